"""Sources of records: generated, local files, or a hub. One function answers for all three."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.schema import FetchSettings
from ptv2_core.errors import DataError

Record = tuple[str, dict[str, Any]]
"""Where a record comes from (`data/mine/train.csv:18`), and the record."""


@dataclass(frozen=True, kw_only=True)
class FetchedData:
    """The records of each split the source has, and where they come from.

    Attributes:
        splits: Records by split: `train` always, `dev` and `test` where the source has them.
        provenance: What identifies the source: kind, path, and for each split its file, the file's
            SHA-256, the number of rows, and what gave none (`skipped`).
    """

    splits: dict[str, list[Record]]
    provenance: dict[str, Any]


def fetch(settings: FetchSettings, root: Path) -> FetchedData:
    """Read all records of a source.

    Args:
        settings: The fetch section of a task.
        root: The folder that `settings.path` is relative to.

    Raises:
        DataError: If the source is missing, unreachable or holds broken records.
    """
    readers: dict[str, Callable[[FetchSettings, Path], FetchedData]] = {
        "demo": _read_demo,
        "local": _read_local,
        "hub": _read_hub,
    }
    return readers[settings.source](settings, root)


def _read_demo(settings: FetchSettings, root: Path) -> FetchedData:
    from pipelines.sources import demo
    from ptv2_core.files import sha256_file

    path = root / settings.path
    if not path.is_file():
        raise DataError(f"expected the demo's grammar at {settings.path}, found no such file")
    generated = demo.generate(path)
    digest = sha256_file(path)
    splits = {
        split: [(f"{settings.path}#{split}:{n}", record) for n, record in enumerate(records, 1)]
        for split, records in generated.items()
    }
    files = {
        split: {"file": settings.path, "sha256": digest, "rows": len(records)}
        for split, records in splits.items()
    }
    provenance = {"source": "demo", "path": settings.path, "files": files}
    return FetchedData(splits=splits, provenance=provenance)


def _read_local(settings: FetchSettings, root: Path) -> FetchedData:
    from pipelines.sources import local

    return local.read(settings, root)


def _read_hub(settings: FetchSettings, root: Path) -> FetchedData:
    from pipelines.sources import hub

    return hub.read(settings, root)
