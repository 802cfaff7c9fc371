"""`ptv2 serve` as it is run: the real command, a registry in SQLite, a tiny backbone."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve_expected import register_versions
from benchmarks.serve_http import ServerProcess, running
from benchmarks.serve_parts import LocalRegistry, Prompts, offline, run_on_loop
from benchmarks.serve_soak import NOBODY, ended_by_sigterm, is_alive
from ptv2_serving import Client
from ptv2_serving.client import Predictions
from ptv2_serving.control import Registry
from tests.registry_parts import empty_registry
from tests.tiny import open_backbone, tiny_backbone

VERSIONS = {"task-0000": 2, "task-0001": 1}
OPTIONS = ("--device", "cpu", "--precision", "fp32", "--engines", "1")
WAIT_S = 30.0


def wait_until(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < until, "in time"
        time.sleep(0.05)


@pytest.mark.slow
def test_serve_follows_a_promotion_and_ends_and_starts_without_losing_anything(
    tmp_path: Path,
) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_registry())
    backbone = tiny_backbone(tmp_path / "backbone")
    registry, prompts = LocalRegistry(tmp_path), Prompts(backbone, prompt_length=4)
    register_versions(registry, prompts, VERSIONS)
    texts, answering = prompts.texts.make(6, 4, seed=0), open_backbone(backbone)

    def check(found: Predictions, task: str, version: int) -> None:
        assert (found.task, found.version, found.role) == (task, version, "champion")
        inputs: list[dict[str, Any]] = [{"text": text} for text in texts]
        expected = offline(registry.folder(task, version), answering).predict(inputs)
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)

    def client_of(server: ServerProcess) -> Client:
        return Client(f"http://127.0.0.1:{server.port}")

    store = tmp_path / "store"
    with running(registry, store, watch_s=0.2, options=OPTIONS) as server:
        with client_of(server) as client:
            for task in VERSIONS:
                check(client.predict(task, texts), task, 1)
            Registry(registry.uri).promote("task-0000:2", expect=1)
            wait_until(lambda: client.predict("task-0000", texts).version == 2)
            check(client.predict("task-0000", texts), "task-0000", 2)
            # what was answered before stays warm
            check(client.predict("task-0000", texts, version=1), "task-0000", 1)
        pids = server.pids()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not any(is_alive(pid) for pid in pids))

    # its registry is away now
    with running(registry, store, tracking_uri=NOBODY, options=OPTIONS) as server:
        with client_of(server) as client:
            check(client.predict("task-0000", texts), "task-0000", 2)
            check(client.predict("task-0001", texts), "task-0001", 1)
        ended = run_on_loop(ended_by_sigterm(server, texts, tasks=len(VERSIONS)))
    assert (ended["lost"], ended["exit_code"]) == (0, 0)
    assert ended["requests"]["answered"] > 0
    allowed = {"answered", "HTTP 503", "refused", "closed before it was read"}
    assert set(ended["requests"]) <= {*allowed, "lost"}
