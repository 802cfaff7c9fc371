"""Asking the server: its app in this process, or the whole of it in another one."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from ptv2_serving.app import ServeConfig, make_app
from tests.serving.service_parts import FakeService

ROOT = Path(__file__).resolve().parents[2]
BASE = "http://127.0.0.1:8000"
START_TIMEOUT_S = 60


class Asked:
    """An app with its service and its log."""

    def __init__(self, service: FakeService | None = None, **config: Any) -> None:
        self.service = service or FakeService()
        self.log = StringIO()
        self.app: FastAPI = make_app(self.service, ServeConfig(**config), log=self.log)

    def ask(
        self, method: str, path: str, *, client: str = "127.0.0.1", **request: Any
    ) -> httpx.Response:
        """Return the answer to one request."""

        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=(client, 50_000))
            async with httpx.AsyncClient(transport=transport, base_url=BASE) as asking:
                return await asking.request(method, path, **request)

        return asyncio.run(run())

    def get(self, path: str, **request: Any) -> httpx.Response:
        return self.ask("GET", path, **request)

    def post(self, path: str, body: Any = None, **request: Any) -> httpx.Response:
        if isinstance(body, bytes):
            headers = {"Content-Type": "application/json", **request.pop("headers", {})}
            return self.ask("POST", path, content=body, headers=headers, **request)
        return self.ask("POST", path, **({} if body is None else {"json": body}), **request)

    def predict(self, task: str, *inputs: Any, **request: Any) -> httpx.Response:
        return self.post(f"/v1/tasks/{task}/predict", {"inputs": list(inputs)}, **request)

    def lines(self) -> list[dict[str, Any]]:
        """Return what was logged."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


def problem_of(response: httpx.Response) -> str:
    """Return the kind of a problem, whose shape is checked."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert set(body) == {"type", "title", "status", "detail", "request_id"}
    assert body["status"] == response.status_code
    assert body["request_id"] == response.headers["x-request-id"]
    prefix, _, kind = body["type"].rpartition(":")
    assert prefix == "urn:ptv2:problem"
    return str(kind)


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    base: str
    port: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


SCRIPT = """
import asyncio, json, sys
from ptv2_serving.http.auth import digest_of
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.run import new_event_loop, serve
from tests.serving.service_parts import FakeService
service, config = json.loads(sys.argv[1])
if "tokens" in config:
    config["tokens"] = frozenset(digest_of(token.encode()) for token in config["tokens"])
def told(address):
    print(address, flush=True)
with asyncio.Runner(loop_factory=new_event_loop) as runner:
    runner.run(serve(FakeService(**service), ServeConfig(port=0, **config), on_listening=told))
print("ended", flush=True)
"""


@contextmanager
def running(service: Mapping[str, Any] | None = None, **config: Any) -> Iterator[Running]:
    """Run a server with a fake service; it is gone in the end."""
    given = json.dumps([dict(service or {}), config])
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        base = process.stdout.readline().strip()
        assert base.startswith("http://"), process.communicate(timeout=START_TIMEOUT_S)[1]
        yield Running(process=process, base=base, port=int(base.rpartition(":")[2]))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)
