"""A sweep on plain threads, in a workspace with a tiny backbone: the engine without Prefect."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.extra_settings import SweepSettings
from pipelines.settings import load_settings
from pipelines.sweep import training
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.sweeping import Done, Look, Sweep, opened
from pipelines.sweep.training import Order
from tests.stage_parts import call, change_params, make_workspace

SWEEP: dict[str, Any] = {
    "n_trials": 5,
    "workers": 2,
    "finalists": 2,
    "seeds": 2,
    "patience": None,
    "heartbeat_s": 30,
}
Train = Callable[[Order], Any]


def sweep_workspace(root: Path) -> Path:
    """Return a workspace whose task `intents` is prepared and may be swept."""
    make_workspace(root)
    change_params(root, {"search.epochs": 3, "sweep": SWEEP, "run.checkpoint_s": 0})
    assert call("fetch", "-t", "intents", "-C", str(root)) == 0
    assert call("prepare", "-t", "intents", "-C", str(root)) == 0
    return root


@contextmanager
def open_sweep(root: Path, **changes: Any) -> Iterator[Sweep]:
    """Open the sweep of `intents` in the current folder."""
    before = Path.cwd()
    os.chdir(root)
    try:
        settings = load_settings(root / "params.yaml")
        sweep = SweepSettings.model_validate({**settings.sweep.model_dump(), **changes})
        with opened(settings, "intents", sweep) as found:
            try:
                yield found
            finally:
                training.end(found.study.name)
    finally:
        os.chdir(before)


def run_sweep(
    root: Path,
    *,
    train: Train = training.train,
    on_look: Callable[[Look], None] = lambda look: None,
    **changes: Any,
) -> SweepRecord:
    """Sweep `intents` to its end."""
    with open_sweep(root, **changes) as sweep, ThreadPoolExecutor(sweep.sweep.workers) as pool:

        def submit(name: str, order: Order, done: Done) -> None:
            def work() -> None:
                try:
                    train(order)
                finally:
                    done()

            pool.submit(work)

        try:
            return sweep.run(submit, on_look)
        finally:
            training.end(sweep.study.name)


def after(count: int, act: Callable[[Order], None]) -> Train:
    """Return what trains, and acts beside the training when so many have begun."""
    lock, begun = threading.Lock(), [0]

    def train(order: Order) -> Any:
        with lock:
            begun[0] += 1
            is_it = begun[0] == count
        if is_it:
            threading.Thread(target=act, args=(order,), daemon=True).start()
        return training.train(order)

    return train
