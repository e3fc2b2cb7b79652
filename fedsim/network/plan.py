"""What a collective is told and what it tells: its plan, its conduct, its report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsim.network.exchange import Trip
from fedsim.network.payloads import Delivery
from topologies.schedules import Schedule

__all__ = ["Bucket", "Conduct", "Hooks", "Plan", "Report", "Span"]


@dataclass(frozen=True, slots=True)
class Conduct:
    """How a group runs its collective.

    Attributes
    ----------
    barrier : {"global", "local"}
        Whether a step begins when all ranks have ended the one before, or each rank goes on by
        itself; and whether replies are available with the last, or each at its own end.
    on_failure : {"error", "reroute", "wait"}
        What a message does whose link is down.
    on_device_failure : {"error", "shrink"}
        What happens if a member goes away: an error, or the others begin again without it.
    step_latency : float, s
        From when a step begins until its messages leave, whatever the hops.
    is_overlapped : bool
        A bucket is sent as soon as back-propagation has made it, not when all work is done.
    """

    barrier: Literal["global", "local"] = "global"
    on_failure: Literal["error", "reroute", "wait"] = "error"
    on_device_failure: Literal["error", "shrink"] = "error"
    step_latency: float = 0.0
    is_overlapped: bool = False


@dataclass(frozen=True, slots=True)
class Bucket:
    """A part of the vector that is synchronised by itself.

    Attributes
    ----------
    size_bytes : int
    ready : float
        Share of a device's last step of optimisation after which it is known.
    """

    size_bytes: int
    ready: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A collective for certain members.

    Attributes
    ----------
    group : str
    conduct : Conduct
    schedule : Schedule
    hosts : tuple of int
        Node of each rank: the members in ascending order, then dedicated servers.
    cut : callable
        Size of the vector (bytes) → its buckets, in the order in which they are sent.
    replan : callable
        Members that are left, one or more → their plan.
    lost : frozenset of int
        Devices that were members and are gone: they pass no messages on.
    """

    group: str
    conduct: Conduct
    schedule: Schedule
    hosts: tuple[int, ...]
    cut: Callable[[int], Sequence[Bucket]]
    replan: Callable[[Sequence[int]], "Plan"]
    lost: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Span:
    """When one step of one bucket ran: from when its first rank began it to its last arrival."""

    bucket: int
    step: int
    started: float
    finished: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a run's time went into, in virtual seconds.

    Attributes
    ----------
    round : int
    group, collective : str
    pushed, finished : float
        When the instructions were pushed, and when the last member was done.
    compute : float
        From the push until the last member's work is done.
    sync : float
        While the collective ran: of each bucket from its first step to its last message with a
        global barrier, from the first rank's first step to the last message with a local one.
    exposed : float
        What compute does not hide of it: from the end of all work to `finished`.
    spans : tuple of Span
    """

    round: int
    group: str
    collective: str
    pushed: float
    finished: float
    compute: float
    sync: float
    exposed: float
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """How long the iteration took."""
        return self.finished - self.pushed


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a run tells and asks whoever made its trips.

    Attributes
    ----------
    load : callable
        Asked once for a trip, when its work is done (begun, if overlapped): the size of its vector
        in bytes, or None if its work has failed and there is nothing to add.
    known : callable
        Asked for a trip at any time: the same size, if it is certain without doing the work.
    post : callable
        Told the way (``peer``; ``up`` or ``down`` to and from a dedicated server) of messages that
        set off, their bytes and their number.
    observe : callable
        Told a member's trip, ``collective``, and what became of a message.
    done : callable
        Told once for each trip, when its reply is available or can no longer come.
    report : callable
        Told once for each run, when it is over.
    """

    load: Callable[[Trip], int | None]
    known: Callable[[Trip], int | None]
    post: Callable[[str, int, int], None]
    observe: Callable[[Trip, str, Delivery], None]
    done: Callable[[Trip], None]
    report: Callable[[Report], None]
