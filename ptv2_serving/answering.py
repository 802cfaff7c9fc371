"""What a server of prompts answers, and how it says no: the seam between HTTP and the engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import PTv2Error

Role = Literal["champion", "canary", "shadow"]


@dataclass(frozen=True, kw_only=True)
class PromptId:
    """Exactly which prompt: nothing else answers under the same name.

    Attributes:
        task: What it answers.
        version: In the registry.
        digest: sha256 of its prompt.safetensors, hexadecimal.
    """

    task: str
    version: int
    digest: str

    def __str__(self) -> str:
        """Return it as it is written in references."""
        return f"{self.task}:{self.version}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answers to one request.

    Attributes:
        prompt: Which one answered all of its inputs.
        role: In which part it was asked.
        predictions: One an input, as `ptv2_core.evaluation.predict.Predictor.predict` returns them.
        truncated: For each input, whether it was cut to the longest length.
        queued_s: How long the request waited before its first row was computed.
        computed_s: From then to the last row's answer.
    """

    prompt: PromptId
    role: Role
    predictions: Sequence[Mapping[str, Any]]
    truncated: Sequence[bool]
    queued_s: float
    computed_s: float


@dataclass(frozen=True, kw_only=True)
class TaskStatus:
    """What is loaded for a task.

    Attributes:
        spec: Kind, fields and labels.
        champion: What answers.
        canary: What answers a share of the requests, or None.
        canary_share: In percent, 0 to 100.
        shadow: What is asked beside the champion without being heard, or None.
        warm: Earlier prompts that are still loaded, latest first.
        max_length: Tokens of an input; longer ones are cut, or refused, as the server is set.
        example: An input as the task takes it.
        problem: Why the registry's wish is not followed, or None.
    """

    spec: TaskSpec
    champion: PromptId
    canary: PromptId | None = None
    canary_share: float = 0.0
    shadow: PromptId | None = None
    warm: Sequence[PromptId] = ()
    max_length: int
    example: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """How the engine stands, for `/metrics`, `/readyz` and the page.

    Attributes:
        backbone: Name, digest, precision, digest in that precision and device of the one backbone.
        ready: Whether requests are answered.
        reason: Why not, in words; empty when ready.
        queued_rows: Rows that wait.
        queue_limit: Rows at which new requests are refused.
        running_rows: Rows that are being computed.
        batches: Forward passes so far.
        batch_rows: Rows in all of them.
        batch_tasks: Sum over them of how many prompts each held.
        batch_tokens: Real tokens in all of them.
        padded_tokens: Tokens computed, padding included.
        engines: Engine processes that are alive.
        resident: Prompts that are loaded.
        resident_bytes: What they take.
        stale_s: Seconds since the registry last answered; 0 where none is watched.
        changes: Times that what `tasks` returns became another; None: nobody counts them.
        swaps: Times that an alias moved and its prompt was swapped in.
        last_swap_s: From the moved alias seen to the first answer of the last swap; None: none yet.
        disagreements: For each task with a shadow or canary, (compared, different) so far.
    """

    backbone: Mapping[str, Any]
    ready: bool
    reason: str = ""
    queued_rows: int = 0
    queue_limit: int = 0
    running_rows: int = 0
    batches: int = 0
    batch_rows: int = 0
    batch_tasks: int = 0
    batch_tokens: int = 0
    padded_tokens: int = 0
    engines: int = 0
    resident: int = 0
    resident_bytes: int = 0
    stale_s: float = 0.0
    changes: int | None = None
    swaps: int = 0
    last_swap_s: float | None = None
    disagreements: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class ServingError(PTv2Error):
    """A request that is not answered, for a reason that its client can act on."""


class UnknownTaskError(ServingError):
    """No prompt of that task, or not of that version, is loaded."""


class TooLongError(ServingError):
    """An input is longer than the longest length, and the server refuses instead of cutting."""


class BusyError(ServingError):
    """The queue is full.

    Attributes:
        retry_after_s: When it is worth trying again.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        """Take the message and when to try again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(ServingError):
    """The answer was not there in time."""


class NotReadyError(ServingError):
    """The server is starting or draining."""


class Service(Protocol):
    """What HTTP is an outside of. All of it is called on one event loop."""

    def tasks(self) -> Sequence[TaskStatus]:
        """Return what is loaded, by task name."""
        ...

    def status(self) -> EngineStatus:
        """Return how the engine stands."""
        ...

    async def predict(
        self,
        task: str,
        inputs: Sequence[Mapping[str, Any]],
        *,
        request_id: str,
        timeout_s: float,
        version: int | None = None,
        refuse_long: bool = False,
    ) -> Answer:
        """Answer inputs, all with one prompt.

        Cancelling the call takes its rows from the queue.

        Args:
            task: Which.
            inputs: As `ptv2_core.evaluation.inputs.examples_of_inputs` takes them.
            request_id: Decides whether the canary answers: the same id, the same prompt.
            timeout_s: When to give up.
            version: Ask this loaded version instead of what the aliases say.
            refuse_long: Whether an input that would be cut is an error.

        Raises:
            UnknownTaskError: No such prompt is loaded.
            DataError: An input is not what the task takes; it says which and why.
            TooLongError: See `refuse_long`.
            BusyError: The queue is full.
            DeadlineError: `timeout_s` went by.
            NotReadyError: The server is starting or draining.
        """
        ...

    async def reload(self) -> Sequence[str]:
        """Look at the registry's aliases now; return what changed, a line each."""
        ...

    async def drain(self, *, timeout_s: float) -> bool:
        """Take no new requests, answer those that were taken; return whether all were."""
        ...
