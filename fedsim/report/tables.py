"""The comparison of a run's strategies as a table: for the terminal, for the page, for programs.

Sizes are decimal (1 kB = 1,000 bytes), as network rates are.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from fedsim.results import RunResult, StrategyResult

__all__ = [
    "COLUMNS",
    "Answer",
    "Cell",
    "Column",
    "answers",
    "comparison_rows",
    "comparison_table",
    "format_bytes",
    "format_count",
    "format_duration",
    "format_percent",
    "format_rate",
    "format_significant",
    "lost_messages",
    "notes",
    "sentence",
    "state_of",
]

_MISSING = "–"
_LEAST_IMPORTANT_FIRST = (
    "final_loss",
    "rounds",
    "lost_share",
    "rounds_to_target",
    "virtual_time",
    "best_accuracy",
    "bytes_total",
    "state",
)


def _scaled(value: float, unit: str, prefixes: Sequence[str]) -> str:
    magnitude, step = abs(value), 0
    while magnitude >= 999.5 and step < len(prefixes) - 1:
        magnitude, step = magnitude / 1000, step + 1
    digits = max(0, 2 - math.floor(math.log10(magnitude))) if magnitude > 0 else 0
    text = f"{math.copysign(magnitude, value):.{min(digits, 3)}f}"
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return f"{text} {prefixes[step]}{unit}"


def format_bytes(size_bytes: float | None) -> str:
    """Return a size with three significant digits.

    >>> format_bytes(1_234_567)
    '1.23 MB'
    """
    if size_bytes is None:
        return _MISSING
    return _scaled(size_bytes, "B", ("", "k", "M", "G", "T", "P"))


def format_rate(rate_bps: float | None) -> str:
    """Return a rate; None and inf are unlimited.

    >>> format_rate(20e6)
    '20 Mbit/s'
    """
    if rate_bps is None or math.isinf(rate_bps):
        return "unlimited"
    return _scaled(rate_bps, "bit/s", ("", "k", "M", "G", "T"))


def format_duration(time: float | None) -> str:
    """Return seconds in words.

    >>> [format_duration(s) for s in (0.0042, 12.34, 252, 7500, 273_600)]
    ['4.2 ms', '12.3 s', '4 min 12 s', '2 h 05 min', '3 d 04 h']
    """
    if time is None:
        return _MISSING
    if time < 0.9995:
        return "0 s" if time == 0 else _scaled(time * 1e6, "s", ("µ", "m"))
    if time < 59.95:
        return f"{time:.3g} s"
    seconds = round(time)
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    minutes = round(time / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(time / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def format_percent(share: float | None) -> str:
    """Return a share of one as a percentage with one decimal.

    >>> format_percent(0.9123)
    '91.2 %'
    """
    return _MISSING if share is None else f"{100 * share:.1f} %"


def format_count(count: int | None) -> str:
    """Return a whole number with thousands apart.

    >>> format_count(1_234_567)
    '1,234,567'
    """
    return _MISSING if count is None else f"{count:,}"


def format_significant(value: float | None) -> str:
    """Return a number with four significant digits.

    >>> format_significant(0.123456)
    '0.1235'
    """
    return _MISSING if value is None else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Column:
    """One column: its key, its heading, where the value is, how it reads, which end is better."""

    key: str
    heading: str
    value: Callable[[StrategyResult], Any]
    text: Callable[[Any], str]
    better: str = ""  # "high", "low", or neither


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry of the table.

    Attributes
    ----------
    text : str
        As read by people, in sensible units.
    value : int, float, str or None
        Exact: seconds, bytes, a share of one.
    is_best : bool
        Whether no other strategy is better here; False where there is nothing to compare.
    """

    text: str
    value: Any
    is_best: bool = False


def lost_messages(result: StrategyResult) -> tuple[int, int]:
    """Return how many messages were lost, and how many were sent."""
    return (
        sum(row.messages_lost for row in result.rounds),
        sum(row.messages_sent for row in result.rounds),
    )


def state_of(result: StrategyResult) -> str:
    """Return how a strategy ended: done, diverged, failed, interrupted or not run."""
    if result.failure is not None:
        return "failed"
    if result.summary.get("diverged"):
        return "diverged"
    if result.complete:
        return "done"
    return "interrupted" if result.rounds else "not run"


def notes(run: RunResult) -> list[str]:
    """Return what a reader must know beside the numbers, one sentence each."""
    lines = []
    for name, result in run.strategies.items():
        state = state_of(result)
        if state == "diverged":
            place = result.summary.get("diverged_at") or {}
            where = f" in round {place['round']}" if place.get("round") is not None else ""
            who = f" on device {place['device']}" if place.get("device") is not None else ""
            why = place.get("reason") or "its loss or parameters are not finite"
            lines.append(f"{name} diverged{where}{who}: {sentence(why)}")
        elif state == "failed":
            when = f" after round {result.rounds[-1].round}" if result.rounds else ""
            lines.append(f"{name} failed{when}: {sentence(str(result.failure))}")
        elif state == "interrupted":
            asked = run.world.get("rounds")
            of = f" of {asked}" if asked else ""
            lines.append(f"{name} was interrupted after round {result.rounds[-1].round}{of}.")
        elif state == "not run":
            lines.append(f"{name} has not been run.")
    return lines + [f"{problem}; it is left out." for problem in run.problems]


def sentence(text: str) -> str:
    """Return a text with one full stop at its end."""
    return text.rstrip(". \n") + "."


@dataclass(frozen=True, slots=True)
class Answer:
    """One question that a run answers: who is best at something, by which value, against whom."""

    question: str
    who: str
    value: str
    how: str


def answers(run: RunResult) -> list[Answer]:
    """Return what the comparison says, most interesting first; nothing if nobody got a result.

    Diverged strategies answer nothing; unfinished ones do with what they have.
    """
    found = []
    if run.target is not None:
        goal = f"{format_percent(run.target)} accuracy"
        found += [
            _lowest(run, "time_to_target", f"First at {goal}", format_duration, "as long"),
            _lowest(run, "bytes_to_target", f"Least traffic to {goal}", format_bytes, "as much"),
        ]
        if found == [None, None]:
            best = _ranked(run, "best_accuracy", -1)
            closest = f"closest was {best[0][1]} with {format_percent(best[0][0])}" if best else ""
            found = [Answer(f"First at {goal}", "nobody", "", closest)]
    final = _ranked(run, "final_accuracy", -1)
    if final:
        (value, who), *others = final
        how = f"next is {others[0][1]} with {format_percent(others[0][0])}" if others else ""
        question = "Most accurate at the end" if len(run.strategies) > 1 else "Accuracy at the end"
        found.append(Answer(question, who, format_percent(value), how))
    return [answer for answer in found if answer is not None and (answer.how or answer.value)]


def _ranked(run: RunResult, key: str, sign: int) -> list[tuple[float, str]]:
    """Return values and names, best first, the names of equal values joined."""
    groups: dict[float, list[str]] = {}
    for name, result in run.strategies.items():
        value = result.summary.get(key)
        if value is not None and not result.summary.get("diverged"):
            groups.setdefault(value, []).append(name)
    return [(v, " and ".join(groups[v])) for v in sorted(groups, key=lambda v: sign * v)]


def _lowest(
    run: RunResult, key: str, question: str, text: Callable[[Any], str], as_what: str
) -> Answer | None:
    ranked = _ranked(run, key, 1)
    if not ranked:
        return None
    (value, who), *others = ranked
    if others and value > 0:
        how = f"{others[0][1]} takes {others[0][0] / value:.2f} × {as_what}"
    else:
        how = "no other strategy reached it" if len(run.strategies) > 1 and not others else ""
    return Answer(question, who, text(value), how)


def _lost_share(result: StrategyResult) -> float | None:
    lost, sent = lost_messages(result)
    return lost / sent if sent else None


def _of_summary(key: str) -> Callable[[StrategyResult], Any]:
    return lambda result: result.summary.get(key)


COLUMNS = (
    Column(
        "final_accuracy", "final accuracy", _of_summary("final_accuracy"), format_percent, "high"
    ),
    Column("best_accuracy", "best accuracy", _of_summary("best_accuracy"), format_percent, "high"),
    Column("final_loss", "final loss", _of_summary("final_loss"), format_significant, "low"),
    Column(
        "rounds_to_target", "rounds to target", _of_summary("rounds_to_target"), format_count, "low"
    ),
    Column(
        "time_to_target", "time to target", _of_summary("time_to_target"), format_duration, "low"
    ),
    Column(
        "bytes_to_target", "traffic to target", _of_summary("bytes_to_target"), format_bytes, "low"
    ),
    Column("rounds", "rounds", _of_summary("rounds"), format_count),
    Column("virtual_time", "virtual time", _of_summary("virtual_time"), format_duration),
    Column("bytes_total", "traffic", _of_summary("bytes_total"), format_bytes),
    Column("lost_share", "messages lost", _lost_share, format_percent),
    Column("state", "state", state_of, str),
)


def comparison_rows(run: RunResult) -> dict[str, dict[str, Cell]]:
    """Return the table as strategy → column key → `Cell`, in the scenario's order.

    Without a target the columns that need one are left out. A diverged strategy is best in nothing.
    """
    columns = [c for c in COLUMNS if run.target is not None or not c.key.endswith("_to_target")]
    rows: dict[str, dict[str, Cell]] = {name: {} for name in run.strategies}
    for column in columns:
        values = {name: column.value(result) for name, result in run.strategies.items()}
        fit = [
            value
            for name, value in values.items()
            if value is not None and not run.strategies[name].summary.get("diverged")
        ]
        best = None
        if column.better and len(run.strategies) > 1 and fit:
            best = max(fit) if column.better == "high" else min(fit)
        for name, value in values.items():
            rows[name][column.key] = Cell(column.text(value), value)
            if best is not None and value == best and value in fit:
                rows[name][column.key] = replace(rows[name][column.key], is_best=True)
    for name, row in rows.items():
        if run.strategies[name].summary.get("diverged"):
            rows[name] = {key: replace(cell, is_best=False) for key, cell in row.items()}
    return rows


def comparison_table(run: RunResult, *, width: int = 120) -> Table:
    """Return the table for a terminal; the best of a column is bold.

    Parameters
    ----------
    run : RunResult
    width : int
        Characters in a line; where it is too narrow the less important columns are left out.
    """
    rows = comparison_rows(run)
    columns = [c for c in COLUMNS if all(c.key in row for row in rows.values())]
    if all(state_of(result) == "done" for result in run.strategies.values()):
        columns = [c for c in columns if c.key != "state"]
    free = width - max(map(cell_len, rows), default=0) - 5
    for key in ("", *_LEAST_IMPORTANT_FIRST):
        columns = [c for c in columns if c.key != key]
        if sum(_width_of(c, rows) + 3 for c in columns) <= free:
            break
    title = Text(run.name)
    if run.target is not None:
        title.append(f"  ·  target accuracy {format_percent(run.target)}")
    caption = Text("\n".join(notes(run)))
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("strategy", no_wrap=True)
    for column in columns:
        heading = Text(_two_lines(column.heading), justify="right")
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for name, row in rows.items():
        cells = [Text(row[c.key].text, style="bold" if row[c.key].is_best else "") for c in columns]
        table.add_row(Text(name), *cells)
    return table


def _two_lines(heading: str) -> str:
    return (
        heading.replace(" ", "\n", 1) if heading.count(" ") == 1 else heading.replace(" t", "\nt")
    )


def _width_of(column: Column, rows: dict[str, dict[str, Cell]]) -> int:
    texts = [*_two_lines(column.heading).split("\n"), *(r[column.key].text for r in rows.values())]
    return max(map(cell_len, texts))
