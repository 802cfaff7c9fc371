"""A prompt that several tasks share: the order of steps, and the training."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ptv2_core.config import TrainConfig
from ptv2_core.data.batching import collate, shuffled_batches
from ptv2_core.evaluation.scoring import evaluate_model, logits_of_batch
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit_together
from ptv2_core.training.learner import Learner, together
from ptv2_core.training.sources import Source, mixing_shares, plan_epoch
from ptv2_core.training.trunk import TrunkCache
from tests.core.processes import Child
from tests.core.shared_parts import SIZES, SharedBench, train_together_step_by_step
from tests.core.training_parts import (
    Bench,
    assert_close,
    assert_equal,
    backward,
    epoch_rows,
    settings,
)
from tests.core.workers import count_runs

Folder = Callable[[str], Path]

DROPOUT: dict[str, Any] = {"prompt": {"length": 4, "dropout": 0.2}, "head": {"dropout": 0.2}}


@pytest.fixture(scope="module")
def shared(backbone_folder: Folder) -> SharedBench:
    """Return two tasks on a tiny BERT."""
    return SharedBench(backbone_folder("bert"))


def trained(model: PromptedModel) -> dict[str, Tensor]:
    """Return copies of all that is trained; the prompt once."""
    return {name: parameter.detach().clone() for name, parameter in model.trainable()}


def linear_of(model: PromptedModel, slot: int = 0) -> nn.Linear:
    """Return the linear layer of a slot's head."""
    linear = model.heads[slot].linear
    assert isinstance(linear, nn.Linear)
    return linear


# The order of steps


def sized(bench: SharedBench, *sizes: int) -> list[Source]:
    """Return sources of so many rows, all of one length."""
    length = int(bench.sources[0].train.lengths[0])
    split = bench.sources[0].train
    made = []
    for slot, size in enumerate(sizes):
        rows = replace(
            split,
            input_ids=np.tile(split.input_ids[:length], size),
            token_type_ids=np.tile(split.token_type_ids[:length], size),
            word_index=np.tile(split.word_index[:length], size),
            offsets=np.arange(size + 1) * length,
            labels=np.zeros(size, dtype=np.int32),
            word_offsets=np.zeros(size + 1, dtype=np.int64),
        )
        made.append(Source(slot=slot, task=bench.sources[0].task, train=rows, dev=rows))
    return made


def test_plan_of_one_source_is_its_shuffled_batches(shared: SharedBench) -> None:
    config = settings(batch_size=7, token_budget=64, seed=3)
    source = shared.sources[0]
    for epoch in range(3):
        wanted = shuffled_batches(
            source.train.unit_lengths, batch_size=7, token_budget=64, seed=3, epoch=epoch
        )
        for temperature in (1.0, 2.0):
            steps = plan_epoch([source], config, epoch, temperature=temperature)
            assert [step.source for step in steps] == [0] * len(wanted)
            for step, rows in zip(steps, wanted, strict=True):
                assert np.array_equal(step.units, rows)


def test_plan_at_temperature_one_uses_each_row_once(shared: SharedBench) -> None:
    sources = [*shared.sources, *sized(shared, 5)]
    for epoch in range(3):
        steps = plan_epoch(sources, settings(batch_size=4, token_budget=64), epoch)
        for place, source in enumerate(sources):
            rows = [row for step in steps if step.source == place for row in step.units.tolist()]
            assert sorted(rows) == list(range(len(source.train)))
        # mixed, not one source after the other
        order = [step.source for step in steps]
        assert order != sorted(order)


@pytest.mark.parametrize(
    ("sizes", "temperature", "wanted"),
    [
        # steps of 2 rows, 90 of them: as many as there are rows; roots 12 and 6; 4, 1 and 1
        ((128, 32, 20), 1.0, [64, 16, 10]),
        ((144, 36), 2.0, [60, 30]),
        ((160, 10, 10), 2.0, [60, 15, 15]),
        # 85 of them: fourth roots 2 and 1
        ((160, 10), 4.0, [57, 28]),
    ],
)
def test_plan_gives_each_source_its_share_of_the_steps(
    shared: SharedBench, sizes: tuple[int, ...], temperature: float, wanted: list[int]
) -> None:
    sources = sized(shared, *sizes)
    config = settings(batch_size=2)
    for epoch in range(2):
        steps = plan_epoch(sources, config, epoch, temperature=temperature)
        counts = Counter(step.source for step in steps)
        assert [counts[place] for place in range(len(sources))] == wanted
        for place, source in enumerate(sources):
            used = Counter(
                row for step in steps if step.source == place for row in step.units.tolist()
            )
            # a small source is gone through again and again, none of its rows before another
            assert max(used.values()) - min(used[row] for row in range(len(source.train))) <= 1


def test_plan_goes_through_a_small_source_in_another_order_each_time(shared: SharedBench) -> None:
    steps = plan_epoch(sized(shared, 160, 10), settings(batch_size=2), 0, temperature=2.0)
    batches = [tuple(step.units.tolist()) for step in steps if step.source == 1]
    assert len(batches) == 17
    assert len(set(batches)) > 10  # of three turns and two batches


def test_plan_is_a_function_of_seed_and_epoch(shared: SharedBench) -> None:
    def told(seed: int, epoch: int) -> list[tuple[int, list[int]]]:
        np.random.seed(len(drawn))
        torch.manual_seed(len(drawn))
        config = settings(batch_size=4, seed=seed)
        steps = plan_epoch(shared.sources, config, epoch, temperature=2.0)
        drawn.append([(step.source, step.units.tolist()) for step in steps])
        return drawn[-1]

    drawn: list[list[tuple[int, list[int]]]] = []
    assert told(1, 0) == told(1, 0)
    assert told(1, 1) == told(1, 1)
    different = [told(1, 0), told(1, 1), told(1, 2), told(2, 0)]
    assert all(one != other for place, one in enumerate(different) for other in different[:place])


def test_mixing_shares_are_roots_of_sizes() -> None:
    assert mixing_shares([900, 100], 1.0) == pytest.approx([0.9, 0.1])
    assert mixing_shares([900, 100], 2.0) == pytest.approx([0.75, 0.25])
    assert mixing_shares([16, 81, 1], 4.0) == pytest.approx([2 / 6, 3 / 6, 1 / 6])
    assert mixing_shares([10**9, 1], 1e-2) == pytest.approx([1.0, 0.0])


# Together


def test_together_prompt_learns_from_all_tasks_and_each_head_from_its_own(
    shared: SharedBench,
) -> None:
    config = settings()
    model = shared.model(config)
    assert set(trained(model)) == {
        "bank.slots.0.weight",
        *(f"heads.{slot}.linear.{name}" for slot in (0, 1) for name in ("weight", "bias")),
    }
    learner = Learner(model, shared.sources, config=config)
    seen: set[int] = set()
    while len(seen) < 2:
        work = learner.next_work()
        slot = work.part.slot
        seen.add(slot)
        for _, parameter in model.trainable():
            parameter.grad = None
        (logits,) = model.answer([work.part])
        assert logits.shape[1] == (3, 2)[slot]
        backward(work.loss(logits))
        assert model.bank.slots[1] is model.bank.slots[0]
        prompt = dict(model.trainable())["bank.slots.0.weight"].grad
        own, other = (linear_of(model, one).weight.grad for one in (slot, 1 - slot))
        assert prompt is not None
        assert prompt.abs().max() > 1e-5
        assert own is not None
        assert own.abs().max() > 1e-5
        assert other is None
        learner.finish(0.0)


def plain_loop(model: PromptedModel, bench: SharedBench, config: TrainConfig) -> list[float]:
    """Train as fit_together() does, written out; returns the losses of the steps."""
    parameters = [parameter for _, parameter in model.trainable()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.01)
    plan = [
        step
        for epoch in range(config.epochs)
        for step in plan_epoch(bench.sources, config, epoch, temperature=2.0)
    ]
    warmup = round(len(plan) * config.warmup_fraction)
    losses = []
    for number, step in enumerate(plan):
        source = bench.sources[step.source]
        batch = collate(source.train, step.units)
        logits = logits_of_batch(model, batch, slot=source.slot)
        loss = nn.functional.cross_entropy(logits, batch.labels)  # type: ignore[arg-type]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        backward(loss)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        rising, falling = (number + 1) / max(warmup, 1), (len(plan) - number) / (len(plan) - warmup)
        optimizer.param_groups[0]["lr"] = config.learning_rate * (
            rising if number < warmup else falling
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_together_trains_as_a_plain_loop(shared: SharedBench) -> None:
    config = settings(epochs=3, batch_size=8, warmup_fraction=0.2)
    model = shared.model(config)
    steps = shared.start(model, config, temperature=2.0)
    reports = []
    for report in steps:
        reports.append(report)
        if report.step == report.total_steps:
            break
    last = trained(model)  # before the best epoch's weights are put back
    other = shared.model(config)
    wanted = plain_loop(other, shared, config)
    got = [r.train_loss for r in reports if r.evaluation is None]
    ends = {r.step - 1 for r in reports if r.evaluation is not None}
    assert len(reports) == len(wanted)
    assert len(ends) == 3
    kept = [loss for place, loss in enumerate(wanted) if place not in ends]
    assert got == pytest.approx(kept, abs=1e-5)
    assert_close(last, trained(other), atol=1e-4)


def test_together_chooses_the_epoch_of_the_best_mean(shared: SharedBench) -> None:
    config = settings(epochs=5, learning_rate=0.1)
    model = shared.model(config)
    best: dict[str, Tensor] = {}
    means = []
    for report in shared.start(model, config):
        if report.evaluation is None:
            continue
        alone = {
            source.task.name: evaluate_model(
                model, source.dev, source.task, token_budget=4096, slot=source.slot
            )
            for source in shared.sources
        }
        found = report.evaluation
        scores = [one.score for one in alone.values()]
        assert found.score == sum(scores) / 2
        assert found.loss == sum(one.loss for one in alone.values()) / 2
        assert found.metrics == {
            f"{task}/{name}": value
            for task, one in alone.items()
            for name, value in one.metrics.items()
        }
        assert found == together(alone)
        assert report.history[-1].dev_score == found.score
        means.append((found.score, -found.loss))
        assert report.is_best == (means[-1] == max(means))
        if report.is_best:
            best = trained(model)
    assert len(means) == 5
    assert_equal(trained(model), best)


def test_together_one_source_is_fit(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"), rows=(40, 12))
    config = settings(**DROPOUT)
    alone, wanted = bench.run(config)
    model = bench.model(config)
    source = Source(slot=0, task=bench.task, train=bench.train, dev=bench.dev)
    reports = list(fit_together(model, [source], config=config, temperature=3.0))
    assert reports == wanted
    assert_equal(trained(model), trained(alone))


def test_together_reads_a_trunk_of_each_task(shared: SharedBench, tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, limit_bytes=1 << 30)
    config = settings(prompt={"length": 4, "layers": 2, "dropout": 0.2})
    _, wanted = shared.run(config)
    shared.run(config, trunk=cache)
    assert len(list(tmp_path.glob("*.npy"))) == 4
    runs = count_runs(shared, 0)  # type: ignore[arg-type]
    _, reports = shared.run(config, trunk=cache)
    assert not runs
    for got, given in zip(epoch_rows(reports), epoch_rows(wanted), strict=True):
        assert got == pytest.approx(given, abs=1e-5)


def test_together_stopped_after_any_step_ends_bitwise_the_same(
    shared: SharedBench, tmp_path: Path
) -> None:
    config = settings(**DROPOUT)
    whole, wanted = shared.run(config, temperature=2.0)
    file = tmp_path / "checkpoint.safetensors"
    assert len(wanted) == 10
    for stop in (1, 4, 5, 7):
        how: dict[str, Any] = {
            "temperature": 2.0, "checkpoint": Checkpoint(file, every_steps=1),
        }  # fmt: skip
        steps = shared.start(shared.model(config), config, **how)
        next(report for report in steps if report.step == stop)
        steps.close()  # type: ignore[attr-defined]
        model, reports = shared.run(config, **how)
        assert reports[0].is_resumed
        assert reports[0].step == stop
        assert reports[1:] == wanted[stop:]
        assert_equal(trained(model), trained(whole))
        file.unlink()


def test_together_killed_writes_the_same_bytes(backbone_folder: Folder, tmp_path: Path) -> None:
    config = settings(**DROPOUT)
    outs = []
    for name, lives in (("whole", [99]), ("killed", [3, 5, 99])):
        out = tmp_path / name
        outs.append(out)
        steps = []
        for most in lives:
            child = Child(train_together_step_by_step, backbone_folder("bert"), out, config)
            while (said := child.receive()) != "done" and said < most:
                steps.append(said)
                child.go_on()
            if said == "done":
                assert child.join() == 0
            child.kill()
        if name == "killed":
            # checkpoints after the second and the fourth step
            assert steps == [1, 2, 2, 3, 4, 4, *range(5, 11)]
    names = sorted(file.name for file in outs[0].iterdir())
    assert names == sorted(file.name for file in outs[1].iterdir())
    assert names == ["0.safetensors", "1.safetensors"]
    for one in names:
        assert (outs[0] / one).read_bytes() == (outs[1] / one).read_bytes()


def test_together_fingerprint_changes_with_what_is_mixed(
    shared: SharedBench, backbone_folder: Folder
) -> None:
    config = settings()

    def fingerprint(sources: list[Source], temperature: float = 1.0) -> str:
        model = shared.model(config)
        return Learner(model, sources, config=config, temperature=temperature).fingerprint()

    first, second = shared.sources
    fewer = SharedBench(backbone_folder("bert"), sizes=(SIZES[0], SIZES[1] - 2)).sources[1]
    found = [
        fingerprint([first, second]),
        fingerprint([first, second], 2.0),
        fingerprint([first, fewer]),
        fingerprint([first, replace(second, task=replace(second.task, metric="macro_f1"))]),
        fingerprint([first]),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == fingerprint([first, second])
