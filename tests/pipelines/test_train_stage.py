"""Training as a user runs it: killed, interrupted, divided among processes, in a few layers."""

import csv
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from safetensors import safe_open

from pipelines.paths import TaskPaths
from ptv2_core.files import locked
from tests.pipelines.processes import Running, environment, program, run
from tests.stage_parts import call, change_params, files, make_workspace

EPOCHS = 60
STEPS = 3 * EPOCHS  # 36 rows in batches of 16
TORCHRUN = ("--standalone", "--nproc-per-node", "2", "--no-python")

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="looks at processes in /proc"
)


def paths_of(root: Path) -> TaskPaths:
    return TaskPaths(root=root, task="intents")


def make_ready(root: Path, changes: dict[str, Any]) -> Path:
    """Make a workspace in which `intents` is prepared."""
    make_workspace(root)
    change_params(root, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert [call(stage, "-t", "intents") for stage in ("fetch", "prepare")] == [0, 0]
    return root


@pytest.fixture(scope="module")
def ready_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose training is next: long, and with a checkpoint every step."""
    changes = {
        "tasks.intents.search.n_trials": 0,
        "train.epochs": EPOCHS,
        "train.patience": EPOCHS,
        "run.checkpoint_s": 0,
    }
    root = make_ready(tmp_path_factory.mktemp("train") / "ready", changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert call("search", "-t", "intents") == 0
    return root


@pytest.fixture(scope="module")
def trained_once(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose training went to its end undisturbed."""
    root = shutil.copytree(ready_once, tmp_path_factory.mktemp("train") / "trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert call("train", "-t", "intents") == 0
    return root


@pytest.fixture(scope="module")
def killed_once(ready_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose training was killed."""
    root = shutil.copytree(ready_once, tmp_path_factory.mktemp("train") / "killed")
    kill_in_training(root, random.Random(1))
    return root


@pytest.fixture
def ready(ready_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace, and the working folder, whose training is next."""
    root = shutil.copytree(ready_once, tmp_path / "workspace")
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace, and the working folder, whose training was killed."""
    root = shutil.copytree(killed_once, tmp_path / "workspace")
    monkeypatch.chdir(root)
    return root


def step_of(root: Path) -> int:
    """Return the step after which the checkpoint was written; 0 without one."""
    file = paths_of(root).checkpoint
    if not file.exists():
        return 0
    with safe_open(file, framework="numpy") as opened:
        return int(json.loads(opened.metadata()["counters"])["step"])


def start_training(root: Path, *command: str) -> Running:
    """Start the command, and wait until it is some steps further than the checkpoint is now."""
    before = step_of(root)
    running = Running(root, *command, environment=environment())
    running.wait_until(lambda: step_of(root) > before + 2)
    return running


def kill_in_training(root: Path, chance: random.Random) -> None:
    running = start_training(root, program(), "train", "-t", "intents")
    time.sleep(chance.uniform(0.0, 0.1))  # anywhere in a step, or in writing what it gave
    running.kill()
    assert not paths_of(root).prompt.exists()


def weights(root: Path) -> dict[str, Any]:
    return safetensors.numpy.load_file(paths_of(root).prompt / "prompt.safetensors")


def history(root: Path) -> list[dict[str, str]]:
    """Return the epochs of history.csv, without what a clock decides."""
    with (paths_of(root).train / "history.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def metrics(root: Path) -> Any:
    return json.loads((paths_of(root).train / "metrics.json").read_text())


def assert_same_training(root: Path, expected: Path) -> None:
    """See that two trainings gave the same, byte for byte, and that nothing is left of them."""
    ours, theirs = (paths_of(r).prompt / "prompt.safetensors" for r in (root, expected))
    assert ours.read_bytes() == theirs.read_bytes()
    assert history(root) == history(expected)
    assert len(history(root)) == EPOCHS
    mine, wanted = (paths_of(r).train / "layers.csv" for r in (root, expected))
    assert mine.read_bytes() == wanted.read_bytes()
    assert files(paths_of(root).checkpoint.parent) == ["intents.lock"]


def went_on_from(said: str) -> int | None:
    """Return the step from which the training says that it goes on; None if it says nothing."""
    first, *_ = said.splitlines()
    if not first.endswith(", going on from the checkpoint"):
        return None
    return int(first.removeprefix("train intents: ").split("/")[0])


# Killed and interrupted


@pytest.mark.slow
def test_train_stage_killed_at_any_moment_ends_with_the_same_bytes(
    killed: Path, trained_once: Path
) -> None:
    chance = random.Random(2)
    steps = [step_of(killed)]
    for _ in range(2):
        kill_in_training(killed, chance)
        steps.append(step_of(killed))
    assert 2 < steps[0] < steps[1] < steps[2] < STEPS
    said = run(killed, program(), "train", "-t", "intents")
    assert went_on_from(said) == steps[2]
    assert said.splitlines()[-1].startswith("trained intents: dev accuracy ")
    assert_same_training(killed, trained_once)


@pytest.mark.slow
def test_train_stage_interrupted_leaves_a_checkpoint_to_go_on_from(
    ready: Path, trained_once: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = start_training(ready, program(), "train", "-t", "intents")
    assert running.interrupt() == 130
    *progress, last = running.said.splitlines()
    assert last == "interrupted; the same command goes on from what is finished"
    assert all(line.startswith("train intents: ") for line in progress)
    step = step_of(ready)
    assert 0 < step < STEPS
    capsys.readouterr()
    assert call("train", "-t", "intents") == 0
    assert went_on_from(capsys.readouterr().out) == step
    assert_same_training(ready, trained_once)


@pytest.mark.slow
def test_train_stage_that_was_killed_before_it_saved_ends_with_the_same_bytes(
    ready: Path, trained_once: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def killed(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.stages.train.save_prompt", killed)
        assert call("train", "-t", "intents") == 130
    assert step_of(ready) == STEPS
    capsys.readouterr()
    assert call("train", "-t", "intents") == 0
    assert went_on_from(capsys.readouterr().out) == STEPS
    assert_same_training(ready, trained_once)


@pytest.mark.slow
def test_train_stage_with_another_setting_does_not_go_on(
    killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_params(killed, {"train.learning_rate": 3e-3, "train.epochs": 2})
    capsys.readouterr()
    assert call("train", "-t", "intents") == 0
    said = capsys.readouterr().out
    assert went_on_from(said) is None
    assert said.startswith("train intents: 1/6 epoch 1 ")
    manifest = json.loads((paths_of(killed).prompt / "prompt.json").read_text())
    assert manifest["training"]["learning_rate"] == 3e-3
    assert not paths_of(killed).checkpoint.exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut off", "one bit", "empty", "something else"])
def test_train_stage_with_a_damaged_checkpoint_says_what_to_do(
    damage: str, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = paths_of(killed).checkpoint
    good = file.read_bytes()
    bad = {
        "cut off": good[: len(good) // 2],
        "one bit": good[:-1] + bytes([good[-1] ^ 1]),
        "empty": b"",
        "something else": b"a checkpoint" * 100,
    }
    file.write_bytes(bad[damage])
    capsys.readouterr()
    assert call("train", "-t", "intents") == 2
    said = capsys.readouterr()
    assert said.out == ""
    relative = ".ptv2/checkpoints/intents.safetensors"
    assert said.err.startswith(f"error: {relative}: the checkpoint is damaged (")
    assert said.err.endswith("); remove it to train from the start\n")
    assert "Traceback" not in said.err
    assert file.read_bytes() == bad[damage]
    assert not paths_of(killed).prompt.exists()


def test_train_stage_runs_once_at_a_time(killed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = step_of(killed)
    lock = paths_of(Path()).checkpoint.with_suffix(".lock")
    capsys.readouterr()
    with locked(lock):
        assert call("train", "-t", "intents") == 2
    assert capsys.readouterr() == (
        "",
        f"error: train: another train of this task is running ({lock} is held); wait for it or "
        "stop it\n",
    )
    assert step_of(killed) == step


def test_train_stage_measures_its_memory(trained_once: Path) -> None:
    found = metrics(trained_once)
    # torch alone takes more than these
    assert found["peak_memory_bytes"] > 50e6
    assert found["peak_device_memory_bytes"] is None


# Several processes


@pytest.mark.slow
def test_train_stage_in_two_processes_gives_what_one_gives(ready: Path, trained_once: Path) -> None:
    said = run(ready, program("torchrun"), *TORCHRUN, program(), "train", "-t", "intents")
    assert said.count(f"train intents: 1/{STEPS} ") == 1
    assert said.count("trained intents: ") == 1
    beginnings = {line.partition(": ")[0] for line in said.splitlines()}
    assert beginnings == {"train intents", "trained intents"}
    ours, theirs = weights(ready), weights(trained_once)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight == pytest.approx(theirs[name], abs=1e-4), name
    assert [row["dev_score"] for row in history(ready)] == [
        row["dev_score"] for row in history(trained_once)
    ]
    assert files(paths_of(ready).checkpoint.parent) == ["intents.lock"]


@needs_proc
@pytest.mark.slow
def test_train_stage_killed_in_two_processes_goes_on_in_one(
    ready: Path, trained_once: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = start_training(
        ready, program("torchrun"), *TORCHRUN, program(), "train", "-t", "intents"
    )
    running.kill_all()
    step = step_of(ready)
    assert 2 < step < STEPS
    capsys.readouterr()
    assert call("train", "-t", "intents") == 0
    assert went_on_from(capsys.readouterr().out) == step
    for name, weight in weights(ready).items():
        assert weight == pytest.approx(weights(trained_once)[name], abs=1e-4), name


# Prompts in a few layers, and memory


def run_chain(*stages: str) -> None:
    for stage in stages:
        assert call(stage, "-t", "intents") == 0


@pytest.mark.slow
def test_train_stage_of_the_top_layers_goes_through_the_whole_chain(
    ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_params(ready, {"train.prompt.layers": 2, "train.epochs": 20})
    trunk = paths_of(ready).trunk
    run_chain("search", "train")
    # train and dev, below the second layer
    assert len(list(trunk.glob("*.npy"))) == 2
    run_chain("evaluate", "register")
    manifest = json.loads((paths_of(ready).prompt / "prompt.json").read_text())
    assert manifest["prompt"]["layers"] == 2
    prompt = weights(ready)["prompt"]
    assert prompt.shape[0] == 2
    registered = json.loads(paths_of(ready).registered.read_text())
    assert (registered["version"], registered["sha256"]) == (1, manifest["sha256"])
    assert call("pull", "intents", "--to", "pulled") == 0
    capsys.readouterr()
    answers = []
    for folder in ("prompts/intents", "pulled"):
        assert call("predict", folder, "play a song in rome", "--json") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert set(json.loads(answers[0])["probabilities"]) == {"alarm", "flight", "song"}


@pytest.mark.slow
def test_train_stage_without_room_for_the_trunk_keeps_none(ready: Path) -> None:
    change_params(ready, {"train.prompt.layers": 2, "train.epochs": 20})
    run_chain("search", "train")
    with_trunk = weights(ready)
    shutil.rmtree(paths_of(ready).trunk)
    change_params(ready, {"run.trunk_cache_gb": 0})
    run_chain("train")
    assert not paths_of(ready).trunk.exists()
    for name, weight in weights(ready).items():
        assert weight == pytest.approx(with_trunk[name], abs=1e-4), name


@pytest.mark.parametrize("layers", [4, [1, 3]])
def test_train_stage_refuses_layers_that_the_backbone_has_not(
    layers: Any, ready: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_params(ready, {"train.prompt.layers": layers})
    capsys.readouterr()
    assert call("train", "-t", "intents") == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith(
        "error: train.prompt.layers: expected `all`, a number of top layers from 1 to 3, or a list "
    )
    assert not paths_of(ready).prompt.exists()


@pytest.mark.slow
def test_train_stage_that_computes_activations_again_gives_the_same(
    ready: Path, trained_once: Path
) -> None:
    change_params(ready, {"train.gradient_checkpointing": True})
    run_chain("search", "train")
    assert_same_training(ready, trained_once)
