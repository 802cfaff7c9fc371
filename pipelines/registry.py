"""MLflow: one run per training, one model version per prompt, and their aliases.

Nothing here or in `mlflow_runs` uses MLflow's global state (active run, tracking URI): a client is
told where to look.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import RegistryError, RegistryUnreachableError
from pipelines.gate import CHALLENGER, CHAMPION, Gate, decide
from pipelines.mlflow_runs import (
    final_points,
    log_metrics,
    log_run,
    relative_to_root,
    reuse_run,
    run_files,
)
from pipelines.model_card import (
    Provenance,
    Results,
    read_results,
    score_tags,
    version_tags,
)
from pipelines.model_text import (
    GENERATED,
    model_description,
    run_description,
    version_description,
)
from pipelines.settings import set_environment_defaults
from ptv2_core.manifest import Manifest
from ptv2_serving import audit
from ptv2_serving.tracking import (
    SHA256_TAG,
    StoreError,
    StoreUnreachableError,
    check_answers,
    quiet_mlflow,
    resolve_uri,
    shown,
    sqlite_path,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["Gate", "Provenance", "Registered", "register"]

MLFLOW_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}

EXPERIMENT_TAGS = {
    "mlflow.note.content": "Trainings of prompts: one run each. The prompts are under Models.",
    # Without it MLflow's pages take an experiment for one of agents and traces.
    "mlflow.experimentKind": "custom_model_development",
}


@dataclass(frozen=True, kw_only=True)
class Registered:
    """Where a prompt is in the registry.

    Attributes:
        model: Registered model, named as the task.
        version: Its version.
        run_id: The run that logged it.
        aliases: All aliases of the version.
        tracking_uri: The registry, as it was asked for, without a password.
        sha256: Of prompt.safetensors.
        gate: Whether it became the champion.
        created: Whether this call made the version; false where it was there.
    """

    model: str
    version: int
    run_id: str
    aliases: tuple[str, ...]
    tracking_uri: str
    sha256: str
    gate: Gate
    created: bool

    def to_mapping(self) -> dict[str, Any]:
        """Return what registered.json holds: the same for every call with the same outcome."""
        values = asdict(self)
        del values["created"]
        return values | {"aliases": list(self.aliases)}


def register(
    *,
    root: Path,
    task: str,
    artifact_dir: Path,
    train_dir: Path,
    evaluate_dir: Path,
    search_dir: Path,
    prepared_dir: Path,
    tracking_uri: str,
    experiment: str,
    gate_margin: float,
    provenance: Provenance,
    input_example: Sequence[Mapping[str, Any]],
) -> Registered:
    """Put a trained prompt into the registry, once, and let it meet the champion.

    A prompt whose sha256 the registry has is not logged again; only its aliases are decided anew,
    and its scores replaced where it was evaluated again. A call that was cut off is completed by
    the next.

    Args:
        root: The workspace; relative SQLite files and local artifacts lie under it.
        task: Becomes the registered model's name.
        artifact_dir: The prompt.
        train_dir: Results of `train`.
        evaluate_dir: Results of `evaluate`; all of its files become artifacts of the run.
        search_dir: Results of `search`; may be empty.
        prepared_dir: Prepared data, for the rows of each split; nothing of it is copied.
        tracking_uri: The registry.
        experiment: Where the run goes; created when it is not there.
        gate_margin: A challenger must beat the champion's test score by more than this.
        provenance: What the artifact does not know about its own making.
        input_example: A few inputs as `Predictor.predict` takes them, shown with the version.

    Raises:
        RegistryError: The registry is away, unusable, or refuses.
        PipelineError: A result of an earlier stage is absent.
        ArtifactError: The prompt is damaged.
    """
    results = read_results(
        artifact_dir=artifact_dir,
        train_dir=train_dir,
        evaluate_dir=evaluate_dir,
        search_dir=search_dir,
        prepared_dir=prepared_dir,
    )
    if results.manifest.task.name != task:
        raise RegistryError(
            f"expected a prompt for the task {task!r} in {artifact_dir}, got one for "
            f"{results.manifest.task.name!r}; run the stage 'train' again."
        )
    uri = _answering_uri(tracking_uri, root)
    tags = version_tags(results, provenance)
    with _as_registry_errors(uri), quiet_mlflow():
        client = _client(uri)
        version = _find_version(client, task, results.manifest.sha256)
        is_new = version is None
        if version is None:
            experiment_id = _experiment(client, experiment, uri, root)
            found = reuse_run(client, experiment_id, tags)
            run_id, model_id = found or log_run(
                client,
                experiment_id,
                results,
                tags,
                artifact_dir=artifact_dir,
                files=run_files(train_dir, evaluate_dir, search_dir),
                source=relative_to_root(prepared_dir, root),
                input_example=input_example,
            )
            version = _create_version(client, run_id, model_id, results, tags)
        else:
            _refresh_scores(client, version, results, run_files(evaluate_dir=evaluate_dir))
        if not version.description:
            text = version_description(results, int(version.version))
            client.update_model_version(task, version.version, description=text)
        gate = _set_aliases(client, version, results, gate_margin)
        aliases = _aliases(client, task)
    number = int(version.version)
    return Registered(
        model=task,
        version=number,
        run_id=str(version.run_id),
        aliases=tuple(sorted(alias for alias, at in aliases.items() if at == number)),
        tracking_uri=shown(tracking_uri),
        sha256=results.manifest.sha256,
        gate=gate,
        created=is_new,
    )


# Aliases


def log_comparison(
    folder: Path,
    metrics: Mapping[str, float],
    params: Mapping[str, str],
    *,
    root: Path,
    tracking_uri: str,
    experiment: str,
) -> str:
    """Log a comparison as a run of its own, and return the run's id.

    Args:
        folder: Its report, whose files become artifacts.
        metrics: Scores by name.
        params: What was compared, and how.
        root: The workspace.
        tracking_uri: The registry.
        experiment: The experiment's name.

    Raises:
        RegistryError: The registry does not answer or refuses.
    """
    with connected(tracking_uri, experiment, root=root, again="ptv2 compare") as place:
        client, experiment_id = place
        run = client.create_run(
            experiment_id,
            run_name="compare",
            tags={"ptv2.stage": "compare"},
        )
        run_id = str(run.info.run_id)
        for key, value in params.items():
            client.log_param(run_id, key, value)
        for key, score in metrics.items():
            client.log_metric(run_id, key, score)
        client.log_artifacts(run_id, str(folder), "compare")
        client.set_terminated(run_id, "FINISHED")
    return run_id


def _set_aliases(
    client: "MlflowClient", version: "ModelVersion", results: Results, margin: float
) -> Gate:
    """Make `version` the challenger, and the champion if it passes the gate."""
    name, number = version.name, int(version.version)
    before = _aliases(client, name)
    if number > before.get(CHALLENGER, 0):
        client.set_registered_model_alias(name, CHALLENGER, str(number))
    champion = before.get(CHAMPION)
    champion_tags = (
        client.get_model_version(name, str(champion)).tags if champion is not None else {}
    )
    gate = decide(
        task=name,
        version=number,
        scores=score_tags(results),
        champion=champion,
        champion_scores=champion_tags,
        margin=margin,
    )
    if gate.promoted and audit.was_rolled_back(_history(client, name), number):
        reason = (
            f"version {number} was rolled back; `ptv2 promote {name}:{number}` makes it the "
            "champion again"
        )
        gate = replace(gate, promoted=False, reason=reason)
    if gate.promoted:
        who = audit.current_user()
        audit.write(
            client, name, "register", before=champion, after=number, who=who, reason=gate.reason
        )
        client.set_registered_model_alias(name, CHAMPION, str(number))
    return gate


def _aliases(client: "MlflowClient", name: str) -> dict[str, int]:
    found = client.get_registered_model(name).aliases
    return {alias: int(version) for alias, version in found.items()}


def _history(client: "MlflowClient", name: str) -> list[audit.AuditLine]:
    return audit.read(client.get_registered_model(name).tags)


# Versions


def _create_version(
    client: "MlflowClient", run_id: str, model_id: str, results: Results, tags: Mapping[str, str]
) -> "ModelVersion":
    """Register a run's model as the next version of the task's registered model."""
    name = results.manifest.task.name
    _describe_model(client, results.manifest)
    version = client.create_model_version(
        name,
        source=client.get_logged_model(model_id).artifact_location,
        run_id=run_id,
        tags=dict(tags),
        model_id=model_id,
    )
    # MLflow's pages link a logged model to its versions by this tag.
    link = json.dumps([{"name": name, "version": int(version.version)}])
    client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
    return version


def _describe_model(client: "MlflowClient", manifest: Manifest) -> None:
    """Create the registered model, or renew its description where a person has not changed it."""
    name, text = manifest.task.name, model_description(manifest)
    exception = _mlflow_exception()
    try:
        client.create_registered_model(
            name, tags={"task_kind": manifest.task.kind}, description=text
        )
    except exception as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        current = client.get_registered_model(name).description or ""
        if current != text and (not current or GENERATED in current):
            client.update_registered_model(name, text)


def _find_version(client: "MlflowClient", name: str, sha256: str) -> "ModelVersion | None":
    found = client.search_model_versions(f"name = '{name}' and tags.{SHA256_TAG} = '{sha256}'")
    return max(found, key=lambda version: int(version.version), default=None)


def _refresh_scores(
    client: "MlflowClient",
    version: "ModelVersion",
    results: Results,
    files: Sequence[tuple[Path, str]],
) -> None:
    """Replace the scores of a version whose prompt was evaluated again."""
    tags = score_tags(results)
    if tags.items() <= version.tags.items():
        return
    run_id = str(version.run_id)
    log_metrics(client, run_id, final_points(results, run_id=run_id, model_id=None))
    for path, folder in files:
        client.log_artifact(run_id, str(path), folder)
    client.set_tag(run_id, "mlflow.note.content", run_description(results))
    text = version_description(results, int(version.version))
    client.update_model_version(version.name, version.version, description=text)
    # The version's tags come last: while one of them is old, the next call does all of this again.
    for key, value in tags.items():
        client.set_tag(run_id, key, value)
        client.set_model_version_tag(version.name, version.version, key, value)


# The connection


@contextmanager
def connected(
    tracking_uri: str, experiment: str, *, root: Path, again: str
) -> Iterator[tuple["MlflowClient", str]]:
    """Yield a client of the registry and the id of an experiment, created when it is not there.

    Args:
        tracking_uri: The registry.
        experiment: The experiment's name.
        root: The workspace.
        again: The command to run again once a failure is mended.

    Raises:
        RegistryError: The registry is away, unusable, or refuses, now or within the block.
    """
    uri = _answering_uri(tracking_uri, root)
    with _as_registry_errors(uri, f"run `{again}` again"), quiet_mlflow():
        client = _client(uri)
        yield client, _experiment(client, experiment, uri, root)


def _answering_uri(tracking_uri: str, root: Path) -> str:
    try:
        uri = resolve_uri(tracking_uri, root=root)
        check_answers(uri)
    except StoreUnreachableError as error:
        raise RegistryUnreachableError(str(error)) from error
    except StoreError as error:
        raise RegistryError(str(error)) from error
    return uri


def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    path = sqlite_path(uri) if uri.startswith("sqlite") else None
    if path is not None and not path.exists():
        _create_database(path)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _create_database(path: Path) -> None:
    """Create MLflow's tables in a new file, and put it in place whole.

    Tasks register side by side, and MLflow does not keep two processes from creating the same
    tables; nor can it go on with half of them. The lock is on the folder and leaves no file.
    """
    from mlflow import MlflowClient

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.exists():
            return
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            new = Path(scratch) / path.name
            MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
            new.rename(path)
    finally:
        os.close(folder)


def _experiment(client: "MlflowClient", name: str, uri: str, root: Path) -> str:
    """Return the experiment's id; a new one keeps local artifacts in the workspace."""
    exception = _mlflow_exception()
    found = client.get_experiment_by_name(name)
    if found is None:
        is_server = uri.startswith("http")
        location = None if is_server else (root.absolute() / "mlartifacts").as_uri()
        try:
            return str(
                client.create_experiment(name, artifact_location=location, tags=EXPERIMENT_TAGS)
            )
        except exception as error:
            # Another task's register can have been faster.
            found = client.get_experiment_by_name(name)
            if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
    if found.lifecycle_stage != "active":
        raise RegistryError(
            f"the experiment {name!r} of the registry {shown(uri)} is deleted; restore it "
            f"(`mlflow experiments restore -x {found.experiment_id}`), or choose another name in "
            "register.experiment of params.yaml."
        )
    return str(found.experiment_id)


def _mlflow_exception() -> type[Any]:
    from mlflow.exceptions import MlflowException

    return MlflowException


@contextmanager
def _as_registry_errors(uri: str, again: str = "run the stage 'register' again") -> Iterator[None]:
    """Turn what MLflow and its transports raise into one message for the user."""
    set_environment_defaults(MLFLOW_DEFAULTS)
    from sqlalchemy.exc import SQLAlchemyError

    # Not looked up in the `except` alone: MLflow must be imported before `quiet_mlflow` is entered,
    # since its import sets the levels of its loggers.
    expected = (_mlflow_exception(), SQLAlchemyError, OSError)
    try:
        yield
    except expected as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RegistryError(
            f"the registry {shown(uri)} refused or failed: {lines[0]} Nothing is registered twice: "
            f"{again} once the cause is mended."
        ) from error
