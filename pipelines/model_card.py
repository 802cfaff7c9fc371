"""What the registry says about a prompt in numbers and tags.

Reads what the stages before left on disk and knows nothing of MLflow.
"""

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.gate import FORMAT_TAG
from pipelines.paths import BEST_FILE
from ptv2_core.data.examples import SPLITS
from ptv2_core.files import sha256_file
from ptv2_core.manifest import MANIFEST_FILE, Manifest, load_manifest
from ptv2_serving.tracking import MANIFEST_TAG, SHA256_TAG

CURVES = ("train_loss", "dev_loss", "dev_score", "learning_rate")
"""The columns of train/history.csv that are worth a plot."""

METHOD_TAG = "ptv2.method"
"""The tag of runs and versions that says what was trained beside the head."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a prompt was made from, as far as its artifact does not say so itself.

    Attributes:
        git_commit: The commit of the workspace; none outside a repository.
        git_dirty: Whether files differed from that commit.
        data_md5: DVC's hash of each data set by name, such as `train`.
        params_hash: Hash of the settings that the stages of this task read.
        flow_run_id: The orchestrator's run, where one started the stage.
    """

    git_commit: str | None
    git_dirty: bool | None
    data_md5: Mapping[str, str]
    params_hash: str
    flow_run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What the stages before `register` left on disk.

    Attributes:
        manifest: The prompt's own description.
        train: train/metrics.json.
        evaluate: evaluate/metrics.json.
        search: search/best.json; empty where nothing was searched.
        history: The rows of train/history.csv, numbers only.
        num_rows: Rows of each split.
        ended_at: When training ended, in seconds since 1970.
        manifest_sha256: Of prompt.json.
    """

    manifest: Manifest
    manifest_sha256: str
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    search: Mapping[str, Any]
    history: list[dict[str, float]]
    num_rows: Mapping[str, int]
    ended_at: float

    @property
    def started_at(self) -> float:
        """When training began, in seconds since 1970."""
        return self.ended_at - float(self.train.get("seconds") or 0.0)


def read_results(
    *,
    artifact_dir: Path,
    train_dir: Path,
    evaluate_dir: Path,
    search_dir: Path,
    prepared_dir: Path,
) -> Results:
    """Read the results of all stages of one task.

    Raises:
        ArtifactError: The prompt is damaged.
        PipelineError: A result is absent or is not what its stage writes.
    """
    metrics_file = train_dir / "metrics.json"
    best_file = search_dir / BEST_FILE
    train = _read_json(metrics_file, stage="train")
    evaluate = _read_json(evaluate_dir / "metrics.json", stage="evaluate")
    manifest = load_manifest(artifact_dir)
    if evaluate.get("prompt_sha256") != manifest.sha256:
        raise PipelineError(
            f"{evaluate_dir / 'metrics.json'}: expected the scores of prompt {manifest.sha256}, "
            f"got those of {evaluate.get('prompt_sha256')}; run `ptv2 evaluate --task "
            f"{manifest.task.name}` first"
        )
    return Results(
        manifest=manifest,
        manifest_sha256=sha256_file(artifact_dir / MANIFEST_FILE),
        train=train,
        evaluate=evaluate,
        search=_read_json(best_file, stage="search") if best_file.exists() else {},
        history=_read_history(train_dir / "history.csv"),
        num_rows={split: _count_lines(prepared_dir / f"{split}.jsonl") for split in SPLITS},
        ended_at=metrics_file.stat().st_mtime,
    )


def run_params(results: Results) -> dict[str, str]:
    """Return the settings of the training, flattened: `prompt.length`, `backbone.name`."""
    manifest = results.manifest
    unused = ("study", "trial") if has_prompt(manifest) else ("study", "trial", "prompt")
    settings = {key: value for key, value in manifest.training.items() if key not in unused}
    backbone = {key: manifest.backbone.get(key) for key in ("name", "revision", "model_type")}
    everything = {
        **settings,
        "backbone": backbone,
        "encoding": manifest.encoding,
        "decoding": manifest.decoding,
    }
    return {key: _text(value) for key, value in _flatten(everything) if value is not None}


def has_prompt(manifest: Manifest) -> bool:
    """Tell whether there is a prompt: a head alone and a fine-tuned model have none."""
    return "prompt" in manifest.shapes()


def epoch_metrics(results: Results) -> list[tuple[str, float, int, float]]:
    """Return `(name, value, epoch, seconds since the start)` of every number of the history."""
    points = []
    for row in results.history:
        elapsed = row.get("seconds", 0.0)
        for key, value in row.items():
            if key in CURVES and math.isfinite(value):
                name = f"dev_{results.evaluate['metric']}" if key == "dev_score" else key
                points.append((metric_name(name), value, int(row["epoch"]), elapsed))
    return points


def final_metrics(results: Results) -> dict[str, float]:
    """Return the numbers that sum the run up, with names that MLflow's plots can show."""
    evaluate, train, metric = results.evaluate, results.train, results.evaluate["metric"]
    found: dict[str, Any] = {
        f"test_{key}": value for key, value in (evaluate.get("test_metrics") or {}).items()
    }
    found |= {
        f"best_dev_{metric}": evaluate.get("dev"),
        f"test_{metric}": evaluate["test"],
        f"probe_test_{metric}": evaluate.get("probe"),
        f"probe_dev_{metric}": evaluate.get("probe_dev"),
        "best_epoch": train.get("best_epoch"),
        "train_seconds": train.get("seconds"),
        "trainable_parameters": train.get("trainable_parameters"),
        "trainable_share": train.get("trainable_share"),
        "peak_memory_bytes": train.get("peak_memory_bytes"),
        "peak_device_memory_bytes": train.get("peak_device_memory_bytes"),
        "artifact_bytes": results.manifest.size_bytes,
    }
    return {
        metric_name(name): float(value)
        for name, value in found.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(float(value))
    }


def metric_name(name: str) -> str:
    """Return `name` with every odd character as `_`; MLflow nests names at a slash."""
    return re.sub(r"[^0-9A-Za-z_]+", "_", name).strip("_")


def version_tags(results: Results, provenance: Provenance) -> dict[str, str]:
    """Return what identifies a version: from these the prompt can be made again."""
    manifest = results.manifest
    search = results.search
    tags: dict[str, Any] = {
        SHA256_TAG: manifest.sha256,
        MANIFEST_TAG: results.manifest_sha256,
        "task": manifest.task.name,
        "task_kind": manifest.task.kind,
        METHOD_TAG: manifest.method,
        "backbone_name": manifest.backbone.get("name"),
        "backbone_revision": manifest.backbone.get("revision"),
        "backbone_digest": manifest.backbone.get("digest"),
        "tokenizer_digest": manifest.tokenizer_digest,
        "git_commit": provenance.git_commit,
        "git_dirty": provenance.git_dirty,
        "params_hash": provenance.params_hash,
        "study": search.get("study", manifest.training.get("study")),
        "trial": search.get("trial", manifest.training.get("trial")),
        "flow_run_id": provenance.flow_run_id,
    }
    tags |= {f"data_md5.{name}": value for name, value in provenance.data_md5.items()}
    data = manifest.provenance.get("data") or {}
    tags |= {f"data_digest.{split}": digest for split, digest in data.items()}
    known = {key: _text(value) for key, value in tags.items() if value is not None}
    # Scores first: lists show the first tags, in this order.
    return score_tags(results) | known


def score_tags(results: Results) -> dict[str, str]:
    """Return the tags that a new evaluation of the same prompt changes."""
    evaluate = results.evaluate
    tags = {
        "metric": evaluate["metric"],
        "test_score": evaluate["test"],
        "dev_score": evaluate.get("dev"),
        "probe_score": evaluate.get("probe"),
        "test_digest": evaluate["test_digest"],
        FORMAT_TAG: evaluate.get("number_format"),
        "answering_digest": evaluate.get("answering_digest"),
    }
    return {key: _text(value) for key, value in tags.items() if value is not None}


def _text(value: Any) -> str:
    """Return text for MLflow: booleans in lower case, floats in full, mappings as JSON."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        # labels can have characters that no parameter's name may have
        is_section = isinstance(value, Mapping) and key != "label_words"
        pairs += _flatten(value, f"{name}.") if is_section else [(name, value)]
    return pairs


def _read_json(path: Path, *, stage: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(
            f"expected {path}, which the stage {stage!r} writes; run that stage first."
        ) from None
    except ValueError as error:
        raise PipelineError(
            f"{path} is not JSON ({error}); run the stage {stage!r} again."
        ) from error
    if not isinstance(value, dict):
        raise PipelineError(f"{path} holds no JSON object; run the stage {stage!r} again.")
    return value


def _read_history(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        raise PipelineError(
            f"expected {path}, which the stage 'train' writes; run that stage first."
        )
    with path.open(encoding="utf-8", newline="") as stream:
        return [
            {key: float(value) for key, value in row.items() if key and value}
            for row in csv.DictReader(stream)
        ]


def _count_lines(path: Path) -> int:
    if not path.exists():
        raise PipelineError(
            f"expected {path}, which the stage 'prepare' writes; run that stage first."
        )
    with path.open("rb") as stream:
        return sum(1 for _ in stream)
