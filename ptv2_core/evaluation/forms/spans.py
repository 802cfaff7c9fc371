"""A stretch of a context, found in windows of it, or no answer.

Letters: B windows, T tokens, A the tokens of the longest answer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptv2_core.data.batching import Batch
from ptv2_core.data.encoding import EncodedSplit, LongArray
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.answers import answer_f1, best_null_threshold, squad_metrics
from ptv2_core.evaluation.forms.base import Decoding, Outcomes, Predictions

NULL_THRESHOLD = "null_threshold"
MAX_ANSWER_TOKENS = 30
NUM_BEST = 20
# a window's outcomes: the score of no answer, then start, end and score of its best answers
WIDTH = 1 + 3 * NUM_BEST


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A possible answer.

    Attributes:
        text: As it stands in the context; empty: no answer.
        start: Its first character's place; -1 for no answer.
        end: One past its last character's place; -1 for no answer.
        score: Sum of the logits of its first and last token.
    """

    text: str
    start: int
    end: int
    score: float


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the sum over windows of the mean cross-entropy of first and last token.

    Args:
        logits: `[B, T, 2]`, the lowest number there is at padding.
        batch: Its labels are `[B, 2]`; without an answer both are the first token.
    """
    assert batch.labels is not None, "windows to learn from have labels"
    # [B, T, 2] with targets [B, 2]
    return nn.functional.cross_entropy(logits.float(), batch.labels, reduction="sum") / 2


def count(batch: Batch) -> int:
    """Return the number of windows."""
    return len(batch.rows)


def outcome_offsets(split: EncodedSplit) -> LongArray:
    """`[rows + 1]`: as many outcomes for every window."""
    return np.arange(len(split) + 1) * WIDTH


def outcomes(logits: Tensor, batch: Batch, split: EncodedSplit) -> list[Outcomes]:
    """Return each window's score of no answer, and its best answers with their characters.

    Where it has fewer, their characters are -1 and their scores minus infinity.
    """
    scores = logits.detach().cpu().double()
    chars = torch.full((*scores.shape[:2], 2), -1, dtype=torch.float64)
    for place, row in enumerate(batch.rows):
        # copied, since a split's arrays may be files that are read and not written
        own = np.array(split.chars[split.offsets[row] : split.offsets[row + 1]])
        chars[place, : len(own)] = torch.from_numpy(own)
    is_context = chars[:, :, 0] >= 0
    firsts, lasts = scores.masked_fill(~is_context[:, :, None], -torch.inf).unbind(dim=-1)
    width = MAX_ANSWER_TOKENS
    lasts = nn.functional.pad(lasts, (0, width - 1), value=-torch.inf)
    pairs = firsts[:, :, None] + lasts.unfold(1, width, 1)  # [B, T, A]
    best, flat = pairs.flatten(1).topk(NUM_BEST, dim=1)  # [B, best]
    first = flat // width
    last = (first + flat % width).clamp(max=scores.shape[1] - 1)
    found = torch.stack(
        [chars[:, :, 0].gather(1, first), chars[:, :, 1].gather(1, last), best], dim=-1
    )
    found[:, :, :2].masked_fill_(~best.isfinite()[:, :, None], -1)
    none = scores[:, 0].sum(dim=-1, keepdim=True)  # [B, 1]
    rows: list[Outcomes] = list(torch.cat([none, found.flatten(1)], dim=1).numpy())
    return rows


def decoding(outcomes: Outcomes, split: EncodedSplit, task: TaskSpec) -> Decoding:
    """Return `null_threshold` where a question has no answer, else nothing: all are answered.

    No answer is given where its score passes that of the best answer by more than the threshold,
    which is the one of the best F1 on the split.
    """
    answers = [split.note(group)["answers"] for group in range(split.num_groups)]
    if all(answers):
        return {}
    best = [guesses[0] for guesses in n_best(outcomes, split)]
    threshold = best_null_threshold(
        [null - guess.score for null, guess in zip(_nulls(outcomes, split), best, strict=True)],
        [answer_f1(guess.text, own) for guess, own in zip(best, answers, strict=True)],
        is_answered=[bool(guess.text) for guess in best],
        has_answer=[bool(own) for own in answers],
    )
    return {NULL_THRESHOLD: threshold}


def predictions(
    outcomes: Outcomes, split: EncodedSplit, task: TaskSpec, decoding: Decoding
) -> Predictions:
    """Return the text of each question's answer, empty for none."""
    return [guesses[0].text for guesses in ranked(outcomes, split, decoding)]


def ranked(outcomes: Outcomes, split: EncodedSplit, decoding: Decoding) -> list[list[Guess]]:
    """Return each question's guesses, the answer first.

    With a `null_threshold`, no answer is among them.
    """
    found = n_best(outcomes, split)
    threshold = decoding.get(NULL_THRESHOLD)
    if threshold is None:
        return found
    result = []
    for guesses, score in zip(found, _nulls(outcomes, split), strict=True):
        null = Guess(text="", start=-1, end=-1, score=score)
        if score - guesses[0].score > threshold:
            result.append([null, *guesses])
        else:
            rest = sorted([null, *guesses[1:]], key=lambda guess: -guess.score)
            result.append([guesses[0], *rest])
    return result


def n_best(outcomes: Outcomes, split: EncodedSplit) -> list[list[Guess]]:
    """Return the best answers to each question over its windows, of each text once.

    A question without any, whose context has no tokens, has one empty guess of the lowest score.
    """
    table = outcomes.reshape(len(split), WIDTH)[:, 1:].reshape(len(split), NUM_BEST, 3)
    edges = _edges(split)
    result = []
    for group in range(split.num_groups):
        rows = table[edges[group] : edges[group + 1]].reshape(-1, 3)
        rows = rows[np.argsort(-rows[:, 2], kind="stable")]
        context = split.note(group)["context"]
        guesses: dict[str, Guess] = {}
        for first, last, score in rows[rows[:, 0] >= 0].tolist():
            start, end = int(first), int(last)
            text = context[start:end]
            guesses.setdefault(text, Guess(text=text, start=start, end=end, score=score))
        nothing = Guess(text="", start=-1, end=-1, score=-np.inf)
        result.append(list(guesses.values())[:NUM_BEST] or [nothing])
    return result


def _nulls(outcomes: Outcomes, split: EncodedSplit) -> list[float]:
    """Return the score of no answer to each question: the least of its windows."""
    scores = outcomes.reshape(len(split), WIDTH)[:, 0]
    least: list[float] = np.minimum.reduceat(scores, _edges(split)[:-1]).tolist()
    return least


def _edges(split: EncodedSplit) -> LongArray:
    """`[groups + 1]`: where each question's windows begin."""
    return np.searchsorted(split.groups, np.arange(split.num_groups + 1))


def gold(split: EncodedSplit, task: TaskSpec) -> Predictions:
    """Return each question's first answer, empty for none."""
    answers = [split.note(group)["answers"] for group in range(split.num_groups)]
    return [own[0] if own else "" for own in answers]


def metrics(predictions: Predictions, split: EncodedSplit, task: TaskSpec) -> dict[str, float]:
    """Return SQuAD's F1 and exact match."""
    answers = [split.note(group)["answers"] for group in range(split.num_groups)]
    return squad_metrics(predictions, answers)
