"""What becomes of a prompt in training, layer by layer.

Letters: L layers with a prompt, P prompt length, N key/value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ptv2_core.config import TrainConfig
from ptv2_core.evaluation.diagnosis import diagnose
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import EmbeddingPrompt
from ptv2_core.training.records import LayerRecord
from ptv2_core.training.sources import Source


class LayerWatch:
    """Records the layers of a slot's deep prompt; of another slot nothing.

    Attributes:
        start: The layers before the first step.
    """

    def __init__(self, model: PromptedModel, source: Source, config: TrainConfig) -> None:
        """Record the start.

        Args:
            model: Holds the prompt, before its first step.
            source: Its slot is watched, on rows of its dev split.
            config: Has the token budget.
        """
        self._model = model
        self._source = source
        self._token_budget = config.token_budget
        self._begin = model.bank.flatten(
            source.slot
        ).clone()  # training changes the prompt in place
        # with an MLP the prompt is no parameter, and has no gradient of its own
        prompt = model.bank.slots[source.slot]
        self._weight = prompt.weight if isinstance(prompt, EmbeddingPrompt) else None
        self._norms: list[list[float]] = []
        self.start = self._records()

    def add_gradients(self) -> None:
        """Note the norms of a step's gradient, which is there and was not clipped yet."""
        if self._weight is not None:
            assert self._weight.grad is not None, "a step has a gradient"
            norms: list[float] = self._weight.grad.flatten(1).norm(dim=1).tolist()
            self._norms.append(norms)

    def end_epoch(self) -> tuple[LayerRecord, ...]:
        """Return the layers as they are now, with the mean norms of the epoch's gradients."""
        records = self._records()
        self._norms = []
        return records

    def counters(self) -> dict[str, Any]:
        """Return what `resume` takes, as JSON holds it."""
        return {"start": [asdict(one) for one in self.start], "norms": self._norms}

    def resume(self, counters: Mapping[str, Any]) -> None:
        """Stand where another stood that began with the same prompt."""
        self.start = tuple(LayerRecord(**one) for one in counters["start"])
        self._norms = [list(norms) for norms in counters["norms"]]

    def _records(self) -> tuple[LayerRecord, ...]:
        source = self._source
        found = diagnose(self._model, source.dev, slot=source.slot, token_budget=self._token_budget)
        if not found:
            return ()
        now = self._model.bank.flatten(source.slot)
        count = len(self._norms)
        means = [sum(norms) / count for norms in zip(*self._norms, strict=True)]
        return tuple(
            LayerRecord(
                layer=figures.layer,
                attention=figures.attention,
                key_norm=figures.key_norm,
                value_norm=figures.value_norm,
                key_rank=figures.key_rank,
                value_rank=figures.value_rank,
                moved=_moved(self._begin[place], now[place]),
                gradient_norm=means[place] if means else None,
            )
            for place, figures in enumerate(found)
        )


def _moved(begin: Tensor, now: Tensor) -> float:
    """Return how far a layer's prompt `[2, N, P, D]` is from its start, as a share of its norm."""
    size = float(now.double().norm())
    return float((now.double() - begin.double()).norm()) / size if size else 0.0
