"""Flows that share links, advanced from one change of rate to the next.

Decision: flows that cross the same *contended* links are one **group** with one common level
(rate / weight); a link with a single flow is not a constraint but a cap of that flow. The solver
sees groups, never flows, and a group keeps the integral of its level, so that a change of level
costs O(log n) however many flows share it (virtual time, as in weighted fair queueing). A change
re-solves only the groups whose bottleneck it can touch, until the max-min condition holds on every
touched link; that condition has one solution, so the local answer is the exact one.

References
----------
.. [1] Bertsekas, Gallager, "Data Networks", 2nd ed., section 6.5.2 (max-min flow control).
.. [2] Parekh, Gallager, "A generalized processor sharing approach to flow control", 1993.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Flow", "FluidNetwork"]

_SLACK = 1e-11  # relative; far above rounding, far below any tolerance promised
_REBASE = 1e6  # a group's virtual time may exceed a newcomer's work by this factor

_Heap = list[tuple[float, int, int, Any]]  # (key, order, version, flow or group)


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
        self.bits = bits  # work left at `since`; meaningful while capped
        self.weight = weight
        self.cap = cap
        self.owner = owner
        self.order = 0
        self.path: list[tuple[_Link, float]] = []
        self.group: _Group | None = None
        self.is_capped = True
        self.top_rate = inf  # own cap and the links that it has for itself
        self.limit = inf  # the same as a level
        self.since = 0.0
        self.target = 0.0  # the group's virtual time at completion, while not capped
        self.version = 0
        self.is_retried = False


class _Link:
    """A link while flows are on it."""

    __slots__ = ("capacity", "flows", "groups", "index", "is_shared", "load", "n_open", "rest")

    def __init__(self, index: int, capacity: float, is_shared: bool) -> None:
        self.index = index
        self.capacity = capacity
        self.is_shared = is_shared
        self.flows: dict[Flow, None] = {}
        self.groups: dict[_Group, float] = {}  # with the consumption of one bit/s
        self.rest = 0.0  # scratch of the solver: capacity, load and groups not yet fixed
        self.load = 0.0
        self.n_open = 0


class _Group:
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

    def __init__(self, key: tuple[tuple[_Link, float], ...], order: int, now: float) -> None:
        self.key = key
        self.order = order
        self.level = 0.0
        self.bottleneck: _Link | None = None
        self.virtual = 0.0  # integral of the level
        self.since = now
        self.n_free = 0
        self.weight = 0.0  # of the free flows
        self.by_finish: _Heap = []  # free flows by completion
        self.by_cap: _Heap = []  # free flows by the level at which they reach their cap
        self.n_capped = 0
        self.capped_rate = 0.0
        self.capped_sum = 0.0
        self.capped_error = 0.0
        self.capped: _Heap = []  # capped flows, highest limit first
        self.version = 0
        self.is_inside = False  # scratch of the solver, like the next three
        self.is_fixed = False
        self.new_level = 0.0
        self.new_bottleneck: _Link | None = None

    def advance(self, now: float) -> None:
        if now > self.since:
            self.virtual += self.level * (now - self.since)
            self.since = now

    def add_capped_rate(self, rate: float) -> None:
        """Add to the sum of the capped rates, keeping what rounding cuts off (Neumaier)."""
        was = self.capped_sum
        new = was + rate
        self.capped_error += (was - new) + rate if was >= abs(rate) else (rate - new) + was
        self.capped_sum = new
        self.capped_rate = new + self.capped_error

    def first_limit(self) -> float:
        """Level at which the next free flow reaches its cap."""
        heap = self.by_cap
        while heap and heap[0][3].version != heap[0][2]:
            heappop(heap)
        return heap[0][0] if heap else inf

    def highest_capped(self) -> float:
        """Level that the capped flow with the highest limit runs at."""
        heap = self.capped
        while heap and heap[0][3].version != heap[0][2]:
            heappop(heap)
        return -heap[0][0] if heap else 0.0

    def first_target(self) -> float:
        """Virtual time at which the next free flow completes."""
        heap = self.by_finish
        while heap and heap[0][3].version != heap[0][2]:
            heappop(heap)
        return heap[0][0] if heap else inf


class FluidNetwork:
    """Weighted max-min rates of a changing set of flows, and their completion times.

    Pure bookkeeping in virtual time: the caller says when things happen. At one instant it takes
    what `finished` returns, then changes capacities, adds and removes flows, then calls `solve`
    once; `next_completion` says when to come back.

    Parameters
    ----------
    capacity : ndarray, shape (n_links,), bit/s
        May be 0 (flows stall) or infinite; changed in place by `set_capacity`.
    unshared : ndarray of bool, shape (n_links,), optional
        Links on which each flow alone may use all the capacity.
    """

    def __init__(
        self, capacity: NDArray[np.float64], unshared: NDArray[np.bool_] | None = None
    ) -> None:
        self.capacity = capacity
        self._unshared = unshared
        self._links: dict[int, _Link] = {}
        self._groups: dict[tuple[tuple[_Link, float], ...], _Group] = {}
        self._finishes: _Heap = []
        self._dirty: dict[_Link, None] = {}
        self._sequence = 0
        self.n_flows = 0

    # What the caller does

    @property
    def is_dirty(self) -> bool:
        """Whether rates are stale until `solve`."""
        return bool(self._dirty)

    def add(self, flow: Flow, now: float) -> None:
        """Let a flow begin to use its links."""
        links = self._links
        self._sequence += 1
        flow.order = self._sequence
        company: dict[Flow, None] | None = None
        path = []
        for index, consumption in flow.uses:
            link = links.get(index)
            if link is None:
                is_shared = self._unshared is None or not self._unshared[index]
                link = links[index] = _Link(index, float(self.capacity[index]), is_shared)
            elif link.is_shared and len(link.flows) == 1:
                # The flow that had the link for itself now has to share it.
                company = company or {}
                company.update(link.flows)
            link.flows[flow] = None
            path.append((link, consumption))
        flow.path = path
        self.n_flows += 1
        self._place(flow, now)
        if company:
            for other in company:
                self._lift(other, now)
                self._place(other, now)

    def remove(self, flow: Flow, now: float) -> float:
        """Take a flow off its links; return the bits it still had to move."""
        self._lift(flow, now)
        self.n_flows -= 1
        alone: dict[Flow, None] | None = None
        for link, _ in flow.path:
            flows = link.flows
            del flows[flow]
            if not flows:
                del self._links[link.index]
            elif len(flows) == 1 and link.is_shared:
                # The flow that is left has the link for itself now.
                alone = alone or {}
                alone.update(flows)
        flow.path = []
        if alone:
            for other in alone:
                self._lift(other, now)
                self._place(other, now)
        return flow.bits

    def set_capacity(self, index: int, capacity: float, now: float) -> None:
        """Change a link's capacity, bit/s."""
        self.capacity[index] = capacity
        link = self._links.get(index)
        if link is None or link.capacity == capacity:
            return
        was, link.capacity = link.capacity, capacity
        if link.is_shared and len(link.flows) > 1 and was < inf and capacity < inf:
            self._dirty[link] = None
            return
        for flow in list(link.flows):
            self._lift(flow, now)
            self._place(flow, now)

    def set_cap(self, flow: Flow, cap: float, now: float) -> None:
        """Change a flow's own largest rate, bit/s."""
        self._lift(flow, now)
        flow.cap = cap
        self._place(flow, now)

    def finished(self, now: float) -> list[Flow]:
        """Remove and return, in order of `add`, the flows whose last bit arrives up to `now`."""
        heap = self._finishes
        done: list[Flow] = []
        while heap and (heap[0][3].version != heap[0][2] or heap[0][0] <= now):
            _, _, version, item = heappop(heap)
            if item.version != version:
                continue
            if isinstance(item, Flow):
                done.append(item)
                item.version += 1
                continue
            item.advance(now)
            # Rounding of `now` must not leave the flow that is due unfinished.
            item.virtual = max(item.virtual, item.first_target())
            while item.first_target() <= item.virtual:
                flow = heappop(item.by_finish)[3]
                done.append(flow)
        done.sort(key=lambda flow: flow.order)
        for flow in done:
            self.remove(flow, now)
            flow.bits = 0.0
        return done

    def next_completion(self) -> float:
        """Return the time of the next completion at the present rates; inf if there is none."""
        heap = self._finishes
        while heap and heap[0][3].version != heap[0][2]:
            heappop(heap)
        return heap[0][0] if heap else inf

    def rate(self, flow: Flow) -> float:
        """Return the present rate of a flow, bit/s."""
        if flow.is_capped or flow.group is None:
            return flow.top_rate
        return flow.weight * flow.group.level

    def bits_left(self, flow: Flow, now: float) -> float:
        """Return the work that a flow has left."""
        if flow.is_capped:
            elapsed = now - flow.since
            return max(flow.bits - flow.top_rate * elapsed, 0.0) if elapsed > 0 else flow.bits
        group = flow.group
        assert group is not None
        virtual = group.virtual + group.level * (now - group.since)
        return max(flow.weight * (flow.target - virtual), 0.0)

    def bottleneck(self, flow: Flow) -> int | None:
        """Return the link that bounds a flow's rate; None if it is the flow's own cap."""
        if not flow.is_capped and flow.group is not None and flow.group.bottleneck is not None:
            return flow.group.bottleneck.index
        for link, consumption in flow.path:
            if link.capacity / consumption <= flow.top_rate:
                return link.index
        return None

    # Bookkeeping of flows and groups

    def _place(self, flow: Flow, now: float) -> None:
        """Put a flow with known `bits` into its group, or let it run at its cap without one."""
        top = flow.cap
        contended = []
        for step in flow.path:
            link, consumption = step
            if link.is_shared and len(link.flows) > 1 and link.capacity < inf:
                contended.append(step)
            elif link.capacity < top * consumption:
                top = link.capacity / consumption
        flow.top_rate = top
        if not contended:
            flow.group = None
            flow.is_capped = True
            flow.since = now
            self._schedule_flow(flow, now)
            return
        flow.limit = top / flow.weight
        key = tuple(contended)
        group = self._groups.get(key)
        if group is None:
            self._sequence += 1
            group = self._groups[key] = _Group(key, self._sequence, now)
            for link, consumption in key:
                link.groups[group] = consumption
        flow.group = group
        self._free(flow, group, now)
        dirty = self._dirty
        for link, _ in key:
            dirty[link] = None

    def _lift(self, flow: Flow, now: float) -> None:
        """Take a flow out of its group; its `bits` are then up to date."""
        group = flow.group
        flow.bits = self.bits_left(flow, now)
        flow.version += 1
        flow.since = now
        if group is None:
            flow.is_capped = True
            return
        if flow.is_capped:
            self._leave_capped(flow, group)
        else:
            self._leave_free(flow, group, now)
        flow.is_capped = True
        flow.group = None
        dirty = self._dirty
        for link, _ in group.key:
            dirty[link] = None
        if not group.n_free and not group.n_capped:
            group.version += 1
            del self._groups[group.key]
            for link, _ in group.key:
                del link.groups[group]

    def _leave_capped(self, flow: Flow, group: _Group) -> None:
        group.n_capped -= 1
        if group.n_capped:
            group.add_capped_rate(-flow.top_rate)
        else:
            group.capped_rate = group.capped_sum = group.capped_error = 0.0

    def _leave_free(self, flow: Flow, group: _Group, now: float) -> None:
        group.advance(now)
        group.version += 1  # its next completion may have been this flow's
        group.n_free -= 1
        group.weight = group.weight - flow.weight if group.n_free else 0.0

    def _free(self, flow: Flow, group: _Group, now: float) -> None:
        """Let a flow, whose `bits` are up to date, share the group's level."""
        group.advance(now)
        work = flow.bits / flow.weight
        if not group.n_free:
            group.virtual = 0.0
            group.by_finish.clear()
            group.by_cap.clear()
        elif group.virtual > _REBASE * work > 0:
            self._rebase(group)
        flow.is_capped = False
        flow.target = group.virtual + work
        group.n_free += 1
        group.weight += flow.weight
        heappush(group.by_finish, (flow.target, flow.order, flow.version, flow))
        if flow.limit < inf:
            heappush(group.by_cap, (flow.limit, flow.order, flow.version, flow))

    def _rebase(self, group: _Group) -> None:
        """Count virtual time from now, so that a small flow's work is not lost in rounding."""
        zero, group.virtual = group.virtual, 0.0
        heap: _Heap = []
        for target, order, version, flow in group.by_finish:
            if flow.version == version:
                flow.target = target - zero
                heap.append((flow.target, order, version, flow))
        heapify(heap)
        group.by_finish = heap

    def _cap(self, flow: Flow, group: _Group, now: float) -> None:
        """Fix a free flow of an advanced group at its cap."""
        flow.bits = max(flow.weight * (flow.target - group.virtual), 0.0)
        flow.version += 1
        flow.since = now
        flow.is_capped = True
        self._leave_free(flow, group, now)
        group.n_capped += 1
        group.add_capped_rate(flow.top_rate)
        self._schedule_flow(flow, now)
        heappush(group.capped, (-flow.limit, flow.order, flow.version, flow))

    def _uncap(self, flow: Flow, group: _Group, now: float) -> None:
        flow.bits = self.bits_left(flow, now)
        flow.version += 1
        self._leave_capped(flow, group)
        self._free(flow, group, now)

    def _schedule_flow(self, flow: Flow, now: float) -> None:
        if flow.top_rate > 0:
            when = now + flow.bits / flow.top_rate
            heappush(self._finishes, (when, flow.order, flow.version, flow))

    def _schedule_group(self, group: _Group) -> None:
        group.version += 1
        if group.n_free and group.level > 0:
            work = max(group.first_target() - group.virtual, 0.0)
            when = group.since + work / group.level
            heappush(self._finishes, (when, group.order, group.version, group))

    # The solver

    def solve(self, now: float) -> None:
        """Bring all rates up to date after the changes of this instant."""
        if not self._dirty:
            return
        touched, self._dirty = self._dirty, {}
        inside: dict[_Group, None] = {}
        for link in touched:
            for group in link.groups:
                if group.n_free and (group.bottleneck is link or group.bottleneck is None):
                    _admit(group, inside, now)
        retried: list[Flow] = []
        capped: list[Flow] = []
        while True:
            for group in inside:
                for link, _ in group.key:
                    touched[link] = None
            self._fill(inside, touched, capped, now)
            if not self._extend(inside, touched, retried, now):
                break
            # What the fill capped may have to give way to the groups that joined.
            for flow in capped:
                if flow.is_capped and flow.group is not None:
                    self._uncap(flow, flow.group, now)
            capped.clear()
        for flow in retried:
            flow.is_retried = False
        for group in inside:
            group.is_inside = False
            group.level = group.new_level
            group.bottleneck = group.new_bottleneck
            self._schedule_group(group)
            _tidy(group)
        if len(self._finishes) > 64 + 4 * (self.n_flows + len(self._groups)):
            self._finishes = [entry for entry in self._finishes if entry[3].version == entry[2]]
            heapify(self._finishes)

    def _fill(
        self,
        inside: dict[_Group, None],
        touched: dict[_Link, None],
        capped: list[Flow],
        now: float,
    ) -> None:
        """Raise the levels of the groups inside together until a link or a cap stops each one."""
        heap: list[tuple[float, int, Any]] = []
        for order, link in enumerate(touched):
            _open(link)
            if link.n_open:
                heap.append((link.rest / link.load, order, link))
        n_open = 0
        for order, group in enumerate(inside):
            group.is_fixed = not group.n_free
            group.new_level = 0.0
            group.new_bottleneck = None
            if group.n_free:
                n_open += 1
                limit = group.first_limit()
                if limit < inf:
                    heap.append((limit, -1 - order, group))
        heapify(heap)
        while n_open:
            _, order, item = heappop(heap)
            if isinstance(item, _Group):
                if item.is_fixed:
                    continue
                flow = heappop(item.by_cap)[3]
                self._cap(flow, item, now)
                capped.append(flow)
                for link, consumption in item.key:
                    link.rest -= consumption * flow.top_rate
                    link.load -= consumption * flow.weight
                if item.n_free:
                    heappush(heap, (item.first_limit(), order, item))
                else:
                    item.is_fixed = True
                    n_open -= 1
                    for link, _ in item.key:
                        link.n_open -= 1
                continue
            if not item.n_open:
                continue
            # A link's level only rises while others are fixed: an old entry is a lower bound.
            now_level = _level(item)
            if heap and now_level > heap[0][0]:
                heappush(heap, (now_level, order, item))
                continue
            n_open -= _fix(item, max(now_level, 0.0))

    def _extend(
        self,
        inside: dict[_Group, None],
        touched: dict[_Link, None],
        retried: list[Flow],
        now: float,
    ) -> bool:
        """Admit whatever breaks the max-min condition on a touched link; tell whether any did."""
        grew = False
        for link in touched:
            used = highest = 0.0
            claim = -1.0  # the level of the groups that were stopped by this link
            for group, consumption in link.groups.items():
                if group.is_inside:
                    level = group.new_level
                    used += consumption * (group.capped_rate + group.weight * level)
                    if group.new_bottleneck is link:
                        claim = level
                    highest = max(highest, level if group.n_free else group.highest_capped())
                else:
                    used += consumption * (group.capped_rate + group.weight * group.level)
            is_over = used > link.capacity * (1 + _SLACK)
            is_full = used >= link.capacity * (1 - _SLACK)
            for group in link.groups:
                if group.is_inside or not group.n_free:
                    continue
                level = group.level * (1 + _SLACK)
                if (
                    is_over
                    or (claim >= 0 and group.level > claim * (1 + _SLACK))
                    or (group.bottleneck is link and (not is_full or highest > level))
                ):
                    _admit(group, inside, now)
                    grew = True
            if is_over:
                grew |= self._make_room(link, inside, retried, now)
            elif claim >= 0:
                for group in link.groups:
                    while group.n_capped and group.highest_capped() > claim * (1 + _SLACK):
                        if not self._retry(group, inside, retried, now):
                            break
                        grew = True
        return grew

    def _make_room(
        self, link: _Link, inside: dict[_Group, None], retried: list[Flow], now: float
    ) -> bool:
        """Free capped flows of an overloaded link, highest first, until the rest can stay."""
        rest, load = link.capacity, 0.0
        heap = []
        for order, (group, consumption) in enumerate(link.groups.items()):
            rest -= consumption * group.capped_rate
            load += consumption * group.weight
            if group.n_capped:
                heap.append((-group.highest_capped(), order, group))
        heapify(heap)
        grew = False
        while heap and (rest < 0 or -heap[0][0] * load > rest):
            _, order, group = heappop(heap)
            flow = group.capped[0][3]
            if self._retry(group, inside, retried, now):
                grew = True
                consumption = link.groups[group]
                rest += consumption * flow.top_rate
                load += consumption * flow.weight
                if group.n_capped:
                    heappush(heap, (-group.highest_capped(), order, group))
        return grew

    def _retry(
        self, group: _Group, inside: dict[_Group, None], retried: list[Flow], now: float
    ) -> bool:
        """Free the group's capped flow with the highest limit, once in a solve."""
        flow: Flow = group.capped[0][3]
        if flow.is_retried:
            return False
        flow.is_retried = True
        retried.append(flow)
        if not group.is_inside:
            _admit(group, inside, now)
        self._uncap(flow, group, now)
        return True


def _admit(group: _Group, inside: dict[_Group, None], now: float) -> None:
    if not group.is_inside:
        group.is_inside = True
        group.advance(now)
        inside[group] = None


def _open(link: _Link) -> None:
    """Set what the groups still to be fixed can have of a link, and their load on it."""
    rest, load, n_open = link.capacity, 0.0, 0
    for group, consumption in link.groups.items():
        if group.n_capped:
            rest -= consumption * group.capped_rate
        if group.n_free:
            if group.is_inside:
                load += consumption * group.weight
                n_open += 1
            else:
                rest -= consumption * group.weight * group.level
    link.rest, link.load, link.n_open = rest, load, n_open


def _level(link: _Link) -> float:
    """Level at which the open groups fill a link, summed afresh: running sums drift."""
    rest, load = link.capacity, 0.0
    for group, consumption in link.groups.items():
        if group.n_capped:
            rest -= consumption * group.capped_rate
        if group.n_free:
            if not group.is_inside:
                rest -= consumption * group.weight * group.level
            elif group.is_fixed:
                rest -= consumption * group.weight * group.new_level
            else:
                load += consumption * group.weight
    return rest / load


def _fix(link: _Link, level: float) -> int:
    """Fix the open groups of a link at a level; return how many there were."""
    n_fixed = 0
    for group in link.groups:
        if group.is_inside and not group.is_fixed:
            n_fixed += 1
            group.is_fixed = True
            group.new_level = level
            group.new_bottleneck = link
            for other, consumption in group.key:
                other.rest -= consumption * group.weight * level
                other.load -= consumption * group.weight
                other.n_open -= 1
    return n_fixed


def _tidy(group: _Group) -> None:
    """Drop outdated heap entries once they outnumber the flows."""
    if len(group.by_finish) > 64 + 4 * group.n_free:
        group.by_finish = _live(group.by_finish)
    if len(group.by_cap) > 64 + 4 * group.n_free:
        group.by_cap = _live(group.by_cap)
    if len(group.capped) > 64 + 4 * group.n_capped:
        group.capped = _live(group.capped)


def _live(heap: _Heap) -> _Heap:
    kept = [entry for entry in heap if entry[3].version == entry[2]]
    heapify(kept)
    return kept
