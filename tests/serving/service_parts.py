"""A service without an engine: it answers every form of task, always the same."""

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptv2_core.data.tasks import METRICS, TaskKind, TaskSpec
from ptv2_core.evaluation.inputs import examples_of_inputs
from ptv2_serving.answering import (
    Answer,
    EngineStatus,
    NotReadyError,
    PromptId,
    TaskStatus,
    TooLongError,
    UnknownTaskError,
)

MAX_WORDS = 50
LABELS = ("book", "cancel", "play")


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def spec(name: str, kind: TaskKind, **fields: str) -> TaskSpec:
    labels: tuple[str, ...] = ()
    if kind in ("classification", "word_in_context"):
        labels = LABELS
    elif kind == "tagging":
        labels = ("O", "B-place", "I-place")
    return TaskSpec(name=name, kind=kind, labels=labels, fields=fields, metric=METRICS[kind])


EXAMPLES: dict[str, dict[str, Any]] = {
    "intents": {"text": "book a table in rome"},
    "pairs": {"text": "a dog runs", "text_pair": "an animal moves"},
    "slots": {"tokens": ["book", "a", "table", "in", "rome"]},
    "reading": {"question": "Where is the table?", "context": "The table is in Rome."},
    "copa": {
        "text": "It rained.",
        "question": "effect",
        "choices": ["The street got wet.", "The street got dry."],
    },
    "scores": {"text": "a fine day"},
}
SPECS = (
    spec("intents", "classification", text="text", label="label"),
    spec("pairs", "classification", text="text", text_pair="other", label="label"),
    spec("slots", "tagging", tokens="tokens", tags="tags"),
    spec("reading", "qa"),
    spec("copa", "multiple_choice"),
    spec("scores", "regression", text="text", label="score"),
)


def predicted(task: TaskSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prediction in the shape of `Predictor.predict`."""
    if task.form == "rows":
        shares = [0.7, 0.2, 0.1]
        best = len(values["text"]) % len(task.labels)
        shares = shares[-best:] + shares[:-best] if best else shares
        return {
            "label": task.labels[best],
            "probabilities": dict(zip(task.labels, shares, strict=True)),
        }
    if task.form == "values":
        return {"value": len(values["text"]) / 10}
    if task.form == "options":
        return {
            "choice": 0,
            "text": values["choices"][0],
            "options": list(values["choices"]),
            "probabilities": [1 / len(values["choices"])] * len(values["choices"]),
        }
    if task.form == "tokens":
        words = values.get("tokens") or values["text"].split()
        last = len(words) - 1
        return {
            "tokens": list(words),
            "tags": ["O"] * last + ["B-place"],
            "spans": [
                {
                    "type": "place",
                    "start": last,
                    "end": last + 1,
                    "start_char": len(" ".join([*words[:last], ""])),
                    "end_char": len(" ".join(words)),
                    "text": words[last],
                }
            ],
        }
    text = values["context"].split()[-1]
    start = len(values["context"]) - len(text)
    best = {"text": text, "start": start, "end": start + len(text), "score": 0.9}
    return {**best, "n_best": [best, {"text": "", "start": None, "end": None, "score": 0.1}]}


@dataclass
class FakeService:
    """Answers at once, or as it is told.

    Attributes:
        specs: Its tasks.
        delay_s: Before each answer.
        error: Raised in place of an answer.
        version: Of every champion; the one before is warm.
        ready: Whether it is.
        cancelled: Calls that were cancelled.
        asked: What `predict` was called with.
        reloads: Calls of `reload`.
        open: Calls that are not answered yet.
    """

    specs: Sequence[TaskSpec] = SPECS
    delay_s: float = 0.0
    error: Exception | None = None
    version: int = 3
    ready: bool = True
    cancelled: int = 0
    asked: list[dict[str, Any]] = field(default_factory=list)
    reloads: int = 0
    open: int = 0
    status_fields: dict[str, Any] = field(default_factory=dict)

    def prompt(self, task: str, version: int | None = None) -> PromptId:
        number = version or self.version
        return PromptId(task=task, version=number, digest=digest(f"{task}:{number}"))

    def tasks(self) -> Sequence[TaskStatus]:
        return [
            TaskStatus(
                spec=one,
                champion=self.prompt(one.name),
                warm=(self.prompt(one.name, self.version - 1),),
                max_length=64,
                example=EXAMPLES.get(one.name, {"text": "a text"}),
            )
            for one in self.specs
        ]

    def status(self) -> EngineStatus:
        values: dict[str, Any] = {
            "backbone": {
                "name": "tiny", "digest": digest("tiny"), "precision": "fp32", "device": "cpu",
            },
            "ready": self.ready,
            "reason": "" if self.ready else "loading the backbone",
            "queue_limit": 1000, "batches": 4, "batch_rows": 20, "batch_tasks": 12,
            "batch_tokens": 300, "padded_tokens": 400, "engines": 1,
            "resident": len(self.specs), "resident_bytes": 590_000 * len(self.specs),
            "changes": 1000 * self.version + len(self.specs),
            "disagreements": {"intents": (40, 2)},
            **self.status_fields,
        }  # fmt: skip
        return EngineStatus(**values)

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
        self.asked.append(
            {"task": task, "inputs": inputs, "request_id": request_id, "timeout_s": timeout_s,
             "version": version, "refuse_long": refuse_long}
        )  # fmt: skip
        del self.asked[:-1000]
        if self.error is not None:
            raise self.error
        if not self.ready:
            raise NotReadyError("loading the backbone")
        known = next(one for one in self.specs if one.name == task)
        if version not in (None, self.version, self.version - 1):
            raise UnknownTaskError(f"expected version {self.version} of {task}, got {version}")
        examples_of_inputs(inputs, known)
        truncated = [len(str(values)) > 10 * MAX_WORDS for values in inputs]
        if refuse_long and any(truncated):
            raise TooLongError(f"input {truncated.index(True) + 1}: expected at most 64 tokens")
        if self.delay_s:
            self.open += 1
            try:
                await asyncio.sleep(self.delay_s)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.open -= 1
        return Answer(
            prompt=self.prompt(task, version),
            role="champion",
            predictions=[predicted(known, values) for values in inputs],
            truncated=truncated,
            queued_s=0.0012,
            computed_s=0.0034,
        )

    async def reload(self) -> Sequence[str]:
        self.reloads += 1
        return ["intents: champion 2 -> 3"]

    async def drain(self, *, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        while self.open and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.ready = False
        return not self.open
