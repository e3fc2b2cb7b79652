"""Where the time of a round went: critical paths, busy links, link states, spans to draw.

All of it from `transfers.parquet`, `compute.parquet` and `links.parquet`, which a scenario asks for
by ``record.transfers``.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.report.tables import format_percent
from fedsim.results import RunResult, StrategyResult

__all__ = [
    "LinkStates",
    "LinkUse",
    "RoundPath",
    "Spans",
    "TimeShare",
    "Timeline",
    "critical_path",
    "link_states",
    "link_uses",
    "natural",
    "node_rows",
    "place_of",
    "round_paths",
    "side_of",
    "spans_of",
    "telling_rounds",
    "time_share",
    "timeline_notes",
    "timelines",
]

_NEGLIGIBLE = 0.01  # share of the time below which the network does not matter
_INWARD = {"down", "evaluate-down"}  # drawn at the receiver, the rest at the sender

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spans:
    """Transfers and local work of one strategy, side by side.

    Attributes
    ----------
    round, source, destination : int array, shape (n_spans,)
        Local work has its device at both ends.
    start, end : float array, shape (n_spans,)
        Virtual seconds; a transfer starts when it is handed to the network.
    kind, outcome : list of str
        The outcome of local work is "".
    is_compute : bool array, shape (n_spans,)
    size_bytes : int array, shape (n_spans,)
        0 for local work.
    route : list of sequence of str
        Links crossed.
    """

    round: IntArray
    source: IntArray
    destination: IntArray
    start: FloatArray
    end: FloatArray
    kind: list[str]
    outcome: list[str]
    is_compute: NDArray[np.bool_]
    size_bytes: IntArray
    route: list[Sequence[str]]


def spans_of(result: StrategyResult) -> Spans | None:
    """Return what a strategy's transfers and local work were; None if they were not recorded.

    Transfers that never ended are left out.
    """
    transfers, compute = result.table("transfers"), result.table("compute")
    if transfers is None or compute is None:
        return None
    transfers = transfers.filter(transfers["finished"].is_valid())
    none = [""] * compute.num_rows

    def joined(first: str, second: str, dtype: Any) -> Any:
        parts = (transfers[first].to_numpy(), compute[second].to_numpy())
        return np.concatenate(parts).astype(dtype)

    sizes = [transfers["size_bytes"].to_numpy(), np.zeros(compute.num_rows)]
    return Spans(
        round=joined("round", "round", np.int64),
        source=joined("source", "device", np.int64),
        destination=joined("destination", "device", np.int64),
        start=joined("released", "started", np.float64),
        end=joined("finished", "finished", np.float64),
        kind=transfers["kind"].to_pylist() + compute["kind"].to_pylist(),
        outcome=transfers["outcome"].to_pylist() + none,
        is_compute=np.arange(transfers.num_rows + compute.num_rows) >= transfers.num_rows,
        size_bytes=np.concatenate(sizes).astype(np.int64),
        route=transfers["route"].to_pylist() + [()] * compute.num_rows,
    )


def critical_path(spans: Spans, members: IntArray) -> list[int]:
    """Return the chain of spans that ends last among `members`, in order of time.

    Each link of the chain is the latest span that ended where the next one began, before it began:
    a device computes after it received, and sends after it computed.
    """
    if not len(members):
        return []
    slack = 1e-9 * max(1.0, float(np.abs(spans.end[members]).max()))
    path = [int(members[np.argmax(spans.end[members])])]
    while True:
        here = path[-1]
        before = members[
            (spans.destination[members] == spans.source[here])
            & (spans.end[members] <= spans.start[here] + slack)
            & ~np.isin(members, path)
        ]
        if not len(before):
            return path[::-1]
        path.append(int(before[np.argmax(spans.end[before])]))


@dataclass(frozen=True, slots=True)
class RoundPath:
    """What one round waited for.

    Attributes
    ----------
    round : int
    start, end : float
        Virtual seconds.
    path : list of int
        Spans of the critical path.
    network, compute : float
        Seconds of it in transfers and in local work; the rest is waiting.
    device : int or None
        The device whose work or transfer ended last.
    link : str or None
        Of the links on the path, the one that the round's transfers kept occupied longest.
    """

    round: int
    start: float
    end: float
    path: list[int]
    network: float
    compute: float
    device: int | None
    link: str | None


def round_paths(result: StrategyResult, spans: Spans) -> list[RoundPath]:
    """Return the critical path of every round; spans that end after their round do not count."""
    links = result.table("links")
    rates = dict(
        zip(links["link"].to_pylist(), links["bandwidth_bps"].to_pylist(), strict=True)
        if links is not None
        else ()
    )
    order = np.argsort(spans.round, kind="stable")
    numbers = spans.round[order]
    paths, start = [], 0.0
    for row in result.rounds:
        low, high = np.searchsorted(numbers, [row.round, row.round + 1])
        members = order[low:high]
        slack = 1e-9 * max(1.0, row.virtual_time)
        inside = members[spans.end[members] <= row.virtual_time + slack]
        path = critical_path(spans, inside)
        lengths = spans.end[path] - spans.start[path]
        works = spans.is_compute[path]
        paths.append(
            RoundPath(
                round=row.round,
                start=start,
                end=row.virtual_time,
                path=path,
                network=float(lengths[~works].sum()),
                compute=float(lengths[works].sum()),
                device=place_of(spans, path[-1]) if path else None,
                link=_busiest(spans, members, path, rates),
            )
        )
        start = row.virtual_time
    return paths


def side_of(spans: Spans, index: int) -> str:
    """Return how a span is drawn: ``in`` at the receiver, ``work`` and ``out`` at the sender."""
    if spans.is_compute[index]:
        return "work"
    return "in" if spans.kind[index] in _INWARD else "out"


def place_of(spans: Spans, index: int) -> int:
    """Return the node that a span is drawn at."""
    ends = spans.destination if side_of(spans, index) == "in" else spans.source
    return int(ends[index])


def _busiest(
    spans: Spans, members: IntArray, path: list[int], rates: dict[str, float]
) -> str | None:
    on_path = dict.fromkeys(link for index in path for link in spans.route[index])
    occupied = dict.fromkeys(on_path, 0.0)
    for index in members.tolist():
        for link in spans.route[index]:
            if link in occupied:
                occupied[link] += 8 * spans.size_bytes[index] / rates.get(link, np.inf)
    return max(occupied, key=lambda link: occupied[link], default=None)


@dataclass(frozen=True, slots=True)
class TimeShare:
    """What a strategy's rounds waited for: shares of its virtual time, and the usual suspects."""

    network: float
    compute: float
    device: int | None
    link: str | None

    @property
    def waiting(self) -> float:
        """The share in which nothing on the critical path moved: timeouts, absent devices."""
        return max(0.0, 1.0 - self.network - self.compute)


def time_share(paths: Sequence[RoundPath]) -> TimeShare:
    """Return the shares over all rounds, and who was critical in most of them."""
    total = sum(path.end - path.start for path in paths) or 1.0
    devices = Counter(path.device for path in paths if path.device is not None)
    links = Counter(path.link for path in paths if path.link is not None)
    return TimeShare(
        network=sum(path.network for path in paths) / total,
        compute=sum(path.compute for path in paths) / total,
        device=devices.most_common(1)[0][0] if devices else None,
        link=links.most_common(1)[0][0] if links else None,
    )


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one strategy, and what its rounds waited for."""

    spans: Spans
    paths: list[RoundPath]
    share: TimeShare


def timelines(run: RunResult) -> dict[str, Timeline]:
    """Return the timeline of every strategy whose transfers were recorded."""
    found = {}
    for name, result in run.strategies.items():
        spans = spans_of(result)
        if spans is not None and len(spans.round):
            paths = round_paths(result, spans)
            found[name] = Timeline(spans, paths, time_share(paths))
    return found


def timeline_notes(found: dict[str, Timeline]) -> list[str]:
    """Return a warning for each strategy whose time the network does not influence."""
    return [
        f"{name}: the network is not on the critical path; transfers take "
        f"{format_percent(line.share.network)} of the time, so links change nothing here."
        for name, line in found.items()
        if line.share.network < _NEGLIGIBLE and line.share.compute > 0
    ]


def telling_rounds(paths: Sequence[RoundPath]) -> dict[int, str]:
    """Return a few rounds worth a picture, index → why: slowest, median, first, last."""
    if not paths:
        return {}
    by_length = sorted(range(len(paths)), key=lambda i: paths[i].start - paths[i].end)
    chosen = {by_length[0]: "slowest"}
    middle = by_length[len(by_length) // 2]
    for index, why in ((middle, "median"), (0, "first"), (len(paths) - 1, "last")):
        chosen.setdefault(index, why)
    return chosen


def node_rows(
    spans: Spans, path: RoundPath, *, max_nodes: int, max_spans: int
) -> tuple[dict[int, list[int]], int]:
    """Return what to draw of a round, and how many nodes there are in all.

    Returns
    -------
    dict
        Node → its spans; the nodes that end last, latest first, whole, as many as the two limits
        allow. Of a single node that is too much alone, the spans that end last.
    int
        Nodes of the round.
    """
    rows: dict[int, list[int]] = {}
    for index in np.flatnonzero(spans.round == path.round).tolist():
        rows.setdefault(place_of(spans, index), []).append(index)
    latest = sorted(rows, key=lambda node: -max(spans.end[i] for i in rows[node]))
    shown: dict[int, list[int]] = {}
    for node in latest[:max_nodes]:
        if shown and sum(map(len, shown.values())) + len(rows[node]) > max_spans:
            break
        shown[node] = sorted(rows[node], key=lambda i: spans.end[i])[-max_spans:]
    return shown, len(rows)


@dataclass(frozen=True, slots=True)
class LinkUse:
    """How much one link was used.

    Attributes
    ----------
    link : str
    bandwidth_bps, latency, carried_bytes : float
    busy : float
        Share of the time with at least one flow on it.
    utilisation : float or None
        Bits carried over bits that it could have carried; None if it has no limit.
    """

    link: str
    bandwidth_bps: float
    latency: float
    carried_bytes: float
    busy: float
    utilisation: float | None


def link_uses(result: StrategyResult) -> list[LinkUse]:
    """Return the use of every recorded link, the most utilised first."""
    table, until = result.table("links"), result.summary.get("virtual_time") or 0.0
    if table is None or until <= 0:
        return []
    uses = []
    for row in table.to_pylist():
        times, integral = _bits(row, until)
        capacity = float(np.interp(until, times, integral))
        share = 8 * row["carried_bytes"] / capacity if np.isfinite(capacity) and capacity else None
        uses.append(
            LinkUse(
                link=row["link"],
                bandwidth_bps=row["bandwidth_bps"],
                latency=row["latency"],
                carried_bytes=row["carried_bytes"],
                busy=row["busy_time"] / until,
                utilisation=share,
            )
        )
    return sorted(uses, key=lambda use: (-(use.utilisation or 0.0), -use.busy, natural(use.link)))


def _bits(row: dict[str, Any], until: float) -> tuple[FloatArray, FloatArray]:
    """Return times, and the bits that a link could have carried up to each of them."""
    steps = np.array(row["change_times"] or [0.0])
    rates = np.array(row["change_rates_bps"] or [row["bandwidth_bps"]])
    edges = np.append(steps, max(until, steps[-1]))
    lengths = np.diff(edges)
    bits = np.where(lengths > 0, rates, 0.0) * np.where(lengths > 0, lengths, 1.0)
    return edges, np.concatenate([[0.0], np.cumsum(bits)])


def natural(name: str) -> list[Any]:
    """Return a sort key that puts ``up-9`` before ``up-10``."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part)
            for part in re.split(r"(\d+)", name)]  # fmt: skip


@dataclass(frozen=True, slots=True)
class LinkStates:
    """The states of links over time as a strip each.

    Attributes
    ----------
    links : list of str
    until : float
        Virtual seconds; the strips begin at 0.
    level : float array, shape (n_links, n_bins)
        Mean rate of each bin over the link's best rate, 0 to 1.
    changing : int
        How many links change in all.
    """

    links: list[str]
    until: float
    level: FloatArray
    changing: int


def link_states(run: RunResult, *, max_links: int, bins: int) -> LinkStates | None:
    """Return the strips of the links that change, the most used ones; None if none does.

    A link that several strategies share has one history; the strategy that ran longest shows it.
    """
    found: dict[str, dict[str, Any]] = {}
    by_length = sorted(
        run.strategies.values(), key=lambda r: -(r.summary.get("virtual_time") or 0.0)
    )
    until = max((r.summary.get("virtual_time") or 0.0 for r in by_length), default=0.0)
    for result in by_length:
        table = result.table("links")
        for row in [] if table is None else table.to_pylist():
            if len(row["change_times"] or ()) > 1:
                found.setdefault(row["link"], row)
    if not found or until <= 0:
        return None
    used = sorted(found.values(), key=lambda row: (-row["carried_bytes"], natural(row["link"])))
    shown = sorted(used[:max_links], key=lambda row: natural(row["link"]))
    edges = np.linspace(0.0, until, bins + 1)
    level = []
    for row in shown:
        times, integral = _bits(row, until)
        best = max([*row["change_rates_bps"], 1e-300])
        level.append(np.diff(np.interp(edges, times, integral)) / np.diff(edges) / best)
    return LinkStates([row["link"] for row in shown], until, np.array(level), len(found))
