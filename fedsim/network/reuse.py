"""Collectives that do what an earlier one did are not simulated again.

Iterations of training mostly repeat each other. What a collective did while it was alone on a
network that did not change follows from its schedule, its bytes, when its ranks were ready, and
the state of the links. If all of these come again, and nothing can happen before it would be over,
the earlier times and counts hold.

Decision: only where that is certain. The simulation's queue must hold nothing but the collective's
own events until then, the strategy must be waiting for just these replies, no link or device may
change, and nothing may be drawn at random or be recorded transfer by transfer. In all other cases
every message is simulated.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from fedsim.network.clock import At, is_alone
from fedsim.network.exchange import Compute
from fedsim.network.transfers import Network

__all__ = ["Due", "Memory", "Past", "Tally", "Watch"]

FloatArray = NDArray[np.float64]
_MAX_KEPT = 256
_ULPS = 8  # of the clock, by which times that are equal may differ


class Due(At):
    """An event of a collective that disturbs nothing else."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What a collective has sent.

    Attributes
    ----------
    sent, received : tuple of int
        Bytes of each member.
    posted : dict of str to (int, int)
        Way → bytes and messages.
    """

    sent: tuple[int, ...]
    received: tuple[int, ...]
    posted: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def messages(self) -> int:
        """The number of messages."""
        return sum(messages for _, messages in self.posted.values())

    def since(self, before: "Tally") -> "Tally":
        """Return what has been sent after an earlier count."""
        posted = {}
        for way, (size, messages) in self.posted.items():
            was = before.posted.get(way, (0, 0))
            posted[way] = size - was[0], messages - was[1]
        return Tally(
            tuple(b - a for a, b in zip(before.sent, self.sent, strict=True)),
            tuple(b - a for a, b in zip(before.received, self.received, strict=True)),
            posted,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Past:
    """What a collective did, or one bucket of it; times count from its begin (s).

    Attributes
    ----------
    ready : ndarray, shape (n_members, n_buckets)
        When each member had each bucket.
    ends : tuple of float
        When each member was done.
    spans : tuple of (int, float, float)
        Position of each step, from when it began and to when it ended.
    tally : Tally
    carried, busy : ndarray, shape (n_links,)
        Bytes, and seconds.
    """

    ready: FloatArray
    ends: tuple[float, ...]
    spans: tuple[tuple[int, float, float], ...]
    tally: Tally
    carried: FloatArray
    busy: FloatArray

    @property
    def seconds(self) -> float:
        """How long it took."""
        return max(self.ends)


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """What was so when a collective began that may be worth keeping.

    Attributes
    ----------
    begin : float, s
    ready : ndarray, shape (n_members, n_buckets), s from the begin
    tally : Tally
        Of what was sent before.
    """

    begin: float
    ready: FloatArray
    tally: Tally
    key: Hashable
    until: float  # no link or device changes before
    n_released: int
    n_forced: int
    usage: tuple[FloatArray, FloatArray]


class Memory:
    """The collectives of one network that were alone on it.

    Parameters
    ----------
    network, compute
        Who carries and who works.

    Attributes
    ----------
    quiet_until : float, s
        Until when nobody outside the simulation will send or change anything.
    """

    def __init__(self, network: Network, compute: Compute) -> None:
        self.quiet_until = -inf
        self._network = network
        self._compute = compute
        self._kept: dict[Hashable, list[Past]] = {}

    def watch(self, subject: Hashable, ready: FloatArray, tally: Tally) -> Watch | None:
        """Return what to keep a collective by that begins now; None if it cannot come again."""
        network, now = self._network, self._network.env.now
        if not network.is_idle or network.has_draws:
            return None
        state, until = network.outlook()
        return Watch(
            begin=now,
            ready=ready,
            tally=tally,
            key=(subject, state),
            until=min(until, self._compute.next_change(now)),
            n_released=network.n_released,
            n_forced=network.n_forced,
            usage=network.usage(),
        )

    def recall(self, watch: Watch) -> Past | None:
        """Return what such a collective did before, if it is certain to do so again."""
        past = self._find(watch)
        if past is None or self._network.on_close is not None:
            return None
        end = watch.begin + past.seconds
        if end > min(self.quiet_until, watch.until):
            return None
        return past if is_alone(self._network.env, end, Due) else None

    def _find(self, watch: Watch) -> Past | None:
        slack = _ULPS * np.spacing(watch.begin)
        for past in self._kept.get(watch.key, ()):
            if np.abs(past.ready - watch.ready).max(initial=0.0) <= slack:
                return past
        return None

    def keep(
        self,
        watch: Watch,
        tally: Tally,
        ends: Sequence[float],
        spans: Sequence[tuple[int, float, float]],
    ) -> None:
        """Keep what a collective did that ends now, if nothing disturbed it (absolute times)."""
        network, begin = self._network, watch.begin
        sent = tally.since(watch.tally)
        if (
            network.n_released - watch.n_released > sent.messages
            or network.n_forced > watch.n_forced
            or network.env.now > watch.until
            or self._find(watch) is not None
        ):
            return
        if len(self._kept) >= _MAX_KEPT:
            del self._kept[next(iter(self._kept))]
        carried, busy = network.usage()
        self._kept.setdefault(watch.key, []).append(
            Past(
                ready=watch.ready,
                ends=tuple(end - begin for end in ends),
                spans=tuple((p, start - begin, end - begin) for p, start, end in spans),
                tally=sent,
                carried=carried - watch.usage[0],
                busy=busy - watch.usage[1],
            )
        )
