"""Single values of a record, checked: what was expected, what was got, and where."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ptv2_core.data.examples import Record
from ptv2_core.data.fields import KIND_FIELDS, Fields
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import DataError

LONGEST_SHOWN = 80


def field(record: Record, path: str) -> Any:
    """Return a field's value.

    Raises:
        DataError: The record has no such field.
    """
    value: Any = record.values
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            known = ", ".join(sorted(map(str, record.values)))
            raise DataError(f"{record.where}: no field {path!r}; the record has: {known}")
        value = value[part]
    return value


def optional(record: Record, fields: Fields, name: str, *, kind: TaskKind) -> str | None:
    """Return the path of a field that may be missing, None where it is.

    Only a field under its customary name may: one that the settings name must be there.
    """
    path: str | None = getattr(fields, name)
    if path is None:
        return None
    if path != KIND_FIELDS[kind].optional.get(name):
        return path
    return path if record.values.get(path) is not None else None


def text(record: Record, path: str, *, may_be_empty: bool = False) -> str:
    """Return a field that must hold text.

    Raises:
        DataError: It is something else, or empty and may not be.
    """
    value = field(record, path)
    if not isinstance(value, str):
        raise DataError(f"{record.where}: field {path!r} must be text, got {shown(value)}")
    if not value.strip() and not may_be_empty:
        raise DataError(f"{record.where}: field {path!r} is empty; remove the record or fill it in")
    return value


def label(record: Record, path: str) -> str:
    """Return a class's name.

    Raises:
        DataError: It is neither a name nor a whole number nor true or false.
    """
    value = field(record, path)
    if isinstance(value, bool | int | str) and str(value).strip():
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise DataError(
        f"{record.where}: field {path!r} must be a label's name or number, got {shown(value)}"
    )


def number(record: Record, path: str) -> float:
    """Return a finite number; a table's text is read as one.

    Raises:
        DataError: It is not one.
    """
    value = field(record, path)
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(
            f"{record.where}: field {path!r} must be a finite number, got {shown(value)}"
        )
    return found


def whole_number(record: Record, path: str) -> int:
    """Return a whole number; a table's text is read as one.

    Raises:
        DataError: It is not one.
    """
    value = field(record, path)
    found = as_whole_number(value)
    if found is None:
        raise DataError(
            f"{record.where}: field {path!r} must be a whole number, got {shown(value)}"
        )
    return found


def as_whole_number(value: Any) -> int | None:
    """Return a whole number or the one that a text spells; None for all else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        return int(value)
    return None


def strings(record: Record, path: str) -> tuple[str, ...]:
    """Return a list of texts; a text is split at its blanks.

    Raises:
        DataError: It is something else, or empty, or an item is.
    """
    value = field(record, path)
    return checked_strings(record, path, value.split() if isinstance(value, str) else value)


def checked_strings(record: Record, path: str, value: Any) -> tuple[str, ...]:
    """Return a list of texts as it is.

    Raises:
        DataError: It is something else, or empty, or an item is.
    """
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(item, str) for item in value):
        raise DataError(
            f"{record.where}: field {path!r} must be a list of texts, got {shown(value)}"
        )
    if not value:
        raise DataError(f"{record.where}: field {path!r} is empty; remove the record or fill it in")
    blank = next((place for place, item in enumerate(value) if not item.strip()), None)
    if blank is not None:
        raise DataError(f"{record.where}: item {blank + 1} of field {path!r} is empty")
    return tuple(value)


def shown(value: Any) -> str:
    """Return a value as a message shows it, long ones cut."""
    return f"{value!r:.{LONGEST_SHOWN}}"


def named(path: str | None) -> str:
    """Return the name of a field that the settings always give."""
    assert path is not None, "the settings name the fields that a kind needs"
    return path
