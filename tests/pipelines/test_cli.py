import io
import json
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stage_parts import (
    PARAMS,
    TASKS,
    call,
    change_params,
    files,
    intent_rows,
    make_workspace,
    tree,
    write_jsonl,
    write_params,
)
from tests.tiny import tiny_backbone

STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")
INTENTS = Path("mine") / "intents"
ARRAYS = (
    "chars", "groups", "input_ids", "labels", "note_offsets", "notes", "offsets", "read_at",
    "token_type_ids", "units", "word_index", "word_offsets",
)  # fmt: skip


@dataclass(frozen=True)
class Said:
    """What a command wrote, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture
def ptv2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a command and captures what it says."""

    def run(*arguments: str, stdin: bytes = b"") -> Said:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        code = call(*arguments)
        return Said(code, *capsys.readouterr())

    return run


Ptv2 = Callable[..., Said]


@pytest.fixture(scope="module")
def ready_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("cli") / "fresh")


@pytest.fixture(scope="module")
def finished_once(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all stages of all tasks once."""
    root = tmp_path_factory.mktemp("cli") / "done"
    shutil.copytree(ready_once, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for task in TASKS:
            for stage in STAGES:
                assert call(stage, "--task", task) == 0
    return root


@pytest.fixture
def ready(ready_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace, and the working folder, in which nothing has run."""
    root = tmp_path / "workspace"
    shutil.copytree(ready_once, root)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def finished(finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace, and the working folder, in which every stage has run."""
    root = tmp_path / "workspace"
    # the registry's files stay where they are: its database names them by absolute paths
    shutil.copytree(finished_once, root, ignore=shutil.ignore_patterns("mlartifacts"))
    monkeypatch.chdir(root)
    return root


def refused(ptv2: Ptv2, *arguments: str, stdin: bytes = b"") -> str:
    """Run a command that must refuse: one message, exit code 2, nothing changed; return it."""
    before = tree(Path())
    said = ptv2(*arguments, stdin=stdin)
    assert tree(Path()) == before
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("error: ")
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.err
    return said.err.removeprefix("error: ").removesuffix("\n")


def succeeded(ptv2: Ptv2, *arguments: str, stdin: bytes = b"") -> str:
    """Run a command that must succeed and complain of nothing; return what it says."""
    said = ptv2(*arguments, stdin=stdin)
    assert (said.code, said.err) == (0, "")
    return said.out


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# What each stage leaves behind


@pytest.mark.parametrize(
    ("task", "splits"),
    [
        ("intents", ["dev", "test", "train"]),
        ("pairs", ["train"]),
        ("slots", ["dev", "test", "train"]),
    ],
)
def test_cli_stages_write_exactly_these_files(
    task: str, splits: list[str], finished_once: Path
) -> None:
    raw = [f"{split}.jsonl" for split in splits]
    assert files(finished_once / "data" / "raw" / task) == sorted([*raw, "source.json"])
    prepared = [f"{split}/{array}.npy" for split in ("dev", "test", "train") for array in ARRAYS]
    prepared += ["dev.jsonl", "report.json", "task.json", "test.jsonl", "train.jsonl"]
    assert files(finished_once / "data" / "prepared" / task) == sorted(prepared)
    assert files(finished_once / "prompts" / task) == ["prompt.json", "prompt.safetensors"]
    assert files(finished_once / "results" / task) == [
        "evaluate/confusion.csv",
        "evaluate/metrics.json",
        "evaluate/per_label.csv",
        "evaluate/predictions.jsonl",
        "registered.json",
        "search/best.json",
        "search/search.html",
        "search/trials.csv",
        "train/history.csv",
        "train/layers.csv",
        "train/metrics.json",
    ]


def test_cli_leaves_nothing_else_in_the_workspace(finished_once: Path) -> None:
    assert sorted(path.name for path in finished_once.iterdir()) == [
        ".ptv2", "backbone", "data", "mine", "mlartifacts", "mlflow.db", "params.yaml", "prompts",
        "results",
    ]  # fmt: skip
    studies = {f"studies/{task}.{kind}" for task in ("intents", "pairs") for kind in ("db", "lock")}
    locks = {f"checkpoints/{task}.lock" for task in TASKS}
    assert set(files(finished_once / ".ptv2")) == studies | locks


@pytest.mark.parametrize("task", TASKS)
def test_cli_json_files_have_exactly_these_keys(task: str, finished_once: Path) -> None:
    results = finished_once / "results" / task
    metric = "span_f1" if task == "slots" else "accuracy"
    best = read_json(results / "search" / "best.json")
    assert list(best) == [
        "task", "metric", "value", "trial", "study", "n_trials", "train", "screen",
    ]  # fmt: skip
    if task == "slots":
        assert best == {
            "task": task, "metric": metric, "value": None, "trial": None, "study": None,
            "n_trials": {}, "train": {}, "screen": None,
        }  # fmt: skip
    else:
        assert best["n_trials"] == {"complete": 2, "pruned": 0, "failed": 0}
        assert set(best["train"]) == {"prompt", "learning_rate"}
    train = read_json(results / "train" / "metrics.json")
    assert list(train) == [
        "metric", "dev", "best_epoch", "epochs", "seconds", "peak_memory_bytes",
        "peak_device_memory_bytes", "trainable_parameters", "trainable_share", "precision",
    ]  # fmt: skip
    evaluate = read_json(results / "evaluate" / "metrics.json")
    assert list(evaluate) == [
        "task", "metric", "dev", "test", "test_rows", "test_digest", "prompt_sha256",
        "probe", "probe_dev",
        "test_metrics", "number_format", "answering_digest",
    ]  # fmt: skip
    assert (evaluate["task"], evaluate["metric"]) == (task, metric)
    assert evaluate["test_metrics"][metric] == evaluate["test"]
    assert evaluate["dev"] == pytest.approx(train["dev"])
    registered = read_json(results / "registered.json")
    assert list(registered) == [
        "model", "version", "run_id", "aliases", "tracking_uri", "sha256", "gate",
    ]  # fmt: skip
    assert list(registered["gate"]) == [
        "promoted", "reason", "metric", "score", "margin", "champion_version", "champion_score",
    ]  # fmt: skip
    assert (registered["model"], registered["version"]) == (task, 1)
    assert registered["aliases"] == ["challenger", "champion"]
    manifest = read_json(finished_once / "prompts" / task / "prompt.json")
    assert registered["sha256"] == manifest["sha256"]
    assert manifest["training"]["study"] == best["study"]


def test_cli_tables_have_a_row_each(finished_once: Path) -> None:
    def rows(path: str) -> list[list[str]]:
        lines = (finished_once / "results" / path).read_text().splitlines()
        return [line.split(",") for line in lines]

    header, *epochs = rows("intents/train/history.csv")
    assert header == [
        "epoch", "train_loss", "dev_loss", "dev_score", "learning_rate", "is_best", "seconds",
    ]  # fmt: skip
    assert [row[0] for row in epochs] == ["1", "2"]
    header, *trials = rows("intents/search/trials.csv")
    assert header == ["trial", "state", "value", "learning_rate", "prompt_length"]
    assert [row[:2] for row in trials] == [["0", "complete"], ["1", "complete"]]
    assert rows("slots/search/trials.csv") == [["trial", "state", "value"]]
    assert len(rows("intents/evaluate/confusion.csv")) == 1 + 12
    predictions = (
        finished_once / "results" / "pairs" / "evaluate" / "predictions.jsonl"
    ).read_text()
    assert {tuple(json.loads(line)) for line in predictions.splitlines()} == {
        ("text", "text_pair", "label", "predicted")
    }


def test_cli_evaluate_refuses_a_prompt_of_other_data(ptv2: Ptv2, finished: Path) -> None:
    change_params(finished, {"tasks.intents.prepare.max_rows": 12})
    succeeded(ptv2, "prepare", "--task", "intents")
    said = refused(ptv2, "evaluate", "--task", "intents")
    assert "prompts/intents: trained on other data than data/prepared/intents" in said
    assert said.endswith("run `ptv2 train --task intents` again")


def test_cli_evaluate_refuses_a_prompt_of_another_template(ptv2: Ptv2, finished: Path) -> None:
    change_params(finished, {"tasks.intents.prepare.template": "{text} {mask}"})
    succeeded(ptv2, "prepare", "--task", "intents")
    said = refused(ptv2, "evaluate", "--task", "intents")
    assert "prompts/intents: trained on texts of template None, but the data is of '{text}" in said
    assert said.endswith("run `ptv2 train --task intents` again")


def test_cli_registering_again_makes_no_second_version(ptv2: Ptv2, finished: Path) -> None:
    before = read_json(finished / "results" / "intents" / "registered.json")
    said = succeeded(ptv2, "register", "--task", "intents")
    assert said == (
        "registered intents: version 1 (challenger, champion), as before\n"
        "  version 1 is the champion already\n"
    )
    after = read_json(finished / "results" / "intents" / "registered.json")
    assert {key: value for key, value in after.items() if key != "gate"} == {
        key: value for key, value in before.items() if key != "gate"
    }


def test_cli_a_stage_runs_the_same_from_another_folder(
    ptv2: Ptv2, ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for stage in ("fetch", "prepare", "search", "train", "evaluate"):
        monkeypatch.chdir(elsewhere)
        assert ptv2(stage, "--task", "slots", "--workspace", "../workspace").code == 0
    assert list(elsewhere.iterdir()) == []
    assert (
        read_json(ready / "prompts" / "slots" / "prompt.json")["backbone"]["name"] == "./backbone"
    )


def test_cli_search_says_each_trial_and_goes_on_with_more(ptv2: Ptv2, finished: Path) -> None:
    change_params(finished, {"search.n_trials": 3})
    said = succeeded(ptv2, "search", "--task", "intents").splitlines()
    assert said[0].startswith("search intents: 3/3 trial 2 complete ")
    assert said[1].startswith("searched intents: dev accuracy ")
    assert said[1].endswith("(3 complete)")
    assert len(said) == 2


def test_cli_report_has_a_row_a_task(ptv2: Ptv2, finished: Path) -> None:
    shutil.rmtree(finished / "results" / "pairs")
    said = succeeded(ptv2, "report").splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said if "│" in line]
    assert [row[0] for row in rows] == list(TASKS)
    assert rows[0][-2:] == ["1", "challenger, champion"]
    assert rows[1][2:5] == ["-", "-", "-"]


def test_cli_check_lists_the_tasks(ptv2: Ptv2, ready: Path) -> None:
    before = tree(ready)
    said = succeeded(ptv2, "check")
    assert said == "params.yaml is sound; tasks: intents, pairs, slots\n"
    assert tree(ready) == before


# Pull and predict


def test_cli_pull_brings_two_verified_files(ptv2: Ptv2, finished: Path) -> None:
    said = succeeded(ptv2, "pull", "intents", "--to", "pulled/intents")
    assert said.startswith("pulled intents version 1 to pulled/intents: ")
    assert files(finished / "pulled") == ["intents/prompt.json", "intents/prompt.safetensors"]
    assert tree(finished / "pulled" / "intents") == tree(finished / "prompts" / "intents")
    assert succeeded(ptv2, "pull", "intents:1", "--to", "pulled/intents").startswith("pulled")


def test_cli_predict_answers_texts_as_a_table_and_as_json(ptv2: Ptv2, finished: Path) -> None:
    table = succeeded(ptv2, "predict", "prompts/intents", "book the alarm", "a song")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]
    assert [row[0] for row in rows if row] == ["book the alarm", "a song"]
    lines = succeeded(ptv2, "predict", "prompts/intents", "book the alarm", "--json").splitlines()
    (answer,) = [json.loads(line) for line in lines]
    assert list(answer) == ["label", "probabilities"]
    assert list(answer["probabilities"]) == ["alarm", "flight", "song"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
    assert answer["label"] == rows[3][1]


def test_cli_predict_reads_json_lines(ptv2: Ptv2, finished: Path) -> None:
    given = [{"text": "find rome", "text_pair": "show rome"}, {"text": "a", "text_pair": "b"}]
    stdin = "\n\n".join(json.dumps(row) for row in given).encode()
    lines = succeeded(ptv2, "predict", "prompts/pairs", "-", stdin=stdin).splitlines()
    first, second = (json.loads(line) for line in lines)
    assert first["label"] in ("no", "yes")
    assert set(second["probabilities"]) == {"no", "yes"}
    same = ("predict", "prompts/pairs", "find rome", "--pair", "show rome", "--json")
    again = json.loads(succeeded(ptv2, *same))
    assert again["probabilities"] == pytest.approx(first["probabilities"], abs=1e-5)


def test_cli_predict_tags_words(ptv2: Ptv2, finished: Path) -> None:
    text = "please call anna in paris"
    answer = json.loads(succeeded(ptv2, "predict", "prompts/slots", text, "--json"))
    assert answer == {
        "tokens": ["please", "call", "anna", "in", "paris"],
        "tags": ["O", "O", "B-person", "O", "B-city"],
        "spans": [
            {
                "type": "person", "start": 2, "end": 3, "start_char": 12, "end_char": 16,
                "text": "anna",
            },
            {
                "type": "city", "start": 4, "end": 5, "start_char": 20, "end_char": 25,
                "text": "paris",
            },
        ],
    }  # fmt: skip
    table = succeeded(ptv2, "predict", "prompts/slots", text)
    assert "anna = person" in table
    assert "paris = city" in table


# Data that cannot be used: the message names file and line, and what was there survives


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "found no train split in mine/intents; looked for train.jsonl"),
        (b"", "mine/intents/train.jsonl: the file is empty; put records into it, or remove it"),
        (b"\n\n", "mine/intents/train.jsonl: the file holds no records"),
        (
            b'{"text": "a", "label": "b"}\n{"text": "caf\xe9", "label": "b"}\n',
            "mine/intents/train.jsonl:2: expected UTF-8, but byte 14 of the line is 0xe9",
        ),
        (
            b'{"text": "a", "label": "b"}\n{"text": "a", "label": }\n',
            "mine/intents/train.jsonl:2, column 24: not valid JSON: Expecting value",
        ),
        (b"[1, 2]\n", "mine/intents/train.jsonl:1: expected a JSON object on each line"),
    ],
    ids=["missing", "empty", "blank", "not UTF-8", "broken JSON", "no object"],
)
def test_cli_fetch_refuses(content: bytes | None, message: str, ptv2: Ptv2, finished: Path) -> None:
    file = finished / INTENTS / "train.jsonl"
    file.unlink() if content is None else file.write_bytes(content)
    assert message in refused(ptv2, "fetch", "--task", "intents")
    assert (finished / "data" / "raw" / "intents" / "train.jsonl").is_file()


def test_cli_fetch_refuses_a_folder_that_is_not_there(ptv2: Ptv2, finished: Path) -> None:
    shutil.rmtree(finished / INTENTS)
    said = refused(ptv2, "fetch", "--task", "intents")
    missing = "expected a file or folder at mine/intents, found nothing there"
    assert said == f"{missing}; mend fetch.path or fetch.files"


def _with_row(split: str, row: dict[str, Any]) -> Callable[[Path], None]:
    """Put a row in the second line of a split."""

    def change(root: Path) -> None:
        first, *others = intent_rows(6, seed=9)
        write_jsonl(root / INTENTS / f"{split}.jsonl", [first, row, *others])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _with_row("dev", {"label": "song"}),
            "mine/intents/dev.jsonl:2: no field 'text'; the record has: label",
        ),
        (
            _with_row("test", {"text": "rome", "label": "weather"}),
            "mine/intents/test.jsonl:2: unknown label 'weather' in test; train has: alarm, flight, "
            "song",
        ),
        (
            _with_row("train", {"text": " ", "label": "song"}),
            "mine/intents/train.jsonl:2: field 'text' is empty; remove the record or fill it in",
        ),
        (
            _with_row("train", {"text": ["rome"], "label": "song"}),
            "mine/intents/train.jsonl:2: field 'text' must be text, got ['rome']",
        ),
        (
            _with_row("train", {"text": "rome", "label": None}),
            "mine/intents/train.jsonl:2: field 'label' must be a label's name or number, got None",
        ),
    ],
    ids=["missing field", "unknown label", "empty text", "wrong type", "no label"],
)
def test_cli_prepare_refuses(
    change: Callable[[Path], None], message: str, ptv2: Ptv2, finished: Path
) -> None:
    change(finished)
    succeeded(ptv2, "fetch", "--task", "intents")
    assert refused(ptv2, "prepare", "--task", "intents") == message
    assert (finished / "data" / "prepared" / "intents" / "task.json").is_file()


def _tagged(root: Path, *rows: tuple[list[str], list[str]]) -> None:
    """Make `slots` a task on JSON lines, the same in every split."""
    records = [{"tokens": tokens, "tags": tags} for tokens, tags in rows]
    for split in ("train", "dev", "test"):
        write_jsonl(root / "mine" / "tagged" / f"{split}.jsonl", records)
    change_params(root, {"tasks.slots.fetch.path": "mine/tagged"})


def test_cli_prepare_refuses_tags_that_do_not_match(ptv2: Ptv2, finished: Path) -> None:
    _tagged(finished, (["in", "rome"], ["O", "B-city"]), (["in", "rome"], ["O"]))
    succeeded(ptv2, "fetch", "--task", "slots")
    said = refused(ptv2, "prepare", "--task", "slots").splitlines()
    assert said[0] == "mine/tagged/train.jsonl:2: 2 tokens but 1 tags; each token needs one tag"


def test_cli_prepare_takes_an_inside_tag_that_begins_a_span_and_says_so(
    ptv2: Ptv2, ready: Path
) -> None:
    _tagged(ready, (["in", "rome"], ["O", "I-city"]), (["to", "oslo"], ["O", "B-city"]))
    succeeded(ptv2, "fetch", "--task", "slots")
    said = succeeded(ptv2, "prepare", "--task", "slots").splitlines()
    assert said == [
        "prepared slots: 2 train, 2 dev, 2 test rows, 3 labels",
        "  3 I- tags began a span and were taken as B-, as conlleval does",
    ]
    prepared = ready / "data" / "prepared" / "slots"
    assert read_json(prepared / "report.json")["repaired_tags"] == 3
    first = (prepared / "train.jsonl").read_text().splitlines()[0]
    assert json.loads(first)["tags"] == ["O", "B-city"]


def test_cli_prepare_says_how_many_rows_were_cut(ptv2: Ptv2, ready: Path) -> None:
    change_params(ready, {"prepare.max_length": 4})
    succeeded(ptv2, "fetch", "--task", "pairs")
    said = succeeded(ptv2, "prepare", "--task", "pairs").splitlines()
    assert said[1] == "  40 rows were cut to 4 tokens (prepare.max_length)"


# Settings that cannot be used


def test_cli_names_every_problem_of_params_yaml_at_once(ptv2: Ptv2, finished: Path) -> None:
    changes = {
        "backbone.precison": "fp32",
        "prepare.dev_fraction": 1.5,
        "search.n_trials": "six",
        "train.learning_rate": -1.0,
        "tasks.intents.train.prompt": {"length": 0},
        "tasks.slots.fetch.source": "locale",
    }
    change_params(finished, changes)
    for command in (["check"], ["train", "--task", "pairs"], ["run"], ["report"]):
        said = refused(ptv2, *command).splitlines()
        assert said[0] == "6 problems in the settings:"
        assert [line.split(":")[0].removeprefix("  - ") for line in said[1:]] == list(changes_of())
        assert all("(params.yaml, line " in line for line in said[1:])


def changes_of() -> list[str]:
    return [
        "backbone.precison",
        "prepare.dev_fraction",
        "search.n_trials",
        "train.learning_rate",
        "tasks.intents.train.prompt.length",
        "tasks.slots.fetch.source",
    ]


def test_cli_refuses_a_task_that_is_there_twice(ptv2: Ptv2, finished: Path) -> None:
    text = (finished / "params.yaml").read_text()
    (finished / "params.yaml").write_text(text.replace("\n  pairs:\n", "\n  intents:\n"))
    said = refused(ptv2, "fetch", "--task", "intents")
    assert said.startswith("tasks.intents: expected each key once, got 'intents' on lines ")
    assert said.endswith(" of params.yaml")


def test_cli_refuses_a_name_that_cannot_be_a_path(ptv2: Ptv2, ready: Path) -> None:
    params = {**PARAMS, "tasks": {"../Up": PARAMS["tasks"]["intents"]}}
    write_params(ready, params)
    said = refused(ptv2, "fetch", "--task", "../Up")
    assert said.startswith("tasks.../Up: expected a name of a lower-case letter")


def test_cli_names_the_tasks_there_are(ptv2: Ptv2, finished: Path) -> None:
    expected = (
        "expected a task of params.yaml (intents, pairs, slots), got 'intent'; did you mean "
        "'intents'?"
    )
    for stage in STAGES:
        assert refused(ptv2, stage, "--task", "intent") == expected
    assert refused(ptv2, "run", "--task", "intent") == expected


def test_cli_without_params_yaml_says_where_to_run(
    ptv2: Ptv2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = "expected the settings at params.yaml, found no such file; run in the folder of"
    for command in (["check"], ["report"], ["run"], ["fetch", "--task", "intents"]):
        assert refused(ptv2, *command).startswith(expected)
    said = refused(ptv2, "fetch", "--task", "intents", "--workspace", "nowhere")
    assert said.startswith("expected the settings at nowhere/params.yaml, found no such file")


def test_cli_without_its_options_says_which(ptv2: Ptv2, ready: Path) -> None:
    before = tree(ready)
    said = ptv2("train")
    assert said.code == 2
    assert "Missing option '--task'" in said.err
    assert tree(ready) == before


@pytest.mark.parametrize(
    ("stage", "changes", "key"),
    [
        (
            "search",
            {"search.space.prompt_length": [2, 60]},
            "search.space.prompt_length",
        ),
        (
            "search",
            {"search.space.prompt_length": None, "train.prompt.length": 60},
            "train.prompt.length",
        ),
        (
            "search",
            {
                "search.space.prompt_length": [2, 60],
                "search.space.prompt_layers": [2, "all"],
                "train.prompt.layers": 2,
            },
            "search.space.prompt_length",
        ),
        ("train", {"train.prompt.length": 60}, "train.prompt.length"),
    ],
)
def test_cli_refuses_a_prompt_longer_than_the_positions_allow(
    stage: str, changes: dict[str, Any], key: str, ptv2: Ptv2, finished: Path
) -> None:
    change_params(finished, changes)
    if stage == "train":
        best = finished / "results" / "intents" / "search" / "best.json"
        best.write_text(json.dumps({**read_json(best), "train": {}}))
    said = refused(ptv2, stage, "--task", "intents")
    assert said.startswith(f"{key}: 60 prompt positions and ")
    assert "but ./backbone has 64; expected a length of at most 5" in said


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"search.space.prompt_layers": ["all", 3, 4]}, "search.space.prompt_layers"),
        (
            {"search.screen": {"layers": 4, "n_trials": 2, "keep": 1}},
            "search.screen.layers",
        ),
    ],
)
def test_cli_search_refuses_layers_that_the_backbone_has_not(
    changes: dict[str, Any], key: str, ptv2: Ptv2, finished: Path
) -> None:
    change_params(finished, changes)
    assert refused(ptv2, "search", "--task", "intents") == (
        f"{key}: expected a number of top layers from 1 to 3, which is what the backbone has; got 4"
    )


# The backbone


@pytest.mark.parametrize("stage", ["prepare", "search", "train", "evaluate"])
def test_cli_refuses_a_backbone_that_is_not_there(stage: str, ptv2: Ptv2, finished: Path) -> None:
    change_params(finished, {"backbone.name": "./elsewhere"})
    said = refused(ptv2, stage, "--task", "intents")
    assert said.startswith("backbone.name: './elsewhere' is not there; expected one of ")


@pytest.mark.parametrize("stage", ["search", "train", "evaluate"])
def test_cli_refuses_a_backbone_with_another_digest(stage: str, ptv2: Ptv2, finished: Path) -> None:
    wanted = f"sha256:{'0' * 64}"
    change_params(finished, {"backbone.digest": wanted})
    said = refused(ptv2, stage, "--task", "intents")
    assert said.startswith(f"backbone.digest: expected {wanted}, got sha256:")


def test_cli_refuses_a_prompt_of_another_backbone(ptv2: Ptv2, finished: Path) -> None:
    tiny_backbone(finished / "backbone", seed=1)
    said = refused(ptv2, "evaluate", "--task", "intents")
    assert said.startswith("prompts/intents: expected backbone sha256:")
    assert said.endswith("run `ptv2 train --task intents` again")
    said = refused(ptv2, "predict", "prompts/intents", "a song")
    assert said.startswith("backbone.digest: expected sha256:")


def test_cli_refuses_data_of_another_tokenizer(ptv2: Ptv2, finished: Path) -> None:
    file = finished / "backbone" / "tokenizer.json"
    file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))
    for stage in ("search", "train", "evaluate"):
        said = refused(ptv2, stage, "--task", "intents")
        assert said.startswith("data/prepared/intents: encoded with tokenizer sha256:")
        assert said.endswith("run `ptv2 prepare --task intents` again")


# The order of stages


@pytest.mark.parametrize(
    ("stage", "absent", "first"),
    [
        ("prepare", "data/raw/intents", "fetch"),
        ("search", "data/prepared/intents", "prepare"),
        ("train", "data/prepared/intents", "prepare"),
        ("train", "results/intents/search", "search"),
        ("evaluate", "data/prepared/intents", "prepare"),
        ("evaluate", "prompts/intents", "train"),
        ("register", "data/prepared/intents", "prepare"),
        ("register", "prompts/intents", "train"),
        ("register", "results/intents/train", "train"),
        ("register", "results/intents/evaluate", "evaluate"),
    ],
)
def test_cli_a_stage_before_its_upstream_says_what_to_run(
    stage: str, absent: str, first: str, ptv2: Ptv2, finished: Path
) -> None:
    shutil.rmtree(finished / absent)
    said = refused(ptv2, stage, "--task", "intents")
    assert absent in said
    assert f"`ptv2 {first} --task intents`" in said


# The registry


def _closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.timeout(60)
def test_cli_says_within_seconds_that_the_registry_does_not_answer(
    ptv2: Ptv2, finished: Path
) -> None:
    uri = f"http://127.0.0.1:{_closed_port()}"
    expected = f"the registry {uri} does not answer: "
    change_params(finished, {"register.tracking_uri": uri})
    assert refused(ptv2, "register", "--task", "intents").startswith(expected)
    assert refused(ptv2, "pull", "intents", "--to", "pulled").startswith(expected)
    said = refused(ptv2, "pull", "intents", "--to", "p", "--tracking-uri", uri)
    assert "Start its server, check the network, or mend register.tracking_uri" in said


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("weather", "no prompt for the task 'weather' in the registry "),
        ("intents@best", "intents@best: the task 'intents' has no alias 'best'; there is: "),
        ("intents:7", "intents:7: the task 'intents' has no version 7; there is: 1."),
        ("Intents!", "expected TASK, TASK@ALIAS or TASK:VERSION"),
    ],
)
def test_cli_pull_refuses_what_is_not_registered(
    reference: str, message: str, ptv2: Ptv2, finished: Path
) -> None:
    assert refused(ptv2, "pull", reference, "--to", "pulled").startswith(message)


def test_cli_pull_refuses_a_folder_of_something_else(ptv2: Ptv2, finished: Path) -> None:
    said = refused(ptv2, "pull", "intents", "--to", "mine/intents")
    assert said.startswith("mine/intents is not replaced: expected nothing but prompt.safetensors")
    assert "dev.jsonl, test.jsonl, train.jsonl" in said
    said = refused(ptv2, "pull", "intents", "--to", "params.yaml")
    assert said == "params.yaml is not replaced: expected a folder or nothing, found a file."


def test_cli_pull_without_a_registry_makes_none(ptv2: Ptv2, ready: Path) -> None:
    said = refused(ptv2, "pull", "intents", "--to", "pulled")
    assert said.startswith("no registry: there is no database ")


# Prompts and inputs that cannot be used


def test_cli_predict_refuses_a_damaged_prompt(ptv2: Ptv2, finished: Path) -> None:
    weights = finished / "prompts" / "intents" / "prompt.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    said = refused(ptv2, "predict", "prompts/intents", "a song")
    assert said.startswith("prompts/intents/prompt.safetensors: expected sha256 ")
    assert said.endswith("Get the prompt again.")
    assert "expected sha256" in refused(ptv2, "evaluate", "--task", "intents")
    assert "expected sha256" in refused(ptv2, "register", "--task", "intents")
    weights.write_bytes(good)
    manifest = finished / "prompts" / "intents" / "prompt.json"
    manifest.write_text(manifest.read_text()[:100])
    said = refused(ptv2, "predict", "prompts/intents", "a song")
    assert said.startswith("prompts/intents/prompt.json: not valid JSON ")
    said = refused(ptv2, "predict", "prompts/nothing", "a song")
    assert said.startswith("prompts/nothing/prompt.json: not there; a prompt is a folder with ")


def test_cli_predict_names_every_broken_line(ptv2: Ptv2, finished: Path) -> None:
    stdin = b'{"text": "a song"}\n{"text": \n\n[1]\n{"text": "caf\xe9"}\n'
    said = refused(ptv2, "predict", "prompts/intents", "-", stdin=stdin).splitlines()
    assert said[0] == "3 problems in the data:"
    assert [line[: line.index(":")] for line in said[1:]] == [
        "  - standard input, line 2",
        "  - standard input, line 4",
        "  - standard input, line 5",
    ]
    said_of_nothing = refused(ptv2, "predict", "prompts/intents", "-", stdin=b"\n")
    assert said_of_nothing == "standard input is empty; expected JSON lines with a text each"


@pytest.mark.parametrize(
    ("prompt", "stdin", "message"),
    [
        ("intents", b'{"texts": "a"}', "input 1: expected a `text`, got {'texts': 'a'}"),
        ("intents", b'{"text": "a"}\n{"text": " "}', "input 2: expected a `text`, got {'text'"),
        ("pairs", b'{"text": "a"}', "input 1: task pairs also needs a `text_pair`, got None"),
        ("slots", b'{"tokens": ["a", 1]}', "input 1: expected `tokens` (texts) or a `text`, got"),
        ("slots", b'{"tokens": []}', "input 1: expected `tokens` (texts) or a `text`, got"),
    ],
)
def test_cli_predict_refuses_inputs_of_another_form(
    prompt: str, stdin: bytes, message: str, ptv2: Ptv2, finished: Path
) -> None:
    said = refused(ptv2, "predict", f"prompts/{prompt}", "-", stdin=stdin)
    assert said.startswith(message)


def test_cli_predict_wants_a_pair_for_each_text(ptv2: Ptv2, finished: Path) -> None:
    said = refused(ptv2, "predict", "prompts/pairs", "a", "b", "--pair", "c")
    assert said == "expected a --pair for each of 2 texts, got 1"


def test_cli_predict_takes_json_objects_as_options(ptv2: Ptv2, finished: Path) -> None:
    given = ["--input", '{"text": "a song"}', "--input", '{"text": "the alarm"}']
    lines = succeeded(ptv2, "predict", "prompts/intents", *given, "--json").splitlines()
    texts = ("predict", "prompts/intents", "a song", "the alarm", "--json")
    assert lines == succeeded(ptv2, *texts).splitlines()
    said = refused(ptv2, "predict", "prompts/intents", "a song", *given)
    assert said == "expected texts or --input, got both"
    broken = ("--input", "{}", "--input", "{", "--input", "[1]")
    said = refused(ptv2, "predict", "prompts/intents", *broken)
    assert [line[: line.index(":")] for line in said.splitlines()[1:]] == [
        "  - --input 2",
        "  - --input 3",
    ]
    said = refused(ptv2, "predict", "prompts/intents")
    assert said.startswith("nothing to answer: expected a text, --input with a JSON object, or -")


def test_cli_an_interrupt_says_that_it_can_go_on(
    ptv2: Ptv2, ready: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.stages.fetch.run", interrupt)
    said = ptv2("fetch", "--task", "intents")
    assert (said.code, said.out) == (130, "")
    assert said.err == "interrupted; the same command goes on from what is finished\n"
