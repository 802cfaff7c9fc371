"""Which rows make a batch."""

import asyncio

import numpy as np
import pytest

from ptv2_serving.engine.forward import Row
from ptv2_serving.engine.requests import Request
from ptv2_serving.engine.waiting import Item, Waiting


@pytest.fixture
def request_of_many() -> Request:
    with asyncio.Runner() as runner:
        return Request(99, runner.get_loop().create_future())


def make(request: Request, *lengths: int, mixes: object = None) -> list[Item]:
    return [
        Item(
            row=Row(0, np.zeros(length, dtype=np.int32), None, -1),
            place=place,
            request=request,
            mixes=mixes,
        )
        for place, length in enumerate(lengths)
    ]


def lengths(items: list[Item]) -> list[int]:
    return [item.tokens for item in items]


def test_waiting_begins_with_the_longest_wait_and_fills_up_with_like_lengths(
    request_of_many: Request,
) -> None:
    waiting = Waiting(token_budget=64, batch_rows=8)
    waiting.add(make(request_of_many, 16, 60, 15, 17, 16, 16))
    assert lengths(waiting.take()) == [16, 16, 16, 15]  # with one of 17 it would be 4 * 17
    assert lengths(waiting.take()) == [60]
    assert lengths(waiting.take()) == [17]
    assert waiting.take() == []


def test_waiting_lets_a_row_over_the_budget_stand_alone(request_of_many: Request) -> None:
    waiting = Waiting(token_budget=64, batch_rows=8)
    waiting.add(make(request_of_many, 100, 100))
    assert lengths(waiting.take()) == [100]
    assert len(waiting) == 1


def test_waiting_bounds_the_rows_of_a_batch(request_of_many: Request) -> None:
    waiting = Waiting(token_budget=1000, batch_rows=3)
    waiting.add(make(request_of_many, 4, 4, 4, 4))
    assert waiting.is_full()
    assert len(waiting.take()) == 3
    assert not waiting.is_full()


def test_waiting_never_mixes_what_must_stand_alone(request_of_many: Request) -> None:
    waiting = Waiting(token_budget=1000, batch_rows=8)
    alone, others = make(request_of_many, 4, 4, mixes=7), make(request_of_many, 4, 4)
    waiting.add([alone[0], others[0], alone[1], others[1]])
    assert waiting.take() == alone
    assert waiting.take() == others


def test_waiting_puts_failed_rows_before_all_others(request_of_many: Request) -> None:
    waiting = Waiting(token_budget=4, batch_rows=8)
    first, again = make(request_of_many, 4), make(request_of_many, 3, 2)
    waiting.add(first)
    waiting.add(again, first=True)
    assert [waiting.take() for _ in range(3)] == [[again[0]], [again[1]], first]


def test_waiting_forgets_the_rows_of_a_request(request_of_many: Request) -> None:
    waiting = Waiting(token_budget=64, batch_rows=8)
    with asyncio.Runner() as runner:
        other = Request(1, runner.get_loop().create_future())
    kept = make(other, 5)
    waiting.add([*make(request_of_many, 4, 4), *kept])
    waiting.forget(request_of_many)
    assert list(waiting) == kept
