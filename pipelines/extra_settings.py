"""The sections of params.yaml that no stage reads: `compare`, `multitask` and `sweep`."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from pipelines.schema import Conflicts, SearchSpace, Section, Seed, Text, Whole
from ptv2_core.config import Method, TrainConfig
from ptv2_core.data.tasks import NAME_PATTERN
from ptv2_core.errors import ConfigError

METHODS: tuple[Method, ...] = get_args(Method)
SET_BY_COMPARE = "a comparison sets this itself; leave it out"
# settings of train that a window sets itself
SET_BY_WINDOW = ("method", "init_from", "learning_rate", "seed")

DEFAULT_SPACES: Mapping[str, SearchSpace] = {
    "probe": SearchSpace(learning_rate=(1e-3, 1e-1)),
    "prompt_tuning": SearchSpace(prompt_length=(8, 64), learning_rate=(3e-3, 1e-1)),
    "ptv2": SearchSpace(prompt_length=(16, 128), learning_rate=(1e-2, 2e-1)),
    "finetune": SearchSpace(learning_rate=(5e-5, 1e-3)),
}
DEFAULT_TRAINS: Mapping[str, Mapping[str, Any]] = {
    "probe": {"learning_rate": 1e-2},
    "prompt_tuning": {"learning_rate": 2e-2},
    "ptv2": {},
    "finetune": {"learning_rate": 3e-4, "head_learning_rate": None, "backbone_dropout": True},
}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _over(defaults: Mapping[str, Any]) -> BeforeValidator:
    """Return what lays a given mapping over the defaults, key by key."""
    return BeforeValidator(
        lambda value: {**defaults, **value} if isinstance(value, Mapping) else value
    )


def _train_conflicts(place: str, changes: Mapping[str, Any]) -> Conflicts:
    """Return what is wrong in settings that will be laid over `train`."""
    try:
        TrainConfig.from_mapping(changes, path=place)
    except ConfigError as error:
        return error.problems
    return []


def _repeated(section: Section, *keys: str) -> Conflicts:
    """Return the lists that name something twice."""
    return [
        (key, f"expected each once, got {list(values)}")
        for key in keys
        if len(set(values := getattr(section, key))) < len(values)
    ]


Names = Annotated[tuple[str, ...], BeforeValidator(_tuple), Field(min_length=1)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_tuple), Field(min_length=1)]
Trials = Annotated[int, Field(ge=0, le=100_000)]
SEEDS_WORDS = "a list of whole numbers from 0 to 4294967295"
NAMES_WORDS = f"a list of {', '.join(METHODS)}, or of names under compare.train"


class WindowSettings(Section):
    """Trainings over a range of learning rates, which show how far off a rate may be."""

    methods: Names = Field(description=NAMES_WORDS)
    factor: float = Field(default=100.0, gt=1.0, le=1e6, description="a number above 1 to 1000000")
    points: int = Field(default=9, ge=3, le=1000, description="a whole number from 3 to 1000")
    seeds: Seeds = Field(default=(1,), description=SEEDS_WORDS)
    train: Mapping[str, Any] = Field(default={}, description="a mapping of settings of train")

    def conflicts(self) -> Conflicts:
        """Refuse what is named twice, and settings that a window sets itself."""
        return [
            *_repeated(self, "methods", "seeds"),
            *_train_conflicts("train", self.train),
            *(
                (f"train.{key}", "a window sets this itself; leave it out")
                for key in SET_BY_WINDOW
                if key in self.train
            ),
        ]


class CompareSettings(Section):
    """`ptv2 compare`.

    What is compared goes by a name: a method, or a variant, which is an entry of `train` under
    another name that says which method it is.
    """

    methods: Names = Field(
        default=("probe", "prompt_tuning", "ptv2", "finetune"),
        description=NAMES_WORDS,
    )
    seeds: Seeds = Field(default=(1, 2, 3), description=SEEDS_WORDS)
    n_trials: Trials | Mapping[str, Trials] = Field(
        default=6,
        description="a whole number from 0 (no search) to 100000, or a mapping of names to such",
    )
    parallel: Whole = Field(default=2, description="a whole number of trainings side by side >= 1")
    space: Annotated[Mapping[str, SearchSpace], _over(DEFAULT_SPACES)] = Field(
        default=DEFAULT_SPACES, description="a mapping of methods to ranges as in search.space"
    )
    train: Annotated[Mapping[str, Mapping[str, Any]], _over(DEFAULT_TRAINS)] = Field(
        default=DEFAULT_TRAINS, description="a mapping of methods to settings of train"
    )
    window: WindowSettings | None = Field(
        default=None, description="null or {methods, factor, points, seeds, train}"
    )

    def method_of(self, name: str) -> Method:
        """Return the method of a name; a method's own name means itself."""
        method: Method = self.train[name].get("method", name)
        return method

    def changes_of(self, name: str) -> Mapping[str, Any]:
        """Return what a name lays over `train`, the method aside."""
        return {key: value for key, value in self.train[name].items() if key != "method"}

    def space_of(self, name: str) -> SearchSpace:
        """Return the ranges of a name's search: its own, or else those of its method."""
        return self.space.get(name, self.space[self.method_of(name)])

    def trials_of(self, name: str) -> int:
        """Return how many trials a name's search has; a mapping that leaves it out means none."""
        return self.n_trials if isinstance(self.n_trials, int) else self.n_trials.get(name, 0)

    @property
    def names(self) -> tuple[str, ...]:
        """All that is trained: what is compared, then what only the window is about."""
        extra = () if self.window is None else self.window.methods
        return tuple(dict.fromkeys((*self.methods, *extra)))

    def conflicts(self) -> Conflicts:
        """Refuse what is named twice or means nothing, and ranges that are upside down."""
        return [
            *_repeated(self, "methods", "seeds"),
            *self._unknown("methods", self.methods),
            *(() if isinstance(self.n_trials, int) else self._unknown("n_trials", self.n_trials)),
            *self._train_conflicts(),
            *self._space_conflicts(),
            *self._window_conflicts(),
        ]

    def _unknown(self, place: str, names: Iterable[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            if name not in self.train:
                yield (
                    place,
                    f"expected {', '.join(METHODS)}, or a name with an entry under compare.train "
                    f"that says its method, as {name}: {{method: ptv2}}; got {name!r}",
                )

    def _train_conflicts(self) -> Iterator[tuple[str, str]]:
        for name, changes in self.train.items():
            place = f"train.{name}"
            if not NAME_PATTERN.fullmatch(name):
                grammar = "a lower-case letter, then up to 62 of a-z, 0-9, _ and -"
                yield place, f"expected a name of {grammar}, got {name!r}"
            yield from _train_conflicts(place, changes)
            if "init_from" in changes:
                yield f"{place}.init_from", SET_BY_COMPARE
            if name in METHODS and "method" in changes:
                yield f"{place}.method", f"{SET_BY_COMPARE}, or give the entry another name"
            if name not in METHODS and "method" not in changes:
                expected = " | ".join(METHODS)
                yield f"{place}.method", f"is required, since {name} is none; expected {expected}"

    def _space_conflicts(self) -> Iterator[tuple[str, str]]:
        for name, space in self.space.items():
            yield from self._unknown(f"space.{name}", (name,))
            yield from ((f"space.{name}.{key}", words) for key, words in space.conflicts())
            if self.trials_of(name) and not space.model_dump(exclude_none=True):
                expected = "expected a range for one setting at least, or n_trials: 0"
                yield f"space.{name}", expected

    def _window_conflicts(self) -> Iterator[tuple[str, str]]:
        if self.window is not None:
            yield from self._unknown("window.methods", self.window.methods)
            yield from ((f"window.{key}", words) for key, words in self.window.conflicts())


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


class SweepSettings(Section):
    """`ptv2 sweep`: the search of a task under Prefect; what is drawn is in `search`."""

    n_trials: int = Field(
        default=24, ge=1, le=100_000, description="a whole number of trials from 1 to 100000"
    )
    workers: int = Field(
        default=2, ge=1, le=1024, description="a whole number of trials side by side, 1 to 1024"
    )
    engine: Literal["processes", "stack", "ray", "dask", "work_pool"] = Field(
        default="processes", description="processes, stack, ray, dask or work_pool"
    )
    address: Text | None = Field(
        default=None, description="null, where a Ray or Dask cluster listens, or a deployment"
    )
    storage: Text | None = Field(
        default=None, description="null, or postgresql://USER@HOST/DATABASE"
    )
    transfer: int = Field(
        default=3, ge=0, le=1000, description="a whole number of settings from 0 to 1000"
    )
    finalists: int = Field(default=3, ge=1, le=100, description="a whole number from 1 to 100")
    seeds: int = Field(default=3, ge=1, le=100, description="a whole number from 1 to 100")
    patience: int | None = Field(
        default=12, ge=1, description="null, or a whole number of finished trials >= 1"
    )
    margin: float = Field(
        default=0.005, ge=0.0, le=1.0, description="a gain of the dev score, 0 to 1"
    )
    heartbeat_s: float = Field(
        default=60.0, ge=1.0, le=86400.0, description="seconds from 1 to 86400"
    )
    retries: int = Field(default=2, ge=0, le=100, description="a whole number from 0 to 100")

    def conflicts(self) -> Conflicts:
        """Refuse what the engine has no use for, and databases that cannot be shared."""
        found = []
        if self.address is not None and self.engine in ("processes", "stack"):
            found.append(("address", f"engine: {self.engine} has none; expected null"))
        if self.storage is not None and not self.storage.startswith(
            ("postgresql://", "postgresql+psycopg2://")
        ):
            # a password is not shown
            kind = self.storage.partition(":")[0]
            words = f"expected null (SQLite in .ptv2) or postgresql://..., got {kind}:..."
            found.append(("storage", words))
        return found
