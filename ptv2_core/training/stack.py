"""A stack of trials: K slots of one bank trained in one forward.

A trial in a stack is the same trial alone, to the rounding of sums in another order: rows do not
mix, and every learner has its own order of rows, optimizer, clipping, dropout and early stop.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from ptv2_core.config import TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError, TrainingError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.checkpoint import Checkpoint
from ptv2_core.training.learner import Learner
from ptv2_core.training.records import TrainReport
from ptv2_core.training.sources import Source
from ptv2_core.training.start import Start, new_slot
from ptv2_core.training.stepping import compute_gradients, finish_step, is_memory, ran_out
from ptv2_core.training.trunk import TrunkCache


class Stack:
    """Trains as many trials at once as were started; a freed lane can be started again.

    Attributes:
        model: Lane k is its slot k.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        task: TaskSpec,
        train: EncodedSplit,
        dev: EncodedSplit,
        trunk: TrunkCache | None = None,
    ) -> None:
        """Hold no trial yet.

        Args:
            backbone: Frozen, shared by all trials.
            task: Labels and metric.
            train: Rows to learn from.
            dev: Rows that choose each trial's epoch.
            trunk: As for `fit`.
        """
        self.model = PromptedModel(backbone, PromptBank(backbone.spec.shape), [])
        self._task, self._train, self._dev, self._trunk = task, train, dev, trunk
        self._learners: dict[int, Learner] = {}
        self._checkpoints: dict[int, tuple[Checkpoint, str]] = {}
        # in one forward at most; memory decides
        self._together: int | None = None

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes that have a trial which is not done."""
        return tuple(sorted(self._learners))

    def start(
        self,
        lane: int,
        config: TrainConfig,
        *,
        start: Start | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> TrainReport | None:
        """Begin a trial in a lane that is free: a used one, or the next.

        Args:
            lane: Which.
            config: The trial's settings.
            start: What was trained before, to begin with.
            checkpoint: As for `fit`.

        Returns:
            Where a trial that has a checkpoint goes on; None of one that begins.

        Raises:
            ConfigError: The trial cannot share a forward, or its settings do not fit.
            TrainingError: The checkpoint is damaged.
        """
        assert lane not in self._learners, "the lane is free"
        assert lane <= len(self.model.bank), "lanes are opened in order"
        check_shares_forward(config)
        prompt, head = new_slot(self.model.backbone, self._task, config, self._train, start=start)
        self.model.put(lane, prompt, config.prompt, head)
        source = Source(slot=lane, task=self._task, train=self._train, dev=self._dev)
        learner = Learner(self.model, [source], config=config, trunk=self._trunk)
        resumed = None
        if checkpoint is not None:
            fingerprint = learner.fingerprint()
            snapshot = checkpoint.load(fingerprint=fingerprint)
            resumed = None if snapshot is None else learner.restore(snapshot)
            self._checkpoints[lane] = checkpoint, fingerprint
        self._learners[lane] = learner
        if learner.is_done:
            self.stop(lane)
        return resumed

    def stop(self, lane: int) -> None:
        """End a lane's trial; its slot keeps the weights of the best epoch."""
        self._learners.pop(lane).restore_best()
        self._checkpoints.pop(lane, None)

    def advance(
        self, lanes: Collection[int] | None = None
    ) -> Mapping[int, TrainReport | TrainingError]:
        """Take one step of every trial, in one forward, or in several where memory asks for that.

        Args:
            lanes: Of these alone.

        Returns:
            By lane, the trial's report, or why it cannot go on; one that is done, or cannot, has
            left its lane.
        """
        chosen = self.lanes if lanes is None else tuple(sorted(lanes))
        results: dict[int, TrainReport | TrainingError] = {}
        for group in _groups(chosen, self._together or len(chosen)):
            results |= self._step(group)
        for lane in chosen:
            if not isinstance(results[lane], TrainingError):
                results[lane] = self._kept(lane, results[lane])
            if isinstance(results[lane], TrainingError) or self._learners[lane].is_done:
                self.stop(lane)
        return results

    def _step(self, lanes: Sequence[int]) -> dict[int, TrainReport | TrainingError]:
        """Take a step of some trials together; by halves where that needs too much memory."""
        learners = [self._learners[lane] for lane in lanes]
        try:
            losses = compute_gradients(self.model, learners)
        except Exception as error:
            if not is_memory(error):
                raise
            problem = ran_out(error)
        else:
            return dict(zip(lanes, finish_step(learners, losses), strict=True))
        # only here: the exception held what the forward had made
        for learner in learners:
            learner.forget_gradients()
        if len(lanes) == 1:
            return {lanes[0]: problem}
        self._together = half = (len(lanes) + 1) // 2
        return {**self._step(lanes[:half]), **self._step(lanes[half:])}

    def _kept(self, lane: int, result: TrainReport | TrainingError) -> TrainReport | TrainingError:
        """Write the lane's checkpoint if that is due; returns why it could not be written."""
        if lane not in self._checkpoints:
            return result
        learner, (checkpoint, fingerprint) = self._learners[lane], self._checkpoints[lane]
        if learner.is_done or checkpoint.is_due(learner.step):
            try:
                checkpoint.save(learner.snapshot(), fingerprint=fingerprint, step=learner.step)
            except TrainingError as error:
                return error
        return result


def shares_forward(config: TrainConfig) -> bool:
    """Tell whether a trial with these settings can be in a stack."""
    return _why_alone(config) is None


def check_shares_forward(config: TrainConfig) -> None:
    """Refuse settings of a trial that cannot be in a stack.

    Raises:
        ConfigError: It would depend on its neighbours, or is no prompt.
    """
    why = _why_alone(config)
    if why is not None:
        raise ConfigError(why)


def _why_alone(config: TrainConfig) -> str | None:
    if config.backbone_dropout:
        return (
            "train.backbone_dropout: trials that share a forward share its draws, so a trial "
            "would depend on its neighbours; expected false, or trials one at a time"
        )
    if config.method not in ("ptv2", "probe"):
        return (
            f"train.method: trials of {config.method} cannot share a forward; expected ptv2 or "
            "probe, or trials one at a time"
        )
    return None


def _groups(lanes: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    left = iter(lanes)
    while group := tuple(islice(left, size)):
        yield group
