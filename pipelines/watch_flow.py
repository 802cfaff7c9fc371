"""Prefect: a look at the sources as a flow run, which starts the run of the tasks that changed."""

from pathlib import Path
from typing import Any, cast

import prefect
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.states import Completed

from pipelines import flows, watching

NOTHING = "nothing changed"


@prefect.flow(name="ptv2-watch", persist_result=False)
def ptv2_watch(root: str = ".", deployment: str | None = None) -> State[Any]:
    """Run the tasks whose sources changed since they were last fetched.

    Args:
        root: The workspace: the folder of params.yaml.
        deployment: A deployment of the run flow, such as `ptv2-run/run-nightly`: the run is given
            to it, and its limit then keeps two runs of one workspace apart. None runs it here.
    """
    workspace = Path(root).resolve()
    found = watching.look(workspace)
    if not found.due:
        tried = f"; given to a run before: {', '.join(found.tried)}" if found.tried else ""
        return Completed(message=NOTHING + tried)
    tasks = list(found.due)
    # noted first: a run that ends this process with it would else be started for ever
    watching.note(workspace, found, tasks)
    if deployment is None:
        return flows.ptv2_run(root=root, tasks=tasks, return_state=True)
    # not waited for: a worker with one slot would wait for itself
    started = cast(FlowRun, run_deployment(deployment, parameters={"tasks": tasks}, timeout=0))
    return Completed(message=f"changed: {', '.join(tasks)}; started {started.name}")
