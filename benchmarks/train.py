"""`python -m benchmarks.train`: how fast a training step is, against its peers and the limit.

All ways train on the same sentences in one process and take turns; a figure is the median of the
rounds. Each way trains on all sentences once before it is measured. Memory is that of a process of
its own for each way.
"""

import argparse
import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoConfig

from benchmarks import limit, ours, peers
from benchmarks.lengths import BATCH_SIZE, MAX_LENGTH, SOURCES, sentences
from benchmarks.machine import describe, set_up
from benchmarks.measure import PROMPT_LENGTH, Round, Setting, choose, in_turn
from benchmarks.memory import measure_memory
from benchmarks.plot import svg
from benchmarks.report import LIMIT, Figures, Table, drawn, ratio_lines
from benchmarks.shapes import NAMES, backbone_folder, bert_tokenizer
from ptv2_core.files import write_json_atomic

BOTH = ("minilm", "bert-base")
# of a table in a file or a pipe
TABLE_WIDTH = 130


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run measures.

    Attributes:
        shapes: Backbones, the one whose ratios are the run's last.
        lengths: Data sets, that one first.
        num_sentences: A round.
        rounds: Of each way.
        memory: Whether to measure it too.
    """

    shapes: Sequence[str]
    lengths: Sequence[str]
    num_sentences: int
    rounds: int
    memory: bool


def main(words: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        words: Its arguments; None takes those of the process.
    """
    given = _parser().parse_args(words)
    shapes = {None: BOTH[:1] if given.quick else BOTH, "both": BOTH}
    plan = Plan(
        shapes=shapes.get(given.shape, (given.shape,)),
        lengths=(given.lengths,) if given.lengths else tuple(SOURCES)[: 1 if given.quick else None],
        num_sentences=given.sentences,
        rounds=given.rounds,
        memory=not given.no_memory,
    )
    set_up(threads=given.threads)
    machine = describe()
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    tables = []
    with tempfile.TemporaryDirectory() as scratch:
        for shape in plan.shapes:
            for lengths in plan.lengths:
                is_first = lengths == plan.lengths[0]
                setting = Setting(
                    folder=backbone_folder(shape, Path(scratch)),
                    sentences=sentences(lengths, plan.num_sentences, bert_tokenizer()),
                )
                # the longest batch, and so the peak, is much the same for every data set
                table = _measure(shape, setting, plan.rounds, memory=plan.memory and is_first)
                console.print(drawn(table, machine))
                tables.append(table)
    headline = next(table for table in reversed(tables) if table.lengths == plan.lengths[0])
    console.print(f"{headline.shape}, {headline.lengths}:")
    for line in ratio_lines(headline.ratios()):
        console.print(f"  {line}")
    if given.json is not None:
        write_json_atomic(given.json, _mapping(plan, machine, tables, headline))
    if given.plot is not None:
        given.plot.write_text(svg(tables, machine), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="MiniLM and RTE only, 3 rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write a picture (SVG)")
    parser.add_argument(
        "--shape",
        choices=(*NAMES, "both"),
        metavar="{minilm,bert-base,both}",
        help="default: both, or minilm with --quick",
    )
    parser.add_argument(
        "--lengths", choices=tuple(SOURCES), help="default: both, or rte with --quick"
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--sentences", type=int, default=64, help="a round; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory out")
    return parser


def _measure(shape: str, setting: Setting, rounds: int, *, memory: bool) -> Table:
    config = AutoConfig.from_pretrained(setting.folder)
    rows = setting.sentences
    buckets = limit.bucket_shapes(rows)
    ways = (*peers.WAYS, *ours.ways())
    chosen: dict[str, tuple[str, Round]] = {way.key: choose(way, setting) for way in ways}
    measures = {key: once for key, (_, once) in chosen.items()}
    times = in_turn({LIMIT: lambda: limit.gemm_rate(config, buckets), **measures}, rounds)
    variants = {key: variant for key, (variant, _) in chosen.items()}
    # let the models go before other processes load theirs
    del measures, chosen
    gc.collect()
    return Table(
        shape=shape,
        lengths=rows.name,
        origin=rows.origin,
        num_tokens=rows.num_tokens,
        flop=limit.step_flop(config, buckets, first_token=True),
        flop_unpadded=limit.step_flop(config, limit.row_shapes(rows), first_token=True),
        gemm_rates=times[LIMIT],
        ways=[
            Figures(
                key=way.key,
                name=way.name,
                variant=variants[way.key],
                rounds=times[way.key],
                memory=measure_memory(setting, way.key, variants[way.key]) if memory else None,
            )
            for way in ways
        ],
    )


def _mapping(
    plan: Plan, machine: dict[str, Any], tables: Sequence[Table], headline: Table
) -> dict[str, Any]:
    return {
        "ratios": headline.ratios(),
        "ratios_of": {"shape": headline.shape, "lengths": headline.lengths},
        "settings": {
            "rounds": plan.rounds,
            "sentences": plan.num_sentences,
            "batch_size": BATCH_SIZE,
            "max_length": MAX_LENGTH,
            "prompt_length": PROMPT_LENGTH,
        },
        "machine": machine,
        "tables": [table.to_mapping() for table in tables],
    }


if __name__ == "__main__":
    main()
