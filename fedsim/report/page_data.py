"""What the page's program draws: the numbers of every figure, thinned to fit a page.

Decision: a page stays far below 6 MB whatever the run, 4.8 MB of which are plotly.js; so there are
upper bounds here, and numbers have six digits, which is finer than a pixel.
"""

from collections.abc import Sequence
from typing import Any

from fedsim.report import exchanges, series, timeline
from fedsim.report.tables import format_bytes
from fedsim.results import RunResult

__all__ = ["collect", "has_device_figure", "has_network_figure", "measures", "pictures", "strips"]

_CURVE_NUMBERS = 60_000  # of all curves together
_HEAT_CELLS = 30_000
_SCATTER_POINTS = 1_200  # of all networks together, and of the devices
_TIMELINE_NODES = 40
_TIMELINE_SPANS = 6_000  # of all strategies together
_SPAN_KEYS = ("row", "side", "start", "length", "critical", "arrived", "label")
_STRIP_LINKS = 40
_STRIP_BINS = 240
_GRAPHS = 8
_GRAPH_DEVICES = 60
_GRAPH_LINES = 8_000  # of all histories together
_PARTNER_CELLS = 24_000  # likewise


def collect(
    run: RunResult,
    recorded: dict[str, timeline.Timeline],
    drawn: Sequence[exchanges.Picture] = (),
) -> dict[str, Any]:
    """Return everything that the page's program reads, ready for JSON."""
    lists = len(run.strategies) * (5 + len(measures(run)))  # three abscissae, accuracy and loss
    points = max(40, _CURVE_NUMBERS // max(1, lists))
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
        "partners": [_partner_data(picture) for picture in drawn],
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
    kept = series.thinned(len(listed), _SCATTER_POINTS // len(run.world["networks"]))

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
    spans = recorded.spans
    rows, nodes = timeline.node_rows(spans, path, max_nodes=_TIMELINE_NODES, max_spans=budget)
    labels: dict[str, int] = {}
    drawn = []
    for row, members in enumerate(rows.values()):
        for index in members:
            side = timeline.side_of(spans, index)
            label = spans.kind[index]
            if side != "work":
                label += f", {format_bytes(int(spans.size_bytes[index]))}, {spans.outcome[index]}"
            drawn.append(
                {
                    "row": row,
                    "side": side,
                    "start": _short(float(spans.start[index]) - path.start),
                    "length": _short(float(spans.end[index] - spans.start[index])),
                    "critical": int(index in path.path),
                    "arrived": int(spans.outcome[index] in {"", "delivered"}),
                    "label": labels.setdefault(label, len(labels)),
                }
            )
    return {
        "title": f"round {path.round} ({why})",
        "note": f"· {len(rows)} of {nodes} nodes, those that end last" if len(rows) < nodes else "",
        "length": path.end - path.start,
        "rows": [
            f"device {node}" if n_devices is None or node < n_devices else f"node {node}"
            for node in rows
        ],
        "labels": list(labels),
        # one list for each property: a third of the text that objects would be
        "spans": {key: [span[key] for span in drawn] for key in _SPAN_KEYS},
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


def pictures(found: Sequence[exchanges.Exchanges]) -> list[exchanges.Picture]:
    """Return what the page draws of each history of exchanges."""
    count = max(1, len(found))
    return [
        exchanges.picture(
            one,
            max_graphs=_GRAPHS,
            max_devices=_GRAPH_DEVICES,
            max_lines=_GRAPH_LINES // count,
            max_bins=max(10, _PARTNER_CELLS // count // min(_GRAPH_DEVICES, one.devices)),
        )
        for one in found
    ]


def _partner_data(picture: exchanges.Picture) -> dict[str, Any]:
    return {
        "devices": picture.shown,
        "first": [first for first, _ in picture.bins],
        "last": [last for _, last in picture.bins],
        "level": [[_short(value) for value in row] for row in picture.partners.tolist()],
    }
