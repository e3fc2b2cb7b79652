"""The graphs of a scenario: its topology, and who may exchange with whom in a round.

Decision: a graph that changes from round to round is drawn from (seed, round) alone, so any round
can be asked for in any order, and strategies that go through their rounds at different speeds see
the same graphs.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from fedsim import registry
from fedsim.errors import ScenarioError
from fedsim.streams import stream
from topologies.attributes import Graph, devices_of

__all__ = ["between_devices", "build_graph", "is_random", "peer_graphs"]


def build_graph(
    spec: Mapping[str, Any], devices: int, rng: np.random.Generator, **figures: Any
) -> Graph:
    """Return the graph of a part of a scenario that names a topology.

    Parameters
    ----------
    spec : mapping
        `kind` and the generator's arguments.
    devices : int
        How many the scenario has. Families whose sizes say another number are refused.
    rng : numpy.random.Generator
        For random graphs.
    **figures
        ``bandwidth`` (bit/s) and ``latency`` (s) of links for which the family has none; of a tree
        a list, for each tier.

    Raises
    ------
    ScenarioError
        If the generator refuses its arguments, or makes a graph of other devices.
    """
    graph: Graph = registry.build("topology", spec, devices=devices, seed=rng, **figures)
    found = devices_of(graph)
    if len(found) != devices:
        raise ScenarioError(
            f"{graph.name or spec['kind']} has {len(found)} devices, but data.devices is "
            f"{devices}; write data.devices: {len(found)}, or another size"
        )
    if found != list(range(devices)):
        raise ScenarioError(f"{spec['kind']}: the devices must be the nodes 0 to {devices - 1}")
    return graph


def between_devices(graph: Graph) -> Graph:
    """Return the devices and the links between them."""
    kept: Graph = graph.subgraph(devices_of(graph))
    return kept


def is_random(kind: str) -> bool:
    """Return whether a topology is drawn, so that it can be drawn anew."""
    return "seed" in inspect.signature(registry.resolve("topology", kind)).parameters


def peer_graphs(
    spec: Mapping[str, Any], devices: int, seed: int, *, redraw: bool
) -> Callable[[int], Graph]:
    """Return who may exchange with whom, as a function of the round.

    Parameters
    ----------
    spec : mapping
        `kind` and the generator's arguments.
    devices : int
    seed : int
        The scenario's.
    redraw : bool
        Draw a random graph anew in every round; otherwise all rounds have one graph.
    """

    @lru_cache(maxsize=4)
    def at(number: int) -> Graph:
        return between_devices(build_graph(spec, devices, stream(seed, "peers", number)))

    return at if redraw else lambda number: at(0)
