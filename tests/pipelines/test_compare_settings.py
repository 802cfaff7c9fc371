"""The section `compare` of params.yaml: names of one's own, windows, and what is refused."""

from typing import Any

import pytest

from pipelines.checking import check_section
from pipelines.extra_settings import (
    DEFAULT_SPACES,
    DEFAULT_TRAINS,
    NAMES_WORDS,
    CompareSettings,
)
from pipelines.schema import SearchSpace

METHODS = "ptv2 | prompt_tuning | finetune | probe"
SET = "a comparison sets this itself; leave it out"
PLAIN = {"method": "ptv2", "learning_rate": 3e-3, "prompt": {"start": "normal"}}


def unknown(name: str) -> str:
    return (
        "expected ptv2, prompt_tuning, finetune, probe, or a name with an entry under "
        f"compare.train that says its method, as {name}: {{method: ptv2}}; got {name!r}"
    )


def built(values: dict[str, Any]) -> CompareSettings:
    found: list[Any] = []
    section = check_section(CompareSettings, values, found)
    assert found == []
    assert isinstance(section, CompareSettings)
    return section


def problems(values: dict[str, Any]) -> dict[str, str]:
    found: list[Any] = []
    assert check_section(CompareSettings, values, found) is None
    return {".".join(map(str, where)): words for where, words in found}


def test_compare_settings_lie_over_the_defaults_name_by_name() -> None:
    own = built(
        {"train": {"ptv2": {"epochs": 3}, "plain": PLAIN}, "space": {"probe": {}}, "n_trials": 0}
    )
    assert own.train == {**DEFAULT_TRAINS, "ptv2": {"epochs": 3}, "plain": PLAIN}
    assert own.space == {**DEFAULT_SPACES, "probe": SearchSpace()}
    assert built({}) == CompareSettings()


def test_compare_settings_of_a_variant_are_those_of_its_method_but_for_what_it_says() -> None:
    range_of_plain = {"learning_rate": [1e-4, 1e-3]}
    values = {
        "methods": ["probe", "plain", "late"],
        "train": {"plain": PLAIN, "late": {"method": "finetune"}},
    }
    own = built({**values, "space": {"plain": range_of_plain}})
    assert [own.method_of(name) for name in own.methods] == ["probe", "ptv2", "finetune"]
    assert own.changes_of("plain") == {"learning_rate": 3e-3, "prompt": {"start": "normal"}}
    assert own.changes_of("late") == {}
    assert own.space_of("plain") == SearchSpace(learning_rate=(1e-4, 1e-3))
    assert own.space_of("late") == DEFAULT_SPACES["finetune"]


def test_compare_settings_keep_a_variant_that_is_not_listed() -> None:
    values = {
        "methods": ["probe"],
        "train": {"plain": PLAIN},
        "space": {"plain": {"prompt_length": [2, 4]}},
    }
    assert built(values).names == ("probe",)
    with_window = built({**values, "window": {"methods": ["plain", "probe"]}})
    assert with_window.names == ("probe", "plain")
    window = with_window.window
    assert window is not None
    assert (window.factor, window.points, window.seeds, window.train) == (100.0, 9, (1,), {})


@pytest.mark.parametrize(
    ("values", "place", "words"),
    [
        ({"methods": ["lora"]}, "methods", unknown("lora")),
        (
            {"train": {"plain": {"epochs": 2}}},
            "train.plain.method",
            f"is required, since plain is none; expected {METHODS}",
        ),
        (
            {"train": {"plain": {"method": "lora"}}},
            "train.plain.method",
            f"expected {METHODS}, got 'lora'",
        ),
        (
            {"train": {"ptv2": {"method": "probe"}}},
            "train.ptv2.method",
            f"{SET}, or give the entry another name",
        ),
        (
            {"train": {"Plain": {"method": "ptv2"}}},
            "train.Plain",
            "expected a name of a lower-case letter, then up to 62 of a-z, 0-9, _ and -, "
            "got 'Plain'",
        ),
        ({"train": {"plain": {**PLAIN, "init_from": "x"}}}, "train.plain.init_from", SET),
        (
            {"train": {"plain": 3}},
            "train.plain",
            "expected a mapping of methods to settings of train, got 3",
        ),
        ({"space": {"plain": {}}, "n_trials": 0}, "space.plain", unknown("plain")),
        (
            {"space": {"ptv2": {"learning_rate": [2.0, 3.0]}}},
            "space.ptv2.learning_rate.0",
            "expected null or [lowest, highest], numbers > 0 and <= 1, got 2.0",
        ),
        (
            {"space": {"ptv2": {"learning_rate": [0.3, 0.2]}}},
            "space.ptv2.learning_rate",
            "expected [lowest, highest], got [0.3, 0.2]",
        ),
        (
            {"space": {"ptv2": {"lerning_rate": [0.2, 0.3]}}},
            "space.ptv2.lerning_rate",
            "unknown key; did you mean 'learning_rate'?",
        ),
        ({"window": {"methods": ["lora"]}}, "window.methods", unknown("lora")),
        ({"window": {}}, "window.methods", f"is required; expected {NAMES_WORDS}"),
        (
            {"window": {"methods": ["ptv2"], "factor": 1}},
            "window.factor",
            "expected a number above 1 to 1000000, got 1",
        ),
        (
            {"window": {"methods": ["ptv2"], "points": 2}},
            "window.points",
            "expected a whole number from 3 to 1000, got 2",
        ),
        (
            {"window": {"methods": ["ptv2", "ptv2"]}},
            "window.methods",
            "expected each once, got ['ptv2', 'ptv2']",
        ),
        (
            {"window": {"methods": ["ptv2"], "train": {"learning_rate": 0.1}}},
            "window.train.learning_rate",
            "a window sets this itself; leave it out",
        ),
    ],
)
def test_compare_settings_say_which_key_is_wrong(
    values: dict[str, Any], place: str, words: str
) -> None:
    assert problems(values)[place] == words
