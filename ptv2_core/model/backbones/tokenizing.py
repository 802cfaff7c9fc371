"""Load a backbone's tokenizer, and see to what rows rely on; loads no torch."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.files import read_settings, refuse_code
from ptv2_core.model.backbones.hub import VOCABULARIES
from ptv2_core.model.backbones.locating import Location


@dataclass(frozen=True, kw_only=True)
class Change:
    """What was changed in a tokenizer, because rows are other ones here than it would make.

    Attributes:
        what: A sentence about rows.
        imports: Lines of Python that `code` needs.
        code: Lines that do the same to a `tokenizer` of Transformers.
        is_of_pairs: Whether rows of two texts alone show it.
    """

    what: str
    imports: tuple[str, ...]
    code: tuple[str, ...]
    is_of_pairs: bool


def load_tokenizer(location: Location, *, words: bool = False) -> PreTrainedTokenizerBase:
    """Load the backbone's tokenizer; arguments and errors as for `open_tokenizer`."""
    return open_tokenizer(location, words=words)[0]


def open_tokenizer(
    location: Location, *, words: bool = False
) -> tuple[PreTrainedTokenizerBase, tuple[Change, ...]]:
    """Load the backbone's fast tokenizer from its folder, and say what was changed in it.

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
    changes = [
        _part_words(tokenizer) if words else None,
        _part_texts(tokenizer, vocabulary),
    ]
    return tokenizer, tuple(change for change in changes if change is not None)


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


def _part_words(tokenizer: PreTrainedTokenizerBase) -> Change | None:
    """Put a space before each word, where the tokenizer puts none and needs one."""
    backend = tokenizer.backend_tokenizer
    stored = _state(backend.pre_tokenizer) or {}
    if stored.get("type") == "ByteLevel":
        if stored.get("add_prefix_space"):
            return None
        backend.pre_tokenizer.add_prefix_space = True
        return _spaces("tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True")
    parts = stored.get("pretokenizers", [stored])
    # not by add_prefix_space: behind another part it puts a space before each piece of a word
    glues = any(
        part.get("add_prefix_space") is False or part.get("prepend_scheme") == "never"
        for part in parts
    )
    if not glues:
        return None
    own = _state(backend.normalizer)
    parts = [*([own] if own else []), {"type": "Prepend", "prepend": " "}]
    whole = _made(backend, normalizer={"type": "Sequence", "normalizers": parts})
    backend.normalizer = whole.normalizer
    before = "tokenizer.backend_tokenizer.normalizer, " if own else ""
    return _spaces(
        "tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(",
        f'    [{before}normalizers.Prepend(" ")]',
        ")",
        imports=("from tokenizers import normalizers",),
    )


def _spaces(*code: str, imports: tuple[str, ...] = ()) -> Change:
    return Change(
        what="Before each word of tokenizer(words, is_split_into_words=True) stands a space.",
        imports=imports,
        code=code,
        is_of_pairs=False,
    )


def _part_texts(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> Change | None:
    """Put a separator between two texts, where the tokenizer puts nothing there.

    Without one, `art` and `is` would be the row of `artis`.
    """
    special = tokenizer.num_special_tokens_to_add
    if special(pair=True) > special(pair=False):
        return None
    named = [token for token in (tokenizer.sep_token, tokenizer.eos_token) if token in vocabulary]
    separator = str(named[0]) if named else "\n"
    ids = [vocabulary[separator]] if named else _new_line(tokenizer)
    if not ids:  # pairs are refused when they are encoded
        return None
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
    numbers = ", ".join(map(str, ids))
    return Change(
        what=f"Between two texts stands {separator!r} (token {numbers}).",
        imports=("from tokenizers import processors",),
        code=_template_code(template),
        is_of_pairs=True,
    )


def _template_code(template: dict[str, Any]) -> tuple[str, ...]:
    """Return code that gives a tokenizer a template of rows; of ids, nothing else decides."""
    special = template["special_tokens"]
    # by their ids: a name may hold what means something in a template
    names = {name: "token_" + "_".join(map(str, one["ids"])) for name, one in special.items()}
    lines = []
    for key in ("single", "pair"):
        pieces = []
        for piece in template[key]:
            ((kind, one),) = piece.items()
            name = f"${one['id']}" if kind == "Sequence" else names[one["id"]]
            pieces.append(f"{name}:{one['type_id']}")
        lines.append(f"    {key}={pieces},")
    tokens = [one | {"id": names[name]} for name, one in special.items()]
    return (
        "tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(",
        *lines,
        f"    special_tokens={tokens},",
        ")",
    )


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
