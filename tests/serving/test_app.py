"""`/v1`, health and errors, on an app with a fake service."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from ptv2_core.errors import ArtifactError, BackboneError, DataError
from ptv2_serving.answering import (
    BusyError,
    DeadlineError,
    NotReadyError,
    ServingError,
    TaskStatus,
    TooLongError,
    UnknownTaskError,
)
from ptv2_serving.http import asking
from ptv2_serving.tracking import StoreError
from tests.serving.http_parts import BASE, Asked, problem_of
from tests.serving.service_parts import EXAMPLES, SPECS, FakeService, digest, predicted, spec

PREDICT = "/v1/tasks/intents/predict"


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_predict_answers_every_form_of_task(asked: Asked, spec: Any) -> None:
    example = EXAMPLES[spec.name]
    response = asked.predict(spec.name, example, headers={"X-Request-Id": "a.b-c_1"})
    assert response.status_code == 200
    assert response.json() == {
        "task": spec.name,
        "version": 3,
        "digest": digest(f"{spec.name}:3"),
        "role": "champion",
        "request_id": "a.b-c_1",
        "predictions": [predicted(spec, example)],
        "truncated": [False],
    }
    assert response.headers["x-request-id"] == "a.b-c_1"
    assert response.headers["x-ptv2-version"] == "3"
    assert response.headers["x-ptv2-digest"] == digest(f"{spec.name}:3")
    assert response.headers["server-timing"] == "queue;dur=1.200, compute;dur=3.400"


def test_predict_takes_one_input_a_version_and_a_time(asked: Asked) -> None:
    body = {"input": "book a table", "version": 2, "timeout_s": 1.5}
    response = asked.post(PREDICT, body, headers={"X-Request-Id": "same"})
    assert response.json()["version"] == 2
    assert asked.service.asked == [
        {
            "task": "intents",
            "inputs": [{"text": "book a table"}],
            "request_id": "same",
            "timeout_s": 1.5,
            "version": 2,
            "refuse_long": False,
        }
    ]


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\x7f", "é", 'a"}'])
def test_predict_makes_a_request_id_where_the_given_one_is_unfit(asked: Asked, given: str) -> None:
    headers = {b"X-Request-Id": given.encode("latin-1"), b"Content-Type": b"application/json"}
    response = asked.ask("POST", PREDICT, content=b'{"input":"a"}', headers=headers)
    made = response.headers["x-request-id"]
    assert len(made) == 32
    assert made == response.json()["request_id"] != given


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([], 'either "inputs", a list, or "input"'),
        ({}, 'either "inputs", a list, or "input"'),
        ({"input": "a", "inputs": ["a"]}, 'either "inputs", a list, or "input"'),
        ({"inputs": "a"}, 'expected a list as "inputs"'),
        ({"inputs": []}, "expected 1 to 64 inputs, got 0"),
        ({"inputs": ["a"] * 65}, "expected 1 to 64 inputs, got 65"),
        ({"input": "a", "text": "a"}, "got 'text'"),
        ({"inputs": ["a", 7]}, "input 2: expected an object with `text` or a text, got a number"),
        ({"inputs": ["a", [["b"]]]}, "input 2: expected an object with `text` or a text"),
        ({"inputs": ["a", {"txt": "b"}]}, "input 2: expected a `text`"),
        ({"input": "a", "version": True}, "version: expected a whole number from 1"),
        ({"input": "a", "version": 0}, "version: expected a whole number from 1"),
        ({"input": "a", "version": 1.5}, "version: expected a whole number from 1"),
        ({"input": "a", "timeout_s": 0}, "timeout_s: expected a number above 0, at most 120"),
        ({"input": "a", "timeout_s": 121}, "timeout_s: expected a number above 0, at most 120"),
        ({"input": "a", "timeout_s": "1"}, "timeout_s: expected a number above 0, at most 120"),
    ],
)
def test_predict_says_what_is_wrong_with_a_body(asked: Asked, body: Any, expected: str) -> None:
    response = asked.post(PREDICT, body)
    assert response.status_code == 422
    assert problem_of(response) == "bad-input"
    assert expected in response.json()["detail"]


def test_predict_needs_objects_where_a_text_is_not_enough(asked: Asked) -> None:
    response = asked.predict("reading", "Where is the table?")
    assert problem_of(response) == "bad-input"
    assert response.json()["detail"] == (
        "input 1: expected an object with `question`, `context`, got a text"
    )


@pytest.mark.parametrize("path", ["/v1/tasks/nope/predict", "/v1/tasks/..%2Fintents/predict"])
def test_predict_of_an_unknown_task_is_not_found(asked: Asked, path: str) -> None:
    response = asked.post(path, {"input": "a"})
    assert response.status_code == 404
    assert asked.service.asked == []


def test_predict_of_an_unknown_version_is_not_found(asked: Asked) -> None:
    response = asked.post(PREDICT, {"input": "a", "version": 9})
    assert (response.status_code, problem_of(response)) == (404, "unknown-task")


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (BusyError("full", retry_after_s=2.2), 429, "busy", "3"),
        (DeadlineError("late"), 504, "deadline", None),
        (NotReadyError("starting"), 503, "not-ready", "1"),
        (TooLongError("input 1: long"), 422, "too-long", None),
        (DataError("input 1: expected a `text`"), 422, "bad-input", None),
        (ServingError("the process that computed it ended"), 500, "internal", None),
        (StoreError("/srv/store cannot be written"), 500, "internal", None),
        (BackboneError("/srv/minilm is another one"), 500, "internal", None),
        (ArtifactError("/srv/store/a is damaged"), 500, "internal", None),
        (RuntimeError("secret text"), 500, "internal", None),
    ],
)
def test_predict_tells_the_errors_of_the_service(
    error: Exception, status: int, kind: str, retry: str | None
) -> None:
    asked = Asked(FakeService(error=error))
    response = asked.predict("intents", "secret text")
    assert (response.status_code, problem_of(response)) == (status, kind)
    assert response.headers.get("retry-after") == retry
    assert "connection" not in response.headers
    assert "secret text" not in response.text
    assert "secret text" not in asked.log.getvalue()


def test_faults_of_the_engine_are_told_to_the_log_alone() -> None:
    asked = Asked(FakeService(error=ServingError("out of memory on /srv")))
    response = asked.predict("intents", "a", headers={"X-Request-Id": "r1"})
    assert response.json()["detail"] == "see the server's log under this request id"
    failure, request = asked.lines()
    assert (failure["event"], failure["request_id"]) == ("failure", "r1")
    assert (failure["error"], failure["message"]) == ("ServingError", "out of memory on /srv")
    assert (request["status"], request["problem"]) == (500, "internal")
    infer = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    response = asked.post("/v2/models/intents/infer", {"inputs": [infer]})
    assert (response.status_code, list(response.json())) == (500, ["error"])


def test_predict_is_cancelled_when_its_client_goes() -> None:
    asked = Asked(FakeService(delay_s=30.0))

    async def run() -> list[Any]:
        sent: list[Any] = []
        body = [{"type": "http.request", "body": b'{"input": "a"}', "more_body": False}]

        async def receive() -> Any:
            if body:
                return body.pop()
            while not asked.service.open:
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        await asked.app(
            {
                "type": "http",
                "method": "POST",
                "path": PREDICT,
                "raw_path": PREDICT.encode(),
                "query_string": b"",
                "headers": headers,
                "client": ("127.0.0.1", 1),
                "server": ("127.0.0.1", 80),
                "scheme": "http",
                "http_version": "1.1",
            },
            receive,
            send,
        )
        return sent

    assert asyncio.run(run()) == []
    assert asked.service.cancelled == 1
    assert [line["status"] for line in asked.lines()] == [499]


def test_tasks_say_what_is_loaded(asked: Asked) -> None:
    tasks = {task["name"]: task for task in asked.get("/v1/tasks").json()["tasks"]}
    assert list(tasks) == [spec.name for spec in SPECS]
    assert tasks["reading"] == asked.get("/v1/tasks/reading").json()
    assert tasks["reading"] == {
        "name": "reading",
        "kind": "qa",
        "form": "spans",
        "labels": [],
        "metric": "f1",
        "inputs": {"needed": ["question", "context"], "optional": [], "text": False},
        "example": EXAMPLES["reading"],
        "max_length": 64,
        "champion": {"version": 3, "digest": digest("reading:3")},
        "canary": None,
        "canary_share": 0.0,
        "shadow": None,
        "warm": [{"version": 2, "digest": digest("reading:2")}],
        "problem": None,
    }
    assert problem_of(asked.get("/v1/tasks/nope")) == "unknown-task"


def test_tasks_are_not_asked_for_again_while_none_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, looks = [100.0], [0]

    class Counted(FakeService):
        def tasks(self) -> Sequence[TaskStatus]:
            looks[0] += 1
            return super().tasks()

    monkeypatch.setattr(asking, "_clock", lambda: now[0])
    service = Counted()
    catalogue = asking.Catalogue(service)
    for _ in range(8):
        assert catalogue.find("intents").champion.version == 3
        with pytest.raises(UnknownTaskError):
            catalogue.find("nope")
        now[0] += 1.1
    assert looks == [1]
    # a swap, then another prompt
    service.version = 4
    assert catalogue.find("intents").champion.version == 4
    service.specs = (*SPECS, spec("nope", "regression", text="text"))
    now[0] += 0.2
    assert catalogue.find("nope").spec.name == "nope"
    assert looks == [3]
    # who asks about a task itself gets what is loaded at this moment
    service.version = 5
    assert catalogue.find("intents").champion.version == 4
    assert catalogue.find("intents", believed_s=0.0).champion.version == 5
    service.specs = (*service.specs, spec("new", "regression", text="text"))
    assert catalogue.find("new", believed_s=0.0).spec.name == "new"
    # a service that counts no changes is asked each time
    service.status_fields = {"changes": None}
    for version in (6, 7):
        service.version = version
        assert catalogue.find("intents", believed_s=0.0).champion.version == version


def test_reload_asks_the_service(asked: Asked) -> None:
    assert asked.post("/v1/admin/reload").json() == {"changes": ["intents: champion 2 -> 3"]}
    assert asked.service.reloads == 1


def test_status_counts_what_was_answered(asked: Asked) -> None:
    for _ in range(3):
        asked.predict("intents", "a table")
    status = asked.get("/v1/status").json()
    assert status["latency"]["requests"] == 3
    assert 0 < status["latency"]["p50_ms"] <= status["latency"]["p95_ms"]
    assert status["batches"] == {"count": 4, "rows": 5.0, "tasks": 3.0, "padding": 0.25}
    assert status["ready"] is True


def test_health_tells_live_from_ready() -> None:
    asked = Asked(FakeService(ready=False))
    assert asked.get("/healthz").json() == {"live": True}
    response = asked.get("/readyz")
    assert (response.status_code, response.json()) == (
        503,
        {"ready": False, "reason": "loading the backbone"},
    )
    assert response.headers["retry-after"] == "1"
    asked.service.ready = True
    assert asked.get("/readyz").json() == {"ready": True}


def test_draining_refuses_all_but_health(asked: Asked) -> None:
    asked.app.state.traffic.draining = True
    response = asked.predict("intents", "a")
    assert (response.status_code, problem_of(response)) == (503, "not-ready")
    assert response.headers["connection"] == "close"
    assert response.headers["retry-after"] == "1"
    assert asked.service.asked == []
    assert asked.get("/healthz").status_code == 200
    assert asked.get("/readyz").json()["reason"] == "draining"


def test_unknown_addresses_and_methods_are_problems(asked: Asked) -> None:
    assert problem_of(asked.get("/v1/tasks/")) == "not-found"
    assert problem_of(asked.get("/docs")) == "not-found"
    response = asked.get(PREDICT)
    assert (response.status_code, problem_of(response)) == (405, "method")
    assert response.headers["allow"] == "POST"


def test_answers_carry_headers_of_safety(asked: Asked) -> None:
    for path in ("/healthz", "/v1/tasks", "/nowhere"):
        headers = asked.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_log_has_a_line_a_request_and_no_text(asked: Asked) -> None:
    asked.predict("intents", "a secret", "another", headers={"X-Request-Id": "r1"})
    asked.predict("nope-secret", "a secret", headers={"X-Request-Id": "r2"})
    asked.post(PREDICT, {"inputs": [{"txt": "a secret"}]}, headers={"X-Request-Id": "r3"})
    asked.get("/healthz")
    first, second, third = asked.lines()
    assert 0 < first.pop("ms") < 5000
    assert first.pop("time").endswith("Z")
    assert first == {
        "event": "request",
        "request_id": "r1",
        "method": "POST",
        "route": "/v1/tasks/{task}/predict",
        "status": 200,
        "task": "intents",
        "version": 3,
        "role": "champion",
        "n": 2,
    }
    assert (second["task"], second["problem"]) == (None, "unknown-task")
    assert (third["task"], third["problem"]) == ("intents", "bad-input")
    assert "secret" not in asked.log.getvalue()


def test_log_has_texts_where_it_is_told_to() -> None:
    asked = Asked(log_texts=True)
    asked.predict("intents", "a secret")
    assert asked.lines()[0]["inputs"] == [{"text": "a secret"}]


def test_openapi_names_every_address_of_the_api(asked: Asked) -> None:
    document = asked.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/healthz",
        "/readyz",
        "/v1/admin/reload",
        "/v1/status",
        "/v1/tasks",
        "/v1/tasks/{task}",
        "/v1/tasks/{task}/predict",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{model}",
        "/v2/models/{model}/infer",
        "/v2/models/{model}/ready",
        "/v2/models/{model}/versions/{version}",
        "/v2/models/{model}/versions/{version}/infer",
        "/v2/models/{model}/versions/{version}/ready",
    }
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_many_requests_at_once_are_answered_side_by_side() -> None:
    asked = Asked(FakeService(delay_s=0.2))

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(asked.app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            calls = [client.post(PREDICT, json={"input": f"text {n}"}) for n in range(20)]
            return list(await asyncio.wait_for(asyncio.gather(*calls), 2.0))

    assert {response.status_code for response in asyncio.run(run())} == {200}
