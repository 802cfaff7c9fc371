"""The forms' losses and answers against slow, plain computations."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ptv2_core.data.batching import Batch, collate
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import OptionsExample, QuestionExample
from ptv2_core.evaluation.forms import rules_of, spans
from ptv2_core.evaluation.forms.base import Outcomes
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.core import squad_oracle as oracle
from tests.core.kind_parts import kind_examples, kind_task

Folder = Callable[[str], Path]


@pytest.fixture
def encode(backbone_folder: Folder) -> Callable[..., EncodedSplit]:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))

    def encoded(kind: str, count: int = 9, **settings: int) -> EncodedSplit:
        examples = kind_examples(kind, count)  # type: ignore[arg-type]
        sizes = {"max_length": 32, **settings}
        return encode_examples(examples, tokenizer, task=kind_task(kind), **sizes)[0]  # type: ignore[arg-type]

    return encoded


def whole(split: EncodedSplit) -> Batch:
    """Return all rows as one batch."""
    return collate(split, np.arange(len(split)))


def noise(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(7))


Encode = Callable[..., EncodedSplit]


def test_rows_lose_what_the_right_class_lacks(encode: Encode) -> None:
    batch = whole(encode("classification"))
    logits, rules = noise(9, 2), rules_of("rows")
    assert batch.labels is not None
    slow = [-math.log(torch.softmax(logits[row], 0)[batch.labels[row]]) for row in range(9)]
    assert float(rules.loss(logits, batch)) == pytest.approx(sum(slow), rel=1e-5)
    assert rules.count(batch) == 9


def test_values_lose_the_squared_error(encode: Encode) -> None:
    batch = whole(encode("regression"))
    logits, rules = noise(9, 1), rules_of("values")
    assert batch.labels is not None
    slow = [(float(logits[row, 0]) - float(batch.labels[row])) ** 2 for row in range(9)]
    assert float(rules.loss(logits, batch)) == pytest.approx(sum(slow), rel=1e-5)
    assert rules.count(batch) == 9


def test_tokens_lose_at_first_pieces_alone(encode: Encode) -> None:
    split = encode("tagging")
    batch, rules = whole(split), rules_of("tokens")
    logits = noise(9, batch.input_ids.shape[1], 3)
    assert batch.labels is not None
    slow, count = 0.0, 0
    for row, place in itertools.product(range(9), range(logits.shape[1])):
        word = int(batch.word_index[row, place])
        if word >= 0:
            tag = int(split.labels[split.word_offsets[row] + word])
            slow -= float(torch.log_softmax(logits[row, place], 0)[tag])
            count += 1
    assert float(rules.loss(logits, batch)) == pytest.approx(slow, rel=1e-5)
    assert rules.count(batch) == count == len(split.labels)


# Options


def options_split(tokenizer_folder: Path, *correct: tuple[int, ...]) -> EncodedSplit:
    """Encode a group of three options for each tuple of right ones."""
    examples = [
        OptionsExample(
            text="book", options=("a", "the", "my"), names=("x", "y", "z"), correct=places
        )
        for places in correct
    ]
    tokenizer = load_tokenizer(locate(str(tokenizer_folder)))
    return encode_examples(examples, tokenizer, task=kind_task("record"), max_length=8)[0]


def test_options_lose_what_all_right_ones_together_lack(backbone_folder: Folder) -> None:
    # one right, two right, none right, all right
    correct = [(1,), (0, 2), (), (0, 1, 2)]
    split = options_split(backbone_folder("bert"), *correct)
    rules, scores = rules_of("options"), noise(4, 3)
    slow = {
        group: -math.log(sum(float(torch.softmax(scores[group], 0)[place]) for place in places))
        for group, places in enumerate(correct)
        if places
    }
    for order in itertools.permutations(range(4)):
        batch = collate(split, split.rows_of(np.array(order)))
        logits = scores[list(order)].reshape(-1, 1).requires_grad_()
        loss = rules.loss(logits, batch)
        assert float(loss.detach()) == pytest.approx(sum(slow.values()), rel=1e-5, abs=1e-6)
        assert rules.count(batch) == 3
        loss.backward()
        assert logits.grad is not None
        gradient = logits.grad.reshape(4, 3)
        assert gradient.isfinite().all()
        # a group without a right option teaches nothing, nor does one without a wrong one
        assert gradient[order.index(2)].tolist() == [0, 0, 0]
        assert gradient[order.index(3)].abs().max() < 1e-6
        assert gradient[order.index(0)].abs().min() > 0.01


def test_options_of_a_share_of_the_batch_lose_their_share(encode: Encode) -> None:
    split = encode("record")
    batch, rules = whole(split), rules_of("options")
    logits = noise(len(split), 1)
    assert batch.groups is not None
    own = [np.flatnonzero(batch.groups.numpy() % 2 == share) for share in (0, 1)]
    parts = [rules.loss(logits[rows], batch.take(rows)) for rows in own]
    assert float(sum(parts)) == pytest.approx(float(rules.loss(logits, batch)), rel=1e-5)
    assert sum(rules.count(batch.take(rows)) for rows in own) == rules.count(batch) == 9


def test_options_answer_with_the_best_of_each_group(encode: Encode) -> None:
    split, rules, task = encode("record"), rules_of("options"), kind_task("record")
    scores = np.arange(len(split), dtype=np.float64)
    # the last of each group
    wanted = [split.note(group)["names"][-1] for group in range(9)]
    assert rules.predictions(scores, split, task, {}) == wanted
    gold = rules.gold(split, task)
    metrics = rules.metrics(gold, split, task)
    assert metrics == {"f1": 1.0, "em": 1.0, "accuracy": 1.0}
    assert rules.metrics(["nobody"] * 9, split, task) == {"f1": 0.0, "em": 0.0, "accuracy": 0.0}
    assert rules.decoding(scores, split, task) == {}


def test_options_of_record_score_the_best_of_all_answers(backbone_folder: Folder) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    example = OptionsExample(
        text="book",
        options=("a", "the"),
        names=("The New York Times", "Boston"),
        correct=(),
        answers=("Times", "York Times"),
    )
    task = kind_task("record")
    split, _ = encode_examples([example], tokenizer, task=task, max_length=8)
    metrics = rules_of("options").metrics(["The New York Times"], split, task)
    # 2 of 3 words said, 2 of 2 found
    assert metrics == {"f1": pytest.approx(0.8), "em": 0.0, "accuracy": 0.0}


# Spans


def test_spans_lose_the_mean_of_both_ends(encode: Encode) -> None:
    split = encode("qa", max_length=16, stride=2)
    batch, rules = whole(split), rules_of("spans")
    logits = noise(len(split), batch.input_ids.shape[1], 2)
    logits[~batch.token_mask] = torch.finfo(torch.float32).min
    slow = 0.0
    for row in range(len(split)):
        size = int(split.lengths[row])
        for side in (0, 1):
            shares = torch.softmax(logits[row, :size, side], 0)
            slow -= math.log(float(shares[int(split.labels[row, side])])) / 2
    assert float(rules.loss(logits, batch)) == pytest.approx(slow, rel=1e-5)
    assert rules.count(batch) == len(split) > 9


def spans_outcomes(split: EncodedSplit, logits: Tensor) -> Outcomes:
    """Return the outcomes of logits `[rows, T, 2]`, computed in two batches."""
    rules, found = rules_of("spans"), {}
    for rows in np.array_split(np.arange(len(split)), min(2, len(split))):
        batch = collate(split, rows)
        own = logits[rows, : batch.input_ids.shape[1]]
        found |= dict(zip(rows.tolist(), rules.outcomes(own, batch, split), strict=True))
    return np.concatenate([found[row] for row in range(len(split))])


def brute_force(split: EncodedSplit, logits: Tensor, group: int) -> list[tuple[float, str]]:
    """Return every answer to a question with its score, the best first, each text once."""
    context = split.note(group)["context"]
    found: dict[str, float] = {}
    for row in np.flatnonzero(split.groups == group):
        chars = split.chars[split.offsets[row] : split.offsets[row + 1]].tolist()
        places = [place for place, (start, _) in enumerate(chars) if start >= 0]
        for first, last in itertools.product(places, places):
            if first <= last < first + 30:
                text = context[chars[first][0] : chars[last][1]]
                score = float(logits[row, first, 0].double() + logits[row, last, 1].double())
                found[text] = max(score, found.get(text, -math.inf))
    return sorted(((score, text) for text, score in found.items()), reverse=True)


def test_spans_rank_answers_as_a_search_over_all_pairs(encode: Encode) -> None:
    split = encode("qa", max_length=16, stride=2)
    logits = noise(len(split), 16, 2) * 3
    outcomes = spans_outcomes(split, logits)
    for group, guesses in enumerate(spans.n_best(outcomes, split)):
        slow = brute_force(split, logits, group)[: spans.NUM_BEST]
        assert [guess.text for guess in guesses] == [text for _, text in slow]
        assert [guess.score for guess in guesses] == pytest.approx([score for score, _ in slow])
        context = split.note(group)["context"]
        assert all(context[guess.start : guess.end] == guess.text for guess in guesses)


def test_spans_have_at_most_thirty_tokens(backbone_folder: Folder) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    example = QuestionExample(question="to", context=" ".join(["a"] * 50), answers=())
    split, _ = encode_examples([example], tokenizer, task=kind_task("qa"), max_length=64)
    logits = torch.zeros(1, 54, 2)
    logits[0, 3, 0] = logits[0, 52, 1] = 10.0
    best = spans.n_best(spans_outcomes(split, logits), split)[0][0]
    assert best.score == 10.0
    assert len(best.text.split()) <= 30


def test_spans_answer_nothing_by_the_least_null_score(encode: Encode) -> None:
    split = encode("qa", max_length=16, stride=2)
    task, rules = kind_task("qa"), rules_of("spans")
    logits = noise(len(split), 16, 2)
    outcomes = spans_outcomes(split, logits)
    best = [brute_force(split, logits, group)[0] for group in range(9)]
    nulls = [float(logits[split.groups == group, 0].double().sum(-1).min()) for group in range(9)]
    differences = [null - score for null, (score, _) in zip(nulls, best, strict=True)]
    threshold = sorted(differences)[4]
    found = rules.predictions(outcomes, split, task, {"null_threshold": threshold})
    assert found == [
        "" if difference > threshold else text
        for difference, (_, text) in zip(differences, best, strict=True)
    ]
    assert found.count("") == 4  # type: ignore[attr-defined]
    # without a threshold all are answered
    assert rules.predictions(outcomes, split, task, {}) == [text for _, text in best]


def test_spans_choose_the_threshold_of_the_best_f1(encode: Encode) -> None:
    split = encode("qa", 30, max_length=16, stride=2)
    task, rules = kind_task("qa"), rules_of("spans")
    # right answers stand out, and null scores where there is none
    logits = noise(len(split), 16, 2)
    rows = torch.arange(len(split))
    for side in (0, 1):
        logits[rows, torch.from_numpy(split.labels[:, side]).long(), side] += 3.0
    outcomes = spans_outcomes(split, logits)
    chosen = rules.decoding(outcomes, split, task)
    json.dumps(chosen, allow_nan=False)
    score = rules.metrics(rules.predictions(outcomes, split, task, chosen), split, task)["f1"]
    best = [brute_force(split, logits, group)[0] for group in range(30)]
    nulls = [float(logits[split.groups == group, 0].double().sum(-1).min()) for group in range(30)]
    differences = [null - one for null, (one, _) in zip(nulls, best, strict=True)]
    answers = {group: split.note(group)["answers"] for group in range(30)}

    scores = [oracle.best_f1(text, answers[group]) for group, (_, text) in enumerate(best)]
    has_answer = [bool(answers[group]) for group in range(30)]

    def f1_at(threshold: float) -> float:
        return oracle.mean_at(threshold, differences, scores, has_answer)

    assert score == pytest.approx(max(f1_at(one) for one in [-1e9, *differences]))
    assert score == pytest.approx(f1_at(chosen["null_threshold"]))
    assert score > max(f1_at(-1e9), f1_at(1e9))


def test_spans_need_no_threshold_where_every_question_has_an_answer(
    backbone_folder: Folder,
) -> None:
    tokenizer = load_tokenizer(locate(str(backbone_folder("bert"))))
    examples = [one for one in kind_examples("qa", 9) if one.answers]  # type: ignore[union-attr]
    split, _ = encode_examples(examples, tokenizer, task=kind_task("qa"), max_length=48)
    rules, task = rules_of("spans"), kind_task("qa")
    outcomes = spans_outcomes(split, noise(6, 48, 2))
    assert rules.decoding(outcomes, split, task) == {}
    assert all(rules.predictions(outcomes, split, task, {}))
    assert rules.metrics(rules.gold(split, task), split, task) == {"f1": 1.0, "em": 1.0}
