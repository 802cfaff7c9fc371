"""DVC: the stage graph, one stage at a time, and what DVC knows about data. Only DVC is here.

The graph is DVC's own resolution of dvc.yaml. Stages run through DVC's command line, in processes
of their own: that is what lets independent stages run side by side, and DVC's Python API changes
the working folder and signal handlers of its process.
"""

import getpass
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import guarded
from pipelines.dvc_output import OnLine, Output, failure, follow
from pipelines.errors import PipelineError, StageInterruptedError, TemporaryError
from pipelines.settings import set_environment_defaults

if TYPE_CHECKING:
    from dvc.repo import Repo

SEPARATOR = "@"


@dataclass(frozen=True, kw_only=True)
class StageNode:
    """One stage of one task.

    Attributes:
        address: What DVC calls it, as in `train@rte`.
        stage: The stage.
        task: The task.
        upstream: Addresses of the stages whose outs it reads.
        command: Its command line.
    """

    address: str
    stage: str
    task: str
    upstream: tuple[str, ...]
    command: str


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """The stages by address, each after those it depends on."""

    nodes: Mapping[str, StageNode] = field(default_factory=dict)

    def select(self, tasks: Collection[str]) -> "StageGraph":
        """Return the stages of some tasks, and whatever these depend on.

        Raises:
            PipelineError: For a task without stages.
        """
        known = list(dict.fromkeys(node.task for node in self.nodes.values()))
        for task in tasks:
            if task not in known:
                raise PipelineError(
                    f"expected a task of dvc.yaml ({', '.join(known)}), got {task!r}"
                )
        wanted = {address for address, node in self.nodes.items() if node.task in tasks}
        for address in reversed(list(self.nodes)):
            if address in wanted:
                wanted.update(self.nodes[address].upstream)
        return StageGraph(nodes={a: node for a, node in self.nodes.items() if a in wanted})

    def downstream(self, addresses: Iterable[str]) -> set[str]:
        """Return the given stages and all that depend on them."""
        found = set(addresses)
        for address, node in self.nodes.items():
            if found.intersection(node.upstream):
                found.add(address)
        return found


@dataclass(frozen=True, kw_only=True)
class ReproResult:
    """What `dvc repro` did about one stage.

    Attributes:
        address: The stage.
        ran: Whether its command ran.
        cached: Whether its outs came from an earlier run with the same inputs instead.
        seconds: How long it took.
    """

    address: str
    ran: bool
    cached: bool
    seconds: float


def read_graph(root: Path) -> StageGraph:
    """Read the stage graph of a workspace.

    Args:
        root: The folder of dvc.yaml.

    Raises:
        PipelineError: If there is no DVC repository or its files are wrong.
    """
    from dvc.exceptions import DvcException

    if not (root / "dvc.yaml").is_file():
        raise PipelineError(f"expected a stage graph at {root / 'dvc.yaml'}, found no such file")
    try:
        with _opened(root) as repo:
            graph = repo.index.graph
            # Files under `dvc add` are in the graph too, without a command.
            stages = {stage: str(stage.name) for stage in repo.index.stages if stage.cmd}
            upstream = {
                name: [stages[above] for above in graph[stage] if above in stages]
                for stage, name in stages.items()
            }
            commands = {name: str(stage.cmd) for stage, name in stages.items()}
    except DvcException as error:
        raise PipelineError(f"DVC cannot read the stages of {root}: {_reason(error)}") from error
    nodes: dict[str, StageNode] = {}
    for address in _topological(upstream):
        stage, _, task = address.partition(SEPARATOR)
        nodes[address] = StageNode(
            address=address,
            stage=stage,
            task=task,
            upstream=tuple(sorted(upstream[address])),
            command=commands[address],
        )
    return StageGraph(nodes=nodes)


def _reason(error: BaseException) -> str:
    """Join an exception's message with those of its causes; DVC puts the useful one last."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = str(current).strip()
        if text and text not in parts:
            parts.append(text)
        current = current.__cause__
    return ": ".join(parts)


def _topological(upstream: Mapping[str, list[str]]) -> list[str]:
    """Order addresses so that each follows its upstream, otherwise as in dvc.yaml."""
    done: dict[str, None] = {}
    while len(done) < len(upstream):
        for address, above in upstream.items():
            if address not in done and done.keys() >= set(above):
                done[address] = None
    return list(done)


def stale(root: Path, graph: StageGraph, environment: Mapping[str, str]) -> set[str]:
    """Return the stages that would run: those that changed, and all that depend on them.

    Args:
        root: The workspace.
        graph: Its stages, or a selection of them.
        environment: Of the DVC process.

    Raises:
        PipelineError: If DVC cannot tell.
    """
    done = _dvc(["status", "--json", *graph.nodes], root, environment)
    if done.returncode != 0:
        raise PipelineError(f"`dvc status` failed: {done.stderr.strip()}")
    changed = json.loads(done.stdout.strip().splitlines()[-1])
    return graph.downstream(set(changed) & set(graph.nodes))


def source_digests(root: Path, addresses: Collection[str]) -> dict[str, str]:
    """Return a digest of all that each stage reads now, as its files and parameters are.

    Args:
        root: The workspace.
        addresses: Stages; those that dvc.yaml does not have are left out.

    Raises:
        PipelineError: DVC cannot read the workspace.
    """
    from dvc.exceptions import DvcException

    try:
        with _opened(root) as repo:
            return {
                str(stage.name): _digest(stage.deps)
                for stage in repo.index.stages
                if stage.cmd and str(stage.name) in addresses
            }
    except DvcException as error:
        raise PipelineError(f"DVC cannot read the stages of {root}: {_reason(error)}") from error


def _opened(root: Path) -> "Repo":
    """Open a workspace. DVC asks who runs it, and a container's user may have no name."""
    from dvc.repo import Repo

    try:
        getpass.getuser()
    except (KeyError, OSError):  # as Python says it before and since 3.13
        set_environment_defaults({"USER": f"uid-{os.getuid()}"})
    return Repo(str(root))


def _digest(deps: Iterable[Any]) -> str:
    """Hash deps; one that is not there, or lacks a parameter, counts as such."""
    from dvc.exceptions import DvcException

    found: dict[str, Any] = {}
    for dep in deps:
        try:
            found[str(dep)] = dep.get_hash().value
        except (DvcException, OSError) as error:
            found[str(dep)] = str(error)
    text = json.dumps(found, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def repro(
    address: str,
    root: Path,
    environment: Mapping[str, str],
    *,
    on_line: OnLine = lambda stream, line: None,
    stop: threading.Event | None = None,
) -> ReproResult:
    """Bring one stage up to date; its upstream must be already.

    When the command fails, DVC has removed the stage's outs before it ran: the last good ones are
    put back from the cache.

    Args:
        address: The stage.
        root: The workspace.
        environment: Of the DVC process and the stage's command.
        on_line: Called with each line that the stage's command writes.
        stop: Once set, the stage is interrupted.

    Raises:
        StageTemporaryError: After a lock that is held, or when the command says it may try again.
        StageInterruptedError: After `stop`.
        StageFailedError: After any other failure, with the last lines the command wrote.
    """
    started = time.monotonic()
    output = Output()
    command = [*_DVC, "repro", "--single-item", address]
    process = guarded.start(command, cwd=root, environment={**environment, **_QUIET})
    interrupted = follow(process, output, on_line, stop or threading.Event())
    if process.returncode == 0 and not interrupted:
        return ReproResult(
            address=address,
            ran=output.started,
            cached=output.cached,
            seconds=time.monotonic() - started,
        )
    if output.started and address in _locked_stages(root):
        _dvc(["checkout", "--force", address], root, environment)
    if interrupted:
        raise StageInterruptedError(address, "was interrupted")
    raise failure(address, output)


# The repository's lock is held for moments only, between commands, so waiting for it is right. A
# conflict over the same files is another lock, and is reported at once.
_DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
_QUIET = {"DVC_NO_ANALYTICS": "true", "PYTHONUNBUFFERED": "1"}


def bring_up_to_date(
    root: Path,
    tasks: Sequence[str],
    stages: Collection[str],
    environment: Mapping[str, str],
    on_stage: Callable[[str], None] = lambda address: None,
) -> None:
    """Run the stages of some names that are out of date, as `dvc repro` does.

    Args:
        root: The workspace.
        tasks: Whose.
        stages: Their names, such as `prepare`.
        environment: Of the commands.
        on_stage: Called with the address of each that is run.

    Raises:
        PipelineError: The graph cannot be read, or a stage failed.
    """
    graph = read_graph(root).select(tasks)
    old = stale(root, graph, environment)
    for address, node in graph.nodes.items():
        if node.stage in stages and address in old:
            on_stage(address)
            repro(address, root, environment)


def _dvc(
    arguments: list[str], root: Path, environment: Mapping[str, str]
) -> "subprocess.CompletedProcess[str]":
    """Run a short DVC command to its end."""
    return subprocess.run(
        [*_DVC, *arguments],
        cwd=root,
        env={**environment, **_QUIET},
        capture_output=True,
        text=True,
        check=False,
    )


def clear_dead_locks(root: Path) -> None:
    """Remove what killed processes left in DVC's table of files in use.

    DVC forgets entries of process ids that are gone, but not of ids that another process has got
    since (in a container they are few), nor does it read a table that was cut off in the middle of
    a write; either would block every later run.

    Raises:
        TemporaryError: If another process is writing the table.
    """
    from dvc.lock import LockError, make_lock

    table = root / ".dvc" / "tmp" / "rwlock"
    if not table.is_file():
        return
    try:
        with make_lock(str(table.with_name("rwlock.lock")), tmp_dir=str(table.parent)):
            _rewrite_without_dead(table)
    except LockError as error:
        raise TemporaryError(f"another DVC process holds {table}: {error}") from error


def _rewrite_without_dead(table: Path) -> None:
    try:
        entries: dict[str, Any] = json.loads(table.read_text(encoding="utf-8"))
        writers = {p: info for p, info in entries.get("write", {}).items() if _is_alive(info)}
        readers = {
            path: alive
            for path, infos in entries.get("read", {}).items()
            if (alive := [info for info in infos if _is_alive(info)])
        }
    except (ValueError, TypeError, AttributeError, KeyError):
        table.unlink()
        return
    table.write_text(json.dumps({"write": writers, "read": readers}), encoding="utf-8")


def _is_alive(info: Mapping[str, Any]) -> bool:
    """Tell whether the process of an entry still runs the command it had then."""
    pid = int(info["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is there, but another user's; what it runs can be seen all the same
    shown = Path(f"/proc/{pid}/cmdline")
    if not shown.is_file():
        return True
    running = shown.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return all(words in running for words in str(info["cmd"]).split(maxsplit=1)[1:])


def data_hashes(root: Path, address: str) -> dict[str, str]:
    """Return the MD5 of each dep and out of a stage, as dvc.lock has them; empty before its run."""
    entry = _locked_stages(root).get(address, {})
    items = [*entry.get("deps", []), *entry.get("outs", [])]
    return {item["path"]: item["md5"] for item in items if "md5" in item}


def _locked_stages(root: Path) -> dict[str, Any]:
    from dvc.exceptions import DvcException
    from dvc.utils.serialize import load_yaml

    path = root / "dvc.lock"
    if not path.is_file():
        return {}
    try:
        content = load_yaml(str(path))
    except DvcException as error:
        raise PipelineError(f"cannot read {path}: {_reason(error)}") from error
    stages: dict[str, Any] = (content or {}).get("stages") or {}
    return stages


def git_commit(root: Path) -> dict[str, Any]:
    """Return the workspace's commit, and whether tracked files differ from it.

    dvc.lock does not count: a run writes it as it goes.
    """
    commit = _git(["rev-parse", "HEAD"], root)
    if commit is None:
        return {"commit": None, "dirty": False}
    changes = _git(
        ["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)dvc.lock"], root
    )
    return {"commit": commit, "dirty": bool(changes)}


def _git(arguments: list[str], root: Path) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
