"""A sweep in MLflow: one run for it, and a child run for each of its trials.

Every call brings the runs up to what the record says, whatever a call before has written: a sweep
that goes on keeps its run, and a call that was cut off is completed by the next.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.flow_yaml import flow
from pipelines.mlflow_runs import MAX_BATCH_PARAMS, log_metrics
from pipelines.model_card import metric_name
from pipelines.registry import connected
from pipelines.schema import PLACES
from pipelines.sweep.record import Finalist, SweepRecord, TrialRecord, TrialState
from ptv2_core.files import sha256_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND_TAG = "ptv2.kind"
STUDY_TAG = "ptv2.study"
TRIAL_TAG = "ptv2.trial"
STATE_TAG = "ptv2.trial_state"
FILES_TAG = "ptv2.files"
"""Digest of the artifacts; set after them."""
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"
ARTIFACTS = "sweep"

# a pruned trial did as it was meant to; MLflow's KILLED is for runs that somebody stopped
STATUS: Mapping[TrialState, str] = {
    "complete": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "crashed": "FAILED",
}
MAX_TAG = 5000
PAGE = 1000


def log_sweep(
    record: SweepRecord,
    folder: Path,
    *,
    params: Mapping[str, str],
    root: Path,
    tracking_uri: str,
    experiment: str,
) -> str:
    """Log a sweep and its trials, and return the id of the sweep's run.

    The run is found again by the study's name: the same sweep with more trials goes on with it, and
    one that is logged already changes nothing. One process at a time may log a study.

    Args:
        record: The sweep.
        folder: Its files, which become artifacts.
        params: What was swept, and how; a run's params cannot change, so those of the first call
            stay.
        root: The workspace.
        tracking_uri: The registry.
        experiment: The experiment's name.

    Raises:
        RegistryError: The registry does not answer or refuses.
    """
    again = f"ptv2 sweep --task {record.task}"
    with connected(tracking_uri, experiment, root=root, again=again) as (client, experiment_id):
        run = _find(client, experiment_id, record)
        if run is None:
            run = client.create_run(
                experiment_id,
                start_time=_start(record),
                run_name=f"sweep of {record.task}",
                tags=_tags(record),
            )
        sweep = _Sweep(
            client=client,
            experiment_id=experiment_id,
            run_id=str(run.info.run_id),
            begun=int(run.info.start_time),
            record=record,
        )
        is_new = sweep.log_trials()
        is_new |= _bring_up(client, run, _tags(record), params, _metrics(record))
        is_new |= _log_files(client, run, folder)
        if is_new or run.info.status != "FINISHED":
            client.set_terminated(sweep.run_id, "FINISHED")
    return sweep.run_id


def _find(client: "MlflowClient", experiment_id: str, record: SweepRecord) -> "Run | None":
    """Return the sweep's run; the oldest, should there be several."""
    query = f"tags.`{KIND_TAG}` = 'sweep' and tags.`{STUDY_TAG}` = '{record.study}'"
    found = client.search_runs([experiment_id], query, order_by=["attributes.start_time ASC"])
    return found[0] if found else None


# The sweep


def _tags(record: SweepRecord) -> dict[str, str]:
    tags = {
        KIND_TAG: "sweep",
        STUDY_TAG: record.study,
        "task": record.task,
        "metric": record.metric,
        "flow_run": record.flow_run,
        "ptv2.stopped": record.stopped or f"after the {record.asked} trials that were asked for",
        "ptv2.winner": str(record.winner.number),
        "mlflow.source.name": f"ptv2 sweep --task {record.task}",
        "mlflow.source.type": "JOB",
        NOTE_TAG: _note(record),
    }
    return {key: value[:MAX_TAG] for key, value in tags.items()}


def _note(record: SweepRecord) -> str:
    """Return Markdown about the sweep: what won, and by what."""
    counts = ", ".join(f"{count} {state}" for state, count in record.counts().items())
    best = record.finalists[0]
    lines = [
        f"Trial {best.number} won: dev {record.metric} {best.mean:.4f}, spread {best.spread:.4f} "
        f"over {_seeds(best)}.",
        "",
        "```text",
        *(f"{name:<24}{flow(value):>16}" for name, value in record.winner.params.items()),
        "```",
        "",
        f"{len(record.trials)} trials ({counts}), {record.epochs_spent} epochs of training. "
        f"`ptv2 apply {record.task}` writes the winner into params.yaml.",
    ]
    return "\n".join(lines)


def _seeds(finalist: Finalist) -> str:
    count = len(finalist.scores)
    return "one seed" if count == 1 else f"{count} seeds"


def _metrics(record: SweepRecord) -> dict[str, float]:
    """Return the numbers that sum the sweep up."""
    counts = record.counts()
    best = max((one.value for one in record.trials if one.value is not None), default=None)
    winner = record.finalists[0]
    found: dict[str, float | None] = {
        f"best_dev_{record.metric}": best,
        f"winner_mean_{record.metric}": winner.mean,
        f"winner_spread_{record.metric}": winner.spread,
        "trials": len(record.trials),
        **{f"trials_{state}": counts.get(state, 0) for state in STATUS},
        "epochs_spent": record.epochs_spent,
    }
    return _finite(found)


def _log_files(client: "MlflowClient", run: "Run", folder: Path) -> bool:
    """Log the files of the sweep, unless they are there; tell whether they were logged."""
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not path.name.startswith(".")
    ]
    listed = "".join(f"{path.name} {sha256_file(path)}\n" for path in files)
    digest = f"sha256:{hashlib.sha256(listed.encode()).hexdigest()}"
    if run.data.tags.get(FILES_TAG) == digest:
        return False
    for path in files:
        client.log_artifact(str(run.info.run_id), str(path), ARTIFACTS)
    client.set_tag(str(run.info.run_id), FILES_TAG, digest)
    return True


# Its trials


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """A sweep's run, to which trials are added."""

    client: "MlflowClient"
    experiment_id: str
    run_id: str
    begun: int
    record: SweepRecord

    def log_trials(self) -> bool:
        """Bring every trial's run up to the record; tell whether anything had to be written."""
        there = {run.data.tags.get(TRIAL_TAG): run for run in self._children()}
        finalists = {one.number: one for one in self.record.finalists}
        is_new = False
        for trial in self.record.trials:
            run = there.get(str(trial.number))
            if run is None:
                run = self._create(trial)
            is_new |= self._complete(run, trial, finalists.get(trial.number))
        return is_new

    def _children(self) -> Iterator["Run"]:
        query = f"tags.`{PARENT_TAG}` = '{self.run_id}'"
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id], query, max_results=PAGE, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _create(self, trial: TrialRecord) -> "Run":
        """Create a trial's run.

        The record knows how long a trial took and not when it began: all begin with the sweep, a
        millisecond apart, so that pages list them in order.
        """
        return self.client.create_run(
            self.experiment_id,
            start_time=self.begun + 1 + trial.number,
            run_name=f"trial {trial.number}",
            tags=self._trial_tags(trial),
        )

    def _complete(self, run: "Run", trial: TrialRecord, finalist: Finalist | None) -> bool:
        """Write what a trial's run lacks; tell whether it lacked anything."""
        metric = self.record.metric
        numbers: dict[str, float | None] = {
            f"best_dev_{metric}": trial.value,
            "epochs": len(trial.epochs),
            "seconds": trial.seconds,
        }
        if finalist is not None:
            numbers |= {f"mean_{metric}": finalist.mean, f"spread_{metric}": finalist.spread}
        is_ended = run.info.status != "RUNNING"
        params = {".".join(PLACES.get(name, (name,))): flow(v) for name, v in trial.params.items()}
        if not is_ended:
            self._log_curve(run, trial)
        is_new = _bring_up(self.client, run, self._trial_tags(trial), params, _finite(numbers))
        if not is_ended:
            end = int(run.info.start_time) + int(trial.seconds * 1000)
            self.client.set_terminated(run.info.run_id, STATUS[trial.state], end_time=end)
        return is_new or not is_ended

    def _trial_tags(self, trial: TrialRecord) -> dict[str, str]:
        tags = {
            PARENT_TAG: self.run_id,
            KIND_TAG: "trial",
            STUDY_TAG: self.record.study,
            TRIAL_TAG: str(trial.number),
            STATE_TAG: trial.state,
            "ptv2.origin": trial.origin,
            "ptv2.retries": str(trial.retries),
            "task": self.record.task,
            "mlflow.source.name": f"ptv2 sweep --task {self.record.task}",
            "mlflow.source.type": "JOB",
        }
        if trial.message:
            tags[NOTE_TAG] = trial.message
        return {key: value[:MAX_TAG] for key, value in tags.items()}

    def _log_curve(self, run: "Run", trial: TrialRecord) -> None:
        """Log the score after each epoch, spread evenly over the trial's time."""
        from mlflow.entities import Metric

        name = metric_name(f"dev_{self.record.metric}")
        apart = trial.seconds * 1000 / max(1, len(trial.epochs))
        begun = int(run.info.start_time)
        points = [
            Metric(name, score, begun + int(apart * epoch), epoch)
            for epoch, score in enumerate(trial.epochs, start=1)
            if math.isfinite(score)
        ]
        log_metrics(self.client, str(run.info.run_id), points)


# Both


def _bring_up(
    client: "MlflowClient",
    run: "Run",
    tags: Mapping[str, str],
    params: Mapping[str, str],
    metrics: Mapping[str, float],
) -> bool:
    """Log what a run lacks or has otherwise; tell whether there was any."""
    from mlflow.entities import Metric, Param, RunTag

    data, run_id = run.data, str(run.info.run_id)
    now = int(time.time() * 1000)
    new_tags = [RunTag(k, v) for k, v in tags.items() if data.tags.get(k) != v]
    # at step 0 MLflow draws a single number as a bar, not as a curve of one point
    points = [Metric(k, v, now, 0) for k, v in metrics.items() if data.metrics.get(k) != v]
    new_params = [Param(k, v) for k, v in params.items() if k not in data.params]
    if new_tags or points:
        client.log_batch(run_id, metrics=points, tags=new_tags)
    for start in range(0, len(new_params), MAX_BATCH_PARAMS):
        client.log_batch(run_id, params=new_params[start : start + MAX_BATCH_PARAMS])
    return bool(new_tags or points or new_params)


def _finite(numbers: Mapping[str, float | None]) -> dict[str, float]:
    """Return the numbers that there are, with names that MLflow's plots can show."""
    return {
        metric_name(name): float(value)
        for name, value in numbers.items()
        if value is not None and math.isfinite(value)
    }


def _start(record: SweepRecord) -> int:
    """Return when the sweep began, in milliseconds since 1970."""
    ended = datetime.fromisoformat(record.date).timestamp()
    return int((ended - record.seconds) * 1000)
