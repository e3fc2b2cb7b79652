"""Payloads in virtual time: latency, fair sharing, loss, failure and retry, on one SimPy clock.

The network keeps one pending SimPy event, for the next thing that happens to any payload; no
process runs for a payload or a link. At one instant completions come first, then changes of links,
then arrivals; rates are solved once, after everything else at that instant.

Decision: a payload that does not arrive is an outcome, not an exception. A `Transfer` always
succeeds with a `Delivery` whose `outcome` is ``delivered``, ``lost`` or ``failed``, so that whoever
waits for many of them handles loss as data.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf, nan
from typing import Any, Literal

import numpy as np
import simpy

from fedsim.errors import NetworkError
from fedsim.network.engine import Flow, FluidNetwork
from fedsim.network.links import UP, LinkEnds, LinkHistory, LinkModel, LinkState
from fedsim.network.wiring import LinkTable, Wiring
from fedsim.streams import bits

__all__ = ["Delivery", "Network", "Transfer", "TransferOptions"]

_FIRST = 0  # SimPy priority: before what users schedule for the same instant (which is 1)
_LAST = 2
_CHANGE, _ARRIVAL, _EXPIRY = 0, 1, 2  # order within the calendar at one instant
_ALWAYS = -1  # a calendar entry that holds as long as the transfer is not over
_MAX_IDLE_WAKES = 1000

Outcome = Literal["delivered", "lost", "failed"]


@dataclass(frozen=True, slots=True)
class TransferOptions:
    """How payloads travel; everything beyond latency and fair sharing is off by default.

    Attributes
    ----------
    message_loss : float
        Probability that a whole message is lost: it uses the network as usual and is reported lost
        at the time it would have arrived.
    link_down : {"stall", "fail", "reroute"}
        What a link that goes down does to payloads on it: they wait and go on where they were;
        they fail at once; they take another route (and wait where there is none).
    retries : int
        How often a message that was lost or failed is sent again, from its start.
    backoff : float, s
        Wait before the first retry; doubles with each.
    timeout : float, s
        After this long since it was first sent a message fails, whatever its state.
    header_bytes : int
        Added to every message.
    """

    message_loss: float = 0.0
    link_down: Literal["stall", "fail", "reroute"] = "stall"
    retries: int = 0
    backoff: float = 1.0
    timeout: float = inf
    header_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Delivery:
    """What became of a payload.

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


class Transfer(simpy.Event):
    """A payload on its way: an event that succeeds with a `Delivery`."""

    def __init__(
        self,
        network: "Network",
        source: int,
        destination: int,
        size_bytes: int,
        route: tuple[int, ...],
        weight: float,
        cap_bps: float,
    ) -> None:
        super().__init__(network.env)
        self.network = network
        self.source = source
        self.destination = destination
        self.size_bytes = size_bytes
        self.started: float = network.env.now
        self.route = route
        self.weight = weight
        self.cap_bps = cap_bps
        self.attempts = 1
        self.first_byte = nan
        self.flow: Flow | None = None
        self.bits_left = 0.0
        self.consumption: dict[int, float] | None = None
        self.will_be_lost = False
        self.version = 0
        self.is_over = False

    def cancel(self) -> None:
        """Take the payload off the network; it fails now, with reason ``cancelled``.

        Without effect if it has already arrived or failed.
        """
        self.network.cancel(self)


class _Wake(simpy.Event):
    """A call at a given time, before or after everything else at that time."""

    def __init__(
        self,
        env: simpy.Environment,
        call: Callable[[simpy.Event], None],
        delay: float,
        priority: int,
    ) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        self.callbacks.append(call)
        env.schedule(self, priority, delay)  # type: ignore[arg-type]


class _Watch:
    """A varying link while payloads are on their way over it."""

    __slots__ = ("history", "is_over", "is_up", "link", "loss", "users", "version")

    def __init__(self, link: int, history: LinkHistory | None) -> None:
        self.link = link
        self.history = history
        self.users: dict[Transfer, None] = {}
        self.is_up = True
        self.loss = 0.0
        self.version = 0
        self.is_over = False


class Network:
    """Payloads that share links in the virtual time of a SimPy environment.

    Made by `star_network` and `graph_network`.

    Parameters
    ----------
    env : simpy.Environment
    table : LinkTable
        Bandwidth and latency of each link.
    wiring : Wiring
        Names and routes.
    options : TransferOptions
    link_model : LinkModel, optional
        How the links that `wiring` calls varying vary.
    seed : int
        Of link histories and message loss.
    """

    def __init__(
        self,
        env: simpy.Environment,
        table: LinkTable,
        wiring: Wiring,
        *,
        options: TransferOptions | None = None,
        link_model: LinkModel | None = None,
        seed: int = 0,
    ) -> None:
        table.check(wiring.name)
        self.env = env
        self.options = options or TransferOptions()
        self.server = wiring.server
        self.n_nodes = wiring.n_nodes
        self.seed = seed
        self._wiring = wiring
        self._bandwidth = table.bandwidth_bps
        self._latency = table.latency
        self._fluid = FluidNetwork(
            np.array(table.bandwidth_bps, dtype=float),
            table.unshared if table.unshared is not None and table.unshared.any() else None,
        )
        self._link_model = link_model
        self._histories: dict[int, LinkHistory | None] = {}
        self._watches: dict[int, _Watch] = {}
        self._forced_down: set[int] = set()
        self._dead_nodes: set[int] = set()
        self._active: dict[Transfer, None] = {}
        self._calendar: list[tuple[float, int, int, Callable[[Any, float], None], Any, int]] = []
        self._sequence = 0
        self._wake: _Wake | None = None
        self._armed = inf
        self._is_solving = False
        self._idle_wakes = 0
        self._last_wake = -inf
        self._message_counts: dict[tuple[int, int], int] = {}
        self._loss_key = int(bits(seed, "message-loss"))
        self.link_bytes = np.zeros(len(table.bandwidth_bps))

    # What users do

    def transfer(
        self,
        source: int,
        destination: int,
        size_bytes: int,
        *,
        weight: float = 1.0,
        cap_bps: float = inf,
        route: Sequence[str] | None = None,
        consumption: Mapping[str, float] | None = None,
    ) -> Transfer:
        """Send a payload now.

        Parameters
        ----------
        source, destination : int
            Node ids; equal ones take no time.
        size_bytes : int
            Payload, at least 0.
        weight : float
            Share of a contended link relative to other payloads on it.
        cap_bps : float
            Largest rate.
        route : sequence of str, optional
            Names of the links to cross; by default the shortest route.
        consumption : mapping of str to float, optional
            Capacity that one bit/s takes on a link of the route, where it is not 1 (a shared
            medium whose capacity is time: 1 / rate of the station).

        Returns
        -------
        Transfer
            A SimPy event that succeeds with a `Delivery`, also if the payload is lost or fails.

        Raises
        ------
        NetworkError
            If there is no route, or a figure is impossible.
        """
        if size_bytes < 0 or not weight > 0 or not cap_bps > 0:
            raise NetworkError(
                f"payload {source} → {destination}: size must not be negative, weight and cap must "
                f"be positive, got {size_bytes} bytes, {weight:g} and {cap_bps:g} bit/s"
            )
        if route is None:
            links = self._wiring.route(source, destination)
        else:
            links = tuple(link for name in route for link in self._wiring.find(name))
        transfer = Transfer(self, source, destination, size_bytes, links, weight, cap_bps)
        if consumption:
            transfer.consumption = {
                link: value
                for name, value in consumption.items()
                for link in self._wiring.find(name)
            }
        self._active[transfer] = None
        if self.options.timeout < inf:
            self._at(self.env.now + self.options.timeout, _EXPIRY, self._expire, transfer, _ALWAYS)
        self._release(transfer, self.env.now)
        self._look_ahead()
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """Take a payload off the network (see `Transfer.cancel`)."""
        if not transfer.is_over:
            self._close(transfer, "failed", "cancelled")
            self._look_ahead()

    def set_link(
        self, name: str, *, up: bool | None = None, bandwidth_bps: float | None = None
    ) -> None:
        """Change a link now, for both directions if the name is an edge's.

        Parameters
        ----------
        name : str
        up : bool, optional
            Take the link down or let it follow its model again.
        bandwidth_bps : float, optional
            New bandwidth, 0 or more.
        """
        for link in self._wiring.find(name):
            if up is not None:
                (self._forced_down.discard if up else self._forced_down.add)(link)
            if bandwidth_bps is not None:
                if not bandwidth_bps >= 0:
                    raise NetworkError(f"link {name}: negative bandwidth {bandwidth_bps:g} bit/s")
                if self._bandwidth is self._fluid.capacity or not self._bandwidth.flags.writeable:
                    self._bandwidth = self._bandwidth.copy()
                self._bandwidth[link] = bandwidth_bps
            self._force(link)
        self._look_ahead()

    def set_node(self, node: int, *, up: bool) -> None:
        """Let a node die or come back: its links go with it, payloads from or to it fail."""
        (self._dead_nodes.discard if up else self._dead_nodes.add)(node)
        if not up:
            for transfer in [t for t in self._active if node in (t.source, t.destination)]:
                self._miss(transfer, "failed", f"node {node} is down")
        for link in self._wiring.links_of(node):
            self._force(link)
        self._look_ahead()

    def link_name(self, link: int) -> str:
        """Return the name of a link id."""
        return self._wiring.name(link)

    def why_stalled(self) -> str | None:
        """Say why nothing can ever be delivered; None if something can, or nothing is on its way.

        True for as long as nobody sends anything new or changes a link by hand.
        """
        if not self._active or self._fluid.is_dirty or self._next_time() < inf:
            return None
        reasons = []
        for transfer in list(self._active)[:3]:
            stuck = [
                self.link_name(link)
                for link in transfer.route
                if self._fluid.capacity.item(link) <= 0
            ]
            reasons.append(
                f"{transfer.source} → {transfer.destination} ({transfer.size_bytes} bytes, sent at "
                f"{transfer.started:g} s) waits for link {', '.join(stuck)}, "
                "which is down or has no bandwidth for good"
            )
        more = len(self._active) - len(reasons)
        return "; ".join(reasons) + (f"; and {more} more" if more else "")

    # The life of a payload

    def _release(self, transfer: Transfer, now: float) -> None:
        """Begin an attempt: resolve the route, then wait for its latency."""
        options = self.options
        transfer.bits_left = 8.0 * (transfer.size_bytes + options.header_bytes)
        if options.message_loss > 0:
            transfer.will_be_lost = self._draw_loss(transfer)
        if self._dead_nodes and not self._dead_nodes.isdisjoint(
            (transfer.source, transfer.destination)
        ):
            node = transfer.source if transfer.source in self._dead_nodes else transfer.destination
            self._miss(transfer, "failed", f"node {node} is down")
            return
        if self._is_varying() and not self._watch_route(transfer, now):
            return
        self._start_latency(transfer, now)

    def _start_latency(self, transfer: Transfer, now: float) -> None:
        latency = self._latency
        delay = 0.0
        for link in transfer.route:
            delay += latency.item(link)
        if delay > 0:
            self._at(now + delay, _ARRIVAL, self._enter, transfer, transfer.version)
        else:
            self._enter(transfer, now)

    def _enter(self, transfer: Transfer, now: float) -> None:
        """Begin the fluid phase: the first byte is there."""
        transfer.version += 1
        transfer.first_byte = now
        uses: dict[int, float] = {}
        capacity = self._fluid.capacity
        for link in transfer.route:
            if capacity.item(link) < inf:
                uses[link] = uses.get(link, 0.0) + 1.0
        if transfer.consumption:
            uses.update(transfer.consumption)
        if not uses and transfer.cap_bps == inf:
            self._arrive(transfer)
            return
        flow = Flow(
            tuple(uses.items()), transfer.bits_left, transfer.weight, transfer.cap_bps, transfer
        )
        transfer.flow = flow
        self._fluid.add(flow, now)

    def _leave(self, transfer: Transfer, now: float) -> None:
        """Take a payload out of whatever phase it is in; `bits_left` is then up to date."""
        transfer.version += 1
        flow = transfer.flow
        if flow is not None:
            transfer.flow = None
            left = self._fluid.remove(flow, now)
            self._count_bytes(transfer, transfer.bits_left - left)
            transfer.bits_left = left

    def _arrive(self, transfer: Transfer) -> None:
        """Decide whether the payload whose last bit is there counts as delivered."""
        if transfer.will_be_lost:
            self._miss(transfer, "lost", "message loss")
        else:
            self._close(transfer, "delivered", "")

    def _miss(self, transfer: Transfer, outcome: Outcome, reason: str) -> None:
        """Try again, or give up."""
        options = self.options
        if transfer.attempts > options.retries:
            self._close(transfer, outcome, reason)
            return
        now = self.env.now
        self._leave(transfer, now)
        self._unwatch(transfer)
        wait = options.backoff * 2.0 ** (transfer.attempts - 1)
        transfer.attempts += 1
        self._at(now + wait, _ARRIVAL, self._release, transfer, transfer.version)

    def _close(self, transfer: Transfer, outcome: Outcome, reason: str) -> None:
        now = self.env.now
        self._leave(transfer, now)
        if self._watches:
            self._unwatch(transfer)
        transfer.is_over = True
        del self._active[transfer]
        transfer.succeed(
            Delivery(
                transfer.source,
                transfer.destination,
                transfer.size_bytes,
                transfer.started,
                now,
                outcome,
                reason,
                transfer.first_byte,
                transfer.attempts,
                transfer.route,
            )
        )

    def _expire(self, transfer: Transfer, now: float) -> None:
        self._close(transfer, "failed", "timeout")

    def _draw_loss(self, transfer: Transfer) -> bool:
        """Draw the fate of the pair's next message."""
        pair = (transfer.source, transfer.destination)
        count = self._message_counts.get(pair, 0)
        self._message_counts[pair] = count + 1
        return keyed_uniform(self._loss_key, (*pair, count)) < self.options.message_loss

    def _count_bytes(self, transfer: Transfer, n_bits: float) -> None:
        link_bytes = self.link_bytes
        for link in transfer.route:
            link_bytes[link] += n_bits / 8

    # Links that vary

    def _is_varying(self) -> bool:
        return self._link_model is not None or bool(self._forced_down or self._dead_nodes)

    def _history(self, link: int) -> LinkHistory | None:
        if self._link_model is None or not self._wiring.varies(link):
            return None
        if link not in self._histories:
            source, destination = sorted(self._wiring.ends(link))
            ends = LinkEnds(
                self._wiring.physical(link), source, destination, self._bandwidth.item(link)
            )
            self._histories[link] = self._link_model.bind(self.seed, ends)
        return self._histories[link]

    def _is_forced_down(self, link: int) -> bool:
        return link in self._forced_down or (
            bool(self._dead_nodes) and not self._dead_nodes.isdisjoint(self._wiring.ends(link))
        )

    def _is_up(self, link: int) -> bool:
        if self._is_forced_down(link):
            return False
        history = self._history(link)
        return history is None or history.state_at(self.env.now).is_up

    def _watch_route(self, transfer: Transfer, now: float) -> bool:
        """Follow the links of a payload's route; tell whether it may go on."""
        for _ in range(2):
            broken = None
            for link in transfer.route:
                watch = self._watches.get(link)
                if watch is None:
                    history = self._history(link)
                    if history is None and not self._is_forced_down(link):
                        continue
                    watch = self._open_watch(link, history, now)
                watch.users[transfer] = None
                if not watch.is_up and broken is None:
                    broken = link
            if broken is None or self.options.link_down == "stall":
                return True
            if self.options.link_down == "fail":
                self._miss(transfer, "failed", f"link {self.link_name(broken)} is down")
                return False
            detour = self._wiring.detour(transfer.source, transfer.destination, self._is_up)
            if detour is None:
                return True
            self._unwatch(transfer)
            transfer.route = detour
        return True

    def _open_watch(self, link: int, history: LinkHistory | None, now: float) -> _Watch:
        watch = self._watches[link] = _Watch(link, history)
        self._apply_state(watch, now)
        if history is not None:
            self._schedule_change(watch, now)
        return watch

    def _schedule_change(self, watch: _Watch, now: float) -> None:
        assert watch.history is not None
        when = watch.history.next_change(now)
        if not when > now:
            raise NetworkError(
                f"link {self.link_name(watch.link)}: its model says at {now:g} s "
                f"that it changes next at {when:g} s"
            )
        if when < inf:
            self._at(when, _CHANGE, self._change, watch, watch.version)

    def _apply_state(self, watch: _Watch, now: float) -> None:
        """Give the solver the capacity that a watched link has now."""
        state: LinkState = UP if watch.history is None else watch.history.state_at(now)
        watch.is_up = state.is_up and not self._is_forced_down(watch.link)
        capacity = 0.0
        if watch.is_up:
            own = self._bandwidth.item(watch.link)
            capacity = state.scale * (own if state.bandwidth_bps is None else state.bandwidth_bps)
        self._fluid.set_capacity(watch.link, capacity, now)

    def _change(self, watch: _Watch, now: float) -> None:
        """Let a watched link take its next state."""
        self._refresh(watch, now)
        if watch.users:
            self._schedule_change(watch, now)

    def _refresh(self, watch: _Watch, now: float) -> None:
        was_up, was_infinite = watch.is_up, self._fluid.capacity.item(watch.link) == inf
        self._apply_state(watch, now)
        is_infinite = self._fluid.capacity.item(watch.link) == inf
        for transfer in list(watch.users):
            if was_infinite != is_infinite and transfer.flow is not None:
                self._leave(transfer, now)
                self._enter(transfer, now)
            if was_up and not watch.is_up and not transfer.is_over:
                self._break(transfer, watch, now)

    def _break(self, transfer: Transfer, watch: _Watch, now: float) -> None:
        """Apply the link-down policy to a payload on a link that has just gone down."""
        if self.options.link_down == "fail":
            self._miss(transfer, "failed", f"link {self.link_name(watch.link)} went down")
        elif self.options.link_down == "reroute":
            detour = self._wiring.detour(transfer.source, transfer.destination, self._is_up)
            if detour is not None:
                self._leave(transfer, now)
                self._unwatch(transfer)
                transfer.route = detour
                self._watch_route(transfer, now)
                self._start_latency(transfer, now)

    def _force(self, link: int) -> None:
        """Apply a change by hand; payloads that crossed the link unwatched are found first."""
        now = self.env.now
        watch = self._watches.get(link)
        if watch is None:
            users = [transfer for transfer in self._active if link in transfer.route]
            if not users:
                self._fluid.set_capacity(link, self._bandwidth.item(link), now)
                return
            watch = self._watches[link] = _Watch(link, self._history(link))
            watch.users.update(dict.fromkeys(users))
        self._refresh(watch, now)

    def _unwatch(self, transfer: Transfer) -> None:
        for link in transfer.route:
            watch = self._watches.get(link)
            if watch is not None and transfer in watch.users:
                del watch.users[transfer]
                if not watch.users:
                    watch.version += 1
                    del self._watches[link]

    # The one clock

    def _at(
        self,
        when: float,
        rank: int,
        call: Callable[[Any, float], None],
        item: "Transfer | _Watch",
        version: int,
    ) -> None:
        self._sequence += 1
        heappush(self._calendar, (when, rank, self._sequence, call, item, version))

    def _next_time(self) -> float:
        calendar = self._calendar
        while calendar:
            _, _, _, _, item, version = calendar[0]
            if item.version == version or (version == _ALWAYS and not item.is_over):
                break
            heappop(calendar)
        when = self._fluid.next_completion()
        return min(when, calendar[0][0]) if calendar else when

    def _look_ahead(self) -> None:
        """Make sure that SimPy calls back: at the end of this instant, or at the next event."""
        if self._fluid.is_dirty:
            if not self._is_solving:
                self._is_solving = True
                _Wake(self.env, self._on_solve, 0.0, _LAST)
            return
        when = self._next_time()
        if when < self._armed:
            self._armed = when
            self._wake = _Wake(self.env, self._on_wake, max(when - self.env.now, 0.0), _FIRST)

    def _on_solve(self, event: simpy.Event) -> None:
        self._is_solving = False
        self._check_progress()
        self._fluid.solve(self.env.now)
        self._look_ahead()

    def _on_wake(self, event: simpy.Event) -> None:
        if event is not self._wake:
            return  # superseded by an earlier one
        self._armed = inf
        self._check_progress()
        now = self.env.now
        for flow in self._fluid.finished(now):
            transfer: Transfer = flow.owner
            transfer.flow = None
            self._count_bytes(transfer, transfer.bits_left)
            transfer.bits_left = 0.0
            self._arrive(transfer)
        calendar = self._calendar
        while self._calendar and calendar[0][0] <= now:
            when, _, _, call, item, version = heappop(calendar)
            if item.version == version or (version == _ALWAYS and not item.is_over):
                call(item, max(when, now))
        self._look_ahead()

    def _check_progress(self) -> None:
        now = self.env.now
        if now > self._last_wake:
            self._last_wake = now
            self._idle_wakes = 0
            return
        self._idle_wakes += 1
        if self._idle_wakes > _MAX_IDLE_WAKES:
            raise NetworkError(
                f"more than {_MAX_IDLE_WAKES} network events at {now:g} s: time does not go on"
            )


_MASK = 0xFFFFFFFFFFFFFFFF


def keyed_uniform(key: int, words: Iterable[int]) -> float:
    """Return `streams.uniform(seed, purpose, *words)` for scalars, given ``bits(seed, purpose)``.

    numpy takes some 40 µs for one message's draw; this takes 2.
    """
    for word in words:
        z = ((key ^ (word & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        key = z ^ (z >> 31)
    return (key >> 11) * 2.0**-53
