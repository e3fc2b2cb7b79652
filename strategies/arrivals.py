"""What devices sent each other in a round, and the mixing weights that follow from what arrived."""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import torch
from flwr.app import ConfigRecord
from numpy.typing import NDArray
from torch import Tensor

from topologies.attributes import DiGraph, Graph
from topologies.mixing import metropolis, push_sum

__all__ = [
    "Arrivals",
    "laplacian",
    "matrix",
    "mix",
    "pair_weights",
    "push_weights",
    "row_weights",
    "rows_in",
]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """What the devices of a round sent each other.

    Attributes
    ----------
    linked : ndarray of bool, shape (n, n)
        Entry (i, j): j sent to i. Its links at that moment give the degrees.
    received : ndarray of bool, shape (n, n)
        Entry (i, j): and it arrived.
    """

    linked: BoolArray
    received: BoolArray

    @property
    def is_complete(self) -> bool:
        """Whether all that was sent arrived."""
        return bool((self.linked == self.received).all())


def _edges(adjacency: BoolArray) -> list[tuple[int, int]]:
    sources, targets = np.nonzero(adjacency)
    return list(zip(sources.tolist(), targets.tolist(), strict=True))


def _undirected(adjacency: BoolArray) -> Graph:
    graph: Graph = nx.Graph()
    graph.add_nodes_from(range(len(adjacency)))
    graph.add_edges_from(_edges(np.triu(adjacency | adjacency.T, 1)))
    return graph


def _keeping(weights: FloatArray, received: BoolArray) -> FloatArray:
    """Return the weights of what arrived; the rest of each row goes to its own device."""
    kept = np.where(received, weights, 0.0)
    np.fill_diagonal(kept, 1.0 - kept.sum(axis=1))
    return kept


def row_weights(arrivals: Arrivals) -> FloatArray:
    """Return Metropolis weights; what did not arrive counts for the receiver's own model.

    Returns
    -------
    ndarray, shape (n, n)
        Rows sum to 1. Symmetric if nothing was lost on one way only.
    """
    return _keeping(metropolis(_undirected(arrivals.linked)), arrivals.received)


def pair_weights(arrivals: Arrivals) -> FloatArray:
    """Return Metropolis weights of the pairs in which both directions arrived: doubly stochastic.

    Devices must tell each other what arrived, which costs no more than an acknowledgement.
    """
    both = arrivals.received & arrivals.received.T
    return _keeping(metropolis(_undirected(arrivals.linked)), both)


def push_weights(arrivals: Arrivals) -> FloatArray:
    """Return weights 1 / (out-degree + 1) of the sender, who keeps what did not arrive.

    Returns
    -------
    ndarray, shape (n, n)
        Columns sum to 1 whatever is lost: mass is kept.
    """
    graph: DiGraph = nx.DiGraph()
    graph.add_nodes_from(range(len(arrivals.linked)))
    graph.add_edges_from(_edges(arrivals.linked.T))
    weights = np.where(arrivals.received, push_sum(graph), 0.0)
    np.fill_diagonal(weights, 1.0 - weights.sum(axis=0))
    return weights


def laplacian(arrivals: Arrivals) -> FloatArray:
    """Return the graph Laplacian of the pairs in which both directions arrived."""
    both = (arrivals.received & arrivals.received.T).astype(np.float64)
    return np.diag(both.sum(axis=1)) - both


def mix(weights: FloatArray, rows: Tensor) -> Tensor:
    """Return ``weights @ rows`` for weights whose rows sum to 1.

    Where all rows are equal they come back unchanged, to the bit.

    Parameters
    ----------
    weights : ndarray, shape (n, n)
    rows : Tensor, shape (n, p)
    """
    return torch.where((rows == rows[:1]).all(0), rows[:1], matrix(weights, rows) @ rows)


def matrix(weights: FloatArray, like: Tensor) -> Tensor:
    """Return the weights as a tensor of the type and on the device of `like`."""
    return torch.from_numpy(weights).to(like.device, like.dtype)


def rows_in(delivery: ConfigRecord, key: str, nodes: Sequence[int]) -> list[int]:
    """Return the rows of the nodes that a record ``delivery`` lists under `key`."""
    listed = delivery.get(key, [])
    if not isinstance(listed, list):
        raise ValueError(f"delivery.{key} = {listed!r}: must be a list of node ids")
    return [row for row, node in enumerate(nodes) if node in set(listed)]
