"""What the page's program draws: the numbers of every figure, thinned to fit a page.

Decision: a page stays far below 6 MB whatever the run, 4.8 MB of which are plotly.js; so there are
upper bounds here, and numbers have six digits, which is finer than a pixel.
"""

from typing import Any

from fedsim.report import series, timeline
from fedsim.report.tables import format_bytes
from fedsim.results import RunResult

__all__ = ["collect", "has_device_figure", "has_network_figure", "measures", "strips"]

_CURVE_POINTS = 12_000  # of all strategies together
_HEAT_CELLS = 40_000
_SCATTER_POINTS = 1_500
_TIMELINE_NODES = 40
_TIMELINE_SPANS = 6_000  # of all strategies together
_STRIP_LINKS = 40
_STRIP_BINS = 240


def collect(run: RunResult, recorded: dict[str, timeline.Timeline]) -> dict[str, Any]:
    """Return everything that the page's program reads, ready for JSON."""
    points = max(100, _CURVE_POINTS // max(1, len(run.strategies)))
    totals = [
        [sum(getattr(row, key) for row in result.rounds) for key in
         ("bytes_down", "bytes_up", "bytes_peer")]
        for result in run.strategies.values()
    ]  # fmt: skip
    return {
        "target": run.target,
        "measures": measures(run),
        "strategies": [
            {
                "name": curve.name,
                "state": curve.state,
                "light": curve.style.light,
                "dark": curve.style.dark,
                "dash": ",".join(f"{length}px" for length in curve.style.dash) or "solid",
                "x": {key: [_short(v) for v in values] for key, values in curve.x.items()},
                "y": {key: [_short(v) for v in values] for key, values in curve.y.items()},
                "reached": curve.reached,
                "traffic": traffic,
            }
            for curve, traffic in zip(
                series.curves(run, max_points=points), totals, strict=True
            )
        ],
        "split": _split_data(run),
        "devices": _devices_data(run),
        "networks": [_network_data(run, n) for n in run.world.get("networks", ())],
        "timelines": _timeline_data(run, recorded),
        "strips": _strip_data(run),
    }  # fmt: skip


def _short(value: float | None) -> float | None:
    """Round to six digits, which is finer than a pixel."""
    return value if value is None or isinstance(value, int) else float(f"{value:.6g}")


def measures(run: RunResult) -> list[dict[str, str]]:
    """Return key and label of what was recorded beside accuracy and loss."""
    shown = {"eval_accuracy", "eval_loss"}
    keys = dict.fromkeys(key for curve in series.curves(run) for key in curve.y)
    return [{"key": key, "label": series.label_of(key)} for key in keys if key not in shown]


def _split_data(run: RunResult) -> dict[str, Any] | None:
    devices = series.devices_of(run)
    counts = devices.get("label_counts")
    if not counts:
        return None
    kept = series.thinned(len(counts), max(2, _HEAT_CELLS // max(1, len(counts[0]))))
    return {
        "devices": [devices["listed"][i] for i in kept],
        "counts": [[counts[i][c] for i in kept] for c in range(len(counts[0]))],
    }


def has_device_figure(devices: dict[str, Any]) -> bool:
    """Return whether devices differ in samples or speed."""
    return series.is_varied(devices.get("samples")) or series.is_varied(
        devices.get("speed_samples_per_s")
    )


def _devices_data(run: RunResult) -> dict[str, Any] | None:
    devices = series.devices_of(run)
    if not has_device_figure(devices):
        return None
    kept = series.thinned(len(devices["listed"]), _SCATTER_POINTS)
    return {
        "listed": [devices["listed"][i] for i in kept],
        "samples": [devices["samples"][i] for i in kept],
        "speed": [_short(devices["speed_samples_per_s"][i]) for i in kept],
    }


def has_network_figure(network: dict[str, Any]) -> bool:
    """Return whether devices differ in their access links."""
    return series.is_varied(network.get("uplink_bps")) or series.is_varied(
        network.get("downlink_bps")
    )


def _network_data(run: RunResult, network: dict[str, Any]) -> dict[str, Any]:
    listed = series.devices_of(run).get("listed", ())
    kept = series.thinned(len(listed), _SCATTER_POINTS)

    def chosen(key: str) -> list[Any] | None:
        values = network.get(key)
        return None if not values else [_short(values[i]) for i in kept]

    return {
        "listed": [listed[i] for i in kept],
        "up": chosen("uplink_bps"),
        "down": chosen("downlink_bps"),
        "latency": chosen("latency_s"),
    }


def _timeline_data(run: RunResult, recorded: dict[str, timeline.Timeline]) -> dict[str, Any]:
    """Return strategy's index → rounds to choose from, each with rows of nodes and spans."""
    budget = _TIMELINE_SPANS // (4 * max(1, len(recorded)))
    count = (run.world.get("devices") or {}).get("count")
    indices = {name: index for index, name in enumerate(run.strategies)}
    return {
        str(indices[name]): [
            _round_data(r, r.paths[index], why, budget, count)
            for index, why in timeline.telling_rounds(r.paths).items()
        ]
        for name, r in recorded.items()
    }


def _round_data(
    recorded: timeline.Timeline,
    path: timeline.RoundPath,
    why: str,
    budget: int,
    n_devices: int | None,
) -> dict[str, Any]:
    spans, drawn = recorded.spans, []
    rows = timeline.node_rows(spans, path, _TIMELINE_NODES)
    for row, members in enumerate(rows.values()):
        for index in members[: max(1, budget // len(rows))]:
            side = timeline.side_of(spans, index)
            detail = "" if side == "work" else (
                f", {format_bytes(int(spans.size_bytes[index]))}, {spans.outcome[index]}"
            )  # fmt: skip
            drawn.append(
                [row, side, float(spans.start[index]), float(spans.end[index]), index in path.path,
                 spans.outcome[index] in {"", "delivered"}, spans.kind[index] + detail]
            )  # fmt: skip
    return {
        "label": f"round {path.round} ({why})",
        "start": path.start,
        "end": path.end,
        "rows": [
            f"device {node}" if n_devices is None or node < n_devices else f"node {node}"
            for node in rows
        ],
        "spans": drawn,
    }


def strips(run: RunResult) -> timeline.LinkStates | None:
    """Return the link states that the page shows; None if no link changes."""
    return timeline.link_states(run, max_links=_STRIP_LINKS, bins=_STRIP_BINS)


def _strip_data(run: RunResult) -> dict[str, Any] | None:
    states = strips(run)
    if states is None:
        return None
    return {
        "links": states.links,
        "until": states.until,
        "level": [[round(v, 3) for v in row] for row in states.level.tolist()],
    }
