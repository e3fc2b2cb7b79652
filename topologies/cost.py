"""What a network costs: switches, ports, cables, network cards, and a price table.

Decision: a comparison of BCube with Fat-Tree at equal switch ports (k/5 of the switches) is
pro-rated: a full Fat-Tree of n-port switches holds n^3/4 servers, not n^k. `fat_tree_counts` of
`smallest_fat_tree` gives the one that can be bought, `pro_rated_switches` the ratio's; and a BCube
server has k network ports where a Fat-Tree's has one, so ``fat_tree(..., planes=k)`` is the
comparison with equal ports.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from topologies.attributes import Graph, at_least, devices_of, switches_of

__all__ = [
    "Hardware",
    "Prices",
    "bcube_counts",
    "fat_tree_counts",
    "hardware",
    "pro_rated_ratio",
    "pro_rated_switches",
]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What has to be bought.

    Attributes
    ----------
    devices : int
    switches : int
    switch_ports : int
        Of all switches together, also those that stay empty.
    nic_ports : int
        Network ports of devices and of the servers that are used.
    cables : int
    switches_by_ports : tuple of (int, int)
        (ports, number of switches of that size), ascending.
    """

    devices: int
    switches: int
    switch_ports: int
    nic_ports: int
    cables: int
    switches_by_ports: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Prices:
    """A price table in any currency; the defaults are round numbers, not quotations.

    Attributes
    ----------
    switch : float
        Of a switch without its ports.
    switch_port : float
        Of each port of a switch.
    nic_port : float
        Of each network port of a machine.
    cable : float
    switches : tuple of (int, float)
        Whole switches by number of ports, where a price list has them: ``((4, 300.0),)``.
    """

    switch: float = 0.0
    switch_port: float = 100.0
    nic_port: float = 50.0
    cable: float = 20.0
    switches: tuple[tuple[int, float], ...] = ()

    def of(self, hardware: Hardware) -> float:
        """Return the price of all hardware.

        Examples
        --------
        >>> Prices(switch_port=1, nic_port=0, cable=0).of(bcube_counts(3, 2))
        18.0
        """
        listed = dict(self.switches)
        switches = sum(
            count * listed.get(ports, self.switch + ports * self.switch_port)
            for ports, count in hardware.switches_by_ports
        )
        machines = hardware.nic_ports * self.nic_port
        return float(switches + machines + hardware.cables * self.cable)


def hardware(graph: Graph, *, spares_used: int = 0) -> Hardware:
    """Return what a graph is made of.

    Parameters
    ----------
    graph : networkx.Graph
    spares_used : int
        How many of the spare hosts, in order, are bought as well (dedicated servers).

    Examples
    --------
    >>> from topologies.datacentre import bcube
    >>> hardware(bcube(3, 2)) == bcube_counts(3, 2)
    True
    """
    spare = sorted(v for v, data in graph.nodes(data=True) if data.get("spare"))[spares_used:]
    missing = set(spare)
    switches = switches_of(graph)
    relays = set(switches)
    sizes = Counter(int(graph.nodes[v].get("ports", graph.degree[v])) for v in switches)
    cables = sum(u not in missing and v not in missing for u, v in graph.edges)
    nic_ports = sum(d for v, d in graph.degree if v not in relays and v not in missing)
    return Hardware(
        devices=len(devices_of(graph)),
        switches=len(switches),
        switch_ports=sum(ports * count for ports, count in sizes.items()),
        nic_ports=nic_ports,
        cables=cables,
        switches_by_ports=tuple(sorted(sizes.items())),
    )


def bcube_counts(n: int, k: int) -> Hardware:
    """Return the hardware of BCube(n, k) without building it.

    Examples
    --------
    >>> bcube_counts(16, 3).switches
    768
    """
    at_least("n", n, 2)
    at_least("k", k, 1)
    servers, switches = n**k, k * n ** (k - 1)
    ports = k * servers
    return Hardware(servers, switches, ports, ports, ports, ((n, switches),))


def fat_tree_counts(ports: int) -> Hardware:
    """Return the hardware of a full Fat-Tree without building it.

    Examples
    --------
    >>> fat_tree_counts(16).switches
    320
    """
    at_least("ports", ports, 2)
    if ports % 2:
        raise ValueError(f"ports = {ports}: a Fat-Tree needs an even number, {ports + 1} say")
    hosts, switches = ports**3 // 4, 5 * ports**2 // 4
    return Hardware(hosts, switches, switches * ports, hosts, 3 * hosts, ((ports, switches),))


def pro_rated_switches(servers: int, ports: int) -> Fraction:
    """Return 5/p switches for each server: a Fat-Tree's share, whatever it holds.

    Examples
    --------
    >>> pro_rated_switches(9, 3)
    Fraction(15, 1)
    """
    return Fraction(5 * servers, ports)


def pro_rated_ratio(k: int) -> Fraction:
    """Return BCube's switches over Fat-Tree's for equal servers and switch ports: k/5.

    Examples
    --------
    >>> pro_rated_ratio(2)
    Fraction(2, 5)
    """
    return Fraction(k, 5)
