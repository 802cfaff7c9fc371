"""What Transformers' own models for a task put on a backbone.

Letters: C classes, H hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ptv2_core.model.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """How an encoder's model for sequence classification reads a text.

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


@dataclass(frozen=True, kw_only=True)
class LastToken:
    """How a decoder's model for sequence classification reads a text.

    The state of the last token that is not padding's goes through one layer, without a bias.

    Attributes:
        layer: Its name.
    """

    layer: str


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Tables of embeddings whose sum, given in place of ids, is the same row.

    Attributes:
        words: Name of that of words, in an encoder.
        types: Name of that of token types.
    """

    words: str
    types: str


@dataclass(frozen=True, kw_only=True)
class TaskModels:
    """The layers of an architecture's models for a task.

    Attributes:
        rows: Of that for sequence classification.
        tables: The encoder's, to give token types without ids of types; None: it has none, or
            counts positions otherwise where it is given embeddings.
        tokens: Name of the one for token classification; None: there is no such model.
        spans: Name of the one for question answering; None: there is no such model.
    """

    rows: FirstToken | LastToken
    tables: Tables | None = None
    tokens: str | None = "classifier"
    spans: str | None = "qa_outputs"


_OF_BERT = Tables(words="embeddings.word_embeddings", types="embeddings.token_type_embeddings")
_OF_ROBERTA = TaskModels(
    rows=FirstToken(
        dense="classifier.dense", last="classifier.out_proj", slope=1.0, has_pooler=False
    )
)
_SCORE = LastToken(layer="score")

# model_type -> its models, of the types on which PEFT's prefix tuning runs
TASK_MODELS: Mapping[str, TaskModels] = {
    "bert": TaskModels(
        rows=FirstToken(dense="bert.pooler.dense", last="classifier", slope=1.0, has_pooler=True),
        tables=_OF_BERT,
    ),
    "roberta": _OF_ROBERTA,
    "xlm-roberta": _OF_ROBERTA,
    "camembert": _OF_ROBERTA,
    "electra": TaskModels(
        rows=FirstToken(
            dense="classifier.dense", last="classifier.out_proj", slope=0.5, has_pooler=False
        ),
        tables=_OF_BERT,
    ),
    "gpt2": TaskModels(rows=_SCORE),
    "opt": TaskModels(rows=_SCORE, tokens=None),
    "llama": TaskModels(rows=_SCORE, tokens="score"),
    "qwen3": TaskModels(rows=_SCORE, tokens="score"),
    "glm": TaskModels(rows=_SCORE, tokens="score", spans=None),
    "glm4": TaskModels(rows=_SCORE, tokens="score", spans=None),
}


def pooler_of(backbone: Backbone) -> tuple[Tensor, Tensor] | None:
    """Return weight `[H, H]` and bias `[H]` of a backbone's own pooler; None without one."""
    pooler = getattr(backbone.model, "pooler", None)
    if pooler is None:
        return None
    return pooler.dense.weight.detach().float(), pooler.dense.bias.detach().float()


def padding_id(backbone: Backbone) -> int | None:
    """Return the token that models for a task take for padding; None where none is named."""
    config: Any = backbone.model.config
    found: int | None = config.pad_token_id
    return found


def states_width(backbone: Backbone) -> int:
    """Return how wide the states are that models for a task read.

    Not H where a projection stands behind the layers, as in one size of OPT.
    """
    config: Any = backbone.model.config
    width: int | None = getattr(config, "word_embed_proj_dim", None)
    return backbone.spec.hidden_size if width is None else width
