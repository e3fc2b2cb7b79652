"""The state of any link at any time: its own figures, its model, failures, changes by hand."""

from collections.abc import Iterable, Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import NetworkError
from fedsim.network.failures import Failure, is_within, next_edge, windows
from fedsim.network.links import UP, Constant, LinkEnds, LinkHistory, LinkModel, RoundHistory
from fedsim.network.wiring import LinkTable, Wiring

__all__ = ["LinkStates"]

_MAX_IDLE_HISTORIES = 50_000  # histories can be made anew from the seed at any time

Window = tuple[float, float]


class LinkStates:
    """What links are like, asked for one link at one time; nothing is scheduled here.

    Parameters
    ----------
    table : LinkTable
    wiring : Wiring
    link_model : LinkModel, optional
        For the links that the wiring calls varying.
    failures : sequence of Failure
    seed : int
    """

    def __init__(
        self,
        table: LinkTable,
        wiring: Wiring,
        link_model: LinkModel | None,
        failures: Sequence[Failure],
        seed: int,
    ) -> None:
        self._wiring = wiring
        self._model = link_model = None if type(link_model) is Constant else link_model
        self._seed = seed
        self._bandwidth = table.bandwidth_bps
        self._loss = table.loss
        self._histories: dict[str, LinkHistory | None] = {}
        self._shared: dict[Any, Any] = {}
        self._cuts = [(failure, failure.sides()) for failure in failures if failure.link is None]
        self._link_windows: dict[int, list[Window]] = {}
        self._node_windows: dict[int, list[Window]] = {}
        self._link_failures: dict[int, list[Failure]] = {}
        self._round = 0
        self._edges: frozenset[tuple[int, int]] | None = None
        self._has_rounds = False  # a link that has been used is drawn anew in each round
        self._down: set[int] = set()
        self._dead: set[int] = set()
        self.is_varying = link_model is not None or bool(failures)
        for failure in failures:
            if failure.link is not None:
                for link in wiring.find(failure.link):
                    self._link_failures.setdefault(link, []).append(failure)
        for node in {failure.node for failure in failures if failure.node is not None}:
            if wiring.n_nodes and not 0 <= node < wiring.n_nodes:
                raise NetworkError(f"node {node} cannot fail: nodes are 0 … {wiring.n_nodes - 1}")
            self._node_windows[node] = windows(f for f in failures if f.node == node)

    # One link

    def can_change(self, link: int) -> bool:
        """Tell whether a link may ever differ from its own figures."""
        return self.is_varying and (
            self._history(link) is not None
            or bool(self._windows(link))
            or self._is_forced_down(link)
            or self._edges is not None
        )

    def is_up(self, link: int, now: float) -> bool:
        """Tell whether a link exists at a time."""
        if self._is_cut(link, now):
            return False
        history = self._history(link)
        return history is None or history.state_at(now).is_up

    def figures(self, link: int, now: float) -> tuple[bool, float, float, Any]:
        """Return whether a link is up, its capacity (bit/s), its packet loss and its burst law."""
        history = self._history(link)
        state = UP if history is None else history.state_at(now)
        own_loss = 0.0 if self._loss is None else self._loss.item(link)
        loss = own_loss + state.loss - own_loss * state.loss
        if not state.is_up or self._is_cut(link, now):
            return False, 0.0, loss, state.burst
        own = self._bandwidth.item(link)
        rate = own if state.bandwidth_bps is None else state.bandwidth_bps
        return True, state.scale * rate, loss, state.burst

    def next_change(self, link: int, now: float) -> float:
        """Return the first time after `now` at which a link may change; inf if never.

        Raises
        ------
        NetworkError
            If the link's model names a time that is not later.
        """
        when = next_edge(self._windows(link), now)
        history = self._history(link)
        if history is not None:
            change = history.next_change(now)
            if not change > now:
                raise NetworkError(
                    f"link {self._wiring.name(link)}: its model says at {now:g} s "
                    f"that it changes next at {change:g} s"
                )
            when = min(when, change)
        return when

    def timeline(self, link: int, start: float, end: float) -> list[tuple[float, float]]:
        """Return the steps (time, bit/s) of a link from `start` to `end`; 0 bit/s is down."""
        steps: list[tuple[float, float]] = []
        now = start
        while now < end or not steps:
            rate = self.figures(link, now)[1]
            if not steps or steps[-1][1] != rate:
                steps.append((now, rate))
            now = self.next_change(link, now)
        return steps

    # Nodes

    def is_dead(self, node: int, now: float) -> bool:
        """Tell whether a node is down."""
        return node in self._dead or is_within(self._node_windows.get(node, ()), now)

    def next_death(self, node: int, now: float) -> float:
        """Return when a node that is up dies on its timetable; inf if never."""
        return min((s for s, _ in self._node_windows.get(node, ()) if s > now), default=inf)

    # Changes by hand

    def set_link(self, link: int, up: bool | None, bandwidth_bps: float | None) -> None:
        """Force a link down or let it go; change its bandwidth."""
        self.is_varying = True
        if up is not None:
            (self._down.discard if up else self._down.add)(link)
        if bandwidth_bps is not None:
            if not self._bandwidth.flags.owndata or not self._bandwidth.flags.writeable:
                self._bandwidth = self._bandwidth.copy()
            self._bandwidth[link] = bandwidth_bps

    def set_node(self, node: int, up: bool) -> None:
        """Let a node die or return."""
        self.is_varying = True
        (self._dead.discard if up else self._dead.add)(node)

    @property
    def depends_on_round(self) -> bool:
        """Whether a new round can change a link that has been used."""
        return self._has_rounds or self._edges is not None

    def start_round(self, number: int, edges: Iterable[tuple[int, int]] | None) -> None:
        """Let per-round links take the states of a round."""
        self._round = number
        self._edges = None
        if not self._has_rounds and edges is None:
            return
        if edges is not None:
            self.is_varying = True
            self._edges = frozenset((min(a, b), max(a, b)) for a, b in edges)
        for history in self._histories.values():
            if isinstance(history, RoundHistory):
                history.start_round(number)

    @property
    def bandwidth(self) -> NDArray[np.float64]:
        """The links' own bandwidths, changes by hand included."""
        return self._bandwidth

    def _history(self, link: int) -> LinkHistory | None:
        if self._model is None or not self._wiring.varies(link):
            return None
        name = self._wiring.physical(link)
        histories = self._histories
        if name in histories:
            return histories[name]
        source, destination = sorted(self._wiring.ends(link))
        ends = LinkEnds(name, source, destination, self._wiring.server, self._shared)
        history = self._model.bind(self._seed, ends)
        if isinstance(history, RoundHistory):
            self._has_rounds = True
            history.start_round(self._round)
        if len(histories) >= _MAX_IDLE_HISTORIES:
            del histories[next(iter(histories))]
        histories[name] = history
        return history

    def _is_cut(self, link: int, now: float) -> bool:
        """Tell whether something other than its model keeps a link down."""
        if self._is_forced_down(link) or is_within(self._windows(link), now):
            return True
        return self._edges is not None and self._pair(link) not in self._edges

    def _pair(self, link: int) -> tuple[int, int]:
        a, b = self._wiring.ends(link)
        return min(a, b), max(a, b)

    def _is_forced_down(self, link: int) -> bool:
        return link in self._down or (
            bool(self._dead) and not self._dead.isdisjoint(self._wiring.ends(link))
        )

    def _windows(self, link: int) -> list[Window]:
        if not self._cuts and not self._link_failures:
            return []
        if link not in self._link_windows:
            a, b = self._wiring.ends(link)
            hits = list(self._link_failures.get(link, ()))
            for failure, sides in self._cuts:
                if failure.node is not None:
                    if failure.node in (a, b):
                        hits.append(failure)
                elif a in sides and b in sides and sides[a] != sides[b]:
                    hits.append(failure)
            self._link_windows[link] = windows(hits)
        return self._link_windows[link]
