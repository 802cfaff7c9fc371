"""What a flow run of ours has around it: a Prefect server, a quiet console, an end on SIGTERM."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prefect
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker, PrefectConsoleHandler
from prefect.settings import (
    PREFECT_API_SSL_CERT_FILE,
    PREFECT_API_URL,
    temporary_settings,
)

from pipelines.errors import PipelineError
from pipelines.interrupts import terminate_as_interrupt
from pipelines.prefect_server import temporary_server

DRAIN_TIMEOUT_S = 30.0
CERTIFICATE = Path(__file__).with_name("nobody.pem")
TAG = "ptv2"
GPU_TAG = "gpu"
"""`prefect concurrency-limit create gpu N`: N task runs with it at once, over all of a server."""


@contextmanager
def session(root: Path) -> Iterator[None]:
    """Run flows inside: on the server that is configured, or on one for this run.

    Raises:
        PipelineError: The server cannot be reached, or not be started.
    """
    with _quiet_console(), terminate_as_interrupt(), _server(root), prefect.tags(TAG):
        yield


@contextmanager
def _server(root: Path) -> Iterator[None]:
    """Use the configured Prefect server, or one for this run."""
    configured = PREFECT_API_URL.value()
    if configured is not None:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
        if problem is not None:
            advice = "start it, or unset PREFECT_API_URL for a server of this run's own"
            raise PipelineError(f"cannot reach Prefect at {configured}: {problem}; {advice}")
        yield
        _drain()
        return
    with temporary_server(root) as url, temporary_settings({PREFECT_API_URL: url}):
        try:
            yield
        finally:
            # a server that is gone would be asked for a minute
            _drain()


@contextmanager
def quick_clients() -> Iterator[None]:
    """Have clients of a Prefect server that is asked in plain HTTP be made quickly.

    A task run makes several, and each reads a whole bundle of certificates (16 ms), though nobody
    looks at them. Here, and in whatever takes on the settings of this process, they read one that
    vouches for nobody.
    """
    with temporary_settings({PREFECT_API_SSL_CERT_FILE: str(CERTIFICATE)}):
        yield


def _drain() -> None:
    """Hand over what Prefect still holds back; the states of task runs are among it, as events."""
    APILogWorker.drain_all(timeout=DRAIN_TIMEOUT_S)
    EventsWorker.drain_all(timeout=DRAIN_TIMEOUT_S)


@contextmanager
def _quiet_console() -> Iterator[None]:
    """Keep Prefect's log off the console, where the caller draws; its server still gets it."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, PrefectConsoleHandler)
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
