"""Splits keep shared texts together; plain values and digests of all kinds of examples."""

import json

import pytest

from ptv2_core.data.examples import (
    Answer,
    Example,
    OptionsExample,
    QuestionExample,
    TextExample,
    TokensExample,
    carve_splits,
    collect_labels,
    cut_rows,
    digest_examples,
    example_to_mapping,
)
from ptv2_core.errors import DataError

SIZES = (3, 1, 4, 1, 5, 2, 2, 3, 1, 2, 4, 2)


def answers() -> list[Example]:
    """Return answers to two questions about each of twelve paragraphs."""
    return [
        TextExample(
            text=f"paragraph {number}",
            text_pair=f"question {part}, answer {place}",
            label=str(place % 2),
            group=f"{number}-{part}",
        )
        for number, size in enumerate(SIZES)
        for part in (1, 2)
        for place in range(size)
    ]


def shared(kind: str) -> list[Example]:
    """Return two or more examples about each of twelve texts."""
    found: list[Example] = []
    for number, size in enumerate(SIZES):
        text = f"text {number}"
        for place in range(size + 1):
            if kind == "qa":
                found.append(QuestionExample(question=f"q{place}", context=text, answers=()))
            elif kind == "record":
                names = ("a", "b")
                found.append(
                    OptionsExample(
                        text=text, options=names, names=names, correct=(0,), answers=("a",)
                    )
                )
            else:
                tokens = (text, "does")
                found.append(TokensExample(tokens=tokens, tags=("O", "O"), predicate=place % 2))
    return found


def text_of(example: Example) -> object:
    """Return what examples about the same text share."""
    if isinstance(example, QuestionExample):
        return example.context
    return example.tokens if isinstance(example, TokensExample) else example.text


@pytest.mark.parametrize("kind", ["multirc", "qa", "record", "srl"])
def test_carving_never_divides_a_text(kind: str) -> None:
    rows = answers() if kind == "multirc" else shared(kind)
    carved = carve_splits({"train": rows}, dev_fraction=0.2, test_fraction=0.2, seed=3)
    texts = {split: {text_of(example) for example in found} for split, found in carved.items()}
    assert sum(map(len, texts.values())) == len(SIZES)
    assert set.union(*texts.values()) == {text_of(example) for example in rows}
    assert sorted(map(repr, rows)) == sorted(repr(e) for found in carved.values() for e in found)
    for split in ("dev", "test"):
        # at most one text more than was asked for
        assert round(0.2 * len(rows)) <= len(carved[split]) < round(0.2 * len(rows)) + 10
        places = [place for place, row in enumerate(rows) if any(row is e for e in carved[split])]
        assert [rows[place] for place in places] == carved[split]


def test_carving_of_one_shared_text_is_refused() -> None:
    rows = [example for example in answers() if example.text == "paragraph 4"]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"train has 10 rows, too few to carve dev \(0.2\)"):
        carve_splits({"train": rows}, dev_fraction=0.2, test_fraction=0.2, seed=1)


def test_carving_and_cutting_of_rows_that_share_nothing_is_as_it_always_was() -> None:
    rows: list[Example] = [
        TextExample(text=f"text {n % 3}", text_pair=None, label="a") for n in range(20)
    ]
    carved = carve_splits({"train": rows}, dev_fraction=0.1, test_fraction=0.1, seed=42)
    assert [len(found) for found in carved.values()] == [16, 2, 2]
    # the digests of the first version that carved
    digests = {split: digest_examples(found)[7:15] for split, found in carved.items()}
    assert digests == {"train": "39c16908", "dev": "fbd7cf19", "test": "19b07980"}
    assert digest_examples(cut_rows(rows, 7, seed=42))[7:15] == "ad9ba957"


def test_cutting_keeps_groups_whole() -> None:
    rows = answers()
    cut = cut_rows(rows, 21, seed=5)
    assert 15 < len(cut) <= 21
    assert cut == [example for example in rows if example in cut]
    for group in {example.group for example in cut}:  # type: ignore[union-attr]
        whole = [example for example in rows if example.group == group]  # type: ignore[union-attr]
        assert [example for example in cut if example.group == group] == whole  # type: ignore[union-attr]
    assert cut == cut_rows(rows, 21, seed=5)
    assert cut != cut_rows(rows, 21, seed=6)
    assert len(cut_rows(rows[:6], 1, seed=1)) == 3


def test_labels_of_kinds_without_a_closed_set_are_none() -> None:
    number: list[Example] = [TextExample(text="x", text_pair=None, label=1.5)]
    assert collect_labels({"train": number}, kind="regression") == ()
    assert collect_labels({"train": shared("qa")}, kind="qa") == ()
    assert collect_labels({"train": shared("record")}, kind="record") == ()
    assert collect_labels({"train": answers()[:1]}, kind="multirc") == ("0", "1")


def test_roles_of_all_splits_are_labels() -> None:
    def roles(*tags: str) -> list[Example]:
        return [TokensExample(tokens=("x",) * len(tags), tags=tags, predicate=0)]

    splits = {"train": roles("O", "B-A0"), "test": roles("B-R-AM-DIR", "O")}
    found = collect_labels(splits, kind="srl")
    assert found == ("O", "B-A0", "I-A0", "B-R-AM-DIR", "I-R-AM-DIR")
    with pytest.raises(DataError, match="unknown label 'B-R-AM-DIR' in test"):
        collect_labels(splits, kind="srl", labels=("O", "B-A0", "I-A0"))


PLAIN: list[tuple[Example, dict[str, object]]] = [
    (TextExample(text="a", text_pair=None, label="x", where="f:1"), {"text": "a", "label": "x"}),
    (
        TextExample(text="a", text_pair="b", label=1.5, group="g"),
        {"text": "a", "text_pair": "b", "label": 1.5, "group": "g"},
    ),
    (TokensExample(tokens=("a",), tags=("O",)), {"tokens": ["a"], "tags": ["O"]}),
    (
        TokensExample(tokens=("a",), tags=None, predicate=0),
        {"tokens": ["a"], "predicate": 0, "tags": None},
    ),
    (
        OptionsExample(text="t", options=("a b",), names=("b",), correct=(0,), answers=("b",)),
        {"text": "t", "options": ["a b"], "names": ["b"], "correct": [0], "answers": ["b"]},
    ),
    (
        QuestionExample(question="q", context="c d", answers=(Answer(text="d", start=2),), id="7"),
        {"question": "q", "context": "c d", "answers": [{"text": "d", "start": 2}], "id": "7"},
    ),
    (
        QuestionExample(question="q", context="c", answers=None),
        {"question": "q", "context": "c", "answers": None, "id": ""},
    ),
]


@pytest.mark.parametrize(("example", "values"), PLAIN)
def test_plain_values_hold_what_an_example_says(
    example: Example, values: dict[str, object]
) -> None:
    found = example_to_mapping(example)
    assert found == values
    assert list(found) == list(values)
    assert json.loads(json.dumps(found)) == values
