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
from ptv2_core.model.backbones.families import TESTED_VERSIONS
from ptv2_core.model.prompts import LayerPrompt

# ids from here on are words, or pieces of them, in every vocabulary
FIRST_TOKEN = 5
NUM_TOKENS = 5
NUM_PADDING = 2
LENGTH = 3
# of a difference, by the size of what is compared: what rounding explains
EXACT, ROUGH = 1e-3, 0.1
# a prompt of random keys and values changes far more
LEAST_CHANGE = 1e-3


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
    except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
        raise _broken(name, model_type, f"a forward ended with {told}") from error


@torch.no_grad()
def check(backbone: Backbone) -> None:
    """Run a few tokens through a backbone, with and without a prompt.

    Raises:
        BackboneError: A prompt changes nothing, an empty slot changes something, attention is not
            what it says it is, or the bare backbone is not what Transformers makes of it.
    """
    ids, mask = _tokens(backbone)
    layers = [_prompt(backbone, seed) for seed in range(backbone.spec.shape.num_layers)]
    captured: list[Captured] = []
    bare = _states(backbone, ids[:1], mask[:1], [None] * len(layers))[0]
    # the same row twice; the prompt is the first one's alone
    prompted, empty = _states(backbone, ids, mask, layers, captured)
    is_exact = backbone.dtype == torch.float32 and backbone.rounding is None
    tolerance = EXACT if is_exact else ROUGH
    problem = None
    if [one.layer for one in captured] != list(range(len(layers))):
        problem = f"expected attention of {len(layers)} layers in turn, got {len(captured)} calls"
    elif not _difference(prompted, bare) > LEAST_CHANGE:
        problem = "a prompt changes nothing"
    elif not _difference(*_attention(captured[0], layers[0])) < tolerance:
        problem = "attention is not the softmax over prompt and tokens"
    elif not _difference(empty, bare) < tolerance:
        problem = "the prompt of one row changes another row"
    else:
        own = _own_states(backbone, ids[:1], mask[:1])
        if own.shape == bare.shape and not _difference(bare, own) < tolerance:
            problem = "without a prompt, its states are not those that Transformers computes"
    if problem:
        raise _broken(backbone.spec.name, backbone.spec.model_type, problem)


def _broken(name: str, model_type: str, what: str) -> BackboneError:
    return BackboneError(
        f"backbone.name: deep prompts do not work in {name!r} ({model_type}) under Transformers "
        f"{transformers.__version__}: {what}. Versions {TESTED_VERSIONS[0]} to "
        f"{TESTED_VERSIONS[1]} were tested; install one of them, or take another backbone"
    )


def _tokens(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Return ids `[2, T]` of the same row twice, padded, and the mask of real tokens."""
    config: Any = backbone.model.config
    padding = config.pad_token_id
    # MPNet counts positions by a padding id that its configuration need not name
    words = range(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS + 1)
    ids = [token for token in words if token != padding][:NUM_TOKENS]
    row = torch.tensor(ids + [padding or 0] * NUM_PADDING, device=backbone.device)
    real = torch.arange(len(row), device=backbone.device) < NUM_TOKENS
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
) -> Tensor:
    """Return the states of the real tokens, `[B, T, H]`."""
    encoded = backbone.encode(
        ids,
        mask,
        None,
        shifts=torch.zeros(1, dtype=torch.long, device=backbone.device),
        prompts=PromptBatch.of(layers, mask, backbone.states_dtype, captured),
    )
    return encoded.hidden[:, :NUM_TOKENS]


def _own_states(backbone: Backbone, ids: Tensor, mask: Tensor) -> Tensor:
    """Return what Transformers' own forward gives for one row, `[T, H]`."""
    model: Any = backbone.model
    ours = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        output = model(input_ids=ids, attention_mask=mask.long())
    finally:
        model.config._attn_implementation = ours
    states: Tensor = output.last_hidden_state[0, :NUM_TOKENS]
    return states.float()


def _attention(layer: Captured, prompt: LayerPrompt) -> tuple[Tensor, Tensor]:
    """Return what attention gave the first row, and should have given, `[T, G * N, D]`."""
    assert layer.context is not None, "whatever is captured holds what attention gave"
    query = layer.query[0, :, :NUM_TOKENS].double()  # [G * N, T, D]
    group = len(query) // layer.key.shape[1]
    own_keys, own_values = prompt.keys_and_values()
    keys = torch.cat([own_keys[0], layer.key[0]], dim=1).double()  # [N, S, D]
    values = torch.cat([own_values[0], layer.value[0]], dim=1).double()
    added = torch.zeros(len(query), NUM_TOKENS, keys.shape[1], dtype=torch.float64)
    added = added.to(query.device)
    if layer.bias is not None:
        bias = layer.bias[0].expand(len(query), NUM_TOKENS + NUM_PADDING, -1)
        added[:, :, LENGTH:] = bias[:, :NUM_TOKENS].double()
    heads = []
    for head, asked in enumerate(query):
        scores = asked @ keys[head // group].T * layer.scaling + added[head]  # [T, S]
        shares = (scores - scores.amax(dim=1, keepdim=True)).exp()
        shares = shares / shares.sum(dim=1, keepdim=True)
        heads.append(shares @ values[head // group])
    given = layer.context[0, :NUM_TOKENS].double()
    return given, torch.stack(heads, dim=1)


def _difference(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference by that of what is wanted; no number is no number."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())
