"""Answer raw inputs with a trained prompt.

Letters: T tokens, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptv2_core.artifact import load_manifest, load_weights, restore_model
from ptv2_core.config import Device, Precision
from ptv2_core.data.batching import collate, sorted_batches
from ptv2_core.data.encoding import EncodedSplit, encode_examples
from ptv2_core.data.examples import Example, OptionsExample, TokensExample
from ptv2_core.data.tasks import Form, TaskSpec
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.forms import rules_of
from ptv2_core.evaluation.forms.base import Decoding, Outcomes
from ptv2_core.evaluation.forms.spans import ranked
from ptv2_core.evaluation.inputs import examples_of_inputs
from ptv2_core.evaluation.metrics import spans
from ptv2_core.evaluation.scoring import EVALUATION_ROWS, logits_of_batch
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import load_tokenizer, locate
from ptv2_core.model.prompted import PromptedModel

TOKEN_BUDGET = 8192
# fp32 sums differ in their last bits between machines; logits are of the order of 1 to 10
GOLDEN_TOLERANCE = 1e-2
# how many of an answer's rivals a prediction shows
NUM_SHOWN = 5


class Predictor:
    """One trained prompt on its backbone."""

    def __init__(
        self,
        model: PromptedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskSpec,
        *,
        max_length: int,
        stride: int = 0,
        decoding: Decoding | None = None,
        golden: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Answer with slot 0 of a model.

        Args:
            model: Holds prompt and head.
            tokenizer: The backbone's.
            task: What it answers.
            max_length: Tokens of a row at most.
            stride: Tokens that two windows of a long context share.
            decoding: Settings of an answer that dev chose; None: none.
            golden: Inputs with their logits, for `verify_golden`.
        """
        self.model = model
        self.task = task
        self._tokenizer = tokenizer
        # training checked its own rows; a longer input must not pass the backbone's positions
        room = model.backbone.position_limit - model.bank.shift(0)
        self._max_length = min(max_length, room)
        self._stride = stride
        self._decoding = decoding or {}
        self._golden = golden

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        backbone_name: str | None = None,
        device: Device = "auto",
        precision: Precision = "auto",
    ) -> "Predictor":
        """Load an artifact and the backbone it names.

        Args:
            directory: Holds `prompt.safetensors` and `prompt.json`.
            backbone_name: A name or folder to take the backbone from instead; its digest must be
                the one that the artifact names.
            device: Where to answer.
            precision: Number format of the frozen weights.

        Raises:
            ArtifactError: The artifact is damaged, or made for another tokenizer.
            BackboneError: The backbone is not there or is another one.
        """
        manifest = load_manifest(directory)
        name = backbone_name or manifest.backbone["name"]
        revision = None if backbone_name else manifest.backbone.get("revision")
        location = locate(name, revision)
        found = location.tokenizer_digest()
        if found != manifest.tokenizer_digest:
            raise ArtifactError(
                f"{directory}: expected tokenizer {manifest.tokenizer_digest}, got {found} in "
                f"{location.folder}; use the backbone's own tokenizer files"
            )
        is_tuned = manifest.method == "finetune"
        backbone = load_backbone(
            name,
            revision,
            digest=manifest.backbone["digest"],
            device=device,
            precision=precision,
            packs=not is_tuned,
            tunable=is_tuned,
            language_model=manifest.head.type == "verbalizer",
        )
        weights = load_weights(directory, manifest)
        model = restore_model(backbone, [(manifest.task, manifest.prompt, manifest.head, weights)])
        return cls(
            model,
            load_tokenizer(location, words=manifest.task.form == "tokens"),
            manifest.task,
            max_length=manifest.encoding["max_length"],
            stride=manifest.encoding.get("stride", 0),
            decoding=manifest.decoding,
            golden=manifest.golden,
        )

    def logits(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return each input's logits on the CPU.

        These are `[C]` of a row, `[1]` of a number, `[options]` of a choice, `[words, C]` of the
        words it read, `[T, 2]` of the first window of a context. A word beyond the maximal
        length, or one that the tokenizer drops, has no row.

        Raises:
            DataError: An input lacks what its kind needs.
        """
        run = self._run(examples_of_inputs(inputs, self.task))
        return [run.logits_of(place) for place in range(len(inputs))]

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer inputs, in their order.

        Args:
            inputs: As for `examples_of_inputs`.

        Returns:
            For classes `label` and `probabilities` by label; for a number `value`; for options
            `choice`, the chosen one's number, its `text`, all `options` and their `probabilities`;
            for words `tokens`, `tags` and `spans` with type, start, end and text; for a question
            `text`, `start` and `end` in characters (None without an answer), `score`, which is
            the answer's probability among the `n_best`.

        Raises:
            DataError: An input lacks what its kind needs.
        """
        examples = examples_of_inputs(inputs, self.task)
        return ANSWERS[self.task.form](self._run(examples), self._decoding)

    def verify_golden(self) -> None:
        """Run the artifact's golden inputs.

        Raises:
            ArtifactError: A logit differs from the stored one.
        """
        for place, example in enumerate(self._golden, start=1):
            expected = torch.tensor(example["logits"])
            (got,) = self.logits([example["input"]])
            if got.shape != expected.shape or not torch.allclose(
                got, expected, atol=GOLDEN_TOLERANCE, rtol=GOLDEN_TOLERANCE
            ):
                raise ArtifactError(
                    f"golden input {place}: expected logits {_short(expected)}, got {_short(got)}; "
                    "this backbone, or this version of torch or transformers, computes something "
                    "else than the one the prompt was trained with"
                )

    @torch.no_grad()
    def _run(self, examples: Sequence[Example]) -> "_Run":
        """Return what the model gives for examples."""
        split, _ = encode_examples(
            examples,
            self._tokenizer,
            task=self.task,
            max_length=self._max_length,
            stride=self._stride,
            with_labels=False,
        )
        rules = rules_of(self.task.form)
        offsets = rules.outcome_offsets(split)
        outcomes = np.zeros(offsets[-1], dtype=np.float64)
        kept: dict[int, Tensor] = {}
        for units in sorted_batches(
            split.unit_lengths, batch_size=EVALUATION_ROWS, token_budget=TOKEN_BUDGET
        ):
            batch = collate(split, split.rows_of(units))
            logits = logits_of_batch(self.model, batch).cpu()
            found = rules.outcomes(logits, batch, split)
            for place, row in enumerate(batch.rows.tolist()):
                outcomes[offsets[row] : offsets[row + 1]] = found[place]
                kept[row] = logits[place]
                if self.task.form == "tokens":
                    kept[row] = kept[row][batch.word_index[place] >= 0]  # [T, C] -> [words, C]
                elif self.task.form == "spans":
                    kept[row] = kept[row][: split.lengths[row]]
        logits_by_row = [kept[row] for row in range(len(split))]
        return _Run(
            examples=examples, split=split, task=self.task, logits=logits_by_row, outcomes=outcomes
        )


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What a model gives for some examples.

    Attributes:
        examples: One for each input.
        split: Their rows.
        task: Theirs.
        logits: Of each row, without padding.
        outcomes: Of all rows, as the form's rules keep them.
    """

    examples: Sequence[Example]
    split: EncodedSplit
    task: TaskSpec
    logits: Sequence[Tensor]
    outcomes: Outcomes

    def answers(self, decoding: Decoding) -> Sequence[Any]:
        """Return the answers in the form of predictions."""
        rules = rules_of(self.task.form)
        return rules.predictions(self.outcomes, self.split, self.task, decoding)

    def logits_of(self, place: int) -> Tensor:
        """Return the logits of an input, see `Predictor.logits`."""
        if self.task.form == "options":
            edges = self.split.units
            return torch.cat(list(self.logits[edges[place] : edges[place + 1]]))
        if self.task.form == "spans":
            return self.logits[int(np.searchsorted(self.split.groups, place))]
        return self.logits[place]


def _labels(run: _Run, decoding: Decoding) -> list[dict[str, Any]]:
    found = []
    for answer, logits in zip(run.answers(decoding), run.logits, strict=True):
        shares = logits.softmax(dim=-1).tolist()
        probabilities = dict(zip(run.task.labels, shares, strict=True))
        found.append({"label": answer, "probabilities": probabilities})
    return found


def _values(run: _Run, decoding: Decoding) -> list[dict[str, Any]]:
    return [{"value": value} for value in run.answers(decoding)]


def _choices(run: _Run, decoding: Decoding) -> list[dict[str, Any]]:
    found = []
    for place, example in enumerate(run.examples):
        assert isinstance(example, OptionsExample), "a task of options has nothing else"
        logits = run.logits_of(place)
        # the first of equal ones, as in scoring
        best = int(np.argmax(logits.numpy()))
        found.append(
            {
                "choice": best,
                "text": example.names[best],
                "options": list(example.names),
                "probabilities": logits.softmax(dim=-1).tolist(),
            }
        )
    return found


def _tags(run: _Run, decoding: Decoding) -> list[dict[str, Any]]:
    found = []
    for example, tags in zip(run.examples, run.answers(decoding), strict=True):
        assert isinstance(example, TokensExample), "a task of words has nothing else"
        named = [
            {
                "type": span.type,
                "start": span.start,
                "end": span.end,
                "text": " ".join(example.tokens[span.start : span.end]),
            }
            for span in spans(tags)
        ]
        found.append({"tokens": list(example.tokens), "tags": list(tags), "spans": named})
    return found


def _texts(run: _Run, decoding: Decoding) -> list[dict[str, Any]]:
    found = []
    for guesses in ranked(run.outcomes, run.split, decoding):
        scores = torch.tensor([guess.score for guess in guesses], dtype=torch.float64)
        # a context without tokens has one guess of no score
        shares = scores.softmax(dim=0).nan_to_num(nan=1.0).tolist()
        n_best = [
            {
                "text": guess.text,
                "start": guess.start if guess.text else None,
                "end": guess.end if guess.text else None,
                "score": share,
            }
            for guess, share in zip(guesses, shares, strict=True)
        ]
        found.append({**n_best[0], "n_best": n_best[:NUM_SHOWN]})
    return found


ANSWERS: Mapping[Form, Callable[[_Run, Decoding], list[dict[str, Any]]]] = {
    "rows": _labels,
    "values": _values,
    "options": _choices,
    "tokens": _tags,
    "spans": _texts,
}


def _short(logits: Tensor) -> str:
    values = logits.flatten().tolist()[:6]
    return "[" + ", ".join(f"{value:.4f}" for value in values) + ", ...]"
