"""The report's figures as PNG and SVG files, for papers and for readers without a browser.

Drawn with matplotlib's objects alone, without pyplot and its global state. The same records give
the same bytes with the same matplotlib.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from fedsim.report import exchanges, series, timeline
from fedsim.results import RunResult

__all__ = ["write_plots"]

_SETTINGS: Any = {
    "svg.hashsalt": "fedsim",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold a $
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa4af",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e9ecef",
    "legend.frameon": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "lines.scale_dashes": False,
}
_ABSCISSAE = {"round": "round", "time": "time", "traffic": "bytes"}
_MAX_POINTS = 4_000
_LEGEND_NAME = 32
_ALONE = "#d9480f"


def write_plots(run: RunResult, directory: Path) -> list[Path]:
    """Draw every figure that the records allow into `directory`; return the files.

    Files of these names that no longer have anything to show are removed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    with mpl.rc_context(_SETTINGS):
        for name, draw in _figures(run):
            figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
            FigureCanvasAgg(figure)
            draw(figure.add_subplot())
            for suffix, stamp in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = directory / f"{name}.{suffix}"
                figure.savefig(path, format=suffix, metadata=stamp)
                written.append(path)
                figure.set_layout_engine("none")  # laid out once, for both files
    for path in directory.glob("*.*"):
        if path.suffix in {".png", ".svg"} and path not in written:
            path.unlink()
    return written


def _figures(run: RunResult) -> Iterator[tuple[str, Callable[[Axes], None]]]:
    drawn = series.curves(run, max_points=_MAX_POINTS)
    for key, word in (("eval_accuracy", "accuracy"), ("eval_loss", "loss")):
        if any(key in curve.y for curve in drawn):
            for abscissa in _ABSCISSAE:
                yield f"{word}_by_{abscissa}", partial(_curves, run, drawn, key, abscissa)
    if any(result.rounds for result in run.strategies.values()):
        yield "traffic", partial(_traffic, run)
    devices = series.devices_of(run)
    if devices.get("label_counts"):
        yield "data_split", partial(_split, devices)
    if devices.get("samples"):
        yield "devices", partial(_devices, devices)
    for index, network in enumerate(run.world.get("networks", ())):
        if network.get("uplink_bps") or network.get("downlink_bps"):
            name = "network" if index == 0 else f"network_{index + 1}"
            yield name, partial(_network, series.network_title(run, network), network)

    states = timeline.link_states(run, max_links=40, bins=400)
    if states is not None:
        yield "link_states", partial(_link_states, states)
    for index, one in enumerate(exchanges.exchanges_of(run), start=1):
        yield f"exchanges_{index}", partial(_exchanges, one)
    for index, result in enumerate(run.strategies.values(), start=1):
        spans = timeline.spans_of(result)
        paths = [] if spans is None else timeline.round_paths(result, spans)
        if spans is not None and paths:
            slowest = max(paths, key=lambda path: path.end - path.start)
            title = f"{_short(result.name)}, round {slowest.round} (slowest)"
            yield f"timeline_{index}", partial(_timeline, title, spans, slowest)


def _short(name: str) -> str:
    return name if len(name) <= _LEGEND_NAME else name[: _LEGEND_NAME - 1] + "…"


def _dashes(style: series.Style) -> Any:
    return (0, style.dash) if style.dash else "solid"


def _curves(
    run: RunResult, drawn: list[series.Curves], key: str, abscissa: str, axes: Axes
) -> None:
    column = _ABSCISSAE[abscissa]
    longest = max((curve.x[column][-1] for curve in drawn if key in curve.y), default=0.0)
    scale, unit = series.time_unit(longest) if abscissa == "time" else (1.0, "")
    fit: list[float] = []
    for curve in (c for c in drawn if key in c.y):
        values = zip(curve.x[column], curve.y[key], strict=True)
        points = [(x / scale, y) for x, y in values if y is not None]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=curve.style.light,
            linestyle=_dashes(curve.style),
            linewidth=1.5,
            marker="o" if len(points) == 1 else None,
            label=_label(curve),
        )
        if curve.state != "diverged":
            fit += [y for _, y in points]
        hit = None if curve.reached is None else curve.y[key][curve.reached]
        if key == "eval_accuracy" and curve.reached is not None and hit is not None:
            at = curve.x[column][curve.reached] / scale
            axes.plot(at, hit, "o", ms=6, mfc="white", mec=curve.style.light, mew=1.5)
    if abscissa == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif abscissa == "traffic":
        axes.xaxis.set_major_formatter(EngFormatter("B"))
    words = {
        "round": "round",
        "time": f"virtual time ({unit})",
        "traffic": "traffic since the start",
    }
    axes.set_xlabel(words[abscissa])
    axes.set_ylabel(series.label_of(key))
    if key == "eval_accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        if run.target is not None:
            axes.axhline(run.target, color="#5a636e", lw=0.9, ls=(0, (2, 3)), label="target")
    elif fit and any(curve.state == "diverged" for curve in drawn):
        margin = 0.08 * (max(fit) - min(fit) or 1.0)
        axes.set_ylim(min(fit) - margin, max(fit) + margin)  # a curve that explodes flattens none
    axes.legend(ncols=2 if len(drawn) > 6 else 1, fontsize=8)


def _label(curve: series.Curves) -> str:
    name = _short(curve.name) + ("" if curve.state == "done" else f" ({curve.state})")
    return f"\u200b{name}" if name.startswith("_") else name  # matplotlib hides names with _


def _traffic(run: RunResult, axes: Axes) -> None:
    names = [_short(name) for name in run.strategies]
    left = [0.0] * len(names)
    kinds = (("bytes_down", "from the server", "#1f3fb8"), ("bytes_up", "to the server", "#1598d7"),
             ("bytes_peer", "between devices", "#c9619f"))  # fmt: skip
    for key, words, colour in kinds:
        sizes = [sum(getattr(row, key) for row in r.rounds) for r in run.strategies.values()]
        if any(sizes):
            axes.barh(range(len(names)), sizes, left=left, color=colour, height=0.6, label=words)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(EngFormatter("B"))
    axes.set_xlabel("payload, all rounds")
    if any(left):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)


def _split(devices: dict[str, Any], axes: Axes) -> None:
    counts = devices["label_counts"]
    image = axes.imshow(
        list(zip(*counts, strict=True)), aspect="auto", cmap="Blues", vmin=0, origin="lower",
        interpolation="nearest",
    )  # fmt: skip
    axes.grid(visible=False)
    axes.set_xlabel("device" if len(counts) == devices["count"] else "devices, a sample of them")
    axes.set_ylabel("class")
    axes.figure.colorbar(image, ax=axes, label="training samples")


def _devices(devices: dict[str, Any], axes: Axes) -> None:
    pairs = zip(devices["samples"], devices["speed_samples_per_s"], strict=True)
    points = [(samples, speed) for samples, speed in pairs if speed]
    if points:
        samples, speeds = zip(*points, strict=True)
        axes.plot(samples, speeds, "o", ms=4, color="#1f3fb8", alpha=0.7, mew=0)
        _logarithmic(axes, "")
    axes.set_xlabel("training samples of a device")
    axes.set_ylabel("speed (samples/s)")


def _network(title: str, network: dict[str, Any], axes: Axes) -> None:
    sides = (("uplink_bps", "device to server", "o", "#1f3fb8"),
             ("downlink_bps", "server to device", "D", "#d9480f"))  # fmt: skip
    for key, words, marker, colour in sides:
        rates = sorted(rate for rate in network.get(key) or () if rate)
        if rates:
            axes.plot(range(1, len(rates) + 1), rates, marker, ms=4, color=colour, label=words)
            axes.legend(fontsize=8)
    _logarithmic(axes, "bit/s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("devices, slowest link first")
    axes.set_ylabel("access rate")
    axes.set_title(_short(title), fontsize=9)


def _link_states(states: timeline.LinkStates, axes: Axes) -> None:
    scale, unit = series.time_unit(states.until)
    colours = LinearSegmentedColormap.from_list("states", ["#c2410c", "#e3e8ee"])
    rows = len(states.links)
    image = axes.imshow(
        states.level, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest",
        extent=(0.0, states.until / scale, rows - 0.5, -0.5),
    )  # fmt: skip
    axes.grid(visible=False)
    axes.set_yticks(range(rows), map(_short, states.links), fontsize=max(3, min(8, 240 // rows)))
    axes.set_xlabel(f"virtual time ({unit})")
    axes.figure.colorbar(image, ax=axes, label="rate, share of the link's best")


def _timeline(title: str, spans: timeline.Spans, path: timeline.RoundPath, axes: Axes) -> None:
    rows, _ = timeline.node_rows(spans, path, max_nodes=30, max_spans=2_000)
    scale, unit = series.time_unit(path.end - path.start)
    colours = {"in": "#1598d7", "work": "#7a8591", "out": "#d9480f"}
    words = {"in": "receiving", "work": "local work", "out": "sending"}
    for row, members in enumerate(rows.values()):
        for index in members:
            side = timeline.side_of(spans, index)
            length = float(spans.end[index] - spans.start[index]) / scale
            start = float(spans.start[index] - path.start) / scale
            axes.barh(row, length, left=start, height=0.7, color=colours[side],
                      lw=1.0 if index in path.path else 0.0, ec="black",
                      alpha=1.0 if spans.outcome[index] in {"", "delivered"} else 0.4,
                      label=words.pop(side, None))  # fmt: skip
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), map(str, rows), fontsize=7)
    axes.set_ylabel("device, the last one on top")
    axes.set_xlabel(f"virtual time since the round began ({unit})")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)


def _exchanges(found: exchanges.Exchanges, axes: Axes) -> None:
    """Draw the graphs of a few rounds above a strip: how many devices each one heard from."""
    drawn = exchanges.picture(found, max_graphs=5, max_devices=60, max_lines=10_000, max_bins=400)
    axes.set_title(_short(", ".join(found.strategies)), fontsize=9)
    axes.axis("off")
    for at, drawing in enumerate(drawn.drawings):
        _graph(drawing, len(drawn.shown), axes.inset_axes((0.2 * at, 0.62, 0.19, 0.33)))
    strip = axes.inset_axes((0.0, 0.0, 0.92, 0.52))
    most = max(1.0, float(drawn.partners.max()))
    colours = _partner_colours(most)
    image = strip.imshow(
        drawn.partners, aspect="auto", cmap=colours, vmin=0, vmax=most, interpolation="nearest",
        extent=(drawn.bins[0][0] - 0.5, drawn.bins[-1][1] + 0.5, len(drawn.shown) - 0.5, -0.5),
    )  # fmt: skip
    strip.grid(visible=False)
    strip.xaxis.set_major_locator(MaxNLocator(integer=True))
    strip.set_xlabel("round; orange: lost payloads, and devices that heard from nobody")
    few = len(drawn.shown) < found.devices
    strip.set_ylabel("devices, some of them" if few else "device")
    axes.figure.colorbar(image, cax=axes.inset_axes((0.94, 0.0, 0.015, 0.52)), label="heard from")


def _partner_colours(most: float) -> LinearSegmentedColormap:
    """Return a scale from 0 to `most` on which half a device and less stands out."""
    none = min(0.5, 0.5 / most)
    stops = ((0.0, _ALONE), (none, _ALONE), (none, "#e9edf6"), (1.0, "#14297d"))
    return LinearSegmentedColormap.from_list("partners", stops)


def _graph(drawing: exchanges.Drawing, count: int, axes: Axes) -> None:
    at = exchanges.places(count)
    lines = len(drawing.arrived) + len(drawing.lost)
    faint, width = max(0.2, min(0.9, 60 / max(1, lines))), 1.2 if lines <= 60 else 0.5
    for pairs, colour, dash in ((drawing.arrived, "#1f3fb8", "-"), (drawing.lost, _ALONE, "--")):
        # one line with gaps for all pairs
        x = [v for a, b in pairs for v in (at[a][0], at[b][0], nan)]
        y = [v for a, b in pairs for v in (at[a][1], at[b][1], nan)]
        axes.plot(x, y, dash, color=colour, alpha=faint, lw=width)
    colours = [_ALONE if i in set(drawing.alone) else "#5a636e" for i in range(count)]
    axes.scatter([x for x, _ in at], [y for _, y in at], s=8, c=colours, zorder=3, linewidths=0)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.set_title(f"round {drawing.round}", fontsize=8)


def _logarithmic(axes: Axes, unit: str) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(EngFormatter(unit))
    axes.yaxis.set_minor_formatter(NullFormatter())
