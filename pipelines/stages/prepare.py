"""prepare: check, split and encode a task's records."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.paths import TaskPaths
from pipelines.prepared import TASK_FILE
from pipelines.settings import TaskSettings
from ptv2_core.data.encoding import EncodingReport, encode_examples
from ptv2_core.data.examples import (
    SPLITS,
    Example,
    Record,
    carve_splits,
    collect_labels,
    cut_rows,
    digest_examples,
    example_to_mapping,
)
from ptv2_core.data.parsing import parse_records, require_right_options
from ptv2_core.data.tasks import METRICS, TaskSpec
from ptv2_core.errors import ConfigError, DataError
from ptv2_core.files import replace_directory, write_json_atomic, write_text_atomic
from ptv2_core.model.backbones.locating import Location, locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What prepare did, as `report.json` holds it.

    Attributes:
        labels: Number of classes or tags; 0 for kinds without a closed set of them.
        repaired_tags: `I-` tags that began a span and were taken as `B-`.
        splits: Rows, tokens, longest row, cut rows, answers wanted and further windows by split.
    """

    labels: int
    repaired_tags: int
    splits: dict[str, EncodingReport]


def run(settings: TaskSettings, paths: TaskPaths) -> PrepareReport:
    """Check all records, carve missing splits, encode, and write `data/prepared/TASK`.

    Raises:
        DataError: Records are not what the task's settings say; nothing is written.
        BackboneError: The backbone's tokenizer is not there.
        ConfigError: Rows would be longer than the tokenizer says its model can read.
    """
    prepare = settings.prepare
    location = locate(settings.backbone.name, settings.backbone.revision)
    parsed, repaired = _parsed(settings, paths)
    labels = collect_labels(parsed, kind=prepare.kind, labels=prepare.labels)
    splits = _chosen(parsed, settings)
    task = TaskSpec(
        name=settings.name,
        kind=prepare.kind,
        labels=labels,
        fields=prepare.record_fields().named(),
        metric=METRICS[prepare.kind],
        template=prepare.chosen_template(),
    )
    tokenizer = load_tokenizer(location, words=task.form == "tokens")
    _check_length(prepare.max_length, tokenizer.model_max_length, location)
    reports: dict[str, EncodingReport] = {}
    with replace_directory(paths.prepared) as folder:
        for split, examples in splits.items():
            encoded, reports[split] = encode_examples(
                examples,
                tokenizer,
                task=task,
                max_length=prepare.max_length,
                stride=prepare.stride,
            )
            encoded.save(folder / split)
            write_text_atomic(folder / f"{split}.jsonl", _json_lines(examples))
        report = PrepareReport(labels=len(labels), repaired_tags=repaired, splits=reports)
        stored = {
            "task": task.to_mapping(),
            "encoding": {
                "max_length": prepare.max_length,
                "stride": prepare.stride,
                "tokenizer_digest": location.tokenizer_digest(),
            },
            "digests": {split: digest_examples(examples) for split, examples in splits.items()},
        }
        write_json_atomic(folder / TASK_FILE, stored)
        write_json_atomic(folder / "report.json", asdict(report))
    return report


def _check_length(max_length: int, limit: float, location: Location) -> None:
    # where there is no limit, Transformers puts a number that no row reaches
    if max_length > limit:
        raise ConfigError(
            f"prepare.max_length: expected at most {limit}, which the tokenizer of "
            f"{location.name!r} gives as its model's limit (model_max_length in "
            f"{location.folder / 'tokenizer_config.json'}), got {max_length}; lower it. Beyond "
            "that the model was not trained, whatever its max_position_embeddings say."
        )


def _parsed(settings: TaskSettings, paths: TaskPaths) -> tuple[dict[str, list[Example]], int]:
    """Return the examples of each split that fetch wrote, and the number of mended tags."""
    prepare = settings.prepare
    splits: dict[str, list[Example]] = {}
    repaired = 0
    for split, records in _read_raw(paths.raw).items():
        splits[split], count = parse_records(
            records,
            kind=prepare.kind,
            fields=prepare.record_fields(),
            template=prepare.chosen_template(),
        )
        repaired += count
    return splits, repaired


def _chosen(parsed: dict[str, list[Example]], settings: TaskSettings) -> dict[str, list[Example]]:
    """Return train, dev and test, carved where one is missing, cut to the rows wanted."""
    prepare = settings.prepare
    carved = carve_splits(
        parsed,
        dev_fraction=prepare.dev_fraction,
        test_fraction=prepare.test_fraction,
        seed=prepare.seed,
    )
    splits: dict[str, list[Example]] = {
        split: cut_rows(carved[split], prepare.rows_of(split), seed=prepare.seed)
        for split in SPLITS
    }
    # on test an answer that is no option counts as wrong; a loss has no meaning there
    require_right_options([*splits["train"], *splits["dev"]])
    return splits


def _json_lines(examples: list[Example]) -> str:
    lines = [json.dumps(example_to_mapping(e), ensure_ascii=False) for e in examples]
    return "\n".join(lines) + "\n"


def _read_raw(folder: Path) -> dict[str, list[Record]]:
    """Read what fetch wrote; a train split is always there."""
    splits: dict[str, list[Record]] = {}
    for split in SPLITS:
        file = folder / f"{split}.jsonl"
        if file.is_file():
            stored = [json.loads(line) for line in file.read_text("utf-8").split("\n") if line]
            splits[split] = [Record(where=row["where"], values=row["record"]) for row in stored]
    if "train" not in splits:
        raise DataError(
            f"{folder / 'train.jsonl'}: not there; run `ptv2 fetch --task {folder.name}` first"
        )
    return splits
