"""A prompt as an MLflow model. MLflow stores this file with each version and runs it on loading.

Kept by itself ("models from code"), so that no pickle is written or read.
"""

import json
from pathlib import Path
from typing import Any

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
        """Answer each row: label and score, or tags and spans as JSON."""
        rows = [_as_input(row) for row in model_input.to_dict(orient="records")]
        return pd.DataFrame([_as_row(answer) for answer in self.predictor.predict(rows)])


def _as_input(row: dict[str, Any]) -> dict[str, Any]:
    """Take tokens as a list or as text that is split on white space."""
    tokens = row.get("tokens")
    if tokens is None:
        return row
    return {
        "tokens": tokens.split() if isinstance(tokens, str) else [str(token) for token in tokens]
    }


def _as_row(answer: dict[str, Any]) -> dict[str, Any]:
    if "tags" in answer:
        return {key: json.dumps(answer[key], ensure_ascii=False) for key in ("tags", "spans")}
    label = answer["label"]
    return {"label": label, "score": float(answer["probabilities"][label])}


set_model(PromptModel())
