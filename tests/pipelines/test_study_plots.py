import io
import warnings

import matplotlib.pyplot as plt
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from pipelines.study_plots import importances, study_of, surface_names, varied_names, write_png
from tests.pipelines.study_parts import (
    all_failed_but_one,
    failed,
    of_one_setting,
    only_learning_rate_matters,
    record,
    renumbered,
    sample,
    trial,
)

ALL = ["history", "importances", "surface", "parallel", "epochs"]
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", autouse=True)
def _no_warning_of_optuna():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_study_of_has_every_trial_as_it_ended():
    made = sample()
    found = study_of(made).get_trials()
    states = [one.state for one in found]
    assert [one.number for one in found] == list(range(24))
    assert states.count(TrialState.COMPLETE) == 13
    assert states.count(TrialState.PRUNED) == 8
    assert states.count(TrialState.FAIL) == 3
    for one, told in zip(found, made.trials, strict=True):
        assert one.params == told.params
        assert one.value == told.value
        assert one.intermediate_values == dict(enumerate(told.epochs, start=1))
        assert one.user_attrs == {"origin": told.origin, "message": told.message}


def test_study_of_draws_from_the_ranges_of_the_space():
    found = study_of(sample()).get_trials()[0].distributions
    assert found == {
        "prompt_length": IntDistribution(4, 64, log=True),
        "learning_rate": FloatDistribution(0.001, 0.03, log=True),
        "head_learning_rate": FloatDistribution(0.0005, 0.02, log=True),
        "reparameterization": CategoricalDistribution(("embedding", "mlp")),
        "prompt_dropout": FloatDistribution(0.0, 0.3),
        "prompt_layers": CategoricalDistribution(("all", 4)),
    }


def test_study_of_takes_settings_that_lie_outside_the_space():
    made = record(
        (
            trial(0, params={"learning_rate": 0.1, "prompt_layers": 2}, origin="baseline"),
            trial(1, params={"learning_rate": 0.002, "prompt_layers": "all", "weight_decay": 0.1}),
        ),
        space={"learning_rate": [0.001, 0.03], "prompt_layers": ["all"], "weight_decay": None},
    )
    first, second = study_of(made).get_trials()
    assert first.distributions == {
        "learning_rate": FloatDistribution(0.001, 0.1, log=True),
        "prompt_layers": CategoricalDistribution(("all", 2)),
    }
    assert second.distributions["weight_decay"] == FloatDistribution(0.1, 0.1, log=True)


def test_study_of_keeps_numbers_that_have_gaps():
    found = study_of(renumbered(sample(), 2)).get_trials()
    assert len(found) == 47
    assert found[18].value == sample().trials[9].value
    assert found[19].state == TrialState.FAIL
    assert found[19].params == {}


def test_importances_find_the_one_setting_that_matters():
    # its scores are computed from the learning rate alone
    made = only_learning_rate_matters()
    found = importances(made)
    assert list(found.shares)[0] == "learning_rate"
    assert found.shares["learning_rate"] > 0.8
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.says.startswith("Importance of the settings, from 24 trials with a score: learn")


def test_importances_count_pruned_trials_with_their_best_score():
    whole = only_learning_rate_matters()
    middle = sorted(one.value for one in whole.trials)[12]
    pruned = tuple(
        trial(
            one.number,
            params=one.params,
            state="complete" if one.value >= middle else "pruned",
            value=one.value,
            epochs=one.epochs,
        )
        for one in whole.trials
    )
    assert importances(record(pruned, space=whole.space)) == importances(whole)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (record(), "it takes 4 complete trials, and there are 1."),
        (only_learning_rate_matters(3), "it takes 4 complete trials, and there are 3."),
        (all_failed_but_one(), "it takes 4 complete trials, and there are 1."),
        (
            of_one_setting("learning_rate", 0.001, 0.002, 0.004, 0.008),
            "only learning_rate was drawn from a range.",
        ),
        (
            record(tuple(trial(number) for number in range(4))),
            "nothing was drawn from a range.",
        ),
        (
            record(
                tuple(
                    trial(number, params={"learning_rate": 0.01 * rate, "prompt_length": length})
                    for number, (rate, length) in enumerate(((1, 4), (2, 8), (3, 16), (4, 4)))
                )
            ),
            "all trials score the same.",
        ),
    ],
)
def test_importances_that_cannot_be_told_say_why(made, why):
    found = importances(made)
    assert found.shares is None
    assert found.says == f"Importance of the settings: not told; {why}"


def test_varied_names_puts_what_is_looked_at_first_in_front():
    assert varied_names(sample().trials) == [
        "prompt_length",
        "learning_rate",
        "head_learning_rate",
        "prompt_dropout",
        "reparameterization",
        "prompt_layers",
    ]
    assert varied_names((trial(0), trial(1))) == []


def test_surface_needs_two_numbers_that_differ():
    assert surface_names(sample()) == ("prompt_length", "learning_rate")
    assert surface_names(of_one_setting("learning_rate", 0.001, 0.01)) is None
    assert surface_names(record()) is None


def test_write_png_writes_five_plots(tmp_path):
    written = write_png(sample(), tmp_path / "plots")
    assert [file.name for file in written] == [f"{name}.png" for name in ALL]
    for file in written:
        data = file.read_bytes()
        assert data.startswith(PNG)
        image = plt.imread(io.BytesIO(data), format="png")
        # readable, and something is drawn
        assert image.shape[0] > 400
        assert image.shape[1] > 700
        assert image.std() > 0.05


@pytest.mark.parametrize(
    ("made", "names"),
    [
        (record(), ["history", "epochs"]),
        (all_failed_but_one(), ["history", "epochs"]),
        (
            of_one_setting("learning_rate", 0.001, 0.002, 0.005, 0.02),
            ["history", "surface", "parallel", "epochs"],
        ),
        (
            of_one_setting("reparameterization", "mlp", "embedding", "mlp"),
            ["history", "surface", "parallel", "epochs"],
        ),
        (renumbered(sample(), 3), ALL),
    ],
)
def test_write_png_leaves_out_what_there_is_nothing_to_draw_for(tmp_path, made, names):
    written = write_png(made, tmp_path)
    assert [file.stem for file in written] == names
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_write_png_removes_plots_of_an_earlier_sweep(tmp_path):
    (tmp_path / "importances.png").write_bytes(b"old")
    (tmp_path / "mine.png").write_bytes(b"mine")
    write_png(record((trial(0), failed(1))), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "epochs.png",
        "history.png",
        "mine.png",
    ]


def test_write_png_leaves_style_figures_and_logging_as_they_were(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    before = dict(plt.rcParams)
    write_png(sample(), tmp_path)
    assert plt.get_fignums() == []
    after = dict(plt.rcParams)
    assert {key for key in before if before[key] != after[key]} <= {"backend"}
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
