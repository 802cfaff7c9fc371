"""Tiny random backbones of every family but BERT's, with what makes each of them special."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from tests.tiny import WORDS, save_tokenizer

# of all 3 layers, 4 heads of size 8
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 5 + len(WORDS),
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
DISENTANGLED: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "type_vocab_size": 0,
    "position_biased_input": False,
    "max_relative_positions": 64,
}

# name -> model type, and its configuration beside what is common
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("albert", {"embedding_size": 24, "hidden_act": "gelu_new"}),
    "albert-groups": (
        "albert",
        {
            "embedding_size": 24, "hidden_act": "gelu_new", "num_hidden_layers": 2,
            "num_hidden_groups": 2, "inner_group_num": 2,
        },
    ),
    "distilbert": (
        "distilbert",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48},
    ),
    "mpnet": ("mpnet", {"relative_attention_num_buckets": 32}),
    "modernbert": (
        "modernbert",
        {
            "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 2,
            "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3,
        },
    ),
    "eurobert": ("eurobert", GROUPED | {"mask_token_id": 4}),
    "deberta": ("deberta", DISENTANGLED),
    "deberta-v3": (
        "deberta-v2",
        DISENTANGLED
        | {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-v2-xlarge": (
        "deberta-v2",
        DISENTANGLED
        | {"type_vocab_size": 2, "position_biased_input": True, "share_att_key": False,
           "conv_kernel_size": 3, "conv_act": "tanh"},
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 64,
              "bos_token_id": 2, "eos_token_id": 3}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-350m": (
        "opt", {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "llama": ("llama", GROUPED),
    "qwen3": (
        "qwen3",
        GROUPED
        | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    ),
    "glm": ("glm", GROUPED | {"head_dim": 8}),
    "glm4": ("glm4", GROUPED | {"head_dim": 8, "attention_bias": True}),
}  # fmt: skip
DECODERS = ("gpt2", "opt", "opt-350m", "llama", "qwen3", "glm", "glm4")


def tiny_family(folder: Path, case: str) -> Path:
    """Save a random backbone in which no weight is zero or one; returns its folder."""
    model_type, own = CASES[case]
    config = AutoConfig.for_model(model_type, **(COMMON | own))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                elif parameter.std() < 0.1:  # where initializer_range is not asked
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
