"""Random graphs on which devices learn from each other.

Every function takes a `seed`: an int, or a `numpy.random.Generator` for a graph of a sequence
(`topologies.dynamics`).
"""

import math
from collections.abc import Callable

import networkx as nx
import numpy as np

from topologies.attributes import Graph, annotate, at_least

__all__ = [
    "barabasi_albert",
    "erdos_renyi",
    "expander",
    "random_geometric",
    "random_regular",
    "watts_strogatz",
]

_ATTEMPTS = 1000


def erdos_renyi(
    devices: int,
    density: float,
    *,
    connected: bool = False,
    seed: int | np.random.Generator = 0,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return G(n, p): each of the n (n - 1) / 2 links exists with probability `density`.

    Parameters
    ----------
    devices : int
    density : float
        Expected share of the possible links, in [0, 1].
    connected : bool
        Draw again until the graph is connected.
    seed : int or numpy.random.Generator
    bandwidth, latency : float
        Of a link, per direction (bit/s, s).

    Raises
    ------
    ValueError
        If `density` is not a probability, or no connected graph was drawn in 1000 attempts.

    Examples
    --------
    >>> erdos_renyi(20, 0.3, connected=True, seed=1).number_of_nodes()
    20
    """
    at_least("devices", devices, 2)
    if not 0 <= density <= 1:
        raise ValueError(f"density = {density}: must be between 0 and 1")
    upper = np.triu_indices(devices, 1)

    def draw(rng: np.random.Generator) -> Graph:
        chosen = rng.random(len(upper[0])) < density
        graph: Graph = nx.Graph()
        graph.add_nodes_from(range(devices))
        graph.add_edges_from(zip(upper[0][chosen].tolist(), upper[1][chosen].tolist(), strict=True))
        return graph

    sizes = {"devices": devices, "density": density}
    graph = _drawn(draw, f"density = {density}", seed, connected)
    return annotate(graph, "erdos_renyi", sizes, bandwidth=bandwidth, latency=latency)


def watts_strogatz(
    devices: int,
    neighbours: int,
    rewiring: float,
    *,
    seed: int | np.random.Generator = 0,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return a connected small world: a ring of `neighbours` each, links rewired at random.

    Parameters
    ----------
    devices : int
    neighbours : int
        Of each device before rewiring; even, below `devices`.
    rewiring : float
        Probability that one end of a link moves, in [0, 1].
    seed : int or numpy.random.Generator
    bandwidth, latency : float

    Examples
    --------
    >>> watts_strogatz(20, 4, 0.1, seed=1).number_of_edges()
    40
    """
    at_least("devices", devices, 3)
    if neighbours % 2 or not 2 <= neighbours < devices:
        raise ValueError(f"neighbours = {neighbours}: must be even, from 2 to {devices - 1}")
    if not 0 <= rewiring <= 1:
        raise ValueError(f"rewiring = {rewiring}: must be between 0 and 1")
    sizes = {"devices": devices, "neighbours": neighbours, "rewiring": rewiring}
    graph = _drawn(
        lambda rng: nx.watts_strogatz_graph(devices, neighbours, rewiring, seed=_python_seed(rng)),
        f"neighbours = {neighbours}, rewiring = {rewiring}",
        seed,
        connected=True,
    )
    return annotate(graph, "watts_strogatz", sizes, bandwidth=bandwidth, latency=latency)


def barabasi_albert(
    devices: int,
    attachments: int,
    *,
    seed: int | np.random.Generator = 0,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return a scale-free graph: each new device links to `attachments` old ones by their degree.

    Examples
    --------
    >>> barabasi_albert(20, 3, seed=1).number_of_edges() == 3 * (20 - 3)
    True
    """
    at_least("devices", devices, 2)
    if not 1 <= attachments < devices:
        raise ValueError(f"attachments = {attachments}: must be from 1 to {devices - 1}")
    sizes = {"devices": devices, "attachments": attachments}
    rng = np.random.default_rng(seed)
    graph = nx.barabasi_albert_graph(devices, attachments, seed=_python_seed(rng))
    return annotate(graph, "barabasi_albert", sizes, bandwidth=bandwidth, latency=latency)


def random_regular(
    devices: int,
    degree: int,
    *,
    seed: int | np.random.Generator = 0,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return a connected random graph in which every device has `degree` neighbours.

    Degree 1, a perfect matching, is the one degree that is not asked to be connected.

    Examples
    --------
    >>> set(dict(random_regular(20, 3, seed=1).degree()).values())
    {3}
    """
    at_least("devices", devices, 2)
    if not 1 <= degree < devices or devices * degree % 2:
        raise ValueError(
            f"degree = {degree}: must be from 1 to {devices - 1}, and {devices} x degree even"
        )
    sizes = {"devices": devices, "degree": degree}
    graph = _drawn(
        lambda rng: nx.random_regular_graph(degree, devices, seed=_python_seed(rng)),
        f"degree = {degree}",
        seed,
        connected=degree > 1,
    )
    return annotate(graph, "random_regular", sizes, bandwidth=bandwidth, latency=latency)


def random_geometric(
    devices: int,
    radius: float,
    *,
    connected: bool = False,
    seed: int | np.random.Generator = 0,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return devices at random places of the unit square, linked up to a distance of `radius`.

    Examples
    --------
    >>> graph = random_geometric(20, 0.4, seed=1)
    >>> len(graph.nodes[0]["position"])
    2
    """
    at_least("devices", devices, 2)
    if not radius > 0:
        raise ValueError(f"radius = {radius}: must be positive")

    def draw(rng: np.random.Generator) -> Graph:
        place = rng.random((devices, 2))
        distance = np.linalg.norm(place[:, None] - place[None], axis=2)
        graph: Graph = nx.Graph()
        graph.add_nodes_from((i, {"position": (x, y)}) for i, (x, y) in enumerate(place.tolist()))
        graph.add_edges_from(
            (i, j) for i, j in np.argwhere(np.triu(distance <= radius, 1)).tolist()
        )
        return graph

    sizes = {"devices": devices, "radius": radius}
    graph = _drawn(draw, f"radius = {radius}", seed, connected)
    return annotate(graph, "random_geometric", sizes, bandwidth=bandwidth, latency=latency)


def expander(
    devices: int,
    degree: int,
    *,
    seed: int | np.random.Generator = 0,
    bandwidth: float = math.inf,
    latency: float = 0.0,
) -> Graph:
    """Return a random regular graph whose second eigenvalue is within 5 % of Ramanujan's bound.

    All eigenvalues of its adjacency matrix but the first are at most 1.05 x 2 sqrt(degree - 1) in
    absolute value; most random regular graphs are like that.

    Examples
    --------
    >>> graph = expander(40, 4, seed=1)
    >>> values = np.sort(np.abs(np.linalg.eigvalsh(nx.to_numpy_array(graph))))
    >>> bool(values[-2] <= 1.05 * 2 * np.sqrt(3))
    True

    References
    ----------
    .. [1] Friedman, "A proof of Alon's second eigenvalue conjecture", STOC 2003.
    """
    if degree < 3:
        raise ValueError(f"degree = {degree}: an expander needs at least 3")
    rng = np.random.default_rng(seed)
    bound = 1.05 * 2 * math.sqrt(degree - 1)
    for _ in range(_ATTEMPTS):
        graph = random_regular(devices, degree, seed=rng, bandwidth=bandwidth, latency=latency)
        if np.sort(np.abs(np.linalg.eigvalsh(nx.to_numpy_array(graph))))[-2] <= bound:
            sizes = {"devices": devices, "degree": degree}
            return annotate(graph, "expander", sizes, bandwidth=bandwidth, latency=latency)
    raise ValueError(f"degree = {degree}: no expander of {devices} devices in {_ATTEMPTS} draws")


def _python_seed(rng: np.random.Generator) -> int:
    """Return a seed for networkx, which makes a private `random.Random` of it."""
    return int(rng.integers(2**63))


def _drawn(
    draw: Callable[[np.random.Generator], Graph],
    what: str,
    seed: int | np.random.Generator,
    connected: bool,
) -> Graph:
    rng = np.random.default_rng(seed)
    for _ in range(_ATTEMPTS):
        graph = draw(rng)
        if not connected or nx.is_connected(graph):
            ordered: Graph = nx.Graph()
            ordered.add_nodes_from(sorted(graph.nodes(data=True)))
            ordered.add_edges_from(graph.edges)
            return ordered
    raise ValueError(f"{what}: no connected graph in {_ATTEMPTS} draws")
