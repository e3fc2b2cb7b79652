"""What every graph of this package carries, and how to read it back.

Nodes are integers: the devices are 0..n-1, servers and switches follow. Node attribute ``role`` is
``device``, ``server`` or ``switch``; a server is a machine that is not a device (the hub of a star,
an edge server, a spare host of a Fat-Tree). An undirected edge is a full-duplex cable: each
direction has the whole ``bandwidth`` (bit/s) to itself; ``latency`` is one way (s). Node attributes
``position`` (x, y) and ``level`` serve drawings. The graph's own attributes are ``family``,
``parameters`` and ``name``, which is spelled as a study's table prints it: ``bcube(n=4, k=2)``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import networkx as nx

if TYPE_CHECKING:
    Graph = nx.Graph[int]
    DiGraph = nx.DiGraph[int]
else:
    Graph = nx.Graph
    DiGraph = nx.DiGraph

__all__ = [
    "ROLES",
    "DiGraph",
    "Graph",
    "annotate",
    "at_least",
    "devices_of",
    "family_of",
    "hosts_of",
    "label",
    "servers_of",
    "switches_of",
]

ROLES = ("device", "server", "switch")


def at_least(what: str, value: int, least: int) -> int:
    """Return `value`; raise ValueError with the name and the value if it is below `least`."""
    if value < least:
        raise ValueError(f"{what} = {value}: must be at least {least}")
    return value


def label(family: str, parameters: Mapping[str, Any]) -> str:
    """Return how tables spell a topology.

    Examples
    --------
    >>> label("bcube", {"n": 4, "k": 2})
    'bcube(n=4, k=2)'
    """
    arguments = ", ".join(f"{k}={_short(v)}" for k, v in parameters.items())
    return f"{family}({arguments})" if arguments else family


def _short(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "x".join(str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def annotate(
    graph: Graph,
    family: str,
    parameters: Mapping[str, Any],
    *,
    bandwidth: float,
    latency: float,
) -> Graph:
    """Give a graph the attributes of this package where it lacks them, and return it.

    Parameters
    ----------
    graph : networkx.Graph
        Nodes without a ``role`` become devices.
    family, parameters
        What made it; together its ``name``.
    bandwidth : float
        bit/s of one direction, for edges that do not say.
    latency : float
        Seconds one way, for edges that do not say.

    Raises
    ------
    ValueError
        If `bandwidth` is not positive or `latency` is negative.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth = {bandwidth} bit/s: must be positive")
    if not (latency >= 0 and math.isfinite(latency)):
        raise ValueError(f"latency = {latency} s: must be finite and not negative")
    for _, data in graph.nodes(data=True):
        data.setdefault("role", "device")
    for _, _, data in graph.edges(data=True):
        data.setdefault("bandwidth", float(bandwidth))
        data.setdefault("latency", float(latency))
    shown = {k: v for k, v in parameters.items() if v is not None}
    graph.graph.update(family=family, parameters=shown, name=label(family, shown))
    return graph


def _having(graph: Graph, *roles: str) -> list[int]:
    return sorted(v for v, data in graph.nodes(data=True) if data.get("role", "device") in roles)


def devices_of(graph: Graph) -> list[int]:
    """Return the devices in ascending order; rank r of a collective is the r-th of them."""
    return _having(graph, "device")


def servers_of(graph: Graph) -> list[int]:
    """Return the machines that are not devices, in ascending order."""
    return _having(graph, "server")


def switches_of(graph: Graph) -> list[int]:
    """Return the switches in ascending order."""
    return _having(graph, "switch")


def hosts_of(graph: Graph) -> list[int]:
    """Return devices, then servers: the machines that a schedule's ranks stand for."""
    return [*devices_of(graph), *servers_of(graph)]


def family_of(graph: Graph) -> str:
    """Return the generator's name, or ``custom`` for a graph made elsewhere."""
    return str(graph.graph.get("family", "custom"))
