"""The benchmark data sets, read in place: `PTV2_BENCH_DATA`, or `../shared/data` of the project."""

import json
import os
from pathlib import Path

from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import (
    Record,
    carve_splits,
    collect_labels,
    cut_rows,
)
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import parse_records
from ptv2_core.data.tasks import METRICS, TaskKind, TaskSpec
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer

MAX_LENGTH = 128
PAIR = Fields(text="premise", text_pair="hypothesis", label="label")
TAGS = Fields(tokens="tokens", tags="tags")
# data set -> kind, fields, and the file of each split; test is the official validation where
# there are no official test labels
SETS: dict[str, tuple[TaskKind, Fields, dict[str, str]]] = {
    "rte": ("classification", PAIR, {"train": "train", "test": "validation"}),
    "cb": ("classification", PAIR, {"train": "train", "test": "validation"}),
    "snips": ("tagging", TAGS, {"train": "train", "dev": "validation", "test": "test"}),
}


def data_folder() -> Path:
    """Return where the data sets are expected; the folder may not exist."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("PTV2_BENCH_DATA") or beside)


def load_task(
    name: str, *, backbone: str, max_rows: int | None = None
) -> tuple[TaskSpec, dict[str, EncodedSplit]]:
    """Return a task and its encoded splits.

    Args:
        name: A key of `SETS`.
        backbone: Whose tokenizer encodes.
        max_rows: Of train at most, chosen by a fixed seed.
    """
    kind, fields, files = SETS[name]
    splits = {}
    for split, stem in files.items():
        file = data_folder() / name / f"{stem}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
        records = [
            Record(where=f"{file.name}:{number}", values=json.loads(line))
            for number, line in enumerate(lines, start=1)
        ]
        splits[split] = parse_records(records, kind=kind, fields=fields)[0]
    splits = carve_splits(splits, dev_fraction=0.1, test_fraction=0.1, seed=42)
    if max_rows is not None:
        splits["train"] = cut_rows(splits["train"], max_rows, seed=42)
    labels = collect_labels(splits, kind=kind)
    task = TaskSpec(
        name=name, kind=kind, labels=labels, fields=fields.named(), metric=METRICS[kind]
    )
    tokenizer = load_tokenizer(locate(backbone), words=kind == "tagging")
    encoded = {
        split: encode_examples(examples, tokenizer, task=task, max_length=MAX_LENGTH)[0]
        for split, examples in splits.items()
    }
    return task, encoded
