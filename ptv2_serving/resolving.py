"""Find a version in the registry; where there is none, say what there is."""

from typing import TYPE_CHECKING

from ptv2_serving.references import Reference
from ptv2_serving.routing import ResolvedVersion
from ptv2_serving.tracking import StoreError, shown

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

MAX_LISTED = 20


def resolve(
    client: "MlflowClient", wanted: Reference, uri: str
) -> tuple[ResolvedVersion, str | None]:
    """Find a version and the run that registered it, where the registry says so.

    Raises:
        StoreError: There is no such version; it lists what there is.
        ArtifactError: It was not made by `ptv2 register`.
    """
    model = find_model(client, wanted.task, uri)
    aliases = {alias: int(number) for alias, number in model.aliases.items()}
    number = aliases.get(wanted.alias) if wanted.alias else wanted.version
    if number is None:
        known = [f"@{alias} (version {at})" for alias, at in sorted(aliases.items())]
        raise StoreError(
            f"{wanted}: the task {wanted.task!r} has no alias {wanted.alias!r}; there is: "
            f"{listed(known)}."
        )
    found = _find_version(client, wanted, number)
    return resolved(client, found), found.run_id or None


def resolved(client: "MlflowClient", found: "ModelVersion") -> ResolvedVersion:
    """Return what is needed of a version.

    Raises:
        ArtifactError: It was not made by `ptv2 register`.
    """
    source = str(found.source)
    # only these point to something else; asking costs as much as finding the version
    if source.startswith(("models:", "runs:")):
        source = client.get_model_version_download_uri(found.name, found.version)
    return ResolvedVersion.of_tags(found.name, int(found.version), tags=found.tags, source=source)


def find_model(client: "MlflowClient", task: str, uri: str) -> "RegisteredModel":
    """Find a task in the registry.

    Raises:
        StoreError: There is no such task; it lists those there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(task)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(model.name for model in client.search_registered_models())
        raise StoreError(
            f"no prompt for the task {task!r} in the registry {shown(uri)}; there is: "
            f"{listed(names)}."
        ) from error


def _find_version(client: "MlflowClient", wanted: Reference, number: int) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(wanted.task, str(number))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = client.search_model_versions(f"name = '{wanted.task}'")
        versions = sorted(int(version.version) for version in found)
        raise StoreError(
            f"{wanted}: the task {wanted.task!r} has no version {number}; there is: "
            f"{listed([str(version) for version in versions])}."
        ) from error


def listed(names: list[str]) -> str:
    """Return the first of some names in words."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return (", ".join(names[:MAX_LISTED]) + more) or "none"
