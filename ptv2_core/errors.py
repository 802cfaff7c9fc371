"""Errors that are addressed to users.

Every message says what was expected, what was got, where (file and line, or the key's path),
and what to do about it. The command line prints the message and exits with code 2.
"""

from collections.abc import Sequence


class PTv2Error(Exception):
    """Base of every error that a user can mend."""


class ConfigError(PTv2Error):
    """Settings that cannot be used.

    Attributes:
        problems: Every problem found, as `(dotted path, message)`.
    """

    def __init__(self, problems: Sequence[tuple[str, str]] | str) -> None:
        """Make the error from one message or from all problems at once.

        Args:
            problems: A message, or pairs of a dotted path and a message.
        """
        self.problems: list[tuple[str, str]] = (
            [("", problems)] if isinstance(problems, str) else list(problems)
        )
        lines = [f"{path}: {message}" if path else message for path, message in self.problems]
        if len(lines) > 1:
            lines = [f"{len(lines)} problems in the settings:", *(f"  - {line}" for line in lines)]
        super().__init__("\n".join(lines))


class DataError(PTv2Error):
    """Records that cannot be used; the message names file and line."""

    @classmethod
    def collected(cls, problems: Sequence[str], *, shown: int = 10) -> "DataError":
        """Make one error of many problems.

        Args:
            problems: One line a problem, each with its place.
            shown: How many to list; the rest are counted.
        """
        if len(problems) == 1:
            return cls(problems[0])
        lines = [f"{len(problems)} problems in the data:"]
        lines += [f"  - {problem}" for problem in problems[:shown]]
        if len(problems) > shown:
            lines.append(f"  - and {len(problems) - shown} more")
        return cls("\n".join(lines))


class BackboneError(PTv2Error):
    """A backbone that is absent, unsupported or not the expected one."""


class ArtifactError(PTv2Error):
    """A saved prompt that is damaged, of another schema, or made for something else."""


class TrainingError(PTv2Error):
    """A training that cannot go on, such as one whose loss is not finite."""


class MemoryRanOutError(TrainingError):
    """A training whose step, or whose evaluation, needs more memory than there is."""
