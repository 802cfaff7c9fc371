"""fit(): the training loop as a generator; the caller owns every side effect but checkpoints."""

from collections.abc import Iterator, Sequence

from ptv2_core.config import TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import TrainingError
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.learner import Learner
from ptv2_core.training.records import TrainReport
from ptv2_core.training.sources import Source
from ptv2_core.training.stepping import take_step
from ptv2_core.training.trunk import TrunkCache


def fit(
    model: PromptedModel,
    *,
    task: TaskSpec,
    train: EncodedSplit,
    dev: EncodedSplit,
    config: TrainConfig,
    trunk: TrunkCache | None = None,
    checkpoint: Checkpoint | None = None,
    team: Team | None = None,
    diagnoses: bool = False,
) -> Iterator[TrainReport]:
    """Train slot 0 of a model on one data set; see `fit_together`, whose case of one this is."""
    source = Source(slot=0, task=task, train=train, dev=dev)
    return fit_together(
        model,
        [source],
        config=config,
        trunk=trunk,
        checkpoint=checkpoint,
        team=team,
        diagnoses=diagnoses,
    )


def fit_together(
    model: PromptedModel,
    sources: Sequence[Source],
    *,
    config: TrainConfig,
    temperature: float = 1.0,
    trunk: TrunkCache | None = None,
    checkpoint: Checkpoint | None = None,
    team: Team | None = None,
    diagnoses: bool = False,
) -> Iterator[TrainReport]:
    """Train a model on data sets that share a prompt (paper, MPT-2).

    However the iteration ends, the model is left with the weights of the best epoch so far. Of
    several data sets the best is that of the mean score.

    Args:
        model: Its prompt and heads are trained in place.
        sources: The data sets, one or more.
        config: Everything else.
        temperature: Of the mixture, as for `plan_epoch`.
        trunk: Where to keep the states below the first prompt; None computes them each time.
        checkpoint: Where to go on from, and to write; the caller removes it when the result is
            safe. None: a killed training starts again.
        team: The processes among which every batch is divided; the first of them writes the
            checkpoint. None: this one alone.
        diagnoses: Whether the start and every epoch are recorded layer by layer; of several data
            sets, on the dev rows of the first.

    Yields:
        A report a step; of a training that goes on from a checkpoint, first the place where.

    Raises:
        ConfigError: A team cannot train with these settings.
        TrainingError: The loss is not finite, and the step that would spread it is not taken; or
            the checkpoint is damaged, or cannot be written.
    """
    learner = Learner(
        model,
        sources,
        config=config,
        temperature=temperature,
        trunk=trunk,
        team=team,
        diagnoses=diagnoses,
    )
    fingerprint = learner.fingerprint() if checkpoint else ""
    writer = checkpoint if team is None or team.rank == 0 else None
    try:
        if checkpoint is not None:
            snapshot = checkpoint.load(fingerprint=fingerprint)
            if team is not None:
                team.wait()  # nobody writes before all have read
            if snapshot is not None:
                yield learner.restore(snapshot)
        while not learner.is_done:
            (result,) = take_step(model, [learner])
            if isinstance(result, TrainingError):
                raise result
            if writer is not None and (learner.is_done or writer.is_due(learner.step)):
                writer.save(learner.snapshot(), fingerprint=fingerprint, step=learner.step)
            yield result
    finally:
        learner.restore_best()
