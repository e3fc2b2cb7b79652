"""Graphs from files: GraphML, node-link JSON, edge-list CSV, and the research networks shipped."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx

from topologies.attributes import ROLES, Graph, annotate, at_least

__all__ = ["RESEARCH_NETWORKS", "from_file", "research_network"]

RESEARCH_NETWORKS = ("abilene", "nsfnet")
_FOLDER = Path(__file__).parent / "networks"
_EARTH_RADIUS = 6_371_000.0
_SPEED_IN_FIBRE = 2e8
# Names under which files of others carry our attributes (bit/s, s).
_BANDWIDTH = ("bandwidth", "bandwidth_bps", "LinkSpeedRaw")
_LATENCY = ("latency", "latency_s")


def from_file(
    path: str | Path,
    *,
    bandwidth: float = math.inf,
    latency: float | None = None,
) -> Graph:
    """Return the graph of a GraphML, node-link JSON or edge-list CSV file.

    Devices become nodes 0..n-1 in the file's order, then servers, then switches; a node's old name
    is its attribute ``label``. Nodes without ``role`` are devices. A CSV file has the columns
    ``source,target`` and optionally ``bandwidth`` (bit/s), ``latency`` (s), ``source_role``,
    ``target_role``; bare numbers. Parallel links become one with their summed bandwidth.

    Parameters
    ----------
    path : str or Path
        Ends in .graphml, .json or .csv.
    bandwidth : float
        bit/s of links for which the file gives none.
    latency : float, optional
        Seconds for links for which the file gives none. By default it follows from ``Latitude`` and
        ``Longitude`` of the ends (200,000 km/s along the great circle), else it is 0.

    Raises
    ------
    ValueError
        If the file is missing or of another kind, a role, bandwidth or latency makes no sense, or
        the graph has less than two devices.
    """
    path = Path(path)
    readers: dict[str, Callable[[Path], Any]] = {
        ".graphml": nx.read_graphml,
        ".json": _read_json,
        ".csv": _read_csv,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: must end in one of {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        raw = readers[path.suffix](path)
    except (nx.NetworkXException, json.JSONDecodeError, KeyError, SyntaxError) as error:
        raise ValueError(f"{path}: not a graph: {error!r}") from error
    graph = _numbered(raw, path, latency)
    annotate(graph, "custom", {}, bandwidth=bandwidth, latency=latency or 0.0)
    graph.graph["name"] = path.stem
    return graph


def research_network(
    network: str, *, bandwidth: float = math.inf, latency: float | None = None
) -> Graph:
    """Return a real research network whose sites are devices that relay for each other.

    Parameters
    ----------
    network : str
        ``abilene`` (11 sites, 2005) or ``nsfnet`` (14 sites, 1991).
    bandwidth : float
        bit/s of every link.
    latency : float, optional
        Seconds of every link; by default the great-circle distance at 200,000 km/s.

    Examples
    --------
    >>> graph = research_network("abilene")
    >>> graph.number_of_nodes(), graph.number_of_edges(), graph.nodes[0]["label"]
    (11, 14, 'New York')

    References
    ----------
    .. [1] Knight, Nguyen, Falkner, Bowden, Roughan, "The Internet Topology Zoo", IEEE JSAC 2011.
    """
    if network not in RESEARCH_NETWORKS:
        raise ValueError(f"network = {network!r}: must be one of {', '.join(RESEARCH_NETWORKS)}")
    graph = from_file(_FOLDER / f"{network}.graphml", bandwidth=bandwidth, latency=latency)
    sizes = {"network": network}
    return annotate(graph, "research_network", sizes, bandwidth=bandwidth, latency=latency or 0.0)


def _read_json(path: Path) -> Any:
    data = json.loads(path.read_text(encoding="utf-8"))
    return nx.node_link_graph(data, edges="links" if "links" in data else "edges")


def _read_csv(path: Path) -> Any:
    graph: Any = nx.MultiGraph()
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for end in ("source", "target"):
                role = row.pop(f"{end}_role", None)
                graph.add_node(row[end], **({"role": role} if role else {}))
            values = {k: v for k, v in row.items() if v and k not in ("source", "target")}
            graph.add_edge(row["source"], row["target"], **values)
    return graph


def _numbered(raw: Any, path: Path, latency: float | None) -> Graph:
    """Return a simple graph on 0..n-1, devices first, with our attribute names."""
    for node, data in raw.nodes(data=True):
        if data.setdefault("role", "device") not in ROLES:
            raise ValueError(f"{path}: role {data['role']!r} of {node!r}: one of {ROLES}")
    order = sorted(raw, key=lambda node: ROLES.index(raw.nodes[node]["role"]))
    at_least(f"{path}: devices", sum(d["role"] == "device" for _, d in raw.nodes(data=True)), 2)
    number = {node: i for i, node in enumerate(order)}
    graph: Graph = nx.DiGraph() if raw.is_directed() else nx.Graph()
    for node in order:
        data = raw.nodes[node]
        place = _coordinates(data)
        graph.add_node(
            number[node],
            role=data["role"],
            label=str(data.get("label") or data.get("name") or node),
            **({"position": place} if place else {}),
        )
    for a, b, data in raw.edges(data=True):
        u, v = number[a], number[b]
        if u == v:
            continue
        link: dict[str, float] = {}
        rate = _number(data, _BANDWIDTH, path, (a, b))
        delay = _number(data, _LATENCY, path, (a, b))
        if delay is None and latency is None:
            ends = _coordinates(raw.nodes[a]), _coordinates(raw.nodes[b])
            delay = _great_circle(*ends) / _SPEED_IN_FIBRE if ends[0] and ends[1] else None
        if rate is not None:
            link["bandwidth"] = rate + graph.edges.get((u, v), {}).get("bandwidth", 0.0)
        if delay is not None:
            link["latency"] = min(delay, graph.edges.get((u, v), {}).get("latency", math.inf))
        graph.add_edge(u, v, **link)
    return graph


def _number(
    data: dict[str, Any], names: tuple[str, ...], path: Path, link: tuple[Any, Any]
) -> float | None:
    for name in names:
        if data.get(name) not in (None, ""):
            try:
                value = float(data[name])
            except ValueError:
                value = math.nan
            if not value >= 0:
                raise ValueError(
                    f"{path}: {name} = {data[name]!r} of link {link[0]}-{link[1]}: "
                    "must be a bare number of bit/s or s"
                )
            return value
    return None


def _coordinates(data: dict[str, Any]) -> tuple[float, float] | None:
    """Return longitude and latitude in degrees: x and y of a drawing."""
    if "position" in data:
        x, y = data["position"]
        return float(x), float(y)
    if data.get("Latitude") is None or data.get("Longitude") is None:
        return None
    return float(data["Longitude"]), float(data["Latitude"])


def _great_circle(a: tuple[float, float] | None, b: tuple[float, float] | None) -> float:
    """Return metres between two (longitude, latitude) pairs in degrees, by the haversine."""
    if a is None or b is None:
        return 0.0
    (x1, y1), (x2, y2) = (tuple(math.radians(v) for v in place) for place in (a, b))
    h = math.sin((y2 - y1) / 2) ** 2
    h += math.cos(y1) * math.cos(y2) * math.sin((x2 - x1) / 2) ** 2
    return 2 * _EARTH_RADIUS * math.asin(math.sqrt(h))
