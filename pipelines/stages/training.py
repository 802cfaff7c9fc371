"""What search, train and evaluate share: the backbone of the settings, and one training."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import torch

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.settings import TaskSettings, read_environment
from ptv2_core.artifact import load_weights
from ptv2_core.config import Device, HeadConfig, Method, Precision, TrainConfig
from ptv2_core.errors import ConfigError, DataError
from ptv2_core.manifest import load_manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import choose_device, choose_precision, load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.rounding import number_format, require_gradient, rounding_of
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit
from ptv2_core.training.records import TrainReport
from ptv2_core.training.start import Start, check_positions, new_model, resolve_head
from ptv2_core.training.trunk import TrunkCache
from ptv2_serving.store import parse_reference, pull

REGISTERED = "models:/"


def backbone_for(
    settings: TaskSettings,
    prepared: Prepared,
    *,
    method: Method | None = None,
    head: HeadConfig | None = None,
    precision: Precision | None = None,
    trains: bool = True,
) -> Backbone:
    """Load the backbone of the settings, and check that the data was encoded with its tokenizer.

    Args:
        settings: Of a task.
        prepared: Its data.
        method: What will be trained on it, or was; none takes that of `train`.
        head: What reads it; none takes that of `train`.
        precision: Its number format; none takes that of the settings.
        trains: Whether something will be trained on it, rather than answered.

    Raises:
        BackboneError: It is not there, is another one, or is in a format that does not allow it.
        DataError: The data was encoded with another tokenizer.
    """
    chosen = settings.backbone
    found = locate(chosen.name, chosen.revision).tokenizer_digest()
    if found != prepared.tokenizer_digest:
        raise DataError(
            f"data/prepared/{settings.name}: encoded with tokenizer {prepared.tokenizer_digest}, "
            f"but {chosen.name} has {found}; run `ptv2 prepare --task {settings.name}` again"
        )
    backbone = load_backbone(
        chosen.name,
        chosen.revision,
        digest=chosen.digest,
        precision=precision or chosen.precision,
        device=chosen.device,
        **backbone_needs(method or settings.train.method, head or settings.train.head),
    )
    if trains:
        require_gradient(backbone.rounding)
    return backbone


def backbone_identity(settings: TaskSettings) -> tuple[str, str, str]:
    """Return what of a backbone results depend on: digest, number format and kind of device.

    Raises:
        BackboneError: It is not there, or cannot have that format.
    """
    chosen = settings.backbone
    device = choose_device(chosen.device)
    dtype = choose_precision(chosen.precision, device)
    rounding = rounding_of(chosen.precision, device)
    # names of studies are made of it: those in plain formats keep theirs
    described = str(dtype) if rounding is None else number_format(rounding, dtype)
    return locate(chosen.name, chosen.revision).digest(), described, device.type


class BackboneNeeds(TypedDict):
    """Arguments of `load_backbone`."""

    packs: bool
    tunable: bool
    language_model: bool


def backbone_needs(method: Method, head: HeadConfig) -> BackboneNeeds:
    """Return the arguments of `load_backbone` that a method and a head ask for."""
    tunable = method == "finetune"
    return BackboneNeeds(
        packs=not tunable, tunable=tunable, language_model=head.type == "verbalizer"
    )


def load_start(
    settings: TaskSettings,
    prepared: Prepared,
    paths: TaskPaths,
    backbone: Backbone,
    *,
    pulls: bool = True,
) -> Start | None:
    """Load the prompt that `train.init_from` names; None where the training starts anew.

    The head is taken over too where the task has the same labels.

    Args:
        settings: Of a task.
        prepared: Its data.
        paths: Its files.
        backbone: That the prompt must be of.
        pulls: Whether to ask the registry; if not, a registered prompt was pulled before.

    Raises:
        ConfigError: It is no deep prompt, or of another backbone.
        ArtifactError: It is not there, or damaged.
        StoreError: The registry is away, or has no such prompt.
    """
    source = settings.train.init_from
    if source is None:
        return None
    if settings.train.method != "ptv2":
        raise ConfigError(
            f"train.init_from: only ptv2 begins from a prompt; expected train.method: ptv2, got "
            f"{settings.train.method}"
        )
    folder = paths.root / source
    if folder.resolve() == paths.prompt.resolve():
        raise ConfigError(
            f"train.init_from: {source} is what this training writes, and DVC removes it first; "
            f"expected another folder, or {REGISTERED}{settings.name}@champion"
        )
    if source.startswith(REGISTERED):
        folder = paths.init
        if pulls:
            _pull(source, folder, settings, paths)
    manifest = load_manifest(folder)
    if manifest.method != "ptv2":
        raise ConfigError(
            f"train.init_from: expected a prompt of method ptv2, got {manifest.method} in {source}"
        )
    if manifest.backbone["digest"] != backbone.spec.digest:
        raise ConfigError(
            f"train.init_from: {source} is a prompt of backbone {manifest.backbone['name']} "
            f"({manifest.backbone['digest']}), expected {backbone.spec.name} "
            f"({backbone.spec.digest})"
        )
    num_layers = backbone.spec.shape.num_layers
    theirs = manifest.prompt.layer_indices(num_layers)
    ours = settings.train.prompt.layer_indices(num_layers)
    if theirs != ours:
        raise ConfigError(
            f"train.init_from: {source} is a prompt in the layers {_listed(theirs)}, expected the "
            f"layers {_listed(ours)} (train.prompt.layers); set that to the same"
        )
    weights = load_weights(folder, manifest)
    assert weights.prompt is not None, "a prompt of ptv2 has one"
    # a head that read something else knows nothing of what this one reads
    is_same = (manifest.task.kind, manifest.task.labels, manifest.head.reads) == (
        prepared.task.kind,
        prepared.task.labels,
        resolve_head(settings.train.head, backbone).reads,
    )
    head = (weights.head_weight, weights.head_bias) if is_same else None
    return Start(prompt=weights.prompt, digest=manifest.sha256, head=head)


def _pull(source: str, folder: Path, settings: TaskSettings, paths: TaskPaths) -> None:
    """Put a registered prompt into a folder."""
    # models:/NAME/3 is MLflow's NAME:3
    reference = source.removeprefix(REGISTERED).replace("/", ":")
    try:
        parse_reference(reference)
    except ConfigError as error:
        raise ConfigError(
            "train.init_from: expected a folder, models:/NAME@ALIAS or models:/NAME/VERSION, got "
            f"{source!r}"
        ) from error
    chosen = settings.backbone
    uri = read_environment().mlflow_tracking_uri or settings.register.tracking_uri
    pull(
        reference,
        folder,
        tracking_uri=uri,
        root=paths.root,
        backbone_name=chosen.name if chosen.revision is None else None,
    )


def overlay(base: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    """Return settings with nested `changes` laid over them, checked again."""
    values = base.to_mapping()
    for key, value in changes.items():
        is_section = isinstance(value, Mapping)
        values[key] = {**values[key], **value} if is_section else value
    return TrainConfig.from_mapping(values)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


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
    start: Start | None = None,
    trunk: TrunkCache | None = None,
    checkpoint: Checkpoint | None = None,
    team: Team | None = None,
    diagnoses: bool = False,
) -> tuple[PromptedModel, Iterator[TrainReport]]:
    """Return a new model and the generator that trains it; the last four as for `fit`.

    A backbone that is to be tuned is copied for the model.

    Raises:
        ConfigError: The prompt is longer than the backbone's positions allow.
    """
    splits = prepared.splits
    check_positions(backbone, config, list(splits.values()))
    model = new_model(backbone, prepared.task, config, splits["train"], start=start)
    reports = fit(
        model,
        task=prepared.task,
        train=splits["train"],
        dev=splits["dev"],
        config=config,
        trunk=trunk,
        checkpoint=checkpoint,
        team=team,
        diagnoses=diagnoses,
    )
    return model, reports
