"""Flows that share links, advanced from one change of rate to the next.

Decision: flows that cross the same *contended* links are one group with one common level; a link
with a single flow is not a constraint but a cap of that flow. The solver sees groups, never flows,
so that a round of n messages through one server costs n log n, and identical messages cost one
variable however many they are.
"""

from array import array
from heapq import heapify, heappop, heappush
from math import inf

import numpy as np
from numpy.typing import NDArray

from fedsim.network.groups import Flow, Group, Heap, Link
from fedsim.network.solver import resolve

__all__ = ["Flow", "FluidNetwork"]

FloatArray = NDArray[np.float64]


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
        self._links: dict[int, Link] = {}  # those in use
        self._unused: dict[int, Link] = {}
        self._groups: dict[tuple[tuple[Link, float], ...], Group] = {}
        self._finishes: Heap = []
        self._dirty: dict[Link, None] = {}
        self._busy = array("d", bytes(8 * len(capacity)))  # numpy takes five times as long to add
        self._sequence = 0
        self.n_flows = 0

    # What the caller does

    @property
    def is_dirty(self) -> bool:
        """Whether rates are stale until `solve`."""
        return bool(self._dirty)

    def is_shared(self, link: int) -> bool:
        """Return whether flows on a link slow each other down."""
        is_unshared = self._unshared is not None and self._unshared[link]
        return self.capacity.item(link) < inf and not is_unshared

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
                link = links[index] = self._open(index, now)
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
        self._unlink(flow, now)
        return flow.bits

    def _open(self, index: int, now: float) -> Link:
        """Return a link that nobody uses; one that was used before needs not be made."""
        link = self._unused.pop(index, None)
        if link is None:
            link = Link(index, self._unshared is None or not self._unshared[index])
        link.capacity = self.capacity.item(index)
        link.since = now
        return link

    def _unlink(self, flow: Flow, now: float) -> None:
        """Take a flow that is in no group off its links."""
        self.n_flows -= 1
        alone: dict[Flow, None] | None = None
        for link, _ in flow.path:
            flows = link.flows
            del flows[flow]
            if not flows:
                self._unused[link.index] = self._links.pop(link.index)
                self._busy[link.index] += now - link.since
            elif len(flows) == 1 and link.is_shared:
                # The flow that is left has the link for itself now.
                alone = alone or {}
                alone.update(flows)
        flow.path = []
        if alone:
            for other in alone:
                self._lift(other, now)
                self._place(other, now)

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
        if not heap or heap[0][0] > now:  # most calls, for arrivals and changes
            return done
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
        if len(done) > 1:
            done.sort(key=lambda flow: flow.order)
        for flow in done:
            if flow.group is None:
                flow.version += 1  # an earlier one may have left it alone, and scheduled anew
            else:
                self._lift(flow, now)
            self._unlink(flow, now)
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

    def bottleneck(self, flow: Flow) -> int | None:
        """Return the link that bounds a flow's rate; None if it is the flow's own cap."""
        if not flow.is_capped and flow.group is not None and flow.group.bottleneck is not None:
            return flow.group.bottleneck.index
        for link, consumption in flow.path:
            if link.capacity / consumption <= flow.top_rate:
                return link.index
        return None

    def busy_time(self, now: float) -> FloatArray:
        """Return for how long each link has had flows on it, s, shape (n_links,)."""
        busy = np.array(self._busy)
        for link in self._links.values():
            busy[link.index] += now - link.since
        return busy

    def add_busy_time(self, busy: FloatArray) -> None:
        """Count time (s, shape (n_links,)) for which links had flows that were never added."""
        np.frombuffer(self._busy)[:] += busy

    def count_busy(self, link: int, seconds: float) -> None:
        """Count time (s) for which a link had a flow that was never added."""
        self._busy[link] += seconds

    def solve(self, now: float) -> None:
        """Bring all rates up to date after the changes of this instant."""
        if not self._dirty:
            return
        changed, self._dirty = self._dirty, {}
        groups, flows = resolve(changed, now)
        for flow in flows:
            if flow.is_capped:
                self._schedule_flow(flow, now)
        for group in groups:
            self._schedule_group(group)
        if len(self._finishes) > 64 + 4 * (self.n_flows + len(self._groups)):
            self._finishes = [entry for entry in self._finishes if entry[3].version == entry[2]]
            heapify(self._finishes)

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
            flow.since = now
            self._schedule_flow(flow, now)
            return
        flow.limit = top / flow.weight
        key = tuple(contended)
        group = self._groups.get(key)
        if group is None:
            self._sequence += 1
            group = self._groups[key] = Group(key, self._sequence, now)
            for link, consumption in key:
                link.groups[group] = consumption
        group.join(flow, now)
        dirty = self._dirty
        for link, _ in key:
            dirty[link] = None

    def _lift(self, flow: Flow, now: float) -> None:
        """Take a flow out of its group; its `bits` are then up to date."""
        group = flow.group
        if group is None:
            flow.bits = flow.bits_left(now)
            flow.version += 1
            flow.since = now
            return
        group.leave(flow, now)
        dirty = self._dirty
        for link, _ in group.key:
            dirty[link] = None
        if not group.n_free and not group.n_capped:
            group.version += 1
            del self._groups[group.key]
            for link, _ in group.key:
                del link.groups[group]

    def _schedule_flow(self, flow: Flow, now: float) -> None:
        if flow.top_rate > 0:
            when = now + flow.bits / flow.top_rate
            heappush(self._finishes, (when, flow.order, flow.version, flow))

    def _schedule_group(self, group: Group) -> None:
        group.version += 1
        if group.n_free and group.level > 0:
            work = max(group.first_target() - group.virtual, 0.0)
            when = group.since + work / group.level
            heappush(self._finishes, (when, group.order, group.version, group))
