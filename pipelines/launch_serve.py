"""`ptv2 serve`: load what the registry wishes, say where it is, and answer until told to end."""

import asyncio
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.console import progress
from pipelines.threads import available_cores, set_up_torch, threads_by_user
from ptv2_core.config import Device
from ptv2_serving.answering import TaskStatus
from ptv2_serving.http.auth import read_tokens
from ptv2_serving.http.config import ServeConfig
from ptv2_serving.run import listen, new_event_loop, serve

if TYPE_CHECKING:
    from ptv2_serving.opening import Progress, ServiceConfig

STORE = Path(".ptv2") / "store"
# a table of hundreds of tasks tells a person nothing; the page has them all
MOST_TASKS = 30
DIGEST_CHARS = 12


def run(
    tasks: Sequence[str],
    *,
    workspace: Path,
    tracking_uri: str | None,
    store: Path | None,
    token_file: Path | None,
    admin_token_file: Path | None,
    serving: Mapping[str, Any],
    service: Mapping[str, Any],
    console: Console,
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        tasks: Which; none: all that the registry has a champion for.
        workspace: Holds params.yaml, which names the registry, and the local store.
        tracking_uri: The registry, in place of that.
        store: The local store, in place of that of the workspace.
        token_file: Tokens for predictions.
        admin_token_file: Tokens for `/v1/admin/`.
        serving: Fields of `ServeConfig`; those that are None keep their defaults.
        service: Likewise of `ServiceConfig`.
        console: Where to draw.

    Raises:
        PTv2Error: Nothing can be served, or not there; says why.
    """
    config = ServeConfig(
        tokens=frozenset() if token_file is None else read_tokens(token_file),
        admin_tokens=frozenset() if admin_token_file is None else read_tokens(admin_token_file),
        **_given(serving),
    )
    # they load torch and MLflow, which takes seconds: what is wrong above is said before
    from pipelines.launch_control import registry_uri
    from ptv2_serving.opening import ServiceConfig

    set_up_torch(available_cores())
    engines = _engines(service.get("engines"), service.get("device") or "auto")
    chosen = ServiceConfig(
        threads=threads_by_user() or 1,
        tasks=tuple(dict.fromkeys(tasks)),
        tracking_uri=registry_uri(workspace, tracking_uri),
        root=workspace,
        store=store or workspace / STORE,
        **_given({**service, "engines": engines}),
    )
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        try:
            runner.run(_serve(config, chosen, console))
        except asyncio.CancelledError:
            # SIGTERM while it was loading
            raise KeyboardInterrupt from None


def _engines(wanted: int | None, device: Device) -> int:
    """Return how many processes compute.

    Raises:
        BackboneError: The device is not on this machine.
    """
    from ptv2_core.model.backbones.loading import num_cards

    # On a CPU a core is left to HTTP, tokenizers and answers. Two processes of one thread do more
    # than one of two threads, which wait for each other at every small product.
    cards = num_cards(device)
    return wanted or cards or max(1, available_cores() - 1)


async def _serve(config: ServeConfig, chosen: "ServiceConfig", console: Console) -> None:
    from ptv2_serving.opening import open_service

    # bound before the long wait, so that a taken port is known at once; nobody can connect yet
    with listen(config) as listener:
        with _cancelled_by_sigterm(), _drawn(console) as told:
            service, notes = await open_service(chosen, told)
        following = asyncio.create_task(service.follow(chosen.watch_s)) if chosen.watch_s else None

        def tell(address: str) -> None:
            console.print(_tasks_table(service.tasks()))
            for note in notes:
                console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
            console.print(f"listening on {address}", markup=False, highlight=False)
            console.print(f"page         {address}/", markup=False, highlight=False)
            console.print(f"metrics      {address}/metrics", markup=False, highlight=False)

        try:
            await serve(service, config, on_listening=tell, listener=listener)
        finally:
            if following is not None:
                following.cancel()
            await service.close()
    console.print("ended", highlight=False)


@contextmanager
def _cancelled_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the loading as Ctrl-C does: what was started is ended, too."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None, "runs in a task"
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


@contextmanager
def _drawn(console: Console) -> "Iterator[Progress]":
    """Yield what draws a bar on a terminal, and writes a line a step elsewhere."""
    from ptv2_serving.opening import Progress

    with progress("serve", console) as draw:
        what, done, total = "", 0, 1

        def step(words: str, parts: int | None) -> None:
            nonlocal what, done, total
            what, done, total = words, 0, parts or 1
            if console.is_terminal:
                draw(what, done, total)
            else:
                console.print(f"serve: {words}", markup=False, highlight=False)

        def count(name: str) -> None:
            nonlocal done
            done += 1
            draw(f"{what}: {name}", done, total)

        yield Progress(step=step, done=count)


def _tasks_table(tasks: Sequence[TaskStatus]) -> Table:
    table = Table(title="Loaded prompts", title_justify="left")
    for header in ("task", "kind", "version", "digest", "canary", "shadow", "tokens"):
        table.add_column(header, justify="right" if header in ("version", "tokens") else "left")
    for task in tasks[:MOST_TASKS]:
        canary = f"{task.canary.version} ({task.canary_share:g} %)" if task.canary else "-"
        shadow = str(task.shadow.version) if task.shadow else "-"
        prompt = task.champion
        cells = (
            task.spec.name,
            task.spec.kind,
            str(prompt.version),
            prompt.digest[:DIGEST_CHARS],
            canary,
            shadow,
            str(task.max_length),
        )
        table.add_row(*map(Text, cells))
    if len(tasks) > MOST_TASKS:
        table.caption = f"and {len(tasks) - MOST_TASKS} more"
    return table


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
