"""How links vary in virtual time: each model a small frozen dataclass, each link its own history.

A model is what the user writes (``kind: on_off, mean_up: 60 s``); `bind` makes the history of one
link from it, which answers `state_at(time)` and `next_change(time)`, whatever was asked before.
Nothing is scheduled by a history: the network asks only while a flow uses the link.

Decision: both directions of one physical link (``up-17`` and ``down-17``; ``3>7`` and ``7>3``)
share a history, because what cuts or slows a radio cuts or slows it both ways. A history depends
on (seed, kind, name of the physical link) alone: links added elsewhere never change it.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, Protocol

import numpy as np

from fedsim.errors import ScenarioError
from fedsim.streams import digest, stream, uniform
from fedsim.units import Duration

__all__ = [
    "Burst",
    "Constant",
    "Correlated",
    "GilbertElliott",
    "LinkEnds",
    "LinkHistory",
    "LinkModel",
    "LinkState",
    "OnOff",
    "Redraw",
    "RoundHistory",
    "Sinusoid",
    "Steps",
    "TwoStates",
]

_BLOCK = 16  # sojourns drawn at a time


@dataclass(frozen=True, slots=True)
class Burst:
    """Losses that come in bursts: a two-state chain that steps with each packet.

    Attributes
    ----------
    to_bad, to_good : float
        Probabilities of leaving the good and the bad state at a packet.
    loss_good, loss_bad : float
        Probability that a packet is lost in each state.
    """

    to_bad: float
    to_good: float
    loss_good: float
    loss_bad: float

    @property
    def mean_loss(self) -> float:
        """Long-run share of packets that are lost."""
        bad = self.to_bad / (self.to_bad + self.to_good)
        return (1 - bad) * self.loss_good + bad * self.loss_bad

    def survival(self, n_packets: int) -> float:
        """Return the probability that n packets in a row all arrive, from the stationary state.

        In closed form: the n-th power of the 2 × 2 matrix of steps that lose nothing.
        """
        bad = self.to_bad / (self.to_bad + self.to_good)
        keep = np.diag([1 - self.loss_good, 1 - self.loss_bad])
        move = np.array([[1 - self.to_bad, self.to_bad], [self.to_good, 1 - self.to_good]])
        start = np.array([1 - bad, bad])
        return float(start @ np.linalg.matrix_power(keep @ move, n_packets) @ np.ones(2))


@dataclass(frozen=True, slots=True)
class LinkState:
    """What a link is like for a while.

    Attributes
    ----------
    is_up : bool
        Whether it exists; `TransferOptions.link_down` says what becomes of payloads on it.
    scale : float
        Factor on the bandwidth.
    bandwidth_bps : float or None
        Replaces the link's own bandwidth; None keeps it.
    loss : float
        Probability that a packet is lost, in [0, 1), added to the link's own.
    burst : Burst or None
        How losses follow each other within a message; None: independently.
    """

    is_up: bool = True
    scale: float = 1.0
    bandwidth_bps: float | None = None
    loss: float = 0.0
    burst: Burst | None = None


UP = LinkState()
DOWN = LinkState(is_up=False)


@dataclass(frozen=True, slots=True)
class LinkEnds:
    """Which physical link a history is for.

    Attributes
    ----------
    name : str
    source, destination : int
        Its nodes, the smaller first.
    server : int or None
        The node that is the server.
    shared : mapping
        Where histories of one network keep what they have in common, such as a node's positions.
    """

    name: str
    source: int
    destination: int
    server: int | None = None
    shared: MutableMapping[Any, Any] = field(default_factory=dict)


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


class RoundHistory:
    """A link that is drawn anew for each round of training: up with probability `density`."""

    def __init__(self, density: float, seed: int, name: str) -> None:
        self._density = density
        self._seed = seed
        self._word = digest(name)
        self._state = UP
        self.start_round(0)

    def start_round(self, number: int) -> None:
        """Draw the state for a round."""
        draw = uniform(self._seed, "link-redraw", number, np.uint64(self._word))
        self._state = UP if draw < self._density else DOWN

    def state_at(self, time: float) -> LinkState:
        """Return the state of this round."""
        return self._state

    def next_change(self, time: float) -> float:
        """Return inf: when the round ends is not known in virtual time."""
        return inf


class PeriodicHistory:
    """A history whose state k, of period k, is a function of k.

    Parameters
    ----------
    period : float, s
    state_of : callable
        Period number → LinkState.
    """

    def __init__(self, period: float, state_of: Callable[[int], LinkState]) -> None:
        self._period = period
        self._state_of = state_of

    def _number(self, time: float) -> int:
        number = math.floor(time / self._period)
        return number + 1 if (number + 1) * self._period <= time else number

    def state_at(self, time: float) -> LinkState:
        """Return the state of the period."""
        return self._state_of(self._number(time))

    def next_change(self, time: float) -> float:
        """Return the end of the period."""
        return (self._number(time) + 1) * self._period


class Layered:
    """Several histories of one link: up if all are, slowed down by each."""

    def __init__(self, layers: Sequence[LinkHistory]) -> None:
        self._layers = layers

    def state_at(self, time: float) -> LinkState:
        """Return the states of all layers together."""
        states = [layer.state_at(time) for layer in self._layers]
        return LinkState(
            is_up=all(state.is_up for state in states),
            scale=math.prod(state.scale for state in states),
        )

    def next_change(self, time: float) -> float:
        """Return the first change of any layer."""
        return min(layer.next_change(time) for layer in self._layers)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class GilbertElliott:
    """Links that are good or bad for a while: loss and capacity of a two-state Markov chain.

    Give `mean_good` and `mean_bad` for a chain in time, whose changes are changes of the link; or
    `to_bad` and `to_good` for a chain that steps with each packet of a message (for
    ``loss: drop``), where only the message's chance to arrive whole depends on it.

    Attributes
    ----------
    mean_good, mean_bad : float, s
        Mean sojourns; the stationary share of bad time is ``mean_bad / (mean_good + mean_bad)``.
    to_bad, to_good : float
        Probabilities of a change at a packet; the mean burst is ``1 / to_good`` packets.
    loss_good, loss_bad : float
        Probability that a packet is lost, in [0, 1); what it does is `TransferOptions.loss`.
    scale_good, scale_bad : float
        Factors on the bandwidth (chain in time only).

    References
    ----------
    .. [1] Gilbert, "Capacity of a burst-noise channel", BSTJ 39, 1960; Elliott, BSTJ 42, 1963.
    """

    mean_good: Duration | None = None
    mean_bad: Duration | None = None
    to_bad: float | None = None
    to_good: float | None = None
    loss_good: float = 0.0
    loss_bad: float = 0.0
    scale_good: float = 1.0
    scale_bad: float = 1.0

    def __post_init__(self) -> None:
        in_time = self.mean_good is not None and self.mean_bad is not None
        by_packet = self.to_bad is not None and self.to_good is not None
        if in_time == by_packet:
            raise ScenarioError(
                "gilbert_elliott: give mean_good and mean_bad, or to_bad and to_good"
            )
        for name in ("mean_good", "mean_bad", "to_bad", "to_good"):
            value = getattr(self, name)
            most = 1.0 if name.startswith("to") else inf
            if value is not None and not 0 < value <= most:
                raise ScenarioError(f"gilbert_elliott: {name} must be positive, got {value}")
        for name in ("loss_good", "loss_bad"):
            if not 0 <= getattr(self, name) < 1:
                raise ScenarioError(
                    f"gilbert_elliott: {name} must be at least 0 and below 1, "
                    f"got {getattr(self, name)}"
                )
        if min(self.scale_good, self.scale_bad) < 0:
            raise ScenarioError("gilbert_elliott: scale_good and scale_bad must not be negative")

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory:
        """Return the history of one link."""
        if self.to_bad is not None and self.to_good is not None:
            burst = Burst(self.to_bad, self.to_good, self.loss_good, self.loss_bad)
            return Steps([0.0], [LinkState(loss=burst.mean_loss, burst=burst)])
        assert self.mean_good is not None
        assert self.mean_bad is not None
        return TwoStates(
            (
                LinkState(scale=self.scale_good, loss=self.loss_good),
                LinkState(scale=self.scale_bad, loss=self.loss_bad),
            ),
            (self.mean_good, self.mean_bad),
            rng=stream(seed, "link-gilbert-elliott", link.name),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinusoid:
    """Links whose bandwidth follows the time of day.

    The factor on the bandwidth is ``1 + amplitude · sin(2π (time + phase) / period)``, in steps,
    each with its exact mean over the step, so that whole steps carry exactly as many bytes.

    Attributes
    ----------
    period : float, s
    amplitude : float
        In [0, 1].
    phase : float, s, or "random"
        ``random``: one of its own for each link.
    steps : int
        Steps in a period.
    """

    period: Duration = 86_400.0
    amplitude: float = 0.5
    phase: Duration | Literal["random"] = 0.0
    steps: int = 48

    def __post_init__(self) -> None:
        if not self.period > 0 or not 0 <= self.amplitude <= 1 or self.steps < 2:
            raise ScenarioError(
                "sinusoid: period must be positive, amplitude within 0 and 1, steps at least 2; "
                f"got {self.period:g} s, {self.amplitude:g} and {self.steps}"
            )

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory:
        """Return the history of one link."""
        shift = self.phase
        if shift == "random":
            shift = self.period * float(stream(seed, "link-sinusoid", link.name).random())
        turn = 2 * math.pi / self.steps
        offset = 2 * math.pi * float(shift) / self.period

        def state_of(number: int) -> LinkState:
            angle = turn * (number % self.steps) + offset
            mean = (math.cos(angle) - math.cos(angle + turn)) / turn
            return LinkState(scale=max(1 + self.amplitude * mean, 0.0))

        return PeriodicHistory(self.period / self.steps, state_of)


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlated:
    """Links that fail together: each cell of nodes (a radio cell, a rack, a region) goes as one.

    Attributes
    ----------
    mean_up, mean_down : float, s
        Mean sojourns of a cell (exponential).
    cells : int, optional
        Node i belongs to cell i modulo this number.
    groups : list of lists of int, optional
        The nodes of each cell instead; nodes in none never fail. A link is up while the cells of
        both of its ends are; the server is in no cell unless it is named here.
    """

    mean_up: Duration
    mean_down: Duration
    cells: int | None = None
    groups: list[list[int]] | None = None

    def __post_init__(self) -> None:
        if not (self.mean_up > 0 and self.mean_down > 0):
            raise ScenarioError(
                f"correlated: mean_up and mean_down must be positive, "
                f"got {self.mean_up} s and {self.mean_down} s"
            )
        if (self.cells is None) == (self.groups is None) or (self.cells or 1) < 1:
            raise ScenarioError("correlated: give either cells (1 or more) or groups")

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory | None:
        """Return the history of one link; None if its ends are in no cell."""
        cells = sorted(
            {
                cell
                for node in (link.source, link.destination)
                if (cell := self._cell(node, link)) is not None
            }
        )
        for cell in cells:
            if ("cell", cell) not in link.shared:
                link.shared["cell", cell] = TwoStates(
                    (UP, DOWN),
                    (self.mean_up, self.mean_down),
                    rng=stream(seed, "link-correlated", cell),
                )
        if not cells:
            return None
        return Layered([link.shared["cell", cell] for cell in cells])

    def _cell(self, node: int, link: LinkEnds) -> int | None:
        if self.groups is None:
            assert self.cells is not None
            return None if node == link.server else node % self.cells
        return next((cell for cell, nodes in enumerate(self.groups) if node in nodes), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraw:
    """Links drawn anew again and again: each is up with probability `density`.

    Attributes
    ----------
    density : float
        In [0, 1].
    period : float, s, optional
        Time between draws. Without it the draws belong to rounds of training (see
        `Network.start_round`), and payloads that are on their way when a round ends finish.
    """

    density: float
    period: Duration | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.density <= 1 or (self.period is not None and not self.period > 0):
            raise ScenarioError(
                "redraw: density must be within 0 and 1, period positive; "
                f"got {self.density} and {self.period}"
            )

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory:
        """Return the history of one link."""
        if self.period is None:
            return RoundHistory(self.density, seed, link.name)
        word = np.uint64(digest(link.name))

        def state_of(number: int) -> LinkState:
            is_up = uniform(seed, "link-redraw", number, word) < self.density
            return UP if is_up else DOWN

        return PeriodicHistory(self.period, state_of)
