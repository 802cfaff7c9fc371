"""`python -m benchmarks.fleet`: from one machine to 10,000 tasks and 100,000 requests a second.

A simulation, fed by what `benchmarks.serve` measured: what a batch costs, a prompt's size and its
loading, what HTTP costs a request, and a look at the registry. It says at which load an engine
process still answers in time, how many of them a fleet needs, what its memory holds, which limit
comes first, and how an alias moves across it. See docs/scale.md.

Letters: T tokens.
"""

import argparse
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group
from rich.table import Table

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "serve-quick.json"
TABLE_WIDTH = 125
REQUESTS = 20_000
SEED = 0
P95_S = 0.05
BUDGET, BATCH_ROWS = 1024, 64
# how busy a process that speaks HTTP may be, so that a burst finds room
HTTP_BUSY = 0.7
LOADS = (0.2, 0.5, 0.7, 0.8, 0.9, 0.95)

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What was measured.

    Attributes:
        fixed_s: Of a batch.
        row_s: Of each of its rows.
        token_s: Of each token.
        http_s: Of a request, in the process that speaks HTTP.
        prompt_bytes: Of a resident prompt, as the process that holds it grew.
        file_bytes: Of its file.
        prompt_load_s: From a file in the page cache to an engine process that has it.
        look_s: Of a look at the registry, however few tasks it has.
        look_task_s: Likewise, and this much for each task.
        swap_s: From a moved alias seen to the first answer.
        backbone_bytes: Shared by the engine processes of a machine.
    """

    fixed_s: float
    row_s: float
    token_s: float
    http_s: float
    prompt_bytes: int
    file_bytes: int
    prompt_load_s: float
    look_s: float
    look_task_s: float
    swap_s: float
    backbone_bytes: int

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> "Costs":
        """Take them from the JSON of `benchmarks.serve`."""
        costs, http, residents = figures["costs"], figures["http"], figures["residents"]
        few, many = figures["looks"][0], figures["looks"][-1]
        look_task_s = max(0.0, many["ms"] - few["ms"]) / (many["tasks"] - few["tasks"]) / 1e3
        return cls(
            fixed_s=costs["fixed_s"],
            row_s=costs["row_s"],
            token_s=costs["token_s"],
            http_s=http["server_cpu_s"],
            prompt_bytes=residents["bytes_beyond_backbone"] // residents["tasks"],
            file_bytes=figures["swap"]["file_bytes"],
            prompt_load_s=costs["prompt_load_s"],
            look_s=max(0.0, few["ms"] / 1e3 - few["tasks"] * look_task_s),
            look_task_s=look_task_s,
            swap_s=figures["swap"]["median_ms"] / 1e3,
            backbone_bytes=http["backbone_bytes"],
        )

    def batch_s(self, rows: int, tokens: int) -> float:
        """Return the seconds of a batch of rows of T tokens each."""
        return self.fixed_s + rows * (self.row_s + tokens * self.token_s)

    def full(self, tokens: int) -> int:
        """Return the rows of a full batch."""
        return max(1, min(BATCH_ROWS, BUDGET // tokens))

    def most_per_s(self, tokens: int) -> float:
        """Return the requests a second of full batches."""
        rows = self.full(tokens)
        return rows / self.batch_s(rows, tokens)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a fleet is made of.

    Attributes:
        cores: Each for an engine process or for one that speaks HTTP.
        memory_bytes: For backbone and prompts.
        network_bytes_s: Each way.
    """

    cores: int = 16
    memory_bytes: int = 64 * 2**30
    network_bytes_s: int = 10**9


@dataclass(frozen=True, kw_only=True)
class Queue:
    """What an engine process does under a load.

    Attributes:
        per_s: Requests that arrive a second.
        rows: Of a batch, on average.
        mean_s: From arrival to answer.
        p50_s: Likewise.
        p95_s: Likewise.
        p99_s: Likewise.
    """

    per_s: float
    rows: float
    mean_s: float
    p50_s: float
    p95_s: float
    p99_s: float


def simulate(
    costs: Costs, per_s: float, tokens: int, *, miss: float = 0.0, requests: int = REQUESTS
) -> Queue:
    """Let requests arrive at random times at one engine process that takes what waits.

    Args:
        costs: Of a batch.
        per_s: Requests a second, on average.
        tokens: T of each.
        miss: Share of the rows whose prompt has to be loaded first.
        requests: How many.
    """
    draw = np.random.default_rng(SEED)
    arrivals = np.cumsum(draw.exponential(1 / per_s, size=requests))
    misses = np.concatenate([[0], np.cumsum(draw.random(requests) < miss)])
    most, first, now, batches = costs.full(tokens), 0, 0.0, 0
    waits: FloatArray = np.empty(requests)
    while first < requests:
        now = max(now, float(arrivals[first]))
        waiting = int(np.searchsorted(arrivals, now, side="right"))
        last = min(waiting, first + most)
        loads = int(misses[last] - misses[first])
        now += costs.batch_s(last - first, tokens) + loads * costs.prompt_load_s
        waits[first:last] = now - arrivals[first:last]
        first, batches = last, batches + 1
    p50, p95, p99 = np.percentile(waits, [50, 95, 99])
    return Queue(
        per_s=per_s,
        rows=requests / batches,
        mean_s=float(waits.mean()),
        p50_s=float(p50),
        p95_s=float(p95),
        p99_s=float(p99),
    )


def sustained(costs: Costs, tokens: int, *, miss: float = 0.0, p95_s: float = P95_S) -> float:
    """Return the most requests a second that an engine process answers within `p95_s`."""
    low, high = 0.0, costs.most_per_s(tokens)
    for _ in range(12):
        middle = (low + high) / 2
        is_in_time = simulate(costs, middle, tokens, miss=miss).p95_s <= p95_s
        low, high = (middle, high) if is_in_time else (low, middle)
    return low


def hit_rate(tasks: int, kept: int, *, exponent: float = 1.0) -> float:
    """Return how often a prompt is there, where the last `kept` of them that were asked stay.

    Tasks are asked as often as Zipf's law has it. Che's approximation: every prompt stays for the
    time in which `kept` different ones are asked.
    """
    if kept >= tasks:
        return 1.0
    shares = 1.0 / np.arange(1, tasks + 1) ** exponent
    shares /= shares.sum()
    low, high = 0.0, 1e12
    for _ in range(200):
        middle = (low + high) / 2
        if (1 - np.exp(-shares * middle)).sum() < kept:
            low = middle
        else:
            high = middle
    return float((shares * (1 - np.exp(-shares * high))).sum())


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What answers so many tasks and requests.

    Attributes:
        tasks: With a champion each.
        per_s: Requests a second, of all.
        engines: Processes that compute.
        servers: Processes that speak HTTP, each with its share of the engines.
        machines: That hold them, and one more that may fail.
        shards: Groups of machines that each serve a part of the tasks.
        memory_bytes: Of a machine, with the prompts of its shard in each engine process.
        looks_busy: Cores that the servers' looks take, of the registry's and their own.
        limit: Which limits are met: the one that needs another way of doing things first.
    """

    tasks: int
    per_s: float
    engines: int
    servers: int
    machines: int
    shards: int
    memory_bytes: int
    looks_busy: float
    limit: str


def plan(
    costs: Costs, machine: Machine, *, tasks: int, per_s: float, tokens: int, watch_s: float = 2.0
) -> Fleet:
    """Size a fleet.

    Args:
        costs: What was measured.
        machine: What it is made of.
        tasks: With a champion each, about equally asked.
        per_s: Requests a second.
        tokens: T of each.
        watch_s: Between two looks of a server at the registry.
    """
    engines = math.ceil(per_s / sustained(costs, tokens))
    servers = math.ceil(per_s * costs.http_s / HTTP_BUSY)
    busy = math.ceil((engines + servers) / machine.cores)
    # what stands on a machine: servers, and the engine processes that each of them has
    own_servers = math.ceil(servers / busy)
    own_engines = math.ceil(engines / busy)
    room = machine.memory_bytes - own_servers * costs.backbone_bytes
    shards = max(1, math.ceil(own_engines * tasks * costs.prompt_bytes / room))
    machines = max(busy, shards) + 1
    held = math.ceil(tasks / shards)
    memory = own_servers * costs.backbone_bytes + own_engines * held * costs.prompt_bytes
    # a server looks at all that the registry has
    looks = servers / watch_s * (costs.look_s + costs.look_task_s * tasks)
    limit = "cores"
    if shards > 1:
        limit = "memory, so shards; then cores"
    if looks > 1:
        limit = "looks at the registry; " + limit
    return Fleet(
        tasks=tasks,
        per_s=per_s,
        engines=engines,
        servers=servers,
        machines=machines,
        shards=shards,
        memory_bytes=memory,
        looks_busy=looks,
        limit=limit,
    )


@dataclass(frozen=True, kw_only=True)
class Move:
    """An alias that moves across a fleet.

    Attributes:
        servers: That serve the task.
        watch_s: Between two looks of each.
        first_s: Until the first of them answers with the new version; the median of many moves.
        half_s: Until half of them do.
        last_s: Until all do.
        last_p99_s: Likewise, of the 99th of 100 moves.
        num_bytes: Downloaded by all of them.
        served_s: In which the place of the files sends them, at the full rate of its network.
    """

    servers: int
    watch_s: float
    first_s: float
    half_s: float
    last_s: float
    last_p99_s: float
    num_bytes: int
    served_s: float


def move(
    costs: Costs, machine: Machine, *, servers: int, watch_s: float, moves: int = 1000
) -> Move:
    """Move an alias many times; servers look at times of their own.

    A server that sees it downloads the prompt; downloads share the network of the place where the
    files lie, one after the other.
    """
    draw = np.random.default_rng(SEED)
    sent_s = costs.file_bytes / machine.network_bytes_s
    ends = np.empty((moves, servers))
    for number in range(moves):
        free, done = 0.0, []
        sees = draw.uniform(0, watch_s, size=servers).tolist()
        heapq.heapify(sees)
        while sees:
            free = max(free, heapq.heappop(sees)) + sent_s
            done.append(free + costs.swap_s)
        ends[number] = done
    return Move(
        servers=servers,
        watch_s=watch_s,
        first_s=float(np.median(ends[:, 0])),
        half_s=float(np.median(ends[:, servers // 2])),
        last_s=float(np.median(ends[:, -1])),
        last_p99_s=float(np.percentile(ends[:, -1], 99)),
        num_bytes=servers * costs.file_bytes,
        served_s=servers * sent_s,
    )


SIZES = (
    (50, 500.0),
    (500, 2_000.0),
    (1_000, 10_000.0),
    (10_000, 10_000.0),
    (10_000, 100_000.0),
)
KEPT = (10_000, 5_000, 2_000, 1_000, 500)
SERVERS = ((1, 2.0), (10, 2.0), (100, 2.0), (100, 10.0), (500, 2.0))


def drawn(costs: Costs, machine: Machine, *, tokens: int) -> Group:
    """Return all tables."""
    return Group(
        _engine(costs, tokens),
        _fleets(costs, machine, tokens),
        _paging(costs, tokens),
        _moves(costs, machine),
    )


def _table(title: str, headers: Sequence[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for header in headers:
        table.add_column(header, justify="right")
    return table


def _engine(costs: Costs, tokens: int) -> Table:
    most = costs.most_per_s(tokens)
    table = _table(
        f"One engine process, T = {tokens}",
        ("load", "requests/s", "rows a batch", "p50 ms", "p95 ms", "p99 ms"),
        f"100 % is {most:,.0f} requests/s, in batches of {costs.full(tokens)}; p95 within "
        f"{P95_S * 1e3:.0f} ms up to {sustained(costs, tokens):,.0f} requests/s",
    )
    for load in LOADS:
        own = simulate(costs, load * most, tokens)
        times = (f"{seconds * 1e3:.1f}" for seconds in (own.p50_s, own.p95_s, own.p99_s))
        table.add_row(f"{load:.0%}", f"{own.per_s:,.0f}", f"{own.rows:.1f}", *times)
    return table


def _fleets(costs: Costs, machine: Machine, tokens: int) -> Table:
    table = _table(
        f"Fleets of machines with {machine.cores} cores and {machine.memory_bytes / 2**30:.0f} GiB",
        ("tasks", "requests/s", "engines", "servers", "machines", "shards", "GiB each",
         "looks: cores", "limits"),
        "one machine more than are needed; every engine process holds its shard's prompts",
    )  # fmt: skip
    for tasks, per_s in SIZES:
        own = plan(costs, machine, tasks=tasks, per_s=per_s, tokens=tokens)
        table.add_row(
            f"{own.tasks:,}",
            f"{own.per_s:,.0f}",
            f"{own.engines:,}",
            f"{own.servers:,}",
            f"{own.machines:,}",
            f"{own.shards}",
            f"{own.memory_bytes / 2**30:.1f}",
            f"{own.looks_busy:.2f}",
            own.limit,
        )
    return table


def _paging(costs: Costs, tokens: int) -> Table:
    tasks = KEPT[0]
    table = _table(
        f"{tasks:,} tasks, asked by Zipf's law, with fewer prompts resident",
        ("resident", "MB a process", "hit rate", "requests/s", "of all resident"),
        f"a prompt that is not there takes {costs.prompt_load_s * 1e3:.1f} ms of the engine",
    )
    full = sustained(costs, tokens)
    for kept in KEPT:
        hits = hit_rate(tasks, kept)
        rate = sustained(costs, tokens, miss=1 - hits)
        table.add_row(
            f"{kept:,}",
            f"{kept * costs.prompt_bytes / 1e6:,.0f}",
            f"{hits:.3f}",
            f"{rate:,.0f}",
            f"{rate / full:.0%}",
        )
    return table


def _moves(costs: Costs, machine: Machine) -> Table:
    table = _table(
        "An alias that moves: seconds until servers answer with the new version",
        ("servers", "watch s", "first", "half", "all", "all, p99", "MB sent", "sending s"),
    )
    for servers, watch_s in SERVERS:
        own = move(costs, machine, servers=servers, watch_s=watch_s)
        times = (own.first_s, own.half_s, own.last_s, own.last_p99_s)
        table.add_row(
            f"{own.servers}",
            f"{own.watch_s:g}",
            *(f"{seconds:.2f}" for seconds in times),
            f"{own.num_bytes / 1e6:,.0f}",
            f"{own.served_s:.2f}",
        )
    return table


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--figures", type=Path, default=FIGURES, help="JSON of benchmarks.serve")
    parser.add_argument("--tokens", type=int, default=32, help="of a request; default: %(default)s")
    parser.add_argument("--cores", type=int, default=16, help="a machine; default: %(default)s")
    parser.add_argument("--gib", type=int, default=64, help="a machine; default: %(default)s")
    given = parser.parse_args(words)
    costs = Costs.of(json.loads(given.figures.read_text(encoding="utf-8")))
    machine = Machine(cores=given.cores, memory_bytes=given.gib * 2**30)
    Console(width=TABLE_WIDTH).print(drawn(costs, machine, tokens=given.tokens))


if __name__ == "__main__":
    main()
