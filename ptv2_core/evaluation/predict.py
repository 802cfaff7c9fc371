"""Answer raw inputs with a trained prompt.

Letters: T tokens, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptv2_core.artifact import load_manifest, load_weights, restore_model
from ptv2_core.config import Device, Precision
from ptv2_core.data.batching import collate, sorted_batches
from ptv2_core.data.encoding import encode_examples
from ptv2_core.data.examples import Example, TextExample, TokensExample
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError, DataError
from ptv2_core.evaluation.metrics import spans
from ptv2_core.evaluation.scoring import EVALUATION_ROWS, decode
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import load_tokenizer, locate
from ptv2_core.model.prompted import PromptedModel

TOKEN_BUDGET = 8192
# fp32 sums differ in their last bits between machines; logits are of the order of 1 to 10
GOLDEN_TOLERANCE = 1e-2


class Predictor:
    """One trained prompt on its backbone."""

    def __init__(
        self,
        model: PromptedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: TaskSpec,
        *,
        max_length: int,
        golden: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Answer with slot 0 of a model."""
        self.model = model
        self.task = task
        self._tokenizer = tokenizer
        # training checked its own rows; a longer input must not pass the backbone's positions
        room = model.backbone.position_limit - model.bank.shift(0)
        self._max_length = min(max_length, room)
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
        backbone = load_backbone(
            name,
            revision,
            digest=manifest.backbone["digest"],
            device=device,
            precision=precision,
        )
        weights = load_weights(directory, manifest)
        model = restore_model(backbone, [(manifest.task, manifest.prompt, manifest.head, weights)])
        return cls(
            model,
            load_tokenizer(location, words=manifest.task.kind == "tagging"),
            manifest.task,
            max_length=manifest.encoding["max_length"],
            golden=manifest.golden,
        )

    def logits(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return each input's logits on the CPU: `[C]`, or `[words, C]` of the words it read.

        A word beyond the maximal length, or one that the tokenizer drops, has no row.

        Raises:
            DataError: An input lacks a text or tokens.
        """
        examples = [self._example(place, values) for place, values in enumerate(inputs, start=1)]
        return [logits for _, logits in self._run(examples)]

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answer inputs, in their order.

        Args:
            inputs: `{"text": ...}` with `text_pair` for pairs; for tagging `{"tokens": [...]}`, or
                a `text` that is split on white space.

        Returns:
            For classification `label` and `probabilities` by label; for tagging `tokens`, `tags`
            and `spans` with type, start, end and text.

        Raises:
            DataError: An input lacks a text or tokens.
        """
        examples = [self._example(place, values) for place, values in enumerate(inputs, start=1)]
        return [
            self._answer(example, answer, logits)
            for example, (answer, logits) in zip(examples, self._run(examples), strict=True)
        ]

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

    def _example(self, place: int, values: Mapping[str, Any]) -> Example:
        where = f"input {place}"
        text, tokens = values.get("text"), values.get("tokens")
        if self.task.kind == "tagging":
            words = tuple(tokens) if isinstance(tokens, list) else tuple(str(text or "").split())
            if not words or not all(isinstance(word, str) and word.strip() for word in words):
                raise DataError(
                    f"{where}: expected `tokens` (texts) or a `text`, got {values!r:.80}"
                )
            _check_encodable(where, *words)
            return TokensExample(tokens=words, tags=None, where=where)
        pair = values.get("text_pair")
        needs_pair = "text_pair" in self.task.fields
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: expected a `text`, got {values!r:.80}")
        _check_encodable(where, text, pair)
        if needs_pair and (not isinstance(pair, str) or not pair.strip()):
            raise DataError(
                f"{where}: task {self.task.name} also needs a `text_pair`, got {pair!r:.80}"
            )
        return TextExample(
            text=text, text_pair=pair if needs_pair else None, label=None, where=where
        )

    @torch.no_grad()
    def _run(self, examples: Sequence[Example]) -> list[tuple[str | list[str], Tensor]]:
        """Return each example's answer and logits, in order."""
        if not examples:
            return []
        split, _ = encode_examples(
            examples, self._tokenizer, labels=None, max_length=self._max_length
        )
        results: dict[int, tuple[str | list[str], Tensor]] = {}
        for rows in sorted_batches(
            split.lengths, batch_size=EVALUATION_ROWS, token_budget=TOKEN_BUDGET
        ):
            batch = collate(split, rows)
            moved = batch.to(self.model.backbone.device)
            logits = self.model(moved.input_ids, moved.token_mask, moved.token_type_ids).cpu()
            answers = decode(logits, batch, split, self.task)
            for place, row in enumerate(rows.tolist()):
                kept = logits[place]
                if self.task.kind == "tagging":
                    kept = kept[batch.word_index[place] >= 0]  # [T, C] -> [words, C]
                results[row] = (answers[place], kept)
        return [results[row] for row in range(len(examples))]

    def _answer(self, example: Example, answer: str | list[str], logits: Tensor) -> dict[str, Any]:
        if isinstance(example, TokensExample):
            found = [
                {
                    "type": span.type,
                    "start": span.start,
                    "end": span.end,
                    "text": " ".join(example.tokens[span.start : span.end]),
                }
                for span in spans(answer)
            ]
            return {"tokens": list(example.tokens), "tags": list(answer), "spans": found}
        shares = logits.softmax(dim=-1).tolist()
        probabilities = dict(zip(self.task.labels, shares, strict=True))
        return {"label": answer, "probabilities": probabilities}


def _check_encodable(where: str, *texts: object) -> None:
    """Refuse half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    for text in texts:
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{where}: character {error.start + 1} of {text!r:.60} is half a surrogate "
                    "pair, which is not valid text; mend what wrote it"
                ) from error


def _short(logits: Tensor) -> str:
    values = logits.flatten().tolist()[:6]
    return "[" + ", ".join(f"{value:.4f}" for value in values) + ", ...]"
