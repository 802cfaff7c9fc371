"""A comparison as JSON: for other programs to read, and to draw its tables and plots again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pipelines.compare_data import (
    Comparison,
    Row,
    TaskFacts,
    Trial,
    Variant,
    Window,
    WindowRun,
)
from pipelines.compare_stats import Average, Cell, Difference, Summary
from pipelines.compare_windows import summarise_windows
from pipelines.errors import PipelineError

FORMAT = "ptv2-comparison-1"


def to_json(comparison: Comparison, summary: Summary) -> dict[str, Any]:
    """Return plain values: `rows`, `summary`, `differences`, `average`, `window`, and more.

    The test items of a row are left out: they are large, and what is computed from them is there.
    """
    facts = asdict(comparison)
    for row in facts["rows"]:
        del row["items"]
    numbers = asdict(summary)
    windows = summarise_windows(comparison, summary)
    if windows is not None:
        facts["window"] |= {
            "summary": [
                {**asdict(cell), "best": cell.best, "best_rate": cell.best_rate}
                for cell in windows.cells
            ],
            "average": [asdict(one) for one in windows.averages],
        }
    return {
        "format": FORMAT,
        "rows": facts.pop("rows"),
        "summary": numbers.pop("cells"),
        "differences": numbers.pop("differences"),
        "average": {
            "tasks": numbers.pop("complete_tasks"),
            "methods": numbers.pop("averages"),
            "differences": numbers.pop("average_differences"),
        },
        "missing": [
            {"task": task, "method": method, "seeds": seeds}
            for task, method, seeds in numbers.pop("missing")
        ],
        "bootstrap": numbers,
        **facts,
    }


def from_json(values: Mapping[str, Any]) -> tuple[Comparison, Summary]:
    """Read what `to_json` gave, as it is after a file; test items are not among it.

    Raises:
        PipelineError: It is something else.
    """
    if values.get("format") != FORMAT:
        raise PipelineError(
            f"comparison: expected format {FORMAT!r}, got {values.get('format')!r}; "
            "give a file that `ptv2 compare --json` wrote"
        )
    try:
        return _comparison(values), _summary(values)
    except (KeyError, TypeError) as error:
        raise PipelineError(f"comparison: the file is damaged: {error}; compare again") from error


def _comparison(values: Mapping[str, Any]) -> Comparison:
    rows = [
        Row(**{**row, "history": tuple(tuple(epoch) for epoch in row["history"])})
        for row in values["rows"]
    ]
    return Comparison(
        methods=tuple(values["methods"]),
        seeds=tuple(values["seeds"]),
        tasks=tuple(TaskFacts(**task) for task in values["tasks"]),
        rows=tuple(rows),
        trials=tuple(Trial(**trial) for trial in values["trials"]),
        chosen_on=values["chosen_on"],
        num_trials=values["num_trials"],
        backbone=values["backbone"],
        backbone_parameters=values["backbone_parameters"],
        backbone_layers=values["backbone_layers"],
        machine=values["machine"],
        date=values["date"],
        versions=values["versions"],
        git_commit=values["git_commit"],
        results=values["results"],
        # files of an older version have neither
        variants=tuple(Variant(**one) for one in values.get("variants", ())),
        window=_window(values["window"]) if values.get("window") else None,
    )


def _window(values: Mapping[str, Any]) -> Window:
    return Window(
        methods=tuple(values["methods"]),
        factor=values["factor"],
        points=values["points"],
        seeds=tuple(values["seeds"]),
        train=values["train"],
        moved=tuple(tuple(place) for place in values["moved"]),
        runs=tuple(WindowRun(**run) for run in values["runs"]),
    )


def _summary(values: Mapping[str, Any]) -> Summary:
    average = values["average"]
    return Summary(
        cells=tuple(Cell(**{**cell, "seeds": tuple(cell["seeds"])}) for cell in values["summary"]),
        complete_tasks=tuple(average["tasks"]),
        missing=tuple(
            (one["task"], one["method"], tuple(one["seeds"])) for one in values["missing"]
        ),
        averages=tuple(Average(**one) for one in average["methods"]),
        differences=tuple(Difference(**one) for one in values["differences"]),
        average_differences=tuple(Difference(**one) for one in average["differences"]),
        resamples=values["bootstrap"]["resamples"],
        seed=values["bootstrap"]["seed"],
    )
