"""Which links there are and which of them a payload crosses: a star as arithmetic, or any graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import inf
from typing import Any, Literal, Protocol

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from fedsim.errors import NetworkError

__all__ = ["GraphWiring", "LinkTable", "ListedWiring", "StarWiring", "Wiring"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinkTable:
    """The links' own figures; row = link id.

    Attributes
    ----------
    bandwidth_bps, latency : ndarray, shape (n_links,), bit/s and s
    loss : ndarray, shape (n_links,), or None
        Probability that a packet is lost.
    unshared : ndarray of bool, shape (n_links,), or None
        Links on which each flow alone may use all of the bandwidth.
    """

    bandwidth_bps: FloatArray
    latency: FloatArray
    loss: FloatArray | None = None
    unshared: NDArray[np.bool_] | None = None

    def check(self, name: Callable[[int], str]) -> None:
        """Raise `NetworkError` for figures that no link can have."""
        _refuse(
            np.isnan(self.bandwidth_bps) | (self.bandwidth_bps <= 0),
            self.bandwidth_bps,
            name,
            "bandwidth must be positive (bit/s)",
        )
        _refuse(
            ~np.isfinite(self.latency) | (self.latency < 0),
            self.latency,
            name,
            "latency must be finite and not negative (s)",
        )
        if self.loss is not None:
            _refuse(
                ~((self.loss >= 0) & (self.loss < 1)),
                self.loss,
                name,
                "loss must be at least 0 and below 1",
            )


def _refuse(
    wrong: NDArray[np.bool_], values: FloatArray, name: Callable[[int], str], rule: str
) -> None:
    if wrong.any():
        link = int(np.argmax(wrong))
        raise NetworkError(f"link {name(link)}: {rule}, got {values[link]:g}")


class Wiring(Protocol):
    """Names, ends and routes of links."""

    n_nodes: int
    server: int | None
    graph: "nx.Graph[Any] | None"

    def name(self, link: int) -> str:
        """Return a link's name."""

    def find(self, name: str) -> tuple[int, ...]:
        """Return the links of a name; an undirected edge's name gives both directions."""

    def ends(self, link: int) -> tuple[int, int]:
        """Return the nodes that a link leads from and to."""

    def physical(self, link: int) -> str:
        """Return the name that both directions of a link share."""

    def varies(self, link: int) -> bool:
        """Tell whether a link model for access links applies to this one."""

    def links_of(self, node: int) -> tuple[int, ...]:
        """Return the links that start or end at a node."""

    def route(self, source: int, destination: int) -> tuple[int, ...]:
        """Return the links from one node to another, in order."""

    def detour(
        self, source: int, destination: int, is_up: Callable[[int], bool]
    ) -> tuple[int, ...] | None:
        """Return a route over links that are up; None if there is none."""


class StarWiring:
    """Devices 0..n-1 around one server, node n: two links a device and the server's own two.

    Link ids: ``up-i`` is i (device to server), ``down-i`` is n + i, ``server-up`` 2n (what all
    uploads share), ``server-down`` 2n + 1. Nothing is stored for a device.
    """

    def __init__(self, n_devices: int) -> None:
        self._n = n_devices
        self.n_nodes = n_devices + 1
        self.graph: nx.Graph[Any] | None = None
        self.server: int | None = n_devices

    def name(self, link: int) -> str:
        """Return a link's name."""
        n = self._n
        if link < 2 * n:
            return f"up-{link}" if link < n else f"down-{link - n}"
        return "server-up" if link == 2 * n else "server-down"

    def find(self, name: str) -> tuple[int, ...]:
        """Return the link of a name; ``access-17`` and ``17-<server>`` give both directions."""
        n = self._n
        if name in ("server-up", "server-down"):
            return (2 * n + (name == "server-down"),)
        head, _, tail = name.partition("-")
        if head.isdigit() and tail == str(n):
            head, tail = "access", head
        if tail.isdigit() and int(tail) < n:
            device = int(tail)
            found = {"up": (device,), "down": (n + device,), "access": (device, n + device)}
            if head in found:
                return found[head]
        raise NetworkError(
            f"no link is called {name!r}: a star of {n} devices has up-0 … up-{n - 1}, "
            f"down-0 … down-{n - 1}, access-0 … access-{n - 1}, server-up, server-down"
        )

    def ends(self, link: int) -> tuple[int, int]:
        """Return the nodes that a link leads from and to."""
        n = self._n
        if link < n:
            return link, n
        return (n, link - n) if link < 2 * n else (n, n)

    def physical(self, link: int) -> str:
        """Return the name that both directions of a link share."""
        n = self._n
        return f"access-{link % n}" if link < 2 * n else self.name(link)

    def varies(self, link: int) -> bool:
        """Tell whether a link is an access link."""
        return link < 2 * self._n

    def links_of(self, node: int) -> tuple[int, ...]:
        """Return the links that start or end at a node."""
        n = self._n
        return (node, n + node) if node < n else tuple(range(2 * n + 2))

    def route(self, source: int, destination: int) -> tuple[int, ...]:
        """Return the links from one node to another; devices reach each other over the server."""
        n = self._n
        if not (0 <= source <= n and 0 <= destination <= n):
            raise NetworkError(f"no route from {source} to {destination}: nodes are 0 … {n}")
        if source == destination:
            return ()
        if destination == n:
            return (source, 2 * n)
        if source == n:
            return (2 * n + 1, n + destination)
        return (source, 2 * n, 2 * n + 1, n + destination)

    def detour(
        self, source: int, destination: int, is_up: Callable[[int], bool]
    ) -> tuple[int, ...] | None:
        """Return the one route if it is up."""
        route = self.route(source, destination)
        return route if all(is_up(link) for link in route) else None


class GraphWiring:
    """Links of a networkx graph, routed by shortest path.

    An undirected edge becomes two directed links, ``3>7`` and ``7>3`` (physical link ``3-7``), or
    one shared by both directions where `duplex` (or the edge's own) is ``"half"``.
    Ties between routes go to fewer hops, then to the smaller node ids.
    """

    def __init__(
        self,
        graph: "nx.Graph[Any]",
        *,
        duplex: Literal["full", "half"] = "full",
        routing: Literal["latency", "hops"] = "latency",
    ) -> None:
        if sorted(graph.nodes) != list(range(len(graph))):
            raise NetworkError("the nodes of a network graph must be 0 … n-1")
        self.n_nodes = len(graph)
        self.graph: nx.Graph[Any] | None = graph
        servers = [node for node, data in graph.nodes(data=True) if data.get("role") == "server"]
        self.server: int | None = servers[0] if len(servers) == 1 else None
        self._names: list[str] = []
        self._ends: list[tuple[int, int]] = []
        self._by_name: dict[str, list[int]] = {}
        self._neighbours: list[list[tuple[int, int]]] = [[] for _ in range(self.n_nodes)]
        self._routes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._searches: dict[int, _Search] = {}
        rows: list[tuple[float, float, float, bool]] = []
        multi = graph.is_multigraph()
        # Sorted, so that the order in which edges were added changes nothing.
        edges = [
            (a, b, data) if graph.is_directed() else (min(a, b), max(a, b), data)
            for a, b, data in graph.edges(data=True)
        ]
        for a, b, data in sorted(edges, key=lambda edge: edge[:2]):
            if multi and (a, b) in self._ends:
                raise NetworkError(f"link {a}-{b} is named twice")
            self._add_edge(a, b, data, graph.is_directed(), duplex, rows)
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        loss, unshared = np.array(columns[2], dtype=float), np.array(columns[3], dtype=bool)
        self.table = LinkTable(
            np.array(columns[0], dtype=float),
            np.array(columns[1], dtype=float),
            loss if loss.any() else None,
            unshared if unshared.any() else None,
        )
        self.table.check(self.name)
        self._cost = [0.0] * len(rows) if routing == "hops" else list(columns[1])

    def _add_edge(
        self,
        a: int,
        b: int,
        data: dict[str, Any],
        is_directed: bool,
        duplex: str,
        rows: list[tuple[float, float, float, bool]],
    ) -> None:
        sharing = data.get("sharing", "shared")
        if sharing not in ("shared", "unshared"):
            raise NetworkError(f"link {a}-{b}: sharing is shared or unshared, got {sharing!r}")
        row = (
            float(data.get("bandwidth", inf)),
            float(data.get("latency", 0.0)),
            float(data.get("loss", 0.0)),
            sharing == "unshared",
        )
        pairs = [(a, b)] if is_directed else [(a, b), (b, a)]
        if not is_directed and data.get("duplex", duplex) == "half":
            link = self._add_link(f"{a}-{b}", a, b, rows, row)
            self._neighbours[a].append((b, link))
            self._neighbours[b].append((a, link))
            return
        for source, destination in pairs:
            link = self._add_link(f"{source}>{destination}", source, destination, rows, row)
            self._neighbours[source].append((destination, link))
            self._by_name.setdefault(self.physical(link), []).append(link)

    def _add_link(
        self,
        name: str,
        source: int,
        destination: int,
        rows: list[tuple[float, float, float, bool]],
        row: tuple[float, float, float, bool],
    ) -> int:
        self._names.append(name)
        self._ends.append((source, destination))
        self._by_name[name] = [len(rows)]
        rows.append(row)
        return len(rows) - 1

    def name(self, link: int) -> str:
        """Return a link's name."""
        return self._names[link]

    def find(self, name: str) -> tuple[int, ...]:
        """Return the links of a name: ``3>7`` one direction, ``3-7`` the edge."""
        head, dash, tail = name.partition("-")
        if dash and head.isdigit() and tail.isdigit() and int(tail) < int(head):
            name = f"{tail}-{head}"
        if name not in self._by_name:
            raise NetworkError(f"no link is called {name!r}: write 3-7 (both ways) or 3>7")
        return tuple(self._by_name[name])

    def ends(self, link: int) -> tuple[int, int]:
        """Return the nodes that a link leads from and to."""
        return self._ends[link]

    def physical(self, link: int) -> str:
        """Return the name that both directions of a link share."""
        a, b = self._ends[link]
        return f"{min(a, b)}-{max(a, b)}"

    def varies(self, link: int) -> bool:
        """Return True: in a graph a link model applies to every link."""
        return True

    def links_of(self, node: int) -> tuple[int, ...]:
        """Return the links that start or end at a node."""
        return tuple(link for link, ends in enumerate(self._ends) if node in ends)

    def route(self, source: int, destination: int) -> tuple[int, ...]:
        """Return the shortest route; searched once for each source, as far as needed."""
        key = (source, destination)
        found = self._routes.get(key)
        if found is None:
            for node in key:
                if not 0 <= node < self.n_nodes:
                    raise NetworkError(
                        f"no route from {source} to {destination}: nodes are 0 … {self.n_nodes - 1}"
                    )
            search = self._searches.get(source)
            if search is None:
                search = self._searches[source] = _Search(source)
            path = self._advance(search, destination, None)
            if path is None:
                raise NetworkError(f"no route from {source} to {destination}: not connected")
            found = self._routes[key] = path
        return found

    def detour(
        self, source: int, destination: int, is_up: Callable[[int], bool]
    ) -> tuple[int, ...] | None:
        """Return the shortest route over links that are up; None if there is none."""
        return self._advance(_Search(source), destination, is_up)

    def _advance(
        self, search: "_Search", destination: int, is_up: Callable[[int], bool] | None
    ) -> tuple[int, ...] | None:
        """Go on with a Dijkstra search until it has settled the destination."""
        last, best, heap = search.last, search.best, search.heap
        while heap and destination not in last:
            cost, hops, path, link = heappop(heap)
            node = path[-1]
            if node in last:
                continue
            last[node] = link
            for neighbour, onward in self._neighbours[node]:
                if neighbour in last or (is_up is not None and not is_up(onward)):
                    continue
                key = (cost + self._cost[onward], hops + 1, (*path, neighbour))
                if neighbour not in best or key < best[neighbour]:
                    best[neighbour] = key
                    heappush(heap, (*key, onward))
        if destination not in last:
            return None
        route: list[int] = []
        node = destination
        while last[node] >= 0:
            route.append(last[node])
            a, b = self._ends[last[node]]
            node = a if node == b else b
        return tuple(reversed(route))


class _Search:
    """A shortest-path search that can be taken up again."""

    def __init__(self, source: int) -> None:
        self.last: dict[int, int] = {}  # of each settled node, the link that leads to it
        self.best: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        self.heap: list[tuple[float, int, tuple[int, ...], int]] = [(0.0, 0, (source,), -1)]


class ListedWiring:
    """Links in a list, without nodes: whoever sends a payload says which links it crosses."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._ids = {name: link for link, name in enumerate(self._names)}
        if len(self._ids) < len(self._names):
            twice = next(a for a, b in pairwise(sorted(self._names)) if a == b)
            raise NetworkError(f"link {twice} is named twice")
        self.n_nodes = 0
        self.graph: nx.Graph[Any] | None = None
        self.server: int | None = None

    def name(self, link: int) -> str:
        """Return a link's name."""
        return self._names[link]

    def find(self, name: str) -> tuple[int, ...]:
        """Return the link of a name."""
        if name not in self._ids:
            raise NetworkError(f"no link is called {name!r}")
        return (self._ids[name],)

    def ends(self, link: int) -> tuple[int, int]:
        """Return no nodes."""
        return (-1, -1)

    def physical(self, link: int) -> str:
        """Return the link's own name."""
        return self._names[link]

    def varies(self, link: int) -> bool:
        """Return True: a link model applies to every link."""
        return True

    def links_of(self, node: int) -> tuple[int, ...]:
        """Return no links."""
        return ()

    def route(self, source: int, destination: int) -> tuple[int, ...]:
        """Raise `NetworkError`: routes have to be given."""
        raise NetworkError(f"no route from {source} to {destination}: give one with the transfer")

    def detour(
        self, source: int, destination: int, is_up: Callable[[int], bool]
    ) -> tuple[int, ...] | None:
        """Return None: only the route that was given exists."""
        return None
