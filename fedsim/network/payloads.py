"""What there is to say of a payload: where it is to go, how it fared, what it met."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, nan
from typing import Literal, NamedTuple

__all__ = ["Delivery", "LinkDown", "LinkUse", "Outcome", "Spread", "Way"]

Outcome = Literal["delivered", "lost", "failed"]
LinkDown = Literal["stall", "fail", "reroute"]


@dataclass(slots=True)  # not frozen: one is made for each payload, and that takes thrice as long
class Delivery:
    """What became of a payload; not to be changed.

    Attributes
    ----------
    source, destination : int
        Node ids.
    size_bytes : int
        Payload, without headers.
    started, finished : float, s
        When it was sent, and when its last byte arrived or it was given up.
    outcome : {"delivered", "lost", "failed"}
    reason : str
        Why it was lost or failed; empty if delivered.
    first_byte : float, s
        When the first byte of the last attempt arrived; nan if none did.
    attempts : int
    route : tuple of int
        Link ids; `Network.link_name` names them.
    """

    source: int
    destination: int
    size_bytes: int
    started: float
    finished: float
    outcome: Outcome
    reason: str = ""
    first_byte: float = nan
    attempts: int = 1
    route: tuple[int, ...] = ()


class Way(NamedTuple):
    """What a payload meets that is alone on its route.

    Attributes
    ----------
    source, destination : int
    route : tuple of int
        Link ids.
    delay : float, s
        Until the first byte arrives.
    rate_bps : float, bit/s
        Of the narrowest link.
    shared : list of int
        Links of the route on which another payload would slow it down.
    """

    source: int
    destination: int
    route: tuple[int, ...]
    delay: float
    rate_bps: float
    shared: list[int]

    def times(self, n_bits: float, start: float) -> tuple[float, float]:
        """Return when the first and the last bit arrive (s)."""
        first_byte = start + self.delay
        return first_byte, first_byte + n_bits / self.rate_bps


@dataclass(frozen=True, slots=True)
class Spread:
    """How a payload travels that does not take one route by the network's own options.

    Attributes
    ----------
    shares : mapping of int to float
        Link id → share of the payload that crosses it; several routes are used at once, and the
        latency is their mean.
    link_down : {"stall", "fail", "reroute"}
        Instead of the network's `TransferOptions.link_down`.
    detour : callable, optional
        Returns the shares over links that are up now, for ``reroute``; raises where there are none.
    exact_bytes : float, optional
        What takes time on the links, where a payload is cut into equal pieces that are no whole
        bytes.
    """

    shares: Mapping[int, float]
    link_down: LinkDown
    detour: Callable[[], Mapping[int, float]] | None = None
    exact_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What a link has carried.

    Attributes
    ----------
    name : str
    bandwidth_bps, latency : float, bit/s and s
    carried_bytes : float
        Headers and repetitions included.
    busy_time : float, s
        With at least one payload on it (0 for a link of infinite bandwidth).
    """

    name: str
    bandwidth_bps: float
    latency: float
    carried_bytes: float
    busy_time: float

    def utilisation(self, elapsed: float) -> float:
        """Return the share of the nominal capacity of `elapsed` seconds that was used."""
        if elapsed <= 0 or not 0 < self.bandwidth_bps < inf:
            return 0.0
        return 8 * self.carried_bytes / (self.bandwidth_bps * elapsed)
