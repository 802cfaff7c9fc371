"""The artifact: `prompt.safetensors` and `prompt.json`, hashed, verified, written atomically.

Letters: L layers, N key/value heads, P prompt length, D head size, H hidden size, C classes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ptv2_core.config import HeadConfig, Method, PromptConfig
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError
from ptv2_core.files import replace_directory, write_bytes_atomic, write_json_atomic
from ptv2_core.manifest import (
    BACKBONE,
    FILES,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    WEIGHTS_FILE,
    Manifest,
    load_manifest,
)
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.heads import LinearHead, reading_for
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import EmbeddingPrompt, InputPrompt, NoPrompt, PromptBank

__all__ = [
    "FILES",
    "MANIFEST_FILE",
    "SCHEMA_VERSION",
    "WEIGHTS_FILE",
    "Manifest",
    "Weights",
    "load_manifest",
    "load_weights",
    "restore_model",
    "save_artifact",
]


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


def load_weights(directory: Path, manifest: Manifest) -> Weights:
    """Load the weights of an artifact whose manifest was checked.

    Raises:
        ArtifactError: They are no longer those that were checked, or not finite.
    """
    file = directory / WEIGHTS_FILE
    try:
        tensors = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{file}: not a safetensors file ({error})") from error
    tuned = {n.removeprefix(BACKBONE): t for n, t in tensors.items() if n.startswith(BACKBONE)}
    found = {n: list(t.shape) for n, t in tensors.items() if not n.startswith(BACKBONE)}
    if found != manifest.shapes():
        raise ArtifactError(f"{file}: changed while it was read; try again")
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"{file}: expected finite numbers, got NaN or infinity in {name!r}; the training "
                "that made this prompt failed. Train it again."
            )
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
