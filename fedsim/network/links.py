"""How links vary in virtual time: each model a small frozen dataclass, each link its own history.

A model is what the user writes (``kind: on_off, mean_up: 60 s``); `bind` makes the history of one
link from it, which answers `state_at(time)` and `next_change(time)`, whatever was asked before.
Nothing is scheduled by a history: the network asks only while a flow uses the link.

Decision: both directions of one physical link (``up-17`` and ``down-17``; ``3>7`` and ``7>3``)
share a history, because what cuts or slows a radio cuts or slows it both ways. A history depends
on (seed, kind, name of the physical link) alone: links added elsewhere never change it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol

import numpy as np

from fedsim.errors import ScenarioError
from fedsim.streams import stream
from fedsim.units import Duration

__all__ = [
    "Constant",
    "LinkEnds",
    "LinkHistory",
    "LinkModel",
    "LinkState",
    "OnOff",
]

_BLOCK = 16  # sojourns drawn at a time


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a link is like for a while.

    Attributes
    ----------
    is_up : bool
        Whether it exists; what happens to flows on a link that goes down is `Protocol.link_down`.
    scale : float
        Factor on the bandwidth.
    bandwidth_bps : float or None
        Replaces the link's own bandwidth; None keeps it.
    loss : float
        Probability that a packet is lost, in [0, 1), added to the link's own.
    """

    is_up: bool = True
    scale: float = 1.0
    bandwidth_bps: float | None = None
    loss: float = 0.0


UP = LinkState()
DOWN = LinkState(is_up=False)


@dataclass(frozen=True, slots=True)
class LinkEnds:
    """Which physical link a history is for."""

    name: str
    source: int
    destination: int
    bandwidth_bps: float = inf


class LinkHistory(Protocol):
    """The states of one link over virtual time."""

    def state_at(self, time: float) -> LinkState:
        """Return the state at a time (a change at that time has happened)."""

    def next_change(self, time: float) -> float:
        """Return the first time after `time` at which the state may change; inf if never."""


class LinkModel(Protocol):
    """How links vary."""

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory | None:
        """Return the history of one link; None if it never varies."""


@dataclass(frozen=True, slots=True)
class Constant:
    """Links that never change."""

    def bind(self, seed: int, link: LinkEnds) -> None:
        """Return None: there is no history."""


class Steps:
    """A history that is known in advance: state k holds from time k to the next, the last for good.

    Parameters
    ----------
    times : sequence of float, s
        Ascending, beginning at 0.
    states : sequence of LinkState
    """

    def __init__(self, times: Sequence[float], states: Sequence[LinkState]) -> None:
        self._times = times
        self._states = states

    def state_at(self, time: float) -> LinkState:
        """Return the state at a time."""
        return self._states[max(bisect_right(self._times, time) - 1, 0)]

    def next_change(self, time: float) -> float:
        """Return the next time in the list."""
        index = bisect_right(self._times, time)
        return self._times[index] if index < len(self._times) else inf


class TwoStates:
    """A history that alternates between two states; sojourns are drawn when they are needed.

    Parameters
    ----------
    states : pair of LinkState
    means : pair of float, s
        Mean sojourn in each state; 0 skips the state, inf never leaves it.
    is_fixed : bool
        Sojourns last exactly their mean instead of being exponential.
    rng : numpy.random.Generator
    first : int or None
        State at time 0; None draws it, and the time left in it, from the stationary law.
    """

    def __init__(
        self,
        states: tuple[LinkState, LinkState],
        means: tuple[float, float],
        *,
        rng: np.random.Generator,
        is_fixed: bool = False,
        first: int | None = None,
    ) -> None:
        self._states = states
        self._means = means
        self._is_fixed = is_fixed
        self._rng = rng
        draw, part = rng.random(2)
        if first is None:
            first = int(draw * (means[0] + means[1]) >= means[0]) if means[0] < inf else 0
            residual = means[first] * part if is_fixed else self._draw(means[first])
        else:
            residual = self._draw(means[first])
        self._first = first
        self._changes = [residual]  # change k leaves state (first + k) % 2

    def _draw(self, mean: float) -> float:
        return mean if self._is_fixed or mean == inf else float(self._rng.exponential(mean))

    def _reach(self, time: float) -> None:
        changes = self._changes
        while changes[-1] <= time:
            last = changes[-1]
            for _ in range(_BLOCK):
                last += self._draw(self._means[(self._first + len(changes)) % 2])
                changes.append(last)
                if last == inf:
                    break

    def state_at(self, time: float) -> LinkState:
        """Return the state at a time."""
        self._reach(time)
        return self._states[(self._first + bisect_right(self._changes, time)) % 2]

    def next_change(self, time: float) -> float:
        """Return the end of the present sojourn."""
        self._reach(time)
        return self._changes[bisect_right(self._changes, time)]


@dataclass(frozen=True, slots=True)
class OnOff:
    """Links that come and go: an alternating renewal process.

    Attributes
    ----------
    mean_up, mean_down : float, s
        Mean sojourns; the share of time up is ``mean_up / (mean_up + mean_down)``.
    sojourn : {"exponential", "fixed"}
        Markov, or exactly the means with a phase of its own for each link.
    initial : {"stationary", "up", "down"}
        State at time 0.
    """

    mean_up: Duration
    mean_down: Duration
    sojourn: Literal["exponential", "fixed"] = "exponential"
    initial: Literal["stationary", "up", "down"] = "stationary"

    def __post_init__(self) -> None:
        if not (self.mean_up > 0 and self.mean_down > 0):
            raise ScenarioError(
                f"on_off: mean_up and mean_down must be positive, "
                f"got {self.mean_up} s and {self.mean_down} s"
            )

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory:
        """Return the history of one link."""
        first = {"stationary": None, "up": 0, "down": 1}[self.initial]
        return TwoStates(
            (UP, DOWN),
            (self.mean_up, self.mean_down),
            rng=stream(seed, "link-on-off", link.name),
            is_fixed=self.sojourn == "fixed",
            first=first,
        )
