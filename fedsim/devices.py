"""The devices: how fast each computes, when it is there, and what it is busy with.

Decision: a device does one job at a time, in the order in which instructions arrive. A job whose
round is over still runs to its end; that is what makes a straggler a straggler.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError
from fedsim.streams import stream
from fedsim.units import Duration, Speed

__all__ = [
    "Always",
    "Availability",
    "ClassSpeed",
    "ConstantSpeed",
    "DeviceFleet",
    "LognormalSpeed",
    "OnOffAvailability",
    "SpeedModel",
    "UniformSpeed",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class SpeedModel(Protocol):
    """How fast the devices of a fleet are."""

    def sample(self, n_devices: int, seed: int) -> FloatArray:
        """Return the speed of each device in training samples per second, shape (n_devices,)."""


@dataclass(frozen=True, slots=True)
class ConstantSpeed:
    """Every device trains `value` samples per second."""

    value: Speed

    def sample(self, n_devices: int, seed: int) -> FloatArray:
        """Return the speed of each device in training samples per second, shape (n_devices,)."""
        return np.full(n_devices, self.value)


@dataclass(frozen=True, slots=True)
class LognormalSpeed:
    """Speeds spread lognormally around `median`; `sigma` is the spread of their logarithm.

    `sigma` 0 makes all devices equal; 0.5 gives a factor of 7 between the 2.5 % slowest and
    fastest, 1.2 a factor of 110.
    """

    median: Speed
    sigma: float = 0.5

    def __post_init__(self) -> None:
        if not self.sigma >= 0:
            raise ScenarioError(f"sigma is {self.sigma}; it must be 0 or more")

    def sample(self, n_devices: int, seed: int) -> FloatArray:
        """Return the speed of each device in training samples per second, shape (n_devices,)."""
        draws = stream(seed, "device-speed").standard_normal(n_devices)
        return np.asarray(self.median * np.exp(self.sigma * draws))


@dataclass(frozen=True, slots=True)
class UniformSpeed:
    """Speeds uniform between `low` and `high`."""

    low: Speed
    high: Speed

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ScenarioError(f"low is {self.low}, above high, {self.high}")

    def sample(self, n_devices: int, seed: int) -> FloatArray:
        """Return the speed of each device in training samples per second, shape (n_devices,)."""
        return stream(seed, "device-speed").uniform(self.low, self.high, n_devices)


@dataclass(frozen=True, slots=True)
class ClassSpeed:
    """Classes of devices: `speeds` by class name, in the proportions `shares`.

    Each device draws its class; with shares 0.3, 0.6 and 0.1, some 30 %, 60 % and 10 % of them.
    """

    speeds: dict[str, Speed]
    shares: dict[str, float]

    def __post_init__(self) -> None:
        if set(self.speeds) != set(self.shares):
            raise ScenarioError(
                f"shares names the classes {sorted(self.shares)}, speeds {sorted(self.speeds)}"
            )
        if abs(sum(self.shares.values()) - 1) > 1e-6 or min(self.shares.values()) < 0:
            raise ScenarioError(f"shares are {self.shares}; they must be positive and sum to 1")

    def sample(self, n_devices: int, seed: int) -> FloatArray:
        """Return the speed of each device in training samples per second, shape (n_devices,)."""
        names = list(self.speeds)
        shares = [self.shares[name] for name in names]
        drawn = stream(seed, "device-speed").choice(len(names), n_devices, p=shares)
        return np.array([self.speeds[name] for name in names], np.float64)[drawn]


class Availability(Protocol):
    """When the devices of a fleet are there; created once for a fleet by `start`."""

    def start(self, n_devices: int, seed: int) -> "Timetable | None":
        """Return when each device is there, or None if all always are."""


@dataclass(frozen=True, slots=True)
class Always:
    """Every device is always there."""

    def start(self, n_devices: int, seed: int) -> "Timetable | None":
        """Return None: nothing ever changes."""
        return None


@dataclass(frozen=True, slots=True)
class OnOffAvailability:
    """Each device comes and goes by itself: exponential times with these means (seconds).

    A device starts in its long-run state: there with probability mean_on / (mean_on + mean_off).
    """

    mean_on: Duration
    mean_off: Duration

    def __post_init__(self) -> None:
        if not (self.mean_on > 0 and self.mean_off > 0):
            raise ScenarioError("mean_on and mean_off must be above 0 s")

    def start(self, n_devices: int, seed: int) -> "Timetable":
        """Return the timetable of the fleet."""
        return Timetable(n_devices, seed, self.mean_on, self.mean_off)


class Timetable:
    """Alternating on and off times of each device, drawn from the device's own stream.

    Queries may come in any order of time and device: a device's changes are drawn in order from
    its own generator and kept.
    """

    def __init__(self, n_devices: int, seed: int, mean_on: float, mean_off: float) -> None:
        self._means = (mean_off, mean_on)
        self._draws = [stream(seed, "device-availability", i) for i in range(n_devices)]
        share = mean_on / (mean_on + mean_off)
        self._starts_on = np.array([draw.random() < share for draw in self._draws])
        self._changes: list[list[float]] = [[] for _ in range(n_devices)]

    def _index(self, device: int, time: float) -> int:
        """Return how often `device` has changed by `time`, drawing further as needed."""
        changes = self._changes[device]
        while not changes or changes[-1] <= time:
            is_on = self._starts_on[device] ^ (len(changes) % 2 == 1)
            mean = self._means[int(is_on)]
            last = changes[-1] if changes else 0.0
            changes.append(last + self._draws[device].exponential(mean))
        return int(np.searchsorted(changes, time, side="right"))

    def is_on(self, device: int, time: float) -> bool:
        """Return whether `device` is there at `time`."""
        return bool(self._starts_on[device] ^ (self._index(device, time) % 2 == 1))

    def next_change(self, device: int, time: float) -> float:
        """Return when `device` next comes or goes after `time`."""
        return self._changes[device][self._index(device, time)]


@dataclass(slots=True)
class DeviceFleet:
    """Compute speed, availability and queue of every device.

    Parameters
    ----------
    speed : ndarray, shape (n_devices,)
        Training samples per second of each device.
    timetable : Timetable, optional
        When each is there; None: always.
    """

    speed: FloatArray
    timetable: Timetable | None = None
    _busy_until: FloatArray = field(init=False, repr=False)
    _everybody: IntArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.speed).all() and (self.speed > 0).all()):
            raise ScenarioError("every device's speed must be above 0 samples/s and finite")
        self._busy_until = np.zeros(len(self.speed))
        self._everybody = np.arange(len(self.speed))

    def __len__(self) -> int:
        return len(self.speed)

    def is_available(self, device: int, time: float) -> bool:
        """Return whether `device` is there at `time`."""
        return self.timetable is None or self.timetable.is_on(device, time)

    def available(self, time: float) -> IntArray:
        """Return the devices that are there at `time`, ascending."""
        if self.timetable is None:
            return self._everybody
        return np.flatnonzero([self.timetable.is_on(i, time) for i in range(len(self))])

    def next_change(self, time: float) -> float:
        """Return when a device next comes or goes after `time`; inf if none ever does."""
        if self.timetable is None:
            return math.inf
        return min(self.timetable.next_change(i, time) for i in range(len(self)))

    def occupy(self, device: int, time: float, samples: float) -> tuple[float, float]:
        """Queue `samples` of work at `device` from `time` on; return its start and end (s)."""
        start = max(time, float(self._busy_until[device]))
        end = start + samples / float(self.speed[device])
        self._busy_until[device] = end
        return start, end
