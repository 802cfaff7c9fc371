"""register: one model version per prompt, with everything that leads back to it."""

import hashlib
import json
from typing import Any

from pipelines import dag, registry
from pipelines.paths import TaskPaths
from pipelines.prepared import TASK_FILE, read_examples
from pipelines.settings import TaskSettings, read_environment
from ptv2_core.config import Method
from ptv2_core.errors import ConfigError
from ptv2_core.evaluation.inputs import INPUT_KEYS
from ptv2_core.files import write_json_atomic
from ptv2_core.manifest import MANIFEST_FILE, load_manifest

EXAMPLES = 3


def run(settings: TaskSettings, paths: TaskPaths) -> registry.Registered:
    """Register `prompts/TASK`, idempotently, and write `results/TASK/registered.json`.

    Raises:
        RegistryError: The registry does not answer or refuses.
        PipelineError: A result of an earlier stage is absent.
        ArtifactError: The prompt is damaged.
        ConfigError: It is of a method that is not registered.
    """
    for file, stage in (
        (paths.prepared / TASK_FILE, "prepare"),
        (paths.prompt / MANIFEST_FILE, "train"),
        (paths.train / "metrics.json", "train"),
        (paths.evaluate / "metrics.json", "evaluate"),
    ):
        paths.require(file, stage)
    _check_method(load_manifest(paths.prompt).method)
    environment = read_environment()
    commit = dag.git_commit(paths.root)
    registered = registry.register(
        root=paths.root,
        task=settings.name,
        artifact_dir=paths.prompt,
        train_dir=paths.train,
        evaluate_dir=paths.evaluate,
        search_dir=paths.search,
        prepared_dir=paths.prepared,
        tracking_uri=environment.mlflow_tracking_uri or settings.register.tracking_uri,
        experiment=settings.register.experiment,
        gate_margin=settings.register.gate_margin,
        provenance=registry.Provenance(
            git_commit=commit["commit"],
            git_dirty=commit["dirty"],
            data_md5=_data_md5(paths),
            params_hash=params_hash(settings),
            flow_run_id=environment.flow_run_id,
        ),
        input_example=_examples(paths),
    )
    write_json_atomic(paths.registered, registered.to_mapping())
    return registered


def _check_method(method: Method) -> None:
    """Refuse a prompt that no batch of mixed tasks can hold."""
    if method == "prompt_tuning":
        raise ConfigError(
            "train.method: prompt_tuning is there to compare with and is not registered: its "
            "prompt takes part in every layer as tokens do, so rows of other tasks cannot share "
            "its batch; expected ptv2, probe or finetune"
        )


def params_hash(settings: TaskSettings) -> str:
    """Return `sha256:...` of every setting that the task's stages read."""
    text = json.dumps(settings.to_mapping(), sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _data_md5(paths: TaskPaths) -> dict[str, str]:
    """Return DVC's hashes of the `raw` and the `prepared` data, as far as DVC made them."""
    hashes = dag.data_hashes(paths.root, f"prepare@{paths.task}")
    folders = {"raw": paths.raw, "prepared": paths.prepared}
    named = {name: str(folder.relative_to(paths.root)) for name, folder in folders.items()}
    return {name: hashes[path] for name, path in named.items() if path in hashes}


def _examples(paths: TaskPaths) -> list[dict[str, Any]]:
    """Return a few dev inputs as the predictor takes them."""
    rows = read_examples(paths.prepared, "dev")[:EXAMPLES]
    return [{key: value for key, value in row.items() if key in INPUT_KEYS} for row in rows]
