"""`ptv2`: the command line. Every command imports what it needs when it runs."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptv2_core.config import AnsweringPrecision, Device
from ptv2_core.errors import ConfigError, PTv2Error

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.paths import TaskPaths
    from pipelines.settings import TaskSettings

INTERRUPTED = 130
# of `ptv2 up`, whose servers are no mistake of the user
SERVER_FAILED = 1

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Tiny prompts for a frozen transformer: prepare data, search, train, register, pull.",
)

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
    str | None, typer.Option(help="The registry; default: that of params.yaml.")
]
Expect = Annotated[
    int | None, typer.Option(min=1, help="Only if this version is the champion now.")
]
Reason = Annotated[str, typer.Option(help="Why, for the audit line.")]


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


@app.command(rich_help_panel=EVERYDAY)
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

    console = _console()
    settings = load_settings(workspace / "params.yaml")
    chosen = [settings.task(name).name for name in task] if task else list(settings.tasks)
    failed = launch.run(settings, chosen, concurrency or settings.run.concurrency, console)
    console.print(results_table(report.read_rows(settings.root, chosen)))
    console.print(launch.where_to_look(settings), markup=False, highlight=False)
    if failed:
        raise failed


@app.command(rich_help_panel=EVERYDAY)
def watch(
    every: Annotated[float, typer.Option(min=1.0, help="Seconds between two looks.")] = 60.0,
    once: Annotated[bool, typer.Option("--once", help="Look once only.")] = False,
    workspace: Workspace = Path(),
) -> None:
    """Run the tasks whose sources changed, again and again; Ctrl-C ends it."""
    from pipelines import launch_watch
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    console = _console()
    if not once:
        launch_watch.run(settings, every, console)
        return
    failed = launch_watch.look(settings, console)
    if failed:
        raise failed


@app.command(rich_help_panel=EVERYDAY)
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
        pages.run(settings, ports, _console())
    except PipelineError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(SERVER_FAILED) from None


@app.command(rich_help_panel=EVERYDAY)
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
    launch.run(settings, chosen, trials=trials, workers=workers, console=_console())


@app.command(rich_help_panel=STAGES)
def fetch(task: Task, workspace: Workspace = Path()) -> None:
    """Bring a task's records into the workspace."""
    settings, paths = _task(workspace, task)
    from pipelines.stages import fetch as stage

    done = stage.run(settings, paths)
    rows = ", ".join(f"{count} {split}" for split, count in done.rows.items())
    _say(f"fetched {task}: {rows} records")
    for split, left_out in done.skipped.items():
        for what, count in left_out.items():
            _say(f"  {split}: {count} {what} gave no record")


@app.command(rich_help_panel=STAGES)
def prepare(task: Task, workspace: Workspace = Path()) -> None:
    """Check, split and encode a task's records."""
    settings, paths = _task(workspace, task)
    from pipelines.stages import prepare as stage

    done = stage.run(settings, paths)
    rows = ", ".join(f"{report.rows} {split}" for split, report in done.splits.items())
    labels = f", {done.labels} labels" if done.labels else ""
    _say(f"prepared {task}: {rows} rows{labels}")
    windows = sum(report.windows for report in done.splits.values())
    if windows:
        _say(f"  {windows} rows are further windows of contexts longer than one row")
    cut = sum(report.truncated for report in done.splits.values())
    if cut:
        _say(f"  {cut} rows were cut to {settings.prepare.max_length} tokens (prepare.max_length)")
    if done.repaired_tags:
        _say(f"  {done.repaired_tags} I- tags began a span and were taken as B-, as conlleval does")


@app.command(rich_help_panel=STAGES)
def search(task: Task, workspace: Workspace = Path()) -> None:
    """Search for the settings that score best on dev."""
    settings, paths = _task(workspace, task)
    from pipelines.console import progress
    from pipelines.stages import search as stage
    from pipelines.threads import limit_threads

    limit_threads()
    with progress(f"search {task}", _console()) as on_progress:
        done = stage.run(settings, paths, on_progress)
    if done.value is None:
        _say(f"searched {task}: search.n_trials is 0, the settings of train are taken")
        return
    if done.screen is not None:
        told = done.screen.rank_correlation
        agreement = "too few to rank" if told is None else f"rank correlation {told:.2f}"
        _say(
            f"screened {task}: {sum(done.screen.n_trials.values())} trials in the top "
            f"{done.screen.layers} layers; {done.screen.compared} trained at full depth too, "
            f"{agreement}"
        )
    counts = ", ".join(f"{count} {state}" for state, count in done.n_trials.items() if count)
    _say(f"searched {task}: dev {done.metric} {done.value:.4f} by trial {done.trial} ({counts})")


@app.command(rich_help_panel=STAGES)
def train(task: Task, workspace: Workspace = Path()) -> None:
    """Train the prompt with the best settings and save it; goes on from a checkpoint."""
    settings, paths = _task(workspace, task)
    from pipelines.console import progress
    from pipelines.settings import read_environment
    from pipelines.stages import silent
    from pipelines.stages import train as stage
    from pipelines.threads import limit_threads

    limit_threads()
    if read_environment().rank > 0:  # the first process of torchrun speaks for all
        stage.run(settings, paths, silent)
        return
    with progress(f"train {task}", _console()) as on_progress:
        done = stage.run(settings, paths, on_progress)
    _say(
        f"trained {task}: dev {done.metric} {done.dev:.4f} in epoch {done.best_epoch} of "
        f"{done.epochs}, {done.trainable_parameters:,} parameters, {done.seconds:.0f} s, "
        f"{done.peak_memory_bytes / 1e9:.1f} GB at its peak"
    )


@app.command(rich_help_panel=STAGES)
def evaluate(task: Task, workspace: Workspace = Path()) -> None:
    """Score the prompt on the held-out test split."""
    settings, paths = _task(workspace, task)
    from pipelines.console import progress
    from pipelines.stages import evaluate as stage
    from pipelines.threads import limit_threads

    limit_threads()
    with progress(f"evaluate {task}", _console()) as on_progress:
        done = stage.run(settings, paths, on_progress)
    probe = "" if done.probe is None else f", bare-backbone probe {done.probe:.4f}"
    _say(f"evaluated {task}: test {done.metric} {done.test:.4f}{probe}")


@app.command(rich_help_panel=STAGES)
def register(task: Task, workspace: Workspace = Path()) -> None:
    """Register the prompt as a model version, once."""
    settings, paths = _task(workspace, task)
    from pipelines.stages import register as stage

    done = stage.run(settings, paths)
    aliases = f" ({', '.join(done.aliases)})" if done.aliases else ""
    again = "" if done.created else ", as before"
    _say(f"registered {task}: version {done.version}{aliases}{again}")
    _say(f"  {done.gate.reason}")


@app.command(rich_help_panel=EVERYDAY)
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
    launch_compare.run(settings, chosen, changes, json_file, _console())


@app.command(rich_help_panel=EVERYDAY)
def multitask(
    name: Annotated[str, typer.Argument(help="A name under multitask.shared of params.yaml.")],
    workspace: Workspace = Path(),
) -> None:
    """Train one prompt on several tasks at once, a head each; goes on from a checkpoint."""
    from pipelines import multitask as shared
    from pipelines.console import progress, shared_table
    from pipelines.settings import load_settings
    from pipelines.threads import limit_threads

    limit_threads()
    load_settings(workspace / "params.yaml")
    os.chdir(workspace)
    settings = load_settings(Path("params.yaml"))
    with progress(f"multitask {name}", _console()) as on_progress:
        done = shared.run(settings, name, on_progress)
    _console().print(shared_table(name, done))
    _say("a training begins from one of them with train.init_from, such as " + done[0].prompt)


@app.command(rich_help_panel=EVERYDAY)
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
        _console().print(diff_text(done.diff), soft_wrap=True)
    for sentence in applying.sentences(done):
        _say(sentence)


@app.command(rich_help_panel=EVERYDAY)
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
    _say(f"added {called or name} to {workspace / 'params.yaml'}")
    needed = published.needed_first(known[name], workspace)
    if needed is not None:
        _say(needed)


@app.command(rich_help_panel=EVERYDAY)
def pin(
    file: Annotated[Path, typer.Argument(help="A pin file of a hub's data set.")],
    update: Annotated[
        bool, typer.Option("--update", help="Take the newest commit in place of the one pinned.")
    ] = False,
) -> None:
    """Pin a data set of a hub to its present commit; needs the network."""
    from pipelines.sources import hub_pin

    done = hub_pin.pin(file, update=update)
    _say(f"pinned {done.dataset} to {done.revision} ({done.ref})")


@app.command(rich_help_panel=EVERYDAY)
def check(workspace: Workspace = Path()) -> None:
    """Check params.yaml and say which tasks it has."""
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    _say(f"{settings.path} is sound; tasks: {', '.join(settings.tasks)}")


@app.command(rich_help_panel=EVERYDAY)
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
        _console().print(findings_table(findings))
        _say(examination.verdict(problems))
    if problems:
        raise typer.Exit(EXIT_USER_ERROR)


@app.command(rich_help_panel=EVERYDAY)
def backbones(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the families of backbones that take deep prompts, and what each supports."""
    from pipelines import launch_backbones

    if as_json:
        typer.echo(json.dumps({"families": launch_backbones.rows()}, indent=2))
    else:
        _console().print(launch_backbones.table())
        for sentence in launch_backbones.sentences():
            _say(sentence)


@app.command(rich_help_panel=EVERYDAY)
def report(workspace: Workspace = Path()) -> None:
    """Print the table of results."""
    from pipelines import report as results
    from pipelines.console import results_table
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml")
    _console().print(results_table(results.read_rows(settings.root, list(settings.tasks))))


@app.command(rich_help_panel=EVERYDAY)
def inspect(
    task: Annotated[str, typer.Argument(help="A task of params.yaml whose prompt is trained.")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Look into a trained prompt: its attention, size, rank and gradients, layer by layer."""
    target = None if json_file is None else json_file.absolute()
    settings, paths = _task(workspace, task)
    from pipelines import inspection as inspecting
    from pipelines.console import layers_table
    from pipelines.inspect_page import page
    from pipelines.inspect_report import explain
    from pipelines.threads import limit_threads
    from ptv2_core.files import write_json_atomic, write_text_atomic

    limit_threads()
    found = inspecting.inspect(settings, paths)
    explanation = explain(found)
    write_text_atomic(paths.inspected, page(found, explanation))
    if target is not None:
        write_json_atomic(target, inspecting.to_json(found, explanation))
    _console().print(layers_table(found))
    for sentence in explanation:
        _say(sentence)
    for note in found.missing:
        _say(f"missing   {note}")
    _say(f"page      {paths.inspected} (open it in a browser)")


@app.command(rich_help_panel=EVERYDAY)
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
    _, paths = _task(workspace, task)
    from pipelines import study_files, study_report
    from pipelines.sweep.record import SweepRecord

    record = SweepRecord.read(paths)
    console = _console()
    console.print(study_report.trials_table(record))
    console.print(study_report.finalists_table(record))
    for sentence in study_report.sentences(record):
        _say(sentence)
    written = study_files.write_chosen(record, paths.sweep, *asked)
    for name, place in written.items():
        _say(f"{name:<9} {place}")


@app.command(rich_help_panel=EVERYDAY)
def pull(
    reference: Annotated[str, typer.Argument(help="TASK, TASK@ALIAS or TASK:VERSION.")],
    to: Annotated[Path, typer.Option(help="The folder to put the prompt in.")],
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is, if not where it was in training.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="The registry; default: that of params.yaml.")
    ] = None,
    verify_key: Annotated[
        Path | None, typer.Option(help="A public key; a prompt that is not signed is refused.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Download a registered prompt and verify it on its backbone."""
    from pipelines.launch_control import registry_uri
    from pipelines.threads import limit_threads
    from ptv2_serving import signing, store

    limit_threads()
    pulled = store.pull(
        reference,
        to,
        tracking_uri=registry_uri(workspace, tracking_uri),
        root=workspace,
        backbone_name=backbone,
        public_key=None if verify_key is None else signing.read_public_key(verify_key),
    )
    _say(
        f"pulled {pulled.manifest.task.name} version {pulled.version} to {pulled.path}: "
        f"{pulled.manifest.size_bytes:,} bytes, sha256 and golden inputs verified"
    )


@app.command(rich_help_panel=CONTROL)
def promote(
    reference: Annotated[str, typer.Argument(help="TASK:VERSION or TASK@ALIAS.")],
    expect: Expect = None,
    reason: Reason = "",
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Make a version the champion, which answers; its canary has ended then."""
    from pipelines import launch_control

    _say_all(launch_control.promote(workspace, tracking_uri, reference, expect, reason))


@app.command(rich_help_panel=CONTROL)
def rollback(
    task: TaskName,
    to: Annotated[
        int | None, typer.Option(min=1, help="A version; default: the champion before this one.")
    ] = None,
    expect: Expect = None,
    reason: Reason = "",
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Make the version champion again that was it before."""
    from pipelines import launch_control

    _say_all(launch_control.rollback(workspace, tracking_uri, task, to, expect, reason))


@app.command(rich_help_panel=CONTROL)
def canary(
    reference: Challenger,
    share: Annotated[
        float | None, typer.Option(help="Percent of the requests that it answers.")
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End the task's canary.")] = False,
    reason: Reason = "",
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Let a version answer a share of the requests beside the champion."""
    from pipelines import launch_control

    _say_all(launch_control.canary(workspace, tracking_uri, reference, share, stop, reason))


@app.command(rich_help_panel=CONTROL)
def shadow(
    reference: Challenger,
    stop: Annotated[bool, typer.Option("--stop", help="End the task's shadow.")] = False,
    reason: Reason = "",
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Ask a version beside the champion without hearing it, to count where they differ."""
    from pipelines import launch_control

    _say_all(launch_control.shadow(workspace, tracking_uri, reference, stop, reason))


@app.command(rich_help_panel=CONTROL)
def history(
    task: TaskName, tracking_uri: TrackingUri = None, workspace: Workspace = Path()
) -> None:
    """Show who changed what answers a task, when and why; latest first."""
    from pipelines import launch_control

    _say_all(launch_control.history(workspace, tracking_uri, task))


@app.command(rich_help_panel=CONTROL)
def sign(
    reference: Annotated[str, typer.Argument(help="TASK:VERSION.")],
    key: Annotated[Path, typer.Option(help="A private Ed25519 key in PEM.")],
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Sign a registered prompt, for those who pull with --verify-key."""
    from pipelines import launch_control

    _say_all(launch_control.sign(workspace, tracking_uri, reference, key))


@app.command(rich_help_panel=EVERYDAY)
def serve(
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="TASK", help="Default: all with a champion.")
    ] = None,
    host: Annotated[str, typer.Option(help="Any but loopback needs --token-file.")] = "127.0.0.1",
    port: Port = 8000,
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
    store: Annotated[
        Path | None, typer.Option(help="The local store.", show_default=".ptv2/store")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is, if not where it was in training.")
    ] = None,
    precision: Annotated[AnsweringPrecision, typer.Option(help="Of the frozen weights.")] = "auto",
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    engines: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that compute.", show_default="a core each but one"),
    ] = None,
    watch_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds between two looks at the aliases; 0: none.")
    ] = 2.0,
    verify_key: Annotated[
        Path | None, typer.Option(help="A public key; a prompt that is not signed is refused.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="Who may ask: one token a line.", rich_help_panel=LIMITS)
    ] = None,
    admin_token_file: Annotated[
        Path | None, typer.Option(help="Who may reload, likewise.", rich_help_panel=LIMITS)
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Of a request.", rich_help_panel=LIMITS)
    ] = None,
    max_inputs: Annotated[
        int | None, typer.Option(help="Of a request.", rich_help_panel=LIMITS)
    ] = None,
    max_text_chars: Annotated[
        int | None, typer.Option(help="Of each text.", rich_help_panel=LIMITS)
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Requests side by side.", rich_help_panel=LIMITS)
    ] = None,
    max_queue_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows that wait.", rich_help_panel=LIMITS)
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second of one client; 0: any.", rich_help_panel=LIMITS),
    ] = None,
    burst: Annotated[
        int | None, typer.Option(help="Of them at once.", rich_help_panel=LIMITS)
    ] = None,
    timeout_s: Annotated[
        float | None, typer.Option(help="For an answer.", rich_help_panel=LIMITS)
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="For the last answers.", rich_help_panel=LIMITS)
    ] = None,
    refuse_long: Annotated[
        bool, typer.Option("--refuse-long", help="Do not cut texts.", rich_help_panel=LIMITS)
    ] = False,
    log_texts: Annotated[
        bool, typer.Option("--log-texts", help="Log inputs, too.", rich_help_panel=LIMITS)
    ] = False,
) -> None:
    """Serve the registry's prompts over HTTP, all on one backbone; SIGTERM or Ctrl-C ends it."""
    from pipelines import launch_serve

    launch_serve.run(
        tasks or [],
        workspace=workspace,
        tracking_uri=tracking_uri,
        store=store,
        token_file=token_file,
        admin_token_file=admin_token_file,
        serving={
            "host": host, "port": port, "max_body_bytes": max_body_bytes,
            "max_inputs": max_inputs, "max_text_chars": max_text_chars,
            "max_concurrent": max_concurrent, "rate_per_s": rate, "rate_burst": burst,
            "timeout_s": timeout_s, "drain_timeout_s": drain_s, "refuse_long": refuse_long,
            "log_texts": log_texts,
        },
        service={
            "backbone": backbone, "precision": precision, "device": device, "engines": engines,
            "watch_s": watch_s, "public_key": verify_key, "queue_rows": max_queue_rows,
        },
        console=_console(),
    )  # fmt: skip


@app.command(rich_help_panel=EVERYDAY)
def predict(
    prompt: Annotated[Path, typer.Argument(help="A folder with a prompt.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts, or - for JSON lines on standard input.")
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option(help="The second text of each, for tasks on pairs.")
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option("--input", help="A JSON object, where texts do not suffice; may be repeated."),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is, if not where it was in training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
) -> None:
    """Answer texts or other inputs with a prompt: labels, numbers, choices, spans, answers."""
    from pipelines.predict_inputs import read_inputs
    from pipelines.threads import limit_threads
    from ptv2_core.artifact import load_manifest
    from ptv2_core.evaluation.predict import Predictor

    limit_threads()
    inputs = read_inputs(load_manifest(prompt).task, texts or [], pair, given)
    predictor = Predictor.load(prompt, backbone_name=backbone)
    answers = predictor.predict(inputs)
    if as_json or texts == ["-"]:
        for answer in answers:
            typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    from pipelines.console import answers_table

    _console().print(answers_table(inputs, answers))


@app.command("export", rich_help_panel=EVERYDAY)
def export_prompt(
    prompt: Annotated[Path, typer.Argument(help="A folder with a prompt.")],
    peft: Annotated[Path, typer.Option(help="The folder to write, as PEFT reads it.")],
    without_head: Annotated[
        bool, typer.Option("--without-head", help="The prompt alone: PEFT gives hidden states.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="What PEFT shall call the backbone; default: as we do.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is, if not where it was in training.")
    ] = None,
) -> None:
    """Write a prompt as a PEFT adapter (prefix tuning) that gives the same logits."""
    from pipelines import launch_interchange

    _say_all(launch_interchange.export_to_peft(prompt, peft, without_head, base, backbone))


@app.command("import", rich_help_panel=EVERYDAY)
def import_prompt(
    peft: Annotated[Path, typer.Option(help="A folder that PEFT saved: prefix tuning.")],
    task: Annotated[str, typer.Option("--task", "-t", help="The name of the task.")],
    to: Annotated[Path, typer.Option(help="The folder to put the prompt in.")],
    labels: Annotated[
        str | None, typer.Option(help="Its labels in the head's order, with commas between them.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="classification | regression | tagging | qa.")
    ] = None,
    pair: Annotated[bool, typer.Option("--pair", help="Its inputs are two texts.")] = False,
    backbone: Annotated[
        str | None, typer.Option(help="The backbone, if not the one that the adapter names.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The commit of a hub's backbone.")] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row; default: 512, or what there is.")
    ] = None,
    without_head: Annotated[
        bool, typer.Option("--without-head", help="The prompt alone, for train.init_from.")
    ] = False,
) -> None:
    """Make a prompt of a PEFT adapter (prefix tuning)."""
    from pipelines import launch_interchange

    wanted = launch_interchange.Wanted(
        task=task, kind=kind, labels=labels, has_pairs=pair, backbone=backbone, revision=revision,
        max_length=max_length, with_head=not without_head,
    )  # fmt: skip
    _say_all(launch_interchange.import_from_peft(peft, to, wanted))


def _task(workspace: Path, name: str) -> "tuple[TaskSettings, TaskPaths]":
    from pipelines.paths import TaskPaths
    from pipelines.settings import load_settings

    settings = load_settings(workspace / "params.yaml").task(name)
    # A stage runs in its workspace, as under DVC: a backbone's folder is relative to that, too.
    os.chdir(workspace)
    return settings, TaskPaths(root=Path(), task=name)


def _console() -> "Console":
    from rich.console import Console

    # a file or a pipe has no width of its own; the table of results needs some 130 columns
    return Console() if sys.stdout.isatty() else Console(width=140)


def _say(text: str) -> None:
    typer.echo(text)


def _say_all(lines: list[str]) -> None:
    for line in lines:
        _say(line)
