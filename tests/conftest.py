"""Shared by all tests: no network, no telemetry, plain output; skips for what cannot run here."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports the libraries that read these at import. A caller's own value wins.
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "HF_HUB_OFFLINE": "1",
    # A worker a core: more threads would only be in each other's way.
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "TOKENIZERS_PARALLELISM": "false",
    # Typer writes for a terminal on some CI services, and tests read what it writes.
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
}.items():
    os.environ.setdefault(_name, _value)


def bench_data_directory() -> Path:
    """Return where the benchmark data sets are expected; the folder may not exist."""
    return Path(os.environ.get("PTV2_BENCH_DATA") or ROOT.parent / "shared" / "data")


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-xdist hand files out in the order that the next function gives them."""
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first; skip `gpu` and `bench_data` where there is neither."""
    # else a worker may begin with a minute-long file when the others have nothing left to do
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        _skip(gpu, "needs a CUDA device")
    bench = [item for item in items if item.get_closest_marker("bench_data")]
    if bench and not bench_data_directory().is_dir():
        _skip(bench, f"no benchmark data in {bench_data_directory()}; set PTV2_BENCH_DATA")


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """Return the folder of the benchmark data sets; for tests marked `bench_data`."""
    return bench_data_directory()


def _has_cuda() -> bool:
    import torch  # only when a test asks: loading it takes seconds

    return torch.cuda.is_available()


def _skip(items: list[pytest.Item], reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))
