"""What this machine can do and has done: the speed of its products, the memory of this process."""

import ctypes
import math
import resource
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

MIN_TIMED_S = 0.01
"""Multiplications are timed together until they take this long; one alone may be too short."""

# mallopt's options by glibc's malloc.h, and what it gets: 32 MB is the most it takes for the first
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 256 << 20
M_MMAP_THRESHOLD, HEAP_BYTES = -3, 32 << 20


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MB that it frees, for its next tensors; glibc's malloc alone.

    A forward makes and frees tensors of megabytes. By itself malloc hands them back to the system
    again and again, and each page of the next one is then a fault and a page of zeros. Children
    that are forked have it too.
    """
    if not sys.platform.startswith("linux"):
        return
    # musl has no such function
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, HEAP_BYTES)


def measure_gemm_rate(
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: int = 2048,
    inner: int = 768,
    outer: int = 3072,
    seconds: float = 0.5,
) -> float:
    """Return the rate of a linear layer in FLOP/s, with as many threads as torch has now.

    The sizes are those of the widest layer of a base-sized encoder. The best of all repetitions
    counts, which is what the machine can do when nothing else disturbs it.

    Args:
        dtype: Number format of both factors.
        device: Where to multiply.
        rows: Rows of the states `[rows, inner]`: the tokens of a batch.
        inner: Width that is summed over.
        outer: Rows of the weight `[outer, inner]`.
        seconds: How long to measure, after one multiplication to warm up; one repetition at least.
    """
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay his
    states = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
    weight = torch.randn(outer, inner, generator=generator, device=device).to(dtype)

    def timed(calls: int) -> float:
        """Return seconds per call."""
        started = time.perf_counter()
        with torch.no_grad():
            for _ in range(calls):
                functional.linear(states, weight)
        _synchronize(device)
        return (time.perf_counter() - started) / calls

    _synchronize(device)
    timed(1)
    best = timed(1)
    calls = math.ceil(MIN_TIMED_S / best)
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends:
        best = min(best, timed(calls))
    return 2 * rows * inner * outer / best


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has done it at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Linux hands the parent's peak on to a child in ru_maxrss, but not in its status
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """Return the most that tensors have taken on a CUDA card so far; none for other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
