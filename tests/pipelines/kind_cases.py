"""A task of each kind: raw records of the tiny vocabulary, an input, and what its model has."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PLACES = ("rome", "paris", "oslo", "lima")
NAMES = ("anna", "bob", "carla", "dan")


def number(n: int, chance: random.Random) -> dict[str, Any]:
    first, second = chance.choice(PLACES), chance.choice(PLACES)
    return {"one": f"book {first}", "other": f"find {second}", "score": 5.0 * (first == second)}


def choice(n: int, chance: random.Random) -> dict[str, Any]:
    one, other = chance.sample(PLACES, 2)
    question = ("cause", "effect")[n % 2]
    return {"premise": f"to {one}", "question": question, "choice1": one, "choice2": other,
            "label": 0}  # fmt: skip


def marked(n: int, chance: random.Random) -> dict[str, Any]:
    one, other = chance.choice(PLACES), chance.choice(PLACES)
    return {"word": "book", "sentence1": f"book {one}", "sentence2": f"my book {other}",
            "start1": 0, "end1": 4, "start2": 3, "end2": 7, "label": one == other}  # fmt: skip


def pronoun(n: int, chance: random.Random) -> dict[str, Any]:
    name = chance.choice(NAMES)
    target = {"span1_text": name, "span1_index": 0, "span2_text": "my", "span2_index": 2}
    return {"text": f"{name} call my {chance.choice(PLACES)}", "target": target, "label": n % 2}


def answers(n: int, chance: random.Random) -> dict[str, Any]:
    place = chance.choice(PLACES)
    found = [{"text": other, "label": int(other == place)} for other in PLACES[:2]]
    question = {"question": "find my", "answers": found}
    return {"passage": {"text": f"anna in {place} {n}", "questions": [question]}}


def gap(n: int, chance: random.Random) -> dict[str, Any]:
    one, other = chance.sample(NAMES, 2)
    ends = (len(one) - 1, len(one) + 1 + len(other) - 1)
    entities = [{"start": 0, "end": ends[0]}, {"start": len(one) + 1, "end": ends[1]}]
    query = {"query": "call @placeholder", "answers": [{"text": one}]}
    return {"passage": {"text": f"{one} {other} {n}", "entities": entities}, "qas": [query]}


def roles(n: int, chance: random.Random) -> dict[str, Any]:
    tokens = [chance.choice(NAMES), "call", chance.choice(NAMES), "in", chance.choice(PLACES)]
    return {"tokens": tokens, "predicate": 1, "tags": ["B-ARG0", "B-V", "B-ARG1", "B-AM", "I-AM"]}


def question(n: int, chance: random.Random) -> dict[str, Any]:
    place = chance.choice(PLACES)
    before = " ".join(chance.choices(["anna", "bob", "call", "the"], k=30)) + " in "
    found = {"text": [place], "answer_start": [len(before)]} if n % 3 else []
    return {"id": n, "question": "find my", "context": f"{before}{place}", "answers": found}


@dataclass(frozen=True)
class Case:
    """A kind of task.

    Attributes:
        row: Makes a raw record.
        given: An input as a user writes it.
        inputs: The columns of its model, and those that must be there.
        needed: Of these.
        outputs: The columns of an answer.
        keys: Of an answer on the command line.
        header: What the table of answers shows.
        fields: The fields that the settings must name.
    """

    row: Callable[[int, random.Random], dict[str, Any]]
    given: dict[str, Any]
    inputs: list[str]
    needed: list[str]
    outputs: list[str]
    keys: list[str]
    header: list[str]
    fields: dict[str, Any]


LABEL = {
    "outputs": ["label", "score"],
    "keys": ["label", "probabilities"],
    "header": ["input", "label", "probabilities"],
}
OPTION = {
    "outputs": ["choice", "text", "score"],
    "keys": ["choice", "text", "options", "probabilities"],
    "header": ["input", "choice", "probabilities"],
}
SPANS = ["span1_text", "span1_index", "span2_text", "span2_index"]
CASES: dict[str, Case] = {
    "regression": Case(
        row=number,
        given={"text": "book rome", "text_pair": "find oslo"},
        inputs=["text", "text_pair"],
        needed=["text", "text_pair"],
        outputs=["value"],
        keys=["value"],
        header=["input", "value"],
        fields={"text": "one", "text_pair": "other", "label": "score"},
    ),
    "multiple_choice": Case(
        row=choice,
        given={"text": "to rome", "question": "cause", "choices": ["rome", "lima", "a song"]},
        inputs=["text", "choices", "question", "options", "names"],
        needed=["text"],
        fields={},
        **OPTION,
    ),
    "word_in_context": Case(
        row=marked,
        given={"sentence1": "book rome", "sentence2": "my book lima", "word": "book"},
        inputs=["sentence1", "sentence2", "word", "start1", "end1", "start2", "end2", "text",
                "text_pair"],
        needed=[],
        fields={},
        **LABEL,
    ),
    "coreference": Case(
        row=pronoun,
        given={"text": "anna call my rome", "span1_text": "anna", "span1_index": 0,
               "span2_text": "my", "span2_index": 2},
        inputs=["text", *SPANS, "text_pair"],
        needed=["text"],
        fields={},
        **LABEL,
    ),
    "multirc": Case(
        row=answers,
        given={"paragraph": "anna in rome", "question": "find my", "answer": "rome"},
        inputs=["paragraph", "question", "answer", "text", "text_pair"],
        needed=[],
        fields={},
        **LABEL,
    ),
    "record": Case(
        row=gap,
        given={"passage": "anna bob", "query": "call @placeholder", "entities": ["anna", "bob"]},
        inputs=["passage", "query", "entities", "text", "options", "names"],
        needed=[],
        fields={},
        **OPTION,
    ),
    "srl": Case(
        row=roles,
        given={"tokens": ["anna", "call", "bob", "in", "rome"], "predicate": 1},
        inputs=["tokens", "predicate"],
        needed=["tokens", "predicate"],
        outputs=["tags", "spans"],
        keys=["tokens", "tags", "spans"],
        header=["input", "spans"],
        fields={},
    ),
    "qa": Case(
        row=question,
        given={"question": "find my", "context": "anna in rome"},
        inputs=["question", "context"],
        needed=["question", "context"],
        outputs=["text", "score", "start", "end"],
        keys=["text", "start", "end", "score", "n_best"],
        header=["input", "answer", "characters", "score"],
        fields={},
    ),
}  # fmt: skip
