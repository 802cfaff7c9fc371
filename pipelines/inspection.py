"""What a trained prompt does in each layer, and how it came to that: `ptv2 inspect`'s facts."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.prepared import TASK_FILE, Prepared
from pipelines.settings import TaskSettings
from pipelines.stages.train import LAYERS_FILE
from pipelines.stages.training import backbone_for
from ptv2_core.artifact import Weights, load_weights, restore_model
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.diagnosis import (
    DIAGNOSED_ROWS,
    LayerFigures,
    diagnose,
    effective_rank,
    root_mean_square,
)
from ptv2_core.manifest import MANIFEST_FILE, Manifest, load_manifest
from ptv2_core.training.records import LayerRecord

FORMAT = "ptv2-inspection-1"
TOKEN_BUDGET = 4096
# norms are written in full, but an MLP's product may be rounded otherwise on another machine
SAME_NORM = 1e-3


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """The prompt of one layer; what could not be measured or was not recorded is None.

    Attributes:
        layer: Which; 0 is the lowest.
        attention: Share of the attention that tokens give to the prompt, mean over heads.
        start_attention: The same before the first step.
        head_attention: The same for each head; none where it was not measured.
        key_norm: Root mean square of the prompt's keys.
        value_norm: Of its values.
        key_ratio: `key_norm` over that of the layer's own keys of the tokens.
        value_ratio: Likewise for values.
        key_rank: Effective rank of the keys.
        value_rank: Of the values.
        first_gradient: Norm of the gradient, mean over the first epoch's steps.
        last_gradient: Over the last epoch's.
        moved: Norm of the change since the start, as a share of the norm of the prompt.
    """

    layer: int
    attention: float | None
    start_attention: float | None
    head_attention: tuple[float, ...]
    key_norm: float
    value_norm: float
    key_ratio: float | None
    value_ratio: float | None
    key_rank: float
    value_rank: float
    first_gradient: float | None
    last_gradient: float | None
    moved: float | None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The layers at the end of an epoch; epoch 0 is the start."""

    epoch: int
    layers: tuple[LayerRecord, ...]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that is known of a trained prompt.

    Attributes:
        task: The task.
        backbone: Its name.
        num_layers: Of the backbone.
        prompt_length: P.
        metric: What is scored on dev.
        dev: The prompt's score on dev; None where the prompt does not say.
        best_epoch: Whose prompt it is; None where the prompt does not say.
        epochs_asked: `train.epochs` of its training.
        epochs_run: How many ran; None without a history.
        rows: Rows of dev that were measured; 0 without any.
        layers: Each layer with a prompt, lowest first.
        epochs: The layers over the training; empty where that was not recorded.
        missing: What is not there, and why.
    """

    task: str
    backbone: str
    num_layers: int
    prompt_length: int
    metric: str
    dev: float | None
    best_epoch: int | None
    epochs_asked: int | None
    epochs_run: int | None
    rows: int
    layers: tuple[LayerRow, ...]
    epochs: tuple[Epoch, ...]
    missing: tuple[str, ...]


def inspect(settings: TaskSettings, paths: TaskPaths) -> Inspection:
    """Read what a training left, and measure the prompt on dev where the data is there.

    Raises:
        PipelineError: There is no prompt yet, or it has no keys and values in the layers.
        ArtifactError: The prompt is damaged, or of another backbone.
    """
    paths.require(paths.prompt / MANIFEST_FILE, "train")
    manifest = load_manifest(paths.prompt)
    if manifest.method != "ptv2":
        raise PipelineError(
            f"{paths.prompt}: expected a prompt of method ptv2, which has keys and values in the "
            f"layers; got {manifest.method}, of which nothing is measured layer by layer"
        )
    weights = load_weights(paths.prompt, manifest)
    missing: list[str] = []
    best = manifest.metrics.get("best_epoch")
    epochs = _recorded(paths, weights, best, missing)
    figures, rows = _measured(settings, paths, manifest, weights, missing)
    history = _table(paths.train / "history.csv")
    return Inspection(
        task=settings.name,
        backbone=manifest.backbone["name"],
        num_layers=manifest.backbone["num_layers"],
        prompt_length=manifest.prompt.length,
        metric=manifest.task.metric,
        dev=manifest.metrics.get(f"dev_{manifest.task.metric}"),
        best_epoch=best,
        epochs_asked=manifest.training.get("epochs"),
        epochs_run=int(history[-1]["epoch"]) if history and epochs else None,
        rows=rows,
        layers=_rows(manifest, weights, figures, epochs, best),
        epochs=epochs,
        missing=tuple(missing),
    )


def to_json(inspection: Inspection, explanation: Sequence[str]) -> dict[str, Any]:
    """Return plain values, with the sentences that explain them."""
    return {"format": FORMAT, **asdict(inspection), "explanation": list(explanation)}


def _table(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _recorded(
    paths: TaskPaths, weights: Weights, best: int | None, missing: list[str]
) -> tuple[Epoch, ...]:
    """Return the layers over the training, if that is the training of this prompt."""
    file = paths.train / LAYERS_FILE
    rows = _table(file)
    if not rows:
        missing.append(
            f"{file}: not there, so nothing is shown over the epochs; `ptv2 train --task "
            f"{paths.task}` writes it (a pulled or older prompt comes without)"
        )
        return ()
    found: dict[int, list[LayerRecord]] = {}
    for row in rows:
        found.setdefault(int(row["epoch"]), []).append(_record(row, file))
    chosen = found.get(-1 if best is None else best, [])
    assert weights.prompt is not None, "a prompt of ptv2 has one"
    sizes = [(root_mean_square(keys), root_mean_square(values)) for keys, values in weights.prompt]
    if len(chosen) != len(sizes) or not all(
        math.isclose(one.key_norm, keys, rel_tol=SAME_NORM)
        and math.isclose(one.value_norm, values, rel_tol=SAME_NORM)
        for one, (keys, values) in zip(chosen, sizes, strict=True)
    ):
        missing.append(
            f"{file}: of another training than {paths.prompt}, so nothing is shown over the "
            f"epochs; `ptv2 train --task {paths.task}` writes both"
        )
        return ()
    return tuple(Epoch(epoch=epoch, layers=tuple(layers)) for epoch, layers in found.items())


def _record(row: Mapping[str, str], file: Path) -> LayerRecord:
    try:
        numbers = {
            name: float(text) if text else None for name, text in row.items() if name != "epoch"
        }
        return LayerRecord(**{**numbers, "layer": int(row["layer"])})  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise PipelineError(f"{file}: damaged ({error}); train again, or remove it") from error


def _measured(
    settings: TaskSettings,
    paths: TaskPaths,
    manifest: Manifest,
    weights: Weights,
    missing: list[str],
) -> tuple[tuple[LayerFigures, ...], int]:
    """Return the prompt's figures on dev, and how many rows they are of."""
    if not (paths.prepared / TASK_FILE).is_file():
        missing.append(
            f"{paths.prepared}: not there, so nothing is measured on dev now; "
            f"`ptv2 prepare --task {settings.name}` writes it"
        )
        return (), 0
    prepared = Prepared.load(paths.prepared)
    backbone = backbone_for(
        settings, prepared, method=manifest.method, head=manifest.head, trains=False
    )
    if backbone.spec.digest != manifest.backbone["digest"]:
        raise ArtifactError(
            f"{paths.prompt}: expected backbone {manifest.backbone['digest']}, got "
            f"{backbone.spec.digest}; set backbone.name to that of the prompt "
            f"({manifest.backbone['name']}), or train again"
        )
    model = restore_model(backbone, [(manifest.task, manifest.prompt, manifest.head, weights)])
    dev = prepared.splits["dev"]
    figures = diagnose(model, dev, token_budget=TOKEN_BUDGET)
    return figures, min(DIAGNOSED_ROWS, len(dev.unit_lengths))


def _rows(
    manifest: Manifest,
    weights: Weights,
    figures: Sequence[LayerFigures],
    epochs: Sequence[Epoch],
    best: int | None,
) -> tuple[LayerRow, ...]:
    """Put together what was measured, what was recorded, and what the weights say themselves."""
    recorded = {one.epoch: one.layers for one in epochs}
    trained = [one.layers for one in epochs if one.epoch > 0]
    assert weights.prompt is not None, "a prompt of ptv2 has one"
    rows = []
    for place, (layer, (keys, values)) in enumerate(
        zip(
            manifest.prompt.layer_indices(manifest.backbone["num_layers"]),
            weights.prompt,
            strict=True,
        )
    ):
        now = figures[place] if figures else None
        then = recorded[best][place] if best in recorded else None
        start = recorded[0][place] if 0 in recorded else None
        attention = now.attention if now else then.attention if then else None
        key_norm, value_norm = root_mean_square(keys), root_mean_square(values)
        rows.append(
            LayerRow(
                layer=layer,
                attention=attention,
                start_attention=start.attention if start else None,
                head_attention=now.head_attention if now else (),
                key_norm=key_norm,
                value_norm=value_norm,
                key_ratio=key_norm / now.token_key_norm if now else None,
                value_ratio=value_norm / now.token_value_norm if now else None,
                key_rank=effective_rank(keys),
                value_rank=effective_rank(values),
                first_gradient=trained[0][place].gradient_norm if trained else None,
                last_gradient=trained[-1][place].gradient_norm if trained else None,
                moved=then.moved if then else None,
            )
        )
    return tuple(rows)
