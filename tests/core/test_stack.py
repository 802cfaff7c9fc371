"""A stack of trials: each one trains as it would alone, whoever shares its forward."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ptv2_core.config import TrainConfig
from ptv2_core.errors import ConfigError, MemoryRanOutError, TrainingError
from ptv2_core.training import learner as learner_module
from ptv2_core.training import stack as stack_module
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import TrainReport
from ptv2_core.training.learner import Learner
from ptv2_core.training.stack import Stack
from ptv2_core.training.stepping import compute_gradients
from ptv2_core.training.trunk import TrunkCache
from tests.core.training_parts import Bench, assert_close, assert_equal, settings, weights
from tests.core.workers import count_runs

Folder = Callable[[str], Path]
Results = Mapping[int, TrainReport | TrainingError]

# sums of some 100 fp32 numbers in another order
LOSS_ATOL = 2e-5
# AdamW divides a gradient by its own size: one near zero carries its rounding into the weight
WEIGHT_ATOL = 1e-4

every_kind = pytest.mark.parametrize("kind", ["classification", "tagging"])

# all that can differ between trials, in no order
TRIALS: list[dict[str, Any]] = [
    {"prompt": {"length": 4}},
    {
        "prompt": {"length": 9, "layers": 2, "dropout": 0.2},
        "learning_rate": 3e-2,
        "seed": 7,
        "batch_size": 8,
    },
    {
        "prompt": {"length": 3, "layers": [0, 2], "shift_positions": False},
        "head": {"dropout": 0.2, "reads": "mean"},
        "batch_size": 32,
        "epochs": 3,
        "weight_decay": 0.1,
    },
    {
        "prompt": {"length": 5, "reparameterization": "mlp", "mlp_hidden": 8, "dropout": 0.1},
        "head": {"dropout": 0.1},
        "seed": 3,
        "token_budget": 100,
        "head_learning_rate": 1e-3,
    },
    {
        "prompt": {"length": 6, "layers": [1]},
        "learning_rate": 1e-12,
        "epochs": 9,
        "patience": 1,
        "batch_size": 30,
        "max_grad_norm": 0.01,
        "warmup_fraction": 0.5,
    },
    {"prompt": {"length": 4, "start": "backbone"}, "gradient_checkpointing": True, "epochs": 1},
    {"method": "probe", "head": {"dropout": 0.1}, "learning_rate": 5e-2, "batch_size": 20},
]


def stack_of(bench: Bench, *, trunk: TrunkCache | None = None) -> Stack:
    """Return an empty stack."""
    return Stack(bench.backbone, task=bench.task, train=bench.train, dev=bench.dev, trunk=trunk)


def report_of(results: Results, lane: int) -> TrainReport:
    """Return a lane's report; it must not be an error."""
    result = results[lane]
    assert isinstance(result, TrainReport), result
    return result


class Trial:
    """What a stack said about a trial, and what it left of it."""

    def __init__(self, config: TrainConfig) -> None:
        """Hear nothing yet."""
        self.config = config
        self.reports: list[TrainReport] = []
        self.weights: dict[str, torch.Tensor] = {}


def run_all(stack: Stack, configs: list[TrainConfig], *, lanes: int) -> list[Trial]:
    """Train all trials, at most so many at once; a lane that is freed takes the next."""
    trials = [Trial(config) for config in configs]
    waiting = list(trials)
    busy: dict[int, Trial] = {}
    while waiting or busy:
        for lane in range(lanes):
            if lane not in busy and waiting:
                busy[lane] = waiting.pop(0)
                stack.start(lane, busy[lane].config)
        results = stack.advance()
        assert set(results) == set(busy)
        for lane in results:
            busy[lane].reports.append(report_of(results, lane))
            if lane not in stack.lanes:
                busy.pop(lane).weights = weights(stack.model, lane)
    return trials


def assert_as_alone(bench: Bench, trial: Trial, *, trunk: TrunkCache | None = None) -> None:
    """Assert that a trial's reports and weights are those of `fit` on it alone."""
    model, wanted = bench.run(trial.config, trunk=trunk)
    assert len(trial.reports) == len(wanted)
    for got, given in zip(trial.reports, wanted, strict=True):
        assert (got.step, got.total_steps, got.epoch) == (
            given.step,
            given.total_steps,
            given.epoch,
        )
        assert (got.learning_rate, got.is_best) == (given.learning_rate, given.is_best)
        assert got.train_loss == pytest.approx(given.train_loss, abs=LOSS_ATOL)
        assert got.grad_norm == pytest.approx(given.grad_norm, abs=LOSS_ATOL, rel=1e-4)
        assert (got.evaluation is None) == (given.evaluation is None)
        if got.evaluation is not None and given.evaluation is not None:
            assert got.evaluation.loss == pytest.approx(given.evaluation.loss, abs=LOSS_ATOL)
            assert got.evaluation.predictions == given.evaluation.predictions
    assert_close(trial.weights, weights(model), atol=WEIGHT_ATOL)


# As alone


@every_kind
def test_stack_trials_of_any_settings_train_as_alone(backbone_folder: Folder, kind: str) -> None:
    bench = Bench(backbone_folder("bert"), kind)
    configs = [settings(**changes) for changes in TRIALS]
    trials = run_all(stack_of(bench), configs, lanes=len(configs))
    for trial in trials:
        assert_as_alone(bench, trial)
    # they did learn, and not the same
    assert len({round(trial.reports[-1].train_loss, 4) for trial in trials}) == len(trials)
    # and the one with the least patience was not kept by the others
    assert trials[4].reports[-1].epoch < 9


@every_kind
def test_stack_lanes_are_filled_again_while_others_go_on(
    backbone_folder: Folder, kind: str
) -> None:
    bench = Bench(backbone_folder("bert"), kind)
    configs = [settings(**changes) for changes in [*TRIALS, *TRIALS[::-1]]]
    stack = stack_of(bench)
    for trial in run_all(stack, configs, lanes=3):
        assert_as_alone(bench, trial)
    assert not stack.lanes
    assert len(stack.model.bank) == len(stack.model.heads) == 3


def test_stack_of_one_is_bitwise_the_trial_alone(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    config = settings(prompt={"length": 4, "dropout": 0.2}, head={"dropout": 0.1})
    (trial,) = run_all(stack_of(bench), [config], lanes=1)
    model, wanted = bench.run(config)
    assert [r.train_loss for r in trial.reports] == [r.train_loss for r in wanted]
    assert_equal(trial.weights, weights(model))


@every_kind
def test_stack_of_one_depth_reads_its_trunk(
    backbone_folder: Folder, tmp_path: Path, kind: str
) -> None:
    bench = Bench(backbone_folder("bert"), kind)
    cache = TrunkCache(tmp_path, limit_bytes=1 << 30)
    prompts = [{"length": 4, "layers": 2}, {"length": 7, "layers": [1], "dropout": 0.1}]
    configs = [settings(prompt=prompt, seed=seed) for seed, prompt in enumerate(prompts)]
    run_all(stack_of(bench, trunk=cache), configs[:1], lanes=1)
    runs = count_runs(bench, 0)
    trials = run_all(stack_of(bench, trunk=cache), configs, lanes=2)
    assert not runs
    for trial in trials:
        assert_as_alone(bench, trial, trunk=cache)
        assert_as_alone(bench, trial)


# the lanes that have a trunk have two; or one, beside those that have none
@pytest.mark.parametrize("depths", [[2, [2]], [2, "all"], [2, [2], "all", [0, 1]]])
def test_stack_of_several_depths_trains_as_alone_with_a_trunk(
    backbone_folder: Folder, tmp_path: Path, depths: list[Any]
) -> None:
    bench = Bench(backbone_folder("bert"))
    cache = TrunkCache(tmp_path, limit_bytes=1 << 30)
    configs = [settings(prompt={"length": 4, "layers": layers}) for layers in depths]
    for trial in run_all(stack_of(bench, trunk=cache), configs, lanes=len(depths)):
        assert_as_alone(bench, trial, trunk=cache)


# Ends


def poison(stack: Stack, lane: int) -> None:
    """Make a lane's next loss not a number."""
    with torch.no_grad():
        next(iter(dict(stack.model.trainable(lane)).values())).view(-1)[0] = float("nan")


def test_stack_trial_that_fails_leaves_the_others_as_alone(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    configs = [settings(prompt={"length": length}, seed=length) for length in (4, 6, 5)]
    stack = stack_of(bench)
    trials = [Trial(config) for config in configs]
    for lane, config in enumerate(configs):
        stack.start(lane, config)
    failed_at = 0
    for step in range(1, 9):
        if step == 3:
            poison(stack, 1)
        results = stack.advance()
        if isinstance(results.get(1), TrainingError):
            failed_at = step
            assert "nan" in str(results[1])
            assert stack.lanes == (0, 2)
        for lane in (0, 2):
            trials[lane].reports.append(report_of(results, lane))
    assert failed_at == 3
    for lane in (0, 2):
        trials[lane].weights = weights(stack.model, lane)
        assert_as_alone(bench, trials[lane])


def test_stack_lane_of_a_failed_trial_is_used_again(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    config = settings(prompt={"length": 5}, seed=5)
    stack = stack_of(bench)
    stack.start(0, settings(epochs=9, patience=9))
    stack.start(1, settings())
    stack.advance()
    poison(stack, 1)
    assert isinstance(stack.advance()[1], TrainingError)
    trial = Trial(config)
    stack.start(1, config)
    while 1 in stack.lanes:
        trial.reports.append(report_of(stack.advance(), 1))
    trial.weights = weights(stack.model, 1)
    assert_as_alone(bench, trial)
    assert stack.lanes == (0,)


def test_stack_stopped_lane_keeps_the_weights_of_its_best_epoch(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    stack = stack_of(bench)
    stack.start(0, settings(seed=1))
    stack.start(1, settings(epochs=9, learning_rate=5e-2))
    best: dict[str, torch.Tensor] = {}
    for _ in range(6):
        report = report_of(stack.advance(), 1)
        if report.is_best:
            best = weights(stack.model, 1)
    assert report.evaluation is None
    assert report.epoch == 2
    now = weights(stack.model, 1)
    assert any(not torch.equal(now[name], best[name]) for name in best)
    stack.stop(1)
    assert stack.lanes == (0,)
    assert_equal(weights(stack.model, 1), best)
    stack.advance()
    assert_equal(weights(stack.model, 1), best)


def test_stack_trial_that_is_done_keeps_the_weights_of_its_best_epoch(
    backbone_folder: Folder,
) -> None:
    bench = Bench(backbone_folder("bert"))
    stack = stack_of(bench)
    stack.start(0, settings(epochs=5, learning_rate=0.3))
    stack.start(1, settings(epochs=9, patience=9))
    best: dict[str, torch.Tensor] = {}
    while 0 in stack.lanes:
        if report_of(stack.advance(), 0).is_best:
            best = weights(stack.model, 0)
    for _ in range(3):
        stack.advance()
    assert_equal(weights(stack.model, 0), best)


def test_stack_refuses_a_trial_whose_dropout_its_neighbours_would_share(
    backbone_folder: Folder,
) -> None:
    stack = stack_of(Bench(backbone_folder("bert"), rows=(12, 6)))
    with pytest.raises(ConfigError, match=r"train\.backbone_dropout: .* expected false"):
        stack.start(0, settings(backbone_dropout=True))
    assert not stack.lanes
    stack.start(0, settings())
    assert stack.lanes == (0,)


@pytest.mark.parametrize("method", ["prompt_tuning", "finetune"])
def test_stack_refuses_methods_that_cannot_share_a_forward(
    backbone_folder: Folder, method: str
) -> None:
    stack = stack_of(Bench(backbone_folder("bert"), rows=(12, 6)))
    with pytest.raises(ConfigError, match=rf"train\.method: trials of {method} cannot share"):
        stack.start(0, settings(method=method, learning_rate=1e-3))
    assert not stack.lanes
    assert len(stack.model.bank) == 0
    stack.start(0, settings())
    assert stack.lanes == (0,)


def test_stack_refuses_a_layer_that_is_not_there_and_leaves_the_lane_free(
    backbone_folder: Folder,
) -> None:
    stack = stack_of(Bench(backbone_folder("bert"), rows=(12, 6)))
    with pytest.raises(ConfigError, match=r"train\.prompt\.layers"):
        stack.start(0, settings(prompt={"length": 4, "layers": 4}))
    stack.start(0, settings())
    assert stack.lanes == (0,)


def test_stack_leaves_the_backbone_and_the_random_state_alone(backbone_folder: Folder) -> None:
    bench = Bench(backbone_folder("bert"))
    before = {name: tensor.clone() for name, tensor in bench.backbone.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    run_all(stack_of(bench), [settings(**changes) for changes in TRIALS[:3]], lanes=3)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in bench.backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Checkpoints


def kept(folder: Path, number: int) -> Checkpoint:
    """Return a trial's checkpoint, written after every step."""
    return Checkpoint(folder / f"{number}.safetensors", every_steps=1)


def test_stack_trial_goes_on_from_its_checkpoint_in_another_lane(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"))
    trials = [Trial(settings(**changes)) for changes in TRIALS[:4]]
    dead = stack_of(bench)
    for lane, trial in enumerate(trials):
        assert dead.start(lane, trial.config, checkpoint=kept(tmp_path, lane)) is None
    for _ in range(3):
        for lane, result in dead.advance().items():
            assert isinstance(result, TrainReport)
            trials[lane].reports.append(result)
    stack = stack_of(bench)
    for lane, number in enumerate((2, 0, 3, 1)):
        resumed = stack.start(lane, trials[number].config, checkpoint=kept(tmp_path, number))
        assert resumed is not None
        assert (resumed.step, resumed.is_resumed) == (3, True)
    while stack.lanes:
        for lane, result in stack.advance().items():
            number = (2, 0, 3, 1)[lane]
            assert isinstance(result, TrainReport)
            trials[number].reports.append(result)
            if lane not in stack.lanes:
                trials[number].weights = weights(stack.model, lane)
    for trial in trials:
        assert_as_alone(bench, trial)


def test_stack_trial_that_was_done_is_done_again(backbone_folder: Folder, tmp_path: Path) -> None:
    bench = Bench(backbone_folder("bert"), rows=(24, 12))
    first, again = stack_of(bench), stack_of(bench)
    first.start(0, settings(), checkpoint=kept(tmp_path, 0))
    last = None
    while first.lanes:
        last = report_of(first.advance(), 0)
    resumed = again.start(0, settings(), checkpoint=kept(tmp_path, 0))
    assert again.lanes == ()
    assert resumed is not None
    assert last is not None
    assert resumed.history == last.history
    assert_equal(weights(again.model), weights(first.model))


def test_stack_checkpoint_is_one_that_a_training_alone_goes_on_from(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"))
    config = settings(prompt={"length": 4, "dropout": 0.2})
    stack = stack_of(bench)
    stack.start(0, settings(seed=9))
    stack.start(1, config, checkpoint=kept(tmp_path, 1))
    for _ in range(3):
        stack.advance()
    model = bench.model(config)
    reports = list(bench.start(model, config, checkpoint=kept(tmp_path, 1)))
    assert (reports[0].is_resumed, reports[0].step) == (True, 3)
    whole, _ = bench.run(config)
    assert_close(weights(model), weights(whole), atol=WEIGHT_ATOL)


def test_stack_trial_whose_checkpoint_finds_no_room_leaves_the_others_as_alone(
    backbone_folder: Folder, tmp_path: Path
) -> None:
    bench = Bench(backbone_folder("bert"))
    stack, trial = stack_of(bench), Trial(settings(seed=4))
    stack.start(0, trial.config)
    (tmp_path / "1.safetensors").mkdir()
    (tmp_path / "1.safetensors" / "in-the-way").touch()
    stack.start(1, settings(), checkpoint=kept(tmp_path, 1))
    while stack.lanes:
        results = stack.advance()
        trial.reports.append(report_of(results, 0))
        if len(trial.reports) == 1:
            assert "the checkpoint could not be written" in str(results[1])
            assert stack.lanes == (0,)
    trial.weights = weights(stack.model, 0)
    assert_as_alone(bench, trial)


# Memory


def test_stack_parts_its_forward_where_memory_runs_out(
    backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(backbone_folder("bert"))
    sizes: list[int] = []

    def compute(model: Any, learners: Any) -> list[float]:
        sizes.append(len(learners))
        losses = compute_gradients(model, learners)  # whose gradients are of no step
        if len(learners) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(stack_module, "compute_gradients", compute)
    configs = [settings(seed=seed, prompt={"length": 3 + seed}) for seed in range(5)]
    trials = run_all(stack_of(bench), configs, lanes=5)
    assert sizes[:5] == [5, 3, 2, 1, 2]
    assert max(sizes[5:]) == 2
    for trial in trials:
        assert_as_alone(bench, trial)


def test_stack_trial_that_is_too_large_by_itself_leaves_the_others_as_alone(
    backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(backbone_folder("bert"))

    def compute(model: Any, learners: list[Learner]) -> list[float]:
        if any(learner.config.seed == 1 for learner in learners):
            raise MemoryError("no room for a batch")
        return compute_gradients(model, learners)

    monkeypatch.setattr(stack_module, "compute_gradients", compute)
    trials = [Trial(settings(seed=seed)) for seed in range(3)]
    stack = stack_of(bench)
    for lane, trial in enumerate(trials):
        stack.start(lane, trial.config)
    first = stack.advance()
    assert isinstance(first[1], MemoryRanOutError)
    assert str(first[1]) == "MemoryError: no room for a batch"
    trials[0].reports.append(report_of(first, 0))
    trials[2].reports.append(report_of(first, 2))
    while stack.lanes:
        for lane, result in stack.advance().items():
            trials[lane].reports.append(report_of({lane: result}, lane))
    for lane in (0, 2):
        trials[lane].weights = weights(stack.model, lane)
        assert_as_alone(bench, trials[lane])


def test_stack_trial_whose_evaluation_is_too_large_leaves_the_others(
    backbone_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(24, 12))
    evaluate = learner_module.evaluate_model

    def hungry(*given: Any, slot: int, **options: Any) -> Any:
        if slot == 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return evaluate(*given, slot=slot, **options)

    monkeypatch.setattr(learner_module, "evaluate_model", hungry)
    stack = stack_of(bench)
    stack.start(0, settings())
    stack.start(1, settings())
    ends = []
    while stack.lanes:
        ends.append(stack.advance())
    failed = [results[0] for results in ends if isinstance(results.get(0), MemoryRanOutError)]
    assert len(failed) == 1
    assert report_of(ends[-1], 1).epoch == 2
