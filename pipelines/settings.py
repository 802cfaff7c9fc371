"""params.yaml and the environment, read once, checked whole; the only reader of either.

Every problem of the file is reported in one ConfigError, each at its dotted path and line. YAML is
read as version 1.2, as DVC reads it: `no` and `on` are words, `1e-3` is a number.
"""

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from pipelines.auto import resolved
from pipelines.checking import Found, Where, check_section, did_you_mean
from pipelines.extra_settings import CompareSettings, MultitaskSettings, SweepSettings
from pipelines.schema import (
    BackboneSettings,
    EvaluateSettings,
    FetchSettings,
    PrepareSettings,
    RegisterSettings,
    RunSettings,
    SearchSettings,
    Section,
    TaskPrepareSettings,
)
from ptv2_core.config import TrainConfig
from ptv2_core.data.tasks import NAME_PATTERN
from ptv2_core.errors import ConfigError

TASK_MODELS: dict[str, type[Section] | type[TrainConfig]] = {
    "fetch": FetchSettings,
    "prepare": TaskPrepareSettings,
    "search": SearchSettings,
    "train": TrainConfig,
}
SHARED_MODELS: dict[str, type[Section] | type[TrainConfig]] = {
    "backbone": BackboneSettings,
    "prepare": PrepareSettings,
    "search": SearchSettings,
    "train": TrainConfig,
    "evaluate": EvaluateSettings,
    "register": RegisterSettings,
    "compare": CompareSettings,
    "multitask": MultitaskSettings,
    "sweep": SweepSettings,
    "run": RunSettings,
}
# what no stage reads may be left out
OPTIONAL = ("compare", "multitask", "sweep", "run")
SECTIONS = (*SHARED_MODELS, "tasks")
MAX_DEPTH = 16


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Everything the stages of one task read: the shared sections with the task's own on top."""

    name: str
    backbone: BackboneSettings
    fetch: FetchSettings
    prepare: TaskPrepareSettings
    search: SearchSettings
    train: TrainConfig
    evaluate: EvaluateSettings
    register: RegisterSettings
    run: RunSettings

    def to_mapping(self) -> dict[str, Any]:
        """Return plain nested values, for provenance and for hashing.

        Without `run`, on which no result depends.
        """
        sections = {
            name: getattr(self, name).model_dump(mode="json")
            for name in ("backbone", "fetch", "prepare", "search", "evaluate", "register")
        }
        return {"name": self.name, **sections, "train": self.train.to_mapping()}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A checked params.yaml."""

    path: Path
    backbone: BackboneSettings
    prepare: PrepareSettings
    search: SearchSettings
    train: TrainConfig
    evaluate: EvaluateSettings
    register: RegisterSettings
    compare: CompareSettings
    multitask: MultitaskSettings
    sweep: SweepSettings
    run: RunSettings
    tasks: Mapping[str, TaskSettings]

    @property
    def root(self) -> Path:
        """The workspace: the folder of params.yaml."""
        return self.path.parent

    def task(self, name: str) -> TaskSettings:
        """Return the settings of one task; a ConfigError lists the tasks there are."""
        if name not in self.tasks:
            known = ", ".join(self.tasks)
            message = f"expected a task of {self.path} ({known}), got {name!r}"
            raise ConfigError(message + did_you_mean(name, list(self.tasks)))
        return self.tasks[name]


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The variables that the orchestration reads; an empty one counts as unset.

    Attributes:
        mlflow_tracking_uri: MLFLOW_TRACKING_URI, which wins over `register.tracking_uri`.
        prefect_api_url: PREFECT_API_URL of a running Prefect server.
        storage: PTV2_STORAGE, which wins over `sweep.storage`.
        flow_run_id: PTV2_FLOW_RUN_ID, the flow run that started this stage.
        omp_num_threads: OMP_NUM_THREADS as it is written; `pipelines.threads` reads the number.
        world_size: WORLD_SIZE, the processes that torchrun started; none without it.
        rank: RANK, which of them this is.
        local_rank: LOCAL_RANK, which on this machine.
    """

    mlflow_tracking_uri: str | None = None
    prefect_api_url: str | None = None
    storage: str | None = None
    flow_run_id: str | None = None
    omp_num_threads: str | None = None
    world_size: int | None = None
    rank: int = 0
    local_rank: int = 0


def read_environment() -> Environment:
    """Read the environment variables that `Environment` names."""
    return Environment(
        mlflow_tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or None,
        prefect_api_url=os.environ.get("PREFECT_API_URL") or None,
        storage=os.environ.get("PTV2_STORAGE") or None,
        flow_run_id=os.environ.get("PTV2_FLOW_RUN_ID") or None,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS") or None,
        **_torchrun(),
    )


def _torchrun() -> dict[str, int]:
    """Return this process's place among those of torchrun; clusters set WORLD_SIZE without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    return {name.lower(): int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}


def child_environment(
    overrides: Mapping[str, str] | None = None, *, defaults: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of a child process.

    Programs installed beside this Python, such as `ptv2` in a virtual environment that is not
    activated, are found first.

    Args:
        overrides: Variables to set.
        defaults: Variables to set where the user has not; an empty one counts as unset.
    """
    programs = str(Path(sys.executable).parent)
    path = os.pathsep.join(filter(None, (programs, os.environ.get("PATH"))))
    unset = {name: value for name, value in (defaults or {}).items() if not os.environ.get(name)}
    return {**os.environ, **unset, "PATH": path, **(overrides or {})}


def set_environment_defaults(values: Mapping[str, str]) -> None:
    """Set the variables that are not set, for a library that reads them when it is imported."""
    for name, value in values.items():
        os.environ.setdefault(name, value)


@contextmanager
def environment_kept(names: Collection[str]) -> Iterator[None]:
    """Take back at the end what a library sets in the environment meanwhile.

    Args:
        names: Variables that it sets.
    """
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def load_settings(path: Path = Path("params.yaml")) -> Settings:
    """Read and check params.yaml.

    Args:
        path: The file.

    Raises:
        ConfigError: Naming every problem, each with its dotted path and line.
    """
    values, lines = read_yaml(path)
    found: Found = []
    settings = _build(path, values, found)
    if settings is None:
        raise ConfigError([placed(path, where, message, lines) for where, message in found])
    return settings


def placed(path: Path, where: Where, message: str, lines: dict[Where, int]) -> tuple[str, str]:
    """Give a problem its dotted path and the line of the nearest key that exists.

    Args:
        path: The file.
        where: The steps to the value.
        message: What is wrong with it.
        lines: The line of each path, as `read_yaml` gives them.
    """
    known = next(where[:end] for end in range(len(where), -1, -1) if where[:end] in lines)
    return _dotted(where), f"{message} ({path.name}, line {lines[known]})"


def _dotted(where: Where) -> str:
    return ".".join(map(str, where))


# Reading YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: null, true, false, integers and floats; all else is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|$"), None)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[Where, int]]:
    """Return the mapping in a file and the line of each path in it.

    Args:
        path: The file, in YAML 1.2.

    Raises:
        ConfigError: It is not there, holds no mapping, or says a key twice.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"expected the settings at {path}, found no such file; run in the folder of "
            "params.yaml, or name that folder with --workspace"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        message = f"expected UTF-8 text, got the byte 0x{raw[error.start]:02x}; save it as UTF-8"
        raise ConfigError(f"{path}, line {line}: {message}") from error
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        problems: Found = []
        lines: dict[Where, int] = {}
        values = None if node is None else _construct(loader, node, (), lines, problems)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if problems:
        raise ConfigError([(_dotted(where), f"{words} of {path}") for where, words in problems])
    if values is None:
        raise ConfigError(f"{path} is empty; expected the sections {', '.join(SECTIONS)}")
    if not isinstance(values, dict):
        got = type(values).__name__
        raise ConfigError(f"{path}: expected a mapping of sections at the top, got a {got}")
    return values, lines


def _construct(
    loader: _Loader, node: yaml.Node, where: Where, lines: dict[Where, int], problems: Found
) -> Any:
    """Build plain values, noting the line of each path and every key that is written twice."""
    if len(where) > MAX_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
    lines.setdefault(where, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [
            _construct(loader, item, (*where, index), lines, problems)
            for index, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    seen: dict[str, int] = {}
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        is_merge = key_node.tag == "tag:yaml.org,2002:merge"
        key = "<<" if is_merge else loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problems.append(
                ((*where, str(key)), f"expected text as the key: quote it on line {line}")
            )
        elif key in seen:
            message = f"expected each key once, got {key!r} on lines {seen[key]} and {line}"
            problems.append(((*where, key), message))
        else:
            seen[key] = line
    # After this the keys taken over by `<<` come first, so that the mapping's own win.
    loader.flatten_mapping(node)
    pairs = {
        str(loader.construct_object(key, deep=True)): (key, value) for key, value in node.value
    }
    node.value = list(pairs.values())
    values = {}
    for name, (key_node, value_node) in pairs.items():
        lines[(*where, name)] = key_node.start_mark.line + 1
        values[name] = _construct(loader, value_node, (*where, name), lines, problems)
    return values


# Checking


def _build(path: Path, values: dict[str, Any], found: Found) -> Settings | None:
    """Check all sections; None where `found` got a problem."""
    for key in values:
        if key not in SECTIONS:
            found.append(((key,), f"unknown section{did_you_mean(key, SECTIONS)}"))
    shared: dict[str, Any] = {}
    for name, model in SHARED_MODELS.items():
        if name not in values and name not in OPTIONAL:
            found.append(((name,), "this section is required; DVC tracks it"))
            continue
        problems: Found = []
        own = values.get(name, {})
        shared[name] = check_section(model, resolved(own) if name == "train" else own, problems)
        found += [((name, *where), message) for where, message in problems]
    shared_found = list(found)
    tasks: dict[str, TaskSettings] = {}
    for name, own in _task_values(values, found).items():
        task = _build_task(name, own, values, shared, shared_found, found)
        if task is not None:
            tasks[name] = task
    if found:
        return None
    return Settings(path=path, tasks=MappingProxyType(tasks), **shared)


def _task_values(values: dict[str, Any], found: Found) -> dict[str, Any]:
    """Return the mapping of tasks, with what is wrong about their names noted."""
    tasks = values.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        got = "" if tasks is None else f", got {tasks!r}"
        found.append((("tasks",), f"expected a mapping with one task at least{got}"))
        return {}
    for name in tasks:
        if not NAME_PATTERN.fullmatch(name):
            grammar = "a lower-case letter, then up to 62 of a-z, 0-9, _ and -"
            found.append((("tasks", name), f"expected a name of {grammar}, got {name!r}"))
    return tasks


def _build_task(
    name: str,
    own: Any,
    values: dict[str, Any],
    shared: dict[str, Any],
    shared_found: Found,
    found: Found,
) -> TaskSettings | None:
    """Check one task's sections on top of the shared ones."""
    place: Where = ("tasks", name)
    if not isinstance(own, dict):
        keys = ", ".join(TASK_MODELS)
        found.append((place, f"expected a mapping with the keys {keys}, got {own!r}"))
        return None
    before = len(found)
    for key in own:
        if key in SECTIONS:
            if key not in TASK_MODELS:
                found.append(((*place, key), "cannot be set for one task; set it at the top"))
        elif key not in TASK_MODELS:
            found.append(((*place, key), f"unknown key{did_you_mean(key, list(TASK_MODELS))}"))
    sections: dict[str, Any] = {}
    for key, model in TASK_MODELS.items():
        if key not in own:
            empty = f"; `{key}: {{}}` takes the shared one" if key in ("search", "train") else ""
            found.append(((*place, key), f"is required, since DVC tracks it{empty}"))
            continue
        base = values.get(key) if isinstance(values.get(key), dict) else {}
        problems: Found = []
        merged = merge(base, own[key]) if isinstance(own[key], dict) else own[key]
        if key == "train":
            merged = resolved(merged, _kind(own))
        sections[key] = check_section(model, merged, problems)
        for where, message in problems:
            if _reaches(own[key], where) or ((key, *where) not in dict(shared_found)):
                found.append(((*place, key, *where), message))
    if len(found) > before or shared_found:
        return None
    common = {key: shared[key] for key in ("backbone", "evaluate", "register", "run")}
    return TaskSettings(name=name, **common, **sections)


def _kind(own: Mapping[str, Any]) -> Any:
    prepare = own.get("prepare")
    return prepare.get("kind") if isinstance(prepare, dict) else None


def merge(base: Any, own: Any) -> Any:
    """Lay `own` over `base`, key by key; nested mappings are merged, all else is replaced."""
    if not (isinstance(base, dict) and isinstance(own, dict)):
        return own
    return {**base, **{key: merge(base.get(key), value) for key, value in own.items()}}


def _reaches(values: Any, where: Where) -> bool:
    """Tell whether `values` itself sets what is at `where`."""
    for step in where:
        if not isinstance(values, dict):
            return True
        if step not in values:
            return False
        values = values[step]
    return True
