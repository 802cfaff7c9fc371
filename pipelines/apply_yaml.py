"""A value set in YAML text at the marks that the parser gives; every other character is kept.

What cannot be set so is refused with an `UneditableError`. The caller reads the new text again:
what looks right here and means something else (an anchor that others use) is told there.
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from pipelines.flow_yaml import flow, scalar

LINE_BREAK = re.compile(r"\r\n|[\n\r\x85\u2028\u2029]")
ALIAS = re.compile(r"\s*:\s*\*[\w-]+")
NULLS = ("", "~", "null", "Null", "NULL")
EXPONENT = re.compile(r"^(-?\d+)(e[-+]\d+)$")
SMALL = 0.1
"""Positive numbers below it are written as the learning rates of params.yaml are, as 1.0e-2."""


class UneditableError(Exception):
    """A place that has to be edited by hand; the message says what is there."""


def set_value(text: str, path: Sequence[str], value: Any) -> str:
    """Return YAML text with one value set.

    A value that is there is replaced; a key that is not is added after the others of its mapping,
    with the mappings that lead to it.

    Args:
        text: YAML, a mapping at its top.
        path: The keys that lead to the value.
        value: A text, a number, a truth value, null, or a list of these.

    Raises:
        UneditableError: The place is an alias, a block of several lines, or no mapping; or the text
            is not valid.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        # an edit before this one met a form of YAML that is not known here
        raise UneditableError(f"{_dotted(path[:-1])} is of an unusual form") from error
    for depth, key in enumerate(path):
        if not isinstance(node, yaml.MappingNode):
            raise UneditableError(f"{_dotted(path[:depth])} is no mapping")
        found = _entry(node, key)
        if found is None:
            return _added(text, node, key, _nested(path[depth + 1 :], value))
        name, child = found
        is_last = depth == len(path) - 1
        if not is_last and not _is_null(child):
            if _is_alias(name, child):
                raise UneditableError(f"{_dotted(path[: depth + 1])} is an alias")
            node = child
            continue
        start, end = _span(text, name, child, _dotted(path[: depth + 1]))
        new = value_text(value) if is_last else _nested(path[depth + 1 :], value)
        # an empty value begins right behind its colon
        space = " " if start == end else ""
        return text[:start] + space + new + text[end:]
    raise UneditableError("no key is given")


def value_text(value: Any) -> str:
    """Return a value on one line; a float so that YAML 1.1 reads one, too: `1.0e-2`, not `1e-2`."""
    if not isinstance(value, float):
        return flow(value)
    if 0 < value < SMALL:
        mantissa, exponent = f"{value:.3e}".split("e")
        short = f"{float(mantissa)}e{int(exponent)}"
        if float(short) == value:
            return short
    return EXPONENT.sub(r"\1.0\2", repr(value))


def _nested(keys: Sequence[str], value: Any) -> str:
    """Return a value inside the mappings that lead to it, on one line."""
    text = value_text(value)
    for key in reversed(keys):
        text = f"{{{scalar(key)}: {text}}}"
    return text


def _dotted(path: Sequence[str]) -> str:
    return ".".join(path) or "the file"


# Places


def _entry(node: yaml.MappingNode, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    for name, value in node.value:
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            return name, value
    return None


def _is_alias(before: yaml.Node, node: yaml.Node) -> bool:
    """Tell whether a node stands elsewhere: an alias is composed as the node of its anchor."""
    return bool(node.start_mark.index < before.start_mark.index)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in NULLS


def _is_block_text(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")


def _span(text: str, name: yaml.Node, node: yaml.Node, where: str) -> tuple[int, int]:
    """Return where a value that can be replaced begins and ends."""
    if _is_alias(name, node):
        end = _alias_end(text, name, where)
        return text.rindex("*", 0, end), end
    start, end = node.start_mark.index, node.end_mark.index
    old = text[start:end]
    if old.startswith(("&", "!")):
        raise UneditableError(f"{where} has an anchor or a tag")
    if isinstance(node, yaml.CollectionNode):
        is_block = not node.flow_style or "#" in old
    else:
        is_block = _is_block_text(node)
    if is_block:
        raise UneditableError(f"{where} is a value of several lines")
    return start, end


def _alias_end(text: str, name: yaml.Node, where: str) -> int:
    found = ALIAS.match(text, name.end_mark.index)
    if found is None:
        raise UneditableError(f"{where} is an alias")
    return found.end()


def _end(text: str, node: yaml.Node, where: str) -> int:
    """Return where a node ends, what follows a block left out."""
    if not isinstance(node, yaml.CollectionNode):
        old = text[node.start_mark.index : node.end_mark.index]
        return int(node.start_mark.index) + len(old.rstrip() if _is_block_text(node) else old)
    if node.flow_style:
        return int(node.end_mark.index)
    last = node.value[-1]
    if not isinstance(node, yaml.MappingNode):
        if _is_alias(node, last):
            raise UneditableError(f"{where} ends in an alias")
        return _end(text, last, where)
    name, value = last
    return _alias_end(text, name, where) if _is_alias(name, value) else _end(text, value, where)


# Additions


def _added(text: str, node: yaml.MappingNode, key: str, value: str) -> str:
    """Return the text with an entry after the last one of a mapping."""
    entry = f"{scalar(key)}: {value}"
    if not node.value:
        # `{}`: in front of the brace that closes it
        place = node.end_mark.index - 1
        return text[:place] + entry + text[place:]
    if node.flow_style:
        name, last = node.value[-1]
        place = _alias_end(text, name, key) if _is_alias(name, last) else _end(text, last, key)
        return f"{text[:place]}, {entry}{text[place:]}"
    found = LINE_BREAK.search(text, _end(text, node, key))
    place = found.start() if found else len(text)
    line_break = found or LINE_BREAK.search(text)
    newline = line_break.group() if line_break else "\n"
    margin = " " * node.value[0][0].start_mark.column
    return f"{text[:place]}{newline}{margin}{entry}{text[place:]}"
