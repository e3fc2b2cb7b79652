"""What devices spend in joules: counted beside a run, changing nothing in it."""

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedsim.errors import ScenarioError
from fedsim.units import Energy

__all__ = ["EnergyCosts", "EnergyMeter", "energy_joules"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyCosts:
    """What a device spends on work and on messages.

    Parameters
    ----------
    per_sample : float, J, optional
        For one training sample; evaluation counts a third.
    per_flop : float, J, optional
        For one operation of the model, instead of `per_sample`.
    per_byte_sent, per_byte_received : float, J
        For one byte of payload and header; lost messages cost their sender as much as others.
    """

    per_sample: Energy | None = None
    per_flop: Energy | None = None
    per_byte_sent: Energy = 0.0
    per_byte_received: Energy = 0.0

    def __post_init__(self) -> None:
        if self.per_sample is not None and self.per_flop is not None:
            raise ScenarioError("give the energy per_sample or per_flop, not both")

    def of_sample(self, flops_per_sample: float | None) -> float:
        """Return what one training sample costs (J).

        Raises
        ------
        ScenarioError
            If it is given per operation and their number is not known.
        """
        if self.per_flop is None:
            return self.per_sample or 0.0
        if not flops_per_sample:
            raise ScenarioError(
                "energy per_flop needs the operations of one sample, which are not known of this "
                "model; give per_sample"
            )
        return self.per_flop * flops_per_sample


def energy_joules(
    costs: EnergyCosts,
    *,
    samples: ArrayLike,
    sent_bytes: ArrayLike,
    received_bytes: ArrayLike,
    flops_per_sample: float | None = None,
) -> FloatArray:
    """Return the energy of work and messages (J), element by element.

    Parameters
    ----------
    costs : EnergyCosts
    samples, sent_bytes, received_bytes : array
        Training samples' worth of work and bytes; shapes broadcast.
    flops_per_sample : float, optional
        Operations of one sample in training; needed with `per_flop`.

    Raises
    ------
    ScenarioError
        If the costs are per operation and `flops_per_sample` is not given.

    Examples
    --------
    >>> costs = EnergyCosts(per_sample=0.02, per_byte_sent=1e-6)
    >>> float(energy_joules(costs, samples=100, sent_bytes=1e6, received_bytes=5))
    3.0
    """
    return np.asarray(
        costs.of_sample(flops_per_sample) * np.asarray(samples, np.float64)
        + costs.per_byte_sent * np.asarray(sent_bytes, np.float64)
        + costs.per_byte_received * np.asarray(received_bytes, np.float64)
    )


class EnergyMeter:
    """What each device has done so far; work counts when it ends.

    Parameters
    ----------
    n_devices : int

    Attributes
    ----------
    sent_bytes, received_bytes : ndarray, shape (n_devices,)
    """

    def __init__(self, n_devices: int) -> None:
        self.sent_bytes = np.zeros(n_devices)
        self.received_bytes = np.zeros(n_devices)
        self._samples = np.zeros(n_devices)
        self._open: list[tuple[float, int, float]] = []  # heap of (end, device, samples)

    def add_work(self, device: int, end: float, samples: float) -> None:
        """Count work that ends at `end` (s)."""
        heappush(self._open, (end, device, samples))

    def samples(self, time: float) -> FloatArray:
        """Return the work that each device has done by `time` (s), which never goes back."""
        while self._open and self._open[0][0] <= time:
            _, device, samples = heappop(self._open)
            self._samples[device] += samples
        return self._samples
