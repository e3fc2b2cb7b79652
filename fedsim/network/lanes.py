"""Which links the messages of a collective cross: spread over all routes that are equally short.

Decision: as in `topologies.routing`, a message is split evenly over the shortest paths of a graph
(over the rotations of the digits on BCube), since a collective's messages are made of many packets
and its users have machine rooms in mind; `TransferOptions.multipath` says otherwise. What else
travels takes one shortest route.
"""

from collections.abc import Mapping, Sequence, Set
from functools import lru_cache
from typing import cast

import numpy as np

from fedsim.errors import NetworkError
from fedsim.network.plan import Plan
from fedsim.network.transfers import Network
from topologies.attributes import Graph
from topologies.routing import Mode, Router

__all__ = ["Lanes", "Script", "Shares"]

Shares = Mapping[int, float]
"""Link id → share of a message that crosses it."""


class Lanes:
    """Routes of a collective's messages on one network.

    Parameters
    ----------
    network : Network
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._router: Router | None = None
        if network.graph is not None:
            multipath = network.options.multipath
            mode: Mode = "auto" if multipath == "spray" else multipath
            graph = cast(Graph, network.graph)
            self._router = Router(graph, mode=mode, weight="latency", seed=network.seed)
            self._around = lru_cache(maxsize=4)(self._router.without)
            self._links = self._ids(self._router)

    def between(
        self, sources: Sequence[int], destinations: Sequence[int], lost: Set[int] = frozenset()
    ) -> list[Shares]:
        """Return which links each message crosses while everything is up.

        Parameters
        ----------
        sources, destinations : sequence of int
            Nodes.
        lost : set of int
            Nodes that pass nothing on.

        Raises
        ------
        ValueError
            If there is no route for a pair of nodes.
        """
        if self._router is None:
            routes = map(self._network.route, sources, destinations)
            return [dict.fromkeys(route, 1.0) for route in routes]
        router = self._around(frozenset(lost)) if lost else self._router
        return self._over(router, sources, destinations)

    def detour(self, source: int, destination: int, lost: Set[int] = frozenset()) -> Shares:
        """Return the links that a message crosses around all that is down now.

        A cable that is down in one direction is avoided in both.

        Raises
        ------
        ValueError
            If there is no way around.
        """
        if self._router is None:
            raise ValueError(f"no route from {source} to {destination}: a star has only one")
        around = self._around(self._network.down_now() | lost)
        return self._over(around, [source], [destination])[0]

    def _over(
        self, router: Router, sources: Sequence[int], destinations: Sequence[int]
    ) -> list[Shares]:
        routes = router.routes(np.asarray(sources), np.asarray(destinations))
        links = self._links[routes.link].tolist()
        found: list[dict[int, float]] = [{} for _ in sources]
        for message, link, share in zip(
            routes.message.tolist(), links, routes.share.tolist(), strict=True
        ):
            shares = found[message]
            shares[link] = shares.get(link, 0.0) + share
        return list(found)

    def _ids(self, router: Router) -> np.ndarray:
        """Return the network's number of each of the router's links."""
        ends = self._network.link_ends()
        numbers = {(b, a): link for link, (a, b) in enumerate(ends)}  # of links shared both ways
        numbers |= {(a, b): link for link, (a, b) in enumerate(ends)}
        pairs = zip(router.links.source.tolist(), router.links.target.tolist(), strict=True)
        return np.array([numbers[pair] for pair in pairs])


class Script:
    """What a plan's schedule means on a network, worked out once.

    Parameters
    ----------
    plan : Plan
    lanes : Lanes

    Attributes
    ----------
    messages : list of list of (int, int, int, int)
        Of each step: source and destination rank, first piece and end.
    shares : list of list of mapping
        Of each step and message: link id → share of it.
    rows : list of dict
        Of each step: rank → its messages.
    waits : list of list of int
        Of each step and rank: how many messages it sends and receives.
    last : list of int
        Of each rank: the last step that it takes part in.
    """

    def __init__(self, plan: Plan, lanes: Lanes) -> None:
        self.schedule = schedule = plan.schedule
        self.n_steps = len(schedule.steps)
        columns = [
            (s.source.tolist(), s.destination.tolist(), s.lo.tolist(), s.hi.tolist())
            for s in schedule.steps
        ]
        self.messages = [list(zip(*column, strict=True)) for column in columns]
        known: dict[tuple[bytes, bytes], list[Shares]] = {}
        self.shares: list[list[Shares]] = []
        self.rows: list[dict[int, list[int]]] = []
        self.waits: list[list[int]] = []
        for number, step in enumerate(schedule.steps):
            key = step.source.tobytes(), step.destination.tobytes()
            if key not in known:
                known[key] = self._routes(number, plan, lanes)
            self.shares.append(known[key])
            rows: dict[int, list[int]] = {}
            for row, source in enumerate(step.source.tolist()):
                rows.setdefault(source, []).append(row)
            self.rows.append(rows)
            ends = np.concatenate([step.source, step.destination])
            self.waits.append(np.bincount(ends, minlength=schedule.ranks).tolist())
        self.last = [
            max((step for step, waits in enumerate(self.waits) if waits[rank]), default=0)
            for rank in range(schedule.ranks)
        ]

    def _routes(self, number: int, plan: Plan, lanes: Lanes) -> list[Shares]:
        sources = [plan.hosts[a] for a, _, _, _ in self.messages[number]]
        destinations = [plan.hosts[b] for _, b, _, _ in self.messages[number]]
        try:
            return lanes.between(sources, destinations, plan.lost)
        except ValueError as error:
            raise NetworkError(f"step {number} of {self.schedule.name}: {error}") from error
