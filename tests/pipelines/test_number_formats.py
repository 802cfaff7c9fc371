"""`ptv2 evaluate --compare`: a prompt's answers with its backbone in another number format."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.number_formats import difference
from pipelines.prepared import Prepared
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.evaluation.scoring import evaluate_model
from ptv2_core.model.backbones.locating import locate
from tests.stage_parts import call, change_params, make_workspace, tree

TRAINED = ("intents", "slots")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with two trained prompts."""
    root = make_workspace(tmp_path_factory.mktemp("formats"))
    change_params(root, {"search.n_trials": 0, "tasks.slots.train.epochs": 3})
    for task in TRAINED:
        for stage in ("fetch", "prepare", "search", "train"):
            assert call(stage, "--task", task, "-C", str(root)) == 0
    return root


@pytest.fixture(autouse=True)
def _inside(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def compared(task: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("results", task, "formats.json").read_text())
    return found


def rounded(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return (weight / scale).round() * scale


class SlowInt8(nn.Module):
    """int8 by plain float64 arithmetic, written without the code that is tested."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = rounded(linear.weight.detach().double()), linear.bias.double()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.double()
        scale = wide.abs().amax(dim=-1, keepdim=True) / 127
        return ((wide / scale).round() * scale @ self.weight.T + self.bias).to(states.dtype)


def answered(task: str, *, is_int8: bool) -> tuple[float, list[Any]]:
    """Return score and predictions on dev by a predictor whose layers are replaced here."""
    predictor = Predictor.load(Path("prompts", task), device="cpu", precision="fp32")
    model = predictor.model.backbone.model
    if is_int8:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear):
                model.set_submodule(name, SlowInt8(module))  # type: ignore[attr-defined]
    prepared = Prepared.load(Path("data", "prepared", task))
    scored = evaluate_model(
        predictor.model, prepared.splits["dev"], prepared.task, token_budget=512
    )
    return scored.score, list(scored.predictions)


@pytest.mark.slow
@pytest.mark.parametrize("task", TRAINED)
def test_number_formats_are_those_of_an_independent_computation(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ptv2_core.model.backbones.loading._is_fast_at_bf16", lambda _: False)
    before = {name: digest for name, digest in tree(Path()).items() if "formats" not in name}
    capsys.readouterr()
    assert call("evaluate", "--task", task, "--compare", "int8", "--compare", "bf16") == 0
    printed = capsys.readouterr().out
    found = compared(task)
    # nothing but the report, so no stage's output
    assert {n: d for n, d in tree(Path()).items() if "formats" not in n} == before
    exact, (score, answers) = answered(task, is_int8=False), answered(task, is_int8=True)
    fp32, int8, bf16 = found["formats"]
    assert [one["precision"] for one in found["formats"]] == ["fp32", "int8", "bf16"]
    assert (fp32["score"], fp32["points"], fp32["changed"]) == (exact[0], 0.0, 0)
    assert int8["score"] == pytest.approx(score)
    assert int8["points"] == pytest.approx(100 * (score - exact[0]))
    single = [tags if task == "slots" else [tags] for tags in exact[1]]
    other = [tags if task == "slots" else [tags] for tags in answers]
    pairs = [
        pair for one, two in zip(single, other, strict=True) for pair in zip(one, two, strict=True)
    ]
    assert int8["changed"] == sum(one != two for one, two in pairs)
    assert found["decisions"] == len(pairs)
    assert (found["split"], found["device"], found["task"]) == ("dev", "cpu", task)
    assert found["split_digest"] == Prepared.load(Path("data", "prepared", task)).digests["dev"]
    digest = locate("./backbone").digest()
    assert fp32["answering_digest"] == digest
    assert len({one["answering_digest"] for one in found["formats"]}) == 3
    assert [one["number_format"] for one in found["formats"]] == [
        "float32", "int8+float32", "bfloat16",
    ]  # fmt: skip
    assert int8["size_bytes"] < fp32["size_bytes"]
    assert bf16["size_bytes"] < fp32["size_bytes"]
    assert all(one["rows_per_s"] > 0 for one in found["formats"])
    for shown in ("int8+float32", f"{fp32['score']:.4f}", "rows/s", "formats.json"):
        assert shown in printed


def test_number_formats_of_test_are_compared_where_that_is_asked_for() -> None:
    assert call("evaluate", "--task", "intents", "--compare", "bf16", "--split", "test") == 0
    found = compared("intents")
    prepared = Prepared.load(Path("data", "prepared", "intents"))
    assert (found["split"], found["split_digest"]) == ("test", prepared.digests["test"])


@pytest.mark.parametrize(
    ("task", "precision", "said"),
    [
        ("pairs", "int8", "run `ptv2 prepare --task pairs` first"),
        ("intents", "nf4", "nf4 needs a CUDA card, got device cpu"),
        ("intents", "fp32", "--compare: expected another format than fp32"),
        ("intents", "int4", "--compare: expected auto | fp32 | bf16 | int8 | nf4, got 'int4'"),
    ],
)
def test_number_formats_are_refused_before_anything_is_scored(
    task: str, precision: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Path("results", task, "formats.json")
    report.unlink(missing_ok=True)
    assert call("evaluate", "--task", task, "--compare", precision) == 2
    assert said in capsys.readouterr().err
    assert not report.exists()


def test_evaluate_refuses_rows_to_compare_on_where_nothing_is_compared(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("evaluate", "--task", "intents", "--split", "dev") == 2
    assert "--split: expected --compare beside it, got --split dev alone" in capsys.readouterr().err


def test_number_formats_need_a_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("fetch", "prepare"):
        assert call(stage, "--task", "pairs") == 0
    assert call("evaluate", "--task", "pairs", "--compare", "int8") == 2
    assert "run `ptv2 train --task pairs` first" in capsys.readouterr().err
    assert not Path("results", "pairs", "formats.json").exists()
    shutil.rmtree("data/prepared/pairs")


def test_evaluate_notes_the_format_of_its_scores() -> None:
    assert call("evaluate", "--task", "intents") == 0
    found = json.loads(Path("results", "intents", "evaluate", "metrics.json").read_text())
    assert found["number_format"] == "float32"
    assert found["answering_digest"] == locate("./backbone").digest()


def test_training_in_int8_on_a_cpu_is_refused_with_the_reason(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_params(workspace, {"backbone.precision": "int8"})
    try:
        assert call("train", "--task", "intents") == 2
        assert "int8 on a CPU has no gradient" in capsys.readouterr().err
        assert call("evaluate", "--task", "intents") == 0
    finally:
        change_params(workspace, {"backbone.precision": "fp32"})
    found = json.loads(Path("results", "intents", "evaluate", "metrics.json").read_text())
    assert found["number_format"].startswith("int8+")
    assert found["answering_digest"] != locate("./backbone").digest()


@pytest.mark.parametrize(
    ("form", "before", "after", "found"),
    [
        ("labels", ["a", "b", "a"], ["a", "a", "a"], (1, None)),
        ("options", ["x", "y"], ["x", "y"], (0, None)),
        ("spans", ["in rome", ""], ["rome", ""], (1, None)),
        ("tokens", [["O", "B-a"], ["O"]], [["B-a", "B-a"], ["B-a"]], (2, None)),
        ("values", [1.0, 2.0], [1.5, 1.0], (None, 0.75)),
    ],
)
def test_difference_counts_decisions_and_measures_numbers(
    form: Any, before: list[Any], after: list[Any], found: tuple[int | None, float | None]
) -> None:
    assert difference(form, before, after) == found
