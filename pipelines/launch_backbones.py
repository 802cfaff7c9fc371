"""`ptv2 backbones`: which families of backbones take deep prompts, and what each supports."""

from typing import Any, get_args

from rich.table import Table
from rich.text import Text

from ptv2_core.data.tasks import TaskKind
from ptv2_core.model.backbones.families import FAMILIES, TESTED_VERSIONS, Family

# the position of a row's first token, where a configuration says it
BEHIND_PADDING = "pad_token_id + 1"
HEADERS = ("family", "model types", "verbalizer", "last layer", "length", "head reads", "special")


def rows() -> list[dict[str, Any]]:
    """Return what each family supports, as plain values."""
    return [_row(family) for family in FAMILIES]


def _row(family: Family) -> dict[str, Any]:
    return {
        "name": family.name,
        "model_types": list(family.model_types),
        "kinds": list(get_args(TaskKind)),
        "verbalizer": family.has_verbalizer,
        "depth": True,
        "trunk_cache": True,
        "first_token_last_layer": family.trims_last_layer,
        "max_length": "max_position_embeddings - first_position",
        "first_position": BEHIND_PADDING
        if family.first_position is None
        else family.first_position,
        "position_table": family.has_position_table,
        "reads": family.reads,
        "is_causal": family.is_causal,
        "tested_transformers": list(TESTED_VERSIONS),
        "note": family.note,
    }


def table() -> Table:
    """Return the families as a table; what all have in common is below it."""
    drawn = Table(title="Backbones that take deep prompts", title_justify="left")
    for header in HEADERS:
        drawn.add_column(header, no_wrap=header in ("family", "model types"))
    for row in rows():
        drawn.add_row(*(Text(cell) for cell in _cells(row)), end_section=True)
    return drawn


def sentences() -> list[str]:
    """Return what holds for all families."""
    oldest, newest = TESTED_VERSIONS
    return [
        "all of them: every kind of task, prompts in any of their layers, states of the layers "
        "below cached (trunk), embeddings before the words where those are as wide as the states",
        f"tested with Transformers {oldest} to {newest}; a backbone is checked when it is loaded",
        "length: tokens and prompt positions that a row can have, max_position_embeddings of its "
        "configuration; where positions do not begin at 0 (first_position in --json), less by as "
        "many: 512 of 514 in the published RoBERTa and MPNet",
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"],
        "\n".join(row["model_types"]),
        "yes" if row["verbalizer"] else "no",
        "first token alone" if row["first_token_last_layer"] else "all tokens",
        "table of positions" if row["position_table"] else "no table",
        {"cls": "first token", "last": "last token"}[row["reads"]],
        row["note"],
    )
