"""`NetworkGrid`: a Flower `Grid` whose messages travel a simulated network in virtual time.

Decision: *when and whether* a message arrives is the network's business, *what is in it* the
executor's. Virtual time never waits for arithmetic: a reply whose size is known travels before it
is computed, and all instructions under way are computed in one call when the first content is
needed. Results therefore do not depend on the order of events.

Decision: a lost message is *missing*, as it is for Flower's own grids after a timeout. Flower's
differential-privacy wrappers drop a whole round for one error reply but accept missing ones;
``loss_reply="error"`` makes losses error replies instead.
"""

import math
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence, Set
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, Literal, Protocol, cast

import simpy
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsim.devices import DeviceFleet
from fedsim.errors import NetworkError, NoNodesError, PayloadError, ScenarioError
from fedsim.flower import compat
from fedsim.flower.collectives import Planner
from fedsim.flower.instructions import (
    NODE_BASE,
    Exchange,
    WorkPlan,
    read_exchange,
    server_round,
)
from fedsim.flower.ledger import Ledger, Traffic, is_train_type
from fedsim.flower.peers import PeerGraph, agreed_manners, check_node, group, peers_of, received
from fedsim.flower.records import (
    FiniteCheck,
    Intake,
    flower_bytes,
    payload_bytes,
    release_rows,
)
from fedsim.learning.config import ROUNDS, LocalConfig
from fedsim.network import Network, edges, plan
from fedsim.network.alone import serve_alone
from fedsim.network.collective import Collectives
from fedsim.network.exchange import Broadcast, Service, Trip
from fedsim.network.neighbours import Hooks, Neighbours
from fedsim.recorder import Recorder
from topologies.profiles import Profile

__all__ = ["NODE_BASE", "Executor", "NetworkGrid"]

_LAST_TIME = sys.float_info.max  # before infinity, at which nothing happens


class Executor(Protocol):
    """Who really computes: all instructions under way in one call.

    Attributes
    ----------
    is_stateful : bool
        Whether a device keeps state from one instruction to the next. Then an instruction is
        computed only when its device has begun to work on it, in the device's own order.

    An executor that computes ahead and keeps state has two methods more: ``can_compute(message)``
    tells whether the state a message meets is known, and ``settle(message_id, has_arrived=...)``
    is called when its reply arrives or is lost.
    """

    is_stateful: bool

    def __call__(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the reply (or error reply) to each message, in the same order."""

    def reply_bytes(self, message: Message) -> int | None:
        """Return the dense payload of the reply, if it is known without computing it."""


@dataclass(slots=True, eq=False)
class _Flight:
    """One instruction that somebody may still ask about."""

    message: Message | None  # None: only its sender still holds it (see NetworkGrid._abandon)
    trip: Trip
    exchange: Exchange
    expires: float
    known_bytes: int | None  # of its payload, where nothing need be computed to know it
    reply: Message | None = None  # computed, whether or not it has arrived
    sender: "weakref.ref[Message] | None" = None
    is_expired: bool = False

    @property
    def is_ready(self) -> bool:
        if self.is_expired:
            return self.reply is not None
        return self.trip.has_arrived or (self.trip.is_lost and self.reply is not None)

    @property
    def sends_result(self) -> bool:
        """Whether its payload is what its work makes, not what it was sent."""
        return self.exchange.kind != "neighbours" or self.exchange.manner.when == "after"

    @property
    def sent(self) -> Message | None:
        """The message whose arrays its device sends to its neighbours."""
        return self.reply if self.sends_result else self.message

    @property
    def has_failed(self) -> bool:
        """Whether its device's app raised, so that there was nothing to send."""
        return self.sends_result and self.reply is not None and self.reply.has_error()


@dataclass(frozen=True, slots=True)
class _Cargo:
    """What all messages with one content share."""

    content: RecordDict
    config: LocalConfig
    size_bytes: int  # without the header
    exchange: Exchange
    round: int | None  # that it names


class NetworkGrid(Grid):
    """A Flower grid over simulated devices and links; any `Strategy.start` runs on it.

    Parameters
    ----------
    env : simpy.Environment
        The one clock.
    network : Network
        Carries the messages; shares `env`.
    fleet : DeviceFleet
        Compute speed and availability of the devices. Device i is node `NODE_BASE` + i.
    executor : Executor
        Computes the replies.
    work : WorkPlan
        Says how much work an instruction is.
    loss_reply : {"missing", "error"}
        What a strategy sees of a lost message.
    header_bytes : int
        Added to every message, on the links and in the records.
    accounting : {"dense", "flower"}
        Whether a payload is elements × itemsize of its arrays, or all that Flower counts.
    keep_dtypes : bool
        Cast float arrays on the way down to the dtype their key first had.
    free_evaluation : bool
        Evaluate messages take no time and no bytes and are never lost.
    broadcasts : bool
        Instructions of one push that carry the same arrays are one transmission by the server.
    cancel_late : bool
        What a timeout of `send_and_receive` finds on its way is cancelled; else it travels on.
    peers : PeerGraph, optional
        Who a device's neighbours are where an instruction does not say.
    seed : int
        Of the choice among neighbours, where not all are sent to.
    profile : callable, optional
        Returns the layers of the model, for collectives that fuse tensors.

    Attributes
    ----------
    trips : list of Trip
        Every instruction pushed, in order, if `keep_trips` was asked for.
    """

    def __init__(
        self,
        env: simpy.Environment,
        network: Network,
        fleet: DeviceFleet,
        executor: Executor,
        work: WorkPlan,
        *,
        loss_reply: Literal["missing", "error"] = "missing",
        header_bytes: int = 0,
        accounting: Literal["dense", "flower"] = "dense",
        keep_dtypes: bool = True,
        free_evaluation: bool = False,
        broadcasts: bool = False,
        cancel_late: bool = False,
        peers: PeerGraph | None = None,
        seed: int = 0,
        profile: Callable[[], Profile] | None = None,
        keep_trips: bool = False,
    ) -> None:
        self.env = env
        self.network = network
        self.fleet = fleet
        self.trips: list[Trip] | None = [] if keep_trips else None
        self.on_train_push: Callable[[], None] = lambda: None
        ledger = self._ledger = Ledger(network)
        self._executor = executor
        self._can_compute: Callable[[Message], bool] = getattr(
            executor, "can_compute", lambda message: True
        )
        self._settle: Callable[..., None] = getattr(executor, "settle", lambda i, has_arrived: None)
        self._work = work
        self._loss_reply = loss_reply
        self._header_bytes = header_bytes
        self._count = flower_bytes if accounting == "flower" else payload_bytes
        self._is_dense = accounting == "dense"
        self._intake = Intake(accounting, keep_dtypes=keep_dtypes)
        self._is_finite = FiniteCheck()
        self._free_evaluation = free_evaluation
        self._broadcasts = broadcasts
        self._cancel_late = cancel_late
        self._peers = peers
        hooks = Hooks(
            self._load_payload, partial(ledger.post, "peer"), ledger.observe, self._arrive
        )
        self._service = Service(
            network, fleet, self._reply_bytes, self._arrive, ledger.observe, self._known_bytes
        )
        self._neighbours = Neighbours(network, fleet, len(fleet), hooks, seed=seed)
        self._planner = Planner(network, len(fleet), profile)
        self._collectives = Collectives(
            network,
            fleet,
            plan.Hooks(
                self._load_vector,
                self._known_vector,
                ledger.post,
                ledger.observe,
                self._arrive,
                ledger.note_collective,
            ),
            header_bytes=header_bytes,
        )
        self._run = compat.empty_run()
        self._n_pushed = 0
        self._round = 0
        self._flights: dict[str, _Flight] = {}
        self._ready: dict[str, _Flight] = {}  # whose reply can be handed over
        self._expiries: dict[str, float] = {}  # of undecided instructions with a time to live
        self._uncomputed: dict[str, _Flight] = {}
        self._lost: set[str] = set()
        self._given_up: dict[str, _Flight] = {}  # still under way, but nobody can ask any more
        self._waiting: Set[str] = frozenset()  # ids somebody waits for now
        self._n_computed = 0  # replies since rows were last released
        self._needed = 0  # how many of them are to be decided before it goes on
        self._was_hopeless = False

    @property
    def recorder(self) -> Recorder | None:
        """Gets every transfer and every span of local work."""
        return self._ledger.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._ledger.recorder = recorder

    @staticmethod
    def wrap(
        grid: Grid, scenario: Any, out: Any = None, **options: Any
    ) -> AbstractContextManager["NetworkGrid"]:
        """Return a scenario's network around the grid that Flower hands to a `ServerApp`.

        ``with NetworkGrid.wrap(grid, "world.yaml", "runs/mine") as net: strategy.start(net, ...)``
        is all that an app of yours has to add; see `fedsim.wrapped.wrap` for the arguments.
        """
        # What a scenario means is the runner's to know, a room above: so by name, and only here.
        made = import_module("fedsim.wrapped").wrap(grid, scenario, out, **options)
        return cast(AbstractContextManager[NetworkGrid], made)

    # --- what Flower asks of a grid -----------------------------------------------------------

    def set_run(self, run: compat.Run) -> None:
        """Set the run this grid belongs to."""
        self._run = run

    @property
    def run(self) -> compat.Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a new instruction (kept for Flower's interface; `Message(...)` does the same)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Sequence[int]:
        """Return the node ids of the devices that are available now, ascending."""
        if self.fleet.timetable is None:
            return range(NODE_BASE, NODE_BASE + len(self.fleet))
        return [NODE_BASE + int(i) for i in self.fleet.available(self.env.now)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send instructions off at this moment of virtual time; return their ids in order.

        Raises
        ------
        PayloadError
            If a message asks for an exchange that this grid does not carry.
        NetworkError
            If a message goes to a node that does not exist.
        ScenarioError
            If a message travels by way of the server and the topology has none.
        """
        return self._push(messages, -math.inf)

    def _push(self, messages: Iterable[Message], until: float) -> list[str]:
        """Send instructions off; the caller will push nothing else until their replies or then."""
        batch = list(messages)
        if len({id(message) for message in batch}) < len(batch):
            raise PayloadError("the same Message is twice in one push; build one for each node")
        cargoes: dict[int, _Cargo] = {}
        loads: list[_Cargo] = []
        n_devices = len(self.fleet)
        devices: list[int] = []
        for message in batch:
            node_id = message.metadata.dst_node_id
            check_node(node_id, n_devices)
            devices.append(node_id - NODE_BASE)
            content = message.content
            if id(content) not in cargoes:
                cargoes[id(content)] = self._load(content)
            loads.append(cargoes[id(content)])
        peers = [self._peers_of(m, load) for m, load in zip(batch, loads, strict=True)]
        manners = agreed_manners([(load.round, load.exchange) for load in loads])
        exchanges = [load.exchange for load in loads]
        groups = self._planner.groups(list(zip(devices, exchanges, strict=True)))
        if any(_is_train(message) for message in batch):
            self.on_train_push()
        self._start_round(max((load.round or 0 for load in loads), default=0))
        flights = [self._board(m, load) for m, load in zip(batch, loads, strict=True)]
        if self._broadcasts:
            self._join_broadcasts(flights)
        between: list[tuple[Trip, list[int]]] = []
        direct: list[Trip] = []
        for flight, among in zip(flights, peers, strict=True):
            if among is not None:
                between.append((flight.trip, among))
            elif flight.exchange.kind == "server" and not flight.exchange.by_edge:
                direct.append(flight.trip)
        self._depart(direct, until)
        self._depart_by_edge([flight for flight in flights if flight.exchange.by_edge])
        for trips, known in group(between):
            self._neighbours.begin(trips, known, manners[trips[0].round])
        for places, planned in groups:
            self._collectives.begin([flights[i].trip for i in places], planned)
        self._was_hopeless = False
        return [flight.trip.message_id for flight in flights]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there; if none is, advance virtual time to the next.

        The time advances until one of `message_ids` has its reply or is lost; if all that happens
        at that moment are losses, the list is empty and `is_lost` tells which. Each reply is
        returned once, in the order in which the instructions were pushed. A set or the keys of a
        mapping are not gone through: then the cost does not grow with how many are under way.

        Raises
        ------
        NetworkError
            If asked twice in a row for messages that can never have a reply.
        """
        ids = message_ids if isinstance(message_ids, Set) else set(message_ids)
        if not any(message_id in ids for message_id in self._ready):
            is_open = any(message_id in self._flights for message_id in ids)
            if is_open:
                self._run_until(ids, math.inf, needed=1)
                while self.env.peek() == self.env.now:  # who else arrives at this moment
                    self.env.step()
            elif self._was_hopeless:
                raise NetworkError(
                    f"pull_messages was called again for {len(ids)} message(s) that are lost or "
                    "were already returned: no reply can ever come. Ask "
                    "grid.is_lost(message_id), push something first, or set network.loss_reply: "
                    "error, with which each lost message has an error reply."
                )
            self._was_hopeless = not is_open
        return self._collect(ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Push instructions and wait for the replies, at most `timeout` virtual seconds.

        Replies come in the order of the instructions, whatever order they arrived in; lost ones
        are missing. A reply that is late stays pullable for as long as the sender keeps its
        instruction.
        """
        deadline = math.inf if timeout is None else self.env.now + timeout
        ids = self._push(messages, deadline)
        self.wait(ids, timeout=deadline - self.env.now)
        replies = self._collect(set(ids))
        for message_id in ids:
            if message_id in self._flights:
                flight = self._flights[message_id]
                flight.trip.is_closed = True
                self._abandon(flight)
                if self._cancel_late:
                    flight.trip.cancel()
        return replies

    # --- what a simulated grid can tell besides -----------------------------------------------

    @property
    def now(self) -> float:
        """The virtual time in seconds."""
        return self.env.now

    def is_lost(self, message_id: str) -> bool:
        """Return whether the reply to a pushed instruction can never come (lost, expired)."""
        return message_id in self._lost

    @property
    def lost_messages(self) -> Set[str]:
        """The ids of all instructions that can never have a reply, so far: a view, not a copy."""
        return self._lost

    def wait(self, message_ids: Iterable[str], *, timeout: float) -> None:
        """Advance virtual time until these are answered or lost, at most `timeout` seconds."""
        ids = message_ids if isinstance(message_ids, Set) else set(message_ids)
        n_open = sum(i in self._flights and i not in self._ready for i in ids)
        self._run_until(ids, self.env.now + timeout, needed=n_open)

    def advance(self, seconds: float) -> None:
        """Let virtual time pass."""
        self._neighbours.settle()
        until = self._collectives.memory.quiet_until = self.env.now + seconds
        self.env.run(until=until)

    def wait_for_nodes(self, seconds: float) -> None:
        """Sleep as a strategy does that waits for nodes: whole steps, up to the next change.

        Raises
        ------
        NoNodesError
            If no device will ever come or go again, so that waiting is in vain.
        """
        change = self.fleet.next_change(self.env.now)
        if math.isinf(change):
            online = len(self.get_node_ids())
            raise NoNodesError(
                f"the strategy waits for more devices than the {online} that are available, and "
                "none will ever come: lower min_available_nodes (or the fraction sampled), or "
                "raise data.devices"
            )
        steps = max(1, math.ceil((change - self.env.now) / seconds))
        self.advance(steps * seconds)

    def take_traffic(self) -> Traffic:
        """Return what happened since the last call, and start counting anew."""
        return self._ledger.take()

    # --- an instruction's way -----------------------------------------------------------------

    def _load(self, content: RecordDict) -> _Cargo:
        """Copy and weigh what all messages with this content carry."""
        exchange = read_exchange(content)
        copied, size_bytes = self._intake(content)
        return _Cargo(
            content=copied,
            config=self._work.local_config(copied),
            size_bytes=size_bytes,
            exchange=exchange,
            round=server_round(copied),
        )

    def _start_round(self, number: int) -> None:
        """Tell links that are drawn anew for each round which round it is."""
        if number and number != self._round:
            self._round = number
            self.network.start_round(number)

    def _peers_of(self, message: Message, cargo: _Cargo) -> list[int] | None:
        """Return the devices that a message's device may send to; None: it does not say."""
        if cargo.exchange.kind == "neighbours":
            node_id = message.metadata.dst_node_id
            return peers_of(node_id, cargo.exchange, cargo.round, self._peers, len(self.fleet))
        if cargo.exchange.kind == "collective":
            return None
        if self.network.server is None and not self._is_free(message.metadata.message_type):
            raise ScenarioError(
                "topology: it has no server, and this strategy's messages travel by way of one; "
                "use a topology that has a server (kind: star, tree), or a strategy whose devices "
                "exchange with their neighbours"
            )
        return None

    def _board(self, message: Message, cargo: _Cargo) -> _Flight:
        """Give a message its id and its snapshot, and a trip in virtual time."""
        self._n_pushed += 1
        message_id = str(self._n_pushed)
        compat.set_message_id(message, message_id)
        message.content = cargo.content
        meta = message.metadata
        device = meta.dst_node_id - NODE_BASE
        trip = Trip(
            message_id=message_id,
            device=device,
            kind=meta.message_type,
            pushed=self.env.now,
            round=(self._n_pushed if cargo.round is None else cargo.round) % ROUNDS,
            samples=self._work.samples(message, cargo.config, device),
            exchange=cargo.exchange.kind,
        )
        asked = cargo.exchange.collective
        if asked is not None and asked.conduct.is_overlapped:
            trip.last_step = self._work.last_step(message, cargo.config, device)
        expires = math.inf if meta.ttl == compat.DEFAULT_TTL else self.env.now + meta.ttl
        known = cargo.exchange.payload_bytes
        flight = _Flight(message, trip, cargo.exchange, expires, known)
        if trip.exchange == "server":
            trip.bytes_down = cargo.size_bytes + self._header_bytes
        if known is None and not flight.sends_result:
            flight.known_bytes = cargo.size_bytes
        elif known is None and self._is_dense:
            flight.known_bytes = self._executor.reply_bytes(message)
        self._flights[message_id] = self._uncomputed[message_id] = flight
        if expires < math.inf:
            self._expiries[message_id] = expires
        if self.trips is not None:
            self.trips.append(trip)
        if is_train_type(trip.kind):
            self._ledger.traffic.selected.add(device)
        return flight

    def _is_free(self, message_type: str) -> bool:
        return self._free_evaluation and message_type.startswith("evaluate")

    def _depart(self, trips: Sequence[Trip], until: float) -> None:
        """Send off what travels between the server and devices."""
        released = []
        for trip in trips:
            if self._is_free(trip.kind):
                self._answer_at_once(trip)
            else:
                self._release(trip)
                released.append(trip)
        n_open = len(self._flights) - len(self._ready) + len(self._given_up)
        is_all = n_open == len(released) > 0 and not self._expiries
        if is_all and until > self.env.now and serve_alone(self._service, released, until):
            return
        for trip in released:
            self._service.serve(trip)

    def _answer_at_once(self, trip: Trip) -> None:
        """Let an instruction that takes no time arrive, if its device is there."""
        trip.bytes_down = 0
        trip.received = trip.started = trip.computed = trip.finished = self.env.now
        is_there = self.fleet.is_available(trip.device, self.env.now)
        trip.outcome = "ok" if is_there else "offline"
        self._arrive(trip)

    def _release(self, trip: Trip) -> None:
        """Count an instruction that sets off to its device, if that is there."""
        is_first = trip.broadcast is None or not trip.broadcast.is_counted
        is_there = self.fleet.is_available(trip.device, self.env.now)
        self._ledger.post("down", trip.bytes_down if is_there and is_first else 0)
        if is_there and trip.broadcast is not None:
            trip.broadcast.is_counted = True

    def _join_broadcasts(self, flights: Sequence[_Flight]) -> None:
        """Let what is the same for several devices be sent once to all of them."""
        groups: dict[Any, list[Trip]] = defaultdict(list)
        for flight in flights:
            trip, message = flight.trip, flight.message
            is_there = self.fleet.is_available(trip.device, self.env.now)
            if message is None or trip.exchange != "server" or self._is_free(trip.kind):
                continue
            records = message.content.array_records.values()
            arrays = tuple(id(array) for record in records for array in record.values())
            if arrays and is_there:
                by_edge = flight.exchange.by_edge
                server = edges.edge_of(self.network, trip.device) if by_edge else None
                groups[server, trip.bytes_down, arrays].append(trip)
        for (server, *_), trips in groups.items():
            origin = cast(int, self.network.server) if server is None else server
            routes = (self.network.route(origin, trip.device) for trip in trips)
            broadcast = Broadcast(Counter(link for route in routes for link in route))
            for trip in trips:
                trip.broadcast = broadcast

    def _depart_by_edge(self, flights: Sequence[_Flight]) -> None:
        """Send off what travels by way of edge servers, each with what it fetches and sends on."""
        groups: dict[tuple[int, edges.Backhaul], list[Trip]] = defaultdict(list)
        for flight in flights:
            trip = flight.trip
            if self._is_free(trip.kind):
                self._answer_at_once(trip)
                continue
            trip.server = edges.edge_of(self.network, trip.device)
            groups[trip.server, flight.exchange.backhaul].append(trip)
        for (edge, backhaul), trips in groups.items():
            edges.serve_by_edge(
                self._service,
                trips,
                edge,
                backhaul,
                release=self._release,
                post=self._ledger.post,
            )

    def _weigh(self, trip: Trip) -> int | None:
        """Return what a trip's payload weighs, now that it sets off; None if its work failed."""
        flight = self._flights.get(trip.message_id)
        if flight is None:  # given up, and nobody kept the instruction
            flight = self._given_up[trip.message_id]
        if flight.known_bytes is not None:
            return flight.known_bytes + self._header_bytes
        if flight.reply is None:
            self._compute(needed=flight)
        assert flight.reply is not None
        if flight.reply.has_error():
            return None
        return self._count(flight.reply.content) + self._header_bytes

    def _known_bytes(self, trip: Trip) -> int | None:
        """Return what the reply to the server will weigh, if nothing need be computed to know."""
        known = self._known_vector(trip)
        return None if known is None else known + self._header_bytes

    def _reply_bytes(self, trip: Trip) -> int:
        """Return what the reply to the server weighs; an error report weighs a header."""
        weight = self._weigh(trip)
        size = self._header_bytes if weight is None else weight
        self._ledger.post("up", size)
        return size

    def _load_payload(self, trip: Trip) -> tuple[int, _Flight | None] | None:
        """Return size and origin of what a device sends to its neighbours."""
        flight = self._flights.get(trip.message_id)
        size = self._weigh(trip)
        return None if size is None else (size, flight)

    def _load_vector(self, trip: Trip) -> int | None:
        """Return the size of what a device adds to a collective, whose messages have headers."""
        size = self._weigh(trip)
        return None if size is None else size - self._header_bytes

    def _known_vector(self, trip: Trip) -> int | None:
        """Return the size of what a device will add, if nothing need be computed to know it."""
        flight = self._flights.get(trip.message_id)
        return None if flight is None else flight.known_bytes

    def _arrive(self, trip: Trip) -> None:
        """Note that the reply is here, or can no longer come."""
        given_up = self._given_up.pop(trip.message_id, None)
        flight = self._flights.get(trip.message_id)
        is_between = trip.exchange != "server"
        if is_between and not math.isnan(trip.computed):
            self._ledger.record_work(trip)
        is_lost, asked = trip.is_lost, flight or given_up
        if is_lost:
            self._ledger.traffic.messages_lost += not is_between and trip.outcome not in (
                "failed-device",
                "cancelled",
            )
        elif asked is not None and self.env.now > asked.expires:
            trip.outcome, is_lost = "expired", True
        if is_lost:
            self._lost.add(trip.message_id)
            if flight is not None and not flight.is_expired:
                self._lose(flight)
        self._settle(trip.message_id, has_arrived=not is_lost)
        if is_lost or given_up is not None:
            self._uncomputed.pop(trip.message_id, None)
        if given_up is None:
            self._decide(trip.message_id)

    def _decide(self, message_id: str) -> None:
        """Note that an instruction has its reply, or never will."""
        self._expiries.pop(message_id, None)
        if message_id in self._waiting:
            self._needed -= 1
        flight = self._flights.get(message_id)
        if flight is not None and flight.is_ready:
            self._ready[message_id] = flight

    def _lose(self, flight: _Flight) -> None:
        if self._loss_reply == "missing" or flight.message is None:
            del self._flights[flight.trip.message_id]
            return
        reason = "expired" if flight.is_expired else flight.trip.outcome
        is_gone = reason in ("offline", "failed-device")
        code = compat.NODE_UNAVAILABLE if is_gone else compat.MESSAGE_UNAVAILABLE
        flight.reply = Message(Error(code, reason), reply_to=flight.message)

    def _expire(self) -> None:
        """Give up the instructions waited for whose time to live is over."""
        due = [i for i, time in self._expiries.items() if time <= self.env.now]
        for message_id in due:
            if message_id in self._waiting:
                flight = self._flights[message_id]
                flight.is_expired = True
                self._lost.add(message_id)
                self._given_up[message_id] = replace(flight)  # it is still under way
                self._lose(flight)
                self._decide(message_id)

    def _abandon(self, flight: _Flight) -> None:
        """Keep a late instruction only for as long as its sender does.

        `send_and_receive` gave it up, so only who still has the `Message` can know its id. Without
        this every late reply of a long run would keep a global model alive.
        """
        message, message_id = flight.message, flight.trip.message_id
        is_local = flight.exchange.manner.barrier == "local"  # others may hold its payload
        if message is None or is_local or flight.is_expired:
            return

        def forget(_: object) -> None:
            self._ready.pop(message_id, None)
            self._expiries.pop(message_id, None)
            if self._flights.pop(message_id, None) and flight.trip.outcome == "pending":
                self._given_up[message_id] = flight

        flight.sender = weakref.ref(message, forget)
        flight.message = copy(message)
        if flight.known_bytes is not None and not self._executor.is_stateful:
            self._uncomputed.pop(message_id, None)
            flight.message = None

    # --- computing and handing over -----------------------------------------------------------

    def _compute(self, also: Sequence[_Flight] = (), needed: _Flight | None = None) -> None:
        """Compute all instructions under way in one call: of a device the first, if it keeps state.

        The one that is `needed` is computed in any case.
        """
        flights = [
            flight
            for flight in (*self._uncomputed.values(), *also)
            if flight is needed or flight.message is None or self._can_compute(flight.message)
        ]
        if self._executor.is_stateful:
            flights = [flight for flight in flights if not math.isnan(flight.trip.computed)]
            flights.sort(key=lambda flight: flight.trip.received)
        messages = [flight.message for flight in flights if flight.message is not None]
        for flight, reply in zip(flights, self._executor(messages), strict=True):
            compat.set_message_id(reply, f"r{flight.trip.message_id}")
            flight.reply = reply
            self._uncomputed.pop(flight.trip.message_id, None)
        self._n_computed += len(flights)

    def _release_rows(self) -> None:
        """Let go of models that were handed over, though others of their batch were not."""
        self._n_computed = 0
        replies = (flight.reply for flight in self._flights.values())
        contents = (r.content for r in replies if r is not None and r.has_content())
        records = (record for content in contents for record in content.values())
        release_rows(record for record in records if isinstance(record, ArrayRecord))

    def _collect(self, ids: Set[str]) -> list[Message]:
        """Hand over the replies that are there, in the order of their instructions."""
        found = [message_id for message_id in self._ready if message_id in ids]
        ready = [self._ready.pop(message_id) for message_id in sorted(found, key=int)]
        late = [flight for flight in ready if flight.reply is None and flight.message is None]
        for flight in late:  # its sender has come back for it
            flight.message = flight.sender() if flight.sender else None
        senders = self._senders(ready)
        if senders or any(flight.reply is None for flight in ready):
            known = self._uncomputed.keys() | {flight.trip.message_id for flight in late}
            self._compute([*late, *(s for s in senders if s.trip.message_id not in known)])
        replies, errors = [], []
        for flight in ready:
            assert flight.reply is not None
            del self._flights[flight.trip.message_id]
            flight.trip.is_closed = True
            self._note(flight)
            replies.append(flight.reply)
            if flight.trip.outcome == "error":
                errors.append(f"device {flight.trip.device}: {flight.reply.error.reason}")
        if errors:
            self._ledger.note_errors(errors, len(replies))
        if self._n_computed > len(self._flights):
            self._release_rows()
        return replies

    def _senders(self, ready: Sequence[_Flight]) -> list[_Flight]:
        """Return the instructions whose payloads are handed over now and not yet computed."""
        senders = {
            sender.trip.message_id: sender
            for flight in ready
            if self._executor.is_stateful or flight.exchange.manner.barrier == "local"
            for sender in (flight.trip.payloads or {}).values()
            if sender is not None and sender.reply is None and sender.sends_result
        }
        return list(senders.values())

    def _note(self, flight: _Flight) -> None:
        """Count a reply that is handed over, and tell in it how it travelled."""
        trip, reply = flight.trip, flight.reply
        assert reply is not None
        if reply.has_error():
            trip.outcome = trip.outcome if trip.is_lost else "error"
            return
        is_train = is_train_type(trip.kind)
        metrics, is_finite = None, True
        records = compat.values_of(reply.content)
        for record in records.values():
            if isinstance(record, MetricRecord):
                metrics = record if metrics is None else metrics
            elif is_train and is_finite and isinstance(record, ArrayRecord):
                is_finite = self._is_finite(record)
        if not is_finite:
            self._ledger.note_not_finite(trip)
        if metrics is not None:
            self._ledger.note_metrics(trip, dict(compat.values_of(metrics)))
        delivery: dict[str, Any] = {
            "sent_bytes": trip.bytes_up,
            "received_bytes": trip.bytes_down,
            "started": trip.pushed,
            "finished": trip.finished,
        }
        if trip.server is not None:
            delivery["server"] = trip.server
        if trip.exchange == "collective":
            delivery["computed"] = trip.computed
            if trip.neighbours:
                delivery["received_from"] = [NODE_BASE + device for device in trip.neighbours]
        if trip.exchange == "neighbours":
            payloads = sorted((trip.payloads or {}).items())
            came = {d: s for d, s in payloads if s is None or not s.has_failed}
            if trip.neighbours:
                delivery["neighbours"] = [NODE_BASE + device for device in trip.neighbours]
            if came:
                delivery["received_from"] = [NODE_BASE + device for device in came]
            if flight.exchange.manner.barrier == "local":
                sent = {d: None if s is None else s.sent for d, s in came.items()}
                records["received"] = received(sent)
            trip.payloads = dict.fromkeys(came)  # let go of the senders' models
        records["delivery"] = compat.record_of(ConfigRecord, delivery)

    def _run_until(self, ids: Set[str], deadline: float, *, needed: int) -> None:
        """Advance virtual time until `needed` of the instructions are decided, or `deadline`."""
        self._waiting, self._needed = ids, needed
        env = self.env
        self._neighbours.settle()
        self._collectives.memory.quiet_until = self._quiet_until(ids, deadline, needed)
        expiry = self._next_expiry()
        limit = min(deadline, expiry, _LAST_TIME)
        while self._needed > 0:
            time = env.peek()
            if time <= limit:
                env.step()
                continue
            if min(time, expiry) > deadline:
                break
            if time > expiry:
                if env.now < expiry:
                    env.run(until=expiry)
                self._expire()
                expiry = self._next_expiry()
                limit = min(deadline, expiry, _LAST_TIME)
                continue
            if self._neighbours.give_up():
                continue
            why = self.network.why_stalled() or "no event is left in virtual time"
            if place := self._collectives.why_stuck():
                why = f"{place}; {why}"
            n_open = sum(i in self._flights and i not in self._ready for i in ids)
            raise NetworkError(
                f"{n_open} message(s) can never be delivered: {why}. Set "
                "round_timeout to go on without them."
            )
        if self._needed > 0 and env.now < deadline:
            env.run(until=deadline)
        self._waiting = frozenset()
        self._collectives.memory.quiet_until = -math.inf

    def _quiet_until(self, ids: Set[str], deadline: float, needed: int) -> float:
        """Return until when nobody can push: the caller waits for all that is under way."""
        if self.recorder is not None or self._given_up or not self._collectives.runs:
            return -math.inf
        pending = [i for i, flight in self._flights.items() if flight.trip.outcome == "pending"]
        waits_for_all = needed == len(pending) and all(i in ids for i in pending)
        return deadline if waits_for_all else -math.inf

    def _next_expiry(self) -> float:
        mine = (time for i, time in self._expiries.items() if i in self._waiting)
        return min(mine, default=math.inf)


def _is_train(message: Message) -> bool:
    return is_train_type(message.metadata.message_type)
