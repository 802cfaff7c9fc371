"""How many threads a process may use; every command and every stage of a run asks here.

What the workers that run side by side use together is never more than the cores there are, unless
OMP_NUM_THREADS says so; and no process uses more than all cores, whatever it says.
"""

import joblib

from pipelines.settings import read_environment
from ptv2_core.errors import ConfigError


def available_cores() -> int:
    """Return the cores this process may use: CPU affinity and a container's quota count."""
    return int(joblib.cpu_count())


def threads_per_worker(workers: int) -> int:
    """Return the share of the cores of one of so many workers side by side."""
    return max(1, available_cores() // max(1, workers))


def threads_by_user() -> int | None:
    """Return the number that OMP_NUM_THREADS asks for; None where it is not set.

    Raises:
        ConfigError: It is no number of threads.
    """
    written = read_environment().omp_num_threads
    if written is None:
        return None
    # OpenMP takes a list, a number for each level of nesting; the first is that of a plain process
    first = written.partition(",")[0].strip()
    if not (first.isascii() and first.isdecimal() and int(first) > 0):
        raise ConfigError(
            f"OMP_NUM_THREADS: expected a whole number of threads >= 1, got {written!r}; mend it, "
            "or unset it for a share of the cores"
        )
    return int(first)


def chosen_threads(workers: int = 1) -> int:
    """Return the threads of one of so many workers: the user's choice, or its share of the cores.

    Args:
        workers: How many run side by side.

    Raises:
        ConfigError: OMP_NUM_THREADS is no number of threads.
    """
    by_user = threads_by_user()
    if by_user is None:
        return threads_per_worker(workers)
    return min(by_user, available_cores())


def thread_environment(workers: int) -> dict[str, str]:
    """Return the variables that hold a child process to its threads, where the user set none.

    OMP_NUM_THREADS is read by torch, its MKL, NumPy's OpenBLAS and Arrow, RAYON_NUM_THREADS by the
    tokenizers.

    Args:
        workers: How many such processes run side by side.

    Raises:
        ConfigError: OMP_NUM_THREADS is no number of threads.
    """
    threads = str(chosen_threads(workers))
    return {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}


def set_up_torch(workers: int = 1) -> int:
    """Hold torch in this process to its threads, and let it keep what it frees.

    By itself torch takes all cores of the machine, a container's quota notwithstanding.

    Args:
        workers: How many processes like this one run side by side.

    Returns:
        How many threads.

    Raises:
        ConfigError: OMP_NUM_THREADS is no number of threads.
    """
    import torch

    from ptv2_core.machine import keep_freed_memory

    keep_freed_memory()
    threads = chosen_threads(workers)
    torch.set_num_threads(threads)
    return threads
