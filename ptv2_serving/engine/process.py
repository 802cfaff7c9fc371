"""The processes that compute: one loads the backbone, the others are forked from it and share it.

A process that has used a GPU cannot be forked: there, each loads the backbone for itself.

They speak over sockets with the process that started them, in messages of plain tuples. A process
ends when its socket is closed, so none outlives the server.
"""

import gc
import os
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from ptv2_core.errors import PTv2Error
from ptv2_core.machine import keep_freed_memory
from ptv2_serving.engine.forward import BackboneChoice, Forward, Row

# what a socket holds of a batch that waits for its turn, so that sending never blocks
SEND_BUFFER = 1 << 20
FORK = b"f"


def socket_pair() -> tuple[Connection, socket.socket]:
    """Return one end for this process, and one for another."""
    mine, other = socket.socketpair()
    for end in (mine, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    return Connection(mine.detach()), other


class Host:
    """The process that loaded the backbone, seen from the server."""

    def __init__(
        self, choice: BackboneChoice, *, threads: int, name: str, card: int | None
    ) -> None:
        """Start loading.

        Args:
            choice: The backbone.
            threads: Of each process.
            name: Shown in lists of processes.
            card: Number of the GPU on which it answers itself; None: its children do, on the CPU.
        """
        self.control, other = socket.socketpair()
        self.first, engine = socket_pair()
        self.process: SpawnProcess = SpawnContext().Process(
            target=_host, args=(choice, threads, card, other, engine), name=name, daemon=True
        )
        self.process.start()
        other.close()
        engine.close()

    def fork(self) -> Connection:
        """Start another process on the same backbone; its first message tells that it is ready.

        Raises:
            OSError: The process that loaded the backbone has ended.
        """
        mine, other = socket_pair()
        with other:
            socket.send_fds(self.control, [FORK], [other.fileno()])
        return mine

    def end(self, timeout_s: float = 5.0) -> None:
        """Close the sockets, wait for the process, and kill it if it stays."""
        self.control.close()
        self.process.join(timeout_s)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _host(
    choice: BackboneChoice,
    threads: int,
    card: int | None,
    control: socket.socket,
    engine: socket.socket,
) -> None:
    """Load the backbone, then answer over `engine`; on a CPU in children, so that others follow."""
    import torch

    # Ctrl-C goes to the whole group; the server ends its processes when it has drained
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    keep_freed_memory()
    # a fork copies no threads: none may exist before it
    torch.set_num_threads(1)
    connection = Connection(engine.detach())
    try:
        backbone = choice.load(card)
    except PTv2Error as error:
        connection.send(("refused", str(error)))
        return
    if card is not None:
        control.close()
        _answer(connection, lambda: Forward(backbone), threads)
        return
    gc.freeze()  # what is shared stays unwritten, and so shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that end leave nothing behind
    if os.fork() == 0:
        control.close()
        _child(connection, lambda: Forward(backbone), threads)
    connection.close()
    while True:
        message, files, *_ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        child = Connection(files[0])
        if os.fork() == 0:
            control.close()
            _child(child, lambda: Forward(backbone), threads)
        child.close()


def _child(connection: Connection, make: Callable[[], Forward], threads: int) -> None:
    status = 1
    try:
        _answer(connection, make, threads)
        status = 0
    finally:
        # not sys.exit: what the parent registered to run at its end is not this one's
        os._exit(status)


def _answer(connection: Connection, make: Callable[[], Forward], threads: int) -> None:
    """Serve until the server closes its end."""
    import torch

    torch.set_num_threads(threads)
    forward = make()
    spec = forward.backbone.spec
    connection.send(
        (
            "ready",
            os.getpid(),
            {
                "name": spec.name,
                "digest": spec.digest,
                "device": forward.backbone.device.type,
                "precision": forward.backbone.number_format,
                "answering_digest": forward.backbone.answering_digest,
            },
        )
    )
    inbox: deque[tuple[Any, ...]] = deque()
    while True:
        try:
            while not inbox or connection.poll():
                inbox.append(connection.recv())
        except (EOFError, OSError):
            return
        try:
            connection.send(_reply(forward, _next(inbox)))
        except (BrokenPipeError, ConnectionResetError):
            return


def _next(inbox: deque[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Take the next message: prompts before batches, so that a swap waits for one at most.

    A row whose prompt has gone by then is one that nobody waits for.
    """
    place = next((at for at, message in enumerate(inbox) if message[0] != "run"), 0)
    message = inbox[place]
    del inbox[place]
    return message


def _reply(forward: Forward, message: tuple[Any, ...]) -> tuple[Any, ...]:
    kind, number, *rest = message
    try:
        if kind == "put":
            slot, folder, batches = rest
            size = forward.put(slot, Path(folder))
            return ("put", number, (size, [own for rows in batches for own in _run(forward, rows)]))
        if kind == "fill":
            return ("filled", number, _fill(forward, rest[0]))
        if kind == "drop":
            forward.drop(rest[0])
            return ("dropped", number, None)
        return ("ran", number, _run(forward, rest[0]))
    except Exception as error:
        # whatever a row or a prompt did, torch and the process can go on
        return ("failed", number, _words(error))


def _run(forward: Forward, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return each row's logits; None where its slot has no prompt."""
    named = [Row(*row) for row in rows]
    known = [row for row in named if forward.holds(row.slot)]
    found = iter(forward.run(known) if known else ())
    return [next(found) if forward.holds(row.slot) else None for row in named]


def _fill(forward: Forward, folders: Sequence[tuple[int, str]]) -> dict[int, str]:
    """Load many prompts; return what is wrong with those that could not be, by slot."""
    problems = {}
    for slot, folder in folders:
        try:
            forward.put(slot, Path(folder))
        except Exception as error:
            # the others still answer
            problems[slot] = _words(error)
    return problems


def _words(error: Exception) -> str:
    if isinstance(error, PTv2Error):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
