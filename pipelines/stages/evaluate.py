"""evaluate: score the trained prompt once on the held-out test split, beside a bare probe."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.paths import TaskPaths
from pipelines.settings import TaskSettings
from pipelines.stages import Progress, silent
from pipelines.stages.prepare import Prepared, read_examples
from pipelines.stages.training import backbone_for
from pipelines.tables import csv_text
from ptv2_core.artifact import MANIFEST_FILE, Manifest, load_manifest, load_weights, restore_model
from ptv2_core.data.tasks import TaskKind
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.metrics import Counts, label_counts, span_counts, total_counts
from ptv2_core.evaluation.predict import TOKEN_BUDGET
from ptv2_core.evaluation.scoring import Evaluation, evaluate_model, gold_labels
from ptv2_core.files import replace_directory, write_json_atomic, write_text_atomic
from ptv2_core.training.probe import probe
from ptv2_core.training.start import reading_of


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The scores, as `metrics.json` holds them.

    Attributes:
        task: The task.
        metric: The task's metric.
        dev: On dev, which chose settings and epoch.
        test: On the held-out rows.
        test_rows: How many.
        test_digest: Of their content; scores compare only where it is equal.
        prompt_sha256: Of the prompt that was scored, so that no other is registered with this.
        probe: A linear probe on the bare backbone, on test; none where not wanted.
        probe_dev: The same on dev.
        test_metrics: All metrics on test.
    """

    task: str
    metric: str
    dev: float
    test: float
    test_rows: int
    test_digest: str
    prompt_sha256: str
    probe: float | None
    probe_dev: float | None
    test_metrics: dict[str, float]


def run(settings: TaskSettings, paths: TaskPaths, progress: Progress = silent) -> EvaluateResult:
    """Score `prompts/TASK` and write `results/TASK/evaluate`.

    Raises:
        PipelineError: Train has not run.
        ArtifactError: The prompt is damaged, or made for other data or another backbone.
    """
    prepared = Prepared.load(paths.prepared)
    paths.require(paths.prompt / MANIFEST_FILE, "train")
    manifest = load_manifest(paths.prompt)
    _check_match(manifest, prepared, paths.prompt)
    backbone = backbone_for(settings, prepared)
    if backbone.spec.digest != manifest.backbone["digest"]:
        raise ArtifactError(
            f"{paths.prompt}: expected backbone {manifest.backbone['digest']}, got "
            f"{backbone.spec.digest}; run `ptv2 train --task {settings.name}` again"
        )
    weights = load_weights(paths.prompt, manifest)
    model = restore_model(backbone, [(manifest.task, manifest.prompt, manifest.head, weights)])
    scored = {}
    for place, split in enumerate(("dev", "test")):
        progress(f"scoring {split}", place, 3)
        scored[split] = evaluate_model(
            model, prepared.splits[split], prepared.task, token_budget=TOKEN_BUDGET
        )
    progress("probing the bare backbone", 2, 3)
    probed = None
    if settings.evaluate.probe:
        probed = probe(
            model,
            task=prepared.task,
            splits=[prepared.splits[split] for split in ("train", "dev", "test")],
            reads=reading_of(prepared.task, manifest.head, backbone),
            token_budget=TOKEN_BUDGET,
        )
    result = EvaluateResult(
        task=settings.name,
        metric=prepared.task.metric,
        dev=scored["dev"].score,
        test=scored["test"].score,
        test_rows=len(prepared.splits["test"]),
        test_digest=prepared.digests["test"],
        prompt_sha256=manifest.sha256,
        probe=None if probed is None else probed.test.score,
        probe_dev=None if probed is None else probed.dev.score,
        test_metrics=scored["test"].metrics,
    )
    _write(paths, prepared, scored["test"], result)
    progress("done", 3, 3)
    return result


def _check_match(manifest: Manifest, prepared: Prepared, prompt: Path) -> None:
    if manifest.task.labels != prepared.task.labels or manifest.task.kind != prepared.task.kind:
        raise ArtifactError(
            f"{prompt}: made for {manifest.task.kind} with {len(manifest.task.labels)} labels, but "
            f"the data is {prepared.task.kind} with {len(prepared.task.labels)}; train again"
        )
    trained_on = manifest.provenance.get("data")
    if trained_on != prepared.digests:
        # rows of this test split may have been in that train split
        raise ArtifactError(
            f"{prompt}: trained on other data than data/prepared/{prepared.task.name} (expected "
            f"{trained_on}, got {prepared.digests}); run `ptv2 train --task {prepared.task.name}` "
            "again"
        )


def _write(paths: TaskPaths, prepared: Prepared, test: Evaluation, result: EvaluateResult) -> None:
    gold = gold_labels(prepared.splits["test"], prepared.task)
    examples = read_examples(paths.prepared, "test")
    lines = [
        json.dumps({**example, "predicted": predicted}, ensure_ascii=False)
        for example, predicted in zip(examples, test.predictions, strict=True)
    ]
    actual, predicted, counts = _compare(gold, test.predictions, prepared.task.kind)
    with replace_directory(paths.evaluate) as folder:
        write_json_atomic(folder / "metrics.json", asdict(result))
        write_text_atomic(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        write_text_atomic(folder / "per_label.csv", _per_label(counts))
        pairs = zip(actual, predicted, strict=True)
        write_text_atomic(folder / "confusion.csv", csv_text(["actual", "predicted"], pairs))


def _compare(
    gold: Any, predicted: Any, kind: TaskKind
) -> tuple[Sequence[str], Sequence[str], dict[str, Counts]]:
    """Return actual and predicted names for a confusion matrix, and counts by name.

    Of a tagged row these are the span types of its tokens; the counts are of whole spans.
    """
    if kind == "tagging":
        return _types(gold), _types(predicted), span_counts(gold, predicted)
    return gold, predicted, label_counts(gold, predicted)


def _types(rows: Sequence[Sequence[str]]) -> list[str]:
    return [tag[2:] or tag for row in rows for tag in row]


def _per_label(counts: Mapping[str, Counts]) -> str:
    rows = [
        [name, f"{c.f1:.4f}", f"{c.precision:.4f}", f"{c.recall:.4f}", c.gold, c.predicted]
        for name, c in [*counts.items(), ("all", total_counts(counts))]
    ]
    return csv_text(["label", "f1", "precision", "recall", "gold", "predicted"], rows)
