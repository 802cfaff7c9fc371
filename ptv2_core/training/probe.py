"""The bare-backbone probe: what a linear layer alone reads out of the frozen states.

Letters: N rows or tagged words, H hidden size, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ptv2_core.data.batching import IGNORED, Batch, collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ConfigError
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import FormRules
from ptv2_core.evaluation.scoring import EVALUATION_ROWS, Evaluation, evaluate
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
    """Fit a linear layer on the bare backbone's states by L-BFGS.

    It minimises the loss of the task's form: for classes this is multinomial logistic regression.

    Args:
        model: Only its backbone is used.
        task: Labels and metric.
        splits: Train, dev and test.
        reads: What the tuned head reads, so that the two compare.
        token_budget: Padded tokens of a batch at most.

    Raises:
        ConfigError: The task answers with stretches of a context, whose loss needs the states of
            all tokens at once.
    """
    if task.form == "spans":
        raise ConfigError(
            f"task {task.name}: a probe is fitted to rows, options or tagged words; expected a "
            f"kind of these, got {task.kind}; leave the probe out, or train a head alone"
        )
    train, dev, test = splits
    features, targets = _features(model, train, task, reads, token_budget)
    mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
    # states of tagged words are rows by now
    rules = rules_of("rows" if task.form == "tokens" else task.form)
    best: tuple[Evaluation, nn.Linear, float] | None = None
    for penalty in PENALTIES:
        linear = nn.Linear(features.shape[1], task.num_outputs).to(features.device)
        _fit(linear, (features - mean) / spread, targets, rules, penalty)
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
    encoded = model.encode(
        moved.input_ids,
        moved.token_mask,
        moved.token_type_ids,
        slots=NO_SLOT,
        read_at=moved.read_at if reads == "mask" else None,
    )
    return read(encoded, reads)


def _features(
    model: PromptedModel, split: EncodedSplit, task: TaskSpec, reads: Reading, token_budget: int
) -> tuple[Tensor, Batch]:
    """Return states `[N, H]`, and a batch of nothing but their labels and groups."""
    states: list[Tensor] = []
    labels: list[Tensor] = []
    groups: list[Tensor] = []
    for units in sorted_batches(
        split.unit_lengths, batch_size=EVALUATION_ROWS, token_budget=token_budget
    ):
        batch = collate(split, split.rows_of(units))
        assert batch.labels is not None, "training rows have labels"
        found = _states(model, batch, reads).flatten(0, -2)
        flat = batch.labels.flatten().to(found.device)
        is_used = flat != IGNORED if task.form == "tokens" else torch.ones_like(flat).bool()
        states.append(found[is_used])
        labels.append(flat[is_used])
        if batch.groups is not None:
            groups.append(torch.from_numpy(split.groups[batch.rows]).to(found.device))
    features = torch.cat(states)
    nothing = torch.zeros(len(features), 0, dtype=torch.long)
    targets = Batch(
        rows=np.arange(len(features)),
        input_ids=nothing,
        token_mask=nothing.bool(),
        token_type_ids=None,
        labels=torch.cat(labels),
        word_index=nothing,
        groups=torch.cat(groups) if groups else None,
    )
    return features, targets


def _fit(
    linear: nn.Linear, features: Tensor, targets: Batch, rules: FormRules, penalty: float
) -> None:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe"
    )
    count = rules.count(targets)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = rules.loss(linear(features), targets) / count
        loss = loss + penalty * linear.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


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
