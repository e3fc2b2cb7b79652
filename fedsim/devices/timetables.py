"""When devices are in one of two states: there or away, at full speed or slowed down.

A timetable answers for one device or for many at once, at any time, whatever was asked before.

Decision: random timetables hold no history. The two-state Markov chain is uniformised: events come
in a Poisson process whose rate is the sum of the two rates of leaving a state, and each event draws
the state anew from the stationary law, which gives exactly the exponential sojourns asked for.
The events of any window of time are keyed draws, so that the state of a device at any time costs a
few hashes: a million devices that nobody asks about cost one number each.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError
from fedsim.streams import bits, mix64

__all__ = ["CyclicTimetable", "MarkovTimetable", "Timetable", "toggles_of"]

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Timetable(Protocol):
    """When each device of a fleet is on."""

    def is_on(self, devices: int | IntArray, time: float) -> Any:
        """Return whether a device is on at `time` (s): a bool, or an array, shape of `devices`."""

    def next_change(self, devices: int | IntArray, time: float) -> Any:
        """Return the first time after `time` at which a device changes (s); inf if it never does.

        A float, or an array, shape of `devices`.
        """


# --- cycles -----------------------------------------------------------------------------------


def toggles_of(
    intervals: Iterable[tuple[float, float]], period: float, where: str
) -> tuple[bool, list[float]]:
    """Return the state at time 0 and the times of change of a cycle given by its on-times.

    Parameters
    ----------
    intervals : iterable of (float, float), s
        Start and end of each time on: ascending, not overlapping, within the period.
    period : float, s
        Length of the cycle; inf does not repeat.
    where : str
        Begins the message of an error.

    Returns
    -------
    bool
        Whether time 0 is on.
    list of float
        Ascending, above 0, at most `period`.

    Raises
    ------
    ScenarioError
        If the intervals are unsorted, overlap, are empty or outside of the period.
    """
    toggles: list[float] = []
    is_on_first, last = False, 0.0
    for start, end in intervals:
        if not 0 <= start < end:
            raise ScenarioError(f"{where}: {start:g} s to {end:g} s is no interval")
        if start < last:
            raise ScenarioError(
                f"{where}: {start:g} s to {end:g} s begins before the last interval's end, "
                f"{last:g} s (unsorted or overlapping)"
            )
        if end > period:
            raise ScenarioError(f"{where}: ends at {end:g} s, after the period of {period:g} s")
        if start == 0:
            is_on_first = True
        elif toggles and toggles[-1] == start:
            toggles.pop()
        else:
            toggles.append(start)
        if end < math.inf:
            toggles.append(end)
        last = end
    if is_on_first and period < math.inf:  # on again when the next cycle begins
        if toggles and toggles[-1] == period:
            toggles.pop()
        else:
            toggles.append(period)
    return is_on_first, toggles


class CyclicTimetable:
    """Known times of change, in cycles that devices share or have of their own.

    Parameters
    ----------
    cycles : sequence of (bool, sequence of float)
        State at time 0 and times of change of each cycle, as `toggles_of` returns them.
    period : float, s
        Length of all cycles; inf: they do not repeat.
    cycle : ndarray of int, shape (n_devices,)
        Which cycle each device follows.
    phase : ndarray, shape (n_devices,), s, optional
        Where in its cycle each device is at time 0 (needs a finite period).
    """

    def __init__(
        self,
        cycles: Sequence[tuple[bool, Sequence[float]]],
        period: float,
        cycle: IntArray,
        phase: FloatArray | None = None,
    ) -> None:
        lengths = [len(toggles) for _, toggles in cycles]
        self._toggles = np.array([t for _, toggles in cycles for t in toggles], np.float64)
        self._first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._starts_on = np.array([is_on for is_on, _ in cycles], bool)
        self._repeats = period < math.inf
        self._period = period if self._repeats else 0.0
        self._cycle = cycle
        self._phase = np.zeros(len(cycle)) if phase is None else phase

    def is_on(self, devices: int | IntArray, time: float) -> Any:
        """Return whether a device is on at `time`: a bool, or an array, shape of `devices`."""
        ids = np.atleast_1d(devices)
        _, index = self._locate(ids, time)
        cycle = self._cycle[ids]
        is_on = self._starts_on[cycle] ^ ((index - self._first[cycle]) % 2 == 1)
        return is_on if np.ndim(devices) else bool(is_on[0])

    def next_change(self, devices: int | IntArray, time: float) -> Any:
        """Return when a device next changes after `time` (s); inf if it never does."""
        ids = np.atleast_1d(devices)
        n_cycles, index = self._locate(ids, time)
        first, end = self._first[self._cycle[ids]], self._first[self._cycle[ids] + 1]
        is_over = (index == end) & self._repeats
        n_cycles, index = n_cycles + is_over, np.where(is_over, first, index)
        change = np.full(len(ids), math.inf)
        left = np.flatnonzero(index < end)
        change[left] = self._when(ids[left], n_cycles[left], index[left])
        return change if np.ndim(devices) else float(change[0])

    def _when(self, ids: IntArray, n_cycles: FloatArray, index: IntArray) -> FloatArray:
        return np.asarray((n_cycles * self._period + self._toggles[index]) - self._phase[ids])

    def _locate(self, ids: IntArray, time: float) -> tuple[FloatArray, IntArray]:
        """Return how many cycles each device has behind it, and its next toggle in this one.

        Toggles are compared with `time` as the absolute times that `next_change` returns, so that
        rounding cannot make the two contradict each other.
        """
        n_cycles = np.zeros(len(ids))
        if self._repeats:
            phase = self._phase[ids]
            n_cycles = np.floor((time + phase) / self._period)
            n_cycles -= ((n_cycles - 1) * self._period + self._period) - phase > time
            n_cycles += (n_cycles * self._period + self._period) - phase <= time
        cycle = self._cycle[ids]
        low, high = self._first[cycle], self._first[cycle + 1]
        while len(open_ := np.flatnonzero(low < high)):  # bisect each device's own cycle
            middle = (low[open_] + high[open_]) // 2
            is_past = self._when(ids[open_], n_cycles[open_], middle) <= time
            low[open_[is_past]] = middle[is_past] + 1
            high[open_[~is_past]] = middle[~is_past]
        return n_cycles, low


# --- Markov -----------------------------------------------------------------------------------

# P(at most k events in a window), for one event a window on average
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])
_POISSON_LIST: list[float] = _POISSON.tolist()
_MASK = 0xFFFFFFFFFFFFFFFF


class MarkovTimetable:
    """Devices that change between on and off after exponential times, each by itself.

    A device begins in its long-run state, on with probability mean_on / (mean_on + mean_off).

    Parameters
    ----------
    n_devices : int
    seed : int
    purpose : str
        What the history is for; names the draws.
    mean_on, mean_off : float, s
        Mean sojourns, above 0.

    References
    ----------
    .. [1] Jensen, "Markoff chains as an aid in the study of Markoff processes", Skandinavisk
       Aktuarietidskrift 36, 1953 (uniformisation).
    """

    def __init__(
        self, n_devices: int, seed: int, purpose: str, mean_on: float, mean_off: float
    ) -> None:
        self._keys = bits(seed, purpose, np.arange(n_devices))
        self._window = 1 / (1 / mean_on + 1 / mean_off)  # s; one event in each on average
        self._share = mean_on / (mean_on + mean_off)

    def is_on(self, devices: int | IntArray, time: float) -> Any:
        """Return whether a device is on at `time`: a bool, or an array, shape of `devices`."""
        if np.ndim(devices) == 0:
            return self._is_one_on(int(self._keys[devices]), time)
        keys = self._keys[devices]
        is_on = np.zeros(len(keys), bool)
        asked = np.arange(len(keys))
        # From one window ahead backwards: rounding may have put `time` a window too low.
        window = math.floor(time / self._window) + 1
        while len(asked):
            rows, times, marks = self._events(keys[asked], np.int64(window))
            latest = np.full(len(asked), -math.inf)
            is_past = times <= time
            np.maximum.at(latest, rows[is_past], times[is_past])
            is_last = times == latest[rows]
            is_on[asked[rows[is_last]]] = marks[is_last]
            asked = asked[latest == -math.inf]
            window -= 1
        return is_on

    def next_change(self, devices: int | IntArray, time: float) -> Any:
        """Return when a device next changes after `time` (s)."""
        first = math.floor(time / self._window) - 1
        if np.ndim(devices) == 0:
            return self._next_change_of_one(int(self._keys[devices]), first, time)
        keys = self._keys[devices]
        is_on = self.is_on(devices, time)
        change = np.full(len(keys), math.inf)
        asked = np.arange(len(keys))
        width = 1
        while len(asked):
            windows = np.tile(np.arange(first, first + width), len(asked))
            rows, times, marks = self._events(np.repeat(keys[asked], width), windows)
            rows //= width
            is_flip = (times > time) & (marks != is_on[asked[rows]])
            np.minimum.at(change, asked[rows[is_flip]], times[is_flip])
            asked = asked[change[asked] == math.inf]
            first += width
            width = min(2 * width, max(1, 65536 // max(len(asked), 1)))
        return change

    def _events(
        self, keys: NDArray[np.uint64], windows: Any
    ) -> tuple[IntArray, FloatArray, BoolArray]:
        """Return the events of one window for each key: its row, its time, the state it draws."""
        keys = mix64(keys ^ np.asarray(windows).astype(np.uint64))
        counts = np.searchsorted(_POISSON, _unit(mix64(keys)), side="right")
        rows = np.repeat(np.arange(len(keys)), counts)
        number = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        words = (2 * number + 1).astype(np.uint64)
        places = _unit(mix64(keys[rows] ^ words))
        marks = _unit(mix64(keys[rows] ^ (words + np.uint64(1)))) < self._share
        begins = np.broadcast_to(windows, keys.shape)[rows]
        return rows, (begins + places) * self._window, marks

    # The same for a single device, in Python's integers: an order of magnitude less overhead.

    def _is_one_on(self, key: int, time: float) -> bool:
        window = math.floor(time / self._window) + 1
        while True:
            past = [event for event in self._events_of_one(key, window) if event[0] <= time]
            if past:
                return max(past)[1]
            window -= 1

    def _next_change_of_one(self, key: int, window: int, time: float) -> float:
        is_on = self._is_one_on(key, time)
        while True:
            events = self._events_of_one(key, window)
            flips = [when for when, mark in events if when > time and mark != is_on]
            if flips:
                return min(flips)
            window += 1

    def _events_of_one(self, key: int, window: int) -> list[tuple[float, bool]]:
        key = _mix(key ^ (window & _MASK))
        count = bisect_right(_POISSON_LIST, _fraction(_mix(key)))
        return [
            (
                (window + _fraction(_mix(key ^ (2 * k + 1)))) * self._window,
                _fraction(_mix(key ^ (2 * k + 2))) < self._share,
            )
            for k in range(count)
        ]


def _unit(draws: NDArray[np.uint64]) -> FloatArray:
    return np.asarray((draws >> np.uint64(11)) * 2.0**-53)


def _fraction(draw: int) -> float:
    return (draw >> 11) * 2.0**-53


def _mix(value: int) -> int:
    """Return `fedsim.streams.mix64` of one number."""
    z = (value + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
