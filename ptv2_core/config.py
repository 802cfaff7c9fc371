"""Settings of one training: frozen dataclasses, all problems of a mapping reported at once."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ptv2_core.errors import ConfigError

Problems = list[tuple[str, str]]
T = TypeVar("T")

Reparameterization = Literal["embedding", "mlp"]
PromptStart = Literal["normal", "backbone"]
Reads = Literal["auto", "cls", "pooler", "mean", "last", "mask"]
HeadType = Literal["linear", "verbalizer"]
LabelWords = Mapping[str, str]
Method = Literal["ptv2", "prompt_tuning", "finetune", "probe"]
Precision = Literal["auto", "fp32", "bf16", "int8", "nf4"]
PromptLayers = Literal["all"] | int | tuple[int, ...]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class Range:
    """The closed or half-open interval that a number must lie in."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: float) -> bool:
        """Tell whether `value` is finite and inside."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        """Say the interval in words for an error message."""
        low = f"{'>' if self.low_open else '>='} {self.low:g}"
        if math.isinf(self.high):
            return low
        return f"{low} and {'<' if self.high_open else '<='} {self.high:g}"


def number(default: float, **limits: Any) -> Any:
    """Declare a numeric field with a default and the `Range` it must lie in."""
    return field(default=default, metadata={"range": Range(**limits)})


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The shape of a prompt (paper, section 3.2).

    Attributes:
        length: P, key/value positions in each layer that has a prompt.
        reparameterization: `embedding` trains the keys and values themselves, `mlp` an embedding
            and a two-layer MLP that produces them.
        mlp_hidden: Width of that MLP.
        dropout: Probability that an element of the prompt is dropped in a training step.
        start: `normal` draws from N(0, start_std), as the released code does; `backbone` takes the
            keys and values that the frozen backbone itself computes for training words.
        start_std: Standard deviation of a `normal` start.
        start_attention: Share of their attention that tokens give to the prompt at the start, for
            which its keys are shifted; None leaves what the start comes to.
        shift_positions: Whether token positions start at P, as in the released code. Without a
            prompt in the lowest layer they always start where the backbone has them.
        layers: Which layers have a prompt: `all`, the top so many, or a list, 0 the lowest (paper,
            section 4.3).
    """

    length: int = number(64, low=1, high=4096)
    layers: PromptLayers = "all"
    reparameterization: Reparameterization = "embedding"
    mlp_hidden: int = number(512, low=1, high=65536)
    dropout: float = number(0.0, low=0.0, high=1.0, high_open=True)
    start: PromptStart = "backbone"
    start_std: float = number(1.0, low=0.0, low_open=True)
    start_attention: float | None = number(0.05, low=0.0, low_open=True, high=1.0, high_open=True)
    shift_positions: bool = True

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Return the layers that have a prompt, lowest first.

        Args:
            num_layers: L.

        Raises:
            ConfigError: A layer is named that the backbone does not have.
        """
        if self.layers == "all":
            return tuple(range(num_layers))
        if isinstance(self.layers, int):
            chosen = tuple(range(num_layers - self.layers, num_layers))
        else:
            chosen = tuple(sorted(self.layers))
        if chosen[0] < 0 or chosen[-1] >= num_layers:
            raise ConfigError(
                f"train.prompt.layers: expected `all`, a number of top layers from 1 to "
                f"{num_layers}, or a list of layers from 0 to {num_layers - 1}, which is what the "
                f"backbone has; got {self.layers!r}"
            )
        return chosen

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, path: str = "prompt") -> "PromptConfig":
        """Build from a mapping; every problem is reported at once as a ConfigError."""
        return _build(cls, values, path)


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head on top of the backbone.

    Attributes:
        reads: What a head for whole texts reads. `auto` takes what the backbone's files say (the
            last token of a decoder), or the mask token for a verbalizer.
        dropout: Dropout before the linear layer.
        type: `linear` starts at random; `verbalizer` starts from the rows that the backbone's
            language model has for one word a label, and reads the mask token of the template
            through that model's own transform (paper, section 4.3).
        label_words: Of a verbalizer: a word for each label, a single piece of the tokenizer.
    """

    reads: Reads = "auto"
    dropout: float = number(0.0, low=0.0, high=1.0, high_open=True)
    type: HeadType = "linear"
    label_words: LabelWords | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, path: str = "head") -> "HeadConfig":
        """Build from a mapping; every problem is reported at once as a ConfigError."""
        return _build(cls, values, path)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Attributes:
        method: What is trained beside the head: `ptv2` a prompt in each layer, `prompt_tuning` one
            before the lowest layer alone (Lester et al. 2021), `finetune` the whole backbone,
            `probe` nothing.
        prompt: The prompt.
        head: The head.
        init_from: A folder with a prompt, or `models:/NAME@ALIAS`, to begin from; none begins as
            `prompt.start` says.
        learning_rate: Peak learning rate of what `method` trains.
        head_learning_rate: Peak learning rate of the head; none takes `learning_rate`, and so does
            a `probe`, which trains nothing else.
        epochs: Passes over the training data at most.
        batch_size: Rows in one step at most.
        token_budget: Padded tokens in one step at most.
        warmup_fraction: Share of all steps with a rising learning rate.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: Gradients are scaled down to this norm.
        patience: Epochs in which neither the development score nor its loss gets better, before
            stopping.
        seed: Of the start, the order of rows and dropout.
        backbone_dropout: Whether the frozen backbone drops out as in its own pre-training.
        gradient_checkpointing: Whether a layer's activations are computed again in the backward
            pass instead of kept: less memory, about half more time.
    """

    method: Method = "ptv2"
    prompt: PromptConfig = field(default_factory=PromptConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    init_from: str | None = None
    learning_rate: float = number(5e-2, low=0.0, low_open=True, high=1.0)
    head_learning_rate: float | None = number(1e-2, low=0.0, low_open=True, high=1.0)
    epochs: int = number(10, low=1, high=100_000)
    batch_size: int = number(32, low=1, high=65536)
    token_budget: int = number(4096, low=16, high=16_777_216)
    warmup_fraction: float = number(0.06, low=0.0, high=1.0, high_open=True)
    weight_decay: float = number(0.01, low=0.0, high=10.0)
    max_grad_norm: float = number(1.0, low=0.0, low_open=True)
    patience: int = number(5, low=1, high=100_000)
    seed: int = number(42, low=0, high=2**32 - 1)
    backbone_dropout: bool = False
    gradient_checkpointing: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, path: str = "train") -> "TrainConfig":
        """Build from a mapping; every problem is reported at once as a ConfigError."""
        return _build(cls, values, path)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain nested dictionaries, as `from_mapping` takes them."""
        return dataclasses.asdict(self)


def _build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    problems: Problems = []
    built = _read(cls, values, path, problems)
    if problems or built is None:
        raise ConfigError(problems)
    return built


def _read(cls: type[T], values: Any, path: str, problems: Problems) -> T | None:
    """Read one dataclass, appending every problem; None where there was any."""
    if not isinstance(values, Mapping):
        problems.append((path, f"expected a mapping of settings, got {values!r}"))
        return None
    before = len(problems)
    hints = get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            problems.append((f"{path}.{key}", f"unknown key; known: {', '.join(known)}"))
    taken: dict[str, Any] = {}
    for name, declared in known.items():
        if name in values:
            where = f"{path}.{name}"
            if dataclasses.is_dataclass(hints[name]):
                taken[name] = _read(hints[name], values[name], where, problems)
            else:
                limits: Range | None = declared.metadata.get("range")
                taken[name] = _value(values[name], hints[name], limits, where, problems)
    return cls(**taken) if len(problems) == before else None


def _value(value: Any, hint: Any, limits: Range | None, path: str, problems: Problems) -> Any:
    """Check one scalar against its type and range; integers pass as floats."""
    if hint == PromptLayers:
        return _layers(value, path, problems)
    if hint == LabelWords | None:
        return _label_words(value, path, problems)
    options = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    if value is None and NoneType in options:
        return None
    kind = next(option for option in options if option is not NoneType)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            expected = " | ".join(str(choice) for choice in get_args(kind))
            problems.append((path, f"expected {expected}, got {value!r}"))
        return value
    checks: dict[type, tuple[str, Callable[[Any], bool]]] = {
        str: ("a text", lambda v: isinstance(v, str) and bool(v.strip())),
        bool: ("true or false", lambda v: isinstance(v, bool)),
        int: ("a whole number", lambda v: isinstance(v, int) and not isinstance(v, bool)),
        float: ("a number", lambda v: isinstance(v, int | float) and not isinstance(v, bool)),
    }
    wanted, is_right = checks[kind]
    within = f" {limits}" if limits else ""
    if not is_right(value) or (limits is not None and value not in limits):
        problems.append((path, f"expected {wanted}{within}, got {value!r}"))
        return value
    return float(value) if kind is float else value


def _layers(value: Any, path: str, problems: Problems) -> PromptLayers:
    """Check `all`, a number of top layers, or a list of layers."""

    def is_whole(number: Any, low: int) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= low

    if isinstance(value, list | tuple):
        if value and all(is_whole(v, 0) for v in value) and len(set(value)) == len(value):
            return tuple(sorted(value))
    elif value == "all" or is_whole(value, 1):
        return value  # type: ignore[no-any-return]
    problems.append(
        (path, f"expected all, a number of top layers >= 1, or a list of layers, got {value!r}")
    )
    return "all"


def _label_words(value: Any, path: str, problems: Problems) -> dict[str, str] | None:
    """Check a mapping of labels to words."""
    if value is None:
        return None
    if isinstance(value, Mapping) and all(isinstance(w, str) and w for w in value.values()):
        return {str(label): word for label, word in value.items()}
    problems.append((path, f"expected null or a mapping of labels to words, got {value!r}"))
    return None
