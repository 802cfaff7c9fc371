"""This project, rung by rung.

A new rung is one entry of `RUNGS`, and a new switch one field of `Rung` and one line of `_make`.
Every rung does what `fit()` does in a step: collate, forward, loss, backward, clip, step.
"""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.lengths import BATCH_SIZE, MAX_LENGTH, NUM_CLASSES, SEED, Sentences
from benchmarks.measure import PROMPT_LENGTH, Round, Setting, Way
from ptv2_core.config import Precision, TrainConfig
from ptv2_core.data.batching import Batch, collate, shuffled_batches
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.prompted import Part, PromptedModel
from ptv2_core.training.optim import make_optimizer
from ptv2_core.training.start import new_model
from ptv2_core.training.trunk import TrunkCache, TrunkStates

CACHE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One rung of the ladder.

    Attributes:
        key: Names it in the JSON.
        name: Names it in the table.
        precision: Of the frozen weights.
        padded: Whether rows are in random order and padded to 128, not in length buckets.
        packs: Whether frozen linear layers are packed.
        first_token: Whether the last layer computes only what the first token's state needs.
        top_third: Whether only the top third of the layers has prompts.
        cached: Whether the states below the first prompt are read from the trunk cache.
        train: More settings of the training.
    """

    key: str
    name: str
    precision: Precision = "auto"
    padded: bool = False
    packs: bool = True
    first_token: bool = True
    top_third: bool = False
    cached: bool = False
    train: Mapping[str, Any] = field(default_factory=dict)


_DROPOUT = {"backbone_dropout": True}
_RECOMPUTE = {"gradient_checkpointing": True}

# the rungs that the ratios are about
ALL_LAYERS = "ours_all_layers"
TOP_THIRD_CACHED = "ours_top_third_cached"

RUNGS = (
    Rung(
        key="ours_fp32",
        name="ptv2: fp32, padded to 128, dropout",
        precision="fp32",
        padded=True,
        first_token=False,
        train=_DROPOUT,
    ),
    Rung(
        key="ours_buckets",
        name="+ length buckets",
        precision="fp32",
        first_token=False,
        train=_DROPOUT,
    ),
    Rung(
        key="ours_bf16",
        name="+ frozen weights in bf16 where that is fast",
        first_token=False,
        packs=False,
        train=_DROPOUT,
    ),
    Rung(
        key="ours_eval_mode",
        name="+ no dropout in the backbone",
        first_token=False,
        packs=False,
    ),
    Rung(key="ours_packed", name="+ frozen linear layers packed", first_token=False),
    Rung(key=ALL_LAYERS, name="+ the last layer for [CLS] alone: all-layer prompts"),
    Rung(key="ours_recompute", name="the same, gradient checkpointing", train=_RECOMPUTE),
    Rung(key="ours_top_third", name="the same, prompts in the top third", top_third=True),
    Rung(key=TOP_THIRD_CACHED, name="+ cached below them", top_third=True, cached=True),
)


def ways() -> tuple[Way, ...]:
    """Return the rungs as ways of training."""
    return tuple(
        Way(key=rung.key, name=rung.name, variants={"": partial(_make, rung=rung)})
        for rung in RUNGS
    )


def _make(setting: Setting, *, rung: Rung) -> Round:
    backbone = load_backbone(
        str(setting.folder), precision=rung.precision, device="cpu", packs=rung.packs
    )
    num_layers = backbone.spec.shape.num_layers
    config = TrainConfig.from_mapping(
        {
            "prompt": {
                "length": PROMPT_LENGTH,
                "layers": max(1, num_layers // 3) if rung.top_third else "all",
            },
            "head": {"reads": "cls"},
            "batch_size": BATCH_SIZE,
            "token_budget": BATCH_SIZE * MAX_LENGTH,
            **rung.train,
        }
    )
    split = encoded(setting.sentences)
    model = new_model(backbone, task(), config, split)
    model.trims_last_layer = rung.first_token
    states = _states(model, split) if rung.cached else None
    batches = _batches(setting.sentences, config, padded=rung.padded)
    return _round(model, config, split, batches, states=states, padded=rung.padded)


def _round(
    model: PromptedModel,
    config: TrainConfig,
    split: EncodedSplit,
    batches: list[np.ndarray],
    *,
    states: TrunkStates | None,
    padded: bool,
) -> Round:
    trained = dict(model.trainable())
    optimizer = make_optimizer(trained, config)
    seed = SEED if config.backbone_dropout else None
    rules = rules_of(task().form)

    def once() -> float:
        model.train()
        started = time.perf_counter()
        for rows in batches:
            batch = collate(split, rows)
            if padded:
                batch = _widened(batch)
            part = Part(
                slot=0,
                input_ids=batch.input_ids,
                token_mask=batch.token_mask,
                token_type_ids=batch.token_type_ids,
                trunk=states.batch(rows, batch.input_ids.shape[1]) if states else None,
            )
            with model.backbone.dropout(seed):
                logits = model.answer([part], recompute=config.gradient_checkpointing)[0]
                loss = rules.loss(logits, batch) / rules.count(batch)
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - started

    return once


def task() -> TaskSpec:
    """Return the task that all sentences belong to."""
    return TaskSpec(
        name="bench",
        kind="classification",
        labels=tuple(f"class{place}" for place in range(NUM_CLASSES)),
        fields={"text": "text", "label": "label"},
        metric=METRICS["classification"],
    )


def _states(model: PromptedModel, split: EncodedSplit) -> TrunkStates | None:
    """Return the trunk's states; filling the cache is no part of a round, as of most epochs."""
    with tempfile.TemporaryDirectory() as folder:
        cache = TrunkCache(Path(folder), limit_bytes=CACHE_BYTES)
        # the mapped file stays readable after its name is gone
        return cache.states(model.backbone, split, model.bank.first_layer(0))


def _batches(sentences: Sentences, config: TrainConfig, *, padded: bool) -> list[np.ndarray]:
    if padded:
        return [np.array(rows) for rows in sentences.in_random_order()]
    return shuffled_batches(
        sentences.lengths,
        batch_size=config.batch_size,
        token_budget=config.token_budget,
        seed=SEED,
        epoch=0,
    )


def encoded(sentences: Sentences) -> EncodedSplit:
    """Return the sentences as training reads them."""
    rows = sentences.rows
    ids = [token for row in rows for token in row.input_ids]
    types = [kind for row in rows for kind in row.token_type_ids]
    return EncodedSplit(
        input_ids=np.array(ids, dtype=np.int32),
        token_type_ids=np.array(types, dtype=np.int32),
        word_index=np.full(len(ids), -1, dtype=np.int32),
        offsets=np.concatenate([[0], np.cumsum(sentences.lengths)]),
        labels=np.array([row.label for row in rows], dtype=np.int32),
        word_offsets=np.zeros(len(rows) + 1, dtype=np.int64),
    )


def _widened(batch: Batch) -> Batch:
    """Return a batch padded to the maximal length."""
    missing = (0, MAX_LENGTH - batch.input_ids.shape[1])
    types = batch.token_type_ids
    return Batch(
        rows=batch.rows,
        input_ids=nn.functional.pad(batch.input_ids, missing),
        token_mask=nn.functional.pad(batch.token_mask, missing),
        token_type_ids=None if types is None else nn.functional.pad(types, missing),
        labels=batch.labels,
        word_index=nn.functional.pad(batch.word_index, missing, value=-1),
    )
