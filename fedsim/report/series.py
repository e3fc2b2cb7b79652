"""What figures show, whoever draws them: curves of a run, and how its strategies look.

Decision: a strategy is recognisable without its colour. Twelve strategies in a row differ in the
pair of colour and dashes; the six colours stay apart for the three common kinds of colour blindness
and have a contrast of at least 3 to the page, on light and on dark ground.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from fedsim.recorder import RoundRow
from fedsim.report.tables import state_of
from fedsim.results import RunResult, StrategyResult

__all__ = [
    "COLOURS",
    "DASHES",
    "LABELS",
    "Curves",
    "Style",
    "curves",
    "devices_of",
    "is_varied",
    "label_of",
    "network_title",
    "style_of",
    "thinned",
    "time_unit",
]

COLOURS = {  # light ground, dark ground
    "#1f3fb8": "#6f83ff",
    "#d9480f": "#e8953a",
    "#008a68": "#5fe0a0",
    "#7a1446": "#d9527f",
    "#1598d7": "#3fb2e0",
    "#c9619f": "#f6d3f7",
}
DASHES: tuple[tuple[int, ...], ...] = ((), (8, 3), (2, 2), (8, 3, 2, 3))
LABELS = {
    "eval_accuracy": "accuracy",
    "eval_loss": "loss",
    "train_loss": "training loss",
    "accuracy_std": "spread of accuracy over devices",
    "consensus_distance": "consensus distance",
    "mean_staleness": "mean staleness (versions)",
    "devices_replied": "devices that replied, per round",
    "messages_lost": "messages lost, per round",
    "bytes": "traffic per round (bytes)",
    "wall_time": "wall time (s)",
}


@dataclass(frozen=True, slots=True)
class Style:
    """The look of a strategy: a colour on light and on dark ground, and dash lengths."""

    light: str
    dark: str
    dash: tuple[int, ...]


def style_of(index: int) -> Style:
    """Return the look of the strategy at this place of the scenario."""
    light, dark = list(COLOURS.items())[index % len(COLOURS)]
    turn = index // len(COLOURS)
    return Style(light, dark, DASHES[(index + turn) % len(DASHES)])


@dataclass(frozen=True, slots=True)
class Curves:
    """All curves of one strategy.

    Attributes
    ----------
    name, state : str
        The state is one of `fedsim.report.tables.state_of`.
    style : Style
    x : dict
        ``round``, ``time`` (virtual seconds) and ``bytes`` (since the start), one value a point.
    y : dict
        Measures that have a value somewhere, keys of `LABELS` or ``strategy.<key>``; one value or
        None a point.
    reached : int or None
        The first point at the target.
    """

    name: str
    state: str
    style: Style
    x: dict[str, list[float]]
    y: dict[str, list[float | None]]
    reached: int | None


def curves(run: RunResult, *, max_points: int | None = None) -> list[Curves]:
    """Return the curves of every strategy, in the scenario's order.

    Parameters
    ----------
    run : RunResult
    max_points : int, optional
        Thin each strategy's rounds to about so many, evenly; the last one and the one at the target
        stay.
    """
    return [
        _curves(result, style_of(index), run.target, max_points)
        for index, result in enumerate(run.strategies.values())
    ]


def _curves(
    result: StrategyResult, style: Style, target: float | None, max_points: int | None
) -> Curves:
    rows = result.rounds
    traffic = list(accumulate(row.bytes_total for row in rows))
    hits = (i for i, row in enumerate(rows) if target is not None and _at_least(row, target))
    first = next(hits, None)
    kept = thinned(len(rows), max_points)
    if first is not None and first not in kept:
        kept = sorted({*kept, first})
    values = {key: [_measure(rows[i], key) for i in kept] for key in _measures(rows)}
    return Curves(
        name=result.name,
        state=state_of(result),
        style=style,
        x={
            "round": [rows[i].round for i in kept],
            "time": [rows[i].virtual_time for i in kept],
            "bytes": [traffic[i] for i in kept],
        },
        y={key: v for key, v in values.items() if any(number is not None for number in v)},
        reached=None if first is None else kept.index(first),
    )


def _at_least(row: RoundRow, target: float) -> bool:
    return row.eval_accuracy is not None and row.eval_accuracy >= target


def _measures(rows: Sequence[RoundRow]) -> list[str]:
    own = dict.fromkeys(f"strategy.{key}" for row in rows for key in row.extra)
    return [*LABELS, *own]


def _measure(row: RoundRow, key: str) -> float | None:
    if key == "bytes":
        return row.bytes_total
    value = (
        row.extra.get(key.removeprefix("strategy."))
        if key.startswith("strategy.")
        else getattr(row, key)
    )
    return value if isinstance(value, int | float) else None


def label_of(key: str) -> str:
    """Return how a measure is called on an axis."""
    return LABELS.get(key, key.removeprefix("strategy.").replace("_", " "))


def thinned(count: int, max_points: int | None) -> list[int]:
    """Return indices of `count` things, evenly thinned to at most `max_points`, ends included."""
    if max_points is None or count <= max_points:
        return list(range(count))
    chosen: list[int] = np.unique(
        np.linspace(0, count - 1, max_points).round().astype(int)
    ).tolist()
    return chosen


def time_unit(longest: float) -> tuple[float, str]:
    """Return the unit for an axis of so many seconds: its length in seconds, and its name."""
    units = ((300.0, 1.0, "s"), (3 * 3600.0, 60.0, "min"), (4 * 86_400.0, 3600.0, "h"))
    return next(((size, name) for end, size, name in units if longest < end), (86_400.0, "d"))


def devices_of(run: RunResult) -> dict[str, Any]:
    """Return the devices of `world.json`: listed, samples, label_counts, speed_samples_per_s."""
    devices: dict[str, Any] = run.world.get("devices") or {}
    return devices


def is_varied(values: Sequence[float | None] | None) -> bool:
    """Return whether there is anything to draw: at least two different values."""
    return bool(values) and len(set(values or ())) > 1


def network_title(run: RunResult, network: dict[str, Any]) -> str:
    """Return the topology, and whose it is where strategies differ."""
    title = str(network.get("topology", "network"))
    if len(run.world.get("networks", ())) > 1:
        title += " (" + ", ".join(network.get("strategies", ())) + ")"
    return title
