"""A prompt as a folder that PEFT loads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptv2_core.artifact import Weights, load_weights
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import (
    replace_directory,
    write_bytes_atomic,
    write_json_atomic,
    write_text_atomic,
)
from ptv2_core.interchange import folder, heads, limits
from ptv2_core.interchange.readme import readme
from ptv2_core.interchange.rows import row_changes
from ptv2_core.manifest import Manifest, load_manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.task_models import TASK_MODELS, padding_id, pooler_of, states_width
from ptv2_core.model.backbones.tokenizing import Change
from ptv2_core.model.heads import Reading, reading_for


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        directory: Where.
        task_type: PEFT's.
        size_bytes: Of the weights.
        notes: What the one who loads it must know, a sentence each.
    """

    directory: Path
    task_type: str
    size_bytes: int
    notes: tuple[str, ...]


def export_peft(
    source: Path,
    directory: Path,
    *,
    backbone_name: str | None = None,
    base_model: str | None = None,
    with_head: bool = True,
) -> Exported:
    """Write a prompt as a folder that `PeftModel.from_pretrained` loads.

    The prompt is first checked on its backbone, golden inputs included.

    Args:
        source: A prompt's folder.
        directory: Where; an earlier export is replaced.
        backbone_name: Where the backbone is, if not where it was in training.
        base_model: What PEFT shall call the backbone; None: as in the prompt.
        with_head: Whether the head goes along; else PEFT gives hidden states, not answers.

    Raises:
        ArtifactError: The prompt is damaged, or PEFT cannot say the same.
        BackboneError: The backbone is not there or is another one.
    """
    manifest = load_manifest(source)
    check_target(directory, folder.FILES, folder.CONFIG_FILE)
    _check_prompt(manifest, source)
    predictor = Predictor.load(source, backbone_name=backbone_name, device="cpu", precision="fp32")
    backbone = predictor.model.backbone
    spec = backbone.spec
    if spec.model_type not in TASK_MODELS:
        raise ArtifactError(
            f"{source}: expected a backbone of type {', '.join(TASK_MODELS)}, whose answers were "
            f"compared with PEFT's, got {spec.model_type}"
        )
    predictor.verify_golden()
    weights = load_weights(source, manifest)
    assert weights.prompt is not None, "a prompt of ptv2 has one"
    with limits.naming(source):
        limits.check_window(backbone, manifest.prompt.length, manifest.encoding["max_length"])
    head = _head(manifest, weights, backbone, source) if with_head else {}
    padding = _padding(manifest, predictor, source) if with_head else None
    config = folder.AdapterConfig(
        task_type=heads.TASK_TYPES[manifest.task.form] if with_head else "FEATURE_EXTRACTION",
        base_model=base_model or spec.name,
        revision=None if base_model else spec.revision,
        prompt_length=manifest.prompt.length,
        num_layers=spec.shape.num_layers,
        num_heads=spec.shape.num_heads,
        width=spec.shape.num_heads * spec.shape.head_size,
        peft_version=None,
    )
    drops_types = _drops_types(manifest, config, predictor)
    tables = TASK_MODELS[spec.model_type].tables if drops_types else None
    if drops_types and tables is None:
        raise ArtifactError(
            f"{source}: PEFT drops token_type_ids in tasks of type {config.task_type}, so its "
            f"{spec.model_type} model cannot tell the second text from the first as this prompt "
            "does"
        )
    data = folder.weights_bytes(weights.prompt, head)
    column = heads.layer_with_column(head, spec.model_type, spec.hidden_size)
    changes = row_changes(manifest, locate(spec.name, spec.revision))
    notes = _notes(
        manifest,
        config,
        head,
        backbone,
        drops_types=drops_types,
        padding=padding,
        column=column,
        changes=changes,
    )
    with replace_directory(directory) as temporary:
        write_bytes_atomic(temporary / folder.WEIGHTS_FILE, data)
        saved = config.to_mapping(heads.modules_to_save(head))
        write_json_atomic(temporary / folder.CONFIG_FILE, saved)
        text = readme(
            manifest,
            config,
            notes,
            tables=tables,
            pad_token_id=padding if padding != padding_id(backbone) else None,
            column_layer=column,
            changes=changes,
        )
        write_text_atomic(temporary / folder.README_FILE, text)
    return Exported(
        directory=directory, task_type=config.task_type, size_bytes=len(data), notes=notes
    )


def check_target(directory: Path, names: tuple[str, ...], mark: str) -> None:
    """Refuse to replace a folder that holds anything but an earlier result.

    Args:
        directory: What would be replaced.
        names: The files of a result.
        mark: The one that is always among them.

    Raises:
        ArtifactError: It holds something else.
    """
    if not directory.exists():
        return
    found = {entry.name for entry in directory.iterdir()} if directory.is_dir() else {"a file"}
    if found and (found - set(names) or mark not in found):
        other = ", ".join(sorted(found - set(names))[:3]) or "other files"
        raise ArtifactError(
            f"{directory}: expected a new folder, or one with {', '.join(names)} alone to replace; "
            f"got {other}"
        )


def _check_prompt(manifest: Manifest, source: Path) -> None:
    """Refuse what is no prompt in every layer with shifted positions."""
    if manifest.method != "ptv2":
        raise ArtifactError(
            f"{source}: expected a prompt of method ptv2, which is PEFT's prefix tuning; got "
            f"{manifest.method}"
        )
    num_layers = manifest.backbone["num_layers"]
    layers = manifest.prompt.layer_indices(num_layers)
    if len(layers) < num_layers:
        raise ArtifactError(
            f"{source}: the prompt is in the layers {', '.join(map(str, layers))} of {num_layers}; "
            "PEFT's has keys and values in all of them, and none that stand for no prompt. Train "
            "with train.prompt.layers: all"
        )
    if not manifest.prompt.shift_positions:
        raise ArtifactError(
            f"{source}: the prompt was trained with train.prompt.shift_positions: false; under "
            f"PEFT the tokens' positions begin after the prompt, at {manifest.prompt.length}. "
            "Train with shift_positions: true"
        )


def _head(
    manifest: Manifest, weights: Weights, backbone: Backbone, source: Path
) -> Mapping[str, Tensor]:
    """Return the head as PEFT stores it."""
    with limits.naming(source):
        limits.check_width(backbone)
        head = heads.to_peft(
            weights.head_weight,
            weights.head_bias,
            form=manifest.task.form,
            reads=_reads(manifest),
            model_type=backbone.spec.model_type,
            pooler=pooler_of(backbone),
        )
    for name, tensor in head.items():
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{source}: {name} would be too large a number for fp32")
    return head


def _padding(manifest: Manifest, predictor: Predictor, source: Path) -> int | None:
    """Return the token that rows must be padded with; None: any."""
    reads_last = manifest.task.form in ("rows", "values") and _reads(manifest) == "last"
    if not reads_last:
        return None
    named = padding_id(predictor.model.backbone)
    padding = predictor.codec.padding_id if named is None else named
    with limits.naming(source):
        limits.check_ends(predictor, [example["input"] for example in manifest.golden], padding)
    return padding


def _notes(
    manifest: Manifest,
    config: folder.AdapterConfig,
    head: Mapping[str, Tensor],
    backbone: Backbone,
    *,
    drops_types: bool,
    padding: int | None,
    column: str | None,
    changes: Sequence[Change],
) -> tuple[str, ...]:
    """Return what the one who loads it must know."""
    found = []
    if heads.is_scaled(head, backbone.spec.model_type):
        found.append(
            "The head reads the first token itself. The model has a layer in between, which here "
            "passes states on times 2^-30: exact in fp32 and bf16, lost in fp16."
        )
    if config.task_type == "FEATURE_EXTRACTION":
        reads = reading_for(manifest.task.form, _reads(manifest))
        found.append(
            "There is no head here: the model gives hidden states. That of the prompt (head.weight "
            f"and head.bias in prompt.safetensors) reads {READINGS[reads]}."
        )
        if states_width(backbone) != backbone.spec.hidden_size:
            found.append(
                f"The model projects its states to {states_width(backbone)} numbers; that head "
                f"reads them as they were before, of {backbone.spec.hidden_size}."
            )
    if column is not None:
        found.append(
            f"The head's bias is the last column of {column}.weight, for which the model has no "
            "place; the README's code makes one, and PEFT refuses the adapter without it."
        )
    if padding is not None:
        found.append(
            f"The last token that is not {padding} answers: pad with it, and let no row end with "
            "it."
        )
    if manifest.task.form == "spans":
        found.append("ptv2 also hides padding from the answer, which PEFT's model does not.")
    if drops_types:
        found.append(
            f"PEFT drops token_type_ids in tasks of type {config.task_type}; give it inputs_embeds "
            "that hold them, as the README's code makes them."
        )
    for change in changes:
        found.append(
            f"{change.what} The tokenizer itself puts nothing there, and other rows have other "
            "answers; the README's code changes it."
        )
    return tuple(found)


def _drops_types(manifest: Manifest, config: folder.AdapterConfig, predictor: Predictor) -> bool:
    """Tell whether inputs have token types that PEFT, which takes them, does not hand on."""
    if not predictor.model.backbone.has_token_types:
        return False
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        return False
    inputs = [example["input"] for example in manifest.golden]
    return bool(inputs) and bool(predictor.codec.encode(inputs).split.token_type_ids.any())


def _reads(manifest: Manifest) -> heads.Reads:
    # a manifest of tokens may leave it open
    return "cls" if manifest.head.reads == "auto" else manifest.head.reads


READINGS: Mapping[Reading, str] = {
    "tokens": "each token",
    "cls": "the first token",
    "pooler": "the backbone's pooler",
    "mean": "the mean over all tokens but padding",
    "last": "the last token but padding",
    "mask": "the mask token through the language model's transform",
}
