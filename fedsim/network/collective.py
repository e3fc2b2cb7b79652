"""Collectives: devices work, then add up their vectors by a schedule, step by step.

The instructions of one push that name one group form a *run*: each member works, and the schedule's
messages then travel the network as ordinary transfers, beside whatever else is on it. With a global
barrier a step begins when the last message of the one before has arrived; with a local one each
rank goes on as soon as its own messages have come and gone. The instructions themselves travel at
no cost: a device's state lives on the device.

Decision: a vector is cut into equal pieces, whatever its bytes: pieces take time by their exact
size, and are counted by the whole bytes that fall into them. So the times are those of
`fedsim whatif`, and the counts add up to the vector.

Decision: nothing is waited for in vain and no sum is silently wrong. A message that cannot arrive
ends the simulation with an error that names link, step and ranks, unless `Conduct` says how to go
on. Where a device is lost and the others go on without it, they begin the vector again, all of it,
so that every piece is the sum over the same devices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import simpy

from fedsim.network.clock import At
from fedsim.network.exchange import Compute, Trip
from fedsim.network.lanes import Lanes, Script
from fedsim.network.plan import Hooks, Plan
from fedsim.network.reuse import Memory, Past
from fedsim.network.runs import Member, Progress, Run
from fedsim.network.transfers import Network

__all__ = ["Collectives"]

_MAX_SCRIPTS = 64


class Collectives:
    """All collectives on one network.

    Parameters
    ----------
    network, compute
        Who carries and who works.
    hooks : Hooks
    header_bytes : int
        Added to every message.

    Attributes
    ----------
    memory : Memory
        What collectives did, so that it need not be simulated again.
    runs : dict
        The collectives that are not over, in the order of their begin.
    """

    def __init__(
        self, network: Network, compute: Compute, hooks: Hooks, *, header_bytes: int = 0
    ) -> None:
        self.network = network
        self.compute = compute
        self.hooks = hooks
        self.header_bytes = header_bytes
        self.memory = Memory(network, compute)
        self.runs: dict[Run[Any], None] = {}
        self._scripts: dict[tuple[int, tuple[int, ...], frozenset[int]], Script] = {}

    @cached_property
    def lanes(self) -> Lanes:
        """The routes of messages, worked out when the first collective begins."""
        return Lanes(self.network)

    def begin(self, trips: Sequence[Trip], plan: Plan) -> None:
        """Start the members of one group.

        Parameters
        ----------
        trips : sequence of Trip
            Of different devices, ascending.
        plan : Plan
            For these devices.
        """
        kind = _TogetherRun if plan.conduct.barrier == "global" else _ApartRun
        run: Run[Any] = kind(self, trips, plan)
        self.runs[run] = None
        At(self.network.env, self.network.env.now, run.start)

    def why_stuck(self) -> str | None:
        """Say where the first run stands that is not over; None if all are."""
        return next((run.place() for run in self.runs), None)

    def script(self, plan: Plan) -> Script:
        """Return what a plan's schedule means on the network; worked out once."""
        key = id(plan.schedule), plan.hosts, plan.lost
        if key not in self._scripts:
            if len(self._scripts) >= _MAX_SCRIPTS:
                del self._scripts[next(iter(self._scripts))]
            self._scripts[key] = Script(plan, self.lanes)
        return self._scripts[key]


# --- a global barrier -----------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Together(Progress):
    """How far all ranks are."""

    position: int = 0
    is_begun: bool = False  # this position
    n_open: int = 0  # messages of it


class _TogetherRun(Run[_Together]):
    """A run in which all ranks are in the same step."""

    def __init__(self, host: Collectives, trips: Sequence[Trip], plan: Plan) -> None:
        self._sync = 0.0
        super().__init__(host, trips, plan)

    def _progress(self, script: Script, roster: list[Member]) -> _Together:
        return _Together(script, roster)

    @property
    def sync(self) -> float:
        """Seconds of all buckets, each from its first step to its last message."""
        return self._sync

    def _go_on(self, member: Member) -> None:
        self._begin_step(self._now)

    def _begin_step(self, now: _Together) -> None:
        """Begin the next step, if the one before has ended and all have its bucket."""
        bucket, step = divmod(now.position, now.script.n_steps)
        if now.is_begun or not all(member.n_ready > bucket for member in now.roster):
            return
        now.is_begun = True
        begin = self._env.now
        if step == 0:
            together = np.zeros((len(now.roster), 1))
            past = self._recall((self.buckets[bucket].size_bytes,), together)
            if past is not None:
                self._at(begin + past.seconds, partial(self._repeat_bucket, now, past, begin))
                return
        now.began[now.position] = begin
        self._at(begin + self.plan.conduct.step_latency, partial(self._send_step, now))

    def _send_step(self, now: _Together, _: simpy.Event) -> None:
        now.n_open = len(now.script.messages[now.position % now.script.n_steps])
        if self._send(now, now.position, range(now.n_open)) and not now.n_open:
            self._end_step(now)

    def _has_arrived(self, now: _Together, position: int, ranks: tuple[int, int]) -> None:
        now.n_open -= 1
        if not now.n_open:
            self._end_step(now)

    def _end_step(self, now: _Together) -> None:
        now.ended[now.position] = self._env.now
        now.position += 1
        now.is_begun = False
        if now.position % now.script.n_steps:
            self._begin_step(now)
            return
        first = now.position - now.script.n_steps
        self._keep(range(first, now.position), [self._env.now] * len(now.roster))
        self._end_bucket(now, now.began[first])

    def _repeat_bucket(self, now: _Together, past: Past, begin: float, _: simpy.Event) -> None:
        """End a bucket that went as an earlier one did."""
        if now is self._now:
            self._repeat(past, begin, now.position)
            now.position += now.script.n_steps
            now.is_begun = False
            self._end_bucket(now, begin)

    def _end_bucket(self, now: _Together, begin: float) -> None:
        self._sync += self._env.now - begin
        if now.position < now.script.n_steps * len(self.buckets):
            self._begin_step(now)
        else:
            self._end(now.roster)

    def _is_dropped(self, now: _Together) -> None:
        begin = now.began.get(now.position - now.position % now.script.n_steps)
        if now.is_begun and begin is not None:
            self._sync += self._env.now - begin


# --- a local barrier ------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Rank:
    """Where one rank is."""

    position: int = 0
    is_begun: bool = False  # this position: it waits for the step's latency, or more
    is_sent: bool = False  # its messages of it
    ended: float = 0.0  # the position before


@dataclass(slots=True, eq=False)
class _Apart(Progress):
    """How far each rank is."""

    ranks: list[_Rank] = field(default_factory=list)
    waits: dict[int, list[int]] = field(default_factory=dict)  # position → of each rank
    is_repeated: bool = False


class _ApartRun(Run[_Apart]):
    """A run in which each rank goes on by itself."""

    def __init__(self, host: Collectives, trips: Sequence[Trip], plan: Plan) -> None:
        self._first = math.nan  # when the first rank began
        super().__init__(host, trips, plan)

    def _progress(self, script: Script, roster: list[Member]) -> _Apart:
        return _Apart(script, roster, ranks=[_Rank() for _ in self.plan.hosts])

    @property
    def sync(self) -> float:
        """Seconds from the first rank's first step to the last message."""
        return self._env.now - self._first

    def _go_on(self, member: Member) -> None:
        now = self._now
        if math.isnan(self._first):
            self._first = self._env.now
        if not now.began and not now.is_repeated:
            self._try_to_repeat(now)
        if not now.is_repeated:
            self._advance(now, member.rank)
            for server in range(len(now.roster), len(now.ranks)):
                self._advance(now, server)

    def _advance(self, now: _Apart, number: int) -> None:
        """Let a rank leave its step if all is done there, and begin the next if it can."""
        rank, n_steps = now.ranks[number], now.script.n_steps
        member = now.roster[number] if number < len(now.roster) else None
        if rank.is_sent and not self._waits(now, rank.position)[number]:
            if now.script.waits[rank.position % n_steps][number]:
                rank.ended = self._env.now
            rank.position += 1
            if rank.position % n_steps > now.script.last[number]:  # no more part in this bucket
                rank.position += n_steps - rank.position % n_steps
            rank.is_begun = rank.is_sent = False
            if member is not None and rank.position == n_steps * len(self.buckets):
                self._end_member(now, member)
        bucket, step = divmod(rank.position, n_steps)
        if rank.is_begun or bucket == len(self.buckets):
            return
        if member is not None and member.n_ready <= bucket:
            return
        if step == 0:
            rank.ended = self._env.now
        rank.is_begun = True
        now.began.setdefault(rank.position, rank.ended)
        begin = rank.ended + self.plan.conduct.step_latency
        self._at(begin, partial(self._send_own, now, number))

    def _waits(self, now: _Apart, position: int) -> list[int]:
        """Return how many messages each rank still waits for in a step, its own included."""
        if position not in now.waits:
            now.waits[position] = list(now.script.waits[position % now.script.n_steps])
        return now.waits[position]

    def _send_own(self, now: _Apart, number: int, _: simpy.Event) -> None:
        rank = now.ranks[number]
        rank.is_sent = True
        rows = now.script.rows[rank.position % now.script.n_steps].get(number, ())
        if self._send(now, rank.position, rows):
            self._advance(now, number)

    def _has_arrived(self, now: _Apart, position: int, ranks: tuple[int, int]) -> None:
        waits = self._waits(now, position)
        for number in ranks:
            waits[number] -= 1
            self._advance(now, number)

    def _end_member(self, now: _Apart, member: Member) -> None:
        if all(other.is_over or other is member for other in now.roster):
            ends = [self._env.now if m is member else m.trip.finished for m in now.roster]
            self._keep(sorted(now.ended), ends)
        self._end([member])

    def _try_to_repeat(self, now: _Apart) -> None:
        """Let all go as in an earlier run, if it is certain to; the first bucket is ready."""
        trips = [member.trip for member in now.roster]
        if any(math.isnan(trip.computed) for trip in trips):
            return
        whole, known = sum(bucket.size_bytes for bucket in self.buckets), self._host.hooks.known
        if any(member.n_ready == 0 and known(member.trip) != whole for member in now.roster):
            return  # the work of one may fail, or weigh something else
        begin, sizes = self._env.now, tuple(bucket.size_bytes for bucket in self.buckets)
        ready = np.array([self._ready_times(trip) for trip in trips]) - begin
        past = self._recall(sizes, ready)
        if past is not None:
            now.is_repeated = True
            for member, end in zip(now.roster, past.ends, strict=True):
                self._at(begin + end, partial(self._repeat_member, now, past, begin, member))

    def _repeat_member(
        self, now: _Apart, past: Past, begin: float, member: Member, _: simpy.Event
    ) -> None:
        """End a member's part as in an earlier run; the first to end counts for all."""
        if now is self._now:
            if not now.began:
                self._repeat(past, begin, 0)
            self._end([member])
