"""Who exchanged with whom, round by round, where devices exchange with each other.

From `transfers.parquet`, which a scenario asks for by ``record.transfers``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import cos, pi, sin

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from fedsim.report.series import thinned
from fedsim.results import RunResult, StrategyResult
from topologies.dynamics import Connectivity, b_connectivity

__all__ = ["Drawing", "Exchanges", "Picture", "exchanges_of", "picture", "places", "svg"]

_CONNECTIVITY_LINKS = 500_000  # of all rounds; finding B takes seconds then

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Exchanges:
    """The payloads between devices of strategies that all exchanged alike.

    Attributes
    ----------
    strategies : list of str
    devices : int
    rounds : int array, shape (n_rounds,)
        Those with a payload between devices.
    round, source, destination : int array, shape (n_payloads,)
        Of every payload, in this order.
    arrived : bool array, shape (n_payloads,)
    """

    strategies: list[str]
    devices: int
    rounds: IntArray
    round: IntArray
    source: IntArray
    destination: IntArray
    arrived: BoolArray

    def partners(self) -> IntArray:
        """Return how many devices each one heard from in each round, ``(devices, n_rounds)``."""
        heard = np.zeros((self.devices, len(self.rounds)), np.int64)
        at = np.searchsorted(self.rounds, self.round[self.arrived])
        np.add.at(heard, (self.destination[self.arrived], at), 1)
        return heard

    def changes(self) -> bool:
        """Return whether some round's links differ from another's."""
        first = None
        for _, pairs, _ in self.by_round():
            first = pairs if first is None else first
            if not np.array_equal(pairs, first):
                return True
        return False

    def by_round(self) -> Iterator[tuple[int, IntArray, BoolArray]]:
        """Yield round, (source, destination) of its payloads, and which of them arrived."""
        pairs = np.stack([self.source, self.destination], axis=1)
        for number in self.rounds.tolist():
            low, high = np.searchsorted(self.round, [number, number + 1])
            yield number, pairs[low:high], self.arrived[low:high]

    def connectivity(self) -> Connectivity | None:
        """Return how well what arrived connects the devices; None if that takes too long.

        A link counts if a payload arrived on it, in its direction.
        """
        if len(self.round) > _CONNECTIVITY_LINKS:
            return None
        graphs = []
        for _, pairs, arrived in self.by_round():
            graph: nx.DiGraph[int] = nx.DiGraph()
            graph.add_nodes_from(range(self.devices), role="device")
            graph.add_edges_from(pairs[arrived].tolist())
            graphs.append(graph)
        return b_connectivity(lambda number: graphs[number], len(graphs))


def exchanges_of(run: RunResult) -> list[Exchanges]:
    """Return what devices sent each other; strategies of equal exchanges together."""
    devices = (run.world.get("devices") or {}).get("count")
    found: list[Exchanges] = []
    for name, result in run.strategies.items():
        one = _read(name, result, devices)
        if one is None:
            continue
        same = next((other for other in found if _is_same(one, other)), None)
        if same is None:
            found.append(one)
        else:
            same.strategies.append(name)
    return found


def _read(name: str, result: StrategyResult, devices: int | None) -> Exchanges | None:
    table = result.table("transfers")
    if table is None:
        return None
    kinds = np.array(table["kind"].to_pylist(), dtype=object)
    rows = np.flatnonzero(kinds == "peer")
    if not len(rows):
        return None
    numbers = {
        key: table[key].to_numpy()[rows].astype(np.int64)
        for key in ("round", "source", "destination")
    }
    order = np.lexsort((numbers["destination"], numbers["source"], numbers["round"]))
    last = max(int(numbers[key].max()) for key in ("source", "destination"))
    return Exchanges(
        strategies=[name],
        devices=max(devices or 0, last + 1),
        rounds=np.unique(numbers["round"]),
        arrived=np.array(table["outcome"].to_pylist(), dtype=object)[rows[order]] == "delivered",
        **{key: values[order] for key, values in numbers.items()},
    )


def _is_same(one: Exchanges, other: Exchanges) -> bool:
    return all(
        np.array_equal(getattr(one, key), getattr(other, key))
        for key in ("round", "source", "destination", "arrived")
    )


@dataclass(frozen=True, slots=True)
class Drawing:
    """The graph of one round; devices are places among those shown.

    Attributes
    ----------
    round : int
    arrived, lost : list of (int, int)
        Pairs of which a payload arrived in some direction, and of which none did.
    alone : list of int
        Who heard from nobody, shown or not.
    """

    round: int
    arrived: list[tuple[int, int]]
    lost: list[tuple[int, int]]
    alone: list[int]


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn of one history of exchanges.

    Attributes
    ----------
    shown : list of int
        Devices drawn.
    drawings : list of Drawing
    partners : float array, shape (len(shown), n_bins)
        How many devices each one heard from, on average over the rounds of a bin.
    bins : list of (int, int)
        First and last round of every bin.
    """

    shown: list[int]
    drawings: list[Drawing]
    partners: FloatArray
    bins: list[tuple[int, int]]


def picture(
    found: Exchanges, *, max_graphs: int, max_devices: int, max_lines: int, max_bins: int
) -> Picture:
    """Return the graphs of a few rounds, and every device's partners over all rounds.

    Devices are thinned evenly to `max_devices`, and further, down to 12, until all graphs together
    have at most `max_lines` lines. Of links that never change one round is drawn.
    """
    heard = found.partners()
    chosen = thinned(len(found.rounds), max_graphs if found.changes() else 1)
    numbers = {int(found.rounds[i]): i for i in chosen}
    members = {n: (p, a) for n, p, a in found.by_round() if n in numbers}
    count = min(found.devices, max_devices)
    while True:
        shown = thinned(found.devices, count)
        drawings = [
            Drawing(n, *_lines(*members[n], shown), np.flatnonzero(heard[shown, at] == 0).tolist())
            for n, at in numbers.items()
        ]
        if count <= 12 or sum(len(d.arrived) + len(d.lost) for d in drawings) <= max_lines:
            break
        count = max(12, count * 3 // 4)
    edges = np.linspace(0, len(found.rounds), min(max_bins, len(found.rounds)) + 1).astype(int)
    sums = np.add.reduceat(heard[shown], edges[:-1], axis=1)
    ends = [(int(found.rounds[a]), int(found.rounds[b - 1])) for a, b in pairwise(edges)]
    return Picture(shown, drawings, sums / np.diff(edges), ends)


def _lines(
    pairs: IntArray, arrived: BoolArray, shown: Sequence[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    place = {device: at for at, device in enumerate(shown)}
    good: dict[tuple[int, int], bool] = {}
    for (a, b), came in zip(pairs.tolist(), arrived.tolist(), strict=True):
        if a in place and b in place:
            line = min(place[a], place[b]), max(place[a], place[b])
            good[line] = good.get(line, False) or came
    return [x for x, came in good.items() if came], [x for x, came in good.items() if not came]


def places(count: int) -> list[tuple[float, float]]:
    """Return points on the unit circle, the first on top, clockwise."""
    turns = [2 * pi * i / count for i in range(count)]
    return [(sin(turn), cos(turn)) for turn in turns]


def svg(drawing: Drawing, shown: Sequence[int]) -> str:
    """Return the graph of a round as an SVG element, for the page's style sheet to colour."""
    at = [(round(100 + 90 * x), round(100 - 90 * y)) for x, y in places(len(shown))]
    alone = set(drawing.alone)
    n_lines = len(drawing.arrived) + len(drawing.lost)
    faint = max(0.25, min(0.9, 60 / max(1, n_lines)))

    def path(kind: str, lines: list[tuple[int, int]]) -> str:
        steps = "".join(f"M{at[a][0]} {at[a][1]}L{at[b][0]} {at[b][1]}" for a, b in lines)
        look = f'opacity="{faint:.2f}" stroke-width="{2.5 if n_lines <= 60 else 1}"'
        return f'<path class="{kind}" {look} d="{steps}"/>' if lines else ""

    dots = "".join(
        f'<circle class="{"alone" if i in alone else "dot"}" cx="{x}" cy="{y}" '
        f'r="{4 if len(shown) <= 30 else 2.5}"><title>device {device}</title></circle>'
        for i, ((x, y), device) in enumerate(zip(at, shown, strict=True))
    )
    words = escape(f"links of round {drawing.round}: {len(drawing.arrived)} pairs exchanged")
    return (
        f'<svg viewBox="0 0 200 200" role="img" aria-label="{words}">'
        f"{path('came', drawing.arrived)}{path('lost', drawing.lost)}{dots}</svg>"
    )
