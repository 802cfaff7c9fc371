"""`/v1`: the tasks, their predictions, and how the server stands."""

import time
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Request
from starlette.responses import Response

from ptv2_core.evaluation.inputs import TEXT_KINDS, input_fields
from ptv2_serving.answering import NotReadyError, PromptId, TaskStatus
from ptv2_serving.http.asking import (
    Asking,
    Question,
    answer_headers,
    read_timeout,
    read_version,
)
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.exchanges import WINDOW_S
from ptv2_serving.http.problems import ProblemError

KEYS = ("inputs", "input", "version", "timeout_s")


class Tasks:
    """The handlers of `/v1`."""

    def __init__(self, asking: Asking) -> None:
        """Answer through `asking`."""
        self._asking = asking
        self._service = asking.service

    async def predict(self, request: Request, task: str) -> Response:
        """Answer inputs with the prompt of a task.

        All inputs of a request are answered by the same version. An input is an object with the
        fields that `GET /v1/tasks/{task}` names; a text will do where it says so.
        """
        exchange = request.scope["ptv2.exchange"]
        exchange.asks = True
        found = self._asking.catalogue.find(task)
        exchange.task = task
        async with self._asking.room(exchange, request.receive):
            body = await self._asking.read(exchange, request.receive)
            question = self._question(body, found)
            answer = await self._asking.answer(found, question, exchange, request.receive)
        content = {
            "task": answer.prompt.task,
            "version": answer.prompt.version,
            "digest": answer.prompt.digest,
            "role": answer.role,
            "request_id": exchange.request_id,
            "predictions": answer.predictions,
            "truncated": answer.truncated,
        }
        return json_response(content, headers=answer_headers(answer))

    async def list_tasks(self) -> Response:
        """List the tasks that are loaded."""
        return json_response({"tasks": [_told(task) for task in self._service.tasks()]})

    async def get_task(self, task: str) -> Response:
        """Say what is loaded for a task, and what its inputs are."""
        return json_response(_told(self._asking.catalogue.find(task, believed_s=0.0)))

    async def status(self) -> Response:
        """Say how the server stands: what the page shows."""
        traffic, status = self._asking.traffic, self._service.status()
        count, median, p95 = traffic.recent()
        content = {
            "ready": status.ready and not traffic.draining,
            "reason": "draining" if traffic.draining else status.reason,
            "backbone": status.backbone,
            "uptime_s": round(time.monotonic() - traffic.started_s, 1),
            "latency": {
                "window_s": WINDOW_S, "requests": count, "p50_ms": _ms(median), "p95_ms": _ms(p95),
            },
            "queue": {"rows": status.queued_rows, "limit": status.queue_limit},
            "running_rows": status.running_rows,
            "batches": {
                "count": status.batches,
                "rows": _share(status.batch_rows, status.batches),
                "tasks": _share(status.batch_tasks, status.batches),
                "padding": _share(status.padded_tokens - status.batch_tokens, status.padded_tokens),
            },
            "engines": status.engines,
            "resident": {"prompts": status.resident, "bytes": status.resident_bytes},
            "stale_s": status.stale_s,
            "swaps": status.swaps,
            "last_swap_s": status.last_swap_s,
            "limits": _limits(self._asking.config),
        }  # fmt: skip
        return json_response(content)

    async def reload(self) -> Response:
        """Look at the registry's aliases now."""
        if self._asking.traffic.draining:
            raise NotReadyError("the server is draining")
        return json_response({"changes": list(await self._service.reload())})

    def _question(self, body: Any, task: TaskStatus) -> Question:
        if not isinstance(body, dict) or ("inputs" in body) == ("input" in body):
            raise ProblemError(
                "bad-input", 'expected an object with either "inputs", a list, or "input"'
            )
        if len(body) > len(KEYS) or any(key not in KEYS for key in body):
            unknown = next(key for key in body if key not in KEYS)
            raise ProblemError(
                "bad-input", f"expected no keys but {', '.join(KEYS)}, got {unknown[:40]!r}"
            )
        values = [body["input"]] if "input" in body else body["inputs"]
        if not isinstance(values, list):
            raise ProblemError("bad-input", 'expected a list as "inputs"; one alone is "input"')
        return Question(
            inputs=self._asking.inputs(values, task.spec),
            version=read_version(body.get("version")),
            timeout_s=read_timeout(body.get("timeout_s"), self._asking.config),
        )


def json_response(
    content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return JSON; a number that is none becomes null."""
    return Response(
        orjson.dumps(content, default=_plain), status, headers, media_type="application/json"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value)


def _told(task: TaskStatus) -> dict[str, Any]:
    fields = input_fields(task.spec)
    return {
        "name": task.spec.name,
        "kind": task.spec.kind,
        "form": task.spec.form,
        "labels": task.spec.labels,
        "metric": task.spec.metric,
        "inputs": {
            "needed": fields.needed,
            "optional": fields.optional,
            "text": task.spec.kind in TEXT_KINDS,
        },
        "example": task.example,
        "max_length": task.max_length,
        "champion": _prompt(task.champion),
        "canary": _prompt(task.canary),
        "canary_share": task.canary_share,
        "shadow": _prompt(task.shadow),
        "warm": [_prompt(prompt) for prompt in task.warm],
        "problem": task.problem,
    }


def _prompt(prompt: PromptId | None) -> dict[str, Any] | None:
    return None if prompt is None else {"version": prompt.version, "digest": prompt.digest}


def _limits(config: ServeConfig) -> dict[str, Any]:
    names = ("max_body_bytes", "max_inputs", "max_text_chars", "max_words", "max_timeout_s")
    return {name: getattr(config, name) for name in (*names, "refuse_long")}


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)
