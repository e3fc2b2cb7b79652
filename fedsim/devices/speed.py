"""How fast devices compute: what a user writes, each model a small frozen dataclass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.devices.traces import StepTrace, draw_phases, read_steps, trace_files
from fedsim.errors import ScenarioError
from fedsim.streams import stream
from fedsim.units import ComputeRate, ComputeSpeed, Duration

__all__ = [
    "ClassSpeed",
    "ConstantSpeed",
    "DeviceClass",
    "LognormalSpeed",
    "SpeedModel",
    "SpeedTraces",
    "Speeds",
    "TraceSpeed",
    "UniformSpeed",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class SpeedTraces:
    """How the speeds of a fleet vary around their means.

    Parameters
    ----------
    traces : sequence of StepTrace
        Factors on the mean, 1 on average.
    trace : ndarray of int, shape (n_devices,)
        Which one each device follows.
    offset : ndarray, shape (n_devices,), s
        Where in it each device is at time 0.
    """

    traces: Sequence[StepTrace]
    trace: IntArray
    offset: FloatArray

    def work(self, device: int, start: float, end: float) -> float:
        """Return the work from `start` to `end` (s), in seconds at the mean speed."""
        trace, offset = self._of(device)
        return trace.integral(start + offset, end + offset)

    def finish(self, device: int, start: float, work: float) -> float:
        """Return when `work` (seconds at the mean speed) begun at `start` (s) is done."""
        trace, offset = self._of(device)
        return max(trace.reach(start + offset, work) - offset, start)

    def _of(self, device: int) -> tuple[StepTrace, float]:
        return self.traces[int(self.trace[device])], float(self.offset[device])


@dataclass(frozen=True, slots=True, eq=False)
class Speeds:
    """The speeds of a fleet.

    Parameters
    ----------
    mean : ndarray, shape (n_devices,)
        Training samples per second.
    traces : SpeedTraces, optional
        How they vary; None: not at all.
    """

    mean: FloatArray
    traces: SpeedTraces | None = None


class SpeedModel(Protocol):
    """How fast the devices of a fleet are."""

    def start(self, n_devices: int, seed: int, flops_per_sample: float | None = None) -> Speeds:
        """Return the speeds of a fleet.

        Parameters
        ----------
        n_devices, seed : int
        flops_per_sample : float, optional
            Operations of one sample in training; needed for speeds in FLOP/s.
        """


def _samples_per_second(rate: ComputeRate, flops_per_sample: float | None) -> float:
    if rate.unit == "samples/s":
        return rate.value
    if not flops_per_sample:
        raise ScenarioError(
            f"a speed of {rate.value:g} FLOP/s needs the operations of one sample, which are not "
            "known of this model; give samples/s"
        )
    return rate.value / flops_per_sample


@dataclass(frozen=True, slots=True)
class ConstantSpeed:
    """Every device has the same speed.

    Parameters
    ----------
    value : ComputeRate
        In samples/s or FLOP/s.
    """

    value: ComputeSpeed

    def start(self, n_devices: int, seed: int, flops_per_sample: float | None = None) -> Speeds:
        """Return the speeds of a fleet."""
        return Speeds(np.full(n_devices, _samples_per_second(self.value, flops_per_sample)))


@dataclass(frozen=True, slots=True)
class LognormalSpeed:
    """Speeds spread lognormally around a median.

    Parameters
    ----------
    median : ComputeRate
        In samples/s or FLOP/s.
    sigma : float
        Spread of the logarithm. 0 makes all devices equal; 0.5 gives a factor of 7 between the
        2.5 % slowest and fastest, 1.2 a factor of 110.
    """

    median: ComputeSpeed
    sigma: float = 0.5

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)

    def start(self, n_devices: int, seed: int, flops_per_sample: float | None = None) -> Speeds:
        """Return the speeds of a fleet."""
        draws = stream(seed, "device-speed").standard_normal(n_devices)
        median = _samples_per_second(self.median, flops_per_sample)
        return Speeds(np.asarray(median * np.exp(self.sigma * draws)))


def _check_sigma(sigma: float) -> None:
    if not 0 <= sigma < math.inf:
        raise ScenarioError(f"sigma is {sigma}; it must be 0 or more")


@dataclass(frozen=True, slots=True)
class UniformSpeed:
    """Speeds uniform between two values.

    Parameters
    ----------
    low, high : ComputeRate
        Both in samples/s or both in FLOP/s.
    """

    low: ComputeSpeed
    high: ComputeSpeed

    def __post_init__(self) -> None:
        if self.low.unit != self.high.unit:
            raise ScenarioError(f"low is in {self.low.unit}, high in {self.high.unit}")
        if self.low.value > self.high.value:
            raise ScenarioError(f"low is {self.low.value:g}, above high, {self.high.value:g}")

    def start(self, n_devices: int, seed: int, flops_per_sample: float | None = None) -> Speeds:
        """Return the speeds of a fleet."""
        low, high = (_samples_per_second(rate, flops_per_sample) for rate in (self.low, self.high))
        return Speeds(stream(seed, "device-speed").uniform(low, high, n_devices))


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """One class of devices: how many there are and how fast they are.

    Parameters
    ----------
    share : float
        Probability that a device is of this class.
    speed : ComputeRate
        In samples/s or FLOP/s; the median if `sigma` is above 0.
    sigma : float
        Spread of the logarithm of speeds within the class; 0: all equal.
    """

    share: float
    speed: ComputeSpeed
    sigma: float = 0.0

    def __post_init__(self) -> None:
        _check_sigma(self.sigma)


@dataclass(frozen=True, slots=True)
class ClassSpeed:
    """Classes of devices, such as 30 % phones, 60 % laptops and 10 % servers.

    Parameters
    ----------
    classes : dict of DeviceClass
        Class → ``{share: 0.3, speed: 50 samples/s}``. Each device draws its class, so that the
        shares hold up to chance; they sum to 1.
    """

    classes: dict[str, DeviceClass]

    def __post_init__(self) -> None:
        shares = {name: each.share for name, each in self.classes.items()}
        total = sum(shares.values())
        if not all(share >= 0 for share in shares.values()) or not abs(total - 1) <= 1e-6:
            raise ScenarioError(
                f"shares are {shares}: they must be 0 or more and sum to 1, not to {total:g}"
            )

    def start(self, n_devices: int, seed: int, flops_per_sample: float | None = None) -> Speeds:
        """Return the speeds of a fleet."""
        classes = list(self.classes.values())
        shares = np.array([each.share for each in classes])
        drawn = stream(seed, "device-speed").choice(
            len(classes), n_devices, p=shares / shares.sum()
        )
        medians = [_samples_per_second(each.speed, flops_per_sample) for each in classes]
        speed = np.array(medians, np.float64)[drawn]
        sigma = np.array([each.sigma for each in classes], np.float64)[drawn]
        if sigma.any():
            speed *= np.exp(
                sigma * stream(seed, "device-speed-in-class").standard_normal(n_devices)
            )
        return Speeds(speed)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSpeed:
    """Speeds that follow a recording, which repeats; the work of a job is integrated exactly.

    Parameters
    ----------
    path : str
        CSV with the header ``time_s,speed``: a speed of 0 or more holds until the next line's
        time; times begin at 0, the last line only marks the end. Or a directory: each device then
        follows one of its ``*.csv`` files, chosen by the seed.
    unit : {"samples/s", "FLOP/s"}
        Of the column `speed`.
    mean : ComputeRate, optional
        Scale each recording to this mean; the unit of its column then has no meaning.
    offset : float, s, or "random"
        Where in the recording a device is at time 0; ``random``: at a place of its own.
    """

    path: str
    unit: Literal["samples/s", "FLOP/s"] = "samples/s"
    mean: ComputeSpeed | None = None
    offset: Duration | Literal["random"] = "random"

    def __post_init__(self) -> None:
        self._read()

    def _read(self) -> list[StepTrace]:
        traces = []
        for file in trace_files(self.path):
            trace = StepTrace(*read_steps(file, "speed"))
            if trace.total == 0:
                raise ScenarioError(f"trace {file}: the speed is 0 all the time")
            traces.append(trace)
        return traces

    def start(self, n_devices: int, seed: int, flops_per_sample: float | None = None) -> Speeds:
        """Return the speeds of a fleet."""
        traces = self._read()
        chosen = stream(seed, "device-speed-file").integers(len(traces), size=n_devices)
        period = np.array([trace.period for trace in traces])[chosen]
        offset = draw_phases(self.offset, period, n_devices, seed, "device-speed-trace")
        means = [self.mean or ComputeRate(trace.mean, self.unit) for trace in traces]
        speeds = np.array([_samples_per_second(rate, flops_per_sample) for rate in means])
        factors = [trace.scaled(1 / trace.mean) for trace in traces]
        return Speeds(speeds[chosen], SpeedTraces(factors, chosen, offset))
