"""Get a repository's files from a hub, at one commit; loads no torch."""

import re
from pathlib import Path

from transformers.utils.hub import (  # type: ignore[attr-defined]
    cached_file,
    is_offline_mode,
    try_to_load_from_cache,
)

from ptv2_core.errors import BackboneError
from ptv2_core.model.backbones.files import WEIGHTS, WEIGHTS_INDEX, weight_files

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
    "spm.model",
    "tokenizer.model",
)
# what a repository may have beside its weights and its vocabulary
OTHERS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "1_Pooling/config.json",
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT = re.compile(r"[0-9a-fA-F]{7,40}")


def fetch(name: str, revision: str | None) -> Path:
    """Return the folder of a repository's files at a commit; gets those that are not there yet.

    Args:
        name: `organisation/model`.
        revision: The commit.

    Raises:
        BackboneError: It is no commit, or the files cannot be had.
    """
    if revision is None or not _COMMIT.fullmatch(revision):
        raise _unpinned(name, revision)
    if is_offline_mode():
        return _cached(name, revision)
    try:
        config = cached_file(name, "config.json", revision=revision)
        if config is None:  # of this file alone, a missing one is no error of Transformers
            raise BackboneError(
                f"backbone.name: {name!r} at {revision} has no config.json on the hub; expected "
                f"config.json, {WEIGHTS} (or its shards) and tokenizer files. Check the name and "
                "the commit, or name a repository that save_pretrained() wrote."
            )
        folder = Path(config).parent
        if _optional(name, WEIGHTS, revision) is None:
            cached_file(name, WEIGHTS_INDEX, revision=revision)
        for file in weight_files(folder):
            cached_file(name, file.name, revision=revision)
        if _optional(name, VOCABULARIES[0], revision) is None:
            for vocabulary in VOCABULARIES[1:]:
                _optional(name, vocabulary, revision)
        for file_name in OTHERS:
            _optional(name, file_name, revision)
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"backbone.name: {name!r} at {revision} could not be had from the hub: {error}. Check "
            "the name, the commit and the network. Where all of it is on this machine already, set "
            "HF_HUB_OFFLINE=1; or name a local folder. A repository that has its weights in other "
            "formats alone is not loaded: pin the commit of its safetensors conversion (a pull "
            "request there, refs/pr/N), or convert it on a machine that you trust with "
            "save_pretrained()."
        ) from error
    return folder


def _optional(name: str, file: str, revision: str) -> str | None:
    found: str | None = cached_file(
        name, file, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return found


def _cached(name: str, revision: str) -> Path:
    """Return the folder in the cache, without asking a hub."""
    config = try_to_load_from_cache(name, "config.json", revision=revision)
    way_out = (
        f"Get it where there is a network (`hf download {name} --revision {revision}`), unset "
        "HF_HUB_OFFLINE, or name a local folder."
    )
    start = f"backbone.name: {name!r} at {revision} could not be had from the hub: HF_HUB_OFFLINE"
    if not isinstance(config, str):
        raise BackboneError(
            f"{start} is set, and this machine's cache has no config.json of it. {way_out}"
        )
    folder = Path(config).parent
    missing = [file.name for file in weight_files(folder) if not file.is_file()]
    if not missing and not any((folder / file).is_file() for file in VOCABULARIES):
        missing = [f"tokenizer ({VOCABULARIES[0]})"]
    if missing:
        raise BackboneError(
            f"{start} is set, and only a part of it is in this machine's cache, {folder}: "
            f"config.json is there, {missing[0]} is not. {way_out}"
        )
    return folder


def _unpinned(name: str, revision: str | None) -> BackboneError:
    expected = (
        f"backbone.name: {name!r} is no folder here (looked for {Path(name).absolute()}), so "
        "it is taken for a hub name, and backbone.revision must be pinned to a commit of 40 "
        f"hexadecimal digits, got {revision!r}"
    )
    copy = (
        "Mend the folder's name (from another folder: --backbone), or copy the commit from the "
        "model's page on the hub (its history of commits)."
    )
    if revision and _SHORT.fullmatch(revision):
        return BackboneError(f"{expected}: all 40, in small letters. {copy}")
    # a branch or a tag; the cache knows at which commit it last was
    found = try_to_load_from_cache(name, "config.json", revision=revision or "main")
    commit = Path(found).parent.name if isinstance(found, str) else ""
    if _COMMIT.fullmatch(commit):
        return BackboneError(
            f"{expected}; in this machine's cache {revision or 'main'!r} is "
            f"{commit}, which would be `backbone.revision: {commit}`. {copy}"
        )
    return BackboneError(f"{expected}. {copy}")
