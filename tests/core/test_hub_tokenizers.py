"""Tokenizers as they are published: what is loaded, what is refused, and what rows they give."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ptv2_core.config import PromptConfig
from ptv2_core.data.batching import collate
from ptv2_core.data.encoding import EncodedSplit, encode_examples, encode_inputs
from ptv2_core.data.examples import (
    Answer,
    OptionsExample,
    QuestionExample,
    TextExample,
    TokensExample,
)
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError, BackboneError, DataError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.core.hub_parts import BYTES, LETTERS, PATTERN, changed, lettered
from tests.core.kind_parts import kind_task
from tests.tiny import open_backbone, task_of, tiny_backbone, tiny_model

END = "<|endoftext|>"
PAIR = TextExample(text="ab", text_pair="cd", label="song", where="mine:7")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_backbone(tmp_path / "bert")


def tokenizer_of(folder: Path, *, words: bool = False) -> Any:
    return load_tokenizer(locate(str(folder)), words=words)


def pieces(tokenizer: Any, split: EncodedSplit) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(split.input_ids.tolist()))


def encoded(tokenizer: Any, *examples: Any, task: TaskSpec | None = None, **sizes: int) -> Any:
    sizes = {"max_length": 32} | sizes
    return encode_inputs(examples, tokenizer, task=task or task_of(), **sizes)[0]


# What is loaded and what is refused


def test_tokenizer_that_is_not_there_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
        with pytest.raises(BackboneError, match=r"no usable tokenizer in .*: expected tokenizer.j"):
            tokenizer_of(folder)


def test_tokenizer_of_an_older_form_is_the_same(folder: Path) -> None:
    new = tokenizer_of(folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    old = tokenizer_of(folder)
    pair = TextExample(text="books to rome", text_pair="in paris", label="song")
    wanted, got = encoded(new, pair), encoded(old, pair)
    assert got.input_ids.tolist() == wanted.input_ids.tolist()
    assert got.token_type_ids.tolist() == wanted.token_type_ids.tolist()


def test_tokenizer_that_cannot_be_converted_is_refused_with_a_way_out(folder: Path) -> None:
    changed(folder / "config.json", model_type="xlm-roberta")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "sentencepiece.bpe.model").write_bytes(b"no vocabulary")
    with pytest.raises(BackboneError, match=r"no usable tokenizer .* Save it once with Auto"):
        tokenizer_of(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_tokenizer_that_is_damaged_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(BackboneError, match="no usable tokenizer in"):
        tokenizer_of(folder)


def test_tokenizer_without_words_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    # a vocabulary, but not one that BERT's tokenizer reads
    (folder / "spiece.model").write_bytes(b"")
    with pytest.raises(BackboneError, match="has no words: expected a vocabulary, got 5 special"):
        tokenizer_of(folder)


def test_tokenizer_larger_than_its_model_is_refused_with_both_numbers(folder: Path) -> None:
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    changed(folder / "config.json", vocab_size=size + 64)  # padded embeddings
    tokenizer_of(folder)
    changed(folder / "config.json", vocab_size=size)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save_pretrained(folder)
    message = f"expected ids below {size}, .*got up to {size}\\."
    with pytest.raises(BackboneError, match=message):
        tokenizer_of(folder)


def test_tokenizer_digest_is_of_what_is_read(folder: Path) -> None:
    location = locate(str(folder))
    before = location.tokenizer_digest()
    (folder / "vocab.txt").write_text("not read beside a tokenizer.json")
    assert location.tokenizer_digest() == before
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").unlink()
    found = set()
    for name in ("spiece.model", "spm.model", "tokenizer.model"):
        for content in (b"one", b"two"):
            (folder / name).write_bytes(content)
            found.add(location.tokenizer_digest())
        (folder / name).unlink()
    assert len(found) == 6


# Sides and padding are ours


def test_tokenizer_that_cuts_and_pads_on_the_left_gives_the_same_rows(
    folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "left"
    shutil.copytree(folder, other)
    changed(other / "tokenizer_config.json", padding_side="left", truncation_side="left")
    stored = json.loads((other / "tokenizer.json").read_text())
    padding = {"strategy": {"Fixed": 16}, "direction": "Left", "pad_to_multiple_of": None}
    stored["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    cut = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    stored["truncation"] = cut
    (other / "tokenizer.json").write_text(json.dumps(stored))
    long = TextExample(text="book the flight to rome", text_pair="at noon please", label="song")
    short = TextExample(text="book", text_pair="now", label="song")
    wanted = encoded(tokenizer_of(folder), long, short, max_length=8)
    got = encoded(tokenizer_of(other), long, short, max_length=8)
    for name, array in vars(wanted).items():
        assert np.array_equal(array, getattr(got, name)), name


def test_decoder_without_a_padding_token_is_served_and_batched(tmp_path: Path) -> None:
    folder = lettered(tmp_path / "gpt2", eos_token=END)
    tokenizer = tokenizer_of(folder)
    assert tokenizer.pad_token is None
    rows = (TextExample(text="a", text_pair=None, label="song"),)
    rows += (TextExample(text="abcd", text_pair=None, label="song"),)
    batch = collate(encoded(tokenizer, *rows), np.array([0, 1]))
    assert batch.token_mask.tolist() == [[True] + [False] * 3, [True] * 4]
    model = tiny_model(open_backbone(folder), PromptConfig(length=2), task=task_of())
    predictor = Predictor(model, tokenizer, task_of(), max_length=32)
    together = predictor.logits([{"text": "a"}, {"text": "abcd"}])
    alone = predictor.logits([{"text": "a"}]) + predictor.logits([{"text": "abcd"}])
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)


# Two texts


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"eos_token": END}, f"a b {END} c d"),
        ({"eos_token": END, "sep_token": "-"}, "a b - c d"),
        ({}, "a b \u010a c d"),
        ({"pre_tokenizer": PATTERN, "eos_token": END}, f"a b {END} c d"),
        (
            {"template": (f"{END} $A", f"{END} $A $B:1"), "eos_token": END},
            f"{END} a b {END} c d",
        ),
        # these part texts themselves
        ({"template": (f"{END} $A", f"{END} $A {END} $B:1"), "sep_token": "-"},
         f"{END} a b {END} c d"),
        ({"template": (f"$A {END}", f"$A {END} $B:1 {END}"), "sep_token": "-"},
         f"a b {END} c d {END}"),
    ],
)  # fmt: skip
def test_two_texts_have_one_separator_between_them(
    tmp_path: Path, settings: dict[str, Any], wanted: str
) -> None:
    tokenizer = tokenizer_of(lettered(tmp_path / "decoder", **settings))
    split = encoded(tokenizer, PAIR)
    assert pieces(tokenizer, split) == wanted
    assert split.token_type_ids.tolist()[-1 - wanted.endswith(f" {END}")] == 1
    single = TextExample(text="ab", text_pair=None, label="song")
    assert "a b" in pieces(tokenizer, encoded(tokenizer, single))
    assert len(encoded(tokenizer, PAIR, max_length=len(wanted.split()) - 1).input_ids) == (
        len(wanted.split()) - 1
    )


def test_options_have_a_separator_before_each(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(lettered(tmp_path / "gpt2", eos_token=END))
    example = OptionsExample(
        text="ab", options=("c", "d"), correct=(0,), names=("c", "d"), answers=(), where="mine:1"
    )
    split = encoded(tokenizer, example, task=kind_task("multiple_choice"))
    assert pieces(tokenizer, split) == f"a b {END} c a b {END} d"


@pytest.mark.parametrize("pre_tokenizer", [BYTES, PATTERN])
def test_windows_have_a_separator_and_exact_characters(tmp_path: Path, pre_tokenizer: Any) -> None:
    tokenizer = tokenizer_of(
        lettered(tmp_path / "gpt2", eos_token=END, pre_tokenizer=pre_tokenizer)
    )
    context = "ab cd ef gh"
    example = QuestionExample(
        id="1", question="xy", context=context, answers=(Answer(text="ef", start=6),),
        where="mine:1",
    )  # fmt: skip
    task = kind_task("qa")
    split, _ = encode_examples([example], tokenizer, task=task, max_length=9, stride=2)
    found = []
    for start, end, answer in zip(split.offsets, split.offsets[1:], split.labels, strict=False):
        row = tokenizer.convert_ids_to_tokens(split.input_ids[start:end].tolist())
        assert row[:3] == ["x", "y", END]
        for piece, (first, last) in zip(row[3:], split.chars[start:end][3:], strict=True):
            assert context[first:last].strip() == piece.replace("\u0120", " ").strip()
        if answer.any():
            first, last = split.chars[start:end][answer][:, 0][0], split.chars[start + answer[1]][1]
            found.append(context[first:last].strip())
    assert found
    assert set(found) == {"ef"}
    assert split.lengths.max() == 9


def test_two_texts_of_bert_are_as_ever(folder: Path) -> None:
    plain = AutoTokenizer.from_pretrained(folder)
    split = encoded(tokenizer_of(folder), TextExample(text="book", text_pair="rome", label="song"))
    assert split.input_ids.tolist() == plain("book", "rome")["input_ids"]


def test_two_texts_that_nothing_can_part_are_refused(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "words")
    made = Tokenizer(models.WordLevel(vocab={"ab": 0, "[UNK]": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    changed(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = tokenizer_of(folder)
    encoded(tokenizer, TextExample(text="ab", text_pair=None, label="song"))
    with pytest.raises(DataError, match="puts nothing between two texts"):
        encoded(tokenizer, PAIR)


def test_prompt_of_pairs_from_before_separators_is_refused(tmp_path: Path) -> None:
    folder = lettered(tmp_path / "gpt2", eos_token=END)
    task = task_of(pair=True)
    model = tiny_model(open_backbone(folder), PromptConfig(length=2), task=task)
    given = [{"text": "ab", "text_pair": "cd"}]
    # the row of that time is that of both texts as one
    old = Predictor(model, tokenizer_of(folder), task_of(), max_length=32)
    golden = [{"input": given[0], "logits": old.logits([{"text": "abcd"}])[0].tolist()}]
    new = Predictor(model, tokenizer_of(folder), task, max_length=32, golden=golden)
    with pytest.raises(ArtifactError, match="golden input 1: expected logits"):
        new.verify_golden()


# Words


@pytest.mark.parametrize("pre_tokenizer", [BYTES, PATTERN])
def test_words_of_byte_level_tokenizers_stay_apart_and_whole(
    tmp_path: Path, pre_tokenizer: Any
) -> None:
    folder = lettered(tmp_path / "gpt2", eos_token=END, pre_tokenizer=pre_tokenizer)
    tokenizer = tokenizer_of(folder, words=True)
    example = TokensExample(tokens=("to", "x-y"), tags=("O", "O"))
    split = encoded(tokenizer, example, task=task_of("tagging"))
    assert pieces(tokenizer, split) == "\u0120 t o \u0120 x - y"
    assert split.word_index.tolist() == [0, -1, -1, 1, -1, -1, -1]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_words_of_metaspace_tokenizers_stay_apart(tmp_path: Path, scheme: str) -> None:
    folder = lettered(tmp_path / "gpt2", eos_token=END)
    letters = [*LETTERS, "\u2581"]
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END).save_pretrained(folder)
    changed(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    changed(folder / "config.json", model_type="llama")
    tokenizer = tokenizer_of(folder, words=True)
    example = TokensExample(tokens=("to", "pa"), tags=("O", "O"))
    split = encoded(tokenizer, example, task=task_of("tagging"))
    assert pieces(tokenizer, split) == "\u2581 t o \u2581 p a"


def test_word_without_tokens_leaves_the_others_in_place(folder: Path) -> None:
    example = TokensExample(tokens=("book", "\u200b", "rome"), tags=("O", "O", "B-city"))
    task = task_of("tagging")
    split, _ = encode_examples([example], tokenizer_of(folder), task=task, max_length=8)
    assert split.word_index.tolist() == [-1, 0, 2, -1]
    labels = collate(split, np.array([0])).labels
    assert labels is not None
    assert labels[0].tolist()[1:3] == [task.labels.index("O"), task.labels.index("B-city")]
