"""The Python client, against the app and against servers that refuse."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import ptv2_serving
from ptv2_serving import AsyncClient, Client, client
from ptv2_serving.answering import ServingError
from ptv2_serving.app import ServeConfig, make_app
from tests.serving.http_parts import running
from tests.serving.service_parts import EXAMPLES, FakeService, digest

ANSWER = {
    "task": "intents",
    "version": 3,
    "digest": "d",
    "role": "champion",
    "request_id": "r",
    "predictions": [{"label": "book"}],
    "truncated": [False],
}


def refusing(
    *answers: httpx.Response | Exception, **options: Any
) -> tuple[Client, list[httpx.Request], list[float]]:
    """Return a client of a server that gives these answers, its requests and its waits."""
    requests: list[httpx.Request] = []
    waits: list[float] = []
    left = list(answers)

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    transport = httpx.MockTransport(answer)
    made = Client("http://server", transport=transport, sleep=waits.append, **options)
    return made, requests, waits


def problem(status: int, kind: str, **headers: str) -> httpx.Response:
    body = {"type": f"urn:ptv2:problem:{kind}", "detail": f"why {kind}"}
    return httpx.Response(status, json=body, headers={"X-Request-Id": "r9", **headers})


def test_client_is_exported() -> None:
    assert ptv2_serving.Client is client.Client
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = ptv2_serving.Nothing  # type: ignore[attr-defined]


def test_client_answers_with_version_and_digest() -> None:
    with running() as server, Client(server.base) as asking:
        found = asking.predict("intents", ["book a table", {"text": "cancel it"}], version=2)
        assert [one["label"] for one in found] == ["book", "book"]
        assert (found.task, found.version, found.role) == ("intents", 2, "champion")
        assert found.digest == digest("intents:2")
        assert found.truncated == [False, False]
        (one,) = asking.predict("reading", EXAMPLES["reading"], request_id="mine")
        assert one["text"] == "Rome."
        assert [task["name"] for task in asking.tasks()][:2] == ["intents", "pairs"]
        with pytest.raises(client.NotFoundError, match="got 'nope'") as caught:
            asking.predict("nope", "a")
        assert (caught.value.status, caught.value.kind) == (404, "unknown-task")
        assert len(caught.value.request_id) == 32
        with pytest.raises(client.BadInputError, match="input 1: expected"):
            asking.predict("reading", "a")


def test_client_tries_again_as_long_as_the_server_says() -> None:
    asking, requests, waits = refusing(
        problem(429, "busy", **{"Retry-After": "2"}),
        problem(503, "not-ready"),
        httpx.ConnectError("refused"),
        httpx.Response(200, json=ANSWER),
    )
    assert asking.predict("intents", "a")[0] == {"label": "book"}
    assert len({request.headers["x-request-id"] for request in requests}) == 1
    assert waits[0] == 2.0
    assert 0.1 <= waits[1] <= 0.2
    assert 0.2 <= waits[2] <= 0.4


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: problem(429, "rate"), client.OverloadedError),
        (lambda: problem(503, "not-ready"), client.UnavailableError),
        (lambda: httpx.ConnectError("refused"), client.UnavailableError),
    ],
)
def test_client_gives_up_after_its_retries(
    make: Callable[[], Any], expected: type[Exception]
) -> None:
    asking, requests, _ = refusing(*(make() for _ in range(3)), retries=2)
    with pytest.raises(expected):
        asking.predict("intents", "a")
    assert len(requests) == 3


def test_client_does_not_wait_beyond_its_time() -> None:
    asking, requests, waits = refusing(problem(429, "busy", **{"Retry-After": "60"}), timeout_s=5)
    with pytest.raises(client.OverloadedError, match="why busy"):
        asking.predict("intents", "a")
    assert (len(requests), waits) == (1, [])


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (problem(401, "unauthorized"), client.NotAllowedError),
        (problem(422, "bad-input"), client.BadInputError),
        (problem(413, "too-large"), client.BadInputError),
        (problem(504, "deadline"), client.DeadlineError),
        (problem(500, "internal"), client.ServerFailedError),
        (httpx.Response(502, text="<html>"), client.ServerFailedError),
        (httpx.ReadTimeout("slow"), client.DeadlineError),
    ],
)
def test_client_errors_that_no_retry_mends(answer: Any, expected: type[Exception]) -> None:
    asking, requests, _ = refusing(answer)
    with pytest.raises(expected):
        asking.predict("intents", "a")
    assert len(requests) == 1


def test_client_sends_token_and_time_that_is_left() -> None:
    asking, requests, _ = refusing(httpx.Response(200, json=ANSWER), token="t" * 16)
    asking.predict("intents", "a", timeout_s=3.0)
    assert requests[0].headers["authorization"] == "Bearer " + "t" * 16
    body = json.loads(requests[0].content)
    assert body["inputs"] == ["a"]
    assert 2.0 < body["timeout_s"] <= 3.0


@pytest.mark.parametrize("task", ["", "a/b", "..", "a?b", "a%2fb"])
def test_client_sends_no_name_that_is_a_path(task: str) -> None:
    asking, requests, _ = refusing()
    with pytest.raises(client.BadInputError, match="expected a task's name"):
        asking.predict(task, "a")
    assert requests == []


def test_async_client_answers() -> None:
    app = make_app(FakeService(), ServeConfig())

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://localhost", transport=transport) as asking:
            found = await asking.predict("scores", ["a fine day", "no"])
            assert ([one["value"] for one in found], found.version) == ([1.0, 0.2], 3)
            assert len(await asking.tasks()) == 6
            with pytest.raises(client.NotFoundError):
                await asking.predict("nope", "a")

    asyncio.run(run())


def test_client_tells_a_fault_of_the_server_from_a_bad_input() -> None:
    app = make_app(FakeService(error=ServingError("its process ended")), ServeConfig())

    async def run() -> None:
        transport = httpx.ASGITransport(app)
        async with AsyncClient("http://localhost", transport=transport) as asking:
            with pytest.raises(client.ServerFailedError) as caught:
                await asking.predict("intents", "a")
        assert (caught.value.status, caught.value.kind) == (500, "internal")

    asyncio.run(run())
