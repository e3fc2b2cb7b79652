"""The paths between one pair of nodes, as lists of nodes: shortest, hashed, BCube's."""

import math
from collections.abc import Callable
from typing import Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from topologies.attributes import Graph

__all__ = [
    "Weight",
    "bcube_digits",
    "bcube_disjoint_paths",
    "bcube_paths",
    "bcube_switch",
    "bcube_switches",
    "equal_cost_paths",
    "hashed_path",
    "keyed_uniform",
    "shortest_path",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Weight = Literal["hops", "latency", "bandwidth"]


def keyed_uniform(seed: int, *words: IntArray) -> FloatArray:
    """Return one number in [0, 1) for each row of `words`, by splitmix64 of seed and words."""

    def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
        z = z + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(np.full(len(words[0]), seed, dtype=np.uint64))
    for word in words:
        key = mix(key ^ word.astype(np.uint64))
    return np.asarray((key >> np.uint64(11)) * 2.0**-53)


def shortest_path(
    graph: Graph, source: int, destination: int, *, weight: Weight = "hops"
) -> list[int]:
    """Return the shortest path that comes first by node numbers.

    Raises
    ------
    ValueError
        If there is none; names the pair.

    Examples
    --------
    >>> from topologies.generators import torus
    >>> shortest_path(torus((3, 3)), 0, 4)
    [0, 1, 4]
    """
    return equal_cost_paths(graph, source, destination, weight=weight)[0]


def equal_cost_paths(
    graph: Graph, source: int, destination: int, *, weight: Weight = "hops"
) -> list[list[int]]:
    """Return all shortest paths between two nodes, in the order of their node numbers.

    Parameters
    ----------
    graph : networkx.Graph
    source, destination : int
    weight : str
        ``hops``, ``latency``, or ``bandwidth`` (the sum of 1/rate); fewer hops break ties.

    Raises
    ------
    ValueError
        If there is none; names the pair.

    Examples
    --------
    >>> from topologies.datacentre import fat_tree
    >>> [len(equal_cost_paths(fat_tree(4), 0, host)) for host in (1, 2, 4)]
    [1, 2, 4]
    """
    cost: str | Callable[[int, int, dict[str, float]], float] | None = {
        "hops": None,
        "latency": "latency",
        "bandwidth": lambda u, v, data: 1.0 / data.get("bandwidth", math.inf),
    }[weight]
    try:
        paths = sorted(nx.all_shortest_paths(graph, source, destination, weight=cost))
    except (nx.NetworkXNoPath, nx.NodeNotFound) as error:
        raise ValueError(f"no route from {source} to {destination}: {error}") from error
    fewest = min(len(path) for path in paths)
    return [path for path in paths if len(path) == fewest]


def hashed_path(
    graph: Graph, source: int, destination: int, *, flow: int = 0, seed: int = 0
) -> list[int]:
    """Return one of the shortest paths, drawn by a hash of (seed, source, destination, flow)."""
    paths = equal_cost_paths(graph, source, destination)
    words = (np.array([word], dtype=np.int64) for word in (source, destination, flow))
    return paths[int(keyed_uniform(seed, *words)[0] * len(paths))]


def bcube_digits(server: int, n: int, k: int) -> tuple[int, ...]:
    """Return a server's address, digit of level 0 first.

    Examples
    --------
    >>> bcube_digits(5, 3, 2)
    (2, 1)
    """
    return tuple(server // n**level % n for level in range(k))


def bcube_switch(server: int, level: int, n: int, k: int) -> int:
    """Return the node of the switch on a server's port of one level."""
    return int(bcube_switches(np.array([server]), level, n, k)[0])


def bcube_switches(servers: IntArray, level: int, n: int, k: int) -> IntArray:
    """Return the nodes of the switches on the servers' ports of one level."""
    low = n**level
    rest = servers % low + servers // (low * n) * low
    return np.asarray(rest + n**k + level * n ** (k - 1))


def bcube_paths(source: int, destination: int, n: int, k: int) -> list[list[int]]:
    """Return the digit-correcting paths of BCube, one for each rotation of the levels that differ.

    Examples
    --------
    >>> bcube_paths(0, 4, 3, 2)
    [[0, 9, 1, 13, 4], [0, 12, 3, 10, 4]]
    """
    a, b = bcube_digits(source, n, k), bcube_digits(destination, n, k)
    levels = [level for level in range(k) if a[level] != b[level]]
    return [
        _bcube_path(source, [(level, b[level]) for level in levels[i:] + levels[:i]], n, k)
        for i in range(len(levels))
    ]


def bcube_disjoint_paths(source: int, destination: int, n: int, k: int) -> list[list[int]]:
    """Return k paths between two servers that share neither server, switch nor link.

    Path i leaves on level i. Where that digit differs, the digits are corrected from there in
    falling cyclic order; where it agrees, the path leaves to another digit, corrects the rest and
    comes back.

    Examples
    --------
    >>> [len(path) // 2 for path in bcube_disjoint_paths(0, 1, 3, 2)]
    [1, 3]

    References
    ----------
    .. [1] Guo et al., "BCube", SIGCOMM 2009, theorem 4.
    """
    a, b = bcube_digits(source, n, k), bcube_digits(destination, n, k)
    if source == destination:
        raise ValueError(f"source = destination = {source}")
    paths = []
    for first in range(k):
        order = [(first - i) % k for i in range(k)]
        fixes = [(level, b[level]) for level in order if a[level] != b[level]]
        if a[first] == b[first]:
            away = (a[first] + 1) % n
            fixes = [(first, away), *fixes, (first, b[first])]
        paths.append(_bcube_path(source, fixes, n, k))
    return paths


def _bcube_path(source: int, fixes: list[tuple[int, int]], n: int, k: int) -> list[int]:
    path, here = [source], source
    for level, digit in fixes:
        path.append(bcube_switch(here, level, n, k))
        here += (digit - here // n**level % n) * n**level
        path.append(here)
    return path
