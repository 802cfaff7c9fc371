"""train: the best settings on train, early stopping on dev, and the artifact."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.dag import git_commit
from pipelines.paths import BEST_FILE, TaskPaths, alone
from pipelines.prepared import Prepared, read_examples
from pipelines.settings import TaskSettings
from pipelines.stages import Progress, silent
from pipelines.stages.training import (
    backbone_for,
    backbone_needs,
    joined_team,
    load_start,
    overlay,
    start_training,
    trunk_cache,
)
from pipelines.tables import csv_text
from ptv2_core.artifact import Weights, restore_model, save_artifact
from ptv2_core.config import TrainConfig
from ptv2_core.evaluation.inputs import INPUT_KEYS
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.files import replace_directory, write_json_atomic, write_text_atomic
from ptv2_core.machine import peak_device_memory_bytes, peak_memory_bytes
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.records import EpochRecord, TrainReport
from ptv2_core.training.start import resolve_head

GOLDEN_INPUTS = 4
LIBRARIES = ("torch", "transformers", "numpy", "safetensors")
LAYERS_FILE = "layers.csv"
LAYER_COLUMNS = (
    "layer",
    "attention",
    "gradient_norm",
    "key_norm",
    "value_norm",
    "key_rank",
    "value_rank",
    "moved",
)
"""The columns of `layers.csv` behind `epoch`; names of `LayerRecord`."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How the training went, as `metrics.json` holds it.

    Attributes:
        metric: The task's metric.
        dev: Its best value on dev.
        best_epoch: When.
        epochs: Epochs that ran.
        seconds: Of training, evaluation on dev included.
        peak_memory_bytes: The process's largest resident size.
        peak_device_memory_bytes: The most that tensors took on a CUDA card; none without one.
        trainable_parameters: Of the saved prompt and head.
        trainable_share: Of what was tuned beside the head in the backbone's parameters.
        precision: Number format of the frozen weights, as `Backbone.number_format` names it.
    """

    metric: str
    dev: float
    best_epoch: int
    epochs: int
    seconds: float
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None
    trainable_parameters: int
    trainable_share: float
    precision: str


def run(settings: TaskSettings, paths: TaskPaths, progress: Progress = silent) -> TrainResult:
    """Train, and write `prompts/TASK` and `results/TASK/train`.

    A killed training goes on from its checkpoint and ends with the same bytes. Under torchrun the
    processes divide every batch, and the first of them writes.

    Raises:
        ConfigError: The prompt is longer than the backbone's positions allow.
        PipelineError: Search has not run, or another training of this task is running.
        TrainingError: The loss was not finite, or the checkpoint is damaged.
    """
    prepared = Prepared.load(paths.prepared)
    best_file = paths.require(paths.search / BEST_FILE, "search")
    best: dict[str, Any] = json.loads(best_file.read_text(encoding="utf-8"))
    config = overlay(settings.train, best.get("train", {}))
    with joined_team(settings.backbone.device) as team, _alone(paths, team):
        backbone = backbone_for(settings, prepared)
        start = load_start(settings, prepared, paths, backbone)
        checkpoint = Checkpoint(paths.checkpoint, every_s=settings.run.checkpoint_s)
        model, reports = start_training(
            backbone,
            prepared,
            config,
            start=start,
            trunk=trunk_cache(settings, paths),
            checkpoint=checkpoint,
            team=team,
            diagnoses=True,
        )
        for report in reports:
            what = f"epoch {report.epoch} loss {report.train_loss:.4f}"
            if report.history:
                what += f", dev {report.history[-1].dev_score:.4f}"
            if report.is_resumed:
                what += ", going on from the checkpoint"
            progress(what, report.step, report.total_steps)
        weights = Weights.of(model)
        result = _result(prepared, backbone, weights, report.history)
        if team is None or team.rank == 0:
            chosen = evaluate_model(
                model, prepared.splits["dev"], prepared.task, token_budget=config.token_budget
            )
            with replace_directory(paths.train) as folder:
                write_json_atomic(folder / "metrics.json", asdict(result))
                write_text_atomic(folder / "history.csv", _history_csv(report.history))
                write_text_atomic(folder / LAYERS_FILE, _layers_csv(report))
            save_prompt(
                paths.prompt,
                weights,
                settings=settings,
                paths=paths,
                prepared=prepared,
                backbone=backbone,
                config=config,
                best=best,
                decoding=chosen.decoding,
                metrics={
                    f"dev_{result.metric}": result.dev,
                    "best_epoch": result.best_epoch,
                    "precision": result.precision,
                },
            )
            checkpoint.remove()
        return result


@contextmanager
def _alone(paths: TaskPaths, team: Team | None) -> Iterator[None]:
    """Hold the task's training; of a team, its first process does."""
    if team is not None and team.rank > 0:
        yield
        return
    with alone(paths.checkpoint.with_suffix(".lock"), "train"):
        yield


def _result(
    prepared: Prepared, backbone: Backbone, weights: Weights, history: Sequence[EpochRecord]
) -> TrainResult:
    chosen = [record for record in history if record.is_best][-1]
    return TrainResult(
        metric=prepared.task.metric,
        dev=chosen.dev_score,
        best_epoch=chosen.epoch,
        epochs=len(history),
        seconds=history[-1].seconds,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_memory_bytes=peak_device_memory_bytes(backbone.device),
        trainable_parameters=sum(tensor.numel() for tensor in weights.named().values()),
        trainable_share=weights.num_tuned / backbone.spec.num_parameters,
        precision=backbone.number_format,
    )


def _history_csv(history: Sequence[EpochRecord]) -> str:
    rows = [{**asdict(record), "is_best": int(record.is_best)} for record in history]
    for row in rows:
        del row["layers"]
    return csv_text(rows[0], [row.values() for row in rows])


def _layers_csv(report: TrainReport) -> str:
    """Return a row for each layer at the end of each epoch; epoch 0 is the start."""
    epochs = [(0, report.start_layers), *((one.epoch, one.layers) for one in report.history)]
    rows = [
        [epoch, *(getattr(layer, name) for name in LAYER_COLUMNS)]
        for epoch, layers in epochs
        for layer in layers
    ]
    return csv_text(["epoch", *LAYER_COLUMNS], rows)


def save_prompt(
    directory: Path,
    weights: Weights,
    *,
    settings: TaskSettings,
    paths: TaskPaths,
    prepared: Prepared,
    backbone: Backbone,
    config: TrainConfig,
    best: Mapping[str, Any],
    decoding: Mapping[str, float],
    metrics: Mapping[str, Any],
) -> None:
    """Save what was trained for a task as an artifact, with golden inputs.

    Args:
        directory: Where; replaced if it is there.
        weights: What was trained.
        settings: Of the task.
        paths: Its files.
        prepared: Its data.
        backbone: That it was trained on.
        config: With which settings.
        best: What a search found, as `best.json` holds it; empty without one.
        decoding: Settings of an answer that dev chose.
        metrics: Scores on dev.
    """
    head = resolve_head(config.head, backbone)
    reference = load_backbone(
        settings.backbone.name,
        settings.backbone.revision,
        precision="fp32",
        # a card that holds the rounded weights may have no room for these
        device="auto" if backbone.rounding is None else "cpu",
        **backbone_needs(config.method, config.head),
    )
    location = locate(settings.backbone.name, settings.backbone.revision)
    predictor = Predictor(
        restore_model(reference, [(prepared.task, config.prompt, head, weights)]),
        load_tokenizer(location, words=prepared.task.form == "tokens"),
        prepared.task,
        max_length=prepared.max_length,
        stride=prepared.stride,
        decoding=decoding,
    )
    save_artifact(
        directory,
        weights,
        task=prepared.task,
        method=config.method,
        prompt=config.prompt,
        head=head,
        backbone=backbone.spec.to_mapping(),
        tokenizer_digest=prepared.tokenizer_digest,
        encoding={"max_length": prepared.max_length, "stride": prepared.stride},
        decoding=decoding,
        training={**config.to_mapping(), "study": best.get("study"), "trial": best.get("trial")},
        provenance={
            "git_commit": git_commit(paths.root)["commit"],
            "data": prepared.digests,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in LIBRARIES},
        },
        metrics=metrics,
        golden=golden_inputs(predictor, paths.prepared),
    )


def golden_inputs(predictor: Predictor, prepared: Path) -> list[dict[str, Any]]:
    """Return a few dev inputs with the logits that the prompt gives, to check loading against."""
    inputs = [
        {key: value for key, value in example.items() if key in INPUT_KEYS}
        for example in read_examples(prepared, "dev")[:GOLDEN_INPUTS]
    ]
    return [
        {"input": given, "logits": logits.tolist()}
        for given, logits in zip(inputs, predictor.logits(inputs), strict=True)
    ]
