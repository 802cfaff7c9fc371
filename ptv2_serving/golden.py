"""Whether golden inputs are answered as they were in training, by a backbone in any number format.

Logits in bf16 or int8 differ from those in fp32 by some hundredths, so what is compared here are
decisions, and only those that were clear. Logits themselves are compared in fp32, once, before a
prompt is stored.

Letters: T tokens, C classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ptv2_core.data.tasks import Form
from ptv2_core.errors import ArtifactError

# between the best logit and the next, for a decision to be clear
CLEAR_MARGIN = 0.5
# of a number that a task of values answers, and of at least 1
VALUE_SHARE = 0.1


def check_decisions(form: Form, expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Compare logits of golden inputs.

    Args:
        form: Of the task.
        expected: Of each input, as training stored them; see `Predictor.logits`.
        got: Likewise, as they are now.

    Raises:
        ArtifactError: A clear decision is another one.
    """
    for place, (one, other) in enumerate(zip(expected, got, strict=True), start=1):
        if one.shape != other.shape or not _agree(form, one, other):
            raise ArtifactError(
                f"golden input {place} has another answer here than in training; the backbone's "
                "number format, or this version of torch or transformers, changes too much: serve "
                "with --precision fp32"
            )


def _agree(form: Form, expected: Tensor, got: Tensor) -> bool:
    if not torch.isfinite(got).all():
        return False
    if form == "values":
        allowed = VALUE_SHARE * expected.abs().clamp(min=1.0)
        return bool(((expected - got).abs() <= allowed).all())
    # spans: [T, 2] decides among tokens, all others among the last dimension
    scores, found = (expected.T, got.T) if form == "spans" else (expected, got)
    if scores.shape[-1] < 2:
        return True
    best = scores.topk(2, dim=-1).values
    is_clear = best[..., 0] - best[..., 1] >= CLEAR_MARGIN
    is_same = scores.argmax(dim=-1) == found.argmax(dim=-1)
    return bool((is_same | ~is_clear).all())
