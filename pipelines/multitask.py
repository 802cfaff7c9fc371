"""`ptv2 multitask`: one prompt trained on several tasks at once, one head each (paper, MPT-2).

What it writes is a prompt for each task, with the shared keys and values and the task's own head:
it answers as it is, and a training of one task can begin from it (`train.init_from`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import PipelineError
from pipelines.extra_settings import SharedPrompt
from pipelines.paths import TaskPaths, alone
from pipelines.prepared import Prepared
from pipelines.settings import Settings
from pipelines.stages import Progress, silent
from pipelines.stages.train import save_prompt
from pipelines.stages.training import backbone_for, overlay, trunk_cache
from ptv2_core.artifact import Weights
from ptv2_core.config import TrainConfig
from ptv2_core.data.tasks import NAME_PATTERN
from ptv2_core.errors import ConfigError
from ptv2_core.evaluation.scoring import Evaluation, evaluate_model
from ptv2_core.files import write_json_atomic
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.fit import fit_together
from ptv2_core.training.sources import Source, mixing_shares
from ptv2_core.training.start import check_positions, new_slot


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A task's part in a shared prompt.

    Attributes:
        task: The task.
        metric: Its metric.
        share: Of the steps of an epoch.
        dev: Score on dev.
        test: Score on the held-out rows.
        prompt: The folder of its prompt.
    """

    task: str
    metric: str
    share: float
    dev: float
    test: float
    prompt: str


def run(settings: Settings, name: str, progress: Progress = silent) -> list[Shared]:
    """Train a shared prompt, and write `prompts/shared/NAME/TASK` for each of its tasks.

    A run that was killed goes on from its checkpoint.

    Raises:
        ConfigError: The tasks cannot share a prompt, or there is no such shared prompt.
        DataError: A task is not prepared.
    """
    chosen = _chosen(settings, name)
    paths = [TaskPaths(root=settings.root, task=task) for task in chosen.tasks]
    prepared = [Prepared.load(one.prepared) for one in paths]
    _check_alike(name, prepared)
    config = overlay(settings.train, chosen.train)
    if config.method != "ptv2" or config.init_from is not None:
        raise ConfigError(
            f"multitask.shared.{name}.train: a shared prompt is one of method ptv2 that starts "
            f"anew; got method {config.method}, init_from {config.init_from}"
        )
    checkpoint = Checkpoint(
        settings.root / ".ptv2" / "checkpoints" / f"shared-{name}.safetensors",
        every_s=settings.run.checkpoint_s,
    )
    first = settings.task(chosen.tasks[0])
    with alone(checkpoint.file.with_suffix(".lock"), "multitask"):
        backbone = backbone_for(first, prepared[0], method=config.method, head=config.head)
        model, sources = shared_model(backbone, prepared, config)
        for report in fit_together(
            model,
            sources,
            config=config,
            temperature=chosen.temperature,
            trunk=trunk_cache(first, paths[0]),
            checkpoint=checkpoint,
        ):
            what = f"epoch {report.epoch} loss {report.train_loss:.4f}"
            if report.history:
                what += f", mean dev {report.history[-1].dev_score:.4f}"
            progress(what, report.step, report.total_steps)
        shares = mixing_shares([len(one.splits["train"]) for one in prepared], chosen.temperature)
        results = []
        for slot, (own, one) in enumerate(zip(paths, prepared, strict=True)):
            dev = _score(model, slot, one, "dev", config)
            test = _score(model, slot, one, "test", config, dev)
            folder = settings.root / "prompts" / "shared" / name / own.task
            save_prompt(
                folder,
                Weights.of(model, slot),
                settings=settings.task(own.task),
                paths=own,
                prepared=one,
                backbone=backbone,
                config=config,
                best={},
                decoding=dev.decoding,
                metrics={f"dev_{one.task.metric}": dev.score},
            )
            results.append(
                Shared(
                    task=own.task,
                    metric=one.task.metric,
                    share=shares[slot],
                    dev=dev.score,
                    test=test.score,
                    prompt=str(folder.relative_to(settings.root)),
                )
            )
        write_json_atomic(
            settings.root / "results" / "shared" / f"{name}.json", [vars(one) for one in results]
        )
        checkpoint.remove()
    return results


def _chosen(settings: Settings, name: str) -> SharedPrompt:
    shared = settings.multitask.shared
    if name not in shared:
        known = ", ".join(shared) or "none yet, add {name: {tasks: [a, b]}}"
        raise ConfigError(
            f"multitask.shared: expected one of {settings.path} ({known}), got {name!r}"
        )
    chosen = shared[name]
    if not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"multitask: expected a name of a-z, 0-9, _ and -, which becomes a folder; got {name!r}"
        )
    if len(set(chosen.tasks)) < len(chosen.tasks):
        raise ConfigError(f"{_place(name)}: expected each once, got {list(chosen.tasks)}")
    for task in chosen.tasks:
        settings.task(task)
    return chosen


def _place(name: str) -> str:
    return f"multitask.shared.{name}.tasks"


def _check_alike(name: str, prepared: Sequence[Prepared]) -> None:
    """Refuse tasks whose heads answer differently, or whose tokens are not the same."""
    forms = {one.task.name: one.task.form for one in prepared}
    if len(set(forms.values())) > 1:
        found = ", ".join(f"{task} answers {form}" for task, form in forms.items())
        raise ConfigError(f"{_place(name)}: expected tasks that answer alike, got {found}")
    if len({one.tokenizer_digest for one in prepared}) > 1:
        raise PipelineError(
            f"{_place(name)}: prepared with different tokenizers; run `ptv2 prepare` of each again"
        )


def shared_model(
    backbone: Backbone, prepared: Sequence[Prepared], config: TrainConfig
) -> tuple[PromptedModel, list[Source]]:
    """Return a model with a slot a task, all with the same prompt, and what `fit_together` takes.

    Raises:
        ConfigError: The prompt is longer than the backbone's positions allow.
    """
    for one in prepared:
        check_positions(backbone, config, list(one.splits.values()))
    slots = [new_slot(backbone, one.task, config, one.splits["train"]) for one in prepared]
    prompt = slots[0][0]
    bank = PromptBank(backbone.spec.shape, [(prompt, config.prompt)] * len(slots))
    sources = [
        Source(slot=slot, task=one.task, train=one.splits["train"], dev=one.splits["dev"])
        for slot, one in enumerate(prepared)
    ]
    return PromptedModel(backbone, bank, [head for _, head in slots]), sources


def _score(
    model: PromptedModel,
    slot: int,
    prepared: Prepared,
    split: str,
    config: TrainConfig,
    dev: Evaluation | None = None,
) -> Evaluation:
    return evaluate_model(
        model,
        prepared.splits[split],
        prepared.task,
        token_budget=config.token_budget,
        slot=slot,
        decoding=None if dev is None else dev.decoding,
    )
