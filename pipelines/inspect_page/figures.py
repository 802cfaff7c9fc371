"""The plots of an inspection's page, as SVG that stands in the page; colours are the page's."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from pipelines.inspection import Epoch, Inspection
from pipelines.page_shell import blend
from ptv2_core.training.records import LayerRecord

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 10, 34
NUM_TICKS = 4
# more would be a line of dots
MOST_DOTS = 40
# from the lowest layer to the highest; readable on light and on dark
RAMP = ((0x3B, 0x7F, 0xF0), (0x0F, 0x9D, 0x76), (0xD9, 0x77, 0x06), (0xD6, 0x33, 0x6C))


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot over the epochs, a line for each layer.

    Attributes:
        title: Its heading.
        says: How to read it, in a sentence.
        value: What of a layer is drawn.
        factor: By which it is multiplied.
        unit: Behind the numbers of the axis.
        is_log: Whether the axis is logarithmic.
    """

    title: str
    says: str
    value: Callable[[LayerRecord], float | None]
    factor: float = 1.0
    unit: str = ""
    is_log: bool = False


FIGURES = (
    Figure(
        title="Attention on the prompt",
        says="Share of the tokens' attention, mean over heads, on rows of dev.",
        value=lambda one: one.attention,
        factor=100.0,
        unit=" %",
    ),
    Figure(
        title="Gradient norm",
        says="Of the loss with respect to the layer's prompt, before clipping, mean over steps.",
        value=lambda one: one.gradient_norm,
        is_log=True,
    ),
    Figure(
        title="Moved from the start",
        says="Norm of the change since the start, as a share of the norm of the prompt.",
        value=lambda one: one.moved,
        factor=100.0,
        unit=" %",
    ),
    Figure(
        title="Norm of the keys",
        says="Root mean square of the prompt's keys.",
        value=lambda one: one.key_norm,
    ),
    Figure(
        title="Norm of the values",
        says="Root mean square of the prompt's values.",
        value=lambda one: one.value_norm,
    ),
    Figure(
        title="Effective rank of the keys",
        says="How many positions differ; the prompt length where nothing is shared.",
        value=lambda one: one.key_rank,
    ),
    Figure(
        title="Effective rank of the values",
        says="How many positions differ; the prompt length where nothing is shared.",
        value=lambda one: one.value_rank,
    ),
)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """Where a number is on an axis: `low` at `start`, `high` at `end`, in pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, given = self.low, self.high, value
        if self.is_log:
            low, high, given = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (self.end - self.start) * (given - low) / (high - low)


def colour(place: int, count: int) -> str:
    """Return the colour of a layer, `place` among `count` from the lowest."""
    return blend(RAMP, 0.0 if count < 2 else place / (count - 1))


def draw(figure: Figure, inspection: Inspection) -> str | None:
    """Return a plot as SVG; None where there is nothing to draw."""
    lines = _lines(figure, inspection.epochs)
    values = [value for points in lines for _, value in points]
    if not values:
        return None
    last = inspection.epochs[-1].epoch
    across = _Axis(low=0, high=max(last, 1), start=LEFT, end=WIDTH - RIGHT)
    up = _up(values, is_log=figure.is_log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(figure.title)}">',
        *_grid(up, figure.unit),
        *_epochs(across, last),
        *_best(across, inspection.best_epoch),
    ]
    for place, points in enumerate(lines):
        if points:
            layer = inspection.layers[place].layer
            parts += _line(points, layer, colour(place, len(lines)), across, up, figure.unit)
    return "\n".join([*parts, "</svg>"])


def _lines(figure: Figure, epochs: Sequence[Epoch]) -> list[list[tuple[int, float]]]:
    """Return the points `(epoch, value)` of each layer."""
    count = len(epochs[0].layers) if epochs else 0
    lines: list[list[tuple[int, float]]] = [[] for _ in range(count)]
    for one in epochs:
        for place, layer in enumerate(one.layers):
            value = figure.value(layer)
            # nought has no place on a logarithmic axis
            if value is not None and not (figure.is_log and value <= 0.0):
                lines[place].append((one.epoch, figure.factor * value))
    return lines


def _up(values: Sequence[float], *, is_log: bool) -> _Axis:
    start, end = HEIGHT - BOTTOM, TOP
    if is_log:
        low = 10.0 ** math.floor(math.log10(min(values)))
        high = 10.0 ** math.ceil(math.log10(max(values)))
        return _Axis(low=low, high=max(high, 10 * low), start=start, end=end, is_log=True)
    step = _step(max(values))
    return _Axis(low=0.0, high=step * math.ceil(max(values) / step) or 1.0, start=start, end=end)


def _step(highest: float) -> float:
    """Return a round distance between ticks."""
    if highest <= 0.0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(highest / NUM_TICKS))
    return next(size * by for by in (1, 2, 2.5, 5, 10) if size * by * NUM_TICKS >= highest)


def _grid(up: _Axis, unit: str) -> list[str]:
    if up.is_log:
        first, last = round(math.log10(up.low)), round(math.log10(up.high))
        every = max(1, (last - first) // NUM_TICKS)
        ticks = [10.0**power for power in range(first, last + 1, every)]
    else:
        step = _step(up.high)
        ticks = [step * place for place in range(round(up.high / step) + 1)]
    parts = []
    for tick in ticks:
        y = up.place(tick)
        parts.append(
            f'<line class="grid-line" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
            f"{tick:g}{unit}</text>"
        )
    return parts


def _epochs(across: _Axis, last: int) -> list[str]:
    step = max(1, math.ceil(_step(max(last, 1))))
    baseline = HEIGHT - BOTTOM
    parts = [
        f'<text class="tick" x="{across.place(epoch):.1f}" y="{baseline + 15}" '
        f'text-anchor="middle">{epoch}</text>'
        for epoch in range(0, last + 1, step)
    ]
    middle = (across.start + across.end) / 2
    return [
        *parts,
        f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 4}" text-anchor="middle">epoch</text>',
    ]


def _best(across: _Axis, best: int | None) -> list[str]:
    if best is None:
        return []
    x = across.place(best)
    return [
        f'<line class="best" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>epoch {best}: the best on dev, and the prompt that was kept</title></line>"
    ]


def _line(
    points: Sequence[tuple[int, float]],
    layer: int,
    stroke: str,
    across: _Axis,
    up: _Axis,
    unit: str,
) -> list[str]:
    placed = [(across.place(epoch), up.place(value)) for epoch, value in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="2">'
        f"<title>layer {layer}</title></polyline>"
    ]
    if len(points) <= MOST_DOTS:
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{stroke}">'
            f"<title>layer {layer}, epoch {epoch}: {value:.3g}{unit}</title></circle>"
            for (epoch, value), (x, y) in zip(points, placed, strict=True)
        ]
    return parts
