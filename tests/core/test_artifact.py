"""The artifact: what is in it, what it weighs, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ptv2_core.artifact import FILES, Weights, load_manifest, load_weights
from ptv2_core.config import HeadConfig
from ptv2_core.errors import ArtifactError, BackboneError, DataError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import sha256_file
from tests.core.training_parts import Bench, save_trained, settings
from tests.tiny import tiny_artifact, tiny_backbone

Folder = Callable[[str], Path]

MANIFEST_KEYS = {
    "schema_version", "method", "task", "prompt", "head", "backbone", "tokenizer_digest",
    "encoding", "decoding", "training", "provenance", "metrics", "sha256", "golden",
}  # fmt: skip


@pytest.fixture
def artifact(tmp_path: Path, backbone_folder: Folder) -> Path:
    """Return a saved artifact."""
    return tiny_artifact(tmp_path / "prompt", backbone_folder("bert"))


def change(artifact: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit prompt.json in place."""
    file = artifact / "prompt.json"
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


def test_artifact_is_two_files_with_their_keys_and_tensors(artifact: Path) -> None:
    assert sorted(file.name for file in artifact.iterdir()) == sorted(FILES)
    assert set(json.loads((artifact / "prompt.json").read_text())) == MANIFEST_KEYS
    tensors = load_file(artifact / "prompt.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"prompt": (3, 2, 4, 4, 8), "head.weight": (3, 32), "head.bias": (3,)}


def test_artifact_size_is_its_formula(artifact: Path) -> None:
    layers, heads, length, size, hidden, classes = 3, 4, 4, 8, 32, 3
    numbers = 2 * layers * length * heads * size + classes * hidden + classes
    data = (artifact / "prompt.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert len(data) == 8 + header + 4 * numbers


def test_artifact_survives_a_round_trip(artifact: Path) -> None:
    manifest = load_manifest(artifact)
    weights = load_weights(artifact, manifest)
    stored = load_file(artifact / "prompt.safetensors")
    for name, tensor in weights.named().items():
        assert torch.equal(tensor, stored[name])
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    again = Weights.of(predictor.model)
    assert torch.equal(again.prompt, weights.prompt)
    predictor.verify_golden()


def test_artifact_same_inputs_give_the_same_bytes(tmp_path: Path, backbone_folder: Folder) -> None:
    first, second = (
        tiny_artifact(tmp_path / name, backbone_folder("bert")) for name in ("one", "two")
    )
    for name in FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_artifact_with_changed_weights_is_refused(artifact: Path) -> None:
    file = artifact / "prompt.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"prompt.safetensors: expected sha256 .*, got "):
        load_manifest(artifact)


@pytest.mark.parametrize("missing", FILES)
def test_artifact_without_a_file_is_refused(artifact: Path, missing: str) -> None:
    (artifact / missing).unlink()
    with pytest.raises(ArtifactError, match=f"{missing}: not there"):
        load_manifest(artifact)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema_version=2), "expected schema_version 1, got 2"),
        (lambda m: m.pop("golden"), "golden must be a list, got NoneType"),
        (lambda m: m["backbone"].pop("digest"), "backbone lacks digest"),
        (lambda m: m["backbone"].update(num_layers="3"), "backbone.num_layers must be a whole"),
        (lambda m: m["encoding"].update(token_types="no"), "token_types must be true or false"),
        (lambda m: m["encoding"].clear(), "encoding.max_length must be a whole number"),
        (lambda m: m["golden"][0].pop("logits"), "golden input 1 must have an input and its"),
        (lambda m: m["task"].update(labels=["one"]), "task.labels"),
        (lambda m: m["task"].update(name="../up"), "task.name"),
        (lambda m: m["prompt"].update(length=9), "expected tensors"),
        (lambda m: m["task"]["labels"].append("more"), "expected tensors"),
        (lambda m: m["prompt"].update(extra=1), "unknown key"),
        (
            lambda m: m.update(method="lora"),
            "method: expected ptv2 | prompt_tuning | fine",
        ),
        (lambda m: m.update(method=None), "method must be a str, got NoneType"),
        (lambda m: m.update(method="prompt_tuning"), r"expected tensors {'prompt': [4, 32]"),
        (lambda m: m.update(method="probe"), r"expected tensors {'head.weight': [3, 32]"),
        (lambda m: m.update(method="finetune"), r"expected tensors {'head.weight': [3, 32]"),
        (lambda m: m.update(decoding=[]), "decoding must be a dict, got list"),
        (lambda m: m["head"].update(label_words=["a"]), "head.label_words: expected null or a map"),
    ],
)
def test_artifact_with_a_wrong_manifest_is_refused(
    artifact: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(artifact, edit)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        load_manifest(artifact)


def test_artifact_of_before_there_were_methods_is_one_of_ptv2(artifact: Path) -> None:
    def make_old(manifest: dict[str, Any]) -> None:
        del manifest["method"], manifest["decoding"], manifest["task"]["template"]
        del manifest["head"]["type"], manifest["head"]["label_words"]

    change(artifact, make_old)
    manifest = load_manifest(artifact)
    assert (manifest.method, manifest.decoding) == ("ptv2", {})
    assert manifest.head == HeadConfig(reads="cls")
    assert load_weights(artifact, manifest).num_tuned == 768
    Predictor.load(artifact, device="cpu", precision="fp32").verify_golden()


@pytest.mark.parametrize("others", [False, True])
def test_artifact_of_a_fine_tuned_backbone_needs_all_of_its_weights(
    tmp_path: Path, backbone_folder: Folder, others: bool
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    config = settings(method="finetune", learning_rate=1e-3)
    artifact = save_trained(tmp_path / "tuned", bench.model(config), bench, config)
    file = artifact / "prompt.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("head.")}
    if others:
        kept |= {n: t for n, t in tensors.items() if "position_embeddings" not in n}
    save_file(kept, file)
    change(artifact, lambda m: m.update(sha256=sha256_file(file)))
    wanted = (
        r"fine-tuned weights: expected those of .*; 1 differ, such as "
        r"embeddings.position_embeddings.weight \(expected \[64, 32\], got None\)"
        if others
        else r"expected the weights of a fine-tuned backbone, got head.bias, head.weight"
    )
    with pytest.raises(ArtifactError, match=wanted):
        Predictor.load(artifact, device="cpu")


@pytest.mark.parametrize("method", ["probe", "ptv2"])
def test_artifact_with_a_backbone_that_its_method_does_not_train_is_refused(
    tmp_path: Path, backbone_folder: Folder, method: str
) -> None:
    bench = Bench(backbone_folder("bert"), rows=(12, 6))
    config = settings(method="finetune", learning_rate=1e-3)
    artifact = save_trained(tmp_path / "tuned", bench.model(config), bench, config)
    change(artifact, lambda m: m.update(method=method))
    with pytest.raises(ArtifactError, match=r"expected tensors .*, got .*backbone\.embeddings"):
        load_manifest(artifact)


def test_artifact_with_broken_json_is_refused(artifact: Path) -> None:
    (artifact / "prompt.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"prompt.json: not valid JSON"):
        load_manifest(artifact)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "not a safetensors file"),
        (b'{"prompt": {"dtype": "F32"}}', "an entry without shape"),
    ],
)
def test_artifact_with_a_wrong_header_is_refused(
    artifact: Path, header: bytes, message: str
) -> None:
    file = artifact / "prompt.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    change(artifact, lambda m: m.update(sha256=sha256_file(file)))
    with pytest.raises(ArtifactError, match=message):
        load_manifest(artifact)


def test_artifact_cut_short_is_refused(artifact: Path) -> None:
    file = artifact / "prompt.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    change(artifact, lambda m: m.update(sha256=sha256_file(file)))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load_weights(artifact, load_manifest(artifact))


def test_artifact_in_half_precision_is_refused(artifact: Path) -> None:
    file = artifact / "prompt.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    change(artifact, lambda m: m.update(sha256=sha256_file(file)))
    with pytest.raises(ArtifactError, match="expected F32 tensors, got F16"):
        load_manifest(artifact)


def test_predictor_refuses_another_backbone(artifact: Path, tmp_path: Path) -> None:
    other = tiny_backbone(tmp_path / "other", seed=1)
    with pytest.raises(BackboneError, match=r"expected sha256:.*, got sha256:.* these are other"):
        Predictor.load(artifact, backbone_name=str(other))


def test_predictor_refuses_another_tokenizer(artifact: Path, tmp_path: Path) -> None:
    other = tiny_backbone(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(ArtifactError, match="expected tokenizer sha256:"):
        Predictor.load(artifact, backbone_name=str(other))


def test_predictor_refuses_wrong_golden_logits(artifact: Path) -> None:
    change(artifact, lambda m: m["golden"][0].update(logits=[9.0, 9.0, 9.0]))
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    with pytest.raises(ArtifactError, match="golden input 1: expected logits"):
        predictor.verify_golden()


def test_predictor_answers_texts_with_probabilities(artifact: Path) -> None:
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    texts = [{"text": "book a flight"}, {"text": "play the next song in the alarm"}]
    answers = predictor.predict(texts)
    for given, answer in zip(texts, answers, strict=True):
        probabilities = answer["probabilities"]
        assert sum(probabilities.values()) == pytest.approx(1.0)
        assert answer["label"] == max(probabilities, key=probabilities.get)
        alone = predictor.predict([given])[0]
        assert alone["probabilities"] == pytest.approx(probabilities, abs=1e-6)


def test_predictor_answers_tokens_with_spans(tmp_path: Path, backbone_folder: Folder) -> None:
    artifact = tiny_artifact(tmp_path / "prompt", backbone_folder("bert"), kind="tagging")
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    predictor.verify_golden()
    answer = predictor.predict([{"text": "call anna from oslo"}])[0]
    assert answer["tokens"] == ["call", "anna", "from", "oslo"]
    assert len(answer["tags"]) == 4
    for span in answer["spans"]:
        assert span["text"] == " ".join(answer["tokens"][span["start"] : span["end"]])


def test_predictor_refuses_inputs_without_text(artifact: Path) -> None:
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    with pytest.raises(DataError, match="input 2: expected a `text`"):
        predictor.predict([{"text": "fine"}, {"text": " "}])


def test_predictor_refuses_a_pair_without_its_second_text(
    tmp_path: Path, backbone_folder: Folder
) -> None:
    artifact = tiny_artifact(tmp_path / "prompt", backbone_folder("bert"), pair=True)
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    with pytest.raises(DataError, match="also needs a `text_pair`"):
        predictor.predict([{"text": "book it"}])
    assert predictor.predict([{"text": "book it", "text_pair": "not on monday"}])


def test_predictor_cuts_inputs_to_the_backbones_positions(
    tmp_path: Path, backbone_folder: Folder
) -> None:
    artifact = tiny_artifact(tmp_path / "prompt", backbone_folder("bert"))
    change(artifact, lambda m: m["encoding"].update(max_length=500))
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    # 64 positions, 4 of them the prompt's, and two special tokens leave room for 58 words
    fits, longer = " ".join(["book"] * 58), " ".join(["book"] * 58 + ["rome"] * 40)
    first, second = predictor.logits([{"text": fits}, {"text": longer}])
    assert torch.equal(first, second)


def test_predictor_refuses_half_a_surrogate_pair(artifact: Path) -> None:
    predictor = Predictor.load(artifact, device="cpu", precision="fp32")
    with pytest.raises(DataError, match="input 1: character 4 of .* is half a surrogate pair"):
        predictor.predict([{"text": "hi \ud83d there"}])
