"""Ask a server of prompts from Python: pooled connections, retries, typed errors."""

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import httpx

from ptv2_core.errors import PTv2Error

Input = Mapping[str, Any] | str

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 5.0
MAX_CONNECTIONS = 100
# the server gives up first, and says so
GRACE_S = 1.0
RETRIED = (429, 503)


class ClientError(PTv2Error):
    """A request that was not answered.

    Attributes:
        status: Of the answer; None: there was none.
        kind: The last part of the problem's type, such as `unknown-task`.
        request_id: Under which the server's log has it.
    """

    def __init__(
        self, message: str, *, status: int | None = None, kind: str = "", request_id: str = ""
    ) -> None:
        """Take the words and where they are from."""
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.request_id = request_id


class NotAllowedError(ClientError):
    """The token is missing, unknown or of no use here."""


class NotFoundError(ClientError):
    """No such task or version is loaded."""


class BadInputError(ClientError):
    """The inputs are not what the task takes."""


class OverloadedError(ClientError):
    """The server took no more requests, however often it was asked."""


class UnavailableError(ClientError):
    """The server does not answer, or is starting or draining."""


class DeadlineError(ClientError):
    """The answer was not there in time."""


class ServerFailedError(ClientError):
    """The server failed; its log says why."""


BY_STATUS: Mapping[int, type[ClientError]] = {
    401: NotAllowedError,
    403: NotAllowedError,
    404: NotFoundError,
    429: OverloadedError,
    503: UnavailableError,
    504: DeadlineError,
}


class Predictions(list[dict[str, Any]]):
    """The answers to a request, one an input, as `Predictor.predict` gives them.

    Attributes:
        task: What was asked.
        version: Which answered all of them.
        digest: sha256 of its prompt.safetensors.
        role: In which part it was asked: champion, canary, shadow.
        request_id: Of the request.
        truncated: For each input, whether it was cut.
    """

    def __init__(self, answer: Mapping[str, Any]) -> None:
        """Read the server's answer."""
        super().__init__(answer["predictions"])
        self.task: str = answer["task"]
        self.version: int = answer["version"]
        self.digest: str = answer["digest"]
        self.role: str = answer["role"]
        self.request_id: str = answer["request_id"]
        self.truncated: list[bool] = answer["truncated"]


class _Call:
    """One request and its retries: what to send, and what to do with what comes back."""

    def __init__(self, timeout_s: float, request_id: str | None, retries: int) -> None:
        self.request_id = request_id or secrets.token_hex(16)
        self._timeout_s = timeout_s
        self._until_s = time.monotonic() + timeout_s
        self._left = retries
        self._wait_s = FIRST_WAIT_S

    @property
    def left_s(self) -> float:
        """How much time is left."""
        return max(0.0, self._until_s - time.monotonic())

    @property
    def headers(self) -> dict[str, str]:
        # the same for every try: the canary's choice hangs on it
        return {"X-Request-Id": self.request_id}

    def wait_s(self, error: ClientError, retry_after: str | None = None) -> float:
        """Return how long to wait before the next try; raises `error` where there is none."""
        # some of the wait is chance, so that clients that were refused together come apart
        wait_s = self._wait_s * (0.5 + random.random() / 2)
        if retry_after is not None and retry_after.isdigit():
            wait_s = max(wait_s, float(retry_after))
        if self._left <= 0 or wait_s >= self.left_s:
            raise error
        self._left -= 1
        self._wait_s = min(LONGEST_WAIT_S, 2 * self._wait_s)
        return wait_s

    def broken(self, error: httpx.TransportError, base: str) -> float:
        """Return how long to wait after an exchange that broke off."""
        if isinstance(error, httpx.TimeoutException):
            words = f"{base} did not answer within {self._timeout_s:g} s"
            raise DeadlineError(words, request_id=self.request_id) from error
        words = f"{base} does not answer: {error or type(error).__name__}; is the server running?"
        return self.wait_s(UnavailableError(words, request_id=self.request_id))

    def refused(self, response: httpx.Response) -> float:
        """Return how long to wait after an answer that is an error."""
        error = error_of(response)
        if response.status_code not in RETRIED:
            raise error
        return self.wait_s(error, response.headers.get("retry-after"))


class _Requests:
    """What both clients send."""

    def __init__(self, base_url: str, token: str | None, timeout_s: float, retries: int) -> None:
        self._base = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._options: dict[str, Any] = {
            "base_url": self._base,
            "headers": {} if token is None else {"Authorization": f"Bearer {token}"},
            "limits": httpx.Limits(max_connections=MAX_CONNECTIONS),
            # the server's address is named; no variable of the environment moves it
            "trust_env": False,
        }

    def _call(self, timeout_s: float | None, request_id: str | None = None) -> _Call:
        return _Call(timeout_s or self._timeout_s, request_id, self._retries)


def _body(inputs: Iterable[Input] | Input, version: int | None, call: _Call) -> dict[str, Any]:
    many = [inputs] if isinstance(inputs, str | Mapping) else list(inputs)
    body: dict[str, Any] = {"inputs": many, "timeout_s": max(0.001, call.left_s)}
    return body if version is None else {**body, "version": version}


class Client(_Requests):
    """Asks a server; use it as a context manager, from as many threads as you like."""

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout_s: float = 10.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect to nothing yet.

        Args:
            base_url: Such as `http://127.0.0.1:8000`.
            token: A line of the server's `--token-file`, where it has one.
            timeout_s: For a request and its retries together.
            retries: After answers 429 and 503, and after broken connections.
            transport: In place of the network.
            sleep: Waits between tries.
        """
        super().__init__(base_url, token, timeout_s, retries)
        self._http = httpx.Client(transport=transport, **self._options)
        self._sleep = sleep

    def predict(
        self,
        task: str,
        inputs: Iterable[Input] | Input,
        *,
        version: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Predictions:
        """Return the answers to inputs, all by one version.

        Args:
            task: Which.
            inputs: Texts or objects with the task's fields; one alone will do.
            version: Ask this loaded version instead of the champion.
            timeout_s: For this request and its retries.
            request_id: Decides whether a canary answers; None: a new one.

        Raises:
            ClientError: Its subclass says why.
        """
        call = self._call(timeout_s, request_id)
        path = f"/v1/tasks/{_checked(task)}/predict"
        return Predictions(self._send(call, "POST", path, lambda: _body(inputs, version, call)))

    def tasks(self) -> list[dict[str, Any]]:
        """Return what is loaded, a mapping a task."""
        found: list[dict[str, Any]] = self._send(self._call(None), "GET", "/v1/tasks")["tasks"]
        return found

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> "Client":
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def _send(
        self, call: _Call, method: str, path: str, body: Callable[[], Any] | None = None
    ) -> Any:
        while True:
            try:
                response = self._http.request(
                    method,
                    path,
                    json=None if body is None else body(),
                    headers=call.headers,
                    timeout=call.left_s + GRACE_S,
                )
            except httpx.TransportError as error:
                self._sleep(call.broken(error, self._base))
                continue
            if response.is_success:
                return response.json()
            self._sleep(call.refused(response))


class AsyncClient(_Requests):
    """Asks a server from an event loop; use it as an async context manager."""

    def __init__(
        self,
        base_url: str,
        token: str | None = None,
        *,
        timeout_s: float = 10.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """Connect to nothing yet; the arguments are those of `Client`."""
        super().__init__(base_url, token, timeout_s, retries)
        self._http = httpx.AsyncClient(transport=transport, **self._options)

    async def predict(
        self,
        task: str,
        inputs: Iterable[Input] | Input,
        *,
        version: int | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Predictions:
        """Return the answers to inputs, as `Client.predict` does."""
        call = self._call(timeout_s, request_id)
        path = f"/v1/tasks/{_checked(task)}/predict"
        answer = await self._send(call, "POST", path, lambda: _body(inputs, version, call))
        return Predictions(answer)

    async def tasks(self) -> list[dict[str, Any]]:
        """Return what is loaded, a mapping a task."""
        found = await self._send(self._call(None), "GET", "/v1/tasks")
        tasks: list[dict[str, Any]] = found["tasks"]
        return tasks

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> "AsyncClient":
        """Return the client."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.close()

    async def _send(
        self, call: _Call, method: str, path: str, body: Callable[[], Any] | None = None
    ) -> Any:
        while True:
            try:
                response = await self._http.request(
                    method,
                    path,
                    json=None if body is None else body(),
                    headers=call.headers,
                    timeout=call.left_s + GRACE_S,
                )
            except httpx.TransportError as error:
                await asyncio.sleep(call.broken(error, self._base))
                continue
            if response.is_success:
                return response.json()
            await asyncio.sleep(call.refused(response))


def error_of(response: httpx.Response) -> ClientError:
    """Return an answer that is an error as one of Python's."""
    status = response.status_code
    try:
        body = response.json()
    except ValueError:
        body = None
    body = body if isinstance(body, dict) else {}
    default = ServerFailedError if status >= 500 else BadInputError
    return BY_STATUS.get(status, default)(
        str(body.get("detail") or f"{response.request.url} answered with status {status}"),
        status=status,
        kind=str(body.get("type", "")).rpartition(":")[2],
        request_id=response.headers.get("x-request-id", ""),
    )


def _checked(task: str) -> str:
    """Return a task's name, which becomes a part of an address."""
    if not task or not all(letter.isalnum() or letter in "_-" for letter in task):
        raise BadInputError(f"expected a task's name of a-z, 0-9, _ and -, got {task!r:.80}")
    return task
