"""Local files: JSONL, CSV, TSV, Parquet, SQuAD's JSON and columns of words, a file a split."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines.schema import FetchSettings
from pipelines.sources import FetchedData, Record
from pipelines.sources.propositions import read_conllu
from pipelines.sources.readers import (
    ColumnChoice,
    Outcome,
    read_conll,
    read_csv,
    read_jsonl,
    read_parquet,
    read_tsv,
)
from pipelines.sources.role_columns import read_role_columns
from pipelines.sources.squad import read_squad
from ptv2_core.data.examples import SPLITS
from ptv2_core.errors import DataError
from ptv2_core.files import sha256_file

MAX_PROBLEMS = 10
SPLIT_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "valid", "validation", "val"),
    "test": ("test",),
}
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
    "tsv": (".tsv",),
    "parquet": (".parquet",),
    "conll": (".conll", ".bio", ".iob", ".iob2"),
    "squad": (".json",),
    "conllu": (".conllu", ".conllup"),
    "srl": (".srl",),
}
READERS: Mapping[str, Callable[[Path, str], Outcome]] = {
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
    "squad": read_squad,
    "conllu": read_conllu,
}
MISSING = "expected {what} at {path}, found nothing there; mend fetch.path or fetch.files"


def read(settings: FetchSettings, root: Path) -> FetchedData:
    """Read the splits of a local file or folder.

    Args:
        settings: The fetch section of a task.
        root: The folder that `settings.path` is relative to.

    Raises:
        DataError: With up to ten problems of each file, and how many more there are.
    """
    files = _find(settings, root)
    splits: dict[str, list[Record]] = {}
    described: dict[str, Any] = {}
    problems: list[str] = []
    for split, shown in files.items():
        try:
            outcome = _read_file(root / shown, shown, settings)
            digest = sha256_file(root / shown)
        except OSError as error:
            raise DataError(f"cannot read {shown}: {error.strerror}") from error
        problems += _shortened(outcome.problems, shown)
        splits[split] = outcome.records
        described[split] = {"file": shown, "sha256": digest, "rows": len(outcome.records)}
        if outcome.skipped:
            described[split]["skipped"] = dict(outcome.skipped)
    if problems:
        raise DataError.collected(problems, shown=len(problems))
    provenance = {"source": "local", "path": settings.path, "files": described}
    return FetchedData(splits=splits, provenance=provenance)


def _read_file(path: Path, shown: str, settings: FetchSettings) -> Outcome:
    """Read one file, whatever its format; a file without records is a problem."""
    if path.stat().st_size == 0:
        return Outcome([], [f"{shown}: the file is empty; put records into it, or remove it"])
    kind = _format(shown, settings)
    if kind == "conll":
        columns = ColumnChoice(settings.token_column, settings.tag_column)
        outcome = read_conll(path, shown, columns)
    elif kind == "srl":
        outcome = read_role_columns(path, shown, settings.token_column)
    else:
        outcome = READERS[kind](path, shown)
    if not outcome.records and not outcome.problems:
        left_out = "".join(f"; {count} {what}" for what, count in outcome.skipped.items())
        return Outcome([], [f"{shown}: the file holds no records{left_out}"])
    return outcome


def _shortened(problems: list[str], shown: str) -> list[str]:
    more = len(problems) - MAX_PROBLEMS
    tail = [f"{shown}: and {more} more problems in this file"] if more > 0 else []
    return problems[:MAX_PROBLEMS] + tail


def _find(settings: FetchSettings, root: Path) -> dict[str, str]:
    """Return the file of each split, relative to `root`."""
    path = root / settings.path
    if not path.exists():
        raise DataError(MISSING.format(what="a file or folder", path=settings.path))
    if settings.files is not None:
        return _named(settings, root)
    if path.is_file():
        return {"train": _checked(settings.path, root)}
    found = {split: _search(split, settings, root) for split in SPLITS}
    if found["train"] is None:
        looked_for = ", ".join(_candidates("train", settings))
        present = sorted(entry.name for entry in path.iterdir())[:5] or ["nothing"]
        raise DataError(
            f"found no train split in {settings.path}; looked for {looked_for}, "
            f"found {', '.join(present)}. Rename the file, or name it in fetch.files"
        )
    return {split: file for split, file in found.items() if file is not None}


def _named(settings: FetchSettings, root: Path) -> dict[str, str]:
    """Return the files that fetch.files names, each of which must be there."""
    if not (root / settings.path).is_dir():
        raise DataError(f"expected a folder at {settings.path}, since fetch.files is given")
    names = settings.files.model_dump(exclude_none=True) if settings.files else {}
    files = {
        split: _checked(f"{settings.path.rstrip('/')}/{name}", root)
        for split, name in names.items()
    }
    for split, file in files.items():
        twin = next((s for s, f in files.items() if f == file and s != split), None)
        if twin is not None:
            raise DataError(f"expected different files for {twin} and {split}, got {file} for both")
    return files


def _checked(shown: str, root: Path) -> str:
    if not (root / shown).is_file():
        raise DataError(MISSING.format(what="a file", path=shown))
    return shown


def _search(split: str, settings: FetchSettings, root: Path) -> str | None:
    """Return the one file in the folder that has the name of a split."""
    folder = settings.path.rstrip("/")
    found = [
        f"{folder}/{name}"
        for name in _candidates(split, settings)
        if (root / folder / name).is_file()
    ]
    if len(found) > 1:
        raise DataError(
            f"expected one file for the {split} split, found {' and '.join(found)}; "
            "remove one, or name the right one in fetch.files"
        )
    return found[0] if found else None


def _candidates(split: str, settings: FetchSettings) -> list[str]:
    kinds = SUFFIXES if settings.format == "auto" else (settings.format,)
    suffixes = [suffix for kind in kinds for suffix in SUFFIXES[kind]]
    return [name + suffix for name in SPLIT_NAMES[split] for suffix in suffixes]


def _format(shown: str, settings: FetchSettings) -> str:
    if settings.format != "auto":
        return settings.format
    suffix = Path(shown).suffix.lower()
    for kind, suffixes in SUFFIXES.items():
        if suffix in suffixes:
            return kind
    raise DataError(f"cannot tell the format of {shown} from its name; set fetch.format")
