"""Where a task's files are in a workspace; dvc.yaml names the same places."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import PipelineError
from ptv2_core.files import locked

BEST_FILE = "best.json"
"""What a search found, in `TaskPaths.search`."""


@dataclass(frozen=True, kw_only=True)
class TaskPaths:
    """The files of one task.

    Attributes:
        root: The workspace: the folder of params.yaml.
        task: The task's name.
    """

    root: Path
    task: str

    @property
    def raw(self) -> Path:
        """Output of fetch: records as the source has them."""
        return self.root / "data" / "raw" / self.task

    @property
    def prepared(self) -> Path:
        """Output of prepare: checked, split and encoded."""
        return self.root / "data" / "prepared" / self.task

    @property
    def prompt(self) -> Path:
        """Output of train: the artifact."""
        return self.root / "prompts" / self.task

    @property
    def results(self) -> Path:
        """Everything that is read by people."""
        return self.root / "results" / self.task

    @property
    def search(self) -> Path:
        """Output of search."""
        return self.results / "search"

    @property
    def train(self) -> Path:
        """Output of train: history and metrics."""
        return self.results / "train"

    @property
    def evaluate(self) -> Path:
        """Output of evaluate."""
        return self.results / "evaluate"

    @property
    def formats(self) -> Path:
        """What `ptv2 evaluate --compare` found, which is no output of a stage."""
        return self.results / "formats.json"

    @property
    def registered(self) -> Path:
        """Output of register."""
        return self.results / "registered.json"

    @property
    def inspected(self) -> Path:
        """The page of `ptv2 inspect`, which is no output of a stage."""
        return self.root / "results" / "inspect" / f"{self.task}.html"

    @property
    def sweep(self) -> Path:
        """What `ptv2 sweep` found, which is no output of a stage."""
        return self.root / "results" / "sweeps" / self.task

    @property
    def sweeps(self) -> Path:
        """The database of the sweeps of all tasks."""
        return self.root / ".ptv2" / "sweeps.db"

    @property
    def study(self) -> Path:
        """The search's database, kept between runs."""
        return self.root / ".ptv2" / "studies" / f"{self.task}.db"

    @property
    def checkpoint(self) -> Path:
        """Where a training stands, until its prompt is saved."""
        return self.root / ".ptv2" / "checkpoints" / f"{self.task}.safetensors"

    @property
    def init(self) -> Path:
        """The registered prompt that a training begins from, as it was pulled."""
        return self.root / ".ptv2" / "init" / self.task

    @property
    def trunk(self) -> Path:
        """The trunk cache, which all tasks share."""
        return self.root / ".ptv2" / "trunk"

    def require(self, file: Path, stage: str) -> Path:
        """Return a file that an earlier stage writes.

        Raises:
            PipelineError: It is not there; says what to run.
        """
        if not file.is_file():
            raise PipelineError(f"{file}: not there; run `ptv2 {stage} --task {self.task}` first")
        return file


@contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Hold a lock file for as long as the work takes.

    Args:
        lock: The file.
        what: The work that only one process may do, such as `search`.

    Raises:
        PipelineError: Another process does it.
    """
    with ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError as error:
            raise PipelineError(
                f"{what}: another {what} of this task is running ({lock} is held); wait for it or "
                "stop it"
            ) from error
        yield
