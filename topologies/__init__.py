"""Graphs, routing, mixing weights, collectives and their cost; needs networkx and numpy only."""

from topologies.attributes import devices_of, hosts_of, servers_of, switches_of
from topologies.generators import (
    complete,
    exponential,
    grid,
    hypercube,
    line,
    ring,
    star,
    torus,
    tree,
)

__all__ = [
    "complete",
    "devices_of",
    "exponential",
    "grid",
    "hosts_of",
    "hypercube",
    "line",
    "ring",
    "servers_of",
    "star",
    "switches_of",
    "torus",
    "tree",
]
