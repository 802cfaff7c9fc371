"""Answer raw inputs with a trained prompt.

Letters: T tokens, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptv2_core.artifact import load_weights, restore_model
from ptv2_core.config import Device, Precision
from ptv2_core.data.batching import collate, sorted_batches
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.codec import Asked, Codec
from ptv2_core.evaluation.forms.base import Decoding
from ptv2_core.evaluation.scoring import EVALUATION_ROWS, logits_of_batch
from ptv2_core.manifest import Manifest, load_manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
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
        stride: int = 0,
        decoding: Decoding | None = None,
        golden: Sequence[Mapping[str, Any]] = (),
        token_types: bool = True,
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
            token_types: As for `Codec`.
        """
        self.model = model
        self.task = task
        # training checked its own rows; a longer input must not pass the backbone's positions
        room = model.backbone.position_limit - model.bank.shift(0)
        self.codec = Codec(
            tokenizer,
            task,
            max_length=min(max_length, room),
            stride=stride,
            decoding=decoding,
            token_types=token_types,
        )
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
        tokenizer = load_tokenizer(location, words=manifest.task.form == "tokens")
        return cls.of(directory, manifest, backbone, tokenizer)

    @classmethod
    def of(
        cls,
        directory: Path,
        manifest: Manifest,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
    ) -> "Predictor":
        """Load an artifact onto a backbone that is there already.

        Args:
            directory: Holds both files.
            manifest: What `load_manifest` returned for it.
            backbone: The one that it names; it is shared, and not changed.
            tokenizer: The backbone's, for words where the task's form is tokens.

        Raises:
            ArtifactError: The weights are damaged.
        """
        weights = load_weights(directory, manifest)
        model = restore_model(backbone, [(manifest.task, manifest.prompt, manifest.head, weights)])
        return cls(
            model,
            tokenizer,
            manifest.task,
            max_length=manifest.encoding["max_length"],
            stride=manifest.encoding.get("stride", 0),
            decoding=manifest.decoding,
            golden=manifest.golden,
            token_types=manifest.encoding.get("token_types", True),
        )

    def logits(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """Return each input's logits on the CPU.

        These are `[C]` of a row, `[1]` of a number, `[options]` of a choice, `[words, C]` of the
        words it read, `[T, 2]` of the first window of a context. A word beyond the maximal
        length, or one that the tokenizer drops, has no row.

        Raises:
            DataError: An input lacks what its kind needs.
        """
        asked = self.codec.encode(inputs)
        return self.codec.logits_by_input(asked, self._answer(asked))

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
        asked = self.codec.encode(inputs)
        return self.codec.decode(asked, self._answer(asked))

    def verify_golden(self) -> None:
        """Run the artifact's golden inputs.

        Raises:
            ArtifactError: A logit differs from the stored one.
        """
        found = self.logits([example["input"] for example in self._golden])
        for place, (example, got) in enumerate(zip(self._golden, found, strict=True), start=1):
            expected = torch.tensor(example["logits"])
            if got.shape != expected.shape or not torch.allclose(
                got, expected, atol=GOLDEN_TOLERANCE, rtol=GOLDEN_TOLERANCE
            ):
                raise ArtifactError(
                    f"golden input {place}: expected logits {_short(expected)}, got {_short(got)}; "
                    "this backbone, or this version of torch or transformers, computes something "
                    "else than the one the prompt was trained with"
                )

    @torch.no_grad()
    def _answer(self, asked: Asked) -> list[Tensor]:
        """Return each row's logits, `[C]` or `[T, C]`, without padding."""
        split = asked.split
        kept: dict[int, Tensor] = {}
        for units in sorted_batches(
            split.unit_lengths, batch_size=EVALUATION_ROWS, token_budget=TOKEN_BUDGET
        ):
            batch = collate(split, split.rows_of(units))
            logits = logits_of_batch(self.model, batch).cpu()
            for place, row in enumerate(batch.rows.tolist()):
                own = logits[place]
                kept[row] = own if own.dim() == 1 else own[: split.lengths[row]]
        return [kept[row] for row in range(len(split))]


def _short(logits: Tensor) -> str:
    values = logits.flatten().tolist()[:6]
    return "[" + ", ".join(f"{value:.4f}" for value in values) + ", ...]"
