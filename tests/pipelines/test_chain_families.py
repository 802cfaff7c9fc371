"""The whole chain on families that PEFT refuses and on MiniLM: trained, registered, pulled back."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ptv2_core.evaluation.predict import Predictor
from ptv2_serving.store import pull
from tests.core.family_parts import tiny_family
from tests.registry_parts import URI, empty_registry
from tests.stage_parts import PARAMS, call, intent_rows, write_jsonl, write_params

STAGES = ("fetch", "prepare", "search", "train", "evaluate", "register")
ROWS = {"train": 60, "dev": 24, "test": 30}
SEARCH: dict[str, Any] = {
    "n_trials": 2,
    "epochs": 2,
    "grace_epochs": 1,
    "space": {"prompt_length": [2, 4], "learning_rate": [1e-2, 3e-2]},
}


def workspace(root: Path, backbone: str, **train: Any) -> Path:
    """Write a task of three classes, and an empty registry; returns `root`."""
    (root / "mlflow.db").write_bytes(empty_registry())
    for seed, (split, rows) in enumerate(ROWS.items()):
        write_jsonl(root / "mine" / f"{split}.jsonl", intent_rows(rows, seed=seed))
    task = {
        "fetch": {"source": "local", "path": "mine"},
        "prepare": {"kind": "classification", "text": "text", "label": "label"},
        "search": {},
        "train": {},
    }
    changed = {
        "backbone": {**PARAMS["backbone"], "name": backbone},
        "search": SEARCH,
        "train": {**PARAMS["train"], "epochs": 20, "patience": 20, **train},
        "tasks": {"intents": task},
    }
    write_params(root, {**PARAMS, **changed})
    return root


def read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def check_chain(root: Path) -> None:
    """Run all stages; the pulled champion must be what was trained, and have learned."""
    assert [call(stage, "--task", "intents") for stage in STAGES] == [0] * 6
    with Path("results/intents/train/history.csv").open(encoding="utf-8") as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert min(losses[1:]) < 0.8 * losses[0]
    tests = [json.loads(line) for line in Path("mine/test.jsonl").read_text().splitlines()]
    labels = Counter(row["label"] for row in tests)
    scores = read_json("results/intents/evaluate/metrics.json")
    assert scores["test_rows"] == len(tests)
    assert scores["test"] > max(labels.values()) / len(tests) + 0.15

    pulled = pull("intents@champion", root / "pulled", tracking_uri=URI, root=root, device="cpu")
    registered = read_json("results/intents/registered.json")
    assert (pulled.version, registered["version"]) == (1, 1)
    trained, back = (
        Predictor.load(folder, device="cpu", precision="fp32")
        for folder in (root / "prompts" / "intents", root / "pulled")
    )
    inputs = [{"text": row["text"]} for row in tests]
    assert torch.equal(torch.stack(trained.logits(inputs)), torch.stack(back.logits(inputs)))
    answers = [answer["label"] for answer in back.predict(inputs)]
    right = sum(found == row["label"] for found, row in zip(answers, tests, strict=True))
    assert right / len(tests) == pytest.approx(scores["test"])


@pytest.mark.parametrize("case", ["albert", "deberta-v3", "modernbert"])
def test_chain_of_a_family_that_peft_refuses_ends_with_a_pulled_prompt_that_learned(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace(tmp_path, "./backbone"))
    tiny_family(tmp_path / "backbone", case)
    check_chain(tmp_path)


@pytest.mark.slow
def test_chain_of_minilm_ends_with_a_pulled_prompt_that_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workspace(tmp_path, "all-minilm-l6-v2", epochs=4))
    check_chain(tmp_path)
