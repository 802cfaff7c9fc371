"""The table at the end of a run: what was trained, how well, and where it is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.paths import TaskPaths

HEADERS = (
    "task",
    "metric",
    "dev",
    "test",
    "probe",
    "method",
    "prompt length",
    "learning rate",
    "share",
    "bytes",
    "version",
    "alias",
)
LEFT = ("task", "metric", "method", "alias")
"""The headers of columns of words."""

ABSENT = "-"
PROMPTED = ("ptv2", "prompt_tuning")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One task's results; a value that is not there yet is none.

    Attributes:
        task: The task.
        metric: What is scored.
        dev: The prompt's score on dev.
        test: On the held-out rows.
        probe: A linear probe on the bare backbone, on the same rows.
        method: What was trained beside the head.
        prompt_length: P; none where the method trains no prompt.
        learning_rate: Peak.
        share: Of what was tuned beside the head in the backbone's parameters.
        size_bytes: Of the artifact.
        version: In the registry.
        aliases: In the registry.
    """

    task: str
    metric: str | None
    dev: float | None
    test: float | None
    probe: float | None
    method: str | None
    prompt_length: int | None
    learning_rate: float | None
    share: float | None
    size_bytes: int | None
    version: int | None
    aliases: tuple[str, ...]

    def cells(self) -> tuple[str, ...]:
        """Return the texts of a table's row, in the order of `HEADERS`."""
        return (
            self.task,
            self.metric or ABSENT,
            _percent(self.dev),
            _percent(self.test),
            _percent(self.probe),
            self.method or ABSENT,
            ABSENT if self.prompt_length is None else str(self.prompt_length),
            ABSENT if self.learning_rate is None else f"{self.learning_rate:.2g}",
            ABSENT if self.share is None else f"{100 * self.share:.2f} %",
            ABSENT if self.size_bytes is None else f"{self.size_bytes:,}",
            ABSENT if self.version is None else str(self.version),
            ", ".join(self.aliases) or ABSENT,
        )


def read_row(root: Path, task: str) -> Row:
    """Collect what the stages of one task have written so far."""
    paths = TaskPaths(root=root, task=task)
    train = _read(paths.train / "metrics.json")
    scores = _read(paths.evaluate / "metrics.json")
    manifest = _read(paths.prompt / "prompt.json")
    registered = _read(paths.registered)
    # a prompt of an older version does not say its method, which was this one
    method = manifest.get("method", "ptv2") if manifest else None
    files = [file for file in paths.prompt.glob("prompt.*") if file.is_file()]
    return Row(
        task=task,
        metric=scores.get("metric", train.get("metric")),
        dev=scores.get("dev", train.get("dev")),
        test=scores.get("test"),
        probe=scores.get("probe"),
        method=method,
        prompt_length=manifest.get("prompt", {}).get("length") if method in PROMPTED else None,
        learning_rate=manifest.get("training", {}).get("learning_rate"),
        share=train.get("trainable_share"),
        size_bytes=sum(file.stat().st_size for file in files) or None,
        version=registered.get("version"),
        aliases=tuple(registered.get("aliases", ())),
    )


def read_rows(root: Path, tasks: Sequence[str] | None = None) -> list[Row]:
    """Return a row a task; without names, for every task that has results."""
    if tasks is None:
        tasks = sorted(folder.name for folder in (root / "results").glob("*") if folder.is_dir())
    return [read_row(root, task) for task in tasks]


def markdown_table(root: Path, tasks: Sequence[str] | None = None) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEADERS, ["---"] * len(HEADERS), *(row.cells() for row in read_rows(root, tasks))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _percent(score: float | None) -> str:
    return ABSENT if score is None else f"{100 * score:.1f}"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return values
