"""What `/metrics` says, in a registry of its own."""

import asyncio
import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ptv2_serving.answering import EngineStatus, PromptId, Service, TaskStatus
from ptv2_serving.http.exchanges import Exchange, Traffic

UNKNOWN = "unknown"
"""The task of requests for one that is not loaded: names of clients make no series."""

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
# between two looks at how late the event loop is
TICK_S = 0.05
# series of a task's versions; old ones go when it has more
MAX_VERSIONS = 8
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts requests, and asks the service how it stands when it is read."""

    def __init__(self, service: Service, traffic: Traffic) -> None:
        """Start every count at zero.

        Args:
            service: Says how the engine stands.
            traffic: Of this server.
        """
        self._registry = CollectorRegistry(auto_describe=False)
        self._seconds = Histogram(
            "ptv2_request_seconds",
            "From the first byte of a request for predictions to its answer.",
            ("task", "status", "role"),
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._inputs = Counter(
            "ptv2_inputs", "Inputs answered.", ("task", "version", "role"), registry=self._registry
        )
        self._truncated = Counter(
            "ptv2_truncated_inputs",
            "Inputs that were cut to the longest length.",
            ("task",),
            registry=self._registry,
        )
        self._refused = Counter(
            "ptv2_refused",
            "Requests that were not answered, by the last part of a problem's type.",
            ("reason",),
            registry=self._registry,
        )
        running = Gauge(
            "ptv2_requests_running",
            "Requests that are being read and answered.",
            registry=self._registry,
        )
        running.set_function(lambda: traffic.running)
        self._lag = Histogram(
            "ptv2_loop_lag_seconds",
            "How late the event loop came back to a timer, which all requests waited for.",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._engine = _Engine(service)
        self._registry.register(self._engine)
        # children of the metrics above: looking one up by its labels costs more than counting
        self._timers: dict[tuple[str, int, str], Histogram] = {}
        self._counters: dict[tuple[str, int, str], Counter] = {}
        self._versions: dict[str, list[int]] = {}

    def observe(self, exchange: Exchange, status: int, seconds: float) -> None:
        """Count a request that is over."""
        if exchange.problem is not None:
            self._refused.labels(exchange.problem).inc()
        if not exchange.asks:
            return
        key = (exchange.task or UNKNOWN, status, exchange.role)
        timer = self._timers.get(key)
        if timer is None:
            timer = self._timers[key] = self._seconds.labels(key[0], str(status), key[2])
        timer.observe(seconds)
        if exchange.task is None or exchange.version is None:
            return
        self._counter(exchange.task, exchange.version, exchange.role).inc(exchange.inputs)
        if exchange.truncated:
            self._truncated.labels(exchange.task).inc(exchange.truncated)

    async def watch_loop(self) -> None:
        """Measure how late the event loop is, again and again, until it is cancelled."""
        while True:
            due_s = time.perf_counter() + TICK_S
            await asyncio.sleep(TICK_S)
            self._lag.observe(max(0.0, time.perf_counter() - due_s))

    def look(self) -> None:
        """Ask the service how it stands, on its own event loop; `text` then says it."""
        self._engine.look()

    def text(self) -> bytes:
        """Return everything in the text format of Prometheus; any thread will do."""
        return generate_latest(self._registry)

    def _counter(self, task: str, version: int, role: str) -> Counter:
        key = (task, version, role)
        counter = self._counters.get(key)
        if counter is None:
            self._forget(task, version)
            counter = self._inputs.labels(task, str(version), role)
            self._counters[key] = counter
        return counter

    def _forget(self, task: str, version: int) -> None:
        """Make room for a version: those of a task are few, however long the server runs."""
        versions = self._versions.setdefault(task, [])
        if version in versions:
            return
        versions.append(version)
        for old in versions[:-MAX_VERSIONS]:
            versions.remove(old)
            for key in [key for key in self._counters if key[:2] == (task, old)]:
                del self._counters[key]
                self._inputs.remove(task, str(old), key[2])


class _Engine(Collector):
    """How the engine stood at the last look."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._seen: tuple[EngineStatus, Sequence[TaskStatus]] | None = None

    def look(self) -> None:
        self._seen = (self._service.status(), self._service.tasks())

    def collect(self) -> Iterator[Metric]:
        # once before the first look: the registry asks for the names
        if self._seen is not None:
            yield from _stand(*self._seen)


def _stand(status: EngineStatus, tasks: Sequence[TaskStatus]) -> Iterator[Metric]:
    for name, what, value in (
        ("ready", "Whether requests are answered.", float(status.ready)),
        ("queue_rows", "Rows that wait.", status.queued_rows),
        ("queue_limit_rows", "Rows at which requests are refused.", status.queue_limit),
        ("running_rows", "Rows that are being computed.", status.running_rows),
        ("engines", "Engine processes that are alive.", status.engines),
        ("resident_prompts", "Prompts that are loaded.", status.resident),
        ("resident_bytes", "What they take.", status.resident_bytes),
        ("registry_stale_seconds", "Since the registry last answered.", status.stale_s),
    ):
        yield GaugeMetricFamily(f"ptv2_{name}", what, value=value)
    if status.last_swap_s is not None:
        yield GaugeMetricFamily(
            "ptv2_last_swap_seconds",
            "From a moved alias seen to the first answer, the last time.",
            value=status.last_swap_s,
        )
    for name, what, count in (
        ("batches", "Forward passes.", status.batches),
        ("batch_rows", "Rows in all of them.", status.batch_rows),
        ("batch_tasks", "Prompts in each of them, added up.", status.batch_tasks),
        ("batch_tokens", "Real tokens in all of them.", status.batch_tokens),
        ("padded_tokens", "Tokens computed, padding included.", status.padded_tokens),
        ("swaps", "Prompts that were swapped in.", status.swaps),
    ):
        yield CounterMetricFamily(f"ptv2_{name}", what, value=count)
    compared = CounterMetricFamily(
        "ptv2_compared", "Inputs that two prompts of a task answered.", labels=("task",)
    )
    different = CounterMetricFamily(
        "ptv2_disagreements", "Of them, those answered differently.", labels=("task",)
    )
    for task, (count, differing) in status.disagreements.items():
        compared.add_metric((task,), count)
        different.add_metric((task,), differing)
    yield from (compared, different, _loaded(tasks))


def _loaded(tasks: Sequence[TaskStatus]) -> Metric:
    loaded = GaugeMetricFamily(
        "ptv2_prompt_info",
        "The prompts that answer, each with the value 1.",
        labels=("task", "version", "digest", "role"),
    )
    for task in tasks:
        roles: Sequence[tuple[str, PromptId | None]] = (
            ("champion", task.champion), ("canary", task.canary), ("shadow", task.shadow),
        )  # fmt: skip
        for role, prompt in roles:
            if prompt is not None:
                labels = (prompt.task, str(prompt.version), prompt.digest[:12], role)
                loaded.add_metric(labels, 1)
    return loaded
