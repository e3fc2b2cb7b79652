"""The fleet: what every device is busy with, and until when.

Decision: a device does one job at a time, in the order in which instructions arrive. A job whose
round is over still runs to its end; that is what makes a straggler a straggler.

Decision: a device that goes away (see `availability`) either *pauses*: its present job stands still
and goes on when it comes back, those that wait for their turn wait on; or *drops* its work, as one
does that crashes: the present job and those that wait are lost at that moment, and it comes back
with nothing to do. Pausing for ever is dropping. Messages under way are the links' business: what
arrives while a device is away is not received.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.devices.availability import Always, Availability
from fedsim.devices.energy import EnergyCosts, EnergyMeter, energy_joules
from fedsim.devices.slowdown import NoSlowdown, SlowdownModel, SlowPeriods
from fedsim.devices.speed import SpeedModel, SpeedTraces
from fedsim.devices.timetables import Timetable
from fedsim.errors import ScenarioError

__all__ = ["DeviceFleet", "Job", "make_fleet"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


class Job(NamedTuple):
    """When a device works on something.

    Attributes
    ----------
    started : float, s
        NaN if its turn never came.
    ended : float, s
        When it is done, or dropped.
    is_done : bool
        False: the device went away and dropped it.
    """

    started: float
    ended: float
    is_done: bool


class DeviceFleet:
    """Compute speed, availability and queue of every device.

    Parameters
    ----------
    speed : ndarray, shape (n_devices,)
        Training samples per second of each device, the mean where it varies.
    timetable : Timetable, optional
        When each is there; None: always.
    traces : SpeedTraces, optional
        How speeds vary; None: not at all.
    slowdown : SlowPeriods, optional
        When devices are slower than that; None: never.
    on_leave : {"pause", "drop"}
        What becomes of the work of a device that goes away.
    energy : EnergyCosts, optional
        Count what devices spend.
    flops_per_sample : float, optional
        Operations of one sample in training, for an energy per operation.

    Raises
    ------
    ScenarioError
        If a speed is not above 0 and finite, or the energy needs operations that are not given.
    """

    def __init__(
        self,
        speed: FloatArray,
        timetable: Timetable | None = None,
        *,
        traces: SpeedTraces | None = None,
        slowdown: SlowPeriods | None = None,
        on_leave: Literal["pause", "drop"] = "pause",
        energy: EnergyCosts | None = None,
        flops_per_sample: float | None = None,
    ) -> None:
        if not (np.isfinite(speed).all() and (speed > 0).all()):
            raise ScenarioError("every device's speed must be above 0 samples/s and finite")
        if energy is not None:
            energy.of_sample(flops_per_sample)
        self.speed = speed
        self.timetable = timetable
        self._traces = traces
        self._slowdown = slowdown
        self._on_leave = on_leave
        self._costs = energy
        self._flops_per_sample = flops_per_sample
        self._meter = None if energy is None else EnergyMeter(len(speed))
        self._is_steady = timetable is None and traces is None and slowdown is None
        self._busy_until = np.zeros(len(speed))
        self._everybody = np.arange(len(speed))
        self._seen = math.nan, self._everybody  # time, who was there

    def __len__(self) -> int:
        return len(self.speed)

    # --- who is there -------------------------------------------------------------------------

    def is_available(self, device: int, time: float) -> bool:
        """Return whether `device` is there at `time` (s)."""
        return self.timetable is None or bool(self.timetable.is_on(device, time))

    def available(self, time: float) -> IntArray:
        """Return the devices that are there at `time` (s), ascending."""
        if self.timetable is None:
            return self._everybody
        if time != self._seen[0]:  # strategies ask several times in a round
            is_on = self.timetable.is_on(self._everybody, time)
            self._seen = time, np.flatnonzero(np.broadcast_to(is_on, len(self)))
        return self._seen[1]

    def next_change(self, time: float) -> float:
        """Return when a device next comes or goes after `time` (s); inf if none ever does."""
        if self.timetable is None:
            return math.inf
        return float(np.min(self.timetable.next_change(self._everybody, time)))

    # --- work ---------------------------------------------------------------------------------

    def occupy(self, device: int, time: float, samples: float) -> Job:
        """Queue work at a device that is there, behind what it does already.

        Parameters
        ----------
        device : int
        time : float, s
            When the work arrives; does not go back from call to call.
        samples : float
            Training samples' worth of work.
        """
        job = self.forecast(device, time, samples)
        self._busy_until[device] = job.ended
        if self._meter is not None:
            done = samples if job.is_done else self._done(device, job) * float(self.speed[device])
            self._meter.add_work(device, job.ended, done)
        return job

    def forecast(self, device: int, time: float, samples: float) -> Job:
        """Return what `occupy` would, and queue nothing."""
        start = max(time, float(self._busy_until[device]))
        work = samples / float(self.speed[device])
        if self._is_steady:
            return Job(start, start + work, True)
        job = self._work_off(device, start, work)
        leaves = self._leaves(device, time) if self._on_leave == "drop" else math.inf
        if start >= leaves or job.ended > leaves:
            return Job(start if start < leaves else math.nan, leaves, False)
        return job

    def _work_off(self, device: int, start: float, work: float) -> Job:
        """Return when `work` (seconds at the mean speed) is done, if the device drops nothing."""
        time, started = start, math.nan
        while True:
            factor, until = self._factor(device, time)
            if factor > 0:
                started = time if math.isnan(started) else started
                end = self._reach(device, time, work / factor)
                if end <= until:
                    return Job(started, end, True)
                work = max(work - factor * self._integral(device, time, until), 0.0)
            elif until == math.inf:
                return Job(started, time, False)
            time = until

    def _factor(self, device: int, time: float) -> tuple[float, float]:
        """Return the factor on the speed at `time`, besides the trace, and until when it holds."""
        factor, until = 1.0, math.inf
        if self.timetable is not None and self._on_leave == "pause":
            until = float(self.timetable.next_change(device, time))
            if not self.timetable.is_on(device, time):
                return 0.0, until
        if self._slowdown is not None:
            until = min(until, float(self._slowdown.is_slow.next_change(device, time)))
            if self._slowdown.is_slow.is_on(device, time):
                factor = self._slowdown.factor
        return factor, until

    def _reach(self, device: int, start: float, work: float) -> float:
        if self._traces is None:
            return start + work
        return self._traces.finish(device, start, work)

    def _integral(self, device: int, start: float, end: float) -> float:
        return end - start if self._traces is None else self._traces.work(device, start, end)

    def _leaves(self, device: int, time: float) -> float:
        """Return when a device next goes away (s): now if it is not there, inf if never."""
        if self.timetable is None:
            return math.inf
        if not self.timetable.is_on(device, time):
            return time
        return float(self.timetable.next_change(device, time))

    def _done(self, device: int, job: Job) -> float:
        """Return how much of a dropped job was done, in seconds at the mean speed."""
        done, time = 0.0, job.started
        while time < job.ended:  # never if it did not start
            factor, until = self._factor(device, time)
            until = min(until, job.ended)
            done += factor * self._integral(device, time, until)
            time = until
        return done

    # --- energy -------------------------------------------------------------------------------

    def count_bytes(self, device: int, *, sent: int = 0, received: int = 0) -> None:
        """Count what a device has sent or received; does nothing where energy is not counted."""
        if self._meter is not None:
            self._meter.sent_bytes[device] += sent
            self._meter.received_bytes[device] += received

    def energy(self, time: float) -> FloatArray | None:
        """Return what each device has spent by `time` (J), shape (n_devices,).

        None where energy is not counted. A job counts when it ends; `time` never goes back.
        """
        if self._costs is None or self._meter is None:
            return None
        return energy_joules(
            self._costs,
            samples=self._meter.samples(time),
            sent_bytes=self._meter.sent_bytes,
            received_bytes=self._meter.received_bytes,
            flops_per_sample=self._flops_per_sample,
        )


def make_fleet(
    n_devices: int,
    seed: int,
    *,
    speed: SpeedModel,
    availability: Availability | None = None,
    slowdown: SlowdownModel | None = None,
    on_leave: Literal["pause", "drop"] = "pause",
    energy: EnergyCosts | None = None,
    flops_per_sample: float | None = None,
) -> DeviceFleet:
    """Make a fleet from what a scenario says of it.

    Parameters
    ----------
    n_devices, seed : int
    speed : SpeedModel
    availability : Availability, optional
        By default every device is always there.
    slowdown : SlowdownModel, optional
        By default there is none.
    on_leave, energy, flops_per_sample
        See `DeviceFleet`.

    Raises
    ------
    ScenarioError
        If the parts do not fit the number of devices, or operations per sample are needed and not
        given.
    """
    speeds = speed.start(n_devices, seed, flops_per_sample)
    return DeviceFleet(
        speeds.mean,
        (availability or Always()).start(n_devices, seed),
        traces=speeds.traces,
        slowdown=(slowdown or NoSlowdown()).start(n_devices, seed),
        on_leave=on_leave,
        energy=energy,
        flops_per_sample=flops_per_sample,
    )
