"""The one backbone of a server, in fp32: what golden inputs are checked on, and tokenizers.

There are two of each tokenizer. One keeps settings inside that two threads would change under each
other, and golden inputs are read on another thread than requests.

Golden logits were computed in fp32, and only fp32 can repeat them closely; what answers may run in
another format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptv2_core.errors import ArtifactError, BackboneError
from ptv2_core.evaluation.codec import Codec
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.manifest import Manifest
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.loading import load_backbone
from ptv2_core.model.backbones.locating import Location, locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer


class Verifier:
    """Checks prompts on the backbone that the first of them names; all others must name it too."""

    def __init__(self, backbone_name: str | None = None) -> None:
        """Load nothing yet.

        Args:
            backbone_name: Where the backbone is on this machine, if not under the name that the
                prompts were trained with.
        """
        self._name = backbone_name
        self._named: Mapping[str, Any] = {}
        self._location: Location | None = None
        self._backbone: Backbone | None = None
        self._is_settled = False
        self._verifying: dict[bool, PreTrainedTokenizerBase] = {}
        self._serving: dict[bool, PreTrainedTokenizerBase] = {}

    @property
    def is_open(self) -> bool:
        """Whether a prompt has said which backbone it is."""
        return self._backbone is not None

    @property
    def location(self) -> Location:
        """Where the backbone's files are."""
        assert self._location is not None, "the first prompt says which backbone it is"
        return self._location

    @property
    def backbone(self) -> Backbone:
        """The backbone that was loaded."""
        assert self._backbone is not None, "the first prompt says which backbone it is"
        return self._backbone

    def settle(self) -> None:
        """Keep the backbone as it is: the engine has loaded the same, and cannot add to it."""
        self._is_settled = True

    def predictor(self, folder: Path, manifest: Manifest) -> Predictor:
        """Return a prompt on the fp32 backbone, to compute its golden inputs.

        Raises:
            ArtifactError: It is for another backbone or tokenizer, or of a method that cannot share
                its backbone.
            BackboneError: The backbone is not on this machine, or is another one, or was loaded
                without what the prompt needs.
        """
        name = manifest.task.name
        if manifest.method == "finetune":
            raise ArtifactError(
                f"{name}: expected a prompt, got a fine-tuned model, which shares its backbone "
                "with nobody; serve it by itself (`mlflow models serve`)."
            )
        self._open(manifest)
        expected, found = manifest.backbone["digest"], self.backbone.spec.digest
        if expected != found:
            raise BackboneError(
                f"{name}: expected the backbone {found}, on which all prompts of a server run, got "
                f"a prompt for {expected} ({manifest.backbone['name']}). Serve it by another "
                "server."
            )
        tokens = self.location.tokenizer_digest()
        if manifest.tokenizer_digest != tokens:
            raise ArtifactError(
                f"{name}: expected tokenizer {manifest.tokenizer_digest}, got {tokens} in "
                f"{self.location.folder}; use the backbone's own tokenizer files"
            )
        tokenizer = self._tokenizer(manifest, self._verifying)
        return Predictor.of(folder, manifest, self.backbone, tokenizer)

    def codec(self, predictor: Predictor, manifest: Manifest) -> Codec:
        """Return what reads and answers requests for a prompt, with a tokenizer of its own."""
        return Codec(
            self._tokenizer(manifest, self._serving),
            manifest.task,
            max_length=predictor.codec.max_length,
            stride=manifest.encoding.get("stride", 0),
            decoding=manifest.decoding,
            token_types=manifest.encoding.get("token_types", True),
        )

    def _tokenizer(
        self, manifest: Manifest, known: dict[bool, PreTrainedTokenizerBase]
    ) -> PreTrainedTokenizerBase:
        words = manifest.task.form == "tokens"
        if words not in known:
            known[words] = load_tokenizer(self.location, words=words)
        return known[words]

    def _open(self, manifest: Manifest) -> None:
        """Load the backbone, once; again where the first head to read the mask token comes."""
        reads_mask = manifest.head.type == "verbalizer"
        if self._backbone is None:
            self._named = manifest.backbone
        elif not reads_mask or self._backbone.language_model is not None:
            return
        elif self._is_settled:
            raise BackboneError(
                f"{manifest.task.name}: expected a prompt without a verbalizer, since no prompt "
                "with one was there when the server started and its engine loaded the backbone "
                "without its language model, got one. Restart the server to serve it."
            )
        name = self._name or self._named["name"]
        revision = None if self._name else self._named.get("revision")
        self._location = locate(name, revision)
        self._backbone = load_backbone(
            name,
            revision,
            digest=self._named["digest"],
            device="cpu",
            precision="fp32",
            language_model=reads_mask,
        )
