"""A model before its first step: prompt and head started from the settings."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ptv2_core.config import HeadConfig, PromptConfig, TrainConfig
from ptv2_core.data.batching import collate
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.heads import LinearHead, Reading, reading_for
from ptv2_core.model.prompted import PromptedModel, sample_keys_and_values
from ptv2_core.model.prompts import EmbeddingPrompt, MlpPrompt, PromptBank, make_prompt

# rows whose words a prompt that starts from the backbone is sampled from
START_ROWS = 64


def resolve_head(head: HeadConfig, backbone: Backbone) -> HeadConfig:
    """Return the head's settings with `auto` replaced by what the backbone's files say.

    Raises:
        ConfigError: A pooler is asked for that the backbone's files do not hold.
    """
    reads = backbone.spec.reads if head.reads == "auto" else head.reads
    if reads == "pooler" and not backbone.spec.has_pooler:
        raise ConfigError(
            f"train.head.reads: {backbone.spec.name} has no trained pooler; expected auto, cls or "
            "mean"
        )
    return HeadConfig(reads=reads, dropout=head.dropout)


def reading_of(task: TaskSpec, head: HeadConfig, backbone: Backbone) -> Reading:
    """Return what the task's head reads on this backbone."""
    resolved = resolve_head(head, backbone).reads
    assert resolved != "auto", "resolve_head leaves no auto"
    return reading_for(task.kind, resolved)


def check_positions(
    backbone: Backbone,
    prompt: PromptConfig,
    splits: Sequence[EncodedSplit],
    *,
    setting: str = "train.prompt.length",
) -> None:
    """Refuse a prompt that leaves too few positions for the longest row.

    Args:
        backbone: Has the positions.
        prompt: Takes P of them, unless it does not shift the tokens.
        splits: All rows that the prompt will meet.
        setting: Where the length was set, for the message.

    Raises:
        ConfigError: Prompt and longest row together pass the backbone's positions.
    """
    longest = max(int(split.lengths.max(initial=0)) for split in splits)
    limit = backbone.position_limit
    is_lowest = prompt.layer_indices(backbone.spec.shape.num_layers)[0] == 0
    taken = prompt.length if prompt.shift_positions and is_lowest else 0
    if taken + longest > limit:
        raise ConfigError(
            f"{setting}: {taken} prompt positions and {longest} tokens of the "
            f"longest row need {taken + longest} positions, but {backbone.spec.name} has "
            f"{limit}; expected a length of at most {limit - longest}, or lower prepare.max_length"
        )


def new_slot(
    backbone: Backbone, task: TaskSpec, config: TrainConfig, train: EncodedSplit
) -> tuple[EmbeddingPrompt | MlpPrompt, LinearHead]:
    """Return a prompt and a head before their first step.

    Args:
        backbone: Frozen.
        task: Its labels size the head.
        config: Prompt, head and seed.
        train: Rows whose words a `backbone` start is sampled from.

    Raises:
        ConfigError: The head cannot read what it is told to read, or a layer is not there.
    """
    prompt = make_prompt(
        backbone.spec.shape,
        config.prompt,
        seed=config.seed,
        start=_start(backbone, config, train),
    )
    head = LinearHead(
        backbone.spec.hidden_size,
        len(task.labels),
        reads=reading_of(task, config.head, backbone),
        seed=config.seed,
    )
    return prompt, head


def new_model(
    backbone: Backbone, task: TaskSpec, config: TrainConfig, train: EncodedSplit
) -> PromptedModel:
    """Return a model with one slot, ready for `fit`; arguments and errors as for `new_slot`."""
    prompt, head = new_slot(backbone, task, config, train)
    return PromptedModel(
        backbone, PromptBank(backbone.spec.shape, [(prompt, config.prompt)]), [head]
    )


def _start(backbone: Backbone, config: TrainConfig, train: EncodedSplit) -> Tensor | None:
    """Return a prompt `[L, 2, N, P, D]` of the backbone's own keys and values, where asked for."""
    if config.prompt.start != "backbone" or config.prompt.reparameterization == "mlp":
        return None
    chosen = np.random.default_rng(config.seed).permutation(len(train))[:START_ROWS]
    batch = collate(train, np.sort(chosen)).to(backbone.device)
    bare = PromptedModel(backbone, PromptBank(backbone.spec.shape), [])
    return sample_keys_and_values(
        bare, batch.input_ids, batch.token_mask, count=config.prompt.length, seed=config.seed
    )
