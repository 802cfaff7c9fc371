"""Published settings: tasks with their data source and the hyper-parameters that a paper gives.

`configs/paper.yaml` holds them. A published task becomes the four sections of a task of
params.yaml: its settings for a size of backbone are laid over `train`, which a search tries before
all else, and are among `search.first`, in a space that is made wide enough for them.
"""

import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field

from pipelines.checking import Found, check_section, did_you_mean
from pipelines.flow_yaml import task_lines
from pipelines.schema import (
    PLACES,
    FetchSettings,
    SearchSettings,
    SearchSpace,
    Section,
    TaskPrepareSettings,
    Text,
)
from pipelines.settings import load_settings, merge, placed, read_yaml
from ptv2_core.config import TrainConfig
from ptv2_core.data.tasks import METRICS, NAME_PATTERN
from ptv2_core.errors import ConfigError, DataError
from ptv2_core.files import write_text_atomic

PAPER = Path("configs/paper.yaml")
FILE_KEYS = ("train", "tasks")
SHARED = ("head_learning_rate", "weight_decay")
"""Settings that all scripts have in common, and so none is the first to try."""
NOTHING = "none"
"""What a user calls a task without published hyper-parameters."""


class _Entry(Section):
    """One task of the file."""

    about: Text = Field(description="a sentence on what is asked")
    licence: Text = Field(description="the licence of the data, in words")
    fetch: dict[str, Any] = Field(description="a mapping of settings")
    prepare: dict[str, Any] = Field(description="a mapping of settings")
    metric: Text = Field(description="the name of a metric")
    settings: dict[str, dict[str, Any]] = Field(
        description="a mapping of sizes of backbone to their settings, or {}"
    )


class _FamilyEntry(Section):
    """What is published for one size of backbone."""

    backbone: Text = Field(description="the name of a backbone")
    script: Text = Field(description="the name of a script")
    prepare: dict[str, Any] = Field(default={}, description="a mapping of settings")
    train: dict[str, Any] = Field(description="a mapping of settings")


@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """What is published for one size of backbone.

    Attributes:
        backbone: The backbone that was used.
        script: The released script with these settings.
        prepare: What it changes in `prepare`.
        train: What it changes in `train`.
    """

    backbone: str
    script: str
    prepare: Mapping[str, Any]
    train: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class PublishedTask:
    """One task with its source and settings.

    Attributes:
        name: Its name in params.yaml.
        about: What is asked.
        licence: Of the data.
        metric: What scores it.
        fetch: The fetch section.
        prepare: The prepare section.
        settings: What is published, by size of backbone; may be empty.
    """

    name: str
    about: str
    licence: str
    metric: str
    fetch: Mapping[str, Any]
    prepare: Mapping[str, Any]
    settings: Mapping[str, PublishedSettings]

    def of(self, family: str) -> PublishedSettings:
        """Return what is published for a size of backbone.

        Raises:
            ConfigError: Nothing is; says for which something is.
        """
        if family in self.settings:
            return self.settings[family]
        known = ", ".join((*self.settings, NOTHING))
        raise ConfigError(
            f"{self.name}: expected the settings of one of {known}, got {family!r}; `{NOTHING}` "
            "adds the task alone"
        )


def load_published(path: Path = PAPER) -> dict[str, PublishedTask]:
    """Read and check a file of published settings.

    Args:
        path: The file, such as configs/paper.yaml.

    Raises:
        ConfigError: Naming every problem, each with its dotted path and line.
    """
    if not path.is_file():
        raise ConfigError(f"expected published settings at {path}, found no such file")
    values, lines = read_yaml(path)
    found: Found = []
    tasks = _build(values, found)
    if found:
        raise ConfigError([placed(path, where, message, lines) for where, message in found])
    return tasks


def as_task(
    published: PublishedTask, family: str | None = None, space: SearchSpace | None = None
) -> dict[str, Any]:
    """Return the sections fetch, prepare, search and train of a task of params.yaml.

    Args:
        published: The task.
        family: A size of backbone, as in `published.settings`; none takes no hyper-parameters.
        space: The shared `search.space` that the sections will lie on.

    Raises:
        ConfigError: Nothing is published for `family`.
    """
    sections: dict[str, Any] = {
        "fetch": dict(published.fetch),
        "prepare": dict(published.prepare),
        "search": {},
        "train": {},
    }
    if family is None:
        return sections
    chosen = published.of(family)
    sections["prepare"] |= chosen.prepare
    sections["train"] = dict(chosen.train)
    limits = (space or SearchSettings().space).model_dump(mode="json", exclude_none=True)
    trials = [
        {key: value for key, value in trial.items() if key in limits}
        for trial in first_trials(published, family)
    ]
    wider = _widened(limits, trials)
    if wider:
        sections["search"]["space"] = wider
    if any(trials):
        sections["search"]["first"] = [trial for trial in trials if trial]
    return sections


def first_trials(published: PublishedTask, family: str | None = None) -> list[dict[str, Any]]:
    """Return the published settings as `search.first` takes them.

    Args:
        published: The task.
        family: A size of backbone; none takes all that there are, equal ones once.

    Raises:
        ConfigError: Nothing is published for `family`.
    """
    chosen = published.settings.values() if family is None else [published.of(family)]
    trials: list[dict[str, Any]] = []
    for settings in chosen:
        trial = {
            key: value
            for key, steps in PLACES.items()
            if key not in SHARED and (value := _reached(settings.train, steps)) is not None
        }
        if trial not in trials:
            trials.append(trial)
    return trials


def add_task(
    params_file: Path,
    published: PublishedTask,
    family: str | None = None,
    *,
    name: str | None = None,
) -> None:
    """Append a published task to the tasks of params.yaml, and change nothing else in it.

    Args:
        params_file: The file; it is replaced only by one that loads.
        published: The task.
        family: A size of backbone whose settings are taken; none takes none.
        name: What to call it; its own name without one.

    Raises:
        ConfigError: The file does not load, has the task already, or would not load with it.
    """
    settings = load_settings(params_file)
    name = name or published.name
    if name in settings.tasks:
        raise ConfigError(
            f"tasks.{name}: {params_file} has this task already; change it there, or add the "
            "published one under another name"
        )
    if (
        published.fetch["source"] == "hub"
        and not (settings.root / published.fetch["path"]).exists()
    ):
        raise ConfigError(
            f"tasks.{name}.fetch.path: expected the pin file {published.fetch['path']} in "
            f"{settings.root.resolve()}, found none; copy configs/hub there"
        )
    sections = as_task(published, family, settings.search.space)
    text = _appended(params_file, name, published.about, sections)
    with tempfile.TemporaryDirectory() as folder:
        # under the same name, which messages give
        trial = Path(folder) / params_file.name
        write_text_atomic(trial, text)
        tasks = load_settings(trial).tasks
    if list(tasks) != [*settings.tasks, name]:
        raise ConfigError(f"tasks: cannot append to {params_file}; add {name} to it by hand")
    write_text_atomic(params_file, text)


def needed_first(published: PublishedTask, root: Path) -> str | None:
    """Say what has to be done before the task's data can be fetched; None: nothing.

    Args:
        published: The task.
        root: The folder of params.yaml.
    """
    path = published.fetch["path"]
    if published.fetch["source"] == "hub":
        if not (root / path).is_file():
            return f"put a pin file at {path}"
        try:
            is_pinned = "revision" in tomllib.loads((root / path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not valid TOML: {error}") from error
        return None if is_pinned else f"run `ptv2 pin {path}`, which writes the newest commit"
    if (root / path).exists():
        return None
    files = ", ".join(published.fetch.get("files", {}).values())
    return f"put {files or 'the records'} into {path} (licence: {published.licence})"


# Checking


def _build(values: Mapping[str, Any], found: Found) -> dict[str, PublishedTask]:
    for key in values:
        if key not in FILE_KEYS:
            found.append(((key,), f"unknown section{did_you_mean(key, FILE_KEYS)}"))
    shared = values.get("train", {})
    _check(TrainConfig, shared, ("train",), found)
    entries = values.get("tasks")
    if not isinstance(entries, dict) or not entries:
        found.append((("tasks",), f"expected a mapping with one task at least, got {entries!r}"))
        return {}
    tasks = {}
    for name, entry in entries.items():
        task = _build_task(name, entry, shared, found)
        if task is not None:
            tasks[name] = task
    return tasks


def _build_task(name: str, entry: Any, shared: Any, found: Found) -> PublishedTask | None:
    place = ("tasks", name)
    if not NAME_PATTERN.fullmatch(name):
        found.append((place, f"expected a name of {NAME_PATTERN.pattern}, got {name!r}"))
    checked = _check(_Entry, entry, place, found)
    if checked is None:
        return None
    _check(FetchSettings, checked.fetch, (*place, "fetch"), found)
    prepare = _check(TaskPrepareSettings, checked.prepare, (*place, "prepare"), found)
    if prepare is not None and checked.metric != METRICS[prepare.kind]:
        expected = f"expected {METRICS[prepare.kind]}, which scores kind: {prepare.kind}"
        found.append(((*place, "metric"), f"{expected}; got {checked.metric!r}"))
    settings = {}
    for family, own in checked.settings.items():
        built = _build_family(own, checked.prepare, shared, (*place, "settings", family), found)
        if built is not None:
            settings[family] = built
    return PublishedTask(
        name=name,
        about=checked.about,
        licence=checked.licence,
        metric=checked.metric,
        fetch=MappingProxyType(checked.fetch),
        prepare=MappingProxyType(checked.prepare),
        settings=MappingProxyType(settings),
    )


def _build_family(
    own: Any, prepare: dict[str, Any], shared: Any, place: tuple[str, ...], found: Found
) -> PublishedSettings | None:
    checked = _check(_FamilyEntry, own, place, found)
    if checked is None:
        return None
    _check(TaskPrepareSettings, {**prepare, **checked.prepare}, (*place, "prepare"), found)
    _check(TrainConfig, checked.train, (*place, "train"), found)
    common = shared if isinstance(shared, dict) else {}
    return PublishedSettings(
        backbone=checked.backbone,
        script=checked.script,
        prepare=MappingProxyType(checked.prepare),
        train=MappingProxyType(merge(common, checked.train)),
    )


def _check(
    model: type[Section] | type[TrainConfig], values: Any, place: tuple[str, ...], found: Found
) -> Any:
    problems: Found = []
    section = check_section(model, values, problems)
    found += [((*place, *where), message) for where, message in problems]
    return section


# The space and the file


def _reached(values: Mapping[str, Any], steps: tuple[str, ...]) -> Any:
    for step in steps:
        values = values.get(step) if isinstance(values, Mapping) else None  # type: ignore[assignment]
    return values


def _widened(limits: Mapping[str, Any], trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the ranges that have to grow for all trials to lie in them."""
    wider: dict[str, Any] = {}
    for key, limit in limits.items():
        values = [trial[key] for trial in trials if key in trial]
        if key in ("reparameterization", "prompt_layers"):
            new = [*limit, *(value for value in values if value not in limit)]
        else:
            new = [min([limit[0], *values]), max([limit[1], *values])]
        if new != list(limit):
            wider[key] = new
    return wider


def _appended(params_file: Path, name: str, about: str, sections: Mapping[str, Any]) -> str:
    """Return the text of params.yaml with a task after the last of its tasks."""
    _, places = read_yaml(params_file)
    text = params_file.read_bytes().decode("utf-8")
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.replace("\r\n", "\n").split("\n")
    begin = places[("tasks",)]  # the index of the line after `tasks:`
    first = min(line for where, line in places.items() if len(where) == 2 and where[0] == "tasks")
    if first <= begin:
        raise ConfigError(
            f"tasks: expected one task below another in {params_file}, got them all on line "
            f"{begin}; write them below each other"
        )
    end = begin
    for index in range(begin, len(lines)):
        if re.match(r"[^\s#]", lines[index]):
            break
        # comments at the margin belong to what follows
        if lines[index].strip() and not lines[index].startswith("#"):
            end = index + 1
    indent = len(lines[first - 1]) - len(lines[first - 1].lstrip(" "))
    added = task_lines(name, sections, comment=about, indent=indent)
    tail = lines[end:] or [""]
    return newline.join([*lines[:end], *added, *tail])
