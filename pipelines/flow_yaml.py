"""Plain values as YAML text, in the style of params.yaml: a line a section where it fits."""

import json
import re
from collections.abc import Mapping
from typing import Any

WIDTH = 110
PLAIN = re.compile(r"[A-Za-z][\w./-]*")
# words that YAML 1.1 or 1.2 reads as something else
RESERVED = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def task_lines(
    name: str, sections: Mapping[str, Any], *, comment: str, indent: int = 2
) -> list[str]:
    """Return the lines of one task of params.yaml.

    Args:
        name: The task.
        sections: Its sections.
        comment: Stands above it.
        indent: Spaces before its name.
    """
    margin = " " * indent
    lines = [f"{margin}# {' '.join(comment.split())}", f"{margin}{scalar(name)}:"]
    for key, values in sections.items():
        lines += _lines(key, values, indent + 2)
    return lines


def _lines(key: str, value: Any, indent: int) -> list[str]:
    """Return a key and its value on one line, or a mapping that is too wide below its key."""
    line = f"{' ' * indent}{scalar(key)}: {flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, Mapping) or not value:
        return [line]
    below = [line for name, item in value.items() for line in _lines(name, item, indent + 2)]
    return [f"{' ' * indent}{scalar(key)}:", *below]


def flow(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{scalar(key)}: {flow(item)}" for key, item in value.items())
        return f"{{{pairs}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    return scalar(value)


def scalar(value: Any) -> str:
    """Return a text, a number, a truth value or null; a text is quoted where it has to be."""
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False)
