"""A calendar on SimPy's clock that keeps one pending event, whatever is entered in it.

Decision: events are entered in SimPy's queue at their time, not after a delay: now + (when - now)
is not always `when`, and the last bits of a time would depend on what else was simulated before.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from math import inf
from typing import Any, Protocol

import simpy

from fedsim.errors import NetworkError

__all__ = ["ARRIVAL", "CHANGE", "EXPIRY", "WHILE_OPEN", "At", "Clock", "is_alone", "pass_to"]

CHANGE, ARRIVAL, EXPIRY = 0, 1, 2  # order of the calendar's entries at one instant
WHILE_OPEN = -1  # the version of an entry that holds as long as its item is not over

_FIRST, _LAST = 0, 2  # SimPy priorities; what users schedule has 1
_MAX_WAKES_AT_ONCE = 1000


class Item(Protocol):
    """What an entry is about; it outdates the entry by changing its version."""

    version: int
    is_over: bool


class At(simpy.Event):
    """A call at a given time, or at the end of this instant if it is past.

    Parameters
    ----------
    env : simpy.Environment
    when : float, s
    call : callable
        Called with this event.
    priority : int
        SimPy's, among the events of one instant.
    """

    def __init__(
        self,
        env: simpy.Environment,
        when: float,
        call: Callable[[simpy.Event], None],
        priority: int = 1,
    ) -> None:
        self.env = env
        self.callbacks = [call]
        self._ok = True
        self._value = None
        now = env._now
        entry: Any = (when if when > now else now, priority, next(env._eid), self)
        heappush(env._queue, entry)


class _Wake(At):
    """One of a clock's own calls."""


def pass_to(env: simpy.Environment, when: float) -> None:
    """Let time pass until it is exactly `when`."""
    At(env, when, lambda event: None)
    while env.now < when:
        env.step()


def is_alone(env: simpy.Environment, until: float, *own: type[simpy.Event]) -> bool:
    """Return whether nothing but events of these types, and clocks' wakes, comes before a time."""
    mine = (*own, _Wake)
    return all(time >= until or isinstance(event, mine) for time, _, _, event in env._queue)


class Clock:
    """Things to come, and one SimPy event for the first of them.

    Parameters
    ----------
    env : simpy.Environment
    on_due : callable
        Called with the time when something is due, before all else at that instant.
    on_end : callable
        Called with the time after all else at an instant, if `call_at_end` was.
    """

    def __init__(
        self,
        env: simpy.Environment,
        on_due: Callable[[float], None],
        on_end: Callable[[float], None],
    ) -> None:
        self.env = env
        self._on_due = on_due
        self._on_end = on_end
        self._calendar: list[tuple[float, int, int, Callable[[Any, float], None], Any, int]] = []
        self._sequence = 0
        self._wake: _Wake | None = None
        self._armed = inf
        self._is_ending = False
        self._n_wakes = 0
        self._last_wake = -inf

    def at(
        self, when: float, rank: int, call: Callable[[Any, float], None], item: Item, version: int
    ) -> None:
        """Enter ``call(item, when)``, which holds while the item has this version."""
        self._sequence += 1
        heappush(self._calendar, (when, rank, self._sequence, call, item, version))

    def next_time(self) -> float:
        """Return the time of the first entry that still holds; inf if there is none."""
        calendar = self._calendar
        while calendar:
            _, _, _, _, item, version = calendar[0]
            if item.version == version or (version == WHILE_OPEN and not item.is_over):
                return calendar[0][0]
            heappop(calendar)
        return inf

    def run_due(self, now: float) -> None:
        """Make the calls that are due."""
        calendar = self._calendar
        while calendar and calendar[0][0] <= now:
            _, _, _, call, item, version = heappop(calendar)
            if item.version == version or (version == WHILE_OPEN and not item.is_over):
                call(item, now)

    def wake_at(self, when: float) -> None:
        """Make sure that `on_due` is called at a time, if not before."""
        if when < self._armed:
            self._armed = when
            self._wake = _Wake(self.env, when, self._on_wake, _FIRST)

    def is_end(self, now: float) -> bool:
        """Return whether nothing else is to come at this instant."""
        queue = self.env._queue
        return not queue or queue[0][0] > now

    def call_at_end(self) -> None:
        """Make sure that `on_end` is called at the end of this instant."""
        if not self._is_ending:
            self._is_ending = True
            _Wake(self.env, self.env.now, self._on_last, _LAST)

    def _on_wake(self, event: simpy.Event) -> None:
        if event is self._wake:  # else superseded by an earlier one
            now = self.env._now
            self._armed = inf
            self._check_progress(now)
            self._on_due(now)

    def _on_last(self, event: simpy.Event) -> None:
        now = self.env._now
        self._is_ending = False
        self._check_progress(now)
        self._on_end(now)

    def _check_progress(self, now: float) -> None:
        if now > self._last_wake:
            self._last_wake = now
            self._n_wakes = 0
            return
        self._n_wakes += 1
        if self._n_wakes > _MAX_WAKES_AT_ONCE:
            raise NetworkError(
                f"more than {_MAX_WAKES_AT_ONCE} network events at {now:g} s: time does not go on"
            )
