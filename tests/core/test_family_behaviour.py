"""What holds for every family of backbones beside its states: heads, starts, trainings, checks."""

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertForPreTraining, AutoModel, MPNetForMaskedLM

from ptv2_core.artifact import load_manifest, load_weights, restore_model
from ptv2_core.config import HeadConfig, PromptConfig
from ptv2_core.data.batching import collate
from ptv2_core.errors import BackboneError, ConfigError
from ptv2_core.evaluation.diagnosis import diagnose
from ptv2_core.model import attention
from ptv2_core.model.attention import Captured, PromptBatch
from ptv2_core.model.backbones import families
from ptv2_core.model.backbones.albert import Albert
from ptv2_core.model.backbones.checking import check
from ptv2_core.model.backbones.deberta import Deberta
from ptv2_core.model.backbones.families import FAMILIES, family_of, model_types
from ptv2_core.model.backbones.interface import BertFamily
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.rotary import ModernBert
from ptv2_core.model.heads import read
from ptv2_core.training.prompt_start import new_deep_prompt, quieting_shift
from ptv2_core.training.start import resolve_head
from tests.core.family_parts import CASES, DECODERS
from tests.core.hub_parts import changed
from tests.core.training_parts import Bench, backward, epoch_rows, padded, save_trained, settings
from tests.tiny import MODELS, open_backbone, tiny_model

Folder = Callable[[str], Path]

ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 3], [2, 9, 9, 3]]
every_case = pytest.mark.parametrize("case", CASES)
# which PEFT refuses
REFUSED = ("albert", "distilbert", "mpnet", "modernbert", "deberta", "deberta-v3")


def test_family_cases_cover_the_table() -> None:
    tested = {model_type for model_type, _ in CASES.values()} | set(MODELS)
    assert tested == set(model_types())
    assert {case for case in CASES if family(case).is_causal} == set(DECODERS)


def family(case: str) -> families.Family:
    """Return the family of a case."""
    return family_of(CASES[case][0], name=case)


# Heads


@every_case
def test_family_head_reads_what_sees_all_others(family_folder: Folder, case: str) -> None:
    backbone = open_backbone(family_folder(case))
    reads = "last" if case in DECODERS else "cls"
    assert resolve_head(HeadConfig(), backbone).reads == reads == backbone.spec.reads
    model = tiny_model(backbone, PromptConfig(length=4))
    linear: Any = model.heads[0].linear
    with torch.no_grad():
        encoded = model.encode(*padded(ROWS))
        got = read(encoded, reads)
        for row, state, states in zip(ROWS, got, encoded.hidden, strict=True):
            assert torch.equal(state, states[len(row) - 1 if reads == "last" else 0])
            # padding changes no answer
            alone = model(*padded([row]))[0]
            torch.testing.assert_close(linear(state), alone, atol=1e-4, rtol=1e-4)


def test_family_decoder_head_refuses_the_first_token(family_folder: Folder) -> None:
    backbone = open_backbone(family_folder("gpt2"))
    with pytest.raises(ConfigError, match="is a decoder, whose first token sees no other"):
        resolve_head(HeadConfig(reads="cls"), backbone)


@pytest.mark.parametrize("case", ["albert", "mpnet"])
def test_family_pooler_is_the_backbones_own(family_folder: Folder, case: str) -> None:
    folder = family_folder(case)
    model = tiny_model(open_backbone(folder), PromptConfig(length=4))
    assert model.backbone.spec.has_pooler
    ids, mask = padded(ROWS)
    with torch.no_grad():
        plain = AutoModel.from_pretrained(folder).eval()
        wanted = plain(input_ids=ids, attention_mask=mask.long()).pooler_output
        got = model.encode(ids, mask, slots=-1).pooled
    assert got is not None
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_family_albert_reads_the_pooler_that_its_sentence_head_trained(
    family_folder: Folder, tmp_path: Path
) -> None:
    plain = AlbertForPreTraining.from_pretrained(family_folder("albert"))
    plain.save_pretrained(tmp_path)
    assert open_backbone(tmp_path).spec.reads == "pooler"


def test_family_mpnet_has_a_language_model_for_a_verbalizer(
    family_folder: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(family_folder("mpnet"), tmp_path / "mpnet")
    plain: Any = MPNetForMaskedLM.from_pretrained(folder)
    plain.eval()
    plain.save_pretrained(folder)
    backbone = load_backbone(str(folder), precision="fp32", device="cpu", language_model=True)
    model = tiny_model(backbone, PromptConfig(length=4))
    ids, mask = padded(ROWS)
    at, words = torch.tensor([1, 2, 3, 0]), torch.tensor([7, 12, 30])
    with torch.no_grad():
        wanted = plain(input_ids=ids, attention_mask=mask.long()).logits[torch.arange(4), at]
        masked = model.encode(ids, mask, slots=-1, read_at=at).masked
        assert masked is not None
        assert backbone.language_model is not None
        weight, bias = backbone.language_model.word_rows(words)
    torch.testing.assert_close(masked @ weight.T + bias, wanted[:, words], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["albert", "modernbert", "gpt2"])
def test_family_without_a_known_language_model_refuses_a_verbalizer(
    family_folder: Folder, case: str
) -> None:
    with pytest.raises(BackboneError, match="a verbalizer reads the language model"):
        load_backbone(str(family_folder(case)), device="cpu", language_model=True)


# Precision


@every_case
def test_family_in_bf16_is_near_fp32(family_folder: Folder, case: str) -> None:
    folder = family_folder(case)
    exact = tiny_model(open_backbone(folder), PromptConfig(length=4))
    loaded = load_backbone(str(folder), precision="bf16", device="cpu")
    rough = tiny_model(loaded, PromptConfig(length=4))
    ids, mask = padded(ROWS)
    backward(rough(ids, mask).sum())
    gradient = dict(rough.trainable())["bank.slots.0.weight"].grad
    assert gradient is not None
    assert 0 < gradient.abs().max() < float("inf")
    with torch.no_grad():
        wanted, got = exact.encode(ids, mask).hidden[mask], rough.encode(ids, mask).hidden[mask]
    assert 0 < (got - wanted).norm() / wanted.norm() < 0.1


@pytest.mark.parametrize("case", ["llama", "modernbert"])
def test_family_in_int8_keeps_its_rotary_tables_exact(family_folder: Folder, case: str) -> None:
    folder = str(family_folder(case))
    exact = load_backbone(folder, precision="fp32", device="cpu")
    rounded = load_backbone(folder, precision="int8", device="cpu")
    tables = dict(exact.model.named_buffers())
    assert tables
    for name, buffer in rounded.model.named_buffers():
        assert torch.equal(buffer, tables[name]), name


# Starts


@every_case
def test_family_prompt_starts_from_the_backbones_own_and_quietly(
    family_folder: Folder, case: str
) -> None:
    bench = Bench(family_folder(case), rows=(20, 6))
    config = settings(prompt={"length": 6, "start": "backbone"})
    loud = new_deep_prompt(bench.backbone, config, bench.train)().detach()
    shape = bench.backbone.spec.shape
    assert loud.shape == (shape.num_layers, 2, shape.num_heads, 6, shape.head_size)
    quiet_config = settings(prompt={"length": 6, "start": "backbone", "start_attention": 0.01})
    quiet = new_deep_prompt(bench.backbone, quiet_config, bench.train)().detach()
    assert torch.equal(quiet[:, 1], loud[:, 1])
    assert quiet.isfinite().all()
    assert (quiet[:, 0] - loud[:, 0]).abs().max() > 0.1


def captured_of(query: Tensor, key: Tensor, bias: Tensor | None) -> Captured:
    return Captured(layer=0, query=query, key=key, value=key, scaling=0.5, bias=bias)


def drawn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_family_quiet_start_brings_heads_that_share_keys_together() -> None:
    # one row of 40 tokens, two heads of queries for one of keys, each sees those before it
    query, key, prompt = (
        drawn(1, 2, 40, 8, seed=1),
        drawn(1, 1, 40, 8, seed=2),
        drawn(1, 3, 8, seed=3),
    )
    query = query + 2.0 * drawn(8, seed=4)
    bias = torch.full((40, 40), float("-inf")).triu(1)[None, None]
    real = torch.ones(1, 40, dtype=torch.bool)
    shift = quieting_shift(prompt, captured_of(query, key, bias), real, share=0.05)
    asked = query[0].double().numpy()
    wanted = []
    for head in asked:
        odds = []
        for place, one in enumerate(head):
            seen = key[0, 0, : place + 1].double().numpy() @ one * 0.5
            of_prompt = prompt[0].double().numpy() @ one * 0.5
            odds.append(np.logaddexp.reduce(of_prompt) - np.logaddexp.reduce(seen))
        wanted.append(np.full(40, (np.log(0.05 / 0.95) - np.mean(odds)) / 0.5))
    by_hand, *_ = np.linalg.lstsq(asked.reshape(80, 8), np.concatenate(wanted), rcond=None)
    assert shift[0].numpy() == pytest.approx(by_hand, abs=1e-2)


@every_case
def test_family_diagnosis_finds_the_attention_that_a_prompt_gets(
    family_folder: Folder, case: str
) -> None:
    bench = Bench(family_folder(case), rows=(20, 6))
    model = bench.model(settings(prompt={"length": 4}))
    figures = diagnose(model, bench.dev, slot=0, rows=6, token_budget=10_000)
    batch = collate(bench.dev, np.arange(6))
    prompt = model.bank.flatten(0)
    captured: list[Captured] = []
    with torch.no_grad():
        model.encode(batch.input_ids, batch.token_mask, captured=captured)
    reads = model.heads[0].reads
    for layer, one in zip(figures, captured, strict=True):
        query, key = one.query.double() * one.scaling, one.key.double()
        group = query.shape[1] // key.shape[1]
        shares = torch.zeros(key.shape[1], dtype=torch.float64)
        count = 0
        for row, length in enumerate(batch.token_mask.sum(dim=1).tolist()):
            places = range(length)
            if layer.layer == len(figures) - 1:
                places = range(length - 1, length) if reads == "last" else range(1)
            count += len(places)
            for place in places:
                for head in range(query.shape[1]):
                    asked = query[row, head, place]
                    own = key[row, head // group, :length] @ asked
                    if one.bias is not None:
                        bias = one.bias.expand(6, query.shape[1], len(batch.token_mask[0]), -1)
                        own = own + bias[row, head, place, :length]
                    of_prompt = prompt[layer.layer, 0, head // group].double() @ asked
                    both = torch.cat([of_prompt, own]).softmax(0)
                    shares[head // group] += both[:4].sum() / group
        assert layer.head_attention == pytest.approx((shares / count).tolist(), abs=1e-4)


# Trainings


@every_case
def test_family_trains_and_its_artifact_survives_a_round_trip(
    family_folder: Folder, tmp_path: Path, case: str
) -> None:
    bench = Bench(family_folder(case))
    prompt = {"length": 4, "start": "backbone", "start_attention": 0.01}
    config = settings(prompt=prompt, epochs=3, learning_rate=2e-2)
    before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
    model, reports = bench.run(config)
    losses = [train_loss for train_loss, _, _ in epoch_rows(reports)]
    assert losses[-1] < losses[0] * 0.9
    after = bench.backbone.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    save_trained(tmp_path / "prompt", model.eval(), bench, config)
    manifest = load_manifest(tmp_path / "prompt")
    weights = load_weights(tmp_path / "prompt", manifest)
    again = restore_model(
        open_backbone(bench.folder), [(manifest.task, manifest.prompt, manifest.head, weights)]
    )
    with torch.no_grad():
        assert torch.equal(again(*padded(ROWS)), model(*padded(ROWS)))


@pytest.mark.parametrize("case", REFUSED)
def test_family_that_peft_refuses_learns(family_folder: Folder, case: str) -> None:
    bench = Bench(family_folder(case), rows=(120, 48))
    prompt = {"length": 6, "layers": 2, "start": "backbone"}
    _, reports = bench.run(settings(prompt=prompt, epochs=10, learning_rate=5e-2))
    rows = epoch_rows(reports)
    assert rows[-1][0] < rows[0][0] * 0.75
    assert max(score for _, _, score in rows) > 0.6  # of three labels


@pytest.mark.parametrize("kind", ["tagging", "regression", "multiple_choice", "qa"])
@pytest.mark.parametrize("case", ["albert", "mpnet", "modernbert", "llama"])
def test_family_learns_other_kinds_of_task(family_folder: Folder, case: str, kind: str) -> None:
    bench = Bench(family_folder(case), kind)
    _, reports = bench.run(settings(epochs=4, learning_rate=2e-2))
    rows = epoch_rows(reports)
    assert rows[-1][0] < rows[0][0] * 0.98


@pytest.mark.parametrize(
    ("case", "table"),
    [("mpnet", "relative_attention_bias"), ("deberta", "rel_embeddings"), ("qwen3", "q_norm")],
)
def test_family_fine_tuning_reaches_what_attention_adds(
    family_folder: Folder, case: str, table: str
) -> None:
    folder = family_folder(case)
    model = tiny_model(open_backbone(folder).tunable_copy(), PromptConfig(length=2))
    plain: nn.Module = AutoModel.from_pretrained(folder).eval()
    ids, mask = padded(ROWS)
    weighing = drawn(ids.shape[1], 32, seed=1) * mask[:, :, None]
    backward((model.encode(ids, mask, slots=-1).hidden * weighing).sum())
    backward((plain(input_ids=ids, attention_mask=mask.long()).last_hidden_state * weighing).sum())
    got, wanted = dict(model.backbone.model.named_parameters()), dict(plain.named_parameters())
    tables = [name for name in wanted if table in name]
    assert tables
    for name, parameter in wanted.items():
        if parameter.grad is None:
            continue
        given = got[name].grad
        assert given is not None, name
        torch.testing.assert_close(given, parameter.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("case", [*CASES, *MODELS])
def test_family_fine_tunes_in_bf16_as_in_fp32(
    family_folder: Folder, backbone_folder: Folder, case: str
) -> None:
    folder = family_folder(case) if case in CASES else backbone_folder(case)
    ids, mask = padded(ROWS)
    weighing = drawn(ids.shape[1], 32, seed=1) * mask[:, :, None]
    found = []
    for precision in ("fp32", "bf16"):
        backbone = load_backbone(
            str(folder), precision=precision, device="cpu", packs=False, tunable=True
        )
        model = tiny_model(backbone.tunable_copy(), PromptConfig(length=4))
        assert model.backbone.number_format == {"fp32": "float32", "bf16": "bfloat16"}[precision]
        slots = torch.tensor([0, -1, 0, -1])
        backward((model.encode(ids, mask, slots=slots).hidden * weighing).sum())
        trained = dict(model.trainable())
        gradients = {name: one.grad for name, one in trained.items() if one.grad is not None}
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        found.append(gradients)
    exact, rough = found
    assert exact.keys() == rough.keys()
    assert "bank.slots.0.weight" in exact
    flat = [torch.cat([one[name].flatten() for name in exact]) for one in (exact, rough)]
    assert 0 < (flat[1] - flat[0]).norm() / flat[0].norm() < 0.1


# What is refused, and the check at load


def test_family_that_is_unknown_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        BackboneError, match=r"'t5'.*expected one of albert, bert, camembert, "
    ) as e:
        family_of("t5", name="mine")
    assert all(name in str(e.value) for name in model_types())


def test_family_deberta_that_mixes_heads_is_refused(family_folder: Folder) -> None:
    plain = AutoModel.from_pretrained(family_folder("deberta"))
    plain.config.talking_head = True
    with pytest.raises(BackboneError, match="talking_head"):
        Deberta(plain, is_first=True)


@pytest.mark.parametrize("version", ["5.16.3", "5.99.0", "6.0.0.dev0"])
def test_family_warns_once_of_a_transformers_that_was_not_tested(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    families._warn_of_version.cache_clear()
    with pytest.warns(UserWarning, match=f"Transformers {version} was not tested"):
        family_of("bert", name="mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family_of("bert", name="mine")
    families._warn_of_version.cache_clear()


def test_family_check_is_quick() -> None:
    backbone = load_backbone("all-minilm-l6-v2", device="cpu")
    times = []
    for _ in range(5):
        start = time.perf_counter()
        check(backbone)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.1


def loses_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a layer forget what it is told of prompts."""
    layer = Albert.layer

    def forgetful(self: Albert, index: int, hidden: Tensor, prompts: Any, shared: Any) -> Tensor:
        count = len(prompts.layers)
        bare = PromptBatch(layers=[None] * count, masks=[None] * count, captured=prompts.captured)
        return layer(self, index, hidden, bare, shared)

    monkeypatch.setattr(Albert, "layer", forgetful)


def leaves_a_layer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the lowest layer do nothing."""
    layer = Albert.layer

    def lazy(self: Albert, index: int, hidden: Tensor, *rest: Any) -> Tensor:
        return layer(self, index, hidden, *rest) if index else hidden

    monkeypatch.setattr(Albert, "layer", lazy)


def shows_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every row see every prompt."""
    made = attention.additive_mask

    def blind(token_mask: Tensor, prompt_mask: Any, *rest: Any) -> Tensor | None:
        return made(token_mask, None, *rest)

    monkeypatch.setattr(attention, "additive_mask", blind)


def scales_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make attention forget its factor where there is a prompt."""
    weights = attention._weights

    def unscaled(query: Tensor, key: Tensor, mask: Any, scaling: float) -> Tensor:
        return weights(query, key, mask, scaling if query.shape[2] == key.shape[2] else 1.0)

    monkeypatch.setattr(attention, "_weights", unscaled)


def moves_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make embeddings stand one place too far."""
    embed = Albert.embed

    def moved(
        self: Albert, ids: Tensor, types: Any, positions: Tensor, inputs: Any = None
    ) -> Tensor:
        return embed(self, ids, types, positions + 1, inputs)

    monkeypatch.setattr(Albert, "embed", moved)


def has_no_such_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a module by a name that it no longer has."""

    def renamed(self: Albert, *_: Any) -> Tensor:
        found: Tensor = self._model.encoder.renamed
        return found

    monkeypatch.setattr(Albert, "layer", renamed)


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (loses_prompts, "a prompt changes nothing"),
        (leaves_a_layer_out, "expected attention of 3 layers in turn, got 2 calls"),
        (shows_every_prompt, "the prompt of one row changes another row"),
        (scales_wrongly, "attention is not the softmax over prompt and tokens"),
        (moves_tokens, "its states are not those that Transformers computes"),
        (has_no_such_layer, "a forward ended with AttributeError"),
    ],
)
def test_family_check_turns_a_silent_break_into_an_error(
    family_folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    breaks: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    folder = family_folder("albert")
    breaks(monkeypatch)
    with pytest.raises(BackboneError, match=f"deep prompts do not work in .*{message}"):
        open_backbone(folder)


def takes_another_for_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the last layer compute another token than the first alone."""
    own = BertFamily.first_token_layer

    def moved(self: BertFamily, index: int, hidden: Tensor, *rest: Any) -> Tensor:
        return own(self, index, hidden.roll(1, dims=1), *rest)

    monkeypatch.setattr(BertFamily, "first_token_layer", moved)


def forgets_a_residual_of_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the first token alone, and it alone, come out scaled."""
    own = BertFamily.first_token_layer

    def scaled(self: BertFamily, *given: Any) -> Tensor:
        return own(self, *given) * 1.2

    monkeypatch.setattr(BertFamily, "first_token_layer", scaled)


def forgets_the_prompt_of_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the first token alone see no prompt."""
    own = BertFamily.first_token_layer

    def bare(self: BertFamily, index: int, hidden: Tensor, prompts: Any, shared: Any) -> Tensor:
        count = len(prompts.layers)
        none = PromptBatch(layers=[None] * count, masks=[None] * count, captured=prompts.captured)
        return own(self, index, hidden, none, shared)

    monkeypatch.setattr(BertFamily, "first_token_layer", bare)


def scales_the_highest_layer_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make one layer alone forget its factor where there is a prompt."""
    layer, right = Albert.layer, attention._weights

    def wrong(query: Tensor, key: Tensor, mask: Any, scaling: float) -> Tensor:
        return right(query, key, mask, scaling if query.shape[2] == key.shape[2] else 1.0)

    def either(self: Albert, index: int, *rest: Any) -> Tensor:
        monkeypatch.setattr(attention, "_weights", wrong if index == 2 else right)
        return layer(self, index, *rest)

    monkeypatch.setattr(Albert, "layer", either)


def sees_one_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make windows end one token later."""
    init = ModernBert.__init__

    def wider(self: ModernBert, model: Any) -> None:
        init(self, model)
        self.sights = [
            one if one.window is None else replace(one, window=one.window + 1)
            for one in self.sights
        ]

    monkeypatch.setattr(ModernBert, "__init__", wider)


@pytest.mark.parametrize(
    ("case", "breaks", "message"),
    [
        ("bert", takes_another_for_the_first_token, "the first token alone other states"),
        ("electra", forgets_a_residual_of_the_first_token, "the first token alone other states"),
        ("roberta", forgets_the_prompt_of_the_first_token, "attention is not the softmax"),
        ("albert", scales_the_highest_layer_wrongly, "attention is not the softmax"),
        ("modernbert", sees_one_further, "its states are not those that Transformers computes"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_family_check_sees_into_every_layer_and_past_windows(
    family_folder: Folder,
    backbone_folder: Folder,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
    case: str,
    breaks: Callable[[pytest.MonkeyPatch], None],
    message: str,
) -> None:
    folder = family_folder(case) if case in CASES else backbone_folder(case)
    breaks(monkeypatch)
    with pytest.raises(BackboneError, match=f"deep prompts do not work in .*{message}"):
        load_backbone(str(folder), precision=precision, device="cpu")


@pytest.mark.parametrize("window", [8, 64])
def test_family_check_passes_windows_as_wide_as_published_ones(
    family_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    folder = shutil.copytree(family_folder("modernbert"), tmp_path / "modernbert")
    changed(folder / "config.json", local_attention=2 * window, max_position_embeddings=512)
    assert open_backbone(folder).window == window
    sees_one_further(monkeypatch)
    with pytest.raises(BackboneError, match="its states are not those that Transformers computes"):
        open_backbone(folder)


@pytest.mark.parametrize(
    ("version", "advice", "other"),
    [
        ("5.16.3", "install one of them", "config.json"),
        ("5.17.0", "special in this one's config.json", "install"),
        ("5.99.0", "install one of them", "config.json"),
    ],
)
def test_family_check_advises_another_version_where_this_one_was_not_tested(
    family_folder: Folder, monkeypatch: pytest.MonkeyPatch, version: str, advice: str, other: str
) -> None:
    loses_prompts(monkeypatch)
    monkeypatch.setattr("transformers.__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackboneError) as caught:
            open_backbone(family_folder("albert"))
    families._warn_of_version.cache_clear()
    said = str(caught.value)
    assert advice in said
    assert other not in said


def test_family_whose_frequencies_depend_on_the_longest_row_is_refused(
    family_folder: Folder, tmp_path: Path
) -> None:
    folder = shutil.copytree(family_folder("llama"), tmp_path / "llama")
    rotary: dict[str, Any] = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 2.0,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    original = "original_max_position_embeddings"
    changed(folder / "config.json", rope_parameters=rotary | {original: 32})
    with pytest.raises(BackboneError, match=r"longer than 32 tokens \(rope_type longrope.*\(64\)"):
        open_backbone(folder)
    changed(folder / "config.json", rope_parameters=rotary | {original: 64})
    open_backbone(folder)


def test_family_table_says_what_each_supports() -> None:
    names = [one.name for one in FAMILIES]
    assert len(set(names)) == len(names)
    trims = {one.name for one in FAMILIES if one.trims_last_layer}
    assert trims == {"BERT", "RoBERTa", "ELECTRA"}
    for one in FAMILIES:
        own = one.make_layers is BertFamily
        assert one.trims_last_layer == own, one.name
    verbalizers = {one.name for one in FAMILIES if one.has_verbalizer}
    assert verbalizers == {"BERT", "RoBERTa", "MPNet"}
