"""Loading backbones: which one it is, what its files say, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ptv2_core.config import PromptConfig
from ptv2_core.errors import BackboneError
from ptv2_core.files import sha256_file
from ptv2_core.model.backbones.loading import (
    choose_device,
    choose_precision,
    default_reading,
    load_backbone,
    locate_offline,
    num_cards,
    precision_reason,
)
from ptv2_core.model.backbones.locating import Location, locate
from tests.tiny import MODELS, open_backbone, tiny_backbone, tiny_model, without_pooler

Folder = Callable[[str], Path]

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def test_backbone_digest_is_that_of_the_weight_file(backbone_folder: Folder) -> None:
    folder = backbone_folder("bert")
    backbone = open_backbone(folder)
    assert backbone.spec.digest == f"sha256:{sha256_file(folder / 'model.safetensors')}"
    assert (
        load_backbone(str(folder), digest=backbone.spec.digest).spec.digest == backbone.spec.digest
    )


def test_backbone_in_shards_has_a_digest_of_all_of_them(tmp_path: Path) -> None:
    from transformers import AutoModel

    folder = tiny_backbone(tmp_path / "whole")
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    (shards / "model.safetensors").unlink()
    AutoModel.from_pretrained(folder).save_pretrained(shards, max_shard_size="20KB")
    assert len(locate(str(shards)).weight_files()) > 1
    one, other = open_backbone(folder), open_backbone(shards)
    assert one.spec.digest != other.spec.digest
    ids = torch.tensor([[2, 7, 3]])
    assert torch.equal(
        one.model.embeddings.word_embeddings(ids), other.model.embeddings.word_embeddings(ids)
    )


def test_backbone_with_other_weights_is_refused(backbone_folder: Folder) -> None:
    wanted = f"sha256:{'0' * 64}"
    with pytest.raises(BackboneError, match=f"expected {wanted}, got sha256:"):
        load_backbone(str(backbone_folder("bert")), digest=wanted)


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("no/such/folder", None, "is not there; expected one of all-minilm-l6-v2"),
        ("nothing", None, "is not there"),
        ("org/model", None, "must be pinned to a commit of 40"),
        ("org/model", "main", "must be pinned to a commit of 40"),
        ("org/model", "0" * 40, "could not be had from the hub"),
    ],
)
def test_backbone_that_is_not_there_is_refused(
    name: str, revision: str | None, message: str
) -> None:
    with pytest.raises(BackboneError, match=message):
        locate(name, revision)


def test_backbone_that_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "bert")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BackboneError, match="is damaged"):
        load_backbone(str(folder))


def test_backbone_with_missing_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_backbone(tmp_path / "bert")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {k: v for k, v in tensors.items() if "layer.2.output" not in k}, file, {"format": "pt"}
    )
    with pytest.raises(BackboneError, match=r"lack encoder.layer.2.output"):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        # what Transformers' configurations say of a value of the wrong type, and of a bad one
        ({"hidden_size": "32"}, "could not be read by Transformers .*hidden_size"),
        ({"num_attention_heads": 5}, "could not be loaded by Transformers .*multiple of the num"),
        ({"hidden_act": "none_such"}, "could not be loaded by Transformers .*none_such"),
    ],
)
def test_backbone_of_a_bad_configuration_is_refused(
    tmp_path: Path, values: dict[str, object], message: str
) -> None:
    folder = tiny_backbone(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


def test_backbone_of_other_sizes_than_its_configuration_says_is_refused_with_both(
    tmp_path: Path,
) -> None:
    folder = tiny_backbone(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    message = (
        r"encoder\.layer\.0\.intermediate\.dense\.bias: expected \[40\] by its config.json, got "
        r"\[48\] in the weights.*get the backbone's files again"
    )
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


@pytest.mark.parametrize(
    ("model_type", "values", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "'relative_key'.*absolute"),
        ("roberta", {"position_embedding_type": "relative_key_query"}, "'relative_key_query'"),
        ("electra", {"position_embedding_type": "relative_key"}, "'relative_key'"),
        # of Jina's first embedding models, which say that they are BERT
        ("bert", {"position_embedding_type": "alibi"}, "'alibi'"),
        ("bert", {"is_decoder": True}, "is_decoder: true"),
        ("camembert", {"is_decoder": True}, "is_decoder: true"),
    ],
)
def test_backbone_of_a_variant_that_would_be_run_otherwise_is_refused(
    tmp_path: Path, model_type: str, values: dict[str, object], message: str
) -> None:
    folder = tiny_backbone(tmp_path / model_type, model_type)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(BackboneError, match=rf"backbone.name: '{folder}' .*{message}"):
        load_backbone(str(folder))
    plain = dict.fromkeys(values) | {"position_embedding_type": "absolute"}
    (folder / "config.json").write_text(json.dumps({**config, **plain, "is_decoder": False}))
    load_backbone(str(folder))


def test_backbone_with_one_type_of_tokens_has_none_to_tell(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = tiny_backbone(tmp_path / "roberta", "roberta")
    sizes = RobertaConfig.from_pretrained(folder, type_vocab_size=1)
    RobertaModel(sizes).save_pretrained(folder)
    backbone = open_backbone(folder)
    assert not backbone.has_token_types
    model = tiny_model(backbone, PromptConfig(length=2))
    ids, mask = torch.tensor([[2, 7, 3, 8, 3]]), torch.ones(1, 5, dtype=torch.bool)
    types = torch.tensor([[0, 0, 0, 1, 1]])
    with torch.no_grad():
        got, wanted = model.encode(ids, mask, types).hidden, model.encode(ids, mask).hidden
    assert torch.equal(got, wanted)
    below = [backbone.trunk(ids, mask, given, num_layers=2).hidden for given in (types, None)]
    assert torch.equal(*below)


def test_backbone_of_an_unknown_family_is_refused(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "fnet"}))
    with pytest.raises(BackboneError, match="of type 'fnet', which takes no deep prompts here"):
        load_backbone(str(folder))


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_backbone_precision_leaves_outputs_in_fp32(
    backbone_folder: Folder, model_type: str
) -> None:
    exact = tiny_model(open_backbone(backbone_folder(model_type)), PromptConfig(length=4))
    backbone = load_backbone(str(backbone_folder(model_type)), precision="bf16", device="cpu")
    assert backbone.dtype == torch.bfloat16
    rough = tiny_model(backbone, PromptConfig(length=4))
    ids, mask = torch.tensor([[2, 7, 8, 3]]), torch.ones(1, 4, dtype=torch.bool)
    rough(ids, mask).sum().backward()
    assert rough.bank.slots[0].weight.dtype == torch.float32
    assert rough.bank.slots[0].weight.grad.dtype == torch.float32
    with torch.no_grad():
        wanted, got = exact.encode(ids, mask).hidden, rough.encode(ids, mask).hidden
    assert got.dtype == torch.float32
    assert 0 < (wanted - got).abs().max() < 0.2


def test_backbone_files_say_what_a_head_reads(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "bert")
    assert open_backbone(folder).spec.reads == "cls"
    pooling = folder / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    assert open_backbone(folder).spec.reads == "mean"
    (pooling / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert open_backbone(folder).spec.reads == "cls"


def pooled_by(tmp_path: Path, written: str) -> Location:
    """Return a backbone whose sentence embeddings are pooled as a file says."""
    folder = tiny_backbone(tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(written)
    return locate(str(folder))


@pytest.mark.parametrize(
    ("written", "reads"),
    [
        # as sentence-transformers 6 writes it, and as it did before
        ({"embedding_dimension": 32, "pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
        ({"embedding_dimension": 32, "pooling_mode": "lasttoken"}, "last"),
        ({"embedding_dimension": 32, "pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        # the newer of two that differ
        ({"pooling_mode": "cls", "pooling_mode_mean_tokens": True}, "cls"),
        ({}, "mean"),
    ],
)
def test_backbone_pooling_of_either_form_is_what_a_head_reads(
    tmp_path: Path, written: dict[str, object], reads: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert default_reading(pooled_by(tmp_path, json.dumps(written))) == reads


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({"pooling_mode": "max"}, "max"),
        ({"pooling_mode": ["cls", "mean"]}, "cls, mean"),
        ({"pooling_mode": "newer"}, "newer"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls, max"),
    ],
)
def test_backbone_pooling_that_no_head_reads_is_the_mean_with_a_warning(
    tmp_path: Path, written: dict[str, object], named: str
) -> None:
    with pytest.warns(UserWarning, match=rf"pooled by {named}, .*the mean.*train\.head\.reads"):
        assert default_reading(pooled_by(tmp_path, json.dumps(written))) == "mean"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{", "could not be read"),
        ("[]", "expected an object, got list"),
        ('{"pooling_mode": 3}', "pooling_mode: expected a name or a list of names, got 3"),
        ('{"pooling_mode": [3]}', r"pooling_mode: expected a name or .*, got \[3\]"),
        ('{"pooling_mode": []}', r"pooling_mode: expected a name or .*, got \[\]"),
    ],
)
def test_backbone_pooling_that_is_damaged_is_refused(
    tmp_path: Path, written: str, message: str
) -> None:
    with pytest.raises(BackboneError, match=rf"1_Pooling.*config\.json.*{message}"):
        default_reading(pooled_by(tmp_path, written))


def test_backbone_pooler_is_read_where_a_sentence_head_trained_it(tmp_path: Path) -> None:
    from transformers import AutoConfig, BertForPreTraining

    folder = tiny_backbone(tmp_path / "bert")
    BertForPreTraining(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    backbone = open_backbone(folder)
    assert backbone.spec.reads == "pooler"
    assert backbone.spec.has_pooler


def test_backbone_without_a_pooler_makes_none_up(tmp_path: Path) -> None:
    backbone = open_backbone(without_pooler(tiny_backbone(tmp_path / "bert")))
    assert not backbone.spec.has_pooler
    assert not any("pooler" in name for name, _ in backbone.named_parameters())


def test_backbone_packaged_minilm_is_the_published_one() -> None:
    backbone = load_backbone("all-minilm-l6-v2", precision="fp32", device="cpu")
    spec = backbone.spec
    assert spec.digest == f"sha256:{MINILM_SHA256}"
    assert (spec.shape.num_layers, spec.shape.num_heads, spec.shape.head_size) == (6, 12, 32)
    assert spec.num_parameters == 22_713_216
    assert spec.reads == "mean"
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_backbone_device_that_is_not_here_is_refused() -> None:
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    with pytest.raises(BackboneError, match=f"'{absent}' is not on this machine; there is: .*cpu"):
        choose_device(absent)  # type: ignore[arg-type]


def test_backbone_cards_are_all_that_the_chosen_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cards("cpu") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert num_cards("cuda") == num_cards("auto") == 4
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert num_cards("mps") == 1


@pytest.mark.parametrize("model_type", sorted(MODELS))
def test_backbone_default_reading_is_what_loading_finds(
    backbone_folder: Folder, model_type: str
) -> None:
    folder = backbone_folder(model_type)
    assert default_reading(locate(str(folder))) == open_backbone(folder).spec.reads


def test_backbone_default_reading_refuses_an_unknown_family(tmp_path: Path) -> None:
    folder = tiny_backbone(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "fnet"}))
    with pytest.raises(BackboneError, match="of type 'fnet', which takes no deep prompts here"):
        default_reading(locate(str(folder)))


def test_backbone_of_a_hub_is_found_offline_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--org--model" / "snapshots" / commit
    assert locate_offline("org/model", commit) is None
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert locate_offline("org/model", commit) is None
    (snapshot / "model.safetensors").write_bytes(b"")
    expected = Location(name="org/model", revision=commit, folder=snapshot)
    assert locate_offline("org/model", commit) == expected


def test_backbone_that_is_no_hub_model_is_located_as_ever(backbone_folder: Folder) -> None:
    folder = str(backbone_folder("bert"))
    assert locate_offline(folder) == locate(folder)
    with pytest.raises(BackboneError, match="must be pinned to a commit of 40"):
        locate_offline("org/model")
    with pytest.raises(BackboneError, match="is not there; expected one of"):
        locate_offline("no/such/folder", "0" * 40)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype", "reason"),
    [
        (True, True, torch.bfloat16, "this CPU multiplies bf16 in hardware (AVX512-BF16, AMX)"),
        (False, True, torch.bfloat16, "this CPU multiplies bf16 in hardware (AMX)"),
        (True, False, torch.bfloat16, "this CPU multiplies bf16 in hardware (AVX512-BF16)"),
        (False, False, torch.float32, "no bf16 instructions on this CPU (AVX512-BF16, AMX)"),
    ],
)
def test_backbone_precision_of_a_cpu_has_its_reason(
    avx512: bool, amx: bool, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_precision("auto", CPU) == dtype
    assert precision_reason("auto", CPU) == f"auto: {reason}"
    assert precision_reason("fp32", CPU) == "set by backbone.precision"


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((9, 0), torch.bfloat16, "this GPU multiplies bf16 in hardware (compute capability 9.0)"),
        ((8, 0), torch.bfloat16, "this GPU multiplies bf16 in hardware (compute capability 8.0)"),
        (
            (7, 5),
            torch.float32,
            "bf16 needs compute capability 8.0, this GPU has 7.5",
        ),
    ],
)
def test_backbone_precision_of_a_gpu_has_its_reason(
    capability: tuple[int, int],
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", CUDA) == dtype
    assert precision_reason("auto", CUDA) == f"auto: {reason}"
