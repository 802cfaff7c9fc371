"""Every form of task and every method, from raw files to a registered prompt that answers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ptv2_core.artifact import load_manifest
from ptv2_core.data.tasks import METRICS
from ptv2_core.evaluation.predict import Predictor
from tests.pipelines.kind_cases import CASES
from tests.registry_parts import empty_registry
from tests.stage_parts import PARAMS, call, intent_rows, write_jsonl, write_params
from tests.tiny import tiny_language_model

ROWS = 24
STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a task of each kind, named after it, and one for each method."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny_language_model(folder / "backbone")
    (folder / "mlflow.db").write_bytes(empty_registry())
    tasks: dict[str, Any] = {}
    for kind, case in CASES.items():
        chance = random.Random(kind)
        write_jsonl(folder / f"{kind}.jsonl", [case.row(n, chance) for n in range(ROWS)])
        tasks[kind] = _task(f"{kind}.jsonl", kind, case.fields)
    write_jsonl(folder / "intents.jsonl", intent_rows(ROWS, seed=0))
    fields = {"text": "text", "label": "label"}
    rates = {"probe": 1e-2, "finetune": 1e-3, "prompt_tuning": 1e-2}
    for method, rate in rates.items():
        train = {"method": method, "learning_rate": rate}
        tasks[method] = _task("intents.jsonl", "classification", fields, train)
    # a verbalizer reads the language model's own transform of a backbone that is tuned
    words = {"alarm": "alarm", "flight": "flight", "song": "song"}
    tasks["verbalizer"] = _task(
        "intents.jsonl",
        "classification",
        {**fields, "template": "{text} at {mask}"},
        {
            "method": "finetune",
            "learning_rate": 1e-3,
            "head": {"type": "verbalizer", "label_words": words},
        },
    )
    shared = {"max_length": 24, "stride": 8, "dev_fraction": 0.25, "test_fraction": 0.25}
    search = {**PARAMS["search"], "n_trials": 0}
    train = {"prompt": {"length": 3}, "epochs": 1, "batch_size": 8}
    params = {**PARAMS, "prepare": shared, "search": search, "train": train, "tasks": tasks}
    write_params(folder, params)
    return folder


def _task(
    file: str, kind: str, fields: dict[str, Any], train: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {
        "fetch": {"source": "local", "path": file},
        "prepare": {"kind": kind, **fields},
        "search": {},
        "train": train or {},
    }


@pytest.fixture(autouse=True)
def _inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def chain(task: str, *, until: str = "register") -> None:
    """Run the stages of a task."""
    for stage in STAGES[: STAGES.index(until) + 1]:
        assert call(stage, "--task", task) == 0


def read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def client(root: Path) -> Any:
    from mlflow import MlflowClient

    uri = f"sqlite:///{root}/mlflow.db"
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def stored(root: Path, task: str) -> Path:
    """Return the folder of the first version's files."""
    uri = client(root).get_model_version_download_uri(task, "1")
    return Path(uri.removeprefix("file://"))


def signature(root: Path, task: str) -> Any:
    from mlflow.models import Model

    return Model.load(str(stored(root, task))).signature


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert call("predict", *arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", CASES)
def test_a_task_of_each_kind_goes_from_files_to_a_registered_prompt_that_answers(
    kind: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, metric = CASES[kind], METRICS[kind]  # type: ignore[index]
    chain(kind)
    scores = read_json(f"results/{kind}/evaluate/metrics.json")
    assert scores["metric"] == metric
    assert scores["test_metrics"][metric] == scores["test"]
    rows = Path(f"data/prepared/{kind}/test.jsonl").read_text().splitlines()
    assert scores["test_rows"] == len(rows)
    assert (scores["probe"] is None) == (kind == "qa")
    version = client(root).get_model_version(kind, "1")
    assert (version.tags["task_kind"], version.tags["ptv2.method"]) == (kind, "ptv2")
    run = client(root).get_run(version.run_id)
    assert run.data.tags["task_kind"] == kind
    for name, value in scores["test_metrics"].items():
        assert run.data.metrics[f"test_{name}"] == pytest.approx(value)
    assert version.description.startswith(f"Test {metric} {scores['test']:.4f} ({len(rows)} rows)")
    columns = signature(root, kind)
    assert columns.inputs.input_names() == case.inputs
    assert columns.inputs.required_input_names() == case.needed
    assert columns.outputs.input_names() == case.outputs
    assert call("pull", kind, "--to", f"pulled/{kind}") == 0
    given = json.dumps(case.given)
    answer = json.loads(predicted(capsys, f"pulled/{kind}", "--input", given, "--json"))
    assert list(answer) == case.keys
    table = predicted(capsys, f"pulled/{kind}", "--input", given).splitlines()
    assert [cell.strip() for cell in table[1].split("┃")[1:-1]] == case.header


@pytest.mark.parametrize(
    ("method", "says", "made"),
    [
        ("probe", "a head alone for the frozen backbone", "a head alone, no prompt, on"),
        ("finetune", "is a fine-tuned model of", "fine-tuned from `./backbone`, a backbone of its"),
    ],
)
def test_a_method_without_a_prompt_is_registered_as_what_it_is(
    method: str, says: str, made: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain(method)
    found = client(root)
    version = found.get_model_version(method, "1")
    assert version.tags["ptv2.method"] == method
    assert made in version.description
    assert says in found.get_registered_model(method).description
    run = found.get_run(version.run_id)
    assert run.data.tags["ptv2.method"] == run.data.params["method"] == method
    assert not [name for name in run.data.params if name.startswith("prompt.")]
    (model,) = found.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{version.run_id}'"
    )
    assert model.model_type == {"probe": "ptv2-head", "finetune": "ptv2-finetuned"}[method]
    # the pull has verified the golden inputs
    assert call("pull", method, "--to", f"pulled/{method}") == 0
    for name in ("prompt.json", "prompt.safetensors"):
        assert (
            Path(f"pulled/{method}/{name}").read_bytes()
            == Path(f"prompts/{method}/{name}").read_bytes()
        )
    answer = json.loads(predicted(capsys, f"pulled/{method}", "a song", "--json"))
    assert list(answer["probabilities"]) == ["alarm", "flight", "song"]
    weights = load_file(f"pulled/{method}/prompt.safetensors")
    assert any(name.startswith("backbone.") for name in weights) == (method == "finetune")


def test_a_fine_tuned_verbalizer_is_pulled_with_the_language_models_transform(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain("verbalizer")
    assert call("pull", "verbalizer", "--to", "pulled/verbalizer") == 0
    manifest = load_manifest(Path("pulled/verbalizer"))
    assert (manifest.method, manifest.head.type) == ("finetune", "verbalizer")
    run = client(root).get_run(client(root).get_model_version("verbalizer", "1").run_id)
    words = json.loads(run.data.params["head.label_words"])
    assert words == {"alarm": "alarm", "flight": "flight", "song": "song"}
    answer = json.loads(predicted(capsys, "pulled/verbalizer", "a song", "--json"))
    assert list(answer["probabilities"]) == ["alarm", "flight", "song"]


def test_a_text_does_not_suffice_where_an_input_has_fields(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, fields in (
        ("word_in_context", "`sentence1`, `sentence2` and `word`"),
        ("multiple_choice", "`text` and `choices`"),
        ("qa", "`question` and `context`"),
    ):
        needs(kind)
        capsys.readouterr()
        assert call("predict", f"prompts/{kind}", "a text") == 2
        assert capsys.readouterr().err == (
            f"error: a text does not suffice for {kind}, a task of kind {kind}: expected JSON "
            f"objects with {fields}, each with --input or, with -, on a line of standard input\n"
        )
    assert call("predict", "prompts/qa", "--input", '{"question": "find my"}') == 2
    assert "error: input 1: no field 'context'" in capsys.readouterr().err


def test_table_shows_what_was_asked(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs("srl")
    given = json.dumps(CASES["srl"].given)
    shown = predicted(capsys, "prompts/srl", "--input", given)
    assert "anna call bob in rome" in shown
    assert "predicate: 1" in shown
    needs("multiple_choice")
    given = json.dumps(CASES["multiple_choice"].given)
    assert "choices: rome | lima | a song" in predicted(
        capsys, "prompts/multiple_choice", "--input", given
    )


def test_input_prompt_tuning_is_compared_and_not_registered(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chain("prompt_tuning", until="evaluate")
    capsys.readouterr()
    assert call("register", "--task", "prompt_tuning") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: train.method: prompt_tuning is there to compare with")
    assert said.err.endswith("expected ptv2, probe or finetune\n")
    assert not Path("results/prompt_tuning/registered.json").exists()
    assert client(root).search_model_versions("name = 'prompt_tuning'") == []
    # it answers all the same
    answer = json.loads(predicted(capsys, "prompts/prompt_tuning", "a song", "--json"))
    assert set(answer) == {"label", "probabilities"}


# What the answers are compared with


def rows_of(file: str) -> list[list[str]]:
    return [line.split(",") for line in Path(file).read_text(encoding="utf-8").splitlines()]


def test_tables_of_answers_without_names_say_right_and_wrong(root: Path) -> None:
    for kind in ("multiple_choice", "record", "qa"):
        needs(kind)
        scores = read_json(f"results/{kind}/evaluate/metrics.json")["test_metrics"]
        header, *pairs = rows_of(f"results/{kind}/evaluate/confusion.csv")
        assert header == ["actual", "predicted"]
        right = sum(actual == answer for actual, answer in pairs) / len(pairs)
        assert right == pytest.approx(scores["em" if kind == "qa" else "accuracy"])
        actual = {pair[0] for pair in pairs}
        assert actual == ({"right", "no answer"} if kind == "qa" else {"right"})


def test_tables_of_numbers_are_empty(root: Path) -> None:
    needs("regression")
    assert rows_of("results/regression/evaluate/confusion.csv") == [["actual", "predicted"]]
    header = ["label", "f1", "precision", "recall", "gold", "predicted"]
    assert rows_of("results/regression/evaluate/per_label.csv") == [header]


def needs(task: str) -> None:
    """Run the stages of a task if no test before this one has."""
    if not Path(f"results/{task}/registered.json").exists():
        chain(task)


def test_report_says_each_method_and_each_metric(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in ("regression", "finetune"):
        needs(task)
    capsys.readouterr()
    assert call("report") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {}
    for line in lines:
        cells = [cell.strip() for cell in line.split("\u2502")[1:-1]]
        if cells:
            rows[cells[0]] = cells[1:]
    scores = read_json("results/regression/evaluate/metrics.json")
    shown = [f"{100 * scores[key]:.1f}" for key in ("dev", "test", "probe")]
    assert rows["regression"][:6] == ["pearson", *shown, "ptv2", "3"]
    assert rows["finetune"][4:6] == ["finetune", "-"]
    assert rows["finetune"][7] == "100.00 %"


# As models of MLflow


@pytest.mark.slow
def test_versions_of_all_kinds_answer_as_models_of_mlflow(root: Path, tmp_path: Path) -> None:
    tasks = [*CASES, "finetune"]
    for task in tasks:
        needs(task)
    inputs = {task: case.given for task, case in CASES.items()} | {"finetune": {"text": "a song"}}
    script = """
import json, mlflow, pandas, sys
found = {}
for task, given in json.load(sys.stdin).items():
    model = mlflow.pyfunc.load_model(f"models:/{task}@champion")
    answers = model.predict(pandas.DataFrame([given]))
    example = model.predict(model.input_example)
    names = model.metadata.signature.outputs.input_names()
    assert list(answers.columns) == list(example.columns) == names, (task, answers.columns)
    found[task] = [answers.to_dict("records")[0], len(example)]
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        input=json.dumps(inputs),
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{root}/mlflow.db"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for task, given in inputs.items():
        (answer,) = Predictor.load(Path(f"prompts/{task}")).predict([given])
        got, rows = found[task]
        assert rows == 3
        for name, value in got.items():
            expected = cell(answer, name)
            is_number = isinstance(expected, float)
            assert value == (pytest.approx(expected, abs=1e-5) if is_number else expected)


def cell(answer: dict[str, Any], name: str) -> Any:
    """Return what a model's column holds of an answer."""
    if name in ("tags", "spans"):
        return json.dumps(answer[name])
    if name in answer:
        return answer[name]
    shares = answer["probabilities"]
    return shares[answer["label"]] if "label" in answer else shares[answer["choice"]]
