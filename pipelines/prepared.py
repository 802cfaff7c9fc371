"""What `prepare` wrote, as the stages behind it read it. Loads no tokenizer, and no torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.examples import SPLITS
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import DataError

TASK_FILE = "task.json"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared task.

    Attributes:
        task: Its labels and metric.
        splits: Encoded rows of train, dev and test, mapped into memory.
        max_length: Tokens of a row at most.
        stride: Tokens that two windows of one context share.
        tokenizer_digest: Of the tokenizer that encoded it.
        digests: `sha256:...` of each split's content.
    """

    task: TaskSpec
    splits: dict[str, EncodedSplit]
    max_length: int
    stride: int
    tokenizer_digest: str
    digests: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Map what `run` wrote.

        Raises:
            DataError: It is not there, or damaged.
        """
        file = folder / TASK_FILE
        if not file.is_file():
            raise DataError(f"{file}: not there; run `ptv2 prepare --task {folder.name}` first")
        stored = json.loads(file.read_text(encoding="utf-8"))
        return cls(
            task=TaskSpec.from_mapping(stored["task"]),
            splits={split: EncodedSplit.load(folder / split) for split in SPLITS},
            max_length=stored["encoding"]["max_length"],
            stride=stored["encoding"]["stride"],
            tokenizer_digest=stored["encoding"]["tokenizer_digest"],
            digests=stored["digests"],
        )

    def identity(self) -> dict[str, Any]:
        """Return what results depend on: the content, how it is answered, how it was encoded."""
        task = self.task
        return {
            "data": self.digests,
            "task": [task.kind, list(task.labels), task.metric, task.template],
            "encoding": [self.max_length, self.stride, self.tokenizer_digest],
        }


def read_examples(folder: Path, split: str) -> list[dict[str, Any]]:
    """Return the examples of a prepared split as plain values, in the order of its rows."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]
