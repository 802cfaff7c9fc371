"""Backbones whose weights are rounded to 8 or 4 bits: by what, what that needs, what it is called.

On a CPU that is our own int8 (`quantized.py`), which answers and has no gradient. On CUDA it is
bitsandbytes, which Transformers calls while it loads; prompts are trained on it as adapters are in
QLoRA: the weights stay rounded, and the gradient passes through them.
"""

import logging
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ptv2_core.config import Precision
from ptv2_core.errors import BackboneError

Rounding = Literal["int8", "bnb-int8", "bnb-nf4"]
# what the extra `quantized` brings; asked for by name, since a CPU needs neither
LIBRARIES = ("bitsandbytes", "accelerate")


def rounding_of(
    precision: Precision, device: torch.device, *, tunable: bool = False
) -> Rounding | None:
    """Return how a precision rounds the weights on a device; None where it does not.

    Args:
        precision: The one that is wished for.
        device: Where the backbone will be.
        tunable: Whether the weights themselves will be trained.

    Raises:
        BackboneError: The device, the method or what is installed does not allow it.
    """
    if precision not in ("int8", "nf4"):
        return None
    if tunable:
        raise BackboneError(
            f"precision: {precision} rounds the weights for good, and fine-tuning trains them; "
            "choose auto, bf16 or fp32"
        )
    if device.type == "cpu" and precision == "int8":
        return "int8"
    if device.type != "cuda":
        other = "int8 (to answer), bf16 or fp32" if device.type == "cpu" else "bf16 or fp32"
        expected = "a CUDA card" if precision == "nf4" else "a CPU or a CUDA card"
        raise BackboneError(
            f"precision: {precision} needs {expected}, got device {device.type}; choose {other}"
        )
    require_libraries(precision)
    return "bnb-nf4" if precision == "nf4" else "bnb-int8"


def require_libraries(precision: Precision) -> None:
    """Refuse a precision on CUDA whose libraries are not installed.

    Raises:
        BackboneError: One of them is missing.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise BackboneError(
            f"precision: {precision} on CUDA needs {' and '.join(LIBRARIES)}, not installed: "
            f"{', '.join(missing)}; run `pip install 'ptv2[quantized]'`"
        )


def require_gradient(rounding: Rounding | None) -> None:
    """Refuse to train on a backbone through which no gradient passes.

    Raises:
        BackboneError: It is in our own int8.
    """
    if rounding == "int8":
        raise BackboneError(
            "backbone.precision: int8 on a CPU has no gradient and is for answering alone "
            "(`ptv2 serve --precision int8`, `ptv2 evaluate --compare int8`); to train, expected "
            "auto, bf16 or fp32, or int8 or nf4 on a CUDA card"
        )


def number_format(rounding: Rounding | None, dtype: torch.dtype) -> str:
    """Name how a backbone computes: `float32`, or `int8+float32` with what rounds the weights.

    Args:
        rounding: Of the weights.
        dtype: Of everything else.
    """
    plain = str(dtype).removeprefix("torch.")
    return plain if rounding is None else f"{rounding}+{plain}"


def loading_arguments(
    rounding: Rounding | None, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the arguments by which Transformers rounds weights while it loads them.

    Args:
        rounding: None and our own ask Transformers for nothing.
        dtype: In which 4 bit weights are multiplied.
        device: Where they are rounded, and stay.
    """
    if rounding is None or rounding == "int8":
        return {}
    # says at each product that it works in fp16 inside
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if rounding == "bnb-int8":
        # with its outliers apart, which are chosen by all states of a batch, a row's answer would
        # depend on the other rows
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_8bit=True, llm_int8_threshold=0.0
        )
    else:
        config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    return {"quantization_config": config, "device_map": {"": device}}


def size_bytes(model: nn.Module) -> int:
    """Return what the weights of a loaded model take, with their scales."""
    total = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        # layers of our own, whose weights are no parameters
        total += getattr(module, "hidden_bytes", 0)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes, 4 bits
        for part in (state, getattr(state, "state2", None)):
            scales = getattr(part, "absmax", None)
            total += 0 if scales is None else scales.nbytes
    for module in model.modules():
        scales = getattr(getattr(module, "state", None), "SCB", None)  # likewise, 8 bits
        total += 0 if scales is None else scales.nbytes
    return total
