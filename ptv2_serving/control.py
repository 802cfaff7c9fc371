"""Which version of a task answers: read from the registry's aliases, and changed there.

The champion is the alias `champion`. A canary is the alias `canary` with its share in percent in
the tag `ptv2.canary_share` of the registered model; a version that is only listened to is the alias
`shadow`. Every change writes an audit line first (`ptv2_serving.audit`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_serving import audit
from ptv2_serving.audit import AuditLine, current_user
from ptv2_serving.folder_lock import held
from ptv2_serving.references import Reference, check_task, parse_reference
from ptv2_serving.resolving import find_model, resolve
from ptv2_serving.routing import ResolvedVersion, Routing, is_share
from ptv2_serving.tracking import (
    SIGNATURE_TAG,
    ConflictError,
    StoreError,
    as_store_errors,
    check_answers,
    connect,
    quiet_mlflow,
    resolve_uri,
    sqlite_path,
)
from ptv2_serving.wishes import CANARY, CHAMPION, SHADOW, SHARE_TAG, Wishes, aliases_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

__all__ = ["AuditLine", "Change", "Registry", "ResolvedVersion", "Routing", "current_user"]

LOCK_WAIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Change:
    """What was changed.

    Attributes:
        task: Whose alias.
        action: As in `AuditLine`.
        before: The version that was there, or None.
        after: The version that is there now, or None.
        ended: The canary that ended with it, or None.
    """

    task: str
    action: str
    before: int | None
    after: int | None
    ended: int | None = None


class Registry:
    """The registry as the control plane sees it.

    Changes compare and swap: the alias is read, compared with what was expected, set, and read
    again. MLflow itself has no such operation: between two writers on different machines the one
    that writes last wins, and only the other notices, when it reads again. Where the registry is a
    SQLite file, a lock keeps the writers of this machine apart, so there it is exact.

    Attributes:
        problems: Why a task, a canary or a shadow was left out of the last `routings`, by task.
    """

    def __init__(self, tracking_uri: str, root: Path = Path(), *, who: str | None = None) -> None:
        """Name a registry; nothing is asked yet.

        Args:
            tracking_uri: The registry.
            root: Relative SQLite files lie under it.
            who: Written into audit lines; default: the user and host of this process.

        Raises:
            StoreError: The address is none of a registry.
        """
        self._uri = resolve_uri(tracking_uri, root=root)
        self._who = who
        self._client: MlflowClient | None = None
        self._wishes = Wishes(self._uri)
        self.problems: dict[str, str] = {}

    # Reading

    def routings(self, tasks: Sequence[str] | None = None) -> dict[str, Routing]:
        """Return what the registry wishes to answer each task.

        One call for a task, or one for a thousand; and one more for each version that is new.

        Args:
            tasks: Which; None: every task with a champion.

        Returns:
            By task. One without a champion, or whose champion cannot be used, is left out, and so
            is a canary or shadow that cannot be used; `problems` says why.

        Raises:
            ConfigError: A task's name is none.
            StoreUnreachableError: The registry does not answer.
            StoreError: It refuses.
        """
        names = None if tasks is None else [check_task(task) for task in tasks]
        with self._asked("the wished versions could not be read") as client:
            found, self.problems = self._wishes.read(client, names)
        return found

    def resolve(self, reference: str | Reference) -> ResolvedVersion:
        """Return a version; always asks the registry.

        Raises:
            ConfigError: The reference cannot be read.
            StoreError: There is no such version, or the registry is away.
            ArtifactError: It was not made by `ptv2 register`.
        """
        wanted = parse_reference(reference) if isinstance(reference, str) else reference
        with self._asked(f"{wanted} could not be found") as client:
            return resolve(client, wanted, self._uri)[0]

    def forget(self, task: str) -> None:
        """Ask for a task's versions again, since one of them may be signed by now."""
        self._wishes.forget(task)

    def history(self, task: str) -> list[AuditLine]:
        """Return the audit lines of a task, oldest first.

        Raises:
            StoreError: There is no such task, or the registry is away.
        """
        with self._asked("the history could not be read") as client:
            return audit.read(find_model(client, check_task(task), self._uri).tags)

    # Changing

    def promote(self, reference: str, expect: int | None = None, *, reason: str = "") -> Change:
        """Make a version the champion; a canary that is promoted has ended.

        Args:
            reference: `TASK:VERSION` or `TASK@ALIAS`.
            expect: The present champion; None: whichever it is.
            reason: For the audit line.

        Raises:
            ConfigError: The reference cannot be read, or names the champion itself.
            ConflictError: The champion is, or became, another one.
            StoreError: There is no such version, or the registry is away.
            ArtifactError: It was not made by `ptv2 register`.
        """
        wanted = parse_reference(reference)
        if wanted.alias == CHAMPION:
            raise ConfigError(
                f"expected what is to become the champion, such as {wanted.task}:3 or "
                f"{wanted.task}@canary, got {reference!r}"
            )
        with self._changing(wanted.task) as (client, model):
            chosen = resolve(client, wanted, self._uri)[0].version
            return self._crown(client, model, "promote", chosen, expect=expect, reason=reason)

    def rollback(
        self, task: str, to: int | None = None, expect: int | None = None, *, reason: str = ""
    ) -> Change:
        """Make the version champion that was it before.

        Args:
            task: Which.
            to: Another version than the one before.
            expect: The present champion; None: whichever it is.
            reason: For the audit line.

        Raises:
            ConflictError: The champion is, or became, another one.
            StoreError: There is no such version, or none before; or the registry is away.
        """
        with self._changing(check_task(task)) as (client, model):
            current = aliases_of(model).get(CHAMPION)
            before = audit.champions(audit.read(model.tags), current)[:-1]
            if to is not None:
                before = [to]
            while before:
                wanted = Reference(task=task, version=before.pop())
                try:
                    chosen = resolve(client, wanted, self._uri)[0].version
                except (StoreError, ArtifactError):
                    # deleted since; what was champion before that one still answers
                    if not before:
                        raise
                    continue
                return self._crown(client, model, "rollback", chosen, expect=expect, reason=reason)
        raise StoreError(
            f"{task}: no champion before version {current} is known from its history; name the "
            f"version to go to, with `ptv2 rollback {task} --to VERSION`."
        )

    def set_canary(self, task: str, version: int, share: float, *, reason: str = "") -> Change:
        """Let a version answer a share of the requests.

        Args:
            task: Which.
            version: Which.
            share: In percent, above 0, at most 100.
            reason: For the audit line.

        Raises:
            ConfigError: The share is none, or the version is the champion.
            StoreError: There is no such version, or the registry is away.
        """
        if not is_share(share) or share == 0:
            raise ConfigError(f"--share: expected a percentage above 0, at most 100, got {share!r}")
        with self._changing(check_task(task)) as (client, model):
            self._challenge(client, model, CANARY, version)
            before = aliases_of(model).get(CANARY)
            words = f"{share:g} %{f': {reason}' if reason else ''}"
            with self._audited(client, task, "canary", before, version, words):
                # never a new canary with the share of an old one
                if before not in (None, version):
                    client.delete_registered_model_alias(task, CANARY)
                client.set_registered_model_tag(task, SHARE_TAG, f"{share:g}")
                client.set_registered_model_alias(task, CANARY, str(version))
            self._check_alias(client, task, CANARY, version)
        return Change(task=task, action="canary", before=before, after=version)

    def stop_canary(
        self, task: str, reason: str = "", *, expect: int | None = None
    ) -> Change | None:
        """Let the champion answer alone again; the promise of an automatic rollback.

        Args:
            task: Which.
            reason: For the audit line.
            expect: The version that is to stop; another one that took its place goes on.

        Returns:
            The change, or None where there was no such canary.

        Raises:
            StoreError: There is no such task, or the registry is away.
        """
        with self._changing(check_task(task)) as (client, model):
            before = aliases_of(model).get(CANARY)
            if before is None or (expect is not None and before != expect):
                return None
            with self._audited(client, task, "stop-canary", before, None, reason):
                self._end_canary(client, model)
        return Change(task=task, action="stop-canary", before=before, after=None)

    def set_shadow(self, task: str, version: int | None, *, reason: str = "") -> Change | None:
        """Ask a version beside the champion without hearing it; None ends that.

        Returns:
            The change, or None where there was no shadow to end.

        Raises:
            ConfigError: The version is the champion.
            StoreError: There is no such version, or the registry is away.
        """
        action = "stop-shadow" if version is None else "shadow"
        with self._changing(check_task(task)) as (client, model):
            before = aliases_of(model).get(SHADOW)
            if version is None and before is None:
                return None
            if version is not None:
                self._challenge(client, model, SHADOW, version)
            with self._audited(client, task, action, before, version, reason):
                if version is None:
                    client.delete_registered_model_alias(task, SHADOW)
                else:
                    client.set_registered_model_alias(task, SHADOW, str(version))
            self._check_alias(client, task, SHADOW, version)
        return Change(task=task, action=action, before=before, after=version)

    def add_signature(self, version: ResolvedVersion, signature: str) -> None:
        """Store the signature of a version.

        Raises:
            StoreError: The registry is away, or refuses.
        """
        with self._changing(version.task) as (client, _):
            number = version.version
            with self._audited(client, version.task, "sign", number, number, ""):
                client.set_model_version_tag(version.task, str(number), SIGNATURE_TAG, signature)
        self.forget(version.task)

    # Parts of changing

    def _crown(
        self,
        client: "MlflowClient",
        model: "RegisteredModel",
        action: str,
        chosen: int,
        *,
        expect: int | None,
        reason: str,
    ) -> Change:
        """Move the alias of the champion."""
        task, aliases = model.name, aliases_of(model)
        before = aliases.get(CHAMPION)
        if expect is not None and before != expect:
            raise ConflictError(
                f"{task}: expected version {expect} to be the champion, got "
                f"{before if before is not None else 'none'}; somebody moved it. Look at `ptv2 "
                f"history {task}`, then decide anew."
            )
        ended = aliases.get(CANARY) if aliases.get(CANARY) == chosen else None
        change = Change(task=task, action=action, before=before, after=chosen, ended=ended)
        if before == chosen and ended is None:
            return change
        with self._audited(client, task, action, before, chosen, reason):
            client.set_registered_model_alias(task, CHAMPION, str(chosen))
            if ended is not None:
                self._end_canary(client, model)
        self._check_alias(client, task, CHAMPION, chosen)
        return change

    def _challenge(
        self, client: "MlflowClient", model: "RegisteredModel", role: str, version: int
    ) -> None:
        """Check that a version is there, and can stand beside the champion."""
        resolve(client, Reference(task=model.name, version=version), self._uri)
        champion = aliases_of(model).get(CHAMPION)
        if champion is None or champion == version:
            got = "none" if champion is None else f"version {version}"
            raise ConfigError(
                f"{model.name}: expected another champion than the {role}, got {got}; the {role} "
                "is compared with it"
            )

    def _end_canary(self, client: "MlflowClient", model: "RegisteredModel") -> None:
        client.delete_registered_model_alias(model.name, CANARY)
        if SHARE_TAG in model.tags:
            client.delete_registered_model_tag(model.name, SHARE_TAG)

    def _check_alias(
        self, client: "MlflowClient", task: str, alias: str, wanted: int | None
    ) -> None:
        got = aliases_of(find_model(client, task, self._uri)).get(alias)
        if got != wanted:
            raise ConflictError(
                f"{task}: the {alias} was set to {wanted or 'none'}, and is {got or 'none'} now: "
                f"somebody else changed it at the same time. Look at `ptv2 history {task}`, then "
                "decide anew."
            )

    @contextmanager
    def _audited(
        self,
        client: "MlflowClient",
        task: str,
        action: str,
        before: int | None,
        after: int | None,
        reason: str,
    ) -> Iterator[None]:
        """Write the line of a change; take it back where the change is refused."""
        from mlflow.exceptions import MlflowException

        who = self._who or current_user()
        key = audit.write(client, task, action, before=before, after=after, who=who, reason=reason)
        try:
            yield
        except MlflowException:
            client.delete_registered_model_tag(task, key)
            raise

    @contextmanager
    def _changing(self, task: str) -> Iterator[tuple["MlflowClient", "RegisteredModel"]]:
        path = sqlite_path(self._uri) if self._uri.startswith("sqlite") else None
        folder = path.parent if path is not None else None
        with (
            self._asked(f"{task} could not be changed") as client,
            held(folder, wait_s=LOCK_WAIT_S),
        ):
            yield client, find_model(client, task, self._uri)

    @contextmanager
    def _asked(self, doing: str) -> Iterator["MlflowClient"]:
        check_answers(self._uri, must_exist=True)
        with as_store_errors(self._uri, doing), quiet_mlflow():
            if self._client is None:
                self._client = connect(self._uri)
            yield self._client
