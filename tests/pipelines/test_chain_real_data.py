"""The whole chain on real data: DVC, Prefect, MLflow and the stages as real processes."""

import json
from pathlib import Path

import pytest

from tests.pipelines.chain_parts import make_repository, status, versions
from tests.pipelines.processes import program, run
from tests.stage_parts import PARAMS, call

pytestmark = pytest.mark.slow


@pytest.mark.bench_data
def test_chain_on_real_data_ends_with_registered_versions(
    tmp_path: Path, bench_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = {
        "rte": {
            "fetch": {
                "source": "local",
                "path": str(bench_data.resolve() / "rte"),
                "files": {"train": "train.jsonl", "test": "validation.jsonl"},
            },
            "prepare": {
                "kind": "classification",
                "text": "premise",
                "text_pair": "hypothesis",
                "label": "label",
            },
            "search": {},
            "train": {},
        },
        "snips": {
            "fetch": {"source": "local", "path": str(bench_data.resolve() / "snips")},
            "prepare": {"kind": "tagging", "tokens": "tokens", "tags": "tags"},
            "search": {},
            "train": {},
        },
    }
    root = make_repository(
        tmp_path / "real",
        tasks,
        backbone={**PARAMS["backbone"], "name": "all-minilm-l6-v2"},
        prepare={"max_length": 32, "dev_fraction": 0.1, "test_fraction": 0.1, "max_rows": 64},
        train={"prompt": {"length": 8}, "epochs": 1, "batch_size": 32},
    )
    monkeypatch.chdir(root)
    said = run(root, program(), "run")
    assert "12 stages: 12 ran" in said
    assert "INFO mlflow" not in said
    assert versions(root) == [("rte", 1), ("snips", 1)]
    kinds = {"rte": "accuracy", "snips": "span_f1"}
    for task, metric in kinds.items():
        scores = json.loads((root / "results" / task / "evaluate" / "metrics.json").read_text())
        assert (scores["metric"], scores["test_rows"]) == (metric, 64)
        manifest = json.loads((root / "prompts" / task / "prompt.json").read_text())
        assert len(manifest["golden"]) == 4
        assert call("pull", task, "--to", f"pulled/{task}") == 0
    assert status(root) == {}
