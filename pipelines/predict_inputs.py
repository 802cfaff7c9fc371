"""What `ptv2 predict` answers: texts on the command line, or JSON objects."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from ptv2_core.data.tasks import TaskSpec
from ptv2_core.errors import DataError
from ptv2_core.evaluation.inputs import TEXT_KINDS, input_fields

STANDARD_INPUT = "-"


def read_inputs(
    task: TaskSpec,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    given: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the inputs of a command, as `Predictor.predict` takes them.

    Args:
        task: Says whether texts suffice.
        texts: Texts, or `-` alone for JSON lines on standard input.
        pairs: The second text of each.
        given: A JSON object each.

    Raises:
        DataError: They are not for this task, or a line is not JSON; all such lines are named.
    """
    fields = _listed([f"`{name}`" for name in input_fields(task).needed])
    if list(texts) == [STANDARD_INPUT] and not given:
        return _read_lines(task, fields)
    if texts and given:
        raise DataError("expected texts or --input, got both")
    if given:
        return _objects([(f"--input {place}", text) for place, text in enumerate(given, start=1)])
    if not texts:
        raise DataError(
            "nothing to answer: expected a text, --input with a JSON object, or - for JSON lines "
            "on standard input"
        )
    if task.kind not in TEXT_KINDS:
        raise DataError(
            f"a text does not suffice for {task.name}, a task of kind {task.kind}: expected JSON "
            f"objects with {fields}, each with --input or, with -, on a line of standard input"
        )
    if pairs is None:
        return [{"text": text} for text in texts]
    if len(pairs) != len(texts):
        raise DataError(f"expected a --pair for each of {len(texts)} texts, got {len(pairs)}")
    return [{"text": text, "text_pair": pair} for text, pair in zip(texts, pairs, strict=True)]


def _read_lines(task: TaskSpec, fields: str) -> list[dict[str, Any]]:
    lines = [
        (f"standard input, line {number}", line)
        for number, line in enumerate(sys.stdin.buffer.read().split(b"\n"), start=1)
        if line.strip()
    ]
    if not lines:
        what = "a text" if task.kind in TEXT_KINDS else fields
        raise DataError(f"standard input is empty; expected JSON lines with {what} each")
    return _objects(lines)


def _objects(values: Sequence[tuple[str, str | bytes]]) -> list[dict[str, Any]]:
    """Read JSON objects; every broken one is named before anything is answered."""
    inputs: list[dict[str, Any]] = []
    problems: list[str] = []
    for where, text in values:
        try:
            value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
        except ValueError as error:
            problems.append(f"{where}: not JSON in UTF-8 ({error})")
            continue
        if isinstance(value, dict):
            inputs.append(value)
        else:
            problems.append(f"{where}: expected an object, got {value!r:.60}")
    if problems:
        raise DataError.collected(problems)
    return inputs


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
