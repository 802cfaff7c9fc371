"""Every answer is that of exactly the version it names, while many prompts swap under load."""

import asyncio
import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve_expected import Expected, compute_expected, register_versions
from benchmarks.serve_http import HttpError
from benchmarks.serve_load import LIKES, load, run_over_http
from benchmarks.serve_parts import LocalRegistry, Prompts, names
from ptv2_core.errors import DataError
from ptv2_serving.opening import ServiceConfig, open_service
from tests.registry_parts import empty_registry
from tests.tiny import open_backbone, tiny_backbone

pytestmark = pytest.mark.slow

# a second version costs a registration, which takes MLflow a while
VERSIONS = {task: 2 if place < 12 else 1 for place, task in enumerate(names(50))}
REQUESTS, SWAPS, CLIENTS = 2000, 20, 32


def answer(label: str, share: float) -> dict[str, Any]:
    other = {"a": "b", "b": "a"}[label]
    return {"label": label, "probabilities": {label: share, other: 1 - share}}


EXPECTED = Expected(
    texts=["one", "two"],
    answers={("t", 1): [answer("a", 0.9), answer("b", 0.8)], ("t", 2): [answer("b", 0.7)] * 2},
    tolerance=0.01,
)


@pytest.mark.parametrize(
    ("version", "found", "problem"),
    [
        (1, answer("a", 0.905), ""),
        (1, answer("a", 0.88), "expected a, got a; probabilities differ by up to 0.0200"),
        (1, answer("b", 0.7), "expected a, got b"),
        (3, answer("a", 0.9), "version 3 was never registered"),
    ],
)
def test_load_tells_a_wrong_answer(version: int, found: Mapping[str, Any], problem: str) -> None:
    said = EXPECTED.problem("t", version, 0, found)
    assert problem in said
    assert bool(said) == bool(problem)
    assert EXPECTED.told_apart() == 1.0


def tags(*found: str, start_char: int = 0, **more: Any) -> dict[str, Any]:
    spans = [{"type": "x", "start": 0, "end": 1, "start_char": start_char, "end_char": 1}]
    return {"tokens": ["a", "b"], "tags": list(found), "spans": spans, **more}


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        (tags("B-x", "O"), ""),
        # as likely, within twice the tolerance
        (tags("O", "O"), ""),
        (tags("B-x", "B-x"), "expected the tags ['B-x', 'O'], got ['B-x', 'B-x']"),
        (tags("B-y", "O"), "expected the tags"),
        (tags("B-x"), "expected the tags"),
        (tags("B-x", "O", start_char=1), "expected the spans"),
        ({**tags("B-x", "O"), "tokens": ["a"]}, "expected the words ['a', 'b'], got ['a']"),
    ],
)
def test_load_tells_wrong_tags(found: Mapping[str, Any], problem: str) -> None:
    # the second word was cut off
    wanted = tags("B-x", "O", shares=[{"O": 0.49, "B-x": 0.505, "B-y": 0.005}])
    expected = Expected(texts=["a b"], answers={("t", 1): [wanted]}, tolerance=0.01)
    said = expected.problem("t", 1, 0, found)
    assert problem in said
    assert bool(said) == bool(problem)


@pytest.mark.parametrize("fault", ["stale", "other prompt", "lost", "failed"])
def test_load_notices_a_service_that_errs(fault: str) -> None:
    champion = {"t": 1}

    class Aliases:
        def move(self, task: str, version: int) -> None:
            champion[task] = version

    async def follow(task: str, version: int) -> float:
        return 0.001

    async def ask(task: str, text: str, request_id: str) -> tuple[int, Mapping[str, Any]]:
        await asyncio.sleep(0.0005)
        place, version = EXPECTED.texts.index(text), champion[task]
        if fault == "lost" and request_id == "request-7":
            raise DataError("gone")
        if fault == "failed" and request_id == "request-7":
            raise HttpError("HTTP 503: ...", status=503)
        answered = 1 if fault == "stale" else version
        taken = 3 - version if fault == "other prompt" else answered
        return answered, EXPECTED.answers[(task, taken)][place]

    found = asyncio.run(load(ask, Aliases(), follow, EXPECTED, requests=400, swaps=1, clients=4))
    assert found.swaps == 1
    assert (found.wrong > 0) == (fault in ("stale", "other prompt"))
    lost = {"lost": {"DataError": 1}, "failed": {"HTTP 503": 1}}.get(fault, {})
    assert dict(found.lost) == lost
    assert found.to_mapping()["server_errors"] == (fault == "failed")


def test_load_of_many_tasks_gets_the_answers_of_the_versions_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_registry())
    backbone = tiny_backbone(tmp_path / "backbone")
    registry = LocalRegistry(tmp_path)
    prompts = Prompts(backbone, prompt_length=4)
    register_versions(registry, prompts, VERSIONS)
    expected = compute_expected(
        registry,
        open_backbone(backbone),
        [text for tokens in (4, 6, 9) for text in prompts.texts.make(tokens, 2, seed=tokens)],
        VERSIONS,
    )
    assert expected.told_apart() > 0.99

    async def served() -> None:
        service, notes = await open_service(
            ServiceConfig(
                tracking_uri=registry.uri,
                store=tmp_path / "store",
                device="cpu",
                precision="fp32",
                engines=2,
                watch_s=0,
                # what is replaced goes at once, and its slot is given to another prompt
                warm=0,
            )
        )
        assert notes == []

        async def ask(task: str, text: str, request_id: str) -> tuple[int, Mapping[str, Any]]:
            found = await service.predict(
                task, [{"text": text}], request_id=request_id, timeout_s=60.0
            )
            return found.prompt.version, found.predictions[0]

        async def follow(task: str, version: int) -> float:
            (line,) = await service.reload()
            assert line.startswith(f"{task}: champion ")
            assert line.endswith(f" -> {version}")
            seconds = service.status().last_swap_s
            assert seconds is not None
            return seconds

        try:
            found = await load(
                ask, registry, follow, expected, requests=REQUESTS, swaps=SWAPS, clients=CLIENTS
            )
            assert (found.requests, found.swaps) == (REQUESTS, SWAPS)
            assert found.samples == []
            assert (found.wrong, dict(found.lost)) == (0, {})
            assert {task for task, _ in found.answered} == set(VERSIONS)
            # prompts were mixed
            assert service.status().batch_tasks > service.status().batches
        finally:
            await service.close()

    asyncio.run(served())


@pytest.fixture
def collector() -> Iterator[None]:
    """Put the garbage collector back: the clients take all there is out of its sight."""
    before = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*before)


@pytest.mark.usefixtures("collector")
def test_load_over_http_gets_the_answers_of_the_versions_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_registry())
    # one of each kind, length of prompt and length of row; the first two of each kind can move
    tasks = names(len(LIKES))
    movable = {tasks[place] for place in (0, 1, 6, 7)}
    found = run_over_http(
        tmp_path,
        tiny_backbone(tmp_path / "backbone"),
        versions={task: 2 if task in movable else 1 for task in tasks},
        requests=600,
        swaps=6,
        clients=8,
        precision="fp32",
    )
    assert found["samples"] == []
    assert (found["requests"], found["swaps"]) == (600, 6)
    assert (found["wrong"], found["lost"], found["server_errors"]) == (0, {}, 0)
    assert found["versions_that_answered"] > len(LIKES)
    assert found["told_apart"] == 1.0
