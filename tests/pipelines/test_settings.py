import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from pipelines.schema import FetchSettings, RunSettings, TaskPrepareSettings
from pipelines.settings import (
    SHARED_MODELS,
    Settings,
    child_environment,
    load_settings,
    read_environment,
    set_environment_defaults,
)
from ptv2_core.config import HeadConfig, PromptConfig, TrainConfig
from ptv2_core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "params.yaml"

GOOD: dict[str, Any] = {
    "backbone": {"name": "tiny", "revision": None, "digest": None},
    "prepare": {"max_length": 64},
    "search": {"n_trials": 2, "space": {"prompt_length": [4, 16]}},
    "train": {"epochs": 3, "prompt": {"length": 8}},
    "evaluate": {},
    "register": {},
    "tasks": {
        "rte": {
            "fetch": {"source": "local", "path": "data/rte"},
            "prepare": {"kind": "classification", "text": "a", "label": "b"},
            "search": {},
            "train": {},
        }
    },
}


def _with(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy with `value` at a dotted path; `...` removes the key."""
    head, _, rest = path.partition(".")
    new = dict(values)
    if rest:
        new[head] = _with(new.get(head, {}), rest, value)
    elif value is ...:
        del new[head]
    else:
        new[head] = value
    return new


def load(folder: Path, values: dict[str, Any] | str) -> Settings:
    path = folder / "params.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, sort_keys=False))
    return load_settings(path)


def problems(folder: Path, values: dict[str, Any] | str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, values)
    return dict(caught.value.problems)


def test_the_shipped_file_is_sound_and_has_the_defaults() -> None:
    settings = load_settings(SHIPPED)
    assert list(settings.tasks) == ["intents", "entailment", "slots"]
    assert settings.root == ROOT
    assert settings.train == TrainConfig()
    for name, model in SHARED_MODELS.items():
        if isinstance(model, type) and issubclass(model, BaseModel) and name != "backbone":
            assert getattr(settings, name) == model(), f"{name}: defaults differ from the file"


def test_every_key_of_the_shipped_file_is_a_field_and_every_field_is_shown() -> None:
    shipped = yaml.safe_load(SHIPPED.read_text())
    tasks = shipped.pop("tasks")
    keys = {
        _closed(f"{name}.{key}") for name, section in shipped.items() for key in _paths(section)
    }
    fields = {
        _closed(f"{name}.{key}") for name, model in SHARED_MODELS.items() for key in _fields(model)
    }
    assert keys == fields
    shown = SHIPPED.read_text()
    for model in (FetchSettings, TaskPrepareSettings):
        assert all(name in shown for name in model.model_fields)
    for task in tasks.values():
        assert set(task) == {"fetch", "prepare", "search", "train"}


def _closed(path: str) -> str:
    """Cut a path at a section whose keys are those of another one, and are shown there."""
    borrowed = ["compare.space", "compare.train"]
    return next((section for section in borrowed if f"{path}.".startswith(f"{section}.")), path)


def _paths(values: dict[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from (f"{key}.{inner}" for inner in _paths(value))
        else:
            yield key


def _fields(model: Any) -> Iterator[str]:
    nested = {"prompt": PromptConfig, "head": HeadConfig}
    if dataclasses.is_dataclass(model):
        for field in dataclasses.fields(model):
            inner = nested.get(field.name) if model is TrainConfig else None
            yield from (f"{field.name}.{n}" for n in _fields(inner)) if inner else (field.name,)
        return
    for name, info in model.model_fields.items():
        is_section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        yield from (
            (f"{name}.{inner}" for inner in _fields(info.annotation)) if is_section else (name,)
        )


def test_a_task_lies_on_top_of_the_shared_sections_key_by_key(tmp_path: Path) -> None:
    own = {"train": {"prompt": {"dropout": 0.1}, "epochs": 9}, "prepare": {"max_rows": 5}}
    values = _with(GOOD, "tasks.rte.train", own["train"])
    values = _with(values, "tasks.rte.prepare.max_rows", 5)
    values = _with(
        values, "tasks.rte.search.space", {"prompt_length": None, "learning_rate": [1e-3, 1]}
    )
    settings = load(tmp_path, values)
    task = settings.task("rte")
    assert (task.train.epochs, task.train.prompt.length, task.train.prompt.dropout) == (9, 8, 0.1)
    assert (task.prepare.max_length, task.prepare.max_rows) == (64, 5)
    assert (task.search.n_trials, task.search.space.prompt_length) == (2, None)
    assert task.search.space.learning_rate == (1e-3, 1.0)
    assert settings.train.epochs == 3
    assert settings.run == RunSettings()
    mapping = task.to_mapping()
    assert mapping["train"]["prompt"]["dropout"] == 0.1
    assert mapping["fetch"]["source"] == "local"


def test_all_problems_come_at_once_each_at_its_place(tmp_path: Path) -> None:
    text = """\
backbone: {name: tiny, revision: main, digest: null}
prepare: {dev_fraction: 0.6, test_fraction: 0.6, max_rows: 0}
search:
  n_trials: "6"
  space: {prompt_length: [64, 8]}
  first: [{learning_rate: 1.0e-3}]
train: {lerning_rate: 1}
evaluate: null
regster: {}
tasks:
  rte:
    fetch: {source: demo, path: x, format: csv}
    prepare: {kind: tagging, text: a, labels: [x]}
    search: {n_trials: -1}
    train: {learning_rate: fast, prompt: {length: 0}}
    evaluate: {probe: false}
    trian: {}
  Bad/Name: {}
"""
    found = problems(tmp_path, text)
    assert found["tasks.rte.train.learning_rate"] == (
        "expected a number > 0 and <= 1, got 'fast' (params.yaml, line 15)"
    )
    assert found["tasks.rte.train.prompt.length"].endswith("got 0 (params.yaml, line 15)")
    assert found["regster"] == "unknown section; did you mean 'register'? (params.yaml, line 9)"
    assert found["tasks.rte.trian"].startswith("unknown key; did you mean 'train'?")
    assert found["tasks.rte.evaluate"].startswith("cannot be set for one task")
    assert found["search.n_trials"] == (
        "expected a whole number from 0 (no search) to 100000, got '6' (params.yaml, line 4)"
    )
    assert set(found) == {
        "backbone.revision",
        "prepare.dev_fraction",
        "prepare.max_rows",
        "search.n_trials",
        "search.space.prompt_length",
        "search.first.0.learning_rate",
        "train.lerning_rate",
        "evaluate",
        "register",
        "regster",
        "tasks.rte.fetch.format",
        "tasks.rte.prepare.labels",
        "tasks.rte.prepare.tags",
        "tasks.rte.prepare.text",
        "tasks.rte.prepare.tokens",
        "tasks.rte.search.n_trials",
        "tasks.rte.train.learning_rate",
        "tasks.rte.train.prompt.length",
        "tasks.rte.evaluate",
        "tasks.rte.trian",
        "tasks.Bad/Name",
        "tasks.Bad/Name.fetch",
        "tasks.Bad/Name.prepare",
        "tasks.Bad/Name.search",
        "tasks.Bad/Name.train",
    }


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("backbone.name", "", "expected a packaged model"),
        ("backbone.revision", ..., "is required"),
        ("backbone.presicion", "fp32", "did you mean 'precision'"),
        ("backbone.digest", "sha256:abc", "64 hexadecimal digits"),
        ("prepare.dev_fraction", 1.0, "from 0 to below 1, got 1.0"),
        ("prepare.dev_fraction", float("nan"), "from 0 to below 1, got nan"),
        ("prepare.seed", True, "expected a whole number from 0"),
        ("prepare.max_length", 3.0, "expected a whole number of tokens"),
        ("search.pruner", "asha", "median, successive_halving, hyperband or none, got 'asha'"),
        ("search.space", {}, "expected a range for one setting at least"),
        ("search.space.learning_rate", [0, 1], "numbers > 0 and <= 1"),
        ("search.space.learning_rate", [0.1], "expected null or [lowest, highest]"),
        ("search.space.reparameterization", [], "a list of embedding, mlp"),
        ("search.first", [{"prompt_length": 3}], "inside space.prompt_length ([4, 16]), got 3"),
        ("search.first", [{"prompt_dropout": 0.1}], "inside space.prompt_dropout (no range)"),
        ("search.first", {"prompt_length": 3}, "expected a list of mappings"),
        ("search.first", [{"prompt_layers": 2}], "inside space.prompt_layers (no range), got 2"),
        ("search.parallel", 0, "expected a whole number of trials side by side, 1 to 256, got 0"),
        ("search.screen", 3, "a mapping such as {layers: 2, n_trials: 12, keep: 3}, got 3"),
        (
            "search.screen",
            {"layers": 1, "n_trials": 1, "keep": 2},
            "expected n_trials (1) at most, got 2",
        ),
        (
            "search.screen",
            {"layers": 1, "n_trials": 9, "keep": 3},
            "expected search.n_trials (2) at most, which train them; got 3",
        ),
        (
            "search.screen",
            {"layers": 1, "n_trials": 200, "keep": 150},
            "expected search.n_trials",
        ),
        ("train", [], "expected a mapping of settings, got []"),
        ("register.gate_margin", -0.1, "expected a number from 0 to 1"),
        ("register", ..., "this section is required"),
        ("run", {"concurrency": 0}, "a whole number of stages"),
        ("tasks", {}, "one task at least"),
        ("tasks", ["rte"], "one task at least, got ['rte']"),
        ("tasks.rte", None, "expected a mapping with the keys fetch, prepare, search, train"),
        ("tasks.rte.train", ..., "is required, since DVC tracks it; `train: {}`"),
        ("tasks.rte.train", None, "expected a mapping of settings, got None"),
        ("tasks.rte.fetch.source", "ftp", "expected demo, local or hub, got 'ftp'"),
        ("tasks.rte.fetch.files", {"train": "../x"}, "expected a file inside fetch.path"),
        ("tasks.rte.fetch.files", {"train": "/x"}, "expected a file inside fetch.path"),
        ("tasks.rte.fetch.files", {"dev": "x"}, "is required; expected a file name"),
        ("tasks.rte.prepare.kind", ..., "is required; expected classification | regression"),
        ("tasks.rte.prepare.label", ..., "is required for kind: classification"),
        ("tasks.rte.prepare.tags", "t", "does not go with kind: classification"),
        ("tasks.rte.prepare.labels", ["x", "x"], "all different"),
        ("tasks.rte.prepare.test_fraction", 0.95, "below 1, got 0.1 + 0.95"),
        ("tasks.UPPER", {}, "expected a name of"),
    ],
)
def test_one_wrong_value_is_named(path: str, value: Any, expected: str, tmp_path: Path) -> None:
    found = problems(tmp_path, _with(GOOD, path, value))
    assert any(expected in message for message in found.values()), found
    assert all(place.startswith(path.rpartition(".")[0] or path) for place in found), found


@pytest.mark.parametrize("layers", ["some", 0, True])
def test_a_value_that_may_be_of_two_kinds_is_one_problem(layers: Any, tmp_path: Path) -> None:
    values = _with(GOOD, "search.space.prompt_layers", ["all", layers])
    values = _with(values, "search.first", [{"prompt_length": 8}, {"prompt_layers": layers}])
    found = problems(tmp_path, values)
    assert {place: message.rpartition(" (")[0] for place, message in found.items()} == {
        "search.space.prompt_layers.1": (
            f"expected null or a list of all and numbers of top layers, as [all, 4], got {layers!r}"
        ),
        "search.first.1.prompt_layers": f"expected all or a number of top layers, got {layers!r}",
    }


def test_a_screen_does_not_go_with_a_search_over_layers(tmp_path: Path) -> None:
    values = _with(GOOD, "search.space.prompt_layers", ["all", 2])
    values = _with(values, "search.screen", {"layers": 1, "n_trials": 2, "keep": 1})
    assert list(problems(tmp_path, values)) == ["search.screen"]


def test_a_screen_is_no_concern_of_a_task_without_a_search(tmp_path: Path) -> None:
    values = _with(GOOD, "search.screen", {"layers": 1, "n_trials": 2, "keep": 1})
    values = _with(values, "tasks.rte.search", {"n_trials": 0})
    assert load(tmp_path, values).task("rte").search.n_trials == 0


def test_a_problem_of_a_shared_section_is_not_repeated_for_each_task(tmp_path: Path) -> None:
    assert list(problems(tmp_path, _with(GOOD, "train.epochs", 0))) == ["train.epochs"]


def test_labels_that_yaml_reads_as_numbers_or_truth_values_are_text(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD, sort_keys=False).replace("kind:", "labels: [no, yes]\n      kind:")
    assert load(tmp_path, text).task("rte").prepare.labels == ("no", "yes")
    for given, expected in [([0, 1], ("0", "1")), ([False, True], ("false", "true"))]:
        values = _with(GOOD, "tasks.rte.prepare.labels", given)
        assert load(tmp_path, values).task("rte").prepare.labels == expected


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD, sort_keys=False).replace("epochs: 3", "learning_rate: 1e-3")
    assert load(tmp_path, text).train.learning_rate == 1e-3


def test_a_key_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    text = "tasks:\n  rte: {}\n  b: {x: 1, x: 2}\n  rte: {}\n  7: {}\n"
    found = problems(tmp_path, text)
    place = tmp_path / "params.yaml"
    assert found == {
        "tasks.rte": f"expected each key once, got 'rte' on lines 2 and 4 of {place}",
        "tasks.b.x": f"expected each key once, got 'x' on lines 3 and 3 of {place}",
        "tasks.7": f"expected text as the key: quote it on line 5 of {place}",
    }


def test_anchors_and_merges_are_read(tmp_path: Path) -> None:
    text = yaml.safe_dump(GOOD, sort_keys=False)
    text = text.replace("train:\n  epochs: 3", "train: &t\n  epochs: 3")
    assert (
        load(tmp_path, text.replace("    train: {}", "    train: {<<: *t, epochs: 4}"))
        .task("rte")
        .train.epochs
        == 4
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; expected the sections backbone"),
        (b"# only a comment\n", "is empty"),
        (b"- 1\n", "expected a mapping of sections at the top, got a list"),
        (b"a: 1\nb: \xff\n", "line 2: expected UTF-8 text, got the byte 0xff"),
        (b"a: [1\nb: 2", "line 2, column 2: not valid YAML"),
        (b"a:\n\t- 1", "line 2, column 1: not valid YAML"),
        (b"a: 1\n---\nb: 2", "not valid YAML"),
        (b"a: !!python/name:os.system x", "not valid YAML"),
        (b"a: &a [*a]", "nested more than 16 levels deep"),
        (b"a: \x07", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_settings_is_one_error(
    content: bytes, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no such file"):
        load_settings(tmp_path / "params.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        load_settings(tmp_path)


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="intents, entailment, slots.*did you mean 'slots'"):
        load_settings(SHIPPED).task("slot")


def test_the_environment_is_read_with_empty_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow")
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.delenv("PTV2_FLOW_RUN_ID", raising=False)
    environment = read_environment()
    assert environment.mlflow_tracking_uri == "http://mlflow"
    assert environment.prefect_api_url is None
    assert environment.flow_run_id is None


def test_a_child_gets_overrides_and_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_BY_USER", "user")
    child = child_environment({"X": "1"}, defaults={"SET_BY_USER": "ours", "Y": "2"})
    assert (child["X"], child["Y"], child["SET_BY_USER"]) == ("1", "2", "user")
    set_environment_defaults({"SET_BY_USER": "ours"})
    assert child_environment()["SET_BY_USER"] == "user"
