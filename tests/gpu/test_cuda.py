"""What runs on a CUDA card gives what the CPU gives; skipped where there is none."""

import asyncio
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ptv2_core.config import PromptConfig, TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import TrainingError
from ptv2_core.machine import measure_gemm_rate
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.rounding import LIBRARIES
from ptv2_core.model.prompts import NO_SLOT
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit
from ptv2_core.training.records import EpochRecord
from ptv2_core.training.stack import Stack
from ptv2_core.training.start import new_model
from ptv2_core.training.trunk import TrunkCache
from ptv2_serving.engine.requests import Computed
from tests.core.family_parts import CASES, tiny_family
from tests.core.training_parts import backward, padded
from tests.serving.engine_parts import Served, questions
from tests.tiny import MODELS, encode_for, examples_of, task_of, tiny_backbone, tiny_model

pytestmark = pytest.mark.gpu
# sums in another order, over three epochs of AdamW
TOLERANCE = 2e-3
ROWS = [[2, 7, 8, 9, 3], [2, 11, 3], [2, 20, 21, 22, 23, 24, 25, 30, 31, 32, 33, 3], [2, 9, 9, 3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_backbone(tmp_path_factory.mktemp("bert"))


def parts(folder: Path, kind: str) -> tuple[TaskSpec, EncodedSplit, EncodedSplit]:
    """Return a task with its train and dev rows."""
    task = task_of(kind)
    train, dev = (encode_for(folder, examples_of(kind, n, seed=n), task) for n in (60, 24))
    return task, train, dev


def settings(**changes: object) -> TrainConfig:
    """Return quick settings."""
    values = {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "prompt": {"length": 4}}
    return TrainConfig.from_mapping({**values, **changes})


def history(
    folder: Path,
    device: str,
    kind: str,
    config: TrainConfig,
    *,
    trunk: TrunkCache | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[EpochRecord]:
    """Train to the end and return the epochs."""
    backbone = load_backbone(str(folder), precision="fp32", device=device)  # type: ignore[arg-type]
    task, train, dev = parts(folder, kind)
    model = new_model(backbone, task, config, train)
    *_, last = fit(
        model, task=task, train=train, dev=dev, config=config, trunk=trunk, checkpoint=checkpoint
    )
    return list(last.history)


@pytest.mark.parametrize("kind", ["classification", "tagging"])
@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}])
def test_cuda_trains_as_the_cpu_does(folder: Path, kind: str, changes: dict[str, object]) -> None:
    config = settings(**changes, prompt={"length": 4, "dropout": 0.1}, head={"dropout": 0.1})
    on_card, on_cpu = (history(folder, device, kind, config) for device in ("cuda", "cpu"))
    for ours, theirs in zip(on_card, on_cpu, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=TOLERANCE)
        assert ours.dev_loss == pytest.approx(theirs.dev_loss, abs=TOLERANCE)


def states(folder: Path, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the states of rows with and without prompts, and a prompt's gradient."""
    backbone = load_backbone(str(folder), precision="fp32", device=device)  # type: ignore[arg-type]
    model = tiny_model(backbone, PromptConfig(length=3), PromptConfig(length=7, layers=(0, 2)))
    ids, mask = (one.to(device) for one in padded(ROWS))
    slots = torch.tensor([0, NO_SLOT, 1, 0])
    hidden = model.encode(ids, mask, slots=slots).hidden[mask]
    weighing = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    backward((hidden * weighing.to(device)).sum())
    gradient = dict(model.trainable())["bank.slots.0.weight"].grad
    assert gradient is not None
    return hidden.detach().cpu(), gradient.cpu()


@pytest.mark.parametrize("case", [*MODELS, *CASES])
def test_cuda_computes_every_family_as_the_cpu_does(tmp_path: Path, case: str) -> None:
    make = tiny_family if case in CASES else tiny_backbone
    folder = make(tmp_path, case)
    (got, got_gradient), (wanted, gradient) = (states(folder, one) for one in ("cuda", "cpu"))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-3)
    size = gradient.abs().max()
    torch.testing.assert_close(got_gradient / size, gradient / size, atol=1e-4, rtol=1e-3)


def test_cuda_reads_the_trunk_cache(folder: Path, tmp_path: Path) -> None:
    config = settings(prompt={"length": 4, "layers": 2})
    cache = TrunkCache(tmp_path / "trunk", limit_bytes=10**8)
    cached = history(folder, "cuda", "classification", config, trunk=cache)
    plain = history(folder, "cuda", "classification", config)
    assert len(list((tmp_path / "trunk").glob("*.npy"))) == 2
    for ours, theirs in zip(cached, plain, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=TOLERANCE)


def test_cuda_stack_trains_each_trial_as_alone(folder: Path) -> None:
    task, train, dev = parts(folder, "classification")
    configs = [
        settings(learning_rate=rate, prompt={"length": length})
        for rate, length in ((1e-2, 3), (3e-2, 8), (1e-3, 5))
    ]
    backbone = load_backbone(str(folder), precision="fp32", device="cuda")
    stack = Stack(backbone, task=task, train=train, dev=dev)
    for lane, config in enumerate(configs):
        stack.start(lane, config)
    losses: dict[int, list[float]] = {lane: [] for lane in range(3)}
    while stack.lanes:
        for lane, result in stack.advance().items():
            assert not isinstance(result, TrainingError)
            if result.evaluation is not None:
                losses[lane].append(result.evaluation.loss)
    for lane, config in enumerate(configs):
        alone = history(folder, "cuda", "classification", config)
        wanted = [record.dev_loss for record in alone]
        assert losses[lane] == pytest.approx(wanted, abs=TOLERANCE)


def test_cuda_training_goes_on_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    config = settings()
    backbone = load_backbone(str(folder), precision="fp32", device="cuda")
    task, train, dev = parts(folder, "classification")
    model = new_model(backbone, task, config, train)
    checkpoint = Checkpoint(tmp_path / "checkpoint.safetensors", every_steps=1)
    reports = fit(model, task=task, train=train, dev=dev, config=config, checkpoint=checkpoint)
    for _ in range(5):
        next(reports)
    reports.close()  # type: ignore[attr-defined]
    resumed = history(
        folder, "cuda", "classification", config, checkpoint=Checkpoint(checkpoint.file)
    )
    whole = history(folder, "cuda", "classification", config)
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours.dev_loss == pytest.approx(theirs.dev_loss, abs=TOLERANCE)


def test_cuda_bf16_keeps_prompts_in_fp32(folder: Path) -> None:
    backbone = load_backbone(str(folder), precision="bf16", device="cuda")
    task, train, _ = parts(folder, "classification")
    model = new_model(backbone, task, settings(), train)
    assert {p.dtype for _, p in model.trainable()} == {torch.float32}
    assert backbone.dtype == torch.bfloat16
    assert measure_gemm_rate(torch.bfloat16, backbone.device, seconds=0.1) > 0


needs_bitsandbytes = pytest.mark.skipif(
    any(find_spec(name) is None for name in LIBRARIES),
    reason="the extra `quantized` is not installed",
)


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_cuda_trains_prompts_on_rounded_weights(folder: Path, precision: str) -> None:
    backbone = load_backbone(str(folder), precision=precision, device="cuda")  # type: ignore[arg-type]
    assert backbone.number_format.startswith(f"bnb-{precision}+")
    task, train, dev = parts(folder, "classification")
    before = {name: one.clone() for name, one in backbone.model.named_parameters()}
    model = new_model(backbone, task, settings(learning_rate=3e-2), train)
    *_, last = fit(model, task=task, train=train, dev=dev, config=settings(learning_rate=3e-2))
    losses = [record.train_loss for record in last.history]
    assert losses[-1] < losses[0]
    assert {p.dtype for _, p in model.trainable()} == {torch.float32}
    assert all(torch.equal(one, before[name]) for name, one in backbone.model.named_parameters())


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_cuda_rounded_answers_a_row_alike_alone_and_among_others(
    folder: Path, precision: str
) -> None:
    backbone = load_backbone(str(folder), precision=precision, device="cuda")  # type: ignore[arg-type]
    task, train, _ = parts(folder, "classification")
    model = new_model(backbone, task, settings(), train).eval()
    ids = torch.tensor([[2, 7, 8, 3], [2, 11, 12, 3]], device="cuda")
    with torch.no_grad():
        whole = model(ids, ids > 0)
        alone = model(ids[:1], ids[:1] > 0)
    torch.testing.assert_close(alone, whole[:1], atol=2e-2, rtol=2e-2)


def test_cuda_engine_on_every_card_answers_as_the_cpu_does(tmp_path: Path) -> None:
    cards = torch.cuda.device_count()
    made = Served(tmp_path, device="cuda", processes=cards + 1, batch_rows=2)

    async def asked() -> list[Computed]:
        await made.start()
        return await asyncio.gather(*(made.ask(*question) for question in questions(60)))

    for question, computed in zip(questions(60), made.runner.run(asked()), strict=True):
        made.check(*question, computed, tolerance=TOLERANCE)
    found = [worker.card for worker in made.engine.pool.workers]
    assert sorted(found) == sorted([*range(cards), 0])
    assert made.engine.backbone["device"] == "cuda"
    made.runner.run(made.engine.close())
    made.runner.close()
