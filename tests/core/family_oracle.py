"""An independent reading of deep-prompt attention in every family but BERT's, written out.

Shares no code with the core or with Transformers' forwards: it takes a model's weights and computes
one unpadded row with loops over heads and tokens. The keys and values of a prompt stand before the
layer's own; nothing that depends on places is added to their scores.

Letters: T tokens, P prompt length, H hidden size, M query heads, N key heads, D head size.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Prompts = Sequence[Tensor | None]
# (query position, key position, of query head) -> what is added to the score; None: not seen
Added = Callable[[int, int, int], Tensor | float | None]


def encode_row(model: Any, input_ids: list[int], prompts: Prompts, *, shift: int) -> Tensor:
    """Return the last hidden states `[T, H]` of one row.

    Args:
        model: A Transformers model.
        input_ids: The row.
        prompts: For each layer `[2, N, P, D]`, or None where it has none.
        shift: By how many positions the tokens are moved.
    """
    tokens, places = torch.tensor(input_ids), torch.arange(len(input_ids)) + shift
    return ROWS[model.config.model_type](model, tokens, places, prompts)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: Tensor | None,
    scale: float,
    added: Added | None = None,
) -> Tensor:
    """Return `[T, M * D]` for queries `[T, M, D]`, keys and values `[T, N, D]`."""
    group = query.shape[1] // key.shape[1]
    rows = []
    for token in range(len(query)):
        heads = []
        for head in range(query.shape[1]):
            scores, values = [], []
            of_prompt = range(0 if prompt is None else prompt.shape[2])
            for place in of_prompt:
                assert prompt is not None
                scores.append(query[token, head] @ prompt[0, head // group, place] * scale)
                values.append(prompt[1, head // group, place])
            for place in range(len(key)):
                extra = added(token, place, head) if added else 0.0
                if extra is None:
                    continue
                scores.append(query[token, head] @ key[place, head // group] * scale + extra)
                values.append(value[place, head // group])
            shares = torch.exp(torch.stack(scores) - max(scores).detach())
            heads.append((shares / shares.sum()) @ torch.stack(values))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def causal(window: int | None = None) -> Added:
    """Let a token see itself and those before it, `window` of them with itself."""

    def added(query: int, key: int, _: int) -> float | None:
        return 0.0 if key <= query and (window is None or query - key < window) else None

    return added


def linear(states: Tensor, layer: Any) -> Tensor:
    """Return the product with a layer's weights, and its bias where it has one."""
    product: Tensor = states @ layer.weight.T
    return product if layer.bias is None else product + layer.bias


def conv1d(states: Tensor, layer: Any) -> Tensor:
    """Return the product of GPT-2's layers, whose weights stand the other way."""
    product: Tensor = states @ layer.weight + layer.bias
    return product


def norm(states: Tensor, layer: Any) -> Tensor:
    """Return states of mean 0 and variance 1, scaled and moved."""
    epsilon = getattr(layer, "eps", None) or layer.variance_epsilon
    centred = states - states.mean(dim=-1, keepdim=True)
    size = torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + epsilon)
    scaled: Tensor = centred / size * layer.weight
    return scaled if layer.bias is None else scaled + layer.bias


def rms(states: Tensor, layer: Any) -> Tensor:
    """Return states of mean square 1, scaled."""
    size = torch.sqrt((states**2).mean(dim=-1, keepdim=True) + layer.variance_epsilon)
    scaled: Tensor = states / size * layer.weight
    return scaled


def gelu(states: Tensor) -> Tensor:
    """Return the exact GELU."""
    return 0.5 * states * (1.0 + torch.erf(states / math.sqrt(2.0)))


def gelu_by_tanh(states: Tensor) -> Tensor:
    """Return the GELU as GPT-2 and ALBERT compute it."""
    inner = math.sqrt(2.0 / math.pi) * (states + 0.044715 * states**3)
    return 0.5 * states * (1.0 + torch.tanh(inner))


def silu(states: Tensor) -> Tensor:
    """Return states times their sigmoids."""
    return states / (1.0 + torch.exp(-states))


def split(states: Tensor, heads: int) -> Tensor:
    """Return `[T, heads, D]` for `[T, heads * D]`."""
    return states.reshape(len(states), heads, -1)


def turn(states: Tensor, places: Tensor, base: float, size: int, *, adjacent: bool) -> Tensor:
    """Turn `[T, heads, D]` by their places; the first `size` numbers of each head.

    Args:
        states: To turn.
        places: `[T]`.
        base: Of the frequencies.
        size: How many numbers are turned, two at a time.
        adjacent: Whether neighbours are turned together, or each with the one half a head on.
    """
    half = size // 2
    angles = places[:, None] * base ** (-2.0 * torch.arange(half) / size)  # [T, half]
    turning = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = states[..., :size]
    pairs = (
        turned.reshape(*turned.shape[:-1], half, 2)
        if adjacent
        else turned.reshape(*turned.shape[:-1], 2, half).mT
    )
    after = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turning)
    flat = after.flatten(-2) if adjacent else after.mT.flatten(-2)
    return torch.cat([flat, states[..., size:]], dim=-1)


def _albert(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    config, parts = model.config, model.embeddings
    hidden = (
        parts.word_embeddings.weight[tokens]
        + parts.position_embeddings.weight[places]
        + parts.token_type_embeddings.weight[0]
    )
    hidden = norm(hidden, parts.LayerNorm)
    hidden = linear(hidden, model.encoder.embedding_hidden_mapping_in)
    heads = config.num_attention_heads
    left = list(prompts)
    for index in range(config.num_hidden_layers):
        group = index * config.num_hidden_groups // config.num_hidden_layers
        for layer in model.encoder.albert_layer_groups[group].albert_layers:
            own = layer.attention
            query, key, value = (
                split(linear(hidden, p), heads) for p in (own.query, own.key, own.value)
            )
            context = attend(query, key, value, left.pop(0), query.shape[-1] ** -0.5)
            hidden = norm(linear(context, own.dense) + hidden, own.LayerNorm)
            inner = linear(gelu_by_tanh(linear(hidden, layer.ffn)), layer.ffn_output)
            hidden = norm(inner + hidden, layer.full_layer_layer_norm)
    return hidden


def _distilbert(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    parts, heads = model.embeddings, model.config.n_heads
    hidden = parts.word_embeddings.weight[tokens] + parts.position_embeddings.weight[places]
    hidden = norm(hidden, parts.LayerNorm)
    for layer, prompt in zip(model.transformer.layer, prompts, strict=True):
        own = layer.attention
        query, key, value = (
            split(linear(hidden, p), heads) for p in (own.q_lin, own.k_lin, own.v_lin)
        )
        context = attend(query, key, value, prompt, query.shape[-1] ** -0.5)
        hidden = norm(linear(context, own.out_lin) + hidden, layer.sa_layer_norm)
        inner = linear(gelu(linear(hidden, layer.ffn.lin1)), layer.ffn.lin2)
        hidden = norm(inner + hidden, layer.output_layer_norm)
    return hidden


def _mpnet(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    parts, heads = model.embeddings, model.config.num_attention_heads
    hidden = parts.word_embeddings.weight[tokens] + parts.position_embeddings.weight[places + 2]
    hidden = norm(hidden, parts.LayerNorm)
    table = model.encoder.relative_attention_bias.weight  # [32, heads]

    def added(query: int, key: int, head: int) -> Tensor:
        distance = abs(query - key)
        bucket = distance
        if distance >= 8:
            bucket = min(15, 8 + int(math.log(distance / 8) / math.log(16) * 8))
        found: Tensor = table[bucket + (16 if key > query else 0), head]
        return found

    for layer, prompt in zip(model.encoder.layer, prompts, strict=True):
        own = layer.attention.attn
        query, key, value = (split(linear(hidden, part), heads) for part in (own.q, own.k, own.v))
        context = attend(query, key, value, prompt, query.shape[-1] ** -0.5, added)
        hidden = norm(linear(context, own.o) + hidden, layer.attention.LayerNorm)
        inner = gelu(linear(hidden, layer.intermediate.dense))
        hidden = norm(linear(inner, layer.output.dense) + hidden, layer.output.LayerNorm)
    return hidden


def _modernbert(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    config = model.config
    hidden = norm(model.embeddings.tok_embeddings.weight[tokens], model.embeddings.norm)
    heads = config.num_attention_heads

    def nearby(query: int, key: int, _: int) -> float | None:
        return 0.0 if abs(query - key) <= config.local_attention // 2 else None

    for index, (layer, prompt) in enumerate(zip(model.layers, prompts, strict=True)):
        kind = config.layer_types[index]
        base = config.rope_parameters[kind]["rope_theta"]
        states = hidden if index == 0 else norm(hidden, layer.attn_norm)
        query, key, value = (
            split(part, heads) for part in linear(states, layer.attn.Wqkv).chunk(3, dim=-1)
        )
        size = query.shape[-1]
        query, key = (turn(one, places, base, size, adjacent=False) for one in (query, key))
        is_local = kind == "sliding_attention"
        context = attend(query, key, value, prompt, size**-0.5, nearby if is_local else None)
        hidden = hidden + linear(context, layer.attn.Wo)
        inner, gate = linear(norm(hidden, layer.mlp_norm), layer.mlp.Wi).chunk(2, dim=-1)
        hidden = hidden + linear(gelu(inner) * gate, layer.mlp.Wo)
    return norm(hidden, model.final_norm)


def _deberta(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    config = model.config
    is_first = config.model_type == "deberta"
    hidden = model.embeddings.word_embeddings.weight[tokens]
    if model.embeddings.position_embeddings is not None:
        hidden = hidden + model.embeddings.position_embeddings.weight[places]
    if model.embeddings.token_type_embeddings is not None:
        hidden = hidden + model.embeddings.token_type_embeddings.weight[0]
    hidden = embedded = norm(hidden, model.embeddings.LayerNorm)
    relative = model.encoder.rel_embeddings.weight
    if "layer_norm" in getattr(config, "norm_rel_ebd", "none"):
        relative = norm(relative, model.encoder.LayerNorm)
    middle = len(relative) // 2
    heads = config.num_attention_heads

    def row_of(query: int, key: int) -> int:
        distance = query - key
        buckets, longest = getattr(config, "position_buckets", -1), config.max_relative_positions
        mid = buckets // 2
        if not is_first and buckets > 0 and abs(distance) > mid:
            share = math.log(abs(distance) / mid) / math.log((longest - 1) / mid)
            distance = int(math.copysign(math.ceil(share * (mid - 1)) + mid, distance))
        return min(max(distance + middle, 0), len(relative) - 1)

    for index, (layer, prompt) in enumerate(zip(model.encoder.layer, prompts, strict=True)):
        own = layer.attention.self
        if is_first:
            both = linear(hidden, own.in_proj).reshape(len(hidden), heads, 3, -1)
            query, key, value = both.unbind(2)
            query, value = (
                query + split(own.q_bias[None], heads),
                value + split(own.v_bias[None], heads),
            )
            of_key, of_query = linear(relative, own.pos_proj), linear(relative, own.pos_q_proj)
        else:
            query, key, value = (
                split(linear(hidden, part), heads)
                for part in (own.query_proj, own.key_proj, own.value_proj)
            )
            shares = config.share_att_key
            of_key = linear(relative, own.key_proj if shares else own.pos_key_proj)
            of_query = linear(relative, own.query_proj if shares else own.pos_query_proj)
        of_key, of_query = split(of_key, heads), split(of_query, heads)
        scale = 1.0 / math.sqrt(query.shape[-1] * 3)

        def added(
            at: int,
            to: int,
            head: int,
            of: tuple[Tensor, ...] = (query, key, of_key, of_query),
            scale: float = scale,
        ) -> Tensor:
            asked, answered, places_keys, places_queries = of
            row = row_of(at, to)
            by_place = asked[at, head] @ places_keys[row, head]
            of_place = answered[to, head] @ places_queries[row, head]
            return (by_place + of_place) * scale

        context = attend(query, key, value, prompt, scale, added)
        output = layer.attention.output
        after = norm(linear(context, output.dense) + hidden, output.LayerNorm)
        inner = gelu(linear(after, layer.intermediate.dense))
        hidden = norm(linear(inner, layer.output.dense) + after, layer.output.LayerNorm)
        if index == 0 and getattr(model.encoder, "conv", None) is not None:
            hidden = _convolved(model.encoder.conv, embedded, hidden)
    return hidden


def _convolved(part: Any, embedded: Tensor, hidden: Tensor) -> Tensor:
    weight = part.conv.weight  # [H, H, 3]
    none = torch.zeros_like(embedded[:1])
    around = torch.cat([none, embedded, none])
    rows = [
        sum(around[token + place] @ weight[:, :, place].T for place in range(3)) + part.conv.bias
        for token in range(len(embedded))
    ]
    return norm(hidden + torch.tanh(torch.stack(rows)), part.LayerNorm)


def _gpt2(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    hidden = model.wte.weight[tokens] + model.wpe.weight[places]
    heads = model.config.n_head
    for layer, prompt in zip(model.h, prompts, strict=True):
        states = conv1d(norm(hidden, layer.ln_1), layer.attn.c_attn)
        query, key, value = (split(part, heads) for part in states.chunk(3, dim=-1))
        context = attend(query, key, value, prompt, query.shape[-1] ** -0.5, causal())
        hidden = hidden + conv1d(context, layer.attn.c_proj)
        inner = gelu_by_tanh(conv1d(norm(hidden, layer.ln_2), layer.mlp.c_fc))
        hidden = hidden + conv1d(inner, layer.mlp.c_proj)
    return norm(hidden, model.ln_f)


def _opt(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    decoder, heads = model.decoder, model.config.num_attention_heads
    before = model.config.do_layer_norm_before
    hidden = decoder.embed_tokens.weight[tokens]
    if decoder.project_in is not None:
        hidden = linear(hidden, decoder.project_in)
    hidden = hidden + decoder.embed_positions.weight[places + 2]
    for layer, prompt in zip(decoder.layers, prompts, strict=True):
        own, around = layer.self_attn, layer.self_attn_layer_norm
        states = norm(hidden, around) if before else hidden
        query, key, value = (
            split(linear(states, p), heads) for p in (own.q_proj, own.k_proj, own.v_proj)
        )
        context = attend(query, key, value, prompt, query.shape[-1] ** -0.5, causal())
        hidden = hidden + linear(context, own.out_proj)
        hidden = hidden if before else norm(hidden, around)
        states = norm(hidden, layer.final_layer_norm) if before else hidden
        hidden = hidden + linear(torch.relu(linear(states, layer.fc1)), layer.fc2)
        hidden = hidden if before else norm(hidden, layer.final_layer_norm)
    return norm(hidden, decoder.final_layer_norm) if before else hidden


def _rotary(model: Any, tokens: Tensor, places: Tensor, prompts: Prompts) -> Tensor:
    """Llama and those like it: EuroBERT sees all, Qwen3 norms heads, GLM turns neighbours."""
    config, kind = model.config, model.config.model_type
    hidden = model.embed_tokens.weight[tokens]
    base = config.rope_parameters["rope_theta"]
    is_glm = kind in ("glm", "glm4")
    for index, (layer, prompt) in enumerate(zip(model.layers, prompts, strict=True)):
        own = layer.self_attn
        states = rms(hidden, layer.input_layernorm)
        query = split(linear(states, own.q_proj), config.num_attention_heads)
        key, value = (
            split(linear(states, part), config.num_key_value_heads)
            for part in (own.k_proj, own.v_proj)
        )
        if kind == "qwen3":
            query, key = rms(query, own.q_norm), rms(key, own.k_norm)
        size = query.shape[-1]
        turned = size // 2 if is_glm else size
        query, key = (turn(one, places, base, turned, adjacent=is_glm) for one in (query, key))
        is_local = kind == "qwen3" and config.layer_types[index] == "sliding_attention"
        sees = None if kind == "eurobert" else causal(config.sliding_window if is_local else None)
        context = linear(attend(query, key, value, prompt, size**-0.5, sees), own.o_proj)
        if kind == "glm4":
            context = rms(context, layer.post_self_attn_layernorm)
        hidden = hidden + context
        states = rms(hidden, layer.post_attention_layernorm)
        if is_glm:
            gate, inner = linear(states, layer.mlp.gate_up_proj).chunk(2, dim=-1)
        else:
            gate, inner = linear(states, layer.mlp.gate_proj), linear(states, layer.mlp.up_proj)
        states = linear(silu(gate) * inner, layer.mlp.down_proj)
        if kind == "glm4":
            states = rms(states, layer.post_mlp_layernorm)
        hidden = hidden + states
    return rms(hidden, model.norm)


ROWS: dict[str, Callable[[Any, Tensor, Tensor, Prompts], Tensor]] = {
    "albert": _albert,
    "distilbert": _distilbert,
    "mpnet": _mpnet,
    "modernbert": _modernbert,
    "deberta": _deberta,
    "deberta-v2": _deberta,
    "gpt2": _gpt2,
    "opt": _opt,
    "eurobert": _rotary,
    "llama": _rotary,
    "qwen3": _rotary,
    "glm": _rotary,
    "glm4": _rotary,
}
