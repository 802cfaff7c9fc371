"""Commands that look at settings and results, or change params.yaml."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import EVERYDAY, Workspace, make_console, say, task_of
from ptv2_core.errors import ConfigError

commands = typer.Typer()


@commands.command(rich_help_panel=EVERYDAY)
def apply(
    task: Annotated[str, typer.Argument(help="A task of params.yaml that was swept.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the change and write nothing.")
    ] = False,
    workspace: Workspace = Path(),
) -> None:
    """Write the winner of a task's last sweep into params.yaml, and nothing else."""
    from pipelines import apply as applying
    from pipelines.console import diff_text

    done = applying.apply(workspace, task, dry_run=dry_run)
    if done.diff:
        make_console().print(diff_text(done.diff), soft_wrap=True)
    for sentence in applying.sentences(done):
        say(sentence)


@commands.command(rich_help_panel=EVERYDAY)
def add(
    name: Annotated[str, typer.Argument(help="A task of the file of published settings.")],
    source: Annotated[Path, typer.Option("--from", help="The file of published settings.")] = Path(
        "configs/paper.yaml"
    ),
    family: Annotated[
        str, typer.Option("--settings", help="Whose settings: bert-large, roberta-large or none.")
    ] = "none",
    called: Annotated[
        str | None, typer.Option("--as", help="The task's name in params.yaml; default: NAME.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Add a task of the paper, with its published settings, to params.yaml."""
    from pipelines import published
    from pipelines.checking import did_you_mean

    known = published.load_published(workspace / source)
    if name not in known:
        hint = did_you_mean(name, list(known))
        raise ConfigError(f"expected a task of {workspace / source}, got {name!r}{hint}")
    chosen = None if family == published.NOTHING else family
    published.add_task(workspace / "params.yaml", known[name], chosen, name=called)
    say(f"added {called or name} to {workspace / 'params.yaml'}")
    needed = published.needed_first(known[name], workspace)
    if needed is not None:
        say(needed)


@commands.command(rich_help_panel=EVERYDAY)
def pin(
    file: Annotated[Path, typer.Argument(help="A pin file of a hub's data set.")],
    update: Annotated[
        bool, typer.Option("--update", help="Take the newest commit in place of the one pinned.")
    ] = False,
) -> None:
    """Pin a data set of a hub to its present commit; needs the network."""
    from pipelines.sources import hub_pin

    done = hub_pin.pin(file, update=update)
    say(f"pinned {done.dataset} to {done.revision} ({done.ref})")


@commands.command(rich_help_panel=EVERYDAY)
def check(workspace: Workspace = Path()) -> None:
    """Check params.yaml and say which tasks it has."""
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    say(f"{settings.path} is sound; tasks: {', '.join(settings.tasks)}")


@commands.command(rich_help_panel=EVERYDAY)
def doctor(
    workspace: Workspace = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at machine, settings, backbone, data and servers; exit code 2 if one needs mending."""
    from pipelines import doctor as examination
    from pipelines.console import findings_table
    from pipelines.errors import EXIT_USER_ERROR

    if not workspace.is_dir():
        raise ConfigError(f"--workspace: expected a folder at {workspace}, found none")
    os.chdir(workspace)
    findings = examination.examine(Path())
    problems = sum(finding.state == "problem" for finding in findings)
    if as_json:
        plain = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(json.dumps({"problems": problems, "findings": plain}, indent=2))
    else:
        make_console().print(findings_table(findings))
        say(examination.verdict(problems))
    if problems:
        raise typer.Exit(EXIT_USER_ERROR)


@commands.command(rich_help_panel=EVERYDAY)
def backbones(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the families of backbones that take deep prompts, and what each supports."""
    from pipelines import launch_backbones

    if as_json:
        typer.echo(json.dumps({"families": launch_backbones.rows()}, indent=2))
    else:
        make_console().print(launch_backbones.table())
        for sentence in launch_backbones.sentences():
            say(sentence)


@commands.command(rich_help_panel=EVERYDAY)
def report(workspace: Workspace = Path()) -> None:
    """Print the table of results."""
    from pipelines import report as results
    from pipelines.console import results_table
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    make_console().print(results_table(results.read_rows(settings.root, list(settings.tasks))))


@commands.command(rich_help_panel=EVERYDAY)
def inspect(
    task: Annotated[str, typer.Argument(help="A task of params.yaml whose prompt is trained.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Look into a trained prompt: its attention, size, rank and gradients, layer by layer."""
    target = None if json_file is None else json_file.absolute()
    settings, paths = task_of(workspace, task)
    from pipelines import inspection as inspecting
    from pipelines.console import layers_table
    from pipelines.inspect_page import page
    from pipelines.inspect_report import explain
    from pipelines.threads import set_up_torch
    from ptv2_core.files import write_json_atomic, write_text_atomic

    set_up_torch()
    found = inspecting.inspect(settings, paths)
    explanation = explain(found)
    write_text_atomic(paths.inspected, page(found, explanation))
    if target is not None:
        write_json_atomic(target, inspecting.to_json(found, explanation))
    make_console().print(layers_table(found))
    for sentence in explanation:
        say(sentence)
    for note in found.missing:
        say(f"missing   {note}")
    say(f"page      {paths.inspected} (open it in a browser)")


@commands.command(rich_help_panel=EVERYDAY)
def study(
    task: Annotated[str, typer.Argument(help="A task of params.yaml that was swept.")],
    html_file: Annotated[
        Path | None, typer.Option("--html", help="The page; default: beside the sweep.")
    ] = None,
    png_folder: Annotated[
        Path | None, typer.Option("--png", help="Where the plots go; default: beside the sweep.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Show a task's last sweep: its trials, what mattered and the winner; a page and plots."""
    asked = [
        None if path is None else path.absolute() for path in (html_file, png_folder, json_file)
    ]
    from pipelines import study_files, study_report
    from pipelines.paths import TaskPaths
    from pipelines.settings import load_settings
    from pipelines.sweep.record import SweepRecord

    known = load_settings(workspace / "params.yaml").task(task)
    # not from within the workspace: what is written is named as it is reached from here
    paths = TaskPaths(root=workspace, task=known.name)
    record = SweepRecord.read(paths)
    console = make_console()
    console.print(study_report.trials_table(record))
    console.print(study_report.finalists_table(record))
    for sentence in study_report.sentences(record):
        say(sentence)
    written = study_files.write_chosen(record, paths.sweep, *asked)
    for name, place in written.items():
        say(f"{name:<9} {place}")
