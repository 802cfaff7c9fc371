"""A thousand prompts resident: what they take, and whether they slow anything down."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serve_parts import Prompts, memory_of, names
from benchmarks.serve_rates import Served, make_rows
from ptv2_serving.engine.engine import EngineConfig

FEW = 10


@dataclass(frozen=True, kw_only=True)
class Residents:
    """Many prompts in one process.

    Attributes:
        prompt_length: P of each.
        tasks: How many.
        before_bytes: What the process has in memory with a few of them.
        num_bytes: What the process has in memory beyond the backbone.
        weights_bytes: What their numbers take.
        few_per_s: Requests a second when a few of them are asked, a round each.
        all_per_s: Likewise when all are.
    """

    prompt_length: int
    tasks: int
    before_bytes: int
    num_bytes: int
    weights_bytes: int
    few_per_s: Sequence[float]
    all_per_s: Sequence[float]

    @property
    def ratio(self) -> float:
        """Throughput with all asked over that with a few, the median of the rounds' ratios."""
        pairs = zip(self.all_per_s, self.few_per_s, strict=True)
        return statistics.median(many / few for many, few in pairs)

    def to_mapping(self) -> dict[str, Any]:
        """Return the figures as the JSON has them."""
        return {
            "prompt_length": self.prompt_length,
            "tasks": self.tasks,
            "before_bytes": self.before_bytes,
            "bytes_beyond_backbone": self.num_bytes,
            "weights_bytes": self.weights_bytes,
            "few_tasks": FEW,
            "few_per_s": list(self.few_per_s),
            "all_per_s": list(self.all_per_s),
            "ratio": self.ratio,
        }


def measure(
    prompts: Prompts,
    scratch: Path,
    *,
    tasks: int,
    tokens: int,
    requests: int,
    clients: int,
    rounds: int,
    threads: int,
) -> Residents:
    """Load prompts, weigh them, and ask few and all of them in turn.

    Args:
        prompts: Makes them.
        scratch: Where their files go.
        tasks: How many.
        tokens: Of each request.
        requests: A round.
        clients: That ask side by side.
        rounds: After one to warm up.
        threads: Of the engine.
    """
    served = Served(prompts.choice(), EngineConfig(threads=threads))
    try:
        rows = make_rows(prompts, tokens=tokens, count=requests, tasks=tasks)
        few = replace(rows, slots=(np.array(rows.slots) % FEW).tolist())
        listed = names(tasks)
        folders = [
            prompts.save(scratch / name, name, seed=place, golden=0)
            for place, name in enumerate(listed)
        ]
        # buffers of the batches are there before, and no part of what prompts take
        served.put(folders[:FEW])
        served.ask(few, clients)
        before = memory_of(served.pid).pss
        served.put(folders[FEW:])
        served.ask(rows, clients)
        rest = memory_of(served.pid).pss - before
        rates: dict[str, list[float]] = {"few": [], "all": []}
        for _ in range(rounds):
            for name, asked in (("few", few), ("all", rows)):
                rates[name].append(requests / served.ask(asked, clients)[0])
        sizes = served.engine.sizes.values()
        return Residents(
            prompt_length=prompts.config.prompt.length,
            tasks=tasks,
            before_bytes=before,
            num_bytes=rest * tasks // (tasks - FEW),
            weights_bytes=sum(sizes),
            few_per_s=rates["few"],
            all_per_s=rates["all"],
        )
    finally:
        served.close()
