"""Prefect: a sweep as a flow run, and the sweep of each task as one within it."""

from contextlib import chdir
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import prefect
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Failed

from pipelines import dag, prefect_session
from pipelines.errors import PipelineError
from pipelines.extra_settings import SweepSettings
from pipelines.settings import Settings, child_environment, load_settings
from pipelines.study_report import markdown
from pipelines.sweep import engines, finishing
from pipelines.sweep.looks import OnLook
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.sweeping import opened, overlaid
from pipelines.sweep.training import end
from ptv2_core.errors import PTv2Error

ARTIFACT_KEY = "ptv2-sweep"
NEEDED_STAGES = ("fetch", "prepare")


@dataclass(kw_only=True)
class _Session:
    """What `run` shares with the flow: a flow's own parameters must be JSON, for deployments."""

    on_look: OnLook
    records: list[SweepRecord] = field(default_factory=list)
    failed: list[PTv2Error] = field(default_factory=list)
    raised: BaseException | None = None


_session: ContextVar[_Session | None] = ContextVar("session", default=None)


def run(
    settings: Settings,
    tasks: list[str],
    *,
    trials: int | None,
    workers: int | None,
    on_look: OnLook,
) -> tuple[list[SweepRecord], PTv2Error | None]:
    """Sweep tasks from a plain Python process, one after another; what ails one stops no other.

    Uses the Prefect server that is configured, or one for this run, as `ptv2 run` does.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks.
        trials: In place of `sweep.n_trials`.
        workers: In place of `sweep.workers`.
        on_look: Called now and then with how a sweep stands.

    Returns:
        What each sweep found, and what went wrong with tasks that are not among them, or None.

    Raises:
        PTv2Error: No sweep can begin, or Prefect's server is gone; what ended before is kept.
        KeyboardInterrupt: After SIGINT or SIGTERM, once the trainings are ended.
    """
    session = _Session(on_look=on_look)
    token = _session.set(session)
    try:
        with prefect_session.session(settings.root):
            _run_flow(session, str(settings.root), tasks, trials, workers)
    finally:
        _session.reset(token)
    if session.raised is not None:
        raise session.raised
    return session.records, _all_of(session.failed)


def _run_flow(session: _Session, *given: Any) -> None:
    """Run the flow with what its parameters are given; what it found is in the session."""
    server = PREFECT_API_URL.value()
    try:
        state = ptv2_sweep(*given, return_state=True)
        if state.is_failed() and session.raised is None and not session.failed:
            state.result()  # raises what else went wrong: Prefect has it, and nobody else
    except httpx.HTTPError as error:
        raise PipelineError(
            f"Prefect's server at {server} does not answer ({str(error) or type(error).__name__}); "
            "no finished trial is lost: once it is back, the same command goes on"
        ) from error


def _all_of(errors: list[PTv2Error]) -> PTv2Error | None:
    """Return one error with the messages of all, or None."""
    if len(errors) > 1:
        return PipelineError("\n".join(map(str, errors)))
    return errors[0] if errors else None


def _run_name() -> str:
    tasks = flow_run.parameters.get("tasks")
    return f"sweeps: {', '.join(tasks)}" if tasks else "sweeps: all tasks"


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
    session = _session.get() or _Session(on_look=lambda look: None)
    try:
        settings = load_settings(Path(root).resolve() / "params.yaml")
        chosen = [settings.task(name).name for name in tasks] if tasks else list(settings.tasks)
        sweep = overlaid(settings.sweep, {"n_trials": trials, "workers": workers})
        # a backbone's folder is relative to the workspace, wherever a worker starts its flow runs
        with chdir(settings.root):
            _sweep_all(settings, chosen, sweep, session)
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
    if session.failed:
        return Failed(message="; ".join([*map(str, session.failed), *words]))
    return Completed(message="; ".join(words))


def _sweep_all(
    settings: Settings, chosen: list[str], sweep: SweepSettings, session: _Session
) -> None:
    for task in chosen:
        try:
            session.records.append(_prepared_and_swept(settings, task, sweep, session.on_look))
        except PTv2Error as error:
            # what is wrong with one task is no reason to leave the next one out
            message = f"{task}: {error}" if len(chosen) > 1 else str(error)
            session.failed.append(PipelineError(message))


def _prepared_and_swept(
    settings: Settings, task: str, sweep: SweepSettings, on_look: OnLook
) -> SweepRecord:
    dag.bring_up_to_date(settings.root, [task], NEEDED_STAGES, child_environment())
    return sweep_one(settings, task, sweep, on_look)


def sweep_one(settings: Settings, task: str, sweep: SweepSettings, on_look: OnLook) -> SweepRecord:
    """Sweep one task in a flow run of its own, whose task runner is the engine."""
    raised: list[BaseException] = []
    found: list[SweepRecord] = []

    def work() -> State[Any]:
        with opened(settings, task, sweep) as opened_sweep:
            try:
                with engines.submitting(sweep) as submit:
                    record = opened_sweep.run(submit, on_look)
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

    state = engines.run(f"sweep of {task}", sweep, work)
    if raised:
        raise raised[0]
    if not found:
        state.result()
        raise PipelineError(f"sweep: Prefect did not run it: {state.message or state.name}")
    return found[0]
