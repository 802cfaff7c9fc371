"""Read files that somebody else wrote: plain ones, bounded before anything is allocated.

A number, a length or a nesting that a file claims is believed only once it is below a bound and
agrees with the file's size.
"""

import json
import math
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ptv2_core.errors import ArtifactError

MAX_JSON_BYTES = 16 * 2**20
MAX_JSON_PARTS = 2**19
"""Brackets and commas in a JSON file; each may become an object of some 60 to 230 bytes."""

MAX_JSON_DEPTH = 32
MAX_JSON_DIGITS = 18
MAX_HEADER_BYTES = 2**20
MAX_TENSORS = 16_384
MAX_DIMENSIONS = 8

# what a number takes in each format of safetensors that files here may be in
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
PLAIN_FLOATS = frozenset({"F32"})
ALL_FLOATS = frozenset(_FLOAT_BYTES)


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the header of a safetensors file says, and is true of the file.

    Attributes:
        shapes: Of each tensor.
        data_bytes: Of all tensors.
        size_bytes: Of the whole file.
    """

    shapes: Mapping[str, list[int]]
    data_bytes: int
    size_bytes: int


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Return the bytes of a plain file that is not larger than a bound.

    Raises:
        ArtifactError: It is absent, no plain file, or larger.
    """
    with open_plain(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most_bytes:
            raise ArtifactError(
                f"{path}: expected at most {most_bytes:,} bytes, got {size:,}; get the prompt again"
            )
        data = stream.read(size + 1)
    if len(data) != size:
        raise ArtifactError(f"{path}: changed while it was read; try again")
    return data


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading, unless it is a folder, a pipe or a device.

    Raises:
        ArtifactError: It is not there, or no plain file.
    """
    try:
        # without O_NONBLOCK, opening a pipe waits for somebody who writes into it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read ({_reason(error)})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ArtifactError(f"{path}: expected a plain file; get the prompt again")
    return os.fdopen(descriptor, "rb")


def parse_json(data: bytes, where: object, *, most_bytes: int = MAX_JSON_BYTES) -> Any:
    """Read strict JSON: UTF-8, every key once, finite numbers, bounded in size and depth.

    Args:
        data: The bytes.
        where: Named in errors.
        most_bytes: Bytes of it at most.

    Raises:
        ArtifactError: It is anything else; the message says what.
    """
    if len(data) > most_bytes:
        raise ArtifactError(f"{where}: expected at most {most_bytes:,} bytes, got {len(data):,}")
    parts = sum(data.count(sign) for sign in (b"[", b"{", b","))
    if parts > MAX_JSON_PARTS:
        raise ArtifactError(
            f"{where}: expected JSON of at most {MAX_JSON_PARTS:,} parts, got {parts:,}"
        )
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_short,
        )
        # what Python's own limit lets through would break those who walk the value later
        if _depth(value) > MAX_JSON_DEPTH:
            raise RecursionError
    except RecursionError as error:
        raise ArtifactError(
            f"{where}: not valid JSON (expected at most {MAX_JSON_DEPTH} levels, got more); get "
            "the prompt again"
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{where}: not valid JSON ({error}); get the prompt again") from error
    return value


def read_header(weights: Path, formats: Collection[str] = PLAIN_FLOATS) -> Header:
    """Read the header of a safetensors file, and compare it with the file's size.

    Nothing but the header is read: the tensors must fill the file one after the other.

    Args:
        weights: The file.
        formats: Which its numbers may be in.

    Raises:
        ArtifactError: It is no such file.
    """
    with open_plain(weights) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size_bytes < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
            raise _no_tensors(
                weights,
                f"its header claims {length:,} bytes; expected at most {MAX_HEADER_BYTES:,} within "
                f"a file of {size_bytes:,}",
            )
        text = stream.read(length)
    entries = parse_json(text, f"{weights}: not a safetensors file", most_bytes=MAX_HEADER_BYTES)
    if not isinstance(entries, dict) or len(entries) > MAX_TENSORS:
        raise _no_tensors(weights, f"expected a header of at most {MAX_TENSORS:,} tensors")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _no_tensors(weights, "__metadata__ must be a mapping of texts")
    for name, entry in entries.items():
        _check_entry(name, entry, weights)
    kinds = {entry["dtype"] for entry in entries.values()}
    if not kinds <= set(formats):
        raise ArtifactError(
            f"{weights}: expected {' or '.join(sorted(formats, reverse=True))} tensors, got "
            f"{', '.join(sorted(kinds))}"
        )
    data_bytes = _check_places(entries, weights)
    if 8 + length + data_bytes != size_bytes:
        raise _no_tensors(
            weights,
            f"expected {8 + length + data_bytes:,} bytes, as its header says, got {size_bytes:,}",
        )
    shapes = {name: entry["shape"] for name, entry in entries.items()}
    return Header(shapes=shapes, data_bytes=data_bytes, size_bytes=size_bytes)


def is_whole(value: Any, low: int = 0, high: float = math.inf) -> bool:
    """Tell whether a value is a whole number, not a boolean, from `low` to `high`."""
    return type(value) is int and low <= value <= high


def _check_entry(name: str, entry: Any, weights: Path) -> None:
    wanted = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict):
        raise _no_tensors(weights, f"the entry of {name!r} is no mapping")
    for key in wanted:
        if key not in entry:
            raise _no_tensors(weights, f"an entry without {key}")
    shape, places = entry["shape"], entry["data_offsets"]
    if (
        len(entry) > len(wanted)
        or not isinstance(entry["dtype"], str)
        or not (isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS)
        or not (isinstance(places, list) and len(places) == 2)
        or not all(is_whole(number) for number in (*shape, *places))
    ):
        raise _no_tensors(weights, f"the entry of {name!r} is malformed")


def _check_places(entries: Mapping[str, Any], weights: Path) -> int:
    """Check that tensors follow each other without gap or overlap; return where the last ends."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        size = _FLOAT_BYTES[entry["dtype"]] * math.prod(entry["shape"])
        wanted = [end, end + size]
        if entry["data_offsets"] != wanted:
            raise _no_tensors(
                weights, f"expected {name!r} at bytes {wanted}, got {entry['data_offsets']}"
            )
        end = wanted[1]
    return end


def _no_tensors(weights: Path, what: str) -> ArtifactError:
    return ArtifactError(f"{weights}: not a safetensors file ({what})")


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:60]!r} is there twice")
        found[key] = value
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:30]} is too large a number")
    return value


def _short(text: str) -> int:
    if len(text.lstrip("-")) > MAX_JSON_DIGITS:
        raise ValueError(f"{text[:30]}... is too large a number")
    return int(text)


def _depth(value: Any) -> int:
    """Return how deeply lists and mappings are nested, without recursion."""
    depth, level = 0, [value]
    while level := [part for part in level if isinstance(part, dict | list)]:
        depth += 1
        level = [
            inner for part in level for inner in (part.values() if isinstance(part, dict) else part)
        ]
    return depth
