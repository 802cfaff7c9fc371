import socket

import pytest

from ptv2_core.artifact import FILES, load_manifest
from ptv2_core.errors import ArtifactError, BackboneError, ConfigError
from ptv2_serving.store import Reference, StoreError, parse_reference, pull
from tests.registry_parts import Workspace, rewrite
from tests.tiny import tiny_backbone


@pytest.fixture
def workspace(tmp_path):
    """Return a workspace with two versions of a prompt; the first is the champion."""
    workspace = Workspace(tmp_path)
    workspace.register(test=0.9)
    workspace.register(test=0.8, seed=1)
    return workspace


def pull_into(workspace, reference="intents", name="pulled", **how):
    return pull(
        reference,
        workspace.root / name,
        tracking_uri=workspace.uri,
        root=workspace.root,
        device="cpu",
        **how,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("intents", Reference(task="intents", alias="champion")),
        ("intents@challenger", Reference(task="intents", alias="challenger")),
        ("my-task_2:12", Reference(task="my-task_2", version=12)),
    ],
)
def test_references(text, expected):
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "@champion", "intents@", "intents:", "intents:0", "intents:x", "intents@a:1", "Intents",
     "../intents", "models:/intents/1", "intents@champion ", "intents:1\n"],
)  # fmt: skip
def test_references_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match="expected TASK, TASK@ALIAS or TASK:VERSION"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("reference", "version"),
    [("intents", 1), ("intents@champion", 1), ("intents@challenger", 2), ("intents:2", 2)],
)
def test_pull_brings_the_two_files_of_a_version(workspace, reference, version):
    pulled = pull_into(workspace, reference)
    assert pulled.version == version
    assert names(pulled.path) == sorted(FILES)
    for name in FILES:
        stored = workspace.stored(version) / "artifacts" / "prompt" / name
        assert (pulled.path / name).read_bytes() == stored.read_bytes()
    tags = workspace.client().get_model_version("intents", str(version)).tags
    assert pulled.manifest.sha256 == tags["prompt_sha256"]


def test_nothing_else_of_a_version_is_needed_or_run(workspace):
    stored = workspace.stored()
    for path in sorted(stored.rglob("*"), reverse=True):
        if path.is_file() and path.name not in FILES:
            path.unlink()
    (stored / "mlflow_model.py").write_text("raise SystemExit('this code was run')")
    assert names(pull_into(workspace).path) == sorted(FILES)


def test_pull_replaces_a_prompt_and_leaves_nothing_behind(workspace):
    first = pull_into(workspace, "intents:1").manifest
    before = names(workspace.root)
    second = pull_into(workspace, "intents:2").manifest
    assert first.sha256 != second.sha256
    assert load_manifest(workspace.root / "pulled").sha256 == second.sha256
    assert names(workspace.root) == before


def damage_weights(workspace):
    weights = workspace.stored() / "artifacts" / "prompt" / "prompt.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def exchange_prompt(workspace):
    for name in FILES:
        source = workspace.stored(2) / "artifacts" / "prompt" / name
        (workspace.stored(1) / "artifacts" / "prompt" / name).write_bytes(source.read_bytes())


def change_labels(workspace):
    manifest = workspace.stored() / "artifacts" / "prompt" / "prompt.json"
    rewrite(manifest, task=lambda task: task | {"labels": task["labels"][::-1]})


def remove_weights(workspace):
    (workspace.stored() / "artifacts" / "prompt" / "prompt.safetensors").unlink()


def remove_tag(workspace):
    workspace.client().delete_model_version_tag("intents", "1", "prompt_sha256")


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (damage_weights, ArtifactError, "expected sha256 .*, got "),
        (exchange_prompt, ArtifactError, "registry expects a prompt.json with sha256 .*, got "),
        (change_labels, ArtifactError, "registry expects a prompt.json with sha256 .*, got "),
        (remove_weights, ArtifactError, "expected a file prompt.safetensors, found none"),
        (remove_tag, ArtifactError, "no tag 'prompt_sha256'"),
    ],
)
def test_prompt_that_is_not_the_registered_one_never_arrives(workspace, harm, error, message):
    kept = pull_into(workspace, "intents:2").manifest
    before = names(workspace.root)
    harm(workspace)
    with pytest.raises(error, match=message):
        pull_into(workspace, "intents:1")
    assert load_manifest(workspace.root / "pulled").sha256 == kept.sha256
    assert names(workspace.root) == before


def test_other_backbone_is_refused(workspace):
    other = tiny_backbone(workspace.root / "other", seed=1)
    with pytest.raises(BackboneError, match="expected sha256:.*, got sha256:"):
        pull_into(workspace, backbone_name=str(other))
    assert not (workspace.root / "pulled").exists()


def test_same_backbone_at_another_place_is_taken(workspace):
    workspace.backbone.rename(workspace.root / "moved")
    pulled = pull_into(workspace, backbone_name=str(workspace.root / "moved"))
    assert names(pulled.path) == sorted(FILES)


def test_backbone_that_computes_something_else_is_refused(tmp_path):
    from pipelines.registry import register

    workspace = Workspace(tmp_path)
    arguments = workspace.make()
    golden = arguments["artifact_dir"] / "prompt.json"
    rewrite(golden, golden=lambda rows: [rows[0] | {"logits": [9.0, 9.0, 9.0]}])
    register(**arguments)
    with pytest.raises(ArtifactError, match="golden input 1: expected logits"):
        pull_into(workspace)
    assert not (tmp_path / "pulled").exists()


def test_folder_with_other_files_is_not_replaced(workspace):
    folder = workspace.root / "pulled"
    folder.mkdir()
    (folder / "notes.txt").write_text("keep me")
    with pytest.raises(StoreError, match=r"expected nothing but .* found notes\.txt"):
        pull_into(workspace)
    assert names(folder) == ["notes.txt"]


def test_file_is_not_replaced(workspace):
    (workspace.root / "pulled").write_text("keep me")
    with pytest.raises(StoreError, match="found a file"):
        pull_into(workspace)


def test_empty_folder_is_filled(workspace):
    (workspace.root / "pulled").mkdir()
    assert names(pull_into(workspace).path) == sorted(FILES)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("slots", r"no prompt for the task 'slots' .* there is: intents\."),
        ("intents@live", r"no alias 'live'; there is: @challenger .*2.*, @champion .*1"),
        ("intents:7", r"no version 7; there is: 1, 2\."),
    ],
)
def test_unknown_prompt_lists_what_there_is(workspace, reference, message):
    with pytest.raises(StoreError, match=message):
        pull_into(workspace, reference)


def test_missing_database_is_told_and_not_created(tmp_path):
    with pytest.raises(StoreError, match="there is no database"):
        pull("intents", tmp_path / "pulled", tracking_uri="sqlite:///mlflow.db", root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_server_that_is_away_is_told(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(StoreError, match=f"{uri} does not answer"):
            pull("intents", tmp_path / "pulled", tracking_uri=uri)
