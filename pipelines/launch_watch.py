"""`ptv2 watch`: look at the sources now and then, and run the tasks whose sources changed."""

import time
from pathlib import Path

from rich.console import Console

from pipelines import watching
from pipelines.errors import PipelineError
from pipelines.interrupts import terminate_as_interrupt
from pipelines.settings import Settings, load_settings
from ptv2_core.errors import PTv2Error


def run(settings: Settings, every_s: float, console: Console) -> None:
    """Look again and again, until Ctrl-C or SIGTERM.

    Args:
        settings: A checked params.yaml; it is read anew before each look.
        every_s: Seconds from the end of one look to the next.
        console: Where to draw.
    """
    try:
        with terminate_as_interrupt():
            while True:
                _look_and_tell(settings.path, console)
                console.print(f"next look in {every_s:g} s; Ctrl-C ends", highlight=False)
                time.sleep(every_s)
    except KeyboardInterrupt:
        console.print("ended; the same command goes on from what is finished", highlight=False)


def _look_and_tell(path: Path, console: Console) -> None:
    """Look once; what is wrong may be mended until the next look."""
    try:
        failed: PTv2Error | None = look(load_settings(path), console)
    except PTv2Error as error:
        failed = error
    if failed:
        console.print(f"error: {failed}", markup=False, highlight=False)


def look(settings: Settings, console: Console) -> PipelineError | None:
    """Look once, and run what is due; starts nothing of Prefect where nothing is.

    Args:
        settings: A checked params.yaml.
        console: Where to draw.

    Returns:
        What went wrong in the run, or None.

    Raises:
        PipelineError: The sources or the graph cannot be read, or Prefect cannot be reached.
    """
    root = settings.root.resolve()
    found = watching.look(root)
    if found.tried:
        waiting = ", ".join(found.tried)
        minutes = watching.RETRY_AFTER_S / 60
        words = f"{waiting}: not run again with the same sources within {minutes:g} minutes"
        console.print(words, markup=False, highlight=False)
    if not found.due:
        console.print("nothing changed" if not found.tried else "nothing else changed")
        return None
    from pipelines import launch

    console.print(f"changed: {', '.join(found.due)}", markup=False, highlight=False)
    failed = launch.run(settings, found.due, settings.run.concurrency, console)
    if failed:
        # not before its end: what was interrupted is still due
        watching.note(root, found, found.due)
    return failed
