"""When devices run below their speed: what a user writes, each model a small frozen dataclass."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedsim.devices.timetables import CyclicTimetable, MarkovTimetable, Timetable, toggles_of
from fedsim.errors import ScenarioError
from fedsim.units import Duration

__all__ = ["NoSlowdown", "RandomSlowdown", "ScheduledSlowdown", "SlowPeriods", "SlowdownModel"]


@dataclass(frozen=True, slots=True, eq=False)
class SlowPeriods:
    """When devices are slowed down, and how much.

    Parameters
    ----------
    factor : float
        On the speed, while a device is slow.
    is_slow : Timetable
        When each device is.
    """

    factor: float
    is_slow: Timetable


class SlowdownModel(Protocol):
    """Times at which devices run more slowly, for example because they do something else."""

    def start(self, n_devices: int, seed: int) -> SlowPeriods | None:
        """Return the slow periods of a fleet; None if there are none."""


@dataclass(frozen=True, slots=True)
class NoSlowdown:
    """No device is ever slowed down."""

    def start(self, n_devices: int, seed: int) -> None:
        """Return None: there are no slow periods."""
        return


@dataclass(frozen=True, slots=True)
class RandomSlowdown:
    """Each device by itself is slow now and then, after and for exponential times.

    Parameters
    ----------
    factor : float
        On the speed, above 0 and at most 1.
    mean_normal, mean_slow : float, s
        Mean length of the periods at full speed and of the slow ones.
    """

    factor: float
    mean_normal: Duration
    mean_slow: Duration

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if not (self.mean_normal > 0 and self.mean_slow > 0):
            raise ScenarioError("mean_normal and mean_slow must be above 0 s")

    def start(self, n_devices: int, seed: int) -> SlowPeriods:
        """Return the slow periods of a fleet."""
        return SlowPeriods(
            self.factor,
            MarkovTimetable(n_devices, seed, "device-slowdown", self.mean_slow, self.mean_normal),
        )


@dataclass(frozen=True, slots=True)
class ScheduledSlowdown:
    """Devices are slow at given times.

    Parameters
    ----------
    factor : float
        On the speed, above 0 and at most 1.
    periods : list of (float, float), s
        Start and end of each slow period, ascending: ``[[10 s, 40 s], [5 min, 6 min]]``.
    devices : list of int, optional
        Which devices; by default all.
    repeat : float, s, optional
        The periods come again after this time.
    """

    factor: float
    periods: list[tuple[Duration, Duration]]
    devices: list[int] | None = None
    repeat: Duration | None = None

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.repeat == 0:
            raise ScenarioError("repeat must be above 0 s")
        toggles_of(self.periods, self.repeat or math.inf, "periods")

    def start(self, n_devices: int, seed: int) -> SlowPeriods:
        """Return the slow periods of a fleet.

        Raises
        ------
        ScenarioError
            If a device does not exist.
        """
        cycle = np.zeros(n_devices, np.int64)
        if self.devices is not None:
            for device in self.devices:
                if not 0 <= device < n_devices:
                    raise ScenarioError(
                        f"slowdown of device {device}, but devices are 0 to {n_devices - 1}"
                    )
            cycle[:] = 1
            cycle[self.devices] = 0
        period = self.repeat or math.inf
        slow = toggles_of(self.periods, period, "periods")
        return SlowPeriods(self.factor, CyclicTimetable([slow, (False, [])], period, cycle))


def _check_factor(factor: float) -> None:
    if not 0 < factor <= 1:
        raise ScenarioError(f"factor is {factor}; it must be above 0 and at most 1")
