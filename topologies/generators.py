"""Regular graphs: star, tree, ring, line, grid, torus, complete, hypercube, exponential.

One pure function per family, sizes in, graph out; `topologies.attributes` says what the graph
carries.
"""

import math
from collections.abc import Sequence
from itertools import product

import networkx as nx

from topologies.attributes import Graph, annotate, at_least

__all__ = [
    "complete",
    "coordinates",
    "exponential",
    "grid",
    "hypercube",
    "line",
    "ring",
    "star",
    "torus",
    "tree",
]


def star(
    devices: int, *, servers: int = 0, bandwidth: float = math.inf, latency: float = 0.0
) -> Graph:
    """Return devices around one hub, which is node `devices`.

    Parameters
    ----------
    devices : int
        At least 1.
    servers : int
        0: the hub is the server itself, as in federated learning. Otherwise the hub is one
        non-blocking switch, and that many servers hang on it by one cable each, after it.
    bandwidth, latency : float
        Of each cable, per direction (bit/s, s).

    Examples
    --------
    >>> graph = star(9)
    >>> graph.number_of_nodes(), graph.number_of_edges(), graph.nodes[9]["role"]
    (10, 9, 'server')
    """
    at_least("devices", devices, 1)
    at_least("servers", servers, 0)
    graph = nx.star_graph([devices, *range(devices), *range(devices + 1, devices + 1 + servers)])
    graph.nodes[devices].update(role="switch" if servers else "server", level=1)
    for server in range(devices + 1, devices + 1 + servers):
        graph.nodes[server]["role"] = "server"
    sizes = {"devices": devices, "servers": servers or None}
    return annotate(_sorted(graph), "star", sizes, bandwidth=bandwidth, latency=latency)


def tree(
    fanouts: Sequence[int],
    *,
    devices: int | None = None,
    bandwidth: float | Sequence[float] = math.inf,
    latency: float | Sequence[float] = 0.0,
) -> Graph:
    """Return a rooted tree whose leaves are the devices: device, edge servers, ..., cloud.

    Parameters
    ----------
    fanouts : sequence of int
        Children of a node in each tier, from the root down; ``(4, 5)`` is one cloud server, 4 edge
        servers and 20 devices. The root is the first server, then tier by tier.
    devices : int, optional
        Fewer devices than the product of `fanouts`; they are spread evenly and in order.
    bandwidth, latency : float or sequence of float
        Of the cables, one value or one for each tier, from the root down (bit/s, s).

    Examples
    --------
    >>> graph = tree((4, 5), bandwidth=(1e9, 20e6))
    >>> graph.number_of_nodes(), graph.number_of_edges()
    (25, 24)
    >>> graph.edges[20, 21]["bandwidth"], graph.edges[0, 21]["bandwidth"]
    (1000000000.0, 20000000.0)
    """
    if not fanouts:
        raise ValueError("fanouts = (): a tree needs at least one tier")
    for size in fanouts:
        at_least("fanouts", size, 1)
    leaves = math.prod(fanouts)
    count = leaves if devices is None else at_least("devices", devices, 1)
    parents = leaves // fanouts[-1]
    if not parents <= count <= leaves:
        raise ValueError(f"devices = {count}: {tuple(fanouts)} holds {parents} to {leaves}")
    rates, delays = (_per_tier(v, len(fanouts)) for v in (bandwidth, latency))
    graph: Graph = nx.Graph()
    graph.add_nodes_from(range(count), role="device", level=0)
    above, free = [count], count + 1
    graph.add_node(count, role="server", level=len(fanouts))
    for tier, size in enumerate(fanouts):
        link = {"bandwidth": rates[tier], "latency": delays[tier]}
        if tier == len(fanouts) - 1:
            graph.add_edges_from((d, above[d * parents // count], link) for d in range(count))
            break
        below = list(range(free, free + size * len(above)))
        graph.add_nodes_from(below, role="server", level=len(fanouts) - 1 - tier)
        graph.add_edges_from((v, above[i // size], link) for i, v in enumerate(below))
        above, free = below, free + len(below)
    sizes = {"fanouts": tuple(fanouts), "devices": devices}
    return annotate(graph, "tree", sizes, bandwidth=min(rates), latency=max(delays))


def _per_tier(value: float | Sequence[float], tiers: int) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)] * tiers
    if len(values) != tiers:
        raise ValueError(f"{values}: one value, or one for each of the {tiers} tiers")
    return values


def ring(devices: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the cycle 0-1-...-(n-1)-0 (two devices: one cable).

    Examples
    --------
    >>> ring(5).number_of_edges(), nx.diameter(ring(7))
    (5, 3)
    """
    at_least("devices", devices, 2)
    graph = nx.cycle_graph(devices)
    return annotate(graph, "ring", {"devices": devices}, bandwidth=bandwidth, latency=latency)


def line(devices: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the path 0-1-...-(n-1).

    Examples
    --------
    >>> line(5).number_of_edges(), nx.diameter(line(5))
    (4, 4)
    """
    at_least("devices", devices, 2)
    graph = nx.path_graph(devices)
    return annotate(graph, "line", {"devices": devices}, bandwidth=bandwidth, latency=latency)


def grid(dims: Sequence[int], *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the k-dimensional lattice; node i has mixed-radix digits `coordinates(i, dims)`.

    Examples
    --------
    >>> grid((3, 4)).number_of_edges(), nx.diameter(grid((3, 4)))
    (17, 5)
    """
    graph = _lattice(dims, wrap=False)
    return annotate(graph, "grid", {"dims": tuple(dims)}, bandwidth=bandwidth, latency=latency)


def torus(dims: Sequence[int], *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the k-dimensional lattice with wrap-around, every size at least 2.

    A dimension of size 2 has one cable per pair of neighbours, not two.

    Examples
    --------
    >>> torus((3, 4)).number_of_edges(), nx.diameter(torus((3, 4)))
    (24, 3)
    """
    for size in dims:
        at_least("dims", size, 2)
    graph = _lattice(dims, wrap=True)
    return annotate(graph, "torus", {"dims": tuple(dims)}, bandwidth=bandwidth, latency=latency)


def coordinates(node: int, dims: Sequence[int]) -> tuple[int, ...]:
    """Return a node's mixed-radix digits, the first dimension varying fastest.

    Examples
    --------
    >>> coordinates(7, (3, 4))
    (1, 2)
    """
    digits = []
    for size in dims:
        node, digit = divmod(node, size)
        digits.append(digit)
    return tuple(digits)


def _lattice(dims: Sequence[int], *, wrap: bool) -> Graph:
    for size in dims:
        at_least("dims", size, 1)
    count = at_least("devices (the product of dims)", math.prod(dims), 2)
    graph: Graph = nx.Graph()
    for node in range(count):
        graph.add_node(node, position=tuple(float(c) for c in coordinates(node, dims)[:2]))
    stride = 1
    for size in dims:
        for node in range(count):
            digit = node // stride % size
            if digit + 1 < size:
                graph.add_edge(node, node + stride)
            elif wrap and size > 1:
                graph.add_edge(node, node - digit * stride)
        stride *= size
    return graph


def complete(devices: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the graph in which every two devices share a cable.

    Examples
    --------
    >>> complete(6).number_of_edges()
    15
    """
    at_least("devices", devices, 2)
    graph = nx.complete_graph(devices)
    return annotate(graph, "complete", {"devices": devices}, bandwidth=bandwidth, latency=latency)


def hypercube(dimension: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the graph of 2^d devices whose numbers differ in one bit.

    Examples
    --------
    >>> hypercube(4).number_of_edges(), nx.diameter(hypercube(4))
    (32, 4)
    """
    at_least("dimension", dimension, 1)
    graph: Graph = nx.Graph()
    graph.add_nodes_from(range(2**dimension))
    graph.add_edges_from(
        (v, v | 1 << bit)
        for v, bit in product(range(2**dimension), range(dimension))
        if not v >> bit & 1
    )
    sizes = {"dimension": dimension}
    return annotate(graph, "hypercube", sizes, bandwidth=bandwidth, latency=latency)


def exponential(devices: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return the static exponential graph: i and i + 2^j (mod n) are neighbours, 2^j < n.

    The one-peer form, which uses one of these powers a round, is
    `topologies.dynamics.one_peer_exponential`.

    Examples
    --------
    >>> sorted(exponential(8)[0])
    [1, 2, 4, 6, 7]

    References
    ----------
    .. [1] Ying, Yuan, Chen, Hu, Pan, Yin, "Exponential graph is provably efficient for
       decentralized deep training", NeurIPS 2021.
    """
    at_least("devices", devices, 2)
    graph: Graph = nx.Graph()
    graph.add_nodes_from(range(devices))
    hops = [1 << j for j in range((devices - 1).bit_length())]
    graph.add_edges_from((i, (i + hop) % devices) for i in range(devices) for hop in hops)
    sizes = {"devices": devices}
    return annotate(graph, "exponential", sizes, bandwidth=bandwidth, latency=latency)


def _sorted(graph: Graph) -> Graph:
    """Return the graph with its nodes in ascending order of insertion."""
    ordered: Graph = nx.Graph()
    ordered.add_nodes_from(sorted(graph.nodes(data=True)))
    ordered.add_edges_from(graph.edges(data=True))
    return ordered
