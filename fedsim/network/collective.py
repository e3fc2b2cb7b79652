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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal, cast

import numpy as np
import simpy
from numpy.typing import NDArray

from fedsim.errors import NetworkError, PayloadError
from fedsim.network.exchange import Compute, Trip, then
from fedsim.network.lanes import Lanes, Shares
from fedsim.network.reuse import Due, Memory, Past, Watch
from fedsim.network.transfers import Delivery, LinkDown, Network, Spread, Transfer
from topologies.schedules import Schedule

__all__ = ["Bucket", "Collectives", "Conduct", "Hooks", "Plan", "Report", "Span"]

FloatArray = NDArray[np.float64]

_LINK_DOWN: dict[str, LinkDown] = {"error": "fail", "reroute": "reroute", "wait": "stall"}


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
        Members that are left, two or more → their plan.
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
    post: Callable[[str, int, int], None]
    observe: Callable[[Trip, str, Delivery], None]
    done: Callable[[Trip], None]
    report: Callable[[Report], None]


class Collectives:
    """All collectives on one network.

    Parameters
    ----------
    network, compute
        Who carries and who works.
    hooks : Hooks
    header_bytes : int
        Added to every message.
    """

    def __init__(
        self, network: Network, compute: Compute, hooks: Hooks, *, header_bytes: int = 0
    ) -> None:
        self.network = network
        self.compute = compute
        self.hooks = hooks
        self.header_bytes = header_bytes
        self.memory = Memory(network, compute)
        self.runs: dict[_Run, None] = {}
        self._scripts: dict[tuple[int, tuple[int, ...], frozenset[int]], _Script] = {}

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
        run = _Run(self, trips, plan)
        self.runs[run] = None
        _at(self.network.env, self.network.env.now, lambda _: run.start())

    def why_stuck(self) -> str | None:
        """Say where the first run stands that is not over; None if all are."""
        return next((run.place() for run in self.runs), None)

    def script(self, plan: Plan) -> "_Script":
        """Return what a plan's schedule means on the network; worked out once."""
        key = id(plan.schedule), plan.hosts, plan.lost
        if key not in self._scripts:
            if len(self._scripts) >= _MAX_SCRIPTS:
                del self._scripts[next(iter(self._scripts))]
            self._scripts[key] = _Script(plan, self.lanes)
        return self._scripts[key]


_MAX_SCRIPTS = 64


class _Script:
    """A schedule's steps as nodes, routes and pieces; ranks as rows to send and to wait for."""

    def __init__(self, plan: Plan, lanes: Lanes) -> None:
        self.schedule = schedule = plan.schedule
        self.n_steps = len(schedule.steps)
        columns = [
            (s.source.tolist(), s.destination.tolist(), s.lo.tolist(), s.hi.tolist())
            for s in schedule.steps
        ]
        self.messages = [list(zip(*column, strict=True)) for column in columns]
        known: dict[tuple[bytes, bytes], list[Shares]] = {}
        self.shares: list[list[Shares]] = []
        self.rows: list[dict[int, list[int]]] = []  # of each step: rank → messages it sends
        self.waits: list[list[int]] = []  # of each step and rank: messages to and from it
        for number, step in enumerate(schedule.steps):
            key = step.source.tobytes(), step.destination.tobytes()
            if key not in known:
                known[key] = self._routes(number, plan, lanes)
            self.shares.append(known[key])
            rows: dict[int, list[int]] = {}
            for row, source in enumerate(step.source.tolist()):
                rows.setdefault(source, []).append(row)
            self.rows.append(rows)
            ends = np.concatenate([step.source, step.destination])
            self.waits.append(np.bincount(ends, minlength=schedule.ranks).tolist())

    def _routes(self, number: int, plan: Plan, lanes: Lanes) -> list[Shares]:
        sources = [plan.hosts[a] for a, _, _, _ in self.messages[number]]
        destinations = [plan.hosts[b] for _, b, _, _ in self.messages[number]]
        try:
            return lanes.between(sources, destinations, plan.lost)
        except ValueError as error:
            raise NetworkError(f"step {number} of {self.schedule.name}: {error}") from error


@dataclass(slots=True, eq=False)
class _Member:
    """One device's part in a run."""

    trip: Trip
    number: int = 0  # its rank
    n_ready: int = 0  # buckets that it can send
    is_over: bool = False


@dataclass(slots=True, eq=False)
class _Rank:
    """Where one rank is, with a local barrier."""

    position: int = 0
    has_begun: bool = False  # this position: its messages are out
    is_called: bool = False  # its release is on the calendar
    ended: float = 0.0  # the position before


@dataclass(slots=True, eq=False)
class _Progress:
    """How far a run is; made anew when it begins again. A position is a step of a bucket."""

    roster: list[_Member]  # of each rank that is no dedicated server
    script: _Script | None = None  # None: one member is left, and has nothing to send
    ranks: list[_Rank] = field(default_factory=list)
    position: int = 0  # with a global barrier
    is_called: bool = False
    n_open: int = 0
    waits: dict[int, list[int]] = field(default_factory=dict)  # position → of each rank
    began: dict[int, float] = field(default_factory=dict)  # position → time
    ended: dict[int, float] = field(default_factory=dict)
    transfers: dict[Transfer, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Tally:
    """What a run has sent and received so far."""

    sent: tuple[int, ...]  # by each member
    received: tuple[int, ...]
    posted: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, now: _Progress, posted: dict[str, tuple[int, int]]) -> "_Tally":
        trips = [member.trip for member in now.roster]
        sent, received = zip(*((t.bytes_up, t.bytes_down) for t in trips), strict=True)
        return cls(sent, received, dict(posted))


class _Run:
    """One collective of one group."""

    def __init__(self, owner: Collectives, trips: Sequence[Trip], plan: Plan) -> None:
        self.owner = owner
        self.plan = plan
        self.buckets: Sequence[Bucket] = ()
        self._trips = trips
        self._size: tuple[int, int] | None = None  # of a vector, and whose
        self._env = owner.network.env
        self._pushed = self._env.now
        self._first = math.nan  # when the first step began
        self._posted: dict[str, tuple[int, int]] = {}  # way → bytes and messages
        self._watch: Watch | None = None
        self._tally: _Tally | None = None  # when the watch began
        self._sync = 0.0
        self._is_global = plan.conduct.barrier == "global"
        self._is_over = False
        self._now = self._progress([_Member(trip) for trip in trips])
        for trip in trips:
            trip.transfer = self

    def _progress(self, roster: list[_Member]) -> _Progress:
        for number, member in enumerate(roster):
            member.number = number
        if len(roster) < 2:
            return _Progress(roster)
        return _Progress(roster, self.owner.script(self.plan), [_Rank() for _ in self.plan.hosts])

    def place(self) -> str:
        """Say what the run is doing."""
        open_ = sorted(p for p in self._now.began if p not in self._now.ended)
        if not open_:
            return f"group {self.plan.group!r} waits for its members' work"
        return f"group {self.plan.group!r} is in {self._step(open_[0])}"

    def cancel(self) -> None:
        """Take all messages off the network and give the members up."""
        if self._is_over:
            return
        self._drop_transfers()
        for member in self._now.roster:
            if not member.is_over:
                self._close(member, "cancelled")
        self._finish()

    # The members' work

    def start(self) -> None:
        """Let all members take up their instructions."""
        env, compute = self._env, self.owner.compute
        for member in list(self._now.roster):
            trip = member.trip
            if not self._is_there(trip.device):
                self._lose(member, "offline")
                continue
            trip.received = env.now
            trip.started, ended, is_done = compute.occupy(trip.device, env.now, trip.samples)
            if not is_done:
                _at(env, ended, partial(self._lose_at, member))
                continue
            trip.computed = ended
            begin = trip.started if self.plan.conduct.is_overlapped else ended
            _at(env, begin, partial(self._load, member))

    def _is_there(self, device: int) -> bool:
        is_online = self.owner.compute.is_available(device, self._env.now)
        return is_online and not self.owner.network.is_dead(device)

    def _lose_at(self, member: _Member, _: simpy.Event) -> None:
        self._lose(member, "failed-device")

    def _load(self, member: _Member, _: simpy.Event) -> None:
        """Note the size of a member's vector, and when its buckets are ready."""
        trip = member.trip
        if self._is_over or member.is_over:
            return
        size = self.owner.hooks.load(trip)
        if size is None:
            _at(self._env, trip.computed, partial(self._lose_at, member))
            return
        if self._size is None:
            self._size = size, trip.device
            self.buckets = self.plan.cut(size)
        elif size != self._size[0]:
            raise PayloadError(
                f"group {self.plan.group!r}: the vectors of a collective must have one size, but "
                f"device {self._size[1]} has {self._size[0]} bytes and device {trip.device} {size}"
            )
        if not self.plan.conduct.is_overlapped:
            self._make_ready(member, len(self.buckets))
            return
        for number, known in enumerate(self._ready_times(trip), start=1):
            _at(self._env, known, partial(self._make_ready, member, number))

    def _ready_times(self, trip: Trip) -> list[float]:
        """Return when a member has each bucket."""
        step = (trip.computed - trip.started) * trip.last_step
        if not self.plan.conduct.is_overlapped:
            step = 0.0
        return [trip.computed - step * (1.0 - bucket.ready) for bucket in self.buckets]

    def _make_ready(self, member: _Member, n_buckets: int, _: simpy.Event | None = None) -> None:
        member.n_ready = n_buckets
        self._go_on(member)

    def _go_on(self, member: _Member) -> None:
        """Let the run take its next step, now that a member has more of its vector ready."""
        now = self._now
        if self._is_over or member.is_over or not member.n_ready:
            return
        if now.script is None:
            if member.n_ready == len(self.buckets):
                self._end([member])
        elif self._is_global:
            self._begin_step(now)
        elif not now.is_called:
            if math.isnan(self._first):
                self._first = self._env.now
            if not now.began and self._repeats_run(now):
                now.is_called = True
                return
            self._advance(now, member.number)
            for server in range(len(now.roster), len(now.ranks)):
                self._advance(now, server)

    # A global barrier

    def _begin_step(self, now: _Progress) -> None:
        """Begin the next step, if the one before has ended and all have its bucket."""
        assert now.script is not None
        bucket, step = divmod(now.position, now.script.n_steps)
        if now.is_called or not all(member.n_ready > bucket for member in now.roster):
            return
        now.is_called = True
        if math.isnan(self._first):
            self._first = self._env.now
        if step == 0:
            size = self.buckets[bucket].size_bytes
            past = self._recall(now, (size,), np.zeros((len(now.roster), 1)))
            if past is not None:
                end = self._env.now + past.seconds
                _at(self._env, end, partial(self._repeat_bucket, now, past, self._env.now))
                return
        now.began[now.position] = self._env.now
        begin = self._env.now + self.plan.conduct.step_latency
        n_messages = len(now.script.messages[step])
        _at(self._env, begin, lambda _: self._send_all(now, n_messages))

    def _send_all(self, now: _Progress, n_messages: int) -> None:
        now.n_open = n_messages
        if self._send(now, now.position, range(n_messages)) and not n_messages:
            self._end_step(now)

    def _end_step(self, now: _Progress) -> None:
        assert now.script is not None
        now.ended[now.position] = self._env.now
        now.position += 1
        if now.position % now.script.n_steps == 0:
            first = now.position - now.script.n_steps
            self._keep(now, range(first, now.position), [self._env.now] * len(now.roster))
            self._end_bucket(now, now.began[first])
        else:
            now.is_called = False
            self._begin_step(now)

    def _repeat_bucket(self, now: _Progress, past: Past, begin: float, _: simpy.Event) -> None:
        """End a bucket that went as an earlier one did."""
        if now is not self._now:
            return
        assert now.script is not None
        self._repeat(now, past, begin, now.position)
        now.position += now.script.n_steps
        self._end_bucket(now, begin)

    def _end_bucket(self, now: _Progress, begin: float) -> None:
        assert now.script is not None
        now.is_called = False
        self._sync += self._env.now - begin
        if now.position < now.script.n_steps * len(self.buckets):
            self._begin_step(now)
        else:
            self._end(now.roster)

    # A local barrier

    def _advance(self, now: _Progress, number: int) -> None:
        """Let a rank leave its step if all is done there, and begin the next if it can."""
        assert now.script is not None
        rank, n_steps = now.ranks[number], now.script.n_steps
        step = rank.position % n_steps
        if rank.has_begun and not self._waits(now, rank.position)[number]:
            if now.script.waits[step][number]:
                rank.ended = self._env.now
            rank.position += 1
            rank.has_begun = False
            if rank.position == n_steps * len(self.buckets) and number < len(now.roster):
                self._end([now.roster[number]])
        bucket, step = divmod(rank.position, n_steps)
        if bucket == len(self.buckets) or rank.has_begun or rank.is_called:
            return
        if number < len(now.roster) and now.roster[number].n_ready <= bucket:
            return
        if step == 0:
            rank.ended = self._env.now
        rank.is_called = True
        now.began.setdefault(rank.position, rank.ended)
        begin = rank.ended + self.plan.conduct.step_latency
        _at(self._env, begin, lambda _: self._send_own(now, number))

    def _repeats_run(self, now: _Progress) -> bool:
        """Let all go as in an earlier run, if it is certain to; the first bucket is ready."""
        trips = [member.trip for member in now.roster]
        if any(math.isnan(trip.computed) for trip in trips):
            return False
        begin, sizes = self._env.now, tuple(bucket.size_bytes for bucket in self.buckets)
        ready = np.array([self._ready_times(trip) for trip in trips]) - begin
        past = self._recall(now, sizes, ready)
        if past is None:
            return False
        for member, end in zip(now.roster, past.ends, strict=True):
            _at(self._env, begin + end, partial(self._repeat_member, now, past, begin, member))
        return True

    def _repeat_member(
        self, now: _Progress, past: Past, begin: float, member: _Member, _: simpy.Event
    ) -> None:
        """End a member's part that went as an earlier one did; the first to end counts for all."""
        if now is not self._now:
            return
        if not now.began:
            self._repeat(now, past, begin, 0)
        self._end([member])

    def _waits(self, now: _Progress, position: int) -> list[int]:
        """Return how many messages each rank still waits for in a step, its own included."""
        if position not in now.waits:
            assert now.script is not None
            now.waits[position] = list(now.script.waits[position % now.script.n_steps])
        return now.waits[position]

    def _send_own(self, now: _Progress, number: int) -> None:
        assert now.script is not None
        rank = now.ranks[number]
        rank.is_called, rank.has_begun = False, True
        rows = now.script.rows[rank.position % now.script.n_steps].get(number, ())
        if self._send(now, rank.position, rows):
            self._advance(now, number)

    # One message

    def _send(self, now: _Progress, position: int, rows: Iterable[int]) -> bool:
        """Send some messages of a step; tell if the run still goes on as it did."""
        for row in rows:
            if now is not self._now:
                return False
            self._post(now, position, row)
        return now is self._now

    def _post(self, now: _Progress, position: int, row: int) -> None:
        assert now.script is not None
        owner, conduct, script = self.owner, self.plan.conduct, now.script
        bucket, step = divmod(position, script.n_steps)
        a, b, lo, hi = script.messages[step][row]
        source, destination = self.plan.hosts[a], self.plan.hosts[b]
        if a < len(now.roster):
            member = now.roster[a]
            if not self._is_there(source):
                self._lose(member, "offline")
                return
        whole, chunks = self.buckets[bucket].size_bytes, script.schedule.chunks
        size = hi * whole // chunks - lo * whole // chunks + owner.header_bytes
        spread = Spread(
            script.shares[step][row],
            _LINK_DOWN[conduct.on_failure],
            partial(self._detour, position, row) if conduct.on_failure == "reroute" else None,
            (hi - lo) * whole / chunks + owner.header_bytes,
        )
        if a < len(now.roster):
            member.trip.bytes_up += size
            owner.compute.count_bytes(source, sent=size)
        way = _way(now, a, b)
        posted = self._posted.get(way, (0, 0))
        self._posted[way] = posted[0] + size, posted[1] + 1
        owner.hooks.post(way, size, 1)
        transfer = owner.network.transfer(source, destination, size, spread=spread)
        now.transfers[transfer] = None
        then(transfer, partial(self._arrive, now, position, row, transfer))

    def _arrive(
        self, now: _Progress, position: int, row: int, transfer: Transfer, event: simpy.Event
    ) -> None:
        """Note that a message is there, and let those go on who waited for it."""
        assert now.script is not None
        del now.transfers[transfer]
        delivery = cast(Delivery, event.value)
        a, b, _, _ = now.script.messages[position % now.script.n_steps][row]
        receiver = now.roster[b] if b < len(now.roster) else None
        if delivery.outcome == "delivered" and receiver is not None:
            compute, device = self.owner.compute, receiver.trip.device
            if compute.is_available(device, self._env.now):
                receiver.trip.bytes_down += delivery.size_bytes
                compute.count_bytes(device, received=delivery.size_bytes)
            else:
                delivery = replace(delivery, outcome="lost", reason=f"device {device} is offline")
        trip = now.roster[a if a < len(now.roster) else b].trip
        self.owner.hooks.observe(trip, "collective", delivery)
        if now is not self._now:
            return
        if delivery.outcome != "delivered":
            self._fail(now, position, row, delivery)
        elif self._is_global:
            now.n_open -= 1
            if not now.n_open:
                self._end_step(now)
        else:
            now.ended[position] = self._env.now
            waits = self._waits(now, position)
            for number in (a, b):
                waits[number] -= 1
                self._advance(now, number)

    # What fails

    def _step(self, position: int) -> str:
        assert self._now.script is not None
        number = position % self._now.script.n_steps
        return f"step {number} of {self.plan.schedule.name}"

    def _ranks(self, position: int, row: int) -> str:
        assert self._now.script is not None
        a, b, _, _ = self._now.script.messages[position % self._now.script.n_steps][row]
        return f"in {self._step(position)}: rank {a} sends to rank {b}"

    def _detour(self, position: int, row: int) -> Shares:
        """Return a message's links around what is down."""
        script, network = self._now.script, self.owner.network
        assert script is not None
        step = position % script.n_steps
        a, b, _, _ = script.messages[step][row]
        source, destination = self.plan.hosts[a], self.plan.hosts[b]
        if network.is_dead(source) or network.is_dead(destination):
            return script.shares[step][row]  # it fails at once, with its node
        try:
            return self.owner.lanes.detour(source, destination, self.plan.lost)
        except ValueError as error:
            raise NetworkError(
                f"{error} at {self._env.now:g} s, {self._ranks(position, row)}"
            ) from error

    def _fail(self, now: _Progress, position: int, row: int, delivery: Delivery) -> None:
        """Go on without a device that is gone, or say what cannot go on."""
        gone = [member for member in now.roster if not self._is_there(member.trip.device)]
        if gone:
            self._lose(gone[0], "failed-device")
            return
        hint = "exchange.on_failure: 'reroute' or 'wait' goes on"
        if delivery.outcome == "lost":
            hint = "network.retries sends a lost message again"
        raise NetworkError(
            f"{delivery.reason} at {self._env.now:g} s, {self._ranks(position, row)} ({hint})"
        )

    def _lose(self, member: _Member, outcome: str) -> None:
        """Go on without a member, if that is wanted."""
        if member.is_over or self._is_over:
            return
        device, time = member.trip.device, self._env.now
        lost = f"device {device} is gone at {time:g} s, while {self.place()}"
        if self.plan.conduct.on_device_failure == "error":
            raise NetworkError(f"{lost} (exchange.on_device_failure: 'shrink' goes on without it)")
        others = [other for other in self._now.roster if other is not member]
        if any(other.is_over for other in others):
            raise NetworkError(
                f"{lost}, and other devices already have the sum: they cannot go on without it "
                "(with exchange.barrier 'global' they could)"
            )
        self._close(member, outcome)
        self._drop_transfers()
        if len(others) > 1:
            self.plan = self.plan.replan([other.trip.device for other in others])
        self._now = self._progress(others)
        if not others:
            self._finish()
        for other in others:
            self._go_on(other)

    def _drop_transfers(self) -> None:
        """Take all messages off the network; what comes of them later concerns nobody."""
        now, self._now = self._now, _Progress(self._now.roster)
        self._watch = None
        if self._is_global and now.script is not None and now.is_called:
            begin = now.position - now.position % now.script.n_steps
            self._sync += self._env.now - now.began.get(begin, self._env.now)
        for transfer in list(now.transfers):
            transfer.cancel()

    # What went before

    def _recall(self, now: _Progress, sizes: tuple[int, ...], ready: FloatArray) -> Past | None:
        """Return what such a run or bucket did before; else see to it that it can be kept."""
        conduct, memory = self.plan.conduct, self.owner.memory
        subject = now.script, sizes, conduct
        self._watch = memory.watch(subject, ready) if len(self.owner.runs) == 1 else None
        past = None if self._watch is None else memory.recall(self._watch)
        self._tally = _Tally.of(now, self._posted)
        return past

    def _keep(self, now: _Progress, positions: range, ends: Sequence[float]) -> None:
        """Keep what has just ended, if nothing disturbed it."""
        if self._watch is None or self._tally is None:
            return
        before, after = self._tally, _Tally.of(now, self._posted)
        self.owner.memory.keep(
            self._watch,
            ends=ends,
            spans=[(p - positions[0], now.began[p], now.ended[p]) for p in positions],
            sent=[b - a for a, b in zip(before.sent, after.sent, strict=True)],
            received=[b - a for a, b in zip(before.received, after.received, strict=True)],
            posted={
                way: (
                    size - before.posted.get(way, (0, 0))[0],
                    n - before.posted.get(way, (0, 0))[1],
                )
                for way, (size, n) in after.posted.items()
            },
        )

    def _repeat(self, now: _Progress, past: Past, begin: float, position: int) -> None:
        """Count what is not simulated."""
        owner = self.owner
        for step, start, end in past.spans:
            now.began[position + step] = begin + start
            now.ended[position + step] = begin + end
        for member, sent, received in zip(now.roster, past.sent, past.received, strict=True):
            member.trip.bytes_up += sent
            member.trip.bytes_down += received
            owner.compute.count_bytes(member.trip.device, sent=sent, received=received)
        for way, (size, n_messages) in past.posted.items():
            owner.hooks.post(way, size, n_messages)
        owner.network.add_usage(past.carried, past.busy)

    # The end

    def _end(self, members: Sequence[_Member]) -> None:
        """Let members have the sum."""
        devices = tuple(member.trip.device for member in self._now.roster)
        for member in members:
            number = member.number
            member.trip.neighbours = devices[:number] + devices[number + 1 :]
            self._close(member, "ok")
        if all(member.is_over for member in self._now.roster):
            self._finish()

    def _close(self, member: _Member, outcome: str) -> None:
        trip = member.trip
        member.is_over = True
        trip.outcome, trip.finished, trip.transfer = outcome, self._env.now, None
        self.owner.hooks.done(trip)

    def _finish(self) -> None:
        """Close the run."""
        now, env = self._now, self._env
        self._is_over = True
        del self.owner.runs[self]
        computed = [t.computed for t in self._trips if t.outcome == "ok"]
        if not computed:
            return
        if not self._is_global and not now.is_called:
            self._keep(now, range(len(now.ended)), [m.trip.finished for m in now.roster])
        n_steps = now.script.n_steps if now.script else 1
        sync = self._sync
        if not self._is_global and not math.isnan(self._first):
            sync = env.now - self._first
        self.owner.hooks.report(
            Report(
                round=self._trips[0].round,
                group=self.plan.group,
                collective=self.plan.schedule.name,
                pushed=self._pushed,
                finished=env.now,
                compute=max(computed) - self._pushed,
                sync=sync,
                exposed=env.now - max(computed),
                spans=tuple(
                    Span(*divmod(position, n_steps), now.began[position], now.ended[position])
                    for position in sorted(now.ended)
                ),
            )
        )


def _way(now: _Progress, source: int, destination: int) -> str:
    """Return how records call a message between two ranks."""
    n = len(now.roster)
    return "up" if destination >= n else "down" if source >= n else "peer"


def _at(env: simpy.Environment, time: float, callback: Callable[[simpy.Event], None]) -> None:
    """Call back at a time, by an event that is known to disturb nothing else."""
    then(Due(env, max(time - env.now, 0.0)), callback)
