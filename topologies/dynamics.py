"""Graphs that change: a graph as a function of the round, and what their union promises.

A changing graph is a function of the round (0, 1, ...) that depends on nothing else, so that any
round can be asked for in any order. `timeline` turns it into (time, active edges).
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import networkx as nx
import numpy as np

from topologies.attributes import DiGraph, Graph, at_least, devices_of

__all__ = [
    "Connectivity",
    "GraphAt",
    "b_connectivity",
    "dropped_links",
    "one_peer_exponential",
    "random_matching",
    "redrawn",
    "relabelled",
    "timeline",
]

GraphAt = Callable[[int], Graph]


def _rng(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))


def redrawn(make: Callable[[np.random.Generator], Graph], *, seed: int = 0) -> GraphAt:
    """Return a new random graph for every round.

    Parameters
    ----------
    make : callable (numpy.random.Generator) -> networkx.Graph
        For example ``lambda rng: erdos_renyi(20, 0.2, seed=rng)``.
    seed : int

    Examples
    --------
    >>> from topologies.random_graphs import erdos_renyi
    >>> graph_at = redrawn(lambda rng: erdos_renyi(9, 0.5, seed=rng), seed=1)
    >>> sorted(graph_at(3).edges) == sorted(graph_at(3).edges) != sorted(graph_at(4).edges)
    True
    """
    return lambda number: make(_rng(seed, number))


def relabelled(graph: Graph, *, seed: int = 0) -> GraphAt:
    """Return the same graph with its devices shuffled anew in every round."""

    def at(number: int) -> Graph:
        order = _rng(seed, number).permutation(len(graph)).tolist()
        moved: Graph = nx.relabel_nodes(graph, dict(enumerate(order)), copy=True)
        ordered: Graph = nx.Graph(**graph.graph)
        ordered.add_nodes_from(sorted(moved.nodes(data=True)))
        ordered.add_edges_from(moved.edges(data=True))
        return ordered

    return at


def dropped_links(graph: Graph, probability: float, *, seed: int = 0) -> GraphAt:
    """Return the graph without each of its links, independently in every round."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability = {probability}: must be between 0 and 1")

    def at(number: int) -> Graph:
        kept: Graph = graph.copy()
        links = sorted(graph.edges)
        gone = _rng(seed, number).random(len(links)) < probability
        kept.remove_edges_from([link for link, out in zip(links, gone, strict=True) if out])
        return kept

    return at


def random_matching(graph: Graph, *, seed: int = 0) -> GraphAt:
    """Return a maximal set of disjoint links of the graph, drawn anew in every round."""
    links = sorted(graph.edges)

    def at(number: int) -> Graph:
        matched: Graph = nx.Graph(**graph.graph)
        matched.add_nodes_from(graph.nodes(data=True))
        for i in _rng(seed, number).permutation(len(links)).tolist():
            u, v = links[i]
            if not matched.degree[u] and not matched.degree[v]:
                matched.add_edge(u, v, **graph.edges[u, v])
        return matched

    return at


def one_peer_exponential(devices: int) -> Callable[[int], DiGraph]:
    """Return the directed graph in which i sends to i + 2^(round mod ceil(log2 n)) alone.

    With n a power of two, any ceil(log2 n) consecutive rounds average exactly.

    Examples
    --------
    >>> sorted(one_peer_exponential(4)(1).edges)
    [(0, 2), (1, 3), (2, 0), (3, 1)]

    References
    ----------
    .. [1] Ying, Yuan, Chen, Hu, Pan, Yin, "Exponential graph is provably efficient for
       decentralized deep training", NeurIPS 2021.
    """
    at_least("devices", devices, 2)
    period = (devices - 1).bit_length()

    def at(number: int) -> DiGraph:
        graph: DiGraph = nx.DiGraph()
        graph.add_nodes_from(range(devices), role="device")
        hop = 1 << number % period
        graph.add_edges_from((i, (i + hop) % devices) for i in range(devices))
        return graph

    return at


def timeline(
    graph_at: GraphAt, period: float
) -> Iterator[tuple[float, frozenset[tuple[int, int]]]]:
    """Yield (time, active edges) without end: round r begins at r * period seconds."""
    if not period > 0:
        raise ValueError(f"period = {period} s: must be positive")
    for number in count():
        yield number * period, frozenset(graph_at(number).edges)


@dataclass(frozen=True, slots=True)
class Connectivity:
    """How well a sequence of graphs connects its devices.

    Attributes
    ----------
    window : int or None
        The smallest B such that the union of any B consecutive graphs is (strongly) connected; None
        if not even the union of all is.
    connected_share : float
        Share of the rounds whose own graph is connected.
    mean_isolated : float
        Devices without a link, on average over the rounds.
    mean_degree : float
    """

    window: int | None
    connected_share: float
    mean_isolated: float
    mean_degree: float


def b_connectivity(graph_at: GraphAt, rounds: int) -> Connectivity:
    """Return the B-connectivity of the first rounds of a changing graph.

    Examples
    --------
    >>> b_connectivity(one_peer_exponential(8), 12).window
    3
    >>> from topologies.generators import ring
    >>> b_connectivity(dropped_links(ring(4), 1.0), 5).window is None
    True
    """
    at_least("rounds", rounds, 1)
    graphs = [graph_at(number) for number in range(rounds)]
    devices = devices_of(graphs[0])
    n = len(devices)
    # A longer window connects whatever a shorter one does. The shortest is usually very short.
    reach = 1
    while reach < rounds and not _every_union_connects(graphs, reach):
        reach *= 2
    widths = range(reach // 2 + 1, min(reach, rounds) + 1)
    first = bisect_left(widths, True, key=lambda width: _every_union_connects(graphs, width))
    degrees = [[graph.degree[d] for d in devices] for graph in graphs]
    return Connectivity(
        window=widths[first] if first < len(widths) else None,
        connected_share=sum(_connects(graph) for graph in graphs) / rounds,
        mean_isolated=sum(row.count(0) for row in degrees) / rounds,
        mean_degree=sum(map(sum, degrees)) / (rounds * n),
    )


def _connects(graph: Graph) -> bool:
    if isinstance(graph, nx.DiGraph):
        return bool(nx.is_strongly_connected(graph))
    return bool(nx.is_connected(graph))


def _every_union_connects(graphs: list[Graph], width: int) -> bool:
    union = nx.empty_graph(graphs[0], create_using=type(graphs[0]))
    times: Counter[tuple[int, int]] = Counter()  # link → graphs of the window that have it
    for number, graph in enumerate(graphs):
        times.update(_links(graph))
        union.add_edges_from(graph.edges)
        if number >= width:
            gone = _links(graphs[number - width])
            times.subtract(gone)
            union.remove_edges_from(link for link in gone if not times[link])
        if number >= width - 1 and not _connects(union):
            return False
    return True


def _links(graph: Graph) -> list[tuple[int, int]]:
    if graph.is_directed():
        return list(graph.edges)
    return [(min(link), max(link)) for link in graph.edges]
