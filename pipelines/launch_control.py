"""`ptv2 promote`, `rollback`, `canary`, `shadow`, `history` and `sign`: what answers, by hand."""

import tempfile
from pathlib import Path

from pipelines.settings import load_settings, read_environment
from ptv2_core.errors import ConfigError
from ptv2_serving.audit import AuditLine
from ptv2_serving.control import Change, Registry
from ptv2_serving.references import parse_reference

CHALLENGER = "challenger"


def registry(workspace: Path, tracking_uri: str | None) -> Registry:
    """Return the registry that was named, or that of the environment or the workspace."""
    return Registry(registry_uri(workspace, tracking_uri), workspace)


def registry_uri(workspace: Path, tracking_uri: str | None) -> str:
    """Return where the registry is.

    Raises:
        ConfigError: Nothing says where, or the workspace's settings are wrong.
    """
    known = tracking_uri or read_environment().mlflow_tracking_uri
    if known:
        return known
    file = workspace / "params.yaml"
    if not file.is_file():
        raise ConfigError(
            f"expected to be told where the registry is, by --tracking-uri, MLFLOW_TRACKING_URI or "
            f"{file}, found none of them; run in the folder of params.yaml, or name that folder "
            "with --workspace"
        )
    return load_settings(file).register.tracking_uri


def promote(
    workspace: Path, tracking_uri: str | None, reference: str, expect: int | None, reason: str
) -> list[str]:
    """Make a version the champion; return what was done, in words."""
    place = registry(workspace, tracking_uri)
    return sentences(place.promote(reference, expect, reason=reason), "champion")


def rollback(
    workspace: Path,
    tracking_uri: str | None,
    task: str,
    to: int | None,
    expect: int | None,
    reason: str,
) -> list[str]:
    """Make the version champion again that was it before; return what was done, in words."""
    place = registry(workspace, tracking_uri)
    return sentences(place.rollback(task, to, expect, reason=reason), "champion")


def canary(
    workspace: Path,
    tracking_uri: str | None,
    reference: str,
    share: float | None,
    stop: bool,
    reason: str,
) -> list[str]:
    """Start or end a canary; return what was done, in words."""
    place = registry(workspace, tracking_uri)
    wanted = parse_reference(reference, alias=CHALLENGER)
    if stop:
        change = place.stop_canary(wanted.task, reason)
        return sentences(change, "canary") if change else [f"{wanted.task} has no canary"]
    if share is None:
        raise ConfigError("expected --share PERCENT to start a canary, or --stop to end it")
    version = place.resolve(wanted).version
    change = place.set_canary(wanted.task, version, share, reason=reason)
    return [*sentences(change, "canary"), f"  it answers {share:g} % of the requests"]


def shadow(
    workspace: Path, tracking_uri: str | None, reference: str, stop: bool, reason: str
) -> list[str]:
    """Start or end a shadow; return what was done, in words."""
    place = registry(workspace, tracking_uri)
    wanted = parse_reference(reference, alias=CHALLENGER)
    version = None if stop else place.resolve(wanted).version
    change = place.set_shadow(wanted.task, version, reason=reason)
    return sentences(change, "shadow") if change else [f"{wanted.task} has no shadow"]


def history(workspace: Path, tracking_uri: str | None, task: str) -> list[str]:
    """Return the audit lines of a task in words, latest first."""
    lines = registry(workspace, tracking_uri).history(task)
    return [_line(line) for line in reversed(lines)] or [f"{task} has no audit lines"]


def sign(workspace: Path, tracking_uri: str | None, reference: str, key: Path) -> list[str]:
    """Check the files of a version and sign them; return what was done, in words."""
    from ptv2_serving import signing
    from ptv2_serving.sources import download
    from ptv2_serving.tracking import resolve_uri

    private = signing.read_private_key(key)
    uri = registry_uri(workspace, tracking_uri)
    place = Registry(uri, workspace)
    version = place.resolve(reference)
    # the files themselves: what the registry says of them may be what somebody wants signed
    with tempfile.TemporaryDirectory(prefix="ptv2-sign-") as folder:
        download(version, Path(folder), uri=resolve_uri(uri, root=workspace))
    place.add_signature(version, signing.sign(version.manifest_sha256, private))
    return [f"signed {version}: prompt.json with sha256 {version.manifest_sha256}"]


def sentences(change: Change, role: str) -> list[str]:
    """Return what was changed in words."""
    if change.before == change.after and change.ended is None:
        return [f"{change.task}: version {change.after} is the {role} already"]
    was = f"was {_version(change.before)}"
    lines = [f"{change.task}: the {role} is {_version(change.after)} now ({was})"]
    if change.ended is not None:
        lines.append(f"  the canary, version {change.ended}, has ended")
    return lines


def _version(number: int | None) -> str:
    return "none" if number is None else f"version {number}"


def _line(line: AuditLine) -> str:
    change = f"{_version(line.before)} -> {_version(line.after)}"
    reason = f"  {line.reason}" if line.reason else ""
    return f"{line.when[:19]}Z  {line.who}  {line.action}  {change}{reason}"
