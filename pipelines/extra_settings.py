"""The sections of params.yaml that no stage reads: `compare` and `multitask`."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipelines.schema import Conflicts, SearchSpace, Section, Seed, Whole
from ptv2_core.config import Method, TrainConfig
from ptv2_core.errors import ConfigError

# settings of train that a comparison sets itself: the method, and that all methods start anew
SET_BY_COMPARE = ("method", "init_from")


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _train_conflicts(place: str, changes: Mapping[str, Any]) -> Conflicts:
    """Return what is wrong in settings that will be laid over `train`."""
    try:
        TrainConfig.from_mapping(changes, path=place)
    except ConfigError as error:
        return error.problems
    return []


class MethodSpaces(Section):
    """The ranges that the search of each method draws from."""

    probe: SearchSpace = Field(
        default=SearchSpace(learning_rate=(1e-3, 1e-1)), description="a mapping of ranges"
    )
    prompt_tuning: SearchSpace = Field(
        default=SearchSpace(prompt_length=(8, 64), learning_rate=(3e-3, 1e-1)),
        description="a mapping of ranges",
    )
    ptv2: SearchSpace = Field(
        default=SearchSpace(prompt_length=(8, 64), learning_rate=(3e-3, 5e-2)),
        description="a mapping of ranges",
    )
    finetune: SearchSpace = Field(
        default=SearchSpace(learning_rate=(2e-5, 5e-4)), description="a mapping of ranges"
    )


class MethodTrains(Section):
    """What each method changes in the settings of `train`."""

    probe: Mapping[str, Any] = Field(
        default={"learning_rate": 1e-2}, description="a mapping of settings of train"
    )
    prompt_tuning: Mapping[str, Any] = Field(
        default={"learning_rate": 2e-2, "prompt": {"start": "backbone"}},
        description="a mapping of settings of train",
    )
    ptv2: Mapping[str, Any] = Field(default={}, description="a mapping of settings of train")
    finetune: Mapping[str, Any] = Field(
        default={"learning_rate": 1e-4, "backbone_dropout": True},
        description="a mapping of settings of train",
    )


class CompareSettings(Section):
    """`ptv2 compare`."""

    methods: Annotated[tuple[Method, ...], BeforeValidator(_tuple), Field(min_length=1)] = Field(
        default=("probe", "prompt_tuning", "ptv2", "finetune"),
        description="a list of probe, prompt_tuning, ptv2, finetune",
    )
    seeds: Annotated[tuple[Seed, ...], BeforeValidator(_tuple), Field(min_length=1)] = Field(
        default=(1, 2, 3), description="a list of whole numbers from 0 to 4294967295"
    )
    n_trials: int = Field(
        default=6, ge=0, le=100_000, description="a whole number from 0 (no search) to 100000"
    )
    parallel: Whole = Field(default=2, description="a whole number of trainings side by side >= 1")
    space: MethodSpaces = Field(
        default=MethodSpaces(), description="a mapping of methods to ranges as in search.space"
    )
    train: MethodTrains = Field(
        default=MethodTrains(), description="a mapping of methods to settings of train"
    )

    def conflicts(self) -> Conflicts:
        """Refuse what is named twice, and ranges that are upside down."""
        found = []
        for key in ("methods", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                found.append((key, f"expected each once, got {list(values)}"))
        for method in MethodTrains.model_fields:
            place, changes = f"train.{method}", getattr(self.train, method)
            found += _train_conflicts(place, changes)
            found += [
                (f"{place}.{key}", "a comparison sets this itself; leave it out")
                for key in SET_BY_COMPARE
                if key in changes
            ]
        for method in MethodSpaces.model_fields:
            space: SearchSpace = getattr(self.space, method)
            found += [(f"space.{method}.{key}", words) for key, words in space.conflicts()]
            if self.n_trials and not space.model_dump(exclude_none=True):
                found.append(
                    (f"space.{method}", "expected a range for one setting at least, or n_trials: 0")
                )
        return found


class SharedPrompt(Section):
    """One shared prompt of `multitask`: which tasks train it, and how."""

    tasks: Annotated[tuple[str, ...], BeforeValidator(_tuple), Field(min_length=2)] = Field(
        description="a list of two tasks or more, whose heads answer alike"
    )
    temperature: float = Field(
        default=2.0, ge=1.0, le=1e6, description="a number >= 1; 1 takes each row once an epoch"
    )
    train: Mapping[str, Any] = Field(default={}, description="a mapping of settings of train")


class MultitaskSettings(Section):
    """`ptv2 multitask`: shared prompts by name."""

    shared: Mapping[str, SharedPrompt] = Field(
        default={}, description="a mapping of names to {tasks, temperature, train}"
    )

    def conflicts(self) -> Conflicts:
        """Refuse settings of `train` that are none."""
        return [
            conflict
            for name, prompt in self.shared.items()
            for conflict in _train_conflicts(f"shared.{name}.train", prompt.train)
        ]
