"""Errors of the orchestration that a user can mend; the core has its own in `ptv2_core.errors`."""

from ptv2_core.errors import DataError, PTv2Error

EXIT_USER_ERROR = 2
EXIT_TEMPORARY = 75
"""What a stage of a run exits with after a TemporaryError (EX_TEMPFAIL); only then is it tried
again. A person who runs the stage by hand sees EXIT_USER_ERROR."""


class PipelineError(PTv2Error):
    """A stage, the stage graph or a run that cannot go on."""


class RegistryError(PTv2Error):
    """A model registry that is unreachable, or that refuses what was asked of it."""


class TemporaryError(PTv2Error):
    """Something that may pass by itself: a lock that is held, a server that cannot be reached."""


class RegistryUnreachableError(RegistryError, TemporaryError):
    """A model registry that does not answer."""


class SourceUnreachableError(DataError, TemporaryError):
    """A data hub that cannot be reached."""


class StageFailedError(PipelineError):
    """A stage whose command failed; the message is what the command said last.

    Attributes:
        address: The stage, as in `train@rte`.
        exit_code: What its command exited with.
    """

    def __init__(self, address: str, message: str, exit_code: int | None = None) -> None:
        """Name the stage in front of what its command said."""
        super().__init__(f"{address}: {message}")
        self.address = address
        self.exit_code = exit_code


class StageTemporaryError(StageFailedError, TemporaryError):
    """A stage that failed for a reason that may pass by itself."""


class StageInterruptedError(StageFailedError):
    """A stage that was told to stop."""
