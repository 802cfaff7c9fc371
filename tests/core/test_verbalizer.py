"""The verbalizer: a head that starts as the language model's own answer at the mask.

Letters: B rows, H hidden size, C classes, V words.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerFast

from ptv2_core.artifact import load_manifest
from ptv2_core.config import HeadConfig, TrainConfig
from ptv2_core.data.batching import Batch, collate
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import BackboneError, ConfigError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.evaluation.scoring import logits_of_batch
from ptv2_core.model.backbones.language import MaskedLanguageModel
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.prompted import Part, PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.probe import probe
from ptv2_core.training.start import Start, new_slot, resolve_head
from ptv2_core.training.trunk import TrunkCache
from tests.core.training_parts import Bench, epoch_rows, save_trained, settings
from tests.core.workers import count_runs
from tests.tiny import WORDS, encode_for, examples_of, tiny_backbone, tiny_language_model

# the words are others than the labels, and in another order than the vocabulary's
LABEL_WORDS = {"alarm": "noon", "flight": "taxi", "song": "play"}
TEMPLATE = "please {text} at {mask} ."
HEAD: dict[str, Any] = {"type": "verbalizer", "label_words": LABEL_WORDS}
ATOL = 1e-5

Folder = Callable[[str], Path]


def word_id(word: str) -> int:
    """Return a word's id in the tiny vocabulary, after five special tokens."""
    return 5 + WORDS.index(word)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function from a model type to the folder of its tiny language model."""
    made: dict[str, Path] = {}

    def folder(model_type: str = "bert") -> Path:
        if model_type not in made:
            made[model_type] = tiny_language_model(
                tmp_path_factory.mktemp(f"words-{model_type}"), model_type
            )
        return made[model_type]

    return folder


class WordBench(Bench):
    """A bench whose rows fill a template, on a backbone with its language model."""

    def __init__(self, folder: Path, *, rows: tuple[int, int] = (40, 12), **load: Any) -> None:
        """Draw and encode the rows."""
        super().__init__(folder, rows=rows)
        self.task: TaskSpec = replace(self.task, template=TEMPLATE)
        self.train, self.dev = (
            encode_for(folder, examples_of("classification", count, seed=count), self.task)
            for count in rows
        )
        self.backbone = load_backbone(
            str(folder), **{"precision": "fp32", "device": "cpu", "language_model": True, **load}
        )

    def batch(self, count: int = 8) -> Batch:
        """Return some rows of dev."""
        return collate(self.dev, torch.arange(count).numpy())


def of_words(**changes: Any) -> TrainConfig:
    """Return quick settings with a verbalizer."""
    return settings(**{"head": HEAD, **changes})


def words_at_mask(folder: Path, batch: Batch) -> Tensor:
    """Return what the plain language model gives the label words at the mask, `[B, C]`."""
    plain = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = plain(input_ids=batch.input_ids, attention_mask=batch.token_mask.long()).logits
    rows, places = (batch.input_ids == 4).nonzero().unbind(dim=1)  # [MASK]
    assert rows.tolist() == list(range(len(batch.input_ids)))
    ids = [word_id(word) for word in LABEL_WORDS.values()]
    return logits[rows, places][:, ids]  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["probe", "finetune"])
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_verbalizer_starts_as_the_language_models_own_answer(
    model_folder: Folder, model_type: str, method: str
) -> None:
    bench = WordBench(model_folder(model_type))
    model = bench.model(of_words(method=method, learning_rate=1e-3))
    batch = bench.batch()
    wanted = words_at_mask(bench.folder, batch)
    with torch.no_grad():
        got = logits_of_batch(model, batch)
    assert wanted.std() > 0.1
    torch.testing.assert_close(got, wanted, atol=ATOL, rtol=0.0)
    # whoever else is in the batch, and however wide it is
    for place in range(3):
        with torch.no_grad():
            alone = logits_of_batch(model, collate(bench.dev, torch.tensor([place]).numpy()))
        torch.testing.assert_close(alone[0], wanted[place], atol=ATOL, rtol=0.0)


def test_verbalizer_in_bf16_answers_nearly_alike(model_folder: Folder) -> None:
    exact = WordBench(model_folder("bert"))
    batch = exact.batch()
    wanted = words_at_mask(exact.folder, batch)
    for tunable in (False, True):
        bench = WordBench(exact.folder, precision="bf16", tunable=tunable, packs=not tunable)
        config = of_words(method="finetune" if tunable else "probe", learning_rate=1e-3)
        model, reports = bench.run(config)
        assert all(report.train_loss < 10.0 for report in reports)
        with torch.no_grad():
            got = logits_of_batch(bench.model(config), batch)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.02)
        assert model.heads[0].linear.weight.dtype == torch.float32  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["ptv2", "prompt_tuning", "finetune", "probe"])
def test_verbalizer_learns_and_comes_back_from_its_artifact(
    model_folder: Folder, tmp_path: Path, method: str
) -> None:
    bench = WordBench(model_folder("bert"))
    rate = 1e-3 if method == "finetune" else 3e-2
    config = of_words(method=method, learning_rate=rate, epochs=5)
    model, reports = bench.run(config)
    losses = [epoch.train_loss for epoch in reports[-1].history]
    assert losses[-1] < 0.9 * losses[0]
    language_model: Any = bench.backbone.language_model
    for part in (language_model._transform, language_model._words):
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())

    folder = save_trained(tmp_path / "prompt", model, bench, config)
    manifest = load_manifest(folder)
    assert manifest.head == HeadConfig(type="verbalizer", reads="mask", label_words=LABEL_WORDS)
    assert manifest.task.template == TEMPLATE
    predictor = Predictor.load(folder, device="cpu", precision="fp32")
    texts = [example.text for example in examples_of("classification", 12, seed=12)]  # type: ignore[union-attr]
    model.eval()
    with torch.no_grad():
        wanted = logits_of_batch(model, bench.batch(12))
    for got, given in zip(predictor.logits([{"text": t} for t in texts]), wanted, strict=True):
        torch.testing.assert_close(got, given, atol=ATOL, rtol=0.0)


def test_verbalizer_reads_cached_states_at_the_mask(model_folder: Folder, tmp_path: Path) -> None:
    bench = WordBench(model_folder("bert"))
    cache = TrunkCache(tmp_path, limit_bytes=1 << 30)
    config = of_words(method="probe")
    _, wanted = bench.run(config)
    bench.run(config, trunk=cache)
    runs = count_runs(bench, 2)
    _, reports = bench.run(config, trunk=cache)
    assert not runs
    for got, given in zip(epoch_rows(reports), epoch_rows(wanted), strict=True):
        assert got == pytest.approx(given, abs=ATOL)


def test_verbalizer_beside_a_linear_head_answers_as_alone(model_folder: Folder) -> None:
    bench = WordBench(model_folder("bert"))
    configs = [of_words(), settings(seed=1), of_words(method="probe")]
    model = PromptedModel(bench.backbone, PromptBank(bench.backbone.spec.shape), [])
    for slot, config in enumerate(configs):
        prompt, head = new_slot(bench.backbone, bench.task, config, bench.train)
        model.put(slot, prompt, config.prompt, head)
    model.eval()
    batch = bench.batch()
    with torch.no_grad():
        wanted = [logits_of_batch(model, batch, slot=slot) for slot in range(3)]
        slots = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
        mixed = model.mixed(batch.input_ids, batch.token_mask, slots=slots, read_at=batch.read_at)
        for row, got in enumerate(mixed):
            torch.testing.assert_close(got, wanted[slots[row]][row], atol=ATOL, rtol=0.0)
        parts = [
            Part(
                slot=slot, input_ids=batch.input_ids, token_mask=batch.token_mask,
                read_at=None if slot == 1 else batch.read_at,
            )
            for slot in range(3)
        ]  # fmt: skip
        for got, given in zip(model.answer(parts), wanted, strict=True):
            torch.testing.assert_close(got, given, atol=ATOL, rtol=0.0)


def test_verbalizers_template_may_be_read_by_a_linear_head(backbone_folder: Folder) -> None:
    # the same prepared rows, for a comparison of heads; the backbone has no language model
    bench = WordBench(backbone_folder("bert"), language_model=False)
    assert bench.backbone.language_model is None
    _, reports = bench.run(settings(epochs=1))
    assert reports[-1].evaluation is not None
    bare = PromptedModel(bench.backbone, PromptBank(bench.backbone.spec.shape), [])
    splits = [bench.train, bench.dev, bench.dev]
    probe(bare, task=bench.task, splits=splits, reads="cls", token_budget=4096)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
    ],
)
def test_verbalizer_takes_the_piece_of_a_word_inside_a_sentence(pre_tokenizer: Any) -> None:
    space = "\u0120" if isinstance(pre_tokenizer, pre_tokenizers.ByteLevel) else "\u2581"
    vocabulary = {"<unk>": 0, "o": 1, "k": 2, "ok": 3, space: 4, f"{space}ok": 5}
    merges = [("o", "k"), (space, "ok")]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizer
    wrap: Any = PreTrainedTokenizerFast
    tokenizer = wrap(tokenizer_object=made, unk_token="<unk>")
    language_model = MaskedLanguageModel(nn.Identity(), nn.Linear(2, 6), tokenizer)
    for word in ("ok", " ok", "ok "):
        assert language_model.pieces(word) == [5]
    assert language_model.pieces("okok") == [5, 3]
    assert language_model.pieces("okx") == []


# Refusals


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {**LABEL_WORDS, "flight": "flights"},
            r"label_words\.flight: expected a word that is one piece .* got 'flights', which it "
            r"knows as 2",
        ),
        ({**LABEL_WORDS, "song": "zebra"}, r"label_words\.song: .* got 'zebra', .* knows as 0"),
        ({**LABEL_WORDS, "song": "play zebra"}, r"got 'play zebra', which it knows as 0"),
        (
            {"alarm": "noon", "song": "play"},
            r"label_words: expected a word for each of alarm, flight, song; got words for alarm, "
            r"song",
        ),
        (
            {**LABEL_WORDS, "other": "rome"},
            r"label_words: expected a word for each of alarm, flight, song; got words for alarm, "
            r"flight, song, other",
        ),
        ({**LABEL_WORDS, "flight": "noon"}, r"label_words: expected a different word for each"),
        ({**LABEL_WORDS, "flight": " Noon"}, r"label_words: expected a different word for each"),
        (None, r"label_words: a verbalizer needs a word for each label"),
    ],
    ids=["two-pieces", "unknown", "half-unknown", "missing", "extra", "twice", "alike", "none"],
)
def test_verbalizer_refuses_words_that_are_no_answers(
    model_folder: Folder, words: dict[str, str] | None, message: str
) -> None:
    bench = WordBench(model_folder("bert"), rows=(12, 8))
    with pytest.raises(ConfigError, match=message):
        bench.model(of_words(head={"type": "verbalizer", "label_words": words}))


def test_verbalizer_refuses_a_task_without_a_mask(model_folder: Folder) -> None:
    bench = WordBench(model_folder("bert"), rows=(12, 8))
    wanted = r'a verbalizer answers whole texts at the mask of a template; .* "\{text\} It was '
    for template in (None, "please {text}"):
        bench.task = replace(bench.task, template=template)
        with pytest.raises(ConfigError, match=wanted):
            bench.model(of_words())
    tagging = Bench(bench.folder, "tagging", rows=(12, 8))
    tagging.backbone = bench.backbone
    with pytest.raises(ConfigError, match=wanted):
        tagging.model(of_words())


@pytest.mark.parametrize("reads", ["cls", "pooler", "mean"])
def test_verbalizer_refuses_to_read_another_token(model_folder: Folder, reads: str) -> None:
    bench = WordBench(model_folder("bert"), rows=(12, 8))
    with pytest.raises(ConfigError, match=rf"expected auto or mask, got {reads}"):
        bench.model(of_words(head={**HEAD, "reads": reads}))
    assert resolve_head(of_words().head, bench.backbone).reads == "mask"


def test_verbalizers_settings_are_refused_for_a_linear_head(model_folder: Folder) -> None:
    bench = WordBench(model_folder("bert"), rows=(12, 8))
    with pytest.raises(ConfigError, match=r"label_words: only a verbalizer reads them"):
        bench.model(settings(head={"label_words": LABEL_WORDS}))
    with pytest.raises(ConfigError, match=r"reads: only a verbalizer reads the mask token"):
        bench.model(settings(head={"reads": "mask"}))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_verbalizer_refuses_a_backbone_without_its_language_model(
    tmp_path: Path, model_type: str
) -> None:
    folder = tiny_backbone(tmp_path / model_type, model_type)
    with pytest.raises(
        BackboneError,
        match=r"train\.head\.type: a verbalizer reads .* hold none \(.*\); expected linear, or a",
    ):
        load_backbone(str(folder), precision="fp32", device="cpu", language_model=True)


def test_verbalizer_starts_at_its_words_where_an_earlier_head_does_not_fit(
    model_folder: Folder,
) -> None:
    bench = WordBench(model_folder("bert"), rows=(12, 8))
    config = of_words()
    prompt = bench.model(config).bank.flatten(0)

    def linear_of(head: tuple[Tensor, Tensor] | None) -> Any:
        start = Start(prompt=prompt, digest="", head=head)
        _, made = new_slot(bench.backbone, bench.task, config, bench.train, start=start)
        return made.linear

    words = linear_of(None)
    language_model: Any = bench.backbone.language_model
    ids = [word_id(word) for word in LABEL_WORDS.values()]
    assert torch.equal(words.weight, language_model._words.weight[ids])
    assert torch.equal(words.bias, language_model._words.bias[ids])
    other = linear_of((torch.ones(5, 32), torch.ones(5)))
    assert torch.equal(other.weight, words.weight)
    fitting = linear_of((torch.ones(3, 32), torch.full((3,), 2.0)))
    assert torch.equal(fitting.weight, torch.ones(3, 32))
    assert torch.equal(fitting.bias, torch.full((3,), 2.0))
