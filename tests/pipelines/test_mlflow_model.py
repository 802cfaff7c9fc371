"""The model of MLflow: what it takes out of a table, and what it puts into one."""

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.pyfunc.scoring_server import predictions_to_json

from pipelines.mlflow_model import PromptModel


class Recorder(PromptModel):
    """A model with given answers, which keeps what it was asked."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.asked: list[dict[str, Any]] = []

        def predict(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            self.asked += rows
            return list(answers)

        self.predictor = SimpleNamespace(predict=predict)  # type: ignore[assignment]


def answered(model: Recorder, *rows: dict[str, Any]) -> pd.DataFrame:
    return model.predict(None, pd.DataFrame(list(rows)))  # type: ignore[arg-type]


def test_question_without_an_answer_has_empty_places() -> None:
    found = {"text": "rome", "start": 8, "end": 12, "score": 0.75, "n_best": []}
    none: dict[str, Any] = {"text": "", "start": None, "end": None, "score": 0.5, "n_best": []}
    row = {"question": "find my", "context": "anna in rome"}
    frame = answered(Recorder(found, none), row, row)
    stream = io.StringIO()
    predictions_to_json(frame, stream)  # type: ignore[no-untyped-call]
    assert json.loads(stream.getvalue())["predictions"] == [
        {"text": "rome", "score": 0.75, "start": 8, "end": 12},
        {"text": "", "score": 0.5, "start": None, "end": None},
    ]


def test_cells_of_a_table_become_plain_values_and_empty_ones_are_left_out() -> None:
    model = Recorder({"value": 1.0}, {"value": 2.0}, {"value": 3.0})
    rows: list[dict[str, Any]] = [
        {"tokens": "call anna", "predicate": 0},
        {"tokens": np.array(["call", "anna"]), "predicate": 1, "text": None},
        {"tokens": ["call", "anna"], "predicate": 1, "text": float("nan")},
    ]
    assert answered(model, *rows).to_dict("list") == {"value": [1.0, 2.0, 3.0]}
    assert model.asked == [{"tokens": ["call", "anna"], "predicate": place} for place in (0, 1, 1)]


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        ({"label": "b", "probabilities": {"a": 0.25, "b": 0.75}}, {"label": "b", "score": 0.75}),
        ({"value": -0.5}, {"value": -0.5}),
        (
            {"choice": 1, "text": "y", "options": ["x", "y"], "probabilities": [0.25, 0.75]},
            {"choice": 1, "text": "y", "score": 0.75},
        ),
        ({"tokens": ["é"], "tags": ["O"], "spans": []}, {"tags": '["O"]', "spans": "[]"}),
    ],
)
def test_answer_of_each_form_becomes_a_row(answer: dict[str, Any], row: dict[str, Any]) -> None:
    assert answered(Recorder(answer), {"text": "a"}).to_dict("records") == [row]
