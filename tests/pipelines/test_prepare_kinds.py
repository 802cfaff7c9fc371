"""prepare, from files as published to encoded splits, for every kind of task."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared, read_examples
from pipelines.settings import load_settings
from pipelines.stages import fetch, prepare
from ptv2_core.data.examples import SPLITS
from ptv2_core.data.tasks import FORMS, METRICS, TaskKind
from ptv2_core.errors import ConfigError, DataError
from tests.tiny import tiny_backbone

ROWS = 12


def copa(n: int) -> dict[str, Any]:
    choices = {"choice1": "go to rome", "choice2": "call anna"}
    return {"premise": f"book {n}", "question": "effect", **choices, "label": n % 2}


def wic(n: int) -> dict[str, Any]:
    places = {"start1": 0, "end1": 4, "start2": 2, "end2": 6}
    row = {"word": "book", "sentence1": f"book {n}", "sentence2": "a book", "label": n % 2 == 0}
    return {**row, **places}


def wsc(n: int) -> dict[str, Any]:
    target = {"span1_text": "anna", "span1_index": 0, "span2_text": "she", "span2_index": 2}
    return {"text": f"anna called; she sang {n}", "target": target, "label": n % 2 == 0}


def multirc(n: int) -> dict[str, Any]:
    answers = [{"text": "rome", "label": 1}, {"text": "oslo", "label": 0}]
    questions = [{"question": "where", "answers": answers}, {"question": "why", "answers": answers}]
    return {"passage": {"text": f"anna {n}", "questions": questions}}


def record(n: int) -> dict[str, Any]:
    queries = {"query": "book @placeholder", "answers": [{"text": "rome"}]}
    entities = [{"start": 0, "end": 3}, {"start": 5, "end": 8}]
    return {"passage": {"text": f"rome oslo {n}", "entities": entities}, "qas": [queries, queries]}


def qa(n: int) -> dict[str, Any]:
    answers = {"text": ["rome"], "answer_start": [5]} if n % 2 else []
    return {"id": n, "question": "where", "context": f"anna rome {n} " * 9, "answers": answers}


RECORDS: dict[TaskKind, Any] = {
    "classification": lambda n: {"text": f"book {n}", "label": "ab"[n % 2]},
    "regression": lambda n: {"text": f"book {n}", "label": n / 2},
    "multiple_choice": copa,
    "word_in_context": wic,
    "coreference": wsc,
    "multirc": multirc,
    "record": record,
    "tagging": lambda n: {"tokens": ["book", str(n)], "tags": ["O", "B-x"]},
    "srl": lambda n: {"tokens": ["book", str(n)], "predicate": 0, "tags": ["B-V", "B-x"]},
    "qa": qa,
}
GIVEN: dict[TaskKind, dict[str, Any]] = {
    "classification": {"text": "text", "label": "label"},
    "regression": {"text": "text", "label": "label"},
    "tagging": {"tokens": "tokens", "tags": "tags"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a task of each kind, named after it."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny_backbone(folder / "backbone")
    for kind, row in RECORDS.items():
        lines = [json.dumps(row(n)) for n in range(ROWS)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines))
    return folder


def run(root: Path, kind: TaskKind, **changes: Any) -> tuple[prepare.PrepareReport, Prepared]:
    """Fetch and prepare one task."""
    own = {"kind": kind, **GIVEN.get(kind, {}), **changes}
    source = {"source": "local", "path": f"{kind}.jsonl"}
    task = {"fetch": source, "prepare": own, "search": {}, "train": {}}
    backbone = {"name": "./backbone", "revision": None, "digest": None}
    shared = {"max_length": 24, "stride": 8, "dev_fraction": 0.25, "test_fraction": 0.25}
    empty: dict[str, Any] = {"search": {}, "train": {}, "evaluate": {}, "register": {}}
    values = {"backbone": backbone, "prepare": shared, **empty, "tasks": {kind: task}}
    (root / "params.yaml").write_text(yaml.safe_dump(values))
    settings = load_settings(root / "params.yaml").task(kind)
    paths = TaskPaths(root=root, task=kind)
    fetch.run(settings, paths)
    report = prepare.run(settings, paths)
    return report, Prepared.load(paths.prepared)


@pytest.fixture(autouse=True)
def _inside(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


@pytest.mark.parametrize("kind", get_args(TaskKind))
def test_every_kind_is_prepared(kind: TaskKind, root: Path) -> None:
    report, prepared = run(root, kind)
    task = prepared.task
    assert (task.kind, task.metric, task.form) == (kind, METRICS[kind], FORMS[kind])
    assert report.labels == len(task.labels)
    assert (prepared.max_length, prepared.stride) == (24, 8)
    assert set(task.fields) >= set(GIVEN.get(kind, {}))
    for split in SPLITS:
        examples = read_examples(root / "data" / "prepared" / kind, split)
        encoded = prepared.splits[split]
        assert len(encoded) == report.splits[split].rows
        assert len(encoded.labels) > 0
        assert encoded.num_groups == report.splits[split].groups
        if kind != "multirc":
            assert encoded.num_groups == len(examples)
        assert report.splits[split].longest <= 24


def test_windows_and_options_are_counted(root: Path) -> None:
    report, prepared = run(root, "qa")
    assert report.splits["train"].windows > 0
    assert len(prepared.splits["train"]) == 6 + report.splits["train"].windows
    report, prepared = run(root, "multiple_choice")
    assert (report.splits["train"].rows, report.splits["train"].groups) == (12, 6)
    assert prepared.task.template == "joined"


def test_no_passage_is_in_two_splits(root: Path) -> None:
    for kind, key in (("multirc", "text"), ("record", "text")):
        run(root, kind)  # type: ignore[arg-type]
        folder = root / "data" / "prepared" / kind
        texts = [{row[key] for row in read_examples(folder, split)} for split in SPLITS]
        assert sum(map(len, texts)) == ROWS == len(set.union(*texts))


def test_train_may_be_cut_and_test_kept(root: Path) -> None:
    report, _ = run(root, "classification", max_rows={"train": 4})
    assert [report.splits[split].rows for split in SPLITS] == [4, 3, 3]
    report, _ = run(root, "multirc", max_rows={"train": 5})
    assert (report.splits["train"].rows, report.splits["train"].groups) == (4, 2)
    assert report.splits["test"].rows == 12


def test_a_query_without_its_answer_among_the_entities_is_refused(root: Path) -> None:
    file = root / "record.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace('"text": "rome"', '"text": "lima"'))
    with pytest.raises(DataError, match=r"query 1: none of the answers \(lima\) is an entity"):
        run(root, "record")
    file.write_text(kept)


@pytest.mark.parametrize(("limit", "is_refused"), [(24, False), (23, True), (10**30, False)])
def test_rows_longer_than_the_tokenizers_limit_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, is_refused: bool
) -> None:
    own = shutil.copytree(root, tmp_path / "own", ignore=shutil.ignore_patterns("data"))
    monkeypatch.chdir(own)
    file = own / "backbone" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "model_max_length": limit}))
    if not is_refused:
        run(own, "classification")
        return
    message = r"prepare\.max_length: expected at most 23, .*model_max_length in .*, got 24; lower"
    with pytest.raises(ConfigError, match=message):
        run(own, "classification")
    assert not (own / "data" / "prepared" / "classification").exists()
