"""Where a deep prompt begins: sampled keys and values, and little of the tokens' attention."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from ptv2_core.config import TrainConfig
from ptv2_core.data.batching import collate
from ptv2_core.evaluation.diagnosis import diagnose
from ptv2_core.model.attention import Captured
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.prompts import make_prompt
from ptv2_core.training.prompt_start import new_deep_prompt, quieting_shift
from ptv2_core.training.start import new_model
from tests.tiny import encode_for, examples_of, open_backbone, task_of

Folder = Callable[[str], Path]


def config_of(**prompt: Any) -> TrainConfig:
    return TrainConfig.from_mapping({"prompt": prompt})


def states_of(queries: Tensor, keys: Tensor, scaling: float = 0.5) -> Captured:
    return Captured(layer=0, query=queries, key=keys, value=keys, scaling=scaling)


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_prompt_start_samples_the_backbones_own_keys_and_values(backbone_folder: Folder) -> None:
    folder = backbone_folder("bert")
    backbone = open_backbone(folder)
    split = encode_for(folder, examples_of("classification", 1, seed=3), task_of())
    config = config_of(length=9, start="backbone", start_attention=None, shift_positions=False)
    start = new_deep_prompt(backbone, config, split)()
    assert start.shape == (3, 2, 4, 9, 8)
    plain = AutoModel.from_pretrained(folder)
    ids = collate(split, np.arange(1)).input_ids
    with torch.no_grad():
        states = plain.embeddings(input_ids=ids)
        key = plain.encoder.layer[0].attention.self.key(states).view(-1, 4, 8)  # [T, N, D]
    for position in range(9):
        differences = (key - start[0, 0, :, position]).abs().amax(dim=(1, 2))
        assert differences.min() < 1e-5


def test_prompt_start_is_as_loud_as_drawn_where_no_share_is_asked_for(
    backbone_folder: Folder,
) -> None:
    folder = backbone_folder("bert")
    backbone = open_backbone(folder)
    split = encode_for(folder, examples_of("classification", 4, seed=3), task_of())
    config = config_of(length=6, start="normal", start_attention=None)
    prompt = new_deep_prompt(backbone, config, split)
    drawn_alone = make_prompt(backbone.spec.shape, config.prompt, seed=config.seed)
    assert torch.equal(prompt(), drawn_alone())


def share_of(queries: Tensor, own: Tensor, prompt: Tensor, scaling: float) -> Tensor:
    """Return the log-odds `[N]` of prompt against tokens, each query's attention written out."""
    found = []
    for head in range(queries.shape[1]):
        odds = []
        for query in queries[0, head]:
            at_tokens = sum(math.exp(scaling * float(query @ key)) for key in own[0, head])
            at_prompt = sum(math.exp(scaling * float(query @ key)) for key in prompt[head])
            odds.append(math.log(at_prompt / at_tokens))
        found.append(sum(odds) / len(odds))
    return torch.tensor(found)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
def test_prompt_start_brings_the_prompts_attention_to_the_share(share: float) -> None:
    # what MiniLM's queries are like: a common part, and a tenth of that for themselves
    queries = drawn(1, 2, 1, 8, seed=1) + 0.1 * drawn(1, 2, 40, 8, seed=2)
    own, keys = drawn(1, 2, 40, 8, seed=3), drawn(2, 16, 8, seed=4)
    mask = torch.ones(1, 40, dtype=torch.bool)
    shift = quieting_shift(keys, states_of(queries, own), mask, share=share)
    odds = share_of(queries, own, keys + shift[:, None], 0.5)
    assert odds == pytest.approx(math.log(share / (1 - share)), abs=0.05)


def test_prompt_start_shifts_keys_by_least_squares() -> None:
    queries, own, keys = (
        drawn(1, 1, 50, 8, seed=1),
        drawn(1, 1, 50, 8, seed=2),
        drawn(1, 3, 8, seed=3),
    )
    shift = quieting_shift(keys, states_of(queries, own), torch.ones(1, 50) > 0, share=0.05)
    asked = queries[0, 0].double().numpy()
    odds = float(share_of(queries, own, keys, 0.5)[0])
    wanted = np.full(50, (math.log(0.05 / 0.95) - odds) / 0.5)
    by_hand, *_ = np.linalg.lstsq(asked, wanted, rcond=None)
    assert shift[0].numpy() == pytest.approx(by_hand, abs=1e-2)


def test_prompt_start_does_not_look_at_padding() -> None:
    queries, own, keys = (
        drawn(2, 2, 5, 8, seed=1),
        drawn(2, 2, 5, 8, seed=2),
        drawn(2, 3, 8, seed=3),
    )
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    wild = mask[:, None, :, None]
    shift = quieting_shift(keys, states_of(queries, own), mask, share=0.1)
    loud = states_of(queries.where(wild, 1e3), own.where(wild, 1e3))
    assert torch.equal(quieting_shift(keys, loud, mask, share=0.1), shift)


@pytest.mark.parametrize("reparameterization", ["embedding", "mlp"])
def test_prompt_start_moves_all_keys_of_a_head_alike_and_no_value(
    backbone_folder: Folder, reparameterization: str
) -> None:
    folder = backbone_folder("bert")
    backbone = open_backbone(folder)
    split = encode_for(folder, examples_of("classification", 9, seed=3), task_of())
    shape = {"length": 6, "start": "normal", "reparameterization": reparameterization}
    loud, quiet = (
        new_deep_prompt(backbone, config_of(**shape, start_attention=share), split)().detach()
        for share in (None, 0.01)
    )
    assert torch.equal(loud[:, 1], quiet[:, 1])
    moved = quiet[:, 0] - loud[:, 0]
    assert moved.abs().max() > 0.1
    assert torch.allclose(moved, moved[:, :, :1].expand_as(moved), atol=1e-5)


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    return load_backbone("all-minilm-l6-v2", device="cpu")


@pytest.mark.parametrize("start", ["normal", "backbone"])
@pytest.mark.parametrize("length", [8, 64])
def test_prompt_start_takes_a_twentieth_of_a_real_backbones_attention(
    minilm: Backbone, start: str, length: int
) -> None:
    folder = locate("all-minilm-l6-v2").folder
    split = encode_for(folder, examples_of("classification", 40, seed=3), task_of())
    shares = {}
    for share in (None, 0.05):
        config = config_of(length=length, start=start, start_attention=share)
        model = new_model(minilm, task_of(), config, split)
        shares[share] = [one.attention for one in diagnose(model, split, token_budget=8192)]
    assert all(0.02 < share < 0.12 for share in shares[0.05])
    assert max(shares[None]) > 0.2
