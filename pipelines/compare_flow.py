"""Prefect: a comparison as a flow run, with its report as an artifact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefect
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed, Failed

from pipelines import prefect_session
from ptv2_core.errors import PTv2Error

ARTIFACT_KEY = "ptv2-compare"


def run(root: Path, work: Callable[[], str]) -> None:
    """Do the work of a comparison in a flow run.

    Args:
        root: The workspace.
        work: Compares, and returns the report in Markdown.

    Raises:
        PTv2Error: What the work raised, after the flow run was marked as failed.
        KeyboardInterrupt: Likewise, as cancelled.
    """
    raised: list[BaseException] = []

    @prefect.flow(name="ptv2-compare", persist_result=False)
    def ptv2_compare() -> State[Any]:
        try:
            markdown = work()
        except KeyboardInterrupt as interrupt:
            raised.append(interrupt)
            return Cancelled(message="interrupted; what ended before is kept")
        except PTv2Error as error:
            raised.append(error)
            return Failed(message=str(error))
        create_markdown_artifact(
            key=ARTIFACT_KEY, markdown=markdown, description="Tasks, methods and seeds compared"
        )
        return Completed(message="compared")

    with prefect_session.session(root):
        state = ptv2_compare(return_state=True)
    if raised:
        raise raised[0]
    if state.is_failed():
        state.result()  # raises what else went wrong: Prefect has it, and nobody else
