"""When a canary is taken back."""

import pytest

from ptv2_serving.guard import Limits, Record, verdict

LIMITS = Limits(min_requests=10)


def record(seconds: float, *, count: int = 20, failed: int = 0) -> Record:
    made = Record()
    for place in range(count):
        made.add(seconds, failed=place < failed)
    return made


@pytest.mark.parametrize(
    ("champion", "canary", "expected"),
    [
        (record(0.01), record(0.01), None),
        (record(0.01), record(0.025), None),  # slower, but by less than is worth a word
        (record(0.05), record(0.09), None),  # less than twice as slow
        (record(0.05), record(0.12), "its median latency is 120 ms, the champion's 50 ms"),
        (record(0.01), record(0.01, failed=1), None),
        (
            record(0.01),
            record(0.01, failed=2),
            "10% of its last 20 requests failed, 0% of the champion's",
        ),
        (record(0.01, failed=8), record(0.01, failed=8), None),  # what hurts both is no reason
        (record(0.01), record(9.0, count=9, failed=9), None),  # too few to judge
        (Record(), record(9.0), None),  # nobody asked the champion meanwhile
    ],
)
def test_guard_takes_back_what_does_worse(
    champion: Record, canary: Record, expected: str | None
) -> None:
    assert verdict(champion, canary, LIMITS) == expected


def test_guard_remembers_the_latest_requests_alone() -> None:
    made = record(0.01, count=500, failed=500)
    for _ in range(500):
        made.add(0.01, failed=False)
    assert made.error_share == 0.0
    assert len(made.seconds) == 500
