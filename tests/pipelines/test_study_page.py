import json
import re

import pytest

from pipelines.study_page import page
from pipelines.study_page.figures import PARALLEL_TITLE, figures
from tests.pipelines.page_parts import Page
from tests.pipelines.study_parts import (
    HOSTILE,
    all_failed_but_one,
    of_one_setting,
    record,
    renumbered,
    sample,
    trial,
)

TITLES = [
    "Score of each trial",
    "Importance of the settings",
    "Score by prompt_length and learning_rate",
    "Learning curves",
    PARALLEL_TITLE,
]


@pytest.fixture(scope="module")
def text():
    return page(sample())


def stored_figures(text):
    stored = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text)
    return json.loads(stored[1])


def traces(figure):
    return {trace.get("name"): trace for trace in figure.data}


def test_page_asks_for_nothing_outside_itself(text):
    found = Page(text)
    assert found.open == []
    assert found.policy.startswith("default-src 'none'")
    assert "unsafe-eval" not in found.policy
    assert "http" not in found.policy
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/]{43}='", found.policy)) == 2
    for tag, attributes in found.tags:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "href", "srcset", "onclick", "onload", "onerror"} & set(attributes)
    assert "url(" not in "".join(found.texts["style"])
    assert "@import" not in "".join(found.texts["style"])


def test_page_has_five_plots_with_a_sentence_each(text):
    found = Page(text)
    plots = [attributes for _, attributes in found.tags if attributes.get("class") == "plot"]
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert [one["aria-label"] for one in plots] == TITLES
    assert len(ids) == len(set(ids))
    assert all(one["aria-describedby"] in ids for one in plots)
    assert len(stored_figures(text)) == 5
    drawn, missing = figures(sample())
    assert [figure.title for figure in drawn] == TITLES
    assert all(figure.says.endswith(".") for figure in drawn)
    assert missing == []


def test_page_has_headings_and_tables_that_can_be_read_aloud(text):
    found = Page(text)
    assert ("html", {"lang": "en"}) in found.tags
    headings = [tag for tag, _ in found.tags if tag in ("h1", "h2", "h3", "h4")]
    assert headings == ["h1", "h2", "h2", *["h3"] * 5, "h2"]
    assert found.texts["h2"] == ["Finalists", "How it went", "Trials"]
    tables = [attributes for tag, attributes in found.tags if tag == "table"]
    assert [one["aria-labelledby"] for one in tables] == ["finalists", "trials"]
    ids = {attributes["id"] for _, attributes in found.tags if "id" in attributes}
    assert {one["aria-describedby"] for one in tables} <= ids
    scopes = {attributes.get("scope") for tag, attributes in found.tags if tag == "th"}
    assert scopes == {"col", "row"}
    for _, attributes in found.tags:
        if attributes.get("class") in ("scroll", "sideways"):
            assert attributes["tabindex"] == "0"
            assert attributes["role"] == "region"


def test_page_names_the_winner_in_words(text):
    assert text.count("complete, winner") == 1
    assert "<li>Winner: trial 9, dev accuracy 0.7233 ± 0.0045 over 3 seeds" in text


def test_page_shows_hostile_texts_as_they_are(text):
    assert HOSTILE not in text
    assert HOSTILE in "".join(Page(text).texts["td"])


def test_page_of_a_hostile_record_is_whole():
    made = record(
        (
            trial(0, params={"learning_rate": 0.01, "prompt_layers": HOSTILE}, value=0.6),
            trial(1, params={"learning_rate": 0.02, "prompt_layers": "all"}, message=HOSTILE),
        ),
        **dict.fromkeys(("task", "metric", "study", "stopped", "date", "flow_run"), HOSTILE),
        space={"learning_rate": [0.001, 0.03], "prompt_layers": [HOSTILE, "all"]},
    )
    text = page(made)
    found = Page(text)
    assert found.open == []
    assert [tag for tag, _ in found.tags if tag in ("img", "script")] == ["script"] * 3
    # Plotly takes texts of its figures for HTML
    for figure in stored_figures(text):
        for trace in figure["data"]:
            assert "<img" not in str(trace.get("text"))
        for note in figure["layout"].get("annotations", ()):
            assert "<img" not in note["text"]


@pytest.mark.parametrize(
    ("made", "titles"),
    [
        (record(), ["Score of each trial", "Learning curves"]),
        (all_failed_but_one(), ["Score of each trial", "Learning curves"]),
        (
            of_one_setting("learning_rate", 0.001, 0.002, 0.005),
            ["Score of each trial", "Score by learning_rate", "Learning curves", PARALLEL_TITLE],
        ),
        (
            of_one_setting("reparameterization", "mlp", "embedding"),
            [
                "Score of each trial",
                "Score by reparameterization",
                "Learning curves",
                PARALLEL_TITLE,
            ],
        ),
    ],
)
def test_page_says_which_plots_are_left_out_and_why(made, titles):
    drawn, missing = figures(made)
    assert [figure.title for figure in drawn] == titles
    assert len(drawn) + len(missing) == 5
    text = page(made)
    found = Page(text)
    assert found.open == []
    for reason in missing:
        assert reason in found.texts["p"]


def test_history_has_a_point_a_trial_and_the_best_so_far():
    made = record(
        (
            trial(0, value=0.5),
            trial(1, value=0.7),
            trial(2, state="pruned", value=0.8),
            trial(3, value=0.6),
        )
    )
    found = traces(figures(made)[0][0])
    assert found["best so far"]["x"] == [0, 1, 3]
    assert found["best so far"]["y"] == [0.5, 0.7, 0.7]
    assert found["complete"]["y"] == [0.5, 0.7, 0.6]
    assert found["complete"]["marker"]["symbol"] == ["circle", "star", "circle"]
    assert (found["pruned"]["x"], found["pruned"]["y"]) == ([2], [0.8])


def test_contour_has_the_complete_trials_where_they_were():
    points = ((8, 0.01, -0.1), (8, 0.02, 0.7), (32, 0.01, 0.8), (8, 0.01, -0.2))
    made = record(
        tuple(
            trial(number, params={"prompt_length": length, "learning_rate": rate}, value=score)
            for number, (length, rate, score) in enumerate(points)
        )
    )
    surface = next(one for one in figures(made)[0] if one.title.startswith("Score by"))
    ground = surface.data[0]
    assert (ground["x"], ground["y"]) == ([8, 32], [0.01, 0.02])
    # of two trials at one place the better one counts
    assert ground["z"] == [[-0.1, 0.8], [0.7, None]]
    assert surface.layout["xaxis"]["type"] == surface.layout["yaxis"]["type"] == "log"
    assert "0.02" in surface.layout["yaxis"]["ticktext"]


def test_parallel_axes_go_from_the_lowest_value_to_the_highest():
    values = ((4, "all", 0.5), (16, 4, 0.6), (64, 4, 0.9))
    made = record(
        tuple(
            trial(number, params={"prompt_length": length, "prompt_layers": layers}, value=score)
            for number, (length, layers, score) in enumerate(values)
        )
    )
    figure = figures(made)[0][-1]
    assert figure.layout["xaxis"]["ticktext"] == ["prompt_length", "prompt_layers", "dev accuracy"]
    # lengths by their logarithms, choices by their names
    wanted = [[0.0, 1.0, 0.0], [0.5, 0.0, 0.25], [1.0, 0.0, 1.0]]
    assert [line["y"] for line in figure.data] == [pytest.approx(line) for line in wanted]
    assert figure.data[2]["line"]["width"] > figure.data[1]["line"]["width"]


def test_figures_keep_the_numbers_of_the_trials():
    drawn, _ = figures(renumbered(sample(), 2))
    assert "trial 18" in next(one for one in drawn if one.title == "Learning curves").says
    assert 18 in traces(drawn[0])["complete"]["x"]
