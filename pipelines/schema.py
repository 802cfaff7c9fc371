"""The shape of params.yaml: one frozen model a section, each key with its unit and range.

The description of a field completes the sentence "expected ..., got ...". `conflicts` holds the
checks that need two keys at once. The `train` section is not here: its shape is
`ptv2_core.config.TrainConfig`.
"""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from ptv2_core.config import Device, Precision, Reparameterization
from ptv2_core.data.examples import Split
from ptv2_core.data.fields import KIND_FIELDS, TEMPLATES, Fields, fields_of
from ptv2_core.data.tasks import FORMS, NUM_OUTPUTS, TaskKind

COMMIT_PATTERN = r"^[0-9a-f]{40}$"

Conflicts = list[tuple[str, str]]
SourceKind = Literal["demo", "local", "hub"]
FileFormat = Literal["auto", "jsonl", "csv", "tsv", "parquet", "conll", "squad", "conllu", "srl"]


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _label_texts(value: Any) -> Any:
    """Turn the labels `[0, 1]` and `[true, false]` into the texts that their JSON has."""
    if not isinstance(value, list):
        return value
    return tuple(str(label).lower() if isinstance(label, bool | int) else label for label in value)


def _names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _tuple(value)


Text = Annotated[str, Field(min_length=1, pattern=r"\S")]
Whole = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
SEED_WORDS = "a whole number from 0 to 4294967295"
FIELD_WORDS = "the name of a field of the records, dots for nested ones"
ROWS_WORDS = "null or a whole number of rows >= 1"
FieldName = Annotated[Text | None, Field(description=FIELD_WORDS)]


class Section(BaseModel):
    """A section of params.yaml: unknown keys are refused, and no text passes for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def conflicts(self) -> Conflicts:
        """Return what is wrong between keys that are each right, as `(dotted path, message)`."""
        return []


class BackboneSettings(Section):
    """The frozen encoder that every task shares."""

    name: Text = Field(description="a packaged model, a local folder or a hub name")
    revision: Annotated[str, Field(pattern=COMMIT_PATTERN)] | None = Field(
        description="null or a commit of 40 hexadecimal digits"
    )
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = Field(
        description='null or "sha256:" and 64 hexadecimal digits'
    )
    precision: Precision = Field(
        default="auto", description="auto, fp32, bf16, or on CUDA int8 or nf4"
    )
    device: Device = Field(default="auto", description="auto, cpu, cuda or mps")


class SplitRows(Section):
    """A number of rows for each split."""

    train: Whole | None = Field(default=None, description=ROWS_WORDS)
    dev: Whole | None = Field(default=None, description=ROWS_WORDS)
    test: Whole | None = Field(default=None, description=ROWS_WORDS)


def _rows_form(value: Any) -> str:
    return "splits" if isinstance(value, dict | SplitRows) else "number"


RowLimits = Annotated[
    Annotated[Whole, Tag("number")] | Annotated[SplitRows, Tag("splits")],
    Discriminator(_rows_form),
]


class PrepareSettings(Section):
    """How records become encoded splits; shared by all tasks."""

    max_length: int = Field(
        default=128, ge=4, le=65536, description="a whole number of tokens, 4 to 65536"
    )
    stride: int = Field(default=64, ge=0, le=65536, description="a whole number of tokens >= 0")
    dev_fraction: Fraction = Field(
        default=0.1, description="a share of the rows, from 0 to below 1"
    )
    test_fraction: Fraction = Field(
        default=0.1, description="a share of the rows, from 0 to below 1"
    )
    seed: Seed = Field(default=42, description=SEED_WORDS)
    max_rows: RowLimits | None = Field(
        default=None,
        description="null, a whole number of rows >= 1, or one for each split, as {train: 1000}",
    )

    def conflicts(self) -> Conflicts:
        """Refuse fractions that leave nothing to train on."""
        if self.dev_fraction + self.test_fraction < 1.0:
            return []
        total = f"{self.dev_fraction} + {self.test_fraction}"
        return [
            ("dev_fraction", f"expected dev_fraction + test_fraction below 1, got {total}"),
        ]

    def rows_of(self, split: Split) -> int | None:
        """Return how many rows a split keeps at most; None keeps all."""
        if isinstance(self.max_rows, SplitRows):
            found: int | None = getattr(self.max_rows, split)
            return found
        return self.max_rows


class TaskPrepareSettings(PrepareSettings):
    """The prepare section of one task: the shared keys, and what its records mean."""

    kind: TaskKind = Field(description=" | ".join(KIND_FIELDS))
    text: FieldName = None
    text_pair: FieldName = None
    label: FieldName = None
    tokens: FieldName = None
    tags: FieldName = None
    predicate: FieldName = None
    question: FieldName = None
    choices: Annotated[tuple[Text, ...], BeforeValidator(_names), Field(min_length=1)] | None = (
        Field(default=None, description="a list of fields, or one field that holds a list")
    )
    answer: FieldName = None
    group: FieldName = None
    word: FieldName = None
    start: FieldName = None
    end: FieldName = None
    start_pair: FieldName = None
    end_pair: FieldName = None
    span1_text: FieldName = None
    span1_index: FieldName = None
    span2_text: FieldName = None
    span2_index: FieldName = None
    query: FieldName = None
    entities: FieldName = None
    answers: FieldName = None
    context: FieldName = None
    id: FieldName = None
    is_impossible: FieldName = None
    template: Text | None = Field(default=None, description="null or a template of the kind")
    labels: Annotated[tuple[Text, ...], BeforeValidator(_label_texts)] | None = Field(
        default=None, description="null or a list of the labels, at least two, in their order"
    )

    def record_fields(self) -> Fields:
        """Return which field of a record is what, the customary names where none is given."""
        return fields_of(self.kind, {name: getattr(self, name) for name in vars(Fields())})

    def chosen_template(self) -> str | None:
        """Return the template, the kind's first where none is given; None: it has none."""
        return self.template or next(iter(TEMPLATES.get(self.kind, ())), None)

    def conflicts(self) -> Conflicts:
        """Check that the keys are those of the kind of task."""
        known = KIND_FIELDS[self.kind]
        found = super().conflicts()
        for key, custom in known.needed.items():
            if custom is None and getattr(self, key) is None:
                found.append((key, f"is required for kind: {self.kind}; expected {FIELD_WORDS}"))
        names = [*known.needed, *known.optional]
        for key in vars(Fields()):
            if key not in names and getattr(self, key) is not None:
                uses = f"{', '.join(names[:-1])} and {names[-1]}"
                found.append((key, f"does not go with kind: {self.kind}, which reads {uses}"))
        if self.kind == "qa" and self.stride >= self.max_length:
            words = f"expected fewer tokens than max_length ({self.max_length})"
            found.append(("stride", f"{words}, got {self.stride}; windows must overlap by less"))
        return found + self._template_conflicts() + self._label_conflicts()

    def _template_conflicts(self) -> Conflicts:
        known = TEMPLATES.get(self.kind, ())
        if self.template is None or self.template in known:
            return []
        if known:
            return [("template", f"expected {' | '.join(known)}, got {self.template!r}")]
        if self.kind != "classification":
            return [("template", f"does not go with kind: {self.kind}, which has no choice of it")]
        if "{text}" in self.template and "{mask}" in self.template:
            return []
        return [("template", f"expected a text with {{text}} and {{mask}}, got {self.template!r}")]

    def _label_conflicts(self) -> Conflicts:
        if self.labels is None:
            return []
        if FORMS[self.kind] in NUM_OUTPUTS or self.kind == "multirc":
            return [("labels", f"does not go with kind: {self.kind}, whose answers are not chosen")]
        if len(set(self.labels)) < max(2, len(self.labels)):
            got = list(self.labels)
            return [("labels", f"expected two labels or more, all different, got {got}")]
        return []


class SplitFiles(Section):
    """The file of each split, relative to the path of the source."""

    train: Text = Field(description="a file name")
    dev: Text | None = Field(default=None, description="null or a file name")
    test: Text | None = Field(default=None, description="null or a file name")


class FetchSettings(Section):
    """Where the records of one task come from."""

    source: SourceKind = Field(description="demo, local or hub")
    path: Text = Field(description="a file or folder, relative to the folder of params.yaml")
    format: FileFormat = Field(
        default="auto",
        description="auto, jsonl, csv, tsv, parquet, conll, squad, conllu or srl",
    )
    files: SplitFiles | None = Field(
        default=None, description="null or a mapping of splits to file names"
    )
    token_column: int = Field(default=0, description="a whole number; -1 is the last column")
    tag_column: int = Field(-1, description="a whole number; -1 is the last column")

    def conflicts(self) -> Conflicts:
        """Refuse keys that only a local source reads; ignoring them would mislead."""
        local_only = {"format", "files", "token_column", "tag_column"}
        if self.source == "local":
            names = self.files.model_dump(exclude_none=True) if self.files else {}
            return [
                (f"files.{split}", f"expected a file inside fetch.path, got {name!r}")
                for split, name in names.items()
                if PurePath(name).is_absolute() or ".." in PurePath(name).parts
            ]
        return [
            (key, f"is read for source: local only, not for source: {self.source}")
            for key in sorted(self.model_fields_set & local_only)
        ]


PLACES: Mapping[str, tuple[str, ...]] = {
    "prompt_length": ("prompt", "length"),
    "learning_rate": ("learning_rate",),
    "head_learning_rate": ("head_learning_rate",),
    "reparameterization": ("prompt", "reparameterization"),
    "prompt_dropout": ("prompt", "dropout"),
    "weight_decay": ("weight_decay",),
    "prompt_layers": ("prompt", "layers"),
}
"""Where in `train` each setting of a search stands."""


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by the names of a space, nested as in the train section."""
    found: dict[str, Any] = {}
    for name, value in params.items():
        *sections, key = PLACES[name]
        target = found
        for section in sections:
            target = target.setdefault(section, {})
        target[key] = value
    return found


RANGES = ("prompt_length", "learning_rate", "head_learning_rate", "prompt_dropout", "weight_decay")
"""The dimensions of a space that lie between two numbers; the others are lists."""

Rate = Annotated[float, Field(gt=0, le=1)]
Rates = Annotated[tuple[Rate, Rate], BeforeValidator(_tuple)]
RATES_WORDS = "null or [lowest, highest], numbers > 0 and <= 1"
Decay = Annotated[float, Field(gt=0, le=10)]


class SearchSpace(Section):
    """The ranges that a search draws from; a key that is null keeps the value of `train`."""

    prompt_length: Annotated[tuple[Whole, Whole], BeforeValidator(_tuple)] | None = Field(
        default=None, description="null or [lowest, highest], whole numbers >= 1"
    )
    learning_rate: Rates | None = Field(default=None, description=RATES_WORDS)
    head_learning_rate: Rates | None = Field(default=None, description=RATES_WORDS)
    reparameterization: (
        Annotated[
            tuple[Reparameterization, ...],
            BeforeValidator(_tuple),
            Field(min_length=1),
        ]
        | None
    ) = Field(default=None, description="null or a list of embedding, mlp")
    prompt_dropout: Annotated[tuple[Fraction, Fraction], BeforeValidator(_tuple)] | None = Field(
        default=None, description="null or [lowest, highest], numbers from 0 to below 1"
    )
    weight_decay: Annotated[tuple[Decay, Decay], BeforeValidator(_tuple)] | None = Field(
        default=None, description="null or [lowest, highest], numbers > 0 and <= 10"
    )
    prompt_layers: (
        Annotated[tuple[Literal["all"] | Whole, ...], BeforeValidator(_tuple), Field(min_length=1)]
        | None
    ) = Field(
        default=None, description="null or a list of all and numbers of top layers, as [all, 4]"
    )

    def contains(self, settings: Mapping[str, Any]) -> bool:
        """Tell whether all settings lie in the ranges of their names."""
        dimensions = self.model_dump(exclude_none=True)
        return all(_inside(key, value, dimensions.get(key)) for key, value in settings.items())

    def conflicts(self) -> Conflicts:
        """Refuse ranges that are upside down."""
        found = []
        for key in RANGES:
            limits = getattr(self, key)
            if limits is not None and limits[0] > limits[1]:
                message = f"expected [lowest, highest], got {list(limits)}"
                found.append((key, message))
        return found


class FirstTrial(Section):
    """Settings that a search tries before it draws any."""

    prompt_length: Whole | None = Field(default=None, description="a whole number >= 1")
    learning_rate: Rate | None = Field(default=None, description="a number > 0 and <= 1")
    head_learning_rate: Rate | None = Field(default=None, description="a number > 0 and <= 1")
    reparameterization: Reparameterization | None = Field(
        default=None, description="embedding or mlp"
    )
    prompt_dropout: Fraction | None = Field(default=None, description="a number from 0 to below 1")
    weight_decay: Decay | None = Field(default=None, description="a number > 0 and <= 10")
    prompt_layers: Literal["all"] | Whole | None = Field(
        default=None, description="all or a number of top layers"
    )


class ScreenSettings(Section):
    """A cheap look at many settings before the search: prompts in the top layers alone.

    What the layers below them give is cached, so that an epoch costs a fraction of a full one.
    """

    layers: Whole = Field(description="a number of top layers >= 1")
    n_trials: Whole = Field(description="a whole number of trials >= 1")
    keep: Whole = Field(description="a whole number of trials, n_trials at most")

    def conflicts(self) -> Conflicts:
        """Refuse to keep more than there is."""
        if self.keep <= self.n_trials:
            return []
        return [("keep", f"expected n_trials ({self.n_trials}) at most, got {self.keep}")]


class SearchSettings(Section):
    """The search over settings of `train`."""

    n_trials: int = Field(
        default=6, ge=0, le=100_000, description="a whole number from 0 (no search) to 100000"
    )
    epochs: int = Field(default=4, ge=1, le=100_000, description="a whole number from 1 to 100000")
    seed: Seed = Field(default=42, description=SEED_WORDS)
    grace_epochs: int = Field(default=2, ge=0, description="a whole number of epochs >= 0")
    parallel: int = Field(
        default=2, ge=1, le=256, description="a whole number of trials side by side, 1 to 256"
    )
    pruner: Literal["median", "successive_halving", "hyperband", "none"] = Field(
        default="median", description="median, successive_halving, hyperband or none"
    )
    screen: ScreenSettings | None = Field(
        default=None, description="null or a mapping such as {layers: 2, n_trials: 12, keep: 3}"
    )
    space: SearchSpace = Field(
        default=SearchSpace(prompt_length=(16, 128), learning_rate=(1e-2, 2e-1)),
        description="a mapping of settings to their ranges",
    )
    first: Annotated[tuple[FirstTrial, ...], BeforeValidator(_tuple)] = Field(
        default=(),
        description="a list of mappings such as {prompt_length: 16, learning_rate: 5.0e-3}",
    )

    def conflicts(self) -> Conflicts:
        """Check that there is something to search, and that the first trials lie inside it."""
        found = [(f"space.{key}", message) for key, message in self.space.conflicts()]
        if self.screen is not None:
            wrong = self.screen.conflicts()
            found += [(f"screen.{key}", message) for key, message in wrong]
            if not wrong and 0 < self.n_trials < self.screen.keep:
                expected = f"expected search.n_trials ({self.n_trials}) at most, which train them"
                found.append(("screen.keep", f"{expected}; got {self.screen.keep}"))
            if self.space.prompt_layers is not None:
                found.append(
                    ("screen", "does not go with space.prompt_layers: a screen sets the layers")
                )
        dimensions = self.space.model_dump(exclude_none=True)
        if self.n_trials and not dimensions:
            found.append(("space", "expected a range for one setting at least; or set n_trials: 0"))
        for index, trial in enumerate(self.first):
            for key, value in trial.model_dump(exclude_none=True).items():
                if not _inside(key, value, dimensions.get(key)):
                    limits = list(dimensions[key]) if key in dimensions else "no range"
                    message = f"expected a value inside space.{key} ({limits}), got {value!r}"
                    found.append((f"first.{index}.{key}", message))
        return found


def _inside(key: str, value: Any, limits: tuple[Any, ...] | None) -> bool:
    if limits is None:
        return False
    if key not in RANGES:
        return value in limits
    return value is not None and bool(limits[0] <= value <= limits[1])


class EvaluateSettings(Section):
    """What `evaluate` scores besides the prompt."""

    probe: bool = Field(default=True, description="true or false")


class RegisterSettings(Section):
    """The registry, and the gate in front of production."""

    tracking_uri: Text = Field(default="sqlite:///mlflow.db", description="an MLflow tracking URI")
    experiment: Text = Field(default="ptv2", description="the name of an MLflow experiment")
    gate_margin: float = Field(default=0.0, ge=0.0, le=1.0, description="a number from 0 to 1")


class RunSettings(Section):
    """How `ptv2 run` works through the stages; no result depends on it."""

    concurrency: int = Field(
        default=2, ge=1, le=256, description="a whole number of stages, 1 to 256"
    )
    retries: int = Field(default=3, ge=0, le=100, description="a whole number from 0 to 100")
    checkpoint_s: float = Field(
        default=30.0, ge=0.0, le=86400.0, description="a number of seconds from 0 to 86400"
    )
    trunk_cache_gb: float = Field(
        default=4.0, ge=0.0, le=1e6, description="a number of gigabytes; 0 keeps nothing"
    )
