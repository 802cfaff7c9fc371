"""A folder that PEFT saved as a prompt of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptv2_core.artifact import Weights, restore_model, save_artifact
from ptv2_core.config import HeadConfig, PromptConfig
from ptv2_core.data.fields import fields_of
from ptv2_core.data.tasks import METRICS, TaskKind, TaskSpec
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.interchange import folder, heads, limits
from ptv2_core.interchange.export import check_target
from ptv2_core.interchange.folder import AdapterConfig, AdapterWeights
from ptv2_core.manifest import FILES, MANIFEST_FILE, Manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.task_models import TASK_MODELS, padding_id, pooler_of
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.model.heads import LinearHead, reading_for

MAX_LENGTH = 512
STRIDE = 64
# The kinds whose records are plain texts, words or questions. An adapter of any other was trained
# on texts made of the records in a way that it does not say.
KINDS: Mapping[TaskKind, str] = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "tagging": "TOKEN_CLS",
    "qa": "QUESTION_ANS",
}

_TEXTS = (
    "The train to the coast leaves at nine on Friday, and there are two seats left.",
    "Not again!",
)
_PAIR = "Nobody travels on Friday."


def task_of(
    name: str, kind: TaskKind, labels: tuple[str, ...], *, has_pairs: bool = False
) -> TaskSpec:
    """Return a task for an adapter, its fields named as is the custom.

    Args:
        name: Of the task.
        kind: One of `KINDS`.
        labels: In the order of the head's outputs; none for numbers and questions.
        has_pairs: Whether its inputs are two texts.

    Raises:
        ConfigError: The kind has no adapters, or does not go with the rest.
    """
    if kind not in KINDS:
        raise ConfigError(f"--kind: expected {' | '.join(KINDS)}, got {kind}")
    if has_pairs and KINDS[kind] != "SEQ_CLS":
        raise ConfigError(f"--pair: expected for classification or regression, got {kind}")
    given: dict[str, str] = {}
    if KINDS[kind] == "SEQ_CLS":
        given = {"text": "text", "label": "label"}
        given |= {"text_pair": "text_pair"} if has_pairs else {}
    elif kind == "tagging":
        given = {"tokens": "tokens", "tags": "tags"}
    return TaskSpec.from_mapping(
        {
            "name": name,
            "kind": kind,
            "labels": list(labels),
            "fields": fields_of(kind, given).named(),
            "metric": METRICS[kind],
            "template": None,
        }
    )


def kind_of(config: AdapterConfig) -> TaskKind:
    """Return the usual kind of task for an adapter's type.

    Raises:
        ArtifactError: Its type says nothing.
    """
    for kind, task_type in KINDS.items():
        if task_type == config.task_type:
            return kind
    raise ArtifactError(
        f"task_type: {config.task_type} does not say what kind of task this is; name it with --kind"
    )


def import_peft(
    source: Path,
    directory: Path,
    *,
    task: TaskSpec,
    backbone_name: str | None = None,
    revision: str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    with_head: bool = True,
) -> Manifest:
    """Make a prompt of an adapter.

    Args:
        source: What PEFT saved.
        directory: Where the prompt goes; an earlier one is replaced.
        task: What it answers.
        backbone_name: The backbone; None: the one that the adapter names.
        revision: Its commit; None: the one that the adapter names.
        max_length: Tokens of a row at most; None: as many as there is room for, 512 at most.
        stride: Tokens that two windows of a long context share; None: 64, or less in short rows.
        with_head: Whether to take the head; else one that knows nothing stands in its place, and
            the prompt is for `train.init_from`.

    Returns:
        What was written.

    Raises:
        ArtifactError: The adapter is damaged, or says what no prompt here can.
        BackboneError: The backbone is not there.
        ConfigError: Too few positions, or a task that the adapter is not of.
    """
    config = folder.read_config(source)
    check_target(directory, FILES, MANIFEST_FILE)
    _check_task(config, task, source, with_head=with_head)
    name = backbone_name or config.base_model
    if name is None:
        raise ConfigError(
            f"{source / folder.CONFIG_FILE} names no backbone (base_model_name_or_path); name it "
            "with --backbone"
        )
    own_revision = None if backbone_name else config.revision
    weights = folder.load_weights(source, config)
    backbone = load_backbone(name, revision or own_revision, device="cpu", precision="fp32")
    _check_backbone(config, backbone, source)
    prompt = PromptConfig(length=config.prompt_length, start="normal", start_attention=None)
    length = _length(config, backbone, max_length)
    # PEFT takes the types of a question's and a context's tokens, and drops them
    has_types = config.task_type in ("SEQ_CLS", "TOKEN_CLS")
    shared = min(STRIDE, length // 4) if stride is None else stride
    with limits.naming(source / folder.WEIGHTS_FILE):
        reads, trained = _weights(weights, config, task, backbone, with_head=with_head)
    head = HeadConfig(reads=reads)
    location = locate(name, revision or own_revision)
    predictor = Predictor(
        restore_model(backbone, [(task, prompt, head, trained)]),
        load_tokenizer(location, words=task.form == "tokens"),
        task,
        max_length=length,
        stride=shared,
        token_types=has_types,
    )
    inputs = _golden_inputs(task)
    padding = padding_id(backbone)
    if with_head and reads == "last" and task.form in ("rows", "values") and padding is not None:
        with limits.naming(source):
            limits.check_ends(predictor, inputs, padding)
    return save_artifact(
        directory,
        trained,
        task=task,
        method="ptv2",
        prompt=prompt,
        head=head,
        backbone=backbone.spec.to_mapping(),
        tokenizer_digest=location.tokenizer_digest(),
        encoding={"max_length": length, "stride": shared, "token_types": has_types},
        decoding={},
        training={},
        provenance={
            "peft": {
                "sha256": weights.sha256,
                "task_type": config.task_type,
                "base_model": config.base_model,
                "version": config.peft_version,
                "has_head": with_head,
            }
        },
        metrics={},
        golden=[
            {"input": given, "logits": logits.tolist()}
            for given, logits in zip(inputs, predictor.logits(inputs), strict=True)
        ],
    )


def _check_task(config: AdapterConfig, task: TaskSpec, source: Path, *, with_head: bool) -> None:
    if with_head and config.task_type == "FEATURE_EXTRACTION":
        raise ArtifactError(
            f"{source}: an adapter for hidden states has no head; --without-head takes the prompt "
            "alone, to train a head on it (train.init_from)"
        )
    if with_head and KINDS.get(task.kind) != config.task_type:
        raise ConfigError(
            f"{source}: task_type {config.task_type} goes with --kind "
            f"{' or '.join(kind for kind, kinds in KINDS.items() if kinds == config.task_type)}, "
            f"got {task.kind}"
        )


def _check_backbone(config: AdapterConfig, backbone: Backbone, source: Path) -> None:
    spec = backbone.spec
    if spec.model_type not in TASK_MODELS:
        raise ArtifactError(
            f"{source}: expected a backbone of type {', '.join(TASK_MODELS)}, got {spec.model_type}"
        )
    expected = {
        "num_layers": spec.shape.num_layers,
        "num_attention_heads": spec.shape.num_heads,
        "token_dim": spec.shape.num_heads * spec.shape.head_size,
    }
    found = {
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "token_dim": config.width,
    }
    wrong = [key for key, value in expected.items() if found[key] != value]
    if wrong:
        raise ArtifactError(
            f"{source / folder.CONFIG_FILE}: "
            + "; ".join(f"{key}: expected {expected[key]}, got {found[key]}" for key in wrong)
            + f"; this is what {spec.name} has. Name the adapter's own backbone with --backbone"
        )


def _length(config: AdapterConfig, backbone: Backbone, max_length: int | None) -> int:
    """Return how many tokens a row has at most."""
    limit = backbone.position_limit
    window = limits.window_limit(backbone)
    limit = limit if window is None else min(limit, window)
    room = limit - config.prompt_length
    length = min(MAX_LENGTH, room) if max_length is None else max_length
    if not 1 <= length <= room:
        raise ConfigError(
            f"--max-length: {config.prompt_length} prompt positions leave {room} of the {limit} "
            f"that {backbone.spec.name} has{'' if window is None else ' in a window'}; expected a "
            f"length from 1 to {room}, got {length}"
        )
    return length


def _weights(
    weights: AdapterWeights,
    config: AdapterConfig,
    task: TaskSpec,
    backbone: Backbone,
    *,
    with_head: bool,
) -> tuple[heads.Reads, Weights]:
    """Return what the head reads, and the prompt with its head or a new one."""
    spec = backbone.spec
    if not with_head:
        new = LinearHead(
            spec.hidden_size,
            task.num_outputs,
            reads=reading_for(task.form, spec.reads),
            seed=0,
        ).linear
        weight, bias = new.weight.detach(), new.bias.detach()
        return spec.reads, Weights(prompt=weights.prompt, head_weight=weight, head_bias=bias)
    limits.check_width(backbone)
    reads, weight, bias = heads.from_peft(
        weights.head,
        task_type=config.task_type,
        model_type=spec.model_type,
        num_outputs=task.num_outputs,
        hidden_size=spec.hidden_size,
        pooler=pooler_of(backbone),
    )
    head_weight, head_bias = weight.contiguous(), bias.contiguous()
    trained = Weights(prompt=weights.prompt, head_weight=head_weight, head_bias=head_bias)
    return reads or spec.reads, trained


def _golden_inputs(task: TaskSpec) -> list[dict[str, Any]]:
    """Return inputs that any task of the kind can answer."""
    if task.kind == "tagging":
        return [{"tokens": text.split()} for text in _TEXTS]
    if task.kind == "qa":
        return [{"question": "When does the train leave?", "context": _TEXTS[0]}]
    pair = {"text_pair": _PAIR} if "text_pair" in task.fields else {}
    return [{"text": text, **pair} for text in _TEXTS]
