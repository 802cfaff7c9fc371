"""What another number format of the backbone does to a prompt: `ptv2 evaluate --compare`.

A prompt that was trained in one format may answer in another. Here the same rows are answered in
fp32 and in others, one after the other.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

import torch

from pipelines.paths import TaskPaths
from pipelines.settings import TaskSettings
from pipelines.stages import Progress, silent
from pipelines.stages.evaluate import model_of, trained_prompt
from ptv2_core.config import Precision
from ptv2_core.data.tasks import Form
from ptv2_core.errors import ConfigError
from ptv2_core.evaluation.forms.base import Predictions
from ptv2_core.evaluation.predict import TOKEN_BUDGET
from ptv2_core.evaluation.scoring import Evaluation, evaluate_model
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.loading import choose_device
from ptv2_core.model.backbones.rounding import rounding_of

FORMAT = "ptv2-formats-1"
Split = Literal["dev", "test"]
REFERENCE: Precision = "fp32"


@dataclass(frozen=True, kw_only=True)
class FormatResult:
    """What a prompt answers with its backbone in one format.

    Attributes:
        precision: The setting, such as int8.
        number_format: What it came to, as `Backbone.number_format` names it.
        answering_digest: Of the backbone in that format.
        score: The task's metric.
        points: `score` less that of fp32, times 100.
        metrics: All metrics of the task's kind.
        changed: Decisions that differ from those in fp32; none of numbers, which all differ a bit.
        mean_change: Of numbers, the mean of how far they moved; none of decisions.
        size_bytes: What the backbone's weights take in memory.
        rows_per_s: Encoded rows answered in a second, in the second of two passes.
    """

    precision: Precision
    number_format: str
    answering_digest: str
    score: float
    points: float
    metrics: dict[str, float]
    changed: int | None
    mean_change: float | None
    size_bytes: int
    rows_per_s: float


@dataclass(frozen=True, kw_only=True)
class FormatComparison:
    """A prompt in several formats, on the same rows.

    Attributes:
        task: The task.
        metric: Its metric.
        split: Which rows.
        split_digest: Of their content.
        decisions: Answers there are; words in tagging.
        prompt_sha256: Of the prompt.
        device: Where.
        threads: Of torch.
        formats: fp32 first.
    """

    task: str
    metric: str
    split: Split
    split_digest: str
    decisions: int
    prompt_sha256: str
    device: str
    threads: int
    formats: tuple[FormatResult, ...]


def precisions_of(names: Sequence[str]) -> list[Precision]:
    """Return precisions by their names.

    Raises:
        ConfigError: There is none of that name.
    """
    known = get_args(Precision)
    for name in names:
        if name not in known:
            raise ConfigError(f"--compare: expected {' | '.join(known)}, got {name!r}")
    return [cast(Precision, name) for name in names]


def compare_formats(
    settings: TaskSettings,
    paths: TaskPaths,
    precisions: Sequence[Precision],
    *,
    split: Split = "dev",
    progress: Progress = silent,
) -> FormatComparison:
    """Score `prompts/TASK` in fp32 and in other formats, and write `results/TASK/formats.json`.

    Args:
        settings: Of the task.
        paths: Its files.
        precisions: The others; fp32 comes first, whether it is named or not.
        split: On which rows. A choice of format is a choice, so dev is for it.
        progress: Told before each format.

    Raises:
        ConfigError: There is no other format to compare with.
        PipelineError: Prepare or train has not run.
        ArtifactError: The prompt is damaged, or made for other data or another backbone.
        BackboneError: A format cannot be had here; nothing is scored then.
    """
    chosen = list(dict.fromkeys((REFERENCE, *precisions)))
    if len(chosen) == 1:
        raise ConfigError(f"--compare: expected another format than {REFERENCE}")
    prepared, manifest = trained_prompt(paths)
    device = choose_device(settings.backbone.device)
    for precision in chosen:
        rounding_of(precision, device, tunable=manifest.method == "finetune")
    rows = prepared.splits[split]
    found: list[FormatResult] = []
    reference: Evaluation | None = None
    for place, precision in enumerate(chosen):
        progress(f"{split} in {precision}", place, len(chosen))
        model = model_of(settings, paths, prepared, manifest, precision=precision)
        for _ in range(2):  # the first pass has costs of its own
            began = time.perf_counter()
            scored = evaluate_model(
                model, rows, prepared.task, token_budget=TOKEN_BUDGET, decoding=manifest.decoding
            )
            seconds = time.perf_counter() - began
        reference = reference or scored
        changed, mean_change = difference(
            prepared.task.form, reference.predictions, scored.predictions
        )
        found.append(
            FormatResult(
                precision=precision,
                number_format=model.backbone.number_format,
                answering_digest=model.backbone.answering_digest,
                score=scored.score,
                points=100 * (scored.score - reference.score),
                metrics=scored.metrics,
                changed=changed,
                mean_change=mean_change,
                size_bytes=model.backbone.size_bytes,
                rows_per_s=len(rows) / seconds,
            )
        )
        del model  # two backbones need not fit into memory at once
    assert reference is not None, "fp32 is among them"
    result = FormatComparison(
        task=settings.name,
        metric=prepared.task.metric,
        split=split,
        split_digest=prepared.digests[split],
        decisions=len(_decisions(prepared.task.form, reference.predictions)),
        prompt_sha256=manifest.sha256,
        device=str(device),
        threads=torch.get_num_threads(),
        formats=tuple(found),
    )
    write_json_atomic(paths.formats, {"format": FORMAT, **asdict(result)})
    progress("done", len(chosen), len(chosen))
    return result


def difference(
    form: Form, before: Predictions, after: Predictions
) -> tuple[int | None, float | None]:
    """Return how many decisions differ or, of numbers, how far they moved on average.

    Args:
        form: Of the task.
        before: Its answers.
        after: Others to the same rows.
    """
    pairs = list(zip(_decisions(form, before), _decisions(form, after), strict=True))
    if form == "values":
        return None, sum(abs(float(one) - float(other)) for one, other in pairs) / len(pairs)
    return sum(one != other for one, other in pairs), None


def _decisions(form: Form, predictions: Predictions) -> list[Any]:
    """Return single decisions: of tagged rows, one a word."""
    if form == "tokens":
        return [tag for tags in predictions for tag in tags]
    return list(predictions)
