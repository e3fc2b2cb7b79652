"""Exchange between neighbours: devices work and send what they have to each other.

The instructions of one push that belong to one round form an exchange. Each device works and sends
its payload to every peer that it is linked with at that moment (`Manner.when` says which comes
first), then waits for the payloads that are meant for it. The instructions themselves travel at no
cost: a device's state lives on the device.

Decision: a device waits only for payloads that can still come. It does not wait for a peer whose
link is down when it sends, nor for one that is offline, has no instruction, or has gone on to a
later round; what stalls for good is given up when nothing else is left to happen. So nobody waits
for ever, whatever fails.

Decision: with a local barrier instructions of the same round belong to one exchange even if they
are pushed one by one, because that is how a strategy lets each device go on by itself. A payload
that comes before its receiver has begun the round is kept for it.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import numpy as np
import simpy

from fedsim.errors import NetworkError
from fedsim.network.clock import At
from fedsim.network.exchange import Compute, Trip, then
from fedsim.network.payloads import Delivery
from fedsim.network.transfers import Network, Transfer
from fedsim.streams import uniform

__all__ = ["Fanout", "Hooks", "Manner", "Neighbours", "is_linked"]

Fanout = Literal["all", "exponential", "random", "pairwise"]
Peers = Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Manner:
    """How the devices of one exchange send and wait.

    Attributes
    ----------
    when : {"before", "with", "after"}
        Whether a device sends before its work, which then waits for its peers' payloads, when it
        begins to work, or after it.
    fanout : {"all", "exponential", "random", "pairwise"}
        Whom it sends to: every peer; the one 2^k places ahead of it, k going round with the
        rounds; one drawn from those it is linked with; one that it is matched with, who sends in
        return (a device outside the exchange answers at once with what it has).
    barrier : {"global", "local", "deadline"}
        When replies become available: all when the last payload of the exchange has come to its
        end; each when its own device is done; as local, waiting no longer than `deadline`.
    deadline : float, s
        From the push on. What comes later counts as not received.
    """

    when: Literal["before", "with", "after"] = "after"
    fanout: Fanout = "all"
    barrier: Literal["global", "local", "deadline"] = "global"
    deadline: float = math.inf


@dataclass(frozen=True, slots=True)
class Hooks:
    """What an exchange tells and asks whoever made its trips.

    Attributes
    ----------
    load : callable
        Asked once for a trip, when it sends: size in bytes and content of its payload, or None if
        its work has failed and there is nothing to send.
    post : callable
        Told the size of each payload that sets off.
    observe : callable
        Told the trip that caused a payload, ``peer``, and what became of the payload.
    done : callable
        Told once for each trip, when its reply is available or can no longer come.
    """

    load: Callable[[Trip], tuple[int, Any] | None]
    post: Callable[[int], None]
    observe: Callable[[Trip, str, Delivery], None]
    done: Callable[[Trip], None]


@dataclass(slots=True, eq=False)
class _Member:
    """One device's part in an exchange."""

    trip: Trip
    peers: Sequence[int]  # whom it would send to
    has_sent: bool = False
    has_begun: bool = False  # to work
    has_worked: bool = False
    has_gathered: bool = False  # waits for no more payloads
    is_over: bool = False
    awaited: set[int] = field(default_factory=set)  # senders


class Neighbours:
    """All exchanges between neighbours on one network.

    Parameters
    ----------
    network, compute
        Who carries and who works.
    n_devices : int
        Devices are nodes 0 to n_devices - 1.
    hooks : Hooks
    seed : int
        Of the choice of peers.
    """

    def __init__(
        self, network: Network, compute: Compute, n_devices: int, hooks: Hooks, *, seed: int
    ) -> None:
        self.network = network
        self.seed = seed
        self.compute = compute
        self.n_devices = n_devices
        self.hooks = hooks
        self.transfers: dict[Transfer, None] = {}
        self.hopeful: dict[_Member, _Exchange] = {}  # wait for devices that have yet to join
        self._newest: dict[int, Trip] = {}  # of each device, with a local barrier
        self._rounds: dict[int, list[_Exchange]] = {}  # with a local barrier

    def begin(self, trips: Sequence[Trip], peers: Peers, manner: Manner) -> None:
        """Start the instructions of one push and one round.

        Parameters
        ----------
        trips : sequence of Trip
            Of different devices.
        peers : mapping of int to sequence of int
            Device → whom it might send to.
        manner : Manner
        """
        chosen = self._choose(trips, peers, manner.fanout)
        members = [_Member(trip, chosen[trip.device]) for trip in trips]
        exchange = self._exchange(trips, manner)
        exchange.join(members)
        if manner.barrier == "local":
            self._newest |= {trip.device: trip for trip in trips}
        env = self.network.env
        At(env, env.now, lambda _: exchange.start(members))

    def settle(self) -> None:
        """Wait no longer for devices that had their chance to join and did not.

        Called when the strategy, having pushed what it wants to push, lets time pass.
        """
        self._despair(lambda exchange, j: not exchange.expects(j))

    def give_up(self) -> bool:
        """Wait for nothing more, where nothing can ever happen; tell if that changes anything."""
        stuck, waiting = list(self.transfers), list(self.hopeful)
        for transfer in stuck:
            transfer.cancel()
        self._despair(lambda exchange, j: j not in exchange.members)
        return bool(stuck or waiting)

    def _despair(self, is_vain: Callable[["_Exchange", int], bool]) -> None:
        """Let devices no longer wait for some that have not joined their exchange."""
        for member, exchange in list(self.hopeful.items()):
            exchange.drop(member, [j for j in member.awaited if is_vain(exchange, j)])
            if member.is_over or member.awaited <= exchange.members.keys():
                del self.hopeful[member]

    def may_join(self, device: int, round_: int) -> bool:
        """Return whether a device is still busy with an earlier round than this."""
        trip = self._newest.get(device)
        return trip is not None and trip.round < round_ and not (trip.is_lost or trip.is_closed)

    def _exchange(self, trips: Sequence[Trip], manner: Manner) -> "_Exchange":
        """Return the exchange that instructions belong to."""
        number = trips[0].round
        if manner.barrier != "local":
            return _Exchange(self, number, manner)
        for exchange in self._rounds.get(number, ()):
            if exchange.manner == manner and not any(t.device in exchange.members for t in trips):
                return exchange
        self._prune()
        exchange = _Exchange(self, number, manner)
        self._rounds.setdefault(number, []).append(exchange)
        return exchange

    def _prune(self) -> None:
        """Forget exchanges that nobody will join any more."""
        pending = [t.round for t in self._newest.values() if not (t.is_lost or t.is_closed)]
        oldest = min(pending, default=math.inf)
        self._rounds = {r: found for r, found in self._rounds.items() if r >= oldest}

    # Whom to send to

    def _choose(self, trips: Sequence[Trip], peers: Peers, fanout: Fanout) -> Peers:
        match fanout:
            case "all":
                return peers
            case "exponential":
                return {t.device: self._ahead(t, peers[t.device]) for t in trips}
            case "random":
                return {t.device: self._any(t, peers[t.device]) for t in trips}
            case "pairwise":
                return self._match(trips, peers)

    def _ahead(self, trip: Trip, peers: Sequence[int]) -> Sequence[int]:
        period = max((self.n_devices - 1).bit_length(), 1)
        target = (trip.device + (1 << (trip.round - 1) % period)) % self.n_devices
        return [target] if target in peers else []

    def _any(self, trip: Trip, peers: Sequence[int]) -> Sequence[int]:
        linked = [j for j in sorted(peers) if is_linked(self.network, trip.device, j)]
        draw = float(uniform(self.seed, "one-peer", trip.round, trip.device))
        return linked[int(draw * len(linked)) :][:1]

    def _match(self, trips: Sequence[Trip], peers: Peers) -> Peers:
        """Return a maximal random matching; those left over take a device outside the exchange."""
        network, number = self.network, trips[0].round
        members = {trip.device for trip in trips}
        links = sorted({(min(i, j), max(i, j)) for i in members for j in peers[i]})
        links = [link for link in links if is_linked(network, *link)]
        draws = uniform(self.seed, "pairwise", number, *np.array(links, int).reshape(-1, 2).T)
        is_outside = [not members.issuperset(link) for link in links]
        partner: dict[int, int] = {}
        for _, _, (i, j) in sorted(zip(is_outside, draws.tolist(), links, strict=True)):
            if i not in partner and j not in partner:
                partner[i], partner[j] = j, i
        return {i: [partner[i]] if i in partner else [] for i in members}


class _Exchange:
    """One exchange: its members, and the payloads on their way between them."""

    def __init__(self, owner: Neighbours, number: int, manner: Manner) -> None:
        self.members: dict[int, _Member] = {}
        self.manner = manner
        self._owner = owner
        self._env = owner.network.env
        self._round = number
        self._senders: dict[int, list[int]] = defaultdict(list)  # receiver → who would send to it
        self._waiting: dict[int, dict[_Member, None]] = defaultdict(dict)  # sender → who waits
        self._early: dict[int, dict[int, Any]] = defaultdict(dict)  # receiver → sender → payload
        self._under_way: set[tuple[int, int]] = set()
        self._n_busy = 0

    def join(self, members: Sequence[_Member]) -> None:
        """Add devices, before any of them starts."""
        for member in members:
            device = member.trip.device
            self.members[device] = member
            self._n_busy += 1
            for sender, (size_bytes, content) in self._early.pop(device, {}).items():
                self._take(member, sender, size_bytes, content)
            for peer in member.peers:
                self._senders[peer].append(device)

    def start(self, members: Sequence[_Member]) -> None:
        """Let devices take up their instructions."""
        for member in members:
            trip = member.trip
            if not self._owner.compute.is_available(trip.device, self._env.now):
                self._end(member, "offline")
                continue
            trip.received = self._env.now
            if self.manner.when == "before":
                self._send(member)
            else:
                self._work(member)
        if self.manner.barrier == "deadline":
            At(self._env, members[0].trip.pushed + self.manner.deadline, self._close)

    def expects(self, sender: int) -> bool:
        """Return whether a payload of a device can still come in this exchange."""
        return sender in self.members or self._owner.may_join(sender, self._round)

    def drop(self, member: _Member, senders: Iterable[int]) -> None:
        """Let a device no longer wait for some senders."""
        for sender in senders:
            member.awaited.discard(sender)
            self._waiting[sender].pop(member, None)
        self._go_on(member)

    # One device

    def _work(self, member: _Member) -> None:
        trip, env = member.trip, self._env
        member.has_begun = True
        compute = self._owner.compute
        trip.started, ended, is_done = compute.occupy(trip.device, env.now, trip.samples)
        if self.manner.when == "with" and not math.isnan(trip.started):
            At(env, trip.started, lambda _: self._send(member))
        if is_done:
            trip.computed = ended
            At(env, ended, lambda _: self._finish_work(member))
        else:
            At(env, ended, lambda _: self._end(member, "failed-device"))

    def _finish_work(self, member: _Member) -> None:
        member.has_worked = True
        if self.manner.when == "after":
            self._send(member)
        else:
            self._go_on(member)

    def _send(self, member: _Member) -> None:
        """Send a device's payload to everybody it is linked with now."""
        owner, trip = self._owner, member.trip
        if not owner.compute.is_available(trip.device, self._env.now):
            self._end(member, "offline")
            return
        member.has_sent = True
        load = owner.hooks.load(trip)
        if load is not None:
            linked = [j for j in member.peers if is_linked(owner.network, trip.device, j)]
            trip.neighbours = tuple(linked)
            for peer in linked:
                trip.bytes_up += load[0]
                self._post(trip, trip.device, peer, *load)
                if self.manner.fanout == "pairwise" and not self._answers(peer, trip.device):
                    self._post(trip, peer, trip.device, load[0], None)
        self._expect(member)
        for other in list(self._waiting[trip.device]):
            if (trip.device, other.trip.device) not in self._under_way:
                self.drop(other, [trip.device])
        self._go_on(member)

    def _answers(self, partner: int, device: int) -> bool:
        """Return whether a device's partner sends to it anyway (or cannot)."""
        member = self.members.get(partner)
        is_there = self._owner.compute.is_available(partner, self._env.now)
        return not is_there or (member is not None and device in member.peers)

    def _expect(self, member: _Member) -> None:
        """Note whose payloads a device waits for, now that it has sent its own."""
        device, network = member.trip.device, self._owner.network
        for sender in self._senders[device]:
            other = self.members[sender]
            is_due = not (other.has_sent or other.is_over) and is_linked(network, sender, device)
            if is_due or (sender, device) in self._under_way:
                member.awaited.add(sender)
        for sender in member.trip.neighbours:
            if (sender, device) in self._under_way:
                member.awaited.add(sender)
            elif sender not in self.members and self._may_come(sender):
                member.awaited.add(sender)
                self._owner.hopeful[member] = self
        for sender in member.awaited:
            self._waiting[sender][member] = None

    def _may_come(self, sender: int) -> bool:
        is_open = self.manner.barrier == "local" and self.manner.fanout == "all"
        return is_open and self._owner.may_join(sender, self._round)

    def _go_on(self, member: _Member) -> None:
        """Take a device's next step, if it can."""
        if member.is_over:
            return
        if member.has_sent and not member.awaited:
            member.has_gathered = True
        if not member.has_gathered:
            return
        if not member.has_begun:
            self._work(member)
        elif member.has_sent and member.has_worked:
            self._end(member, "ok")

    def _end(self, member: _Member, outcome: str) -> None:
        """End a device's part; its reply waits for the barrier."""
        trip = member.trip
        if member.is_over:
            return
        member.is_over = True
        trip.finished = self._env.now
        self._n_busy -= 1
        if outcome != "ok" or self.manner.barrier != "global":
            trip.outcome = outcome
            self._owner.hooks.done(trip)
        if not member.has_sent:
            for other in list(self._waiting[trip.device]):
                self.drop(other, [trip.device])
        self._pass_barrier()

    def _pass_barrier(self) -> None:
        """With a global barrier, release all replies once nothing is on its way."""
        if self.manner.barrier != "global" or self._n_busy or self._under_way:
            return
        for member in self.members.values():
            if member.trip.outcome == "pending":
                member.trip.outcome = "ok"
                self._owner.hooks.done(member.trip)

    def _close(self, _: simpy.Event) -> None:
        """Let no device wait longer: the deadline has passed."""
        for member in self.members.values():
            member.has_gathered = True
            self._go_on(member)

    # One payload

    def _post(self, trip: Trip, source: int, destination: int, size: int, content: Any) -> None:
        owner = self._owner
        owner.hooks.post(size)
        owner.compute.count_bytes(source, sent=size)
        self._under_way.add((source, destination))
        transfer = owner.network.transfer(source, destination, size)
        owner.transfers[transfer] = None

        def arrive(event: simpy.Event) -> None:
            del owner.transfers[transfer]
            self._arrive(trip, content, cast(Delivery, event.value))

        then(transfer, arrive)

    def _arrive(self, trip: Trip, content: Any, delivery: Delivery) -> None:
        """Hand a payload to its receiver, if it is there."""
        source, destination = delivery.source, delivery.destination
        self._under_way.discard((source, destination))
        is_there = self._owner.compute.is_available(destination, self._env.now)
        if delivery.outcome == "delivered" and not is_there:
            reason = f"device {destination} is offline"
            delivery = replace(delivery, outcome="lost", reason=reason)
        self._owner.hooks.observe(trip, "peer", delivery)
        receiver = self.members.get(destination)
        if delivery.outcome == "delivered":
            self._owner.compute.count_bytes(destination, received=delivery.size_bytes)
            if receiver is not None:
                self._take(receiver, source, delivery.size_bytes, content)
            elif self.manner.barrier == "local":
                self._early[destination][source] = delivery.size_bytes, content
        if receiver is not None:
            self.drop(receiver, [source])
        self._pass_barrier()

    def _take(self, member: _Member, sender: int, size_bytes: int, content: Any) -> None:
        """Count a payload as received, if its receiver has not gone on without it."""
        manner = self.manner
        is_mixed_last = manner.barrier == "global" and manner.when != "before"
        is_waiting = is_mixed_last or not (member.has_gathered or member.is_over)
        if is_waiting and member.trip.outcome == "pending":
            payloads = member.trip.payloads = member.trip.payloads or {}
            payloads[sender] = content
            member.trip.bytes_down += size_bytes


def is_linked(network: Network, source: int, destination: int) -> bool:
    """Return whether a payload that is sent now would find all links of its route up."""
    wiring, states, now = network._wiring, network._states, network.env.now
    if states.is_varying and network.options.link_down == "reroute":
        detour = wiring.detour(source, destination, lambda link: states.is_up(link, now))
        return detour is not None
    try:
        route = wiring.route(source, destination)
    except NetworkError:  # not connected
        return False
    return not states.is_varying or all(states.is_up(link, now) for link in route)
