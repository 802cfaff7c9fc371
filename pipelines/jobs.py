"""Jobs side by side, each in a fresh process: its memory is its own, and its end ends nobody else.

Ctrl-C reaches the process that started them alone, which ends them.
"""

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from pipelines.errors import PipelineError
from pipelines.stages.lanes import deaf_to_interrupts
from ptv2_core.errors import PTv2Error, TrainingError

Submit = Callable[..., Future[Any]]


class _Processes:
    """Starts processes, until all of them are to end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[SpawnProcess] = set()
        self._is_over = False

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function in a process, and return what it returns.

        Raises:
            PTv2Error: As the function.
            PipelineError: The process ended by itself, or all are to end.
        """
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, function, arguments), daemon=True)
        with self._lock:
            if self._is_over:
                raise PipelineError("given up")
            with deaf_to_interrupts():
                process.start()
            self._live.add(process)
        theirs.close()
        try:
            result = ours.recv()
        except EOFError:
            process.join()
            raise PipelineError(
                f"its process ended with exit code {process.exitcode} (-9 is most often too little "
                "memory: run fewer side by side, or lower train.token_budget); what ended before "
                "is kept, and the same command goes on"
            ) from None
        finally:
            process.join()
            with self._lock:
                self._live.discard(process)
            ours.close()
        if isinstance(result, PTv2Error):
            raise result
        return result

    def end(self) -> None:
        """End all processes, and start no more."""
        with self._lock:
            self._is_over = True
            for process in self._live:
                process.terminate()


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
    except TrainingError as error:
        result = TrainingError(str(error))
    except PTv2Error as error:
        result = PipelineError(str(error))
    pipe.send(result)


@contextmanager
def side_by_side(workers: int) -> Iterator[Submit]:
    """Yield what submits a function of plain values, to be run in a process of its own.

    Args:
        workers: How many run at once.
    """
    processes = _Processes()
    threads = ThreadPoolExecutor(workers)

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return threads.submit(processes.run, function, *arguments)

    try:
        yield submit
    finally:
        # after an end in peace nothing is left to end
        processes.end()
        threads.shutdown(cancel_futures=True)
