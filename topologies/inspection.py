"""What a topology is like: counts, degrees, diameter, bisection, spectral gap, hardware, price."""

import math
from collections import Counter
from typing import Any

import networkx as nx

from topologies.attributes import Graph, devices_of, family_of, servers_of, switches_of
from topologies.cost import Prices, hardware, pro_rated_switches
from topologies.mixing import metropolis, spectral_gap

__all__ = ["bisection_bps", "describe", "device_graph"]

# Above these sizes the costly figures are left out (null).
_MAX_FLOW_NODES = 400
_MAX_DIAMETER_NODES = 3000
_MAX_MIXING_DEVICES = 2000


def device_graph(graph: Graph) -> Graph:
    """Return who can be whose neighbour: devices joined by a cable or by a path of switches.

    A server in between does not count: it is a machine that would have to take part.
    """
    devices = devices_of(graph)
    keep = {*devices, *switches_of(graph)}
    near: Graph = nx.Graph()
    near.add_nodes_from(devices, role="device")
    through = nx.Graph(graph.subgraph(keep - set(devices)))
    group_of = {v: i for i, part in enumerate(nx.connected_components(through)) for v in part}
    members: dict[int, set[int]] = {}
    for device in devices:
        for other in graph[device]:
            if other in group_of:
                members.setdefault(group_of[other], set()).add(device)
            elif other in keep:
                near.add_edge(device, other)
    for group in members.values():
        near.add_edges_from((u, v) for u in group for v in group if u < v)
    return near


def bisection_bps(graph: Graph) -> float:
    """Return the most bit/s that flow, one way, from the first half of the devices to the second.

    Exact by maximum flow. It is the bisection where no other halving is worse, which holds for
    BCube with even n, Fat-Tree, leaf-spine, and tori whose last dimension is the largest and even.
    """
    devices = devices_of(graph)
    half = len(devices) // 2
    if not _has_rates(graph):
        return math.inf
    capacity: Any = nx.DiGraph()
    for u, v, data in graph.edges(data=True):
        capacity.add_edge(u, v, capacity=data["bandwidth"])
        if not graph.is_directed():
            capacity.add_edge(v, u, capacity=data["bandwidth"])
    # Edges without a capacity are unlimited.
    capacity.add_edges_from(("from", device) for device in devices[:half])
    capacity.add_edges_from((device, "to") for device in devices[half:])
    return float(nx.maximum_flow_value(capacity, "from", "to"))


def _has_rates(graph: Graph) -> bool:
    """Return whether every link has a finite bandwidth."""
    return all(math.isfinite(data["bandwidth"]) for _, _, data in graph.edges(data=True))


def describe(graph: Graph, *, prices: Prices | None = None) -> dict[str, Any]:
    """Return what ``fedsim topology`` shows; None stands for what is undefined or too costly.

    Parameters
    ----------
    graph : networkx.Graph
    prices : Prices, optional

    Returns
    -------
    dict
        JSON-able; degrees map a degree to the number of devices that have it.

    Examples
    --------
    >>> from topologies.datacentre import bcube
    >>> found = describe(bcube(3, 2, bandwidth=1e9))
    >>> found["devices"], found["switches"], found["cables"], found["diameter"]
    (9, 6, 18, 4)
    """
    nodes, devices = graph.number_of_nodes(), devices_of(graph)
    bought = hardware(graph)
    connected = nx.is_connected(graph.to_undirected())
    near = device_graph(graph)
    found: dict[str, Any] = {
        "topology": str(graph.graph.get("name") or family_of(graph)),
        "devices": len(devices),
        "servers": len(servers_of(graph)),
        "switches": bought.switches,
        "switch_ports": bought.switch_ports,
        "nic_ports": bought.nic_ports,
        "cables": bought.cables,
        "price": (prices or Prices()).of(bought),
        "device_degrees": dict(sorted(Counter(graph.degree[d] for d in devices).items())),
        "is_connected": connected,
        "diameter": None,
        "bisection_bps": None,
        "neighbours": near.number_of_edges(),
        "spectral_gap": None,
    }
    if connected and nodes <= _MAX_DIAMETER_NODES:
        found["diameter"] = nx.diameter(graph.to_undirected())
    if _has_rates(graph) and connected and len(devices) >= 2 and nodes <= _MAX_FLOW_NODES:
        found["bisection_bps"] = bisection_bps(graph)
    if near.number_of_edges() and len(devices) <= _MAX_MIXING_DEVICES:
        found["spectral_gap"] = spectral_gap(metropolis(near))
    if family_of(graph) == "bcube":
        pro_rated = pro_rated_switches(len(devices), graph.graph["parameters"]["n"])
        found["fat_tree_switches_pro_rated"] = float(pro_rated)
    return found
