"""Who is let in."""

from pathlib import Path
from typing import Any

import pytest

from ptv2_core.errors import ConfigError
from ptv2_serving.http.auth import OPEN_PATHS, digest_of, read_tokens
from ptv2_serving.http.config import ServeConfig, is_loopback
from tests.serving.http_parts import Asked, problem_of

TOKEN, ADMIN = "a" * 32, "b" * 32
TOKENS = frozenset({digest_of(TOKEN.encode()), digest_of(b"c" * 32)})
ADMINS = frozenset({digest_of(ADMIN.encode())})
PREDICT = "/v1/tasks/intents/predict"
GUARDED = ["/v1/tasks", "/v1/tasks/intents", "/v1/status", "/v2/models/intents"]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture
def asked() -> Asked:
    return Asked(tokens=TOKENS, admin_tokens=ADMINS, host="0.0.0.0")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("x" * 32),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "a"),
        bearer(""),
        bearer(ADMIN),
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": TOKEN},
        {"Authorization": f"Bearer {digest_of(TOKEN.encode()).hex()}"},
    ],
)
def test_auth_refuses_wrong_tokens(asked: Asked, headers: dict[str, str]) -> None:
    for path in GUARDED:
        response = asked.get(path, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == 'Bearer realm="ptv2"'
    response = asked.post(PREDICT, {"input": "a"}, headers=headers)
    assert problem_of(response) == "unauthorized"
    assert asked.service.asked == []


def test_auth_lets_a_token_in(asked: Asked) -> None:
    for path in GUARDED:
        assert asked.get(path, headers=bearer(TOKEN)).status_code == 200
    assert asked.post(PREDICT, {"input": "a"}, headers=bearer("c" * 32)).status_code == 200
    lower = {"authorization": f"bearer {TOKEN}"}
    assert asked.post(PREDICT, {"input": "a"}, headers=lower).status_code == 200


def test_auth_keeps_admin_apart(asked: Asked) -> None:
    for headers in ({}, bearer(TOKEN), bearer("x" * 32)):
        assert asked.post("/v1/admin/reload", headers=headers).status_code == 401
    assert asked.service.reloads == 0
    assert asked.post("/v1/admin/reload", headers=bearer(ADMIN)).status_code == 200


def test_auth_leaves_only_these_addresses_open(asked: Asked) -> None:
    assert {path for path in OPEN_PATHS if asked.get(path).status_code == 200} == OPEN_PATHS
    for route in asked.app.routes:
        path = getattr(route, "path", "")
        if path and path not in OPEN_PATHS:
            filled = path.replace("{task}", "intents").replace("{model}", "intents")
            assert asked.get(filled).status_code == 401, path


def test_auth_does_not_say_whether_an_address_exists(asked: Asked) -> None:
    assert asked.get("/v1/nowhere").status_code == 401


def test_admin_without_a_token_is_for_this_machine() -> None:
    asked = Asked()
    assert asked.post("/v1/admin/reload").status_code == 200
    assert asked.post("/v1/admin/reload", client="192.0.2.7").status_code == 403
    for name in ("X-Forwarded-For", "Forwarded", "Via", "X-Real-IP"):
        response = asked.post("/v1/admin/reload", headers={name: "for=192.0.2.7"})
        assert problem_of(response) == "forbidden"
    assert asked.service.reloads == 1
    open_to_all = Asked(tokens=TOKENS, host="0.0.0.0")
    assert open_to_all.post("/v1/admin/reload", headers=bearer(TOKEN)).status_code == 403


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_host_of_this_machine_is_answered(host: str) -> None:
    assert Asked().get("/v1/tasks", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "10.0.0.1:8000"])
def test_host_of_elsewhere_is_refused_without_tokens(host: str) -> None:
    asked = Asked()
    for path in ("/v1/tasks", "/", "/metrics"):
        assert problem_of(asked.get(path, headers={"Host": host})) == "forbidden"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9"])
def test_pages_of_elsewhere_are_refused(origin: str) -> None:
    asked = Asked()
    for path in (PREDICT, "/v1/admin/reload"):
        response = asked.post(path, {"input": "a"}, headers={"Origin": origin})
        assert problem_of(response) == "forbidden"
    own = asked.post(PREDICT, {"input": "a"}, headers={"Origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200
    assert asked.service.reloads == 0


def test_forms_of_other_pages_are_no_json() -> None:
    response = Asked().post(PREDICT, b'{"input": "a"}', headers={"Content-Type": "text/plain"})
    assert (response.status_code, problem_of(response)) == (415, "media-type")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org", ""])
def test_config_refuses_other_addresses_without_tokens(host: str) -> None:
    with pytest.raises(ConfigError, match="give --token-file, or listen on 127.0.0.1"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, tokens=TOKENS).host == host


def test_config_names_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServeConfig(port=70_000, max_inputs=0, timeout_s=200, body_timeout_s=float("nan"))
    assert [path for path, _ in caught.value.problems] == [
        "max_inputs",
        "body_timeout_s",
        "port",
        "timeout_s",
    ]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("localhost.example", False), ("", False)],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_read_tokens_keeps_digests_alone(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"{TOKEN}\n\n  {'c' * 32}  \r\n")
    assert read_tokens(file) == TOKENS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file has none"),
        (b"\n \n", "the file has none"),
        (b"short\n", ":1: expected a token of 16 to 512"),
        (b"a" * 32 + b"\nwith blank in the middle\n", ":2: expected a token of 16 to 512"),
        (b"\xff" * 32, ":1: expected a token of 16 to 512"),
        (b"a" * ((1 << 20) + 1), "at most 1,048,576 bytes"),
    ],
)
def test_read_tokens_refuses_other_files(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "tokens"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        read_tokens(file)
    assert "blank" not in str(caught.value)


def test_read_tokens_needs_a_file(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="expected a file of tokens"):
            read_tokens(place)


def test_documents_say_that_tokens_are_needed(asked: Asked) -> None:
    def security(found: Asked) -> Any:
        return (
            found.get("/openapi.json")
            .json()["paths"][PREDICT.replace("intents", "{task}")]["post"]
            .get("security")
        )

    assert security(asked) == [{"token": []}]
    assert security(Asked()) is None
