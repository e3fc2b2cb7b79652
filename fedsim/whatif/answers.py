"""What a study's rows say: who is fastest below which size, which jobs get shorter, what to do."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pandas as pd
from rich.table import Table

from fedsim.errors import FedsimError
from fedsim.units import format_bandwidth, format_time
from fedsim.whatif.evaluate import Line
from fedsim.whatif.study import Study

__all__ = ["crossovers", "fastest", "job_completion", "recommendations", "study_table"]

_NETWORK = ["devices", "bandwidth_bps", "latency_s", "failure"]
# A cheaper choice is worth naming if it is not slower than this.
_NEARLY = 1.10
# Times within 0.1 % are equal.
_EQUAL = 1.001


def crossovers(lines: Sequence[Line]) -> pd.DataFrame:
    """Return the size at which each two choices are equally fast, for each network.

    Times are straight lines over the size, so the answer is exact and does not depend on the
    study's payloads.

    Returns
    -------
    DataFrame
        Columns ``devices, bandwidth_bps, latency_s, failure, at_bytes``, then ``collective`` and
        ``topology`` of the one that is faster ``below`` and of the one that is faster ``above``.
    """
    rows = []
    for network, members in _by_network(lines).items():
        for one, other in combinations(members, 2):
            below, above = sorted((one, other), key=lambda line: line.intercept)
            saved = below.seconds_per_byte - above.seconds_per_byte
            if above.intercept > below.intercept and saved > 1e-9 * below.seconds_per_byte:
                at = (above.intercept - below.intercept) / saved
                ends = (below.collective, below.topology, above.collective, above.topology)
                rows.append((*network, at, *ends))
    names = ["collective_below", "topology_below", "collective_above", "topology_above"]
    return pd.DataFrame(rows, columns=[*_NETWORK, "at_bytes", *names])


def fastest(lines: Sequence[Line]) -> pd.DataFrame:
    """Return, for each network, which choice is the fastest between which sizes.

    Returns
    -------
    DataFrame
        Columns ``scope`` (``all``, or one topology), ``devices, bandwidth_bps, latency_s, failure,
        from_bytes, to_bytes`` (inf at the end), ``collective, topology``.
    """
    rows = []
    for network, members in _by_network(lines).items():
        places = list(dict.fromkeys(line.topology for line in members))
        scopes = {"all": members}
        if len(places) > 1:
            scopes |= {place: [a for a in members if a.topology == place] for place in places}
        for scope, chosen in scopes.items():
            for start, end, line in _envelope(chosen):
                rows.append((scope, *network, start, end, line.collective, line.topology))
    names = ["scope", *_NETWORK, "from_bytes", "to_bytes", "collective", "topology"]
    return pd.DataFrame(rows, columns=names)


def _by_network(lines: Sequence[Line]) -> dict[tuple[Any, ...], list[Line]]:
    found: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        key = line.devices, line.bandwidth_bps, line.latency_s, line.failure
        found[key].append(line)
    return found


def _envelope(lines: Sequence[Line]) -> list[tuple[float, float, Line]]:
    """Return the lower envelope of straight lines over sizes from 0 on."""
    size = 0.0
    parts: list[tuple[float, float, Line]] = []
    best = min(lines, key=lambda a: (a.intercept, a.seconds_per_byte, a.price))
    while True:
        ahead = [
            (
                (line.intercept - best.intercept) / (best.seconds_per_byte - line.seconds_per_byte),
                line,
            )
            for line in lines
            if line.seconds_per_byte < best.seconds_per_byte * (1 - 1e-9)
        ]
        if not ahead:
            return [*parts, (size, float("inf"), best)]
        end, following = min(ahead, key=lambda a: (a[0], a[1].seconds_per_byte, a[1].price))
        if end > size:
            parts.append((size, end, best))
        size, best = max(size, end), following


def job_completion(frame: pd.DataFrame, study: Study) -> pd.DataFrame:
    """Return how much shorter jobs get than with the baseline collective on the same network.

    Baselines of a row are those of the study's `baseline` collective, one for each topology, with
    as many devices and the same payload, rate, latency and failure.

    Returns
    -------
    DataFrame
        Columns ``topology, collective, payload``, the network, ``baseline_topology``,
        ``iteration_seconds, job_seconds, reduction`` (share of the baseline's), ``note``.

    Raises
    ------
    FedsimError
        If BML shortens a job by more than 1 - 1/k while no loss is modelled and the baseline's
        network reaches the lower bound of one port: that cannot be.
    """
    timed = frame[frame["iteration_seconds"].notna()]
    rows = []
    is_ideal = not str(study.losses)
    for key, group in _groups(timed):
        bases = group[group["collective"] == study.baseline]
        for (_, base), (_, row) in product(bases.iterrows(), group.iterrows()):
            reduction = 1 - row["iteration_seconds"] / base["iteration_seconds"]
            note = ""
            limit = _ideal_limit(row, base)
            if limit is not None and reduction > limit + 1e-9:
                if is_ideal and base["gap"] < 1e-6 and row["failure"] == "none":
                    raise FedsimError(
                        f"{row['collective']} shortens the job by {reduction:.1%}, more than the "
                        f"ideal model allows ({limit:.1%}): this is an error of the timing"
                    )
                note = f"beyond the ideal {limit:.1%}: the baseline's network blocks or loses"
            rows.append(
                {
                    "topology": row["topology"],
                    "collective": row["collective"],
                    **dict(zip(["payload", *_NETWORK], key, strict=True)),
                    "baseline_topology": base["topology"],
                    "iteration_seconds": row["iteration_seconds"],
                    "job_seconds": row["iteration_seconds"] * study.iterations,
                    "reduction": reduction,
                    "note": note,
                }
            )
    names = ["topology", "collective", "payload", *_NETWORK, "baseline_topology"]
    names += ["iteration_seconds", "job_seconds", "reduction", "note"]
    return pd.DataFrame(rows, columns=names)


def _groups(frame: pd.DataFrame) -> Iterable[tuple[Any, pd.DataFrame]]:
    """Return the rows of each payload and network with their key, in the order of the study."""
    return frame.groupby(["payload", *_NETWORK], sort=False)


def _ideal_limit(row: Any, base: Any) -> float | None:
    """Return 1 - 1/k for BML on a BCube with k ports against one port, else None."""
    if row["collective"] != "bml" or row["devices"] != base["devices"]:
        return None
    ports = row["nic_ports"] / row["devices"]
    return 1 - 1 / ports if base["nic_ports"] == base["devices"] else None


def recommendations(frame: pd.DataFrame) -> list[str]:
    """Return one sentence for each payload and network: what to take, and why."""
    timed = frame[frame["seconds"].notna()]
    found = []
    for key, group in _groups(timed):
        payload, devices, rate, latency, failure = key
        ranked = group.sort_values(["seconds", "price"], kind="stable")
        equal = ranked[ranked["seconds"] <= ranked["seconds"].iloc[0] * _EQUAL]
        best = equal.sort_values("price", kind="stable").iloc[0]
        head = (
            f"{payload}, {devices} devices at {_rate(rate)}, {format_time(float(latency))} a step"
        )
        head += "" if failure == "none" else f", {failure}"
        said = f"{head}: {_named(best)}, {_seconds(best['seconds'])}"
        others = [_named(row) for _, row in equal.iterrows() if _named(row) != _named(best)]
        said += f" (as fast, for no less: {', '.join(others)})" if others else ""
        said += f"; {_reason(best)}"
        slower = ranked[ranked["seconds"] > ranked["seconds"].iloc[0] * _EQUAL]
        elsewhere = slower[slower["topology"] != best["topology"]]
        if len(elsewhere):
            other = elsewhere.iloc[0]
            ratio = other["seconds"] / best["seconds"]
            said += f"; {_named(other)} takes {ratio:.2f} times as long"
            said += f" and costs {other['price'] / best['price']:.2f} times as much"
        near = ranked[ranked["seconds"] <= best["seconds"] * _NEARLY]
        cheap = near.sort_values("price", kind="stable").iloc[0]
        if cheap["price"] < best["price"]:
            more = cheap["seconds"] / best["seconds"] - 1
            said += f". Cheaper: {_named(cheap)}, {more:.1%} slower for "
            said += f"{cheap['price'] / best['price']:.0%} of the price"
        found.append(f"{said}.")
    return found


def _named(row: Any) -> str:
    return f"{row['collective']} on {row['topology']}"


def _reason(row: Any) -> str:
    if row["critical_link"] == "latency":
        return f"its {row['steps']} steps of latency are all that counts"
    if row["gap"] is not None and row["gap"] < 0.01:
        return "it reaches the lower bound of its network"
    return f"{1 + row['gap']:.2f} times the lower bound, limited by link {row['critical_link']}"


def _rate(rate: float) -> str:
    return format_bandwidth(float(rate))


def _seconds(value: float) -> str:
    """Return a time with four significant digits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.4g} s"


def study_table(frame: pd.DataFrame) -> Table:
    """Return the rows as a table for the terminal, the fastest of each payload and network first.

    Rows of pairs that make no sense come last, with the reason.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("topology", "collective", "payload", "rate", "latency", "failure"):
        table.add_column(name)
    for name in ("time", "closed form", "gap", "iteration", "price"):
        table.add_column(name, justify="right")
    table.add_column("critical")
    table.add_column("note", overflow="fold")
    for row in _ordered(frame):
        table.add_row(
            str(row["topology"]),
            str(row["collective"]),
            _or_blank(row["payload"], str),
            _or_blank(row["bandwidth_bps"], _rate),
            _or_blank(row["latency_s"], lambda v: format_time(float(v))),
            "" if row["failure"] == "none" else str(row["failure"]),
            _or_blank(row["seconds"], _seconds),
            _or_blank(row["closed_form_seconds"], _seconds),
            _or_blank(row["gap"], lambda v: f"{v:.1%}"),
            _or_blank(row["iteration_seconds"], _seconds),
            f"{row['price']:,.0f}",
            str(row["critical_link"] or ""),
            str(row["note"] or ""),
        )
    return table


def _or_blank(value: Any, text: Any) -> str:
    return "" if pd.isna(value) else str(text(value))


def _ordered(frame: pd.DataFrame) -> Iterable[Any]:
    made = frame[frame["payload"].notna()]
    for _, group in _groups(made):
        for _, row in group.sort_values("seconds", kind="stable").iterrows():
            yield row
    for _, row in frame[frame["payload"].isna()].iterrows():
        yield row
