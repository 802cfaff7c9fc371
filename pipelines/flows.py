"""Prefect: the stages of DVC's graph as task runs, side by side where they are independent.

Prefect holds no file dependency of its own. A stage starts once its upstream has ended well; a
stage that fails takes down only those that need it. Retries are for held locks and for servers that
cannot be reached, never for a stage that is wrong.
"""

import queue
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import prefect
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed

from pipelines import dag, prefect_session
from pipelines.dvc_output import Stream
from pipelines.errors import StageFailedError, TemporaryError
from pipelines.report import markdown_table
from pipelines.settings import child_environment
from pipelines.threads import thread_environment, threads_by_user

StageState = Literal["ran", "cached", "unchanged", "failed", "skipped"]

RETRY_DELAYS_S = (2.0, 5.0, 15.0, 30.0)
ARTIFACT_KEY = "ptv2-results"
GPU_STAGES = ("search", "train", "evaluate")


@dataclass(frozen=True, kw_only=True)
class StageEvent:
    """Something that happened to a stage while the flow runs.

    Attributes:
        kind: `started`, `line` (its command wrote one) or `finished`.
        address: The stage, as in `train@rte`.
        text: The line; or the state it finished in.
    """

    kind: Literal["started", "line", "finished"]
    address: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class StageOutcome:
    """How a stage ended.

    Attributes:
        address: The stage.
        state: `ran`; `cached`: outs of an earlier run with the same inputs were put back;
            `unchanged`: nothing to do; `failed`; `skipped`: a stage it needs failed.
        seconds: How long it took.
        message: Of a failed stage, what its command said last; of a skipped one, why.
    """

    address: str
    state: StageState
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended.

    Attributes:
        flow_run_id: Prefect's id; none where there was nothing to do and no server to tell.
        name: Prefect's name of the flow run.
        stages: The outcome of each stage, in the order of the graph.
    """

    flow_run_id: str | None
    name: str | None
    stages: tuple[StageOutcome, ...]

    @property
    def failed(self) -> tuple[StageOutcome, ...]:
        """The stages that failed, without those skipped because of them."""
        return tuple(outcome for outcome in self.stages if outcome.state == "failed")


OnEvent = Callable[[StageEvent], None]


@dataclass(kw_only=True)
class _Session:
    """What one run shares between its threads."""

    root: Path
    graph: dag.StageGraph
    stale: set[str]
    on_event: OnEvent
    stop: threading.Event = field(default_factory=threading.Event)
    outcomes: dict[str, StageOutcome] = field(default_factory=dict)
    flow_run_id: str | None = None
    flow_run_name: str | None = None
    interrupted: bool = False

    def ordered(self) -> tuple[StageOutcome, ...]:
        """Return the outcomes in the order of the graph."""
        return tuple(self.outcomes[address] for address in self.graph.nodes)


# How `run` hands its callback to the flow: a flow's parameters must be JSON, for deployments.
_session: ContextVar[_Session | None] = ContextVar("session", default=None)


def run(
    root: Path,
    tasks: Sequence[str],
    *,
    concurrency: int,
    retries: int,
    on_event: OnEvent = lambda event: None,
) -> RunSummary:
    """Bring all stages of some tasks up to date, from a plain Python process.

    Uses the Prefect server that is configured (PREFECT_API_URL or a profile). Without one, a server
    for this run keeps its database in `.ptv2/prefect`; `PREFECT_HOME=.ptv2/prefect prefect server
    start` shows the run later. Where there is neither a server nor anything to do, none is started.

    Args:
        root: The workspace.
        tasks: Their names.
        concurrency: Stages side by side at most.
        retries: Of a stage, after a held lock or an unreachable server only.
        on_event: Called from several threads as stages start, write and finish.

    Raises:
        PipelineError: If the graph cannot be read or Prefect cannot be reached. A stage that fails
            raises nothing; the summary says so.
        KeyboardInterrupt: After SIGINT or SIGTERM, once the stages are ended and their outs back.
    """
    session = _open_session(root.resolve(), tasks, on_event)
    if PREFECT_API_URL.value() is None and not session.stale:
        for address in session.graph.nodes:
            _finish(session, StageOutcome(address=address, state="unchanged"))
        return RunSummary(flow_run_id=None, name=None, stages=session.ordered())
    token = _session.set(session)
    try:
        with prefect_session.session(session.root):
            ptv2_run(str(root), list(tasks), concurrency, retries, return_state=True)
    finally:
        _session.reset(token)
    if session.interrupted:
        raise KeyboardInterrupt
    return RunSummary(
        flow_run_id=session.flow_run_id, name=session.flow_run_name, stages=session.ordered()
    )


def _run_name() -> str:
    """Name a flow run for its tasks; Prefect would make up two words."""
    tasks = flow_run.parameters.get("tasks")
    return f"run of {', '.join(tasks)}" if tasks else "run of all tasks"


@prefect.flow(name="ptv2-run", flow_run_name=_run_name, persist_result=False)
def ptv2_run(
    root: str = ".", tasks: list[str] | None = None, concurrency: int = 2, retries: int = 3
) -> State[Any]:
    """Bring all stages up to date.

    Args:
        root: The workspace: the folder of params.yaml.
        tasks: Names of tasks; none takes all.
        concurrency: Stages side by side at most.
        retries: Of a stage, after a held lock or an unreachable server only.
    """
    session = _session.get() or _open_session(Path(root).resolve(), tasks, lambda event: None)
    session.flow_run_id, session.flow_run_name = flow_run.id, flow_run.name
    try:
        _schedule(session, concurrency, retries)
    except KeyboardInterrupt:
        # Prefect would leave the flow run as running for ever.
        session.interrupted = True
        return Cancelled(message="interrupted; the stages that were running are ended")
    outcomes = session.ordered()
    create_markdown_artifact(
        key=ARTIFACT_KEY, markdown=_markdown(session), description="Results and stages of a run"
    )
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if not failed:
        return Completed(message=_counts(outcomes))
    details = "\n".join(outcome.message for outcome in failed)
    return Failed(message=f"{_counts(outcomes)}\n{details}")


def _open_session(root: Path, tasks: Sequence[str] | None, on_event: OnEvent) -> _Session:
    """Read the graph and find out what there is to do."""
    threads_by_user()  # a number that is wrong is told before anything starts
    graph = dag.read_graph(root)
    chosen = graph if tasks is None else graph.select(tasks)
    dag.clear_dead_locks(root)
    stale = dag.stale(root, chosen, child_environment())
    return _Session(root=root, graph=chosen, stale=stale, on_event=on_event)


def _schedule(session: _Session, concurrency: int, retries: int) -> None:
    """Submit each stage once its upstream has ended, no more than `concurrency` at a time.

    A stage that waited inside Prefect for its upstream would hold a thread and look like running.
    """
    environment = _stage_environment(session, concurrency)
    futures: dict[str, PrefectFuture[Any]] = {}
    waiting = dict(session.graph.nodes)
    running: set[str] = set()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    try:
        while waiting or running:
            for address in _ready(waiting, futures, running, concurrency):
                node = waiting.pop(address)
                upstream = [futures[above] for above in node.upstream]
                futures[address] = _submit(session, node, environment, retries, upstream)
                running.add(address)
                futures[address].add_done_callback(partial(_announce, ended, address))
            address = ended.get()
            running.remove(address)
            if address not in session.outcomes:
                _finish(session, _unrun(session, address, futures[address].state))
    finally:
        # Whatever ends the flow, an interrupt included, ends the stages that are running, and gives
        # them the time to put their outs back.
        session.stop.set()
        while running:
            running.remove(ended.get())


def _ready(
    waiting: Mapping[str, dag.StageNode],
    submitted: Collection[str],
    running: Collection[str],
    concurrency: int,
) -> list[str]:
    """Return the stages to start now: their upstream has ended, and there is room for them."""
    ready = [
        address
        for address, node in waiting.items()
        if all(above in submitted and above not in running for above in node.upstream)
    ]
    return ready[: concurrency - len(running)]


def _announce(ended: "queue.SimpleQueue[str]", address: str, future: PrefectFuture[Any]) -> None:
    ended.put(address)


def _submit(
    session: _Session,
    node: dag.StageNode,
    environment: dict[str, str],
    retries: int,
    upstream: list[PrefectFuture[Any]],
) -> PrefectFuture[Any]:
    """Start one stage as a task run named after it."""
    is_on_gpu = node.stage in GPU_STAGES

    @prefect.task(
        name=node.stage,
        task_run_name=node.address,
        tags=[node.task, node.stage, *([prefect_session.GPU_TAG] if is_on_gpu else [])],
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=retries,
        retry_delay_seconds=list(RETRY_DELAYS_S[:retries]),
        retry_condition_fn=_is_temporary,
    )
    def stage() -> State[Any]:
        return _run_stage(session, node.address, environment)

    return stage.submit(wait_for=upstream, return_state=False)


def _is_temporary(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Tell whether a stage failed for a reason that may pass by itself."""
    return isinstance(state.data, TemporaryError)


def _run_stage(session: _Session, address: str, environment: dict[str, str]) -> State[Any]:
    """Bring one stage up to date; a failure is returned, so that no traceback is logged for it."""
    if address not in session.stale:
        _finish(session, StageOutcome(address=address, state="unchanged"))
        return Completed(name="Unchanged", message="up to date")
    logger = get_run_logger()

    def on_line(stream: Stream, line: str) -> None:
        logger.info(line)
        session.on_event(StageEvent(kind="line", address=address, text=line))

    session.on_event(StageEvent(kind="started", address=address))
    started = time.monotonic()
    try:
        result = dag.repro(address, session.root, environment, on_line=on_line, stop=session.stop)
    except StageFailedError as error:
        seconds = time.monotonic() - started
        _finish(
            session,
            StageOutcome(address=address, state="failed", seconds=seconds, message=str(error)),
        )
        return Failed(message=str(error), data=error)
    state: StageState = "ran" if result.ran else "cached" if result.cached else "unchanged"
    _finish(session, StageOutcome(address=address, state=state, seconds=result.seconds))
    return Completed(name=state.capitalize() if state != "ran" else "Completed")


def _finish(session: _Session, outcome: StageOutcome) -> None:
    session.outcomes[outcome.address] = outcome
    event = StageEvent(kind="finished", address=outcome.address, text=outcome.state)
    session.on_event(event)


def _unrun(session: _Session, address: str, state: State[Any]) -> StageOutcome:
    """Say why a stage's task run ended without running the stage."""
    bad = [
        above
        for above in session.graph.nodes[address].upstream
        if session.outcomes[above].state in ("failed", "skipped")
    ]
    if bad:
        message = f"{address}: skipped, since {', '.join(bad)} did not end well"
        return StageOutcome(address=address, state="skipped", message=message)
    message = f"{address}: Prefect did not run it: {state.message or state.name}"
    return StageOutcome(address=address, state="failed", message=message)


def _stage_environment(session: _Session, concurrency: int) -> dict[str, str]:
    """Return the environment of the stages: their share of the cores, and the run they are of."""
    side_by_side = min(concurrency, len({node.task for node in session.graph.nodes.values()}))
    overrides = {"PTV2_FLOW_RUN_ID": session.flow_run_id or ""}
    url = PREFECT_API_URL.value()
    if url is not None:
        overrides["PREFECT_API_URL"] = url
    return child_environment(overrides, defaults=thread_environment(side_by_side))


def _counts(outcomes: Sequence[StageOutcome]) -> str:
    """Say how many stages ended in which state."""
    states = [outcome.state for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _markdown(session: _Session) -> str:
    """Return the results and what each stage did, as the flow run's artifact shows them."""
    tasks = list(dict.fromkeys(node.task for node in session.graph.nodes.values()))
    rows = [f"| {o.address} | {o.state} | {o.seconds:.1f} |" for o in session.ordered()]
    head = ["| stage | state | seconds |", "|---|---|---|"]
    return "\n".join([markdown_table(session.root, tasks), "", *head, *rows, ""])
