"""The artifact: `prompt.safetensors` and `prompt.json`, hashed, verified, written atomically.

Letters: L layers, N key/value heads, P prompt length, D head size, H hidden size, C classes.
"""

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ptv2_core.config import HeadConfig, Method, PromptConfig
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.files import replace_directory, sha256_file, write_bytes_atomic, write_json_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.heads import LinearHead, reading_for
from ptv2_core.model.prompted import BACKBONE, PromptedModel
from ptv2_core.model.prompts import EmbeddingPrompt, InputPrompt, NoPrompt, PromptBank

SCHEMA_VERSION = 1
WEIGHTS_FILE = "prompt.safetensors"
MANIFEST_FILE = "prompt.json"
FILES = (WEIGHTS_FILE, MANIFEST_FILE)

_SECTIONS: dict[str, type] = {
    "method": str,
    "task": dict,
    "prompt": dict,
    "head": dict,
    "backbone": dict,
    "tokenizer_digest": str,
    "encoding": dict,
    "decoding": dict,
    "training": dict,
    "provenance": dict,
    "metrics": dict,
    "sha256": str,
    "golden": list,
}

# what an older artifact does not say, since it could only be this
_DEFAULTS: dict[str, Any] = {"method": "ptv2", "decoding": {}}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is trained.

    Attributes:
        prompt: `[layers with a prompt, 2, N, P, D]`, lowest first; `[P, H]` of input prompt
            tuning; None without a prompt.
        head_weight: `[C, H]`.
        head_bias: `[C]`.
        backbone: The weights of a backbone that was fine-tuned, by their names in it; else none.
    """

    prompt: Tensor | None
    head_weight: Tensor
    head_bias: Tensor
    backbone: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PromptedModel, slot: int = 0) -> "Weights":
        """Take a slot's weights, the prompt flattened, and the backbone's where it was tuned."""
        linear = model.heads[slot].linear
        prompt = model.bank.flatten(slot)
        tuned = model.backbone.model.state_dict() if model.backbone.is_tuned else {}
        return cls(
            prompt=prompt if prompt.numel() else None,
            head_weight=_plain(linear.weight),  # type: ignore[union-attr,arg-type]
            head_bias=_plain(linear.bias),  # type: ignore[union-attr,arg-type]
            backbone={name: _plain(tensor) for name, tensor in tuned.items()},
        )

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        prompt = {} if self.prompt is None else {"prompt": self.prompt}
        tuned = {f"{BACKBONE}{name}": tensor for name, tensor in self.backbone.items()}
        return {**prompt, "head.weight": self.head_weight, "head.bias": self.head_bias, **tuned}

    @property
    def num_tuned(self) -> int:
        """Numbers that were trained beside the head."""
        prompt = 0 if self.prompt is None else self.prompt.numel()
        return prompt + sum(tensor.numel() for tensor in self.backbone.values())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `prompt.json` says.

    Attributes:
        schema_version: Of the file.
        method: What was trained beside the head.
        task: The task with its labels.
        prompt: The prompt's settings.
        head: The head's settings; `reads` is resolved.
        backbone: Identity and measures of the backbone it was trained on.
        tokenizer_digest: Of the tokenizer it was trained with.
        encoding: `max_length`, and for windows their `stride`.
        decoding: Settings of an answer that dev chose, such as `null_threshold`.
        training: The settings used, and study and trial where a search chose them.
        provenance: Code, data and versions it came from.
        metrics: Scores on dev.
        sha256: Of `prompt.safetensors`, hexadecimal.
        golden: Inputs with the logits that the trained prompt gives in fp32.
        size_bytes: Of both files.
        raw: The whole of `prompt.json`.
    """

    schema_version: int
    method: Method
    task: TaskSpec
    prompt: PromptConfig
    head: HeadConfig
    backbone: dict[str, Any]
    tokenizer_digest: str
    encoding: dict[str, Any]
    decoding: dict[str, float]
    training: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[str, Any]
    sha256: str
    golden: list[dict[str, Any]]
    size_bytes: int
    raw: dict[str, Any]

    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes that the weights must have, those of a tuned backbone left out."""
        backbone, outputs = self.backbone, self.task.num_outputs
        layers = self.prompt.layer_indices(backbone["num_layers"])
        prompts: dict[Method, list[int]] = {
            "ptv2": [
                len(layers), 2, backbone["num_heads"], self.prompt.length, backbone["head_size"],
            ],
            "prompt_tuning": [self.prompt.length, backbone["hidden_size"]],
        }  # fmt: skip
        prompt = {"prompt": prompts[self.method]} if self.method in prompts else {}
        head = {"head.weight": [outputs, backbone["hidden_size"]], "head.bias": [outputs]}
        return {**prompt, **head}


def save_artifact(
    directory: Path,
    weights: Weights,
    *,
    task: TaskSpec,
    method: Method,
    prompt: PromptConfig,
    head: HeadConfig,
    backbone: Mapping[str, Any],
    tokenizer_digest: str,
    encoding: Mapping[str, Any],
    decoding: Mapping[str, float],
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
        method: Likewise.
        prompt: Likewise.
        head: Likewise, with `reads` resolved.
        backbone: Likewise.
        tokenizer_digest: Likewise.
        encoding: Likewise.
        decoding: Likewise.
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
        "method": method,
        "task": task.to_mapping(),
        "prompt": dict(vars(prompt)),
        "head": dict(vars(head)),
        "backbone": dict(backbone),
        "tokenizer_digest": tokenizer_digest,
        "encoding": dict(encoding),
        "decoding": dict(decoding),
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
    if isinstance(raw, dict):
        raw = {**_DEFAULTS, **raw}
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
    if raw["method"] not in get_args(Method):
        expected = " | ".join(get_args(Method))
        raise ArtifactError(f"{file}: method: expected {expected}, got {raw['method']!r}")
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
            header = json.loads(stream.read(min(size, 1 << 24)))
        except (struct.error, ValueError) as error:
            raise ArtifactError(f"{weights}: not a safetensors file ({error})") from error
    entries = header if isinstance(header, dict) else {}
    is_tuned = manifest.method == "finetune"
    found = {
        n: _entry(e, "shape", weights)
        for n, e in entries.items()
        if n != "__metadata__" and not (is_tuned and n.startswith(BACKBONE))
    }
    expected = manifest.shapes()
    if found != expected:
        raise ArtifactError(f"{weights}: expected tensors {expected}, got {found}")
    if is_tuned and not any(name.startswith(BACKBONE) for name in entries):
        raise ArtifactError(
            f"{weights}: expected the weights of a fine-tuned backbone, got {', '.join(found)}"
        )
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
    tuned = {n.removeprefix(BACKBONE): t for n, t in tensors.items() if n.startswith(BACKBONE)}
    if {n for n in tensors if not n.startswith(BACKBONE)} != set(manifest.shapes()):
        raise ArtifactError(f"{directory / WEIGHTS_FILE}: changed while it was read; try again")
    return Weights(
        prompt=tensors.get("prompt"),
        head_weight=tensors["head.weight"],
        head_bias=tensors["head.bias"],
        backbone=tuned,
    )


def restore_model(
    backbone: Backbone,
    parts: Sequence[tuple[TaskSpec, PromptConfig, HeadConfig, Weights]],
) -> PromptedModel:
    """Put trained prompts and heads on a backbone, slot k for part k.

    Args:
        backbone: The frozen backbone that all of them were trained on. A fine-tuned model, which
            stands alone, gets a copy of it with its own weights.
        parts: Task, prompt and head settings, and weights, of each prompt.

    Raises:
        ArtifactError: Fine-tuned weights are not those of this backbone.
    """
    if any(weights.backbone for *_, weights in parts):
        assert len(parts) == 1, "a fine-tuned model shares its backbone with nobody"
        backbone = _tuned(backbone, parts[0][3].backbone)
    slots = [(_prompt(weights.prompt), prompt) for _, prompt, _, weights in parts]
    heads = []
    for task, _, head_config, weights in parts:
        reads = "cls" if head_config.reads == "auto" else head_config.reads
        head = LinearHead(
            backbone.spec.hidden_size,
            task.num_outputs,
            reads=reading_for(task.form, reads),
            seed=0,
            hides_padding=task.form == "spans",
        )
        head.start_at(weights.head_weight, weights.head_bias)
        heads.append(head)
    model = PromptedModel(backbone, PromptBank(backbone.spec.shape, slots), heads)
    model.eval()
    return model


def _prompt(weight: Tensor | None) -> nn.Module:
    if weight is None:
        return NoPrompt()
    return InputPrompt(weight) if weight.dim() == 2 else EmbeddingPrompt(weight)


def _tuned(backbone: Backbone, weights: Mapping[str, Tensor]) -> Backbone:
    """Return a copy of a backbone with other weights."""
    own = backbone.tunable_copy()
    expected = {name: list(tensor.shape) for name, tensor in own.model.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        wrong = sorted(
            name for name in {*expected, *found} if expected.get(name) != found.get(name)
        )
        raise ArtifactError(
            f"fine-tuned weights: expected those of {backbone.spec.name}; {len(wrong)} differ, "
            f"such as {wrong[0]} (expected {expected.get(wrong[0])}, got {found.get(wrong[0])})"
        )
    own.model.load_state_dict(dict(weights))
    return own
