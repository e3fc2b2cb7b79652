"""Switched networks of machine rooms: Fat-Tree, leaf-spine, BCube, DCell, dragonfly.

Hosts come first. Where fewer devices are asked for than there are hosts, the first hosts in order
are the devices and the others are servers marked ``spare``: there, but not bought
(`topologies.cost`) unless a collective uses them. ``level`` is 0 for hosts, 1 next to them, and so
on; for BCube it is the switch's level plus 1.
"""

import math
from itertools import combinations, product

import networkx as nx

from topologies.attributes import Graph, annotate, at_least

__all__ = ["bcube", "dcell", "dragonfly", "fat_tree", "leaf_spine", "smallest_fat_tree"]


def fat_tree(
    ports: int,
    *,
    devices: int | None = None,
    oversubscription: float = 1.0,
    planes: int = 1,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return the Fat-Tree of switches with an even number of ports p, holding p^3/4 hosts.

    Pod q has p/2 edge and p/2 aggregation switches; host h is in pod h div (p/2)^2, under edge
    switch (h div p/2) mod p/2; aggregation switch x of every pod joins core switches (x, 0..p/2-1).

    Parameters
    ----------
    ports : int
        Even, at least 2.
    devices : int, optional
        The first hosts that are devices; all by default.
    oversubscription : float
        x : 1. Every edge-aggregation and every aggregation-core cable has `bandwidth` / x.
    planes : int
        Parallel copies of all switches; each host has a port on every plane. With as many planes as
        a BCube has levels, hosts have equally many ports.
    bandwidth, latency : float
        Of a host's cable, per direction (bit/s, s).

    Raises
    ------
    ValueError
        If `ports` is odd, or there are more devices than hosts.

    Examples
    --------
    >>> p = 6
    >>> graph = fat_tree(p)
    >>> sum(role == "switch" for _, role in graph.nodes(data="role")) == 5 * p**2 // 4
    True
    >>> graph.number_of_edges() == 3 * p**3 // 4
    True

    References
    ----------
    .. [1] Al-Fares, Loukissas, Vahdat, "A scalable, commodity data center network architecture",
       SIGCOMM 2008.
    """
    at_least("ports", ports, 2)
    if ports % 2:
        raise ValueError(f"ports = {ports}: a Fat-Tree needs an even number, {ports + 1} say")
    if not oversubscription >= 1:
        raise ValueError(f"oversubscription = {oversubscription}: must be at least 1")
    at_least("planes", planes, 1)
    half, pods = ports // 2, ports
    hosts = pods * half * half
    graph = _hosts(hosts, devices)
    upper = {"bandwidth": bandwidth / oversubscription, "latency": latency}
    free = hosts
    for _ in range(planes):
        edge = {key: free + i for i, key in enumerate(product(range(pods), range(half)))}
        aggregation = {key: v + len(edge) for key, v in edge.items()}
        core = {
            key: free + 2 * len(edge) + i for i, key in enumerate(product(range(half), repeat=2))
        }
        layers = (edge.values(), aggregation.values(), core.values())
        for level, switches in enumerate(layers, start=1):
            graph.add_nodes_from(switches, role="switch", level=level, ports=ports)
        graph.add_edges_from((h, edge[h // half**2, h // half % half]) for h in range(hosts))
        for pod, x, y in product(range(pods), range(half), range(half)):
            graph.add_edge(edge[pod, x], aggregation[pod, y], **upper)
            graph.add_edge(aggregation[pod, x], core[x, y], **upper)
        free += 2 * len(edge) + len(core)
    sizes = {
        "ports": ports,
        "devices": devices,
        "oversubscription": oversubscription if oversubscription != 1 else None,
        "planes": planes if planes != 1 else None,
    }
    return annotate(graph, "fat_tree", sizes, bandwidth=bandwidth, latency=latency)


def smallest_fat_tree(hosts: int) -> int:
    """Return the smallest even port number whose full Fat-Tree holds that many hosts.

    Examples
    --------
    >>> smallest_fat_tree(9), smallest_fat_tree(1024), smallest_fat_tree(1025)
    (4, 16, 18)
    """
    ports = 2
    while ports**3 // 4 < hosts:
        ports += 2
    return ports


def leaf_spine(
    leaves: int,
    spines: int,
    hosts_per_leaf: int,
    *,
    devices: int | None = None,
    oversubscription: float | None = None,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return a two-layer network: every leaf switch is joined to every spine switch.

    Parameters
    ----------
    leaves, spines, hosts_per_leaf : int
    devices : int, optional
        The first hosts that are devices; all by default.
    oversubscription : float, optional
        Host capacity of a leaf over its uplink capacity. By default the uplinks have the hosts'
        `bandwidth`, which makes it hosts_per_leaf / spines.
    bandwidth, latency : float
        Of a host's cable, per direction (bit/s, s).

    Examples
    --------
    >>> graph = leaf_spine(4, 2, 3)
    >>> graph.number_of_nodes(), graph.number_of_edges()
    (18, 20)
    """
    for what, value in (("leaves", leaves), ("spines", spines), ("hosts_per_leaf", hosts_per_leaf)):
        at_least(what, value, 1)
    hosts = leaves * hosts_per_leaf
    graph = _hosts(hosts, devices)
    leaf = range(hosts, hosts + leaves)
    spine = range(hosts + leaves, hosts + leaves + spines)
    graph.add_nodes_from(leaf, role="switch", level=1, ports=hosts_per_leaf + spines)
    graph.add_nodes_from(spine, role="switch", level=2, ports=leaves)
    graph.add_edges_from((h, leaf[h // hosts_per_leaf]) for h in range(hosts))
    rate = bandwidth
    if oversubscription is not None:
        if not oversubscription > 0:
            raise ValueError(f"oversubscription = {oversubscription}: must be positive")
        rate = bandwidth * hosts_per_leaf / (spines * oversubscription)
    graph.add_edges_from(product(leaf, spine), bandwidth=rate, latency=latency)
    sizes = {
        "leaves": leaves,
        "spines": spines,
        "hosts_per_leaf": hosts_per_leaf,
        "devices": devices,
        "oversubscription": oversubscription,
    }
    return annotate(graph, "leaf_spine", sizes, bandwidth=bandwidth, latency=latency)


def bcube(n: int, k: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return BCube(n, k): n^k servers with k ports each, k levels of n^(k-1) n-port switches.

    Server a has base-n digits a_0 .. a_(k-1), a = sum a_l n^l. A switch of level l joins the n
    servers that differ in digit l only. Guo et al. write the same object with top level k - 1.

    Parameters
    ----------
    n : int
        Ports of a switch, at least 2.
    k : int
        Levels, which is also the ports of a server, at least 1.
    bandwidth, latency : float
        Of a cable, per direction (bit/s, s).

    Examples
    --------
    >>> n, k = 4, 3
    >>> graph = bcube(n, k)
    >>> sum(role == "switch" for _, role in graph.nodes(data="role")) == k * n ** (k - 1)
    True
    >>> graph.number_of_edges() == k * n**k
    True

    References
    ----------
    .. [1] Guo et al., "BCube: a high performance, server-centric network architecture for modular
       data centers", SIGCOMM 2009.
    """
    at_least("n", n, 2)
    at_least("k", k, 1)
    graph = _hosts(n**k, None)
    for level in range(k):
        low = n**level
        first = n**k + level * n ** (k - 1)
        graph.add_nodes_from(
            range(first, first + n ** (k - 1)), role="switch", level=level + 1, ports=n
        )
        for server in range(n**k):
            rest = server % low + server // (low * n) * low
            graph.add_edge(server, first + rest)
    return annotate(graph, "bcube", {"n": n, "k": k}, bandwidth=bandwidth, latency=latency)


def dcell(n: int, k: int, *, bandwidth: float = math.inf, latency: float = 0.0) -> Graph:
    """Return DCell of level k on n-port switches.

    DCell_0 is n servers on one switch. DCell_l joins g = t + 1 copies of DCell_(l-1) with t servers
    each, every two copies i < j by one cable between server j - 1 of copy i and server i of copy j.

    Examples
    --------
    >>> graph = dcell(4, 1)
    >>> graph.number_of_nodes(), graph.number_of_edges()
    (25, 30)

    References
    ----------
    .. [1] Guo et al., "DCell: a scalable and fault-tolerant network structure for data centers",
       SIGCOMM 2008.
    """
    at_least("n", n, 2)
    at_least("k", k, 0)
    sizes = [n]
    for _ in range(k):
        sizes.append(sizes[-1] * (sizes[-1] + 1))
    hosts = sizes[-1]
    graph = _hosts(hosts, None)
    graph.add_nodes_from(range(hosts, hosts + hosts // n), role="switch", level=1, ports=n)
    graph.add_edges_from((h, hosts + h // n) for h in range(hosts))
    for level, size in enumerate(sizes[1:]):
        part = sizes[level]
        for base in range(0, hosts, size):
            for i, j in combinations(range(part + 1), 2):
                graph.add_edge(base + i * part + j - 1, base + j * part + i)
    return annotate(graph, "dcell", {"n": n, "k": k}, bandwidth=bandwidth, latency=latency)


def dragonfly(
    routers: int,
    hosts_per_router: int,
    global_links: int,
    *,
    devices: int | None = None,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return the largest dragonfly: a h + 1 groups of a routers, one cable per pair of groups.

    Parameters
    ----------
    routers : int
        a, routers of a group, all joined to each other.
    hosts_per_router : int
    global_links : int
        h, cables of a router that leave its group.
    devices : int, optional
        The first hosts that are devices; all by default.
    bandwidth, latency : float
        Of a cable, per direction (bit/s, s).

    Examples
    --------
    >>> graph = dragonfly(4, 2, 2)
    >>> graph.number_of_nodes(), graph.number_of_edges()
    (108, 162)

    References
    ----------
    .. [1] Kim, Dally, Scott, Abts, "Technology-driven, highly-scalable dragonfly topology",
       ISCA 2008.
    """
    parts = (("routers", routers), ("hosts_per_router", hosts_per_router))
    for what, value in (*parts, ("global_links", global_links)):
        at_least(what, value, 1)
    groups = routers * global_links + 1
    switches = groups * routers
    hosts = switches * hosts_per_router
    graph = _hosts(hosts, devices)
    ports = hosts_per_router + routers - 1 + global_links
    graph.add_nodes_from(range(hosts, hosts + switches), role="switch", level=1, ports=ports)
    graph.add_edges_from((h, hosts + h // hosts_per_router) for h in range(hosts))
    for group in range(groups):
        first = hosts + group * routers
        graph.add_edges_from(combinations(range(first, first + routers), 2))
    for i, j in combinations(range(groups), 2):
        # Group i reaches group j by its (j - 1)-th cable, group j reaches i by its i-th.
        graph.add_edge(
            hosts + i * routers + (j - 1) // global_links, hosts + j * routers + i // global_links
        )
    sizes = {
        "routers": routers,
        "hosts_per_router": hosts_per_router,
        "global_links": global_links,
        "devices": devices,
    }
    return annotate(graph, "dragonfly", sizes, bandwidth=bandwidth, latency=latency)


def _hosts(hosts: int, devices: int | None) -> Graph:
    count = hosts if devices is None else at_least("devices", devices, 1)
    if count > hosts:
        raise ValueError(f"devices = {count}: this network holds {hosts}")
    graph: Graph = nx.Graph()
    graph.add_nodes_from(range(count), role="device", level=0)
    graph.add_nodes_from(range(count, hosts), role="server", level=0, spare=True)
    return graph
