"""The processes that compute: one loads the backbone, the others are forked from it and share it.

They speak over sockets with the process that started them, in messages of plain tuples. A process
ends when its socket is closed, so none outlives the server.
"""

import gc
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from ptv2_core.errors import PTv2Error
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

    def __init__(self, choice: BackboneChoice, *, threads: int, name: str) -> None:
        """Start loading.

        Args:
            choice: The backbone.
            threads: Of each process.
            name: Shown in lists of processes.
        """
        self.control, other = socket.socketpair()
        self.first, engine = socket_pair()
        self.process: SpawnProcess = SpawnContext().Process(
            target=_host, args=(choice, threads, other, engine), name=name, daemon=True
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
    choice: BackboneChoice, threads: int, control: socket.socket, engine: socket.socket
) -> None:
    """Load the backbone, then answer over `engine`; on a CPU in a child, so that others can follow.

    A process that has used CUDA cannot be forked: there, this one answers itself.
    """
    import torch

    # Ctrl-C goes to the whole group; the server ends its processes when it has drained
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # a fork copies no threads: none may exist before it
    torch.set_num_threads(1)
    connection = Connection(engine.detach())
    try:
        backbone = choice.load()
    except PTv2Error as error:
        connection.send(("refused", str(error)))
        return
    if backbone.device.type != "cpu":
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
                "device": str(forward.backbone.device),
                "precision": forward.backbone.number_format,
                "answering_digest": forward.backbone.answering_digest,
            },
        )
    )
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(_reply(forward, message))
        except (BrokenPipeError, ConnectionResetError):
            return


def _reply(forward: Forward, message: tuple[Any, ...]) -> tuple[Any, ...]:
    kind, number, *rest = message
    try:
        if kind == "put":
            slot, folder = rest
            return ("put", number, forward.put(slot, Path(folder)))
        if kind == "drop":
            forward.drop(rest[0])
            return ("dropped", number, None)
        return ("ran", number, forward.run([Row(*row) for row in rest[0]]))
    except PTv2Error as error:
        return ("failed", number, str(error))
    except (RuntimeError, MemoryError) as error:
        # torch says so when memory is short; the process can go on
        return ("failed", number, f"{type(error).__name__}: {str(error).splitlines()[0]}")
