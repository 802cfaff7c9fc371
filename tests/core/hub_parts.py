"""Tiny repositories in the shapes that published ones have, on disk and in a hub's cache."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

from tests.core.family_parts import tiny_family

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# of all byte-level tokenizers here: a letter a token
LETTERS = ["<|endoftext|>", "\u0120", "\u010a", *"abcdefghijklmnopqrstuvwxyz-"]
# how Qwen, Llama 3 and GLM-4 part texts: by a pattern, then bytes without one
PATTERN = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\s+|."), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)


def changed(file: Path, **values: Any) -> None:
    """Change some values of a JSON file; None takes one out."""
    stored = json.loads(file.read_text()) if file.is_file() else {}
    stored = {name: value for name, value in (stored | values).items() if value is not None}
    file.write_text(json.dumps(stored))


def in_shards(whole: Path, folder: Path) -> Path:
    """Save a backbone's weights in several files; returns the folder."""
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(whole).save_pretrained(folder, max_shard_size="20KB")
    return folder


def renamed(folder: Path, prefix: str, **extra: Any) -> Path:
    """Put a prefix before all names of a backbone's tensors, and add tensors."""
    file = folder / "model.safetensors"
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | extra, file, {"format": "pt"})
    return folder


def cached(home: Path, folder: Path, *, commit: str = COMMIT, branch: str | None = None) -> Path:
    """Put a repository into a hub's cache as `org/model`; returns the snapshot."""
    repository = home / "models--org--model"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    if branch:
        (repository / "refs").mkdir()
        (repository / "refs" / branch).write_text(commit)
    return snapshot


def lettered(
    folder: Path,
    case: str = "gpt2",
    *,
    pre_tokenizer: Any = BYTES,
    template: tuple[str, str] | None = None,
    **tokens: str,
) -> Path:
    """Save a tiny decoder with a byte-level tokenizer of single letters; returns its folder.

    Args:
        folder: Where.
        case: Of `family_parts`.
        pre_tokenizer: How it parts texts.
        template: Around one text and around two; none: the tokenizer adds nothing.
        tokens: Its named tokens, such as `eos_token`.
    """
    tiny_family(folder, case)
    made = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(LETTERS)}, merges=[]))
    made.pre_tokenizer = pre_tokenizer
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if template:
        named = [("<|endoftext|>", 0)]
        made.post_processor = processors.TemplateProcessing(
            single=template[0], pair=template[1], special_tokens=named
        )
    PreTrainedTokenizerFast(tokenizer_object=made, **tokens).save_pretrained(folder)
    return folder
