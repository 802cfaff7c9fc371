"""What a table of the benchmark says: figures for each way, the ratios, how both are printed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable

from benchmarks import ours
from benchmarks.memory import Memory

PEERS = ("paper_recipe", "peft_default", "peft_tuned", "peft_autocast", "finetune_tuned")
LIMIT = "limit"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One way of training.

    Attributes:
        key: Its name in the JSON.
        name: Its name in the table.
        variant: The variant that was fastest; empty where there is one only.
        rounds: Seconds of each round.
        memory: Of a process of its own; None where it was not measured.
    """

    key: str
    name: str
    variant: str
    rounds: Sequence[float]
    memory: Memory | None

    @property
    def seconds(self) -> float:
        """Median of the rounds."""
        return statistics.median(self.rounds)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All ways on one backbone and one set of sentences.

    Attributes:
        shape: Of the backbone.
        lengths: Name of the data set.
        origin: Of the sentences, in words.
        num_tokens: Of the sentences, without padding.
        flop: Operations of the matrix products of an all-layer round in length buckets.
        flop_unpadded: The same without any padding.
        gemm_rates: Operations a second of a matrix product, measured in each round.
        ways: In the order of measuring.
    """

    shape: str
    lengths: str
    origin: str
    num_tokens: int
    flop: int
    flop_unpadded: int
    gemm_rates: Sequence[float]
    ways: Sequence[Figures]

    @property
    def limit_seconds(self) -> float:
        """Seconds of a round's matrix products alone."""
        return self.flop / statistics.median(self.gemm_rates)

    def way(self, key: str) -> Figures | None:
        """Return a way by its key; None if it was not measured."""
        return next((way for way in self.ways if way.key == key), None)

    def share_of_limit(self, way: Figures) -> float:
        """Return the limit's time over the way's."""
        return self.limit_seconds / way.seconds

    def ratios(self) -> dict[str, float | None]:
        """Return how many times faster this project is, and its share of the limit."""
        every, cached = self.way(ours.ALL_LAYERS), self.way(ours.TOP_THIRD_CACHED)
        ratios: dict[str, float | None] = {key: self._ratio(key, every) for key in PEERS}
        ratios["top_third_cached"] = self._ratio("paper_recipe", cached)
        ratios["share_of_limit"] = None if every is None else self.share_of_limit(every)
        return ratios

    def _ratio(self, peer: str, own: Figures | None) -> float | None:
        measured = self.way(peer)
        return None if measured is None or own is None else measured.seconds / own.seconds

    def to_mapping(self) -> dict[str, Any]:
        """Return what the JSON holds."""
        return {
            "shape": self.shape,
            "lengths": self.lengths,
            "origin": self.origin,
            "tokens": self.num_tokens,
            "gflop": self.flop / 1e9,
            "gflop_unpadded": self.flop_unpadded / 1e9,
            "gemm_gflop_per_s": [rate / 1e9 for rate in self.gemm_rates],
            "limit_seconds": self.limit_seconds,
            "ratios": self.ratios(),
            "ways": [self._way_mapping(way) for way in self.ways],
        }

    def _way_mapping(self, way: Figures) -> dict[str, Any]:
        return {
            "key": way.key,
            "name": way.name,
            "variant": way.variant,
            "seconds": way.seconds,
            "rounds": list(way.rounds),
            "tokens_per_s": self.num_tokens / way.seconds,
            "share_of_limit": self.share_of_limit(way),
            "peak_bytes": None if way.memory is None else way.memory.peak_bytes,
            "step_bytes": None if way.memory is None else way.memory.step_bytes,
        }


def drawn(table: Table, machine: Mapping[str, Any]) -> RichTable:
    """Return a table for the terminal; its ratios are against the paper's recipe."""
    rich = RichTable(title=f"{table.shape}, {table.origin}", caption=_caption(table, machine))
    rich.add_column("way", overflow="fold")
    figures = ("seconds", "lowest to highest", "tokens/s", "ratio", "of limit")
    for header in (*figures, "peak MB", "step MB"):
        rich.add_column(header, justify="right", no_wrap=True)
    base = table.way(PEERS[0]) or table.ways[0]
    for way in table.ways:
        peak, step = ("", "") if way.memory is None else _megabytes(way.memory)
        rich.add_row(
            f"{way.name} ({way.variant})" if way.variant else way.name,
            f"{way.seconds:.2f}",
            f"{min(way.rounds):.2f} to {max(way.rounds):.2f}",
            f"{table.num_tokens / way.seconds:,.0f}",
            f"{base.seconds / way.seconds:.2f}x",
            f"{table.share_of_limit(way):.0%}",
            peak,
            step,
        )
    rich.add_row(
        "the limit: the all-layer step's matrix products alone",
        f"{table.limit_seconds:.2f}",
        "",
        f"{table.num_tokens / table.limit_seconds:,.0f}",
        f"{base.seconds / table.limit_seconds:.2f}x",
        "100%",
        "",
        "",
    )
    return rich


def _megabytes(memory: Memory) -> tuple[str, str]:
    return f"{memory.peak_bytes / 1e6:,.0f}", f"{memory.step_bytes / 1e6:,.0f}"


def _caption(table: Table, machine: Mapping[str, Any]) -> str:
    rate = statistics.median(table.gemm_rates) / 1e9
    return (
        f"{table.num_tokens:,} tokens a round; "
        f"{machine['cpu']}, {machine['threads']} thread(s), {rate:.0f} GFLOP/s; "
        f"torch {machine['torch']}, transformers {machine['transformers']}, "
        f"peft {machine['peft']}; "
        f"medians of {len(table.ways[0].rounds)} rounds"
    )


def ratio_lines(ratios: Mapping[str, float | None]) -> list[str]:
    """Return the ratios in words, one a line."""
    words = {
        "paper_recipe": "all-layer prompts against the paper's recipe",
        "peft_default": "all-layer prompts against PEFT under the Trainer's defaults",
        "peft_tuned": "all-layer prompts against PEFT tuned",
        "peft_autocast": "all-layer prompts against PEFT tuned, bf16 by autocast",
        "finetune_tuned": "all-layer prompts against full fine-tuning tuned",
        "top_third_cached": "top third of the layers, cached below, against the paper's recipe",
    }
    lines = [
        f"{said}: {'not measured' if ratios[key] is None else f'{ratios[key]:.2f}x'}"
        for key, said in words.items()
    ]
    share = ratios["share_of_limit"]
    return [*lines, f"share of the limit: {'not measured' if share is None else f'{share:.0%}'}"]
