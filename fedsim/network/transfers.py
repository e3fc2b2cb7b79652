"""Payloads in virtual time: latency, fair sharing, loss, failure and retry, on one SimPy clock.

The network keeps one pending SimPy event, for the next thing that happens to any payload; no
process runs for a payload or a link. At one instant completions come first, then changes of links,
then arrivals; rates are solved once, after everything else at that instant.

Decision: a payload that does not arrive is an outcome, not an exception. A `Transfer` always
succeeds with a `Delivery` whose `outcome` is ``delivered``, ``lost`` or ``failed``, so that whoever
waits for many of them handles loss as data.
"""

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import exp, inf, isnan, log1p, nan
from typing import Any

import networkx as nx
import numpy as np
import simpy
from numpy.typing import NDArray

from fedsim.errors import NetworkError
from fedsim.network.clock import ARRIVAL, CHANGE, EXPIRY, WHILE_OPEN, Clock
from fedsim.network.engine import Flow, FluidNetwork
from fedsim.network.failures import Failure, Scheduled
from fedsim.network.fates import Fates
from fedsim.network.links import Burst, LinkModel
from fedsim.network.options import TransferOptions
from fedsim.network.payloads import Delivery, LinkDown, LinkUse, Outcome, Spread, Way
from fedsim.network.states import LinkStates
from fedsim.network.wiring import LinkTable, Wiring

__all__ = ["Network", "Transfer"]

FloatArray = NDArray[np.float64]


class Transfer(simpy.Event):
    """A payload on its way: an event that succeeds with a `Delivery`.

    Attributes
    ----------
    source, destination, size_bytes : int
    started : float, s
    route : tuple of int
        Link ids; changes if the payload is rerouted.
    attempts : int
    first_byte : float, s
        nan until it is there.
    is_over : bool
    """

    __slots__ = (
        "attempts",
        "bits_left",
        "cap_bps",
        "consumption",
        "copies",
        "destination",
        "drop_draw",
        "first_byte",
        "flow",
        "is_over",
        "is_waiting",
        "latency",
        "link_down",
        "log_survival",
        "loss",
        "network",
        "next_growth",
        "rate_cap",
        "route",
        "shares",
        "size_bytes",
        "source",
        "spread",
        "stalled_since",
        "started",
        "version",
        "weight",
        "will_be_lost",
        "wire_bits",
    )

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
        self.consumption: dict[int, float] | None = None
        self.copies: Mapping[int, int] | None = None
        self.spread: Spread | None = None
        self.shares: Mapping[int, float] | None = None  # of a payload on several routes
        self.link_down: LinkDown = network.options.link_down
        self.wire_bits = network.options.wire_bits(size_bytes)
        self.latency = 0.0
        self.attempts = 1
        self.is_waiting = False  # for a retry
        self.first_byte = nan
        self.flow: Flow | None = None
        self.bits_left = 0.0
        self.rate_cap = inf  # of a slow start
        self.next_growth = inf
        self.stalled_since = nan
        self.loss = 0.0
        self.log_survival = 0.0
        self.drop_draw = 0.0
        self.will_be_lost = False
        self.version = 0
        self.is_over = False

    def cancel(self) -> None:
        """Take the payload off the network; it fails now, with reason ``cancelled``.

        Without effect if it has already arrived or failed.
        """
        self.network.cancel(self)


class _Watch:
    """A varying link while payloads are on their way over it."""

    __slots__ = ("burst", "is_over", "is_up", "link", "loss", "users", "version")

    def __init__(self, link: int) -> None:
        self.link = link
        self.users: dict[Transfer, None] = {}
        self.is_up = True
        self.loss = 0.0
        self.burst: Burst | None = None
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
    failures : sequence of Failure
        Which links and nodes are down when.
    seed : int
        Of link histories and loss.

    Attributes
    ----------
    env : simpy.Environment
    seed : int
    options : TransferOptions
    server : int or None
        Node id of the server.
    n_nodes : int
    graph : networkx.Graph or None
        What it was made from; None for a star.
    n_released, n_forced : int
        Payloads sent, and changes of links and nodes made by hand, so far.
    on_close : callable or None
        Called with each `Delivery` when its payload has arrived or was given up.
    """

    def __init__(
        self,
        env: simpy.Environment,
        table: LinkTable,
        wiring: Wiring,
        *,
        options: TransferOptions | None = None,
        link_model: LinkModel | None = None,
        failures: Sequence[Failure] = (),
        seed: int = 0,
    ) -> None:
        table.check(wiring.name)
        self.env = env
        self.seed = seed
        self.options = options or TransferOptions()
        self.server = wiring.server
        self.n_nodes = wiring.n_nodes
        self.graph: nx.Graph[Any] | None = wiring.graph
        self.n_released = 0
        self.n_forced = 0
        self.on_close: Callable[[Delivery], None] | None = None
        self._wiring = wiring
        self._latency = table.latency
        self._loss = table.loss
        if isinstance(link_model, Scheduled):
            failures = [*failures, *link_model.failures]
            link_model = None
        self._states = LinkStates(table, wiring, link_model, failures, seed)
        unshared = table.unshared
        if self.options.fairness == "none":
            unshared = np.ones(len(table.latency), dtype=bool)
        elif unshared is not None and not unshared.any():
            unshared = None
        self._fluid = FluidNetwork(np.array(table.bandwidth_bps, dtype=float), unshared)
        self._carried = array("d", bytes(8 * len(table.latency)))
        self._watches: dict[int, _Watch] = {}
        self._active: dict[Transfer, None] = {}
        self._fates = Fates(seed, self.options)
        self._is_plain = (
            self.options.loss == "none"
            and self.options.startup == "none"
            and self.options.fairness != "rtt"
            and self.options.window_bytes is None
            and self.options.header_efficiency == 1.0
        )
        self._down_at: tuple[float, frozenset[tuple[int, int]]] = (nan, frozenset())
        self._clock = Clock(env, self._on_due, self._on_end)

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
        spread: Spread | None = None,
        copies: Mapping[int, int] | None = None,
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
        spread : Spread, optional
            Several routes at once, and what happens when one of them breaks.
        copies : mapping of int to int, optional
            Link id → how many payloads cross it as one: a broadcast whose copies part later. Each
            of the payloads is given the same mapping. A copy that is sent again, or takes a detour,
            travels by itself.

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
        if spread is not None:
            links = tuple(spread.shares)
        elif route is None:
            links = self._wiring.route(source, destination)
        else:
            links = tuple(link for name in route for link in self._wiring.find(name))
        transfer = Transfer(self, source, destination, size_bytes, links, weight, cap_bps)
        if spread is not None:
            transfer.spread, transfer.shares = spread, spread.shares
            transfer.link_down = spread.link_down
            if spread.exact_bytes is not None:
                transfer.wire_bits = self.options.wire_bits(spread.exact_bytes)
        if copies is not None:
            transfer.copies = copies
            transfer.shares = {link: 1.0 / copies[link] for link in links}
        if consumption:
            transfer.consumption = {
                link: value
                for name, value in consumption.items()
                for link in self._wiring.find(name)
            }
        self._active[transfer] = None
        self.n_released += 1
        if self.options.timeout is not None:
            end = self.env.now + self.options.timeout
            self._clock.at(end, EXPIRY, self._expire, transfer, WHILE_OPEN)
        self._release(transfer, self.env.now)
        if transfer.flow is not None:
            self._note_stalls()
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
        if bandwidth_bps is not None and not bandwidth_bps >= 0:
            raise NetworkError(f"link {name}: negative bandwidth {bandwidth_bps:g} bit/s")
        self.n_forced += 1
        self._down_at = nan, frozenset()
        for link in self._wiring.find(name):
            self._states.set_link(link, up, bandwidth_bps)
            self._force(link)
        self._note_stalls()
        self._look_ahead()

    def set_node(self, node: int, *, up: bool) -> None:
        """Let a node die or come back: its links go with it, payloads from or to it fail."""
        self.n_forced += 1
        self._down_at = nan, frozenset()
        self._states.set_node(node, up)
        if not up:
            for transfer in [t for t in self._active if node in (t.source, t.destination)]:
                self._miss(transfer, "failed", f"node {node} is down")
        for link in self._wiring.links_of(node):
            self._force(link)
        self._note_stalls()
        self._look_ahead()

    def start_round(self, number: int, edges: Iterable[tuple[int, int]] | None = None) -> None:
        """Begin a round of training: links that are drawn for each round are drawn anew.

        Parameters
        ----------
        number : int
            The draws depend on (seed, number, link) alone.
        edges : iterable of (int, int), optional
            Only the links between these pairs of nodes exist in this round; by default all.

        A link that is in use stays as it is until nothing is on it, so that payloads on their way
        finish.
        """
        depends = edges is not None or self._states.depends_on_round
        for transfer in self._active if depends else ():
            for link in () if transfer.is_waiting else transfer.route:
                watch = self._watches.get(link)
                if watch is None:
                    watch = self._watches[link] = _Watch(link)
                watch.users[transfer] = None
        self._states.start_round(number, edges)

    def link_name(self, link: int) -> str:
        """Return the name of a link id."""
        return self._wiring.name(link)

    def route(self, source: int, destination: int) -> tuple[int, ...]:
        """Return the link ids of the shortest route between two nodes."""
        return self._wiring.route(source, destination)

    def link_ends_of(self, link: int) -> tuple[int, int]:
        """Return the nodes that a link leads from and to."""
        return self._wiring.ends(link)

    def link_ends(self) -> list[tuple[int, int]]:
        """Return the nodes that each link leads from and to, in order of link ids."""
        return [self._wiring.ends(link) for link in range(len(self._latency))]

    def down_now(self) -> frozenset[tuple[int, int]]:
        """Return the pairs of nodes between which a link is down now."""
        now = self.env.now
        if self._down_at[0] != now:
            ends, is_up = self.link_ends(), self._states.is_up
            down = [pair for link, pair in enumerate(ends) if not is_up(link, now)]
            self._down_at = now, frozenset((min(pair), max(pair)) for pair in down)
        return self._down_at[1]

    def is_dead(self, node: int) -> bool:
        """Return whether a node is down now."""
        return self._states.is_dead(node, self.env.now)

    @property
    def is_idle(self) -> bool:
        """Whether no payload is on its way."""
        return not self._active

    @property
    def has_draws(self) -> bool:
        """Whether what becomes of a message is drawn at random."""
        return self._fates.are_drawn

    @property
    def is_predictable(self) -> bool:
        """Whether nothing is on its way, and what is sent alone takes what its `way` says."""
        return (
            self._is_plain
            and not self._active
            and not self._fates.are_drawn
            and not self._states.is_varying
            and self.options.timeout is None
            and self.on_close is None
        )

    def way(self, source: int, destination: int) -> Way:
        """Return what a payload between two nodes meets if it is alone there."""
        route = self._wiring.route(source, destination)
        latency, rate = 0.0, inf
        for link in route:
            latency += self._latency.item(link)
            rate = min(rate, self._fluid.capacity.item(link))
        shared = [link for link in route if self._fluid.is_shared(link)]
        return Way(source, destination, route, self.options.setup(latency), rate, shared)

    def carry_alone(self, way: Way, size_bytes: int, start: float) -> Delivery:
        """Account for a payload that meets no other, and return its delivery."""
        n_bits = self.options.wire_bits(size_bytes)
        first_byte, finished = way.times(n_bits, start)
        for link in way.route:
            self._carried[link] += n_bits / 8
            if self._fluid.capacity.item(link) < inf:
                self._fluid.count_busy(link, finished - first_byte)
        self.n_released += 1
        return Delivery(
            way.source, way.destination, size_bytes, start, finished, "delivered", "",
            first_byte, 1, way.route,
        )  # fmt: skip

    def outlook(self) -> tuple[bytes, float]:
        """Return the links' present states, equal only if all are, and until when (s) they hold."""
        states, now = self._states, self.env.now
        if not states.is_varying:
            return b"", inf
        links = range(len(self._latency))
        figures = [states.figures(link, now)[1:3] for link in links]
        until = min((states.next_change(link, now) for link in links), default=inf)
        return np.array(figures).tobytes(), until

    def usage(self) -> tuple[FloatArray, FloatArray]:
        """Return the bytes that each link has carried, and its busy time (s)."""
        return np.array(self._carried), self._fluid.busy_time(self.env.now)

    def add_usage(self, carried: FloatArray, busy: FloatArray) -> None:
        """Count what links would have carried, and for how long, in what is not simulated."""
        np.frombuffer(self._carried)[:] += carried
        self._fluid.add_busy_time(busy)

    def link_uses(self) -> list[LinkUse]:
        """Return what each link that was ever used has carried, in order of link ids."""
        busy = self._fluid.busy_time(self.env.now)
        return [
            LinkUse(
                self.link_name(link),
                self._states.bandwidth.item(link),
                self._latency.item(link),
                self._carried[link],
                busy.item(link),
            )
            for link in np.flatnonzero((np.frombuffer(self._carried) > 0) | (busy > 0)).tolist()
        ]

    def timeline(self, name: str, start: float, end: float) -> list[tuple[float, float]]:
        """Return how a link varies by its model and timetable.

        Returns
        -------
        list of (float, float)
            From each time (s) on it has this bandwidth (bit/s), 0 being down.
        """
        return self._states.timeline(self._wiring.find(name)[0], start, end)

    def explain(self, transfer: Transfer) -> str:
        """Say what bounds a payload now: its bottleneck, its share of it, its latency."""
        head = f"{transfer.source} → {transfer.destination}, {transfer.size_bytes} bytes: "
        if transfer.is_over:
            delivery = transfer.value
            assert isinstance(delivery, Delivery)
            return (
                head + f"{delivery.outcome} at {delivery.finished:g} s {delivery.reason}".rstrip()
            )
        names = " → ".join(map(self.link_name, transfer.route)) or "no links"
        latency = self._route_latency(transfer)
        head += f"route {names}, latency {latency:g} s; "
        flow = transfer.flow
        if flow is None:
            return head + "its first byte is not there yet"
        left = flow.bits_left(self.env.now) / 8
        rate = self._fluid.rate(flow)
        link = self._fluid.bottleneck(flow)
        bound = "its own cap" if link is None else f"link {self.link_name(link)}"
        return head + f"{left:.0f} bytes left at {rate:g} bit/s, bounded by {bound}"

    def why_stalled(self) -> str | None:
        """Say why nothing can ever be delivered; None if something can, or nothing is on its way.

        True for as long as nobody sends anything new or changes a link by hand.
        """
        if not self._active or self._fluid.is_dirty:
            return None
        if min(self._fluid.next_completion(), self._clock.next_time()) < inf:
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
        transfer.version += 1
        transfer.bits_left = transfer.wire_bits
        transfer.first_byte = nan
        transfer.rate_cap = inf
        if self._fates.are_drawn:
            fate = self._fates.draw(transfer.source, transfer.destination)
            transfer.will_be_lost, transfer.drop_draw = fate
            transfer.log_survival = 0.0
        if self._states.is_varying:
            for node in (transfer.source, transfer.destination):
                if self._states.is_dead(node, now):
                    self._miss(transfer, "failed", f"node {node} is down")
                    return
                death = self._states.next_death(node, now)
                if death < inf:
                    self._clock.at(death, CHANGE, self._die, transfer, WHILE_OPEN)
            if not self._watch_route(transfer, now):
                return
        self._start_latency(transfer, now)

    def _die(self, transfer: Transfer, now: float) -> None:
        """Let a node's death on its timetable fail a payload, unless a retry waits for better."""
        for node in (transfer.source, transfer.destination):
            if self._states.is_dead(node, now) and not transfer.is_waiting:
                self._miss(transfer, "failed", f"node {node} is down")
                return

    def _route_latency(self, transfer: Transfer) -> float:
        latency, shares = self._latency, transfer.shares
        if transfer.copies is not None:
            shares = None
        total = 0.0
        for link in transfer.route:
            total += latency.item(link) * (1.0 if shares is None else shares[link])
        return total

    def _start_latency(self, transfer: Transfer, now: float) -> None:
        latency = transfer.latency = self._route_latency(transfer)
        delay = self.options.setup(latency)
        if delay > 0:
            self._clock.at(now + delay, ARRIVAL, self._enter, transfer, transfer.version)
        else:
            self._enter(transfer, now)

    def _enter(self, transfer: Transfer, now: float) -> None:
        """Begin the fluid phase: the first byte is there."""
        transfer.first_byte = now
        if not self._is_plain:
            self._start_up(transfer, now)
        self._join(transfer, now)

    def _join(self, transfer: Transfer, now: float) -> None:
        """Give a payload to the solver, with what its route asks of it at present."""
        transfer.version += 1
        one, cap, weight = 1.0, transfer.cap_bps, transfer.weight
        if not self._is_plain:
            options = self.options
            loss = transfer.loss = self._route_loss(transfer)
            one = options.consumption(loss)
            cap = min(
                cap,
                transfer.rate_cap,
                options.rate_cap(transfer.size_bytes, transfer.latency, loss),
            )
            weight *= options.weight(transfer.latency)
        uses: dict[int, float] = {}
        capacity, shares = self._fluid.capacity, transfer.shares
        for link in transfer.route:
            if capacity.item(link) < inf:
                share = one if shares is None else one * shares[link]
                uses[link] = uses.get(link, 0.0) + share
        if transfer.consumption:
            uses.update({link: one * each for link, each in transfer.consumption.items()})
        if not uses and cap == inf:
            self._count(transfer, transfer.bits_left)
            transfer.bits_left = 0.0
            self._arrive(transfer)
            return
        transfer.flow = Flow(tuple(uses.items()), transfer.bits_left, weight, cap, transfer)
        self._fluid.add(transfer.flow, now)
        if transfer.rate_cap < inf:
            self._clock.at(transfer.next_growth, CHANGE, self._grow, transfer, transfer.version)

    def _start_up(self, transfer: Transfer, now: float) -> None:
        """Begin a slow start, unless one is not asked for."""
        transfer.rate_cap = self.options.first_rate(transfer.latency)
        transfer.next_growth = now + 2.0 * transfer.latency

    def _grow(self, transfer: Transfer, now: float) -> None:
        """Double the rate of a slow start after a round trip, until it cannot bound any more."""
        assert transfer.flow is not None
        rtt = 2.0 * transfer.latency
        transfer.rate_cap *= 2.0
        transfer.next_growth = now + rtt
        widest = min((self._fluid.capacity.item(link) for link in transfer.route), default=inf)
        if transfer.rate_cap >= widest or transfer.rate_cap * rtt >= transfer.wire_bits:
            transfer.rate_cap = inf
        self._leave(transfer, now)
        self._join(transfer, now)

    def _leave(self, transfer: Transfer, now: float) -> None:
        """Take a payload out of whatever phase it is in; `bits_left` is then up to date."""
        transfer.version += 1
        flow = transfer.flow
        if flow is not None:
            transfer.flow = None
            left = self._fluid.remove(flow, now)
            self._count(transfer, transfer.bits_left - left)
            transfer.bits_left = left

    def _count(self, transfer: Transfer, n_bits: float) -> None:
        """Account for bits that have crossed the route since the payload joined."""
        sent = n_bits / 8
        if not self._is_plain:
            sent *= self.options.consumption(transfer.loss) * self.options.header_efficiency
            if self.options.loss == "drop" and transfer.loss > 0:
                packets = self.options.packets(transfer.size_bytes)
                share = n_bits / transfer.wire_bits if transfer.wire_bits else 1.0
                transfer.log_survival += share * packets * log1p(-transfer.loss)
        carried, shares = self._carried, transfer.shares
        for link in transfer.route:
            carried[link] += sent if shares is None else sent * shares[link]

    def _arrive(self, transfer: Transfer) -> None:
        """Decide whether the payload whose last bit is there counts as delivered."""
        if transfer.will_be_lost:
            self._miss(transfer, "lost", "message loss")
        elif self.options.loss == "drop" and not transfer.drop_draw < self._survival(transfer):
            self._miss(transfer, "lost", "packet loss")
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
        transfer.is_waiting = True
        self._clock.at(now + wait, ARRIVAL, self._try_again, transfer, transfer.version)

    def _try_again(self, transfer: Transfer, now: float) -> None:
        transfer.is_waiting = False
        if transfer.copies is not None:
            transfer.copies = transfer.shares = None
        self._release(transfer, now)

    def _close(self, transfer: Transfer, outcome: Outcome, reason: str) -> None:
        now = self.env.now
        self._leave(transfer, now)
        if self._watches:
            self._unwatch(transfer)
        transfer.is_over = True
        del self._active[transfer]
        delivery = Delivery(
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
        if self.on_close is not None:
            self.on_close(delivery)
        transfer.succeed(delivery)

    def _expire(self, transfer: Transfer, now: float) -> None:
        self._close(transfer, "failed", "timeout")

    def _route_loss(self, transfer: Transfer) -> float:
        """Return the probability that a packet is lost on the route, bursts apart."""
        if self.options.loss == "none":
            return 0.0
        arrives = 1.0
        shares = transfer.shares if transfer.copies is None else None
        for link in transfer.route:
            watch = self._watches.get(link)
            if watch is not None:
                lost = 0.0 if watch.burst and self.options.loss == "drop" else watch.loss
            else:
                lost = 0.0 if self._loss is None else self._loss.item(link)
            share = 1.0 if shares is None else shares[link]
            arrives *= 1.0 - lost * share
        return 1.0 - arrives

    def _survival(self, transfer: Transfer) -> float:
        """Return the probability that no packet of a message was dropped."""
        survival = exp(transfer.log_survival)
        for link in transfer.route:
            watch = self._watches.get(link)
            if watch is not None and watch.burst is not None:
                survival *= watch.burst.survival(self.options.packets(transfer.size_bytes))
        return survival

    # Links that vary

    def _watch_route(self, transfer: Transfer, now: float) -> bool:
        """Follow the links of a payload's route; tell whether it may go on."""
        broken = self._watch(transfer, now)
        if broken is None or transfer.link_down == "stall":
            return True
        if transfer.link_down == "fail":
            self._miss(transfer, "failed", f"link {self.link_name(broken)} is down")
            return False
        self._take_detour(transfer, now)
        return True

    def _watch(self, transfer: Transfer, now: float) -> int | None:
        """Follow the varying links of a route; return the first one that is down."""
        broken = None
        for link in transfer.route:
            watch = self._watches.get(link)
            if watch is None:
                if not self._states.can_change(link):
                    continue
                watch = self._watches[link] = _Watch(link)
                self._take_state(watch, now)
                self._schedule_change(watch, now)
            watch.users[transfer] = None
            if not watch.is_up and broken is None:
                broken = link
        return broken

    def _take_detour(self, transfer: Transfer, now: float) -> bool:
        """Put a payload on another way over links that are up; tell if there is one."""
        spread = transfer.spread
        shares: Mapping[int, float] | None = None
        if spread is not None and spread.detour is not None:
            shares = spread.detour()
            detour: tuple[int, ...] | None = tuple(shares)
        else:
            detour = self._wiring.detour(
                transfer.source, transfer.destination, lambda link: self._states.is_up(link, now)
            )
        if detour is None:
            return False
        self._leave(transfer, now)
        self._unwatch(transfer)
        transfer.route, transfer.shares, transfer.copies = detour, shares, None
        self._watch(transfer, now)
        return True

    def _schedule_change(self, watch: _Watch, now: float) -> None:
        when = self._states.next_change(watch.link, now)
        if when < inf:
            self._clock.at(when, CHANGE, self._change, watch, watch.version)

    def _take_state(self, watch: _Watch, now: float) -> None:
        """Give the solver the capacity that a watched link has now."""
        watch.is_up, capacity, watch.loss, watch.burst = self._states.figures(watch.link, now)
        self._fluid.set_capacity(watch.link, capacity, now)

    def _change(self, watch: _Watch, now: float) -> None:
        """Let a watched link take its next state."""
        self._refresh(watch, now)
        if watch.users:
            self._schedule_change(watch, now)

    def _refresh(self, watch: _Watch, now: float) -> None:
        was_up, was_loss = watch.is_up, watch.loss
        was_infinite = self._fluid.capacity.item(watch.link) == inf
        self._take_state(watch, now)
        is_infinite = self._fluid.capacity.item(watch.link) == inf
        if was_infinite != is_infinite or (was_loss != watch.loss and not self._is_plain):
            for transfer in list(watch.users):
                if transfer.flow is not None:
                    self._leave(transfer, now)
                    self._join(transfer, now)
        if was_up and not watch.is_up:
            for transfer in list(watch.users):
                if not transfer.is_over and transfer.link_down != "stall":
                    self._break(transfer, watch, now)

    def _break(self, transfer: Transfer, watch: _Watch, now: float) -> None:
        """Apply the link-down policy to a payload on a link that has just gone down."""
        if transfer.link_down == "fail":
            self._miss(transfer, "failed", f"link {self.link_name(watch.link)} went down")
        elif self._take_detour(transfer, now):
            self._start_latency(transfer, now)

    def _force(self, link: int) -> None:
        """Apply a change by hand; payloads that crossed the link unwatched are found first."""
        now = self.env.now
        watch = self._watches.get(link)
        if watch is None:
            users = [t for t in self._active if link in t.route and not t.is_waiting]
            if not users:
                self._fluid.set_capacity(link, self._states.figures(link, now)[1], now)
                return
            watch = self._watches[link] = _Watch(link)
            watch.users.update(dict.fromkeys(users))
            self._refresh(watch, now)
            self._schedule_change(watch, now)
        else:
            self._refresh(watch, now)

    def _unwatch(self, transfer: Transfer) -> None:
        for link in transfer.route:
            watch = self._watches.get(link)
            if watch is not None and transfer in watch.users:
                del watch.users[transfer]
                if not watch.users:
                    watch.version += 1
                    del self._watches[link]
                    self._fluid.set_capacity(link, self._states.bandwidth.item(link), self.env.now)

    # Time

    def _look_ahead(self) -> None:
        """Make sure to be called: at the end of this instant, or when something happens next."""
        if self._fluid.is_dirty:
            self._clock.call_at_end()
            return
        completion, other = self._fluid.next_completion(), self._clock.next_time()
        self._clock.wake_at(completion if completion < other else other)

    def _on_due(self, now: float) -> None:
        for flow in self._fluid.finished(now):
            transfer: Transfer = flow.owner
            transfer.flow = None
            self._count(transfer, transfer.bits_left)
            transfer.bits_left = 0.0
            self._arrive(transfer)
        self._clock.run_due(now)
        if self._clock.is_end(now):
            self._on_end(now)
            return
        self._note_stalls()
        self._look_ahead()

    def _on_end(self, now: float) -> None:
        self._fluid.solve(now)
        self._note_stalls()
        self._look_ahead()

    def _note_stalls(self) -> None:
        """Start and stop the clocks of payloads whose rate is 0; rates are up to date."""
        stall_timeout = self.options.stall_timeout
        if stall_timeout is None or self._fluid.is_dirty:
            return
        now = self.env.now
        for transfer in self._active:
            if transfer.flow is None or self._fluid.rate(transfer.flow) > 0:
                transfer.stalled_since = nan
            elif isnan(transfer.stalled_since):
                transfer.stalled_since = now
                when = now + stall_timeout
                self._clock.at(when, EXPIRY, self._give_up_stalled, transfer, WHILE_OPEN)

    def _give_up_stalled(self, transfer: Transfer, now: float) -> None:
        if now - transfer.stalled_since >= (self.options.stall_timeout or 0.0) * (1 - 1e-12):
            transfer.stalled_since = nan
            self._miss(transfer, "failed", "stalled")
