"""What `/openapi.json` says of bodies; the handlers read and write them without these."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ptv2_serving.http.config import ServeConfig
from ptv2_serving.http.problems import KINDS, PROBLEM_TYPE


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str = Field(pattern="^urn:ptv2:problem:[a-z-]+$")
    title: str
    status: int
    detail: str
    request_id: str


class ProtocolError(BaseModel):
    """An error under /v2."""

    error: str


class Prompt(BaseModel):
    """Exactly which prompt."""

    version: int
    digest: str


class Inputs(BaseModel):
    """The fields of a task's inputs."""

    needed: list[str]
    optional: list[str]
    text: bool = Field(description="Whether a text will do in place of an object.")


class Task(BaseModel):
    """What is loaded for a task."""

    name: str
    kind: str
    form: str
    labels: list[str]
    metric: str
    inputs: Inputs
    example: dict[str, Any]
    max_length: int
    champion: Prompt
    canary: Prompt | None
    canary_share: float
    shadow: Prompt | None
    warm: list[Prompt]
    problem: str | None


class TaskList(BaseModel):
    """The tasks that are loaded."""

    tasks: list[Task]


class Prediction(BaseModel):
    """The answers to a request."""

    task: str
    version: int
    digest: str
    role: Literal["champion", "canary", "shadow"]
    request_id: str
    predictions: list[dict[str, Any]] = Field(
        description="One an input: label and probabilities; value; choice, text, options and "
        "probabilities; tokens, tags and spans (type, text, words from start to end, characters "
        "from start_char to end_char); text, start, end, score and n_best."
    )
    truncated: list[bool]


class Status(BaseModel):
    """How the server stands."""

    model_config = ConfigDict(extra="allow")

    ready: bool
    reason: str


class Changes(BaseModel):
    """What a look at the registry changed."""

    changes: list[str]


class Live(BaseModel):
    """The process answers."""

    live: bool


class Ready(BaseModel):
    """Whether requests are answered."""

    ready: bool
    reason: str | None = None
    error: str | None = None


class Server(BaseModel):
    """Who serves."""

    name: str
    version: str
    extensions: list[str]


class TensorMetadata(BaseModel):
    """What a tensor holds."""

    name: str
    datatype: str
    shape: list[int]


class Model(BaseModel):
    """What a task takes and gives, as tensors."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(BaseModel):
    """Whether a task is answered."""

    name: str
    ready: bool
    error: str | None = None


class Tensor(TensorMetadata):
    """A tensor of an answer."""

    data: list[str | float]
    parameters: dict[str, str] | None = None


class Inference(BaseModel):
    """The answers to a request, as tensors."""

    model_name: str
    model_version: str
    id: str
    parameters: dict[str, str]
    outputs: list[Tensor]


REFUSALS = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503, 504)
"""What a request for predictions may meet."""

GUARDED = (401, 403, 404, 429, 500, 503)
"""What any other request with a token may meet."""


def refusals(statuses: tuple[int, ...], *, protocol: bool = False) -> dict[int | str, Any]:
    """Return how errors are described."""
    titles: dict[int, list[str]] = {}
    for status, title in KINDS.values():
        titles.setdefault(status, []).append(title)
    schema = "ProtocolError" if protocol else "Problem"
    media_type = "application/json" if protocol else PROBLEM_TYPE
    content = {media_type: {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {
        status: {"description": "; ".join(titles[status]), "content": content}
        for status in statuses
    }


ANSWER_HEADERS: Mapping[str, Any] = {
    "X-Request-Id": {"schema": {"type": "string"}, "required": True},
    "X-Ptv2-Version": {"schema": {"type": "integer"}, "required": True},
    "X-Ptv2-Digest": {"schema": {"type": "string"}, "required": True},
    "Server-Timing": {"schema": {"type": "string"}, "required": True},
}


def predict_body(config: ServeConfig) -> dict[str, Any]:
    """Return how the body of a request for predictions is described."""
    one = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "object"}]}
    common = {
        "version": {"type": ["integer", "null"], "minimum": 1, "maximum": 999_999_999},
        "timeout_s": {
            "type": ["number", "null"], "exclusiveMinimum": 0, "maximum": config.max_timeout_s,
        },
    }  # fmt: skip
    many = {"type": "array", "items": one, "minItems": 1, "maxItems": config.max_inputs}
    return _json_body(
        {
            "oneOf": [
                _closed({"inputs": many, **common}, ["inputs"]),
                _closed({"input": one, **common}, ["input"]),
            ],
        },
        {"inputs": ["book a table in rome"], "timeout_s": 2.0},
    )


def infer_body() -> dict[str, Any]:
    """Return how the body of an inference request is described."""
    parameters = {"type": ["object", "null"]}
    tensor = _closed(
        {
            "name": {"type": "string"},
            "datatype": {"const": "BYTES"},
            "shape": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
            "parameters": parameters,
            "data": {"type": "array", "items": {}},
        },
        ["name", "datatype", "shape", "data"],
    )
    tensor["additionalProperties"] = True
    output = {
        "type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],
    }  # fmt: skip
    properties = {
        "id": {"type": ["string", "null"], "maxLength": 128},
        "parameters": parameters,
        "inputs": {"type": "array", "items": tensor, "minItems": 1},
        "outputs": {"type": ["array", "null"], "items": output},
    }
    text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["book a table in rome"]}
    return _json_body(_closed(properties, ["inputs"]), {"inputs": [text]})


def _closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _json_body(schema: dict[str, Any], example: Any) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
