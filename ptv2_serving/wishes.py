"""Read from the registry which versions it wishes to answer each task."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ptv2_core.errors import ArtifactError
from ptv2_serving.references import is_task_name
from ptv2_serving.resolving import find_model, resolved
from ptv2_serving.routing import ResolvedVersion, Routing, is_share
from ptv2_serving.tracking import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION, CANARY, SHADOW = "champion", "canary", "shadow"
SHARE_TAG = "ptv2.canary_share"
PAGE = 1000
MAX_SINGLE = 8
"""Tasks that are asked for one by one; for more of them, pages of all are read."""


class Wishes:
    """What a registry wishes, read again and again; versions that are known are not asked for."""

    def __init__(self, uri: str) -> None:
        """Name the registry, at a resolved address."""
        self._uri = uri
        # the files of a version never change
        self._known: dict[tuple[str, int, int], ResolvedVersion] = {}

    def read(
        self, client: "MlflowClient", names: Sequence[str] | None
    ) -> tuple[dict[str, Routing], dict[str, str]]:
        """Return the routing of each task, and why one or a part of it was left out.

        Args:
            client: Of the registry.
            names: Of tasks; None: all.
        """
        problems: dict[str, str] = {}
        found: dict[str, Routing] = {}
        for model in self._models(client, names, problems):
            routing = self._routing(client, model, problems)
            if routing is not None:
                found[routing.task] = routing
        return found, problems

    def forget(self, task: str) -> None:
        """Ask for a task's versions again, since one of them may be signed by now."""
        self._known = {key: known for key, known in self._known.items() if key[0] != task}

    def _models(
        self, client: "MlflowClient", names: Sequence[str] | None, problems: dict[str, str]
    ) -> Iterator["RegisteredModel"]:
        if names is not None and len(names) <= MAX_SINGLE:
            for name in names:
                try:
                    yield find_model(client, name, self._uri)
                except StoreError as error:
                    problems[name] = str(error)
            return
        wanted = None if names is None else set(names)
        token = None
        while True:
            page = client.search_registered_models(max_results=PAGE, page_token=token)
            for model in page:
                if wanted is None or model.name in wanted:
                    if wanted is not None:
                        wanted.discard(model.name)
                    yield model
            token = page.token
            if not token:
                break
        problems.update(dict.fromkeys(wanted or (), "no prompt for this task in the registry"))

    def _routing(
        self, client: "MlflowClient", model: "RegisteredModel", problems: dict[str, str]
    ) -> Routing | None:
        """Return a model's routing; None where it has no champion that can be used."""
        task, aliases = model.name, aliases_of(model)
        if not is_task_name(task):
            # not one of ours: `ptv2 register` gives no such names
            return None
        if CHAMPION not in aliases:
            problems[task] = f"{task}: no version has the alias {CHAMPION!r}; promote one"
            return None
        share = _share(model.tags.get(SHARE_TAG, ""))
        if CANARY in aliases and share is None:
            problems[task] = f"{task}: the tag {SHARE_TAG!r} is no percentage; no canary answers"
        versions: dict[int, ResolvedVersion] = {}
        for alias in (CHAMPION, CANARY, SHADOW):
            number = aliases.get(alias)
            if number is None or (alias == CANARY and not share):
                continue
            try:
                versions[number] = self._version(client, model, number)
            except (ArtifactError, StoreError) as error:
                problems[task] = f"{alias}: {error}"
                if alias == CHAMPION:
                    return None
        champion = aliases[CHAMPION]
        canary = aliases.get(CANARY) if share else None
        canary = canary if canary in versions and canary != champion else None
        shadow = aliases.get(SHADOW)
        return Routing(
            task=task,
            champion=champion,
            canary=canary,
            canary_share=(share or 0.0) if canary else 0.0,
            shadow=shadow if shadow in versions and shadow != champion else None,
            versions=versions,
        )

    def _version(
        self, client: "MlflowClient", model: "RegisteredModel", number: int
    ) -> ResolvedVersion:
        from mlflow.exceptions import MlflowException

        # a model that was deleted and made again counts from 1 again
        key = (model.name, number, int(model.creation_timestamp or 0))
        if key not in self._known:
            try:
                found = client.get_model_version(model.name, str(number))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise StoreError(f"{model.name}:{number} is not there any more") from error
            self._known[key] = resolved(client, found)
        return self._known[key]


def is_broken(problem: str) -> bool:
    """Tell whether a task was left out since its champion cannot be used, not for having none."""
    return problem.startswith(f"{CHAMPION}: ")


def aliases_of(model: "RegisteredModel") -> dict[str, int]:
    """Return the versions that aliases stand for."""
    return {alias: int(version) for alias, version in model.aliases.items()}


def _share(text: str) -> float | None:
    try:
        share = float(text)
    except ValueError:
        return None
    return share if math.isfinite(share) and is_share(share) else None
