"""The artifact: `prompt.safetensors` and `prompt.json`, hashed, verified, written atomically.

Letters: L layers, N key/value heads, P prompt length, D head size, H hidden size, C classes.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ptv2_core.config import HeadConfig, PromptConfig
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.files import replace_directory, sha256_file, write_bytes_atomic, write_json_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.heads import LinearHead, reading_for
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import EmbeddingPrompt, PromptBank

SCHEMA_VERSION = 1
WEIGHTS_FILE = "prompt.safetensors"
MANIFEST_FILE = "prompt.json"
FILES = (WEIGHTS_FILE, MANIFEST_FILE)

_SECTIONS: dict[str, type] = {
    "task": dict,
    "prompt": dict,
    "head": dict,
    "backbone": dict,
    "tokenizer_digest": str,
    "encoding": dict,
    "training": dict,
    "provenance": dict,
    "metrics": dict,
    "sha256": str,
    "golden": list,
}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is trained.

    Attributes:
        prompt: `[layers with a prompt, 2, N, P, D]`, lowest first.
        head_weight: `[C, H]`.
        head_bias: `[C]`.
    """

    prompt: Tensor
    head_weight: Tensor
    head_bias: Tensor

    @classmethod
    def of(cls, model: PromptedModel, slot: int = 0) -> "Weights":
        """Take a slot's weights, the prompt flattened."""
        linear = model.heads[slot].linear
        return cls(
            prompt=model.bank.flatten(slot),
            head_weight=linear.weight.detach().float().cpu().contiguous(),  # type: ignore[union-attr,operator]
            head_bias=linear.bias.detach().float().cpu().contiguous(),  # type: ignore[union-attr,operator]
        )

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        return {
            "prompt": self.prompt,
            "head.weight": self.head_weight,
            "head.bias": self.head_bias,
        }


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `prompt.json` says.

    Attributes:
        schema_version: Of the file.
        task: The task with its labels.
        prompt: The prompt's settings.
        head: The head's settings; `reads` is resolved.
        backbone: Identity and measures of the backbone it was trained on.
        tokenizer_digest: Of the tokenizer it was trained with.
        encoding: `max_length`.
        training: The settings used, and study and trial where a search chose them.
        provenance: Code, data and versions it came from.
        metrics: Scores on dev.
        sha256: Of `prompt.safetensors`, hexadecimal.
        golden: Inputs with the logits that the trained prompt gives in fp32.
        size_bytes: Of both files.
        raw: The whole of `prompt.json`.
    """

    schema_version: int
    task: TaskSpec
    prompt: PromptConfig
    head: HeadConfig
    backbone: dict[str, Any]
    tokenizer_digest: str
    encoding: dict[str, Any]
    training: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[str, Any]
    sha256: str
    golden: list[dict[str, Any]]
    size_bytes: int
    raw: dict[str, Any]

    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes that the weights must have."""
        backbone, classes = self.backbone, len(self.task.labels)
        layers = self.prompt.layer_indices(backbone["num_layers"])
        prompt = [
            len(layers), 2, backbone["num_heads"], self.prompt.length,
            backbone["head_size"],
        ]  # fmt: skip
        return {
            "prompt": prompt,
            "head.weight": [classes, backbone["hidden_size"]],
            "head.bias": [classes],
        }


def save_artifact(
    directory: Path,
    weights: Weights,
    *,
    task: TaskSpec,
    prompt: PromptConfig,
    head: HeadConfig,
    backbone: Mapping[str, Any],
    tokenizer_digest: str,
    encoding: Mapping[str, Any],
    training: Mapping[str, Any],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    golden: Sequence[Mapping[str, Any]],
) -> Manifest:
    """Write an artifact; the folder appears whole or stays as it was.

    Args:
        directory: Where; replaced if it is there.
        weights: What was trained.
        task: As in the manifest, like all that follows.
        prompt: Likewise.
        head: Likewise, with `reads` resolved.
        backbone: Likewise.
        tokenizer_digest: Likewise.
        encoding: Likewise.
        training: Likewise.
        provenance: Likewise.
        metrics: Likewise.
        golden: Likewise.

    Returns:
        The manifest, read back from what was written.
    """
    data = safetensors.torch.save(weights.named())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "task": task.to_mapping(),
        "prompt": dict(vars(prompt)),
        "head": dict(vars(head)),
        "backbone": dict(backbone),
        "tokenizer_digest": tokenizer_digest,
        "encoding": dict(encoding),
        "training": dict(training),
        "provenance": dict(provenance),
        "metrics": dict(metrics),
        "sha256": hashlib.sha256(data).hexdigest(),
        "golden": [dict(example) for example in golden],
    }
    with replace_directory(directory) as temporary:
        write_bytes_atomic(temporary / WEIGHTS_FILE, data)
        write_json_atomic(temporary / MANIFEST_FILE, manifest)
        load_manifest(temporary)
    return load_manifest(directory)


def load_manifest(directory: Path) -> Manifest:
    """Read and check an artifact without loading its weights.

    Args:
        directory: Holds both files.

    Raises:
        ArtifactError: A file is missing, of another schema, malformed, or the weights are not the
            ones that the manifest names.
    """
    file, weights = directory / MANIFEST_FILE, directory / WEIGHTS_FILE
    for needed in (file, weights):
        if not needed.is_file():
            raise ArtifactError(
                f"{needed}: not there; a prompt is a folder with {' and '.join(FILES)}"
            )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{file}: not valid JSON ({error}); get the prompt again") from error
    _check_sections(raw, file)
    found = sha256_file(weights)
    if found != raw["sha256"]:
        raise ArtifactError(
            f"{weights}: expected sha256 {raw['sha256']}, got {found}; the weights were changed or "
            "damaged. Get the prompt again."
        )
    try:
        task = TaskSpec.from_mapping(raw["task"])
        prompt = PromptConfig.from_mapping(raw["prompt"])
        head = HeadConfig.from_mapping(raw["head"])
        prompt.layer_indices(raw["backbone"]["num_layers"])
    except ConfigError as error:
        raise ArtifactError(f"{file}: {error}") from error
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        task=task,
        prompt=prompt,
        head=head,
        **{name: raw[name] for name in _SECTIONS if name not in ("task", "prompt", "head")},
        size_bytes=file.stat().st_size + weights.stat().st_size,
        raw=raw,
    )
    _check_shapes(manifest, weights)
    return manifest


def _check_sections(raw: Any, file: Path) -> None:
    if not isinstance(raw, dict) or raw.get("schema_version") != SCHEMA_VERSION:
        got = raw.get("schema_version") if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(
            f"{file}: expected schema_version {SCHEMA_VERSION}, got {got!r}; this prompt needs "
            "another version of ptv2"
        )
    for name, kind in _SECTIONS.items():
        if not isinstance(raw.get(name), kind):
            raise ArtifactError(
                f"{file}: {name} must be a {kind.__name__}, got {type(raw.get(name)).__name__}"
            )
    wanted = ("name", "digest", "num_layers", "num_heads", "head_size", "hidden_size")
    absent = [key for key in wanted if key not in raw["backbone"]]
    if absent:
        raise ArtifactError(f"{file}: backbone lacks {', '.join(absent)}")
    sizes = {f"backbone.{key}": raw["backbone"][key] for key in wanted[2:]}
    sizes["encoding.max_length"] = raw["encoding"].get("max_length")
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArtifactError(f"{file}: {key} must be a whole number above 0, got {value!r}")
    for place, example in enumerate(raw["golden"], start=1):
        if not isinstance(example, dict) or not {"input", "logits"} <= example.keys():
            raise ArtifactError(f"{file}: golden input {place} must have an input and its logits")


def _check_shapes(manifest: Manifest, weights: Path) -> None:
    """Compare the tensors in the file's header with the manifest, before anything is allocated."""
    with weights.open("rb") as stream:
        try:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(size, 1 << 20)))
        except (struct.error, ValueError) as error:
            raise ArtifactError(f"{weights}: not a safetensors file ({error})") from error
    entries = header if isinstance(header, dict) else {}
    found = {n: _entry(e, "shape", weights) for n, e in entries.items() if n != "__metadata__"}
    expected = manifest.shapes()
    if found != expected:
        raise ArtifactError(f"{weights}: expected tensors {expected}, got {found}")
    kinds = {_entry(e, "dtype", weights) for n, e in entries.items() if n != "__metadata__"}
    if kinds != {"F32"}:
        raise ArtifactError(f"{weights}: expected F32 tensors, got {', '.join(sorted(kinds))}")


def _entry(entry: Any, key: str, weights: Path) -> Any:
    """Return a part of a tensor's entry in the header."""
    if not isinstance(entry, dict) or key not in entry:
        raise ArtifactError(f"{weights}: not a safetensors file (an entry without {key})")
    return entry[key]


def load_weights(directory: Path, manifest: Manifest) -> Weights:
    """Load the weights of an artifact whose manifest was checked."""
    try:
        tensors = safetensors.torch.load_file(directory / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ArtifactError(
            f"{directory / WEIGHTS_FILE}: not a safetensors file ({error})"
        ) from error
    if set(tensors) != set(manifest.shapes()):
        raise ArtifactError(f"{directory / WEIGHTS_FILE}: changed while it was read; try again")
    return Weights(
        prompt=tensors["prompt"],
        head_weight=tensors["head.weight"],
        head_bias=tensors["head.bias"],
    )


def restore_model(
    backbone: Backbone,
    parts: Sequence[tuple[TaskSpec, PromptConfig, HeadConfig, Weights]],
) -> PromptedModel:
    """Put trained prompts and heads on a backbone, slot k for part k.

    Args:
        backbone: The frozen backbone that all of them were trained on.
        parts: Task, prompt and head settings, and weights, of each prompt.
    """
    slots = [(EmbeddingPrompt(weights.prompt), prompt) for _, prompt, _, weights in parts]
    heads = []
    for task, _, head_config, weights in parts:
        reads = "cls" if head_config.reads == "auto" else head_config.reads
        head = LinearHead(
            backbone.spec.hidden_size,
            len(task.labels),
            reads=reading_for(task.kind, reads),
            seed=0,
        )
        head.linear.load_state_dict({"weight": weights.head_weight, "bias": weights.head_bias})
        heads.append(head)
    model = PromptedModel(backbone, PromptBank(backbone.spec.shape, slots), heads)
    model.eval()
    return model
