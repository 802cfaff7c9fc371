"""`ptv2 run`: start the flow, draw what happens, and say how it ended."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pipelines import flows
from pipelines.errors import PipelineError
from pipelines.settings import Settings, read_environment
from ptv2_serving.tracking import shown

QUIET_STATES = ("unchanged", "skipped")


def run(
    settings: Settings, tasks: Sequence[str], concurrency: int, console: Console
) -> PipelineError | None:
    """Bring all stages of the tasks up to date.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks.
        concurrency: Stages side by side at most.
        console: Where to draw.

    Returns:
        What went wrong in the stages that failed, or None.

    Raises:
        PipelineError: The graph cannot be read, or Prefect cannot be reached.
    """
    started = time.monotonic()
    with _drawing(console) as on_event:
        summary = flows.run(
            settings.root,
            tasks,
            concurrency=concurrency,
            retries=settings.run.retries,
            on_event=on_event,
        )
    states = [outcome.state for outcome in summary.stages]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    name = f" (Prefect: {summary.name})" if summary.name else ""
    seconds = time.monotonic() - started
    console.print(f"{len(states)} stages: {counts}; {seconds:.0f} s{name}", highlight=False)
    if not summary.failed:
        return None
    skipped = states.count("skipped")
    lines = [outcome.message or f"{outcome.address} failed" for outcome in summary.failed]
    note = (
        f"\n{skipped} stages that need them were skipped; mend it and run again" if skipped else ""
    )
    return PipelineError("\n".join(lines) + note)


def where_to_look(settings: Settings) -> str:
    """Return where the results are and how to open the pages."""
    uri = read_environment().mlflow_tracking_uri or settings.register.tracking_uri
    opened = shown(uri) if uri.startswith("http") else f"mlflow ui --backend-store-uri {shown(uri)}"
    lines = [
        "files     prompts/TASK, results/TASK (search.html, history.csv, predictions.jsonl, ...)",
        "tables    ptv2 report; dvc metrics show; dvc plots show",
        f"registry  {opened}",
    ]
    if read_environment().prefect_api_url is None:
        lines.append("runs      PREFECT_HOME=$PWD/.ptv2/prefect prefect server start")
    lines.append("answers   ptv2 pull TASK --to DIR, then ptv2 predict DIR TEXT")
    return "\n".join(lines)


@contextmanager
def _drawing(console: Console) -> Iterator[flows.OnEvent]:
    """Yield a callback that draws stages as they start, speak and finish."""
    bar = Progress(
        TextColumn("stages"),
        BarColumn(),
        TextColumn("{task.completed} done"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        handle = bar.add_task("", total=None, what="")
        begun: dict[str, float] = {}
        plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}

        def on_event(event: flows.StageEvent) -> None:
            if event.kind == "started":
                begun[event.address] = time.monotonic()
            elif event.kind == "line" and console.is_terminal:
                bar.update(handle, what=event.text)
            elif event.kind == "line":
                console.print(f"          {event.address:24} | {event.text}", **plain)
            else:
                bar.update(handle, advance=1)
                if event.text not in QUIET_STATES:
                    seconds = time.monotonic() - begun.get(event.address, time.monotonic())
                    line = f"{event.text:9} {event.address:24} {seconds:6.1f} s"
                    console.print(line, **plain)

        yield on_event
