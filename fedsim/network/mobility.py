"""Links between nodes that move: they exist within range, and their rate depends on the distance.

Positions are piecewise linear in time, so the squared distance of two nodes is piecewise quadratic:
the times at which a contact begins, ends or changes its rate are roots, computed and not sampled.

References
----------
.. [1] Navidi, Camp, "Stationary distributions for the random waypoint mobility model", IEEE
   Transactions on Mobile Computing 3(1), 2004.
.. [2] Liang, Haas, "Predictive distance-based mobility management for PCS networks", INFOCOM 1999
   (Gauss–Markov).
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal

import numpy as np

from fedsim.errors import ScenarioError
from fedsim.network.links import DOWN, LinkEnds, LinkHistory, LinkState
from fedsim.streams import stream
from fedsim.units import Duration

__all__ = ["ContactHistory", "Leg", "Mobility", "Track", "crossings"]

_LOOK_AHEAD = 200  # pairs of legs; nodes that never meet must not be followed for ever


@dataclass(frozen=True, slots=True)
class Leg:
    """Straight motion from one time to another.

    Attributes
    ----------
    start, end : float, s
    x, y : float, m
        Position at `start`.
    vx, vy : float, m/s
    """

    start: float
    end: float
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0

    def at(self, time: float) -> tuple[float, float]:
        """Return the position at a time."""
        return self.x + self.vx * (time - self.start), self.y + self.vy * (time - self.start)


class Track:
    """A node's legs, made when they are needed; a leg follows where the last one ended.

    Parameters
    ----------
    legs : iterator of Leg
    """

    def __init__(self, legs: Iterator[Leg]) -> None:
        self._source = legs
        self._legs: list[Leg] = []
        self._starts: list[float] = []

    def leg_at(self, time: float) -> Leg:
        """Return the leg that a time is in."""
        while not self._legs or self._legs[-1].end <= time:
            leg = next(self._source)
            if leg.end > leg.start:
                self._legs.append(leg)
                self._starts.append(leg.start)
        return self._legs[max(bisect_right(self._starts, time) - 1, 0)]

    def position(self, time: float) -> tuple[float, float]:
        """Return where the node is at a time, m."""
        return self.leg_at(time).at(time)


def crossings(a: Leg, b: Leg, radius: float) -> list[float]:
    """Return the times, within both legs, at which the distance of two nodes is `radius`."""
    start, end = max(a.start, b.start), min(a.end, b.end)
    (ax, ay), (bx, by) = a.at(start), b.at(start)
    x, y, vx, vy = ax - bx, ay - by, a.vx - b.vx, a.vy - b.vy
    speed2 = vx * vx + vy * vy
    if speed2 == 0:
        return []
    half = x * vx + y * vy
    # radius² - (closest distance)², without the cancellation of half² - speed² (distance² - r²)
    cross = x * vy - y * vx
    discriminant = radius * radius * speed2 - cross * cross
    if discriminant <= 0:
        return []  # a tangent is no contact
    root = math.sqrt(discriminant)
    # The root that adds numbers of one sign first; the other from the product of both.
    q = -(half + math.copysign(root, half))
    product = x * x + y * y - radius * radius
    times = sorted((q / speed2, product / q)) if q != 0 else [0.0]
    return [start + t for t in times if 0 < t < end - start]


class ContactHistory:
    """The states of a link between two moving nodes.

    Parameters
    ----------
    first, second : Track
    radii : sequence of float, m, ascending
    states : sequence of LinkState
        State k within ``radii[k]`` (and beyond ``radii[k - 1]``); beyond the last the link is down.
    """

    def __init__(
        self, first: Track, second: Track, radii: Sequence[float], states: Sequence[LinkState]
    ) -> None:
        self._first = first
        self._second = second
        self._radii = radii
        self._states = [*states, DOWN]
        self._times = [0.0]
        self._rings = [self._ring(0.0)]
        self._known = 0.0  # all crossings up to here are in the list

    def _ring(self, time: float) -> int:
        (ax, ay), (bx, by) = self._first.position(time), self._second.position(time)
        return bisect_right(self._radii, math.hypot(ax - bx, ay - by) * (1 - 1e-15))

    def _extend(self) -> None:
        """Find the crossings within the next pair of legs."""
        a, b = self._first.leg_at(self._known), self._second.leg_at(self._known)
        start, end = self._known, min(a.end, b.end)
        found = sorted(
            time for radius in self._radii for time in crossings(a, b, radius) if time > start
        )
        # Between two crossings the ring is that of the middle: no rounding at the edge itself.
        for time, after in pairwise([start, *found, end]):
            ring = self._ring(time + 1.0 if after == inf else (time + after) / 2)
            if ring == self._rings[-1]:
                continue
            if time > self._times[-1]:
                self._times.append(time)
                self._rings.append(ring)
            else:
                self._rings[-1] = ring
        self._known = end

    def state_at(self, time: float) -> LinkState:
        """Return the state at a time."""
        while self._known <= time:
            self._extend()
        return self._states[self._rings[bisect_right(self._times, time) - 1]]

    def next_change(self, time: float) -> float:
        """Return the next time at which a radius is crossed, or until when there is none."""
        for _ in range(_LOOK_AHEAD):
            index = bisect_right(self._times, time)
            if index < len(self._times):
                return self._times[index]
            if self._known == inf:
                return inf
            self._extend()
        return self._known


@dataclass(frozen=True, slots=True, kw_only=True)
class Mobility:
    """Links between nodes that move in a square; each exists while its ends are within range.

    The server stands in the middle. Links need to be given for every pair that may meet, for
    example by a complete graph, or by a star (each device and the server).

    Attributes
    ----------
    motion : {"random_waypoint", "gauss_markov"}
        Straight to a random point, a pause, and on, from the stationary distribution; or a speed
        and direction that remember themselves, reflected at the walls.
    side : float, m
        Of the square.
    range : float, m
        Within which a link exists.
    speed_min, speed_max : float, m/s
        Random waypoint: uniform between them, above 0.
    pause : float, s
        Random waypoint: at each point.
    speed : float, m/s
        Gauss–Markov: mean of the velocity's size.
    memory : float
        Gauss–Markov: in [0, 1); 0 forgets at once.
    step : float, s
        Gauss–Markov: between changes of velocity.
    rate : {"disk", "path_loss"}
        All of the link's bandwidth within range; or in `levels` equal steps that fall with the
        distance as Shannon capacity under log-distance path loss does, the last at `range`.
    levels : int
    exponent : float
        Of the path loss: 2 in free space, 3 to 4 in towns.
    efficiency : float, bit/s/Hz
        Spectral efficiency of the full bandwidth (more is not reached however near).
    """

    range: float
    side: float = 1000.0
    motion: Literal["random_waypoint", "gauss_markov"] = "random_waypoint"
    speed_min: float = 0.5
    speed_max: float = 2.0
    pause: Duration = 0.0
    speed: float = 1.0
    memory: float = 0.75
    step: Duration = 1.0
    rate: Literal["disk", "path_loss"] = "disk"
    levels: int = 6
    exponent: float = 3.0
    efficiency: float = 6.0

    def __post_init__(self) -> None:
        rules = [
            (self.range > 0, "range must be positive (m)"),
            (self.side > 0, "side must be positive (m)"),
            (0 < self.speed_min <= self.speed_max, "speed_min must be positive, at most speed_max"),
            (self.pause >= 0, "pause must not be negative"),
            (self.speed > 0, "speed must be positive (m/s)"),
            (0 <= self.memory < 1, "memory must be at least 0 and below 1"),
            (self.step > 0, "step must be positive"),
            (self.levels >= 1, "levels must be at least 1"),
            (self.exponent > 0, "exponent must be positive"),
            (self.efficiency > 0, "efficiency must be positive"),
        ]
        for is_kept, rule in rules:
            if not is_kept:
                raise ScenarioError(
                    f"mobility: {rule}, got {getattr(self, rule.partition(' ')[0])}"
                )

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory:
        """Return the history of one link."""
        tracks = []
        for node in (link.source, link.destination):
            if ("track", node) not in link.shared:
                link.shared["track", node] = self.track(seed, node, is_server=node == link.server)
            tracks.append(link.shared["track", node])
        radii, states = self.rings()
        return ContactHistory(tracks[0], tracks[1], radii, states)

    def rings(self) -> tuple[list[float], list[LinkState]]:
        """Return the radii (m, ascending) at which the rate changes, and the state within each."""
        if self.rate == "disk":
            return [self.range], [LinkState()]
        # SNR at distance d is that at the edge times (range / d)^exponent.
        edge = 2.0 ** (self.efficiency / self.levels) - 1
        radii, states = [], []
        for level in np.arange(self.levels, 0, -1).tolist():
            share = level / self.levels
            snr = 2.0 ** (self.efficiency * share) - 1
            radii.append(self.range * (edge / snr) ** (1 / self.exponent))
            states.append(LinkState(scale=share))
        return radii, states

    def track(self, seed: int, node: int, *, is_server: bool = False) -> Track:
        """Return where a node is over time."""
        if is_server:
            return Track(iter([Leg(0.0, inf, self.side / 2, self.side / 2)]))
        rng = stream(seed, "link-mobility", node)
        legs = self._waypoints(rng) if self.motion == "random_waypoint" else self._drift(rng)
        return Track(legs)

    def _waypoints(self, rng: np.random.Generator) -> Iterator[Leg]:
        """Yield random waypoint legs from the stationary distribution on."""
        low, high, side = self.speed_min, self.speed_max, self.side
        mean_inverse = 1 / low if low == high else math.log(high / low) / (high - low)
        mean_travel = 0.521405433164720 * side * mean_inverse  # mean distance in a unit square
        time = 0.0
        if rng.random() < self.pause / (self.pause + mean_travel):
            x, y = side * rng.random(2)
            wait = self.pause * rng.random()
            yield Leg(time, wait, x, y)
            time = wait
        else:
            # A trip under way: likelier the longer it is, at a uniform point, slower ones likelier.
            while True:
                x0, y0, x1, y1 = rng.random(4)
                if rng.random() < math.hypot(x1 - x0, y1 - y0) / math.sqrt(2):
                    break
            part = rng.random()
            speed = low * (high / low) ** rng.random()
            x, y = side * (x0 + part * (x1 - x0)), side * (y0 + part * (y1 - y0))
            leg = _straight(time, x, y, side * x1, side * y1, speed)
            yield leg
            time, x, y = leg.end, side * x1, side * y1
            yield Leg(time, time + self.pause, x, y)
            time += self.pause
        while True:
            to_x, to_y = side * rng.random(2)
            leg = _straight(time, x, y, to_x, to_y, low + (high - low) * rng.random())
            yield leg
            yield Leg(leg.end, leg.end + self.pause, to_x, to_y)
            time, x, y = leg.end + self.pause, to_x, to_y

    def _drift(self, rng: np.random.Generator) -> Iterator[Leg]:
        """Yield Gauss–Markov legs: each component of the velocity is an AR(1) sequence."""
        # A velocity of two normal components of this spread has the mean size `speed`.
        spread = self.speed * math.sqrt(2 / math.pi)
        x, y = self.side * rng.random(2)
        vx, vy = spread * rng.standard_normal(2)
        noise = spread * math.sqrt(1 - self.memory**2)
        number = 0
        while True:
            time, end = number * self.step, (number + 1) * self.step
            while time < end:
                hit = min(_wall(x, vx, self.side), _wall(y, vy, self.side))
                until = min(end, time + hit)
                leg = Leg(time, until, x, y, vx, vy)
                if until > time:
                    yield leg
                    x, y = leg.at(until)
                if until < end:
                    if _wall(x, vx, self.side) <= 1e-9 * self.step:
                        vx = -vx
                    if _wall(y, vy, self.side) <= 1e-9 * self.step:
                        vy = -vy
                x, y = min(max(x, 0.0), self.side), min(max(y, 0.0), self.side)
                time = until
            vx = self.memory * vx + noise * rng.standard_normal()
            vy = self.memory * vy + noise * rng.standard_normal()
            number += 1


def _straight(time: float, x: float, y: float, to_x: float, to_y: float, speed: float) -> Leg:
    distance = math.hypot(to_x - x, to_y - y)
    travel = distance / speed
    if travel == 0:
        return Leg(time, time, x, y)
    return Leg(time, time + travel, x, y, (to_x - x) / travel, (to_y - y) / travel)


def _wall(x: float, v: float, side: float) -> float:
    """Return the time until a coordinate reaches the wall it moves to."""
    if v > 0:
        return max((side - x) / v, 0.0)
    return max(-x / v, 0.0) if v < 0 else inf
