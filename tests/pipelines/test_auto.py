"""`auto` in the section `train`: numbers by kind of task and method, given ones untouched."""

from typing import Any

import pytest

from pipelines.auto import resolved
from pipelines.settings import load_settings
from ptv2_core.config import TrainConfig
from tests.stage_parts import change_params, make_workspace


@pytest.mark.parametrize(
    ("train", "kind", "rate", "share"),
    [
        ({}, "classification", 5e-2, 0.05),
        ({}, None, 5e-2, 0.05),
        ({}, "qa", 5e-2, 0.05),
        ({}, "srl", 5e-2, 0.05),
        ({}, "tagging", 1e-1, None),
        ({"learning_rate": "auto", "prompt": {"start_attention": "auto"}}, "tagging", 1e-1, None),
        ({"learning_rate": 0.3, "prompt": {"start_attention": 0.2}}, "tagging", 0.3, 0.2),
        ({"prompt": {"start_attention": None}}, "classification", 5e-2, None),
        ({"prompt": {"reparameterization": "mlp"}}, "tagging", 3e-3, None),
        ({"method": "finetune"}, "tagging", 3e-4, None),
        ({"method": "prompt_tuning"}, "classification", 2e-2, 0.05),
        ({"method": "probe", "prompt": {"reparameterization": "mlp"}}, "qa", 1e-2, 0.05),
    ],
)
def test_auto_goes_by_kind_and_method(
    train: dict[str, Any], kind: str | None, rate: float, share: float | None
) -> None:
    before = repr(train)
    found = resolved(train, kind)
    assert found["learning_rate"] == rate
    assert found["prompt"]["start_attention"] == share
    assert repr(train) == before
    assert {**found, "prompt": None} == {**train, "learning_rate": rate, "prompt": None}
    TrainConfig.from_mapping(found)


@pytest.mark.parametrize("wrong", [None, [], "fast", {"prompt": 3}, {"method": ["a"]}])
def test_auto_leaves_what_is_wrong_to_those_who_check(wrong: Any) -> None:
    found = resolved(wrong)
    if isinstance(wrong, dict):
        assert {**found, **wrong} == found
    else:
        assert found == wrong


def test_auto_is_a_number_for_each_task_of_a_file(tmp_path: Any) -> None:
    root = make_workspace(tmp_path / "space")
    change_params(
        root,
        {
            "train.learning_rate": "auto",
            "train.prompt.start_attention": "auto",
            "tasks.slots.train": {},
            "tasks.pairs.train": {"method": "finetune"},
        },
    )
    settings = load_settings(root / "params.yaml")
    rates = {name: one.train.learning_rate for name, one in settings.tasks.items()}
    assert rates == {"intents": 5e-2, "pairs": 3e-4, "slots": 1e-1}
    shares = {name: one.train.prompt.start_attention for name, one in settings.tasks.items()}
    assert shares == {"intents": 0.05, "pairs": 0.05, "slots": None}
