"""`python -m benchmarks.serve`: many tasks served from one backbone, against the ways there are.

Requests of 50 tasks with random prompts, a row of T tokens each, asked by 64 clients that ask again
as soon as they are answered. Our engine mixes the tasks in its batches. The peers answer one
request at a time on our own forward, switch PEFT's adapter for each request, or hold a fine-tuned
copy of the model a task; each of them also with all that one task has waiting as one batch. All on
as many threads, in the same number format, in turn, with the same clients: at that, our p95 is the
lower one wherever our throughput is the higher. Our engine in int8 is asked beside them; its ratios
begin with `int8_`. A ratio is the median over the rounds of the throughputs of one round. Then
1,000 prompts are made resident, and an alias is moved again and again. Correctness under load, and
a soak, are `benchmarks.serve_load` and `benchmarks.serve_soak`. With `--quick` a slow machine does
less of every part, and leaves out none, so that it ends within 8 minutes; what was shortened is
said below the tables and in the JSON.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import serve_load, serve_resident, serve_soak, serve_swap
from benchmarks.machine import describe, set_up
from benchmarks.serve_budget import Budget, Usual, scaled
from benchmarks.serve_costs import fitted
from benchmarks.serve_http import running
from benchmarks.serve_parts import LocalRegistry, Prompts, names, run_on_loop
from benchmarks.serve_rates import (
    MIXED,
    ONE_TASK,
    ROUNDED,
    Measured,
    Rows,
    Served,
    compare,
    differences,
    distance,
    logits_of,
    make_rows,
)
from benchmarks.serve_report import drawn
from benchmarks.serve_ways import Copies, Ours, Way, fastest_copies, fastest_peft
from benchmarks.shapes import backbone_folder
from ptv2_core.files import write_json_atomic
from ptv2_serving.engine.engine import EngineConfig

TABLE_WIDTH = 125
TASKS, CLIENTS = 50, 64
TOKENS = (16, 32, 64)
LOOKED_AT = (10, 100, 300)
INT8 = "int8"
OURS = (MIXED, ONE_TASK, ROUNDED)
PUBLISHED, DEFAULT = 16, 64
# the parts of `--quick`, estimated from an earlier run: 2 cores of an AMD EPYC, AVX512-BF16
USUAL = {
    "P = 16": Usual(17, 0),
    "P = 16, T = 16": Usual(3, 21),
    "P = 16, T = 32": Usual(5, 34),
    "P = 16, T = 64": Usual(8, 58),
    "P = 64": Usual(17, 0),
    "P = 64, T = 16": Usual(4, 26),
    "P = 64, T = 32": Usual(5, 37),
    "P = 64, T = 64": Usual(8, 62),
    "residents": Usual(15, 25),
    "costs": Usual(4, 5),
    "swaps": Usual(3, 7),
    "looks": Usual(2, 18),
    "load": Usual(18, 10),
    "HTTP": Usual(12, 12),
}
# of the largest logit: a forward in bf16 in another order of sums
AGREEMENT = {"float32": 1e-4, "bfloat16": 0.05}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        lengths: Values of P.
        requests: That our engine answers in a round.
        peer_requests: Likewise a peer.
        rounds: After a short one to warm up.
        residents: Prompts that are made resident.
        swaps: Times that an alias moves.
        load_requests: Of the check under load.
        load_swaps: Likewise.
        http_s: Seconds for which a server process is asked.
        seconds: For everything; None: as long as it takes.
    """

    lengths: Sequence[int]
    requests: int
    peer_requests: int
    rounds: int
    residents: int
    swaps: int
    load_requests: int
    load_swaps: int
    http_s: float
    seconds: float | None = None


QUICK = Plan(
    lengths=(PUBLISHED, DEFAULT),
    requests=1024,
    peer_requests=192,
    rounds=3,
    residents=1000,
    swaps=20,
    load_requests=8000,
    load_swaps=20,
    http_s=9.0,
    # 8 minutes, less what Python takes to start and to end
    seconds=450.0,
)
FULL = Plan(
    lengths=(PUBLISHED, DEFAULT),
    requests=4096,
    peer_requests=512,
    rounds=9,
    residents=1000,
    swaps=100,
    load_requests=200_000,
    load_swaps=100,
    http_s=30.0,
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All ways with prompts of one length.

    Attributes:
        prompt_length: P.
        precision: Of the weights of all ways.
        variants: Of each peer, the one that was the fastest.
        differences: How far a peer's logits are from ours, and ours in int8 too, as a share of the
            largest.
        copies_bytes: What the fine-tuned copies take.
        measured: By T and way.
    """

    prompt_length: int
    precision: str
    variants: Mapping[str, str]
    differences: Mapping[str, float]
    copies_bytes: int
    measured: Mapping[int, Mapping[str, Measured]]

    def ratios(self) -> dict[str, float]:
        """Return our throughput over each peer's, and mixed traffic's over that of one task.

        Those that begin with `int8_` are our engine's in int8; `int8_t16` is it over itself in the
        peers' format.
        """
        found = {
            f"{prefix}{key}_t{tokens}": ratio(ways[own], peer)
            for prefix, own in (("", MIXED), (f"{INT8}_", ROUNDED))
            for tokens, ways in self.measured.items()
            for key, peer in ways.items()
            if key not in OURS
        }
        found |= {
            f"{INT8}_t{tokens}": ratio(ways[ROUNDED], ways[MIXED])
            for tokens, ways in self.measured.items()
        }
        single = {
            tokens: ratio(ways[MIXED], ways[ONE_TASK]) for tokens, ways in self.measured.items()
        }
        found |= {f"single_task_t{tokens}": value for tokens, value in single.items()}
        return found | {"single_task": statistics.median(single.values())}


def ratio(ours: Measured, peer: Measured) -> float:
    """Return how many times our throughput is the peer's, the median of the rounds."""
    pairs = zip(ours.per_s, peer.per_s, strict=True)
    return statistics.median(one / other for one, other in pairs)


def throughput(
    backbone: Path, scratch: Path, plan: Plan, budget: Budget, *, length: int, threads: int
) -> Table:
    """Measure all ways with prompts of one length.

    Args:
        backbone: Its folder.
        scratch: Where prompts are written.
        plan: How much.
        budget: Which share of it.
        length: P.
        threads: Of each way.
    """
    prompts = Prompts(backbone, prompt_length=length)
    folders = [
        prompts.save(scratch / f"p{length}" / name, name, seed=place, golden=0)
        for place, name in enumerate(names(TASKS))
    ]
    choice = prompts.choice()
    config = EngineConfig(threads=threads)
    with (
        closing(Served(choice, config)) as served,
        closing(Served(replace(choice, precision=INT8), config)) as rounded,
    ):
        with budget.part(f"P = {length}"):
            served.put(folders)
            rounded.put(folders)
            rows = {
                tokens: make_rows(prompts, tokens=tokens, count=plan.requests, tasks=TASKS)
                for tokens in TOKENS
            }
            ids = rows[TOKENS[0]].ids
            exact: list[Way] = [Ours(choice, folders), fastest_peft(choice, folders, ids)]
            precision = str(served.engine.backbone["precision"])
            off = differences(served, exact, rows[TOKENS[0]], requests=TASKS)
            wrong = {key: value for key, value in off.items() if value > AGREEMENT[precision]}
            assert not wrong, f"peers that compute something else: {wrong}"
            few = rows[TOKENS[0]].first(TASKS)
            off[ROUNDED] = distance(logits_of(rounded, few), logits_of(served, few))
            copies: Copies = fastest_copies(choice, folders, ids)
            ways = [*exact, copies]
        measured = {}
        for tokens in TOKENS:
            with budget.part(f"P = {length}, T = {tokens}") as share:
                measured[tokens] = _compared(served, rounded, ways, rows[tokens], plan, share)
        return Table(
            prompt_length=length,
            precision=precision,
            variants={way.key: way.variant for way in ways},
            differences=off,
            copies_bytes=copies.num_bytes,
            measured=measured,
        )


def _compared(
    served: Served, rounded: Served, ways: Sequence[Way], rows: Rows, plan: Plan, share: float
) -> Mapping[str, Measured]:
    rounds = scaled(plan.rounds, share, least=1)
    rest = share * plan.rounds / rounds
    return compare(
        served,
        rounded,
        ways,
        rows.first(scaled(plan.requests, rest, least=CLIENTS)),
        clients=CLIENTS,
        rounds=rounds,
        peer_rows=scaled(plan.peer_requests, rest, least=CLIENTS),
    )


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and requests; minutes")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    parser.add_argument("--threads", type=int, default=1, help="of each way; default: %(default)s")
    given = parser.parse_args(words)
    set_up(threads=given.threads)
    plan = QUICK if given.quick else FULL
    console = Console(width=TABLE_WIDTH)
    with tempfile.TemporaryDirectory() as name:
        figures = measure(
            backbone_folder("minilm", Path(name)), Path(name), plan, threads=given.threads
        )
    console.print(drawn(figures))
    if given.json is not None:
        write_json_atomic(given.json, figures)


def measure(backbone: Path, scratch: Path, plan: Plan, *, threads: int) -> dict[str, Any]:
    """Measure everything; return the figures as the JSON has them."""
    before = os.getloadavg()
    budget = Budget(plan.seconds, USUAL)
    tables = [
        throughput(backbone, scratch, plan, budget, length=length, threads=threads)
        for length in plan.lengths
    ]
    default = Prompts(backbone, prompt_length=DEFAULT)
    with budget.part("residents") as share:
        residents = serve_resident.measure(
            default,
            scratch / "residents",
            tasks=plan.residents,
            tokens=TOKENS[0],
            requests=plan.requests,
            clients=CLIENTS,
            rounds=scaled(2 * plan.rounds, share, least=2),
            threads=threads,
        )
    with budget.part("costs") as share:
        rounds = scaled(3 * plan.rounds, share, least=3)
        costs = fitted(default, scratch / "costs", threads=threads, rounds=rounds)
    with budget.part("swaps") as share:
        (scratch / "registry").mkdir()
        registry = LocalRegistry(scratch / "registry")
        swaps = scaled(plan.swaps, share, least=5)
        serve_swap.register(registry, default, swaps=swaps)
        swapped = run_on_loop(serve_swap.swap(registry, scratch / "registry", swaps=swaps))
    with budget.part("looks") as share:
        (scratch / "looks").mkdir()
        looked_at = sorted({scaled(count, share, least=LOOKED_AT[0]) for count in LOOKED_AT})
        times = scaled(5 * plan.rounds, share, least=5)
        looks = serve_swap.looks(scratch / "looks", tasks=looked_at, times=times)
    with budget.part("load") as share:
        (scratch / "load").mkdir()
        loaded = serve_load.run(
            scratch / "load",
            backbone,
            versions={task: 3 if place < 10 else 1 for place, task in enumerate(names(TASKS))},
            requests=scaled(plan.load_requests, share, least=1000),
            swaps=scaled(plan.load_swaps, share, least=5),
            clients=CLIENTS,
        )
    with (
        budget.part("HTTP") as share,
        running(LocalRegistry(scratch / "load"), scratch / "http") as server,
    ):
        texts = default.texts.make(TOKENS[0], CLIENTS, seed=0)
        http = run_on_loop(serve_soak.over_http(server, texts, seconds=share * plan.http_s))
    first = tables[0].ratios()
    return {
        "ratios": {**first, "tasks_1000_vs_10": residents.ratio},
        f"ratios_p{DEFAULT}": tables[-1].ratios(),
        "bank_1000_bytes": residents.num_bytes,
        "swap_ms": swapped.to_mapping()["median_ms"],
        "machine": {**describe(), "load_average": [before, os.getloadavg()]},
        # a second set of copies finds memory that the first one left
        "copies_bytes": tables[0].copies_bytes,
        "clients": CLIENTS,
        "tasks": TASKS,
        "plan": asdict(plan),
        "seconds": budget.seconds,
        "shortened": budget.shortened,
        "tables": [_table(table) for table in tables],
        "residents": residents.to_mapping(),
        "swap": swapped.to_mapping(),
        "looks": looks,
        "load": loaded,
        "http": {**http, "backbone_bytes": residents.before_bytes},
        "costs": costs,
    }


def _table(table: Table) -> dict[str, Any]:
    return {
        "prompt_length": table.prompt_length,
        "precision": table.precision,
        "variants": dict(table.variants),
        "differences": dict(table.differences),
        "ratios": table.ratios(),
        "ways": {
            str(tokens): {
                key: {"per_s": own.rate, "p95_ms": own.p95, "rounds_per_s": own.per_s}
                for key, own in ways.items()
            }
            for tokens, ways in table.measured.items()
        },
    }


if __name__ == "__main__":
    main()
