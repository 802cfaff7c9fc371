import io
import json
import re
from dataclasses import replace

import pytest
from rich.console import Console

from pipelines.compare_data import Trial
from pipelines.compare_json import from_json, to_json
from pipelines.compare_page import page
from pipelines.compare_page.figures import groups
from pipelines.compare_page.looks import looks_of
from pipelines.compare_page.window_figures import window_groups
from pipelines.compare_report import markdown, table
from pipelines.compare_sheets import main_sheet, sheets
from pipelines.compare_stats import Difference, summarise
from pipelines.compare_windows import summarise_windows
from pipelines.compare_words import gap, settings_text, share, size, variant_text, wide
from pipelines.errors import PipelineError
from tests.pipelines.compare_parts import PLAIN, comparison, facts, row, sample, varied
from tests.pipelines.page_parts import Page

HOSTILE = '</script><img src="http://x.example/a">'


def two_methods():
    return comparison(
        [
            row("rte", "ptv2", 0, hits=80, size=100),
            row("rte", "ptv2", 1, hits=78, size=100),
            row("rte", "finetune", 0, hits=60, size=100),
            row("rte", "finetune", 1, hits=60, size=100),
            row("copa", "ptv2", 0, hits=50, size=100),
        ]
    )


def printed(shown, width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(shown)
    return console.export_text()


@pytest.fixture(scope="module")
def whole():
    made = sample()
    summary = summarise(made, resamples=200)
    return made, summary, page(made, summary)


@pytest.mark.parametrize(
    ("difference", "shown"),
    [
        ({"value": -0.004, "low": -0.012, "high": 0.003}, "-0.4 [-1.2, +0.3]"),
        ({"value": 0.02, "low": 0.01, "high": 0.03}, "+2.0 [+1.0, +3.0] *"),
        ({"value": -0.0001, "low": -0.01, "high": 0.0}, "0.0 [-1.0, 0.0]"),
        ({"value": 0.1}, "+10.0"),
    ],
)
def test_gap_has_its_interval_and_a_mark_where_that_excludes_zero(difference, shown):
    assert gap(Difference(task="rte", method="ptv2", other="finetune", **difference)) == shown


def test_units_are_those_that_people_read():
    assert [size(value) for value in (None, 900, 367_400, 90_300_000, 2_100_000_000)] == [
        "-",
        "900 B",
        "367.4 KB",
        "90.3 MB",
        "2.1 GB",
    ]
    assert [share(value) for value in (0.0, 0.0030123, 1.0)] == ["0", "0.301", "100"]
    assert settings_text({"prompt_length": 8, "learning_rate": 0.0123456, "layers": [0, 5]}) == (
        "prompt_length 8, learning_rate 0.0123, layers [0 5]"
    )
    assert settings_text({}) == "-"


def test_main_table_has_a_row_a_task_and_says_what_is_missing():
    made = two_methods()
    sheet = main_sheet(made, summarise(made, resamples=500))
    assert sheet.headers == (
        "task",
        "metric",
        "ptv2",
        "finetune",
        "ptv2 - finetune",
        "ptv2 %",
        "ptv2 KB",
    )
    rte, copa, average, spread, worst = sheet.rows
    assert rte[:4] == ("rte", "accuracy", "79.0 ± 1.4", "60.0 ± 0.0")
    assert re.fullmatch(r"\+19\.0 \[\+1\d\.\d, \+2\d\.\d\] \*", rte[4])
    assert rte[5:] == ("1", "4")
    assert copa == ("copa", "accuracy", "50.0 (1)", "-", "-", "1", "4")
    assert average[:4] == ("average", "1 task", "79.0 ± 1.4", "60.0 ± 0.0")
    assert average[4:] == (rte[4], "", "")
    assert spread == ("spread", "1 task", "1.4", "0.0", "", "", "")
    assert worst == ("worst seed", "1 task", "78.0", "60.0", "", "", "")
    assert sheet.num_totals == 3
    assert "ptv2 %: tuned parameters" in sheet.note


def test_main_table_of_one_seed_has_no_spread():
    made = comparison([row("rte", "ptv2"), row("rte", "finetune")])
    sheet = main_sheet(made, summarise(made, resamples=10))
    assert [cells[0] for cells in sheet.rows] == ["rte", "average"]
    assert sheet.num_totals == 1


def test_main_table_without_ptv2_has_no_difference():
    made = comparison([row("rte", "probe"), row("rte", "finetune")])
    sheet = main_sheet(made, summarise(made, resamples=10))
    assert sheet.headers == ("task", "metric", "probe", "finetune")
    assert {len(cells) for cells in sheet.rows} == {4}


def test_terminal_table_fits_140_columns_and_ends_with_how_it_was_made(whole):
    made, summary, _ = whole
    lines = printed(table(made, summary), 400).splitlines()
    assert max(len(line.rstrip()) for line in lines[:17]) <= 140
    text = printed(table(made, summary), 140)
    assert "…" not in text
    assert "Hyper-parameters chosen on: dev (carved from train with seed 42)" in text
    assert "Search trials for each task: probe 8, prompt_tuning 8, ptv2 8, finetune 8" in text
    assert "Seeds: 0, 1, 2" in text
    assert "Results: results/compare" in text
    assert "Not finished: cb finetune (seed 2)" in text


def test_terminal_table_loses_no_number_on_80_columns(whole):
    made, summary, _ = whole
    text = printed(table(made, summary), 80)
    for value in re.findall(r"\d+\.\d", " ".join(main_sheet(made, summary).rows[0])):
        assert value in text
    assert "367" in text
    assert "…" not in text


def test_terminal_table_takes_no_markup_from_names():
    made = comparison([row("rte", "ptv2", metric="[red]f1")], backbone="[bold]x", tasks=(facts(),))
    assert "[bold]x" in printed(table(made, summarise(made, resamples=10)), 140)


def test_markdown_has_all_tables_in_order():
    made = two_methods()
    text = markdown(made, summarise(made, resamples=100))
    assert re.findall(r"^#+ (.*)$", text, flags=re.M) == [
        "Comparison on all-minilm-l6-v2",
        "Test scores",
        "Differences",
        "Resources",
        "Data",
        "Runs",
    ]
    assert "- Hyper-parameters chosen on: dev (carved from train with seed 42)" in text
    assert "| rte | ptv2 | 1,000 | 1 | 4.1 KB | 2.0 | 3.0 MB |" in text
    settings = "prompt_length 8, learning_rate 0.01, prompt_layers all"
    assert f"| rte | ptv2 | {settings} | 1 | 78.0 | 78.0 | 2.0 |" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1


def test_markdown_shows_texts_as_they_are():
    made = comparison([row()], tasks=(facts(cut="a|b <i>\nc*"),))
    assert r"| a\|b \<i> c\* |" in markdown(made, summarise(made, resamples=10))


def test_json_has_the_rows_and_what_was_computed_from_them():
    made = two_methods()
    values = to_json(made, summarise(made, resamples=100))
    wanted = {"task", "method", "seed", "dev", "test", "tuned_share", "artifact_bytes", "seconds"}
    assert len(values["rows"]) == 5
    assert all(wanted <= set(one) for one in values["rows"])
    assert all("items" not in one for one in values["rows"])
    assert {"summary", "differences", "average"} <= set(values)
    assert values["summary"][0]["test"] == pytest.approx(0.79)
    assert values["average"]["tasks"] == ("rte",)
    assert values["missing"] == [{"task": "copa", "method": "ptv2", "seeds": (1,)}] + [
        {"task": "copa", "method": "finetune", "seeds": (0, 1)}
    ]


def test_json_gives_the_same_reports_again(whole):
    made, summary, text = whole
    stored = json.loads(json.dumps(to_json(made, summary), allow_nan=False))
    again, summary_again = from_json(stored)
    assert summary_again == summary
    assert page(again, summary_again) == text
    assert markdown(again, summary_again) == markdown(made, summary)
    assert json.loads(json.dumps(to_json(again, summary_again))) == stored


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"expected format 'ptv2-comparison-1', got 'other'; give a file"),
        ({"rows": [{"task": "rte"}]}, r"the file is damaged: 'history'"),
        ({"bootstrap": {}}, r"the file is damaged: 'resamples'"),
    ],
)
def test_json_of_something_else_is_refused(change, message):
    made = two_methods()
    with pytest.raises(PipelineError, match=message):
        from_json({**to_json(made, summarise(made, resamples=10)), **change})


def test_page_asks_for_nothing_outside_itself(whole):
    _, _, text = whole
    found = Page(text)
    assert found.open == []
    assert found.policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in found.policy
    assert "http" not in found.policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", found.policy)) == 2
    for tag, attributes in found.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "href", "srcset", "onclick", "onload"} & set(attributes)
    assert "url(" not in "".join(found.texts["style"])
    assert "@import" not in "".join(found.texts["style"])
    assert text.count("plotly.js v") == 1


def test_page_has_a_sentence_and_axis_titles_for_each_plot(whole):
    made, summary, text = whole
    found = Page(text)
    figures = [figure for group in groups(made, summary) for figure in group.figures]
    plots = [attributes for _, attributes in found.tags if attributes.get("class") == "plot"]
    assert len(plots) == len(figures) == 42
    stored = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)
    assert len(json.loads(stored[1])) == 42
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    for figure, attributes in zip(figures, plots, strict=True):
        assert figure.title
        assert figure.says.endswith(".")
        assert re.search(r"\(.+\)", figure.layout["xaxis"]["title"]["text"])
        assert attributes["aria-describedby"] in ids
    assert len(re.findall("<figcaption", text)) == 42


def test_page_has_tables_that_can_be_read_aloud(whole):
    _, _, text = whole
    found = Page(text)
    headers = [attributes for tag, attributes in found.tags if tag == "th"]
    assert {one.get("scope") for one in headers} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.tags:
        if tag == "table":
            assert attributes["aria-labelledby"] in ids
            assert attributes["aria-describedby"] in ids
    assert ("html", {"lang": "en"}) in found.tags
    assert '<td class="number">\N{MINUS SIGN}' in text


def test_page_shows_hostile_texts_as_they_are():
    made = comparison(
        [row(settings={"prompt_length": 4, HOSTILE: 1}), row(seed=1)],
        backbone=HOSTILE,
        machine=HOSTILE,
        tasks=(facts(cut=HOSTILE),),
        trials=(
            Trial(
                task="rte",
                method="ptv2",
                number=0,
                value=0.5,
                settings={"prompt_length": 16, HOSTILE: 2},
                state="complete",
            ),
        ),
    )
    found = Page(page(made, summarise(made, resamples=10)))
    assert found.open == []
    tags = [tag for tag, _ in found.tags]
    assert "img" not in tags
    assert tags.count("script") == 3
    assert found.texts["h1"] == [f"Comparison on {HOSTILE}"]


def test_plots_of_a_setting_need_it_to_vary_and_say_how():
    one_length = comparison([row(seed=0), row(seed=1)])
    by_title = {one.title: one for one in groups(one_length, summarise(one_length, resamples=10))}
    length, depth = by_title["Score against prompt length"], by_title["Score against depth"]
    assert length.figures == depth.figures == ()
    assert "set compare.space.ptv2.prompt_length, for example [8, 64]" in length.note
    assert "set compare.space.ptv2.prompt_layers, for example [all, 4, 2]" in depth.note
    assert len(by_title["Learning curves"].figures) == 1


def test_plot_of_depth_counts_layers_and_leaves_failed_trials_out():
    def trial(number, layers, value):
        return Trial(
            task="rte",
            method="ptv2",
            number=number,
            value=value,
            settings={"prompt_layers": layers},
            state="failed" if value is None else "complete",
        )

    trials = (trial(0, 2, 0.4), trial(1, [0, 3, 5], 0.6), trial(2, 4, None))
    made = comparison([row(hits=8)], trials=trials)
    plots = {one.title: one for one in groups(made, summarise(made, resamples=10))}
    (figure,) = plots["Score against depth"].figures
    (trace,) = figure.data
    assert trace["x"] == [2, 3, 6]
    assert trace["y"] == pytest.approx([40, 60, 80])
    assert trace["marker"]["symbol"] == ["circle-open", "circle-open", "circle"]
    assert figure.says == "Best on dev: ptv2 at 6 (80.0, the best of 3 runs)."


def test_learning_curve_is_the_mean_as_far_as_all_seeds_go():
    made = comparison(
        [
            row(seed=0, history=((1, 1.0, 0.2), (2, 0.9, 0.4), (3, 0.8, 0.6))),
            row(seed=1, history=((1, 1.0, 0.4), (2, 0.9, 0.6))),
        ]
    )
    plots = {one.title: one for one in groups(made, summarise(made, resamples=10))}
    first, second, mean = plots["Learning curves"].figures[0].data
    assert (first["x"], second["x"], mean["x"]) == ([1, 2, 3], [1, 2], [1, 2])
    assert mean["y"] == pytest.approx([30, 50])


def test_page_of_a_comparison_that_has_only_begun():
    made = comparison(
        [], methods=("ptv2", "finetune"), seeds=(0, 1), tasks=(facts("rte"), facts("copa"))
    )
    summary = summarise(made, resamples=10)
    found = Page(page(made, summary))
    assert "rte ptv2 (seed 0, 1)" in "".join(found.texts["p"])
    assert "| rte | accuracy | - | - | - | - | - |" in markdown(made, summary)


def test_variant_is_told_by_its_method_and_changes():
    changes = "learning_rate 0.003, prompt.start normal, prompt.start_std 1"
    assert variant_text(PLAIN) == f"ptv2 with {changes}"
    assert variant_text(replace(PLAIN, changes={})) == "ptv2"
    made = varied()
    summary = summarise(made, resamples=50)
    by_title = {sheet.title: sheet for sheet in sheets(made, summary)}
    assert by_title["Variants"].rows == (("plain", "ptv2", changes),)
    assert f"plain: ptv2 with {changes}" in printed(table(made, summary), 140)
    assert "Variants" not in markdown(two_methods(), summarise(two_methods(), resamples=10))


def test_variant_has_a_look_of_its_own_wherever_it_is_drawn():
    made = varied()
    looks = looks_of(made)
    assert len(set(looks.values())) == 5
    text = page(made, summarise(made, resamples=50))
    for name in made.methods:
        assert f'<span class="swatch" style="background:{looks[name].colour}"></span>' in text
    assert "ptv2 against plain" in text
    assert "ptv2 against probe" not in text
    found = Page(text)
    assert found.open == []


def test_variant_alone_is_the_subject():
    made = comparison([row(method="plain"), row(method="probe")], variants=(PLAIN,))
    assert (made.subject, made.first_of("finetune")) == ("plain", None)
    sheet = main_sheet(made, summarise(made, resamples=10))
    assert sheet.headers == ("task", "metric", "probe", "plain", "plain %", "plain KB")


def test_windows_are_a_table_a_plot_a_task_and_a_line_in_the_terminal():
    made = varied()
    summary = summarise(made, resamples=50)
    by_title = {sheet.title: sheet for sheet in sheets(made, summary)}
    sheet = by_title["Learning-rate windows"]
    windows = summarise_windows(made, summary)
    first, average = windows.cells[0], windows.averages[0]
    assert sheet.rows[0] == (
        "rte",
        "ptv2",
        f"{100 * first.best:.1f}",
        f"{first.best_rate:.2g}",
        "0.001 to 0.1",
        f"{100 * first.share:.3g}",
        f"x{100**first.share:.3g}",
        f"{100 * first.probe_share:.3g}",
    )
    assert [cells[:2] for cells in sheet.rows[-2:]] == [("average", "ptv2"), ("average", "plain")]
    assert "9 learning rates, evenly spaced in logs over a range of x100" in sheet.note
    assert "mean over the seeds 1, 2. All of them with epochs 4." in sheet.note
    assert (
        "Moved down, to end at the highest rate that the method may have: cb plain." in sheet.note
    )
    assert "count as 0 (how many seeds): rte plain at 0.1 (2), cb plain at 0.1 (2)," in sheet.note
    shown = f"ptv2 x{100**average.share:.3g} ({100 * average.share:.3g} %)"
    assert f"Learning-rate window, of x100 (mean over tasks): {shown}, plain x" in printed(
        table(made, summary), 400
    )
    (group,) = window_groups(made, summary)
    assert [figure.title for figure in group.figures] == [
        f"{task}: dev accuracy by learning rate" for task in ("rte", "cb", "snips-slots")
    ]
    ours, plain, probe = group.figures[0].data
    assert ours["y"] == pytest.approx([100 * score for score in first.scores])
    assert plain["marker"]["symbol"] == ["star"] * 8 + ["star-open"]
    assert probe["y"] == [100 * summary.cell("rte", "probe").dev] * 2
    assert list(window_groups(two_methods(), summary)) == []


def test_width_of_a_window_is_the_factor_between_its_ends():
    assert [wide(value, 100.0) for value in (0.0, 0.5, 1.0, 0.4346)] == [
        "x1",
        "x10",
        "x100",
        "x7.4",
    ]


def test_json_keeps_variants_and_windows():
    made = varied()
    summary = summarise(made, resamples=50)
    values = to_json(made, summary)
    cell = summarise_windows(made, summary).cells[0]
    assert values["window"]["summary"][0]["share"] == cell.share
    assert values["window"]["summary"][0]["best_rate"] == cell.best_rate
    assert [one["method"] for one in values["window"]["average"]] == ["ptv2", "plain"]
    again, summary_again = from_json(json.loads(json.dumps(values, allow_nan=False)))
    assert (again.variants, again.window) == (made.variants, made.window)
    assert page(again, summary_again) == page(made, summary)


def test_json_of_an_older_version_can_be_read():
    made = two_methods()
    values = to_json(made, summarise(made, resamples=10))
    del values["variants"], values["window"]
    for one in values["average"]["methods"]:
        del one["spread"], one["worst"]
    again, summary = from_json(values)
    assert (again.variants, again.window) == ((), None)
    assert [cells[0] for cells in main_sheet(again, summary).rows] == ["rte", "copa", "average"]
