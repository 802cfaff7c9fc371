"""What a batch costs: seconds as a fixed part, a part a row and a part a token, fitted.

What the fit is made from is the forward alone, in this process: batches of 1 to 64 rows of 16, 32
and 64 tokens, each row another task's. What an engine process does beside it, and the process that
speaks HTTP, is in the throughput that is measured around them.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.serve_parts import Prompts, names
from benchmarks.serve_rates import make_rows
from ptv2_serving.engine.forward import Forward, Row

SHAPES = (
    (1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (32, 16), (64, 16),
    (1, 32), (4, 32), (8, 32), (16, 32), (32, 32),
    (1, 64), (2, 64), (4, 64), (8, 64), (16, 64),
)  # fmt: skip
TASKS = 50


def fitted(prompts: Prompts, scratch: Path, *, threads: int, rounds: int) -> dict[str, Any]:
    """Time batches of several shapes and fit what they cost.

    Args:
        prompts: Makes them.
        scratch: Where their files go.
        threads: Of the forward.
        rounds: Of all shapes.
    """
    torch.set_num_threads(threads)
    forward = Forward(prompts.choice().load())
    loads = []
    for slot, name in enumerate(names(TASKS)):
        folder = prompts.save(scratch / name, name, seed=slot, golden=0)
        began = time.perf_counter()
        num_bytes = forward.put(slot, folder)
        loads.append(time.perf_counter() - began)
    seconds: dict[tuple[int, int], list[float]] = {shape: [] for shape in SHAPES}
    ids = {
        tokens: make_rows(prompts, tokens=tokens, count=64, tasks=TASKS).ids
        for tokens in sorted({tokens for _, tokens in SHAPES})
    }
    for round_number in range(rounds + 1):
        for (count, tokens), own in seconds.items():
            rows = [
                Row(place % TASKS, one.astype(np.int32), None, -1)
                for place, one in enumerate(ids[tokens][:count])
            ]
            began = time.perf_counter()
            forward.run(rows)
            if round_number:
                own.append(time.perf_counter() - began)
    medians = {shape: statistics.median(own) for shape, own in seconds.items()}
    fixed, a_row, a_token = fit(medians)
    return {
        "threads": threads,
        "prompt_length": prompts.config.prompt.length,
        "fixed_s": fixed,
        "row_s": a_row,
        "token_s": a_token,
        "prompt_load_s": statistics.median(loads),
        "prompt_bytes": num_bytes,
        "batches": [
            {"rows": rows, "tokens": tokens, "seconds": own}
            for (rows, tokens), own in medians.items()
        ],
    }


def fit(seconds: dict[tuple[int, int], float]) -> tuple[float, float, float]:
    """Return the fixed part, the part a row and the part a token, none below zero.

    Each shape's error counts relative to its time, so that small batches count as much as large.

    Args:
        seconds: Of a batch, by rows and tokens of each.
    """
    shapes = np.array([[1.0, rows, rows * tokens] for rows, tokens in seconds])
    times = np.array(list(seconds.values()))
    kept = [0, 1, 2]
    while True:
        weighted = shapes[:, kept] / times[:, None]
        found = np.linalg.lstsq(weighted, np.ones(len(times)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept.pop(int(found.argmin()))
    parts = dict(zip(kept, found.tolist(), strict=True))
    return parts.get(0, 0.0), parts.get(1, 0.0), parts.get(2, 0.0)
