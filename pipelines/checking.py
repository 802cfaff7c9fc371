"""One section of params.yaml: plain values in, a frozen object or problems in words out."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.schema import Section
from ptv2_core.config import TrainConfig
from ptv2_core.errors import ConfigError

Where = tuple[str | int, ...]
Found = list[tuple[Where, str]]


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a hint at the closest known word, or else the list of the known ones."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def check_section(model: type[Section] | type[TrainConfig], values: Any, found: Found) -> Any:
    """Build a section from plain values.

    Args:
        model: The shape of the section.
        values: What the YAML holds for it.
        found: Receives every problem, its place relative to the section.

    Returns:
        The section, or None where there was a problem.
    """
    if not isinstance(values, dict):
        found.append(((), f"expected a mapping of settings, got {values!r}"))
        return None
    if issubclass(model, TrainConfig):
        return _check_train(values, found)
    return _check_model(model, values, found)


def _check_train(values: dict[str, Any], found: Found) -> TrainConfig | None:
    try:
        return TrainConfig.from_mapping(values, path="train")
    except ConfigError as error:
        found += [(_steps(path)[1:], message) for path, message in error.problems]
        return None


def _check_model(model: type[Section], values: dict[str, Any], found: Found) -> Section | None:
    problems: Found = []
    section = None
    try:
        section = model.model_validate(values)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            problem = (_place(model, item), _words(model, item))
            # each branch of a union complains, in the same words
            if problem not in problems:
                problems.append(problem)
    wrong = {where[0] for where, _ in problems}
    for path, message in (section or _without(model, values, wrong)).conflicts():
        # A key that is itself wrong has been left out here: what seems to be missing is not.
        if _steps(path)[0] not in wrong:
            problems.append((_steps(path), message))
    found += problems
    return None if problems else section


def _without(model: type[Section], values: dict[str, Any], wrong: set[str | int]) -> Section:
    """Build the section from its right keys alone, so that the other checks can still speak."""
    right = {key: value for key, value in values.items() if key not in wrong}
    try:
        return model.model_validate(right)
    except ValidationError:
        return Section()


def _steps(path: str) -> Where:
    return tuple(int(step) if step.isdigit() else step for step in path.split("."))


def _place(model: type[BaseModel], error: ErrorDetails) -> Where:
    """Return where the error is in the file, without pydantic's names for branches of a union."""
    if error["type"] in ("extra_forbidden", "missing"):
        return error["loc"]
    place: Where = ()
    current: type[BaseModel] | None = model
    is_name = False
    for step in error["loc"]:
        fields = current.model_fields if current is not None and not is_name else {}
        if step in fields:
            annotation = fields[str(step)].annotation
            current = _nested_model(annotation)
            is_name = get_origin(annotation) is Mapping  # of the next step: a name that users give
        elif is_name or isinstance(step, int):
            is_name = False
        else:
            break
        place = (*place, step)
    return place


def _words(model: type[BaseModel], error: ErrorDetails) -> str:
    """Say one of pydantic's errors as expected and got, with the field's own description."""
    current: type[BaseModel] | None = model
    expected = "another value"
    for step in error["loc"]:
        fields = current.model_fields if current is not None else {}
        if error["type"] == "extra_forbidden" and step == error["loc"][-1]:
            return f"unknown key{did_you_mean(str(step), list(fields))}"
        if step in fields:
            expected = fields[str(step)].description or expected
            current = _nested_model(fields[str(step)].annotation)
    if error["type"] == "missing":
        return f"is required; expected {expected}"
    return f"expected {expected}, got {error['input']!r}"


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """Find the model inside an annotation such as `Model | None` or `tuple[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    parts = getattr(annotation, "__args__", ())
    return next((found for part in parts if (found := _nested_model(part))), None)
