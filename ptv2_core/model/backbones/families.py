"""The families of backbones that take deep prompts, and what each supports.

A family is architectures that are run alike: one small file, and one entry here.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import transformers
from torch import nn

from ptv2_core.errors import BackboneError
from ptv2_core.model.attention import ATTENTION_NAME
from ptv2_core.model.backbones.albert import Albert
from ptv2_core.model.backbones.base import PooledReading
from ptv2_core.model.backbones.deberta import deberta, deberta_v2
from ptv2_core.model.backbones.decoders import Gpt2, Opt
from ptv2_core.model.backbones.distilbert import DistilBert
from ptv2_core.model.backbones.interface import BertFamily
from ptv2_core.model.backbones.layers import Layers
from ptv2_core.model.backbones.mpnet import MPNet
from ptv2_core.model.backbones.rotary import ModernBert, rotary_decoder, rotary_encoder
from ptv2_core.model.prompts import PromptShape

# the oldest and the newest Transformers that the tests were run against
TESTED_VERSIONS = ("5.17", "5.24")
# of architectures that do not ask Transformers' interface for their attention
OWN_ATTENTION = "eager"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Architectures that are run alike.

    Attributes:
        name: For people.
        model_types: Transformers' names.
        make_layers: How they are run.
        note: What is special about prompts in them, for people.
        first_position: The position of a row's first token; None: the one behind the padding's,
            which a configuration names.
        attention: Transformers' name of the attention that a model is loaded with.
        has_pooler: Whether they have a pooler of their own.
        is_causal: Whether they are decoders, whose tokens see none that stands after them.
        has_position_table: Whether a position beyond the table's end does not exist.
        trims_last_layer: Whether the last layer can compute the first token alone.
        has_verbalizer: Whether a head may read the mask token through their language model.
    """

    name: str
    model_types: tuple[str, ...]
    make_layers: Callable[[nn.Module], Layers]
    note: str
    first_position: int | None = 0
    attention: str = ATTENTION_NAME
    has_pooler: bool = False
    is_causal: bool = False
    has_position_table: bool = True
    trims_last_layer: bool = False
    has_verbalizer: bool = False

    @property
    def reads(self) -> PooledReading:
        """What a head for whole texts reads where the backbone's files say nothing else."""
        return "last" if self.is_causal else "cls"

    def first_position_in(self, config: Any) -> int:
        """Return the position of a row's first token, by Transformers' configuration."""
        return int(config.pad_token_id) + 1 if self.first_position is None else self.first_position


FAMILIES = (
    Family(
        name="BERT",
        model_types=("bert",),
        make_layers=BertFamily,
        trims_last_layer=True,
        note="the paper's own",
        has_pooler=True,
        has_verbalizer=True,
    ),
    Family(
        name="RoBERTa",
        model_types=("roberta", "xlm-roberta", "camembert"),
        make_layers=BertFamily,
        trims_last_layer=True,
        note="positions start behind the padding's",
        first_position=None,
        has_pooler=True,
        has_verbalizer=True,
    ),
    Family(
        name="ELECTRA",
        model_types=("electra",),
        make_layers=BertFamily,
        trims_last_layer=True,
        note="the discriminator",
    ),
    Family(
        name="ALBERT",
        model_types=("albert",),
        make_layers=Albert,
        note="shared weights: a prompt for each application of a layer",
        has_pooler=True,
    ),
    Family(
        name="DistilBERT",
        model_types=("distilbert",),
        make_layers=DistilBert,
        note="no token types",
    ),
    Family(
        name="MPNet",
        model_types=("mpnet",),
        make_layers=MPNet,
        note="relative bias between tokens; prompts get none",
        # whatever its configuration names for padding
        first_position=2,
        attention=OWN_ATTENTION,
        has_pooler=True,
        has_verbalizer=True,
    ),
    Family(
        name="ModernBERT",
        model_types=("modernbert",),
        make_layers=ModernBert,
        note="rotary, local layers; prompts have no place and are always seen",
        has_position_table=False,
    ),
    Family(
        name="EuroBERT",
        model_types=("eurobert",),
        make_layers=rotary_encoder,
        note="rotary, grouped queries; prompts have no place and key heads only",
        has_position_table=False,
    ),
    Family(
        name="DeBERTa",
        model_types=("deberta",),
        make_layers=deberta,
        note="prompts take part in the term of contents, not in those of places",
        attention=OWN_ATTENTION,
        has_position_table=False,
    ),
    Family(
        name="DeBERTa-v2/v3",
        model_types=("deberta-v2",),
        make_layers=deberta_v2,
        note="prompts take part in the term of contents, not in those of places",
        attention=OWN_ATTENTION,
        has_position_table=False,
    ),
    Family(
        name="GPT-2",
        model_types=("gpt2",),
        make_layers=Gpt2,
        note="decoder: a token sees the prompt and the tokens before it",
        is_causal=True,
    ),
    Family(
        name="OPT",
        model_types=("opt",),
        make_layers=Opt,
        note="decoder: a token sees the prompt and the tokens before it",
        is_causal=True,
    ),
    Family(
        name="Llama, Qwen3, GLM-4",
        model_types=("llama", "qwen3", "glm", "glm4"),
        make_layers=rotary_decoder,
        note="decoder, rotary, grouped queries; prompts have no place and key heads only",
        is_causal=True,
        has_position_table=False,
    ),
)


def model_types() -> list[str]:
    """Return the names of all supported architectures, sorted."""
    return sorted(name for family in FAMILIES for name in family.model_types)


def family_of(model_type: Any, *, name: str) -> Family:
    """Return the family of an architecture.

    Args:
        model_type: Transformers' name of it, as a configuration says it; None: it does not.
        name: What the user calls the backbone, for the message.

    Raises:
        BackboneError: It takes no deep prompts here.
    """
    for family in FAMILIES:
        if model_type in family.model_types:
            _warn_of_version()
            return family
    raise BackboneError(
        f"backbone.name: {name!r} is of type {model_type!r}, which takes no deep prompts here; "
        f"expected one of {', '.join(model_types())} (`ptv2 backbones` tells more)"
    )


def prompt_shape(config: Any) -> PromptShape:
    """Return what a backbone asks of a prompt, from its configuration."""
    heads = config.num_attention_heads
    return PromptShape(
        # layers that share weights are applied one after the other, each with its own prompt
        num_layers=config.num_hidden_layers * getattr(config, "inner_group_num", 1),
        num_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def is_tested_version() -> bool:
    """Tell whether this Transformers is in the range that was tested."""
    oldest, newest = (_minor(version) for version in TESTED_VERSIONS)
    return oldest <= _minor(transformers.__version__) <= newest


@cache
def _warn_of_version() -> None:
    """Say once that this Transformers is none that was tested."""
    if not is_tested_version():
        warnings.warn(
            f"Transformers {transformers.__version__} was not tested with deep prompts, "
            f"{TESTED_VERSIONS[0]} to {TESTED_VERSIONS[1]} were; each backbone is checked when it "
            "is loaded",
            stacklevel=4,
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)
