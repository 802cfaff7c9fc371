"""The stages, as dvc.yaml runs them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.commands.shared import STAGES, Task, Workspace, make_console, say, task_of
from ptv2_core.errors import ConfigError

commands = typer.Typer()


@commands.command(rich_help_panel=STAGES)
def fetch(task: Task, workspace: Workspace = Path()) -> None:
    """Bring a task's records into the workspace."""
    settings, paths = task_of(workspace, task)
    from pipelines.stages import fetch as stage

    done = stage.run(settings, paths)
    rows = ", ".join(f"{count} {split}" for split, count in done.rows.items())
    say(f"fetched {task}: {rows} records")
    for split, left_out in done.skipped.items():
        for what, count in left_out.items():
            say(f"  {split}: {count} {what} gave no record")


@commands.command(rich_help_panel=STAGES)
def prepare(task: Task, workspace: Workspace = Path()) -> None:
    """Check, split and encode a task's records."""
    settings, paths = task_of(workspace, task)
    from pipelines.stages import prepare as stage

    done = stage.run(settings, paths)
    rows = ", ".join(f"{report.rows} {split}" for split, report in done.splits.items())
    labels = f", {done.labels} labels" if done.labels else ""
    say(f"prepared {task}: {rows} rows{labels}")
    windows = sum(report.windows for report in done.splits.values())
    if windows:
        say(f"  {windows} rows are further windows of contexts longer than one row")
    cut = sum(report.truncated for report in done.splits.values())
    if cut:
        say(f"  {cut} rows were cut to {settings.prepare.max_length} tokens (prepare.max_length)")
    if done.repaired_tags:
        say(f"  {done.repaired_tags} I- tags began a span and were taken as B-, as conlleval does")


@commands.command(rich_help_panel=STAGES)
def search(task: Task, workspace: Workspace = Path()) -> None:
    """Search for the settings that score best on dev."""
    settings, paths = task_of(workspace, task)
    from pipelines.console import progress
    from pipelines.stages import search as stage
    from pipelines.threads import set_up_torch

    set_up_torch()
    with progress(f"search {task}", make_console()) as on_progress:
        done = stage.run(settings, paths, on_progress)
    if done.value is None:
        say(f"searched {task}: search.n_trials is 0, the settings of train are taken")
        return
    if done.screen is not None:
        told = done.screen.rank_correlation
        agreement = "too few to rank" if told is None else f"rank correlation {told:.2f}"
        say(
            f"screened {task}: {sum(done.screen.n_trials.values())} trials in the top "
            f"{done.screen.layers} layers; {done.screen.compared} trained at full depth too, "
            f"{agreement}"
        )
    counts = ", ".join(f"{count} {state}" for state, count in done.n_trials.items() if count)
    say(f"searched {task}: dev {done.metric} {done.value:.4f} by trial {done.trial} ({counts})")


@commands.command(rich_help_panel=STAGES)
def train(task: Task, workspace: Workspace = Path()) -> None:
    """Train the prompt with the best settings and save it; goes on from a checkpoint."""
    settings, paths = task_of(workspace, task)
    from pipelines.console import progress
    from pipelines.settings import read_environment
    from pipelines.stages import silent
    from pipelines.stages import train as stage
    from pipelines.threads import set_up_torch

    set_up_torch()
    if read_environment().rank > 0:  # the first process of torchrun speaks for all
        stage.run(settings, paths, silent)
        return
    with progress(f"train {task}", make_console()) as on_progress:
        done = stage.run(settings, paths, on_progress)
    say(
        f"trained {task}: dev {done.metric} {done.dev:.4f} in epoch {done.best_epoch} of "
        f"{done.epochs}, {done.trainable_parameters:,} parameters, {done.seconds:.0f} s, "
        f"{done.peak_memory_bytes / 1e9:.1f} GB at its peak"
    )


@commands.command(rich_help_panel=STAGES)
def evaluate(
    task: Task,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare the backbone in this number format (bf16, int8, nf4) with fp32 "
            "instead, and write results/TASK/formats.json; may be repeated."
        ),
    ] = None,
    split: Annotated[
        Literal["dev", "test"] | None,
        typer.Option(help="With --compare: on which rows; dev unless told otherwise."),
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Score the prompt on the held-out test split, or compare number formats of its backbone."""
    if split is not None and not compare:
        raise ConfigError(
            f"--split: expected --compare beside it, got --split {split} alone; a prompt is scored "
            "on dev and test (results/TASK/evaluate/metrics.json has both)"
        )
    settings, paths = task_of(workspace, task)
    from pipelines.console import formats_table, progress
    from pipelines.stages import evaluate as stage
    from pipelines.threads import set_up_torch

    set_up_torch()
    if compare:
        from pipelines.number_formats import compare_formats, precisions_of

        precisions = precisions_of(compare)
        console = make_console()
        with progress(f"evaluate {task}", console) as on_progress:
            compared = compare_formats(
                settings, paths, precisions, split=split or "dev", progress=on_progress
            )
        console.print(formats_table(compared))
        say(f"written   {paths.formats}")
        return
    with progress(f"evaluate {task}", make_console()) as on_progress:
        done = stage.run(settings, paths, on_progress)
    probe = "" if done.probe is None else f", bare-backbone probe {done.probe:.4f}"
    say(f"evaluated {task}: test {done.metric} {done.test:.4f}{probe}")


@commands.command(rich_help_panel=STAGES)
def register(task: Task, workspace: Workspace = Path()) -> None:
    """Register the prompt as a model version, once."""
    settings, paths = task_of(workspace, task)
    from pipelines.stages import register as stage

    done = stage.run(settings, paths)
    aliases = f" ({', '.join(done.aliases)})" if done.aliases else ""
    again = "" if done.created else ", as before"
    say(f"registered {task}: version {done.version}{aliases}{again}")
    say(f"  {done.gate.reason}")
