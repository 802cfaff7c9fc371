"""What a training learns from: one data set, or several that share a prompt (paper, MPT-2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ptv2_core.config import TrainConfig
from ptv2_core.data.batching import shuffled_batches
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set and the slot that answers it.

    Attributes:
        slot: Its prompt and head are trained; sources that share a prompt have a slot each, with
            the same prompt.
        task: Labels and metric.
        train: Rows to learn from.
        dev: Rows that choose the epoch.
    """

    slot: int
    task: TaskSpec
    train: EncodedSplit
    dev: EncodedSplit


@dataclass(frozen=True, kw_only=True)
class Step:
    """The rows of one step: units of one source."""

    source: int
    units: LongArray


def plan_epoch(
    sources: Sequence[Source], config: TrainConfig, epoch: int, *, temperature: float = 1.0
) -> list[Step]:
    """Return the steps of an epoch, a function of seed and epoch alone.

    An epoch has as many steps as all sources have batches. A source's share of them is that of
    its rows raised to `1 / temperature`: 1 gives each row once; the higher, the more alike the
    shares, a small source repeated and a large one sampled.

    Args:
        sources: One or more.
        config: Batch size, token budget and seed.
        epoch: Counted from 0.
        temperature: Of the mixture, 1 or more.
    """

    def batches(source: Source, turn: int) -> list[LongArray]:
        return shuffled_batches(
            source.train.unit_lengths,
            batch_size=config.batch_size,
            token_budget=config.token_budget,
            seed=config.seed,
            epoch=turn,
        )

    own = [batches(source, epoch) for source in sources]
    if len(sources) == 1:
        return [Step(source=0, units=units) for units in own[0]]
    steps: list[Step] = []
    total = sum(map(len, own))
    shares = mixing_shares([len(source.train) for source in sources], temperature)
    for place, (source, found) in enumerate(zip(sources, own, strict=True)):
        wanted = len(found) if temperature == 1.0 else max(1, round(total * shares[place]))
        turn = 0
        while len(found) < wanted:
            turn += 1
            found = [*found, *batches(source, epoch + turn * config.epochs)]
        steps += [Step(source=place, units=units) for units in found[:wanted]]
    order = np.random.default_rng([config.seed, epoch, len(sources)]).permutation(len(steps))
    return [steps[place] for place in order]


def mixing_shares(sizes: Sequence[int], temperature: float) -> list[float]:
    """Return each source's share of the steps: `size ** (1 / temperature)`, summing to 1."""
    # from the largest down, so that no power overflows
    logs = [math.log(size) / temperature for size in sizes]
    powers = [math.exp(log - max(logs)) for log in logs]
    return [power / sum(powers) for power in powers]
