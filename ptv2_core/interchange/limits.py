"""Where a model under PEFT answers otherwise than the same prompt here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ptv2_core.errors import ArtifactError
from ptv2_core.evaluation.predict import Predictor
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.task_models import states_width


@contextmanager
def naming(source: Path) -> Iterator[None]:
    """Say in an ArtifactError what was being read."""
    try:
        yield
    except ArtifactError as error:
        raise ArtifactError(f"{source}: {error}") from error


def window_limit(backbone: Backbone) -> int | None:
    """Return how many prompt positions and tokens a row may have together; None: no limit.

    A window counts the prompt under PEFT, and here tokens alone: a longer row's end does not see
    the whole prompt there.
    """
    # a window is how many others a token sees, beside itself
    return None if backbone.window is None else backbone.window + 1


def check_window(backbone: Backbone, prompt_length: int, max_length: int) -> None:
    """Refuse rows that are too long for a backbone with windows.

    Raises:
        ArtifactError: They are.
    """
    limit = window_limit(backbone)
    if limit is not None and prompt_length + max_length > limit:
        raise ArtifactError(
            f"{backbone.spec.name} has layers in which a token sees {limit} positions, and PEFT "
            f"counts the prompt's {prompt_length} among them, so the end of a row of {max_length} "
            f"tokens would not see all of it; expected rows of at most {limit - prompt_length} "
            "tokens (max_length)"
        )


def check_width(backbone: Backbone) -> None:
    """Refuse a backbone whose models for a task read other states than a head here.

    Raises:
        ArtifactError: It projects them before.
    """
    width, own = states_width(backbone), backbone.spec.hidden_size
    if width != own:
        raise ArtifactError(
            f"Transformers' {backbone.spec.model_type} models for a task read states that are "
            f"projected to {width} numbers, and a head here reads them before, of {own}: the same "
            "answers cannot be had; --without-head takes the prompt alone"
        )


def check_ends(predictor: Predictor, inputs: Sequence[Mapping[str, Any]], padding: int) -> None:
    """Refuse rows whose last token a decoder's model for sequence classification would not read.

    It reads the last one that is not that of padding, by its id; a head here knows which tokens
    are real.

    Args:
        predictor: Backbone and tokenizer.
        inputs: Of the task, to see what rows end with.
        padding: The token of padding.

    Raises:
        ArtifactError: Rows end with it.
    """
    split = predictor.codec.encode(list(inputs)).split
    if padding in split.input_ids[split.offsets[1:] - 1]:
        raise ArtifactError(
            f"rows end with token {padding}, which is that of padding too: Transformers' "
            f"{predictor.model.backbone.spec.model_type} model for sequence classification reads "
            "the last token that is not; --without-head takes the prompt alone"
        )
