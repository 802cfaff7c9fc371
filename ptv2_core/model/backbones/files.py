"""Which files of a folder are a backbone, and what is refused of it; loads no torch."""

import json
import re
from pathlib import Path
from typing import Any

from ptv2_core.errors import BackboneError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
# endings of formats that are not loaded; most can run code when they are opened
OTHER_FORMATS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".ot", ".gguf", ".onnx",
)  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that Transformers loads, shards in order.

    One file goes before an index with shards, as in Transformers.

    Raises:
        BackboneError: The index is damaged, or names what is no safetensors file of the folder.
    """
    index = folder / WEIGHTS_INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise BackboneError(
            f"backbone.name: {index} is damaged: expected a weight_map from tensors to files; "
            "get the backbone's files again."
        )
    # anything else may lie outside of the folder, or be a pickle
    foreign = sorted(str(shard) for shard in named.values() if not _is_own(shard))
    if foreign:
        raise BackboneError(
            f"backbone.name: {index} names {foreign[0]!r}; expected names of safetensors files in "
            "its own folder. Get the backbone's files again, from where they can be trusted."
        )
    return [folder / shard for shard in sorted(set(named.values()))]


def check_files(name: str, folder: Path) -> None:
    """Refuse a folder that is no whole backbone, or of which more is loaded than the digest covers.

    Args:
        name: What the user calls it.
        folder: Where it is.

    Raises:
        BackboneError: Files are missing, damaged or of another format, an adapter lies over them,
            or they want code of their own to be run.
    """
    config_file = folder / "config.json"
    if (folder / ADAPTER).is_file():
        raise BackboneError(
            f"backbone.name: {name!r} has an adapter ({ADAPTER}) in {folder}, which Transformers "
            "would lay over the weights; expected a backbone alone. Merge it once (PEFT's "
            "merge_and_unload(), then save_pretrained()), or take the adapter's files out."
        )
    if not config_file.is_file():
        raise _lacks(name, folder, "config.json")
    config = _read_json(config_file)
    if not _is_transformers_own(config):
        refuse_code(name, config_file, config)
    files = weight_files(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _lacks(name, folder, missing[0])
    wanted = config.get("transformers_weights")
    loaded = WEIGHTS_INDEX if files[0].name != WEIGHTS else WEIGHTS
    if wanted is not None and wanted != loaded:
        raise BackboneError(
            f"backbone.name: {config_file} says that the weights are in {wanted!r} "
            f"(transformers_weights); expected {loaded}, which the digest is of. Take the entry "
            "out, or save the model again with save_pretrained()."
        )


def refuse_code(name: str, file: Path, settings: dict[str, Any]) -> None:
    """Refuse settings that name code of the repository's own.

    Args:
        name: What the user calls the backbone.
        file: Where the settings are.
        settings: What it holds.

    Raises:
        BackboneError: There is an `auto_map`.
    """
    if settings.get("auto_map"):
        raise BackboneError(
            f"backbone.name: {name!r} brings code of its own (auto_map in {file}), which is never "
            "run here; expected an architecture and a tokenizer of Transformers. Where the code "
            "has become part of Transformers since, take auto_map out of a local copy of the files."
        )


def _is_transformers_own(config: dict[str, Any]) -> bool:
    """Tell whether the classes of an `auto_map` have become part of Transformers, by their names.

    EuroBERT is published so; without leave to run code, Transformers takes its own. Classes of
    other names may be another model on the same weights, such as a Llama that sees both ways.
    """
    named, model_type = config.get("auto_map"), config.get("model_type")
    if not isinstance(named, dict) or "AutoTokenizer" in named:
        return False
    if not isinstance(model_type, str):
        return False
    # here: it loads torch
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return False
    stem = CONFIG_MAPPING[model_type].__name__.removesuffix("Config")
    own = re.compile(rf"[\w.]+\.{stem}(Config|Model|PreTrainedModel|For[A-Z]\w*)")
    return all(isinstance(one, str) and own.fullmatch(one) for one in named.values())


def read_settings(file: Path) -> dict[str, Any]:
    """Return what a JSON file of settings holds; nothing where it is not there.

    Raises:
        BackboneError: It is damaged.
    """
    return _read_json(file) if file.is_file() else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(
            f"backbone.name: {file} could not be read ({error}); get the backbone's files again."
        ) from error
    if not isinstance(found, dict):
        raise BackboneError(
            f"backbone.name: {file} is damaged: expected an object, got "
            f"{type(found).__name__}; get the backbone's files again."
        )
    return found


def _is_own(shard: Any) -> bool:
    return isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")


def _lacks(name: str, folder: Path, absent: str) -> BackboneError:
    start = f"backbone.name: {name!r} has no {absent} in {folder}; expected config.json, "
    start += f"{WEIGHTS} (or its shards) and tokenizer files."
    if absent == "config.json":
        return BackboneError(f"{start} Name the folder that save_pretrained() wrote.")
    if absent != WEIGHTS:
        return BackboneError(f"{start} {WEIGHTS_INDEX} names it; get the missing shards.")
    # no deeper: a wrong name may be that of a folder with everything in it
    files = [*folder.glob("*"), *folder.glob("*/*")]
    names = sorted(str(file.relative_to(folder)) for file in files if file.is_file())
    tensors = [file for file in names if file.endswith(".safetensors")]
    if tensors:
        return BackboneError(
            f"{start} There is {_some(tensors)}: a variant in another number format, or shards "
            f"without their {WEIGHTS_INDEX}. Get the plain files (backbone.precision rounds them), "
            "or save the model again with save_pretrained()."
        )
    others = [file for file in names if file.endswith(OTHER_FORMATS)]
    there = f" (there is {_some(others)})" if others else ""
    return BackboneError(
        f"{start} Weights in other formats are not loaded{there}, since opening them can run code. "
        "Convert them once on a machine that you trust: "
        f"AutoModel.from_pretrained({name!r}).save_pretrained(FOLDER), and name the folder; or, on "
        "the hub, pin backbone.revision to the commit of the repository's safetensors conversion "
        "(a pull request there, refs/pr/N)."
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
