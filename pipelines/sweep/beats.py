"""Who trains what on a work pool, and that it lives: in the study, like all that a sweep relies on.

A worker's machine may vanish without a word to Prefect, and one that was taken for dead may come
back. So the sweep notes to whom it gave a training, by a place (one for each trial side by side)
and a token; whoever trains writes under its place that it is alive, and ends when the place is
another's.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipelines.errors import PipelineError
from pipelines.sweep.trials import SweepStudy

GIVEN, BEAT = "given", "beat"
BEATS_PER_TIMEOUT = 4
SLOWEST_BEAT_S = 5.0
"""However long the heartbeat: a training that nobody waits for ends soon."""


def every_s(heartbeat_s: float) -> float:
    """Return how often one that trains says that it is alive."""
    return min(heartbeat_s / BEATS_PER_TIMEOUT, SLOWEST_BEAT_S)


def give(study: SweepStudy, place: int, token: str) -> None:
    """Note who trains at a place; whoever did before ends. An empty token is nobody."""
    study.note(f"{GIVEN}:{place}", token)


def take_all(study: SweepStudy) -> None:
    """Give no place to anybody, whichever sweep gave it."""
    for name in study.noted():
        if name.startswith(f"{GIVEN}:"):
            study.note(name, "")


def is_given(study: SweepStudy, place: int, token: str) -> bool:
    """Tell whether a place is still that of a token."""
    return study.noted().get(f"{GIVEN}:{place}") == token


def last(study: SweepStudy) -> dict[int, str]:
    """Return the last beat of each place; it begins with the token of whoever wrote it."""
    found = {}
    for name, value in study.noted().items():
        prefix, _, place = name.partition(":")
        if prefix == BEAT:
            found[int(place)] = str(value)
    return found


@contextmanager
def beating(
    study: SweepStudy,
    place: int,
    token: str,
    *,
    heartbeat_s: float,
    on_lost: Callable[[], None],
) -> Iterator[None]:
    """Say that this process is alive while something is done.

    Args:
        study: Where it is said.
        place: That of what is done.
        token: Whose the place is.
        heartbeat_s: Silence after which this process is taken for dead.
        on_lost: Called, from another thread, once the place is another's or the study is gone.
    """
    over = threading.Event()

    def beat() -> None:
        count = 0
        try:
            while is_given(study, place, token):
                count += 1
                study.note(f"{BEAT}:{place}", f"{token}:{count}")
                if over.wait(every_s(heartbeat_s)):
                    return
        except PipelineError:
            pass  # whoever trains meets the same error at the next epoch, which may be far
        if not over.is_set():
            on_lost()

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
