import io
import json
import re

import pytest
from rich.console import Console

from pipelines.study_files import write_study
from pipelines.study_report import (
    duration,
    facts,
    finalists_table,
    importances_line,
    markdown,
    sentences,
    to_json,
    trials_table,
)
from tests.pipelines.study_parts import (
    HOSTILE,
    all_failed_but_one,
    finalist,
    record,
    sample,
    trial,
)
from tests.stage_parts import call, make_workspace


def printed(shown, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.42, "0.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (1534.2, "25 min 34 s"),
        (7325.0, "2 h 2 min"),
    ],
)
def test_duration_has_the_units_that_people_read(seconds, shown):
    assert duration(seconds) == shown


def test_sentences_say_what_the_sweep_did_and_found():
    told = sentences(sample())
    assert told[:3] == [
        "30 trials asked for, 24 ended: 13 complete, 8 pruned, 2 failed, 1 crashed.",
        "Trained 157 epochs; 24 trials of 10 epochs to their end would have been 240, "
        "1.5 times as many.",
        "Stopped early: an improvement of more than 0.001 is improbable (terminator, 24 trials).",
    ]
    assert told[3].startswith(
        "Winner: trial 9, dev accuracy 0.7233 ± 0.0045 over 3 seeds, with prompt_length 18, "
        "learning_rate 0.00825, head_learning_rate 0.0109, reparameterization embedding, "
    )
    assert told[4] == (
        "Finalists, by mean minus spread: trial 9 0.7233 ± 0.0045 (3 seeds); "
        "trial 4 0.7104 ± 0.0041 (3 seeds); trial 21 0.7029 ± 0.0199 (3 seeds)."
    )
    assert told[5] == (
        "Trial 21 had the best single score, 0.7236; with further seeds it did not hold."
    )
    assert told[6] == importances_line(sample())
    assert told[7:] == ["3 trials went on from a checkpoint after a process died, 4 times in all."]


def test_sentences_of_one_trial_claim_nothing_more():
    assert sentences(record()) == [
        "1 trial asked for, 1 ended: 1 complete.",
        "Trained 3 epochs, every trial to its end.",
        "Stopped after all trials that were asked for.",
        "Winner: trial 0, dev accuracy 0.7000, with learning_rate 0.01.",
        "No trial was trained again with further seeds: the best single score won.",
        "Importance of the settings: not told; it takes 4 complete trials, and there are 1.",
    ]


def test_sentences_of_failed_trials_count_what_they_would_have_cost():
    told = sentences(all_failed_but_one())
    assert told[0] == "5 trials asked for, 5 ended: 1 complete, 4 failed."
    assert told[1] == (
        "Trained 3 epochs; 5 trials of 3 epochs to their end would have been 15, 5.0 times as many."
    )


def test_facts_say_what_was_drawn_from():
    known = dict(facts(sample()))
    assert known["Drawn from"] == (
        "prompt_length 4 to 64; learning_rate 0.001 to 0.03; head_learning_rate 0.0005 to 0.02; "
        "reparameterization embedding or mlp; prompt_dropout 0 to 0.3; prompt_layers all or 4"
    )
    assert known["Time"] == "25 min 34 s"
    assert dict(facts(record(flow_run="")))["Flow run"] == "-"


def test_trials_table_ranks_the_trials_and_fits_140_columns():
    lines = printed(trials_table(sample()), 140).splitlines()
    assert max(map(len, lines)) <= 140
    rows = [line.split() for line in lines if re.match(r" *\d+ ", line)]
    assert [int(row[0]) for row in rows[:4]] == [21, 9, 4, 0]
    assert [row[1] for row in rows if row[1] != "complete"][:2] == ["complete,", "pruned"]
    assert [int(row[0]) for row in rows[-3:]] == [5, 19, 13]
    assert rows[1][1:6] == ["complete,", "winner", "0.7229", "10/10", "18"]
    assert "transferred; 1 retry" in "\n".join(lines)


def test_trials_table_loses_nothing_on_80_columns():
    text = printed(trials_table(sample()), 80)
    assert "…" not in text
    assert re.search(r"0\.7236", text)


def test_trials_table_takes_no_markup_from_messages():
    made = record((trial(0, message="[red]hot[/red]"),), task="[bold]x")
    text = printed(trials_table(made), 140)
    assert "[red]hot[/red]" in text
    assert "Sweep of [bold]x" in text


def test_finalists_table_has_mean_spread_and_seeds():
    made = record((trial(0), trial(1)), finalists=(finalist(1, 0.7, 0.8), finalist(0, 0.7)))
    rows = [line.split("│") for line in printed(finalists_table(made), 100).splitlines()]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) > 2]
    assert cells == [
        ["1", "0.7500", "0.0707", "0.6793", "2", "0.7000, 0.8000"],
        ["0", "0.7000", "-", "0.7000", "1", "0.7000"],
    ]


def test_markdown_has_sentences_and_tables():
    text = markdown(sample())
    assert re.findall(r"^#+ (.*)$", text, flags=re.M) == [
        "Sweep of rte",
        "Finalists",
        "Trials",
        "How it was made",
    ]
    for sentence in sentences(sample()):
        assert f"- {sentence}" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert [len(block.splitlines()) for block in tables] == [2 + 3, 2 + 24]
    for block in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1


def test_markdown_shows_hostile_texts_as_they_are():
    text = markdown(sample())
    assert HOSTILE not in text
    assert r'\</script>\<img src="http://x.example/a">\|\[red]\*' in text


def test_json_has_the_record_and_what_is_computed_from_it():
    made = sample()
    stored = json.loads(json.dumps(to_json(made), allow_nan=False))
    assert type(made).from_mapping({key: stored[key] for key in vars(made)}) == made
    assert stored["counts"] == {"complete": 13, "pruned": 8, "failed": 2, "crashed": 1}
    assert (stored["epochs_spent"], stored["epochs_in_full"]) == (157, 240)
    assert stored["winner"]["number"] == 9
    assert sum(stored["importances"].values()) == pytest.approx(1.0)
    assert to_json(record())["importances"] is None


def test_write_study_writes_the_page_and_the_plots(tmp_path):
    written = write_study(sample(), tmp_path / "new" / "rte")
    assert [file.name for file in written] == [
        "study.html",
        "history.png",
        "importances.png",
        "surface.png",
        "parallel.png",
        "epochs.png",
    ]
    assert sorted(written) == sorted((tmp_path / "new" / "rte").iterdir())


@pytest.fixture
def swept(tmp_path, monkeypatch):
    root = make_workspace(tmp_path / "workspace")
    sample().write(root / "results" / "sweeps" / "intents")
    monkeypatch.chdir(tmp_path)
    return root


def test_study_command_writes_beside_the_sweep_and_says_where(swept, capfd):
    assert call("study", "intents", "-C", str(swept)) == 0
    said = capfd.readouterr().out
    assert "complete, winner" in said
    assert "Finalists by mean minus spread of dev accuracy" in said
    assert sentences(sample())[0] in said
    # as reached from the current folder
    assert f"page      {swept}/results/sweeps/intents/study.html (open it in a browser)" in said
    assert (
        f"plots     {swept}/results/sweeps/intents: history.png, importances.png, surface.png, "
        "parallel.png, epochs.png"
    ) in said
    assert {file.name for file in (swept / "results" / "sweeps" / "intents").iterdir()} == {
        "sweep.json", "study.html", "history.png", "importances.png", "surface.png",
        "parallel.png", "epochs.png",
    }  # fmt: skip


def test_study_command_writes_where_it_is_told(swept, tmp_path, capfd):
    options = ("--html", "a/page.html", "--png", "b", "--json", "c.json")
    assert call("study", "intents", "-C", str(swept), *options) == 0
    assert (tmp_path / "a" / "page.html").read_text().startswith("<!doctype html>")
    assert len(list((tmp_path / "b").iterdir())) == 5
    assert json.loads((tmp_path / "c.json").read_text())["task"] == "rte"
    assert [file.name for file in (swept / "results" / "sweeps" / "intents").iterdir()] == [
        "sweep.json"
    ]
    assert f"figures   {tmp_path / 'c.json'}" in capfd.readouterr().out


def test_study_command_without_a_sweep_says_what_to_run(swept, capfd):
    assert call("study", "pairs", "-C", str(swept)) == 2
    error = capfd.readouterr().err
    assert (
        "results/sweeps/pairs/sweep.json: not there; run `ptv2 sweep --task pairs` first" in error
    )
