"""Prefect: a sweep as a flow run, and each of its trials as a task run on the engine chosen."""

from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import prefect
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from pipelines import dag, prefect_session
from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.settings import Settings, child_environment, load_settings
from pipelines.study_report import markdown
from pipelines.sweep import finishing
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.sweeping import Done, OnLook, Sweep, opened, overlaid
from pipelines.sweep.training import Order, end, train
from ptv2_core.errors import PTv2Error

ARTIFACT_KEY = "ptv2-sweep"
NEEDED_STAGES = ("fetch", "prepare")


@dataclass(kw_only=True)
class _Session:
    """What `run` shares with the flow: a flow's own parameters must be JSON, for deployments."""

    on_look: OnLook
    records: list[SweepRecord]
    raised: BaseException | None = None


_session: ContextVar[_Session | None] = ContextVar("session", default=None)


def run(
    settings: Settings,
    tasks: list[str],
    *,
    trials: int | None,
    workers: int | None,
    on_look: OnLook,
) -> list[SweepRecord]:
    """Sweep tasks from a plain Python process, one after another.

    Uses the Prefect server that is configured, or one for this run, as `ptv2 run` does.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks.
        trials: In place of `sweep.n_trials`.
        workers: In place of `sweep.workers`.
        on_look: Called now and then with how a sweep stands.

    Returns:
        What each sweep found.

    Raises:
        PTv2Error: A sweep cannot go on; what ended before is kept.
        KeyboardInterrupt: After SIGINT or SIGTERM, once the trainings are ended.
    """
    session = _Session(on_look=on_look, records=[])
    token = _session.set(session)
    try:
        with prefect_session.session(settings.root):
            state = ptv2_sweep(str(settings.root), tasks, trials, workers, return_state=True)
    finally:
        _session.reset(token)
    if session.raised is not None:
        raise session.raised
    if state.is_failed():
        state.result()  # raises what else went wrong: Prefect has it, and nobody else
    return session.records


def _run_name() -> str:
    tasks = flow_run.parameters.get("tasks")
    return f"sweep of {', '.join(tasks)}" if tasks else "sweep of all tasks"


@prefect.flow(name="ptv2-sweep", flow_run_name=_run_name, persist_result=False)
def ptv2_sweep(
    root: str = ".",
    tasks: list[str] | None = None,
    trials: int | None = None,
    workers: int | None = None,
) -> State[Any]:
    """Search settings for tasks, one task after another.

    Args:
        root: The workspace: the folder of params.yaml.
        tasks: Names of tasks; none takes all.
        trials: Of each study; none takes `sweep.n_trials`.
        workers: Trials side by side; none takes `sweep.workers`.
    """
    session = _session.get() or _Session(on_look=lambda look: None, records=[])
    try:
        settings = load_settings(Path(root).resolve() / "params.yaml")
        chosen = [settings.task(name).name for name in tasks] if tasks else list(settings.tasks)
        sweep = overlaid(settings.sweep, {"n_trials": trials, "workers": workers})
        dag.bring_up_to_date(settings.root, chosen, NEEDED_STAGES, child_environment())
        for task in chosen:
            session.records.append(_sweep_task(settings, task, sweep, session.on_look))
    except KeyboardInterrupt as interrupt:
        session.raised = interrupt
        return Cancelled(message="interrupted; no finished trial is lost")
    except PTv2Error as error:
        session.raised = error
        return Failed(message=str(error))
    words = [
        f"{one.task}: {one.metric} {one.finalists[0].mean:.4f} by trial {one.winner.number}"
        for one in session.records
    ]
    return Completed(message="; ".join(words))


def _sweep_task(
    settings: Settings, task: str, sweep: SweepSettings, on_look: OnLook
) -> SweepRecord:
    """Sweep one task in a flow run of its own, whose task runner is the engine."""
    raised: list[BaseException] = []
    found: list[SweepRecord] = []

    @prefect.flow(
        name="ptv2-sweep-task",
        flow_run_name=f"sweep of {task}",
        persist_result=False,
        task_runner=_runner(sweep, settings.root),
    )
    def sweep_task() -> State[Any]:
        with opened(settings, task, sweep) as opened_sweep:
            try:
                record = opened_sweep.run(_submitting(opened_sweep), on_look)
            except (KeyboardInterrupt, PTv2Error) as error:
                raised.append(error)
                if isinstance(error, KeyboardInterrupt):
                    return Cancelled(message="interrupted; no finished trial is lost")
                return Failed(message=str(error))
            finally:
                end(opened_sweep.study.name)
        record = replace(record, flow_run=flow_run.name or "")
        finishing.finish(settings, record)
        key = f"{ARTIFACT_KEY}-{task.replace('_', '-')}"
        create_markdown_artifact(
            key=key, markdown=markdown(record), description=f"Trials and winner of {task}"
        )
        found.append(record)
        return Completed(message=f"winner: trial {record.winner.number}")

    state = sweep_task(return_state=True)
    if raised:
        raise raised[0]
    if not found:
        state.result()
        raise PipelineError(f"sweep: Prefect did not run it: {state.message or state.name}")
    return found[0]


def _submitting(sweep: Sweep) -> Any:
    """Return what starts trainings as task runs."""

    def submit(name: str, order: Order, done: Done) -> None:
        future = train_trial.with_options(task_run_name=name).submit(order)
        future.add_done_callback(lambda _: done())

    return submit


@prefect.task(name="trial", tags=["trial"], cache_policy=NO_CACHE, persist_result=False, retries=0)
def train_trial(order: Order) -> State[Any]:
    """Train one trial; how it ended is in the study, and said by the state."""
    ended = train(order)
    words = f"{ended.state} in {ended.seconds:.1f} s"
    if ended.retries:
        words += f", {ended.retries} times begun again"
    if ended.message:
        words += f": {ended.message}"
    if ended.state in ("failed", "crashed"):
        return Failed(name=ended.state.capitalize(), message=words)
    return Completed(name=ended.state.capitalize(), message=words)


def _runner(sweep: SweepSettings, root: Path) -> TaskRunner[Any]:
    """Return the engine.

    Raises:
        PipelineError: Its package is not installed.
    """
    if sweep.engine == "processes":
        return ThreadPoolTaskRunner(max_workers=sweep.workers)
    try:
        if sweep.engine == "ray":
            from prefect_ray import RayTaskRunner

            own = {"num_cpus": sweep.workers, "include_dashboard": False}
            return RayTaskRunner(address=sweep.address, init_kwargs={} if sweep.address else own)
        from prefect_dask import DaskTaskRunner

        if sweep.address:
            return DaskTaskRunner(address=sweep.address)
        return DaskTaskRunner(
            cluster_kwargs={
                "n_workers": sweep.workers,
                "threads_per_worker": 1,
                "dashboard_address": None,
            }
        )
    except ImportError as error:
        raise PipelineError(
            f"sweep.engine: {sweep.engine} needs a package that is not installed ({error.name}); "
            f"install it with `pip install 'ptv2[{sweep.engine}]'`"
        ) from error
