"""One slot in training: its order of rows, its optimizer, its best weights, its early stop.

Every draw is a function of (seed, epoch, step), so a learner does the same alone, beside others in
one forward, and after it was killed and restored.

Letters: B rows, T tokens, H hidden size.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from ptv2_core.config import TrainConfig
from ptv2_core.data.batching import Batch, collate
from ptv2_core.data.encoding import LongArray
from ptv2_core.errors import ConfigError, TrainingError
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import FormRules
from ptv2_core.evaluation.scoring import Evaluation, evaluate_model
from ptv2_core.files import source_digest
from ptv2_core.model.backbones.rounding import require_gradient
from ptv2_core.model.prompted import Part, PromptedModel
from ptv2_core.parallel import Team
from ptv2_core.training.checkpoint import Snapshot
from ptv2_core.training.optim import learning_rate_factor, make_optimizer, set_learning_rate
from ptv2_core.training.records import Best, EpochRecord, TrainReport
from ptv2_core.training.sources import Source, Step, plan_epoch
from ptv2_core.training.trunk import TrunkCache, digest_arrays
from ptv2_core.training.watch import LayerWatch

CORE = Path(__file__).parents[1]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Work:
    """A learner's share of one forward.

    Attributes:
        part: The rows, with what dropout leaves.
        batch: The same, with their labels.
        rules: Of the task's form.
        num_labels: Labels that count, of the whole batch: the loss is a mean over them.
    """

    part: Part
    batch: Batch
    rules: FormRules
    num_labels: int

    def loss(self, logits: Tensor) -> Tensor:
        """Return the mean loss of the logits."""
        return self.rules.loss(logits, self.batch) / self.num_labels


class Learner:
    """Trains one slot of a model, or several that share a prompt."""

    def __init__(
        self,
        model: PromptedModel,
        sources: Sequence[Source],
        *,
        config: TrainConfig,
        temperature: float = 1.0,
        trunk: TrunkCache | None = None,
        team: Team | None = None,
        diagnoses: bool = False,
    ) -> None:
        """Stand before the first step.

        Args:
            model: Holds the slots, which are trained in place.
            sources: What to learn from; of several, the model has no other slots.
            config: Everything else.
            temperature: Of the mixture of several sources, as for `plan_epoch`.
            trunk: Where to keep the states below the first prompt; None computes them each time.
            team: The processes among which every batch is divided; None: this one alone.
            diagnoses: Whether the start and every epoch are recorded layer by layer.

        Raises:
            BackboneError: No gradient passes through the backbone.
            ConfigError: Backbone dropout in a team, whose draws would depend on its size.
        """
        require_gradient(model.backbone.rounding)
        if team is not None and config.backbone_dropout:
            raise ConfigError(
                "train.backbone_dropout: expected false where several processes divide a batch, "
                "since the result would depend on how many they are; got true"
            )
        self.config = config
        self.step = 0
        self.epoch = 0
        self.history: list[EpochRecord] = []
        self._model = model
        self._sources = sources
        self._temperature = temperature
        self._team = team
        self._rules = [rules_of(source.task.form) for source in sources]
        depth = min(model.bank.first_layer(source.slot) for source in sources)
        # states with dropout, or of a backbone that changes, differ at each use
        is_used = depth > 0 and not config.backbone_dropout and not model.backbone.is_tuned
        splits = [split for source in sources for split in (source.train, source.dev)]
        cache = trunk if is_used and trunk and trunk.fits(model.backbone, splits) else None
        self._states = [
            (
                cache.states(model.backbone, source.train, depth) if cache else None,
                cache.states(model.backbone, source.dev, depth) if cache else None,
            )
            for source in sources
        ]
        slot = sources[0].slot if len(sources) == 1 else None
        # under the names of slot 0, so that a checkpoint goes on in any
        self._parameters = {_in_first(name, slot): p for name, p in model.trainable(slot)}
        self._optimizer = make_optimizer(self._parameters, config)
        self._best = Best(self._parameters)
        self._losses: list[float] = []
        self._place = 0
        self._watch = LayerWatch(model, sources[0], config) if diagnoses else None
        self._began = time.monotonic()
        self._batches = self._plan(0)
        self.total_steps = sum(len(self._plan(epoch)) for epoch in range(config.epochs))

    @property
    def is_done(self) -> bool:
        """Whether all epochs ran, or nothing got better for `patience` of them."""
        no_progress = self.epoch - self._best.last_progress >= self.config.patience
        return self.epoch == self.config.epochs or no_progress

    @property
    def seed(self) -> int:
        """Of the next step's dropout."""
        return _step_seed(self.config.seed, self.step)

    def next_work(self) -> Work:
        """Return the next step's rows, and set the learning rate."""
        set_learning_rate(self._optimizer, self._factor())
        step = self._batches[self._place]
        source, rules = self._sources[step.source], self._rules[step.source]
        whole = collate(source.train, source.train.rows_of(step.units))
        assert whole.labels is not None, "training rows have labels"
        prompt_keep, head_keep = self._keeps(whole, source)
        batch = whole
        if self._team is not None:
            own = self._own_rows(whole)
            batch = whole.take(own)
            head_keep = None if head_keep is None else head_keep[own]
        device = self._model.backbone.device
        moved = batch.to(device)
        states, _ = self._states[step.source]
        part = Part(
            slot=source.slot,
            input_ids=moved.input_ids,
            token_mask=moved.token_mask,
            token_type_ids=moved.token_type_ids,
            trunk=states.batch(batch.rows, batch.input_ids.shape[1]) if states else None,
            prompt_keep=None if prompt_keep is None else prompt_keep.to(device),
            head_keep=None if head_keep is None else head_keep.to(device),
            read_at=moved.read_at,
        )
        return Work(part=part, batch=moved, rules=rules, num_labels=rules.count(whole))

    def finish(self, loss: float) -> TrainReport:
        """Take the step whose gradients are there, and evaluate at the end of an epoch.

        Args:
            loss: Of the step, this process's share.

        Raises:
            TrainingError: Loss or gradient is not finite; the step is not taken.
        """
        factor = self._factor()
        loss, norm = self._gradients(loss)
        self.step += 1
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"loss {loss} and gradient norm {norm} at step {self.step} (epoch "
                f"{self.epoch + 1}) are not both finite; the step was not taken. Lower "
                f"train.learning_rate ({self.config.learning_rate:g}) or set backbone.precision "
                "to fp32."
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss)
        self._place += 1
        report = TrainReport(
            step=self.step,
            total_steps=self.total_steps,
            epoch=self.epoch + 1,
            train_loss=loss,
            learning_rate=self.config.learning_rate * factor,
            grad_norm=norm,
            history=self.history,
            start_layers=self._watch.start if self._watch else (),
        )
        return self._end_epoch(report) if self._place == len(self._batches) else report

    def forget_gradients(self) -> None:
        """Leave a step that was not taken as if it had not begun."""
        self._optimizer.zero_grad(set_to_none=True)

    def restore_best(self) -> None:
        """Give the slot the weights of the best epoch so far."""
        self._best.restore()

    # Checkpoints

    def fingerprint(self) -> str:
        """Return a digest of all that decides this training, but for how many processes run it.

        Asked for before the first step.
        """
        assert self.step == 0, "weights that were trained are no start"
        backbone = self._model.backbone
        parts = {
            "config": self.config.to_mapping(),
            "temperature": self._temperature,
            "tasks": [source.task.to_mapping() for source in self._sources],
            "data": [
                digest_arrays(*vars(split).values())
                for source in self._sources
                for split in (source.train, source.dev)
            ],
            # a start may have been trained before
            "start": digest_arrays(*(p.detach().cpu().numpy() for p in self._parameters.values())),
            "backbone": [backbone.answering_digest, backbone.device.type],
            # cached states differ in their last bits from those of a batch
            "trunk": [one is not None for states in self._states for one in states],
            "diagnoses": self._watch is not None,
            "versions": [torch.__version__, transformers.__version__, source_digest(CORE)],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def snapshot(self) -> Snapshot:
        """Return everything that the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"weight/{name}"] = parameter
            for moment in MOMENTS:
                tensors[f"{moment}/{name}"] = self._optimizer.state[parameter][moment]
        tensors |= {f"best/{name}": weight for name, weight in self._best.weights.items()}
        counters = {
            "step": self.step,
            "epoch": self.epoch,
            "place": self._place,
            "losses": self._losses,
            "history": [asdict(record) for record in self.history],
            "best": self._best.counters(),
            "seconds": time.monotonic() - self._began,
            "watch": self._watch.counters() if self._watch else None,
        }
        return Snapshot(tensors=tensors, counters=counters)

    def restore(self, snapshot: Snapshot) -> TrainReport:
        """Stand where the learner stood that the snapshot was taken from."""
        counters, tensors = snapshot.counters, snapshot.tensors
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight/{name}"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(counters["step"])),
                **{m: tensors[f"{m}/{name}"].to(parameter.device) for m in MOMENTS},
            }
        best = {
            name: tensors[f"best/{name}"] for name in self._parameters if f"best/{name}" in tensors
        }
        self._best.resume(best, counters["best"])
        self.step, self.epoch = counters["step"], counters["epoch"]
        self._began = time.monotonic() - counters["seconds"]
        self._place, self._losses = counters["place"], list(counters["losses"])
        self.history = [EpochRecord.from_mapping(record) for record in counters["history"]]
        if self._watch is not None:
            self._watch.resume(counters["watch"])
        self._batches = self._plan(self.epoch) if self.epoch < self.config.epochs else []
        return TrainReport(
            step=self.step,
            total_steps=self.total_steps,
            epoch=min(self.epoch + 1, self.config.epochs),
            train_loss=self._losses[-1] if self._losses else self.history[-1].train_loss,
            learning_rate=self.config.learning_rate * self._factor(),
            grad_norm=0.0,
            history=self.history,
            is_resumed=True,
            start_layers=self._watch.start if self._watch else (),
        )

    # Steps

    def _plan(self, epoch: int) -> list[Step]:
        return plan_epoch(self._sources, self.config, epoch, temperature=self._temperature)

    def _own_rows(self, batch: Batch) -> LongArray:
        """Return the places of this process's rows in a batch; options stay together."""
        assert self._team is not None, "asked in a team alone"
        places = np.arange(len(batch.rows))
        dealt = places if batch.groups is None else batch.groups.numpy()
        own: LongArray = places[dealt % self._team.size == self._team.rank]
        return own

    def _factor(self) -> float:
        return learning_rate_factor(
            self.step,
            total_steps=self.total_steps,
            warmup_fraction=self.config.warmup_fraction,
        )

    def _keeps(self, batch: Batch, source: Source) -> tuple[Tensor | None, Tensor | None]:
        """Return what dropout leaves of the prompt and of what the head reads.

        Drawn for the whole batch at its own width: what other learners or processes do beside
        this one changes nothing.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def keep(share: float, *size: int) -> Tensor | None:
            if share == 0.0:
                return None
            return (torch.rand(size, generator=generator) >= share).float() / (1.0 - share)

        spec, prompt = self._model.backbone.spec, self.config.prompt
        shape = spec.shape
        sizes: dict[str, tuple[int, ...]] = {
            "ptv2": (
                len(self._model.bank.layers(source.slot)), 2, shape.num_heads, prompt.length,
                shape.head_size,
            ),
            "prompt_tuning": (prompt.length, spec.hidden_size),
        }  # fmt: skip
        size = sizes.get(self.config.method)
        prompt_keep = None if size is None else keep(prompt.dropout, *size)
        rows, width = batch.input_ids.shape
        read = (rows, width) if source.task.form in ("tokens", "spans") else (rows,)
        return prompt_keep, keep(self.config.head.dropout, *read, spec.hidden_size)

    def _gradients(self, loss: float) -> tuple[float, float]:
        """Sum loss and gradients over the team, clip, and return the loss and the norm before."""
        parameters = list(self._parameters.values())
        gradients = []
        for parameter in parameters:
            if parameter.grad is None:  # a process without rows in this batch
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        if self._team is not None:
            shared = torch.tensor([loss], dtype=torch.float64, device=gradients[0].device)
            self._team.sum([*gradients, shared])
            loss = float(shared)
        if self._watch is not None:
            self._watch.add_gradients()
        return loss, float(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm))

    def _evaluate(self) -> Evaluation:
        found = {
            source.task.name: evaluate_model(
                self._model,
                source.dev,
                source.task,
                token_budget=self.config.token_budget,
                slot=source.slot,
                trunk_of=states.batch if states else None,
                team=self._team,
            )
            for source, (_, states) in zip(self._sources, self._states, strict=True)
        }
        return together(found) if len(found) > 1 else next(iter(found.values()))

    def _end_epoch(self, report: TrainReport) -> TrainReport:
        evaluation = self._evaluate()
        self.epoch += 1
        is_best = self._best.offer(evaluation, self.epoch)
        record = EpochRecord(
            epoch=self.epoch,
            train_loss=float(np.mean(self._losses)),
            dev_loss=evaluation.loss,
            dev_score=evaluation.score,
            learning_rate=report.learning_rate,
            is_best=is_best,
            seconds=time.monotonic() - self._began,
            layers=self._watch.end_epoch() if self._watch else (),
        )
        self.history = [*self.history, record]
        self._losses, self._place = [], 0
        self._batches = self._plan(self.epoch) if self.epoch < self.config.epochs else []
        return TrainReport(
            step=report.step,
            total_steps=report.total_steps,
            epoch=report.epoch,
            train_loss=record.train_loss,
            learning_rate=report.learning_rate,
            grad_norm=report.grad_norm,
            history=self.history,
            evaluation=evaluation,
            is_best=is_best,
            start_layers=report.start_layers,
        )


def together(evaluations: Mapping[str, Evaluation]) -> Evaluation:
    """Return the mean of several tasks' scores and losses; their answers are left out."""
    count = len(evaluations)
    return Evaluation(
        score=sum(one.score for one in evaluations.values()) / count,
        loss=sum(one.loss for one in evaluations.values()) / count,
        metrics={
            f"{task}/{name}": value
            for task, one in evaluations.items()
            for name, value in one.metrics.items()
        },
        predictions=(),
        decoding={},
    )


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step + 1]).generate_state(1, np.uint64)[0] >> 1)


def _in_first(name: str, slot: int | None) -> str:
    """Return what the parameter of a slot is called in slot 0."""
    for owner in ("bank.slots.", "heads."):
        if slot is not None and name.startswith(f"{owner}{slot}."):
            return f"{owner}0.{name.removeprefix(f'{owner}{slot}.')}"
    return name
