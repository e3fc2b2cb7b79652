"""When devices are there: what a user writes, each model a small frozen dataclass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from fedsim.devices.timetables import CyclicTimetable, MarkovTimetable, Timetable, toggles_of
from fedsim.devices.traces import draw_phases, read_numbers, read_steps
from fedsim.errors import ScenarioError
from fedsim.units import Duration

__all__ = [
    "Always",
    "Availability",
    "DayNight",
    "Intervals",
    "OnOffAvailability",
    "TraceAvailability",
]

_DAY = 86400.0
_Cycle = tuple[bool, Sequence[float]]


class Availability(Protocol):
    """When the devices of a fleet are there; created once for a fleet by `start`."""

    def start(self, n_devices: int, seed: int) -> Timetable | None:
        """Return when each device is there, or None if all always are."""


@dataclass(frozen=True, slots=True)
class Always:
    """Every device is always there."""

    def start(self, n_devices: int, seed: int) -> None:
        """Return None: nothing ever changes."""
        return


@dataclass(frozen=True, slots=True)
class OnOffAvailability:
    """Each device comes and goes by itself, after exponential times.

    A device starts in its long-run state: there with probability mean_on / (mean_on + mean_off).

    Parameters
    ----------
    mean_on, mean_off : float, s
        Mean length of its stays and of its absences.
    """

    mean_on: Duration
    mean_off: Duration

    def __post_init__(self) -> None:
        if not (self.mean_on > 0 and self.mean_off > 0):
            raise ScenarioError("mean_on and mean_off must be above 0 s")

    def start(self, n_devices: int, seed: int) -> Timetable:
        """Return when each device is there."""
        return MarkovTimetable(n_devices, seed, "device-availability", self.mean_on, self.mean_off)


@dataclass(frozen=True, slots=True)
class DayNight:
    """Each device is there for one stretch of every day, as phones are that charge at night.

    Parameters
    ----------
    on : float, s
        Length of the stretch.
    period : float, s
        Length of a day.
    phase : float, s, or "random"
        How far into its stretch a device is at time 0: the same for all, or a place in the day of
        its own (devices all over the world).
    """

    on: Duration
    period: Duration = _DAY
    phase: Duration | Literal["random"] = "random"

    def __post_init__(self) -> None:
        if not 0 < self.on < self.period:
            raise ScenarioError(
                f"on is {self.on:g} s; it must be above 0 s and below the period, "
                f"{self.period:g} s (else: always)"
            )

    def start(self, n_devices: int, seed: int) -> Timetable:
        """Return when each device is there."""
        cycle = toggles_of([(0.0, self.on)], self.period, "day_night")
        phase = draw_phases(self.phase, self.period, n_devices, seed, "device-day")
        return CyclicTimetable([cycle], self.period, np.zeros(n_devices, np.int64), phase)


@dataclass(frozen=True, slots=True)
class TraceAvailability:
    """Every device follows one recording, which repeats, from a place of its own.

    Parameters
    ----------
    path : str
        CSV with the header ``time_s,available``: 1 (there) or 0 holds until the next line's time;
        times begin at 0, the last line only marks the end.
    offset : float, s, or "random"
        Where in the recording a device is at time 0.
    """

    path: str
    offset: Duration | Literal["random"] = "random"

    def __post_init__(self) -> None:
        self._read()

    def _read(self) -> tuple[float, _Cycle]:
        times, values = read_steps(Path(self.path), "available")
        if wrong := set(values) - {0.0, 1.0}:
            raise ScenarioError(f"trace {self.path}: available is {max(wrong):g}; it is 0 or 1")
        if not any(values):
            raise ScenarioError(f"trace {self.path}: nobody is ever available")
        # equal values in a row are merged, so those that are 1 are whole stays
        stays = [(times[k], times[k + 1]) for k, value in enumerate(values) if value]
        return times[-1], toggles_of(stays, times[-1], f"trace {self.path}")

    def start(self, n_devices: int, seed: int) -> Timetable:
        """Return when each device is there."""
        period, cycle = self._read()
        phase = draw_phases(self.offset, period, n_devices, seed, "device-availability-trace")
        return CyclicTimetable([cycle], period, np.zeros(n_devices, np.int64), phase)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Devices are there during given intervals, each during its own.

    Parameters
    ----------
    devices : dict, optional
        Device → its intervals, each a start and an end: ``{0: [[0 s, 10 s], [1 min, 2 min]]}``;
        ascending, not overlapping; none at all: never there.
    path : str, optional
        The same as CSV with the header ``device,start_s,end_s``.
    others : {"always", "never"}, optional
        What the devices do that are not listed; has to be said if there are any.
    repeat : float, s, optional
        The intervals come again after this time.
    """

    devices: dict[int, list[tuple[Duration, Duration]]] | None = None
    path: str | None = None
    others: Literal["always", "never"] | None = None
    repeat: Duration | None = None

    def __post_init__(self) -> None:
        if (self.devices is None) == (self.path is None):
            raise ScenarioError("give the intervals as devices or as path, one of the two")
        if self.repeat == 0:
            raise ScenarioError("repeat must be above 0 s")
        self._cycles()

    def _cycles(self) -> dict[int, _Cycle]:
        period = math.inf if self.repeat is None else self.repeat
        if self.devices is not None:
            given: Mapping[int, Sequence[tuple[float, float]]] = self.devices
            where = "device"
        else:
            given, where = _read_intervals(Path(str(self.path))), f"trace {self.path}, device"
        for device in given:
            if device < 0:
                raise ScenarioError(f"{where} {device}: devices are numbered from 0")
        return {
            device: toggles_of(intervals, period, f"{where} {device}")
            for device, intervals in given.items()
        }

    def start(self, n_devices: int, seed: int) -> Timetable:
        """Return when each device is there.

        Raises
        ------
        ScenarioError
            If a device does not exist, or one has no intervals and `others` is not given.
        """
        cycles = self._cycles()
        if cycles and max(cycles) >= n_devices:
            raise ScenarioError(
                f"intervals of device {max(cycles)}, but devices are 0 to {n_devices - 1}"
            )
        of_device = np.full(n_devices, len(cycles), np.int64)
        of_device[list(cycles)] = np.arange(len(cycles))
        if self.others is None and len(cycles) < n_devices:
            missing = int(np.argmax(of_device))
            raise ScenarioError(
                f"device {missing} has no intervals; list it, or say others: always or never"
            )
        rest: _Cycle = (self.others == "always", [])
        period = math.inf if self.repeat is None else self.repeat
        return CyclicTimetable([*cycles.values(), rest], period, of_device)


def _read_intervals(path: Path) -> dict[int, list[tuple[float, float]]]:
    intervals: dict[int, list[tuple[float, float]]] = {}
    for where, (device, start, end) in read_numbers(path, ("device", "start_s", "end_s")):
        if device != int(device) or device < 0:
            raise ScenarioError(f"{where}: {device:g} is no device; they are numbered from 0")
        stays = intervals.setdefault(int(device), [])
        if not 0 <= start < end:
            raise ScenarioError(f"{where}: {start:g} s to {end:g} s is no interval")
        if stays and start < stays[-1][1]:
            raise ScenarioError(
                f"{where}: begins before the end of the device's last interval, "
                f"{stays[-1][1]:g} s (unsorted or overlapping)"
            )
        stays.append((start, end))
    return intervals
