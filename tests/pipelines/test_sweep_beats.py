"""Places of trainings on a work pool: one owner each, who says that it is alive."""

import threading
import time
from pathlib import Path

import pytest

from pipelines.schema import SearchSettings
from pipelines.sweep import beats
from pipelines.sweep.trials import SweepStudy


@pytest.fixture
def study(tmp_path: Path) -> SweepStudy:
    return SweepStudy(f"sqlite:///{tmp_path / 'sweeps.db'}", "a-study", SearchSettings())


def wait_for(event: threading.Event) -> None:
    assert event.wait(10)


def test_beats_are_written_under_the_token_of_whoever_has_the_place(study: SweepStudy) -> None:
    lost = threading.Event()
    beats.give(study, 1, "mine")
    with beats.beating(study, 1, "mine", heartbeat_s=0.2, on_lost=lost.set):
        while beats.last(study).get(1) != "mine:3":
            time.sleep(0.01)
    assert not lost.is_set()
    said = beats.last(study)
    time.sleep(0.2)
    assert beats.last(study) == said, "it is over"
    assert set(said) == {1}


@pytest.mark.parametrize("how", ["given to another", "taken by a new sweep"])
def test_beats_end_a_training_whose_place_is_gone(how: str, study: SweepStudy) -> None:
    lost = threading.Event()
    beats.give(study, 0, "mine")
    with beats.beating(study, 0, "mine", heartbeat_s=0.2, on_lost=lost.set):
        if how == "given to another":
            beats.give(study, 0, "theirs")
        else:
            beats.take_all(study)
        wait_for(lost)
    assert not beats.is_given(study, 0, "mine")


def test_beats_are_quick_however_long_the_heartbeat() -> None:
    assert beats.every_s(2.0) == 0.5
    assert beats.every_s(86400.0) == 5.0
