"""A prompt as an MLflow model. MLflow stores this file with each version and runs it on loading.

Kept by itself ("models from code"), so that no pickle is written or read.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class PromptModel(PythonModel):
    """Loads the backbone by name and the prompt from the version's files."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the prompt; `model_config` may name another place of the backbone, or a device."""
        # Storing this file runs it as well, and that needs no torch.
        from ptv2_core.evaluation.predict import Predictor

        config = context.model_config or {}
        self.predictor = Predictor.load(
            Path(context.artifacts["prompt"]),
            backbone_name=config.get("backbone"),
            device=config.get("device") or "auto",
        )

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Answer each row.

        Returns:
            For classes `label` and `score`, for a number `value`, for options `choice`, `text` and
            `score`, for words `tags` and `spans` as JSON, for a question `text`, `score`, `start`
            and `end`, the last two empty without an answer.
        """
        rows = [_as_input(row) for row in model_input.to_dict(orient="records")]
        answers = [_as_row(answer) for answer in self.predictor.predict(rows)]
        # by itself, a column of places with an empty cell becomes one of floats
        has_places = bool(answers) and "start" in answers[0]
        return pd.DataFrame(answers, dtype=object if has_places else None)


def _as_input(row: dict[str, Any]) -> dict[str, Any]:
    """Leave empty cells out; take tokens as a list or as text that is split on white space."""
    kept: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, list | tuple | np.ndarray):
            kept[key] = [str(item) for item in value]
        elif not pd.isna(value):
            kept[key] = value
    if isinstance(kept.get("tokens"), str):
        kept["tokens"] = kept["tokens"].split()
    return kept


def _as_row(answer: dict[str, Any]) -> dict[str, Any]:
    if "tags" in answer:
        return {key: json.dumps(answer[key], ensure_ascii=False) for key in ("tags", "spans")}
    if "value" in answer:
        return {"value": float(answer["value"])}
    if "choice" in answer:
        score = float(answer["probabilities"][answer["choice"]])
        return {"choice": answer["choice"], "text": answer["text"], "score": score}
    if "n_best" in answer:
        return {key: answer[key] for key in ("text", "score", "start", "end")}
    label = answer["label"]
    return {"label": label, "score": float(answer["probabilities"][label])}


set_model(PromptModel())
