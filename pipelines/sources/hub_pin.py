"""Find the commit of a data set on a hub, and write it into its pin file.

`datasets` runs no loading scripts. Of a data set that is one, the hub keeps a copy in Parquet under
`refs/convert/parquet`, and the newest commit of that is taken; of all others, that of `main`.
"""

import re
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipelines.errors import SourceUnreachableError
from pipelines.sources.hub import read_pin
from ptv2_core.errors import DataError
from ptv2_core.files import write_text_atomic

MAIN = "main"
CONVERTED = "refs/convert/parquet"
REVISION = re.compile(r"^\s*revision\s*=")
LINES_BEFORE = re.compile(r"^\s*(?:dataset|config)\s*=")


class Hub(Protocol):
    """What of `huggingface_hub.HfApi` is used."""

    def list_repo_refs(self, repo_id: str, *, repo_type: str) -> Any:
        """Return the branches and the converted copies."""

    def list_repo_files(self, repo_id: str, *, repo_type: str) -> list[str]:
        """Return the paths of all files on `main`."""


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """What was written.

    Attributes:
        dataset: The name on the hub.
        ref: The branch or copy whose newest commit it is.
        revision: The commit.
        previous: The commit that was there before; none without one.
    """

    dataset: str
    ref: str
    revision: str
    previous: str | None


def pin(path: Path, hub: Hub | None = None, *, update: bool = False) -> Pinned:
    """Write the newest commit of a data set into its pin file; comments stay.

    Args:
        path: The pin file, as `pipelines.sources.hub` reads it, with or without a revision.
        hub: The hub; none asks the one that HF_ENDPOINT names.
        update: Whether a commit that is there may be replaced.

    Raises:
        DataError: The file is wrong, has a commit already, or the data set is not on the hub.
        SourceUnreachableError: The hub does not answer.
    """
    text = _read(path)
    values = _parse(path, text)
    dataset, previous = values.get("dataset"), values.get("revision")
    if not isinstance(dataset, str) or not dataset:
        raise DataError(f"{path}: dataset: expected the name of a data set, got {dataset!r}")
    if previous is not None and not update:
        raise DataError(
            f"{path}: revision: is pinned to {previous} already; --update takes the newest commit"
        )
    ref, revision = _newest(dataset, hub or _hub())
    new = _with_revision(text, revision)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / path.name
        write_text_atomic(trial, new)
        # a data set named like a folder here is no concern of a name on the hub
        read_pin(trial, str(path), Path(folder))
    write_text_atomic(path, new)
    return Pinned(dataset=dataset, ref=ref, revision=revision, previous=previous)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"expected a pin file at {path}, found nothing there") from None
    except OSError as error:
        raise DataError(f"cannot read the pin file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid TOML: {error}") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{path}: not valid TOML: {error}") from error


def _hub() -> Hub:
    from huggingface_hub import HfApi

    return HfApi()


def _newest(dataset: str, hub: Hub) -> tuple[str, str]:
    """Return the ref that `datasets` can load, and its newest commit."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HFValidationError,
        HTTPError,  # of the HTTP library that it has chosen
        RepositoryNotFoundError,
    )

    try:
        refs = hub.list_repo_refs(dataset, repo_type="dataset")
        files = hub.list_repo_files(dataset, repo_type="dataset")
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"expected a data set on the hub, got {dataset!r}: {error}; check its name, and "
            "HF_TOKEN if it is private or gated"
        ) from error
    except (OSError, HTTPError) as error:
        advice = "check the network, HF_HUB_OFFLINE and HF_ENDPOINT"
        raise SourceUnreachableError(f"cannot reach {dataset}: {error}; {advice}") from error
    script = f"{dataset.rpartition('/')[2]}.py"
    wanted, known = (CONVERTED, refs.converts) if script in files else (MAIN, refs.branches)
    for found in known:
        if wanted in (found.name, found.ref):
            return wanted, str(found.target_commit)
    if wanted == CONVERTED:
        raise DataError(
            f"{dataset} is a loading script, which `datasets` no longer runs, and the hub has no "
            f"copy of it under {CONVERTED}; name another data set"
        )
    raise DataError(f"expected a branch {MAIN} of {dataset}, found none")


def _with_revision(text: str, revision: str) -> str:
    """Return the text with the commit in the place of the old one, or below dataset and config."""
    line = f'revision = "{revision}"'
    lines = text.split("\n")
    top = next((n for n, old in enumerate(lines) if old.lstrip().startswith("[")), len(lines))
    replaced = [n for n in range(top) if REVISION.match(lines[n])]
    if replaced:
        lines[replaced[0]] = line
        return "\n".join(lines)
    after = max((n for n in range(top) if LINES_BEFORE.match(lines[n])), default=-1)
    return "\n".join([*lines[: after + 1], line, *lines[after + 1 :]])
