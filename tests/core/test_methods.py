"""What is trained beside the head: each method against the plain Transformers model.

Letters: B rows, T tokens, P prompt length, H hidden size, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from ptv2_core.data.batching import collate
from ptv2_core.errors import BackboneError, ConfigError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.evaluation.scoring import logits_of_batch
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.packing import PackedLinear, can_pack
from ptv2_core.model.prompted import Part, PromptedModel
from ptv2_core.model.prompts import NO_SLOT, InputPrompt, PromptBank
from ptv2_core.training.learner import Learner
from ptv2_core.training.sources import Source
from ptv2_core.training.start import MAX_FINETUNING_RATE, check_positions, new_slot
from ptv2_core.training.stepping import take_step
from ptv2_core.training.trunk import TrunkCache
from tests.core.training_parts import (
    Bench,
    assert_close,
    assert_equal,
    backward,
    epoch_rows,
    learner_of,
    of_method,
    padded,
    save_trained,
    weights,
)
from tests.core.workers import count_runs
from tests.tiny import open_backbone

Folder = Callable[[str], Path]

ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 3], [2, 9, 9, 3]]
# sums of some 100 fp32 numbers in another order
ATOL = 1e-5


def head_of(model: PromptedModel, slot: int = 0) -> nn.Linear:
    """Return a slot's linear layer."""
    linear = model.heads[slot].linear
    assert isinstance(linear, nn.Linear)
    return linear


def plain_model(folder: Path) -> Any:
    """Return the Transformers model itself, with its own attention written out."""
    return AutoModel.from_pretrained(folder, attn_implementation="eager").eval()


# Prompt tuning: word embeddings before the tokens


def behind_prompt(
    plain: Any, prompt: Tensor, ids: Tensor, mask: Tensor, types: Tensor, *, shift: bool
) -> Tensor:
    """Return the plain model's last states `[B, T, H]` of tokens behind `[P, H]` embeddings."""
    rows, length = len(ids), len(prompt)
    words = plain.get_input_embeddings()(ids)
    first = 1 if plain.config.model_type == "roberta" else 0  # after the padding id, which is 0
    tokens = torch.arange(ids.shape[1]) + (length if shift else 0)
    states: Tensor = plain(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), words], dim=1),
        attention_mask=torch.cat([torch.ones(rows, length), mask], dim=1),
        token_type_ids=torch.cat([torch.zeros(rows, length, dtype=torch.long), types], dim=1),
        position_ids=(torch.cat([torch.arange(length), tokens]) + first).expand(rows, -1),
    ).last_hidden_state
    return states[:, length:]


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_methods_prompt_tuning_is_the_plain_model_behind_embeddings(
    backbone_folder: Folder, model_type: str, shift: bool, typed: bool
) -> None:
    bench = Bench(backbone_folder(model_type), rows=(12, 6))
    config = of_method("prompt_tuning", prompt={"length": 5, "shift_positions": shift})
    model = bench.model(config)
    ids, mask = padded(ROWS)
    types = torch.zeros_like(ids)
    if typed and model_type == "bert":  # a RoBERTa has one type alone
        types[:, 2:] = 1
    plain = plain_model(bench.folder)
    prompt = model.bank.flatten(0).requires_grad_()
    assert prompt.shape == (5, 32)
    with torch.no_grad():
        encoded = model.encode(ids, mask, types if typed else None)
    wanted = behind_prompt(plain, prompt, ids, mask, types, shift=shift)
    torch.testing.assert_close(encoded.hidden[mask], wanted[mask], atol=ATOL, rtol=0.0)
    if model_type == "bert":
        pooled = plain.pooler(wanted)
        assert encoded.pooled is not None
        torch.testing.assert_close(encoded.pooled, pooled, atol=ATOL, rtol=0.0)

    # the first token, not the first row of the states
    head = head_of(model)
    logits = wanted[:, 0] @ head.weight.detach().T + head.bias.detach()
    got = model(ids, mask, types if typed else None)
    torch.testing.assert_close(got, logits, atol=ATOL, rtol=0.0)
    target = torch.tensor([0, 2, 1, 1])
    backward(nn.functional.cross_entropy(logits, target))
    backward(nn.functional.cross_entropy(got, target))
    found = model.bank.slots[0].weight.grad
    assert isinstance(found, Tensor)
    assert prompt.grad is not None
    assert prompt.grad.abs().max() > 1e-3
    torch.testing.assert_close(found, prompt.grad, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_methods_prompt_tuning_starts_from_words_of_the_rows(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    config = of_method("prompt_tuning", prompt={"length": 6, "start": "backbone"})
    words = plain_model(bench.folder).get_input_embeddings().weight
    own = words[sorted(set(bench.train.input_ids.tolist()))]
    prompt = bench.model(config).bank.flatten(0)
    assert ((prompt[:, None] == own[None]).all(dim=-1).sum(dim=1) == 1).all()
    other = bench.model(replace(config, seed=1)).bank.flatten(0)
    assert not torch.equal(prompt, other)


@pytest.mark.parametrize("start", ["normal", "backbone"])
def test_methods_prompt_tuning_refuses_words_of_another_width(
    backbone_folder: Folder, start: str
) -> None:
    bench = Bench(backbone_folder("electra"), rows=(12, 6))
    config = of_method("prompt_tuning", prompt={"length": 4, "start": start})
    with pytest.raises(ConfigError, match=r"train\.method: .* expected words of width 32, got 24"):
        bench.model(config)


def test_methods_take_the_positions_that_their_prompt_needs(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("roberta"), rows=(12, 6))
    longest = int(bench.train.lengths.max())
    fitting = 64 - 1 - longest  # one position is lost to the padding id

    def check(method: str, length: int, **prompt: Any) -> None:
        config = of_method(method, prompt={"length": length, **prompt})
        check_positions(bench.backbone, config, [bench.train])

    check("prompt_tuning", fitting)
    with pytest.raises(ConfigError, match=f"expected a length of at most {fitting}"):
        check("prompt_tuning", fitting + 1)
    # an input prompt stands below all layers, whatever `layers` says
    with pytest.raises(ConfigError, match=f"expected a length of at most {fitting}"):
        check("prompt_tuning", fitting + 1, layers=1)
    check("prompt_tuning", 64, shift_positions=False)
    check("probe", 64)
    check("finetune", 64)


def test_methods_restored_input_prompt_is_one(backbone_folder: Folder, tmp_path: Path) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    config = of_method("prompt_tuning", prompt={"length": 4, "layers": 1})
    model = bench.model(config)
    folder = save_trained(tmp_path / "prompt", model, bench, config, max_length=500)
    predictor = Predictor.load(folder, device="cpu", precision="fp32")
    assert isinstance(predictor.model.bank.slots[0], InputPrompt)
    assert predictor.model.bank.shift(0) == 4
    assert predictor.model.bank.first_layer(0) == 0
    assert predictor.model.bank.configs[0] == config.prompt
    # 64 positions, 4 of them the prompt's, and two special tokens leave room for 58 words
    fits, longer = " ".join(["book"] * 58), " ".join(["book"] * 58 + ["rome"] * 40)
    first, second = predictor.logits([{"text": fits}, {"text": longer}])
    assert torch.equal(first, second)


# Fine-tuning: a copy of the backbone


@pytest.mark.parametrize("kind", ["classification", "tagging"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_methods_finetune_has_the_gradients_of_the_plain_model(
    backbone_folder: Folder, model_type: str, kind: str
) -> None:
    bench = Bench(backbone_folder(model_type), kind, rows=(12, 6))
    config = of_method("finetune", batch_size=12)
    model = bench.model(config)
    work = learner_of(bench, model, config).next_work()
    (logits,) = model.answer([work.part])
    loss = work.loss(logits)
    backward(loss)

    plain = plain_model(bench.folder)
    states = plain(
        input_ids=work.batch.input_ids, attention_mask=work.batch.token_mask.long()
    ).last_hidden_state
    head = nn.Linear(32, bench.task.num_outputs)
    head.load_state_dict(head_of(model).state_dict())
    assert work.batch.labels is not None
    if kind == "classification":
        answers, labels = head(states[:, 0]), work.batch.labels
    else:
        is_tagged = work.batch.labels >= 0
        answers, labels = head(states)[is_tagged], work.batch.labels[is_tagged]
    wanted = nn.functional.cross_entropy(answers, labels)
    backward(wanted)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), abs=ATOL)
    torch.testing.assert_close(head_of(model).weight.grad, head.weight.grad, atol=ATOL, rtol=1e-4)
    moved = 0
    own = dict(model.backbone.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (own[name].grad is None) == (parameter.grad is None), name
        if parameter.grad is not None:
            moved += 1
            torch.testing.assert_close(own[name].grad, parameter.grad, atol=ATOL, rtol=1e-4)
    # all but the pooler, which no head reads
    assert moved == len(own) - 2


def test_methods_finetune_changes_its_copy_and_not_the_callers_backbone(
    backbone_folder: Folder,
) -> None:
    bench = Bench(backbone_folder("bert"))
    before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
    config = of_method("finetune")
    model = bench.model(config)
    frozen = bench.model(of_method("probe"))
    batch = collate(bench.train, bench.train.rows_of(torch.arange(9).numpy()))
    with torch.no_grad():
        got, wanted = (logits_of_batch(one, batch) for one in (model, frozen))
    # a product may round otherwise where weights lie otherwise in memory
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0.0)
    list(bench.start(model, config))
    assert_equal(dict(bench.backbone.state_dict()), before)
    assert not bench.backbone.is_tuned
    assert not any(parameter.requires_grad for parameter in bench.backbone.parameters())
    now = dict(model.backbone.state_dict())
    layers = [name for name in before if ".layer." in name]
    assert len(layers) == 3 * 16
    for name in layers:
        assert not torch.equal(now[name], before[name]), name
    trained = [name for name, _ in model.trainable()]
    assert len(trained) == len(before) + 2
    assert not any(name.startswith("bank.") for name in trained)


def test_methods_finetune_keeps_no_states_of_a_backbone_that_changes(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(16, 6))
    config = of_method("finetune")
    cache = TrunkCache(tmp_path, limit_bytes=1 << 30)
    without, wanted = bench.run(config)
    model, reports = bench.run(config, trunk=cache)
    assert reports == wanted
    assert_equal(weights(model), weights(without))
    assert not list(tmp_path.iterdir())


def test_methods_finetune_refuses_a_backbone_that_is_not_in_fp32(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    folder = str(bench.folder)
    wanted = r"fine-tuning needs the weights in fp32, unpacked; load the backbone with precision"
    bench.backbone = load_backbone(folder, precision="bf16", device="cpu", packs=False)
    with pytest.raises(BackboneError, match=wanted):
        bench.model(of_method("finetune"))
    if can_pack():
        bench.backbone = load_backbone(folder, precision="bf16", device="cpu")
        assert any(isinstance(one, PackedLinear) for one in bench.backbone.modules())
        with pytest.raises(BackboneError, match=wanted):
            bench.model(of_method("finetune"))


def test_methods_finetune_refuses_a_prompts_learning_rate(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    bench.model(of_method("finetune", learning_rate=MAX_FINETUNING_RATE))
    with pytest.raises(
        ConfigError, match=r"train\.learning_rate: 0\.003 would .* expected 0\.002 at most"
    ):
        bench.model(of_method("finetune", learning_rate=3e-3))
    # the head may learn as fast as it likes
    bench.model(of_method("finetune", head_learning_rate=0.1))


def test_methods_finetune_computes_bf16_products_of_fp32_weights(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(24, 12))
    config = of_method("finetune")
    exact, wanted = bench.run(config)
    bench.backbone = load_backbone(
        str(bench.folder), precision="bf16", device="cpu", packs=False, tunable=True
    )
    assert bench.backbone.states_dtype == torch.float32
    model = bench.model(config)
    assert model.backbone.states_dtype == torch.bfloat16
    seen: list[torch.dtype] = []
    own: Any = model.backbone.model
    own.encoder.layer[1].output.dense.register_forward_hook(
        lambda module, given, output: seen.append(output.dtype)
    )
    reports = list(bench.start(model, config))
    assert set(seen) == {torch.bfloat16}
    assert {parameter.dtype for _, parameter in model.trainable()} == {torch.float32}
    for got, given in zip(reports, wanted, strict=True):
        assert got.train_loss == pytest.approx(given.train_loss, abs=0.05)
    assert reports[0].train_loss != wanted[0].train_loss


def test_methods_tunable_copy_shares_no_weight_with_the_backbone(backbone_folder: Folder) -> None:
    backbone = open_backbone(backbone_folder("bert"))
    copied = backbone.tunable_copy()
    assert copied.is_tuned
    assert not backbone.is_tuned
    assert copied.spec is backbone.spec
    shared = {p.data_ptr() for p in backbone.parameters()} & {
        p.data_ptr() for p in copied.parameters()
    }
    assert not shared


# Probe: the head alone


@pytest.mark.parametrize("kind", ["classification", "tagging"])
def test_methods_probe_trains_the_head_on_the_bare_backbone(
    backbone_folder: Folder, kind: str
) -> None:
    bench = Bench(backbone_folder("bert"), kind)
    before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
    config = of_method("probe")
    model, _ = bench.run(config)
    assert [name for name, _ in model.trainable()] == [
        "heads.0.linear.weight", "heads.0.linear.bias",
    ]  # fmt: skip
    assert_equal(dict(bench.backbone.state_dict()), before)
    ids, mask = padded(ROWS)
    with torch.no_grad():
        states = plain_model(bench.folder)(input_ids=ids, attention_mask=mask.long())[0]
        wanted = head_of(model)(states[:, 0] if kind == "classification" else states)
        got = model(ids, mask)
    if kind == "tagging":
        got, wanted = got[mask], wanted[mask]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0.0)


def test_methods_probe_reads_cached_states_and_runs_no_layer(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"))
    cache = TrunkCache(tmp_path, limit_bytes=1 << 30)
    config = of_method("probe", head={"dropout": 0.2})
    without, wanted = bench.run(config)
    bench.run(config, trunk=cache)
    runs = [count_runs(bench, layer) for layer in range(3)]
    model, reports = bench.run(config, trunk=cache)
    assert runs == [[], [], []]
    for got, given in zip(epoch_rows(reports), epoch_rows(wanted), strict=True):
        assert got == pytest.approx(given, abs=ATOL)
    assert_close(weights(model), weights(without), atol=1e-4)


def test_methods_probe_and_prompt_answer_in_one_batch_as_alone(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    configs = [of_method("probe"), of_method("ptv2", seed=1), of_method("probe", seed=2)]
    model = PromptedModel(bench.backbone, PromptBank(bench.backbone.spec.shape), [])
    for slot, config in enumerate(configs):
        prompt, head = new_slot(bench.backbone, bench.task, config, bench.train)
        model.put(slot, prompt, config.prompt, head)
    model.eval()
    ids, mask = padded(ROWS)
    slots = [1, 0, 2, NO_SLOT]
    with torch.no_grad():
        mixed = model.mixed(ids, mask, slots=torch.tensor(slots))
        for row, slot, got in zip(ROWS, slots, mixed, strict=True):
            alone, real = padded([row])
            if slot == NO_SLOT:
                wanted, got = model.encode(alone, real, slots=slot).hidden[0], got[: len(row)]
            else:
                wanted = model(alone, real, slot=slot)[0]
            torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0.0)
        # bare slots alone have no prompt to gather at all
        bare = model.mixed(ids, mask, slots=torch.tensor([0, 2, 0, 2]))
        for row, slot, got in zip(ROWS, [0, 2, 0, 2], bare, strict=True):
            wanted = model(*padded([row]), slot=slot)[0]
            torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0.0)
        parts = [Part(slot=slot, input_ids=ids, token_mask=mask) for slot in range(3)]
        for slot, got in enumerate(model.answer(parts)):
            torch.testing.assert_close(got, model(ids, mask, slot=slot), atol=ATOL, rtol=0.0)


def test_methods_probe_takes_a_step_beside_a_prompt(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(16, 6))
    configs = [of_method("probe", epochs=1), of_method("ptv2", epochs=1)]
    model = PromptedModel(bench.backbone, PromptBank(bench.backbone.spec.shape), [])
    learners = []
    for slot, config in enumerate(configs):
        prompt, head = new_slot(bench.backbone, bench.task, config, bench.train)
        model.put(slot, prompt, config.prompt, head)
        source = Source(slot=slot, task=bench.task, train=bench.train, dev=bench.dev)
        learners.append(Learner(model, [source], config=config))
    take_step(model, learners)
    for slot, config in enumerate(configs):
        alone, _ = bench.run(config)
        learners[slot].restore_best()
        assert_close(weights(model, slot), weights(alone), atol=1e-4)
