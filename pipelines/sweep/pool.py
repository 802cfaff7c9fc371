"""Prefect: trials as flow runs of a deployment, trained by the workers of its work pool."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import cast
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Crashed

from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.sweep import beats
from pipelines.sweep.orders import packed
from pipelines.sweep.training import Order, study_of
from pipelines.sweep.trials import SweepStudy

DEPLOYMENT = "ptv2-trial/trial"
REFUSED = "Refused"
"""Name of the state in which a flow run ends that no worker like this one can train."""
TAGS = ("ptv2", "trial")
LOOK_S = 1.0
SLEPT_S = 10.0
"""More than this between two looks is this process's own sleep, and nobody's silence."""
START_S = 300.0
"""From a worker's yes to the first sign of life: a cold disk takes its time."""
COMING_S = 30.0
"""For a worker that is started together with the sweep."""
NO_WORKER_S = 300.0
"""How long a sweep waits while no worker is there: one that is restarted takes a minute or two."""
UNTAKEN_S = 900.0
"""How long it waits for workers that are there and take nothing."""
AWAY_S = 300.0
PAGE = 200
ADVICE = "in the workspace: prefect worker start --pool {pool} --type process"

Submit = Callable[[str, Order, Callable[[], None]], None]


@dataclass(kw_only=True)
class _Given:
    """A training that is a flow run, and when it was last heard of."""

    number: int
    place: int
    token: str
    heartbeat_s: float
    done: Callable[[], None]
    run: UUID
    seen: str = ""
    quiet_s: float = 0.0


def check(sweep: SweepSettings) -> None:
    """Refuse a server without the deployment, and a pool without a worker.

    Raises:
        PipelineError: With what to start.
    """
    name = sweep.address or DEPLOYMENT
    with get_client(sync_client=True) as client:
        pool = _pool_of(client, name)
        deadline = time.monotonic() + COMING_S
        while not _online(client, pool):
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"sweep.engine: work_pool needs a worker, and none of the pool {pool} is "
                    f"online; start one {ADVICE.format(pool=pool)}"
                )
            time.sleep(LOOK_S)


def _pool_of(client: SyncPrefectClient, name: str) -> str:
    try:
        found = client.read_deployment_by_name(name).work_pool_name
    except ValueError as error:
        raise PipelineError(
            f"sweep.address: expected null or a deployment as FLOW/NAME, got {name}"
        ) from error
    except ObjectNotFound as error:
        raise PipelineError(
            f"sweep.engine: work_pool needs the deployment {name}, which is not at "
            f"{PREFECT_API_URL.value()}; set PREFECT_API_URL to the server of your workers, and "
            "run `prefect --no-prompt deploy --all` in the workspace"
        ) from error
    if found is None:
        raise PipelineError(f"sweep.address: the deployment {name} has no work pool; deploy it")
    return found


def _online(client: SyncPrefectClient, pool: str) -> int:
    workers = client.read_workers_for_work_pool(pool)
    return sum(one.status == WorkerStatus.ONLINE for one in workers)


@contextmanager
def giving(sweep: SweepSettings) -> Iterator[Submit]:
    """Yield what gives trainings to the workers; those left at the end are cancelled."""
    pool = _Pool(sweep.address or DEPLOYMENT)
    # settings of Prefect that are in force here are so in the thread too
    watch = threading.Thread(
        target=contextvars.copy_context().run, args=(pool.watch,), name="pool", daemon=True
    )
    watch.start()
    try:
        yield pool.submit
    finally:
        pool.over.set()
        watch.join()
        pool.cancel()


class _Pool:
    """The flow runs of one sweep that have not ended."""

    def __init__(self, deployment: str) -> None:
        self.over = threading.Event()
        self._deployment = deployment
        self._lock = threading.Lock()
        self._given: dict[str, _Given] = {}
        self._study: SweepStudy | None = None
        self._problem = ""
        self._untaken_s = 0.0
        self._away_s = 0.0

    def submit(self, name: str, order: Order, done: Callable[[], None]) -> None:
        """Start a training.

        Raises:
            PipelineError: Prefect does not take it.
        """
        if self._study is None:
            study = study_of(order)
            beats.take_all(study)
            self._study = study
        with self._lock:
            taken = {one.place for one in self._given.values()}
        place = next(one for one in range(len(taken) + 1) if one not in taken)
        token = uuid4().hex
        beats.give(self._study, place, token)
        try:
            run = cast(
                FlowRun,
                run_deployment(
                    self._deployment,
                    parameters={"order": packed(order), "place": place, "token": token},
                    flow_run_name=name,
                    tags=TAGS,
                    timeout=0,
                    idempotency_key=token,
                ),
            )
        except (httpx.HTTPError, ObjectNotFound) as error:
            raise PipelineError(
                f"Prefect did not take {name}: {error}; no finished trial is lost: mend it, and "
                "the same command goes on"
            ) from error
        given = _Given(
            number=order.number,
            place=place,
            token=token,
            heartbeat_s=order.job.heartbeat_s,
            done=done,
            run=run.id,
        )
        with self._lock:
            self._given[token] = given
        if self._problem:
            self._stop(given)  # nobody looks after it

    def watch(self) -> None:
        """Look after flow runs until the sweep is over."""
        try:
            with get_client(sync_client=True) as client:
                self._watch(client)
        except Exception as error:
            # whatever it is: with this thread gone, the sweep would wait without end
            self._give_up(str(error) or type(error).__name__)

    def _watch(self, client: SyncPrefectClient) -> None:
        before = time.monotonic()
        while not self.over.wait(LOOK_S):
            now = time.monotonic()
            passed, before = min(now - before, SLEPT_S), now
            with self._lock:
                given = list(self._given.values())
            try:
                self._look(client, given, passed)
                self._away_s = 0.0
            except httpx.HTTPError as error:
                self._away_s += passed
                if self._away_s > AWAY_S:
                    raise PipelineError(f"Prefect's server does not answer: {error}") from error

    def _look(self, client: SyncPrefectClient, given: list[_Given], passed: float) -> None:
        if not given or self._study is None:
            return
        runs = _read(client, given)
        heard = beats.last(self._study)
        waiting = 0
        for one in given:
            run = runs.get(one.run)
            state = None if run is None else run.state
            if state is None or state.is_final():
                if state is not None and state.name == REFUSED:
                    self._study.set_stop(one.number, f"a worker refused it: {state.message}")
                self._ended(one)
            elif state.is_scheduled():
                waiting += 1
            elif self._is_silent(one, f"{state.id} {heard.get(one.place, '')}", passed):
                words = f"silent for {one.quiet_s:.0f} s"
                client.set_flow_run_state(one.run, Crashed(message=words), force=True)
                self._ended(one)
        self._untaken_s = self._untaken_s + passed if waiting == len(given) else 0.0
        if self._untaken_s > NO_WORKER_S and (why := self._why_untaken(client)):
            raise PipelineError(why)

    def _is_silent(self, one: _Given, seen: str, passed: float) -> bool:
        if seen != one.seen:
            one.seen, one.quiet_s = seen, 0.0
            return False
        one.quiet_s += passed
        return one.quiet_s > (one.heartbeat_s if f" {one.token}:" in seen else START_S)

    def _why_untaken(self, client: SyncPrefectClient) -> str:
        """Return why nobody takes anything; empty while it is worth waiting."""
        pool = _pool_of(client, self._deployment)
        online = _online(client, pool)
        if not online:
            return (
                f"no worker of the pool {pool} is online, for {self._untaken_s:.0f} s now; start "
                f"one {ADVICE.format(pool=pool)}"
            )
        if self._untaken_s < UNTAKEN_S:
            return ""
        return (
            f"no worker of the pool {pool} took it in {self._untaken_s:.0f} s, though {online} "
            "are online: the pool is paused, or its limits or those of its workers are used up; a "
            "sweep that a worker runs takes a place beside its trials"
        )

    def _give_up(self, problem: str) -> None:
        self._problem = problem
        with self._lock:
            given = list(self._given.values())
        for one in given:
            self._stop(one)

    def _stop(self, one: _Given) -> None:
        """Have the sweep end, without a word against the trial."""
        if self._study is not None:
            # where the study is gone, the sweep has seen that itself
            with suppress(PipelineError):
                self._study.set_stop(one.number, self._problem)
        one.done()

    def _ended(self, one: _Given) -> None:
        with self._lock:
            del self._given[one.token]
        one.done()

    def cancel(self) -> None:
        """End what is left, by Prefect's word and by the study's."""
        given = list(self._given.values())
        if not given or self._study is None:
            return
        with get_client(sync_client=True) as client, suppress(httpx.HTTPError):
            for one in given:
                # one that somebody deleted leaves the others to be cancelled
                with suppress(ObjectNotFound):
                    client.set_flow_run_state(one.run, Cancelling(message="the sweep ended"))
        with suppress(PipelineError):
            beats.take_all(self._study)
        deadline = time.monotonic() + max(beats.every_s(one.heartbeat_s) for one in given) + 5.0
        with get_client(sync_client=True) as client, suppress(httpx.HTTPError):
            # the proxy of a SQLite study ends with the sweep, and then nobody can ask
            while time.monotonic() < deadline and not all(
                run.state is None or run.state.is_final() for run in _read(client, given).values()
            ):
                time.sleep(LOOK_S / 2)


def _read(client: SyncPrefectClient, given: list[_Given]) -> dict[UUID, FlowRun]:
    found = {}
    for first in range(0, len(given), PAGE):
        wanted = [one.run for one in given[first : first + PAGE]]
        only = FlowRunFilter.model_validate({"id": {"any_": wanted}})
        runs = client.read_flow_runs(flow_run_filter=only, limit=PAGE)
        found.update({run.id: run for run in runs})
    return found
