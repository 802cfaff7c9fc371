"""`ptv2`: the command line."""

import sys

import typer

from pipelines.commands import control, prompts, running, settings, stages
from ptv2_core.errors import PTv2Error

INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tiny prompts for a frozen transformer: prepare data, search, train, register, pull.",
)
for part in (running, stages, settings, prompts, control):
    app.add_typer(part.commands)


def main() -> None:
    """Run the command line: a user's mistake is one message and exit code 2."""
    try:
        app()
    except PTv2Error as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(_exit_code(error))
    except SystemExit as end:
        # Typer turns a KeyboardInterrupt into this, and says nothing
        if end.code == INTERRUPTED:
            typer.echo("interrupted; the same command goes on from what is finished", err=True)
        raise


def _exit_code(error: PTv2Error) -> int:
    """Return 2, or what tells a run under Prefect that trying again may help."""
    from pipelines.errors import EXIT_TEMPORARY, EXIT_USER_ERROR, TemporaryError
    from pipelines.settings import read_environment

    is_retried = isinstance(error, TemporaryError) and read_environment().flow_run_id
    return EXIT_TEMPORARY if is_retried else EXIT_USER_ERROR
