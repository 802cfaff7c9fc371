"""Every family of backbones against attention written out by hand: states and gradients."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from ptv2_core.config import PromptConfig, PromptLayers
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import NO_SLOT, InputPrompt, PromptBank
from tests.core.family_oracle import encode_row
from tests.core.family_parts import CASES
from tests.core.training_parts import backward, padded
from tests.tiny import open_backbone, tiny_model

Folder = Callable[[str], Path]
Loaded = Callable[[str], tuple[Backbone, Any]]

ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 30, 31, 32, 33, 3], [2, 9, 9, 3]]
every_case = pytest.mark.parametrize("case", CASES)
# which know two types of tokens
TYPED = ("albert", "albert-groups", "deberta-v2-xlarge")
# words are narrower than states: no embedding can stand before them
NARROW = ("albert", "albert-groups", "opt-350m")


@pytest.fixture(scope="module")
def loaded(family_folder: Folder) -> Loaded:
    """Return a function from a case to its backbone, ours and Transformers' own."""
    made: dict[str, tuple[Backbone, Any]] = {}

    def load(case: str) -> tuple[Backbone, Any]:
        if case not in made:
            folder = family_folder(case)
            made[case] = (open_backbone(folder), AutoModel.from_pretrained(folder).eval())
        return made[case]

    return load


def spread(prompt: Tensor, model: PromptedModel, slot: int = 0) -> list[Tensor | None]:
    """Spread a slot's `[its layers, 2, N, P, D]` over all layers of the backbone."""
    layers = model.bank.layers(slot)
    count = model.backbone.spec.shape.num_layers
    return [prompt[layers.index(one)] if one in layers else None for one in range(count)]


def without_projection(case: str, states: Tensor, plain: Any) -> Tensor:
    """Return our states as Transformers gives them: a head reads OPT-350m's before the last."""
    return states @ plain.decoder.project_out.weight.T if case == "opt-350m" else states


@every_case
def test_families_bare_rows_equal_transformers(loaded: Loaded, case: str) -> None:
    backbone, plain = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=5))
    ids, mask = padded(ROWS)
    assert backbone.has_token_types == (case in TYPED)
    for types in (None, torch.randint_like(ids, 2)) if case in TYPED else (None,):
        with torch.no_grad():
            told = {} if types is None else {"token_type_ids": types}
            wanted = plain(input_ids=ids, attention_mask=mask.long(), **told).last_hidden_state
            got = model.encode(ids, mask, types, slots=NO_SLOT).hidden
            got = without_projection(case, got, plain)
        torch.testing.assert_close(got[mask], wanted[mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", TYPED)
def test_families_tell_two_texts_apart(loaded: Loaded, case: str) -> None:
    backbone, _ = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=5))
    ids, mask = padded(ROWS[:1])
    types = torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        one, two = model.encode(ids, mask).hidden, model.encode(ids, mask, types).hidden
    assert (one - two).abs().max() > 0.01


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("layers", ["all", (0, 2), 1], ids=str)
@every_case
def test_families_equal_written_out_attention(
    loaded: Loaded, case: str, layers: PromptLayers, shift: bool
) -> None:
    backbone, plain = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=5, layers=layers, shift_positions=shift))
    prompts = spread(model.bank.flatten(0), model)
    with torch.no_grad():
        got = model.encode(*padded(ROWS)).hidden
        for row, states in zip(ROWS, got, strict=True):
            wanted = encode_row(plain, row, prompts, shift=model.bank.shift(0))
            torch.testing.assert_close(states[: len(row)], wanted, atol=2e-5, rtol=1e-4)


@every_case
def test_families_mixed_batch_equals_written_out_attention(loaded: Loaded, case: str) -> None:
    backbone, plain = loaded(case)
    model = tiny_model(
        backbone,
        PromptConfig(length=3),
        PromptConfig(length=7, layers=(0, 2), shift_positions=False),
        PromptConfig(length=2, layers=1),
    )
    slots = [1, NO_SLOT, 2, 0]
    with torch.no_grad():
        got = model.encode(*padded(ROWS, width=20), slots=torch.tensor(slots)).hidden
        for row, slot, states in zip(ROWS, slots, got, strict=True):
            bare = [None] * backbone.spec.shape.num_layers
            prompts = bare if slot == NO_SLOT else spread(model.bank.flatten(slot), model, slot)
            wanted = encode_row(plain, row, prompts, shift=model.bank.shift(slot))
            torch.testing.assert_close(states[: len(row)], wanted, atol=2e-5, rtol=1e-4)
    # padding sees nothing but itself where a window ends before the last word
    assert got.isfinite().all()


@every_case
def test_families_gradients_equal_those_of_written_out_attention(loaded: Loaded, case: str) -> None:
    backbone, plain = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=3, layers=(0, 2)))
    rows = ROWS[:2]
    ids, mask = padded(rows)
    weighing = torch.randn(ids.shape[1], 32, generator=torch.Generator().manual_seed(1))
    gradients = []
    for recompute in (False, True):
        hidden = model.encode(ids, mask, recompute=recompute).hidden
        backward((hidden * weighing * mask[:, :, None]).sum())
        trained = dict(model.trainable())["bank.slots.0.weight"]
        assert trained.grad is not None
        gradients.append(trained.grad.clone())
        trained.grad = None
    assert torch.equal(*gradients)
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    prompt = model.bank.flatten(0).requires_grad_()
    total = torch.zeros(())
    for row in rows:
        states = encode_row(plain, row, spread(prompt, model), shift=3)
        total = total + (states * weighing[: len(row)]).sum()
    (wanted,) = torch.autograd.grad(total, prompt)
    size = wanted.abs().max()
    assert size > 1e-2
    torch.testing.assert_close(gradients[0] / size, wanted / size, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if case not in NARROW])
def test_families_embeddings_before_the_words_are_as_transformers_has_them(
    loaded: Loaded, case: str
) -> None:
    backbone, plain = loaded(case)
    start = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    bank = PromptBank(backbone.spec.shape, [(InputPrompt(start), PromptConfig(length=4))])
    model = PromptedModel(backbone, bank, [])
    ids, mask = padded(ROWS)
    with torch.no_grad():
        got = model.encode(ids, mask).hidden
        words = plain.get_input_embeddings()(ids)
        whole = torch.cat([start.expand(len(ids), -1, -1), words], dim=1)
        seen = torch.cat([torch.ones(len(ids), 4, dtype=torch.bool), mask], dim=1)
        output = plain(inputs_embeds=whole, attention_mask=seen.long()).last_hidden_state
    torch.testing.assert_close(got[mask], output[:, 4:][mask], atol=2e-5, rtol=1e-4)


@every_case
def test_families_states_of_the_lower_layers_are_where_a_forward_goes_on(
    loaded: Loaded, case: str
) -> None:
    backbone, _ = loaded(case)
    model = tiny_model(backbone, PromptConfig(length=4, layers=1))
    ids, mask = padded(ROWS)
    below = model.bank.first_layer(0)
    assert below == backbone.spec.shape.num_layers - 1
    trunk = backbone.trunk(ids, mask, None, num_layers=below)
    whole = backbone.trunk(ids, mask, None, num_layers=below + 1)
    with torch.no_grad():
        wanted, bare = model.encode(ids, mask).hidden, model.encode(ids, mask, slots=NO_SLOT).hidden
        got = model.encode(ids, mask, trunk=trunk).hidden
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(whole.hidden, bare, atol=1e-6, rtol=1e-5)
    for row, states in zip(ROWS, trunk.hidden, strict=True):
        alone = backbone.trunk(*padded([row]), None, num_layers=below).hidden[0]
        torch.testing.assert_close(states[: len(row)], alone, atol=2e-5, rtol=1e-4)
