"""Every family of topologies by the name that files and commands use."""

from collections.abc import Callable

from topologies.attributes import Graph
from topologies.datacentre import bcube, dcell, dragonfly, fat_tree, leaf_spine
from topologies.formats import from_file, research_network
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
from topologies.random_graphs import (
    barabasi_albert,
    erdos_renyi,
    expander,
    random_geometric,
    random_regular,
    watts_strogatz,
)

__all__ = ["FAMILIES"]

FAMILIES: dict[str, Callable[..., Graph]] = {
    "barabasi_albert": barabasi_albert,
    "bcube": bcube,
    "complete": complete,
    "dcell": dcell,
    "dragonfly": dragonfly,
    "erdos_renyi": erdos_renyi,
    "expander": expander,
    "exponential": exponential,
    "fat_tree": fat_tree,
    "file": from_file,
    "grid": grid,
    "hypercube": hypercube,
    "leaf_spine": leaf_spine,
    "line": line,
    "random_geometric": random_geometric,
    "random_regular": random_regular,
    "research_network": research_network,
    "ring": ring,
    "star": star,
    "torus": torus,
    "tree": tree,
    "watts_strogatz": watts_strogatz,
}
