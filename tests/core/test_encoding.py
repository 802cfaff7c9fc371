"""Encoding of every kind: windows, options, predicates, templates; one by one and in batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, RobertaTokenizerFast

from ptv2_core.data.batching import collate
from ptv2_core.data.encoding import EncodedSplit, encode_examples, encode_inputs
from ptv2_core.data.examples import (
    Answer,
    OptionsExample,
    QuestionExample,
    TextExample,
    TokensExample,
)
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import ConfigError, DataError
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.core.kind_parts import KINDS, kind_examples, kind_task

Folder = Callable[[str], Path]


@pytest.fixture
def tokenizer(backbone_folder: Folder) -> PreTrainedTokenizerBase:
    return load_tokenizer(locate(str(backbone_folder("bert"))))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer of single bytes, as RoBERTa's splits unknown words."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *pre_tokenizers.ByteLevel.alphabet()]
    tokenizer = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return RobertaTokenizerFast(tokenizer_object=tokenizer, add_prefix_space=False)


def pieces(split: EncodedSplit, tokenizer: PreTrainedTokenizerBase, row: int = 0) -> list[str]:
    """Return a row's tokens."""
    ids = split.input_ids[split.offsets[row] : split.offsets[row + 1]].tolist()
    return tokenizer.convert_ids_to_tokens(ids)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_of_all_at_once_equals_that_of_each_alone(
    kind: TaskKind, tokenizer: PreTrainedTokenizerBase
) -> None:
    task, examples = kind_task(kind), kind_examples(kind, 9)
    settings = {"task": task, "max_length": 16, "stride": 2}
    whole, report = encode_examples(examples, tokenizer, **settings)  # type: ignore[arg-type]
    alone = [encode_examples([one], tokenizer, **settings)[0] for one in examples]  # type: ignore[arg-type]
    for name in ("input_ids", "token_type_ids", "word_index", "labels", "chars", "notes"):
        joined = np.concatenate([getattr(one, name) for one in alone])
        assert np.array_equal(getattr(whole, name), joined), name
    assert report.rows == len(whole) == sum(map(len, alone))
    assert report.groups == (3 if kind == "multirc" else 9)


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_of_every_kind_survives_a_round_trip(
    kind: TaskKind, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    task, examples = kind_task(kind), kind_examples(kind, 5)
    for with_labels in (True, False):
        encode = encode_examples if with_labels else encode_inputs
        split, _ = encode(examples, tokenizer, task=task, max_length=32)
        split.save(tmp_path / str(with_labels))
        loaded = EncodedSplit.load(tmp_path / str(with_labels))
        for name, array in vars(split).items():
            found = getattr(loaded, name)
            assert found.dtype == array.dtype
            assert np.array_equal(found, array), name
        assert bool(len(split.labels)) == with_labels
        assert [loaded.note(group) for group in range(loaded.num_groups)] == [
            split.note(group) for group in range(split.num_groups)
        ]


def test_encoding_keeps_numbers_as_they_are(tokenizer: PreTrainedTokenizerBase) -> None:
    example = TextExample(text="book", text_pair=None, label=2.5)
    split, _ = encode_examples([example], tokenizer, task=kind_task("regression"), max_length=8)
    assert split.labels.dtype == np.float32
    assert split.labels.tolist() == [2.5]
    labels = collate(split, np.array([0])).labels
    assert labels is not None
    assert labels.tolist() == [2.5]


# Options


OPTIONS = OptionsExample(
    text="book a flight to rome",
    options=("my taxi", "my song please"),
    names=("taxi", "song"),
    correct=(1,),
)


def test_encoding_of_options_is_a_row_each_in_one_unit(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    split, report = encode_examples(
        [OPTIONS, OPTIONS], tokenizer, task=kind_task("multiple_choice"), max_length=32
    )
    assert pieces(split, tokenizer, 1) == [
        "[CLS]", "book", "a", "flight", "to", "rome", "[SEP]", "my", "song", "please", "[SEP]",
    ]  # fmt: skip
    assert split.labels.tolist() == [0, 1, 0, 1]
    assert split.groups.tolist() == [0, 0, 1, 1]
    assert split.units.tolist() == [0, 2, 4]
    assert split.unit_lengths.tolist() == [22, 22]
    assert split.note(1) == {"names": ["taxi", "song"], "answers": []}
    assert (report.rows, report.groups, report.windows) == (4, 2, 0)
    batch = collate(split, split.rows_of(np.array([1, 0])))
    assert batch.groups is not None
    assert batch.groups.tolist() == [1, 1, 0, 0]
    kept = batch.take(np.array([0, 1]))
    assert kept.groups is not None
    assert kept.groups.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["multiple_choice", "multirc"])
def test_encoding_cuts_the_text_and_keeps_what_is_said_of_it(
    kind: TaskKind, tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = [
        TextExample(text=OPTIONS.text, text_pair=option, label="1", group="q")
        for option in OPTIONS.options
    ]
    split, report = encode_examples(
        examples if kind == "multirc" else [OPTIONS], tokenizer, task=kind_task(kind), max_length=8
    )
    assert pieces(split, tokenizer, 0) == [
        "[CLS]", "book", "a", "flight", "[SEP]", "my", "taxi", "[SEP]",
    ]  # fmt: skip
    assert pieces(split, tokenizer, 1) == [
        "[CLS]", "book", "a", "[SEP]", "my", "song", "please", "[SEP]",
    ]  # fmt: skip
    assert report.truncated == 2


def test_encoding_cuts_an_option_that_leaves_no_room_for_the_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    long = replace(OPTIONS, options=("my taxi", "a b c d e f g h i j"))
    split, report = encode_examples(
        [long], tokenizer, task=kind_task("multiple_choice"), max_length=8
    )
    assert split.lengths.tolist() == [8, 8]
    assert pieces(split, tokenizer, 0)[-3:-1] == ["my", "taxi"]
    assert report.truncated == 2


def test_encoding_numbers_the_groups_of_answers_by_first_appearance(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    examples = [
        TextExample(text="book", text_pair="taxi", label="0", group=group)
        for group in ("b", "b", "a", "b")
    ]
    split, report = encode_examples(examples, tokenizer, task=kind_task("multirc"), max_length=8)
    assert split.groups.tolist() == [0, 0, 1, 0]
    assert split.num_groups == report.groups == 2
    assert len(split.units) == 0
    assert collate(split, np.arange(4)).groups is None


# Predicates


def test_encoding_of_a_predicate_repeats_its_word_and_marks_its_own_pieces(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    example = TokensExample(
        tokens=("anna", "books", "rome", "books"), tags=("O", "O", "O", "B-ARG0"), predicate=3
    )
    task = kind_task("srl")
    split, report = encode_examples([example], tokenizer, task=task, max_length=16)
    assert pieces(split, tokenizer) == [
        "[CLS]", "anna", "book", "##s", "rome", "book", "##s", "[SEP]", "book", "##s", "[SEP]",
    ]  # fmt: skip
    assert split.token_type_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    assert split.word_index.tolist() == [-1, 0, 1, -1, 2, 3, -1, -1, -1, -1, -1]
    assert split.labels.tolist() == [0, 0, 0, 1]
    assert report.truncated == 0
    short, report = encode_examples([example], tokenizer, task=task, max_length=8)
    # the sentence is cut, not the predicate
    assert pieces(short, tokenizer)[-3:] == ["book", "##s", "[SEP]"]
    assert short.word_offsets.tolist() == [0, 4]
    assert report.truncated == 1


# Windows


CONTEXT = "call anna in rome on monday at noon from paris"
QUESTION = QuestionExample(
    question="to my",
    context=CONTEXT,
    answers=(Answer(text="on monday", start=18), Answer(text="monday", start=21)),
    id="q1",
    where="dev.json:1",
)


def test_encoding_slides_windows_over_a_context(tokenizer: PreTrainedTokenizerBase) -> None:
    split, report = encode_examples(
        [QUESTION, QUESTION], tokenizer, task=kind_task("qa"), max_length=10, stride=2
    )
    assert [pieces(split, tokenizer, row)[4:-1] for row in range(3)] == [
        ["call", "anna", "in", "rome", "on"],
        ["rome", "on", "monday", "at", "noon"],
        ["at", "noon", "from", "paris"],
    ]
    assert pieces(split, tokenizer, 2)[:4] == ["[CLS]", "to", "my", "[SEP]"]
    # the answer is cut by the first window, whole in the second, not in the third
    assert split.labels.tolist() == [[0, 0], [5, 6], [0, 0]] * 2
    assert split.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(split.units) == 0
    assert (report.groups, report.windows, report.truncated) == (2, 4, 0)
    assert split.chars[:4].tolist() == [[-1, -1]] * 4
    assert split.chars[split.offsets[1] - 1].tolist() == [-1, -1]
    assert split.chars[split.offsets[1] + 5].tolist() == [18, 20]
    answers = ["on monday", "monday"]
    assert split.note(1) == {"id": "q1", "context": CONTEXT, "answers": answers}
    labels = collate(split, np.array([1])).labels
    assert labels is not None
    assert labels.tolist() == [[5, 6]]


@pytest.mark.parametrize("answers", [(), None])
def test_encoding_of_a_question_without_answer_points_at_the_first_token(
    answers: tuple[Answer, ...] | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    split, _ = encode_examples(
        [replace(QUESTION, answers=answers)], tokenizer, task=kind_task("qa"), max_length=32
    )
    assert split.labels.tolist() == [[0, 0]]
    assert split.note(0)["answers"] == []


def answer_of(context: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what the labelled tokens of each window stand for in the context."""
    example = QuestionExample(
        question="to", context=context, answers=(Answer(text=text, start=context.index(text)),)
    )
    split, _ = encode_examples([example], tokenizer, task=kind_task("qa"), max_length=24, stride=12)
    found = []
    for row, (first, last) in enumerate(split.labels.tolist()):
        chars = split.chars[split.offsets[row] :]
        if last:
            found.append(context[chars[first, 0] : chars[last, 1]])
    return found


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("in my café à noon", "café"),
        ("in my café à noon", "à"),
        ("\U0001f600 in \U0001f600\U0001f600 noon", "\U0001f600\U0001f600"),
        ("北京 in rome 東京", "東京"),
        ("call  the\n\ntaxi,  to rome", "taxi"),
        ("call a taxi to rome at noon from the table", "rome at"),
    ],
)
def test_encoding_finds_an_answer_in_bytes_accents_and_spaces(
    context: str, text: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    for one in (tokenizer, byte_tokenizer()):
        found = answer_of(context, text, one)
        assert found
        assert set(found) == {text}


def test_encoding_of_bytes_leaves_the_space_before_a_word_out() -> None:
    tokenizer = byte_tokenizer()
    example = QuestionExample(question="to", context="a  é b", answers=None)
    split, _ = encode_inputs([example], tokenizer, task=kind_task("qa"), max_length=32)
    # a; a space alone; a space and the first byte; the second byte; b behind its space
    shown = split.chars[split.chars[:, 0] >= 0].tolist()
    assert [example.context[start:end] for start, end in shown][0] == "a"
    assert {"é", "b"} <= {example.context[start:end] for start, end in shown}
    assert not any(example.context[start:end] in (" b", " é") for start, end in shown)


@pytest.mark.parametrize(
    ("max_length", "stride", "message"),
    [
        (5, 0, "dev.json:1: the question has 2 tokens and leaves no room for its context"),
        (10, 5, "dev.json:1: overlapping windows longer than the model: the question leaves 5"),
        (10, 99, r"expected more than prepare.stride \(99\); lower it or raise prepare.max_length"),
    ],
)
def test_encoding_refuses_windows_that_cannot_move(
    max_length: int, stride: int, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(DataError, match=message):
        encode_examples(
            [QUESTION], tokenizer, task=kind_task("qa"), max_length=max_length, stride=stride
        )


# Templates


def masked(template: str, text: str, pair: str | None = None) -> tuple:
    """Return a task and an example for a template."""
    task = kind_task("classification", template=template)
    return task, TextExample(text=text, text_pair=pair, label="alarm", where="train:3")


@pytest.mark.parametrize(
    ("max_length", "wanted"),
    [
        (32, "[CLS] book a song from rome [UNK] [MASK] in my taxi please [SEP]"),
        # the longer text is cut, then both; the template stays
        (11, "[CLS] book a song [UNK] [MASK] in my taxi please [SEP]"),
        (9, "[CLS] book a [UNK] [MASK] in my please [SEP]"),
        (7, "[CLS] book [UNK] [MASK] in please [SEP]"),
    ],
)
def test_encoding_keeps_a_template_whole(
    max_length: int, wanted: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    task, example = masked(
        "{text}? {mask} in {text_pair} please", "book a song from rome", "my taxi"
    )
    split, report = encode_examples([example], tokenizer, task=task, max_length=max_length)
    assert " ".join(pieces(split, tokenizer)) == wanted
    assert split.read_at.tolist() == [wanted.split().index("[MASK]")]
    assert report.truncated == (max_length < 32)
    batch = collate(split, np.array([0]))
    assert batch.read_at is not None
    assert batch.read_at.tolist() == split.read_at.tolist()


def test_encoding_reads_the_templates_mask_and_not_one_in_a_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task, example = masked("{text} in {mask}", "book [MASK] {mask}")
    split, _ = encode_examples([example], tokenizer, task=task, max_length=32)
    found = pieces(split, tokenizer)
    assert found.count("[MASK]") == 2
    assert split.read_at.tolist() == [len(found) - 2]


def test_encoding_with_a_byte_level_mask() -> None:
    tokenizer = byte_tokenizer()
    task, example = masked("{text} It was {mask}.", "so good")
    split, _ = encode_examples([example], tokenizer, task=task, max_length=14)
    assert pieces(split, tokenizer)[split.read_at[0]] == "<mask>"
    assert "".join(pieces(split, tokenizer)).replace("\u0120", " ") == "<s>so It was <mask>.</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text} {mask} {mask}", r"task.template: expected \{text\} and \{mask\}, each once"),
        ("{mask} {other}", "each once, and for pairs"),
        ("{text!r} {mask}", "each once"),
        ("{text {mask}", "task.template: "),
    ],
)
def test_encoding_refuses_what_is_no_template(
    template: str, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    task, example = masked(template, "book")
    with pytest.raises(ConfigError, match=message):
        encode_examples([example], tokenizer, task=task, max_length=16)


def test_encoding_refuses_a_template_that_cannot_be_filled(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    task, example = masked("{text} {mask} {text_pair}", "book")
    with pytest.raises(DataError, match=r"train:3: the template has a \{text_pair\}"):
        encode_examples([example], tokenizer, task=task, max_length=16)
    task, example = masked("{text} in {mask} at noon", "book a song")
    with pytest.raises(DataError, match=r"train:3: task.template alone has 6 tokens"):
        encode_examples([example], tokenizer, task=task, max_length=6)
    tokenizer.mask_token = None
    with pytest.raises(DataError, match="tokenizer has no mask token"):
        encode_examples([example], tokenizer, task=task, max_length=16)
