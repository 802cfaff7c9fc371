"""Our linear heads as the layers of Transformers' models for a task, and back.

Letters: C classes, H hidden size.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ptv2_core.data.tasks import Form
from ptv2_core.errors import ArtifactError
from ptv2_core.model.backbones.task_models import TASK_MODELS, FirstToken, LastToken

TaskType = Literal["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]
Reads = Literal["cls", "pooler", "mean", "last", "mask"]
Tensors = Mapping[str, Tensor]
Pooler = tuple[Tensor, Tensor]

TASK_TYPES: Mapping[Form, TaskType] = {
    "rows": "SEQ_CLS",
    "values": "SEQ_CLS",
    "tokens": "TOKEN_CLS",
    "spans": "QUESTION_ANS",
}

# Times a state this is so small that tanh(x) = x and GELU(x) = x / 2 to the last bit of fp32; a
# power of two, so that multiplying and dividing by it rounds nothing.
SMALL = 2.0**-30
_WITHOUT_HEAD = "--without-head takes the prompt alone"


def to_peft(
    weight: Tensor,
    bias: Tensor,
    *,
    form: Form,
    reads: str,
    model_type: str,
    pooler: Pooler | None,
) -> dict[str, Tensor]:
    """Return a head as tensors of a model for a task, by their names in that model.

    Args:
        weight: `[C, H]`.
        bias: `[C]`.
        form: Of the task.
        reads: What the head reads, of a text.
        model_type: Of the backbone.
        pooler: The backbone's own, where it has one.

    Raises:
        ArtifactError: No model that PEFT can wrap reads this.
    """
    if form not in TASK_TYPES:
        raise ArtifactError(
            "PEFT has no prefix tuning for tasks that choose one of several options; expected a "
            f"task of texts, words or questions; {_WITHOUT_HEAD}"
        )
    task_type = TASK_TYPES[form]
    if task_type != "SEQ_CLS":
        return _named(_token_layer(task_type, model_type), weight, bias)
    classifier = TASK_MODELS[model_type].rows
    if isinstance(classifier, LastToken):
        if reads != "last":
            raise _reads_other(reads, model_type, place="last", setting="last")
        return {f"{classifier.layer}.weight": _with_column(weight, bias)}
    if reads == "cls":
        # through a layer and an activation that change nothing but the size
        states = torch.eye(weight.shape[1]) * SMALL
        passed = _named(classifier.dense, states, torch.zeros(weight.shape[1]))
        return {**passed, **_named(classifier.last, weight / (SMALL * classifier.slope), bias)}
    if reads == "pooler" and pooler is not None and classifier.is_tanh:
        before = {} if classifier.has_pooler else _named(classifier.dense, *pooler)
        return {**before, **_named(classifier.last, weight, bias)}
    raise _reads_other(reads, model_type, place="first", setting="cls")


def is_scaled(tensors: Tensors, model_type: str) -> bool:
    """Tell whether `to_peft` scaled a head down, which fp16 has no numbers for."""
    rows = TASK_MODELS[model_type].rows
    weight = tensors.get(f"{rows.dense}.weight") if isinstance(rows, FirstToken) else None
    return weight is not None and _is_small(weight)


def layer_with_column(tensors: Tensors, model_type: str, hidden_size: int) -> str | None:
    """Return the name of the layer to which `to_peft` gave its bias as a column; None: none."""
    rows = TASK_MODELS[model_type].rows
    weight = tensors.get(f"{rows.layer}.weight") if isinstance(rows, LastToken) else None
    has_column = weight is not None and weight.shape[1] == hidden_size + 1
    return rows.layer if isinstance(rows, LastToken) and has_column else None


def modules_to_save(tensors: Tensors) -> list[str]:
    """Return PEFT's names of the modules that hold a head's tensors."""
    found = {"pooler" if ".pooler." in name else name.split(".")[0] for name in tensors}
    return sorted(found)


def from_peft(
    tensors: Tensors,
    *,
    task_type: TaskType,
    model_type: str,
    num_outputs: int,
    hidden_size: int,
    pooler: Pooler | None,
) -> tuple[Reads | None, Tensor, Tensor]:
    """Return what a head reads of a text (None: each token), weight `[C, H]` and bias `[C]`.

    Args:
        tensors: All of the adapter's but the prompt, by their names in the model for the task.
        task_type: The adapter's.
        model_type: Of the backbone.
        num_outputs: C.
        hidden_size: H.
        pooler: The backbone's own, where it has one.

    Raises:
        ArtifactError: They are not the layers of that model, or no linear head can say them.
    """
    classifier = TASK_MODELS[model_type].rows
    if task_type != "SEQ_CLS":
        layer = _token_layer(task_type, model_type)
        _check_shapes(tensors, _shapes(layer, num_outputs, hidden_size))
        return None, tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]
    if isinstance(classifier, LastToken):
        name = f"{classifier.layer}.weight"
        has_column = layer_with_column(tensors, model_type, hidden_size) is not None
        _check_shapes(tensors, {name: [num_outputs, hidden_size + has_column]})
        weight = tensors[name][:, :hidden_size]
        bias = tensors[name][:, hidden_size] if has_column else torch.zeros(num_outputs)
        return "last", weight, bias
    shapes = _shapes(classifier.last, num_outputs, hidden_size)
    has_dense = f"{classifier.dense}.weight" in tensors or not classifier.has_pooler
    if has_dense:
        shapes |= _shapes(classifier.dense, hidden_size, hidden_size)
    _check_shapes(tensors, shapes)
    weight, bias = (tensors[f"{classifier.last}.{part}"] for part in ("weight", "bias"))
    if has_dense:
        return _through_dense(tensors, classifier, pooler)
    if pooler is None:
        raise ArtifactError(
            "the classifier reads the pooler, but the backbone's files hold none and neither does "
            "the adapter: PEFT answered with a random one, which is lost. Train again with "
            f"modules_to_save=['pooler', 'classifier']. {_WITHOUT_HEAD}"
        )
    return "pooler", weight, bias


def _through_dense(
    tensors: Tensors, classifier: FirstToken, pooler: Pooler | None
) -> tuple[Reads, Tensor, Tensor]:
    """Return a classifier of two layers as one, where the first is one of two that are known."""
    first, first_bias = (tensors[f"{classifier.dense}.{part}"] for part in ("weight", "bias"))
    weight, bias = (tensors[f"{classifier.last}.{part}"] for part in ("weight", "bias"))
    if _is_small(first) and not first_bias.any():
        return "cls", weight * (SMALL * classifier.slope), bias
    is_poolers = pooler is not None and classifier.is_tanh
    if is_poolers and all(map(torch.equal, (first, first_bias), pooler or ())):
        return "pooler", weight, bias
    raise ArtifactError(
        f"the head has two trained layers, {classifier.dense} and {classifier.last}, and a head "
        f"here has one: the same answers cannot be had. {_WITHOUT_HEAD}, to train a head on it "
        "(train.init_from)"
    )


def _is_small(weight: Tensor) -> bool:
    """Tell whether a first layer only makes states small, as `to_peft` writes it."""
    return torch.equal(weight, torch.eye(len(weight)) * SMALL)


def _token_layer(task_type: TaskType, model_type: str) -> str:
    """Return the name of the layer that answers each token."""
    models = TASK_MODELS[model_type]
    layer = models.tokens if task_type == "TOKEN_CLS" else models.spans
    if layer is None:
        what = "token classification" if task_type == "TOKEN_CLS" else "question answering"
        raise ArtifactError(
            f"Transformers has no {model_type} model for {what}, which PEFT could wrap; "
            f"{_WITHOUT_HEAD}"
        )
    return layer


def _reads_other(reads: str, model_type: str, *, place: str, setting: str) -> ArtifactError:
    """Return the error of a head on what no model for sequence classification reads."""
    what = {
        "cls": "the first token",
        "last": "the last token",
        "mean": "the mean over all tokens",
        "mask": "the mask token through the language model",
        "pooler": "a pooler",
    }[reads]
    return ArtifactError(
        f"the head reads {what}, but Transformers' {model_type} model for sequence classification "
        f"reads the {place} token alone, so PEFT cannot say it; train with train.head.reads: "
        f"{setting}, or {_WITHOUT_HEAD}"
    )


def _with_column(weight: Tensor, bias: Tensor) -> Tensor:
    """Return weight `[C, H]`, or `[C, H + 1]` with a bias, for which the layer has no place.

    PEFT refuses a weight of another shape, but takes a bias without a place and drops it.
    """
    return torch.cat([weight, bias[:, None]], dim=1) if bias.any() else weight.contiguous()


def _shapes(layer: str, num_outputs: int, num_inputs: int) -> dict[str, list[int]]:
    return {f"{layer}.weight": [num_outputs, num_inputs], f"{layer}.bias": [num_outputs]}


def _check_shapes(tensors: Tensors, shapes: Mapping[str, list[int]]) -> None:
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ArtifactError(
            f"expected the head {_listed(shapes)}, got {_listed(found)}; the task's labels must be "
            "as many as the head has, and other trained modules have no place beside a frozen "
            f"backbone. {_WITHOUT_HEAD}"
        )


def _listed(shapes: Mapping[str, list[int]]) -> str:
    """Return names and shapes as a line, the first of very many."""
    shown = ", ".join(f"{name} {shapes[name]}" for name in sorted(shapes)[:8])
    return f"{shown}, ..." if len(shapes) > 8 else shown or "none"


def _named(layer: str, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    return {f"{layer}.weight": weight.contiguous(), f"{layer}.bias": bias.contiguous()}
