"""The server: one process, one event loop, and an end that loses no accepted request."""

import asyncio
import gc
import logging.config
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from ptv2_core.errors import PTv2Error
from ptv2_serving.answering import Service
from ptv2_serving.app import make_app
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.connections import bounded
from ptv2_serving.http.exchanges import Traffic

SIGNALS = (signal.SIGTERM, signal.SIGINT)
BACKLOG = 2048
POLL_S = 0.02
# connections that came before the signal and are not accepted yet become so
LAST_LOOK_S = 0.05
# collections of younger garbage between two of all of it; Python's own number is 10
YOUNG_COLLECTIONS = 50
LOGGING: Mapping[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "ptv2_serving.http.logs.JsonFormatter"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "json"}},
    "loggers": {
        "uvicorn": {"handlers": ["stderr"], "level": "WARNING", "propagate": False},
        "ptv2_serving": {"handlers": ["stderr"], "level": "INFO", "propagate": False},
    },
}


class ListenError(PTv2Error):
    """An address that cannot be listened on."""


class Server(uvicorn.Server):
    """Uvicorn's server, which drains the service before it ends."""

    def __init__(self, config: uvicorn.Config, service: Service, serving: ServeConfig) -> None:
        """Serve what `config` says; drain `service` within the time that `serving` gives."""
        super().__init__(config)
        self._service = service
        self._serving = serving

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End on the first signal, with exit code 0; the second one ends the process at once."""
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end."""
        self.should_exit = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, answer what was taken, then close."""
        until_s = time.monotonic() + self._serving.drain_timeout_s
        traffic: Traffic = self.config.app.state.traffic  # type: ignore[union-attr]
        await asyncio.sleep(LAST_LOOK_S)
        traffic.draining = True
        for server in self.servers:
            server.close()
        await self._service.drain(timeout_s=self._serving.drain_timeout_s)
        while traffic.pending and time.monotonic() < until_s:
            await asyncio.sleep(POLL_S)
        await super().shutdown(sockets)


async def serve(
    service: Service,
    config: ServeConfig,
    *,
    on_listening: Callable[[str], None] = lambda address: None,
    listener: socket.socket | None = None,
    app: FastAPI | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Runs in the main thread, when all is loaded. The caller closes the service.

    Args:
        service: What predicts.
        config: Where to listen, whom to let in.
        on_listening: Is told the address once requests are taken.
        listener: What `listen` returned; None: makes one.
        app: What `make_app` returned; None: makes one.

    Raises:
        ListenError: The address is taken, or not of this machine.
    """
    listener = listener or listen(config)
    logging.config.dictConfig(dict(LOGGING))
    app = app or make_app(service, config)
    spare_what_is_loaded()
    settings = uvicorn.Config(
        app,
        http=bounded(config),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=max(1, round(config.keep_alive_s)),
        timeout_graceful_shutdown=max(1, round(config.drain_timeout_s)),
    )
    server = Server(settings, service, config)
    host, port = listener.getsockname()[:2]
    told = asyncio.create_task(_tell(server, on_listening, address_of(host, port)))
    watching = asyncio.create_task(app.state.metrics.watch_loop())
    try:
        await server.serve(sockets=[listener])
    finally:
        told.cancel()
        watching.cancel()
        listener.close()


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that is bound to the address of a configuration.

    Raises:
        ListenError: It cannot be.
    """
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ListenError(f"cannot listen on {config.host}: {error.strerror}") from error
    try:
        if os.name == "posix":
            # a port whose last connections are still closing is free
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot listen on {config.host}, port {config.port}: {error.strerror}. Choose another "
            "with --port; 0 takes any that is free"
        ) from error
    return listener


def spare_what_is_loaded() -> None:
    """Take all there is now out of the garbage collector's sight, and let it look less often.

    Libraries and prompts are hundreds of thousands of objects; whoever asks would wait while it
    goes through them and finds nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], YOUNG_COLLECTIONS)


def address_of(host: str, port: int) -> str:
    """Return what a browser takes."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return the fastest event loop that is installed."""
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


async def _tell(server: Server, on_listening: Callable[[str], None], address: str) -> None:
    while not server.started:
        await asyncio.sleep(POLL_S)
    on_listening(address)
