"""What Transformers' own models for a task put on an encoder.

Letters: C classes, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ptv2_core.model.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """How a model for sequence classification reads a text.

    The first token's state goes through `dense` `[H, H]`, an activation and `last` `[C, H]`.

    Attributes:
        dense: Name of the first layer.
        last: Name of the last layer.
        slope: Of the activation at zero: 1 of tanh, 1/2 of GELU.
        has_pooler: Whether `dense` is the encoder's own pooler, which comes with its files.
    """

    dense: str
    last: str
    slope: float
    has_pooler: bool

    @property
    def is_tanh(self) -> bool:
        """Whether the activation is that of a pooler."""
        return self.slope == 1.0


_OF_ROBERTA = Classifier(
    dense="classifier.dense", last="classifier.out_proj", slope=1.0, has_pooler=False
)

# model_type -> its classifier, of the types on which PEFT's prefix tuning runs
CLASSIFIERS: Mapping[str, Classifier] = {
    "bert": Classifier(dense="bert.pooler.dense", last="classifier", slope=1.0, has_pooler=True),
    "roberta": _OF_ROBERTA,
    "xlm-roberta": _OF_ROBERTA,
    "camembert": _OF_ROBERTA,
    "electra": Classifier(
        dense="classifier.dense", last="classifier.out_proj", slope=0.5, has_pooler=False
    ),
}


def pooler_of(backbone: Backbone) -> tuple[Tensor, Tensor] | None:
    """Return weight `[H, H]` and bias `[H]` of a backbone's own pooler; None without one."""
    pooler = getattr(backbone.model, "pooler", None)
    if pooler is None:
        return None
    return pooler.dense.weight.detach().float(), pooler.dense.bias.detach().float()
