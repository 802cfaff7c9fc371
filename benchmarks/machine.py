"""The machine of a run: set up the same in every process, and described in every result."""

import os
import platform
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from ptv2_core.machine import keep_freed_memory

CPU_FILE = Path("/proc/cpuinfo")


def set_up(*, threads: int) -> None:
    """Use so many threads, keep freed memory as an engine does, and keep the libraries quiet."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    # a head that is not in the checkpoint is what we want, not news
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def describe() -> dict[str, Any]:
    """Return what a reader of the figures needs to know."""
    return {
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def _cpu() -> str:
    """Return the processor's own name, where the system tells it."""
    if CPU_FILE.exists():
        for line in CPU_FILE.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
