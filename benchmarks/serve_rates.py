"""How many requests a second: our engine and its peers, in turn, with the same clients waiting.

So many clients ask one row each and ask again as soon as they are answered. A way that answers one
task at a time takes the requests in the order in which they came, so a request's latency is the sum
of the times of those before it; our engine's latencies are measured.

Letters: T tokens.
"""

import asyncio
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.serve_parts import MAX_LENGTH, Prompts, run_on_loop, task_of
from benchmarks.serve_ways import IdsArray, LogitsArray, Way, grouped
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.evaluation.codec import Codec
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_serving.engine.engine import Engine, EngineConfig
from ptv2_serving.engine.forward import BackboneChoice

TIMEOUT_S = 120.0
WARM_UP = 128
MIXED, ONE_TASK, ROUNDED = "mixed", "one_task", "mixed_int8"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Requests of one row of T tokens each.

    Attributes:
        tokens: T.
        splits: As our engine takes them.
        ids: The same `[requests, T]`.
        slots: Whose prompt each asks.
    """

    tokens: int
    splits: Sequence[EncodedSplit]
    ids: IdsArray
    slots: Sequence[int]

    def first(self, count: int) -> "Rows":
        """Return the first so many requests."""
        return Rows(
            tokens=self.tokens,
            splits=self.splits[:count],
            ids=self.ids[:count],
            slots=self.slots[:count],
        )

    def only(self, slot: int) -> "Rows":
        """Return the same texts, all asked of one prompt."""
        return Rows(
            tokens=self.tokens, splits=self.splits, ids=self.ids, slots=[slot] * len(self.slots)
        )


@dataclass(kw_only=True)
class Measured:
    """What a way did in its rounds.

    Attributes:
        per_s: Requests a second, a round each.
        p95_ms: Likewise.
    """

    per_s: list[float] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)

    def add(self, seconds: float, latencies_s: Sequence[float]) -> None:
        """Take a round."""
        self.per_s.append(len(latencies_s) / seconds)
        self.p95_ms.append(float(np.percentile(latencies_s, 95)) * 1e3)

    @property
    def rate(self) -> float:
        """Requests a second, the median of the rounds."""
        return statistics.median(self.per_s)

    @property
    def p95(self) -> float:
        """Milliseconds, the median of the rounds."""
        return statistics.median(self.p95_ms)


def make_rows(prompts: Prompts, *, tokens: int, count: int, tasks: int) -> Rows:
    """Draw requests: a text and a task each.

    Args:
        prompts: Whose tokenizer encodes.
        tokens: T.
        count: How many.
        tasks: How many prompts are asked, each about as often.
    """
    codec = Codec(load_tokenizer(prompts.location), task_of("any"), max_length=MAX_LENGTH)
    splits = [
        codec.encode([{"text": text}]).split
        for text in prompts.texts.make(tokens, count, seed=tokens)
    ]
    ids = np.stack([split.input_ids for split in splits]).astype(np.int64)
    assert ids.shape == (count, tokens), "each text has exactly T tokens"
    slots = np.random.default_rng(tokens).integers(tasks, size=count).tolist()
    return Rows(tokens=tokens, splits=splits, ids=ids, slots=slots)


class Served:
    """Our engine with prompts resident, driven by clients on an event loop."""

    def __init__(self, choice: BackboneChoice, config: EngineConfig) -> None:
        """Start it; `close` ends it."""
        from ptv2_serving.run import new_event_loop

        self.runner = asyncio.Runner(loop_factory=new_event_loop)
        self.engine = Engine(choice, config)
        self.slots: list[int] = []
        self.runner.run(self.engine.start())

    @property
    def pid(self) -> int:
        """The process that computes."""
        return self.engine.pool.workers[0].pid or 0

    def put(self, folders: Sequence[Path]) -> None:
        """Load prompts; the n-th one that was ever loaded is asked as slot n."""
        for folder in folders:
            self.slots.append(self.runner.run(self.engine.put(folder, alone=False)))

    def ask(self, rows: Rows, clients: int) -> tuple[float, list[float], list[LogitsArray]]:
        """Answer all requests; return the seconds, each request's own, and the logits."""
        return self.runner.run(self._ask(rows, clients))

    async def _ask(self, rows: Rows, clients: int) -> tuple[float, list[float], list[LogitsArray]]:
        latencies = [0.0] * len(rows.slots)
        logits: list[LogitsArray] = [np.empty(0, np.float32)] * len(rows.slots)
        places: Iterator[int] = iter(range(len(rows.slots)))

        async def client() -> None:
            for place in places:
                asked = time.perf_counter()
                found = await self.engine.compute(
                    self.slots[rows.slots[place]], rows.splits[place], timeout_s=TIMEOUT_S
                )
                latencies[place] = time.perf_counter() - asked
                logits[place] = found.logits[0].numpy()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return time.perf_counter() - started, latencies, logits

    def close(self) -> None:
        """End it."""
        self.runner.run(self.engine.close())
        self.runner.close()


def one_by_one(way: Way, rows: Rows, clients: int) -> tuple[float, list[float]]:
    """Answer requests one after the other; return the seconds, and each request's own.

    A client asks again when it is answered, so a request waits for the `clients - 1` before it.
    """
    services = []
    for place, slot in enumerate(rows.slots):
        began = time.perf_counter()
        way.answer(slot, rows.ids[place : place + 1])
        services.append(time.perf_counter() - began)
    return sum(services), waits(services, clients)


def waits(services: Sequence[float], clients: int) -> list[float]:
    """Return the latency of each request that waits for those of all other clients, and its own."""
    total = np.concatenate([[0.0], np.cumsum(services)])
    begins = np.maximum(np.arange(len(services)) - clients + 1, 0)
    found: list[float] = (total[1:] - total[begins]).tolist()
    return found


def by_task(way: Way, rows: Rows, clients: int) -> tuple[float, list[float]]:
    """Answer all requests that wait, those of one task together; as `one_by_one`."""
    latencies, total = [], 0.0
    for first in range(0, len(rows.slots), clients):
        slots, began = rows.slots[first : first + clients], time.perf_counter()
        for slot, places in grouped(slots).items():
            way.answer(slot, rows.ids[first + np.array(places)])
            latencies += [time.perf_counter() - began] * len(places)
        total += time.perf_counter() - began
    return total, latencies


def differences(
    served: Served, ways: Sequence[Way], rows: Rows, *, requests: int
) -> dict[str, float]:
    """Return how far each way's logits are from ours at most, as a share of the largest."""
    few = rows.first(requests)
    ours = logits_of(served, few)
    return {
        way.key: distance(
            ours,
            np.concatenate(
                [way.answer(slot, ids[None]) for slot, ids in zip(few.slots, few.ids, strict=True)]
            ),
        )
        for way in ways
    }


def logits_of(served: Served, rows: Rows) -> LogitsArray:
    """Return the logits `[requests, C]` of our engine, all requests waiting at once."""
    return np.stack(served.ask(rows, len(rows.slots))[2])


def distance(ours: LogitsArray, theirs: LogitsArray) -> float:
    """Return how far logits are from others at most, as a share of the largest of those."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def compare(
    served: Served,
    rounded: Served,
    ways: Sequence[Way],
    rows: Rows,
    *,
    clients: int,
    rounds: int,
    peer_rows: int,
) -> Mapping[str, Measured]:
    """Measure our engine, in two number formats, and the peers in turn.

    Args:
        served: Ours in the format of the peers.
        rounded: Ours in int8.
        ways: The peers.
        rows: Requests of many tasks.
        clients: That ask.
        rounds: After a short one to warm up.
        peer_rows: Of the requests, how many a peer answers in a round: it takes longer.
    """
    found: dict[str, Measured] = {}
    for round_number in range(rounds + 1):
        ours = rows if round_number else rows.first(WARM_UP)
        short = ours.first(peer_rows)
        results = {
            MIXED: served.ask(ours, clients)[:2],
            ONE_TASK: served.ask(ours.only(rows.slots[0]), clients)[:2],
            ROUNDED: rounded.ask(ours, clients)[:2],
        }
        for way in ways:
            results[way.key] = one_by_one(way, short, clients)
            results[f"{way.key}_by_task"] = by_task(way, short, clients)
        if round_number:
            for key, (seconds, latencies) in results.items():
                found.setdefault(key, Measured()).add(seconds, latencies)
    return found


__all__ = ["Measured", "Rows", "Served", "by_task", "compare", "one_by_one", "run_on_loop"]
