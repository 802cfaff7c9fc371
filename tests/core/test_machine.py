"""The measured rate, against multiplications whose time a clock of the test decides."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional

from ptv2_core import machine
from ptv2_core.machine import measure_gemm_rate, peak_memory_bytes

CPU = torch.device("cpu")
FLOP = 2 * 8 * 4 * 16


class Clock:
    """Stands still but for the multiplications, each of which takes the next of some times."""

    def __init__(self, times: list[float]) -> None:
        self.now = 100.0
        self.calls = 0
        self._times: Iterator[float] = iter(times)

    def perf_counter(self) -> float:
        return self.now

    def linear(self, states: torch.Tensor, weight: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        assert (states.shape, weight.shape) == ((8, 4), (16, 4))
        assert (states.dtype, weight.dtype) == (torch.bfloat16, torch.bfloat16)
        self.calls += 1
        self.now += next(self._times)


def measured(clock: Clock, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> float:
    monkeypatch.setattr(machine.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(functional, "linear", clock.linear)
    return measure_gemm_rate(torch.bfloat16, CPU, rows=8, inner=4, outer=16, seconds=seconds)


def test_machine_rate_is_that_of_the_best_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([64.0, 2.0, 4.0, 0.5, 1.0, 2.0])
    assert measured(clock, monkeypatch, seconds=7.0) == FLOP / 0.5
    assert clock.calls == 6


def test_machine_rate_leaves_out_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([0.25, 2.0])
    assert measured(clock, monkeypatch, seconds=0.0) == FLOP / 2.0
    assert clock.calls == 2


def test_machine_times_short_multiplications_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MIN_TIMED_S", 1.0)
    clock = Clock([1.0, 0.25, *[0.0625, 0.1875] * 4])
    assert measured(clock, monkeypatch, seconds=1.0) == FLOP / 0.125
    assert clock.calls == 2 + 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_machine_rate_leaves_the_random_numbers_alone(dtype: torch.dtype) -> None:
    before = torch.get_rng_state()
    assert measure_gemm_rate(dtype, CPU, rows=8, inner=4, outer=16, seconds=0.0) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_machine_peak_memory_is_this_processes_own() -> None:
    ballast = bytearray(b"x") * (700 << 20)
    assert peak_memory_bytes() > 700 << 20
    code = "from ptv2_core.machine import peak_memory_bytes; print(peak_memory_bytes())"
    # started by a process that has held more than it ever will
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    del ballast
    assert 0 < int(child.stdout) < 700 << 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
@pytest.mark.parametrize("keeps", [False, True])
def test_machine_memory_that_was_freed_is_used_again(keeps: bool) -> None:
    code = f"""
import resource, torch
from ptv2_core.machine import keep_freed_memory
if {keeps}:
    keep_freed_memory()
def faults():
    for _ in range(10):
        tensors = [torch.ones(5 << 20) for _ in range(3)]  # of 20 MB
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
warm = faults()
print(faults() - warm)
"""
    # by itself malloc learns from what is freed; told so, it gives every tensor back at once
    told = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    child = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, check=True, env={**os.environ, **told}
    )
    # 30 tensors, of ten pages each where the system's pages are large
    assert (int(child.stdout) < 30) == keeps
