"""Golden inputs in another number format: clear decisions must stay, close ones may fall."""

from typing import get_args

import pytest
import torch

from ptv2_core.data.tasks import Form
from ptv2_core.errors import ArtifactError
from ptv2_serving.golden import check_decisions

# form, as stored, as it is now, whether that is the same answer
CASES: list[tuple[Form, list[object], list[object], bool]] = [
    ("rows", [2.0, 1.0, 0.0], [1.6, 1.5, 0.0], True),
    ("rows", [2.0, 1.0, 0.0], [1.5, 1.6, 0.0], False),
    ("rows", [1.2, 1.0, 0.0], [1.0, 1.2, 0.0], True),  # it was not clear
    ("values", [3.0], [3.29], True),
    ("values", [3.0], [3.31], False),
    ("options", [0.0, 2.0], [2.0, 0.0], False),
    ("tokens", [[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.9], [0.9, 1.0]], True),
    ("tokens", [[2.0, 0.0], [0.0, 2.0]], [[1.0, 0.9], [1.0, 0.9]], False),
    ("spans", [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], True),
    ("spans", [[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [[1.0, 1.1], [0.0, 1.0], [0.5, 0.5]], False),
    ("rows", [2.0, 0.0], [float("nan"), 0.0], False),
]


@pytest.mark.parametrize(("form", "expected", "got", "is_same"), CASES)
def test_golden_decisions(
    form: Form, expected: list[object], got: list[object], is_same: bool
) -> None:
    one, other = torch.tensor(expected), torch.tensor(got)
    if is_same:
        check_decisions(form, [one], [other])
        return
    with pytest.raises(ArtifactError, match="golden input 2 has another answer here"):
        check_decisions(form, [one, one], [one, other])


def test_golden_covers_every_form_and_refuses_other_shapes() -> None:
    assert {form for form, *_ in CASES} == set(get_args(Form))
    with pytest.raises(ArtifactError, match="golden input 1"):
        check_decisions("rows", [torch.zeros(3)], [torch.zeros(2)])
