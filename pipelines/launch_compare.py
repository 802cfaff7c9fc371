"""`ptv2 compare`: prepare the data, run the comparison in a flow, log it, and say how it ended."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipelines import compare_flow, comparison, dag, registry
from pipelines.checking import check_section
from pipelines.compare_json import to_json
from pipelines.compare_report import markdown, table
from pipelines.compare_windows import summarise_windows
from pipelines.console import progress
from pipelines.errors import PipelineError
from pipelines.extra_settings import CompareSettings
from pipelines.settings import Settings, child_environment, load_settings, read_environment
from ptv2_core.errors import ConfigError
from ptv2_core.files import write_json_atomic

NEEDED_STAGES = ("fetch", "prepare")


def run(
    settings: Settings,
    tasks: Sequence[str],
    changes: Mapping[str, Any],
    json_file: Path | None,
    console: Console,
) -> None:
    """Compare, write and log the report, and print its table.

    Args:
        settings: A checked params.yaml.
        tasks: Names of tasks.
        changes: What the command line sets in the section `compare`; None leaves it.
        json_file: Where the figures go besides the report.
        console: Where to draw.

    Raises:
        PTv2Error: Settings or data are wrong, or a job failed; what ended before is kept. Where a
            training alone failed, the report is there without it.
    """
    chosen = _overlaid(settings.compare, changes)
    target = None if json_file is None else json_file.absolute()
    os.chdir(settings.root)
    settings = load_settings(Path("params.yaml"))
    dag.bring_up_to_date(
        settings.root,
        tasks,
        NEEDED_STAGES,
        child_environment(),
        lambda address: console.print(f"bringing {address} up to date", highlight=False),
    )
    done: list[comparison.Compared] = []

    def work() -> str:
        with progress("compare", console) as on_progress:
            done.append(comparison.run(settings, tasks, chosen, on_progress))
        return markdown(done[0].comparison, done[0].summary)

    compare_flow.run(settings.root, work)
    (compared,) = done
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(target, to_json(compared.comparison, compared.summary))
    _log(settings, tasks, chosen, compared)
    console.print(table(compared.comparison, compared.summary))
    console.print(
        f"report    {compared.folder / 'compare.html'} (open it in a browser), compare.md, "
        "compare.json",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if compared.failed:
        raise PipelineError("\n".join(compared.failed))


def _overlaid(compare: CompareSettings, changes: Mapping[str, Any]) -> CompareSettings:
    given = {key: value for key, value in changes.items() if value is not None}
    found: list[Any] = []
    values = {**compare.model_dump(mode="json", exclude_unset=True), **given}
    checked = check_section(CompareSettings, values, found)
    if found:
        options = {"methods": "--method", "seeds": "--seed", "n_trials": "--trials"}
        raise ConfigError(
            [(options.get(str(where[0]), f"compare.{where[0]}"), words) for where, words in found]
        )
    assert isinstance(checked, CompareSettings), "problems were raised above"
    return checked


def _log(
    settings: Settings,
    tasks: Sequence[str],
    chosen: CompareSettings,
    compared: comparison.Compared,
) -> None:
    """Log the means over seeds, the windows and the report to MLflow."""
    uri = read_environment().mlflow_tracking_uri or settings.register.tracking_uri
    tests = {f"{cell.task}.{cell.method}.test": cell.test for cell in compared.summary.cells}
    windows = summarise_windows(compared.comparison, compared.summary)
    shares = {
        f"{cell.task}.{cell.method}.window": cell.share
        for cell in (windows.cells if windows else ())
    }
    registry.log_comparison(
        compared.folder,
        tests | shares,
        {
            "tasks": ", ".join(tasks),
            "methods": ", ".join(chosen.methods),
            "seeds": ", ".join(map(str, chosen.seeds)),
            "n_trials": ", ".join(f"{name} {chosen.trials_of(name)}" for name in chosen.methods),
            "backbone": compared.comparison.backbone,
        },
        root=settings.root,
        tracking_uri=uri,
        experiment=settings.register.experiment,
    )
