"""Commands that work for a while: runs, sweeps, comparisons, servers."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import EVERYDAY, Port, Workspace, make_console, say

commands = typer.Typer()
# of `ptv2 up`, whose servers are no mistake of the user
SERVER_FAILED = 1


@commands.command(rich_help_panel=EVERYDAY)
def run(
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Only this task; may be repeated.")
    ] = None,
    workspace: Workspace = Path(),
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Stages side by side; default: run.concurrency.")
    ] = None,
) -> None:
    """Run every stage that is out of date, independent ones side by side, under Prefect."""
    from pipelines import launch, report
    from pipelines.console import results_table
    from pipelines.settings import load_settings

    console = make_console()
    settings = load_settings(workspace / "params.yaml")
    chosen = [settings.task(name).name for name in task] if task else list(settings.tasks)
    failed = launch.run(settings, chosen, concurrency or settings.run.concurrency, console)
    console.print(results_table(report.read_rows(settings.root, chosen)))
    console.print(launch.where_to_look(settings), markup=False, highlight=False)
    if failed:
        raise failed


@commands.command(rich_help_panel=EVERYDAY)
def watch(
    every: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once only.")] = False,
    workspace: Workspace = Path(),
) -> None:
    """Run the tasks whose sources changed, again and again; Ctrl-C ends it."""
    from pipelines import launch_watch
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    console = make_console()
    if not once:
        launch_watch.run(settings, every, console)
        return
    failed = launch_watch.look(settings, console)
    if failed:
        raise failed


@commands.command(rich_help_panel=EVERYDAY)
def up(
    prefect_port: Port = 4200,
    mlflow_port: Port = 5000,
    optuna_port: Port = 8080,
    workspace: Workspace = Path(),
) -> None:
    """Start the pages of Prefect, MLflow and Optuna Dashboard here; Ctrl-C stops them all."""
    from pipelines import up as pages
    from pipelines.errors import PipelineError
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    ports = pages.Ports(prefect=prefect_port, mlflow=mlflow_port, optuna=optuna_port)
    try:
        pages.run(settings, ports, make_console())
    except PipelineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(SERVER_FAILED) from None


@commands.command(rich_help_panel=EVERYDAY)
def sweep(
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Only this task; may be repeated.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Of each task; default: sweep.n_trials.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trials side by side; default: sweep.workers.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Search settings under Prefect: parallel, pruned, checked with seeds, safe from any crash."""
    from pipelines.settings import load_settings
    from pipelines.sweep import launch

    settings = load_settings(workspace / "params.yaml")
    chosen = [settings.task(name).name for name in task] if task else list(settings.tasks)
    launch.run(settings, chosen, trials=trials, workers=workers, console=make_console())


@commands.command(rich_help_panel=EVERYDAY)
def compare(
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="Only this task; may be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="Only this method or variant; default: compare.methods."
        ),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(help="This seed; may be repeated; default: compare.seeds.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=0, help="Trials of each search; default: compare.n_trials.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Trainings side by side; default: compare.parallel.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Compare tuning methods on the same data, loop and number of trials; goes on when killed."""
    from pipelines import launch_compare
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    asked = dict.fromkeys(task or settings.tasks)  # each once
    chosen = [settings.task(name).name for name in asked]
    changes = {"methods": method, "seeds": seed, "n_trials": trials, "parallel": parallel}
    launch_compare.run(settings, chosen, changes, json_file, make_console())


@commands.command(rich_help_panel=EVERYDAY)
def multitask(
    name: Annotated[str, typer.Argument(help="A name under multitask.shared of params.yaml.")],
    workspace: Workspace = Path(),
) -> None:
    """Train one prompt on several tasks at once, a head each; goes on from a checkpoint."""
    from pipelines import multitask as shared
    from pipelines.console import progress, shared_table
    from pipelines.settings import load_settings
    from pipelines.threads import set_up_torch

    set_up_torch()
    load_settings(workspace / "params.yaml")
    os.chdir(workspace)
    settings = load_settings(Path("params.yaml"))
    with progress(f"multitask {name}", make_console()) as on_progress:
        done = shared.run(settings, name, on_progress)
    make_console().print(shared_table(name, done))
    say("a training begins from one of them with train.init_from, such as " + done[0].prompt)
