"""What a task is: its kind, fields, labels and metric. Loads no torch."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from ptv2_core.errors import ConfigError

TaskKind = Literal["classification", "tagging"]

NAME_PATTERN = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")

METRICS: dict[TaskKind, str] = {"classification": "accuracy", "tagging": "span_f1"}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task.

    Attributes:
        name: Becomes a path, a stage name and a registered model's name.
        kind: What is predicted: a label a row, or a tag a token.
        labels: Class names, or IOB2 tags with `O` first; their order is that of the logits.
        fields: Which field of a record is what: `text`, `text_pair`, `label`, `tokens`, `tags`.
        metric: The score that chooses; higher is better.
    """

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    fields: Mapping[str, str]
    metric: str

    def to_mapping(self) -> dict[str, Any]:
        """Return the plain values that files store."""
        return {**asdict(self), "labels": list(self.labels), "fields": dict(self.fields)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "TaskSpec":
        """Read what `to_mapping` gave.

        Raises:
            ConfigError: A value is missing or wrong; all problems are named.
        """
        problems: list[tuple[str, str]] = []
        name, kind, labels = values.get("name"), values.get("kind"), values.get("labels")
        if not isinstance(name, str) or not NAME_PATTERN.match(name):
            problems.append(("task.name", f"expected {NAME_PATTERN.pattern}, got {name!r}"))
        if kind not in get_args(TaskKind):
            expected = " | ".join(get_args(TaskKind))
            problems.append(("task.kind", f"expected {expected}, got {kind!r}"))
        if (
            not isinstance(labels, list)
            or len(labels) < 2
            or len(set(map(str, labels))) < len(labels)
        ):
            problems.append(("task.labels", f"expected two or more distinct names, got {labels!r}"))
        fields, metric = values.get("fields"), values.get("metric")
        if not isinstance(fields, Mapping):
            problems.append(("task.fields", f"expected a mapping of field names, got {fields!r}"))
        if metric not in METRICS.values():
            expected = " | ".join(METRICS.values())
            problems.append(("task.metric", f"expected {expected}, got {metric!r}"))
        if problems:
            raise ConfigError(problems)
        return cls(
            name=cast("str", name),
            kind=cast("TaskKind", kind),
            labels=tuple(str(label) for label in cast("list[Any]", labels)),
            fields=dict(cast("Mapping[str, str]", fields)),
            metric=cast("str", metric),
        )
