from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import published
from pipelines.flow_yaml import flow, task_lines
from pipelines.published import PublishedTask, add_task, as_task, first_trials, load_published
from pipelines.schema import SearchSpace
from pipelines.settings import load_settings, read_yaml
from pipelines.sources.hub import read_pin
from ptv2_core.config import TrainConfig
from ptv2_core.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper.yaml"

# run_script/ of the released code: task, size -> batch, learning rate, prompt length, epochs
RELEASED: dict[tuple[str, str], tuple[int, float, int, int]] = {
    ("boolq", "bert-large"): (32, 5e-3, 40, 100),
    ("boolq", "roberta-large"): (32, 7e-3, 8, 100),
    ("copa", "bert-large"): (16, 1e-2, 16, 80),
    ("copa", "roberta-large"): (16, 9e-3, 8, 120),
    ("rte", "bert-large"): (32, 1e-2, 20, 60),
    ("rte", "roberta-large"): (32, 5e-3, 128, 100),
    ("wic", "bert-large"): (16, 1e-4, 20, 80),
    ("wic", "roberta-large"): (32, 1e-2, 8, 50),
    ("wsc", "bert-large"): (16, 5e-3, 20, 80),
    ("wsc", "roberta-large"): (16, 1e-2, 8, 10),
    ("conll03", "roberta-large"): (16, 3e-2, 11, 30),
    ("conll04", "bert-large"): (32, 2e-2, 128, 40),
    ("conll04", "roberta-large"): (32, 6e-2, 144, 80),
    ("ontonotes", "bert-large"): (16, 1e-2, 16, 30),
    ("ontonotes", "roberta-large"): (16, 7e-3, 48, 60),
    ("conll05_wsj", "roberta-large"): (16, 6e-3, 224, 15),
    ("conll05_brown", "roberta-large"): (16, 6e-3, 224, 15),
    ("conll12", "roberta-large"): (32, 5e-3, 64, 45),
    ("squad", "roberta-large"): (8, 5e-3, 16, 30),
    ("squad_v2", "roberta-large"): (8, 5e-3, 8, 10),
}
# tasks of the paper without a released script, and one for regression
WITHOUT_SCRIPT = {"cb", "multirc", "record", "sst2", "stsb"}
KINDS = {
    "boolq": "classification",
    "cb": "classification",
    "copa": "multiple_choice",
    "multirc": "multirc",
    "record": "record",
    "rte": "classification",
    "wic": "word_in_context",
    "wsc": "coreference",
    "conll03": "tagging",
    "conll04": "tagging",
    "ontonotes": "tagging",
    "conll05_wsj": "srl",
    "conll05_brown": "srl",
    "conll12": "srl",
    "squad": "qa",
    "squad_v2": "qa",
    "sst2": "classification",
    "stsb": "regression",
}
# data that may not be had without an agreement, or only in another form
LOCAL = {"conll04", "ontonotes", "conll05_wsj", "conll05_brown", "conll12"}
# no public code was found that names a commit of these
UNPINNED = {"conll03"}
MAX_LENGTHS = {"squad": 384, "squad_v2": 384, "conll03": 152}

PARAMS = """\
# a comment at the top
backbone: {name: tiny, revision: null, digest: null}
prepare: {max_length: 64}
search:
  n_trials: 2
  space: {prompt_length: [8, 64], learning_rate: [3.0e-3, 5.0e-2]}
train: {epochs: 3}
evaluate: {}
register: {}

tasks:
  # a comment on mine
  mine:
    fetch: {source: local, path: data/mine}
    prepare: {kind: classification, text: a, label: b}   # and one behind
    search: {}
    train: {}
"""
SMALL = """\
train: {weight_decay: 0.0}
tasks:
  toy:
    about: a toy
    licence: none
    fetch: {source: local, path: data/toy, files: {train: t.jsonl}}
    prepare: {kind: classification, text: a, label: b, max_length: 128}
    metric: accuracy
    settings:
      large:
        backbone: some-large
        script: run_toy.sh
        prepare: {text_pair: c}
        train: {learning_rate: 1.0e-4, epochs: 7, prompt: {length: 128, dropout: 0.1}}
      small:
        backbone: some-small
        script: run_toy.sh
        train: {learning_rate: 1.0e-2, prompt: {length: 16, reparameterization: mlp}}
"""


@pytest.fixture
def toy(tmp_path: Path) -> PublishedTask:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return load_published(path)["toy"]


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PARAMS)
    return path


def problems(tmp_path: Path, text: str) -> dict[str, str]:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_published(path)
    return dict(caught.value.problems)


# The paper's file


def test_the_file_of_the_paper_is_complete() -> None:
    tasks = load_published(PAPER)
    assert {name: task.prepare["kind"] for name, task in tasks.items()} == KINDS
    assert {name for name, task in tasks.items() if not task.settings} == WITHOUT_SCRIPT
    assert {name for name, task in tasks.items() if task.fetch["source"] == "local"} == LOCAL


def test_the_paper_s_settings_are_those_of_the_released_scripts() -> None:
    found = {}
    for name, task in load_published(PAPER).items():
        for family, settings in task.settings.items():
            train = TrainConfig.from_mapping(settings.train)
            found[name, family] = (
                train.batch_size,
                train.learning_rate,
                train.prompt.length,
                train.epochs,
            )
            assert train.patience == train.epochs
            assert train.prompt.dropout == train.head.dropout > 0
            assert (train.warmup_fraction, train.weight_decay, train.max_grad_norm) == (0, 0, 1)
            with_mlp = (name, family) == ("wic", "bert-large")
            assert train.prompt.reparameterization == ("mlp" if with_mlp else "embedding")
            base = family.split("-")[0]
            assert settings.backbone.startswith(family)
            assert settings.script.endswith(f"_{base}.sh")
    assert found == RELEASED


def test_the_paper_s_texts_have_the_released_length() -> None:
    for name, task in load_published(PAPER).items():
        assert task.prepare["max_length"] == MAX_LENGTHS.get(name, 128)
        assert task.prepare.get("stride") == (128 if task.prepare["kind"] == "qa" else None)


def test_the_paper_s_templates_are_those_of_the_released_code() -> None:
    tasks = load_published(PAPER)
    found = {
        (name, family): as_task(task, family)["prepare"].get("template")
        for name, task in tasks.items()
        for family in task.settings
    }
    expected = {
        ("copa", "bert-large"): "joined",
        ("copa", "roberta-large"): "joined",
        ("wic", "bert-large"): "prefix",
        ("wic", "roberta-large"): "question",
        ("wsc", "bert-large"): "starred",
        ("wsc", "roberta-large"): "starred",
    }
    assert found == dict.fromkeys(RELEASED) | expected


def test_the_pins_of_the_paper_are_sound_or_wait_for_a_commit() -> None:
    unpinned = set()
    for name, task in load_published(PAPER).items():
        if task.fetch["source"] != "hub":
            continue
        path = f"configs/hub/{name}.toml"
        assert task.fetch["path"] == path
        if published.needed_first(task, ROOT) is not None:
            with pytest.raises(DataError, match=r"40 hexadecimal digits.*`ptv2 pin FILE`"):
                read_pin(ROOT / path, path, ROOT)
            unpinned.add(name)
            continue
        pin = read_pin(ROOT / path, path, ROOT)
        assert {"train", "test"} <= set(pin.splits)
    assert unpinned == UNPINNED
    pins = {path.stem for path in (ROOT / "configs" / "hub").iterdir()}
    assert pins == set(KINDS) - LOCAL


@pytest.mark.parametrize("family", [None, "bert-large", "roberta-large"])
def test_every_task_of_the_paper_can_be_added_to_the_shipped_params(
    family: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    tasks = load_published(PAPER)
    chosen = [task for task in tasks.values() if family is None or family in task.settings]
    for task in chosen:
        add_task(path, task, family)
    loaded = load_settings(path)
    for task in chosen:
        settings = loaded.task(task.name)
        assert settings.prepare.kind == KINDS[task.name]
        if family is not None:
            batch, rate, length, epochs = RELEASED[task.name, family]
            train = settings.train
            assert (train.batch_size, train.learning_rate) == (batch, rate)
            assert (train.prompt.length, train.epochs) == (length, epochs)
            first = settings.search.first[0]
            assert (first.learning_rate, first.prompt_length) == (rate, length)


# The form of the file


def test_published_shared_settings_lie_under_those_of_a_task(toy: PublishedTask) -> None:
    assert toy.of("large").train == {
        "weight_decay": 0.0,
        "learning_rate": 1e-4,
        "epochs": 7,
        "prompt": {"length": 128, "dropout": 0.1},
    }
    with pytest.raises(ConfigError, match="expected the settings of one of large, small, none"):
        toy.of("huge")


@pytest.mark.parametrize(
    ("old", "new", "place", "expected"),
    [
        ("epochs: 7", "epochs: 0", "settings.large.train.epochs", "small.yaml, line 14"),
        ("epochs: 7", "epoch: 7", "settings.large.train.epoch", "unknown key"),
        ("text_pair: c", "tokens: c", "settings.large.prepare.tokens", "small.yaml, line 13"),
        ("label: b,", "", "prepare.label", "is required"),
        ("source: local", "source: ftp", "fetch.source", "got 'ftp'"),
        ("metric: accuracy", "metric: f1", "metric", "expected accuracy, which scores kind: cl"),
        ("licence: none", "license: none", "license", "unknown key; did you mean 'licence'"),
        ("script: run_toy.sh\n        train", "train", "settings.small.script", "is required"),
    ],
)
def test_published_problem_is_named_with_key_and_line(
    old: str, new: str, place: str, expected: str, tmp_path: Path
) -> None:
    assert SMALL.count(old) == 1
    found = problems(tmp_path, SMALL.replace(old, new))
    assert expected in found[f"tasks.toy.{place}"], found


def test_published_file_without_tasks_or_absent_is_refused(tmp_path: Path) -> None:
    assert list(problems(tmp_path, "trian: {}\n")) == ["trian", "tasks"]
    with pytest.raises(ConfigError, match=r"nothing.yaml, found no such file"):
        load_published(tmp_path / "nothing.yaml")


# What becomes of a task


def test_first_trials_are_the_published_settings_once(toy: PublishedTask) -> None:
    large = {"prompt_length": 128, "learning_rate": 1e-4, "prompt_dropout": 0.1}
    small = {"prompt_length": 16, "learning_rate": 1e-2, "reparameterization": "mlp"}
    assert first_trials(toy) == [large, small]
    assert first_trials(toy, "small") == [small]


def test_as_task_widens_the_space_for_the_first_trial(toy: PublishedTask) -> None:
    space = SearchSpace(prompt_length=(8, 64), learning_rate=(3e-3, 5e-2))
    assert as_task(toy, "large", space) == {
        "fetch": {"source": "local", "path": "data/toy", "files": {"train": "t.jsonl"}},
        "prepare": {
            "kind": "classification",
            "text": "a",
            "label": "b",
            "max_length": 128,
            "text_pair": "c",
        },
        "search": {
            "space": {"prompt_length": [8, 128], "learning_rate": [1e-4, 5e-2]},
            "first": [{"prompt_length": 128, "learning_rate": 1e-4}],
        },
        "train": dict(toy.of("large").train),
    }
    # inside the space already: nothing to widen
    assert as_task(toy, "small", space)["search"] == {
        "first": [{"prompt_length": 16, "learning_rate": 1e-2}]
    }
    wide = SearchSpace.model_validate({"reparameterization": ["embedding"]})
    assert as_task(toy, "small", wide)["search"] == {
        "space": {"reparameterization": ["embedding", "mlp"]},
        "first": [{"reparameterization": "mlp"}],
    }


def test_as_task_without_a_size_takes_no_settings(toy: PublishedTask) -> None:
    sections = as_task(toy)
    assert (sections["search"], sections["train"]) == ({}, {})
    assert "text_pair" not in sections["prepare"]


# The file that a task is added to


def test_add_task_appends_and_keeps_every_line(params: Path, toy: PublishedTask) -> None:
    add_task(params, toy, "large")
    text = params.read_text()
    assert text.startswith(PARAMS)
    added = text.removeprefix(PARAMS)
    assert added.splitlines()[:4] == [
        "  # a toy",
        "  toy:",
        "    fetch: {source: local, path: data/toy, files: {train: t.jsonl}}",
        "    prepare: {kind: classification, text: a, label: b, max_length: 128, text_pair: c}",
    ]
    space = load_settings(params).search.space
    assert yaml.safe_load(added)["toy"] == as_task(toy, "large", space)
    task = load_settings(params).task("toy")
    assert task.train.prompt.length == 128
    assert task.search.n_trials == 2
    assert [trial.prompt_length for trial in task.search.first] == [128]


def test_add_task_finds_the_tasks_wherever_they_are(params: Path, toy: PublishedTask) -> None:
    head, _, tasks = PARAMS.partition("\ntasks:")
    text = f"tasks:{tasks}  # the last line of mine\n\n# about the rest\n{head}"
    params.write_text(text)
    add_task(params, toy, name="other")
    lines = params.read_text().splitlines()
    at = lines.index("  other:")
    assert lines[at - 2] == "  # the last line of mine"
    assert lines[at + 5 : at + 7] == ["", "# about the rest"]
    assert list(load_settings(params).tasks) == ["mine", "other"]
    assert lines[: at - 1] + lines[at + 5 :] == text.splitlines()


def test_add_task_keeps_the_line_ends_and_a_missing_last_one(
    params: Path, toy: PublishedTask
) -> None:
    params.write_bytes(PARAMS.rstrip("\n").replace("\n", "\r\n").encode())
    add_task(params, toy)
    raw = params.read_bytes()
    assert raw.count(b"\n") == raw.count(b"\r\n")
    assert list(load_settings(params).tasks) == ["mine", "toy"]


def test_add_task_refuses_a_task_that_is_there(params: Path, toy: PublishedTask) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.mine: .* has this task already"):
        add_task(params, toy, name="mine")
    assert params.read_text() == PARAMS


def test_add_task_refuses_what_would_not_load(params: Path, toy: PublishedTask) -> None:
    with pytest.raises(ConfigError, match="expected a name of"):
        add_task(params, toy, name="Toy")
    screened = PARAMS.replace("n_trials: 2", "n_trials: 2\n  first: [{prompt_length: 9}]")
    for text, expected in [
        (PARAMS.replace("epochs: 3", "epochs: 0"), "train.epochs"),
        (PARAMS.replace("kind: classification", "kind: no"), "tasks.mine.prepare.kind"),
    ]:
        params.write_text(text)
        with pytest.raises(ConfigError, match=expected):
            add_task(params, toy)
        assert params.read_text() == text
    params.write_text(screened)
    add_task(params, toy, "large")  # its own first trial takes the place of the shared one
    assert [trial.prompt_length for trial in load_settings(params).task("toy").search.first] == [
        128
    ]


def test_add_task_refuses_tasks_on_one_line(params: Path, toy: PublishedTask) -> None:
    mine = "{fetch: {source: local, path: d}, prepare: {kind: classification, text: a, label: b}"
    head = PARAMS.partition("tasks:")[0]
    text = f"{head}tasks: {{mine: {mine}, search: {{}}, train: {{}}}}}}\n"
    params.write_text(text)
    with pytest.raises(ConfigError, match="write them below each other"):
        add_task(params, toy)
    assert params.read_text() == text


def test_add_task_that_fails_in_writing_leaves_the_file(
    params: Path, toy: PublishedTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        add_task(params, toy)
    monkeypatch.undo()
    assert params.read_text() == PARAMS
    assert sorted(path.name for path in params.parent.iterdir()) == ["params.yaml", "small.yaml"]


def test_add_task_needs_the_pin_file_of_a_hub_source(params: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected the pin file configs/hub/rte\.toml in"):
        add_task(params, load_published(PAPER)["rte"])
    assert params.read_text() == PARAMS


def test_needed_first_says_what_a_user_has_to_do(tmp_path: Path, toy: PublishedTask) -> None:
    assert published.needed_first(toy, tmp_path) == "put t.jsonl into data/toy (licence: none)"
    (tmp_path / "data" / "toy").mkdir(parents=True)
    assert published.needed_first(toy, tmp_path) is None
    tasks = load_published(PAPER)
    assert published.needed_first(tasks["rte"], ROOT) is None
    assert (
        published.needed_first(tasks["rte"], tmp_path) == "put a pin file at configs/hub/rte.toml"
    )
    unpinned = "run `ptv2 pin configs/hub/conll03.toml`, which writes the newest commit"
    assert published.needed_first(tasks["conll03"], ROOT) == unpinned


# Plain values as YAML


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        {"a": [1, 2.5, 1e-4, 3e-6, 1e22, None, True, {"b": []}]},
        ["yes", "no", "on", "null", "True", "1", "1.5", "", " a", "a: b", "a, b", "#", "é", "é x"],
        {"odd key": "a b", "b": '"quoted" \\ and\nlines'},
    ],
)
def test_flow_is_read_back_as_it_was(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"a: {flow(value)}\n")
    assert read_yaml(path)[0] == {"a": value}


def test_task_lines_breaks_what_is_too_wide() -> None:
    wide = {f"key{n}": "v" * 20 for n in range(6)}
    lines = task_lines("t", {"one": {"a": 1}, "two": wide}, comment="two\nlines", indent=4)
    assert lines[:4] == ["    # two lines", "    t:", "      one: {a: 1}", "      two:"]
    assert lines[4:] == [f"        key{n}: {'v' * 20}" for n in range(6)]


def test_settings_of_the_documented_comparison_are_sound() -> None:
    settings = load_settings(ROOT / "configs" / "comparison.yaml")
    assert len(settings.tasks) == 10
    assert settings.compare.methods == ("probe", "ptv2", "finetune")
    assert set(settings.multitask.shared["tagging"].tasks) <= set(settings.tasks)


def test_settings_of_the_documented_study_are_sound() -> None:
    settings = load_settings(ROOT / "configs" / "study.yaml")
    compare = settings.compare
    assert set(compare.methods) <= set(compare.train)
    assert compare.window is not None
    assert compare.window.methods == ("ptv2", "plain")
    # the names beside the methods are prompts in every layer with other settings
    own = [name for name in compare.train if compare.train[name].get("method")]
    assert {compare.method_of(name) for name in own} == {"ptv2"}
    train = settings.task("slots").train
    assert (train.prompt.length, train.prompt.start, train.learning_rate) == (64, "backbone", 0.1)
