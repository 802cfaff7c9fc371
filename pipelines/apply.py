"""`ptv2 apply`: the winner of a task's last sweep goes into params.yaml; nothing else changes."""

import difflib
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.apply_yaml import UneditableError, set_value, value_text
from pipelines.checking import did_you_mean
from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.schema import PLACES
from pipelines.settings import load_settings, merge, read_yaml
from pipelines.sweep.record import FILE, SweepRecord
from ptv2_core.errors import ConfigError
from ptv2_core.files import write_bytes_atomic


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What `apply` did, or would do.

    Attributes:
        file: The params.yaml.
        record: The sweep whose winner was taken.
        changes: The winner's settings, nested as in the train section.
        diff: Lines of a unified diff of the file; none where it has the settings already.
        written: Whether the file was changed.
        searched: Whether the stage `search` will look for other settings still.
    """

    file: Path
    record: SweepRecord
    changes: Mapping[str, Any]
    diff: tuple[str, ...]
    written: bool
    searched: bool


def apply(root: Path, task: str, *, dry_run: bool = False) -> Applied:
    """Write the winner of a task's last sweep into `tasks.TASK.train` of params.yaml.

    Only the values change: comments, order, quotes, spacing and line ends stay as they are. The
    file is replaced only by one that loads, and that differs in nothing but these settings.

    Args:
        root: The workspace.
        task: The task.
        dry_run: Whether to leave the file as it is.

    Raises:
        ConfigError: params.yaml has mistakes, or no such task.
        PipelineError: There is no sweep, its winner does not fit, or the file has to be edited by
            hand.
    """
    file = root / "params.yaml"
    before, _ = read_yaml(file)
    own = _own_train(file, before, task)
    paths = TaskPaths(root=root, task=task)
    record, changes = _winner(paths)
    raw = file.read_bytes()
    text = raw.decode("utf-8")
    new = text if _has(file, task, changes) else _edited(text, file, task, own, changes)
    searched = _check(new, file, task, before, changes) if new != text else _searched(file, task)
    if new != text and not dry_run:
        _replace(file, new)
    return Applied(
        file=file,
        record=record,
        changes=changes,
        diff=_diff(text, new, file.name),
        written=new != text and not dry_run,
        searched=searched,
    )


def sentences(applied: Applied) -> list[str]:
    """Say what was done, and what to run next."""
    record, file = applied.record, applied.file
    best = record.finalists[0]
    scores = "its seed" if len(best.scores) == 1 else f"{len(best.scores)} seeds"
    winner = f"trial {best.number} of {len(record.trials)}, dev {record.metric} {best.mean:.4f}"
    told = [f"winner    {winner} over {scores}, study {record.study}"]
    if not applied.diff:
        return [*told, f"{file} has these settings already; nothing to change"]
    if not applied.written:
        return [*told, f"{file} is unchanged; `ptv2 apply {record.task}` writes this"]
    told.append(f"wrote {file}; next: ptv2 run --task {record.task}, or dvc repro")
    if applied.searched:
        told.append(
            "  its stage search begins with these settings and may find others; "
            f"tasks.{record.task}.search.n_trials: 0 takes them as they are"
        )
    return told


def _winner(paths: TaskPaths) -> tuple[SweepRecord, dict[str, Any]]:
    """Return a task's last sweep and its winner's settings."""
    file = paths.sweep / FILE
    again = f"run `ptv2 sweep --task {paths.task}` again"
    record = SweepRecord.read(paths)
    if record.task != paths.task:
        raise PipelineError(f"{file}: expected a sweep of {paths.task}, got {record.task}; {again}")
    for name in record.winner.params:
        if name not in PLACES:
            hint = did_you_mean(name, list(PLACES))
            raise PipelineError(f"{file}: {name!r} is no setting of a search{hint}; {again}")
    return record, record.winner.changes


def _own_train(file: Path, values: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return what the task's own train section says; empty where it has none."""
    tasks = values.get("tasks")
    known = list(tasks) if isinstance(tasks, dict) else []
    if not isinstance(tasks, dict) or task not in tasks:
        hint = did_you_mean(task, known)
        raise ConfigError(f"expected a task of {file} ({', '.join(known)}), got {task!r}{hint}")
    section = tasks[task]
    own = section.get("train") if isinstance(section, dict) else None
    return own if isinstance(own, dict) else {}


# The edit


def _leaves(values: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *above, key)
        else:
            yield (*above, key), value


def _edited(
    text: str, file: Path, task: str, own: Mapping[str, Any], changes: Mapping[str, Any]
) -> str:
    said = dict(_leaves(own))
    for path, value in _leaves(changes):
        if path in said and said[path] == value:
            continue
        try:
            text = set_value(text, ("tasks", task, "train", *path), value)
        except UneditableError as error:
            raise _by_hand(file, task, changes, str(error)) from error
    return text


def _by_hand(file: Path, task: str, changes: Mapping[str, Any], why: str) -> PipelineError:
    lines = [f"  {'.'.join(path)}: {value_text(value)}" for path, value in _leaves(changes)]
    return PipelineError(
        f"{file} is unchanged: {why}, and setting a value there would touch more than that value. "
        f"Write the winner into tasks.{task}.train by hand:\n" + "\n".join(lines)
    )


def _has(file: Path, task: str, changes: Mapping[str, Any]) -> bool:
    """Tell whether the task has these settings already, be it from the shared section."""
    try:
        train = load_settings(file).task(task).train.to_mapping()
    except ConfigError:
        return False  # `_check` says what is wrong, if the edit does not mend it
    return bool(merge(train, dict(changes)) == train)


def _searched(file: Path, task: str) -> bool:
    return load_settings(file).task(task).search.n_trials > 0


def _check(
    text: str, file: Path, task: str, before: Mapping[str, Any], changes: Mapping[str, Any]
) -> bool:
    """Refuse a text that says anything else than before, with the changes laid over it."""
    with tempfile.TemporaryDirectory() as folder:
        # under the same name, which messages give
        trial = Path(folder) / file.name
        trial.write_bytes(text.encode("utf-8"))
        try:
            after, _ = read_yaml(trial)
        except ConfigError as error:
            raise _by_hand(file, task, changes, f"tasks.{task} is of an unusual form") from error
        section = before["tasks"][task] or {}
        train = merge(section.get("train") or {}, dict(changes))
        tasks = {**before["tasks"], task: {**section, "train": train}}
        if after != {**before, "tasks": tasks}:
            why = f"tasks.{task}.train has anchors, aliases or merge keys that others share"
            raise _by_hand(file, task, changes, why)
        try:
            return _searched(trial, task)
        except ConfigError as error:
            load_settings(file)  # its own mistakes first
            raise PipelineError(
                f"{file} is unchanged: the winner of the sweep does not fit its other settings. "
                f"{error}\nMend these, or run `ptv2 sweep --task {task}` again"
            ) from error


def _replace(file: Path, text: str) -> None:
    """Write the file, keeping its mode, and the link where it is one."""
    target = file.resolve()
    mode = stat.S_IMODE(target.stat().st_mode)
    write_bytes_atomic(target, text.encode("utf-8"))
    target.chmod(mode)


def _diff(old: str, new: str, name: str) -> tuple[str, ...]:
    lines = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"a/{name}", f"b/{name}", lineterm=""
    )
    return tuple(lines)
