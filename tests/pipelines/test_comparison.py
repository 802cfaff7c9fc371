"""`ptv2 compare` and `ptv2 multitask`, on a tiny backbone: what they find, keep and refuse."""

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from pipelines import compare_jobs, comparison
from pipelines.compare_data import Variant
from pipelines.compare_stats import score
from pipelines.errors import PipelineError
from pipelines.extra_settings import CompareSettings, SharedPrompt, WindowSettings
from pipelines.paths import TaskPaths
from pipelines.prepared import Prepared
from pipelines.schema import FirstTrial, SearchSpace
from pipelines.settings import Settings, load_settings
from pipelines.stages.search import study_name
from ptv2_core.artifact import load_manifest
from ptv2_core.errors import ConfigError
from tests.pipelines.chain_parts import make_repository
from tests.pipelines.processes import Running, environment, program, run
from tests.stage_parts import PARAMS, call, change_params, make_workspace, read_params

BACKBONE = ("sha256:0", "torch.float32", "cpu")
METHODS = ("probe", "prompt_tuning", "ptv2", "finetune")
SPACE = {"learning_rate": [1e-3, 1e-2]}
SECTION: dict[str, Any] = {
    "parallel": 2,
    "space": {
        "ptv2": {**SPACE, "prompt_length": [2, 4]},
        "finetune": {"learning_rate": [1e-4, 1e-3]},
    },
    "train": {"finetune": {"learning_rate": 1e-3}},
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace whose tasks are prepared."""
    root = make_workspace(tmp_path_factory.mktemp("compare") / "workspace")
    change_params(root, {"compare": SECTION, "tasks.slots.train": {"learning_rate": 3e-2}})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for task in ("intents", "slots"):
            assert [call(stage, "-t", task) for stage in ("fetch", "prepare")] == [0, 0]
    return root


@pytest.fixture(autouse=True)
def in_workspace(prepared_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in the workspace, as the commands do: the backbone's folder is relative to it."""
    monkeypatch.chdir(prepared_once)


def section(settings: Settings, **changes: Any) -> CompareSettings:
    """Return the settings of a comparison with some changed."""
    return settings.compare.model_copy(update={"n_trials": 0, "seeds": (1,), **changes})


class Seen:
    """Keeps what a comparison says of its jobs."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        assert done == len(self.said) + 1 <= total
        self.said.append(what)


@pytest.mark.slow
def test_comparison_runs_every_method_and_keeps_what_ended(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    first = comparison.run(settings, ["intents"], section(settings, methods=METHODS))
    rows = {row.method: row for row in first.comparison.rows}
    assert set(rows) == set(METHODS)
    tuned = {method: row.tuned_parameters for method, row in rows.items()}
    layers, heads, size, hidden, length = 3, 4, 8, 32, 4
    assert tuned["probe"] == 0
    assert tuned["prompt_tuning"] == length * hidden
    assert tuned["ptv2"] == layers * 2 * heads * length * size
    assert tuned["finetune"] == first.comparison.backbone_parameters
    assert rows["finetune"].tuned_share == 1.0
    classes = 3
    head = classes * (hidden + 1)
    assert {m: row.artifact_bytes for m, row in rows.items()} == {
        method: 4 * (count + head) for method, count in tuned.items()
    }
    for row in rows.values():
        assert row.items is not None
        assert score(row.items) == pytest.approx(row.test, abs=1e-12)
        assert len(row.history) == 2
        assert row.peak_memory_bytes is not None
        assert row.peak_memory_bytes > 1e7
    assert sorted(file.name for file in first.folder.iterdir()) == [
        "compare.html", "compare.json", "compare.md",
    ]  # fmt: skip

    seen = Seen()
    kept = {
        file: file.stat().st_mtime_ns for file in prepared_once.rglob(".ptv2/compare/**/*.json")
    }
    again = comparison.run(settings, ["intents"], section(settings, methods=METHODS), seen)
    assert again.comparison.rows == first.comparison.rows
    assert kept == {file: file.stat().st_mtime_ns for file in kept}
    assert len(seen.said) == 2 * len(METHODS)


@pytest.mark.slow
def test_comparison_searches_each_method_as_often(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    chosen = section(settings, methods=("probe", "ptv2"), n_trials=2)
    found = comparison.run(settings, ["slots"], chosen).comparison
    by_method = {m: [t for t in found.trials if t.method == m] for m in chosen.methods}
    assert {method: len(trials) for method, trials in by_method.items()} == {"probe": 2, "ptv2": 2}
    assert {tuple(trial.settings) for trial in by_method["probe"]} == {("learning_rate",)}
    for method, trials in by_method.items():
        best = max(trials, key=lambda trial: trial.value or 0.0)
        for row in found.runs("slots", method):
            assert row.settings["learning_rate"] == best.settings["learning_rate"]
    database = prepared_once / ".ptv2" / "compare" / "slots" / "ptv2.db"
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT count(*) FROM trials").fetchone() == (2,)


@pytest.mark.slow
def test_comparison_names_the_job_that_failed(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    rate = {**settings.compare.train, "finetune": {"learning_rate": 0.5}}
    chosen = section(settings, methods=("finetune",), train=rate)
    expected = "^intents finetune, seed 1: train.learning_rate: 0.5 would wipe out"
    with pytest.raises(PipelineError, match=expected):
        comparison.run(settings, ["intents"], chosen)


@pytest.mark.slow
def test_comparison_goes_on_without_a_training_whose_loss_is_not_finite(
    prepared_once: Path,
) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    wild = {**settings.compare.train, "ptv2": {"prompt": {"start_std": 1e38}}}
    chosen = section(settings, methods=("ptv2", "probe"), train=wild)
    done = comparison.run(settings, ["intents"], chosen)
    assert [row.method for row in done.comparison.rows] == ["probe"]
    assert done.summary.missing == (("intents", "ptv2", (1,)),)
    (failed,) = done.failed
    assert re.match("intents ptv2, seed 1: loss nan .* at step 1", failed)
    assert "intents ptv2 (seed 1)" in (done.folder / "compare.md").read_text()


@pytest.mark.slow
def test_comparison_of_a_variant_with_windows_is_kept_and_told(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    wild = {"method": "ptv2", "prompt": {"start_std": 1e38}}
    changes = {"prompt": {"length": 3}, "epochs": 1}
    train = {**settings.compare.train, "short": {"method": "ptv2", **changes}, "wild": wild}
    window = WindowSettings(methods=("short", "wild"), factor=16.0, points=3, seeds=(4,))
    chosen = section(settings, methods=("probe", "short"), train=train, window=window)
    done = comparison.run(settings, ["intents"], chosen)
    found = done.comparison
    assert [(row.method, row.settings.get("prompt_length")) for row in found.rows] == [
        ("probe", None),
        ("short", 3),
    ]
    assert found.variants == (
        Variant(name="short", method="ptv2", changes=changes),
        Variant(name="wild", method="ptv2", changes={"prompt": {"start_std": 1e38}}),
    )
    assert found.window is not None
    assert [(one.method, one.learning_rate, one.is_diverged) for one in found.window.runs] == [
        (name, rate, name == "wild") for name in ("short", "wild") for rate in (2.5e-3, 1e-2, 4e-2)
    ]
    assert {one.dev for one in found.window.runs if one.is_diverged} == {0.0}
    assert done.failed == ()
    told = (done.folder / "compare.md").read_text()
    assert "count as 0 (how many seeds): intents wild at 0.0025 (1)," in told
    seen = Seen()
    again = comparison.run(settings, ["intents"], chosen, seen)
    assert (again.comparison.rows, again.comparison.window) == (found.rows, found.window)
    # a search, a training and a window each for two names
    assert len(seen.said) == 6


def test_comparison_asks_again_where_template_or_windows_changed(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    paths = TaskPaths(root=prepared_once, task="intents")
    chosen = section(settings, methods=("probe",))
    cell = compare_jobs.cell_of(settings.task("intents"), paths, chosen, "probe", BACKBONE)
    prepared = Prepared.load(paths.prepared)
    other = replace(prepared.task, template="{text} It was {mask}.")
    changed = (prepared, replace(prepared, task=other), replace(prepared, stride=7))
    backbone = ("digest", "torch.float32", "cpu")
    assert len({study_name(cell.settings, one, backbone) for one in changed}) == 3
    compare_jobs.train(cell, {}, 5, torch.get_num_threads())
    assert compare_jobs.finished_row(cell, {}, 5) is not None
    file = paths.prepared / "task.json"
    before = file.read_text()
    try:
        file.write_text(before.replace('"template": null', '"template": "{text} {mask}"'))
        assert compare_jobs.finished_row(cell, {}, 5) is None
    finally:
        file.write_text(before)


def test_comparison_of_no_trials_needs_no_ranges(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    paths = TaskPaths(root=prepared_once, task="intents")
    space = {**settings.compare.space, "probe": SearchSpace()}
    chosen = section(settings, space=space)
    cell = compare_jobs.cell_of(settings.task("intents"), paths, chosen, "probe", BACKBONE)
    assert compare_jobs.finished_search(cell) == compare_jobs.Found(changes={}, trials=())


def test_comparison_tries_first_what_lies_in_its_own_space(prepared_once: Path) -> None:
    settings = load_settings(prepared_once / "params.yaml")
    paths = TaskPaths(root=prepared_once, task="intents")
    asked = (
        FirstTrial(prompt_length=3, learning_rate=5e-3, prompt_dropout=0.1),
        FirstTrial(prompt_length=64, learning_rate=5e-3),
    )
    task = settings.task("intents")
    task = replace(task, search=task.search.model_copy(update={"first": asked}))
    chosen = section(settings, n_trials=2)
    firsts = {
        method: compare_jobs.cell_of(task, paths, chosen, method, BACKBONE).settings.search.first
        for method in ("ptv2", "finetune")
    }
    assert firsts == {
        "ptv2": (FirstTrial(prompt_length=3, learning_rate=5e-3),),
        "finetune": (),
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("-m", "lora"), "--method: expected .*probe"),
        (("--seed", "1", "--seed", "1"), "--seed: expected each once"),
        (("-t", "nothing"), "expected a task"),
    ],
)
def test_compare_refuses_what_it_does_not_know(
    prepared_once: Path,
    options: tuple[str, ...],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("compare", "-C", str(prepared_once), *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(expected, said)


@pytest.mark.long
def test_compare_as_a_user_runs_it_is_logged_and_goes_on_after_an_interrupt(
    tmp_path: Path,
) -> None:
    tasks = {"intents": PARAMS["tasks"]["intents"]}
    own = {
        **SECTION,
        "seeds": [1, 2],
        "train": {**SECTION["train"], "small": {"method": "ptv2", "prompt": {"length": 2}}},
        "window": {"methods": ["probe"], "points": 3, "train": {"epochs": 1}},
    }
    root = make_repository(tmp_path / "workspace", tasks, compare=own)
    options = ("compare", "--trials", "0", "-m", "probe", "-m", "small", "--json", "out.json")
    first = Running(root, program(), *options, environment=environment(OMP_NUM_THREADS="2"))
    first.wait_until(lambda: any((root / ".ptv2" / "compare" / "intents").glob("*.json")))
    assert first.interrupt() == 130
    first.wait_until_all_is_gone()
    assert "Traceback" not in first.said, first.said
    kept = set((root / ".ptv2" / "compare" / "intents").glob("*.json"))
    run(root, program(), *options)
    assert kept <= set((root / ".ptv2" / "compare" / "intents").glob("*.json"))
    rows = json.loads((root / "out.json").read_text())["rows"]
    assert {(row["task"], row["method"], row["seed"]) for row in rows} == {
        ("intents", method, seed) for method in ("probe", "small") for seed in (1, 2)
    }
    wanted = {"task", "method", "seed", "dev", "test", "tuned_share", "artifact_bytes", "seconds"}
    assert all(wanted <= set(row) for row in rows)
    with closing(sqlite3.connect(root / "mlflow.db")) as connection:
        keys = {key for (key,) in connection.execute("SELECT key FROM metrics")}
    assert keys == {"intents.probe.test", "intents.small.test", "intents.probe.window"}
    with closing(sqlite3.connect(root / ".ptv2" / "prefect" / "prefect.db")) as connection:
        states = connection.execute("SELECT name, state_type FROM flow_run ORDER BY created")
        assert [state for _, state in states] == ["CANCELLED", "COMPLETED"]
        artifacts = connection.execute("SELECT key FROM artifact").fetchall()
    assert artifacts == [("ptv2-compare",)]


def test_multitask_trains_one_prompt_for_all_and_a_task_begins_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_workspace(tmp_path / "workspace")
    params = read_params(root)
    other = {**params["tasks"]["slots"], "fetch": {"source": "local", "path": "mine/slots"}}
    change_params(
        root,
        {
            "tasks.names": other,
            "multitask.shared.tagging": {
                "tasks": ["slots", "names"],
                "train": {"epochs": 2, "learning_rate": 3e-2},
            },
        },
    )
    monkeypatch.chdir(root)
    for task in ("slots", "names"):
        assert [call(stage, "-t", task) for stage in ("fetch", "prepare")] == [0, 0]
    assert call("multitask", "tagging") == 0
    said = capsys.readouterr().out
    assert "Shared prompt tagging" in said
    folders = {task: root / "prompts" / "shared" / "tagging" / task for task in ("slots", "names")}
    tensors = {
        task: safetensors.torch.load_file(folder / "prompt.safetensors")
        for task, folder in folders.items()
    }
    assert tensors["slots"]["prompt"].equal(tensors["names"]["prompt"])
    assert not tensors["slots"]["head.weight"].equal(tensors["names"]["head.weight"])

    change_params(root, {"tasks.names.train.init_from": "prompts/shared/tagging/slots"})
    change_params(root, {"tasks.names.train.epochs": 1, "tasks.names.train.learning_rate": 1e-30})
    assert [call(stage, "-t", "names") for stage in ("search", "train")] == [0, 0]
    trained = safetensors.torch.load_file(root / "prompts" / "names" / "prompt.safetensors")
    # at such a rate a training ends where it began
    assert trained["prompt"].allclose(tensors["slots"]["prompt"], atol=1e-6)
    assert trained["head.weight"].allclose(tensors["slots"]["head.weight"], atol=1e-6)
    manifest = load_manifest(root / "prompts" / "names")
    assert manifest.training["init_from"] == "prompts/shared/tagging/slots"


@pytest.mark.parametrize(
    ("shared", "expected"),
    [
        ({"tasks": ["slots", "intents"]}, "expected tasks that answer alike, got slots answers"),
        ({"tasks": ["slots", "slots"]}, "expected each once"),
        ({"tasks": ["slots", "none"]}, "expected a task"),
    ],
)
def test_multitask_refuses_tasks_that_cannot_share(
    prepared_once: Path, tmp_path: Path, shared: dict[str, Any], expected: str
) -> None:
    from pipelines import multitask

    settings = load_settings(prepared_once / "params.yaml")
    change = {"shared": {"mix": SharedPrompt(**shared)}}
    chosen = settings.multitask.model_copy(update=change)
    with pytest.raises(ConfigError, match=expected):
        multitask.run(Settings(**{**vars(settings), "multitask": chosen}), "mix")
    with pytest.raises(ConfigError, match="expected one of"):
        multitask.run(settings, "mix")
