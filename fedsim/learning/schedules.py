"""Learning-rate schedules: the factor on the learning rate as a function of the round.

Each is a frozen dataclass that maps an array of rounds (from 1) to an array of factors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError

__all__ = ["Cosine", "Exponential", "InverseSqrt", "Schedule", "StepDecay"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Schedule = Callable[[IntArray], FloatArray]


@dataclass(frozen=True, slots=True)
class StepDecay:
    """Multiply by `factor` after every `every` rounds.

    Parameters
    ----------
    every : int
        Rounds at one rate.
    factor : float
    """

    every: int
    factor: float = 0.1

    def __post_init__(self) -> None:
        _positive("every", self.every)
        _positive("factor", self.factor)

    def __call__(self, rounds: IntArray) -> FloatArray:
        """Return the factor in each of the rounds."""
        return np.asarray(self.factor ** ((rounds - 1) // self.every), float)


@dataclass(frozen=True, slots=True)
class Exponential:
    """Multiply by `factor` after every round.

    Parameters
    ----------
    factor : float
        0.99 halves the rate in 69 rounds.
    """

    factor: float

    def __post_init__(self) -> None:
        _positive("factor", self.factor)

    def __call__(self, rounds: IntArray) -> FloatArray:
        """Return the factor in each of the rounds."""
        return np.asarray(self.factor ** (rounds - 1.0))


@dataclass(frozen=True, slots=True)
class Cosine:
    """Fall from 1 to `floor` along half a cosine, after a linear warm-up.

    Parameters
    ----------
    rounds : int
        The round in which the floor is reached; it is kept from then on.
    floor : float
    warmup : int
        Rounds in which the factor rises linearly to 1.
    """

    rounds: int
    floor: float = 0.0
    warmup: int = 0

    def __post_init__(self) -> None:
        _positive("rounds", self.rounds - self.warmup)

    def __call__(self, rounds: IntArray) -> FloatArray:
        """Return the factor in each of the rounds."""
        done = np.clip((rounds - 1 - self.warmup) / max(self.rounds - 1 - self.warmup, 1), 0, 1)
        fallen = self.floor + (1 - self.floor) * 0.5 * (1 + np.cos(np.pi * done))
        return np.where(rounds <= self.warmup, rounds / max(self.warmup, 1), fallen)


@dataclass(frozen=True, slots=True)
class InverseSqrt:
    """1 / sqrt(round), the classical choice for stochastic gradients of convex problems."""

    def __call__(self, rounds: IntArray) -> FloatArray:
        """Return the factor in each of the rounds."""
        return np.asarray(1.0 / np.sqrt(rounds))


def _positive(name: str, value: float) -> None:
    if not value > 0:
        raise ScenarioError(f"training.schedule.{name}: {value} is not above 0")
