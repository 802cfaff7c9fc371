"""A model before its first step: prompt and head started from the settings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptv2_core.config import HeadConfig, TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.heads import LinearHead, Reading, reading_for
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import (
    EmbeddingPrompt,
    InputPrompt,
    NoPrompt,
    PromptBank,
)
from ptv2_core.training.prompt_start import new_deep_prompt

MAX_FINETUNING_RATE = 2e-3


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a training begins with, where that was trained before.

    Attributes:
        prompt: `[layers with a prompt, 2, N, P, D]`.
        digest: Of the weights it was loaded from.
        head: Weight `[C, H]` and bias `[C]`; None: the head starts anew.
    """

    prompt: Tensor
    digest: str
    head: tuple[Tensor, Tensor] | None = None


def resolve_head(head: HeadConfig, backbone: Backbone) -> HeadConfig:
    """Return the head's settings with `auto` replaced by what the backbone's files say.

    Raises:
        ConfigError: What is to be read is not there, or does not go with the head's type.
    """
    if head.type == "verbalizer":
        if head.reads not in ("auto", "mask"):
            raise ConfigError(
                f"train.head.reads: a verbalizer reads the mask token; expected auto or mask, got "
                f"{head.reads}"
            )
        if head.label_words is None:
            raise ConfigError(
                "train.head.label_words: a verbalizer needs a word for each label; expected a "
                "mapping such as {entailment: Yes, not_entailment: No}"
            )
        return replace(head, reads="mask")
    if head.label_words is not None:
        raise ConfigError(
            "train.head.label_words: only a verbalizer reads them; expected train.head.type: "
            "verbalizer, or no words"
        )
    if head.reads == "mask":
        raise ConfigError(
            "train.head.reads: only a verbalizer reads the mask token; expected auto, cls, pooler, "
            "mean or last, or train.head.type: verbalizer"
        )
    reads = backbone.spec.reads if head.reads == "auto" else head.reads
    if reads == "pooler" and not backbone.spec.has_pooler:
        raise ConfigError(
            f"train.head.reads: {backbone.spec.name} has no trained pooler; expected auto, cls or "
            "mean"
        )
    if reads == "cls" and backbone.spec.is_causal:
        raise ConfigError(
            f"train.head.reads: {backbone.spec.name} is a decoder, whose first token sees no "
            "other; expected auto, last or mean"
        )
    return replace(head, reads=reads)


def reading_of(task: TaskSpec, head: HeadConfig, backbone: Backbone) -> Reading:
    """Return what the task's head reads on this backbone."""
    resolved = resolve_head(head, backbone).reads
    assert resolved != "auto", "resolve_head leaves no auto"
    return reading_for(task.form, resolved)


def check_positions(
    backbone: Backbone,
    config: TrainConfig,
    splits: Sequence[EncodedSplit],
    *,
    setting: str = "train.prompt.length",
) -> None:
    """Refuse a prompt that leaves too few positions for the longest row.

    Args:
        backbone: Has the positions.
        config: Its prompt takes P of them, unless there is none or it does not shift the tokens.
        splits: All rows that the prompt will meet.
        setting: Where the length was set, for the message.

    Raises:
        ConfigError: Prompt and longest row together pass the backbone's positions.
    """
    longest = max(int(split.lengths.max(initial=0)) for split in splits)
    limit = backbone.position_limit
    prompt = config.prompt
    is_lowest = {
        "ptv2": prompt.layer_indices(backbone.spec.shape.num_layers)[0] == 0,
        "prompt_tuning": True,
    }.get(config.method, False)
    taken = prompt.length if prompt.shift_positions and is_lowest else 0
    if taken + longest > limit:
        raise ConfigError(
            f"{setting}: {taken} prompt positions and {longest} tokens of the "
            f"longest row need {taken + longest} positions, but {backbone.spec.name} has "
            f"{limit}; expected a length of at most {limit - longest}, or lower prepare.max_length"
        )


def new_slot(
    backbone: Backbone,
    task: TaskSpec,
    config: TrainConfig,
    train: EncodedSplit,
    *,
    start: Start | None = None,
) -> tuple[nn.Module, LinearHead]:
    """Return a prompt and a head before their first step.

    Args:
        backbone: Has the shape, and the keys and values that a prompt may start from.
        task: Sizes the head.
        config: Method, prompt, head and seed.
        train: Rows whose words a `backbone` start is sampled from.
        start: What was trained before, to begin with.

    Raises:
        ConfigError: The head cannot read what it is told to read, a layer is not there, or the
            start is of another shape.
    """
    return _new_prompt(backbone, config, train, start), _new_head(backbone, task, config, start)


def new_model(
    backbone: Backbone,
    task: TaskSpec,
    config: TrainConfig,
    train: EncodedSplit,
    *,
    start: Start | None = None,
) -> PromptedModel:
    """Return a model with one slot, ready for `fit`; arguments and errors as for `new_slot`.

    In fine-tuning the model has a copy of the backbone for its own.
    """
    prompt, head = new_slot(backbone, task, config, train, start=start)
    own = backbone.tunable_copy() if config.method == "finetune" else backbone
    return PromptedModel(own, PromptBank(own.spec.shape, [(prompt, config.prompt)]), [head])


def _new_head(
    backbone: Backbone, task: TaskSpec, config: TrainConfig, start: Start | None
) -> LinearHead:
    head = LinearHead(
        backbone.spec.hidden_size,
        task.num_outputs,
        reads=reading_of(task, config.head, backbone),
        seed=config.seed,
        hides_padding=task.form == "spans",
    )
    before = start.head if start is not None else None
    if before is not None and before[0].shape == head.linear.weight.shape:
        head.start_at(*before)
    elif config.head.type == "verbalizer":
        head.start_at(*_label_rows(backbone, task, config.head))
    return head


def _label_rows(backbone: Backbone, task: TaskSpec, head: HeadConfig) -> tuple[Tensor, Tensor]:
    """Return the language model's rows for the word of each label."""
    words = head.label_words or {}
    where = "train.head.label_words"
    if task.form != "rows" or "{mask}" not in (task.template or ""):
        raise ConfigError(
            "train.head.type: a verbalizer answers whole texts at the mask of a template; expected "
            'kind: classification with a prepare.template such as "{text} It was {mask}."'
        )
    if set(words) != set(task.labels):
        raise ConfigError(
            f"{where}: expected a word for each of {', '.join(task.labels)}; got words for "
            f"{', '.join(words)}"
        )
    assert backbone.language_model is not None, "the backbone was loaded for a verbalizer"
    ids = []
    for label in task.labels:
        pieces = backbone.language_model.pieces(words[label])
        if len(pieces) != 1:
            raise ConfigError(
                f"{where}.{label}: expected a word that is one piece of the tokenizer of "
                f"{backbone.spec.name}, got {words[label]!r}, which it knows as {len(pieces)}"
            )
        ids += pieces
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{where}: expected a different word for each label, got {dict(words)}")
    return backbone.language_model.word_rows(torch.tensor(ids))


def _new_prompt(
    backbone: Backbone, config: TrainConfig, train: EncodedSplit, start: Start | None
) -> nn.Module:
    if config.method == "finetune" and config.learning_rate > MAX_FINETUNING_RATE:
        raise ConfigError(
            f"train.learning_rate: {config.learning_rate:g} would wipe out a backbone's own "
            f"weights; expected {MAX_FINETUNING_RATE:g} at most (5e-5 is usual) for method: "
            "finetune; the same holds for search.space.learning_rate"
        )
    if config.method in ("finetune", "probe"):
        return NoPrompt()
    if config.method == "prompt_tuning":
        return _input_prompt(backbone, config, train)
    if start is None:
        return new_deep_prompt(backbone, config, train)
    shape = backbone.spec.shape
    layers = config.prompt.layer_indices(shape.num_layers)
    wanted = (len(layers), 2, shape.num_heads, config.prompt.length, shape.head_size)
    if config.prompt.reparameterization == "mlp":
        raise ConfigError(
            "train.init_from: a saved prompt holds keys and values, not the MLP that made them; "
            "expected train.prompt.reparameterization: embedding"
        )
    if tuple(start.prompt.shape) != wanted:
        raise ConfigError(
            f"train.init_from: expected a prompt of {len(layers)} layers and length "
            f"{config.prompt.length} (train.prompt), got {start.prompt.shape[0]} layers and length "
            f"{start.prompt.shape[3]}; set train.prompt to the same"
        )
    return EmbeddingPrompt(start.prompt)


def _input_prompt(backbone: Backbone, config: TrainConfig, train: EncodedSplit) -> InputPrompt:
    """Return word embeddings: of sampled training words, or drawn at random."""
    generator = torch.Generator().manual_seed(config.seed)
    length, width = config.prompt.length, backbone.spec.hidden_size

    def embeddings(token_ids: Tensor) -> Tensor:
        with torch.no_grad():
            return backbone.word_embeddings(token_ids.to(backbone.device)).cpu()

    found = embeddings(torch.zeros(1, dtype=torch.long)).shape[1]
    if found != width:
        raise ConfigError(
            "train.method: prompt_tuning puts embeddings as wide as the layers before those of the "
            f"words; expected words of width {width}, got {found} in {backbone.spec.name}; take "
            "ptv2, finetune or probe, or another backbone"
        )
    if config.prompt.start == "normal":
        drawn = torch.randn(length, width, generator=generator)
        return InputPrompt(drawn * config.prompt.start_std)
    places = torch.randint(len(train.input_ids), (length,), generator=generator)
    return InputPrompt(embeddings(torch.from_numpy(train.input_ids[places.numpy()]).long()))
