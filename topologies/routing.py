"""Which links a message crosses: shortest paths, equal-cost multipath, BCube addresses, detours.

A `Router` answers for all messages of a step at once, as arrays over the directed links of a
`LinkTable`; `topologies.paths` answers for one pair of nodes.

Decision: *spray* splits a message evenly over all shortest paths (not hop by hop). On a Fat-Tree
both are the same; on BCube the split is over the rotations of the digits to correct, which is what
its servers know how to do.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from topologies.attributes import Graph, family_of
from topologies.paths import Weight, bcube_switches, keyed_uniform

__all__ = ["LinkTable", "Mode", "Router", "Routes", "link_table"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

Mode = Literal["auto", "spray", "hash", "single", "bcube", "explicit"]

# Links x destinations of one block of the all-destinations search: what fits into a processor's
# caches takes half the time of blocks ten times as large. So many blocks are kept: bounds memory.
_BLOCK = 1_000_000
_KEPT = 40
# Two paths whose scaled costs differ by less are equally short.
_SLACK = 1e-11


@dataclass(frozen=True, slots=True, eq=False)
class LinkTable:
    """The directed links of a graph, ordered by source and target.

    Attributes
    ----------
    n_nodes : int
    source, target : ndarray of int, shape (n_links,)
    bandwidth : ndarray, shape (n_links,)
        bit/s.
    latency : ndarray, shape (n_links,)
        Seconds.
    """

    n_nodes: int
    source: IntArray
    target: IntArray
    bandwidth: FloatArray
    latency: FloatArray

    def __len__(self) -> int:
        """Return the number of directed links."""
        return len(self.source)

    def find(self, sources: IntArray, targets: IntArray) -> IntArray:
        """Return the numbers of the links between pairs of nodes.

        Raises
        ------
        ValueError
            If two of the nodes are not joined.
        """
        keys = self.source * self.n_nodes + self.target
        wanted = np.asarray(sources) * self.n_nodes + np.asarray(targets)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        wrong = np.flatnonzero(keys[at] != wanted)
        if len(wrong):
            a, b = divmod(int(wanted[wrong[0]]), self.n_nodes)
            raise ValueError(f"no link from {a} to {b}")
        return at

    def name(self, link: int) -> str:
        """Return how tables and errors call a link: ``3>17``."""
        return f"{self.source[link]}>{self.target[link]}"


def link_table(graph: Graph) -> LinkTable:
    """Return the directed links of a graph; an undirected edge is two of them.

    Raises
    ------
    ValueError
        If the nodes are not 0..n-1, there is no edge, or an edge lacks a sensible bandwidth.
    """
    n = graph.number_of_nodes()
    if set(graph) != set(range(n)):
        raise ValueError("the nodes of a graph must be 0..n-1 (topologies.from_file renumbers)")
    if not graph.number_of_edges():
        raise ValueError("the graph has no edge")
    rows = [
        (u, v, data.get("bandwidth", math.inf), data.get("latency", 0.0))
        for u, v, data in graph.edges(data=True)
    ]
    if not graph.is_directed():
        rows += [(v, u, rate, delay) for u, v, rate, delay in rows]
    ends = np.array([row[:2] for row in rows], dtype=np.int64)
    values = np.array([row[2:] for row in rows], dtype=np.float64)
    if not (values[:, 0] >= 0).all():
        worst = int(np.flatnonzero(~(values[:, 0] >= 0))[0])
        raise ValueError(f"link {rows[worst][:2]}: bandwidth = {rows[worst][2]} bit/s")
    order = np.lexsort((ends[:, 1], ends[:, 0]))
    ends, values = ends[order], values[order]
    return LinkTable(n, ends[:, 0], ends[:, 1], values[:, 0], values[:, 1])


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Which share of which message crosses which link, as parallel arrays.

    Attributes
    ----------
    message, link : ndarray of int, shape (n_entries,)
    share : ndarray, shape (n_entries,)
        In (0, 1].
    """

    message: IntArray
    link: IntArray
    share: FloatArray

    def loads(self, sizes: FloatArray, n_links: int) -> FloatArray:
        """Return what each link carries when message i weighs ``sizes[i]``."""
        return _sums(self.link, sizes[self.message] * self.share, n_links)


@dataclass(frozen=True, eq=False)
class _Paths:
    """All shortest paths towards a block of destinations, `first` and the next ones.

    `distance` has shape (n_nodes, n_columns), a column for each destination. A state is node *
    n_columns + column. The entries, one for each link and destination whose shortest paths use it,
    lead from state `origin` to state `onward`, with the share of the paths that go this way. They
    come in layers (`bounds`) of falling distance, so that what a node passes on has arrived.
    """

    first: int
    distance: FloatArray
    origin: IntArray
    onward: IntArray
    link: IntArray
    share: FloatArray
    bounds: list[tuple[int, int]]

    @cached_property
    def by_origin(self) -> tuple[IntArray, IntArray]:
        """Return the entries ordered by origin, and where each state's begin."""
        order = np.argsort(self.origin, kind="stable")
        return order, np.searchsorted(self.origin[order], np.arange(self.distance.size + 1))


class Router:
    """Routes of many messages at once on one graph.

    Parameters
    ----------
    graph : networkx.Graph
        Nodes 0..n-1, edges with ``bandwidth``.
    mode : str
        ``spray``: even split over all shortest paths. ``hash``: one of them for each (source,
        destination, flow), drawn by a keyed hash. ``single``: always the first of them by node
        number. ``bcube``: digit-correcting paths, even split over the rotations of the levels that
        differ, the shortest detours where none survives. ``explicit``: as given in `explicit`.
        ``auto``: ``bcube`` on that family, else ``spray``.
    weight : str
        What a shortest path minimises: ``hops``, ``latency``, or ``bandwidth`` (the sum of 1/rate);
        fewer hops break ties.
    seed : int
        Of the hash.
    explicit : mapping, optional
        (source, destination) to a list of node lists, split evenly.
    down : iterable
        Links (u, v), dead in both directions, and nodes (int) that no route may use.
    """

    def __init__(
        self,
        graph: Graph,
        *,
        mode: Mode = "auto",
        weight: Weight = "hops",
        seed: int = 0,
        explicit: Mapping[tuple[int, int], Sequence[Sequence[int]]] | None = None,
        down: Iterable[tuple[int, int] | int] = (),
    ) -> None:
        if mode not in ("auto", "spray", "hash", "single", "bcube", "explicit"):
            raise ValueError(f"mode = {mode!r}: auto, spray, hash, single, bcube or explicit")
        if mode == "bcube" and family_of(graph) != "bcube":
            raise ValueError(f"mode = 'bcube' on {graph.graph.get('name', 'a custom graph')}")
        if (mode == "explicit") != (explicit is not None):
            raise ValueError("mode 'explicit' and the argument `explicit` go together")
        is_bcube = mode == "auto" and family_of(graph) == "bcube"
        self.graph = graph
        self.mode: Mode = ("bcube" if is_bcube else "spray") if mode == "auto" else mode
        self.weight: Weight = weight
        self.seed = seed
        self.explicit = explicit
        self.links = link_table(graph)
        self.down = frozenset(down)
        self.alive = _alive(self.links, self.down)
        self._cost = _link_cost(self.links, weight)
        self._paths_towards = lru_cache(maxsize=_KEPT)(self._search)

    def without(self, down: Iterable[tuple[int, int] | int]) -> "Router":
        """Return a router for the same graph on which other links and nodes are down."""
        return Router(
            self.graph,
            mode=self.mode,
            weight=self.weight,
            seed=self.seed,
            explicit=self.explicit,
            down=down,
        )

    def loads(
        self, sources: IntArray, destinations: IntArray, *sizes: FloatArray
    ) -> tuple[FloatArray, ...]:
        """Return what each link carries when all messages are under way.

        Parameters
        ----------
        sources, destinations : ndarray of int, shape (n_messages,)
            Nodes.
        *sizes : ndarray, shape (n_messages,)
            One or several weights of the messages: bytes, or 1 to count them.

        Returns
        -------
        tuple of ndarray, shape (n_links,)
            One for each of `sizes`.

        Raises
        ------
        ValueError
            If there is no route for a pair; names the pair.
        """
        if self.mode != "spray":
            routes = self.routes(sources, destinations)
            return tuple(routes.loads(size, len(self.links)) for size in sizes)
        total = [np.zeros(len(self.links)) for _ in sizes]
        for paths, rows in self._blocks(sources, destinations):
            start = self._states(paths, sources[rows], destinations[rows])
            for load, size in zip(total, sizes, strict=True):
                flow = _sums(start, size[rows], paths.distance.size)
                load += _propagate(paths, flow, len(self.links))
        return tuple(total)

    def routes(
        self, sources: IntArray, destinations: IntArray, flows: IntArray | None = None
    ) -> Routes:
        """Return the routes of messages, which the timing of single messages needs.

        Parameters
        ----------
        sources, destinations : ndarray of int, shape (n_messages,)
            Nodes.
        flows : ndarray of int, shape (n_messages,), optional
            A third key of the hash, for several flows of one pair.

        Raises
        ------
        ValueError
            If there is no route for a pair; names the pair.
        """
        sources, destinations = np.asarray(sources), np.asarray(destinations)
        if self.mode == "bcube":
            return self._bcube_routes(sources, destinations)
        if self.mode == "explicit":
            return self._explicit_routes(sources, destinations)
        draws = None
        if self.mode == "single":
            draws = np.zeros(len(sources))
        elif self.mode == "hash":
            flow = np.zeros_like(sources) if flows is None else flows
            draws = keyed_uniform(self.seed, sources, destinations, flow)
        return self._shortest_routes(sources, destinations, draws)

    def _shortest_routes(
        self, sources: IntArray, destinations: IntArray, draws: FloatArray | None
    ) -> Routes:
        parts = []
        for paths, rows in self._blocks(sources, destinations):
            state = self._states(paths, sources[rows], destinations[rows])
            routes = _walk(paths, state, None if draws is None else draws[rows])
            parts.append(Routes(rows[routes.message], routes.link, routes.share))
        return _joined(parts)

    def _blocks(
        self, sources: IntArray, destinations: IntArray
    ) -> Iterator[tuple[_Paths, IntArray]]:
        """Yield the shortest paths towards blocks of destinations, with their messages."""
        moving = np.flatnonzero(sources != destinations)
        width = max(1, _BLOCK // len(self.links))
        for first in range(0, self.links.n_nodes, width):
            rows = moving[destinations[moving] // width == first // width]
            if len(rows):
                yield self._paths_towards(first, min(first + width, self.links.n_nodes)), rows

    def _states(self, paths: _Paths, sources: IntArray, destinations: IntArray) -> IntArray:
        columns = destinations - paths.first
        lost = np.flatnonzero(~np.isfinite(paths.distance[sources, columns]))
        if len(lost):
            raise _no_route(int(sources[lost[0]]), int(destinations[lost[0]]), self.down)
        states: IntArray = sources * paths.distance.shape[1] + columns
        return states

    def _search(self, first: int, end: int) -> _Paths:
        """Return all shortest paths from everywhere to the nodes from `first` to below `end`."""
        links, n = self.links, end - first
        alive = np.flatnonzero(self.alive)
        source, target, cost = links.source[alive], links.target[alive], self._cost[alive]
        distance = np.full((links.n_nodes, n), np.inf)
        distance[np.arange(first, end), np.arange(n)] = 0
        senders, starts = np.unique(source, return_index=True)
        while len(alive):  # Bellman-Ford, all destinations side by side
            reach = np.minimum.reduceat(cost[:, None] + distance[target], starts, axis=0)
            if not (reach < distance[senders]).any():
                break
            distance[senders] = np.minimum(distance[senders], reach)
        with np.errstate(invalid="ignore"):
            slack = np.abs(distance[source] - cost[:, None] - distance[target])
        edge, column = np.nonzero(slack <= _SLACK)
        origin, onward = source[edge] * n + column, target[edge] * n + column
        if self.weight == "hops":
            level = distance.reshape(-1)[origin]
        else:
            level = _longest(origin, onward, distance.size)
        order = np.argsort(-level, kind="stable")
        edge, origin, onward, level = edge[order], origin[order], onward[order], level[order]
        cuts = np.concatenate([[0], np.flatnonzero(np.diff(level)) + 1, [len(level)]])
        bounds = [(int(a), int(b)) for a, b in pairwise(cuts) if b > a]
        count = np.zeros(distance.size)
        count[np.arange(first, end) * n + np.arange(n)] = 1
        for a, b in reversed(bounds):
            count += np.bincount(origin[a:b], count[onward[a:b]], distance.size)
        share = count[onward] / count[origin]
        return _Paths(first, distance, origin, onward, alive[edge], share, bounds)

    def _bcube_routes(self, sources: IntArray, destinations: IntArray) -> Routes:
        n, k = (int(self.graph.graph["parameters"][key]) for key in ("n", "k"))
        if len(sources) and max(int(sources.max()), int(destinations.max())) >= n**k:
            raise ValueError(f"mode 'bcube' routes between the servers 0..{n**k - 1} only")
        weights = n ** np.arange(k)
        here = sources[:, None] // weights % n
        goal = destinations[:, None] // weights % n
        differs = here != goal
        entries: list[tuple[IntArray, IntArray, int]] = []
        for rotation in range(k):
            node = sources.copy()
            for turn in range(k):
                level = (rotation + turn) % k
                rows = np.flatnonzero(differs[:, rotation] & differs[:, level])
                at = node[rows]
                after = at + (goal[rows, level] - here[rows, level]) * weights[level]
                switch = bcube_switches(at, level, n, k)
                entries.append((rows, self.links.find(at, switch), rotation))
                entries.append((rows, self.links.find(switch, after), rotation))
                node[rows] = after
        usable = differs.copy()
        for rows, link, rotation in entries:
            usable[rows[~self.alive[link]], rotation] = False
        paths = usable.sum(axis=1)
        kept = [(r[usable[r, q]], e[usable[r, q]]) for r, e, q in entries]
        message = np.concatenate([r for r, _ in kept])
        link = np.concatenate([e for _, e in kept])
        share = 1.0 / paths[message]
        cut_off = np.flatnonzero((paths == 0) & (sources != destinations))
        if len(cut_off):
            detour = self._shortest_routes(sources[cut_off], destinations[cut_off], None)
            message = np.concatenate([message, cut_off[detour.message]])
            link = np.concatenate([link, detour.link])
            share = np.concatenate([share, detour.share])
        return Routes(message, link, share)

    def _explicit_routes(self, sources: IntArray, destinations: IntArray) -> Routes:
        given = self.explicit or {}
        message: list[int] = []
        hops: list[tuple[int, int]] = []
        share: list[float] = []
        for i, pair in enumerate(zip(sources.tolist(), destinations.tolist(), strict=True)):
            if pair[0] == pair[1]:
                continue
            paths = [p for p in given.get(pair, ()) if self._is_alive(p)]
            if not paths:
                raise _no_route(*pair, self.down)
            for path in paths:
                if (path[0], path[-1]) != pair:
                    raise ValueError(f"explicit route {list(path)} does not join {pair}")
                steps = list(pairwise(path))
                hops += steps
                message += [i] * len(steps)
                share += [1 / len(paths)] * len(steps)
        ends = np.array(hops, dtype=np.int64).reshape(-1, 2)
        link = self.links.find(ends[:, 0], ends[:, 1]) if hops else np.zeros(0, np.int64)
        return Routes(np.array(message, dtype=np.int64), link, np.array(share))

    def _is_alive(self, path: Sequence[int]) -> bool:
        ends = np.array(list(pairwise(path)), dtype=np.int64)
        return bool(self.alive[self.links.find(ends[:, 0], ends[:, 1])].all())


def _no_route(source: int, destination: int, down: frozenset[tuple[int, int] | int]) -> ValueError:
    names = [str(item) if isinstance(item, int) else f"{item[0]}-{item[1]}" for item in down]
    reason = f" while {', '.join(sorted(names))} is down" if down else ""
    return ValueError(f"no route from {source} to {destination}: no path exists{reason}")


def _alive(links: LinkTable, down: frozenset[tuple[int, int] | int]) -> BoolArray:
    alive = np.ones(len(links), dtype=bool)
    for item in down:
        if isinstance(item, int):
            alive &= (links.source != item) & (links.target != item)
        else:
            a, b = item
            hit = (links.source == a) & (links.target == b)
            hit |= (links.source == b) & (links.target == a)
            if not hit.any():
                raise ValueError(f"no link between {a} and {b}")
            alive &= ~hit
    return alive


def _link_cost(links: LinkTable, weight: Weight) -> FloatArray:
    """Return what a path adds up, scaled to at most about 1; fewer hops break ties."""
    if weight == "hops":
        return np.ones(len(links))
    if weight not in ("latency", "bandwidth"):
        raise ValueError(f"weight = {weight!r}: must be hops, latency or bandwidth")
    with np.errstate(divide="ignore"):
        raw = links.latency if weight == "latency" else 1.0 / links.bandwidth
    largest = float(raw[np.isfinite(raw)].max(initial=0.0)) or 1.0
    return np.asarray(raw / largest + 1e-6)


def _longest(origin: IntArray, onward: IntArray, size: int) -> FloatArray:
    """Return, for each entry, the most links its origin can be away from its destination."""
    level = np.zeros(size)
    while True:
        before = level.copy()
        np.maximum.at(level, origin, level[onward] + 1)
        if np.array_equal(before, level):
            return level[origin]


def _propagate(paths: _Paths, flow: FloatArray, n_links: int) -> FloatArray:
    """Return the links' loads when `flow`, by state, moves on to its destinations."""
    load = np.zeros(n_links)
    for a, b in paths.bounds:
        moved = flow[paths.origin[a:b]] * paths.share[a:b]
        load += _sums(paths.link[a:b], moved, n_links)
        flow += _sums(paths.onward[a:b], moved, len(flow))
    return load


def _walk(paths: _Paths, state: IntArray, draws: FloatArray | None) -> Routes:
    """Follow messages, given by their first state, to their destinations.

    Without `draws` a message splits at each fork; with one number in [0, 1) each it takes one way,
    every path being equally likely.
    """
    order, begin = paths.by_origin
    message, share = np.arange(len(state)), np.ones(len(state))
    parts: list[Routes] = []
    while len(state):
        fork = begin[state + 1] - begin[state]
        rank = np.arange(fork.sum()) - np.repeat(np.cumsum(fork) - fork, fork)
        entry = order[np.repeat(begin[state], fork) + rank]
        message, part = np.repeat(message, fork), paths.share[entry]
        if draws is None:
            weight = np.repeat(share, fork) * part
            parts.append(Routes(message, paths.link[entry], weight))
            # Branches that meet again go on as one.
            key = message * paths.distance.size + paths.onward[entry]
            unique, where = np.unique(key, return_inverse=True)
            share = _sums(where, weight, len(unique))
            message, state = np.divmod(unique, paths.distance.size)
        else:
            ends = np.cumsum(fork)[fork > 0] - 1
            top = np.cumsum(part)
            top -= np.repeat(top[ends] - 1.0, fork[fork > 0])
            top[ends] = 1.0
            low = np.where(rank == 0, 0.0, np.concatenate([[0.0], top[:-1]]))
            taken = (low <= draws[message]) & (draws[message] < top)
            entry, message = entry[taken], message[taken]
            parts.append(Routes(message, paths.link[entry], np.ones(len(entry))))
            draws = draws.copy()
            rest = (draws[message] - low[taken]) / (top - low)[taken]
            draws[message] = np.clip(rest, 0.0, 1.0 - 2.0**-53)
            state = paths.onward[entry]
    return _joined(parts)


def _joined(parts: list[Routes]) -> Routes:
    none: IntArray = np.zeros(0, dtype=np.int64)
    return Routes(
        np.concatenate([none, *(p.message for p in parts)]),
        np.concatenate([none, *(p.link for p in parts)]),
        np.concatenate([np.zeros(0), *(p.share for p in parts)]),
    )


def _sums(where: IntArray, weights: FloatArray, size: int) -> FloatArray:
    """Return the sum of the weights at each place (float64 even if there are none)."""
    return np.asarray(np.bincount(where, weights, size), dtype=np.float64)
