"""Examples, encoding and batching: nothing is lost, nothing is silent, order is a function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ptv2_core.data.batching import IGNORED, collate, shuffled_batches, sorted_batches
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import (
    Example,
    Record,
    TextExample,
    TokensExample,
    carve_splits,
    collect_labels,
    cut_rows,
    digest_examples,
)
from ptv2_core.data.fields import Fields
from ptv2_core.data.parsing import parse_records, repair_tags
from ptv2_core.errors import DataError
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.tiny import byte_level_backbone, examples_of, task_of

Folder = Callable[[str], Path]

TEXT = Fields(text="text", label="meta.label")
TAGS = Fields(tokens="tokens", tags="tags")


def record(**values: Any) -> Record:
    """Return a record with a place."""
    return Record(where="mine.jsonl:7", values=values)


def texts(count: int, label: str = "a") -> list[Example]:
    """Return that many distinct examples."""
    return [TextExample(text=f"text {i}", text_pair=None, label=label) for i in range(count)]


def test_examples_are_read_by_their_field_map() -> None:
    examples, repaired = parse_records(
        [record(text="hello", meta={"label": True})], kind="classification", fields=TEXT
    )
    assert examples == [
        TextExample(text="hello", text_pair=None, label="true", where="mine.jsonl:7")
    ]
    assert repaired == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"meta": {"label": "a"}}, "no field 'text'; the record has: meta"),
        ({"text": "x", "meta": {}}, "no field 'meta.label'"),
        ({"text": "  ", "meta": {"label": "a"}}, "field 'text' is empty"),
        ({"text": 5, "meta": {"label": "a"}}, "field 'text' must be text, got 5"),
        ({"text": "x", "meta": {"label": None}}, "must be a label's name or number, got None"),
        ({"text": "x", "meta": {"label": 1.5}}, "must be a label's name or number, got 1.5"),
    ],
)
def test_examples_refuse_a_bad_text_record(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_records(
            [Record(where="mine.jsonl:7", values=values)], kind="classification", fields=TEXT
        )
    assert str(caught.value).startswith("mine.jsonl:7: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
        ({"tokens": [], "tags": []}, "field 'tokens' is empty"),
        ({"tokens": ["a", " "], "tags": ["O", "O"]}, "item 2 of field 'tokens' is empty"),
        ({"tokens": ["a"], "tags": ["X-b"]}, "tag 1 must be O, B-type or I-type, got 'X-b'"),
        ({"tokens": ["a"], "tags": ["B-"]}, "tag 1 must be"),
        ({"tokens": [1], "tags": ["O"]}, "must be a list of texts"),
    ],
)
def test_examples_refuse_a_bad_tagged_record(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match="mine.jsonl:7: ") as caught:
        parse_records([Record(where="mine.jsonl:7", values=values)], kind="tagging", fields=TAGS)
    assert message in str(caught.value)


def test_examples_name_all_bad_records_at_once() -> None:
    records = [Record(where=f"f:{n}", values={"text": ""}) for n in range(1, 14)]
    with pytest.raises(DataError) as caught:
        parse_records(records, kind="classification", fields=Fields(text="text"))
    lines = str(caught.value).split("\n")
    assert lines[0] == "13 problems in the data:"
    assert lines[1].startswith("  - f:1: ")
    assert lines[-1] == "  - and 3 more"


def test_examples_take_an_inner_tag_without_a_beginning_as_conlleval_does() -> None:
    assert repair_tags(["I-a", "I-a", "O", "I-b", "I-a"]) == (
        ("B-a", "I-a", "O", "B-b", "B-a"),
        3,
    )
    examples, repaired = parse_records(
        [record(tokens=["x", "y"], tags=["I-a", "I-b"])], kind="tagging", fields=TAGS
    )
    assert repaired == 2
    assert isinstance(examples[0], TokensExample)
    assert examples[0].tags == ("B-a", "B-b")


def test_labels_are_those_of_train_and_closed() -> None:
    splits = {"train": [*texts(2, "b"), *texts(1, "a")], "dev": texts(1, "a")}
    assert collect_labels(splits, kind="classification") == ("a", "b")
    later = TextExample(text="x", text_pair=None, label="c", where="test.csv:9")
    with pytest.raises(DataError, match=r"test.csv:9: unknown label 'c' in test; train has: a, b"):
        collect_labels({**splits, "test": [later]}, kind="classification")
    with pytest.raises(DataError, match="unknown label 'b' in train; prepare.labels has: a, z"):
        collect_labels(splits, kind="classification", labels=("a", "z"))
    with pytest.raises(DataError, match="a task needs two or more"):
        collect_labels({"train": texts(3)}, kind="classification")


def test_labels_of_tags_hold_both_forms_of_every_type() -> None:
    train: list[Example] = [TokensExample(tokens=("x", "y"), tags=("B-b", "B-a"))]
    assert collect_labels({"train": train}, kind="tagging") == ("O", "B-a", "I-a", "B-b", "I-b")


def test_splits_are_carved_by_the_seed_and_lose_nothing() -> None:
    rows = texts(50)
    carved = carve_splits({"train": rows}, dev_fraction=0.2, test_fraction=0.1, seed=1)
    assert {name: len(split) for name, split in carved.items()} == {
        "train": 35,
        "dev": 10,
        "test": 5,
    }
    assert sorted(e.text for split in carved.values() for e in split) == sorted(
        e.text for e in rows
    )  # type: ignore[union-attr]
    assert carved == carve_splits({"train": rows}, dev_fraction=0.2, test_fraction=0.1, seed=1)
    assert carved != carve_splits({"train": rows}, dev_fraction=0.2, test_fraction=0.1, seed=2)


def test_splits_of_the_source_are_kept() -> None:
    given = {"train": texts(20), "test": texts(3, "b")}
    carved = carve_splits(given, dev_fraction=0.1, test_fraction=0.5, seed=1)
    assert carved["test"] == given["test"]
    assert len(carved["dev"]) == 2
    with pytest.raises(DataError, match="no dev split and prepare.dev_fraction is 0"):
        carve_splits({"train": texts(20)}, dev_fraction=0, test_fraction=0.1, seed=1)
    with pytest.raises(DataError, match="too few to carve dev"):
        carve_splits({"train": texts(2)}, dev_fraction=0.1, test_fraction=0.1, seed=1)


def test_cut_rows_and_digest_depend_on_content_alone() -> None:
    rows = texts(30)
    cut = cut_rows(rows, 10, seed=1)
    assert len(cut) == 10
    assert cut == cut_rows(rows, 10, seed=1)
    assert cut_rows(rows, None, seed=1) == rows
    moved = [TextExample(text=e.text, text_pair=None, label=e.label, where="x") for e in texts(30)]  # type: ignore[union-attr]
    assert digest_examples(rows) == digest_examples(moved)
    assert digest_examples(rows) != digest_examples(rows[::-1])


def test_encoding_survives_a_round_trip_through_mapped_files(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    for kind in ("classification", "tagging"):
        task = task_of(kind)
        split, report = encode_examples(examples_of(kind, 20), tokenizer, task=task, max_length=32)
        split.save(tmp_path / kind)
        loaded = EncodedSplit.load(tmp_path / kind)
        assert isinstance(loaded.input_ids, np.memmap)
        for name, array in vars(split).items():
            assert np.array_equal(array, getattr(loaded, name)), name
        assert len(loaded) == report.rows == 20
        assert report.tokens == len(split.input_ids)


def test_encoding_aligns_tags_with_first_pieces_and_keeps_words_cut_off(
    backbone_folder: Folder,
) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    tokens = ("books", "rome", "playing", "anna", "to", "oslo")
    tags = ("O", "B-city", "O", "B-person", "O", "B-city")
    task = task_of("tagging")
    split, report = encode_examples(
        [TokensExample(tokens=tokens, tags=tags)], tokenizer, task=task, max_length=8
    )
    pieces = tokenizer.convert_ids_to_tokens(split.input_ids.tolist())
    assert pieces == ["[CLS]", "book", "##s", "rome", "play", "##ing", "anna", "[SEP]"]
    assert split.word_index.tolist() == [-1, 0, -1, 1, 2, -1, 3, -1]
    assert [task.labels[i] for i in split.labels] == list(tags)
    assert report.truncated == 1
    batch = collate(split, np.array([0]))
    assert batch.labels is not None
    wanted = [IGNORED, 0, IGNORED, 1, 0, IGNORED, 3, IGNORED]
    assert batch.labels.tolist() == [wanted]


def test_encoding_of_a_pair_marks_and_cuts_it(backbone_folder: Folder) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    example = TextExample(text="book a song", text_pair="call anna from rome", label="song")
    split, report = encode_examples([example], tokenizer, task=task_of(), max_length=8)
    assert split.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert report.truncated == 1
    assert split.labels.tolist() == [2]


LENGTHS = np.random.default_rng(0).integers(3, 60, size=500)


def test_batches_hold_every_row_once_within_both_limits() -> None:
    batches = shuffled_batches(LENGTHS, batch_size=16, token_budget=400, seed=1, epoch=2)
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(500))
    for batch in batches:
        assert len(batch) <= 16
        assert len(batch) == 1 or len(batch) * LENGTHS[batch].max() <= 400


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = shuffled_batches(LENGTHS, batch_size=16, token_budget=999, seed=seed, epoch=epoch)
        return np.concatenate(batches).tolist()  # type: ignore[no-any-return]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_batches_save_padding() -> None:
    def padded(batches: list[np.ndarray]) -> int:
        return sum(len(rows) * int(LENGTHS[rows].max()) for rows in batches)

    bucketed = shuffled_batches(LENGTHS, batch_size=16, token_budget=9999, seed=1, epoch=0)
    plain = [np.arange(start, min(start + 16, 500)) for start in range(0, 500, 16)]
    assert padded(bucketed) < 0.75 * padded(plain)
    assert padded(bucketed) >= LENGTHS.sum()


def test_batches_give_a_row_over_the_budget_a_batch_of_its_own() -> None:
    lengths = np.array([3, 90, 4, 80])
    for batches in (
        shuffled_batches(lengths, batch_size=4, token_budget=16, seed=1, epoch=0),
        sorted_batches(lengths, batch_size=4, token_budget=16),
    ):
        assert sorted(tuple(sorted(batch.tolist())) for batch in batches) == [(0, 2), (1,), (3,)]


def test_collate_pads_on_the_right(backbone_folder: Folder) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    rows: list[Example] = [
        TextExample(text="book", text_pair=None, label="song"),
        TextExample(text="book a song", text_pair=None, label="alarm"),
    ]
    split, _ = encode_examples(rows, tokenizer, task=task_of(), max_length=8)
    batch = collate(split, np.array([0, 1]))
    assert batch.token_mask.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert batch.input_ids[0, 3:].tolist() == [0, 0]
    assert batch.token_type_ids is None
    assert batch.labels is not None
    assert torch.equal(batch.labels, torch.tensor([2, 0]))


def test_encoding_keeps_words_apart_with_a_byte_level_tokenizer(tmp_path: Path) -> None:
    folder = byte_level_backbone(tmp_path / "roberta")
    example = TokensExample(tokens=("to", "paris"), tags=("O", "B-city"))
    task = task_of("tagging")

    def pieces(words: bool) -> list[str]:
        tokenizer = load_tokenizer(locate(str(folder)), words=words)
        split, _ = encode_examples([example], tokenizer, task=task, max_length=32)
        return tokenizer.convert_ids_to_tokens(split.input_ids.tolist())  # type: ignore[no-any-return]

    assert "".join(pieces(words=True)) == "<s>\u0120to\u0120paris</s>"
    assert "".join(pieces(words=False)) == "<s>toparis</s>"
