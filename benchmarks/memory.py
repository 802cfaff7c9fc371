"""The peak memory of a way of training, measured in a process of its own.

The process loads the backbone and trains on the sentences once. `peak_bytes` is the most memory it
had resident during those steps: weights, gradients, optimizer, activations, and the libraries,
which are the same for every way. `step_bytes` is what the steps added to what was resident before
them. Loading's own peak is left out where the system can forget it (Linux); elsewhere it counts.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import ours, peers
from benchmarks.lengths import sentences
from benchmarks.machine import set_up
from benchmarks.measure import Setting
from benchmarks.shapes import bert_tokenizer
from ptv2_core.machine import peak_memory_bytes

STATUS = Path("/proc/self/status")
FORGET_PEAK = Path("/proc/self/clear_refs")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of a process that trains.

    Attributes:
        peak_bytes: Resident at most during the steps.
        step_bytes: Of them, what the steps added.
    """

    peak_bytes: int
    step_bytes: int


def measure_memory(setting: Setting, way: str, variant: str) -> Memory:
    """Train on the sentences once in a new process and return its memory.

    Args:
        setting: Backbone and sentences.
        way: Key of the way.
        variant: Of the way.
    """
    words = [sys.executable, "-m", "benchmarks.memory"]
    words += [str(setting.folder), setting.sentences.name, str(len(setting.sentences.rows))]
    words += [way, variant, str(torch.get_num_threads())]
    done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _resident() -> int:
    """Return what is resident now; elsewhere than on Linux, what was at most."""
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes()


def _forget_peak() -> None:
    if FORGET_PEAK.exists():
        FORGET_PEAK.write_text("5", encoding="ascii")


def main() -> None:
    """Measure the way that the arguments name and print the result as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("folder", type=Path)
    parser.add_argument("lengths")
    parser.add_argument("count", type=int)
    parser.add_argument("way")
    parser.add_argument("variant")
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    set_up(threads=given.threads)
    rows = sentences(given.lengths, given.count, bert_tokenizer())
    way = next(way for way in (*peers.WAYS, *ours.ways()) if way.key == given.way)
    once = way.variants[given.variant](Setting(folder=given.folder, sentences=rows))
    _forget_peak()
    before = _resident()
    once()
    peak = peak_memory_bytes()
    print(json.dumps({"peak_bytes": peak, "step_bytes": peak - before}))


if __name__ == "__main__":
    main()
