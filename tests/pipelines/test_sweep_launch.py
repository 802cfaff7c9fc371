"""What `ptv2 sweep` draws while it goes on, and prints at its end; nothing is trained."""

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.errors import PipelineError
from pipelines.settings import Settings, load_settings
from pipelines.sweep import flow, launch
from pipelines.sweep.looks import Look
from tests.pipelines.sweep_parts import sweep, trial
from tests.stage_parts import PARAMS, write_params

RUNNING = trial(7, epochs=(0.25,), value=None, state="failed")
ENDED = (
    trial(0, epochs=(0.5, 0.75), value=0.75),
    trial(1, epochs=(0.625,), value=0.625, state="pruned"),
    trial(2, epochs=(), value=None, state="crashed", message="its [process] ended"),
    *(trial(number, epochs=(0.5 + number / 100,), value=0.5 + number / 100) for number in (3, 4)),
    trial(5, epochs=(0.875, 0.8125), value=0.875),
    trial(6, epochs=(0.125,), value=0.125),
)


def look(**changes: Any) -> Look:
    values: dict[str, Any] = {
        "task": "intents",
        "asked": 24,
        "ended": ENDED,
        "running": (RUNNING,),
        "finalists_left": 0,
        "seconds_left": 89.4,
    }
    return Look(**{**values, **changes})


def drawn(*looks: Look, is_terminal: bool = True, width: int = 140) -> str:
    """Return what is drawn of looks, one after the other."""
    text = StringIO()
    console = Console(file=text, force_terminal=is_terminal, width=width, color_system=None)
    with launch._drawing(console) as on_look:
        for one in looks:
            on_look(one)
    return text.getvalue()


def rows(one: Look, width: int = 140) -> list[str]:
    """Return the lines of a picture."""
    console = Console(file=StringIO(), width=width)
    with console.capture() as captured:
        console.print(launch.picture(one))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_picture_says_how_it_stands_and_shows_what_runs_and_what_is_best() -> None:
    head, names, *table = rows(look())
    assert head == (
        "sweep of intents: 7 of 24 trials (5 complete, 1 pruned, 1 crashed), about 89 s left"
    )
    assert names.split() == ["trial", "state", "epoch", "dev", "settings"]
    # what runs is first; then the five best, without those that have no score
    assert [line.split()[:4] for line in table] == [
        ["7", "running", "1", "0.2500"],
        ["5", "complete", "2", "0.8750"],
        ["0", "complete", "2", "0.7500"],
        ["1", "pruned", "1", "0.6250"],
        ["4", "complete", "1", "0.5400"],
        ["3", "complete", "1", "0.5300"],
    ]
    assert table[0].endswith("prompt_length 16, learning_rate 0.01")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ended": (), "seconds_left": None}, "sweep of intents: 0 of 24 trials"),
        ({"ended": (), "seconds_left": 90.0}, "sweep of intents: 0 of 24 trials, about 2 min left"),
        (
            {"ended": ENDED[:1], "finalists_left": 4, "seconds_left": 0.0},
            "sweep of intents: 1 of 24 trials (1 complete), 4 trainings of finalists to come, "
            "about 0 s left",
        ),
    ],
)
def test_picture_says_what_is_known_alone(changes: dict[str, Any], words: str) -> None:
    assert rows(look(**changes))[0] == words


def test_picture_of_a_trial_that_has_no_epoch_yet() -> None:
    running = trial(0, epochs=(), value=None, message="went on [from] a checkpoint")
    line = rows(look(running=(running,), ended=()))[2]
    assert line.split()[:4] == ["0", "running", "0", "-"]
    assert line.endswith("(went on [from] a checkpoint)")


def test_table_lives_in_a_terminal() -> None:
    said = drawn(look(seconds_left=None), look(finalists_left=3))
    assert "3 trainings of finalists to come" in said
    assert "running" in said
    assert said.endswith("\x1b[?25h") or "\x1b[2K" in said, "it is cleared at the end"


def test_elsewhere_each_trial_is_a_line_once() -> None:
    said = drawn(look(ended=ENDED[:2]), look(ended=ENDED[:3]), is_terminal=False)
    settings = "prompt_length 16, learning_rate 0.01"
    assert said.splitlines() == [
        f"intents: trial 0 complete 0.7500: {settings}",
        f"intents: trial 1 pruned 0.6250: {settings}",
        f"intents: trial 2 crashed: {settings} (its [process] ended)",
    ]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Settings]:
    """Return what loads the settings of a workspace by its path from the current folder."""
    here = tmp_path / "here"
    here.mkdir()
    (tmp_path / "space").mkdir()
    write_params(tmp_path / "space", PARAMS)
    monkeypatch.chdir(here)

    def loaded(workspace: str) -> Settings:
        return load_settings(Path(workspace) / "params.yaml")

    return loaded


def test_launch_prints_what_was_found_and_where_as_seen_from_here(
    settings: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders: list[Path] = []

    def swept(given: Settings, tasks: list[str], **options: Any) -> Any:
        folders.append(Path.cwd())
        assert (given.root, tasks) == (Path(), ["intents", "pairs"])
        failed = PipelineError("pairs: expected a file")
        return [sweep(ENDED[0], asked=3, stopped="no gain")], failed

    monkeypatch.setattr(flow, "run", swept)
    text = StringIO()
    console = Console(file=text, width=140)
    options: dict[str, Any] = {"trials": None, "workers": None, "console": console}
    with pytest.raises(PipelineError, match="pairs: expected a file"):
        launch.run(settings("../space"), ["intents", "pairs"], **options)
    assert folders == [tmp_path / "space"]
    said = text.getvalue()
    assert "swept intents: 1 complete; 2 epochs; no gain" in said
    assert "Finalists by mean minus spread" in said
    assert (
        "page      ../space/results/sweeps/intents/study.html (`ptv2 study intents -C ../space` "
        "prints all trials)"
    ) in said
    assert "ptv2 apply intents -C ../space, then ptv2 run --task intents -C ../space" in said


def test_launch_in_the_workspace_names_no_folder(
    settings: Callable[[str], Settings], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path / "space")
    monkeypatch.setattr(flow, "run", lambda *given, **options: ([sweep(ENDED[0])], None))
    text = StringIO()
    options: dict[str, Any] = {"trials": None, "workers": None, "console": Console(file=text)}
    launch.run(settings("."), ["intents"], **options)
    assert "page      results/sweeps/intents/study.html (`ptv2 study intents` " in text.getvalue()
    assert "apply     ptv2 apply intents, then ptv2 run --task intents\n" in text.getvalue()
