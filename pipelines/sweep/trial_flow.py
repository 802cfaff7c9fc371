"""Prefect: one training of a sweep as a flow run of its own, for workers on a work pool."""

import threading
import time
from typing import Any

import prefect
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Failed

from pipelines.errors import PipelineError
from pipelines.sweep import beats
from pipelines.sweep.engines import train_and_log
from pipelines.sweep.orders import unpacked
from pipelines.sweep.pool import REFUSED
from pipelines.sweep.training import Order, end, study_of
from pipelines.sweep.trials import SweepStudy
from ptv2_core.errors import PTv2Error

OPEN_S = 30.0
NOT_OURS = "the sweep ended, or gave this trial to another"


@prefect.flow(name="ptv2-trial", persist_result=False)
def ptv2_trial(order: dict[str, Any], place: int, token: str) -> State[Any]:
    """Train one trial of a sweep; `ptv2 sweep` with `engine: work_pool` starts these.

    Args:
        order: What to train.
        place: Which of the trials side by side this is.
        token: Whose the place has to be.
    """
    try:
        received = unpacked(order)
        study = _opened(received)
    except PipelineError as error:
        return Failed(name=REFUSED, message=str(error))
    lost = threading.Event()

    def on_lost() -> None:
        lost.set()
        end(received.study)

    try:
        if not beats.is_given(study, place, token):
            return Cancelled(message=NOT_OURS)
        heartbeat_s = received.job.heartbeat_s
        with beats.beating(study, place, token, heartbeat_s=heartbeat_s, on_lost=on_lost):
            return train_and_log(received)
    except PTv2Error as error:
        if lost.is_set():
            return Cancelled(message=NOT_OURS)
        return Failed(message=str(error))
    finally:
        end(received.study)


def _opened(order: Order) -> SweepStudy:
    """Return the study; a database that is being restarted is waited for.

    Raises:
        PipelineError: It cannot be used from here.
    """
    deadline = time.monotonic() + OPEN_S
    while True:
        try:
            return study_of(order)
        except PipelineError:
            if time.monotonic() > deadline:
                raise
        time.sleep(1.0)
