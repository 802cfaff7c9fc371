"""evaluate: score the trained prompt once on the held-out test split, beside a bare probe."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared, read_examples
from pipelines.settings import TaskSettings
from pipelines.stages import Progress, silent
from pipelines.stages.training import backbone_for
from pipelines.tables import csv_text
from ptv2_core.artifact import load_weights, restore_model
from ptv2_core.config import HeadConfig, Precision
from ptv2_core.data.examples import SPLITS
from ptv2_core.data.tasks import Form
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.answers import answer_em
from ptv2_core.evaluation.forms.base import Predictions
from ptv2_core.evaluation.metrics import Counts, label_counts, span_counts, total_counts
from ptv2_core.evaluation.predict import TOKEN_BUDGET
from ptv2_core.evaluation.scoring import Evaluation, evaluate_model, gold_labels
from ptv2_core.files import replace_directory, write_json_atomic, write_text_atomic
from ptv2_core.manifest import MANIFEST_FILE, Manifest, load_manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.probe import ProbeResult, probe
from ptv2_core.training.start import reading_of

RIGHT, WRONG, NO_ANSWER = "right", "wrong", "no answer"


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """The scores, as `metrics.json` holds them.

    Attributes:
        task: The task.
        metric: The task's metric.
        dev: On dev, which chose settings and epoch.
        test: On the held-out rows.
        test_rows: How many: texts, choices, questions or sentences, not their windows or options.
        test_digest: Of their content; scores compare only where it is equal.
        prompt_sha256: Of the prompt that was scored, so that no other is registered with this.
        probe: A linear probe on the bare backbone, on test; none where not wanted.
        probe_dev: The same on dev.
        test_metrics: All metrics on test.
        number_format: How the backbone computed, as `Backbone.number_format` names it.
        answering_digest: Of the backbone in that format.
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
    number_format: str
    answering_digest: str


def run(settings: TaskSettings, paths: TaskPaths, progress: Progress = silent) -> EvaluateResult:
    """Score `prompts/TASK` and write `results/TASK/evaluate`.

    Raises:
        PipelineError: Train has not run.
        ArtifactError: The prompt is damaged, or made for other data or another backbone.
    """
    prepared, manifest = trained_prompt(paths)
    model = model_of(settings, paths, prepared, manifest)
    backbone = model.backbone
    scored = []
    for place, split in enumerate(("dev", "test")):
        progress(f"scoring {split}", place, 3)
        scored.append(
            evaluate_model(
                model,
                prepared.splits[split],
                prepared.task,
                token_budget=TOKEN_BUDGET,
                decoding=manifest.decoding,
            )
        )
    dev, test = scored
    progress("probing the bare backbone", 2, 3)
    probed = _probe(settings, prepared, backbone, manifest) if settings.evaluate.probe else None
    result = EvaluateResult(
        task=settings.name,
        metric=prepared.task.metric,
        dev=dev.score,
        test=test.score,
        test_rows=len(test.predictions),
        test_digest=prepared.digests["test"],
        prompt_sha256=manifest.sha256,
        probe=None if probed is None else probed.test.score,
        probe_dev=None if probed is None else probed.dev.score,
        test_metrics=test.metrics,
        number_format=backbone.number_format,
        answering_digest=backbone.answering_digest,
    )
    _write(paths, prepared, test, result)
    progress("done", 3, 3)
    return result


def trained_prompt(paths: TaskPaths) -> tuple[Prepared, Manifest]:
    """Return a task's data and what describes the prompt that was trained on it.

    Raises:
        PipelineError: Prepare or train has not run.
        ArtifactError: The prompt is damaged, or made for other data.
    """
    prepared = Prepared.load(paths.prepared)
    paths.require(paths.prompt / MANIFEST_FILE, "train")
    manifest = load_manifest(paths.prompt)
    _check_match(manifest, prepared, paths.prompt)
    return prepared, manifest


def model_of(
    settings: TaskSettings,
    paths: TaskPaths,
    prepared: Prepared,
    manifest: Manifest,
    *,
    precision: Precision | None = None,
) -> PromptedModel:
    """Return a trained prompt on its backbone.

    Args:
        settings: Of the task.
        paths: Its files.
        prepared: As `trained_prompt` returns it, like what follows.
        manifest: Likewise.
        precision: Of the backbone; none takes that of the settings.

    Raises:
        ArtifactError: The weights are damaged, or made for another backbone.
        BackboneError: The backbone is not there, or cannot have that precision.
    """
    backbone = backbone_for(
        settings,
        prepared,
        method=manifest.method,
        head=manifest.head,
        precision=precision,
        trains=False,
    )
    if backbone.spec.digest != manifest.backbone["digest"]:
        raise ArtifactError(
            f"{paths.prompt}: expected backbone {manifest.backbone['digest']}, got "
            f"{backbone.spec.digest}; run `ptv2 train --task {settings.name}` again"
        )
    weights = load_weights(paths.prompt, manifest)
    return restore_model(backbone, [(manifest.task, manifest.prompt, manifest.head, weights)])


def _probe(
    settings: TaskSettings, prepared: Prepared, backbone: Backbone, manifest: Manifest
) -> ProbeResult | None:
    """Fit a linear layer on the bare backbone, where the task's form lets one be fitted."""
    if prepared.task.form == "spans":
        return None
    # the mask token says nothing to a backbone without its language model
    reads = HeadConfig() if manifest.head.type == "verbalizer" else manifest.head
    return probe(
        PromptedModel(backbone, PromptBank(backbone.spec.shape), []),
        task=prepared.task,
        splits=[prepared.splits[split] for split in SPLITS],
        reads=reading_of(prepared.task, reads, backbone),
        token_budget=TOKEN_BUDGET,
    )


def _check_match(manifest: Manifest, prepared: Prepared, prompt: Path) -> None:
    if manifest.task.labels != prepared.task.labels or manifest.task.kind != prepared.task.kind:
        raise ArtifactError(
            f"{prompt}: made for {manifest.task.kind} with {len(manifest.task.labels)} labels, but "
            f"the data is {prepared.task.kind} with {len(prepared.task.labels)}; train again"
        )
    if manifest.task.template != prepared.task.template:
        raise ArtifactError(
            f"{prompt}: trained on texts of template {manifest.task.template!r}, but the data is "
            f"of {prepared.task.template!r}; run `ptv2 train --task {prepared.task.name}` again"
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
    examples = read_examples(paths.prepared, "test")
    lines = [
        json.dumps({**example, "predicted": predicted}, ensure_ascii=False)
        for example, predicted in zip(examples, test.predictions, strict=True)
    ]
    actual, predicted, counts = _compare(examples, test.predictions, prepared)
    with replace_directory(paths.evaluate) as folder:
        write_json_atomic(folder / "metrics.json", asdict(result))
        write_text_atomic(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        write_text_atomic(folder / "per_label.csv", _per_label(counts))
        pairs = zip(actual, predicted, strict=True)
        write_text_atomic(folder / "confusion.csv", csv_text(["actual", "predicted"], pairs))


def _compare(
    examples: Sequence[Mapping[str, Any]], predicted: Predictions, prepared: Prepared
) -> tuple[Sequence[str], Sequence[str], dict[str, Counts]]:
    """Return actual and predicted names for a confusion matrix, and counts by name.

    Of a tagged row these are the span types of its tokens; the counts are of whole spans. Options
    and stretches of a context have no names in common: an answer is right or wrong, or says that
    there is none. Of numbers there are no names.
    """
    form = prepared.task.form
    if form == "values":
        return [], [], {}
    gold = gold_labels(prepared.splits["test"], prepared.task)
    if form == "tokens":
        return _types(gold), _types(predicted), span_counts(gold, predicted)
    if form in ("options", "spans"):
        verdicts = [_verdict(*pair, form) for pair in zip(examples, predicted, strict=True)]
        gold, predicted = zip(*verdicts, strict=True)
    return gold, predicted, label_counts(gold, predicted)


def _verdict(example: Mapping[str, Any], predicted: str, form: Form) -> tuple[str, str]:
    """Return whether there is a right answer, and what the predicted one is."""
    if form == "options":
        right = [example["names"][place] for place in example["correct"]]
        return (RIGHT if right else NO_ANSWER), (RIGHT if predicted in right else WRONG)
    right = [answer["text"] for answer in example["answers"]]
    actual = RIGHT if right else NO_ANSWER
    if not predicted:
        return actual, NO_ANSWER
    return actual, (RIGHT if right and answer_em(predicted, right) else WRONG)


def _types(rows: Sequence[Sequence[str]]) -> list[str]:
    return [tag[2:] or tag for row in rows for tag in row]


def _per_label(counts: Mapping[str, Counts]) -> str:
    total = [("all", total_counts(counts))] if counts else []
    rows = [
        [name, f"{c.f1:.4f}", f"{c.precision:.4f}", f"{c.recall:.4f}", c.gold, c.predicted]
        for name, c in [*counts.items(), *total]
    ]
    return csv_text(["label", "f1", "precision", "recall", "gold", "predicted"], rows)
