"""Load a frozen backbone by name, and say exactly which one it is."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import try_to_load_from_cache  # type: ignore[attr-defined]

from ptv2_core.config import Device, Precision
from ptv2_core.errors import BackboneError
from ptv2_core.model.attention import register_attention
from ptv2_core.model.backbones.base import Backbone, BackboneSpec, PooledReading
from ptv2_core.model.backbones.checking import FAILURES, check, explained, told
from ptv2_core.model.backbones.families import Family, family_of, prompt_shape
from ptv2_core.model.backbones.files import check_files, read_settings
from ptv2_core.model.backbones.language import load_language_model
from ptv2_core.model.backbones.locating import Location, locate
from ptv2_core.model.backbones.packing import can_pack, pack
from ptv2_core.model.backbones.quantized import quantize
from ptv2_core.model.backbones.rounding import Rounding, loading_arguments, rounding_of
from ptv2_core.model.backbones.variants import refuse_variants

# names of sentence-transformers' poolings -> what a head reads
POOLINGS: dict[str, PooledReading] = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
# as its earlier releases wrote them, each with a boolean
OLDER_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


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


def num_cards(device: Device = "auto") -> int:
    """Return how many GPUs there are of the kind that `choose_device` takes; 0: it takes the CPU.

    Raises:
        BackboneError: The named device is not on this machine.
    """
    kind = choose_device(device).type
    if kind == "cuda":
        return torch.cuda.device_count()
    return 0 if kind == "cpu" else 1


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the number format of the frozen weights; `auto` takes bf16 where it is fast.

    Of weights that are rounded further it is that of everything else, as `auto` takes it.
    """
    if precision in ("fp32", "bf16"):
        return torch.bfloat16 if precision == "bf16" else torch.float32
    return torch.bfloat16 if _is_fast_at_bf16(device) else torch.float32


def _is_fast_at_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def precision_reason(precision: Precision, device: torch.device) -> str:
    """Say in one sentence why `choose_precision` chooses what it does."""
    if precision != "auto":
        return "set by backbone.precision"
    if device.type == "cuda":
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        if _is_fast_at_bf16(device):
            return f"auto: this GPU multiplies bf16 in hardware (compute capability {found})"
        return f"auto: bf16 needs compute capability 8.0, this GPU has {found}"
    if device.type == "cpu":
        names = {
            "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
            "AMX": torch.cpu._is_amx_tile_supported(),
        }
        found = ", ".join(name for name, is_there in names.items() if is_there)
        if found:
            return f"auto: this CPU multiplies bf16 in hardware ({found})"
        return "auto: no bf16 instructions on this CPU (AVX512-BF16, AMX)"
    return f"auto: bf16 is not taken on {device.type}"


def load_backbone(
    name: str,
    revision: str | None = None,
    *,
    digest: str | None = None,
    precision: Precision = "auto",
    device: Device = "auto",
    packs: bool = True,
    tunable: bool = False,
    language_model: bool = False,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: As for `locate`.
        revision: As for `locate`.
        digest: Refuse weights with any other digest.
        precision: Number format of the frozen weights. With int8 and nf4 everything but the
            weights of linear layers is in what `auto` gives; see `rounding_of` for where they are
            allowed.
        device: Where to put them.
        packs: Whether linear layers may be packed (bf16 on a CPU): faster, the same products.
        tunable: Whether copies of it will be trained: the weights stay in fp32, and `precision`
            is that of a copy's products.
        language_model: Whether a head will read the mask token.

    Raises:
        BackboneError: It is not there, unsupported, damaged or not the expected one, or deep
            prompts do not work in it under this Transformers.
    """
    location = locate(name, revision)
    config, family = _config(location)
    chosen = choose_device(device)
    rounding = rounding_of(precision, chosen, tunable=tunable)
    found = location.digest()
    if digest is not None and digest != found:
        raise BackboneError(
            f"backbone.digest: expected {digest}, got {found} for {name!r} in {location.folder}; "
            "these are other weights. Restore the expected files, or change backbone.digest and "
            "train again."
        )
    names = _tensor_names(location)
    has_pooler = _has_pooler(family, names)
    products = choose_precision(precision, chosen)
    # our own int8 rounds the weights as they are, not as bf16 rounded them
    dtype = torch.float32 if tunable or rounding == "int8" else products
    model = _load_model(location, family, dtype, has_pooler, rounding, chosen)
    spec = BackboneSpec(
        name=location.name,
        revision=location.revision,
        digest=found,
        model_type=config.model_type,
        shape=prompt_shape(config),
        hidden_size=config.hidden_size,
        num_parameters=model.num_parameters(),
        max_positions=config.max_position_embeddings,
        reads=_default_reading(location, family, names),
        has_pooler=has_pooler,
        is_causal=family.is_causal,
    )
    if rounding == "int8":
        with explained(location.name, config.model_type):
            first = family.first_position_in(config)
            # exactly, as what is rounded to 8 bits cannot be compared
            check(Backbone(model, spec, family.make_layers, first_position=first))
        quantize(model)
        _cast(model, products)
    if not (rounding or "").startswith("bnb"):  # those are there already
        model = model.to(chosen)
    if packs and chosen.type == "cpu" and model.dtype == torch.bfloat16 and can_pack():
        pack(model)
    words = None
    if language_model:
        exact = torch.float32 if tunable else products
        words = load_language_model(location, config, family, exact, chosen)
    with explained(location.name, config.model_type):
        backbone = Backbone(
            model,
            spec,
            family.make_layers,
            first_position=family.first_position_in(config),
            language_model=words,
            product_dtype=products if tunable and products != dtype else None,
            rounding=rounding,
        )
        check(backbone)
    return backbone


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the format of the weights; buffers, such as rotary frequencies, stay exact."""
    for parameter in model.parameters():
        if parameter.is_floating_point():  # others are rounded already
            parameter.data = parameter.data.to(dtype)


def _config(location: Location) -> tuple[Any, Family]:
    file = location.folder / "config.json"
    settings = read_settings(file)
    # before Transformers reads it, which knows nothing of what is supported here
    family = family_of(settings.get("model_type"), name=location.name)
    try:
        config = AutoConfig.from_pretrained(
            location.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of wrong values, each architecture raises what it likes
        raise BackboneError(
            f"backbone.name: {file} could not be read by Transformers {transformers.__version__}: "
            f"{told(error)}. Expected what save_pretrained() writes; get the files again."
        ) from error
    refuse_variants(location.name, settings, config, family)
    return config, family


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


def _has_pooler(family: Family, names: set[str]) -> bool:
    ends = ("pooler.dense.weight", "pooler.weight")
    return family.has_pooler and any(name.endswith(ends) for name in names)


def _default_reading(location: Location, family: Family, names: set[str]) -> PooledReading:
    """Take what a head reads from the backbone's own files.

    A sentence-embedding model says how its states are pooled. A pooler is worth reading where it
    was trained by a head that tells pairs of sentences apart, which the files then hold too.
    Otherwise the first token, or the last one where it alone sees all others.
    """
    pooling = location.folder / "1_Pooling" / "config.json"
    if pooling.is_file():
        return _pooling(location, pooling)
    was_trained = any("seq_relationship" in name or "sop_classifier" in name for name in names)
    return "pooler" if was_trained and _has_pooler(family, names) else family.reads


def _pooling(location: Location, file: Path) -> PooledReading:
    """Return what is nearest to the pooling of a sentence-embedding model.

    Raises:
        BackboneError: Its file is damaged.
    """
    settings = read_settings(file)
    older = [name for key, name in OLDER_POOLINGS.items() if settings.get(key)]
    found = settings.get("pooling_mode", older or "mean")
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise BackboneError(
            f"backbone.name: {file} is damaged: pooling_mode: expected a name or a list of names, "
            f"got {found!r}; get the backbone's files again."
        )
    if len(names) == 1 and names[0] in POOLINGS:
        return POOLINGS[names[0]]
    warnings.warn(
        f"the states of {location.name!r} are pooled by {', '.join(names)}, which no head reads "
        "here; a head for whole texts reads what is nearest, the mean, unless train.head.reads "
        "says otherwise",
        stacklevel=4,
    )
    return "mean"


def _load_model(
    location: Location,
    family: Family,
    dtype: torch.dtype,
    has_pooler: bool,
    rounding: Rounding | None,
    device: torch.device,
) -> Any:
    register_attention()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    extra = loading_arguments(rounding, dtype, device)
    if family.has_pooler:
        extra["add_pooling_layer"] = has_pooler
    try:
        model, info = AutoModel.from_pretrained(
            location.folder,
            attn_implementation=family.attention,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            # they are told below, with both sizes
            ignore_mismatched_sizes=True,
            **extra,
        )
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise BackboneError(
            f"backbone.name: {location.name!r} could not be loaded by Transformers "
            f"{transformers.__version__}: {told(error)}. Expected weights and a config.json of one "
            f"{family.name} model in {location.folder}; get the backbone's files again."
        ) from error
    if info["mismatched_keys"]:
        (tensor, got, wanted), *others = sorted(info["mismatched_keys"])
        more = f" (and {len(others)} more)" if others else ""
        raise BackboneError(
            f"backbone.name: {tensor}: expected {list(wanted)} by its config.json, got {list(got)} "
            f"in the weights of {location.folder}{more}; get the backbone's files again, all of "
            "one model."
        )
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise BackboneError(
            f"backbone.name: the weights in {location.folder} lack {missing}; expected a complete "
            f"{family.name} model."
        )
    # DeBERTa's biases stay in fp32 otherwise, and its own products then mix two formats
    _cast(model, dtype)
    return model


def locate_offline(name: str, revision: str | None = None) -> Location | None:
    """Find a backbone's files as `locate` does, without asking a hub.

    Args:
        name: As for `locate`.
        revision: As for `locate`.

    Returns:
        None for a hub model that is not, or not wholly, on this machine yet.

    Raises:
        BackboneError: As `locate`.
    """
    is_on_hub = revision and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if not is_on_hub or Path(name).is_dir():
        return locate(name, revision)
    # not `cached_file(local_files_only=True)`, which asks the hub for other things all the same
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    location = Location(name=name, revision=revision, folder=Path(config).parent)
    if not all(file.is_file() for file in location.weight_files()):
        return None
    check_files(name, location.folder)
    return location


def default_reading(location: Location) -> PooledReading:
    """Return what a classification head reads, from the backbone's files alone.

    Raises:
        BackboneError: They are damaged, or of a type that takes no deep prompts.
    """
    _, family = _config(location)
    return _default_reading(location, family, _tensor_names(location))
