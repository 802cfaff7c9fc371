import json
import random
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.apply import Applied, apply, sentences
from pipelines.apply_yaml import UneditableError, set_value, value_text
from pipelines.console import diff_text
from pipelines.errors import PipelineError
from pipelines.paths import TaskPaths
from pipelines.schema import nested
from pipelines.settings import load_settings, merge, read_yaml
from ptv2_core.errors import ConfigError
from tests.pipelines.sweep_parts import sweep, trial, won_by
from tests.stage_parts import call

ROOT = Path(__file__).resolve().parents[2]
OWN = (ROOT / "params.yaml").read_text(encoding="utf-8")

HEAD = """\
# at the top
backbone: {name: tiny, revision: null, digest: null}
prepare: {max_length: 64}
search: {n_trials: 2}
train: {epochs: 3, prompt: {length: 8}, learning_rate: 2.0e-2}
evaluate: {}
register: {}

tasks:
  # about mine
  mine:
    fetch:   {source: local, path: "data/mine"}
    prepare: {kind: classification, text: a, label: b}   # kept
    search: {}
"""
TAIL = """\

  # about the other
  other:
    fetch: {source: local, path: 'data/other'}
    prepare: {kind: classification, text: a, label: b}
    search: {}
    train: {epochs: 4}
# at the end
"""
NOTE = "# {note: 1}"
BOTH = {"prompt_length": 16, "learning_rate": 0.0123}

# the train section of `mine` as it is written -> with prompt length 16 and learning rate 0.0123
FORMS = {
    "    train: {}\n": "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}\n",
    "    train: { }\n": "    train: { prompt: {length: 16}, learning_rate: 1.23e-2}\n",
    "    train:\n": "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}\n",
    "    train:   # as it is\n": (
        "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}   # as it is\n"
    ),
    "    train: null  # none\n": (
        "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}  # none\n"
    ),
    "    train: ~\n": "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}\n",
    "": "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}\n",
    "    'train':\n      epochs: 6  # six\n": (
        "    'train':\n      epochs: 6  # six\n"
        "      prompt: {length: 16}\n      learning_rate: 1.23e-2\n"
    ),
    "    train: {epochs: 6}  # six\n": (
        "    train: {epochs: 6, prompt: {length: 16}, learning_rate: 1.23e-2}  # six\n"
    ),
    "    train: {epochs:   6 , }\n": (
        "    train: {epochs:   6, prompt: {length: 16}, learning_rate: 1.23e-2 , }\n"
    ),
    "    train: {prompt: {length: 8, dropout: 0.1}, learning_rate: 1e-3}\n": (
        "    train: {prompt: {length: 16, dropout: 0.1}, learning_rate: 1.23e-2}\n"
    ),
    "    train: {prompt: {dropout: 0.1}}\n": (
        "    train: {prompt: {dropout: 0.1, length: 16}, learning_rate: 1.23e-2}\n"
    ),
    "    train: {prompt: {}}\n": "    train: {prompt: {length: 16}, learning_rate: 1.23e-2}\n",
    "    train: {prompt: }\n": "    train: {prompt: {length: 16}, learning_rate: 1.23e-2 }\n",
    '    train: {"learning_rate":1e-3,"prompt":{"length":8}}\n': (
        '    train: {"learning_rate":1.23e-2,"prompt":{"length":16}}\n'
    ),
    "    train: {\n      epochs: 6,  # six\n      learning_rate: 1e-3   # slow\n    }\n": (
        "    train: {\n      epochs: 6,  # six\n"
        "      learning_rate: 1.23e-2, prompt: {length: 16}   # slow\n    }\n"
    ),
    "    train:\n      # first\n      prompt:   # why\n        length:  8   # short\n"
    "        # in between\n        layers:\n        - 0  # lowest\n        - 3\n"
    "      learning_rate: .001\n      # last\n": (
        "    train:\n      # first\n      prompt:   # why\n        length:  16   # short\n"
        "        # in between\n        layers:\n        - 0  # lowest\n        - 3\n"
        "      learning_rate: 1.23e-2\n      # last\n"
    ),
    "    train:\n        prompt:\n          layers:\n          - 0\n          - 3  # two\n": (
        "    train:\n        prompt:\n          layers:\n          - 0\n          - 3  # two\n"
        "          length: 16\n        learning_rate: 1.23e-2\n"
    ),
    "    train:\n      prompt:\n      epochs: 6\n": (
        "    train:\n      prompt: {length: 16}\n      epochs: 6\n      learning_rate: 1.23e-2\n"
    ),
    "    train:\n      init_from: >-\n        models:/mine@champion\n\n": (
        "    train:\n      init_from: >-\n        models:/mine@champion\n"
        "      prompt: {length: 16}\n      learning_rate: 1.23e-2\n\n"
    ),
    "    train:\n      learning_rate: 0.0123\n": (
        "    train:\n      learning_rate: 0.0123\n      prompt: {length: 16}\n"
    ),
    "    train: &mine {epochs: 6}\n": (
        "    train: &mine {epochs: 6, prompt: {length: 16}, learning_rate: 1.23e-2}\n"
    ),
}  # fmt: skip


def workspace(
    root: Path, text: str, params: dict[str, Any], task: str = "mine", *, newline: str = "\n"
) -> Path:
    """Write params.yaml and the record of a sweep; return the former."""
    file = root / "params.yaml"
    file.write_bytes(text.replace("\n", newline).encode("utf-8"))
    folder = TaskPaths(root=root, task=task).sweep
    folder.mkdir(parents=True)
    won_by(params, task).write(folder)
    return file


def applied(root: Path, text: str, params: dict[str, Any], task: str = "mine") -> str:
    file = workspace(root, text, params, task)
    apply(root, task)
    return file.read_bytes().decode("utf-8")


# What is written


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("form", FORMS)
def test_apply_changes_the_values_and_not_a_character_more(
    form: str, newline: str, tmp_path: Path
) -> None:
    file = workspace(tmp_path, HEAD + form + TAIL, BOTH, newline=newline)
    done = apply(tmp_path, "mine")
    expected = (HEAD + FORMS[form] + TAIL).replace("\n", newline)
    assert file.read_bytes() == expected.encode("utf-8")
    assert done.written
    train = load_settings(file).task("mine").train
    assert (train.prompt.length, train.learning_rate) == (16, 0.0123)


@pytest.mark.parametrize("task", ["intents", "entailment", "slots"])
def test_apply_to_the_projects_own_file_changes_one_line(task: str, tmp_path: Path) -> None:
    text = applied(tmp_path, OWN, BOTH | {"reparameterization": "mlp"}, task)
    old, new = OWN.splitlines(), text.splitlines()
    assert len(old) == len(new)
    ((before, after),) = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
    assert before.startswith("    train: {")
    assert after.startswith(before.rstrip("}"))
    assert after.endswith("prompt: {length: 16, reparameterization: mlp}, learning_rate: 1.23e-2}")


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "  # six", "\n  \n# end"])
def test_apply_to_the_last_line_of_a_file_keeps_its_end(ending: str, tmp_path: Path) -> None:
    before = HEAD + "    train:\n      epochs: 6"
    text = applied(tmp_path, before + ending, {"learning_rate": 0.5})
    comment, rest = (ending, "") if ending.startswith("  #") else ("", ending)
    assert text == f"{before}{comment}\n      learning_rate: 0.5{rest}"


def test_apply_keeps_a_byte_order_mark(tmp_path: Path) -> None:
    form = "    train: {}\n"
    assert applied(tmp_path, "\ufeff" + HEAD + form + TAIL, BOTH) == (
        "\ufeff" + HEAD + FORMS[form] + TAIL
    )


def test_apply_writes_a_file_of_json(tmp_path: Path) -> None:
    values = yaml.safe_load(HEAD + "    train: {epochs: 6}\n" + TAIL)
    text = applied(tmp_path, json.dumps(values, indent=1), BOTH)
    train = {"epochs": 6, "prompt": {"length": 16}, "learning_rate": 0.0123}
    values["tasks"]["mine"]["train"] = train
    assert yaml.safe_load(text) == values


def test_apply_writes_the_whole_winner_where_the_shared_section_has_a_part(tmp_path: Path) -> None:
    text = applied(tmp_path, HEAD + "    train: {}\n" + TAIL, BOTH | {"prompt_length": 8})
    assert "    train: {prompt: {length: 8}, learning_rate: 1.23e-2}\n" in text


def random_value(chooser: random.Random, depth: int) -> Any:
    """Return a mapping, a list, or a value that is easily misread."""
    if depth and chooser.random() < 0.6:
        keys = chooser.sample(["a", "b", "c d", "e#", "f", "no"], chooser.randint(0, 3))
        return {key: random_value(chooser, depth - 1) for key in keys}
    if chooser.random() < 0.2:
        return [chooser.choice([1, "x", "#y", None]) for _ in range(chooser.randint(0, 3))]
    return chooser.choice([1, 0.5, None, True, "plain", "two\nlines\n", "# no", "a: b", "{", ""])


def written(values: Any, chooser: random.Random) -> str:
    """Return YAML in a style drawn at random, with comments behind some lines."""
    text = yaml.safe_dump(
        values,
        default_flow_style=chooser.choice([True, False, None]),
        indent=chooser.choice([2, 3, 4]),
        width=chooser.choice([20, 10_000]),
        sort_keys=False,
    )
    commented = [line + chooser.choice(["", "   # {note: 1}"]) + "\n" for line in text.splitlines()]
    noted = "# top\n\n" + "".join(commented)
    is_same = yaml.safe_load(noted) == values  # a comment in a text of several lines is text
    return noted if is_same else text


@pytest.mark.parametrize("seed", range(150))
def test_apply_yaml_sets_one_value_of_any_document(seed: int) -> None:
    chooser = random.Random(seed)
    mine = {"c d": random_value(chooser, 2), "a": random_value(chooser, 2)}
    values = {"tasks": {"mine": mine, "other": random_value(chooser, 2)}}
    path = ["tasks", "mine", *chooser.sample(["a", "b", "e#", "new"], chooser.randint(1, 2))]
    value = chooser.choice([7, 0.03, "mlp", "no"])
    text = written(values, chooser)
    try:
        new = set_value(text, path, value)
    except UneditableError:
        # for a reason: what leads there is no mapping, or what is there takes several lines
        *way, old = on_the_way(values, path)
        is_through = all(at is None or isinstance(at, dict) for at in way)
        assert not is_through or isinstance(old, dict | list) or "\n" in str(old)
        return
    old_value = on_the_way(values, path)[-1]
    change: Any = value
    for key in reversed(path):
        change = {key: change}
    assert yaml.safe_load(new) == merge(values, change)
    # all that went is a value, none of the lines around it
    begin = len(common_start(text, new))
    end = len(common_start(text[begin:][::-1], new[begin:][::-1]))
    is_long = isinstance(old_value, dict | list) or len(str(old_value).split()) > 1
    assert is_long or "\n" not in text[begin : len(text) - end].rstrip()
    assert new.count(NOTE) == text.count(NOTE)


def on_the_way(values: Any, path: list[str]) -> list[Any]:
    found = []
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
        found.append(values)
    return found


def common_start(one: str, other: str) -> str:
    size = next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return one[:size]


NUMBERS = {
    0.01: "1.0e-2",
    0.05: "5.0e-2",
    0.0123: "1.23e-2",
    0.012345678: "0.012345678",
    1e-5: "1.0e-5",
    1.23456e-7: "1.23456e-07",
    1e-300: "1.0e-300",
    0.5: "0.5",
    0.0: "0.0",
    1.0: "1.0",
    1e16: "1.0e+16",
}


@pytest.mark.parametrize("value", NUMBERS)
def test_apply_writes_the_exact_number_for_both_versions_of_yaml(
    value: float, tmp_path: Path
) -> None:
    text = value_text(value)
    assert text == NUMBERS[value]
    read = yaml.safe_load(text)  # YAML 1.1
    assert isinstance(read, float)
    assert read == value
    (tmp_path / "one.yaml").write_text(f"one: {text}")
    assert read_yaml(tmp_path / "one.yaml")[0] == {"one": value}  # YAML 1.2


@pytest.mark.parametrize("seed", range(20))
def test_apply_loses_nothing_of_any_number(seed: int) -> None:
    value = 10 ** random.Random(seed).uniform(-12, 20)
    assert yaml.safe_load(value_text(value)) == value


# Nothing to write


@pytest.mark.parametrize(
    "form", ["    train: {}\n", "    train: {prompt: {length: 8}}\n"], ids=["shared", "own"]
)
def test_apply_of_what_the_task_has_already_changes_nothing(form: str, tmp_path: Path) -> None:
    file = workspace(tmp_path, HEAD + form + TAIL, {"prompt_length": 8, "learning_rate": 0.02})
    modified = file.stat().st_mtime_ns
    done = apply(tmp_path, "mine")
    assert (done.diff, done.written) == ((), False)
    assert sentences(done)[-1].endswith("has these settings already; nothing to change")
    assert file.stat().st_mtime_ns == modified


@pytest.mark.parametrize("form", FORMS)
def test_apply_again_changes_nothing(form: str, tmp_path: Path) -> None:
    file = workspace(tmp_path, HEAD + form + TAIL, BOTH)
    apply(tmp_path, "mine")
    before = file.read_bytes()
    assert apply(tmp_path, "mine").diff == ()
    assert file.read_bytes() == before


def test_apply_dry_run_shows_the_diff_and_writes_nothing(tmp_path: Path) -> None:
    before = HEAD + "    train: {}\n" + TAIL
    file = workspace(tmp_path, before, BOTH)
    done = apply(tmp_path, "mine", dry_run=True)
    assert not done.written
    assert file.read_text() == before
    assert done.diff == (
        "--- a/params.yaml",
        "+++ b/params.yaml",
        "@@ -12,7 +12,7 @@",
        '     fetch:   {source: local, path: "data/mine"}',
        "     prepare: {kind: classification, text: a, label: b}   # kept",
        "     search: {}",
        "-    train: {}",
        "+    train: {prompt: {length: 16}, learning_rate: 1.23e-2}",
        " ",
        "   # about the other",
        "   other:",
    )


# The file


def test_apply_keeps_the_mode_of_the_file_and_a_link_to_it(tmp_path: Path) -> None:
    root = tmp_path / "workspace"
    root.mkdir()
    file = workspace(root, HEAD + "    train: {}\n" + TAIL, BOTH)
    elsewhere = tmp_path / "shared.yaml"
    file.rename(elsewhere)
    elsewhere.chmod(0o640)
    file.symlink_to(elsewhere)
    apply(root, "mine")
    assert file.is_symlink()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o640
    assert "length: 16" in elsewhere.read_text()
    assert {path.name for path in root.iterdir()} == {"params.yaml", "results"}


# What is refused

ALIASES = {
    # a change of `mine` would be one of `other`, too
    "shared": (
        HEAD + "    train: &both {epochs: 6}\n" + TAIL.replace("{epochs: 4}", "*both"),
        "anchors, aliases or merge keys",
    ),
    "used": (
        HEAD.replace("{epochs: 3,", "&all {epochs: 3,") + "    train: *all\n" + TAIL,
        "tasks.mine.train is an alias",
    ),
    # the own `prompt` would hide the dropout that is merged
    "merged": (
        HEAD.replace("train: {", "train: &all {").replace("length: 8", "dropout: 0.2")
        + "    train: {<<: *all}\n"
        + TAIL,
        "anchors, aliases or merge keys",
    ),
    "anchored value": (
        HEAD + "    train: {learning_rate: &rate 0.1}\n" + TAIL,
        "tasks.mine.train.learning_rate has an anchor",
    ),
    "folded value": (
        HEAD + "    train:\n      learning_rate: >-\n        0.1\n" + TAIL,
        "tasks.mine.train.learning_rate is a value of several lines",
    ),
    "complex keys": (
        HEAD + "    ? train\n    : ? epochs\n      : 6\n" + TAIL,
        "unusual form",
    ),
}


@pytest.mark.parametrize("case", ALIASES)
def test_apply_refuses_what_would_touch_more_and_says_what_to_write(
    case: str, tmp_path: Path
) -> None:
    text, why = ALIASES[case]
    file = workspace(tmp_path, text, BOTH)
    with pytest.raises(PipelineError, match="is unchanged") as caught:
        apply(tmp_path, "mine")
    assert why in str(caught.value)
    assert str(caught.value).endswith(
        "Write the winner into tasks.mine.train by hand:\n"
        "  prompt.length: 16\n  learning_rate: 1.23e-2"
    )
    assert file.read_text() == text


def test_apply_goes_on_past_merge_keys_that_stay_as_they_are(tmp_path: Path) -> None:
    head = HEAD.replace("train: {", "train: &all {")
    text = applied(tmp_path, head + "    train:\n      <<: *all\n" + TAIL, {"learning_rate": 0.5})
    assert text == head + "    train:\n      <<: *all\n      learning_rate: 0.5\n" + TAIL


def test_apply_puts_a_value_in_the_place_of_an_alias(tmp_path: Path) -> None:
    head = HEAD.replace("2.0e-2", "&rate 2.0e-2")
    text = applied(
        tmp_path, head + "    train: {learning_rate: *rate}\n" + TAIL, {"learning_rate": 0.5}
    )
    assert text == head + "    train: {learning_rate: 0.5}\n" + TAIL


def test_apply_without_a_sweep_says_what_to_run(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(HEAD + "    train: {}\n" + TAIL)
    with pytest.raises(PipelineError, match="not there; run `ptv2 sweep --task mine` first"):
        apply(tmp_path, "mine")


def test_apply_of_a_task_that_is_gone_names_the_tasks(tmp_path: Path) -> None:
    workspace(tmp_path, HEAD + "    train: {}\n" + TAIL, BOTH, task="mini")
    with pytest.raises(ConfigError, match=r"\(mine, other\), got 'mini'; did you mean 'mine'"):
        apply(tmp_path, "mini")


WINNERS = [
    ({"prompt_length": 5000}, r"tasks\.mine\.train\.prompt\.length: expected .*, got 5000"),
    ({"learning_rate": "fast"}, r"tasks\.mine\.train\.learning_rate: expected .*, got 'fast'"),
    ({"length": 5}, "'length' is no setting of a search; did you mean 'prompt_length'"),
]


@pytest.mark.parametrize(("params", "message"), WINNERS)
def test_apply_refuses_a_winner_that_does_not_fit(
    params: dict[str, Any], message: str, tmp_path: Path
) -> None:
    before = HEAD + "    train: {}\n" + TAIL
    file = workspace(tmp_path, before, params)
    with pytest.raises(PipelineError, match=message) as caught:
        apply(tmp_path, "mine")
    assert "`ptv2 sweep --task mine` again" in str(caught.value)
    assert file.read_text() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"trials": 1}', '{"trials": [{}]}', "\xff"])
def test_apply_refuses_a_record_that_is_damaged(content: str, tmp_path: Path) -> None:
    workspace(tmp_path, HEAD + "    train: {}\n" + TAIL, BOTH)
    (TaskPaths(root=tmp_path, task="mine").sweep / "sweep.json").write_bytes(
        content.encode("latin-1")
    )
    with pytest.raises(PipelineError, match=r"sweep\.json: expected the record of a sweep; run"):
        apply(tmp_path, "mine")


def test_apply_refuses_a_sweep_of_another_task(tmp_path: Path) -> None:
    workspace(tmp_path, HEAD + "    train: {}\n" + TAIL, BOTH)
    won_by(BOTH, "other").write(TaskPaths(root=tmp_path, task="mine").sweep)
    with pytest.raises(PipelineError, match="expected a sweep of mine, got other"):
        apply(tmp_path, "mine")


def test_apply_to_a_file_with_mistakes_tells_those(tmp_path: Path) -> None:
    before = HEAD.replace("max_length: 64", "max_length: 1") + "    train: {}\n" + TAIL
    file = workspace(tmp_path, before, BOTH)
    with pytest.raises(ConfigError, match=r"prepare\.max_length: expected .* got 1 .*line 3"):
        apply(tmp_path, "mine")
    assert file.read_text() == before


# What is said


def done(**changes: Any) -> Applied:
    record = sweep(trial(0), trial(1))
    values: dict[str, Any] = {
        "file": Path("params.yaml"),
        "record": record,
        "changes": nested(BOTH),
        "diff": ("-a", "+b"),
        "written": True,
        "searched": False,
    }
    return Applied(**(values | changes))


def test_apply_says_who_won_and_what_to_run_next() -> None:
    winner = "winner    trial 0 of 2, dev accuracy 0.7500 over its seed, study intents-0123456789ab"
    wrote = "wrote params.yaml; next: ptv2 run --task intents, or dvc repro"
    assert sentences(done()) == [winner, wrote]
    assert sentences(done(searched=True)) == [
        winner,
        wrote,
        "  its stage search begins with these settings and may find others; "
        "tasks.intents.search.n_trials: 0 takes them as they are",
    ]
    assert sentences(done(written=False)) == [
        winner,
        "params.yaml is unchanged; `ptv2 apply intents` writes this",
    ]


def test_apply_diff_is_coloured_by_its_marks() -> None:
    shown = diff_text(["--- a", "+++ b", "@@ -1 +1 @@", "-old", "+new", " same"])
    assert shown.plain == "--- a\n+++ b\n@@ -1 +1 @@\n-old\n+new\n same"
    styles = [(shown.plain[span.start : span.end], span.style) for span in shown.spans]
    assert styles == [
        ("--- a", "bold"), ("+++ b", "bold"), ("@@ -1 +1 @@", "cyan"),
        ("-old", "red"), ("+new", "green"),
    ]  # fmt: skip


def test_apply_is_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = workspace(tmp_path, HEAD + "    train: {}\n" + TAIL, BOTH)
    before = file.read_text()
    assert call("apply", "mine", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "\n-    train: {}\n+    train: {prompt: {length: 16}, learning_rate: 1.23e-2}\n" in shown
    assert file.read_text() == before
    assert call("apply", "mine") == 0
    assert "next: ptv2 run --task mine, or dvc repro" in capsys.readouterr().out
    assert call("apply", "mine") == 0
    assert "nothing to change" in capsys.readouterr().out
    assert call("apply", "none") == 2
    assert capsys.readouterr().err.startswith("error: expected a task of params.yaml")
