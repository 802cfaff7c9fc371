"""The figures of a sweep's cost as text."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

NAMES = {
    "grid": "grid, every cell to the end",
    "tpe": "TPE, nothing pruned",
    "engine": "our engine, the grid's recipe and ranges",
    "ours": "ptv2 sweep",
}
TARGETS = {"best": "grid's best", "half_point_below": "0.5 below", "tpe_best": "TPE's best"}


def drawn(figures: Mapping[str, Any]) -> Group:
    """Return tables of epochs for each task, and of the overhead.

    Args:
        figures: As the JSON has them.
    """
    tables = [_epochs(task) for task in figures["tasks"]]
    return Group(*tables, _overhead(figures))


def _epochs(task: Mapping[str, Any]) -> Table:
    plan, targets = task["plan"], task["targets"]
    cells = len(plan["rates"]) * len(plan["lengths"])
    luck = (
        ""
        if task["is_learned"]
        else "; the grid's best may be luck, so it counts in no ratio of the JSON"
    )
    table = Table(
        title=f"{plan['task']}: epochs until a dev score; {cells} cells or {plan['n_trials']} "
        f"trials of {plan['epochs']} epochs, {len(plan['seeds'])} seed(s) of the sampler",
        caption=f"grid's best: {100 * targets['best'][0]:.1f}; x: epochs against ptv2 sweep's; "
        f">: the way never got there, so all its epochs count{luck}",
    )
    table.add_column("way")
    for name in TARGETS.values():
        table.add_column(name, justify="right")
        table.add_column("x", justify="right")
    table.add_column("all it trained", justify="right")
    table.add_column("best dev", justify="right")
    for way, found in task["ways"].items():
        # the grid has no sampler: the same for each of its seeds
        searches = found[:1] if way == "grid" else found
        row = []
        for target in TARGETS:
            row.append(_joined([one["epochs_until"][target] for one in searches]))
            ratio = task["ratios"][target].get(way)
            row.append("" if ratio is None else _times(ratio))
        scores = ", ".join(f"{100 * one['best']:.1f}" for one in searches)
        row += [_joined([one["epochs"] for one in searches]), scores]
        table.add_row(NAMES[way], *row)
    return table


def _joined(counts: list[int | None]) -> str:
    return ", ".join("never" if count is None else str(count) for count in counts)


def _times(ratio: Mapping[str, Any]) -> str:
    if ratio["value"] is None:
        return "-"
    return f"{'>' if ratio['is_bound'] else ''}{ratio['value']:.1f}"


def _overhead(figures: Mapping[str, Any]) -> Table:
    machine = figures["machine"]
    table = Table(
        title="tiny trials under a Prefect server",
        caption=f"{machine['cpu']}, {machine['cores']} cores; without each worker's first trial",
    )
    for header in ("engine", "workers", "trials", "trials / min", "training, ms", "overhead, ms"):
        table.add_column(header, justify="right")
    for one in figures["overheads"]:
        table.add_row(
            one["engine"],
            str(one["workers"]),
            str(one["trials"]),
            f"{one['trials_per_minute']:.0f}",
            f"{one['training_ms']:.0f}",
            f"{one['overhead_ms']:.0f}",
        )
    return table
