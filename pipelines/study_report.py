"""A finished sweep in words and tables: for the terminal and as Markdown. The page takes both."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipelines.compare_words import ABSENT, settings_text, value_text
from pipelines.study_plots import NUMERIC, importances
from pipelines.sweep.record import Finalist, SweepRecord, TrialRecord
from pipelines.tables import markdown_rows, markdown_text

STATES = ("complete", "pruned", "failed", "crashed")
STATE_STYLES = {"complete": "green", "pruned": "dim", "failed": "bold red", "crashed": "bold red"}
FINALIST_HEADERS = ("trial", "mean", "spread", "mean - spread", "seeds", "scores")


def sentences(record: SweepRecord) -> list[str]:
    """Return what the sweep did and found, most general first."""
    return [
        _ended(record),
        _cost(record),
        _why(record),
        _winner(record),
        *_finalists(record),
        importances_line(record),
        *_troubles(record),
    ]


def importances_line(record: SweepRecord) -> str:
    """Return how much each setting mattered, or why that cannot be told."""
    return importances(record).says


def facts(record: SweepRecord) -> list[tuple[str, str]]:
    """Return what was searched, when and where it is kept, by name."""
    return [
        ("Maximised", f"{record.metric} on dev"),
        ("Drawn from", _space(record)),
        ("Epochs of a full trial", str(record.epochs)),
        ("Ended", record.date),
        ("Time", duration(record.seconds)),
        ("Study", record.study),
        ("Flow run", record.flow_run or ABSENT),
    ]


def duration(seconds: float) -> str:
    """Return a time in the units that people read."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if whole < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def ranked(record: SweepRecord) -> list[TrialRecord]:
    """Return the trials: complete ones first, then by state; in each the best first."""
    return sorted(
        record.trials,
        key=lambda one: (STATES.index(one.state), -(one.value or 0.0), one.number),
    )


def trial_headers(record: SweepRecord) -> list[str]:
    """Return the headers of the table of trials."""
    return ["trial", "state", f"dev {record.metric}", "epochs", *_names(record), "time", "notes"]


def trial_texts(record: SweepRecord) -> set[int]:
    """Return which columns of the table of trials are text, from 0."""
    words = {"state", "notes", *(name for name in _names(record) if name not in NUMERIC)}
    return {place for place, name in enumerate(trial_headers(record)) if name in words}


def trial_rows(record: SweepRecord) -> list[list[str]]:
    """Return the cells of the table of trials, ranked."""
    return [
        [
            str(one.number),
            f"{one.state}, winner" if one.number == record.winner.number else one.state,
            _score(one.value),
            f"{len(one.epochs)}/{record.epochs}",
            *(_cell(one.params, name) for name in _names(record)),
            duration(one.seconds),
            _notes(one),
        ]
        for one in ranked(record)
    ]


def finalist_rows(record: SweepRecord) -> list[list[str]]:
    """Return the cells of the table of finalists, best first."""
    return [
        [
            str(one.number),
            _score(one.mean),
            _score(one.spread) if len(one.scores) > 1 else ABSENT,
            _score(one.rank),
            str(len(one.scores)),
            ", ".join(map(_score, one.scores)),
        ]
        for one in record.finalists
    ]


def trials_table(record: SweepRecord) -> Table:
    """Return the trials for a terminal, ranked; six settings take less than 140 columns."""
    texts = trial_texts(record)
    shown = Table(
        title=Text(f"Sweep of {record.task}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for place, header in enumerate(trial_headers(record)):
        # a name of several words takes as many lines
        words = Text("\n".join(header.replace("_", " ").split()))
        shown.add_column(
            words,
            justify="left" if place in texts else "right",
            overflow="fold",
            # on a narrow terminal a number may take two lines, but not the score
            no_wrap=place in (0, 2, 3),
        )
    for one, (number, state, *others) in zip(ranked(record), trial_rows(record), strict=True):
        shown.add_row(
            number,
            Text(state, style=STATE_STYLES[one.state]),
            *map(Text, others),
            style="bold" if one.number == record.winner.number else "",
        )
    return shown


def finalists_table(record: SweepRecord) -> Table:
    """Return the finalists for a terminal, best first."""
    title = f"Finalists by mean minus spread of dev {record.metric}"
    shown = Table(title=Text(title), title_justify="left")
    for header in FINALIST_HEADERS:
        shown.add_column(Text(header), justify="right", overflow="fold")
    for cells in finalist_rows(record):
        shown.add_row(*map(Text, cells))
    return shown


def markdown(record: SweepRecord) -> str:
    """Return the whole sweep as Markdown."""
    lines = [f"# Sweep of {markdown_text(record.task)}", ""]
    lines += [f"- {markdown_text(sentence)}" for sentence in sentences(record)]
    lines += ["", "## Finalists", ""]
    lines += markdown_rows(FINALIST_HEADERS, finalist_rows(record), num_names=0)
    lines += ["", "## Trials", ""]
    lines += markdown_rows(trial_headers(record), trial_rows(record), num_names=2)
    lines += ["", "## How it was made", ""]
    lines += [f"- {name}: {markdown_text(value)}" for name, value in facts(record)]
    return "\n".join(lines) + "\n"


def to_json(record: SweepRecord) -> dict[str, Any]:
    """Return the sweep as plain values, with what is computed from it."""
    found = importances(record)
    return {
        **asdict(record),
        "counts": record.counts(),
        "epochs_spent": record.epochs_spent,
        "epochs_in_full": full_cost(record),
        "winner": asdict(record.winner),
        "importances": None if found.shares is None else dict(found.shares),
        "sentences": sentences(record),
    }


def full_cost(record: SweepRecord) -> int:
    """Return the epochs of as many trials, each trained to its end."""
    return len(record.trials) * record.epochs


def _names(record: SweepRecord) -> list[str]:
    """Return the settings of all trials, in the order of the space."""
    drawn = dict.fromkeys(name for one in record.trials for name in one.params)
    return [
        *(name for name in record.space if name in drawn),
        *(name for name in drawn if name not in record.space),
    ]


def _notes(one: TrialRecord) -> str:
    """Return what is not as usual about a trial."""
    retries = f"{one.retries} {_plural(one.retries, 'retry')}" if one.retries else ""
    origin = "" if one.origin == "drawn" else one.origin
    return "; ".join(part for part in (origin, retries, one.message) if part)


def _cell(params: Mapping[str, Any], name: str) -> str:
    return value_text(params[name]) if name in params else ABSENT


def _space(record: SweepRecord) -> str:
    """Return the ranges and lists that were drawn from."""
    parts = []
    for name, values in record.space.items():
        if values:
            between = " to " if name in NUMERIC else " or "
            parts.append(f"{name} {between.join(map(value_text, values))}")
    return "; ".join(parts) or ABSENT


def _score(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _ended(record: SweepRecord) -> str:
    counts = record.counts()
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if state in counts)
    asked = f"{record.asked} {_plural(record.asked, 'trial')} asked for"
    return f"{asked}, {len(record.trials)} ended: {told}."


def _cost(record: SweepRecord) -> str:
    spent, full = record.epochs_spent, full_cost(record)
    trained = f"Trained {spent} {_plural(spent, 'epoch')}"
    if spent >= full:
        return f"{trained}, every trial to its end."
    times = f", {full / spent:.1f} times as many" if spent else ""
    return (
        f"{trained}; {len(record.trials)} trials of {record.epochs} epochs to their end would "
        f"have been {full}{times}."
    )


def _why(record: SweepRecord) -> str:
    if record.stopped:
        return f"Stopped early: {record.stopped.rstrip('.')}."
    return "Stopped after all trials that were asked for."


def _winner(record: SweepRecord) -> str:
    one, found = record.winner, record.finalists[0]
    seeds = len(found.scores)
    score = f"dev {record.metric} {_score(found.mean)}"
    if seeds > 1:
        score += f" ± {_score(found.spread)} over {seeds} seeds"
    return f"Winner: trial {one.number}, {score}, with {settings_text(one.params)}."


def _finalists(record: SweepRecord) -> Iterator[str]:
    if all(len(one.scores) < 2 for one in record.finalists):
        yield "No trial was trained again with further seeds: the best single score won."
        return
    told = "; ".join(map(_finalist, record.finalists))
    yield f"Finalists, by mean minus spread: {told}."
    best = max(
        (one for one in record.trials if one.state == "complete"),
        key=lambda one: (one.value or 0.0, -one.number),
    )
    if best.number != record.winner.number:
        yield (
            f"Trial {best.number} had the best single score, {_score(best.value)}; with further "
            "seeds it did not hold."
        )


def _finalist(one: Finalist) -> str:
    seeds = f"{len(one.scores)} {_plural(len(one.scores), 'seed')}"
    return f"trial {one.number} {_score(one.mean)} ± {_score(one.spread)} ({seeds})"


def _troubles(record: SweepRecord) -> Iterator[str]:
    retries = [one.retries for one in record.trials if one.retries]
    if retries:
        yield (
            f"{len(retries)} {_plural(len(retries), 'trial')} went on from a checkpoint after a "
            f"process died, {sum(retries)} {_plural(sum(retries), 'time')} in all."
        )


def _plural(count: int, word: str) -> str:
    if count == 1:
        return word
    return f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
