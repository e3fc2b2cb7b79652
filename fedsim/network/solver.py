"""The max-min fair levels of groups after a change, found by solving only what it can touch.

Admit the groups whose bottleneck is a changed link; fill them (raise their levels together against
what the others leave, until a link or a cap stops each); look at every link they touch, admit what
there breaks the max-min condition, and fill again. When nothing breaks it, every flow has its cap
or a bottleneck, and the rates for which that holds are unique: the local answer is the exact one.

References
----------
.. [1] Bertsekas, Gallager, "Data Networks", 2nd ed., section 6.5.2 (max-min flow control).
"""

from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from fedsim.network.groups import Flow, Group, Link

__all__ = ["resolve"]

_SLACK = 1e-11  # relative; far above rounding, far below any tolerance promised


def resolve(changed: dict[Link, None], now: float) -> tuple[list[Group], list[Flow]]:
    """Give groups the levels that are fair now, after changes on some links.

    Parameters
    ----------
    changed : dict with Link keys
        Links whose capacity changed, or on which flows came or went. (A dict, not a set: its order
        is the same in every run.)
    now : float, s

    Returns
    -------
    list of Group, list of Flow
        What was solved, and the flows in it that were fixed at their cap: their completions have
        to be scheduled anew.
    """
    return _Solve(changed, now).run()


class _Solve:
    """One re-solve: the groups inside, the links they touch, the flows that it capped."""

    def __init__(self, changed: dict[Link, None], now: float) -> None:
        self.now = now
        self.changed = changed
        self.inside: list[Group] = []
        self.touched: dict[Link, None] = {}
        self.capped: list[Flow] = []
        self.retried: list[Flow] = []
        for link in changed:
            link.sum_up()
        self.touched.update(changed)
        for link in changed:
            for group in link.groups:
                if group.n_free and (group.bottleneck is link or group.bottleneck is None):
                    self.admit(group)

    def run(self) -> tuple[list[Group], list[Flow]]:
        while True:
            self.fill()
            if not self.extend():
                break
            # What the fill capped may have to give way to the groups that joined.
            for flow in self.capped:
                if flow.is_capped and flow.group is not None:
                    flow.group.uncap(flow, self.now)
            self.capped.clear()
        for flow in self.retried:
            flow.is_retried = False
        for group in self.inside:
            group.is_inside = False
            change = group.weight * (group.new_level - group.level)
            if change:
                for link, consumption in group.key:
                    link.used += consumption * change
            group.level = group.new_level
            old, new = group.bottleneck, group.new_bottleneck
            if old is not new:
                if old is not None:
                    old.n_stopped -= 1
                if new is not None:
                    new.n_stopped += 1
                group.bottleneck = new
            if new is not None:
                new.level = group.level
            group.tidy()
        for link in self.changed:
            link.sum_up()
        return self.inside, self.capped

    def admit(self, group: Group) -> None:
        if not group.is_inside:
            group.is_inside = True
            group.advance(self.now)
            self.inside.append(group)
            for link, _ in group.key:
                self.touched[link] = None

    def fill(self) -> None:
        """Raise the levels of the groups inside together until a link or a cap stops each one."""
        for link in self.touched:
            link.rest = link.capacity - link.used
            link.load = 0.0
            link.n_open = 0
        heap: list[tuple[float, int, Any]] = []
        n_open = 0
        for order, group in enumerate(self.inside):
            group.is_fixed = not group.n_free
            group.new_level = 0.0
            group.new_bottleneck = None
            if group.n_free:
                n_open += 1
                use = group.weight * group.level
                for link, consumption in group.key:
                    link.rest += consumption * use
                    link.load += consumption * group.weight
                    link.n_open += 1
                if group.by_cap:
                    heap.append((group.first_limit(), -1 - order, group))
        for link in self.changed:
            # The difference of large sums is no good where the capacity has just become small.
            link.rest = _rest(link)
        for order, link in enumerate(self.touched):
            if link.n_open:
                heap.append((link.rest / link.load, order, link))
        heapify(heap)
        while n_open:
            key, order, item = heappop(heap)
            if isinstance(item, Group):
                if not item.is_fixed and key < inf:
                    n_open -= self.cap_first(item)
                    if not item.is_fixed:
                        heappush(heap, (item.first_limit(), order, item))
            elif item.n_open:
                # A link's level only rises while others are fixed: an old key is a lower bound.
                level = item.rest / item.load if item.load > 0 else _level(item)
                if heap and level > heap[0][0] and level > key:
                    heappush(heap, (level, order, item))
                else:
                    n_open -= _fix(item)

    def cap_first(self, group: Group) -> int:
        """Fix the free flow with the lowest limit at its cap; return 1 if it was the last."""
        flow: Flow = heappop(group.by_cap)[3]
        group.cap(flow)
        self.capped.append(flow)
        is_last = not group.n_free
        group.is_fixed = is_last
        for link, consumption in group.key:
            link.rest -= consumption * flow.top_rate
            link.load -= consumption * flow.weight
            link.n_open -= is_last
        return int(is_last)

    def extend(self) -> bool:
        """Admit whatever breaks the max-min condition on a touched link; tell whether any did."""
        for link in self.touched:
            link.claim = -1.0
            link.highest = 0.0
            link.n_inside = 0
        for group in self.inside:
            level = group.new_level if group.n_free else group.highest_capped()
            for link, _ in group.key:
                if level > link.highest:
                    link.highest = level
            if group.new_bottleneck is not None:
                group.new_bottleneck.claim = group.new_level
            if group.bottleneck is not None:
                group.bottleneck.n_inside += 1
        grew = False
        for link in list(self.touched):
            is_over = link.rest < -_SLACK * (link.capacity + link.used)
            is_full = link.rest <= _SLACK * link.capacity
            # The groups outside that the link stops share its level, the highest one outside.
            stops_outside = link.n_stopped > link.n_inside
            is_freed = stops_outside and (not is_full or link.highest > link.level * (1 + _SLACK))
            claim = link.claim * (1 + _SLACK)
            is_claimed = link.claim >= 0 and (not stops_outside or link.level > claim)
            if is_over or is_freed or is_claimed:
                for group in link.groups:
                    if group.n_free and not group.is_inside:
                        is_wrong = is_claimed and group.level > claim
                        if is_over or is_wrong or (is_freed and group.bottleneck is link):
                            self.admit(group)
                            grew = True
            if link.n_capped:
                if is_over:
                    grew |= self.make_room(link)
                elif link.claim >= 0:
                    for group in link.groups:
                        while group.n_capped and group.highest_capped() > claim:
                            if not self.retry(group):
                                break
                            grew = True
        return grew

    def make_room(self, link: Link) -> bool:
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
            if self.retry(group):
                grew = True
                rest += link.groups[group] * flow.top_rate
                load += link.groups[group] * flow.weight
                if group.n_capped:
                    heappush(heap, (-group.highest_capped(), order, group))
        return grew

    def retry(self, group: Group) -> bool:
        """Free the group's capped flow with the highest limit, once in a solve."""
        flow: Flow = group.capped[0][3]
        if flow.is_retried:
            return False
        flow.is_retried = True
        self.retried.append(flow)
        self.admit(group)
        group.uncap(flow, self.now)
        return True


def _rest(link: Link) -> float:
    """Return what the groups outside and capped flows leave of a link, summed afresh."""
    return link.capacity - sum(
        consumption * (group.capped_rate + (0.0 if group.is_inside else group.weight * group.level))
        for group, consumption in link.groups.items()
    )


def _level(link: Link) -> float:
    """Return the level at which the open groups fill a link; their load is summed afresh."""
    link.load = sum(
        consumption * group.weight
        for group, consumption in link.groups.items()
        if group.is_inside and not group.is_fixed
    )
    return link.rest / link.load


def _fix(link: Link) -> int:
    """Fix the open groups of a link at its level; return how many there were."""
    level = max(_level(link), 0.0)
    n_fixed = 0
    for group in link.groups:
        if group.is_inside and not group.is_fixed:
            n_fixed += 1
            group.is_fixed = True
            group.new_level = level
            group.new_bottleneck = link
            for other, consumption in group.key:
                use = consumption * group.weight
                other.rest -= use * level
                other.load -= use
                other.n_open -= 1
    return n_fixed
