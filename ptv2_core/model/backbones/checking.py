"""Check a loaded backbone: a release of Transformers that breaks prompts is an error, not a score.

Letters: B rows, T tokens, P prompt length, N key heads, G query heads for each, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor

from ptv2_core.errors import BackboneError
from ptv2_core.model.attention import Captured, PromptBatch
from ptv2_core.model.backbones.base import Backbone
from ptv2_core.model.backbones.families import TESTED_VERSIONS, is_tested_version
from ptv2_core.model.prompts import LayerPrompt

# ids from here on are words, or pieces of them, in every vocabulary
FIRST_TOKEN = 5
NUM_TOKENS = 5
NUM_PADDING = 2
LENGTH = 3
# a row that passes a wider window would take longer to compute than a backbone to load
WIDEST_WINDOW = 128
# Of a difference, by the size of what is compared: what rounding explains. Measured in fp32: up to
# 1e-6; in bf16 0.009 in one layer's attention, and 0.017 in the last states. On MiniLM a layer less
# makes 0.3, and places one further 0.9.
EXACT, ROUGH_ATTENTION, ROUGH_STATES = 1e-4, 0.03, 0.06
# where states are rounded to 8 bits at each product, which doubles a rounding here and there
COARSE_STATES = 0.2
# a prompt of random keys and values changes far more
LEAST_CHANGE = 1e-3
# what a model that is not run as its family is can raise
FAILURES = (AttributeError, TypeError, ValueError, LookupError, RuntimeError)


@contextmanager
def explained(name: str, model_type: str) -> Iterator[None]:
    """Say what it means where a backbone cannot be run as its family is.

    Args:
        name: What the user calls the backbone.
        model_type: Transformers' name of its architecture.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        raise _broken(name, model_type, f"a forward ended with {told(error)}") from error


def told(error: Exception) -> str:
    """Return what an error says, in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@torch.no_grad()
def check(backbone: Backbone) -> None:
    """Run a few tokens through a backbone, with and without a prompt.

    Raises:
        BackboneError: A prompt changes nothing, an empty slot changes something, attention is not
            what it says it is, the first token alone is not what it is among all, or the bare
            backbone is not what Transformers makes of it.
    """
    ids, mask = _tokens(backbone, NUM_TOKENS)
    layers = [_prompt(backbone, seed) for seed in range(backbone.spec.shape.num_layers)]
    captured: list[Captured] = []
    bare = _states(backbone, ids[:1], mask[:1], [None] * len(layers))[0]
    # The same row twice; the prompt is the first one's alone. Where the last layer can compute the
    # first token alone it does so here, and in the bare row it computes all.
    trims = backbone.trims_last_layer
    prompted, empty = _states(backbone, ids, mask, layers, captured, first_token_only=trims)
    expected = bare[: len(empty)]
    is_exact = backbone.dtype == torch.float32
    tolerance = EXACT if is_exact and backbone.rounding is None else ROUGH_STATES
    if backbone.rounding in ("int8", "bnb-int8"):
        tolerance = COARSE_STATES
    problem = None
    if [one.layer for one in captured] != list(range(len(layers))):
        problem = f"expected attention of {len(layers)} layers in turn, got {len(captured)} calls"
    elif not _difference(prompted, expected) > LEAST_CHANGE:
        problem = "a prompt changes nothing"
    elif not all(
        _difference(*_attention(one, prompt)) < (EXACT if is_exact else ROUGH_ATTENTION)
        for one, prompt in zip(captured, layers, strict=True)
    ):
        problem = "attention is not the softmax over prompt and tokens"
    elif not _difference(empty, expected) < tolerance:
        problem = "the prompt of one row changes another row"
        if trims and _difference(_states(backbone, ids, mask, layers)[1], bare) < tolerance:
            problem = "the last layer gives the first token alone other states than among all"
    # of our own int8 they were compared before the weights were rounded
    elif backbone.rounding != "int8" and not _is_transformers_own(backbone, bare, tolerance):
        problem = "without a prompt, its states are not those that Transformers computes"
    if problem:
        raise _broken(backbone.spec.name, backbone.spec.model_type, problem)


def _broken(name: str, model_type: str, what: str) -> BackboneError:
    tested = f"{TESTED_VERSIONS[0]} to {TESTED_VERSIONS[1]} were tested"
    way_out = f"Versions {tested}; install one of them, or take another backbone"
    if is_tested_version():
        way_out = (
            f"This version was tested ({tested}) on other backbones of its type; look for what is "
            "special in this one's config.json, or take another backbone"
        )
    return BackboneError(
        f"backbone.name: deep prompts do not work in {name!r} ({model_type}) under Transformers "
        f"{transformers.__version__}: {what}. {way_out}"
    )


def _is_transformers_own(backbone: Backbone, bare: Tensor, tolerance: float) -> bool:
    """Tell whether the bare backbone's states `[T, H]` are those of Transformers' own forward.

    Of a backbone with windows the row is another one, whose ends do not see each other.
    """
    window, length = backbone.window, NUM_TOKENS
    if window is not None and window <= WIDEST_WINDOW:
        length += window + 1
    ids, mask = (one[:1] for one in _tokens(backbone, length))
    if length > NUM_TOKENS:
        bare = _states(backbone, ids, mask, [None] * backbone.spec.shape.num_layers)[0]
    own = _own_states(backbone, ids, mask)
    # those of one size of OPT are projected to another width behind the layers
    return own.shape != bare.shape or _difference(bare, own) < tolerance


def _tokens(backbone: Backbone, length: int) -> tuple[Tensor, Tensor]:
    """Return ids `[2, T]` of the same row twice, padded, and the mask of `length` real tokens."""
    config: Any = backbone.model.config
    padding = config.pad_token_id
    # MPNet counts positions by a padding id that its configuration need not name
    words = [one for one in range(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS + 1) if one != padding]
    ids = [words[place % NUM_TOKENS] for place in range(length)]
    row = torch.tensor(ids + [padding or 0] * NUM_PADDING, device=backbone.device)
    real = torch.arange(len(row), device=backbone.device) < length
    return row.expand(2, -1), real.expand(2, -1)


def _prompt(backbone: Backbone, seed: int) -> LayerPrompt:
    """Return a random prompt of one layer, which only the first of two rows sees."""
    shape = backbone.spec.shape
    generator = torch.Generator().manual_seed(seed)
    size = (2, 2, shape.num_heads, LENGTH, shape.head_size)
    drawn = torch.randn(size, generator=generator).to(backbone.device, backbone.states_dtype)
    sees = torch.tensor([[True] * LENGTH, [False] * LENGTH], device=backbone.device)
    return LayerPrompt(pairs=drawn.transpose(0, 1), mask=sees)


def _states(
    backbone: Backbone,
    ids: Tensor,
    mask: Tensor,
    layers: Sequence[LayerPrompt | None],
    captured: list[Captured] | None = None,
    *,
    first_token_only: bool = False,
) -> Tensor:
    """Return the states of the real tokens, `[B, T, H]`; of the first alone, `[B, 1, H]`."""
    encoded = backbone.encode(
        ids,
        mask,
        None,
        shifts=torch.zeros(1, dtype=torch.long, device=backbone.device),
        prompts=PromptBatch.of(layers, mask, backbone.states_dtype, captured),
        first_token_only=first_token_only,
    )
    return encoded.hidden[:, : int(mask[0].sum())]


def _own_states(backbone: Backbone, ids: Tensor, mask: Tensor) -> Tensor:
    """Return what Transformers' own forward gives for one row, `[T, H]`."""
    model: Any = backbone.model
    ours = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        output = model(input_ids=ids, attention_mask=mask.long())
    finally:
        model.config._attn_implementation = ours
    states: Tensor = output.last_hidden_state[0, mask[0]]
    return states.float()


def _attention(layer: Captured, prompt: LayerPrompt) -> tuple[Tensor, Tensor]:
    """Return what attention gave the first row, and should have given, `[T, G * N, D]`."""
    assert layer.context is not None, "whatever is captured holds what attention gave"
    query = layer.query[0, :, :NUM_TOKENS].double()  # [G * N, T, D]; T is 1 of the first alone
    group = len(query) // layer.key.shape[1]
    own_keys, own_values = prompt.keys_and_values()
    keys = torch.cat([own_keys[0], layer.key[0]], dim=1).double()  # [N, S, D]
    values = torch.cat([own_values[0], layer.value[0]], dim=1).double()
    added = torch.zeros(*query.shape[:2], keys.shape[1], dtype=torch.float64)
    added = added.to(query.device)
    if layer.bias is not None:
        bias = layer.bias[0].expand(len(query), NUM_TOKENS + NUM_PADDING, -1)
        added[:, :, LENGTH:] = bias[:, : query.shape[1]].double()
    asked = torch.arange(len(query), device=query.device) // group  # the key head of each query's
    scores = query @ keys[asked].mT * layer.scaling + added  # [G * N, T, S]
    shares = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    shares = shares / shares.sum(dim=-1, keepdim=True)
    given = layer.context[0, :NUM_TOKENS].double()
    return given, (shares @ values[asked]).transpose(0, 1)


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference by that of what is wanted; no number is no number."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
