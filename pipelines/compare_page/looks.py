"""How each name of a comparison is drawn: told apart by shape as well as by colour."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.compare_data import Comparison


@dataclass(frozen=True, kw_only=True)
class Look:
    """A colour, readable on light and on dark, and one of Plotly's symbols."""

    colour: str
    symbol: str


METHOD_LOOKS = {
    "probe": Look(colour="#8b8f98", symbol="square"),
    "prompt_tuning": Look(colour="#d97706", symbol="triangle-up"),
    "ptv2": Look(colour="#3b7ff0", symbol="circle"),
    "finetune": Look(colour="#0f9d76", symbol="diamond"),
}
# of the variants, in their order; one more symbol than colours, so that few pairs come twice
COLOURS = ("#a855f7", "#e0438c", "#0ea5c6", "#dc4a3d", "#9a6b3f", "#7c9a1f")
SYMBOLS = ("star", "cross", "triangle-down", "pentagon", "x", "hexagon", "bowtie")


def looks_of(comparison: Comparison) -> Mapping[str, Look]:
    """Return the look of each name: that of the method, or the next free one."""
    own = {
        variant.name: Look(
            colour=COLOURS[place % len(COLOURS)], symbol=SYMBOLS[place % len(SYMBOLS)]
        )
        for place, variant in enumerate(comparison.variants)
    }
    return {**METHOD_LOOKS, **own}
