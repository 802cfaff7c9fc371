"""Records of all kinds become examples; each kind of bad input is one clear message."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.data import data_folder
from ptv2_core.data.examples import (
    Answer,
    Example,
    OptionsExample,
    QuestionExample,
    Record,
    TextExample,
    TokensExample,
)
from ptv2_core.data.fields import KIND_FIELDS, TEMPLATES, fields_of
from ptv2_core.data.parsing import parse_records, require_right_options
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import DataError

COPA = {
    "premise": "The vase broke.",
    "question": "cause",
    "choice1": "It fell.",
    "choice2": "It was blue.",
    "label": 0,
}
WIC = {
    "word": "place",
    "sentence1": "Do you want to come over to my place later?",
    "sentence2": "A political system with no place for the less prominent groups.",
    "start1": 31,
    "end1": 36,
    "start2": 27,
    "end2": 32,
    "label": False,
}
WSC = {
    "text": "Mark told Pete many lies about himself, which Pete put into the book he wrote.",
    "target": {"span1_text": "Mark", "span1_index": 0, "span2_text": "He", "span2_index": 13},
    "label": False,
}
MULTIRC = {
    "idx": 7,
    "passage": {
        "text": "Ann slept.",
        "questions": [
            {
                "question": "Who?",
                "answers": [{"text": "Ann", "label": 1}, {"text": "", "label": 0}],
            },
            {"question": "When?", "answers": [{"text": "At noon", "label": 0}]},
        ],
    },
}
PASSAGE = "Rome beat Oslo.\n@highlight\nRome won"
RECORD = {
    "passage": {
        "text": PASSAGE,
        "entities": [
            {"start": 0, "end": 3},
            {"start": 10, "end": 13},
            {"start": 27, "end": 30},
        ],
    },
    "qas": [
        {"query": "@placeholder is glad", "answers": [{"start": 0, "end": 3, "text": "Rome"}]},
        {"query": "@placeholder is sad", "answers": [{"start": 10, "end": 13, "text": "Oslo"}]},
    ],
}
SRL = {
    "tokens": ["Ann", "gave", "it", "up"],
    "predicate": 1,
    "tags": ["B-A0", "B-V", "I-A1", "B-C-V"],
}
CONTEXT = "Ann slept in Rome."
QA = {
    "id": "q1",
    "question": " Where did Ann sleep?",
    "context": CONTEXT,
    "answers": {"text": ["Rome", " Rome"], "answer_start": [13, 12]},
}


def parse(
    kind: TaskKind, *values: dict[str, Any], template: str | None = None, **given: Any
) -> list[Example]:
    """Return the examples of records that are at mine:1, mine:2 and so on."""
    records = [Record(where=f"mine:{n}", values=one) for n, one in enumerate(values, start=1)]
    fields = fields_of(kind, given)
    return parse_records(records, kind=kind, fields=fields, template=template)[0]


def refused(kind: TaskKind, values: dict[str, Any], **options: Any) -> str:
    """Return the one message that a record gets."""
    with pytest.raises(DataError) as caught:
        parse(kind, values, **options)
    message = str(caught.value)
    assert message.startswith("mine:1")
    assert "\n" not in message
    return message


def test_parsing_has_fields_for_every_kind() -> None:
    for kind, known in KIND_FIELDS.items():
        assert not set(known.needed) & set(known.optional), kind
        assert fields_of(kind).named().keys() <= {*known.needed, *known.optional}


def test_a_number_is_read_from_a_number_or_from_a_tables_text() -> None:
    given = {"text": "a", "text_pair": "b", "label": "score"}
    rows = [{"a": "x", "b": "y", "score": score} for score in (2, 3.8, "1.25")]
    labels = [example.label for example in parse("regression", *rows, **given)]  # type: ignore[union-attr]
    assert labels == [2.0, 3.8, 1.25]
    assert all(isinstance(label, float) for label in labels)


@pytest.mark.parametrize("score", [None, True, "high", "nan", float("inf"), [1], "", 10**400])
def test_a_score_that_is_no_number_is_refused(score: Any) -> None:
    message = refused("regression", {"a": "x", "s": score}, text="a", label="s")
    assert "field 's' must be a finite number, got" in message


def test_a_choice_follows_the_text_and_the_words_of_its_question() -> None:
    (example,) = parse("multiple_choice", COPA)
    assert example == OptionsExample(
        text="The vase broke. because",
        options=("It fell.", "It was blue."),
        names=("It fell.", "It was blue."),
        correct=(0,),
        where="mine:1",
    )
    texts = [
        parse("multiple_choice", {**COPA, "question": question}, template=template)[0].text  # type: ignore[union-attr]
        for question in ("effect", "And then?")
        for template in TEMPLATES["multiple_choice"]
    ]
    assert texts == [
        "The vase broke. so",
        "The vase broke. What happened as a result of this?",
        "The vase broke. And then?",
        "The vase broke. And then?",
    ]
    without = {key: value for key, value in COPA.items() if key != "question"}
    assert parse("multiple_choice", without)[0].text == "The vase broke."  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("label", "place"), [(1, 1), ("1", 1), ("It was blue.", 1), ("choice2", 1), ("It fell.", 0)]
)
def test_the_right_choice_is_a_number_a_text_or_a_field(label: Any, place: int) -> None:
    (example,) = parse("multiple_choice", {**COPA, "label": label})
    assert isinstance(example, OptionsExample)
    assert example.correct == (place,)


def test_choices_may_be_one_list() -> None:
    row = {"q": "2 + 2?", "options": ["3", "4", "5"], "label": 1}
    (example,) = parse("multiple_choice", row, text="q", choices=("options",))
    assert isinstance(example, OptionsExample)
    assert (example.options, example.correct) == (("3", "4", "5"), (1,))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"choice2": "  "}, "field 'choice2' is empty; remove the record or fill it in"),
        ({"choice2": None}, "field 'choice2' must be text, got None"),
        ({"label": 2}, "field 'label' must be the right choice, a number from 0 to 1, got 2"),
        ({"label": -1}, "a number from 0 to 1, got -1"),
        ({"label": True}, "a number from 0 to 1, got True"),
        ({"label": "neither"}, "a number from 0 to 1, got 'neither'"),
        ({"choice1": "1", "label": "1"}, "field 'label' is '1', which is said of 0 and of 1"),
    ],
)
def test_a_bad_choice_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused("multiple_choice", {**COPA, **changes})


def test_a_choice_that_is_missing_is_refused() -> None:
    row = {key: value for key, value in COPA.items() if key != "choice2"}
    assert "no field 'choice2'; the record has: choice1, label" in refused("multiple_choice", row)
    named = {"text": "premise", "choices": ("options",)}
    for options, expected in [
        (["a"], "must hold two choices or more, got one"),
        (["a", " "], "item 2 of field 'options' is empty"),
        ("a b", "must be a list of texts, got 'a b'"),
    ]:
        row = {"premise": "x", "options": options, "label": 0}
        assert expected in refused("multiple_choice", row, **named)


def test_a_field_that_the_settings_name_must_be_there() -> None:
    assert "no field 'asked'" in refused("multiple_choice", COPA, question="asked")


@pytest.mark.parametrize(
    ("template", "text", "pair"),
    [
        (None, f"place: {WIC['sentence1']}", f"place: {WIC['sentence2']}"),
        (
            "quoted",
            'Do you want to come over to my "place" later?',
            'A political system with no "place" for the less prominent groups.',
        ),
        (
            "question",
            f"{WIC['sentence1']} {WIC['sentence2']} "
            "Does place have the same meaning in both sentences?",
            None,
        ),
    ],
)
def test_a_word_in_context_fills_a_template(
    template: str | None, text: str, pair: str | None
) -> None:
    assert parse("word_in_context", WIC, template=template) == [
        TextExample(text=text, text_pair=pair, label="false", where="mine:1")
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"end1": 44},
            "expected 'start1' and 'end1' inside a text of 43 characters, got 31 to 44",
        ),
        ({"start2": 32}, "expected 'start2' and 'end2' inside a text of 63 characters, got 32"),
        ({"start1": -1}, "got -1 to 36"),
        ({"end1": None}, "field 'end1' must be a whole number, got None"),
        ({"start1": "here"}, "field 'start1' must be a whole number, got 'here'"),
        ({"word": ""}, "field 'word' is empty"),
    ],
)
def test_a_bad_place_of_a_word_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused("word_in_context", {**WIC, **changes})


def test_quotes_need_places_and_other_templates_do_not() -> None:
    row = {key: WIC[key] for key in ("word", "sentence1", "sentence2", "label")}
    assert parse("word_in_context", row)[0].text == f"place: {WIC['sentence1']}"  # type: ignore[union-attr]
    assert "template quoted needs the places" in refused("word_in_context", row, template="quoted")


@pytest.mark.parametrize(
    ("template", "text", "pair"),
    [
        (
            None,
            "Mark told Pete many lies about himself, which Pete put into the book *he* wrote.",
            "Mark",
        ),
        ("prefix", f"He: {WSC['text']}", "Mark"),
        (
            "replaced",
            WSC["text"],
            "Mark told Pete many lies about himself, which Pete put into the book Mark wrote.",
        ),
        ("question", WSC["text"], 'Does "He" stand for "Mark"?'),
    ],
)
def test_a_pronoun_fills_a_template(template: str | None, text: str, pair: str) -> None:
    expected = [TextExample(text=text, text_pair=pair, label="false", where="mine:1")]
    assert parse("coreference", WSC, template=template) == expected
    flat = {"text": WSC["text"], "label": False, **WSC["target"]}  # type: ignore[dict-item]
    assert parse("coreference", flat, template=template) == expected


def test_punctuation_at_marked_words_does_not_count_and_stays() -> None:
    row = {
        "text": "Ann's dog saw Bob (who fed it).",
        "span1_text": "Ann",
        "span1_index": "0",
        "span2_text": "it",
        "span2_index": "6",
        "label": 0,
    }
    (example,) = parse("coreference", row, template="replaced")
    assert example.text_pair == "Ann's dog saw Bob (who fed Ann)."  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"span2_index": 15},
            "'He' is marked at word 15 (span2_index), outside the text of 15 words",
        ),
        ({"span1_index": -1}, "'Mark' is marked at word -1 (span1_index), outside"),
        ({"span1_index": 2}, "expected 'Mark' at word 2 (span1_index), got 'Pete'"),
        ({"span1_text": "Mark Twain"}, "expected 'Mark Twain' at word 0 (span1_index), got 'Mark"),
    ],
)
def test_a_marker_that_is_not_there_is_refused(changes: dict[str, Any], expected: str) -> None:
    row = {**WSC, "target": {**WSC["target"], **changes}}  # type: ignore[dict-item]
    assert expected in refused("coreference", row)


def test_nested_answers_are_examples_in_groups() -> None:
    examples = parse("multirc", MULTIRC, MULTIRC)
    rows = [(e.text_pair, e.label, e.group, e.where) for e in examples]  # type: ignore[union-attr]
    assert rows == [
        ("Who? Ann", "1", "1-1", "mine:1, question 1, answer 1"),
        ("Who?", "0", "1-1", "mine:1, question 1, answer 2"),
        ("When? At noon", "0", "1-2", "mine:1, question 2, answer 1"),
        ("Who? Ann", "1", "2-1", "mine:2, question 1, answer 1"),
        ("Who?", "0", "2-1", "mine:2, question 1, answer 2"),
        ("When? At noon", "0", "2-2", "mine:2, question 2, answer 1"),
    ]
    assert {e.text for e in examples} == {"Ann slept."}  # type: ignore[union-attr]


def test_flat_answers_stand_with_those_of_their_question() -> None:
    def row(question: int, answer: str, label: Any) -> dict[str, Any]:
        place = {"paragraph": 3, "question": question, "answer": 0}
        flat = {"paragraph": "P", "question": f"q{question}?", "answer": answer, "label": label}
        return {**flat, "idx": place}

    rows = [row(1, "a", "False"), row(2, "b", 1), row(1, "c", True)]
    found = [(e.text_pair, e.label, e.group) for e in parse("multirc", *rows)]  # type: ignore[union-attr]
    assert found == [("q1? a", "0", "3-1"), ("q1? c", "1", "3-1"), ("q2? b", "1", "3-2")]
    for one in rows:
        del one["idx"]
    groups = [e.group for e in parse("multirc", *rows)]  # type: ignore[union-attr]
    assert groups == ["P\nq1?", "P\nq1?", "P\nq2?"]


def test_all_problems_of_a_nested_record_are_named() -> None:
    answers = [{"text": "a", "label": 2}, {"text": 5, "label": 1}]
    row = {"passage": {"text": "P", "questions": [{"question": "Q", "answers": answers}]}}
    with pytest.raises(DataError) as caught:
        parse("multirc", row, {"passage": {"text": "P", "questions": "none"}})
    assert str(caught.value).split("\n") == [
        "3 problems in the data:",
        "  - mine:1, question 1, answer 1: field 'label' must be 0 (a wrong answer) or 1 (a right "
        "one), got '2'",
        "  - mine:1, question 1, answer 2: field 'answer' must be text, got 5",
        "  - mine:2: field 'questions' must be a list of objects, got 'none'",
    ]


def test_a_gap_is_filled_by_each_distinct_entity() -> None:
    first, second = parse("record", RECORD)
    assert first == OptionsExample(
        text="Rome beat Oslo.\n- Rome won",
        options=("Rome is glad", "Oslo is glad"),
        names=("Rome", "Oslo"),
        correct=(0,),
        answers=("Rome",),
        where="mine:1, query 1",
    )
    assert isinstance(second, OptionsExample)
    assert second.correct == (1,)
    flat = {
        "passage": PASSAGE,
        "query": "@placeholder is glad",
        "entities": ["Rome", "Oslo", "Rome"],
        "answers": ["Rome", "Rome"],
    }
    (same,) = parse("record", flat)
    assert vars(same) == {**vars(first), "where": "mine:1"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"query": "Who is glad"}, "expected @placeholder in field 'query', got 'Who is glad'"),
        ({"entities": []}, "field 'entities' is empty"),
        ({"entities": "Rome"}, "field 'entities' must be a list of texts, got 'Rome'"),
        ({"answers": []}, "field 'answers' is empty"),
    ],
)
def test_a_bad_gap_is_refused(changes: dict[str, Any], expected: str) -> None:
    row = {"passage": "P", "query": "@placeholder", "entities": ["P"], "answers": ["P"]}
    assert expected in refused("record", {**row, **changes})


def test_an_entity_outside_the_passage_is_refused() -> None:
    row = {**RECORD, "passage": {"text": "Rome", "entities": [{"start": 0, "end": 4}]}}
    message = refused("record", row)
    assert message == "mine:1: expected an entity inside a passage of 4 characters, got 0 to 4"


def test_a_query_without_a_right_entity_cannot_be_learnt_from() -> None:
    row = {"passage": "P", "query": "@placeholder", "entities": ["P"], "answers": ["Q", "R"]}
    examples = parse("record", row)
    with pytest.raises(DataError, match=r"mine:1: none of the answers \(Q, R\) is an entity"):
        require_right_options(examples)
    require_right_options(parse("record", RECORD))


def test_roles_leave_out_the_predicate_itself() -> None:
    records = [Record(where="mine:1", values=SRL)]
    examples, repaired = parse_records(records, kind="srl", fields=fields_of("srl"))
    assert examples == [
        TokensExample(
            tokens=("Ann", "gave", "it", "up"),
            tags=("B-A0", "O", "B-A1", "O"),
            predicate=1,
            where="mine:1",
        )
    ]
    assert repaired == 1
    plain = parse("srl", {**SRL, "tags": "B-A0 V O I-V", "predicate": "1"})
    assert plain[0].tags == ("B-A0", "O", "O", "O")  # type: ignore[union-attr]


@pytest.mark.parametrize("place", [4, -1])
def test_a_predicate_outside_the_tokens_is_refused(place: int) -> None:
    expected = (
        "mine:1: field 'predicate' must be the place of the predicate among 4 tokens, 0 to 3, "
        f"got {place}"
    )
    assert refused("srl", {**SRL, "predicate": place}) == expected


def test_a_question_has_its_answers_at_their_places() -> None:
    assert parse("qa", QA) == [
        QuestionExample(
            question="Where did Ann sleep?",
            context=CONTEXT,
            answers=(Answer(text="Rome", start=13), Answer(text="Rome", start=13)),
            id="q1",
            where="mine:1",
        )
    ]
    listed = {**QA, "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False}
    assert parse("qa", listed)[0].answers == (Answer(text="Ann", start=0),)  # type: ignore[union-attr]
    nothing: tuple[Any, ...] = ([], {"text": [], "answer_start": []})
    for answers in nothing:
        (none,) = parse("qa", {**QA, "answers": answers, "is_impossible": True})
        assert none.answers == ()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"answers": [{"text": "Rome", "answer_start": 12}]},
            "expected the answer 'Rome' at character 12 of a context of 18, got ' Rom'; it is at 1",
        ),
        (
            {"answers": [{"text": "Oslo", "answer_start": 99}]},
            "expected the answer 'Oslo' at character 99 of a context of 18, got ''; it is nowhere",
        ),
        ({"answers": [{"text": "Ann", "answer_start": -1}]}, "at character -1 of a context"),
        ({"answers": [{"text": " ", "answer_start": 3}]}, "must have text and a whole number"),
        ({"answers": [{"text": "Ann"}]}, "got 'Ann' at None"),
        ({"answers": "Rome"}, "must be a list of objects with text and answer_start"),
        ({"answers": {"text": ["Ann"], "answer_start": []}}, "the lists text and answer_start of"),
        ({"is_impossible": True}, "field 'is_impossible' is True, but the question has 2 answers"),
        ({"is_impossible": False, "answers": []}, "is False, but the question has no answer"),
        ({"is_impossible": "no"}, "must be true or false, got 'no'"),
        ({"context": " "}, "field 'context' is empty"),
    ],
)
def test_a_bad_question_is_refused(changes: dict[str, Any], expected: str) -> None:
    assert expected in refused("qa", {**QA, **changes})


def test_records_without_labels_give_examples_that_only_want_an_answer() -> None:
    rows: list[tuple[TaskKind, dict[str, Any], str, str]] = [
        ("multiple_choice", COPA, "label", "correct"),
        ("word_in_context", WIC, "label", "label"),
        ("coreference", WSC, "label", "label"),
        ("multirc", MULTIRC, "label", "label"),
        ("record", RECORD, "answers", "correct"),
        ("srl", SRL, "tags", "tags"),
        ("qa", QA, "answers", "answers"),
    ]
    for kind, values, field, attribute in rows:
        fields = vars(fields_of(kind)) | {field: None}
        left = {key: value for key, value in values.items() if key != field}
        records = [Record(where="mine:1", values=left)]
        examples, _ = parse_records(records, kind=kind, fields=type(fields_of(kind))(**fields))
        assert examples, kind
        assert {getattr(example, attribute) for example in examples} == {None}, kind


def _real(name: str, split: str) -> list[dict[str, Any]]:
    file: Path = data_folder() / name / f"{split}.jsonl"
    if not file.is_file():
        pytest.skip(f"the data sets are not at {data_folder()} (PTV2_BENCH_DATA)")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_superglue_as_published_is_read_whole() -> None:
    copa = parse("multiple_choice", *_real("copa", "train"))
    assert len(copa) == 400
    assert sum(example.correct == (0,) for example in copa) == 195  # type: ignore[union-attr]
    multirc = parse("multirc", *_real("multirc", "validation"))
    assert len(multirc) == 4848
    assert len({example.group for example in multirc}) == 953  # type: ignore[union-attr]
