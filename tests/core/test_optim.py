import pytest
import torch
from torch import nn

from ptv2_core.config import TrainConfig
from ptv2_core.training.optim import make_optimizer

PROMPT, HEAD = "bank.slots.0.weight", "heads.0.linear.weight"


@pytest.mark.parametrize(
    ("changes", "prompt", "head"),
    [
        ({}, 0.05, 0.01),
        ({"learning_rate": 0.2}, 0.2, 0.01),
        ({"learning_rate": 0.2, "head_learning_rate": None}, 0.2, 0.2),
        ({"method": "finetune", "learning_rate": 1e-4}, 1e-4, 0.01),
        # the head is all that a probe trains
        ({"method": "probe", "learning_rate": 0.3}, None, 0.3),
    ],
)
def test_optim_rates_of_prompt_and_head(
    changes: dict[str, object], prompt: float | None, head: float
) -> None:
    parameters = {HEAD: nn.Parameter(torch.zeros(2))}
    if prompt is not None:
        parameters[PROMPT] = nn.Parameter(torch.zeros(3))
    groups = make_optimizer(parameters, TrainConfig.from_mapping(changes)).param_groups
    peaks = {id(group["params"][0]): group["peak"] for group in groups}
    assert peaks[id(parameters[HEAD])] == head
    if prompt is not None:
        assert peaks[id(parameters[PROMPT])] == prompt
    assert len(groups) == len(parameters)
