"""Settings: ranges, types and unknown keys, all problems at once."""

from typing import Any

import pytest

from ptv2_core.config import TrainConfig
from ptv2_core.errors import ConfigError


def test_config_survives_a_round_trip() -> None:
    config = TrainConfig.from_mapping({"learning_rate": 1, "prompt": {"length": 8}})
    assert config.learning_rate == 1.0
    assert isinstance(config.learning_rate, float)
    assert config.prompt.length == 8
    assert TrainConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        (
            {"learning_rate": "fast"},
            "train.learning_rate",
            "expected a number > 0 and <= 1, got 'fast'",
        ),
        ({"learning_rate": 0}, "train.learning_rate", "expected a number > 0 and <= 1, got 0"),
        ({"learning_rate": float("nan")}, "train.learning_rate", "expected a number"),
        ({"epochs": True}, "train.epochs", "expected a whole number"),
        ({"epochs": 1.5}, "train.epochs", "expected a whole number"),
        ({"prompt": {"length": 0}}, "train.prompt.length", ">= 1 and <= 4096, got 0"),
        ({"prompt": {"start": "x"}}, "train.prompt.start", "expected normal | backbone, got 'x'"),
        (
            {"prompt": {"shift_positions": 1}},
            "train.prompt.shift_positions",
            "true or false, got 1",
        ),
        ({"prompt": 3}, "train.prompt", "expected a mapping"),
        (
            {"method": "lora"},
            "train.method",
            "expected ptv2 | prompt_tuning | finetune | probe, got 'lora'",
        ),
        ({"init_from": 3}, "train.init_from", "expected a text, got 3"),
        ({"head": {"type": "mlp"}}, "train.head.type", "expected linear | verbalizer, got 'mlp'"),
        (
            {"head": {"label_words": {"yes": 1}}},
            "train.head.label_words",
            "expected null or a mapping of labels to words, got {'yes': 1}",
        ),
        ({"lr": 1}, "train.lr", "unknown key; known: method, prompt, head, init_from"),
    ],
)
def test_config_names_what_is_wrong(values: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_mapping(values)
    ((where, what),) = caught.value.problems
    assert where == path
    assert message in what


def test_config_names_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig.from_mapping({"epochs": 0, "head": {"reads": "all"}, "what": 1})
    assert sorted(path for path, _ in caught.value.problems) == [
        "train.epochs",
        "train.head.reads",
        "train.what",
    ]
    assert str(caught.value).startswith("3 problems in the settings:\n  - ")
