"""From a request's JSON to the service and back: what `/v1` and `/v2` share."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Receive

from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.inputs import TEXT_KINDS, input_fields
from ptv2_serving.answering import Answer, Service, TaskStatus, UnknownTaskError
from ptv2_serving.http.bodies import discard, read_json
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.exchanges import Exchange, Traffic
from ptv2_serving.http.problems import ClientGoneError, ProblemError

MAX_VERSION = 999_999_999
BUSY_RETRY_S = 1.0
# how long the list of tasks is believed, and how soon a name that is not on it is looked for again
BELIEVED_S = 1.0
SOUGHT_AGAIN_S = 0.1
MAX_SHOWN = 20

Result = TypeVar("Result")

_clock = time.monotonic


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a request asks.

    Attributes:
        inputs: As the service takes them.
        version: Which to ask; None: what the aliases say.
        timeout_s: When to give up; None: as the server is set.
    """

    inputs: Sequence[Mapping[str, Any]]
    version: int | None = None
    timeout_s: float | None = None


class Catalogue:
    """The tasks by name; the service is asked for them now and then, not for every request."""

    def __init__(self, service: Service) -> None:
        """Know nothing yet."""
        self._service = service
        self._tasks: Mapping[str, TaskStatus] = {}
        self._changes: int | None = None
        self._asked_s = -math.inf

    def find(self, name: str, *, believed_s: float = BELIEVED_S) -> TaskStatus:
        """Return what is loaded for a task, as it was a moment ago.

        Args:
            name: The task.
            believed_s: How long ago that may be; longer where nothing changed.

        Raises:
            UnknownTaskError: Nothing is.
        """
        if _clock() - self._asked_s >= (
            believed_s if name in self._tasks else min(believed_s, SOUGHT_AGAIN_S)
        ):
            self._ask()
        if name not in self._tasks:
            known = sorted(self._tasks)
            more = f" and {len(known) - MAX_SHOWN} more" if len(known) > MAX_SHOWN else ""
            raise UnknownTaskError(
                f"expected one of the tasks that are loaded "
                f"({', '.join(known[:MAX_SHOWN]) or 'none'}{more}), got {name[:80]!r}"
            )
        return self._tasks[name]

    def _ask(self) -> None:
        """Make the list anew where it would be another: thousands of tasks take a while."""
        self._asked_s, changes = _clock(), self._service.status().changes
        if changes is None or changes != self._changes:
            self._tasks = {task.spec.name: task for task in self._service.tasks()}
            self._changes = changes


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Reads questions and has them answered.

    Attributes:
        service: Answers.
        config: The limits.
        traffic: Of this server.
        catalogue: The tasks.
    """

    service: Service
    config: ServeConfig
    traffic: Traffic
    catalogue: Catalogue

    @asynccontextmanager
    async def room(self, exchange: Exchange, receive: Receive) -> AsyncIterator[None]:
        """Count a request while it is read and answered: both take memory.

        Raises:
            ProblemError: Too many are.
        """
        if self.traffic.running >= self.config.max_concurrent:
            # who waits for `100 Continue` sends nothing before it is told to
            if b"expect" not in exchange.headers:
                exchange.is_read = await discard(receive)
            raise ProblemError(
                "busy",
                f"{self.config.max_concurrent} requests are being answered; try again",
                retry_after_s=BUSY_RETRY_S,
            )
        self.traffic.running += 1
        try:
            yield
        finally:
            self.traffic.running -= 1

    async def read(self, exchange: Exchange, receive: Receive) -> Any:
        """Return the JSON of a request's body; see `read_json` for what it refuses."""
        value = await read_json(
            exchange.headers,
            receive,
            max_bytes=self.config.max_body_bytes,
            timeout_s=self.config.body_timeout_s,
            max_depth=self.config.max_json_depth,
        )
        exchange.is_read = True
        return value

    async def answer(
        self, task: TaskStatus, question: Question, exchange: Exchange, receive: Receive
    ) -> Answer:
        """Have a question answered, unless the client goes before.

        Raises:
            ClientGoneError: It went; nothing is computed for it any more.
            PTv2Error: As `Service.predict` says.
        """
        exchange.inputs = len(question.inputs)
        if self.config.log_texts:
            exchange.texts = question.inputs
        call = self.service.predict(
            task.spec.name,
            question.inputs,
            request_id=exchange.request_id,
            timeout_s=question.timeout_s or self.config.timeout_s,
            version=question.version,
            refuse_long=self.config.refuse_long,
        )
        answer = await unless_gone(call, receive)
        exchange.version, exchange.role = answer.prompt.version, answer.role
        exchange.truncated = sum(answer.truncated)
        return answer

    def inputs(self, values: Sequence[Any], task: TaskSpec) -> list[Mapping[str, Any]]:
        """Return inputs as the service takes them, within the limits.

        Raises:
            ProblemError: There are none or too many, or one is no input or too large.
        """
        if not 1 <= len(values) <= self.config.max_inputs:
            raise ProblemError(
                "bad-input",
                f"expected 1 to {self.config.max_inputs} inputs, got {len(values)}",
            )
        return [self._input(place, value, task) for place, value in enumerate(values, start=1)]

    def _input(self, place: int, value: Any, task: TaskSpec) -> Mapping[str, Any]:
        if isinstance(value, str) and task.kind in TEXT_KINDS:
            value = {"text": value}
        if not isinstance(value, dict):
            fields = ", ".join(f"`{name}`" for name in input_fields(task).needed)
            text = " or a text" if task.kind in TEXT_KINDS else ""
            raise ProblemError(
                "bad-input",
                f"input {place}: expected an object with {fields}{text}, got {_kind_of(value)}",
            )
        for item in value.values():
            self._check_size(place, item)
        return value

    def _check_size(self, place: int, value: Any) -> None:
        if isinstance(value, str):
            if len(value) > self.config.max_text_chars:
                raise ProblemError(
                    "too-long",
                    f"input {place}: expected texts of at most {self.config.max_text_chars:,} "
                    f"characters, got {len(value):,}",
                )
        elif isinstance(value, list | dict):
            if len(value) > self.config.max_words:
                raise ProblemError(
                    "too-long",
                    f"input {place}: expected lists of at most {self.config.max_words:,} items, "
                    f"got {len(value):,}",
                )
            for item in value.values() if isinstance(value, dict) else value:
                self._check_size(place, item)


async def unless_gone(call: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """Return what a call gives; cancel it when the client goes before.

    Raises:
        ClientGoneError: It went.
    """
    caller = asyncio.current_task()
    assert caller is not None, "runs in a task"
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        # the body was read: what still comes is the end of the connection
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        caller.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await call
    except asyncio.CancelledError:
        if is_gone and caller.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        watcher.cancel()


def read_version(value: Any) -> int | None:
    """Return a version as a request names it.

    Raises:
        ProblemError: It is none.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_VERSION:
        raise ProblemError(
            "bad-input", f"version: expected a whole number from 1, got {str(value)[:40]}"
        )
    return value


def read_timeout(value: Any, config: ServeConfig) -> float | None:
    """Return how long a request waits.

    Raises:
        ProblemError: It is no number, or out of range.
    """
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value <= config.max_timeout_s:
        raise ProblemError(
            "bad-input",
            f"timeout_s: expected a number above 0, at most {config.max_timeout_s:g}, got "
            f"{str(value)[:40]}",
        )
    return float(value)


def answer_headers(answer: Answer) -> dict[str, str]:
    """Return the headers that say who answered, and what the time went to."""
    return {
        "X-Ptv2-Version": str(answer.prompt.version),
        "X-Ptv2-Digest": answer.prompt.digest,
        "Server-Timing": f"queue;dur={1000 * answer.queued_s:.3f}, "
        f"compute;dur={1000 * answer.computed_s:.3f}",
    }


def _kind_of(value: Any) -> str:
    names = {str: "a text", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
