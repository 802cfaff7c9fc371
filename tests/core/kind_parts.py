"""A tiny task of every kind, with examples whose answers are a function of the words."""

import random
from typing import get_args

from ptv2_core.data.examples import (
    Answer,
    Example,
    OptionsExample,
    QuestionExample,
    TextExample,
    TokensExample,
)
from ptv2_core.data.tasks import METRICS, TaskKind, TaskSpec
from tests.tiny import WORDS

KINDS: tuple[TaskKind, ...] = get_args(TaskKind)
PLAIN = [word for word in WORDS if not word.startswith("##")]
LABELS: dict[TaskKind, tuple[str, ...]] = {
    "classification": ("alarm", "flight"),
    "word_in_context": ("false", "true"),
    "coreference": ("false", "true"),
    "multirc": ("0", "1"),
    "tagging": ("O", "B-place", "I-place"),
    "srl": ("O", "B-ARG0", "I-ARG0"),
}
PLACES = ("rome", "paris", "oslo", "lima")


def kind_task(kind: TaskKind, **changes: object) -> TaskSpec:
    """Return a task of a kind."""
    values = {
        "name": "tiny",
        "kind": kind,
        "labels": LABELS.get(kind, ()),
        "fields": {},
        "metric": METRICS[kind],
    }
    return TaskSpec(**{**values, **changes})  # type: ignore[arg-type]


def kind_examples(kind: TaskKind, count: int, *, seed: int = 0) -> list[Example]:
    """Return random examples of a kind."""
    chance = random.Random(f"{kind} {seed}")
    return [_example(kind, number, chance) for number in range(count)]


def words(chance: random.Random, most: int = 8) -> list[str]:
    """Return a few random words of the tiny vocabulary."""
    return chance.choices(PLAIN, k=chance.randint(2, most))


def _example(kind: TaskKind, number: int, chance: random.Random) -> Example:
    chosen = words(chance)
    text = " ".join(chosen)
    if kind in ("tagging", "srl"):
        name = LABELS[kind][1]
        return TokensExample(
            tokens=tuple(chosen),
            tags=tuple(name if word in PLACES else "O" for word in chosen),
            predicate=chance.randrange(len(chosen)) if kind == "srl" else None,
        )
    if kind in ("multiple_choice", "record"):
        options = tuple(chance.sample(PLAIN, 2 if kind == "multiple_choice" else number % 3 + 2))
        right = chance.randrange(len(options))
        return OptionsExample(
            text=f"{text} {options[right]}",
            options=tuple(f"my {option}" for option in options),
            names=options,
            correct=(right,),
            answers=(options[right],) if kind == "record" else (),
        )
    if kind == "qa":
        context = " ".join(words(chance, 30))
        answers: tuple[Answer, ...] = ()
        if number % 3:
            start = context.rindex(" ") + 1
            answers = (Answer(text=context[start:], start=start),)
        return QuestionExample(question=text, context=context, answers=answers, id=str(number))
    if kind == "regression":
        return TextExample(text=text, text_pair="book", label=len(chosen) / 2)
    label = LABELS[kind][number % 2]
    return TextExample(
        text=f"{label} {text}" if kind == "classification" else f"{text} {'not' * (number % 2)}",
        text_pair=None if kind == "classification" else "call anna",
        label=label,
        group=f"question {number // 3}" if kind == "multirc" else None,
    )
