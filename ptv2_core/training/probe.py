"""The bare-backbone probe: what a linear layer alone reads out of the frozen states.

Letters: H hidden size, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptv2_core.data.batching import Batch, collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.evaluation.scoring import EVALUATION_ROWS, Evaluation, cross_entropy, evaluate
from ptv2_core.model.heads import Reading, read
from ptv2_core.model.prompted import PromptedModel
from ptv2_core.model.prompts import NO_SLOT

# strengths of the L2 penalty that dev chooses from
PENALTIES = (1e-5, 1e-4, 1e-3)
ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """A linear probe's evaluations.

    Attributes:
        dev: On the rows that chose the penalty.
        test: On the held-out rows.
        penalty: The chosen L2 strength.
    """

    dev: Evaluation
    test: Evaluation
    penalty: float


def probe(
    model: PromptedModel,
    *,
    task: TaskSpec,
    splits: Sequence[EncodedSplit],
    reads: Reading,
    token_budget: int,
) -> ProbeResult:
    """Fit multinomial logistic regression on the bare backbone's states by L-BFGS.

    Args:
        model: Only its backbone is used.
        task: Labels and metric.
        splits: Train, dev and test.
        reads: What the tuned head reads, so that the two compare.
        token_budget: Padded tokens of a batch at most.
    """
    train, dev, test = splits
    features, labels = _features(model, train, reads, token_budget)
    mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
    best: tuple[Evaluation, nn.Linear, float] | None = None
    for penalty in PENALTIES:
        linear = _fit_linear((features - mean) / spread, labels, len(task.labels), penalty)
        evaluation = _evaluate(model, dev, task, reads, token_budget, linear, mean, spread)
        if best is None or evaluation.score > best[0].score:
            best = (evaluation, linear, penalty)
    assert best is not None, "there are penalties to try"
    result = _evaluate(model, test, task, reads, token_budget, best[1], mean, spread)
    return ProbeResult(dev=best[0], test=result, penalty=best[2])


@torch.no_grad()
def _states(model: PromptedModel, batch: Batch, reads: Reading) -> Tensor:
    model.eval()
    moved = batch.to(model.backbone.device)
    encoded = model.encode(moved.input_ids, moved.token_mask, moved.token_type_ids, slots=NO_SLOT)
    return read(encoded, reads)


def _features(
    model: PromptedModel, split: EncodedSplit, reads: Reading, token_budget: int
) -> tuple[Tensor, Tensor]:
    """Return states `[rows or tagged tokens, H]` and their labels."""
    states: list[Tensor] = []
    labels: list[Tensor] = []
    for rows in sorted_batches(
        split.lengths, batch_size=EVALUATION_ROWS, token_budget=token_budget
    ):
        batch = collate(split, rows)
        assert batch.labels is not None, "training rows have labels"
        found = _states(model, batch, reads).flatten(0, -2)
        flat = batch.labels.flatten().to(found.device)
        states.append(found[flat >= 0])
        labels.append(flat[flat >= 0])
    return torch.cat(states), torch.cat(labels)


def _fit_linear(features: Tensor, labels: Tensor, num_classes: int, penalty: float) -> nn.Linear:
    linear = nn.Linear(features.shape[1], num_classes).to(features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(linear(features), labels) + penalty * linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return linear


def _evaluate(
    model: PromptedModel,
    split: EncodedSplit,
    task: TaskSpec,
    reads: Reading,
    token_budget: int,
    linear: nn.Linear,
    mean: Tensor,
    spread: Tensor,
) -> Evaluation:
    def logits_of(batch: Batch) -> Tensor:
        logits: Tensor = linear((_states(model, batch, reads) - mean) / spread)
        return logits

    return evaluate(logits_of, split, task, token_budget=token_budget)
