"""A study's figures: time against cost, and time against size.

Drawn with matplotlib's objects alone, as PNG and SVG.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

from fedsim.units import format_bandwidth, format_time
from fedsim.whatif.evaluate import Line

__all__ = ["SETTINGS", "save_figure", "write_study_plots"]

SETTINGS: Any = {
    "svg.hashsalt": "fedsim",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4af",
    "axes.grid": True,
    "grid.color": "#e9ecef",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
# Okabe-Ito: told apart with any colour vision.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#4d4d4d")
_MARKERS = "osD^vPX*<>hd"
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 3)))
_LINES_PER_FIGURE = 14


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG, without times or versions in the files."""
    FigureCanvasAgg(figure)
    written = []
    for suffix, stamp in (("png", {"Software": None}), ("svg", {"Date": None})):
        path = stem.with_name(f"{stem.name}.{suffix}")
        figure.savefig(path, format=suffix, metadata=stamp)
        written.append(path)
        figure.set_layout_engine("none")  # laid out once, for both files
    return written


def write_study_plots(frame: pd.DataFrame, lines: Sequence[Line], directory: Path) -> list[Path]:
    """Draw time against cost for every payload, and time against size for every network.

    Returns
    -------
    list of Path
        The PNG and SVG files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for path in [*directory.glob("*.png"), *directory.glob("*.svg")]:
        path.unlink()
    styles = _Styles(frame)
    written = []
    with mpl.rc_context(SETTINGS):
        timed = frame[frame["seconds"].notna()]
        fleets = timed.groupby(["payload", "devices"], sort=False)
        for number, ((payload, devices), group) in enumerate(fleets, start=1):
            figure = Figure(figsize=(8.4, 4.6), dpi=150, layout="constrained")
            what = f"{payload}, {devices} devices"
            _time_against_cost(figure.add_subplot(), group, what, styles)
            written += save_figure(figure, directory / f"time_cost_{number}")
        networks = list(dict.fromkeys(map(_network_of, lines)))
        for number, network in enumerate(networks, start=1):
            members = [line for line in lines if _network_of(line) == network]
            figure = Figure(figsize=(9.0, 6.4), dpi=150, layout="constrained")
            _time_against_size(figure, members, frame, network, styles)
            written += save_figure(figure, directory / f"time_size_{number}")
    return written


def _network_of(line: Line) -> tuple[int, float, float, str]:
    return line.devices, line.bandwidth_bps, line.latency_s, line.failure


class _Styles:
    """A colour for each collective; a marker and a dash for each topology."""

    def __init__(self, frame: pd.DataFrame) -> None:
        names = list(dict.fromkeys(frame["collective"]))
        places = list(dict.fromkeys(frame["topology"]))
        self.colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        self.marker = {place: _MARKERS[i % len(_MARKERS)] for i, place in enumerate(places)}
        self.dash = {place: _DASHES[i % len(_DASHES)] for i, place in enumerate(places)}


def _time_against_cost(axes: Axes, group: pd.DataFrame, what: str, styles: _Styles) -> None:
    rate, latency, failure = _first_network(group)
    here = (group["bandwidth_bps"] == rate) & (group["latency_s"] == latency)
    shown = group[here & (group["failure"] == failure)]
    taken: dict[tuple[float, float], int] = defaultdict(int)
    for _, row in shown.iterrows():
        place = row["price"], float(f"{row['seconds']:.2g}")
        colour = styles.colour[row["collective"]]
        axes.plot(
            row["price"],
            row["seconds"],
            linestyle="none",
            marker=styles.marker[row["topology"]],
            color=colour,
            # What has the same time and price is a ring around the first.
            markersize=7 + 4 * taken[place],
            markerfacecolor="none" if taken[place] else colour,
            markeredgewidth=1.5,
        )
        taken[place] += 1
    front = _pareto(shown)
    xs, ys = [row["price"] for row in front], [row["seconds"] for row in front]
    axes.plot(xs, ys, color="#868e96", linewidth=1, drawstyle="steps-post", zorder=1)
    for row in front:
        axes.annotate(
            f"{row['collective']}\n{row['topology']}",
            (row["price"], row["seconds"]),
            xytext=(7, 5),
            textcoords="offset points",
            fontsize=7,
            color="#343a40",
        )
    axes.set_yscale("log")
    axes.margins(x=0.16, y=0.14)
    _time_ticks(axes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.set_xlabel("price of switches, ports, cards and cables")
    axes.set_ylabel("synchronisation time")
    note = "" if failure == "none" else f", {failure}"
    title = f"{what}, {format_bandwidth(rate)}, {format_time(latency)} a step"
    axes.set_title(title + note, loc="left", fontsize=10)
    _legend(axes, shown, styles)


def _first_network(group: pd.DataFrame) -> tuple[float, float, str]:
    row = group.iloc[0]
    return float(row["bandwidth_bps"]), float(row["latency_s"]), str(row["failure"])


def _pareto(rows: pd.DataFrame) -> list[Any]:
    """Return the rows that no other beats in price and (by 0.1 %) in time, cheapest first."""
    front: list[Any] = []
    for _, row in rows.sort_values(["price", "seconds"], kind="stable").iterrows():
        if not front or row["seconds"] < front[-1]["seconds"] * (1 - 1e-3):
            front.append(row)
    return front


def _legend(axes: Axes, shown: pd.DataFrame, styles: _Styles) -> None:
    for name in dict.fromkeys(shown["collective"]):
        axes.plot([], [], "s", color=styles.colour[name], label=name)
    for place in dict.fromkeys(shown["topology"]):
        axes.plot([], [], styles.marker[place], color="#868e96", label=place)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5, borderaxespad=0)


def _time_against_size(
    figure: Figure,
    lines: Sequence[Line],
    frame: pd.DataFrame,
    network: tuple[int, float, float, str],
    styles: _Styles,
) -> None:
    """Draw times above, and below how many times as long as the fastest each takes."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    payloads = frame.dropna(subset="payload")[["payload", "payload_bytes"]].drop_duplicates()
    sizes = payloads["payload_bytes"].astype(float)
    low = min(1e3, float(sizes.min()) / 4)
    high = max(1e8, float(sizes.max()) * 4)
    x = np.geomspace(low, high, 400)
    times = [line.intercept + line.seconds_per_byte * x for line in lines]
    best = np.min(times, axis=0)
    closest = sorted(range(len(lines)), key=lambda i: float(np.min(times[i] / best)))
    drawn = closest[:_LINES_PER_FIGURE]
    for i in drawn:
        look: dict[str, Any] = {
            "color": styles.colour[lines[i].collective],
            "linestyle": styles.dash[lines[i].topology],
            "linewidth": 1.5,
        }
        above.plot(x, times[i], label=f"{lines[i].collective}, {lines[i].topology}", **look)
        below.plot(x, times[i] / best, **look)
    for _, row in payloads.iterrows():
        size = float(row["payload_bytes"])
        for axes in (above, below):
            axes.axvline(size, color="#adb5bd", linewidth=0.8, zorder=0)
        above.annotate(
            str(row["payload"]),
            (size, 0.985),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 0),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            fontsize=7,
            color="#495057",
        )
    above.set_yscale("log")
    _time_ticks(above)
    below.set_ylim(0.9, min(6.0, 1.1 * max(float((times[i] / best).max()) for i in drawn)))
    below.set_ylabel("times the fastest")
    below.set_xscale("log")
    below.xaxis.set_major_formatter(EngFormatter("B", sep=" "))
    below.xaxis.set_minor_formatter(NullFormatter())
    below.set_xlim(low, high)
    below.set_xlabel("vector")
    above.set_ylabel("synchronisation time")
    devices, rate, latency, failure = network
    title = f"{devices} devices, {format_bandwidth(rate)}, {format_time(latency)} a step"
    title += "" if failure == "none" else f", {failure}"
    left_out = len(lines) - len(drawn)
    title += f" ({left_out} slower ones not drawn)" if left_out else ""
    above.set_title(title, loc="left", fontsize=10)
    above.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7, borderaxespad=0)


def _time_ticks(axes: Axes) -> None:
    """Label decades, and 2 and 5 as well where there are few decades."""
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.yaxis.set_minor_formatter(NullFormatter())
