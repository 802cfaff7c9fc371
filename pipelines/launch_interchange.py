"""`ptv2 export` and `ptv2 import`: prompts to PEFT and from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pipelines.threads import set_up_torch
from ptv2_core.data.tasks import TaskKind
from ptv2_core.interchange.export import export_peft
from ptv2_core.interchange.folder import read_config
from ptv2_core.interchange.importing import import_peft, kind_of, task_of
from ptv2_core.interchange.rows import row_changes
from ptv2_core.model.backbones.locating import locate


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What the command line says of an adapter, which does not say it itself.

    Attributes:
        task: Name of the task.
        kind: Its kind; None: the usual one of the adapter's type.
        labels: In the order of the head's outputs, commas between them.
        has_pairs: Whether its inputs are two texts.
        backbone: None: the one that the adapter names.
        revision: Its commit.
        max_length: Tokens of a row at most; None: what there is room for.
        with_head: Whether the head comes along.
    """

    task: str
    kind: str | None
    labels: str | None
    has_pairs: bool
    backbone: str | None
    revision: str | None
    max_length: int | None
    with_head: bool


def export_to_peft(
    prompt: Path, to: Path, without_head: bool, base: str | None, backbone: str | None
) -> list[str]:
    """Write a prompt as an adapter; return what was done, in words."""
    set_up_torch()
    exported = export_peft(
        prompt, to, backbone_name=backbone, base_model=base, with_head=not without_head
    )
    return [
        f"exported {prompt} to {to}: {exported.task_type}, {exported.size_bytes:,} bytes; its "
        "README.md has the code that loads it",
        *exported.notes,
    ]


def import_from_peft(source: Path, to: Path, wanted: Wanted) -> list[str]:
    """Make a prompt of an adapter; return what was done, in words."""
    set_up_torch()
    kind = wanted.kind or kind_of(read_config(source))
    labels = tuple(label.strip() for label in (wanted.labels or "").split(",") if label.strip())
    manifest = import_peft(
        source,
        to,
        # another word than a kind is refused there
        task=task_of(wanted.task, cast("TaskKind", kind), labels, has_pairs=wanted.has_pairs),
        backbone_name=wanted.backbone,
        revision=wanted.revision,
        max_length=wanted.max_length,
        with_head=wanted.with_head,
    )
    lines = [
        f"imported {source} to {to}: {manifest.task.kind}, {manifest.prompt.length} positions on "
        f"{manifest.backbone['name']}, {manifest.size_bytes:,} bytes"
    ]
    location = locate(manifest.backbone["name"], manifest.backbone["revision"])
    lines += [
        f"{change.what} The tokenizer itself puts nothing there: if this adapter was trained on "
        "its rows, it reads other ones here (docs/interchange.md, Rows)."
        for change in row_changes(manifest, location)
    ]
    if not wanted.with_head:
        lines.append("its head knows nothing yet: set train.init_from to the folder")
    return lines
