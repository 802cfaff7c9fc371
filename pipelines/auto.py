"""What `auto` stands for in the section `train`: what trained well for the kind of task and method.

The figures are in docs/optimisation.md. Prompts for tags learn best when they are loud and quick.
All others begin quiet, and go slower: loud ones never learn to compare two texts.
"""

from collections.abc import Mapping
from typing import Any

AUTO = "auto"
RATES: Mapping[str, float] = {"finetune": 3e-4, "prompt_tuning": 2e-2, "probe": 1e-2}
"""Of the methods whose learning rate does not depend on the kind of task."""
MLP_RATE = 3e-3
TOKENS_RATE, TEXTS_RATE = 1e-1, 5e-2
TEXTS_ATTENTION = 0.05


def resolved(train: Any, kind: Any = None) -> Any:
    """Return a section `train` with `auto`, and what is left out, replaced by numbers.

    Args:
        train: As the file has it; anything but a mapping is returned as it is.
        kind: Of the task; None counts as whole texts.
    """
    if not isinstance(train, Mapping):
        return train
    prompt = train.get("prompt", {})
    is_tokens = kind == "tagging"  # roles ask each token about another one, the predicate
    found = dict(train)
    if train.get("learning_rate", AUTO) == AUTO:
        is_mlp = isinstance(prompt, Mapping) and prompt.get("reparameterization") == "mlp"
        deep = MLP_RATE if is_mlp else TOKENS_RATE if is_tokens else TEXTS_RATE
        method = train.get("method")
        found["learning_rate"] = RATES.get(method, deep) if isinstance(method, str) else deep
    if isinstance(prompt, Mapping) and prompt.get("start_attention", AUTO) == AUTO:
        share = None if is_tokens else TEXTS_ATTENTION
        found["prompt"] = {**prompt, "start_attention": share}
    return found
