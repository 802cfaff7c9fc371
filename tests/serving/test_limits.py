"""How much a request, a client and a connection may take."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from ptv2_serving.http.limits import Rates, client_of
from ptv2_serving.http.problems import ProblemError
from tests.serving.http_parts import BASE, Asked, Running, problem_of, running
from tests.serving.service_parts import FakeService

PREDICT = "/v1/tasks/intents/predict"


def sent_in_parts(asked: Asked, *parts: bytes, delay_s: float = 0.0) -> httpx.Response:
    """Return the answer to a body of unknown length that comes in parts."""

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
            await asyncio.sleep(delay_s)

    return asked.ask("POST", PREDICT, content=body(), headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"input": "a"}}',
        b'{"input": NaN}',
        b'{"input": "a", "timeout_s": Infinity}',
        b'{"input": "a", "timeout_s": -Infinity}',
        b'{"input": "\xff\xfe"}',
        b'{"input": "\xed\xa0\x80"}',
        b'{"input": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        '{"input": "a"}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"input": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"input": {"text": "a", "b": ' + b"[" * 16 + b"]" * 16 + b"}}",
        b"\x80\x04\x95",
    ],
)
def test_bodies_that_are_no_json_are_refused(body: bytes) -> None:
    asked = Asked()
    response = asked.post(PREDICT, body)
    assert (response.status_code, problem_of(response)) == (400, "bad-request")
    assert asked.service.asked == []


def test_bodies_may_repeat_a_key() -> None:
    response = Asked().post(PREDICT, b'{"input": "a", "input": "b c"}')
    assert response.status_code == 200


@pytest.mark.parametrize("kind", ["", "text/plain", "multipart/form-data", "application/jsonx"])
def test_bodies_of_other_types_are_refused(kind: str) -> None:
    response = Asked().post(PREDICT, b'{"input": "a"}', headers={"Content-Type": kind})
    assert (response.status_code, problem_of(response)) == (415, "media-type")
    zipped = {"Content-Encoding": "gzip"}
    assert Asked().post(PREDICT, b'{"input": "a"}', headers=zipped).status_code == 415


def test_bodies_are_bounded_by_what_they_announce_and_by_what_comes() -> None:
    asked = Asked(max_body_bytes=1000)
    just = b'{"input": "' + b"a" * 987 + b'"}'
    assert len(just) == 1000
    assert asked.post(PREDICT, just).status_code == 200
    assert problem_of(asked.post(PREDICT, just + b" ")) == "too-large"
    assert sent_in_parts(asked, just[:500], just[500:]).status_code == 200
    response = sent_in_parts(asked, just, b" ")
    assert (response.status_code, problem_of(response)) == (413, "too-large")
    assert response.headers["connection"] == "close"


def test_bodies_that_come_too_slowly_are_refused() -> None:
    asked = Asked(body_timeout_s=0.1)
    response = sent_in_parts(asked, b'{"input"', b': "a"}', b" ", delay_s=0.5)
    assert (response.status_code, problem_of(response)) == (408, "slow-body")


def test_inputs_are_bounded() -> None:
    asked = Asked(max_inputs=2, max_text_chars=10, max_words=3)
    assert asked.predict("intents", "a" * 10, "b").status_code == 200
    assert problem_of(asked.predict("intents", "a", "b", "c")) == "bad-input"
    response = asked.predict("intents", "a", {"text": "a" * 11})
    assert (response.status_code, problem_of(response)) == (422, "too-long")
    assert "input 2: expected texts of at most 10 characters, got 11" in response.text
    assert asked.predict("slots", {"tokens": ["a"] * 3}).status_code == 200
    assert problem_of(asked.predict("slots", {"tokens": ["a"] * 4})) == "too-long"
    assert problem_of(asked.predict("slots", {"tokens": ["a" * 11]})) == "too-long"


def test_long_texts_are_cut_or_refused_as_set() -> None:
    long = "word " * 200
    assert Asked().predict("intents", "a", long).json()["truncated"] == [False, True]
    response = Asked(refuse_long=True).predict("intents", "a", long)
    assert (response.status_code, problem_of(response)) == (422, "too-long")


def test_concurrent_requests_are_bounded() -> None:
    asked = Asked(FakeService(delay_s=0.3), max_concurrent=3)

    async def run() -> list[int]:
        transport = httpx.ASGITransport(asked.app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            calls = [client.post(PREDICT, json={"input": "a"}) for _ in range(5)]
            return sorted(answer.status_code for answer in await asyncio.gather(*calls))

    assert asyncio.run(run()) == [200, 200, 200, 429, 429]
    assert asked.app.state.traffic.running == 0


def test_concurrent_requests_are_counted_before_their_bodies_are_read() -> None:
    asked = Asked(max_concurrent=1)
    headers = {"Content-Type": "application/json"}

    async def slow() -> AsyncIterator[bytes]:
        yield b'{"input": '
        await asyncio.sleep(0.3)
        yield b'"a"}'

    async def run() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(asked.app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            first = asyncio.create_task(client.post(PREDICT, content=slow(), headers=headers))
            await asyncio.sleep(0.1)
            # no JSON, which nobody finds out
            second = await client.post(PREDICT, content=b"{", headers=headers)
            return second, await first

    refused, answered = asyncio.run(run())
    assert (refused.status_code, problem_of(refused)) == (429, "busy")
    # what it sent was thrown away, so that its connection can be used again
    assert "connection" not in refused.headers
    assert answered.status_code == 200
    assert asked.app.state.traffic.running == 0


def test_rates_give_a_burst_and_then_their_share() -> None:
    now = [100.0]
    rates = Rates(2.0, 3, 10, clock=lambda: now[0])
    for _ in range(3):
        rates.take("a")
    with pytest.raises(ProblemError) as caught:
        rates.take("a")
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
    rates.take("b")
    now[0] += 0.5
    rates.take("a")
    with pytest.raises(ProblemError):
        rates.take("a")
    now[0] += 1000
    for _ in range(3):
        rates.take("a")
    with pytest.raises(ProblemError):
        rates.take("a")


def test_rates_remember_a_bounded_number_of_clients() -> None:
    rates = Rates(1.0, 1, 100)
    for number in range(1000):
        rates.take(f"client {number}")
    assert len(rates) == 100


def test_rates_of_zero_are_no_limit() -> None:
    rates = Rates(0.0, 1, 1)
    for _ in range(100):
        rates.take("a")
    assert len(rates) == 0


def test_rates_take_a_network_of_ipv6_as_one_client() -> None:
    assert client_of("2001:db8::1") == client_of("2001:db8:0:0:ffff::2") == "2001:db8::/64"
    assert client_of("2001:db8:1::1") != client_of("2001:db8::1")
    assert client_of("192.0.2.7") == "192.0.2.7"
    assert client_of("fe80::1%eth0") == "fe80::/64"


def test_rates_are_those_of_a_client() -> None:
    asked = Asked(rate_per_s=0.001, rate_burst=2)
    assert [asked.predict("intents", "a").status_code for _ in range(3)] == [200, 200, 429]
    refused = asked.predict("intents", "a")
    assert problem_of(refused) == "rate"
    assert int(refused.headers["retry-after"]) > 100
    assert asked.predict("intents", "a", client="192.0.2.7").status_code == 200
    assert asked.get("/healthz").status_code == 200


# connections: a whole server in a process of its own


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(
        header_timeout_s=0.5, body_timeout_s=0.5, keep_alive_s=1.0, max_connections=20,
        max_body_bytes=100_000,
    ) as found:  # fmt: skip
        yield found


def exchanged(server: Running, *parts: bytes, delay_s: float = 0.0) -> bytes:
    """Return all that a server says until it closes."""
    with server.connect() as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(delay_s)
        found = b""
        try:
            while part := connection.recv(65_536):
                found += part
        except ConnectionResetError:
            pass
        return found


def request(body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {PREDICT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def test_connection_answers_and_stays(server: Running) -> None:
    body = b'{"input": "a"}'
    one = request(body, f"Content-Length: {len(body)}")
    found = exchanged(server, one, one, delay_s=0.2)
    assert found.count(b"HTTP/1.1 200 OK") == 2


@pytest.mark.parametrize(
    "parts",
    [
        (b"GET / HTTP/1.1\r\n",),
        (b"GET / HTTP/1.1\r\nHost: local",),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 100,),
    ],
)
def test_connection_with_slow_headers_is_closed(server: Running, parts: tuple[bytes, ...]) -> None:
    began = time.monotonic()
    assert exchanged(server, *parts).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 5


def test_connection_that_trickles_headers_is_closed(server: Running) -> None:
    parts = [b"GET / HTTP/1.1\r\nHost: localhost\r\n", *([b"X-A: b\r\n"] * 20)]
    assert b" 408 " in exchanged(server, *parts, delay_s=0.1)[:20]


def test_connection_that_sends_stray_bytes_is_closed(server: Running) -> None:
    body = b'{"input": "a"}'
    one = request(body, f"Content-Length: {len(body)}")
    began = time.monotonic()
    found = exchanged(server, one, *([b"\r\n"] * 20), delay_s=0.1)
    assert found.startswith(b"HTTP/1.1 200 OK")
    assert time.monotonic() - began < 5


def test_connection_may_take_longer_to_answer_than_for_its_headers() -> None:
    with running({"delay_s": 0.8}, header_timeout_s=0.2, keep_alive_s=0.2) as server:
        body = b'{"input": "a"}'
        found = exchanged(server, request(body, f"Content-Length: {len(body)}"))
        assert found.startswith(b"HTTP/1.1 200 OK")


def test_connection_that_says_nothing_is_closed(server: Running) -> None:
    assert exchanged(server) == b""


def test_connection_with_a_slow_body_is_refused(server: Running) -> None:
    found = exchanged(server, request(b'{"in', "Content-Length: 1000"))
    assert found.startswith(b"HTTP/1.1 408 ")
    assert json.loads(found.partition(b"\r\n\r\n")[2])["type"] == "urn:ptv2:problem:slow-body"


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ",
        b"GET /",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-",
    ],
)
def test_connection_with_huge_headers_is_refused(server: Running, head: bytes) -> None:
    found = exchanged(server, head, *([b"a" * 65_536] * 64))
    assert found.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
    many = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 4000 + b"\r\n"
    assert exchanged(server, many).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        request(b"{}", "Content-Length: -2"),
        request(b"{}", "Content-Length: 2", "Content-Length: 3"),
        request(b"{}", "Content-Length: 2", "Transfer-Encoding: chunked"),
        request(b"zz\r\n", "Transfer-Encoding: chunked"),
        b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    ],
)
def test_connection_that_speaks_no_http_is_refused(server: Running, content: bytes) -> None:
    found = exchanged(server, content)
    assert found[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 408"), found
    assert found.count(b"HTTP/1.1 4") == 1


def test_connection_with_a_large_body_hears_why_not(server: Running) -> None:
    chunk = b"4000\r\n" + b"a" * 0x4000 + b"\r\n"
    found = exchanged(server, request(b"", "Transfer-Encoding: chunked"), *([chunk] * 64))
    assert found.startswith(b"HTTP/1.1 413 ")
    announced = request(b"a" * 200_000, "Content-Length: 200000")
    assert exchanged(server, announced).startswith(b"HTTP/1.1 413 ")


def test_connection_that_expects_a_word_first_sends_no_large_body(server: Running) -> None:
    head = request(b"", "Content-Length: 9000000000", "Expect: 100-continue")
    found = exchanged(server, head)
    assert found.startswith(b"HTTP/1.1 413 ")
    assert b"100 Continue" not in found


def test_connections_are_bounded(server: Running) -> None:
    connections = [server.connect() for _ in range(30)]
    try:
        time.sleep(0.2)
        closed = 0
        for connection in connections:
            connection.setblocking(False)
            try:
                closed += connection.recv(1) == b""
            except BlockingIOError:
                pass
            except ConnectionResetError:
                closed += 1
        assert closed == 10
    finally:
        for connection in connections:
            connection.close()
    time.sleep(0.2)
    assert httpx.get(server.base + "/healthz").status_code == 200


def test_connections_of_clients_that_go_cancel_their_calls() -> None:
    with running({"delay_s": 30.0}) as server:
        body = b'{"input": "a"}'
        with server.connect() as connection:
            connection.sendall(request(body, f"Content-Length: {len(body)}"))
            time.sleep(0.3)
            assert running_now(server) == 1
        for _ in range(50):
            if running_now(server) == 0:
                return
            time.sleep(0.1)
        pytest.fail("the call goes on")


def running_now(server: Running) -> float:
    lines: list[Any] = httpx.get(server.base + "/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("ptv2_requests_running ")]
    return float(line.split()[1])
