"""Repositories as they are published: which files are loaded, and what is refused."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertForMaskedLM,
    BertForSequenceClassification,
    EuroBertModel,
)

from ptv2_core.config import PromptConfig
from ptv2_core.errors import BackboneError
from ptv2_core.files import sha256_file
from ptv2_core.model.backbones import hub
from ptv2_core.model.backbones.loading import load_backbone, locate_offline
from ptv2_core.model.backbones.locating import locate
from ptv2_core.model.backbones.tokenizing import load_tokenizer
from tests.core.family_parts import tiny_family
from tests.core.hub_parts import COMMIT, cached, changed, in_shards, renamed
from tests.tiny import open_backbone, tiny_backbone, tiny_model, without_pooler

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
IDS, MASK = torch.tensor([[2, 7, 8, 3]]), torch.ones(1, 4, dtype=torch.bool)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_backbone(tmp_path / "bert")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub."""
    home = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    return home


# Weights that the digest covers


def test_repository_with_one_file_and_shards_is_the_one_file(folder: Path, tmp_path: Path) -> None:
    shards = in_shards(folder, tmp_path / "shards")
    tensors = load_file(folder / WEIGHTS)
    tensors["embeddings.word_embeddings.weight"] *= 2
    save_file(tensors, shards / WEIGHTS, {"format": "pt"})
    location = locate(str(shards))
    assert location.weight_files() == [shards / WEIGHTS]
    assert location.digest() == f"sha256:{sha256_file(shards / WEIGHTS)}"
    loaded = open_backbone(shards).model.embeddings.word_embeddings.weight
    assert torch.equal(loaded, tensors["embeddings.word_embeddings.weight"])


def test_repository_of_shards_keeps_its_digest(folder: Path, tmp_path: Path) -> None:
    location = locate(str(in_shards(folder, tmp_path / "shards")))
    files = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert location.weight_files() == files
    joined = "\n".join(map(sha256_file, files))
    assert location.digest() == f"sha256:{hashlib.sha256(joined.encode()).hexdigest()}"


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "could not be read"),
        ("[]", "expected an object, got list"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"a": "../other.safetensors"}}', r"names '\.\./other\.safetensors'"),
        ('{"weight_map": {"a": "/other.safetensors"}}', "names '/other.safetensors'"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "names 'pytorch_model.bin'"),
        ('{"weight_map": {"a": 3}}', "names '3'"),
        ('{"weight_map": {"a": ["b"]}}', "names .*'b'"),
        ("[" * 100_000, "could not be read"),
    ],
)
def test_repository_with_a_bad_index_is_refused(folder: Path, index: str, message: str) -> None:
    (folder / WEIGHTS).rename(folder.parent / "other.safetensors")
    (folder / INDEX).write_text(index)
    with pytest.raises(BackboneError, match=message):
        locate(str(folder))


def test_repository_without_one_of_its_shards_is_refused(folder: Path, tmp_path: Path) -> None:
    shards = in_shards(folder, tmp_path / "shards")
    lost = sorted(shards.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(BackboneError, match=f"has no {lost.name} in .* names it; get the missing"):
        locate(str(shards))


def test_repository_whose_configuration_names_other_weights_is_refused(folder: Path) -> None:
    shutil.copy(folder / WEIGHTS, folder / "other.safetensors")
    changed(folder / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(BackboneError, match=r"'other.safetensors' .*expected model.safetensors"):
        locate(str(folder))
    changed(folder / "config.json", transformers_weights=WEIGHTS)
    assert locate(str(folder)).weight_files() == [folder / WEIGHTS]


def test_repository_with_an_adapter_over_it_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"has an adapter .* Merge it once"):
        locate(str(folder))


# Weights in other formats


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "model.pt", "model.ckpt", "tf_model.h5", "flax_model.msgpack",
        "model-q4.gguf", "onnx/model.onnx",
    ],
)  # fmt: skip
def test_repository_of_another_format_is_refused_with_a_way_out(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / WEIGHTS).rename(folder / name)
    found = rf"has no {WEIGHTS} in .*\(there is {name}\)"
    message = rf"{found}.*on a machine that you trust: .*save_pretrained.*refs/pr/N"
    with pytest.raises(BackboneError, match=message):
        locate(str(folder))


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00002.safetensors"])
def test_repository_of_a_variant_or_of_shards_alone_is_refused(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(BackboneError, match=f"There is {name}: a variant .* or shards without"):
        locate(str(folder))


def test_repository_with_pickles_beside_safetensors_is_taken(folder: Path) -> None:
    digest = locate(str(folder)).digest()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_backbone(folder).spec.digest == digest


def test_repository_without_a_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(BackboneError, match=r"has no config.json in .* Name the folder that"):
        locate(str(folder))


def test_repository_is_not_searched_all_the_way_down_for_other_formats(folder: Path) -> None:
    deep = folder / "one" / "two"
    deep.mkdir(parents=True)
    (folder / WEIGHTS).rename(deep / "model.bin")
    with pytest.raises(BackboneError, match=r"other formats are not loaded, since"):
        locate(str(folder))


# Code of its own


@pytest.mark.parametrize("model_type", ["bert", "of_its_own"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_repository_with_code_of_its_own_is_refused_without_asking(
    folder: Path, file: str, model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(question: str) -> str:
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    changed(folder / "config.json", model_type=model_type)
    changed(folder / file, auto_map={"AutoModel": "code.Model", "AutoTokenizer": [None, "c.T"]})
    with pytest.raises(BackboneError, match=rf"code of its own \(auto_map in .*{file}"):
        load_tokenizer(locate(str(folder)))


def as_published(folder: Path, **names: str) -> Path:
    """Add code to a EuroBERT as its authors published it; it fails where it is run."""
    for name in ("configuration_eurobert", "modeling_eurobert"):
        (folder / f"{name}.py").write_text("raise AssertionError('this code was run')\n")
    published = {
        "AutoConfig": "configuration_eurobert.EuroBertConfig",
        "AutoModel": "modeling_eurobert.EuroBertModel",
        "AutoModelForPreTraining": "modeling_eurobert.EuroBertPreTrainedModel",
        "AutoModelForMaskedLM": "modeling_eurobert.EuroBertForMaskedLM",
        "AutoModelForSequenceClassification": (
            "modeling_eurobert.EuroBertForSequenceClassification"
        ),
    }
    changed(folder / "config.json", auto_map=published | names)
    return folder


def test_repository_whose_code_is_transformers_own_now_is_taken_and_its_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("code of the repository was asked for")

    for module in ("models.auto.configuration_auto", "models.auto.auto_factory"):
        monkeypatch.setattr(f"transformers.{module}.get_class_from_dynamic_module", run)
    folder = as_published(tiny_family(tmp_path / "eurobert", "eurobert"))
    backbone = open_backbone(folder)
    assert type(backbone.model) is EuroBertModel
    load_tokenizer(locate(str(folder)))


@pytest.mark.parametrize(
    ("case", "names"),
    [
        # another model on the same weights: LLM2Vec's Llama sees both ways
        ("llama", {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"}),
        ("llama", {"AutoModel": "code.LlamaModel", "AutoModelForCausalLM": "code.LlamaBiForMNTP"}),
        ("eurobert", {"AutoModel": "modeling_eurobert.EuroBertModel", "AutoTokenizer": "c.T"}),
        ("eurobert", {"AutoModel": ["modeling_eurobert.EuroBertModel"]}),
        ("eurobert", {"AutoModel": None}),
    ],
)
def test_repository_whose_code_may_be_another_is_refused(
    tmp_path: Path, case: str, names: dict[str, object]
) -> None:
    folder = tiny_family(tmp_path / case, case)
    changed(folder / "config.json", auto_map=names)
    with pytest.raises(BackboneError, match=r"code of its own \(auto_map in .*config.json"):
        load_backbone(str(folder))


@pytest.mark.parametrize("model_type", ["of_its_own", "t5", None])
def test_repository_of_an_unknown_type_is_refused_with_those_that_are_known(
    folder: Path, model_type: str | None
) -> None:
    changed(folder / "config.json", model_type=model_type)
    message = rf"is of type {model_type!r}, .*expected one of albert, bert, .*ptv2 backbones"
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(folder))


# A hub's cache, offline


def test_repository_in_the_cache_is_taken_offline(folder: Path, cache: Path) -> None:
    snapshot = cached(cache, folder)
    location = locate("org/model", COMMIT)
    assert location.folder == snapshot
    assert location.revision == COMMIT
    assert location == locate_offline("org/model", COMMIT)
    assert location.digest() == locate(str(folder)).digest()


def test_repository_that_is_not_in_the_cache_is_refused_offline(cache: Path) -> None:
    message = f"HF_HUB_OFFLINE is set.*`hf download org/model --revision {COMMIT}`"
    with pytest.raises(BackboneError, match=message):
        locate("org/model", COMMIT)


@pytest.mark.parametrize("lost", [WEIGHTS, "tokenizer.json"])
def test_repository_that_is_half_in_the_cache_is_told_apart(
    folder: Path, cache: Path, lost: str
) -> None:
    (cached(cache, folder) / lost).unlink()
    message = rf"only a part of it .*config.json is there, .*{lost}\)? is not\. Get it where"
    with pytest.raises(BackboneError, match=message):
        locate("org/model", COMMIT)


def test_repository_in_the_cache_is_checked_as_a_folder_is(folder: Path, cache: Path) -> None:
    snapshot = cached(cache, folder)
    changed(snapshot / "config.json", auto_map={"AutoModel": "code.Model"})
    for find in (locate, locate_offline):
        with pytest.raises(BackboneError, match="code of its own"):
            find("org/model", COMMIT)


def test_repository_at_a_branch_is_refused_with_the_commit_that_the_cache_knows(
    folder: Path, cache: Path
) -> None:
    cached(cache, folder, branch="main")
    for revision in ("main", None):
        with pytest.raises(BackboneError, match=f"'main' is {COMMIT}, which would be"):
            locate("org/model", revision)
    with pytest.raises(BackboneError, match=r"got 'v1\.0'\. .*page on the hub"):
        locate("org/model", "v1.0")


@pytest.mark.parametrize("revision", [COMMIT[:7], COMMIT[:39], COMMIT.upper()])
def test_repository_at_a_short_commit_is_refused(cache: Path, revision: str) -> None:
    with pytest.raises(BackboneError, match=rf"got '{revision}': all 40, in small letters"):
        locate("org/model", revision)


def test_repository_at_a_commit_and_a_line_end_is_refused(cache: Path) -> None:
    with pytest.raises(BackboneError, match="must be pinned to a commit"):
        locate("org/model", f"{COMMIT}\n")


def test_repository_on_a_hub_that_does_not_answer_is_refused_with_a_way_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route to the hub")

    monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
    monkeypatch.setattr(hub, "cached_file", unreachable)
    message = r"no route to the hub\. Check the name.* set HF_HUB_OFFLINE=1; or name a local"
    with pytest.raises(BackboneError, match=message):
        locate("org/model", COMMIT)


# A hub


@pytest.fixture
def served(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Answer requests from a folder; the result lists them."""

    def serve(folder: Path) -> list[str]:
        asked: list[str] = []
        snapshot = cache / "models--org--model" / "snapshots" / COMMIT

        def cached_file(name: str, file: str, *, revision: str, **how: bool) -> str | None:
            assert (name, revision) == ("org/model", COMMIT)
            asked.append(file)
            if not (folder / file).is_file():
                # as Transformers' own, a configuration that is missing is never an error
                if file == "config.json" or how == {"_raise_exceptions_for_missing_entries": False}:
                    return None
                raise OSError(f"there is no {file}")
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, snapshot / file)
            return str(snapshot / file)

        monkeypatch.setattr(hub, "is_offline_mode", lambda: False)
        monkeypatch.setattr(hub, "cached_file", cached_file)
        return asked

    return serve


def test_repository_on_a_hub_is_fetched_whole_and_no_pickle_with_it(
    folder: Path, tmp_path: Path, served: Callable[[Path], list[str]]
) -> None:
    shards = in_shards(folder, tmp_path / "shards")
    (shards / "pytorch_model.bin").write_bytes(b"")
    (shards / "1_Pooling").mkdir()
    (shards / "1_Pooling" / "config.json").write_text("{}")
    asked = served(shards)
    location = locate("org/model", COMMIT)
    assert location.digest() == locate(str(shards)).digest()
    assert location.tokenizer_digest() == locate(str(shards)).tokenizer_digest()
    assert (location.folder / "1_Pooling" / "config.json").is_file()
    assert "pytorch_model.bin" not in asked
    assert not any(file.endswith(".py") for file in asked)
    load_tokenizer(location)


def test_repository_on_a_hub_with_older_tokenizer_files_gets_those(
    folder: Path, served: Callable[[Path], list[str]]
) -> None:
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    served(folder)
    assert (locate("org/model", COMMIT).folder / "vocab.txt").is_file()


def test_repository_on_a_hub_without_safetensors_is_refused_with_a_way_out(
    folder: Path, served: Callable[[Path], list[str]]
) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    served(folder)
    with pytest.raises(BackboneError, match=rf"there is no {INDEX}\. .*refs/pr/N"):
        locate("org/model", COMMIT)


def test_repository_on_a_hub_without_a_configuration_is_refused(
    folder: Path,
    served: Callable[[Path], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # a whole model where the program runs, which must not be taken for it
    monkeypatch.chdir(folder)
    served(tmp_path / "nothing")
    with pytest.raises(BackboneError, match="'org/model' at 0123.* has no config.json on the hub"):
        locate("org/model", COMMIT)


def test_repository_without_an_optional_file_is_no_error_under_this_transformers(
    folder: Path,
) -> None:
    assert hub._optional(str(folder), "1_Pooling/config.json", COMMIT) is None
    assert hub._optional(str(folder), WEIGHTS, COMMIT) == str(folder / WEIGHTS)
    assert hub.cached_file(str(folder.parent), "config.json", revision=COMMIT) is None


# Checkpoints of tasks


def states(folder: Path) -> torch.Tensor:
    """Return what a backbone computes with a prompt."""
    with torch.no_grad():
        return tiny_model(open_backbone(folder), PromptConfig(length=2)).encode(IDS, MASK).hidden


@pytest.mark.parametrize("saved_by", [BertForMaskedLM, BertForSequenceClassification])
def test_checkpoint_of_a_task_has_the_states_of_the_plain_one(
    folder: Path, tmp_path: Path, saved_by: type
) -> None:
    saved = tmp_path / "task"
    shutil.copytree(folder, saved)
    saved_by.from_pretrained(folder).save_pretrained(saved)  # type: ignore[attr-defined]
    assert all(
        name.startswith(("bert.", "cls.", "classifier.")) for name in load_file(saved / WEIGHTS)
    )
    assert open_backbone(saved).spec.has_pooler == (saved_by is BertForSequenceClassification)
    assert torch.equal(states(saved), states(folder))


def test_backbone_without_a_pooler_has_the_same_states(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    without_pooler(bare)
    assert open_backbone(folder).spec.has_pooler
    assert not open_backbone(bare).spec.has_pooler
    assert torch.equal(states(bare), states(folder))


@pytest.mark.parametrize("case", ["gpt2", "opt", "opt-350m", "qwen3"])
def test_checkpoint_of_a_language_model_has_the_states_of_the_plain_one(
    tmp_path: Path, case: str
) -> None:
    plain = tiny_family(tmp_path / "plain", case)
    saved = tmp_path / "saved"
    shutil.copytree(plain, saved)
    whole = AutoModelForCausalLM.from_pretrained(plain)
    whole.save_pretrained(saved)
    prefix = f"{whole.base_model_prefix}."
    assert any(name.startswith(prefix) for name in load_file(saved / WEIGHTS))
    assert torch.equal(states(saved), states(plain))


def test_pooler_under_a_prefix_is_found(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "prefixed"
    shutil.copytree(folder, saved)
    renamed(saved, "bert.", **{"classifier.weight": torch.zeros(2, 32)})
    assert open_backbone(saved).spec.has_pooler
    assert torch.equal(states(saved), states(folder))
