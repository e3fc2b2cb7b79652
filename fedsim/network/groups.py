"""Flows in groups: the flows on one set of contended links share a level and a virtual clock.

A *level* is a rate divided by a weight. The free flows of a group run at its level, the others at
their cap. The group keeps the integral of its level, its virtual time; a free flow completes when
that has grown by the flow's bits / weight, whatever the level does meanwhile. So a change of level
costs O(log n) for all of its flows together.

References
----------
.. [1] Parekh, Gallager, "A generalized processor sharing approach to flow control in integrated
   services networks", IEEE/ACM Transactions on Networking 1(3), 1993 (virtual time).
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

__all__ = ["Flow", "Group", "Heap", "Link"]

_REBASE = 1e6  # a group's virtual time may exceed a newcomer's work by this factor

Heap = list[tuple[float, int, int, Any]]  # (key, order, version, flow or group); old versions skip


class Flow:
    """Bits that travel over some links at once.

    Parameters
    ----------
    uses : sequence of (int, float)
        Each link crossed, once, with the capacity that one bit/s of this flow consumes on it.
    bits : float
        Work left, at least 0.
    weight : float
        Share relative to other flows, positive.
    cap : float
        Largest rate, bit/s.
    owner : object
        Whatever the caller wants back when the flow completes.
    """

    __slots__ = (
        "bits",
        "cap",
        "group",
        "is_capped",
        "is_retried",
        "limit",
        "order",
        "owner",
        "path",
        "since",
        "target",
        "top_rate",
        "uses",
        "version",
        "weight",
    )

    def __init__(
        self,
        uses: Sequence[tuple[int, float]],
        bits: float,
        weight: float = 1.0,
        cap: float = inf,
        owner: Any = None,
    ) -> None:
        self.uses = uses
        self.bits = bits  # left at `since`; meaningful while capped
        self.weight = weight
        self.cap = cap
        self.owner = owner
        self.order = 0
        self.path: list[tuple[Link, float]] = []
        self.group: Group | None = None
        self.is_capped = True
        self.top_rate = inf  # own cap and the links that it has for itself
        self.limit = inf  # the same as a level
        self.since = 0.0
        self.target = 0.0  # the group's virtual time at completion, while free
        self.version = 0
        self.is_retried = False

    def bits_left(self, now: float) -> float:
        """Return the work left."""
        if self.is_capped or self.group is None:
            elapsed = now - self.since
            return max(self.bits - self.top_rate * elapsed, 0.0) if elapsed > 0 else self.bits
        group = self.group
        virtual = group.virtual + group.level * (now - group.since)
        return max(self.weight * (self.target - virtual), 0.0)


class Link:
    """A link while flows are on it."""

    __slots__ = (
        "capacity",
        "claim",
        "flows",
        "groups",
        "highest",
        "index",
        "is_shared",
        "level",
        "load",
        "n_capped",
        "n_inside",
        "n_open",
        "n_stopped",
        "rest",
        "since",
        "used",
    )

    def __init__(self, index: int, is_shared: bool) -> None:
        self.index = index
        self.capacity = 0.0
        self.is_shared = is_shared
        self.since = 0.0
        self.flows: dict[Flow, None] = {}
        self.groups: dict[Group, float] = {}  # with the consumption of one bit/s
        self.used = 0.0  # by the groups, at their levels
        self.n_capped = 0  # capped flows in the groups
        self.n_stopped = 0  # groups that have this link as their bottleneck
        self.level = 0.0  # of those groups
        # Scratch of the solver
        self.rest = 0.0  # capacity for the groups that are still to be fixed
        self.load = 0.0  # what they take of it at level 1
        self.n_open = 0  # their number
        self.n_inside = 0  # groups being solved that had this link as their bottleneck
        self.claim = -1.0  # level of those that it stops now
        self.highest = 0.0  # level among those being solved

    def sum_up(self) -> None:
        """Sum afresh what the groups use, after flows have come or gone."""
        self.used = sum(
            consumption * (group.capped_rate + group.weight * group.level)
            for group, consumption in self.groups.items()
        )


class Group:
    """The flows on one set of contended links: free ones at a common level, others at their cap."""

    __slots__ = (
        "bottleneck",
        "by_cap",
        "by_finish",
        "capped",
        "capped_error",
        "capped_rate",
        "capped_sum",
        "is_fixed",
        "is_inside",
        "key",
        "level",
        "n_capped",
        "n_free",
        "new_bottleneck",
        "new_level",
        "order",
        "since",
        "version",
        "virtual",
        "weight",
    )

    def __init__(self, key: tuple[tuple[Link, float], ...], order: int, now: float) -> None:
        self.key = key
        self.order = order
        self.level = 0.0
        self.bottleneck: Link | None = None
        self.virtual = 0.0  # integral of the level up to `since`
        self.since = now
        self.n_free = 0
        self.weight = 0.0  # of the free flows
        self.by_finish: Heap = []  # free flows by virtual time of completion
        self.by_cap: Heap = []  # free flows by the level at which they reach their cap
        self.n_capped = 0
        self.capped_rate = 0.0
        self.capped_sum = 0.0
        self.capped_error = 0.0
        self.capped: Heap = []  # capped flows, highest limit first
        self.version = 0
        self.is_inside = False  # scratch of the solver, like the next three
        self.is_fixed = False
        self.new_level = 0.0
        self.new_bottleneck: Link | None = None

    def advance(self, now: float) -> None:
        """Bring the virtual time up to date."""
        if now > self.since:
            self.virtual += self.level * (now - self.since)
            self.since = now

    def first_limit(self) -> float:
        """Return the level at which the next free flow reaches its cap."""
        return _first(self.by_cap)

    def highest_capped(self) -> float:
        """Return the highest limit of a capped flow; 0 if there is none."""
        first = _first(self.capped)
        return -first if first < inf else 0.0

    def first_target(self) -> float:
        """Return the virtual time at which the next free flow completes."""
        return _first(self.by_finish)

    def join(self, flow: Flow, now: float) -> None:
        """Let a flow, whose `bits` are up to date, share the level."""
        self.advance(now)
        work = flow.bits / flow.weight
        if not self.n_free:
            self.virtual = 0.0
            self.by_finish.clear()
            self.by_cap.clear()
        elif self.virtual > _REBASE * work > 0:
            self._rebase()
        flow.group = self
        flow.is_capped = False
        flow.target = self.virtual + work
        self.n_free += 1
        self.weight += flow.weight
        heappush(self.by_finish, (flow.target, flow.order, flow.version, flow))
        if flow.limit < inf:
            heappush(self.by_cap, (flow.limit, flow.order, flow.version, flow))

    def leave(self, flow: Flow, now: float) -> None:
        """Take a flow out; its `bits` are then up to date."""
        if flow.is_capped:
            flow.bits = flow.bits_left(now)
            self._drop_capped(flow)
        else:
            self.advance(now)
            flow.bits = max(flow.weight * (flow.target - self.virtual), 0.0)
            self._drop_free(flow)
        flow.version += 1
        flow.since = now
        flow.group = None
        flow.is_capped = True

    def cap(self, flow: Flow) -> None:
        """Fix a free flow at its cap; the virtual time is up to date."""
        flow.bits = max(flow.weight * (flow.target - self.virtual), 0.0)
        flow.version += 1
        flow.since = self.since
        flow.is_capped = True
        old_use = flow.weight * self.level
        self._drop_free(flow)
        self.n_capped += 1
        self._add_capped_rate(flow.top_rate)
        heappush(self.capped, (-flow.limit, flow.order, flow.version, flow))
        for link, consumption in self.key:
            link.n_capped += 1
            link.used += consumption * (flow.top_rate - old_use)

    def uncap(self, flow: Flow, now: float) -> None:
        """Let a capped flow share the level again."""
        flow.bits = flow.bits_left(now)
        flow.version += 1
        self._drop_capped(flow)
        self.join(flow, now)
        for link, consumption in self.key:
            link.used += consumption * (flow.weight * self.level - flow.top_rate)

    def tidy(self) -> None:
        """Drop outdated heap entries once they outnumber the flows."""
        if len(self.by_finish) > 64 + 4 * self.n_free:
            self.by_finish = _live(self.by_finish)
        if len(self.by_cap) > 64 + 4 * self.n_free:
            self.by_cap = _live(self.by_cap)
        if len(self.capped) > 64 + 4 * self.n_capped:
            self.capped = _live(self.capped)

    def _drop_free(self, flow: Flow) -> None:
        self.version += 1  # its next completion may have been this flow's
        self.n_free -= 1
        if self.n_free:
            self.weight -= flow.weight
            return
        self.weight = 0.0
        if self.bottleneck is not None:
            self.bottleneck.n_stopped -= 1
            self.bottleneck = None

    def _drop_capped(self, flow: Flow) -> None:
        self.n_capped -= 1
        if self.n_capped:
            self._add_capped_rate(-flow.top_rate)
        else:
            self.capped_rate = self.capped_sum = self.capped_error = 0.0
        for link, _ in self.key:
            link.n_capped -= 1

    def _add_capped_rate(self, rate: float) -> None:
        """Add to the sum of the capped rates, keeping what rounding cuts off (Neumaier)."""
        was = self.capped_sum
        new = was + rate
        self.capped_error += (was - new) + rate if was >= abs(rate) else (rate - new) + was
        self.capped_sum = new
        self.capped_rate = new + self.capped_error

    def _rebase(self) -> None:
        """Count virtual time from now, so that a small flow's work is not lost in rounding."""
        zero, self.virtual = self.virtual, 0.0
        heap: Heap = []
        for target, order, version, flow in self.by_finish:
            if flow.version == version:
                flow.target = target - zero
                heap.append((flow.target, order, version, flow))
        heapify(heap)
        self.by_finish = heap


def _first(heap: Heap) -> float:
    """Return the smallest key of a heap; inf if it is empty."""
    while heap:
        key, _, version, flow = heap[0]
        if flow.version == version:
            return key
        heappop(heap)
    return inf


def _live(heap: Heap) -> Heap:
    kept = [entry for entry in heap if entry[3].version == entry[2]]
    heapify(kept)
    return kept
