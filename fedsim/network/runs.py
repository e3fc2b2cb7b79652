"""One collective of one group: its members, their messages, and what happens if some are lost.

Which step comes when is the business of `fedsim.network.collective`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import simpy
from numpy.typing import NDArray

from fedsim.errors import NetworkError, PayloadError
from fedsim.network.exchange import Compute, Trip, then
from fedsim.network.lanes import Lanes, Script, Shares
from fedsim.network.payloads import Delivery, LinkDown, Spread
from fedsim.network.plan import Bucket, Hooks, Plan, Report, Span
from fedsim.network.reuse import Due, Memory, Past, Tally, Watch
from fedsim.network.transfers import Network, Transfer

__all__ = ["Host", "Member", "Progress", "Run"]

FloatArray = NDArray[np.float64]

_LINK_DOWN: dict[str, LinkDown] = {"error": "fail", "reroute": "reroute", "wait": "stall"}


class Host(Protocol):
    """What runs share; see `fedsim.network.collective.Collectives`."""

    network: Network
    compute: Compute
    hooks: Hooks
    header_bytes: int
    memory: Memory
    runs: dict["Run[Any]", None]

    @property
    def lanes(self) -> Lanes:
        """The routes of messages."""

    def script(self, plan: Plan) -> Script:
        """Return what a plan's schedule means on the network."""


@dataclass(slots=True, eq=False)
class Member:
    """One device's part in a run."""

    trip: Trip
    rank: int = 0
    n_ready: int = 0  # buckets that it can send
    is_over: bool = False


@dataclass(slots=True, eq=False)
class Progress:
    """How far a run is; made anew when it begins again. A position is a step of a bucket."""

    script: Script
    roster: list[Member]  # of each rank that is no dedicated server
    began: dict[int, float] = field(default_factory=dict)  # position → time
    ended: dict[int, float] = field(default_factory=dict)
    transfers: dict[Transfer, int] = field(default_factory=dict)  # under way → position


P = TypeVar("P", bound=Progress)


class Run(Generic[P]):
    """One collective of one group.

    Parameters
    ----------
    host : Host
    trips : sequence of Trip
        The members', by rank.
    plan : Plan
    """

    def __init__(self, host: Host, trips: Sequence[Trip], plan: Plan) -> None:
        self.plan = plan
        self.buckets: Sequence[Bucket] = ()
        self._host = host
        self._env = host.network.env
        self._trips = trips
        self._size: tuple[int, int] | None = None  # of a vector, and whose
        self._pushed = self._env.now
        self._posted: dict[str, tuple[int, int]] = {}  # way → bytes and messages
        self._watch: Watch | None = None
        self._is_over = False
        self._now = self._begin_with([Member(trip) for trip in trips])
        for trip in trips:
            trip.transfer = self

    # What barriers differ in

    def _progress(self, script: Script, roster: list[Member]) -> P:
        """Return the progress of a run that has not begun."""
        raise NotImplementedError

    def _go_on(self, member: Member) -> None:
        """Take the next step, now that a member has more of its vector ready."""
        raise NotImplementedError

    def _has_arrived(self, now: P, position: int, ranks: tuple[int, int]) -> None:
        """Take the next step, now that a message between two ranks is there."""
        raise NotImplementedError

    def _is_dropped(self, now: P) -> None:
        """Note that nothing comes of this progress."""

    @property
    def sync(self) -> float:
        """Seconds for which the collective was under way, now that it is over."""
        raise NotImplementedError

    # From outside

    def place(self) -> str:
        """Say what the run is doing."""
        now = self._now
        if not now.began:
            return f"group {self.plan.group!r} waits for its members' work"
        position = min(now.transfers.values(), default=max(now.began))
        return f"group {self.plan.group!r} is in {self._step(position)}"

    def cancel(self) -> None:
        """Take all messages off the network and give the members up."""
        if self._is_over:
            return
        members = self._now.roster
        self._drop()
        for member in members:
            if not member.is_over:
                self._close(member, "cancelled")
        self._finish()

    def start(self, _: simpy.Event) -> None:
        """Let all members take up their instructions."""
        env, compute = self._env, self._host.compute
        for member in list(self._now.roster):
            trip = member.trip
            if not self._is_there(trip.device):
                self._lose(member, "offline")
                continue
            trip.received = env.now
            trip.started, ended, is_done = compute.occupy(trip.device, env.now, trip.samples)
            if not is_done:
                self._at(ended, partial(self._fail_at, member))
                continue
            trip.computed = ended
            begin = trip.started if self.plan.conduct.is_overlapped else ended
            self._at(begin, partial(self._load, member))

    # The members' work

    def _begin_with(self, roster: list[Member]) -> P:
        """Return the progress of a run of these members that has not begun."""
        for rank, member in enumerate(roster):
            member.rank = rank
        return self._progress(self._host.script(self.plan), roster)

    def _at(self, time: float, callback: Callable[[simpy.Event], None]) -> None:
        """Call back at a time, by an event that is known to disturb nothing else."""
        Due(self._env, time, callback)

    def _is_there(self, device: int) -> bool:
        is_online = self._host.compute.is_available(device, self._env.now)
        return is_online and not self._host.network.is_dead(device)

    def _fail_at(self, member: Member, _: simpy.Event) -> None:
        self._lose(member, "failed-device")

    def _load(self, member: Member, _: simpy.Event) -> None:
        """Note the size of a member's vector, and when its buckets are ready."""
        trip = member.trip
        if self._is_over or member.is_over:
            return
        size = self._host.hooks.load(trip)
        if size is None:
            self._at(trip.computed, partial(self._fail_at, member))
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
            self._at(known, partial(self._make_ready, member, number))

    def _ready_times(self, trip: Trip) -> list[float]:
        """Return when a member has each bucket."""
        step = (trip.computed - trip.started) * trip.last_step
        if not self.plan.conduct.is_overlapped:
            step = 0.0
        return [trip.computed - step * (1.0 - bucket.ready) for bucket in self.buckets]

    def _make_ready(self, member: Member, n_buckets: int, _: simpy.Event | None = None) -> None:
        member.n_ready = n_buckets
        if not (self._is_over or member.is_over):
            self._go_on(member)

    # One message

    def _send(self, now: P, position: int, rows: Iterable[int]) -> bool:
        """Send some messages of a step; tell if the run still goes on as it did."""
        for row in rows:
            if now is not self._now:
                return False
            self._post(now, position, row)
        return now is self._now

    def _post(self, now: P, position: int, row: int) -> None:
        host, conduct, script = self._host, self.plan.conduct, now.script
        bucket, step = divmod(position, script.n_steps)
        a, b, lo, hi = script.messages[step][row]
        source, destination = self.plan.hosts[a], self.plan.hosts[b]
        whole, chunks = self.buckets[bucket].size_bytes, script.schedule.chunks
        size = hi * whole // chunks - lo * whole // chunks + host.header_bytes
        if a < len(now.roster):
            sender = now.roster[a]
            if not self._is_there(source):
                self._lose(sender, "offline")
                return
            sender.trip.bytes_up += size
            host.compute.count_bytes(source, sent=size)
        spread = Spread(
            script.shares[step][row],
            _LINK_DOWN[conduct.on_failure],
            partial(self._detour, position, row) if conduct.on_failure == "reroute" else None,
            (hi - lo) * whole / chunks + host.header_bytes,
        )
        way = "up" if b >= len(now.roster) else "down" if a >= len(now.roster) else "peer"
        posted = self._posted.get(way, (0, 0))
        self._posted[way] = posted[0] + size, posted[1] + 1
        host.hooks.post(way, size, 1)
        transfer = host.network.transfer(source, destination, size, spread=spread)
        now.transfers[transfer] = position
        then(transfer, partial(self._arrive, now, position, row, transfer))

    def _arrive(
        self, now: P, position: int, row: int, transfer: Transfer, event: simpy.Event
    ) -> None:
        """Note what became of a message, and let those go on who waited for it."""
        del now.transfers[transfer]
        delivery = cast(Delivery, event.value)
        a, b, _, _ = now.script.messages[position % now.script.n_steps][row]
        if delivery.outcome == "delivered" and b < len(now.roster):
            trip, compute = now.roster[b].trip, self._host.compute
            if compute.is_available(trip.device, self._env.now):
                trip.bytes_down += delivery.size_bytes
                compute.count_bytes(trip.device, received=delivery.size_bytes)
            else:
                reason = f"device {trip.device} is offline"
                delivery = replace(delivery, outcome="lost", reason=reason)
        trip = now.roster[a if a < len(now.roster) else b].trip
        self._host.hooks.observe(trip, "collective", delivery)
        if now is not self._now:
            return
        if delivery.outcome == "delivered":
            now.ended[position] = self._env.now
            self._has_arrived(now, position, (a, b))
        else:
            self._fail(now, position, row, delivery)

    # What fails

    def _step(self, position: int) -> str:
        return f"step {position % self._now.script.n_steps} of {self.plan.schedule.name}"

    def _sending(self, position: int, row: int) -> str:
        a, b, _, _ = self._now.script.messages[position % self._now.script.n_steps][row]
        return f"in {self._step(position)}: rank {a} sends to rank {b}"

    def _detour(self, position: int, row: int) -> Shares:
        """Return a message's links around what is down."""
        script, network = self._now.script, self._host.network
        step = position % script.n_steps
        a, b, _, _ = script.messages[step][row]
        source, destination = self.plan.hosts[a], self.plan.hosts[b]
        if network.is_dead(source) or network.is_dead(destination):
            return script.shares[step][row]  # it fails at once, with its node
        try:
            return self._host.lanes.detour(source, destination, self.plan.lost)
        except ValueError as error:
            place = self._sending(position, row)
            raise NetworkError(f"{error} at {self._env.now:g} s, {place}") from error

    def _fail(self, now: P, position: int, row: int, delivery: Delivery) -> None:
        """Go on without a device that is gone, or say what cannot go on."""
        gone = [member for member in now.roster if not self._is_there(member.trip.device)]
        if gone:
            self._lose(gone[0], "failed-device")
            return
        hint = "exchange.on_failure: 'reroute' or 'wait' goes on"
        if delivery.outcome == "lost":
            hint = "network.retries sends a lost message again"
        place = self._sending(position, row)
        raise NetworkError(f"{delivery.reason} at {self._env.now:g} s, {place} ({hint})")

    def _lose(self, member: Member, outcome: str) -> None:
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
        self._drop()
        if not others:
            self._finish()
            return
        self.plan = self.plan.replan([other.trip.device for other in others])
        self._now = self._begin_with(others)
        for other in others:
            if other.n_ready and not self._is_over:
                self._go_on(other)

    def _drop(self) -> None:
        """Take all messages off the network; what comes of them later concerns nobody."""
        now, self._now = self._now, self._progress(self._now.script, self._now.roster)
        self._watch = None
        self._is_dropped(now)
        for transfer in list(now.transfers):
            transfer.cancel()

    # What went before

    def _recall(self, sizes: tuple[int, ...], ready: FloatArray) -> Past | None:
        """Return what such a run or bucket did before; else see to it that it can be kept."""
        memory, self._watch = self._host.memory, None
        if len(self._host.runs) > 1:
            return None
        subject = self._now.script, sizes, self.plan.conduct
        self._watch = memory.watch(subject, ready, self._tally())
        return None if self._watch is None else memory.recall(self._watch)

    def _tally(self) -> Tally:
        trips = [member.trip for member in self._now.roster]
        sent, received = (tuple(getattr(t, k) for t in trips) for k in ("bytes_up", "bytes_down"))
        return Tally(sent, received, dict(self._posted))

    def _keep(self, positions: Sequence[int], ends: Sequence[float]) -> None:
        """Keep what has just ended, if nothing disturbed it."""
        if self._watch is not None:
            began, ended = self._now.began, self._now.ended
            spans = [(p - positions[0], began[p], ended[p]) for p in positions]
            self._host.memory.keep(self._watch, self._tally(), ends, spans)

    def _repeat(self, past: Past, begin: float, position: int) -> None:
        """Count what is not simulated."""
        now, host, tally = self._now, self._host, past.tally
        for step, start, end in past.spans:
            now.began[position + step] = begin + start
            now.ended[position + step] = begin + end
        for member, sent, received in zip(now.roster, tally.sent, tally.received, strict=True):
            member.trip.bytes_up += sent
            member.trip.bytes_down += received
            host.compute.count_bytes(member.trip.device, sent=sent, received=received)
        for way, (size, n_messages) in tally.posted.items():
            host.hooks.post(way, size, n_messages)
        host.network.add_usage(past.carried, past.busy)

    # The end

    def _end(self, members: Sequence[Member]) -> None:
        """Let members have the sum."""
        devices = tuple(member.trip.device for member in self._now.roster)
        for member in members:
            member.trip.neighbours = devices[: member.rank] + devices[member.rank + 1 :]
            self._close(member, "ok")
        if all(member.is_over for member in self._now.roster):
            self._finish()

    def _close(self, member: Member, outcome: str) -> None:
        trip = member.trip
        member.is_over = True
        trip.outcome, trip.finished, trip.transfer = outcome, self._env.now, None
        self._host.hooks.done(trip)

    def _finish(self) -> None:
        """Close the run, and report if anybody has the sum."""
        now, end = self._now, self._env.now
        self._is_over = True
        del self._host.runs[self]
        computed = max((t.computed for t in self._trips if t.outcome == "ok"), default=math.nan)
        if math.isnan(computed):
            return
        report = Report(
            round=self._trips[0].round,
            group=self.plan.group,
            collective=self.plan.schedule.name,
            pushed=self._pushed,
            finished=end,
            compute=computed - self._pushed,
            sync=self.sync,
            exposed=end - computed,
            spans=tuple(
                Span(
                    *divmod(position, now.script.n_steps), now.began[position], now.ended[position]
                )
                for position in sorted(now.ended)
            ),
        )
        self._host.hooks.report(report)
