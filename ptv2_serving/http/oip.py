"""`/v2`: the Open Inference Protocol, which KServe and Triton clients speak, in its JSON form.

A task is a model, a field of its inputs a tensor of BYTES. Tasks whose inputs are more than texts
take one tensor `json`, an object an element.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version as version_of
from typing import Any

import orjson
from fastapi import Request
from starlette.responses import Response

from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.inputs import LIST_FIELDS, NUMBER_FIELDS, TEXT_KINDS, input_fields
from ptv2_serving.answering import Answer, TaskStatus, UnknownTaskError
from ptv2_serving.http.asking import (
    SOUGHT_AGAIN_S,
    Asking,
    Question,
    answer_headers,
    read_timeout,
)
from ptv2_serving.http.bodies import check_depth
from ptv2_serving.http.exchanges import Exchange
from ptv2_serving.http.operations import readiness, retry_headers
from ptv2_serving.http.problems import ProblemError
from ptv2_serving.http.tasks import json_response

JSON_TENSOR = "json"
KEYS = ("id", "parameters", "inputs", "outputs")
MAX_ID_CHARS = 128
BINARY = (
    "expected tensors as JSON: the binary extension is not supported here; with tritonclient, "
    "pass binary_data=False to set_data_from_numpy and to InferRequestedOutput"
)


class Protocol:
    """The handlers of `/v2`."""

    def __init__(self, asking: Asking) -> None:
        """Answer through `asking`."""
        self._asking = asking

    async def server(self) -> Response:
        """Say who serves."""
        return json_response({"name": "ptv2", "version": version_of("ptv2"), "extensions": []})

    async def live(self) -> Response:
        """Say that the process answers."""
        return json_response({"live": True})

    async def ready(self) -> Response:
        """Say whether requests are answered."""
        is_ready, reason = readiness(self._asking.service, self._asking.traffic)
        if is_ready:
            return json_response({"ready": True})
        body = {"ready": False, "error": reason}
        return json_response(body, status=503, headers=retry_headers())

    async def model(self, model: str) -> Response:
        """Say what a task takes and gives."""
        return json_response(_metadata(self._asking.catalogue.find(model)))

    async def model_version(self, model: str, version: str) -> Response:
        """Say what a version of a task takes and gives."""
        found = self._of_version(model, version)
        return json_response(_metadata(found))

    async def model_ready(self, model: str) -> Response:
        """Say whether a task is answered."""
        found = self._asking.catalogue.find(model)
        return self._is_ready(found)

    async def model_version_ready(self, model: str, version: str) -> Response:
        """Say whether a version of a task is answered."""
        found = self._of_version(model, version)
        return self._is_ready(found)

    async def infer(self, request: Request, model: str) -> Response:
        """Answer the rows of input tensors."""
        return await self._infer(request, model, None)

    async def infer_version(self, request: Request, model: str, version: str) -> Response:
        """Answer the rows of input tensors with a version of a task."""
        return await self._infer(request, model, version)

    def _of_version(self, model: str, version: str) -> TaskStatus:
        found = self._asking.catalogue.find(model, believed_s=SOUGHT_AGAIN_S)
        _loaded(found, version)
        return found

    async def _infer(self, request: Request, model: str, version: str | None) -> Response:
        exchange: Exchange = request.scope["ptv2.exchange"]
        exchange.asks = True
        if version is None:
            found, number = self._asking.catalogue.find(model), None
        else:
            found = self._of_version(model, version)
            number = _loaded(found, version)
        exchange.task = model
        if b"inference-header-content-length" in exchange.headers:
            raise ProblemError("media-type", BINARY, closes=True)
        async with self._asking.room(exchange, request.receive):
            body = await self._asking.read(exchange, request.receive)
            name = _checked(body)
            wanted = _wanted_outputs(body.get("outputs"), found.spec)
            rows = _rows(body.get("inputs"), found.spec, self._asking.config.max_json_depth)
            question = Question(
                inputs=self._asking.inputs(rows, found.spec),
                version=number,
                timeout_s=read_timeout(
                    (body.get("parameters") or {}).get("timeout_s"), self._asking.config
                ),
            )
            answer = await self._asking.answer(found, question, exchange, request.receive)
        content = {
            "model_name": answer.prompt.task,
            "model_version": str(answer.prompt.version),
            "id": exchange.request_id if name is None else name,
            "parameters": {"digest": answer.prompt.digest, "role": answer.role},
            "outputs": _outputs(answer, found.spec, wanted),
        }
        return json_response(content, headers=answer_headers(answer))

    def _is_ready(self, task: TaskStatus) -> Response:
        is_ready, reason = readiness(self._asking.service, self._asking.traffic)
        if is_ready:
            return json_response({"name": task.spec.name, "ready": True})
        body = {"name": task.spec.name, "ready": False, "error": reason}
        return json_response(body, status=503, headers=retry_headers())


def tensor_names(task: TaskSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return which tensors of texts an input consists of, needed and optional.

    Empty where it is more than texts; `json` does for every task.
    """
    if task.kind in TEXT_KINDS:
        return ("text", *(("text_pair",) if "text_pair" in task.fields else ())), ()
    fields = input_fields(task)
    if any(name in LIST_FIELDS | NUMBER_FIELDS for name in fields.needed):
        return (), ()
    return fields.needed, tuple(
        name for name in fields.optional if name not in LIST_FIELDS | NUMBER_FIELDS
    )


def _metadata(task: TaskStatus) -> dict[str, Any]:
    needed, optional = tensor_names(task.spec)
    prompts = (task.champion, task.canary, task.shadow, *task.warm)
    versions = sorted({prompt.version for prompt in prompts if prompt is not None})
    return {
        "name": task.spec.name,
        "versions": [str(version) for version in versions],
        "platform": "ptv2",
        "inputs": [_tensor(name) for name in (*(needed or (JSON_TENSOR,)), *optional)],
        "outputs": [
            {"name": name, "datatype": datatype, "shape": shape}
            for name, datatype, shape in _known_outputs(task.spec)
        ],
    }


def _tensor(name: str) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [-1]}


def _known_outputs(task: TaskSpec) -> list[tuple[str, str, list[int]]]:
    """Return name, datatype and shape of what a task gives, the default ones first."""
    own: list[tuple[str, str, list[int]]] = []
    if task.form == "rows":
        own = [("label", "BYTES", [-1]), ("probabilities", "FP32", [-1, len(task.labels)])]
    elif task.form == "values":
        own = [("value", "FP32", [-1])]
    return [*own, (JSON_TENSOR, "BYTES", [-1])]


def _loaded(task: TaskStatus, version: str) -> int:
    """Return a version's number, if it is loaded."""
    prompts = (task.champion, task.canary, task.shadow, *task.warm)
    known = {str(prompt.version): prompt.version for prompt in prompts if prompt is not None}
    if version not in known:
        raise UnknownTaskError(
            f"expected a version of {task.spec.name} that is loaded ({', '.join(sorted(known))}), "
            f"got {version[:20]!r}"
        )
    return known[version]


def _checked(body: Any) -> str | None:
    """Return the id of a request whose outermost shape is right."""
    if not isinstance(body, dict) or any(key not in KEYS for key in body):
        raise ProblemError("bad-input", f"expected an object with {', '.join(KEYS)} alone")
    name, parameters = body.get("id"), body.get("parameters")
    if name is not None and not (isinstance(name, str) and len(name) <= MAX_ID_CHARS):
        raise ProblemError("bad-input", f"id: expected a text of at most {MAX_ID_CHARS} characters")
    _check_parameters("parameters", parameters)
    return name


def _check_parameters(where: str, parameters: Any) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise ProblemError("bad-input", f"{where}: expected an object")
    if parameters.get("binary_data") or parameters.get("binary_data_output"):
        raise ProblemError("bad-input", f"{where}: {BINARY}")
    if "binary_data_size" in parameters:
        raise ProblemError("bad-input", f"{where}: {BINARY}")


def _wanted_outputs(given: Any, task: TaskSpec) -> list[str]:
    known = [name for name, _, _ in _known_outputs(task)]
    if given is None or given == []:
        return known[:-1] or known
    if not isinstance(given, list):
        raise ProblemError("bad-input", "outputs: expected a list")
    wanted = []
    for place, one in enumerate(given):
        name = one.get("name") if isinstance(one, dict) else None
        if name not in known or name in wanted:
            raise ProblemError(
                "bad-input",
                f"outputs[{place}]: expected an object with a `name` of {', '.join(known)}, each "
                "once",
            )
        _check_parameters(f"outputs[{place}].parameters", one.get("parameters"))
        wanted.append(name)
    return wanted


def _rows(given: Any, task: TaskSpec, max_depth: int) -> list[Any]:
    """Return an input a row of the tensors."""
    needed, optional = tensor_names(task)
    expected = " and ".join(needed) if needed else JSON_TENSOR
    if not isinstance(given, list) or not given:
        raise ProblemError("bad-input", f"inputs: expected a list of tensors: {expected}")
    columns: dict[str, list[str]] = {}
    for place, tensor in enumerate(given):
        name = tensor.get("name") if isinstance(tensor, dict) else None
        if name not in (*needed, *optional, JSON_TENSOR) or name in columns:
            raise ProblemError(
                "bad-input",
                f"inputs[{place}]: expected a tensor named {expected}, or {JSON_TENSOR} alone, "
                f"each once, got {str(name)[:40]!r}",
            )
        columns[name] = _texts(f"inputs[{place}]", tensor)
    if JSON_TENSOR in columns:
        if len(columns) > 1:
            raise ProblemError("bad-input", f"inputs: expected {JSON_TENSOR} alone")
        texts = enumerate(columns[JSON_TENSOR], start=1)
        return [_object(place, text, max_depth) for place, text in texts]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise ProblemError("bad-input", f"inputs: expected a tensor {missing[0]} as well")
    if len({len(texts) for texts in columns.values()}) > 1:
        raise ProblemError("bad-input", "inputs: expected as many rows in each tensor")
    return [dict(zip(columns, texts, strict=True)) for texts in zip(*columns.values(), strict=True)]


def _texts(where: str, tensor: Mapping[str, Any]) -> list[str]:
    """Return the elements of a tensor of shape [n] or [n, 1]."""
    _check_parameters(f"{where}.parameters", tensor.get("parameters"))
    shape, data = tensor.get("shape"), tensor.get("data")
    if tensor.get("datatype") != "BYTES":
        got = str(tensor.get("datatype"))[:20]
        raise ProblemError("bad-input", f"{where}.datatype: expected BYTES, got {got!r}")
    if (
        not isinstance(shape, list)
        or not all(type(size) is int for size in shape)
        or not (len(shape) == 1 or (len(shape) == 2 and shape[1] == 1))
    ):
        raise ProblemError(
            "bad-input", f"{where}.shape: expected [n] or [n, 1], got {str(shape)[:40]}"
        )
    if not isinstance(data, list):
        raise ProblemError("bad-input", f"{where}.data: expected a list of texts")
    flat = [
        item[0] if len(shape) == 2 and isinstance(item, list) and len(item) == 1 else item
        for item in data
    ]
    if len(flat) != shape[0] or not all(isinstance(item, str) for item in flat):
        raise ProblemError("bad-input", f"{where}.data: expected {shape[0]} texts, as its shape")
    return flat


def _object(place: int, text: str, max_depth: int) -> Any:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    check_depth(value, max_depth)
    if not isinstance(value, dict):
        raise ProblemError("bad-input", f"input {place}: expected a JSON object in {JSON_TENSOR}")
    return value


def _outputs(answer: Answer, task: TaskSpec, wanted: Sequence[str]) -> list[dict[str, Any]]:
    found = answer.predictions
    outputs = []
    for name, datatype, shape in _known_outputs(task):
        if name not in wanted:
            continue
        output: dict[str, Any] = {
            "name": name,
            "datatype": datatype,
            "shape": [len(found), *shape[1:]],
        }
        if name == JSON_TENSOR:
            output["data"] = [orjson.dumps(dict(one)).decode() for one in found]
        elif name == "probabilities":
            labels = list(found[0]["probabilities"])
            output["shape"] = [len(found), len(labels)]
            # a tensor has no names for its columns
            output["parameters"] = {"labels": orjson.dumps(labels).decode()}
            output["data"] = [share for one in found for share in one["probabilities"].values()]
        else:
            output["data"] = [one[name] for one in found]
        outputs.append(output)
    return outputs
