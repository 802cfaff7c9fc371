"""Questions about a long context become overlapping windows of it.

Letters: T tokens.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ptv2_core.data.encoding.rows import Row, chunks, require_separator, token_counts
from ptv2_core.data.encoding.split import IntArray
from ptv2_core.data.examples import Answer, QuestionExample
from ptv2_core.errors import DataError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# what a byte-level tokenizer may count to the token behind it
SPACES = np.array([ord(space) for space in " \t\n\r\x0b\x0c\xa0\u2009\u200a\u202f\u3000"])


def window_rows(
    examples: Sequence[QuestionExample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    stride: int,
) -> Iterator[list[Row]]:
    """Yield the windows of each example: its question, and a piece of its context.

    Args:
        examples: Questions about contexts.
        tokenizer: The backbone's.
        max_length: Tokens of a row at most.
        stride: Tokens that two windows of a context share.

    Raises:
        DataError: A question leaves no room for windows that move forward, or the tokenizer puts
            nothing behind it.
    """
    require_separator(tokenizer)
    for chunk in chunks(examples):
        questions = [example.question for example in chunk]
        _check_room(chunk, token_counts(questions, tokenizer), tokenizer, max_length, stride)
        encoded = tokenizer(
            questions,
            [example.context for example in chunk],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            return_token_type_ids=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        owners = np.array(encoded["overflow_to_sample_mapping"])
        edges = np.searchsorted(owners, np.arange(len(chunk) + 1))
        for at, example in enumerate(chunk):
            yield _windows(example, encoded, range(edges[at], edges[at + 1]))


def _check_room(
    examples: Sequence[QuestionExample],
    lengths: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    stride: int,
) -> None:
    specials = tokenizer.num_special_tokens_to_add(pair=True)
    problems = []
    for example, length in zip(examples, lengths, strict=True):
        room = max_length - specials - length
        if room < 1:
            problems.append(
                f"{example.where}: the question has {length} tokens and leaves no room for its "
                f"context: expected fewer than {max_length - specials}; raise "
                f"prepare.max_length ({max_length}) or shorten the question"
            )
        elif stride >= room:
            problems.append(
                f"{example.where}: overlapping windows longer than the model: the question leaves "
                f"{room} tokens for a window, expected more than prepare.stride ({stride}); "
                f"lower it or raise prepare.max_length ({max_length})"
            )
    if problems:
        raise DataError.collected(problems)


def _windows(example: QuestionExample, encoded: "BatchEncoding", places: range) -> list[Row]:
    codes = np.frombuffer(example.context.encode("utf-32-le"), dtype="<u4")
    is_space = np.append(np.isin(codes, SPACES), False)
    rows = []
    for place in places:
        texts = encoded.sequence_ids(place)
        is_context = np.array([text == 1 for text in texts])
        chars = np.array(encoded["offset_mapping"][place], dtype=np.int32)
        chars = _without_leading_space(chars, is_space)
        chars[~is_context] = -1
        answer = (0, 0)
        if example.answers:
            # a context begins in its first window and ends in its last
            answer = _tokens_of(
                example.answers[0],
                chars,
                is_first=place == places[0],
                is_last=place == places[-1],
            )
        rows.append(
            Row(
                input_ids=np.array(encoded["input_ids"][place], dtype=np.int32),
                token_type_ids=np.array(encoded["token_type_ids"][place], dtype=np.int32),
                is_cut=False,
                chars=chars,
                answer=answer,
            )
        )
    return rows


def _without_leading_space(chars: IntArray, is_space: np.ndarray) -> IntArray:
    """Move starts past spaces; a token of nothing else stays as it is."""
    starts, ends = chars[:, 0].copy(), chars[:, 1]
    while True:
        moves = is_space[np.minimum(starts, len(is_space) - 1)] & (starts < ends)
        if not moves.any():
            break
        starts += moves
    starts = np.where(starts < ends, starts, chars[:, 0])
    return np.stack([starts, ends], axis=1).astype(np.int32)


def _tokens_of(
    answer: Answer, chars: IntArray, *, is_first: bool, is_last: bool
) -> tuple[int, int]:
    """Return first and last token of an answer, both 0 where the window does not hold all of it."""
    start = answer.start + len(answer.text) - len(answer.text.lstrip())
    end = answer.start + len(answer.text.rstrip())
    context = np.flatnonzero(chars[:, 0] >= 0)
    touched = context[(chars[context, 1] > start) & (chars[context, 0] < end)]
    if not len(touched):
        return 0, 0
    begins_before = is_first or chars[context[0], 0] <= start
    ends_behind = is_last or chars[context[-1], 1] >= end
    return (int(touched[0]), int(touched[-1])) if begins_before and ends_behind else (0, 0)
