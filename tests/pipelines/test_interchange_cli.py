"""`ptv2 export` and `ptv2 import`."""

import json
from pathlib import Path

import pytest

from tests.core.hub_parts import lettered
from tests.stage_parts import call
from tests.tiny import tiny_artifact, tiny_backbone


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    """Return a prompt for classification."""
    return tiny_artifact(tmp_path / "prompt", tiny_backbone(tmp_path / "backbone"))


def test_export_and_import_bring_the_same_weights_back(
    prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft, back = tmp_path / "peft", tmp_path / "back"
    assert call("export", str(prompt), "--peft", str(peft)) == 0
    said = capsys.readouterr().out
    assert f"exported {prompt} to {peft}: SEQ_CLS" in said
    assert "lost in fp16" in said
    labels = ("--labels", "alarm, flight,song")
    assert call("import", "--peft", str(peft), "--task", "tiny", "--to", str(back), *labels) == 0
    assert f"imported {peft} to {back}: classification, 4 positions" in capsys.readouterr().out
    first, second = (folder / "prompt.safetensors" for folder in (prompt, back))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((back / "prompt.json").read_text())["task"]["labels"] == [
        "alarm",
        "flight",
        "song",
    ]
    assert call("predict", str(back), "book a taxi", "--json") == 0
    assert json.loads(capsys.readouterr().out)["label"] in {"alarm", "flight", "song"}


@pytest.mark.parametrize("is_pair", [True, False])
def test_export_and_import_say_what_stands_between_two_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_pair: bool
) -> None:
    backbone = lettered(tmp_path / "backbone", eos_token="<|endoftext|>")
    prompt = tiny_artifact(tmp_path / "prompt", backbone, pair=is_pair)
    peft, back = str(tmp_path / "peft"), str(tmp_path / "back")
    told = "Between two texts stands '<|endoftext|>' (token 0)."
    assert call("export", str(prompt), "--peft", peft) == 0
    assert (told in capsys.readouterr().out) == is_pair
    wanted = ("import", "--peft", peft, "--task", "tiny", "--to", back)
    pair = ("--pair",) if is_pair else ()
    assert call(*wanted, "--labels", "alarm,flight,song", *pair) == 0
    said = capsys.readouterr().out
    assert (told in said) == is_pair
    assert ("if this adapter was trained on its rows, it reads other ones" in said) == is_pair


def test_import_without_labels_or_with_an_unknown_kind_is_a_message(
    prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft, back = str(tmp_path / "peft"), str(tmp_path / "back")
    assert call("export", str(prompt), "--peft", peft) == 0
    wanted = ("import", "--peft", peft, "--task", "tiny", "--to", back)
    assert call(*wanted) == 2
    assert "task.labels: expected two or more distinct names" in capsys.readouterr().err
    assert call(*wanted, "--kind", "nonsense") == 2
    assert "--kind: expected classification | regression | tagging | qa" in capsys.readouterr().err


def test_export_without_head_and_import_for_training_on(
    prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft, back = str(tmp_path / "peft"), str(tmp_path / "back")
    assert call("export", str(prompt), "--peft", peft, "--without-head", "--base", "some/bert") == 0
    assert "There is no head here" in capsys.readouterr().out
    wanted = ("import", "--peft", peft, "--task", "tiny", "--to", back, "--without-head")
    backbone = ("--backbone", str(tmp_path / "backbone"))
    assert call(*wanted, *backbone) == 2
    assert "name it with --kind" in capsys.readouterr().err
    assert call(*wanted, *backbone, "--kind", "classification", "--labels", "yes,no") == 0
    assert "set train.init_from to the folder" in capsys.readouterr().out
