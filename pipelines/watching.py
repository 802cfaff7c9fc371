"""Which tasks have sources that changed, and for which of them a run is due.

DVC knows what changed since a task was last fetched well. What it does not know is what a run made
of it: a source that cannot be read stays changed. So each look that gives a task to a run notes
what the sources were, and the same sources are tried again only after a while.
"""

import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines import dag
from pipelines.settings import child_environment
from ptv2_core.files import write_json_atomic

FILE = Path(".ptv2") / "watch.json"
STAGE = "fetch"
# a hub may have been away; a file that is wrong changes when it is mended
RETRY_AFTER_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a look at the sources found.

    Attributes:
        changed: A digest of the sources of each task where something changed.
        due: The tasks among them to run now.
    """

    changed: Mapping[str, str]
    due: tuple[str, ...]

    @property
    def tried(self) -> tuple[str, ...]:
        """The tasks that changed, and were given to a run a short while ago."""
        return tuple(task for task in self.changed if task not in self.due)


@dataclass(frozen=True, kw_only=True)
class _Try:
    sources: str
    at: float


def look(root: Path, *, now: Callable[[], float] = time.time) -> Look:
    """Look which tasks have sources that changed since they were last fetched.

    Args:
        root: The workspace.
        now: The time in seconds.

    Raises:
        PipelineError: DVC cannot tell.
    """
    graph = dag.read_graph(root)
    fetches = {address: node for address, node in graph.nodes.items() if node.stage == STAGE}
    selected = dag.StageGraph(nodes=fetches)
    stale = dag.stale(root, selected, child_environment()) if fetches else set()
    digests = dag.source_digests(root, stale)
    changed = {fetches[a].task: digests[a] for a in fetches if a in stale and a in digests}
    tried = _read(root)
    due = [task for task, sources in changed.items() if _is_due(tried.get(task), sources, now())]
    return Look(changed=changed, due=tuple(due))


def note(
    root: Path, found: Look, tasks: Collection[str], *, now: Callable[[], float] = time.time
) -> None:
    """Note that tasks were given to a run with the sources they have."""
    tried = _read(root)
    tried.update({task: _Try(sources=found.changed[task], at=now()) for task in tasks})
    write_json_atomic(root / FILE, {task: asdict(entry) for task, entry in tried.items()})


def _is_due(tried: _Try | None, sources: str, now: float) -> bool:
    if tried is None or tried.sources != sources:
        return True
    # a clock that was set back makes the entry worthless
    return not 0 <= now - tried.at < RETRY_AFTER_S


def _read(root: Path) -> dict[str, _Try]:
    """Read the notes; none where there are none, or where the file is not ours."""
    try:
        content: Any = json.loads((root / FILE).read_text(encoding="utf-8"))
        return {
            str(task): _Try(sources=str(entry["sources"]), at=float(entry["at"]))
            for task, entry in content.items()
        }
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        return {}
