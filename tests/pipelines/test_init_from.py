"""`train.init_from`: a training begins from a prompt in the registry, or says why it cannot."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch import Tensor

from tests.stage_parts import call, change_params, make_workspace

REGISTERED = "models:/intents@champion"


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a registered prompt for intents."""
    root = make_workspace(tmp_path_factory.mktemp("init") / "workspace")
    change_params(root, {"tasks.intents.search": {"n_trials": 0}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        stages = ("fetch", "prepare", "search", "train", "evaluate", "register")
        assert [call(stage, "-t", "intents") for stage in stages] == [0] * len(stages)
    return root


def tensors(root: Path) -> dict[str, Tensor]:
    """Return what the last training saved."""
    return safetensors.torch.load_file(root / "prompts" / "intents" / "prompt.safetensors")


@pytest.mark.slow
def test_init_from_begins_with_a_registered_prompt(
    registered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(registered)
    before = tensors(registered)
    # at such a rate a training ends where it began
    start = {"init_from": REGISTERED, "learning_rate": 1e-30, "epochs": 1}
    for head, is_taken in (({}, True), ({"reads": "mean"}, False)):
        change_params(registered, {"tasks.intents.train": {**start, "head": head}})
        assert [call(stage, "-t", "intents") for stage in ("search", "train")] == [0, 0]
        after = tensors(registered)
        assert after["prompt"].allclose(before["prompt"], atol=1e-6)
        assert after["head.weight"].allclose(before["head.weight"], atol=1e-6) is is_taken


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"init_from": "models:/intents@best"}, "has no alias 'best'"),
        (
            {"init_from": "models:/intents/champion"},
            "train.init_from: expected a folder, models:/NAME@ALIAS or models:/NAME/VERSION",
        ),
        ({"init_from": "prompts/none"}, "prompts/none/prompt.json: not there"),
        (
            {"init_from": REGISTERED, "prompt": {"layers": [0, 1]}},
            "is a prompt in the layers 0, 1, 2, expected the layers 0, 1 (train.prompt.layers)",
        ),
        ({"init_from": REGISTERED, "prompt": {"length": 3}}, "expected a prompt of 3 layers and"),
        ({"init_from": REGISTERED, "method": "probe"}, "only ptv2 begins from a prompt"),
    ],
)
def test_init_from_says_what_does_not_fit(
    registered: Path,
    train: dict[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(registered)
    change_params(registered, {"tasks.intents.train": train})
    assert call("search", "-t", "intents") == 0
    assert call("train", "-t", "intents") == 2
    assert expected in capsys.readouterr().err
