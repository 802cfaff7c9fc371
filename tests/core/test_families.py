"""Every family of backbones against attention written out by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from ptv2_core.config import PromptConfig, PromptLayers
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompts import NO_SLOT
from tests.core.family_oracle import encode_row
from tests.core.family_parts import CASES, tiny_family
from tests.core.training_parts import padded
from tests.tiny import open_backbone, tiny_model

Loaded = Callable[[str], tuple[Backbone, Any]]

ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 30, 31, 32, 33, 3], [2, 9, 9, 3]]
every_case = pytest.mark.parametrize("case", CASES)
# what `layers` is set to, of 3 layers (or of ALBERT's 4 applications)
SOME: PromptLayers = (0, 2)


@pytest.fixture(scope="module")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a case to the folder of its tiny backbone."""
    made: dict[str, Path] = {}

    def folder(case: str) -> Path:
        if case not in made:
            made[case] = tiny_family(tmp_path_factory.mktemp(case), case)
        return made[case]

    return folder


@pytest.fixture(scope="module")
def loaded(family_folder: Callable[[str], Path]) -> Loaded:
    """Return a function from a case to its backbone, ours and Transformers' own."""
    made: dict[str, tuple[Backbone, Any]] = {}

    def load(case: str) -> tuple[Backbone, Any]:
        if case not in made:
            folder = family_folder(case)
            made[case] = (open_backbone(folder), AutoModel.from_pretrained(folder).eval())
        return made[case]

    return load


def spread(prompt: Tensor, layers: tuple[int, ...], count: int) -> list[Tensor | None]:
    """Spread `[its layers, 2, N, P, D]` over all layers."""
    return [prompt[layers.index(one)] if one in layers else None for one in range(count)]


@every_case
def test_families_bare_rows_equal_transformers(loaded: Loaded, case: str) -> None:
    backbone, plain = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=5))
    ids, mask = padded(ROWS)
    captured: list[Tensor] = []
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        got = model.encode(ids, mask, slots=NO_SLOT).hidden
        if case == "opt-350m":  # a head reads what comes before the projection
            got = got @ plain.decoder.project_out.weight.T
    del captured
    torch.testing.assert_close(got[mask], wanted[mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("layers", ["all", SOME, 1], ids=str)
@every_case
def test_families_equal_written_out_attention(
    loaded: Loaded, case: str, layers: PromptLayers, shift: bool
) -> None:
    backbone, plain = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=5, layers=layers, shift_positions=shift))
    prompts = spread(model.bank.flatten(0), model.bank.layers(0), backbone.spec.shape.num_layers)
    with torch.no_grad():
        got = model.encode(*padded(ROWS)).hidden
        for row, states in zip(ROWS, got, strict=True):
            wanted = encode_row(plain, row, prompts, shift=model.bank.shift(0))
            torch.testing.assert_close(states[: len(row)], wanted, atol=2e-5, rtol=1e-4)
