"""What search, train and evaluate share: the backbone of the settings, and one training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.settings import TaskSettings, read_environment
from pipelines.stages.prepare import Prepared
from ptv2_core.config import Device, TrainConfig
from ptv2_core.errors import DataError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import choose_device, load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit
from ptv2_core.training.records import TrainReport
from ptv2_core.training.start import check_positions, new_model
from ptv2_core.training.trunk import TrunkCache


def backbone_for(settings: TaskSettings, prepared: Prepared) -> Backbone:
    """Load the backbone of the settings, and check that the data was encoded with its tokenizer.

    Raises:
        BackboneError: It is not there, or is another one.
        DataError: The data was encoded with another tokenizer.
    """
    chosen = settings.backbone
    found = locate(chosen.name, chosen.revision).tokenizer_digest()
    if found != prepared.tokenizer_digest:
        raise DataError(
            f"data/prepared/{settings.name}: encoded with tokenizer {prepared.tokenizer_digest}, "
            f"but {chosen.name} has {found}; run `ptv2 prepare --task {settings.name}` again"
        )
    return load_backbone(
        chosen.name,
        chosen.revision,
        digest=chosen.digest,
        precision=chosen.precision,
        device=chosen.device,
    )


def overlay(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return settings with nested `changes` laid over them, checked again."""
    values = base.to_mapping()
    for key, value in changes.items():
        is_section = isinstance(value, Mapping)
        values[key] = {**values[key], **value} if is_section else value
    return TrainConfig.from_mapping(values)


@contextmanager
def joined_team(device: Device) -> Iterator[Team | None]:
    """Join the processes that torchrun started, for the time of a training.

    Args:
        device: On `cuda` or `auto` each process takes the card of its local rank.

    Yields:
        The team; None where this process is alone.

    Raises:
        PipelineError: The device cannot be shared so.
    """
    process = read_environment()
    if process.world_size is None or process.world_size == 1:
        yield None
        return
    chosen = choose_device(device)
    if chosen.type == "mps":
        raise PipelineError(
            "torchrun: Apple's MPS cannot sum gradients over processes; set backbone.device to "
            "cpu, or train in one process"
        )
    if chosen.type == "cuda":
        if process.local_rank >= torch.cuda.device_count():
            raise PipelineError(
                f"torchrun: process {process.local_rank} of this machine has no card; expected "
                f"--nproc-per-node {torch.cuda.device_count()} at most"
            )
        torch.cuda.set_device(process.local_rank)
    # scores are summed on the CPU, gradients where they are
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend)
    try:
        yield Team(rank=torch.distributed.get_rank(), size=torch.distributed.get_world_size())
    finally:
        torch.distributed.destroy_process_group()


def trunk_cache(settings: TaskSettings, paths: TaskPaths) -> TrunkCache | None:
    """Return the workspace's trunk cache; None where the settings give it no room."""
    limit = int(settings.run.trunk_cache_gb * 1e9)
    return TrunkCache(paths.trunk, limit_bytes=limit) if limit else None


def start_training(
    backbone: Backbone,
    prepared: Prepared,
    config: TrainConfig,
    *,
    trunk: TrunkCache | None = None,
    checkpoint: Checkpoint | None = None,
    team: Team | None = None,
) -> tuple[PromptedModel, Iterator[TrainReport]]:
    """Return a new model and the generator that trains it; the last three as for `fit`.

    Raises:
        ConfigError: The prompt is longer than the backbone's positions allow.
    """
    splits = prepared.splits
    check_positions(backbone, config.prompt, list(splits.values()))
    model = new_model(backbone, prepared.task, config, splits["train"])
    reports = fit(
        model,
        task=prepared.task,
        train=splits["train"],
        dev=splits["dev"],
        config=config,
        trunk=trunk,
        checkpoint=checkpoint,
        team=team,
    )
    return model, reports
