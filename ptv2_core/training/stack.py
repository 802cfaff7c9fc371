"""A stack of trials: K slots of one bank trained in one forward.

A trial in a stack is the same trial alone, to the rounding of sums in another order: rows do not
mix, and every learner has its own order of rows, optimizer, clipping, dropout and early stop.
"""

from collections.abc import Mapping

from ptv2_core.config import TrainConfig
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError, TrainingError
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import PromptBank
from ptv2_core.training.learner import Learner, take_step
from ptv2_core.training.records import TrainReport
from ptv2_core.training.sources import Source
from ptv2_core.training.start import new_slot
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

    @property
    def lanes(self) -> tuple[int, ...]:
        """The lanes that have a trial which is not done."""
        return tuple(sorted(self._learners))

    def start(self, lane: int, config: TrainConfig) -> None:
        """Begin a trial in a lane that is free: a used one, or the next.

        Raises:
            ConfigError: The trial cannot share a forward, or its settings do not fit.
        """
        assert lane not in self._learners, "the lane is free"
        assert lane <= len(self.model.bank), "lanes are opened in order"
        if config.backbone_dropout:
            raise ConfigError(
                "train.backbone_dropout: trials that share a forward share its draws, so a trial "
                "would depend on its neighbours; expected false, or trials one at a time"
            )
        if config.method not in ("ptv2", "probe"):
            raise ConfigError(
                f"train.method: trials of {config.method} cannot share a forward; expected ptv2 or "
                "probe, or trials one at a time"
            )
        prompt, head = new_slot(self.model.backbone, self._task, config, self._train)
        self.model.put(lane, prompt, config.prompt, head)
        source = Source(slot=lane, task=self._task, train=self._train, dev=self._dev)
        self._learners[lane] = Learner(self.model, [source], config=config, trunk=self._trunk)

    def stop(self, lane: int) -> None:
        """End a lane's trial; its slot keeps the weights of the best epoch."""
        self._learners.pop(lane).restore_best()

    def advance(self) -> Mapping[int, TrainReport | TrainingError]:
        """Take one step of every trial.

        Returns:
            By lane, the trial's report, or why it cannot go on; one that is done, or cannot, has
            left its lane.
        """
        lanes = self.lanes
        results = dict(
            zip(lanes, take_step(self.model, [self._learners[k] for k in lanes]), strict=True)
        )
        for lane, result in results.items():
            if isinstance(result, TrainingError) or self._learners[lane].is_done:
                self.stop(lane)
        return results
