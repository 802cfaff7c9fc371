"""Requests that a machine invents from the OpenAPI document, against the app."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from ptv2_serving.app import ServeConfig, make_app
from tests.serving.service_parts import FakeService

schemathesis = pytest.importorskip("schemathesis", reason="needs schemathesis (extra dev)")

EXAMPLES = 60


class Nowhere:
    """Takes the log."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


APP = make_app(FakeService(), ServeConfig(), log=Nowhere())  # type: ignore[arg-type]
SEEN: set[tuple[str, int]] = set()
KNOWN = {
    "task": ["intents", "slots", "reading", "copa", "nope"],
    "model": ["intents", "slots", "reading", "copa", "nope"],
    "version": ["2", "3", "9", "x"],
}


async def nearby(scope: Any, receive: Any, send: Any) -> None:
    """Answer as to a client on this machine."""
    if scope["type"] == "http":
        scope = {**scope, "client": ("127.0.0.1", 50_000)}
    await APP(scope, receive, send)


# a request that a task of whole texts answers, so that an answer is reached whatever is drawn
ASKED = {
    "/v1/tasks/": {"input": "book a flight"},
    "/v2/models/": {
        "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["book a flight"]}]
    },
}


def document() -> dict[str, Any]:
    """Return the document, with names that are loaded: bodies are not read for others."""
    found = json.loads(json.dumps(APP.openapi()))
    for path, methods in found["paths"].items():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                known = KNOWN[parameter["name"]]
                parameter["schema"] = {"type": "string", "enum": known}
                parameter["examples"] = {name: {"value": name} for name in known}
            for start, body in ASKED.items():
                if path.startswith(start) and "requestBody" in operation:
                    content = operation["requestBody"]["content"]["application/json"]
                    content["examples"] = {"a text": {"value": body}}
    return found


SCHEMA = schemathesis.openapi.from_dict(document())
SCHEMA.app = nearby
OPERATIONS = [(path, method) for path, methods in document()["paths"].items() for method in methods]


def fuzzed(path: str, method: str) -> Callable[[Any], None]:
    """Return the test of one operation.

    One function for all would give every operation the same name in this pytest, and a run in
    several processes would do one of them and leave the others out.
    """

    @pytest.mark.slow
    @SCHEMA.include(path=path, method=method.upper()).parametrize()
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def test(case: Any) -> None:
        from schemathesis.checks import not_a_server_error
        from schemathesis.specs.openapi.checks import (
            content_type_conformance,
            negative_data_rejection,
            response_headers_conformance,
            response_schema_conformance,
            status_code_conformance,
            unsupported_method,
        )

        # which inputs fit depends on the task of the path: good ones may be refused, unchecked here
        response = case.call_and_validate(
            headers={"Host": "localhost"},
            checks=[
                not_a_server_error,
                content_type_conformance,
                negative_data_rejection,
                response_headers_conformance,
                response_schema_conformance,
                status_code_conformance,
                unsupported_method,
            ],
        )
        SEEN.add((case.operation.path, response.status_code))

    return test


for _path, _method in OPERATIONS:
    _words = "_".join(re.findall(r"[a-z0-9]+", _path)) or "root"
    globals()[f"test_fuzz_finds_nothing_in_{_method}_{_words}"] = fuzzed(_path, _method)


@pytest.mark.slow
def test_fuzz_got_as_far_as_answers() -> None:
    if not SEEN:
        pytest.skip("the requests were not made here")
    assert {path for path, _ in SEEN} == {path for path, _ in OPERATIONS}
    for path in ("/v1/tasks/{task}/predict", "/v2/models/{model}/infer"):
        assert {status for found, status in SEEN if found == path} >= {200, 404, 415, 422}, path
