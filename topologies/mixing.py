"""Mixing weights on a graph, and what they promise: spectral gap, doubly stochastic, mass kept.

Matrices are dense, rows and columns in ascending order of the nodes; entry (i, j) is the weight
that node i gives to what it received from node j. In a directed graph an edge (j, i) is the way
from j to i.
"""

import numpy as np
from numpy.typing import NDArray

from topologies.attributes import Graph

__all__ = [
    "MIXING",
    "is_doubly_stochastic",
    "is_row_stochastic",
    "is_symmetric",
    "lazy",
    "max_degree",
    "metropolis",
    "optimal_constant",
    "push_sum",
    "spectral_gap",
    "uniform_neighbour",
]

FloatArray = NDArray[np.float64]


def _neighbours(graph: Graph, *, directed: bool = False) -> FloatArray:
    """Return the 0/1 matrix of who receives from whom, without self-loops."""
    if graph.is_directed() and not directed:
        raise ValueError("this rule needs an undirected graph; push_sum takes a directed one")
    if graph.number_of_nodes() == 0:
        raise ValueError("the graph has no nodes")
    number = {node: i for i, node in enumerate(sorted(graph))}
    matrix = np.zeros((len(number), len(number)))
    for u, v in graph.edges:
        matrix[number[v], number[u]] = 1.0
        if not graph.is_directed():
            matrix[number[u], number[v]] = 1.0
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _with_own(matrix: FloatArray) -> FloatArray:
    """Fill the diagonal so that rows sum to 1."""
    np.fill_diagonal(matrix, 1.0 - matrix.sum(axis=1))
    return matrix


def metropolis(graph: Graph) -> FloatArray:
    """Return Metropolis-Hastings weights 1 / (1 + max(deg i, deg j)): symmetric, local.

    Parameters
    ----------
    graph : networkx.Graph

    Returns
    -------
    ndarray, shape (n, n)
        Doubly stochastic.

    Examples
    --------
    >>> from topologies.generators import ring
    >>> round(1 - spectral_gap(metropolis(ring(8))), 6)
    0.804738

    References
    ----------
    .. [1] Xiao, Boyd, Lall, "A scheme for robust distributed sensor fusion based on average
       consensus", IPSN 2005.
    """
    linked = _neighbours(graph)
    degree = linked.sum(axis=1)
    return _with_own(linked / (1.0 + np.maximum(degree[:, None], degree[None])))


def uniform_neighbour(graph: Graph) -> FloatArray:
    """Return equal weights for oneself and every neighbour: row-stochastic.

    Doubly stochastic only where all degrees are equal.
    """
    received = _neighbours(graph, directed=True) + np.eye(graph.number_of_nodes())
    return np.asarray(received / received.sum(axis=1, keepdims=True))


def max_degree(graph: Graph) -> FloatArray:
    """Return the weight 1 / (1 + largest degree) on every edge: symmetric."""
    linked = _neighbours(graph)
    return _with_own(linked / (1.0 + linked.sum(axis=1).max(initial=0.0)))


def optimal_constant(graph: Graph) -> FloatArray:
    """Return the equal edge weight with the largest spectral gap, 2 / (l_2 + l_n) of the Laplacian.

    Raises
    ------
    ValueError
        If the graph is disconnected: then no weight mixes.

    References
    ----------
    .. [1] Xiao, Boyd, "Fast linear iterations for distributed averaging", Systems & Control
       Letters 2004, Eq. (23).
    """
    linked = _neighbours(graph)
    values = np.linalg.eigvalsh(np.diag(linked.sum(axis=1)) - linked)
    if len(values) == 1:
        return np.ones((1, 1))
    if values[1] < 1e-9:
        raise ValueError("the graph is disconnected: no edge weight is optimal")
    return _with_own(linked * (2.0 / (values[1] + values[-1])))


def push_sum(graph: Graph) -> FloatArray:
    """Return weights 1 / (1 + out-degree of the sender): column-stochastic, mass is kept.

    References
    ----------
    .. [1] Kempe, Dobra, Gehrke, "Gossip-based computation of aggregate information", FOCS 2003.
    """
    received = _neighbours(graph, directed=True) + np.eye(graph.number_of_nodes())
    return np.asarray(received / received.sum(axis=0, keepdims=True))


def lazy(weights: FloatArray, laziness: float = 0.5) -> FloatArray:
    """Return ``laziness * I + (1 - laziness) * weights``; 1/2: no eigenvalue is negative."""
    if not 0 <= laziness < 1:
        raise ValueError(f"laziness = {laziness}: must be in [0, 1)")
    return np.asarray(laziness * np.eye(len(weights)) + (1 - laziness) * weights)


def spectral_gap(weights: FloatArray) -> float:
    """Return 1 minus the second largest absolute eigenvalue; 0 does not mix.

    Examples
    --------
    >>> from topologies.generators import complete
    >>> round(spectral_gap(metropolis(complete(5))), 12)
    1.0
    """
    if len(weights) == 1:
        return 1.0
    values = np.linalg.eigvalsh(weights) if is_symmetric(weights) else np.linalg.eigvals(weights)
    return float(max(0.0, 1.0 - np.sort(np.abs(values))[-2]))


def is_symmetric(weights: FloatArray) -> bool:
    """Return whether the weights are symmetric within 1e-12."""
    return bool(np.allclose(weights, weights.T, rtol=0, atol=1e-12))


def is_row_stochastic(weights: FloatArray) -> bool:
    """Return whether the weights are non-negative and rows sum to 1, within 1e-9."""
    return bool((weights >= -1e-9).all() and np.allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-9))


def is_doubly_stochastic(weights: FloatArray) -> bool:
    """Return whether rows and columns of non-negative weights sum to 1, within 1e-9."""
    return is_row_stochastic(weights) and is_row_stochastic(weights.T)


MIXING = {
    "max_degree": max_degree,
    "metropolis": metropolis,
    "optimal_constant": optimal_constant,
    "push_sum": push_sum,
    "uniform_neighbour": uniform_neighbour,
}
