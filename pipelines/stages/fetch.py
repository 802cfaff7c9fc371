"""fetch: bring a task's records into the workspace as they are, one line each."""

import json
from dataclasses import dataclass

from pipelines.paths import TaskPaths
from pipelines.settings import TaskSettings
from pipelines.sources import fetch as fetch_source
from ptv2_core.files import replace_directory, write_json_atomic, write_text_atomic


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What fetch wrote.

    Attributes:
        rows: Records by split.
        skipped: What gave no record though nothing is wrong with it, counted by split.
    """

    rows: dict[str, int]
    skipped: dict[str, dict[str, int]]


def run(settings: TaskSettings, paths: TaskPaths) -> Fetched:
    """Read the source whole, then write `data/raw/TASK`.

    Raises:
        DataError: The source is missing, unreachable or holds broken records.
    """
    fetched = fetch_source(settings.fetch, paths.root)
    with replace_directory(paths.raw) as folder:
        for split, records in fetched.splits.items():
            lines = [
                json.dumps({"where": where, "record": record}, ensure_ascii=False)
                for where, record in records
            ]
            write_text_atomic(folder / f"{split}.jsonl", "\n".join(lines) + "\n")
        write_json_atomic(folder / "source.json", fetched.provenance)
    files = fetched.provenance["files"]
    return Fetched(
        rows={split: len(records) for split, records in fetched.splits.items()},
        skipped={split: file["skipped"] for split, file in files.items() if "skipped" in file},
    )
