"""The Open Inference Protocol: its messages as its specification writes them."""

import json
from typing import Any

import pytest

from ptv2_serving.http.oip import tensor_names
from tests.serving.http_parts import Asked
from tests.serving.service_parts import EXAMPLES, SPECS, FakeService, digest, predicted, spec

BY_NAME = {one.name: one for one in SPECS}


@pytest.fixture
def asked() -> Asked:
    return Asked()


def tensor(name: str, *data: Any, **changes: Any) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [len(data)], "data": list(data), **changes}


def infer(asked: Asked, model: str, *inputs: Any, **rest: Any) -> Any:
    return asked.post(f"/v2/models/{model}/infer", {"inputs": list(inputs), **rest})


def test_oip_says_who_serves(asked: Asked) -> None:
    server = asked.get("/v2").json()
    assert (server["name"], server["extensions"]) == ("ptv2", [])
    assert asked.get("/v2/health/live").json() == {"live": True}
    assert asked.get("/v2/health/ready").json() == {"ready": True}
    assert asked.get("/v2/models/intents/ready").json() == {"name": "intents", "ready": True}


def test_oip_says_that_it_is_not_ready() -> None:
    asked = Asked(FakeService(ready=False))
    for path in ("/v2/health/ready", "/v2/models/intents/ready"):
        response = asked.get(path)
        assert response.status_code == 503
        assert response.json()["ready"] is False
        assert response.json()["error"] == "loading the backbone"
    assert asked.get("/v2/health/live").status_code == 200


def test_oip_metadata_names_tensors(asked: Asked) -> None:
    assert asked.get("/v2/models/intents").json() == {
        "name": "intents",
        "versions": ["2", "3"],
        "platform": "ptv2",
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [-1]}],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
            {"name": "json", "datatype": "BYTES", "shape": [-1]},
        ],
    }
    assert asked.get("/v2/models/intents/versions/2").status_code == 200
    assert asked.get("/v2/models/intents/versions/2/ready").status_code == 200


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("intents", (("text",), ())),
        ("pairs", (("text", "text_pair"), ())),
        ("slots", (("text",), ())),
        ("reading", (("question", "context"), ())),
        ("copa", ((), ())),
        ("scores", (("text",), ())),
    ],
)
def test_tensor_names_are_the_fields_that_are_texts(name: str, expected: Any) -> None:
    assert tensor_names(BY_NAME[name]) == expected


def test_tensor_names_of_words_in_context_leave_numbers_out() -> None:
    assert tensor_names(spec("wic", "word_in_context")) == (
        ("sentence1", "sentence2", "word"),
        (),
    )
    assert tensor_names(spec("srl", "srl")) == ((), ())


def test_oip_infers_labels_with_probabilities(asked: Asked) -> None:
    texts = ["book a table", "cancel"]
    body = infer(asked, "intents", tensor("text", *texts), id="mine").json()
    expected = [predicted(BY_NAME["intents"], {"text": text}) for text in texts]
    assert body == {
        "model_name": "intents",
        "model_version": "3",
        "id": "mine",
        "parameters": {"digest": digest("intents:3"), "role": "champion"},
        "outputs": [
            {
                "name": "label",
                "datatype": "BYTES",
                "shape": [2],
                "data": [one["label"] for one in expected],
            },
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [2, 3],
                "parameters": {"labels": '["book","cancel","play"]'},
                "data": [share for one in expected for share in one["probabilities"].values()],
            },
        ],
    }


def test_oip_infers_with_a_version(asked: Asked) -> None:
    body = {"inputs": [tensor("text", "a")], "parameters": {"timeout_s": 2}}
    response = asked.post("/v2/models/intents/versions/2/infer", body)
    assert response.json()["model_version"] == response.headers["x-ptv2-version"] == "2"
    assert asked.service.asked[0]["version"] == 2
    assert asked.service.asked[0]["timeout_s"] == 2.0


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_oip_takes_and_gives_json_for_every_task(asked: Asked, name: str) -> None:
    example = EXAMPLES[name]
    given = tensor("json", json.dumps(example))
    (output,) = infer(asked, name, given, outputs=[{"name": "json"}]).json()["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("json", "BYTES", [1])
    assert [json.loads(one) for one in output["data"]] == [predicted(BY_NAME[name], example)]


def test_oip_takes_a_tensor_a_field_in_either_shape(asked: Asked) -> None:
    question = tensor("question", "Where?", "Who?", shape=[2, 1])
    context = tensor("context", ["In Rome."], ["By Anna."], shape=[2, 1])
    body = infer(asked, "reading", question, context).json()
    found = [json.loads(one)["text"] for one in body["outputs"][0]["data"]]
    assert found == ["Rome.", "Anna."]
    assert infer(asked, "scores", tensor("text", "a fine day")).json()["outputs"] == [
        {"name": "value", "datatype": "FP32", "shape": [1], "data": [1.0]}
    ]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ([], "expected an object with id"),
        ({}, "inputs: expected a list of tensors: text"),
        ({"inputs": []}, "inputs: expected a list of tensors: text"),
        ({"inputs": [7]}, "inputs[0]: expected a tensor named text"),
        ({"inputs": [tensor("txt", "a")]}, "got 'txt'"),
        ({"inputs": [tensor("text", "a")] * 2}, "inputs[1]: expected a tensor named text"),
        ({"inputs": [tensor("text", "a"), tensor("json", "{}")]}, "expected json alone"),
        ({"inputs": [tensor("text", "a", datatype="FP32")]}, "datatype: expected BYTES"),
        ({"inputs": [tensor("text", "a", shape=[2])]}, "expected 2 texts"),
        ({"inputs": [tensor("text", "a", shape=[1, 2])]}, "shape: expected [n] or [n, 1]"),
        ({"inputs": [tensor("text", "a", shape=[10**18])]}, "data: expected 1000000000000000000"),
        ({"inputs": [tensor("text", 7)]}, "expected 1 texts"),
        ({"inputs": [tensor("json", "[]")]}, "input 1: expected a JSON object"),
        ({"inputs": [tensor("json", "{")]}, "input 1: expected a JSON object"),
        ({"inputs": [tensor("json", '{"txt": 1}')]}, "input 1: expected a `text`"),
        ({"inputs": [tensor("text", "a")], "id": 7}, "id: expected a text"),
        ({"inputs": [tensor("text", "a")], "outputs": [{"name": "logits"}]}, "outputs[0]"),
        ({"inputs": [tensor("text", "a")], "parameters": 7}, "parameters: expected an object"),
        ({"inputs": [tensor("text", "a")], "parameters": {"timeout_s": 0}}, "timeout_s"),
    ],
)
def test_oip_says_what_is_wrong(asked: Asked, body: Any, expected: str) -> None:
    response = asked.post("/v2/models/intents/infer", body)
    assert response.status_code == 422
    assert set(response.json()) == {"error"}
    assert expected in response.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [tensor("text", parameters={"binary_data_size": 9})]},
        {"inputs": [tensor("text", "a")], "outputs": [
            {"name": "label", "parameters": {"binary_data": True}}]},
        {"inputs": [tensor("text", "a")], "parameters": {"binary_data_output": True}},
    ],
)  # fmt: skip
def test_oip_refuses_binary_tensors_and_says_what_to_do(asked: Asked, body: Any) -> None:
    response = asked.post("/v2/models/intents/infer", body)
    assert response.status_code == 422
    assert "binary_data=False" in response.json()["error"]


def test_oip_refuses_a_binary_body(asked: Asked) -> None:
    headers = {"Inference-Header-Content-Length": "2"}
    response = asked.post("/v2/models/intents/infer", b"{}\x00", headers=headers)
    assert response.status_code == 415
    assert "binary_data=False" in response.json()["error"]


def test_oip_refuses_deep_json_inside_a_tensor(asked: Asked) -> None:
    deep = '{"a":' * 500 + "1" + "}" * 500
    response = infer(asked, "intents", tensor("json", deep))
    assert (response.status_code, set(response.json())) == (400, {"error"})


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/nope",
        "/v2/models/nope/ready",
        "/v2/models/intents/versions/9",
        "/v2/models/intents/versions/9/ready",
        "/v2/models/intents/versions/x",
        "/v2/models/intents/versions/03",
        "/v2/nowhere",
    ],
)
def test_oip_errors_are_those_of_the_protocol(asked: Asked, path: str) -> None:
    response = asked.get(path)
    assert response.status_code == 404
    assert set(response.json()) == {"error"}
