"""Prefect: where trials train. Threads of this process, workers of Ray or Dask, or a work pool.

Ray and Dask workers get a pickle of the flow and of the task, so this module imports nothing that
is slow to load, and the flow itself holds nothing that cannot be pickled.
"""

import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import prefect
from prefect import Flow, get_run_logger
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import TagsContext
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.settings import PREFECT_API_URL
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.prefect_session import GPU_TAG, quick_clients
from pipelines.settings import environment_kept, set_environment_defaults
from pipelines.sweep import pool
from pipelines.sweep.supervise import Ended
from pipelines.sweep.training import Order, train
from pipelines.sweep.urls import host_and_port, is_loopback
from pipelines.threads import thread_environment

REACH_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"
OBJECT_STORE_BYTES = 100 * 2**20
"""Ray's shared memory; orders and states are all that goes through it."""
RAY_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What Ray calls a cluster of one machine; else it asks under which address others see this one."""
RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # a trial asks for no GPU, and yet may train on one, as with the other engines
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
PRE_SPAWN = "distributed.nanny.pre-spawn-environ"
BESIDE_PRE_SPAWN = ("PYTHONHASHSEED", "__DASK_PARENT_PID")
TRIAL_TAG = "trial"
QUIET = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
"""Workers write to the terminal of the sweep; the server gets their log all the same."""

_work: ContextVar[Callable[[], State[Any]]] = ContextVar("work")


def run(name: str, sweep: SweepSettings, work: Callable[[], State[Any]]) -> State[Any]:
    """Do work in a flow run whose task runner is the engine; returns the state that it ended in.

    Args:
        name: Of the flow run.
        sweep: Which engine, where it is, and how many trials it trains side by side.
        work: What is done; may `submit`.

    Raises:
        PipelineError: The engine is not installed, or is not where the settings say.
    """
    runner = _runner(sweep)
    token = _work.set(work)
    try:
        flow: Flow[[], Any] = _sweep_task.with_options(flow_run_name=name, task_runner=runner)
        # Dask sets here, too, what its workers are to have; a next sweep, with another number of
        # workers, would take it for the user's choice
        with environment_kept(_set_by_dask(sweep)), _clients(sweep):
            return cast(State[Any], flow(return_state=True))
    except ConnectionError as error:
        raise PipelineError(
            f"sweep.address: expected a cluster that takes this sweep at {sweep.address}: {error}; "
            "with Ray, both sides must have the same RAY_AUTH_MODE and token"
        ) from error
    finally:
        _work.reset(token)


def _clients(sweep: SweepSettings) -> AbstractContextManager[None]:
    server = urlsplit(PREFECT_API_URL.value() or "")
    # workers elsewhere take on the settings of this process, and have not its files
    is_here = sweep.address is None and is_loopback(server.hostname or "")
    return quick_clients() if is_here and server.scheme == "http" else nullcontext()


# Annotations are pickled too, and `State[Any]` is a class that another process may not find.
@prefect.flow(name="ptv2-sweep-task", persist_result=False)
def _sweep_task() -> Any:
    return _working()


def _working() -> State[Any]:
    # a function of its own, since a flow is pickled with the variables it uses
    return _work.get()()


@contextmanager
def submitting(
    sweep: SweepSettings,
) -> Iterator[Callable[[str, Order, Callable[[], None]], None]]:
    """Yield what starts trainings as task runs or flow runs, for use inside of `run`."""
    if sweep.engine == "work_pool":
        with pool.giving(sweep) as give:
            yield give
        return
    # a future that nobody holds is given up by Dask
    held: set[PrefectFuture[Any]] = set()
    card = _Card()
    of_flow = TagsContext.get().current_tags
    limited = _limited({TRIAL_TAG, *of_flow})

    def ended(future: PrefectFuture[Any], done: Callable[[], None]) -> None:
        held.discard(future)
        done()

    def submit(name: str, order: Order, done: Callable[[], None]) -> None:
        tags = set(limited)
        if order.job.device == "cuda" and order.job.shares_forward:
            card.take()
        elif order.job.device == "cuda":
            tags.add(GPU_TAG)
        # without those of the flow, which are among the tags where they are limited
        with _tried_once(sweep), TagsContext(current_tags=set()):
            future = train_trial.with_options(task_run_name=name, tags=tags).submit(order)
        held.add(future)
        future.add_done_callback(partial(ended, done=done))

    try:
        yield submit
    finally:
        card.over.set()


def _limited(tags: Collection[str]) -> set[str]:
    """Return the tags whose runs Prefect limits.

    A task run with tags asks the server for slots before it begins, and where the server's SQLite
    is busy, again after two seconds: tags that nobody limits would cost that for nothing.
    """
    found = set()
    with get_client(sync_client=True) as client:
        for tag in sorted(tags):
            with suppress(ObjectNotFound):
                client.read_concurrency_limit_by_tag(tag)
                found.add(tag)
    return found


class _Card:
    """A slot of the limit on GPUs for the whole of a sweep whose trials share one forward.

    With a slot for each trial, a limit of one would train them one by one.
    """

    def __init__(self) -> None:
        self.over = threading.Event()
        self._is_held = False

    def take(self) -> None:
        """Wait for the slot, once.

        Raises:
            PipelineError: Prefect does not give it.
        """
        if self._is_held:
            return
        begun = threading.Event()
        future = _hold.submit(begun, self.over)
        future.add_done_callback(lambda ended: begun.set())
        begun.wait()
        if future.state.is_final():
            said = future.state.message or future.state.name
            raise PipelineError(f"sweep: Prefect did not give a slot for the tag {GPU_TAG}: {said}")
        self._is_held = True


@prefect.task(
    name="stack",
    task_run_name="stack",
    tags=[GPU_TAG],
    cache_policy=NO_CACHE,
    persist_result=False,
)
def _hold(begun: threading.Event, over: threading.Event) -> None:
    begun.set()
    over.wait()


@prefect.task(name="trial", cache_policy=NO_CACHE, persist_result=False, retries=0)
def train_trial(order: Order) -> Any:
    """Train one trial; how it ended is in the study, and said by the state."""
    try:
        return train_and_log(order)
    except Exception as error:
        # whatever it is, another process may not be able to read it: its words alone travel
        return Failed(message=f"{type(error).__name__}: {error}")


def train_and_log(order: Order) -> State[Any]:
    """Train in a run, whose log has a line an epoch; returns the state that says how it ended.

    Raises:
        PipelineError: As `train`.
    """
    logger = get_run_logger()
    scores: list[float] = []

    def on_score(epoch: int, score: float) -> None:
        scores.append(score)
        logger.info("epoch %d: dev %.4f", epoch, score)

    return state_of(train(order, on_score), max(scores, default=None))


def state_of(ended: Ended, best: float | None) -> State[Any]:
    """Return how a training ended, and its best score on dev, as the state of its run."""
    words = ended.state if best is None else f"{ended.state}, best on dev {best:.4f},"
    words += f" in {ended.seconds:.1f} s"
    if ended.retries:
        words += f", {ended.retries} times begun again"
    if ended.message:
        words += f": {ended.message}"
    if ended.state in ("failed", "crashed"):
        return Failed(name=ended.state.capitalize(), message=words)
    return Completed(name=ended.state.capitalize(), message=words)


@contextmanager
def _tried_once(sweep: SweepSettings) -> Iterator[None]:
    """Have Ray leave a lost trial to the sweep, which counts how often that happens."""
    if sweep.engine != "ray":
        yield
        return
    from prefect_ray.context import remote_options

    with remote_options(max_retries=0):
        yield


def _runner(sweep: SweepSettings) -> TaskRunner[Any]:
    """Return the engine.

    Raises:
        PipelineError: Its package is not installed, or nothing answers at its address.
    """
    if sweep.engine == "work_pool":
        pool.check(sweep)
    if sweep.engine in ("processes", "stack", "work_pool"):
        # one more holds the card of a stack
        return ThreadPoolTaskRunner(max_workers=sweep.workers + 1)
    try:
        runner = _ray(sweep) if sweep.engine == "ray" else _dask(sweep)
    except ImportError as error:
        raise PipelineError(
            f"sweep.engine: {sweep.engine} needs a package that is not installed ({error.name}); "
            f"install it with `pip install 'ptv2[{sweep.engine}]'`"
        ) from error
    if sweep.address is not None:
        _check_reachable(sweep.address)
        _check_prefect(sweep.address)
    return runner


def _ray(sweep: SweepSettings) -> TaskRunner[Any]:
    # set before Ray is imported, which reads them then
    set_environment_defaults({**RAY_DEFAULTS, **({} if sweep.address else RAY_LOOPBACK)})
    from prefect_ray.task_runners import RayTaskRunner

    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if sweep.address is not None:
        return cast(TaskRunner[Any], RayTaskRunner(address=sweep.address, init_kwargs=quiet))
    own = {
        "num_cpus": sweep.workers,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "runtime_env": {"env_vars": _of_workers(sweep)},
    }
    # "local": not a cluster that somebody else started on this machine
    return cast(TaskRunner[Any], RayTaskRunner(address="local", init_kwargs={**own, **quiet}))


def _of_workers(sweep: SweepSettings) -> dict[str, str]:
    """Return the variables of a worker of a cluster that the sweep starts."""
    return {**thread_environment(sweep.workers), **QUIET}


def _set_by_dask(sweep: SweepSettings) -> set[str]:
    """Return the names of what Dask sets in the process that starts a cluster."""
    if sweep.engine != "dask" or sweep.address is not None:
        return set()
    import dask

    return {*dask.config.get(PRE_SPAWN), *BESIDE_PRE_SPAWN}


def _dask(sweep: SweepSettings) -> TaskRunner[Any]:
    import dask
    from prefect_dask.task_runners import DaskTaskRunner

    if sweep.address is not None:
        return cast(TaskRunner[Any], DaskTaskRunner(address=sweep.address))
    own = _of_workers(sweep)
    dask.config.set(
        {
            # a lost trial is left to the sweep, which counts how often that happens
            "distributed.scheduler.allowed-failures": 0,
            # what is set later comes after the imports of the program that sweeps
            PRE_SPAWN: {**dask.config.get(PRE_SPAWN, {}), **own},
        }
    )
    runner = DaskTaskRunner(
        cluster_kwargs={
            "n_workers": sweep.workers,
            "threads_per_worker": 1,
            "processes": True,
            "host": LOOPBACK,
            "dashboard_address": f"{LOOPBACK}:0",
            # the memory of a training is its own process's, which Dask does not see
            "memory_limit": 0,
            "silence_logs": "CRITICAL",
        }
    )
    return cast(TaskRunner[Any], runner)


def _check_prefect(address: str) -> None:
    """Refuse a cluster elsewhere whose workers cannot reach Prefect, and would lose every trial.

    Raises:
        PipelineError: Prefect's server listens on this machine's loopback alone.
    """
    host, _ = host_and_port(address)
    api = PREFECT_API_URL.value() or ""
    if host is None or is_loopback(host) or not is_loopback(urlsplit(api).hostname or ""):
        return
    raise PipelineError(
        f"sweep.address: the cluster at {address} has workers on other machines, or may have, and "
        f"those cannot reach Prefect at {api}; start a server that they can (`prefect server start "
        "--host 0.0.0.0`, in a network you trust), set PREFECT_API_URL to its address, and run "
        "the same command"
    )


def _check_reachable(address: str) -> None:
    """Refuse a cluster that does not listen, which its own library waits for without end.

    Raises:
        PipelineError: Nothing listens.
    """
    host, port = host_and_port(address)
    if host is None or port is None:
        return  # a name that the library resolves, such as `auto`
    try:
        with socket.create_connection((host, port), timeout=REACH_TIMEOUT_S):
            return
    except OSError as error:
        raise PipelineError(
            f"sweep.address: expected a cluster that listens at {address}: {error}; start it, or "
            "set the address to null for one on this machine"
        ) from error
