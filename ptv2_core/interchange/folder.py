"""A folder as PEFT saves one: `adapter_config.json` and `adapter_model.safetensors`.

Letters: P prompt length, L layers, N heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ptv2_core.bounded import ALL_FLOATS, is_whole, parse_json, read_bounded, read_header
from ptv2_core.errors import ArtifactError
from ptv2_core.files import sha256_file
from ptv2_core.interchange.heads import TaskType
from ptv2_core.manifest import MAX_PROMPT_BYTES

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
README_FILE = "README.md"
FILES = (CONFIG_FILE, WEIGHTS_FILE, README_FILE)
PROMPT = "prompt_embeddings"
# PEFT keeps the model it wraps under this name
MODEL = "base_model."
PEFT_TYPE = "PREFIX_TUNING"

_PICKLED = "adapter_model.bin"
_MAX_CONFIG_BYTES = 2**20
_MOST = {
    "num_virtual_tokens": 4096,
    "num_layers": 1024,
    "num_attention_heads": 1024,
    "token_dim": 65_536,
}


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says, as far as it matters here.

    Attributes:
        task_type: Which model PEFT wraps.
        base_model: Its name or folder; None where it is not said.
        revision: Its commit or branch.
        prompt_length: P.
        num_layers: L.
        num_heads: N.
        width: N times D.
        peft_version: Who wrote it, where it says so.
    """

    task_type: TaskType
    base_model: str | None
    revision: str | None
    prompt_length: int
    num_layers: int
    num_heads: int
    width: int
    peft_version: str | None

    def to_mapping(self, modules_to_save: list[str]) -> dict[str, Any]:
        """Return what PEFT's own file holds, but for the version of PEFT, which was not there."""
        return {
            "auto_mapping": None,
            "base_model_name_or_path": self.base_model,
            "encoder_hidden_size": self.width,
            "inference_mode": True,
            "modules_to_save": modules_to_save or None,
            "num_attention_heads": self.num_heads,
            "num_layers": self.num_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.prompt_length,
            "peft_type": PEFT_TYPE,
            "prefix_projection": False,
            "revision": self.revision,
            "task_type": self.task_type,
            "token_dim": self.width,
        }


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """The tensors of an adapter, in fp32.

    Attributes:
        prompt: `[L, 2, N, P, D]`.
        head: The other tensors, by their names in the model that PEFT wraps.
        sha256: Of the file, hexadecimal.
    """

    prompt: Tensor
    head: Mapping[str, Tensor]
    sha256: str


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`.

    Raises:
        ArtifactError: It is not there, malformed, or of something else than prefix tuning.
    """
    file = folder / CONFIG_FILE
    _check_files(folder)
    values = parse_json(read_bounded(file, _MAX_CONFIG_BYTES), file, most_bytes=_MAX_CONFIG_BYTES)
    if not isinstance(values, dict):
        raise ArtifactError(f"{file}: expected a mapping, got {type(values).__name__}")
    if values.get("peft_type") != PEFT_TYPE:
        raise ArtifactError(
            f"{file}: peft_type: expected {PEFT_TYPE}, the only method of PEFT that puts keys and "
            f"values into every layer, got {values.get('peft_type')!r:.80}"
        )
    if values.get("task_type") not in get_args(TaskType):
        expected = " | ".join(get_args(TaskType))
        raise ArtifactError(
            f"{file}: task_type: expected {expected}, got {values.get('task_type')!r:.80}"
        )
    for key, most in _MOST.items():
        if not is_whole(values.get(key), 1, most):
            raise ArtifactError(
                f"{file}: {key}: expected a whole number from 1 to {most:,}, got "
                f"{values.get(key)!r:.80}"
            )
    if values["token_dim"] % values["num_attention_heads"]:
        raise ArtifactError(
            f"{file}: token_dim: expected a multiple of num_attention_heads "
            f"({values['num_attention_heads']}), got {values['token_dim']}"
        )
    if values.get("num_transformer_submodules") not in (None, 1):
        raise ArtifactError(
            f"{file}: num_transformer_submodules: expected 1, of an encoder, got "
            f"{values['num_transformer_submodules']!r:.80}"
        )
    return AdapterConfig(
        task_type=cast("TaskType", values["task_type"]),
        base_model=_text(values, "base_model_name_or_path", file),
        revision=_text(values, "revision", file),
        prompt_length=values["num_virtual_tokens"],
        num_layers=values["num_layers"],
        num_heads=values["num_attention_heads"],
        width=values["token_dim"],
        peft_version=_text(values, "peft_version", file),
    )


def _check_files(folder: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_file():
            continue
        if name == WEIGHTS_FILE and (folder / _PICKLED).exists():
            raise ArtifactError(
                f"{folder}: holds {_PICKLED}, a pickle, which can run any program when it is "
                f"opened, and is not read; expected {WEIGHTS_FILE}. Where you trust it, load it "
                "with PEFT and save it again: model.save_pretrained(folder)"
            )
        raise ArtifactError(
            f"{folder / name}: not there; expected a folder that PEFT saved, with {CONFIG_FILE} "
            f"and {WEIGHTS_FILE}"
        )


def _text(values: Mapping[str, Any], key: str, file: Path) -> str | None:
    value = values.get(key) or None
    if value is not None and not (isinstance(value, str) and value.isprintable()):
        raise ArtifactError(f"{file}: {key}: expected a line of text or null, got {value!r:.80}")
    return value


def load_weights(folder: Path, config: AdapterConfig) -> AdapterWeights:
    """Load the tensors of a folder whose configuration was checked, fp16 and bf16 as fp32.

    A prompt that was trained through PEFT's projection is stored as what came of it.

    Raises:
        ArtifactError: They are not there, of other shapes, too large, or not finite.
    """
    file = folder / WEIGHTS_FILE
    header = read_header(file, ALL_FLOATS)
    if header.size_bytes > MAX_PROMPT_BYTES:
        raise ArtifactError(
            f"{file}: expected at most {MAX_PROMPT_BYTES:,} bytes, got {header.size_bytes:,}"
        )
    expected = [config.prompt_length, 2 * config.num_layers * config.width]
    if header.shapes.get(PROMPT) != expected:
        raise ArtifactError(
            f"{file}: {PROMPT}: expected {expected}, as {CONFIG_FILE} says, got "
            f"{header.shapes.get(PROMPT)}"
        )
    try:
        tensors = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{file}: not a safetensors file ({error})") from error
    if {name: list(tensor.shape) for name, tensor in tensors.items()} != header.shapes:
        raise ArtifactError(f"{file}: changed while it was read; try again")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"{file}: expected finite numbers, got NaN or infinity in {name!r:.80}; the "
                "training that made this adapter failed"
            )
    flat = tensors.pop(PROMPT)
    size = config.width // config.num_heads
    split = flat.view(config.prompt_length, config.num_layers, 2, config.num_heads, size)
    return AdapterWeights(
        prompt=split.permute(1, 2, 3, 0, 4).contiguous(),  # [P, L, 2, N, D] -> [L, 2, N, P, D]
        head={name.removeprefix(MODEL): tensor for name, tensor in tensors.items()},
        sha256=sha256_file(file),
    )


def weights_bytes(prompt: Tensor, head: Mapping[str, Tensor]) -> bytes:
    """Return the file that PEFT loads, for a prompt `[L, 2, N, P, D]` and a head's tensors."""
    flat = prompt.permute(3, 0, 1, 2, 4).flatten(1)  # [P, L, 2, N, D] -> [P, L * 2 * N * D]
    tensors = {f"{MODEL}{name}": tensor for name, tensor in head.items()}
    return safetensors.torch.save({PROMPT: flat.contiguous(), **tensors}, {"format": "pt"})
