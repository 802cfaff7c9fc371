"""Variants of known architectures that would be loaded as something else, without a word."""

from collections.abc import Iterator, Mapping
from typing import Any

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.families import FAMILIES, Family


def refuse_variants(name: str, settings: Mapping[str, Any], config: Any, family: Family) -> None:
    """Refuse a backbone that is not what it would be run as.

    Args:
        name: What the user calls it.
        settings: What its config.json holds: Transformers' own class may drop what it says.
        config: Transformers' configuration of it.
        family: Of its architecture.

    Raises:
        BackboneError: It is such a variant.
    """
    model_type = config.model_type
    places = settings.get("position_embedding_type")
    if family.has_position_table and places not in (None, "absolute"):
        raise BackboneError(
            f"backbone.name: {name!r} has positions of the type {places!r} "
            f"(position_embedding_type in its config.json), and Transformers' {model_type} would "
            "run it with a table of absolute ones; expected absolute. Take another backbone."
        )
    if settings.get("is_decoder") and not family.is_causal:
        decoders = [one for each in FAMILIES if each.is_causal for one in each.model_types]
        raise BackboneError(
            f"backbone.name: {name!r} is a decoder of type {model_type} (is_decoder: true in its "
            "config.json), which is run here as an encoder, whose tokens see all others; expected "
            f"is_decoder: false, or a decoder of type {', '.join(sorted(decoders))}. Take another "
            "backbone."
        )
    most = config.max_position_embeddings
    for rotary in _rotary_parameters(config):
        shorter = rotary.get("original_max_position_embeddings")
        if rotary.get("rope_type") == "longrope" and shorter is not None and shorter < most:
            raise BackboneError(
                f"backbone.name: {name!r} turns all rows of a batch by other frequencies where one "
                f"of them is longer than {shorter} tokens (rope_type longrope in its config.json), "
                "so a row's answer would depend on the others; expected "
                f"original_max_position_embeddings of max_position_embeddings ({most}) or more. "
                "Take another backbone."
            )


def _rotary_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield what a configuration says of its rotary tables: of one, or of one a kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    yield found
    yield from (one for one in found.values() if isinstance(one, Mapping))
