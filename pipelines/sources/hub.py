"""A data set of a hub, at one pinned commit.

The source is a small TOML pin file, so that what is fetched is under version control and DVC sees
every change of it:

    dataset = "nyu-mll/glue"      # or a local folder, such as a mirror; then without a revision
    config = "rte"                # optional
    revision = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"

    [splits]
    train = "train"
    dev = "validation"            # optional, as is test

The class numbers of `datasets` become their names. Of a local folder DVC tracks the pin file only.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.checking import did_you_mean
from pipelines.errors import SourceUnreachableError
from pipelines.schema import COMMIT_PATTERN, FetchSettings
from pipelines.sources import FetchedData, Record
from pipelines.sources.values import json_value
from ptv2_core.data.examples import SPLITS
from ptv2_core.errors import DataError
from ptv2_core.files import sha256_file

MAX_PROBLEMS = 10
KEYS = ("dataset", "config", "revision", "splits")


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A checked pin file.

    Attributes:
        dataset: The name on the hub, or the absolute path of a local folder.
        shown: The same as written in the pin file, for places and problems.
        config: The configuration of a data set that has several.
        revision: The commit; none for a local folder.
        splits: The expression that `datasets` knows each of our splits by.
    """

    dataset: str
    shown: str
    config: str | None
    revision: str | None
    splits: dict[str, str]


def read(settings: FetchSettings, root: Path) -> FetchedData:
    """Read the splits that a pin file names.

    Args:
        settings: The fetch section of a task; its path is the pin file.
        root: The folder that paths are relative to.

    Raises:
        DataError: If the pin file is wrong, the data set cannot be loaded, or a row has no class.
    """
    pin = read_pin(root / settings.path, settings.path, root)
    digest = sha256_file(root / settings.path)
    splits: dict[str, list[Record]] = {}
    files: dict[str, Any] = {}
    for split, expression in pin.splits.items():
        splits[split] = _read_split(pin, expression, settings.path)
        files[split] = {
            "file": settings.path,
            "sha256": digest,
            "rows": len(splits[split]),
            "split": expression,
        }
    provenance = {
        "source": "hub",
        "path": settings.path,
        "files": files,
        "dataset": pin.shown,
        "config": pin.config,
        "revision": pin.revision,
    }
    return FetchedData(splits=splits, provenance=provenance)


def read_pin(path: Path, shown: str, root: Path) -> Pin:
    """Read and check a pin file.

    Args:
        path: The file.
        shown: Its name in problems.
        root: The folder that a local `dataset` is relative to.

    Raises:
        DataError: With every problem of the file.
    """
    try:
        values = tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"expected a pin file at {shown}, found nothing there") from None
    except OSError as error:
        raise DataError(f"cannot read the pin file {shown}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: not valid TOML: {error}") from error
    problems = [
        f"{shown}: {key}: unknown key{did_you_mean(key, KEYS)}" for key in values if key not in KEYS
    ]
    dataset, config, revision = (values.get(key) for key in ("dataset", "config", "revision"))
    folder = root / dataset if isinstance(dataset, str) and dataset else None
    if folder is None:
        problems.append(f"{shown}: dataset: expected the name of a data set, got {dataset!r}")
    if config is not None and not isinstance(config, str):
        problems.append(f"{shown}: config: expected text, got {config!r}")
    is_local = folder is not None and folder.is_dir()
    problems += [f"{shown}: revision: {words}" for words in _revision_problems(revision, is_local)]
    splits = values.get("splits")
    problems += [f"{shown}: {words}" for words in _split_problems(splits)]
    if problems:
        raise DataError.collected(problems)
    return Pin(
        dataset=str(folder.resolve()) if is_local and folder else str(dataset),
        shown=str(dataset),
        config=config,
        revision=revision,
        splits={split: splits[split] for split in SPLITS if split in splits} if splits else {},
    )


def _revision_problems(revision: Any, is_local: bool) -> list[str]:
    if is_local:
        return [] if revision is None else ["does not apply to a local folder; remove it"]
    if isinstance(revision, str) and re.fullmatch(COMMIT_PATTERN, revision):
        return []
    words = "expected the 40 hexadecimal digits of a commit, so that the data cannot change"
    advice = "; `ptv2 pin FILE` writes the newest" if revision is None else ""
    return [f"{words}, got {revision!r}{advice}"]


def _split_problems(splits: Any) -> list[str]:
    if not isinstance(splits, dict) or "train" not in splits:
        return ['splits: expected a table such as {train = "train", dev = "validation"}']
    return [
        f"splits.{split}: expected one of {', '.join(SPLITS)}, each with the name of a split"
        for split, expression in splits.items()
        if split not in SPLITS or not isinstance(expression, str) or not expression
    ]


def _read_split(pin: Pin, expression: str, shown: str) -> list[Record]:
    """Load one split and turn its rows into records."""
    rows = _load(pin, expression, shown)
    revision = f"@{pin.revision[:12]}" if pin.revision else ""
    records: list[Record] = []
    problems: list[str] = []
    for number, row in enumerate(rows, start=1):
        where = f"{pin.shown}{revision}#{expression}:{number}"
        try:
            records.append((where, json_value(_named(row, rows.features))))
        except ValueError as error:
            problems.append(f"{where}: {error}")
        except TypeError as error:
            problems.append(f"{where}: holds {error}, which JSON cannot; choose another config")
    if problems:
        raise DataError.collected(problems, shown=MAX_PROBLEMS)
    if not records:
        raise DataError(f"{shown}: the split {expression!r} of {pin.shown} has no rows")
    return records


def _load(pin: Pin, expression: str, shown: str) -> Any:
    """Call `datasets`, with its many ways of failing turned into one."""
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    what = " ".join(filter(None, (pin.shown, pin.config, f"split {expression!r}")))
    try:
        return datasets.load_dataset(
            pin.dataset, pin.config, revision=pin.revision, split=expression
        )
    except ConnectionError as error:
        advice = "check the network, HF_HUB_OFFLINE and HF_ENDPOINT, or name a local folder"
        raise SourceUnreachableError(f"{shown}: cannot reach {what}: {error}; {advice}") from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else f"{error}"
        raise DataError(f"{shown}: cannot load {what}: {reason}") from error


def _named(value: Any, feature: Any) -> Any:
    """Turn class numbers into class names, wherever they are in a row.

    Raises:
        ValueError: For a number that names no class; -1 marks a hidden label on the hub.
    """
    import datasets

    if value is None:
        return None
    if isinstance(feature, datasets.ClassLabel):
        if not 0 <= value < feature.num_classes:
            hidden = " (the labels of this split are hidden)" if value == -1 else ""
            raise ValueError(
                f"expected a class from 0 to {feature.num_classes - 1}, got {value}{hidden}"
            )
        return feature.names[value]
    if isinstance(feature, dict):
        return {key: _named(item, feature[key]) for key, item in value.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return [_named(item, feature.feature) for item in value]
    return value
