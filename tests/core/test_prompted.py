"""The invariants of the prompted model, against the written-out oracle."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from ptv2_core.config import PromptConfig
from ptv2_core.model.prompted import Part, is_trainable_name
from ptv2_core.model.prompts import NO_SLOT
from tests.core.oracle import encode_row
from tests.tiny import MODELS, open_backbone, tiny_model

Folder = Callable[[str], Path]

ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 3], [2, 9, 9, 3]]


def padded(rows: list[list[int]], width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids `[B, T]` and the mask of real tokens."""
    width = width or max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return ids, mask


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_prompted_equals_written_out_attention(
    backbone_folder: Folder, model_type: str, shift: bool
) -> None:
    folder = backbone_folder(model_type)
    backbone = open_backbone(folder)
    model = tiny_model(backbone, PromptConfig(length=5, shift_positions=shift))
    ids, mask = padded(ROWS)
    with torch.no_grad():
        got = model.encode(ids, mask).hidden
        plain = AutoModel.from_pretrained(folder)
        first = 1 if model_type in ("roberta", "xlm-roberta", "camembert") else 0
        for row, states in zip(ROWS, got, strict=True):
            wanted = encode_row(
                plain, row, model.bank.flatten(0), first_position=first, shift=shift
            )
            torch.testing.assert_close(states[: len(row)], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_prompted_row_without_slot_sees_the_bare_backbone(
    backbone_folder: Folder, model_type: str
) -> None:
    folder = backbone_folder(model_type)
    model = tiny_model(open_backbone(folder), PromptConfig(length=5))
    ids, mask = padded(ROWS)
    plain = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        got = model.encode(ids, mask, slots=NO_SLOT).hidden
    torch.testing.assert_close(got[mask], wanted[mask], atol=1e-5, rtol=1e-5)


def test_prompted_mixed_batch_equals_separate_forwards(backbone_folder: Folder) -> None:
    backbone = open_backbone(backbone_folder("bert"))
    prompts = [
        PromptConfig(length=3),
        PromptConfig(length=9, shift_positions=False),
        PromptConfig(length=6, reparameterization="mlp", mlp_hidden=8),
    ]
    model = tiny_model(backbone, *prompts, classes=(2, 3, 5))
    slots = [2, 0, NO_SLOT, 1]
    ids, mask = padded(ROWS)
    with torch.no_grad():
        mixed = model.mixed(ids, mask, slots=torch.tensor(slots))
        for row, slot, got in zip(ROWS, slots, mixed, strict=True):
            alone, real = padded([row])
            if slot == NO_SLOT:
                wanted = model.encode(alone, real, slots=NO_SLOT).hidden[0]
                got = got[: len(row)]
            else:
                wanted = model(alone, real, slot=slot)[0]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_prompted_other_rows_and_wider_padding_change_no_logit(backbone_folder: Folder) -> None:
    model = tiny_model(open_backbone(backbone_folder("bert")), PromptConfig(length=4))
    with torch.no_grad():
        together = model(*padded(ROWS))
        wider = model(*padded(ROWS, width=20))
        reversed_rows = model(*padded(ROWS[::-1]))
    torch.testing.assert_close(together, wider, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, reversed_rows.flip(0), atol=1e-5, rtol=1e-5)


def test_prompted_long_row_beside_long_prompt_stays_within_positions(
    backbone_folder: Folder,
) -> None:
    model = tiny_model(
        open_backbone(backbone_folder("bert")), PromptConfig(length=58), PromptConfig(length=2)
    )
    short, long = [2, 7, 3], [2, *range(5, 45), 3]
    ids, mask = padded([short, long])
    with torch.no_grad():
        mixed = model.mixed(ids, mask, slots=torch.tensor([0, 1]))
        wanted = model(*padded([short]), slot=0)[0]
    torch.testing.assert_close(mixed[0], wanted, atol=1e-5, rtol=1e-5)


def test_prompted_gives_different_answers_for_different_slots(backbone_folder: Folder) -> None:
    model = tiny_model(
        open_backbone(backbone_folder("bert")), PromptConfig(length=4), PromptConfig(length=4)
    )
    ids, mask = padded(ROWS)
    with torch.no_grad():
        first = model.encode(ids, mask, slots=0).hidden
        second = model.encode(ids, mask, slots=1).hidden
    assert (first - second).abs().max() > 1e-2


def test_prompted_trains_prompts_and_heads_alone(backbone_folder: Folder) -> None:
    model = tiny_model(open_backbone(backbone_folder("bert")), PromptConfig(length=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"bank.slots.0.weight", "heads.0.linear.weight", "heads.0.linear.bias"}
    assert trained == {name for name, _ in model.trainable()}
    assert not is_trainable_name("backbone.model.embeddings.word_embeddings.weight")


@pytest.mark.parametrize(("length", "classes"), [(1, 2), (7, 5)])
def test_prompted_parameter_count_is_its_formula(
    backbone_folder: Folder, length: int, classes: int
) -> None:
    backbone = open_backbone(backbone_folder("bert"))
    model = tiny_model(backbone, PromptConfig(length=length), classes=(classes,))
    layers, heads, size, hidden = 3, 4, 8, 32
    count = sum(parameter.numel() for _, parameter in model.trainable())
    assert count == 2 * layers * length * heads * size + classes * hidden + classes


def test_prompted_flatten_of_mlp_gives_equal_logits(backbone_folder: Folder) -> None:
    backbone = open_backbone(backbone_folder("bert"))
    config = PromptConfig(length=6, reparameterization="mlp", mlp_hidden=16)
    model = tiny_model(backbone, config)
    flat = tiny_model(backbone, PromptConfig(length=6))
    flat.heads = model.heads
    with torch.no_grad():
        flat.bank.slots[0].weight.copy_(model.bank.flatten(0))
        ids, mask = padded(ROWS)
        assert torch.equal(model(ids, mask), flat(ids, mask))


def test_prompted_dropout_leaves_what_it_is_told_to_leave(backbone_folder: Folder) -> None:
    model = tiny_model(open_backbone(backbone_folder("bert")), PromptConfig(length=6))
    ids, mask = padded(ROWS)
    prompt_keep = (
        torch.rand(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    ) * 2.0
    head_keep = (torch.rand(4, 32, generator=torch.Generator().manual_seed(2)) > 0.5) * 2.0
    dropped = tiny_model(model.backbone, PromptConfig(length=6))
    with torch.no_grad():
        part = Part(
            slot=0, input_ids=ids, token_mask=mask, prompt_keep=prompt_keep, head_keep=head_keep
        )
        (got,) = model.answer([part])
        dropped.bank.slots[0].weight.mul_(prompt_keep)
        states = dropped.encode(ids, mask).hidden[:, 0] * head_keep
        wanted = states @ model.heads[0].linear.weight.T + model.heads[0].linear.bias
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-6)


def test_prompted_backbone_drops_out_only_where_told(backbone_folder: Folder) -> None:
    model = tiny_model(open_backbone(backbone_folder("bert")), PromptConfig(length=6))
    ids, mask = padded(ROWS)
    model.train()
    with torch.no_grad():
        plain = model(ids, mask)
        assert torch.equal(plain, model(ids, mask))
        with model.backbone.dropout(3):
            first = model(ids, mask)
        with model.backbone.dropout(3):
            again = model(ids, mask)
        with model.backbone.dropout(4):
            other = model(ids, mask)
    assert torch.equal(first, again)
    assert not torch.equal(first, plain)
    assert not torch.equal(first, other)
    assert not any(module.training for module in model.backbone.modules())


def test_prompted_gradient_reaches_every_layer_of_the_prompt(backbone_folder: Folder) -> None:
    model = tiny_model(open_backbone(backbone_folder("bert")), PromptConfig(length=4))
    model(*padded(ROWS)).square().sum().backward()
    gradient = model.bank.slots[0].weight.grad
    # the last layer's prompt reaches the mean over tokens too
    assert (gradient.abs().amax(dim=(2, 3, 4)) > 0).all()
