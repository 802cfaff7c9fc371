"""Checkpoints: a training that was stopped or killed anywhere ends as if it had not been."""

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from ptv2_core.config import TrainConfig
from ptv2_core.errors import TrainingError
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training import checkpoint as checkpoint_module
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import TrainReport
from ptv2_core.training.learner import Learner
from ptv2_core.training.sources import Source
from ptv2_core.training.trunk import TrunkCache
from tests.core.processes import Child
from tests.core.training_parts import Bench, assert_equal, settings, weights
from tests.core.workers import save_until_killed, train_step_by_step
from tests.tiny import SIZES, encode_for, examples_of, open_backbone, tiny_backbone

Folder = Callable[[str], Path]

ALL_DROPOUT: dict[str, Any] = {
    "prompt": {"length": 4, "dropout": 0.2},
    "head": {"dropout": 0.2},
    "backbone_dropout": True,
}
MLP: dict[str, Any] = {
    "prompt": {
        "length": 4,
        "dropout": 0.2,
        "layers": 2,
        "reparameterization": "mlp",
        "mlp_hidden": 8,
    },
    "gradient_checkpointing": True,
}
every_kind = pytest.mark.parametrize("kind", ["classification", "tagging"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return where the checkpoint is written."""
    return tmp_path / "runs" / "checkpoint.safetensors"


def every_step(file: Path) -> Checkpoint:
    """Return a checkpoint that is written after each step."""
    return Checkpoint(file, every_steps=1)


def stop_after(reports: Iterator[TrainReport], step: int) -> list[TrainReport]:
    """Take reports up to a step, then close the training as a caller does who is told to stop."""
    taken = []
    for report in reports:
        taken.append(report)
        if report.step == step:
            break
    reports.close()  # type: ignore[attr-defined]
    return taken


def told(reports: list[TrainReport]) -> list[tuple[Any, ...]]:
    """Return what reports of steps say."""
    return [
        (r.step, r.total_steps, r.epoch, r.train_loss, r.learning_rate, r.grad_norm, r.is_best)
        for r in reports
        if not r.is_resumed
    ]


def resume(
    bench: Bench, config: TrainConfig, file: Path
) -> tuple[PromptedModel, list[TrainReport]]:
    """Go on with a new model to the end."""
    model = bench.model(config)
    return model, list(bench.start(model, config, checkpoint=every_step(file)))


# Stopped and gone on


@every_kind
@pytest.mark.parametrize("changes", [ALL_DROPOUT, MLP], ids=["all-dropout", "mlp"])
def test_checkpoint_training_stopped_after_any_step_ends_bitwise_the_same(
    backbone_folder: Folder, file: Path, kind: str, changes: dict[str, Any]
) -> None:
    bench = Bench(backbone_folder("bert"), kind, rows=(40, 12))
    config = settings(**changes)
    whole, wanted = bench.run(config)
    total = wanted[0].total_steps
    assert total == len(wanted) == 6
    for step in range(1, total + 1):
        model = bench.model(config)
        taken = stop_after(bench.start(model, config, checkpoint=every_step(file)), step)
        torch.manual_seed(step)  # nothing may depend on the global state
        again, reports = resume(bench, config, file)
        assert_equal(weights(again), weights(whole))
        assert told(taken) + told(reports) == told(wanted)
        assert reports[0].is_resumed
        assert reports[0].step == step
        assert [r.is_resumed for r in reports[1:]] == [False] * (total - step)
        assert list(reports[-1].history) == list(wanted[-1].history)
        for got, given in zip(reports[1:], wanted[step:], strict=True):
            assert got.evaluation == given.evaluation
        file.unlink()


def test_checkpoint_training_resumed_twice_ends_bitwise_the_same(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(**ALL_DROPOUT)
    whole, wanted = bench.run(config)
    for first, second in [(1, 2), (2, 5), (3, 4), (5, 6)]:
        for step in (first, second):
            stop_after(bench.start(bench.model(config), config, checkpoint=every_step(file)), step)
        again, reports = resume(bench, config, file)
        assert reports[0].step == second
        assert_equal(weights(again), weights(whole))
        assert list(reports[-1].history) == list(wanted[-1].history)
        file.unlink()


def test_checkpoint_keeps_what_early_stopping_counts(backbone_folder: Folder, file: Path) -> None:
    bench = Bench(backbone_folder("bert"), rows=(20, 12))
    config = settings(epochs=15, patience=2, batch_size=20, learning_rate=0.1, seed=1)
    whole, wanted = bench.run(config)
    history = wanted[-1].history
    assert 4 < len(history) < 15
    # an epoch that was not the best, but had the lowest loss so far
    lows = [min(e.dev_loss for e in history[:place]) for place in range(1, len(history))]
    assert any(e.dev_loss < low and not e.is_best for e, low in zip(history[1:], lows, strict=True))
    for step in range(1, len(wanted) + 1):
        model = bench.model(config)
        stop_after(bench.start(model, config, checkpoint=every_step(file)), step)
        again, reports = resume(bench, config, file)
        assert list(reports[-1].history) == list(history)
        assert_equal(weights(again), weights(whole))
        file.unlink()


def test_checkpoint_training_stopped_between_two_writes_repeats_the_steps(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(**ALL_DROPOUT)
    whole, wanted = bench.run(config)
    model = bench.model(config)
    stop_after(bench.start(model, config, checkpoint=Checkpoint(file, every_steps=2)), 5)
    again, reports = resume(bench, config, file)
    assert [r.step for r in reports] == [4, 5, 6]
    assert told(reports) == told(wanted)[4:]
    assert_equal(weights(again), weights(whole))


def test_checkpoint_resumed_training_with_a_trunk_ends_bitwise_the_same(
    backbone_folder: Folder, file: Path, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(prompt={"length": 4, "layers": 2, "dropout": 0.2})
    whole, _ = bench.run(config, trunk=TrunkCache(tmp_path / "one", limit_bytes=1 << 30))
    cache = TrunkCache(tmp_path / "two", limit_bytes=1 << 30)
    for step in (2, 4):
        model = bench.model(config)
        stop_after(bench.start(model, config, trunk=cache, checkpoint=every_step(file)), step)
    model = bench.model(config)
    list(bench.start(model, config, trunk=cache, checkpoint=every_step(file)))
    assert_equal(weights(model), weights(whole))


def test_checkpoint_resumed_training_may_be_left_at_once_with_its_best_weights(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(epochs=4, learning_rate=0.3)
    stopped = bench.model(config)
    taken = stop_after(bench.start(stopped, config, checkpoint=every_step(file)), 11)
    assert any(r.is_best for r in taken)
    again = bench.model(config)
    (first,) = stop_after(bench.start(again, config, checkpoint=every_step(file)), 11)
    assert first.is_resumed
    assert_equal(weights(again), weights(stopped))


@pytest.mark.parametrize(
    "changes",
    [{}, {"epochs": 40, "patience": 2, "learning_rate": 1e-12}],
    ids=["all-epochs", "stopped-early"],
)
def test_checkpoint_of_a_training_that_is_over_says_all_it_found(
    backbone_folder: Folder, file: Path, changes: dict[str, Any]
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(**changes)
    model = bench.model(config)
    done = list(bench.start(model, config, checkpoint=every_step(file)))
    assert len(done[-1].history) == (2 if not changes else done[-1].epoch)
    again, reports = resume(bench, config, file)
    (only,) = reports
    assert only.is_resumed
    assert (only.step, only.total_steps) == (done[-1].step, done[-1].total_steps)
    assert only.epoch == done[-1].epoch + (1 if changes else 0)
    assert only.train_loss == done[-1].train_loss
    assert list(only.history) == list(done[-1].history)
    assert_equal(weights(again), weights(model))


def test_checkpoint_changes_nothing_in_the_training(backbone_folder: Folder, file: Path) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(**ALL_DROPOUT)
    without, wanted = bench.run(config)
    with_it, reports = resume(bench, config, file)
    assert told(reports) == told(wanted)
    assert_equal(weights(with_it), weights(without))


# Of another training


def changed_config(bench: Bench, config: TrainConfig) -> TrainConfig:
    return replace(config, learning_rate=2e-2)


def changed_seed(bench: Bench, config: TrainConfig) -> TrainConfig:
    return replace(config, seed=7)


def changed_epochs(bench: Bench, config: TrainConfig) -> TrainConfig:
    return replace(config, epochs=3)


def changed_layers(bench: Bench, config: TrainConfig) -> TrainConfig:
    return replace(config, prompt=replace(config.prompt, layers=(0, 1, 2)))


def changed_rows(bench: Bench, config: TrainConfig) -> TrainConfig:
    bench.train = encode_for(bench.folder, examples_of("classification", 40, seed=9), bench.task)
    return config


def changed_label(bench: Bench, config: TrainConfig) -> TrainConfig:
    labels = bench.train.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    bench.train = replace(bench.train, labels=labels)
    return config


def changed_dev(bench: Bench, config: TrainConfig) -> TrainConfig:
    bench.dev = encode_for(bench.folder, examples_of("classification", 12, seed=9), bench.task)
    return config


def changed_task(bench: Bench, config: TrainConfig) -> TrainConfig:
    bench.task = replace(bench.task, metric="macro_f1")
    return config


def changed_precision(bench: Bench, config: TrainConfig) -> TrainConfig:
    bench.backbone = load_backbone(str(bench.folder), precision="bf16", device="cpu")
    return config


def changed_backbone(bench: Bench, config: TrainConfig) -> TrainConfig:
    bench.backbone = open_backbone(
        tiny_backbone(bench.folder.parent / f"{bench.folder.name}-seed-1", seed=1)
    )
    return config


@pytest.mark.parametrize(
    "change",
    [
        changed_config,
        changed_seed,
        changed_epochs,
        changed_layers,
        changed_rows,
        changed_label,
        changed_dev,
        changed_task,
        changed_precision,
        changed_backbone,
    ],
)
def test_checkpoint_of_another_training_is_not_gone_on_from(
    backbone_folder: Folder, file: Path, change: Callable[[Bench, TrainConfig], TrainConfig]
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings()
    stop_after(bench.start(bench.model(config), config, checkpoint=every_step(file)), 4)
    config = change(bench, config)
    whole, wanted = bench.run(config)
    again, reports = resume(bench, config, file)
    assert [r.step for r in reports] == list(range(1, reports[0].total_steps + 1))
    assert told(reports) == told(wanted)
    assert_equal(weights(again), weights(whole))
    # and the file is this training's now
    assert resume(bench, config, file)[1][0].is_resumed


def test_checkpoint_of_another_schema_is_not_gone_on_from(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    file.parent.mkdir()
    save_file({"weight": torch.zeros(2)}, file)
    assert every_step(file).load(fingerprint="x") is None
    _, reports = resume(bench, settings(), file)
    assert reports[0].step == 1
    assert not reports[0].is_resumed


# Damage


@pytest.mark.parametrize("length", [0, 4, 8, 100, 2000, -1, -4000])
def test_checkpoint_cut_short_is_refused_with_its_name(
    backbone_folder: Folder, file: Path, length: int
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings()
    stop_after(bench.start(bench.model(config), config, checkpoint=every_step(file)), 2)
    data = file.read_bytes()
    assert len(data) > 5000
    file.write_bytes(data[:length])
    with pytest.raises(TrainingError, match=r"checkpoint.safetensors: the checkpoint is damaged"):
        resume(bench, config, file)
    assert file.read_bytes() == data[:length]
    every_step(file).remove()
    assert resume(bench, config, file)[1][0].step == 1


def test_checkpoint_with_a_flipped_bit_is_never_gone_on_from(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(20, 6))
    learner = Learner(
        bench.model(settings()),
        [Source(slot=0, task=bench.task, train=bench.train, dev=bench.dev)],
        config=settings(),
    )
    fingerprint = learner.fingerprint()
    stop_after(bench.start(bench.model(settings()), settings(), checkpoint=every_step(file)), 3)
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    draw = random.Random(0)
    places = [*draw.sample(range(header), 150), *draw.sample(range(header, len(data)), 50)]
    refusals = []
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            # None: the flip made it another training's
            assert every_step(file).load(fingerprint=fingerprint) is None, place
            assert place < header
        except TrainingError as error:
            refusals.append(str(error))
    assert len(refusals) > 180
    assert all(f"{file}: the checkpoint is damaged (" in refusal for refusal in refusals)
    file.write_bytes(data)
    assert every_step(file).load(fingerprint=fingerprint) is not None


def test_checkpoint_that_is_no_checkpoint_is_refused_with_its_name(file: Path) -> None:
    file.parent.mkdir()
    file.write_bytes(b"something else" * 1000)
    with pytest.raises(TrainingError, match=r"checkpoint.safetensors: .*remove it"):
        every_step(file).load(fingerprint="x")


def test_checkpoint_removed_twice_is_gone(backbone_folder: Folder, file: Path) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    resume(bench, settings(), file)
    assert [one.name for one in file.parent.iterdir()] == [file.name]
    every_step(file).remove()
    every_step(file).remove()
    assert not list(file.parent.iterdir())


# How often


def saved_steps(file: Path, reports: Iterator[TrainReport]) -> list[int]:
    """Return, for each report, the step of the snapshot then in the file; 0 without one."""
    steps = []
    for _ in reports:
        if file.is_file():
            with safe_open(file, framework="pt") as opened:
                steps.append(json.loads(opened.metadata()["counters"])["step"])
        else:
            steps.append(0)
    return steps


@pytest.mark.parametrize(
    ("every_steps", "wanted"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [0, 0, 3, 3, 3, 6, 6, 8]),
        (5, [0, 0, 0, 0, 5, 5, 5, 8]),
        (None, [0, 0, 0, 0, 0, 0, 0, 8]),
    ],
)
def test_checkpoint_is_written_after_so_many_steps_and_at_the_end(
    backbone_folder: Folder, file: Path, every_steps: int | None, wanted: list[int]
) -> None:
    bench = Bench(backbone_folder("bert"))
    checkpoint = Checkpoint(file, every_s=1e9, every_steps=every_steps)
    reports = bench.start(bench.model(settings()), settings(), checkpoint=checkpoint)
    assert saved_steps(file, reports) == wanted


def test_checkpoint_counts_its_steps_on_from_where_it_was(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"))
    first = Checkpoint(file, every_s=1e9, every_steps=3)
    stop_after(bench.start(bench.model(settings()), settings(), checkpoint=first), 4)
    second = Checkpoint(file, every_s=1e9, every_steps=3)
    reports = bench.start(bench.model(settings()), settings(), checkpoint=second)
    # the place where it goes on, steps 4 to 8
    assert saved_steps(file, reports) == [3, 3, 3, 6, 6, 8]


def test_checkpoint_is_written_after_so_much_time(
    backbone_folder: Folder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(backbone_folder("bert"))
    now = [100.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    reports = bench.start(
        bench.model(settings()), settings(), checkpoint=Checkpoint(file, every_s=30.0)
    )
    steps = []
    for passed in (0.0, 29.0, 1.0, 29.9, 0.2, 0.0, 0.0, 0.0):
        now[0] += passed
        steps += saved_steps(file, islice(reports, 1))
    assert steps == [0, 0, 3, 3, 5, 5, 5, 8]


# Killed


def test_checkpoint_killed_in_the_middle_of_writing_leaves_the_last_one(
    backbone_folder: Folder, file: Path
) -> None:
    bench = Bench(backbone_folder("bert"))
    whole, wanted = bench.run(settings())
    for num_saves in (1, 4):
        child = Child(save_until_killed, bench.folder, file, num_saves)
        assert child.receive() == num_saves
        child.kill()
    again, reports = resume(bench, settings(), file)
    # killed in its first write, then in the fourth
    assert reports[0].step == 3
    assert told(reports) == told(wanted)[3:]
    assert_equal(weights(again), weights(whole))
    assert [one.name for one in file.parent.iterdir()] == [file.name]


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a backbone whose products and sums are large enough to be shared by threads."""
    folder = tiny_backbone(tmp_path_factory.mktemp("wide"))
    wider = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(**{**SIZES, **wider}, pad_token_id=0)).save_pretrained(folder)
    return folder


def finish(child: Child) -> int:
    """Let a training run to its end; returns how many steps it took."""
    steps = 0
    while (said := child.receive()) != "done":
        steps += not said[1]
        child.go_on()
    assert child.join() == 0
    return steps


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
def test_checkpoint_training_killed_20_times_writes_the_same_bytes(
    wide_folder: Path, tmp_path: Path, num_threads: int
) -> None:
    config = settings(
        prompt={"length": 8, "dropout": 0.1},
        head={"dropout": 0.1},
        backbone_dropout=True,
        batch_size=30,
        epochs=40,
        patience=40,
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert finish(Child(train_step_by_step, wide_folder, whole, config, num_threads)) == 80
    draw = random.Random(num_threads)
    places = []
    for _ in range(20):
        child = Child(train_step_by_step, wide_folder, killed, config, num_threads)
        step = 0
        # at most 4 steps a life: 20 lives do not reach the end
        for _ in range(draw.randint(0, 4)):
            step, _ = child.receive()
            child.go_on()
        time.sleep(draw.uniform(0.0, 0.05 if step else 0.5))
        child.kill()
        places.append(step)
        assert not (killed / "prompt.safetensors").exists()
    # some died before their first step, and together they came far
    assert 0 in places
    assert max(places) > 10
    assert 0 < finish(Child(train_step_by_step, wide_folder, killed, config, num_threads)) < 70
    got, wanted = ((folder / "prompt.safetensors").read_bytes() for folder in (killed, whole))
    assert got == wanted
    assert [one.name for one in killed.iterdir()] == ["prompt.safetensors"]
