"""What the processes of the tests do; each speaks through the connection it is given."""

import os
import resource
import time
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist

from ptv2_core.artifact import Weights
from ptv2_core.config import TrainConfig
from ptv2_core.errors import TrainingError
from ptv2_core.files import write_bytes_atomic
from ptv2_core.parallel import Team
from ptv2_core.training import trunk
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import TrainReport
from ptv2_core.training.trunk import TrunkCache
from tests.core.training_parts import Bench, epoch_rows, settings, weights

LIMIT = 1 << 30


def count_runs(bench: Bench, layer: int) -> list[int]:
    """Return a list that grows by one with each run of a layer of the bench's backbone."""
    model: Any = bench.backbone.model
    runs: list[int] = []
    model.encoder.layer[layer].intermediate.register_forward_hook(lambda *_: runs.append(1))
    return runs


def fill_until_killed(connection: Connection, folder: Path, cache: Path, num_runs: int) -> None:
    """Fill a trunk cache, say so after so many batches, and wait there for SIGKILL."""
    trunk.TOKEN_BUDGET = 64
    bench = Bench(folder)
    model: Any = bench.backbone.model
    runs = count_runs(bench, 0)

    def wait(*_: Any) -> None:
        if len(runs) == num_runs:
            connection.send(num_runs)
            time.sleep(1000.0)

    model.encoder.layer[0].register_forward_hook(wait)
    TrunkCache(cache, limit_bytes=LIMIT).states(bench.backbone, bench.train, 1)


def fill_beside_another(
    connection: Connection, folder: Path, cache: Path, barrier: Barrier
) -> None:
    """Ask for the same states as another process at the same moment; say runs and values."""
    bench = Bench(folder)
    model: Any = bench.backbone.model
    runs = count_runs(bench, 0)
    # long enough for the other one to come to the same place, were it not held
    model.encoder.layer[0].register_forward_hook(lambda *_: time.sleep(0.3))
    barrier.wait()
    states = TrunkCache(cache, limit_bytes=LIMIT).states(bench.backbone, bench.train, 1)
    assert states is not None
    connection.send((len(runs), states.values.tobytes()))


def train_on_a_full_disk(connection: Connection, folder: Path, cache: Path, size: int) -> None:
    """Train with a trunk cache where no file can grow beyond `size`; say whether it was used.

    A full disk is told as ENOSPC and this limit as EFBIG; Python itself ignores SIGXFSZ.
    """
    bench = Bench(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    kept = TrunkCache(cache, limit_bytes=LIMIT)
    states = kept.states(bench.backbone, bench.train, 1)
    _, reports = bench.run(settings(prompt={"length": 4, "layers": 2}), trunk=kept)
    connection.send((states is not None, epoch_rows(reports)))


def train_step_by_step(
    connection: Connection, folder: Path, out: Path, config: TrainConfig, num_threads: int
) -> None:
    """Train with a checkpoint, wait for a word after each report, and write the prompt."""
    torch.set_num_threads(num_threads)
    bench = Bench(folder)
    model = bench.model(config)
    checkpoint = Checkpoint(out / "checkpoint.safetensors", every_steps=2)
    for report in bench.start(model, config, checkpoint=checkpoint):
        connection.send((report.step, report.is_resumed))
        connection.recv()
    named = Weights.of(model).named()
    write_bytes_atomic(out / "prompt.safetensors", safetensors.torch.save(named))
    checkpoint.remove()
    connection.send("done")


def save_until_killed(connection: Connection, folder: Path, file: Path, num_saves: int) -> None:
    """Train, and wait for SIGKILL in the middle of writing a checkpoint."""
    bench = Bench(folder)
    config = settings()
    sync = os.fsync
    syncs: list[Any] = []

    def wait(fd: Any) -> None:
        syncs.append(fd)
        # a file and its folder are synced for each checkpoint
        if len(syncs) == 2 * num_saves - 1:
            connection.send(num_saves)
            time.sleep(1000.0)
        sync(fd)

    os.fsync = wait
    list(bench.start(bench.model(config), config, checkpoint=Checkpoint(file, every_steps=1)))


@dataclass(frozen=True, kw_only=True)
class TeamPlan:
    """What the processes of a team do.

    Attributes:
        folder: Of the backbone.
        kind: Of the task.
        rows: Of train and dev.
        config: Of the training.
        store: A file through which they find each other.
        size: How many they are.
        trunk: Folder of a trunk cache.
        checkpoint: File of a checkpoint, written at each step.
        last_step: After which they leave the training; None trains to the end.
        poisoned: A process whose backbone breaks after the second step.
    """

    folder: Path
    kind: str
    rows: tuple[int, int]
    config: TrainConfig
    store: Path
    size: int
    trunk: Path | None = None
    checkpoint: Path | None = None
    last_step: int | None = None
    poisoned: int | None = None


@dataclass(frozen=True, kw_only=True)
class TeamResult:
    """What a process of a team has to say.

    Attributes:
        reports: Of its training.
        weights: What it left, by name.
        error: Why it could not go on.
    """

    reports: list[TrainReport]
    weights: dict[str, np.ndarray]
    error: str | None


def train_in_team(connection: Connection, plan: TeamPlan, rank: int) -> None:
    """Train as one of a team; say what came of it."""
    # a process that waits for one that is gone must not wait for ever
    dist.init_process_group(
        "gloo",
        init_method=f"file://{plan.store}",
        rank=rank,
        world_size=plan.size,
        timeout=timedelta(seconds=60),
    )
    bench = Bench(plan.folder, plan.kind, rows=plan.rows)
    model = bench.model(plan.config)
    reports: list[TrainReport] = []
    error = None
    steps = bench.start(
        model,
        plan.config,
        trunk=TrunkCache(plan.trunk, limit_bytes=LIMIT) if plan.trunk else None,
        checkpoint=Checkpoint(plan.checkpoint, every_steps=1) if plan.checkpoint else None,
        team=Team(rank=rank, size=plan.size),
    )
    try:
        for report in steps:
            reports.append(report)
            if report.step == plan.last_step:
                break
            if report.step == 2 and rank == plan.poisoned:
                next(bench.backbone.parameters()).fill_(float("nan"))
    except TrainingError as failure:
        error = str(failure)
    steps.close()  # type: ignore[attr-defined]
    # plain arrays: tensors would travel as files that end with this process
    arrays = {name: tensor.numpy() for name, tensor in weights(model).items()}
    connection.send(TeamResult(reports=reports, weights=arrays, error=error))
    # nobody leaves while another still speaks to it
    connection.recv()
    dist.destroy_process_group()
