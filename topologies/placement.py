"""Collectives on a graph: which schedule, for which ranks, in which order.

Rank r of a schedule is the r-th host of the graph, devices before servers (`attributes.hosts_of`).
Every ``x_schedule(graph, n_bytes)`` takes what it needs from the graph: a ring on BCube follows a
Gray code, groups are the devices under one switch or edge server, dimensions are those of the
torus. A pair that makes no sense raises ValueError with the reason.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import networkx as nx

from topologies import collectives
from topologies.attributes import Graph, devices_of, family_of, servers_of
from topologies.schedules import Schedule

__all__ = [
    "COLLECTIVES",
    "all_to_all_schedule",
    "among",
    "binomial_tree_schedule",
    "bml_schedule",
    "dimension_rings_schedule",
    "double_binary_tree_schedule",
    "halving_doubling_schedule",
    "ps_colocated_schedule",
    "ps_dedicated_schedule",
    "ps_hierarchical_schedule",
    "recursive_doubling_schedule",
    "ring_schedule",
    "rotated_rings_schedule",
]


def _ranks(graph: Graph) -> int:
    """Return the number of devices, which must be able to reach each other."""
    devices = devices_of(graph)
    if len(devices) < 2:
        raise ValueError(f"devices = {len(devices)}: a collective needs at least 2")
    component = nx.node_connected_component(graph.to_undirected(), devices[0])
    cut_off = [d for d in devices if d not in component]
    if cut_off:
        raise ValueError(f"the graph is disconnected: no path from 0 to device {cut_off[0]}")
    return len(devices)


def among(graph: Graph, members: Iterable[int]) -> Graph:
    """Return the graph on which only some devices take part; the others pass messages on.

    Parameters
    ----------
    graph : networkx.Graph
    members : iterable of int
        Devices; rank r is the r-th of them.

    Raises
    ------
    ValueError
        If a member is no device of the graph.
    """
    devices, chosen = devices_of(graph), set(members)
    if not chosen <= set(devices):
        raise ValueError(f"{min(chosen - set(devices))} is no device of {_name(graph)}")
    if len(chosen) == len(devices):
        return graph
    smaller: Graph = graph.copy()
    for device in devices:
        if device not in chosen:
            smaller.nodes[device]["role"] = "switch"
    return smaller


def bml_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return BML, which needs BCube and all of its servers."""
    if family_of(graph) != "bcube":
        raise ValueError(f"bml needs a BCube, not {_name(graph)}")
    sizes = graph.graph["parameters"]
    _all_of(graph, sizes["n"] ** sizes["k"])
    return collectives.bml(sizes["n"], sizes["k"])


def ring_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return the ring: in Gray order on BCube, else in the order of the devices."""
    ranks = _ranks(graph)
    if family_of(graph) != "bcube":
        return collectives.ring(ranks)
    rank_of = {device: rank for rank, device in enumerate(devices_of(graph))}
    around = collectives.gray_order(**graph.graph["parameters"])
    return collectives.ring(ranks, [rank_of[server] for server in around if server in rank_of])


def halving_doubling_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return recursive halving and doubling in the order of the devices."""
    return collectives.halving_doubling(_ranks(graph))


def recursive_doubling_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return recursive doubling in the order of the devices."""
    return collectives.recursive_doubling(_ranks(graph))


def binomial_tree_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return the binomial tree rooted at the first device."""
    return collectives.binomial_tree(_ranks(graph))


def double_binary_tree_schedule(
    graph: Graph, n_bytes: int | None = None, *, pieces: int = 16
) -> Schedule:
    """Return the double binary tree, each half of the vector in `pieces`."""
    return collectives.double_binary_tree(_ranks(graph), pieces)


def ps_colocated_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return the parameter server in which every device serves 1/N of the vector."""
    return collectives.sharded_parameter_server(_ranks(graph))


def ps_dedicated_schedule(
    graph: Graph, n_bytes: int | None = None, *, servers: int = 1
) -> Schedule:
    """Return the parameter server on the graph's first `servers` machines that are no devices."""
    ranks = _ranks(graph)
    present = len(servers_of(graph))
    if not 1 <= servers <= present:
        raise ValueError(
            f"servers = {servers}: {_name(graph)} has {present} machines that are no devices"
        )
    return collectives.parameter_server(ranks, servers)


def ps_hierarchical_schedule(
    graph: Graph, n_bytes: int | None = None, *, group: int | None = None
) -> Schedule:
    """Return members to leader to root and back, the groups taken from the graph.

    In a tree the leaders are the edge servers and the root is the cloud. Elsewhere a group is
    `group` consecutive devices, led by the first: by default a pod of a Fat-Tree, what shares a
    switch (of level 0 in BCube), else about sqrt(N).
    """
    ranks = _ranks(graph)
    servers = servers_of(graph)
    if group is None and family_of(graph) == "tree" and len(servers) > 1:
        rank_of = {server: ranks + i for i, server in enumerate(servers)}
        below: dict[int, list[int]] = defaultdict(list)
        for rank, device in enumerate(devices_of(graph)):
            below[next(iter(graph[device]))].append(rank)
        edges = sorted(below)
        heads = [rank_of[edge] for edge in edges]
        return collectives.hierarchical_parameter_server(
            [below[edge] for edge in edges], heads, rank_of[servers[0]]
        )
    size = group or _group_size(graph, ranks)
    groups = [list(range(i, min(i + size, ranks))) for i in range(0, ranks, size)]
    return collectives.hierarchical_parameter_server(groups)


def _group_size(graph: Graph, ranks: int) -> int:
    """Return the hosts of a pod of a Fat-Tree, at a switch elsewhere, else about sqrt(N)."""
    sizes = graph.graph.get("parameters", {})
    at_a_switch = {
        "bcube": sizes.get("n"),
        "dcell": sizes.get("n"),
        "fat_tree": sizes.get("ports", 0) ** 2 // 4,
        "leaf_spine": sizes.get("hosts_per_leaf"),
        "dragonfly": sizes.get("hosts_per_router"),
    }
    return int(at_a_switch.get(family_of(graph)) or max(1, round(ranks**0.5)))


def all_to_all_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return the single step in which everybody sends everything to everybody."""
    return collectives.all_to_all(_ranks(graph))


def dimension_rings_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return a ring in each dimension of a torus, grid or BCube, or within and across groups."""
    return collectives.dimension_rings(_dimensions(graph))


def rotated_rings_schedule(graph: Graph, n_bytes: int | None = None) -> Schedule:
    """Return rings in all dimensions at once, in rotated order; the dimensions must be equal."""
    dims = _dimensions(graph)
    if len(set(dims)) > 1:
        raise ValueError(f"rotated_rings needs equal dimensions, not {dims} of {_name(graph)}")
    return collectives.dimension_rings(dims, rotated=True)


def _dimensions(graph: Graph) -> tuple[int, ...]:
    ranks = _ranks(graph)
    sizes = graph.graph.get("parameters", {})
    family = family_of(graph)
    dims: tuple[int, ...] = ()
    if family in ("torus", "grid"):
        dims = tuple(int(size) for size in sizes["dims"])
    elif family == "bcube":
        dims = (int(sizes["n"]),) * int(sizes["k"])
    elif family == "hypercube":
        dims = (2,) * int(sizes["dimension"])
    if dims:
        _all_of(graph, math.prod(dims))
        return dims
    if family in ("fat_tree", "leaf_spine", "dragonfly", "dcell", "star"):
        inner = _group_size(graph, ranks)
        if ranks % inner == 0 and inner > 1:
            return (inner, ranks // inner) if ranks > inner else (inner,)
    raise ValueError(f"rings in each dimension need dimensions, and {_name(graph)} has none")


def _all_of(graph: Graph, needed: int) -> None:
    """Refuse a graph of which only some devices take part."""
    ranks = _ranks(graph)
    if ranks != needed:
        raise ValueError(
            f"this collective takes all {needed} devices of {_name(graph)}, not {ranks}"
        )


def _name(graph: Graph) -> str:
    return str(graph.graph.get("name") or "this graph")


COLLECTIVES: dict[str, Callable[..., Schedule]] = {
    "all_to_all": all_to_all_schedule,
    "binomial_tree": binomial_tree_schedule,
    "bml": bml_schedule,
    "dimension_rings": dimension_rings_schedule,
    "double_binary_tree": double_binary_tree_schedule,
    "halving_doubling": halving_doubling_schedule,
    "ps_colocated": ps_colocated_schedule,
    "ps_dedicated": ps_dedicated_schedule,
    "ps_hierarchical": ps_hierarchical_schedule,
    "recursive_doubling": recursive_doubling_schedule,
    "ring": ring_schedule,
    "rotated_rings": rotated_rings_schedule,
}
