"""Every form of task and every method, from raw files to a registered prompt that answers."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ptv2_core.artifact import load_manifest
from ptv2_core.data.tasks import METRICS
from ptv2_core.evaluation.predict import Predictor
from tests.registry_parts import empty_registry
from tests.stage_parts import PARAMS, call, intent_rows, write_jsonl, write_params
from tests.tiny import tiny_backbone

ROWS = 24
STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")
PLACES = ("rome", "paris", "oslo", "lima")
NAMES = ("anna", "bob", "carla", "dan")


def number(n: int, chance: random.Random) -> dict[str, Any]:
    first, second = chance.choice(PLACES), chance.choice(PLACES)
    return {"one": f"book {first}", "other": f"find {second}", "score": 5.0 * (first == second)}


def choice(n: int, chance: random.Random) -> dict[str, Any]:
    one, other = chance.sample(PLACES, 2)
    question = ("cause", "effect")[n % 2]
    return {"premise": f"to {one}", "question": question, "choice1": one, "choice2": other,
            "label": 0}  # fmt: skip


def marked(n: int, chance: random.Random) -> dict[str, Any]:
    one, other = chance.choice(PLACES), chance.choice(PLACES)
    return {"word": "book", "sentence1": f"book {one}", "sentence2": f"my book {other}",
            "start1": 0, "end1": 4, "start2": 3, "end2": 7, "label": one == other}  # fmt: skip


def pronoun(n: int, chance: random.Random) -> dict[str, Any]:
    name = chance.choice(NAMES)
    target = {"span1_text": name, "span1_index": 0, "span2_text": "my", "span2_index": 2}
    return {"text": f"{name} call my {chance.choice(PLACES)}", "target": target, "label": n % 2}


def answers(n: int, chance: random.Random) -> dict[str, Any]:
    place = chance.choice(PLACES)
    found = [{"text": other, "label": int(other == place)} for other in PLACES[:2]]
    question = {"question": "find my", "answers": found}
    return {"passage": {"text": f"anna in {place} {n}", "questions": [question]}}


def gap(n: int, chance: random.Random) -> dict[str, Any]:
    one, other = chance.sample(NAMES, 2)
    ends = (len(one) - 1, len(one) + 1 + len(other) - 1)
    entities = [{"start": 0, "end": ends[0]}, {"start": len(one) + 1, "end": ends[1]}]
    query = {"query": "call @placeholder", "answers": [{"text": one}]}
    return {"passage": {"text": f"{one} {other} {n}", "entities": entities}, "qas": [query]}


def roles(n: int, chance: random.Random) -> dict[str, Any]:
    tokens = [chance.choice(NAMES), "call", chance.choice(NAMES), "in", chance.choice(PLACES)]
    return {"tokens": tokens, "predicate": 1, "tags": ["B-ARG0", "B-V", "B-ARG1", "B-AM", "I-AM"]}


def question(n: int, chance: random.Random) -> dict[str, Any]:
    place = chance.choice(PLACES)
    before = " ".join(chance.choices(["anna", "bob", "call", "the"], k=30)) + " in "
    found = {"text": [place], "answer_start": [len(before)]} if n % 3 else []
    return {"id": n, "question": "find my", "context": f"{before}{place}", "answers": found}


@dataclass(frozen=True)
class Case:
    """A kind of task.

    Attributes:
        row: Makes a raw record.
        given: An input as a user writes it.
        inputs: The columns of its model, and those that must be there.
        needed: Of these.
        outputs: The columns of an answer.
        keys: Of an answer on the command line.
        header: What the table of answers shows.
        fields: The fields that the settings must name.
    """

    row: Callable[[int, random.Random], dict[str, Any]]
    given: dict[str, Any]
    inputs: list[str]
    needed: list[str]
    outputs: list[str]
    keys: list[str]
    header: list[str]
    fields: dict[str, Any]


LABEL = {
    "outputs": ["label", "score"],
    "keys": ["label", "probabilities"],
    "header": ["input", "label", "probabilities"],
}
OPTION = {
    "outputs": ["choice", "text", "score"],
    "keys": ["choice", "text", "options", "probabilities"],
    "header": ["input", "choice", "probabilities"],
}
SPANS = ["span1_text", "span1_index", "span2_text", "span2_index"]
CASES: dict[str, Case] = {
    "regression": Case(
        row=number,
        given={"text": "book rome", "text_pair": "find oslo"},
        inputs=["text", "text_pair"],
        needed=["text", "text_pair"],
        outputs=["value"],
        keys=["value"],
        header=["input", "value"],
        fields={"text": "one", "text_pair": "other", "label": "score"},
    ),
    "multiple_choice": Case(
        row=choice,
        given={"text": "to rome", "question": "cause", "choices": ["rome", "lima", "a song"]},
        inputs=["text", "choices", "question", "options", "names"],
        needed=["text"],
        fields={},
        **OPTION,
    ),
    "word_in_context": Case(
        row=marked,
        given={"sentence1": "book rome", "sentence2": "my book lima", "word": "book"},
        inputs=["sentence1", "sentence2", "word", "start1", "end1", "start2", "end2", "text",
                "text_pair"],
        needed=[],
        fields={},
        **LABEL,
    ),
    "coreference": Case(
        row=pronoun,
        given={"text": "anna call my rome", "span1_text": "anna", "span1_index": 0,
               "span2_text": "my", "span2_index": 2},
        inputs=["text", *SPANS, "text_pair"],
        needed=["text"],
        fields={},
        **LABEL,
    ),
    "multirc": Case(
        row=answers,
        given={"paragraph": "anna in rome", "question": "find my", "answer": "rome"},
        inputs=["paragraph", "question", "answer", "text", "text_pair"],
        needed=[],
        fields={},
        **LABEL,
    ),
    "record": Case(
        row=gap,
        given={"passage": "anna bob", "query": "call @placeholder", "entities": ["anna", "bob"]},
        inputs=["passage", "query", "entities", "text", "options", "names"],
        needed=[],
        fields={},
        **OPTION,
    ),
    "srl": Case(
        row=roles,
        given={"tokens": ["anna", "call", "bob", "in", "rome"], "predicate": 1},
        inputs=["tokens", "predicate"],
        needed=["tokens", "predicate"],
        outputs=["tags", "spans"],
        keys=["tokens", "tags", "spans"],
        header=["input", "spans"],
        fields={},
    ),
    "qa": Case(
        row=question,
        given={"question": "find my", "context": "anna in rome"},
        inputs=["question", "context"],
        needed=["question", "context"],
        outputs=["text", "score", "start", "end"],
        keys=["text", "start", "end", "score", "n_best"],
        header=["input", "answer", "characters", "score"],
        fields={},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a task of each kind, named after it, and one for each method."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny_backbone(folder / "backbone")
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
    size = load_manifest(Path(f"pulled/{method}")).size_bytes
    assert (size > (root / "backbone" / "model.safetensors").stat().st_size) == (
        method == "finetune"
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
    model = mlflow.pyfunc.load_model(f"models:/{task}@champion", model_config=None)
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
            expected = answer.get(name)
            if name == "score" and "n_best" not in answer:
                expected = (
                    max(answer["probabilities"].values())
                    if "label" in answer
                    else max(answer["probabilities"])
                )
            elif name in ("tags", "spans"):
                expected = json.dumps(expected)
            is_number = isinstance(expected, float)
            assert value == (pytest.approx(expected, abs=1e-5) if is_number else expected)
