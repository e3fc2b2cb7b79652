"""A topology as a picture, in a layout that suits its family."""

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import networkx as nx
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from fedsim.whatif.plots import SETTINGS, save_figure
from topologies.attributes import Graph, devices_of, family_of

__all__ = ["draw_topology", "layout_of"]

Place = tuple[float, float]

_LOOKS = {
    "device": ("o", "#0072b2"),
    "server": ("D", "#d55e00"),
    "switch": ("s", "#495057"),
}
_LEVELS = {"bcube", "dcell", "fat_tree", "leaf_spine", "star", "tree"}
# More nodes than this get no numbers, more links fainter lines.
_MAX_LABELS = 120


def draw_topology(graph: Graph, stem: Path) -> list[Path]:
    """Draw a topology as PNG and SVG.

    Parameters
    ----------
    graph : networkx.Graph
    stem : Path
        The files' path without suffix.

    Returns
    -------
    list of Path
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    places = layout_of(graph)
    with mpl.rc_context(SETTINGS | {"axes.grid": False}):
        width, height = _figure_size(places)
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.set_axis_off()
        if family_of(graph) not in _LEVELS - {"star"}:
            axes.set_aspect("equal")
        # Links along a row of nodes (a torus' wrap-around, say) are bent to be seen.
        bend = {"torus": 0.35, "dcell": -0.9}.get(family_of(graph), 0.0)
        segments = [_curve(places[u], places[v], bend) for u, v in graph.edges]
        faint = min(1.0, max(0.12, 120 / max(1, len(segments))))
        axes.add_collection(
            LineCollection(segments, colors="#868e96", linewidths=0.9, alpha=faint, zorder=1)
        )
        size = max(3.0, min(13.0, 87 / math.sqrt(len(graph))))
        if nx.get_node_attributes(graph, "label"):
            size *= 0.6
        for role, (marker, colour) in _LOOKS.items():
            chosen = [v for v, data in graph.nodes(data=True) if data.get("role") == role]
            spare = [v for v in chosen if graph.nodes[v].get("spare")]
            used = [v for v in chosen if v not in set(spare)]
            for nodes, face in ((used, colour), (spare, "white")):
                if nodes:
                    axes.plot(
                        [places[v][0] for v in nodes],
                        [places[v][1] for v in nodes],
                        marker,
                        color=colour,
                        markerfacecolor=face,
                        markersize=size,
                        label=f"{len(nodes)} {_plural(role, nodes, face)}",
                        zorder=2,
                    )
        if len(graph) <= _MAX_LABELS:
            _number(axes, graph, places, size)
        axes.set_title(str(graph.graph.get("name") or "topology"), loc="left", fontsize=11)
        axes.margins(0.06, 0.1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, fontsize=8)
        return save_figure(figure, stem)


def _plural(role: str, nodes: list[int], face: str) -> str:
    word = {"device": "device", "server": "server", "switch": "switch"}[role]
    many = {"device": "devices", "server": "servers", "switch": "switches"}[role]
    return ("spare " if face == "white" else "") + (word if len(nodes) == 1 else many)


def _number(axes: Any, graph: Graph, places: dict[int, Place], size: float) -> None:
    names = nx.get_node_attributes(graph, "label")
    for node, (x, y) in places.items():
        if node in names:
            axes.annotate(
                str(names[node]),
                (x, y),
                xytext=(0, -size),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=6.5,
                color="#343a40",
            )
        elif size >= 8:
            is_filled = not graph.nodes[node].get("spare")
            axes.text(
                x,
                y,
                str(node),
                ha="center",
                va="center_baseline",
                fontsize=0.5 * size,
                color="white" if is_filled else "#343a40",
                zorder=3,
            )


def layout_of(graph: Graph) -> dict[int, Place]:
    """Return where each node is drawn.

    Switched networks and trees are drawn in levels, the devices at the bottom; grids and tori on
    their lattice; graphs with positions by these; rings, complete and exponential graphs on a
    circle; the rest by springs.
    """
    family = family_of(graph)
    if family in ("grid", "torus"):
        return _lattice(tuple(graph.graph["parameters"]["dims"]))
    if family == "line":
        return {node: (float(node), 0.0) for node in graph}
    if family in _LEVELS:
        return _star(graph) if family == "star" else _levels(graph)
    positions: dict[int, Place] = nx.get_node_attributes(graph, "position")
    if len(positions) == len(graph):
        return positions
    if family == "dragonfly":
        return _dragonfly(graph)
    if family in ("ring", "complete", "exponential", "watts_strogatz"):
        return _circle(list(graph), 1.0)
    spring = nx.spring_layout(graph, seed=1, iterations=200)
    return {node: (float(x), float(y)) for node, (x, y) in spring.items()}


def _circle(nodes: list[int], radius: float, centre: Place = (0.0, 0.0)) -> dict[int, Place]:
    turn = 2 * math.pi / max(1, len(nodes))
    return {
        node: (
            centre[0] + radius * math.sin(turn * i),
            centre[1] + radius * math.cos(turn * i),
        )
        for i, node in enumerate(nodes)
    }


def _star(graph: Graph) -> dict[int, Place]:
    hub = max(graph, key=lambda node: graph.degree[node])
    return _circle([v for v in graph if v != hub], 1.0) | {hub: (0.0, 0.0)}


def _lattice(dims: tuple[int, ...]) -> dict[int, Place]:
    """Return places on a lattice; higher dimensions are copies side by side, then above."""
    places = {}
    for node in range(math.prod(dims)):
        x = y = 0.0
        rest, step = node, [1.0, 1.0]
        for axis, size in enumerate(dims):
            rest, digit = divmod(rest, size)
            if axis % 2 == 0:
                x += digit * step[0]
                step[0] *= size * 1.35
            else:
                y += digit * step[1]
                step[1] *= size * 1.35
        places[node] = x, y
    return places


def _levels(graph: Graph) -> dict[int, Place]:
    """Return devices in a row at the bottom, and each level above in the order of its members."""
    rows: dict[int, list[int]] = {}
    for node, data in graph.nodes(data=True):
        rows.setdefault(int(data.get("level", 0)), []).append(node)
    width = max(len(row) for row in rows.values())
    gap = max(1.5, width / 7)
    places: dict[int, Place] = {}
    for height, level in enumerate(sorted(rows)):
        nodes = rows[level]
        step = width / len(nodes)
        places |= {v: ((i + 0.5) * step, height * gap) for i, v in enumerate(nodes)}
    return places


def _dragonfly(graph: Graph) -> dict[int, Place]:
    sizes = graph.graph["parameters"]
    routers, hosts = int(sizes["routers"]), int(sizes["hosts_per_router"])
    groups = routers * int(sizes["global_links"]) + 1
    first = groups * routers * hosts
    switches = list(range(first, first + groups * routers))
    places = _circle(switches, 1.0)
    outside = _circle(devices_of(graph) + [v for v in graph if graph.nodes[v].get("spare")], 1.25)
    return places | outside


def _curve(a: Place, b: Place, bend: float) -> list[Place]:
    """Return a straight line, or an arc if it would run through other nodes of its row."""
    length = math.dist(a, b)
    along = min(abs(b[0] - a[0]), abs(b[1] - a[1])) == 0
    if not bend or not along or length < 1.5:
        return [a, b]
    dx, dy = (b[0] - a[0]), (b[1] - a[1])
    points = []
    for i in range(21):
        t = i / 20
        lift = bend * min(1.0, length / 3) * 4 * t * (1 - t)
        points.append((a[0] + t * dx - lift * dy / length, a[1] + t * dy + lift * dx / length))
    return points


def _figure_size(places: dict[int, Place]) -> tuple[float, float]:
    xs, ys = [p[0] for p in places.values()], [p[1] for p in places.values()]
    wide, tall = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 0.3
    scale = max(wide, tall)
    return max(4.5, 9 * wide / scale), max(3.0, 7 * tall / scale)
