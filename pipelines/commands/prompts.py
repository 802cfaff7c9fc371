"""Commands on finished prompts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import (
    EVERYDAY,
    LIMITS,
    Port,
    TrackingUri,
    Workspace,
    make_console,
    say,
    say_all,
)
from ptv2_core.config import Device, Precision

commands = typer.Typer()


@commands.command(rich_help_panel=EVERYDAY)
def pull(
    reference: Annotated[str, typer.Argument(help="TASK, TASK@ALIAS or TASK:VERSION.")],
    to: Annotated[Path, typer.Option(help="The folder to put the prompt in.")],
    backbone: Annotated[
        str | None, typer.Option(help="Where the backbone is, if not where it was in training.")
    ] = None,
    tracking_uri: TrackingUri = None,
    verify_key: Annotated[
        Path | None, typer.Option(help="A public key; a prompt that is not signed is refused.")
    ] = None,
    workspace: Workspace = Path(),
) -> None:
    """Download a registered prompt and verify it on its backbone."""
    from pipelines.launch_control import registry_uri
    from pipelines.threads import set_up_torch
    from ptv2_serving import signing, store

    set_up_torch()
    pulled = store.pull(
        reference,
        to,
        tracking_uri=registry_uri(workspace, tracking_uri),
        root=workspace,
        backbone_name=backbone,
        public_key=None if verify_key is None else signing.read_public_key(verify_key),
    )
    say(
        f"pulled {pulled.manifest.task.name} version {pulled.version} to {pulled.path}: "
        f"{pulled.manifest.size_bytes:,} bytes, sha256 and golden inputs verified"
    )


@commands.command(rich_help_panel=EVERYDAY)
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
    precision: Annotated[Precision, typer.Option(help="Of the frozen weights.")] = "auto",
    device: Annotated[Device, typer.Option(help="Where to compute.")] = "auto",
    engines: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that compute.", show_default="a GPU each, or a core each but one"
        ),
    ] = None,
    token_budget: Annotated[
        int | None,
        typer.Option(min=1, help="Padded tokens of a batch at most.", show_default="1024"),
    ] = None,
    batch_rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a batch at most.", show_default="64")
    ] = None,
    warm: Annotated[
        int | None,
        typer.Option(min=0, help="Previous versions that stay loaded.", show_default="1"),
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
            "token_budget": token_budget, "batch_rows": batch_rows, "warm": warm,
        },
        console=make_console(),
    )  # fmt: skip


@commands.command(rich_help_panel=EVERYDAY)
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
    from pipelines.threads import set_up_torch
    from ptv2_core.evaluation.predict import Predictor
    from ptv2_core.manifest import load_manifest

    set_up_torch()
    inputs = read_inputs(load_manifest(prompt).task, texts or [], pair, given)
    predictor = Predictor.load(prompt, backbone_name=backbone)
    answers = predictor.predict(inputs)
    if as_json or texts == ["-"]:
        for answer in answers:
            typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    from pipelines.console import answers_table

    make_console().print(answers_table(inputs, answers))


@commands.command("export", rich_help_panel=EVERYDAY)
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

    say_all(launch_interchange.export_to_peft(prompt, peft, without_head, base, backbone))


@commands.command("import", rich_help_panel=EVERYDAY)
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
    say_all(launch_interchange.import_from_peft(peft, to, wanted))
