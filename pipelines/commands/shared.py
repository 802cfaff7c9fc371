"""What commands share: the options that several have, and how they speak."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.paths import TaskPaths
    from pipelines.settings import TaskSettings

Task = Annotated[str, typer.Option("--task", "-t", help="A task of params.yaml.")]
Workspace = Annotated[
    Path, typer.Option("--workspace", "-C", help="The folder of params.yaml.", show_default="here")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")]
STAGES = "Stages, as dvc.yaml runs them"
EVERYDAY = "Everyday"
CONTROL = "What answers, in the registry"
LIMITS = "Who may ask, and how much"

TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A task of the registry.")]
Challenger = Annotated[
    str, typer.Argument(help="TASK:VERSION or TASK@ALIAS; a bare TASK means its challenger.")
]
TrackingUri = Annotated[
    str | None,
    typer.Option(help="The registry; default: MLFLOW_TRACKING_URI, or that of params.yaml."),
]
Expect = Annotated[
    int | None, typer.Option(min=1, help="Only if this version is the champion now.")
]
Reason = Annotated[str, typer.Option(help="Why, for the audit line.")]


def task_of(workspace: Path, name: str) -> "tuple[TaskSettings, TaskPaths]":
    """Return a task's settings and files, and go into the workspace."""
    from pipelines.paths import TaskPaths
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml").task(name)
    # A stage runs in its workspace, as under DVC: a backbone's folder is relative to that, too.
    os.chdir(workspace)
    return settings, TaskPaths(root=Path(), task=name)


def make_console() -> "Console":
    """Return where tables and bars are drawn."""
    from rich.console import Console

    # a file or a pipe has no width of its own; the table of results needs some 130 columns
    return Console() if sys.stdout.isatty() else Console(width=140)


def say(text: str) -> None:
    """Write a line."""
    typer.echo(text)


def say_all(lines: list[str]) -> None:
    """Write lines."""
    for line in lines:
        say(line)
