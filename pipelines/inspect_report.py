"""What the figures of a prompt mean: the cells of its table, and sentences that explain them."""

from collections.abc import Callable, Sequence

from pipelines.inspection import Inspection, LayerRow

IDLE_ATTENTION = 0.02
"""Below this share the prompt does next to nothing: the tokens' own values outweigh it 50 to 1."""

CROWDED_ATTENTION = 0.9
"""Above this share the tokens hardly see each other."""

LOUD_VALUES = 3.0
"""Values so many times as large as the tokens' own are outside what the layers above know."""

LOW_RANK_SHARE = 0.25
"""Positions that span so little of what they could are a quarter as many for the same prompt."""

LONG_PROMPT = 8
"""A shorter prompt costs next to nothing, however little of it is used."""

STILL = 0.05
"""A prompt that moved less is its start, to the eye: AdamW's first steps alone do as much."""

HEADERS = (
    "layer",
    "attention",
    "since start",
    "busiest head",
    "keys / own",
    "values / own",
    "key rank",
    "value rank",
    "moved",
    "gradient",
)
ABSENT = "-"


def cells(row: LayerRow) -> tuple[str, ...]:
    """Return the texts of a layer's row, in the order of `HEADERS`."""
    change = None
    if row.attention is not None and row.start_attention is not None:
        change = row.attention - row.start_attention
    busiest = max(row.head_attention, default=None)
    place = row.head_attention.index(busiest) if busiest is not None else None
    gradient = ABSENT
    if row.first_gradient is not None and row.last_gradient is not None:
        gradient = f"{row.first_gradient:.2g} -> {row.last_gradient:.2g}"
    return (
        str(row.layer),
        _percent(row.attention),
        ABSENT if change is None else f"{100 * change:+.1f}",
        ABSENT if place is None else f"{place}: {_percent(busiest)}",
        _times(row.key_ratio),
        _times(row.value_ratio),
        f"{row.key_rank:.1f}",
        f"{row.value_rank:.1f}",
        _percent(row.moved),
        gradient,
    )


def explain(inspection: Inspection) -> list[str]:
    """Return what the figures say, in sentences; the first sums up, the others are to act on."""
    rules: tuple[Callable[[Inspection], str | None], ...] = (
        _idle,
        _crowded,
        _loud,
        _low_rank,
        _still,
        _unfinished,
    )
    found = [sentence for rule in rules if (sentence := rule(inspection)) is not None]
    summary = _summary(inspection)
    return [
        *([] if summary is None else [summary]),
        *(found or ["Nothing in these figures asks for other settings."]),
    ]


def _summary(inspection: Inspection) -> str | None:
    known = [(row.attention, row.layer) for row in inspection.layers if row.attention is not None]
    if not known:
        return None
    mean = sum(attention for attention, _ in known) / len(known)
    (least, lowest), (most, highest) = min(known), max(known)
    begun = [r.start_attention for r in inspection.layers if r.start_attention is not None]
    before = f" ({_percent(sum(begun) / len(begun))} at the start)" if begun else ""
    return (
        f"The prompt gets {_percent(mean)} of the attention{before}: most in layer {highest} "
        f"({_percent(most)}), least in layer {lowest} ({_percent(least)})."
    )


def _idle(inspection: Inspection) -> str | None:
    idle = [row.layer for row in inspection.layers if _weight(row) < IDLE_ATTENTION]
    if not idle:
        return None
    found = f"{_named(idle)} the prompt gets under {_percent(IDLE_ATTENTION, 0)} of the attention"
    left = [row.layer for row in inspection.layers if row.layer not in idle]
    if not left:
        return (
            f"{found}: it does nothing. Try a higher train.learning_rate, or another "
            "train.prompt.start."
        )
    if left == list(range(inspection.num_layers))[-len(left) :]:
        return (
            f"{found}: it does nothing there. Prompts in the top layers alone "
            f"(train.prompt.layers: {len(left)}) would cost less."
        )
    return f"{found}: it does nothing there. train.prompt.layers: {left} leaves them out."


def _weight(row: LayerRow) -> float:
    """Return the attention that counts: large values weigh more than their share says."""
    if row.attention is None:
        return 1.0
    return row.attention * max(1.0, row.value_ratio or 1.0)


def _crowded(inspection: Inspection) -> str | None:
    crowded = [
        row.layer
        for row in inspection.layers
        if row.attention is not None and row.attention > CROWDED_ATTENTION
    ]
    if not crowded:
        return None
    return (
        f"{_named(crowded)} the prompt gets over {_percent(CROWDED_ATTENTION, 0)} of the "
        "attention: the tokens hardly see each other. A lower train.learning_rate or a shorter "
        "prompt leaves them room."
    )


def _loud(inspection: Inspection) -> str | None:
    loud = {
        row.layer: row.value_ratio
        for row in inspection.layers
        if row.value_ratio is not None and row.value_ratio > LOUD_VALUES
    }
    if not loud:
        return None
    return (
        f"{_named(list(loud))} the prompt's values are up to {_times(max(loud.values()))} as "
        "large as the tokens' own: the learning rate is high, or the prompt is short for what it "
        "has to do. Compare a lower train.learning_rate with a longer train.prompt.length."
    )


def _low_rank(inspection: Inspection) -> str | None:
    length = inspection.prompt_length
    rank = max(max(row.key_rank, row.value_rank) for row in inspection.layers)
    if length < LONG_PROMPT or rank >= LOW_RANK_SHARE * length:
        return None
    enough = 1 << max(0, round(rank) - 1).bit_length()
    return (
        f"The effective rank is {rank:.1f} of {length} at most: the positions say much the same. "
        f"A shorter prompt (train.prompt.length: {enough}) may do."
    )


def _still(inspection: Inspection) -> str | None:
    moved = [row.moved for row in inspection.layers if row.moved is not None]
    if not moved or max(moved) >= STILL:
        return None
    return (
        f"The prompt hardly moved from its start ({_percent(max(moved))} of its norm at most): "
        "the head did the learning. train.learning_rate is too low, or train.epochs too few."
    )


def _unfinished(inspection: Inspection) -> str | None:
    if not inspection.best_epoch == inspection.epochs_run == inspection.epochs_asked:
        return None
    return (
        f"The best epoch is the last one ({inspection.best_epoch}): dev was still getting better. "
        "More train.epochs may help."
    )


def _named(layers: Sequence[int]) -> str:
    """Return layers in words, neighbours as a range: `In layers 0-2 and 5`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"In layer{'s' if len(layers) > 1 else ''} {listed}"


def _percent(share: float | None, digits: int = 1) -> str:
    return ABSENT if share is None else f"{100 * share:.{digits}f} %"


def _times(ratio: float | None) -> str:
    return ABSENT if ratio is None else f"{ratio:.1f}x"
