"""A workspace with the results of all stages before `register`, for the tests of the registry."""

import functools
import json
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelines.registry import Provenance, Registered, register
from ptv2_core.files import sha256_file
from tests.tiny import tiny_artifact, tiny_backbone

URI = "sqlite:///mlflow.db"
ROWS = {"train": 8, "dev": 3, "test": 4}
EXAMPLES = {
    "classification": [{"text": "book a flight to rome"}, {"text": "cancel the meeting"}],
    "tagging": [{"tokens": ["call", "anna", "in", "paris"]}],
}


class Workspace:
    """A folder with an empty registry, in which prompts are made up and registered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = URI
        self.backbone = tiny_backbone(root / "backbone")
        (root / "mlflow.db").write_bytes(empty_registry())

    def make(
        self,
        task: str = "intents",
        *,
        kind: str = "classification",
        seed: int = 0,
        test: float = 0.9,
        test_digest: str = "sha256:first",
    ) -> dict[str, Any]:
        """Write a prompt with all of its results; return the arguments of `register`."""
        folder = self.root / "prompts" / task
        artifact = tiny_artifact(folder, self.backbone, kind=kind, seed=seed)
        rewrite(artifact / "prompt.json", task=lambda spec: spec | {"name": task})
        metric = {"classification": "accuracy", "tagging": "span_f1"}[kind]
        results, prepared = self.root / "results" / task, self.root / "data" / "prepared" / task
        for folder in (prepared, results / "train", results / "evaluate", results / "search"):
            folder.mkdir(parents=True, exist_ok=True)
        for split, rows in ROWS.items():
            (prepared / f"{split}.jsonl").write_text("{}\n" * rows)
        _write_json(
            results / "train" / "metrics.json",
            metric=metric, dev=0.8, best_epoch=2, epochs=3, seconds=30.0,
            peak_memory_bytes=1000, trainable_parameters=500, trainable_share=0.01,
        )  # fmt: skip
        (results / "train" / "history.csv").write_text(
            "epoch,train_loss,dev_loss,dev_score,learning_rate,is_best,seconds\n"
            "1,1.5,1.6,0.5,0.005,1,10.0\n2,1.0,1.2,0.8,0.0025,1,20.0\n3,0.9,,0.7,0.0,0,30.0\n"
        )
        _write_json(
            results / "evaluate" / "metrics.json",
            task=task, metric=metric, dev=0.8, test=test, test_rows=4, test_digest=test_digest,
            prompt_sha256=sha256_file(artifact / "prompt.safetensors"), probe=0.6,
            probe_dev=0.65, test_metrics={metric: test, "macro/f1": 0.7},
        )  # fmt: skip
        (results / "evaluate" / "predictions.jsonl").write_text("{}\n")
        (results / "evaluate" / "confusion.csv").write_text("actual,predicted\n")
        _write_json(
            results / "search" / "best.json",
            task=task, metric=metric, value=0.8, trial=3, study="study-1",
            n_trials={"complete": 4, "pruned": 2, "failed": 0}, train={"learning_rate": 0.005},
        )  # fmt: skip
        (results / "search" / "trials.csv").write_text("trial,value\n3,0.8\n")
        (results / "search" / "search.html").write_text("<p>trials</p>")
        return {
            "root": self.root,
            "task": task,
            "artifact_dir": artifact,
            "train_dir": results / "train",
            "evaluate_dir": results / "evaluate",
            "search_dir": results / "search",
            "prepared_dir": prepared,
            "tracking_uri": self.uri,
            "experiment": "ptv2",
            "gate_margin": 0.0,
            "provenance": Provenance(
                git_commit="c" * 40,
                git_dirty=False,
                data_md5={"train": "md5-train", "test": "md5-test"},
                params_hash="params-1",
                flow_run_id="flow-1",
            ),
            "input_example": EXAMPLES[kind],
        }

    def register(self, task: str = "intents", **how: Any) -> Registered:
        """Make a prompt and register it."""
        return register(**self.make(task, **how))

    def client(self) -> Any:
        """Return an MLflow client of this registry."""
        from mlflow import MlflowClient

        uri = f"sqlite:///{self.root}/mlflow.db"
        return MlflowClient(tracking_uri=uri, registry_uri=uri)

    def stored(self, version: int = 1, task: str = "intents") -> Path:
        """Return the folder of a version's files."""
        uri = self.client().get_model_version_download_uri(task, str(version))
        return Path(uri.removeprefix("file://"))


@functools.cache
def empty_registry() -> bytes:
    """Return MLflow's empty database; its migrations take seconds, so they run once."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.db"
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes()


def rewrite(path: Path, **changes: Callable[[Any], Any]) -> None:
    """Change some keys of a JSON file."""
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {key: of(values[key]) for key, of in changes.items()}))


def _write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))
