"""`ptv2 inspect`: on a trained prompt, on what is left of one, and the rules of its sentences."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.inspect_page import page
from pipelines.inspect_page.figures import FIGURES, HEIGHT, colour, draw
from pipelines.inspect_report import cells, explain
from pipelines.inspection import Epoch, Inspection, LayerRow
from ptv2_core.training.records import LayerRecord
from tests.stage_parts import call, change_params, make_workspace

LENGTH = 4
EPOCHS = 3


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workspace with a deep prompt of `intents`, a probe of `pairs`, none of `slots`."""
    root = make_workspace(tmp_path_factory.mktemp("inspection") / "workspace")
    changes = {
        "tasks.intents.search.n_trials": 0,
        "tasks.intents.train": {"epochs": EPOCHS, "learning_rate": 0.05},
        "tasks.pairs.search.n_trials": 0,
        "tasks.pairs.train": {"method": "probe", "epochs": 1},
    }
    change_params(root, changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for task in ("intents", "pairs"):
            for stage in ("fetch", "prepare", "search", "train"):
                assert call(stage, "-t", task) == 0
    return root


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of it, which is the working folder."""
    root = shutil.copytree(trained_once, tmp_path / "workspace")
    monkeypatch.chdir(root)
    return root


def recorded(root: Path, task: str = "intents") -> list[dict[str, str]]:
    with (root / "results" / task / "train" / "layers.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def inspected(root: Path, *, code: int = 0) -> Any:
    """Inspect `intents`; returns the figures."""
    assert call("inspect", "intents", "--json", "figures.json") == code
    return json.loads((root / "figures.json").read_text())


# What train leaves


def test_train_records_each_layer_of_the_start_and_of_each_epoch(trained: Path) -> None:
    rows = recorded(trained)
    assert list(rows[0]) == [
        "epoch", "layer", "attention", "gradient_norm", "key_norm", "value_norm", "key_rank",
        "value_rank", "moved",
    ]  # fmt: skip
    places = [(int(row["epoch"]), int(row["layer"])) for row in rows]
    assert places == [(epoch, layer) for epoch in range(EPOCHS + 1) for layer in range(3)]
    assert all(bool(row["gradient_norm"]) == (row["epoch"] != "0") for row in rows)
    assert all((float(row["moved"]) > 0.0) == (row["epoch"] != "0") for row in rows)


def test_train_of_a_method_without_a_deep_prompt_records_no_layer(trained: Path) -> None:
    assert recorded(trained, "pairs") == []


# A trained prompt


def test_inspect_measures_what_training_recorded_of_the_best_epoch(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = inspected(trained)
    assert list(found) == [
        "format", "task", "backbone", "num_layers", "prompt_length", "metric", "dev", "best_epoch",
        "epochs_asked", "epochs_run", "rows", "layers", "epochs", "missing", "explanation",
    ]  # fmt: skip
    assert found["format"] == "ptv2-inspection-1"
    assert (found["task"], found["prompt_length"], found["rows"]) == ("intents", LENGTH, 12)
    assert (found["epochs_asked"], found["epochs_run"]) == (EPOCHS, EPOCHS)
    assert found["missing"] == []
    rows = recorded(trained)
    best = [row for row in rows if int(row["epoch"]) == found["best_epoch"]]
    start = [row for row in rows if row["epoch"] == "0"]
    for got, now, begun in zip(found["layers"], best, start, strict=True):
        for name in ("attention", "key_norm", "value_norm", "key_rank", "value_rank", "moved"):
            assert got[name] == pytest.approx(float(now[name]), rel=1e-4), name
        assert got["start_attention"] == float(begun["attention"])
        assert sum(got["head_attention"]) / 4 == pytest.approx(got["attention"])
        assert got["key_ratio"] > 0.0
        assert got["value_ratio"] > 0.0
    for place, got in enumerate(found["layers"]):
        norms = [float(row["gradient_norm"]) for row in rows[3:] if row["layer"] == str(place)]
        assert (got["first_gradient"], got["last_gradient"]) == (norms[0], norms[-1])
    assert [one["epoch"] for one in found["epochs"]] == list(range(EPOCHS + 1))
    said = capsys.readouterr().out
    for sentence in found["explanation"]:
        assert sentence in said
    assert "Prompt of intents, 4 positions" in said
    assert "page      results/inspect/intents.html" in said


def test_inspect_writes_a_page_that_needs_nothing_else(trained: Path) -> None:
    found = inspected(trained)
    text = (trained / "results" / "inspect" / "intents.html").read_text()
    assert [path.name for path in (trained / "results" / "inspect").iterdir()] == ["intents.html"]
    assert not re.search(r"https?:|<script|src=|href=|@import|url\(", text)
    assert text.count("<svg ") == len(FIGURES)
    # a line for each layer, with a dot for each epoch; the gradient has none at the start
    assert text.count("<polyline ") == 3 * len(FIGURES)
    assert text.count("<circle ") == 3 * ((len(FIGURES) - 1) * (EPOCHS + 1) + EPOCHS)
    for layer in found["layers"]:
        for share in layer["head_attention"]:
            assert f">{100 * share:.0f}</td>" in text
    for sentence in found["explanation"]:
        assert sentence in text


def test_inspect_changes_no_output_of_a_stage(trained: Path) -> None:
    def outputs() -> dict[str, bytes]:
        folders = (trained / "prompts", trained / "results" / "intents", trained / "data")
        return {
            str(file): file.read_bytes()
            for folder in folders
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }

    before = outputs()
    inspected(trained)
    assert outputs() == before


# What is left of one


def test_inspect_of_a_prompt_without_its_training_shows_what_it_can_measure(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = inspected(trained)
    shutil.rmtree(trained / "results")
    found = inspected(trained)
    assert found["epochs"] == []
    (note,) = found["missing"]
    assert note.startswith("results/intents/train/layers.csv: not there")
    assert f"missing   {note}" in capsys.readouterr().out
    for got, wanted in zip(found["layers"], whole["layers"], strict=True):
        absent = dict.fromkeys(("start_attention", "first_gradient", "last_gradient", "moved"))
        assert got == {**wanted, **absent}
    text = (trained / "results" / "inspect" / "intents.html").read_text()
    assert "<svg" not in text
    assert "head 3" in text


def test_inspect_without_data_shows_what_training_recorded(trained: Path) -> None:
    whole = inspected(trained)
    shutil.rmtree(trained / "data")
    found = inspected(trained)
    (note,) = found["missing"]
    assert note.startswith("data/prepared/intents: not there")
    assert found["rows"] == 0
    for got, wanted in zip(found["layers"], whole["layers"], strict=True):
        assert got["attention"] == pytest.approx(wanted["attention"], rel=1e-4)
        assert (got["head_attention"], got["key_ratio"], got["value_ratio"]) == ([], None, None)
        assert got["key_norm"] == wanted["key_norm"]


def test_inspect_with_neither_says_what_the_weights_say(trained: Path) -> None:
    shutil.rmtree(trained / "data")
    shutil.rmtree(trained / "results")
    found = inspected(trained)
    assert len(found["missing"]) == 2
    assert [row["attention"] for row in found["layers"]] == [None] * 3
    assert all(row["key_rank"] > 1.0 for row in found["layers"])


def test_inspect_leaves_out_the_record_of_another_training(trained: Path) -> None:
    file = trained / "results" / "intents" / "train" / "layers.csv"
    rows = recorded(trained)
    other = [{**row, "key_norm": str(1.01 * float(row["key_norm"]))} for row in rows]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(other)
    found = inspected(trained)
    (note,) = found["missing"]
    assert "layers.csv: of another training than prompts/intents" in note
    assert found["epochs"] == []


# Mistakes


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert call("inspect", *arguments) == 2
    return capsys.readouterr().err


def test_inspect_of_an_unknown_task_names_those_there_are(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "intent")
    assert "expected a task of params.yaml (intents, pairs, slots), got 'intent'" in said


def test_inspect_before_training_says_what_to_run(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "slots")
    assert "prompts/slots/prompt.json: not there; run `ptv2 train --task slots` first" in said


def test_inspect_of_another_method_says_that_it_has_no_deep_prompt(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "pairs")
    assert "prompts/pairs: expected a prompt of method ptv2" in said
    assert "got probe" in said
    assert not (trained / "results" / "inspect").exists()


def test_inspect_of_a_damaged_record_names_the_file(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = trained / "results" / "intents" / "train" / "layers.csv"
    file.write_text(file.read_text().replace("key_norm", "something"))
    assert "train/layers.csv: damaged" in refused(capsys, "intents")


# The sentences

SOUND: dict[str, Any] = {
    "start_attention": 0.2, "head_attention": (0.2, 0.4), "key_norm": 1.0, "value_norm": 1.0,
    "key_ratio": 1.0, "value_ratio": 1.0, "key_rank": 12.0, "value_rank": 12.0,
    "first_gradient": 1.0, "last_gradient": 0.5, "moved": 0.5,
}  # fmt: skip


def layers(*attentions: float | None, **changes: Any) -> tuple[LayerRow, ...]:
    return tuple(
        LayerRow(**{**SOUND, "layer": place, "attention": attention, **changes})
        for place, attention in enumerate(attentions)
    )


def inspection(rows: tuple[LayerRow, ...], **changes: Any) -> Inspection:
    values: dict[str, Any] = {
        "task": "t", "backbone": "b", "num_layers": 4, "prompt_length": 16, "metric": "accuracy",
        "dev": 0.9, "best_epoch": 3, "epochs_asked": 10, "epochs_run": 10, "rows": 32,
        "layers": rows, "epochs": (), "missing": (),
    }  # fmt: skip
    return Inspection(**{**values, **changes})


def findings(found: Inspection) -> list[str]:
    return explain(found)[1:]


def test_explanation_of_a_sound_prompt_sums_up_and_asks_for_nothing() -> None:
    assert explain(inspection(layers(0.3, 0.1, 0.5, 0.3))) == [
        "The prompt gets 30.0 % of the attention (20.0 % at the start): most in layer 2 (50.0 %), "
        "least in layer 1 (10.0 %).",
        "Nothing in these figures asks for other settings.",
    ]


def test_explanation_without_attention_begins_with_what_is_known() -> None:
    rows = layers(None, None, start_attention=None, value_ratio=None)
    assert explain(inspection(rows)) == ["Nothing in these figures asks for other settings."]


@pytest.mark.parametrize(
    ("attentions", "sentence"),
    [
        (
            (0.019, 0.001, 0.3, 0.3),
            "In layers 0-1 the prompt gets under 2 % of the attention: it does nothing there. "
            "Prompts in the top layers alone (train.prompt.layers: 2) would cost less.",
        ),
        (
            (0.3, 0.01, 0.3, 0.0),
            "In layers 1 and 3 the prompt gets under 2 % of the attention: it does nothing there. "
            "train.prompt.layers: [0, 2] leaves them out.",
        ),
        (
            (0.01, 0.01, 0.01, 0.01),
            "In layers 0-3 the prompt gets under 2 % of the attention: it does nothing. Try a "
            "higher train.learning_rate, or another train.prompt.start.",
        ),
    ],
)
def test_explanation_of_idle_layers_says_which_to_leave_out(
    attentions: tuple[float, ...], sentence: str
) -> None:
    assert findings(inspection(layers(*attentions))) == [sentence]


def test_explanation_counts_a_small_share_of_large_values() -> None:
    # 1.5 % of values 2.9 times as large weigh as much as 4.4 %
    assert len(findings(inspection(layers(0.015, 0.3, 0.3, 0.3, value_ratio=2.9)))) == 1
    assert "asks for" in findings(inspection(layers(0.015, 0.3, 0.3, 0.3, value_ratio=2.9)))[0]


def test_explanation_of_crowded_layers() -> None:
    assert findings(inspection(layers(0.91, 0.9, 0.95, 0.3))) == [
        "In layers 0 and 2 the prompt gets over 90 % of the attention: the tokens hardly see each "
        "other. A lower train.learning_rate or a shorter prompt leaves them room."
    ]


def test_explanation_of_large_values() -> None:
    rows = (*layers(0.3, 0.3), replace(layers(0.3)[0], layer=2, value_ratio=4.04))
    assert findings(inspection(rows)) == [
        "In layer 2 the prompt's values are up to 4.0x as large as the tokens' own: the learning "
        "rate is high, or the prompt is short for what it has to do. Compare a lower "
        "train.learning_rate with a longer train.prompt.length."
    ]
    assert "asks for" in findings(inspection(layers(0.3, 0.3, value_ratio=3.0)))[0]


def test_explanation_of_a_low_rank_names_a_length_that_may_do() -> None:
    rows = layers(0.3, 0.3, key_rank=2.0, value_rank=3.2)
    assert findings(inspection(rows, prompt_length=64)) == [
        "The effective rank is 3.2 of 64 at most: the positions say much the same. A shorter "
        "prompt (train.prompt.length: 4) may do."
    ]
    # a quarter is not low, one layer that uses its positions is enough, and 7 are few as it is
    for rank, length in ((4.0, 16), (16.0, 64), (1.0, 7)):
        mixed = (*layers(0.3, key_rank=1.0, value_rank=1.0), *layers(0.3, key_rank=rank))
        rows = tuple(replace(row, value_rank=1.0, layer=n) for n, row in enumerate(mixed))
        assert "asks for" in findings(inspection(rows, prompt_length=length))[0]


def test_explanation_of_a_prompt_that_hardly_moved() -> None:
    assert findings(inspection(layers(0.3, 0.3, moved=0.049))) == [
        "The prompt hardly moved from its start (4.9 % of its norm at most): the head did the "
        "learning. train.learning_rate is too low, or train.epochs too few."
    ]
    assert "asks for" in findings(inspection(layers(0.3, 0.3, moved=0.05)))[0]
    assert "asks for" in findings(inspection(layers(0.3, 0.3, moved=None)))[0]


@pytest.mark.parametrize(
    ("best", "run", "asked", "is_said"),
    [(10, 10, 10, True), (9, 10, 10, False), (6, 6, 10, False), (None, None, None, False)],
)
def test_explanation_of_a_training_that_ended_too_early(
    best: int | None, run: int | None, asked: int | None, is_said: bool
) -> None:
    found = inspection(layers(0.3), best_epoch=best, epochs_run=run, epochs_asked=asked)
    sentence = (
        "The best epoch is the last one (10): dev was still getting better. More train.epochs may "
        "help."
    )
    assert (sentence in findings(found)) is is_said


def test_cells_of_a_layer_leave_out_what_is_not_known() -> None:
    (row,) = layers(0.31)
    assert cells(row) == (
        "0", "31.0 %", "+11.0", "1: 40.0 %", "1.0x", "1.0x", "12.0", "12.0", "50.0 %", "1 -> 0.5",
    )  # fmt: skip
    known = {"layer", "key_norm", "value_norm", "key_rank", "value_rank", "head_attention"}
    absent: dict[str, Any] = dict.fromkeys(row.__dataclass_fields__.keys() - known)
    bare = replace(row, **absent, head_attention=())
    assert cells(bare) == ("0", "-", "-", "-", "-", "-", "12.0", "12.0", "-", "-")


# The plots


def epoch(number: int, *attentions: float, gradient: float | None = 1.0) -> Epoch:
    return Epoch(
        epoch=number,
        layers=tuple(
            LayerRecord(
                layer=place, attention=attention, key_norm=1.0, value_norm=1.0, key_rank=2.0,
                value_rank=2.0, moved=0.0, gradient_norm=gradient,
            )
            for place, attention in enumerate(attentions)
        ),
    )  # fmt: skip


def drawn(number: int, epochs: tuple[Epoch, ...]) -> list[list[tuple[float, float]]]:
    """Return the points of each line of a figure."""
    svg = draw(FIGURES[number], inspection(layers(0.1, 0.2), epochs=epochs, best_epoch=2))
    assert svg is not None
    return [
        [tuple(map(float, point.split(","))) for point in found.split()]  # type: ignore[misc]
        for found in re.findall(r'<polyline points="([^"]*)"', svg)
    ]


def test_figure_places_shares_on_an_axis_from_nought() -> None:
    epochs = (epoch(0, 0.1, 0.4), epoch(1, 0.2, 0.4), epoch(2, 0.4, 0.0))
    # 0 to 40 %: 10 px from the top is 40, the baseline 0; epochs from 48 to 370 px
    baseline = HEIGHT - 34.0
    full = baseline - 10.0
    assert drawn(0, epochs) == [
        [(48.0, baseline - full / 4), (209.0, baseline - full / 2), (370.0, 10.0)],
        [(48.0, 10.0), (209.0, 10.0), (370.0, baseline)],
    ]


def test_figure_places_gradients_on_a_logarithmic_axis_without_those_of_nought() -> None:
    epochs = (
        epoch(0, 0.1, gradient=None), epoch(1, 0.1, gradient=0.01), epoch(2, 0.1, gradient=1.0),
        epoch(3, 0.1, gradient=0.1), epoch(4, 0.1, gradient=0.0),
    )  # fmt: skip
    baseline = HEIGHT - 34.0
    (line,) = drawn(1, epochs)
    assert line == [(128.5, baseline), (209.0, 10.0), (289.5, (baseline + 10.0) / 2)]


def test_figure_without_a_number_is_not_drawn() -> None:
    epochs = (epoch(0, 0.1, gradient=None), epoch(1, 0.1, gradient=None))
    assert draw(FIGURES[1], inspection(layers(0.1), epochs=epochs)) is None
    text = page(inspection(layers(0.1), epochs=epochs), ["said"])
    assert text.count("<svg ") == len(FIGURES) - 1


def test_figure_of_a_long_training_has_no_dots() -> None:
    epochs = tuple(epoch(number, 0.1) for number in range(60))
    svg = draw(FIGURES[0], inspection(layers(0.1), epochs=epochs))
    assert svg is not None
    assert "<circle" not in svg
    assert svg.count("<polyline") == 1


def test_colour_goes_from_the_lowest_layer_to_the_highest() -> None:
    assert colour(0, 4) == "#3b7ff0"
    assert colour(3, 4) == "#d6336c"
    assert colour(0, 1) == "#3b7ff0"
    assert len({colour(place, 24) for place in range(24)}) == 24


def test_page_escapes_what_it_shows() -> None:
    found = inspection(layers(0.1), task="<b>", backbone="a&b", missing=("<i>",))
    text = page(found, ["1 < 2"])
    assert "<b>" not in text
    assert "<i>" not in text
    assert "a&amp;b" in text
    assert "1 &lt; 2" in text
