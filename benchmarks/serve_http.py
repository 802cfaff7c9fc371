"""A real server process, and a client that costs little: it must not take the server's core."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serve_parts import LocalRegistry, Memory, memory_of
from ptv2_core.errors import PTv2Error

LISTENING = "listening on http://"
START_S = 180.0
END_S = 60.0
# well below the time after which the server closes a connection that is not used
IDLE_S = 10.0


class HttpError(PTv2Error):
    """An answer that is none.

    Attributes:
        status: Of HTTP; None: the connection ended before.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        """Take the words and the status."""
        super().__init__(message)
        self.status = status


class Connection:
    """One connection that is kept open; one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        """Open nothing yet."""
        self._where = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._used_at = 0.0

    async def ask(
        self, path: str, body: Any = None, *, request_id: str = ""
    ) -> tuple[int, Mapping[str, Any]]:
        """POST where there is a body, else GET; return the status and the JSON.

        Raises:
            OSError: The connection was refused, or ended before the answer.
        """
        status, answer = await self.exchange(path, body, request_id=request_id)
        return status, json.loads(answer or b"{}")

    async def exchange(
        self, path: str, body: Any = None, *, request_id: str = ""
    ) -> tuple[int, bytes]:
        """Do the same; return the status and what was answered."""
        if time.monotonic() > self._used_at + IDLE_S:
            self.close()
        self._used_at = time.monotonic()
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._where)
        reader, writer = self._streams
        data = b"" if body is None else json.dumps(body).encode()
        head = (
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: {self._where[0]}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        )
        if request_id:
            head += f"X-Request-Id: {request_id}\r\n"
        try:
            writer.write(head.encode() + b"\r\n" + data)
            raw = await reader.readuntil(b"\r\n\r\n")
            status, headers = _head(raw)
            answer = await reader.readexactly(int(headers.get("content-length", "0")))
        except (asyncio.IncompleteReadError, OSError) as error:
            self.close()
            raise ConnectionResetError("the connection ended before the answer") from error
        if headers.get("connection") == "close":
            self.close()
        return status, answer

    async def predict(self, task: str, text: str, request_id: str) -> tuple[int, Mapping[str, Any]]:
        """Return the version that answered a text, and its prediction.

        Raises:
            HttpError: It was not answered.
        """
        body = {"inputs": [{"text": text}]}
        path = f"/v1/tasks/{task}/predict"
        try:
            status, answer = await self.ask(path, body, request_id=request_id)
        except OSError as error:
            raise HttpError(f"no answer: {error}") from error
        if status != 200:
            raise HttpError(f"HTTP {status}: {answer}", status=status)
        return int(answer["version"]), answer["predictions"][0]

    def close(self) -> None:
        """Close it; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _head(raw: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = raw.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


class ServerProcess:
    """`ptv2 serve` in a process of its own."""

    def __init__(
        self,
        registry: LocalRegistry,
        store: Path,
        *,
        watch_s: float = 0.0,
        tracking_uri: str | None = None,
        options: Sequence[str] = (),
    ) -> None:
        """Start it, and wait until it listens.

        Args:
            registry: What it serves.
            store: Its local store.
            watch_s: Between two looks at the aliases.
            tracking_uri: In place of that of `registry`.
            options: More words of the command.
        """
        words = [sys.executable, "-c", "from pipelines.cli import main; main()", "serve"]
        words += ["--tracking-uri", tracking_uri or registry.uri, "--workspace", str(registry.root)]
        words += ["--store", str(store), "--port", "0", "--watch-s", str(watch_s)]
        words += options
        began = time.perf_counter()
        self.log = registry.root / "server.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        try:
            self.port = self._wait()
        except BaseException:
            self.process.kill()
            raise
        self.ready_s = time.perf_counter() - began

    def _wait(self) -> int:
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            text = self.log.read_text(encoding="utf-8", errors="replace")
            if LISTENING in text and "\n" in text.split(LISTENING)[1]:
                address = text.split(LISTENING)[1].split()[0]
                return int(address.rpartition(":")[2])
            time.sleep(0.02)
        raise HttpError(f"the server did not start: {self.log.read_text(encoding='utf-8')[-2000:]}")

    def connection(self) -> Connection:
        """Return a connection to it."""
        return Connection("127.0.0.1", self.port)

    def pids(self) -> list[int]:
        """Return the process and all that it started."""
        found, places = [], [self.process.pid]
        while places:
            pid = places.pop()
            found.append(pid)
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                places += map(int, children.read_text(encoding="ascii").split())
        return found

    def memory(self) -> Memory:
        """Return what all of its processes take together."""
        return memory_of(*self.pids())

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; return the exit code, negative for a signal that killed it."""
        os.kill(self.process.pid, number)
        return self.process.wait(END_S)


@contextmanager
def running(registry: LocalRegistry, store: Path, **how: Any) -> Iterator[ServerProcess]:
    """Yield a server; end it if it still runs."""
    server = ServerProcess(registry, store, **how)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)
