"""What a task is: its kind, fields, labels and metric. Loads no torch."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from ptv2_core.errors import ConfigError

TaskKind = Literal[
    "classification",
    "regression",
    "multiple_choice",
    "word_in_context",
    "coreference",
    "multirc",
    "record",
    "tagging",
    "srl",
    "qa",
]
Form = Literal["rows", "values", "options", "tokens", "spans"]
"""What a head answers: a class a row, a number a row, one of a group of rows, a class a token, a
stretch of tokens."""

NAME_PATTERN = re.compile(r"^[a-z][a-z0-9_-]{0,62}$")

FORMS: dict[TaskKind, Form] = {
    "classification": "rows",
    "regression": "values",
    "multiple_choice": "options",
    "word_in_context": "rows",
    "coreference": "rows",
    "multirc": "rows",
    "record": "options",
    "tagging": "tokens",
    "srl": "tokens",
    "qa": "spans",
}
METRICS: dict[TaskKind, str] = {
    "classification": "accuracy",
    "regression": "pearson",
    "multiple_choice": "accuracy",
    "word_in_context": "accuracy",
    "coreference": "accuracy",
    "multirc": "f1a",
    "record": "f1",
    "tagging": "span_f1",
    "srl": "span_f1",
    "qa": "f1",
}
# what a head of a form without labels gives for each row or token
NUM_OUTPUTS: dict[Form, int] = {"values": 1, "options": 1, "spans": 2}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task.

    Attributes:
        name: Becomes a path, a stage name and a registered model's name.
        kind: What a record is, and what is predicted.
        labels: Class names, or IOB2 tags with `O` first; their order is that of the logits. None
            for kinds that have no closed set of them.
        fields: Which field of a record is what.
        metric: The score that chooses; higher is better.
        template: How a structured record becomes text; None: the kind has no choice of it.
    """

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    fields: Mapping[str, str]
    metric: str
    template: str | None = None

    @property
    def form(self) -> Form:
        """What its head answers."""
        return FORMS[self.kind]

    @property
    def num_outputs(self) -> int:
        """How many numbers its head gives for each row or token."""
        return NUM_OUTPUTS.get(self.form, len(self.labels))

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
        if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
            problems.append(("task.name", f"expected {NAME_PATTERN.pattern}, got {name!r}"))
        if kind not in get_args(TaskKind):
            expected = " | ".join(get_args(TaskKind))
            problems.append(("task.kind", f"expected {expected}, got {kind!r}"))
        is_closed = FORMS.get(cast("TaskKind", kind), "rows") not in NUM_OUTPUTS
        if (
            not isinstance(labels, list)
            or (is_closed and len(labels) < 2)
            or (not is_closed and labels)
            or len(set(map(str, labels))) < len(labels)
        ):
            wanted = "two or more distinct names" if is_closed else "none"
            problems.append(("task.labels", f"expected {wanted}, got {labels!r}"))
        fields, metric = values.get("fields"), values.get("metric")
        if not isinstance(fields, Mapping):
            problems.append(("task.fields", f"expected a mapping of field names, got {fields!r}"))
        if metric not in METRICS.values():
            expected = " | ".join(dict.fromkeys(METRICS.values()))
            problems.append(("task.metric", f"expected {expected}, got {metric!r}"))
        template = values.get("template")
        if template is not None and not isinstance(template, str):
            problems.append(("task.template", f"expected a name or null, got {template!r}"))
        if problems:
            raise ConfigError(problems)
        return cls(
            name=cast("str", name),
            kind=cast("TaskKind", kind),
            labels=tuple(str(label) for label in cast("list[Any]", labels)),
            fields=dict(cast("Mapping[str, str]", fields)),
            metric=cast("str", metric),
            template=template,
        )
