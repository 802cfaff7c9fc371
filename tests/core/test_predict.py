"""The predictor answers inputs of every kind, and says what is wrong with one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ptv2_core.config import PromptConfig
from ptv2_core.data.encoding import encode_examples
from ptv2_core.data.examples import example_to_mapping
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import ArtifactError, DataError
from ptv2_core.evaluation.inputs import INPUT_KEYS
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.core.kind_parts import KINDS, kind_examples, kind_task
from tests.tiny import open_backbone, tiny_model

Folder = Callable[[str], Path]
Make = Callable[..., Predictor]

# an input of every kind, and one that lacks something with what is said of it
INPUTS: dict[TaskKind, dict[str, Any]] = {
    "classification": {"text": "book a flight"},
    "regression": {"text": "book a flight"},
    "multiple_choice": {
        "text": "call anna", "question": "cause", "choices": ["a song", "a taxi", "noon"],
    },
    "word_in_context": {"sentence1": "book a taxi", "sentence2": "my book", "word": "book"},
    "coreference": {
        "text": "anna from rome", "span1_text": "anna", "span1_index": 0,
        "span2_text": "rome", "span2_index": 2,
    },
    "multirc": {"paragraph": "call anna at noon", "question": "my call", "answer": "noon"},
    "record": {
        "passage": "anna in rome", "query": "@placeholder in rome",
        "entities": ["anna", "rome", "anna"],
    },
    "tagging": {"tokens": ["call", "anna", "in", "rome"]},
    "srl": {"tokens": ["call", "anna", "in", "rome"], "predicate": 0},
    "qa": {"question": "to my", "context": "call anna in rome on monday at noon from paris"},
}  # fmt: skip


@pytest.fixture
def make(backbone_folder: Folder) -> Make:
    folder = backbone_folder("bert")

    def predictor(kind: TaskKind, **settings: Any) -> Predictor:
        task = kind_task(kind)
        model = tiny_model(open_backbone(folder), PromptConfig(length=3), task=task)
        sizes = {"max_length": 16, "stride": 2, **settings}
        return Predictor(model, load_tokenizer(locate(str(folder))), task, **sizes)

    return predictor


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_answers_every_kind_alike_alone_and_among_others(
    kind: TaskKind, make: Make
) -> None:
    predictor = make(kind)
    inputs = [INPUTS[kind], *prepared_inputs(kind), INPUTS[kind]]
    answers, logits = predictor.predict(inputs), predictor.logits(inputs)
    assert len(answers) == len(logits) == len(inputs)
    for given, answer, numbers in zip(inputs, answers, logits, strict=True):
        (alone,) = predictor.logits([given])
        assert alone.shape == numbers.shape
        assert torch.allclose(alone, numbers, atol=1e-5)
        assert set(predictor.predict([given])[0]) == set(answer)


def prepared_inputs(kind: TaskKind) -> list[dict[str, Any]]:
    """Return the inputs that a prepared split's rows make."""
    rows = [example_to_mapping(example) for example in kind_examples(kind, 5)]
    return [{key: value for key, value in row.items() if key in INPUT_KEYS} for row in rows]


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_answers_as_scoring_does(kind: TaskKind, make: Make) -> None:
    predictor, task = make(kind), kind_task(kind)
    task_with_pair = kind_task(kind, fields={"text_pair": "b"} if kind == "regression" else {})
    predictor.codec.task = task_with_pair
    split, _ = encode_examples(
        kind_examples(kind, 5), predictor.codec._tokenizer, task=task, max_length=16, stride=2
    )
    scored = evaluate_model(predictor.model, split, task, token_budget=99, decoding={})
    answers = predictor.predict(prepared_inputs(kind))
    key = {"rows": "label", "values": "value", "options": "text", "tokens": "tags", "spans": "text"}
    found = [answer[key[task.form]] for answer in answers]
    if kind == "regression":
        assert found == pytest.approx(scored.predictions, abs=1e-5)
    else:
        assert found == list(scored.predictions)


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_verifies_golden_inputs_of_every_kind(kind: TaskKind, make: Make) -> None:
    given = INPUTS[kind]
    (logits,) = make(kind).logits([given])
    make(kind, golden=[{"input": given, "logits": logits.tolist()}]).verify_golden()
    wrong = [{"input": given, "logits": (logits + 1).tolist()}]
    with pytest.raises(ArtifactError, match="golden input 1: expected logits"):
        make(kind, golden=wrong).verify_golden()


def test_predictor_logits_have_the_shape_of_their_form(make: Make) -> None:
    shapes = {kind: tuple(make(kind).logits([INPUTS[kind]])[0].shape) for kind in KINDS}
    assert shapes == {
        "classification": (2,),
        "regression": (1,),
        "multiple_choice": (3,),
        "word_in_context": (2,),
        "coreference": (2,),
        "multirc": (2,),
        "record": (2,),
        "tagging": (4, 3),
        "srl": (4, 3),
        "qa": (15, 2),
    }


def test_predictor_gives_a_choice_with_probabilities(make: Make) -> None:
    (answer,) = make("multiple_choice").predict([INPUTS["multiple_choice"]])
    assert answer["options"] == ["a song", "a taxi", "noon"]
    assert answer["text"] == answer["options"][answer["choice"]]
    assert sum(answer["probabilities"]) == pytest.approx(1.0)
    assert answer["probabilities"][answer["choice"]] == max(answer["probabilities"])
    (answer,) = make("record").predict([INPUTS["record"]])
    assert answer["options"] == ["anna", "rome"]


def test_predictor_answers_a_question_with_a_place_in_the_context(make: Make) -> None:
    given = INPUTS["qa"]
    (answer,) = make("qa").predict([given])
    best = answer["n_best"]
    assert {key: answer[key] for key in best[0]} == best[0]
    assert len(best) == len({one["text"] for one in best}) == 5
    assert all(given["context"][one["start"] : one["end"]] == one["text"] for one in best)
    scores = [one["score"] for one in best]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1


@pytest.mark.parametrize(
    ("kind", "given", "places"),
    [
        ("tagging", {"text": "call anna in rome"}, [(0, 4), (10, 17)]),
        ("tagging", {"text": "\n call  anna\tin\u2003rome \n"}, [(2, 6), (13, 20)]),
        ("tagging", {"text": "rome \U0001f600 rome e\u0301"}, [(0, 4), (7, 14)]),
        ("tagging", {"tokens": ["rome", "rom", "rome", "e"]}, [(0, 4), (9, 15)]),
        ("tagging", {"tokens": ["new  york", " a", "a", "\U0001f600"]}, [(0, 9), (13, 16)]),
        ("tagging", {"tokens": ["a", "b", "c", "d"], "text": "none"}, [(0, 1), (4, 7)]),
        ("srl", {"tokens": ["call", "anna", "in", "rome"], "predicate": 0}, [(0, 4), (10, 17)]),
        ("srl", {"tokens": ("a", "b", "c", "d"), "predicate": 0, "text": "x"}, [(0, 1), (4, 7)]),
    ],
)
def test_predictor_gives_spans_their_places_in_the_text(
    kind: TaskKind, given: dict[str, Any], places: list[tuple[int, int]], make: Make
) -> None:
    codec = make(kind).codec
    asked = codec.encode([given])
    logits = torch.zeros(len(asked.split.input_ids), 3)
    # classes of the four words: a span of one word, then one of two
    for word, number in enumerate((1, 0, 1, 2)):
        logits[asked.split.word_index == word, number] = 1.0
    (answer,) = codec.decode(asked, [logits])
    spans = answer["spans"]
    assert [(span["start"], span["end"]) for span in spans] == [(0, 1), (2, 4)]
    assert [(span["start_char"], span["end_char"]) for span in spans] == places
    source = given["text"] if "tokens" not in given else " ".join(given["tokens"])
    cut = [source[start:end].split() for start, end in places]
    assert cut == [span["text"].split() for span in spans]


def test_predictor_gives_no_answer_by_the_threshold_that_dev_chose(make: Make) -> None:
    given = INPUTS["qa"]
    (answer,) = make("qa", decoding={"null_threshold": -1e9}).predict([given])
    assert (answer["text"], answer["start"], answer["end"]) == ("", None, None)
    assert answer["n_best"][0]["text"] == ""
    (answer,) = make("qa", decoding={"null_threshold": 1e9}).predict([given])
    assert answer["text"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("regression", {"text": " "}, "input 1: expected a `text`"),
        ("multiple_choice", {"choices": ["a"]}, "input 1: .*'choices' must hold two choices"),
        ("multiple_choice", {"choices": None, "options": 5}, "input 1: .*'choices' must be a list"),
        ("word_in_context", {"sentence2": None}, "input 1: field 'sentence2' must be text"),
        ("word_in_context", {"start1": 3, "end1": 99}, "input 1: .*inside a text of 11"),
        ("coreference", {"span2_index": 9}, "input 1: 'rome' is marked at word 9 .*outside"),
        ("multirc", {"question": ""}, "input 1: field 'question' is empty"),
        ("record", {"query": "in rome"}, "input 1: expected @placeholder in field 'query'"),
        ("tagging", {"tokens": []}, "input 1: expected `tokens`"),
        ("srl", {"predicate": 4}, "input 1: .*place of the predicate among 4 tokens, 0 to 3"),
        ("srl", {"predicate": None}, "input 1: field 'predicate' must be a whole number"),
        ("qa", {"context": ""}, "input 1: field 'context' is empty"),
        ("qa", {"question": " ".join(["a"] * 14)}, "input 1: the question has 14 tokens and"),
        ("qa", {"context": "half \ud800"}, "input 1: character 6 of .* half a surrogate pair"),
        ("record", {"entities": ["\udc00"]}, "input 1: character 1 of .* half a surrogate pair"),
    ],
)
def test_predictor_refuses_a_bad_input(
    kind: TaskKind, changes: dict[str, Any], message: str, make: Make
) -> None:
    with pytest.raises(DataError, match=message):
        make(kind).predict([{**INPUTS[kind], **changes}])


@pytest.mark.parametrize("kind", KINDS)
def test_predictor_refuses_an_empty_input_with_its_number(kind: TaskKind, make: Make) -> None:
    with pytest.raises(DataError, match="input 2: "):
        make(kind).predict([INPUTS[kind], {}])


def test_predictor_answers_nothing_without_inputs(make: Make) -> None:
    for kind in KINDS:
        assert make(kind).predict([]) == []
        assert make(kind).logits([]) == []


def test_predictor_refuses_options_without_names(make: Make) -> None:
    with pytest.raises(DataError, match="as many `options` as `names`"):
        make("record").predict([{"text": "a", "options": ["b", "c"], "names": ["d"]}])


def test_predictor_takes_one_question_an_input(make: Make) -> None:
    nested = {
        "passage": {"text": "anna in rome", "entities": []},
        "qas": [{"query": "@placeholder", "answers": []}],
        "query": "",
    }
    with pytest.raises(DataError, match="input 1"):
        make("record").predict([nested])
