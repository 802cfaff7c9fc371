"""Sweeps as real processes that are killed: coordinators and hosts, forked from one that is warm.

A host imports for seconds and trains for tenths. So one process imports everything and forks each
coordinator, which forks its hosts. They are processes like those of `ptv2 sweep` in all that a
signal, a limit or a lock can tell: sessions, pipes, folders and exit codes. Sweeps in the process
of the tests can have their hosts forked from it too.
"""

import functools
import importlib
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil
import sqlalchemy

from pipelines.settings import child_environment
from pipelines.sweep import hosts
from pipelines.sweep.job import Job
from pipelines.sweep.record import SweepRecord
from pipelines.sweep.urls import with_driver
from pipelines.threads import thread_environment
from tests.pipelines.processes import environment, processes

PATIENCE_S = 120.0
COLD_START = hosts._start
ROW_BYTES = 1 << 26
"""What a row of a batch takes in a host whose memory is limited, so that a batch may not fit."""


class Coordinator:
    """A sweep of `intents` in a process of its own."""

    def __init__(self, nursery: "Nursery", root: Path, pid: int) -> None:
        """Name a process that the nursery started."""
        self._nursery = nursery
        self._root = root
        self.pid = pid

    @property
    def said(self) -> str:
        """What it wrote, on either stream."""
        return _log(self._root).read_text(encoding="utf-8")

    def hosts(self) -> list[int]:
        """Return its hosts, the oldest first."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid).children()
            return [one.pid for one in sorted(found, key=lambda one: one.create_time())]
        return []

    def code(self) -> int | None:
        """Return its exit code, a signal as a negative number; None while it runs."""
        code: int | None = self._nursery.ask(do="poll", pid=self.pid)
        return code

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for its end; returns its exit code."""
        self.wait_until(lambda: self.code() is not None, patience_s)
        code = self.code()
        assert code is not None
        return code

    def wait_until(self, condition: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        """Wait until something holds; fails where it takes too long."""
        deadline = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < deadline, f"still waiting\n{self.said}"
            time.sleep(0.005)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal; one that is gone is left alone."""
        if self.code() is None:
            os.kill(self.pid, number)

    def record(self) -> SweepRecord:
        """Return what it found, once it has ended well."""
        assert self.wait() == 0, self.said
        return SweepRecord.from_mapping(json.loads(_record(self._root).read_text()))


class Hatchling:
    """A host that the nursery forked, as far as `hosts` uses a Popen."""

    def __init__(self, nursery: "Nursery", pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        """Name a process, and hold the other ends of its pipes."""
        self._nursery = nursery
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout

    def poll(self) -> int | None:
        """Return its exit code, a signal as a negative number; None while it runs."""
        code: int | None = self._nursery.ask(do="poll", pid=self.pid)
        return code

    def kill(self) -> None:
        """Kill it; one that is gone is left alone."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; returns its exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code


class Nursery:
    """The process that forks coordinators, and hosts of coordinators elsewhere."""

    def __init__(self, root: Path, log: Path) -> None:
        """Start it, with the backbone of a workspace imported."""
        self._lock = threading.Lock()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.pipelines.fault_parts", str(root)],
                cwd=Path(__file__).resolve().parents[2],
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "null\n", log.read_text()

    def start(
        self,
        root: Path,
        *,
        file_limit: int | None = None,
        host_file_limit: int | None = None,
        host_memory: int | None = None,
        finish: bool = False,
        **changes: Any,
    ) -> Coordinator:
        """Start a sweep.

        Args:
            root: The prepared workspace.
            file_limit: Bytes of the largest file that the coordinator can write.
            host_file_limit: The same of its hosts.
            host_memory: Bytes that a host can take further; a row of a batch then takes ROW_BYTES.
            finish: Whether it also writes the results and logs them to MLflow.
            changes: To `sweep`.
        """
        pid = self.ask(
            do="start",
            root=str(root),
            file_limit=file_limit,
            host_file_limit=host_file_limit,
            host_memory=host_memory,
            finish=finish,
            changes=changes,
        )
        return Coordinator(self, root, pid)

    def ask(self, **order: Any) -> Any:
        """Give an order and return the answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())

    @contextmanager
    def hatching(self) -> Iterator[None]:
        """Have the hosts of this process's sweeps forked, which costs them no imports."""
        before = hosts._start
        hosts._start = self._hatch  # type: ignore[assignment]
        try:
            yield
        finally:
            hosts._start = before

    def _hatch(self, module: str, job: Job) -> Hatchling:
        orders, words = os.pipe(), os.pipe()
        ours = f"/proc/{os.getpid()}/fd"
        pid = self.ask(
            do="hatch",
            module=module,
            root=job.root,
            variables=child_environment(defaults=thread_environment(job.workers)),
            stdin=f"{ours}/{orders[0]}",
            stdout=f"{ours}/{words[1]}",
        )
        os.close(orders[0])
        os.close(words[1])
        stdin, stdout = os.fdopen(orders[1], "w"), os.fdopen(words[0])
        return Hatchling(self, pid, stdin, stdout)

    def end(self) -> None:
        """End it."""
        self._process.communicate(timeout=PATIENCE_S)


@contextmanager
def nursery(root: Path, log: Path) -> Iterator[Nursery]:
    """Yield a nursery that is warm."""
    made = Nursery(root, log)
    try:
        yield made
    finally:
        made.end()


def database(root: Path) -> Path:
    """Return where the studies of a workspace are."""
    return root / ".ptv2" / "sweeps.db"


def rows(place: Path | str, query: str) -> list[Any]:
    """Return what the studies' database answers; nothing while there is none, or it is locked.

    Args:
        place: A workspace, whose database is SQLite; or the URL of another one.
        query: In SQL.
    """
    if isinstance(place, str):
        engine = sqlalchemy.create_engine(with_driver(place), poolclass=sqlalchemy.NullPool)
        # before the first study there is no table
        with suppress(sqlalchemy.exc.ProgrammingError), engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query))]
        return []
    if not database(place).exists():
        return []
    file = f"file:{database(place)}?mode=rw"
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(file, uri=True)) as connection,
    ):
        return connection.execute(query).fetchall()
    return []


def running_trials(place: Path | str) -> list[int]:
    """Return the trials that train; see `rows`."""
    return [number for (number,) in rows(place, "SELECT number FROM trials WHERE state='RUNNING'")]


def ended_trials(place: Path | str) -> int:
    """Return how many trials have ended; see `rows`."""
    return len(rows(place, "SELECT 1 FROM trials WHERE state NOT IN ('RUNNING', 'WAITING')"))


def check_is_quiet(root: Path, patience_s: float = PATIENCE_S) -> None:
    """Check that no process is left in a workspace; those that have lost their sweep soon end."""
    deadline = time.monotonic() + patience_s
    while left := processes(root):
        assert time.monotonic() < deadline, f"left over: {left}"
        time.sleep(0.02)


def litter(root: Path) -> list[str]:
    """Return files that only a process that was cut off leaves."""
    return sorted(
        str(path.relative_to(root))
        for place in (root / ".ptv2", root / "results")
        for path in place.rglob("*")
        if path.suffix in (".tmp", ".old", ".safetensors") or path.name.startswith(".")
    )


def _log(root: Path) -> Path:
    return root.with_name(f"{root.name}.log")


def _record(root: Path) -> Path:
    return root.with_name(f"{root.name}.json")


# What runs in the nursery and below

HOSTS = ("pipelines.sweep.host", "pipelines.sweep.stack_host")


def _limit_files(size_bytes: int | None) -> None:
    """Set or lift a limit; the hard one stays, so that children may differ."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size_bytes is None else size_bytes, hard))


def _limit_memory(further_bytes: int) -> None:
    """Let this process take so much more, and every row of a batch much of it."""
    import torch

    from pipelines.sweep.host import Trainer
    from pipelines.sweep.job import Job

    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + further_bytes, now + further_bytes))
    train = Trainer.train

    def hungry(self: Trainer, job: Job) -> Iterator[tuple[int, float]]:
        rows = torch.empty(self.config(job).batch_size * ROW_BYTES, dtype=torch.uint8)
        yield from train(self, job)
        del rows

    Trainer.train = hungry  # type: ignore[method-assign]


def _as_started() -> None:
    """Take signals as a fresh Python does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


def _be_host(module: str, variables: Mapping[str, str], order: Mapping[str, Any]) -> NoReturn:
    """Be a host: pipes and folder are those of a child that is about to start its program."""
    code = 1
    try:
        # the pipe that tells the parent that the program has started is among them
        os.closerange(3, 1024)
        _as_started()
        _limit_files(order["host_file_limit"])
        if order["host_memory"] is not None:
            _limit_memory(order["host_memory"])
        os.environ.clear()
        os.environ.update(variables)
        sys.stdin = os.fdopen(0, encoding="utf-8")
        importlib.import_module(module).main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _coordinate(order: Mapping[str, Any]) -> int:
    """Sweep; returns the exit code, as the command line would."""
    from pipelines.settings import load_settings
    from pipelines.sweep import finishing
    from ptv2_core.errors import PTv2Error
    from ptv2_core.files import write_json_atomic
    from tests.pipelines.sweep_engine import run_sweep

    root = Path(order["root"])
    start = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        if command[-1] not in HOSTS:
            return start(command, **options)
        hatch = functools.partial(_be_host, command[-1], dict(options["env"]), order)
        return start(command, preexec_fn=hatch, **options)

    hosts.subprocess.Popen = popen  # type: ignore[misc, assignment]
    _limit_files(order["file_limit"])
    try:
        record = run_sweep(root, **order["changes"])
        if order["finish"]:
            finishing.finish(load_settings(root / "params.yaml"), record)
    except PTv2Error as error:
        print(f"error: {error}", flush=True)
        return 2
    write_json_atomic(_record(root), asdict(record))
    return 0


def _hatch(order: Mapping[str, Any]) -> int:
    stdin, stdout = os.open(order["stdin"], os.O_RDONLY), os.open(order["stdout"], os.O_WRONLY)
    pid = os.fork()
    if pid:
        os.close(stdin)
        os.close(stdout)
        return pid
    os.setsid()
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.chdir(order["root"])
    _be_host(order["module"], order["variables"], {"host_file_limit": None, "host_memory": None})


def _fork(order: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(_log(Path(order["root"])), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, to in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
            os.dup2(number, to)
        os.closerange(3, 1024)
        os.chdir(order["root"])
        _as_started()
        code = _coordinate(order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _warm(root: Path, work: Callable[[Path], None]) -> None:
    """Import what some work imports; a child finds out what that is."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.dup2(2, 1)
            work(root)
            names = [name for name, found in list(sys.modules.items()) if found is not None]
            os.write(writer, json.dumps(names).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        names = json.loads(stream.read())
    os.waitpid(pid, 0)
    for name in names:
        if name not in sys.modules:
            with suppress(ImportError, AttributeError):
                importlib.import_module(name)


def _train_once(root: Path) -> None:
    """Do what a host does."""
    from pipelines.settings import load_settings
    from pipelines.sweep.host import Trainer

    os.chdir(root)
    settings = load_settings(root / "params.yaml")
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            params_file="", root=str(root), task="intents", params={}, checkpoint=f"{folder}/c"
        )
        for _ in Trainer(settings.task("intents"), root).train(job):
            pass


def _finish_once(root: Path) -> None:
    """Do what a coordinator does besides."""
    import tests.pipelines.sweep_engine  # noqa: F401
    from pipelines.settings import load_settings
    from pipelines.sweep import finishing
    from tests.pipelines.sweep_parts import sweep, trial

    os.chdir(root)
    settings = load_settings(root / "params.yaml")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(root / "mlflow.db", folder)
        finishing.finish(
            replace(settings, path=Path(folder) / "params.yaml"), sweep(trial(0), trial(1))
        )


def main() -> None:
    """Fork coordinators until standard input ends."""
    orders, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    root = Path(sys.argv[1])
    _warm(root, _train_once)
    coordinates = False
    ended: dict[int, int | None] = {}
    answers.write("null\n")
    answers.flush()
    while line := orders.readline():
        order = json.loads(line)
        if order["do"] in ("start", "hatch"):
            if order["do"] == "start" and not coordinates:
                # for hosts alone nobody need wait so long
                _warm(root, _finish_once)
                coordinates = True
            answer: int | None = (_fork if order["do"] == "start" else _hatch)(order)
            ended[answer or 0] = None
        else:
            pid = order["pid"]
            if ended[pid] is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                ended[pid] = os.waitstatus_to_exitcode(status) if found else None
            answer = ended[pid]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid, code in ended.items():
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    os._exit(0)  # taking all that was imported down takes seconds


if __name__ == "__main__":
    main()
