"""What a finished sweep leaves: its record, its page and plots, and its runs in MLflow."""

from pipelines.mlflow_sweep import log_sweep
from pipelines.paths import TaskPaths
from pipelines.settings import Settings, read_environment
from pipelines.study_files import write_study
from pipelines.sweep.record import SweepRecord
from ptv2_core.files import replace_directory


def finish(settings: Settings, record: SweepRecord) -> None:
    """Write and log a sweep; done again, it changes nothing but the date.

    Raises:
        RegistryError: MLflow does not take it; the files are there.
    """
    folder = TaskPaths(root=settings.root, task=record.task).sweep
    with replace_directory(folder) as new:
        record.write(new)
        write_study(record, new)
    sweep = settings.sweep
    log_sweep(
        record,
        folder,
        params={"engine": sweep.engine, "seeds": str(sweep.seeds)},
        root=settings.root,
        tracking_uri=read_environment().mlflow_tracking_uri or settings.register.tracking_uri,
        experiment=settings.register.experiment,
    )
