"""What a finished sweep leaves: its record, its page and plots, and its runs in MLflow."""

import shutil

from pipelines.errors import PipelineError
from pipelines.mlflow_sweep import log_sweep
from pipelines.paths import TaskPaths
from pipelines.settings import Settings, read_environment
from pipelines.study_files import write_study
from pipelines.sweep.record import SweepRecord
from ptv2_core.files import replace_directory


def finish(settings: Settings, record: SweepRecord) -> None:
    """Write and log a sweep; done again, it changes nothing but the date.

    One process at a time may finish a task's sweeps.

    Raises:
        PipelineError: A disk is full.
        RegistryError: MLflow does not take it; the files are there.
    """
    folder = TaskPaths(root=settings.root, task=record.task).sweep
    try:
        with replace_directory(folder) as new:
            record.write(new)
            write_study(record, new)
        # what others left that were killed here
        for left in folder.parent.glob(f".{folder.name}.*"):
            shutil.rmtree(left)
    except OSError as error:
        raise PipelineError(
            f"{folder}: could not be written ({error.strerror}); make room, and run the same "
            "command: no trial is trained again"
        ) from error
    sweep = settings.sweep
    log_sweep(
        record,
        folder,
        params={"engine": sweep.engine, "seeds": str(sweep.seeds)},
        root=settings.root,
        tracking_uri=read_environment().mlflow_tracking_uri or settings.register.tracking_uri,
        experiment=settings.register.experiment,
    )
