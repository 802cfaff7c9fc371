"""Raw inputs become rows for a backbone, and a head's logits become answers; no model is needed.

Letters: T tokens, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptv2_core.data.batching import collate
from ptv2_core.data.encoding import EncodedSplit, LongArray, encode_inputs
from ptv2_core.data.examples import Example, OptionsExample, TokensExample
from ptv2_core.data.tasks import Form, TaskSpec
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import Decoding, Outcomes
from ptv2_core.evaluation.forms.spans import ranked
from ptv2_core.evaluation.inputs import examples_of_inputs
from ptv2_core.evaluation.metrics import spans

# how many of an answer's rivals a prediction shows
NUM_SHOWN = 5
# rows that are decoded at once, which bounds the padded logits of long answers
DECODED_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Inputs as rows.

    Attributes:
        inputs: As they were given.
        examples: One for each input.
        split: Their rows.
        is_cut: For each input, whether it was cut to the maximal length.
    """

    inputs: Sequence[Mapping[str, Any]]
    examples: Sequence[Example]
    split: EncodedSplit
    is_cut: Sequence[bool]


class Codec:
    """What stands before and behind the model for one prompt. Nothing in it changes."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskSpec,
        *,
        max_length: int,
        stride: int = 0,
        decoding: Decoding | None = None,
        token_types: bool = True,
    ) -> None:
        """Read and answer inputs of a task.

        Args:
            tokenizer: The backbone's.
            task: What is answered.
            max_length: Tokens of a row at most.
            stride: Tokens that two windows of a long context share.
            decoding: Settings of an answer that dev chose; None: none.
            token_types: Whether tokens of a second text have a type of their own, as the tokenizer
                gives it; else all have that of the first.
        """
        self.task = task
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._stride = stride
        self._decoding = decoding or {}
        self._token_types = token_types

    @property
    def padding_id(self) -> int:
        """The token that rows are padded with: the tokenizer's, or its end of text, or the first.

        No model here reads it; others tell by it where a row ends.
        """
        named = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((token for token in named if isinstance(token, int)), 0)

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> Asked:
        """Return inputs as rows.

        Raises:
            DataError: An input lacks what its kind needs.
        """
        examples = examples_of_inputs(inputs, self.task)
        split, is_cut = encode_inputs(
            examples,
            self._tokenizer,
            task=self.task,
            max_length=self.max_length,
            stride=self._stride,
        )
        if not self._token_types:
            split = replace(split, token_type_ids=np.zeros_like(split.token_type_ids))
        return Asked(inputs=inputs, examples=examples, split=split, is_cut=is_cut)

    def logits_by_input(self, asked: Asked, logits: Sequence[Tensor]) -> list[Tensor]:
        """Return the logits of each input, see `Predictor.logits`.

        Args:
            asked: What `encode` returned.
            logits: Of each row, `[C]` or `[T, C]`, on the CPU.
        """
        split = asked.split
        if self.task.form == "options":
            edges = split.units
            return [
                torch.cat(list(logits[start:end]))
                for start, end in zip(edges, edges[1:], strict=False)
            ]
        if self.task.form == "spans":
            firsts = np.searchsorted(split.groups, np.arange(len(asked.examples)))
            return [logits[first] for first in firsts]
        if self.task.form == "tokens":
            edges = split.offsets
            begins = split.word_index >= 0
            return [
                own[torch.from_numpy(begins[edges[row] : edges[row + 1]])]  # [T, C] -> [words, C]
                for row, own in enumerate(logits)
            ]
        return list(logits)

    def decode(self, asked: Asked, logits: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Return an answer an input, see `Predictor.predict`; arguments as above."""
        return ANSWERS[self.task.form](self, asked, logits)

    def outcomes(self, asked: Asked, logits: Sequence[Tensor]) -> Outcomes:
        """Return what the form's rules keep of all rows; arguments as above."""
        rules, split = rules_of(self.task.form), asked.split
        offsets = rules.outcome_offsets(split)
        found = np.zeros(offsets[-1], dtype=np.float64)
        for start in range(0, len(split), DECODED_ROWS):
            rows: LongArray = np.arange(start, min(start + DECODED_ROWS, len(split)))
            batch = collate(split, rows)
            padded = _padded([logits[row] for row in rows], batch.input_ids.shape[1])
            for row, own in zip(rows, rules.outcomes(padded, batch, split), strict=True):
                found[offsets[row] : offsets[row + 1]] = own
        return found

    def answers(self, asked: Asked, logits: Sequence[Tensor]) -> Sequence[Any]:
        """Return the answers in the form of predictions; arguments as above."""
        rules = rules_of(self.task.form)
        outcomes = self.outcomes(asked, logits)
        return rules.predictions(outcomes, asked.split, self.task, self._decoding)

    def guesses(self, asked: Asked, logits: Sequence[Tensor]) -> list[list[Any]]:
        """Return the best answers to each question, best first; arguments as above."""
        return ranked(self.outcomes(asked, logits), asked.split, self._decoding)


def _padded(logits: Sequence[Tensor], width: int) -> Tensor:
    """`[C]` each to `[B, C]`, or `[T, C]` each to `[B, T, C]`, the lowest number at padding."""
    if logits[0].dim() == 1:
        return torch.stack(list(logits))
    lowest = torch.finfo(logits[0].dtype).min
    padded = logits[0].new_full((len(logits), width, logits[0].shape[1]), lowest)
    for place, own in enumerate(logits):
        padded[place, : len(own)] = own
    return padded


def _labels(codec: Codec, asked: Asked, logits: Sequence[Tensor]) -> list[dict[str, Any]]:
    found = []
    for answer, own in zip(codec.answers(asked, logits), logits, strict=True):
        shares = own.softmax(dim=-1).tolist()
        probabilities = dict(zip(codec.task.labels, shares, strict=True))
        found.append({"label": answer, "probabilities": probabilities})
    return found


def _values(codec: Codec, asked: Asked, logits: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"value": value} for value in codec.answers(asked, logits)]


def _choices(codec: Codec, asked: Asked, logits: Sequence[Tensor]) -> list[dict[str, Any]]:
    found = []
    by_input = codec.logits_by_input(asked, logits)
    for example, own in zip(asked.examples, by_input, strict=True):
        assert isinstance(example, OptionsExample), "a task of options has nothing else"
        # the first of equal ones, as in scoring
        best = int(np.argmax(own.numpy()))
        found.append(
            {
                "choice": best,
                "text": example.names[best],
                "options": list(example.names),
                "probabilities": own.softmax(dim=-1).tolist(),
            }
        )
    return found


def _tags(codec: Codec, asked: Asked, logits: Sequence[Tensor]) -> list[dict[str, Any]]:
    found = []
    answers = codec.answers(asked, logits)
    for given, example, tags in zip(asked.inputs, asked.examples, answers, strict=True):
        assert isinstance(example, TokensExample), "a task of words has nothing else"
        # of all kinds tagging alone takes a text in place of words
        is_text = codec.task.kind == "tagging" and not isinstance(given.get("tokens"), list)
        text = str(given["text"]) if is_text else " ".join(example.tokens)
        places = _places(text, example.tokens)
        named = [
            {
                "type": span.type,
                "start": span.start,
                "end": span.end,
                "start_char": places[span.start][0],
                "end_char": places[span.end - 1][1],
                "text": " ".join(example.tokens[span.start : span.end]),
            }
            for span in spans(tags)
        ]
        found.append({"tokens": list(example.tokens), "tags": list(tags), "spans": named})
    return found


def _places(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Return at which characters each word begins and ends in a text of nothing else."""
    found, at = [], 0
    for token in tokens:
        # from the end of the word before there is white space alone, and no word is that
        start = text.index(token, at)
        at = start + len(token)
        found.append((start, at))
    return found


def _texts(codec: Codec, asked: Asked, logits: Sequence[Tensor]) -> list[dict[str, Any]]:
    found = []
    for guesses in codec.guesses(asked, logits):
        scores = torch.tensor([guess.score for guess in guesses], dtype=torch.float64)
        # a context without tokens has one guess of no score
        shares = scores.softmax(dim=0).nan_to_num(nan=1.0).tolist()
        n_best = [
            {
                "text": guess.text,
                "start": guess.start if guess.text else None,
                "end": guess.end if guess.text else None,
                "score": share,
            }
            for guess, share in zip(guesses, shares, strict=True)
        ]
        found.append({**n_best[0], "n_best": n_best[:NUM_SHOWN]})
    return found


ANSWERS: Mapping[Form, Callable[[Codec, Asked, Sequence[Tensor]], list[dict[str, Any]]]] = {
    "rows": _labels,
    "values": _values,
    "options": _choices,
    "tokens": _tags,
    "spans": _texts,
}
