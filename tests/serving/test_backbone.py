"""The backbone that prompts are checked on, beside requests."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ptv2_core.artifact import Manifest, load_manifest
from ptv2_core.errors import BackboneError
from ptv2_core.evaluation.codec import Codec
from ptv2_serving.backbone import Verifier
from tests.registry_parts import rewrite
from tests.tiny import tiny_artifact, tiny_backbone, tiny_language_model

LONG = "book the flight to rome " * 20


class Prompt:
    """A prompt whose golden input is as long as it reads."""

    def __init__(self, root: Path, backbone: Path, *, max_length: int) -> None:
        self.folder = tiny_artifact(root / str(max_length), backbone)
        golden = {"input": {"text": LONG}, "logits": [0.0, 0.0, 0.0]}
        rewrite(
            self.folder / "prompt.json",
            encoding=lambda values: values | {"max_length": max_length},
            golden=lambda _: [golden],
        )
        self.manifest: Manifest = load_manifest(self.folder)


def test_backbone_reads_requests_beside_golden_inputs_of_another_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone(tmp_path / "backbone")
    short, long = (Prompt(tmp_path, backbone, max_length=length) for length in (16, 48))
    verifier = Verifier()
    predictor = verifier.predictor(long.folder, long.manifest)
    codec = verifier.codec(predictor, long.manifest)
    assert isinstance(codec, Codec)
    checked = verifier.predictor(short.folder, short.manifest)
    setting, is_over = PreTrainedTokenizerFast.set_truncation_and_padding, threading.Event()

    def slowly(self: Any, *args: Any, **how: Any) -> None:
        setting(self, *args, **how)
        is_over.wait(0.002)  # so that the other thread comes in between

    monkeypatch.setattr(PreTrainedTokenizerFast, "set_truncation_and_padding", slowly)

    def check() -> None:
        while not is_over.is_set():
            checked.codec.encode([{"text": LONG}])

    checking = threading.Thread(target=check)
    checking.start()
    try:
        lengths = {len(codec.encode([{"text": LONG}]).split.input_ids) for _ in range(50)}
    finally:
        is_over.set()
        checking.join()
    assert lengths == {48}


def test_backbone_refuses_a_verbalizer_once_the_engine_runs_without_its_language_model(
    tmp_path: Path,
) -> None:
    backbone = tiny_language_model(tmp_path / "backbone")
    plain = Prompt(tmp_path, backbone, max_length=16)
    verifier = Verifier()
    verifier.predictor(plain.folder, plain.manifest)
    assert verifier.backbone.language_model is None
    verifier.settle()
    head = replace(plain.manifest.head, type="verbalizer")
    with pytest.raises(BackboneError, match="Restart the server to serve it"):
        verifier.predictor(plain.folder, replace(plain.manifest, head=head))
    # what it had still goes
    verifier.predictor(plain.folder, plain.manifest)
