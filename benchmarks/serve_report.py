"""The figures of the serving benchmark as tables."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table

NAMES = {
    "mixed": "ours: 50 tasks mixed in each batch",
    "mixed_int8": "ours in int8",
    "one_task": "ours: all requests of one task",
    "one_at_a_time": "one request at a time, our forward",
    "one_at_a_time_by_task": "  each task's waiting rows together",
    "peft_switch": "PEFT, set_adapter for each request",
    "peft_switch_by_task": "  each task's waiting rows together",
    "copies": "a fine-tuned copy for each task",
    "copies_by_task": "  each task's waiting rows together",
}
OURS = "mixed"


def drawn(figures: Mapping[str, Any]) -> Group:
    """Return what a person reads."""
    tables = [_throughput(figures, table) for table in figures["tables"]]
    return Group(*tables, _rest(figures), *_shortened(figures))


def _throughput(figures: Mapping[str, Any], table: Mapping[str, Any]) -> Table:
    machine, ways = figures["machine"], table["ways"]
    found = Table(
        title=f"{figures['tasks']} tasks, prompts of {table['prompt_length']} positions: requests "
        "a second (p95 in ms), and how many times that ours answers (in int8)",
        caption=f"MiniLM in {table['precision']}; {machine['cpu']}, {machine['threads']} thread(s) "
        f"a way; {figures['clients']} clients, closed loop; the copies take "
        f"{figures['copies_bytes'] / 1e9:.1f} GB",
        title_justify="left",
    )
    found.add_column("way")
    for tokens in ways:
        found.add_column(f"T = {tokens}", justify="right")
        found.add_column("times", justify="right")
    for key, name in NAMES.items():
        cells = []
        for tokens, own in ways.items():
            if key in own:
                cells.append(f"{own[key]['per_s']:,.0f} ({own[key]['p95_ms']:,.0f})")
                cells.append(_times(table["ratios"], key, tokens))
        if cells:
            found.add_row(name, *cells)
    return found


def _times(ratios: Mapping[str, float], key: str, tokens: str) -> str:
    """Say how many times as many requests as one way ours answers."""
    if key == OURS:
        key, ours = "", ""
    elif key == "one_task":
        ours = f"{ratios[f'single_task_t{tokens}']:.2f}x"
    else:
        ours = f"{ratios[f'{key}_t{tokens}']:.2f}x" if f"{key}_t{tokens}" in ratios else ""
    # figures of before int8 was asked have none of it
    name = "_".join(filter(None, ["int8", key, f"t{tokens}"]))
    return f"{ours} ({ratios[name]:.2f}x)".strip() if name in ratios else ours


def _rest(figures: Mapping[str, Any]) -> Table:
    residents, swap, load = figures["residents"], figures["swap"], figures["load"]
    costs = figures["costs"]
    found = Table(title="One process", title_justify="left", show_header=False)
    found.add_column("what")
    found.add_column("figure")
    found.add_row(
        f"{residents['tasks']:,} prompts of {residents['prompt_length']} positions",
        f"{residents['bytes_beyond_backbone'] / 1e6:,.0f} MB beyond the backbone; "
        f"{residents['ratio']:.3f} of the throughput with {residents['few_tasks']}",
    )
    parts = ", ".join(f"{name} {ms:.1f}" for name, ms in swap["parts_ms"].items())
    found.add_row(
        f"{swap['swaps']} hot swaps, from the moved alias seen to the first answer",
        f"median {swap['median_ms']:.1f} ms, p95 {swap['p95_ms']:.1f} ms (of it: {parts})",
    )
    found.add_row(
        f"{load['requests']:,} requests with {load['swaps']} swaps",
        f"{load['wrong']} wrong, {sum(load['lost'].values())} lost; "
        f"{load['requests_per_s']:,.0f} a second, p99 {load['p99_ms']:.0f} ms; "
        f"a swap {load['swap_under_load_ms']:.0f} ms",
    )
    http = figures["http"]
    found.add_row(
        "`ptv2 serve` over HTTP, one engine process",
        f"{http['per_s']:,.0f} requests/s, p95 {http['p95_ms']:.0f} ms; processor time a request: "
        f"{http['server_cpu_s'] * 1e3:.2f} ms beside the engine, {http['engine_cpu_s'] * 1e3:.2f} "
        "ms in it",
    )
    found.add_row(
        "a batch",
        f"{costs['fixed_s'] * 1e3:.2f} ms + {costs['row_s'] * 1e6:.0f} us a row + "
        f"{costs['token_s'] * 1e6:.1f} us a token",
    )
    return found


def _shortened(figures: Mapping[str, Any]) -> list[str]:
    """Say what there was no time for; figures of before the budget have no such list."""
    parts = figures.get("shortened", {})
    if not parts:
        return []
    shares = "; ".join(f"{name}: {share:.0%}" for name, share in parts.items())
    return [f"Shortened, to end within {figures['plan']['seconds'] / 60:g} minutes: {shares}"]
