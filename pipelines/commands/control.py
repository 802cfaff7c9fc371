"""Commands that say which version answers."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.shared import (
    CONTROL,
    Challenger,
    Expect,
    Reason,
    TaskName,
    TrackingUri,
    Workspace,
    say_all,
)

commands = typer.Typer()


@commands.command(rich_help_panel=CONTROL)
def promote(
    reference: Annotated[str, typer.Argument(help="TASK:VERSION or TASK@ALIAS.")],
    expect: Expect = None,
    reason: Reason = "",
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Make a version the champion, which answers; its canary has ended then."""
    from pipelines import launch_control

    say_all(launch_control.promote(workspace, tracking_uri, reference, expect, reason))


@commands.command(rich_help_panel=CONTROL)
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

    say_all(launch_control.rollback(workspace, tracking_uri, task, to, expect, reason))


@commands.command(rich_help_panel=CONTROL)
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

    say_all(launch_control.canary(workspace, tracking_uri, reference, share, stop, reason))


@commands.command(rich_help_panel=CONTROL)
def shadow(
    reference: Challenger,
    stop: Annotated[bool, typer.Option("--stop", help="End the task's shadow.")] = False,
    reason: Reason = "",
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Ask a version beside the champion without hearing it, to count where they differ."""
    from pipelines import launch_control

    say_all(launch_control.shadow(workspace, tracking_uri, reference, stop, reason))


@commands.command(rich_help_panel=CONTROL)
def history(
    task: TaskName, tracking_uri: TrackingUri = None, workspace: Workspace = Path()
) -> None:
    """Show who changed what answers a task, when and why; latest first."""
    from pipelines import launch_control

    say_all(launch_control.history(workspace, tracking_uri, task))


@commands.command(rich_help_panel=CONTROL)
def sign(
    reference: Annotated[str, typer.Argument(help="TASK:VERSION.")],
    key: Annotated[Path, typer.Option(help="A private Ed25519 key in PEM.")],
    tracking_uri: TrackingUri = None,
    workspace: Workspace = Path(),
) -> None:
    """Sign a registered prompt, for those who pull with --verify-key."""
    from pipelines import launch_control

    say_all(launch_control.sign(workspace, tracking_uri, reference, key))
