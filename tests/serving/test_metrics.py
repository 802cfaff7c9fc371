"""What `/metrics` says, read with Prometheus's own parser."""

import asyncio
import contextlib
import time
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ptv2_serving.answering import Answer
from ptv2_serving.http import operations
from ptv2_serving.http.exchanges import Exchange, Traffic
from ptv2_serving.http.metrics import MAX_VERSIONS, TICK_S, Metrics
from tests.serving.http_parts import Asked
from tests.serving.service_parts import FakeService, digest

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def test_metrics_count_requests_by_task_status_and_role() -> None:
    asked = Asked()
    for _ in range(3):
        asked.predict("intents", "a", "word " * 200)
    asked.predict("intents", 7)
    response = asked.get("/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(response.text)
    name = "ptv2_request_seconds_count"
    assert value(found, name, task="intents", status="200", role="champion") == 3
    assert value(found, name, task="intents", status="422", role="") == 1
    assert value(found, "ptv2_inputs_total", task="intents", version="3", role="champion") == 6
    assert value(found, "ptv2_truncated_inputs_total", task="intents") == 3
    assert value(found, "ptv2_refused_total", reason="bad-input") == 1
    assert value(found, "ptv2_requests_running") == 0


def test_metrics_say_how_the_engine_stands() -> None:
    service = FakeService()
    service.status_fields = {
        "queued_rows": 7, "running_rows": 16, "swaps": 2, "last_swap_s": 0.04, "stale_s": 12.5,
    }  # fmt: skip
    found = samples(Asked(service).get("/metrics").text)
    expected = {
        "ptv2_ready": 1, "ptv2_queue_rows": 7, "ptv2_queue_limit_rows": 1000,
        "ptv2_running_rows": 16, "ptv2_engines": 1, "ptv2_resident_prompts": 6,
        "ptv2_resident_bytes": 3_540_000, "ptv2_registry_stale_seconds": 12.5,
        "ptv2_last_swap_seconds": 0.04, "ptv2_batches_total": 4, "ptv2_batch_rows_total": 20,
        "ptv2_batch_tasks_total": 12, "ptv2_batch_tokens_total": 300,
        "ptv2_padded_tokens_total": 400, "ptv2_swaps_total": 2,
    }  # fmt: skip
    assert {name: value(found, name) for name in expected} == expected
    assert value(found, "ptv2_compared_total", task="intents") == 40
    assert value(found, "ptv2_disagreements_total", task="intents") == 2
    labels = {"version": "3", "digest": digest("reading:3")[:12], "role": "champion"}
    assert value(found, "ptv2_prompt_info", task="reading", **labels) == 1


def test_metrics_make_no_series_of_what_clients_invent() -> None:
    asked = Asked()
    for number in range(50):
        asked.predict(f"task-{number}", "a")
        asked.get(f"/nowhere/{number}")
    names = {key for key in samples(asked.get("/metrics").text) if "created" not in key[0]}
    counted = {labels for name, labels in names if name == "ptv2_request_seconds_count"}
    assert {dict(labels)["task"] for labels in counted} == {"unknown"}
    assert len(names) < 75


def test_metrics_forget_old_versions() -> None:
    service = FakeService()
    metrics = Metrics(service, Traffic())
    for version in range(1, 51):
        exchange = Exchange("r", {}, asks=True, task="intents", role="champion", inputs=1)
        exchange.version = version
        metrics.observe(exchange, 200, 0.01)
    found = samples(metrics.text().decode())
    versions = [int(dict(labels)["version"]) for name, labels in found if name.endswith("s_total")
                and "version" in dict(labels)]  # fmt: skip
    assert sorted(versions) == list(range(51 - MAX_VERSIONS, 51))


def test_metrics_of_two_servers_are_apart() -> None:
    first, second = Asked(), Asked()
    first.predict("intents", "a")
    assert "ptv2_inputs_total{" in first.get("/metrics").text
    assert "ptv2_inputs_total{" not in second.get("/metrics").text


def test_metrics_of_a_canary_are_apart() -> None:
    class Canary(FakeService):
        async def predict(self, *args: Any, **named: Any) -> Answer:
            found = await super().predict(*args, **named)
            return Answer(**{**vars(found), "role": "canary", "prompt": self.prompt(args[0], 4)})

    asked = Asked(Canary())
    asked.predict("intents", "a")
    found = samples(asked.get("/metrics").text)
    assert value(found, "ptv2_inputs_total", task="intents", version="4", role="canary") == 1


def test_metrics_say_how_late_the_event_loop_comes_back() -> None:
    metrics = Metrics(FakeService(), Traffic())

    async def run() -> None:
        watching = asyncio.create_task(metrics.watch_loop())
        await asyncio.sleep(4 * TICK_S)
        time.sleep(0.3 + TICK_S)  # what a full collection of garbage, or a slow disk, does
        await asyncio.sleep(4 * TICK_S)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    asyncio.run(run())
    found = samples(metrics.text().decode())
    assert value(found, "ptv2_loop_lag_seconds_count") >= 4
    below, all_of_them = (
        value(found, "ptv2_loop_lag_seconds_bucket", le=edge) for edge in ("0.25", "+Inf")
    )
    assert all_of_them - below == 1
    assert value(found, "ptv2_loop_lag_seconds_sum") > 0.3


def test_metrics_are_made_anew_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [100.0], [0]

    class Counted(FakeService):
        def tasks(self) -> Any:
            looks[0] += 1
            return super().tasks()

    monkeypatch.setattr(operations, "_clock", lambda: now[0])
    asked = Asked(Counted())
    texts = [asked.get("/metrics").text for _ in range(5)]
    assert looks == [1]
    assert len(set(texts)) == 1
    asked.predict("intents", "a")
    looks[0] = 0
    now[0] += 1.1
    assert "ptv2_inputs_total{" in asked.get("/metrics").text
    assert looks == [1]
