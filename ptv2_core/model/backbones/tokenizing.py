"""Load a backbone's tokenizer, and see to what rows rely on; loads no torch."""

import json
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.files import read_settings, refuse_code
from ptv2_core.model.backbones.hub import VOCABULARIES
from ptv2_core.model.backbones.locating import Location


def load_tokenizer(location: Location, *, words: bool = False) -> PreTrainedTokenizerBase:
    """Load the backbone's fast tokenizer from its folder.

    Rows are padded and cut on the right, whatever its files say. One that puts nothing between two
    texts puts its own separator there: its sep token, or its end of text, or a new line.

    Args:
        location: Where the backbone is.
        words: Whether rows come as words. A byte-level tokenizer is then told to put a space
            before each, or it would glue them: `to paris` would become `toparis`.

    Raises:
        BackboneError: The folder holds none that is fast, which word alignment needs, or one that
            does not fit the backbone.
    """
    _check_files(location)
    tokenizer = _loaded(location)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    _check_vocabulary(location, tokenizer, vocabulary)
    # rows of a batch are joined on one side, the one that positions and heads count from
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    if words:
        _part_words(tokenizer)
    _part_texts(tokenizer, vocabulary)
    return tokenizer


def _check_files(location: Location) -> None:
    folder = location.folder
    settings = folder / "tokenizer_config.json"
    refuse_code(location.name, settings, read_settings(settings))
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise BackboneError(
            f"backbone.name: {location.name!r} has no usable tokenizer in {folder}: expected "
            f"{VOCABULARIES[0]}, or one of {', '.join(VOCABULARIES[1:])}. Put the files of the "
            "tokenizer that the model was trained with there."
        )


def _loaded(location: Location) -> PreTrainedTokenizerBase:
    way_out = (
        "Save it once with AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER), where "
        "Transformers can convert it (often with the package sentencepiece): that writes a "
        f"{VOCABULARIES[0]}."
    )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location.folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # damaged files raise nothing narrower in tokenizers
        why = str(error).strip().split("\n")[0]
        raise BackboneError(
            f"backbone.name: {location.name!r} has no usable tokenizer in {location.folder}: "
            f"{why} {way_out}"
        ) from error
    if not tokenizer.is_fast:
        raise BackboneError(
            f"backbone.name: the tokenizer of {location.name!r} is not a fast one; expected a "
            f"{VOCABULARIES[0]} in {location.folder}. {way_out}"
        )
    return tokenizer


def _check_vocabulary(
    location: Location, tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]
) -> None:
    added = tokenizer.added_tokens_decoder
    if not any(number not in added for number in vocabulary.values()):
        raise BackboneError(
            f"backbone.name: the tokenizer of {location.name!r} in {location.folder} has no words: "
            f"expected a vocabulary, got {len(vocabulary)} special tokens alone. Its file is "
            "missing, or is one that this architecture does not read."
        )
    size = read_settings(location.folder / "config.json").get("vocab_size")
    # those around the texts need not be in the vocabulary
    highest = max([*vocabulary.values(), *tokenizer("", "")["input_ids"]])
    if isinstance(size, int) and highest >= size:
        raise BackboneError(
            f"backbone.name: the tokenizer of {location.name!r} does not fit its model: expected "
            f"ids below {size}, the model's embeddings (vocab_size in "
            f"{location.folder / 'config.json'}), got up to {highest}. Take the tokenizer that the "
            "model was trained with."
        )


def _part_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Put a space before each word, where the tokenizer puts none and needs one."""
    backend = tokenizer.backend_tokenizer
    stored = _state(backend.pre_tokenizer) or {}
    if stored.get("type") == "ByteLevel":
        backend.pre_tokenizer.add_prefix_space = True
        return
    parts = stored.get("pretokenizers", [stored])
    # not by add_prefix_space: behind another part it puts a space before each piece of a word
    glues = any(
        part.get("add_prefix_space") is False or part.get("prepend_scheme") == "never"
        for part in parts
    )
    if glues:
        own = _state(backend.normalizer)
        parts = [*([own] if own else []), {"type": "Prepend", "prepend": " "}]
        whole = _made(backend, normalizer={"type": "Sequence", "normalizers": parts})
        backend.normalizer = whole.normalizer


def _part_texts(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> None:
    """Put a separator between two texts, where the tokenizer puts nothing there.

    Without one, `art` and `is` would be the row of `artis`.
    """
    special = tokenizer.num_special_tokens_to_add
    if special(pair=True) > special(pair=False):
        return
    named = [token for token in (tokenizer.sep_token, tokenizer.eos_token) if token in vocabulary]
    separator = str(named[0]) if named else "\n"
    ids = [vocabulary[separator]] if named else _new_line(tokenizer)
    if not ids:  # pairs are refused when they are encoded
        return
    backend = tokenizer.backend_tokenizer
    stored = _state(backend.post_processor)
    parts = stored.get("processors", [stored]) if stored else []
    first, second = ({"Sequence": {"id": name, "type_id": at}} for at, name in enumerate("AB"))
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    if template is None:
        template = {"type": "TemplateProcessing", "single": [first], "pair": [first, second]}
        template["special_tokens"] = {}
        parts.append(template)
    at = next(n for n, piece in enumerate(template["pair"]) if _is_first(piece)) + 1
    template["pair"].insert(at, {"SpecialToken": {"id": separator, "type_id": 0}})
    tokens = tokenizer.convert_ids_to_tokens(ids)
    template["special_tokens"][separator] = {"id": separator, "ids": ids, "tokens": tokens}
    whole = _made(backend, post_processor={"type": "Sequence", "processors": parts})
    backend.post_processor = whole.post_processor


def _new_line(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens of a new line; none where the tokenizer does not know it."""
    found: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return [] if tokenizer.unk_token_id in found else found


def _is_first(piece: dict[str, Any]) -> bool:
    return bool(piece.get("Sequence", {}).get("id") == "A")


def _state(part: Any) -> dict[str, Any]:
    """Return a part of a tokenizer as tokenizer.json has it, without writing the vocabulary."""
    found: dict[str, Any] = json.loads(part.__getstate__()) if part is not None else {}
    return found


def _made(backend: Any, **parts: dict[str, Any]) -> Any:
    """Return a tokenizer without words that has some parts, as tokenizer.json would give them."""
    absent = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    whole: dict[str, Any] = {"version": "1.0", "added_tokens": [], **dict.fromkeys(absent), **parts}
    whole["model"] = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    return type(backend).from_str(json.dumps(whole))
