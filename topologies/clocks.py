"""Links whose rate changes: piecewise constant factors, integrated exactly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from topologies.routing import LinkTable

__all__ = ["Clock", "Clocks", "LinkChange"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LinkChange:
    """How the rate of some links changes: a piecewise constant factor.

    Attributes
    ----------
    target : (int, int), int or None
        A cable (both directions), a node (all its cables), or every link.
    times : tuple of float
        Seconds, ascending; the factor is 1 before the first.
    factors : tuple of float
        From each of the times on; 0 is down.
    """

    target: tuple[int, int] | int | None
    times: tuple[float, ...]
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.times) != len(self.factors) or list(self.times) != sorted(set(self.times)):
            raise ValueError(f"times = {self.times}: ascending, one for each of {self.factors}")
        if not all(t >= 0 for t in self.times) or not all(f >= 0 for f in self.factors):
            raise ValueError(f"times {self.times} and factors {self.factors} must not be negative")

    def at(self, time: float) -> float:
        """Return the factor at a time."""
        index = int(np.searchsorted(self.times, time, side="right")) - 1
        return 1.0 if index < 0 else self.factors[index]


class Clock:
    """The seconds that a link of changing rate has worked at full rate, and back."""

    def __init__(self, changes: Sequence[LinkChange]) -> None:
        self.times = np.array(sorted({0.0, *(t for change in changes for t in change.times)}))
        factors = [math.prod(change.at(t) for change in changes) for t in self.times]
        self.factors = np.array(factors, dtype=np.float64)
        done = np.cumsum(np.diff(self.times) * self.factors[:-1])
        self.done = np.concatenate([[0.0], done])

    def work(self, time: FloatArray) -> FloatArray:
        """Return the seconds at full rate that were possible until each time."""
        i = np.searchsorted(self.times, time, side="right") - 1
        return np.asarray(self.done[i] + (time - self.times[i]) * self.factors[i])

    def factor(self, time: float) -> float:
        """Return the factor of the rate at a time."""
        return float(self.factors[np.searchsorted(self.times, time, side="right") - 1])

    def when(self, work: FloatArray) -> FloatArray:
        """Return the first time at which that much work is done; inf if never."""
        i = np.maximum(np.searchsorted(self.done, work, side="left") - 1, 0)
        rest = work - self.done[i]
        with np.errstate(divide="ignore", invalid="ignore"):
            wait = np.where(rest > 0, rest / self.factors[i], 0.0)
        return np.asarray(self.times[i] + wait)

    def down_between(self, start: float, end: float) -> float | None:
        """Return the first time in [start, end) at which the link is down."""
        first = int(np.searchsorted(self.times, start, side="right")) - 1
        for i in range(first, len(self.times)):
            if self.times[i] >= end:
                return None
            if self.factors[i] == 0:
                return max(start, float(self.times[i]))
        return None


class Clocks:
    """One clock for each group of links that change alike."""

    def __init__(self, links: LinkTable, changes: Sequence[LinkChange]) -> None:
        hit = np.zeros((len(changes), len(links)), dtype=bool)
        for row, change in zip(hit, changes, strict=True):
            if change.target is None:
                row[:] = True
            elif isinstance(change.target, int):
                row |= (links.source == change.target) | (links.target == change.target)
            else:
                a, b = change.target
                row |= (links.source == a) & (links.target == b)
                row |= (links.source == b) & (links.target == a)
            if not row.any():
                raise ValueError(f"no link at {change.target}: cannot change it")
        kinds, group = np.unique(hit.T, axis=0, return_inverse=True)
        self.changes = changes
        self.group = group.reshape(-1)
        self.clocks = [
            Clock([c for c, on in zip(changes, kind, strict=True) if on]) for kind in kinds
        ]
        self.members = [np.flatnonzero(self.group == g) for g in range(len(self.clocks))]

    def clock_of(self, link: int) -> Clock:
        """Return the clock of a link."""
        return self.clocks[int(self.group[link])]

    def work(self, link: IntArray, time: FloatArray) -> FloatArray:
        """Return what each link's clock shows at each time."""
        out = np.empty(len(link))
        for g, clock in enumerate(self.clocks):
            rows = self.group[link] == g
            out[rows] = clock.work(time[rows])
        return out

    def when(self, link: IntArray, work: FloatArray) -> FloatArray:
        """Return when each link's clock shows that much."""
        out = np.empty(len(link))
        for g, clock in enumerate(self.clocks):
            rows = self.group[link] == g
            out[rows] = clock.when(work[rows])
        return out

    def finish(self, now: float, busy: FloatArray) -> tuple[FloatArray, IntArray]:
        """Return, for each group, when its longest link ends and which one that is."""
        longest = np.array([m[np.argmax(busy[m])] for m in self.members], dtype=np.int64)
        begin = np.array([float(c.work(np.array(now))) for c in self.clocks])
        ends = [
            float(c.when(np.array(w)))
            for c, w in zip(self.clocks, begin + busy[longest], strict=True)
        ]
        return np.maximum(np.array(ends), now), longest

    def progress(self, now: float, then: float, busy: FloatArray) -> float:
        """Return the share of a step that its slowest link has done from now to then."""
        shares = [1.0]
        for clock, members in zip(self.clocks, self.members, strict=True):
            need = float(busy[members].max(initial=0.0))
            if need > 0:
                shares.append(float(clock.work(np.array(then)) - clock.work(np.array(now))) / need)
        return min(shares)

    def down_at(self, time: float) -> frozenset[tuple[int, int] | int]:
        """Return the cables and nodes that are down; a change of every link has no way around."""
        return frozenset(c.target for c in self.changes if c.target is not None and c.at(time) == 0)

    def first_failure(self, busy: FloatArray, now: float, end: float) -> float | None:
        """Return the first time in (now, end) at which a loaded link goes down."""
        known = self.down_at(now)
        for time in sorted({t for change in self.changes for t in change.times}):
            if now < time < end and not self.down_at(time) <= known:
                for clock, members in zip(self.clocks, self.members, strict=True):
                    if busy[members].any() and clock.factor(time) == 0:
                        return time
        return None
