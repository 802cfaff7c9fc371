"""The server as a process: where it listens, and how it ends."""

import gc
import json
import re
import signal
import socket
import threading
import time

import httpx
import pytest

from ptv2_serving.http.config import ServeConfig
from ptv2_serving.run import ListenError, address_of, listen, spare_what_is_loaded
from tests.serving.http_parts import Running, running

PREDICT = "/v1/tasks/intents/predict"


def ask(server: Running, found: list[int]) -> None:
    found.append(httpx.post(server.base + PREDICT, json={"input": "a"}, timeout=20).status_code)


def test_run_answers_what_it_took_before_it_ends() -> None:
    with running({"delay_s": 1.0}) as server:
        found: list[int] = []
        asking = [threading.Thread(target=ask, args=(server, found)) for _ in range(8)]
        with httpx.Client(base_url=server.base) as kept:
            assert kept.get("/readyz").status_code == 200
            for one in asking:
                one.start()
            time.sleep(0.4)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.25)
            late = kept.post(PREDICT, json={"input": "a"})
            assert late.status_code == 503
            assert late.headers["connection"] == "close"
            with pytest.raises(OSError, match="refused"):
                server.connect()
        assert server.process.wait(timeout=20) == 0
        for one in asking:
            one.join()
        assert found == [200] * 8
        output, log = server.process.communicate()
        assert output == "ended\n"
        assert {json.loads(line)["event"] for line in log.splitlines()} == {"request"}


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_run_ends_at_once_on_a_second_signal(first: int) -> None:
    with running({"delay_s": 30.0}) as server:
        found: list[int] = []

        def broken() -> None:
            with pytest.raises(httpx.TransportError):
                ask(server, found)

        asking = threading.Thread(target=broken)
        asking.start()
        time.sleep(0.4)
        server.process.send_signal(first)
        time.sleep(0.4)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=5) == -signal.SIGTERM
        asking.join()


def test_run_gives_up_on_what_takes_longer_than_its_time() -> None:
    body = b'{"input":"a"}'
    head = f"POST {PREDICT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with (
        running({"delay_s": 60.0}, drain_timeout_s=1.0) as server,
        server.connect() as connection,
    ):
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(timeout=15) == 0


def test_listen_says_what_is_wrong_with_an_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ListenError, match=f"port {port}: Address already in use"):
            listen(ServeConfig(port=port))
    tokens = frozenset({b"x"})
    with pytest.raises(ListenError, match=r"cannot listen on 192\.0\.2\.1"):
        listen(ServeConfig(host="192.0.2.1", port=0, tokens=tokens))


def test_address_of_is_what_a_browser_takes() -> None:
    assert address_of("127.0.0.1", 8000) == "http://127.0.0.1:8000"
    assert address_of("::1", 8000) == "http://[::1]:8000"


def test_run_takes_what_is_loaded_out_of_the_garbage_collectors_sight() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        spare_what_is_loaded()
        assert gc.get_freeze_count() > frozen + 1000
        assert len(gc.get_objects(generation=2)) < 1000
        assert gc.get_threshold()[:2] == before[:2]
        assert gc.get_threshold()[2] > before[2]
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)


def test_run_watches_its_event_loop() -> None:
    with running() as server:
        time.sleep(0.5)
        text = httpx.get(server.base + "/metrics").text
    (count,) = re.findall(r"^ptv2_loop_lag_seconds_count (\S+)$", text, re.MULTILINE)
    assert float(count) >= 2
