"""How a prompt of the registry is named: `TASK`, `TASK@ALIAS` or `TASK:VERSION`."""

import re
from dataclasses import dataclass

from ptv2_core.errors import ConfigError

DEFAULT_ALIAS = "champion"

_NAME = r"[a-z][a-z0-9_-]{0,62}"
_TASK = re.compile(_NAME)
_REFERENCE = re.compile(
    rf"(?P<task>{_NAME})(?:@(?P<alias>{_NAME})|:(?P<version>[1-9][0-9]{{0,8}}))?"
)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Which prompt: a task with an alias or a version, never both."""

    task: str
    alias: str | None = None
    version: int | None = None

    def __str__(self) -> str:
        """Return the reference as it is written."""
        return f"{self.task}@{self.alias}" if self.alias else f"{self.task}:{self.version}"


def parse_reference(text: str, *, alias: str = DEFAULT_ALIAS) -> Reference:
    """Read `TASK`, `TASK@ALIAS` or `TASK:VERSION`.

    Args:
        text: The reference.
        alias: What a bare task means.

    Raises:
        ConfigError: It is none of these.
    """
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"expected TASK, TASK@ALIAS or TASK:VERSION, such as intents@champion or intents:3 "
            f"(names of a-z, 0-9, _ and -, versions from 1), got {text!r}"
        )
    if match["version"]:
        return Reference(task=match["task"], version=int(match["version"]))
    return Reference(task=match["task"], alias=match["alias"] or alias)


def is_task_name(text: object) -> bool:
    """Tell whether it is a name that a task can have; such a name is a safe path, too."""
    return isinstance(text, str) and _TASK.fullmatch(text) is not None


def check_task(text: str) -> str:
    """Return the name of a task, if it is one.

    Raises:
        ConfigError: It is no name.
    """
    if not is_task_name(text):
        raise ConfigError(
            f"expected a task's name of a-z, 0-9, _ and -, such as intents, got {text!r}"
        )
    return text
