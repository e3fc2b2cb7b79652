"""Networks from a few figures: a star of devices around a server, or any networkx graph."""

from collections.abc import Sequence
from math import inf
from typing import Any, Literal

import networkx as nx
import numpy as np
import simpy
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import NetworkError
from fedsim.network.failures import Failure
from fedsim.network.links import LinkModel
from fedsim.network.options import TransferOptions
from fedsim.network.transfers import Network
from fedsim.network.wiring import GraphWiring, LinkTable, StarWiring

__all__ = ["graph_network", "star_network"]


def star_network(
    env: simpy.Environment,
    *,
    uplink_bps: ArrayLike,
    downlink_bps: ArrayLike,
    latency: ArrayLike = 0.0,
    server_up_bps: float = inf,
    server_down_bps: float = inf,
    link_model: LinkModel | None = None,
    failures: Sequence[Failure] = (),
    seed: int = 0,
    **options: Any,
) -> Network:
    """Return devices 0..n-1 around one server, node n.

    Parameters
    ----------
    env : simpy.Environment
    uplink_bps, downlink_bps : array, shape (n_devices,), bit/s
        Access links ``up-i`` (device to server) and ``down-i``.
    latency : float or array, shape (n_devices,), s
        One way between device and server.
    server_up_bps, server_down_bps : float, bit/s
        What all uploads (``server-up``) and all downloads (``server-down``) share.
    link_model : LinkModel, optional
        How every access link varies.
    failures : sequence of Failure
        Which links and nodes are down when.
    seed : int
        Of link histories and message loss.
    **options
        Fields of `TransferOptions`, for example ``message_loss`` and ``link_down``.

    Raises
    ------
    NetworkError
        If the arrays differ in length, a bandwidth is not positive or a latency is negative.
    """
    up, down = _row(uplink_bps), _row(downlink_bps)
    if up.shape != down.shape:
        raise NetworkError(f"{len(up)} uplinks but {len(down)} downlinks")
    try:
        one_way = np.broadcast_to(np.asarray(latency, dtype=float), up.shape)
    except ValueError:
        raise NetworkError(f"{len(up)} uplinks but {np.shape(latency)} latencies") from None
    table = LinkTable(
        np.concatenate([up, down, [server_up_bps, server_down_bps]]),
        np.concatenate([one_way, one_way, [0.0, 0.0]]),
    )
    return Network(
        env,
        table,
        StarWiring(len(up)),
        options=TransferOptions(**options),
        link_model=link_model,
        failures=failures,
        seed=seed,
    )


def graph_network(
    env: simpy.Environment,
    graph: "nx.Graph[Any]",
    *,
    duplex: Literal["full", "half"] = "full",
    routing: Literal["latency", "hops"] = "latency",
    link_model: LinkModel | None = None,
    failures: Sequence[Failure] = (),
    seed: int = 0,
    **options: Any,
) -> Network:
    """Return the network of a graph whose nodes are 0..n-1.

    Parameters
    ----------
    env : simpy.Environment
    graph : networkx.Graph or DiGraph
        Edge attributes ``bandwidth`` (bit/s, default infinite), ``latency`` (s, default 0),
        ``loss``, ``sharing`` (``shared`` or ``unshared``), ``duplex``. An undirected edge 3-7 is
        the two links ``3>7`` and ``7>3``. The node with ``role="server"`` is the server.
    duplex : {"full", "half"}
        With half, both directions of an undirected edge share one link, ``3-7``.
    routing : {"latency", "hops"}
        What a shortest route minimises; ties go to fewer hops, then to smaller node ids.
    link_model : LinkModel, optional
        How every link varies.
    failures : sequence of Failure
        Which links and nodes are down when.
    seed : int
        Of link histories and message loss.
    **options
        Fields of `TransferOptions`, for example ``message_loss`` and ``link_down``.

    Raises
    ------
    NetworkError
        If nodes are not 0..n-1, a link is named twice, or a figure is impossible.
    """
    wiring = GraphWiring(graph, duplex=duplex, routing=routing)
    return Network(
        env,
        wiring.table,
        wiring,
        options=TransferOptions(**options),
        link_model=link_model,
        failures=failures,
        seed=seed,
    )


def _row(values: ArrayLike) -> NDArray[np.float64]:
    row = np.asarray(values, dtype=float)
    if row.ndim != 1:
        raise NetworkError(f"bandwidths must be a row of numbers, got shape {row.shape}")
    return row
