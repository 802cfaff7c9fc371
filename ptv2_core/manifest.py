"""`prompt.json`: what a prompt says about itself, checked before anything is made of it.

And its file of weights, as far as that can be checked unloaded: size, shapes, sha256. Loads no
torch.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ptv2_core.bounded import (
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    is_whole,
    parse_json,
    read_bounded,
    read_header,
)
from ptv2_core.config import HeadConfig, Method, PromptConfig
from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import ArtifactError, ConfigError
from ptv2_core.files import sha256_file

SCHEMA_VERSION = 1
WEIGHTS_FILE = "prompt.safetensors"
MANIFEST_FILE = "prompt.json"
FILES = (WEIGHTS_FILE, MANIFEST_FILE)
BACKBONE = "backbone."
"""Names of a fine-tuned backbone's weights begin with it, in the file."""

MAX_PROMPT_BYTES = 2**30
MAX_TUNED_BYTES = 2**35
"""Of a fine-tuned backbone, whose shapes the manifest does not hold."""

MAX_LABELS = 65_536
MAX_GOLDEN = 64

# the largest that any encoder could have, so that a shape made of them can be counted
_MEASURES = {
    "num_layers": 1024,
    "num_heads": 1024,
    "head_size": 4096,
    "hidden_size": 65_536,
}
_MAX_LENGTH = 2**20
_SHA256 = re.compile(r"[0-9a-f]{64}")

_SECTIONS: dict[str, type] = {
    "method": str,
    "task": dict,
    "prompt": dict,
    "head": dict,
    "backbone": dict,
    "tokenizer_digest": str,
    "encoding": dict,
    "decoding": dict,
    "training": dict,
    "provenance": dict,
    "metrics": dict,
    "sha256": str,
    "golden": list,
}

# what an older artifact does not say, since it could only be this
_DEFAULTS: dict[str, Any] = {"method": "ptv2", "decoding": {}}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `prompt.json` says.

    Attributes:
        schema_version: Of the file.
        method: What was trained beside the head.
        task: The task with its labels.
        prompt: The prompt's settings.
        head: The head's settings; `reads` is resolved.
        backbone: Identity and measures of the backbone it was trained on.
        tokenizer_digest: Of the tokenizer it was trained with.
        encoding: `max_length`, for windows their `stride`, and `token_types` false where a second
            text has the type of the first.
        decoding: Settings of an answer that dev chose, such as `null_threshold`.
        training: The settings used, and study and trial where a search chose them.
        provenance: Code, data and versions it came from.
        metrics: Scores on dev.
        sha256: Of `prompt.safetensors`, hexadecimal.
        golden: Inputs with the logits that the trained prompt gives in fp32.
        size_bytes: Of both files.
        raw: The whole of `prompt.json`.
    """

    schema_version: int
    method: Method
    task: TaskSpec
    prompt: PromptConfig
    head: HeadConfig
    backbone: dict[str, Any]
    tokenizer_digest: str
    encoding: dict[str, Any]
    decoding: dict[str, float]
    training: dict[str, Any]
    provenance: dict[str, Any]
    metrics: dict[str, Any]
    sha256: str
    golden: list[dict[str, Any]]
    size_bytes: int
    raw: dict[str, Any]

    def shapes(self) -> dict[str, list[int]]:
        """Return the shapes that the weights must have, those of a tuned backbone left out."""
        backbone, outputs = self.backbone, self.task.num_outputs
        layers = self.prompt.layer_indices(backbone["num_layers"])
        prompts: dict[Method, list[int]] = {
            "ptv2": [
                len(layers), 2, backbone["num_heads"], self.prompt.length, backbone["head_size"],
            ],
            "prompt_tuning": [self.prompt.length, backbone["hidden_size"]],
        }  # fmt: skip
        prompt = {"prompt": prompts[self.method]} if self.method in prompts else {}
        head = {"head.weight": [outputs, backbone["hidden_size"]], "head.bias": [outputs]}
        return {**prompt, **head}


def read_manifest(file: Path, *, weights_bytes: int = 0) -> Manifest:
    """Read and check `prompt.json` alone.

    Args:
        file: The file.
        weights_bytes: Size of the weights beside it.

    Raises:
        ArtifactError: It is of another schema, malformed, or larger than any could be.
    """
    raw = parse_json(read_bounded(file, MAX_JSON_BYTES), file)
    if isinstance(raw, dict):
        raw = {**_DEFAULTS, **raw}
    _check_sections(raw, file)
    _check_bounds(raw, file)
    try:
        task = TaskSpec.from_mapping(raw["task"])
        prompt = PromptConfig.from_mapping(raw["prompt"])
        head = HeadConfig.from_mapping(raw["head"])
        prompt.layer_indices(raw["backbone"]["num_layers"])
    except ConfigError as error:
        raise ArtifactError(f"{file}: {error}") from error
    return Manifest(
        schema_version=SCHEMA_VERSION,
        task=task,
        prompt=prompt,
        head=head,
        **{name: raw[name] for name in _SECTIONS if name not in ("task", "prompt", "head")},
        size_bytes=file.stat().st_size + weights_bytes,
        raw=raw,
    )


def largest_weights(manifest: Manifest) -> int:
    """Return how large `prompt.safetensors` can be, by what its manifest says.

    Raises:
        ArtifactError: Larger than any prompt could be.
    """
    if manifest.method == "finetune":
        return MAX_TUNED_BYTES
    data_bytes = 4 * sum(math.prod(shape) for shape in manifest.shapes().values())
    if data_bytes > MAX_PROMPT_BYTES:
        raise ArtifactError(
            f"{MANIFEST_FILE}: expected weights of at most {MAX_PROMPT_BYTES:,} bytes, got shapes "
            f"of {data_bytes:,}: {manifest.shapes()}"
        )
    return 8 + MAX_HEADER_BYTES + data_bytes


def load_manifest(directory: Path) -> Manifest:
    """Read and check an artifact without loading its weights.

    Args:
        directory: Holds both files.

    Raises:
        ArtifactError: A file is missing, of another schema, malformed, larger than what it holds,
            or the weights are not the ones that the manifest names.
    """
    file, weights = directory / MANIFEST_FILE, directory / WEIGHTS_FILE
    for needed in (file, weights):
        if not needed.is_file():
            raise ArtifactError(
                f"{needed}: not there; a prompt is a folder with {' and '.join(FILES)}"
            )
    manifest = read_manifest(file, weights_bytes=weights.stat().st_size)
    # sizes and shapes first: what cannot be a prompt is not read to its end
    _check_shapes(manifest, weights)
    found = sha256_file(weights)
    if found != manifest.sha256:
        raise ArtifactError(
            f"{weights}: expected sha256 {manifest.sha256}, got {found}; the weights were changed "
            "or damaged. Get the prompt again."
        )
    return manifest


def _check_shapes(manifest: Manifest, weights: Path) -> None:
    """Compare the file's size and the tensors in its header with the manifest."""
    most, size = largest_weights(manifest), weights.stat().st_size
    if size > most:
        raise ArtifactError(f"{weights}: expected at most {most:,} bytes, got {size:,}")
    header = read_header(weights)
    is_tuned = manifest.method == "finetune"
    found = {
        name: shape
        for name, shape in header.shapes.items()
        if not (is_tuned and name.startswith(BACKBONE))
    }
    expected = manifest.shapes()
    if found != expected:
        raise ArtifactError(f"{weights}: expected tensors {expected}, got {_some(found)}")
    if is_tuned and not any(name.startswith(BACKBONE) for name in header.shapes):
        raise ArtifactError(
            f"{weights}: expected the weights of a fine-tuned backbone, got {', '.join(found)}"
        )


def _some(shapes: Mapping[str, list[int]], *, most: int = 500) -> str:
    text = str(dict(shapes))
    return text if len(text) <= most else f"{text[:most]}... ({len(shapes):,} tensors)"


def _check_sections(raw: Any, file: Path) -> None:
    version = raw.get("schema_version") if isinstance(raw, dict) else type(raw).__name__
    if not is_whole(version, SCHEMA_VERSION, SCHEMA_VERSION):
        raise ArtifactError(
            f"{file}: expected schema_version {SCHEMA_VERSION}, got {version!r}; this prompt needs "
            "another version of ptv2"
        )
    for name, kind in _SECTIONS.items():
        if not isinstance(raw.get(name), kind):
            raise ArtifactError(
                f"{file}: {name} must be a {kind.__name__}, got {type(raw.get(name)).__name__}"
            )
    if raw["method"] not in get_args(Method):
        expected = " | ".join(get_args(Method))
        raise ArtifactError(f"{file}: method: expected {expected}, got {raw['method']!r}")
    if not _SHA256.fullmatch(raw["sha256"]):
        raise ArtifactError(
            f"{file}: sha256: expected 64 hexadecimal digits, got {raw['sha256'][:80]!r}"
        )
    absent = [key for key in ("name", "digest", *_MEASURES) if key not in raw["backbone"]]
    if absent:
        raise ArtifactError(f"{file}: backbone lacks {', '.join(absent)}")
    texts = {f"backbone.{key}": raw["backbone"][key] for key in ("name", "digest")}
    texts |= {f"task.{key}": raw["task"].get(key) for key in ("name", "kind", "metric")}
    for key, value in texts.items():
        if not isinstance(value, str) or not value.isprintable():
            raise ArtifactError(f"{file}: {key} must be a line of text, got {value!r}")


def _check_bounds(raw: Mapping[str, Any], file: Path) -> None:
    """Check every number that a size is made of, before anything is made of it."""
    backbone, encoding = raw["backbone"], raw["encoding"]
    bounds = {f"backbone.{key}": (backbone[key], 1, most) for key, most in _MEASURES.items()}
    bounds["encoding.max_length"] = (encoding.get("max_length"), 1, _MAX_LENGTH)
    bounds["encoding.stride"] = (encoding.get("stride", 0), 0, _MAX_LENGTH)
    for key, (value, low, most) in bounds.items():
        if not is_whole(value, low, most):
            raise ArtifactError(
                f"{file}: {key} must be a whole number above {low - 1}, at most {most:,}, got "
                f"{value!r}"
            )
    if not isinstance(encoding.get("token_types", True), bool):
        raise ArtifactError(
            f"{file}: encoding.token_types must be true or false, got {encoding['token_types']!r}"
        )
    layers, most = raw["prompt"].get("layers"), _MEASURES["num_layers"]
    if is_whole(layers, most + 1):
        raise ArtifactError(
            f"{file}: prompt.layers: expected at most {most:,} layers, got {layers:,}"
        )
    counts = {"task.labels": (raw["task"].get("labels"), MAX_LABELS)}
    counts["golden"] = (raw["golden"], MAX_GOLDEN)
    for key, (values, most) in counts.items():
        if isinstance(values, list) and len(values) > most:
            raise ArtifactError(f"{file}: {key}: expected at most {most:,}, got {len(values):,}")
    if not all(isinstance(label, str) for label in raw["task"].get("labels") or ()):
        raise ArtifactError(f"{file}: task.labels must be texts")
    for key, value in raw["decoding"].items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArtifactError(f"{file}: decoding.{key} must be a number, got {value!r}")
    for place, example in enumerate(raw["golden"], start=1):
        if not isinstance(example, dict) or not {"input", "logits"} <= example.keys():
            raise ArtifactError(f"{file}: golden input {place} must have an input and its logits")
        if not isinstance(example["input"], dict) or not _is_table(example["logits"]):
            raise ArtifactError(
                f"{file}: golden input {place} must have a mapping as input, and a list of numbers "
                "or a table of them as logits"
            )


def _is_table(values: Any) -> bool:
    """Tell whether it is a list of numbers, or of equally long lists of them."""
    if not isinstance(values, list):
        return False
    rows = values if values and isinstance(values[0], list) else [values]
    return all(
        isinstance(row, list)
        and len(row) == len(rows[0])
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in row)
        for row in rows
    )
