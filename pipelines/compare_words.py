"""Numbers and settings of a comparison as people read them."""

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.compare_data import Variant
from pipelines.compare_stats import Difference

ABSENT = "-"
AVERAGE = "average"
CLEAR = "*"


def points(score: float) -> str:
    """Return a score of 0 to 1 as points of 100, with one decimal."""
    return f"{100 * score:.1f}"


def spread(mean: float, sd: float | None) -> str:
    """Return mean and standard deviation in points."""
    return points(mean) if sd is None else f"{points(mean)} ± {points(sd)}"


def gap(difference: Difference | None) -> str:
    """Return a difference with its interval, and a mark where that excludes 0."""
    if difference is None:
        return ABSENT
    if difference.low is None or difference.high is None:
        return signed(difference.value)
    ends = f"[{signed(difference.low)}, {signed(difference.high)}]"
    return f"{signed(difference.value)} {ends}" + (f" {CLEAR}" if difference.is_clear else "")


def share(value: float) -> str:
    """Return a share as a percentage with three significant digits."""
    return f"{100 * value:.3g}"


def size(num_bytes: int | None) -> str:
    """Return bytes in the unit that people read."""
    if num_bytes is None:
        return ABSENT
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.1f} {unit}"
    return f"{num_bytes} B"


def wide(share_of_range: float, factor: float) -> str:
    """Return how wide a share of a range of rates is, as the factor between its ends."""
    return f"x{factor**share_of_range:.3g}"


def settings_text(settings: Mapping[str, Any]) -> str:
    """Return settings in one line; numbers with three significant digits."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in settings.items()) or ABSENT


def variant_text(variant: Variant) -> str:
    """Return a variant's method and what it changes, in one line."""
    changes = settings_text(dict(flat(variant.changes)))
    return variant.method if changes == ABSENT else f"{variant.method} with {changes}"


def flat(changes: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested settings by their dotted paths."""
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def signed(difference: float) -> str:
    """Return a difference of scores in points, with its sign."""
    # what rounds to nothing has no sign
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("+0.0", "0.0")


def p_value(value: float, resamples: int) -> str:
    """Return a p-value; the least that so many resamples can show is a bound, not a number."""
    least = 2 / (resamples + 1)
    return f"≤ {least:.1g}" if value <= least else f"{value:.3g}"


def value_text(value: object) -> str:
    """Return a setting's value; a number with three significant digits."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list | tuple):
        return "[" + " ".join(map(str, value)) + "]"
    return str(value)
