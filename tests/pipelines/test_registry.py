import contextlib
import json
import logging
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ptv2_core
from pipelines import registry
from pipelines.errors import PipelineError, RegistryError
from pipelines.registry import register
from ptv2_core.artifact import load_manifest
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.files import sha256_file
from tests.registry_parts import EXAMPLES, ROWS, Workspace


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path)


# What is in the registry


def test_first_version_becomes_challenger_and_champion(workspace):
    registered = workspace.register()
    assert registered.created
    assert registered.to_mapping() == {
        "model": "intents",
        "version": 1,
        "run_id": registered.run_id,
        "aliases": ["challenger", "champion"],
        "tracking_uri": "sqlite:///mlflow.db",
        "sha256": load_manifest(workspace.root / "prompts" / "intents").sha256,
        "gate": {
            "promoted": True,
            "reason": "the first champion, with test accuracy 0.9000",
            "metric": "accuracy",
            "score": 0.9,
            "margin": 0.0,
            "champion_version": None,
            "champion_score": None,
        },
    }
    json.dumps(registered.to_mapping())


def test_tags_say_how_to_make_the_prompt_again(workspace):
    workspace.register()
    artifact = workspace.root / "prompts" / "intents"
    manifest = load_manifest(artifact)
    data = {f"data_digest.{key}": value for key, value in manifest.provenance["data"].items()}
    tags = workspace.client().get_model_version("intents", "1").tags
    assert tags == data | {
        "metric": "accuracy",
        "test_score": "0.9",
        "dev_score": "0.8",
        "probe_score": "0.6",
        "test_digest": "sha256:first",
        "prompt_sha256": manifest.sha256,
        "manifest_sha256": sha256_file(artifact / "prompt.json"),
        "task": "intents",
        "task_kind": "classification",
        "ptv2.method": "ptv2",
        "backbone_name": manifest.backbone["name"],
        "backbone_digest": manifest.backbone["digest"],
        "tokenizer_digest": manifest.tokenizer_digest,
        "git_commit": "c" * 40,
        "git_dirty": "false",
        "params_hash": "params-1",
        "study": "study-1",
        "trial": "3",
        "flow_run_id": "flow-1",
        "data_md5.train": "md5-train",
        "data_md5.test": "md5-test",
    }


def test_descriptions_say_what_it_is_and_how_to_get_it(workspace):
    workspace.register()
    model = workspace.client().get_registered_model("intents").description
    version = workspace.client().get_model_version("intents", "1").description
    for label in load_manifest(workspace.root / "prompts" / "intents").task.labels:
        assert f"`{label}`" in model
    assert version.startswith("Test accuracy 0.9000 (4 rows), dev 0.8000")
    assert "ptv2 pull intents:1 --to intents-prompt" in version
    assert "models:/intents/1" in version


def test_description_that_a_person_wrote_is_kept(workspace):
    workspace.register()
    client = workspace.client()
    client.update_registered_model("intents", "Ours.")
    workspace.register(seed=1)
    assert client.get_registered_model("intents").description == "Ours."


def test_run_holds_settings_curves_data_and_files(workspace):
    registered = workspace.register()
    client = workspace.client()
    run = client.get_run(registered.run_id)
    assert run.info.run_name == f"intents-{registered.sha256[:8]}"
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 30_000
    assert run.data.params["prompt.length"] == str(
        load_manifest(workspace.root / "prompts" / "intents").prompt.length
    )
    curve = client.get_metric_history(run.info.run_id, "dev_accuracy")
    assert [(point.step, point.value) for point in curve] == [(1, 0.5), (2, 0.8), (3, 0.7)]
    assert [point.timestamp - run.info.start_time for point in curve] == [10_000, 20_000, 30_000]
    assert len(client.get_metric_history(run.info.run_id, "dev_loss")) == 2
    assert {
        name: run.data.metrics[name]
        for name in ("best_dev_accuracy", "test_accuracy", "probe_test_accuracy", "test_macro_f1")
    } == {
        "best_dev_accuracy": 0.8,
        "test_accuracy": 0.9,
        "probe_test_accuracy": 0.6,
        "test_macro_f1": 0.7,
    }
    assert {"trainable_share", "artifact_bytes", "best_epoch"} <= run.data.metrics.keys()
    inputs = {
        item.tags[0].value: (item.dataset.name, json.loads(item.dataset.profile))
        for item in run.inputs.dataset_inputs
    }
    assert inputs == {split: ("intents", {"num_rows": rows}) for split, rows in ROWS.items()}
    listed = {
        file.path
        for folder in ("train", "evaluate", "search")
        for file in client.list_artifacts(run.info.run_id, folder)
    }
    assert listed == {
        "train/history.csv",
        "train/metrics.json",
        "evaluate/confusion.csv",
        "evaluate/metrics.json",
        "evaluate/predictions.jsonl",
        "search/best.json",
        "search/search.html",
        "search/trials.csv",
    }


def test_version_stores_prompt_and_source_and_nothing_else(workspace):
    workspace.register()
    stored = workspace.stored()
    files = {path.relative_to(stored).as_posix(): path for path in stored.rglob("*.*")}
    core = Path(ptv2_core.__file__).parent
    code = {f"code/ptv2_core/{path.relative_to(core).as_posix()}" for path in core.rglob("*.py")}
    prompt = {"artifacts/prompt/prompt.json", "artifacts/prompt/prompt.safetensors"}
    assert files.keys() - code - prompt == {
        "conda.yaml",
        "input_example.json",
        "mlflow_model.py",
        "python_env.yaml",
        "requirements.txt",
        "serving_input_example.json",
    }
    assert files.keys() >= code | prompt
    everything = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
    assert everything - sum(files[name].stat().st_size for name in prompt) < 1_000_000
    requirements = (stored / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {
        "mlflow", "numpy", "pandas", "safetensors", "torch", "transformers",
    }  # fmt: skip
    assert not [line for line in requirements if "+" in line or "==" not in line]


def test_workspace_gets_nothing_but_the_registry(workspace, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    workspace.register()
    assert not list(Path.cwd().iterdir())
    assert {path.name for path in workspace.root.iterdir()} == {
        "backbone", "data", "mlartifacts", "mlflow.db", "prompts", "results",
    }  # fmt: skip


def test_nothing_is_printed(workspace, capfd):
    arguments = workspace.make()
    level = logging.getLogger("mlflow").level
    capfd.readouterr()
    register(**arguments)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("mlflow").level == level


# Once and only once


def test_same_prompt_again_changes_nothing(workspace):
    first = workspace.register()
    again = workspace.register()
    assert not again.created
    assert (again.version, again.run_id) == (first.version, first.run_id)
    assert again.aliases == ("challenger", "champion")
    assert_registered_once(workspace)


STEPS = [
    "create_experiment",
    "create_run",
    "log_inputs",
    "log_batch",
    "log_artifact",
    "create_logged_model",
    "log_model_artifacts",
    "log_outputs",
    "finalize_logged_model",
    "set_terminated",
    "create_registered_model",
    "create_model_version",
    "set_logged_model_tags",
    "update_model_version",
    "set_registered_model_alias",
]


@pytest.mark.parametrize("step", STEPS)
def test_register_cut_off_after_any_step_is_completed_by_the_next(workspace, monkeypatch, step):
    from mlflow import MlflowClient

    class PowerCutError(BaseException):
        pass

    original = getattr(MlflowClient, step)

    def cut_off(*arguments, **named):
        original(*arguments, **named)
        raise PowerCutError

    arguments = workspace.make()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, cut_off)
        with pytest.raises(PowerCutError):
            register(**arguments)
    registered = register(**arguments)
    assert registered.version == 1
    assert registered.aliases == ("challenger", "champion")
    assert_registered_once(workspace)


def assert_registered_once(workspace):
    client = workspace.client()
    (version,) = client.search_model_versions("name = 'intents'")
    experiment = client.get_experiment_by_name("ptv2").experiment_id
    (run,) = client.search_runs([experiment])
    (model,) = client.search_logged_models([experiment])
    assert run.info.status == "FINISHED"
    assert str(model.status) == "READY"
    assert version.run_id == run.info.run_id == model.source_run_id
    assert version.description
    assert len(client.get_metric_history(run.info.run_id, "train_loss")) == 3


def test_tasks_that_register_side_by_side_create_the_database_once(tmp_path, monkeypatch):
    created = []

    class SlowClient:
        def __init__(self, *, tracking_uri):
            self.path = Path(tracking_uri.removeprefix("sqlite:///"))

        def search_experiments(self, **_):
            created.append(self.path)
            self.path.write_text("half")
            time.sleep(0.2)
            self.path.write_text("whole")

    monkeypatch.setattr("mlflow.MlflowClient", SlowClient)
    path = tmp_path / "mlflow.db"
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(registry._create_database, [path] * 4))
    assert len(created) == 1
    assert created[0] != path
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_first_register_creates_the_database(workspace):
    (workspace.root / "mlflow.db").unlink()
    assert workspace.register().version == 1


def test_tasks_with_equal_weights_keep_their_own_runs(workspace):
    first = workspace.register()
    second = workspace.register("greetings")
    assert first.sha256 == second.sha256
    experiment = workspace.client().get_experiment_by_name("ptv2").experiment_id
    runs = {run.info.run_id for run in workspace.client().search_runs([experiment])}
    assert runs == {first.run_id, second.run_id}


# The gate, in the registry


def test_better_version_takes_both_aliases(workspace):
    workspace.register(test=0.8)
    second = workspace.register(seed=1, test=0.9)
    assert second.gate.promoted
    assert second.aliases == ("challenger", "champion")
    model = workspace.client().get_registered_model("intents")
    assert {alias: int(at) for alias, at in model.aliases.items()} == {
        "challenger": 2,
        "champion": 2,
    }


@pytest.mark.parametrize(("test", "digest"), [(0.7, "sha256:first"), (0.99, "sha256:other")])
def test_worse_or_incomparable_version_is_challenger_only(workspace, test, digest):
    workspace.register(test=0.8)
    second = workspace.register(seed=1, test=test, test_digest=digest)
    assert not second.gate.promoted
    assert second.aliases == ("challenger",)


def test_new_evaluation_replaces_scores_and_meets_the_champion_again(workspace):
    workspace.register(test=0.8)
    workspace.register(seed=1, test=0.7, test_digest="sha256:other")
    again = workspace.register(seed=1, test=0.85)
    assert (again.version, again.created) == (2, False)
    assert again.gate.promoted
    version = workspace.client().get_model_version("intents", "2")
    assert version.tags["test_score"] == "0.85"
    assert version.tags["test_digest"] == "sha256:first"
    assert version.description.startswith("Test accuracy 0.8500")
    assert workspace.client().get_run(again.run_id).data.metrics["test_accuracy"] == 0.85


# What cannot work


def test_server_that_is_away_is_told_within_seconds(workspace):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        workspace.uri = f"http://someone:secret@127.0.0.1:{unused.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(RegistryError, match="does not answer.*refused.*tracking_uri") as caught:
            workspace.register()
    assert time.monotonic() - started < 5
    assert "127.0.0.1" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_server_that_hangs_is_told_within_seconds(workspace):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        workspace.uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(RegistryError, match="does not answer.*timed out"):
            workspace.register()
    assert time.monotonic() - started < 8


def test_database_server_that_is_away_is_told_within_seconds(workspace):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        workspace.uri = f"postgresql+psycopg2://u:p@127.0.0.1:{unused.getsockname()[1]}/mlflow"
        with pytest.raises(RegistryError, match=r"u:\*\*\*@127.0.0.1.*does not answer"):
            workspace.register()


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "databricks", "http://", ""])
def test_uri_of_no_registry_is_refused(workspace, uri):
    workspace.uri = uri
    with pytest.raises(RegistryError, match="cannot be used; expected sqlite"):
        workspace.register()


def test_missing_folder_of_the_database_is_named(workspace):
    workspace.uri = "sqlite:///nowhere/mlflow.db"
    with pytest.raises(RegistryError, match="expected a folder .*nowhere"):
        workspace.register()
    assert not (workspace.root / "nowhere").exists()


def test_damaged_database_is_told_and_left_as_it_is(workspace):
    (workspace.root / "mlflow.db").write_bytes(b"not a database " * 100)
    with pytest.raises(RegistryError, match="cannot be read as SQLite: file is not a database"):
        workspace.register()
    assert (workspace.root / "mlflow.db").read_bytes().startswith(b"not a database")


def test_database_of_another_program_is_told(workspace):
    (workspace.root / "mlflow.db").unlink()
    with contextlib.closing(sqlite3.connect(workspace.root / "mlflow.db")) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")
        connection.commit()
    with pytest.raises(RegistryError, match="is not a registry of MLflow's"):
        workspace.register()


def test_deleted_experiment_is_told_with_the_way_back(workspace):
    workspace.register()
    client = workspace.client()
    client.delete_experiment(client.get_experiment_by_name("ptv2").experiment_id)
    with pytest.raises(RegistryError, match="'ptv2'.*is deleted; restore it"):
        workspace.register(seed=1)


def test_scores_of_another_prompt_are_refused(workspace):
    workspace.register(seed=1)
    arguments = workspace.make(seed=2)
    file = arguments["evaluate_dir"] / "metrics.json"
    scores = json.loads(file.read_text())
    file.write_text(json.dumps({**scores, "prompt_sha256": "0" * 64}))
    with pytest.raises(PipelineError, match=r"run `ptv2 evaluate --task intents` first"):
        register(**arguments)


def test_older_prompt_again_leaves_the_newest_the_challenger(workspace):
    workspace.register(seed=1, test=0.9)
    assert workspace.register(seed=2, test=0.5).aliases == ("challenger",)
    assert workspace.register(seed=1, test=0.9).aliases == ("champion",)


def test_prompt_of_another_task_is_refused(workspace):
    arguments = workspace.make("intents") | {"task": "slots"}
    with pytest.raises(RegistryError, match="expected a prompt for the task 'slots'"):
        register(**arguments)


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("results/intents/train/metrics.json", "train"),
        ("results/intents/train/history.csv", "train"),
        ("results/intents/evaluate/metrics.json", "evaluate"),
        ("data/prepared/intents/test.jsonl", "prepare"),
    ],
)
def test_missing_result_names_the_stage_to_run(workspace, file, stage):
    arguments = workspace.make()
    (workspace.root / file).unlink()
    with pytest.raises(PipelineError, match=f"'{stage}'"):
        register(**arguments)


# As a model of MLflow


def bare_environment(workspace) -> dict[str, str]:
    """Return an environment in which only the stored code can be imported, and no pickle read."""
    return {
        **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{workspace.root}/mlflow.db",
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.slow
def test_version_loads_anywhere_without_pickle_and_answers_as_the_predictor(workspace, tmp_path):
    workspace.register()
    workspace.register("slots", kind="tagging")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = """
import json, mlflow, pandas
intents = mlflow.pyfunc.load_model("models:/intents@champion")
slots = mlflow.pyfunc.load_model("models:/slots@champion")
text = pandas.DataFrame({"text": ["book a flight to rome", "cancel the meeting"]})
tokens = pandas.DataFrame({"tokens": ["call anna in paris", ["call", "anna", "in", "paris"]]})
answers = [intents.predict(text), slots.predict(tokens)]
print(json.dumps([answer.to_dict("records") for answer in answers]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=elsewhere,
        env=bare_environment(workspace),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    intents, slots = json.loads(done.stdout.splitlines()[-1])
    assert intents == [pytest.approx(row) for row in expected_labels(workspace)]
    (answer,) = predictor(workspace, "slots").predict(EXAMPLES["tagging"])
    expected = {key: json.dumps(answer[key]) for key in ("tags", "spans")}
    assert slots == [expected, expected]


@pytest.mark.slow
def test_mlflow_serves_a_version(workspace, tmp_path):
    workspace.register()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path / "server.log"
    stream = log.open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", "models:/intents/1",
         "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path,
        env=bare_environment(workspace),
        stdout=stream,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server, log=log)
        body = json.dumps({"dataframe_records": EXAMPLES["classification"]}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answers = json.load(response)["predictions"]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
        stream.close()
    assert answers == [pytest.approx(row) for row in expected_labels(workspace)]


def predictor(workspace, task: str) -> Predictor:
    return Predictor.load(workspace.root / "prompts" / task)


def expected_labels(workspace) -> list[dict[str, object]]:
    answers = predictor(workspace, "intents").predict(EXAMPLES["classification"])
    return [
        {"label": answer["label"], "score": answer["probabilities"][answer["label"]]}
        for answer in answers
    ]


def wait_for(url: str, server: subprocess.Popen[bytes], *, log: Path) -> None:
    for _ in range(240):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, log.read_text()
            time.sleep(0.25)
    pytest.fail(f"the server did not start: {log.read_text()}")
