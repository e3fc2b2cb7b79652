"""`NetworkGrid`: a Flower `Grid` whose messages travel a simulated network in virtual time.

Decision: *when and whether* a message arrives is the network's business, *what is in it* the
executor's. Virtual time never waits for arithmetic: a reply whose size is known travels before it
is computed, and all instructions under way are computed in one call when the first content is
needed. Results therefore do not depend on the order of events.

Decision: a lost message is *missing*, as it is for Flower's own grids after a timeout. Flower's
differential-privacy wrappers drop a whole round for one error reply but accept missing ones;
``loss_reply="error"`` makes losses error replies instead.
"""

import logging
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import simpy
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedsim.devices import DeviceFleet
from fedsim.errors import NetworkError, NoNodesError
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan, read_exchange, round_of
from fedsim.flower.records import (
    cast_like,
    flower_bytes,
    payload_bytes,
    snapshot,
    template_of,
)
from fedsim.learning.config import LocalConfig
from fedsim.network import Delivery, Network
from fedsim.network.exchange import Trip, serve
from fedsim.recorder import ComputeRow, Recorder, TransferRow

__all__ = ["NODE_BASE", "Executor", "NetworkGrid", "Traffic"]

NODE_BASE = 1000
"""Flower node id of device 0 (0 and 1 mean something else in Flower)."""

_log = logging.getLogger(__name__)


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


@dataclass(slots=True)
class Traffic:
    """What has happened on the grid since somebody last asked (see `NetworkGrid.take_traffic`).

    Attributes
    ----------
    bytes_down, bytes_up : int
        Payloads released, counted once, end to end, lost ones included.
    messages_sent, messages_lost : int
        Messages released, instructions and replies alike, and those that did not arrive.
    error_replies : int
        Replies in which a device's app reported an error.
    selected, replied : set of int
        Devices that were sent a train instruction, and whose train reply was handed over.
    train, evaluate : list of (device, metrics)
        The metrics of the replies handed over.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    messages_sent: int = 0
    messages_lost: int = 0
    error_replies: int = 0
    selected: set[int] = field(default_factory=set)
    replied: set[int] = field(default_factory=set)
    train: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    evaluate: list[tuple[int, dict[str, Any]]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Flight:
    """One instruction that somebody may still ask about."""

    message: Message | None  # None: only its sender still holds it (see NetworkGrid._abandon)
    trip: Trip
    expires: float
    known_bytes: int | None  # of the reply, where nothing need be computed to know it
    reply: Message | None = None  # computed, whether or not it has arrived
    sender: "weakref.ref[Message] | None" = None

    @property
    def is_ready(self) -> bool:
        return self.trip.has_arrived or (self.trip.is_lost and self.reply is not None)


@dataclass(frozen=True, slots=True)
class _Cargo:
    """What all messages with one content share."""

    content: RecordDict
    config: LocalConfig
    size_bytes: int
    reply_bytes: int | None  # asked for by the instruction


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

    Attributes
    ----------
    recorder : Recorder or None
        Gets every transfer and every span of local work.
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
        keep_trips: bool = False,
    ) -> None:
        self.env = env
        self.network = network
        self.fleet = fleet
        self.trips: list[Trip] | None = [] if keep_trips else None
        self.recorder: Recorder | None = None
        self.on_train_push: Callable[[], None] = lambda: None
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
        self._keep_dtypes = keep_dtypes
        self._free_evaluation = free_evaluation
        self._template: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._run = compat.empty_run()
        self._n_pushed = 0
        self._flights: dict[str, _Flight] = {}
        self._uncomputed: dict[str, _Flight] = {}
        self._lost: set[str] = set()
        self._forgotten: dict[str, int] = {}  # reply sizes of trips that nobody waits for
        self._waiting: set[str] = set()  # ids somebody waits for now
        self._was_hopeless = False
        self._traffic = Traffic()

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
        """
        batch = list(messages)
        cargoes: dict[int, _Cargo] = {}
        for message in batch:
            self._check_node(message.metadata.dst_node_id)
            if id(message.content) not in cargoes:
                cargoes[id(message.content)] = self._load(message.content)
        if any(_is_train(message) for message in batch):
            self.on_train_push()
        flights = [self._board(message, cargoes[id(message.content)]) for message in batch]
        for flight in flights:
            self._depart(flight.trip)
        self._was_hopeless = False
        return [flight.trip.message_id for flight in flights]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there; if none is, advance virtual time to the next.

        The time advances until one of `message_ids` has its reply or is lost; in the second case
        the list is empty and `is_lost` tells which. Each reply is returned once, in the order in
        which the instructions were pushed.

        Raises
        ------
        NetworkError
            If asked twice in a row for messages that can never have a reply.
        """
        ids = list(message_ids)
        if not self._ready(ids):
            open_ids = {i for i in ids if i in self._flights}
            is_hopeless = not open_ids
            if open_ids:
                self._run_until(open_ids, math.inf, needed=1)
            elif self._was_hopeless:
                raise NetworkError(
                    f"pull_messages was called again for {len(ids)} message(s) that are lost or "
                    "were already returned: no reply can ever come. Ask "
                    "grid.is_lost(message_id), or push something first."
                )
            self._was_hopeless = is_hopeless
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
        ids = self.push_messages(messages)
        open_ids = {i for i in ids if i in self._flights and not self._flights[i].is_ready}
        self._run_until(open_ids, deadline, needed=len(open_ids))
        replies = self._collect(ids)
        for message_id in ids:
            if message_id in self._flights:
                self._abandon(self._flights[message_id])
        return replies

    # --- what a simulated grid can tell besides -----------------------------------------------

    @property
    def now(self) -> float:
        """The virtual time in seconds."""
        return self.env.now

    def is_lost(self, message_id: str) -> bool:
        """Return whether the reply to a pushed instruction can never come (lost, expired)."""
        return message_id in self._lost

    def advance(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.env.run(until=self.env.now + seconds)

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
        taken, self._traffic = self._traffic, Traffic()
        return taken

    # --- an instruction's way -----------------------------------------------------------------

    def _check_node(self, node_id: int) -> None:
        if not 0 <= node_id - NODE_BASE < len(self.fleet):
            last = NODE_BASE + len(self.fleet) - 1
            raise NetworkError(f"there is no node {node_id}; nodes are {NODE_BASE} to {last}")

    def _load(self, content: RecordDict) -> _Cargo:
        """Copy and weigh what all messages with this content carry."""
        exchange = read_exchange(content)
        copied = snapshot(content)
        if self._keep_dtypes:
            records = (r for r in copied.values() if isinstance(r, ArrayRecord))
            self._template = self._template or template_of(records)
            if n_cast := cast_like(copied, self._template):
                _log.info("cast %d array(s) on the way down to the dtype they first had", n_cast)
        return _Cargo(
            content=copied,
            config=self._work.local_config(copied),
            size_bytes=self._count(copied) + self._header_bytes,
            reply_bytes=exchange.payload_bytes,
        )

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
            round=round_of(message),
            samples=self._work.samples(message, cargo.config, device),
            bytes_down=cargo.size_bytes,
        )
        known = cargo.reply_bytes
        if known is None and self._is_dense:
            known = self._executor.reply_bytes(message)
        expires = math.inf if meta.ttl == compat.DEFAULT_TTL else self.env.now + meta.ttl
        flight = _Flight(message, trip, expires, known)
        self._flights[message_id] = self._uncomputed[message_id] = flight
        if self.trips is not None:
            self.trips.append(trip)
        if _is_train(message):
            self._traffic.selected.add(device)
        return flight

    def _depart(self, trip: Trip) -> None:
        is_there = self.fleet.is_available(trip.device, self.env.now)
        if self._free_evaluation and trip.kind.startswith("evaluate"):
            trip.bytes_down = 0
            trip.received = trip.started = trip.computed = trip.finished = self.env.now
            trip.outcome = "ok" if is_there else "offline"
            self._arrive(trip)
            return
        self._traffic.messages_sent += 1
        if is_there:
            self._traffic.bytes_down += trip.bytes_down
        serve(
            self.network,
            self.fleet,
            trip,
            reply_bytes=self._reply_bytes,
            done=self._arrive,
            observe=None if self.recorder is None else self._observe,
        )

    def _observe(self, trip: Trip, way: str, delivery: Delivery) -> None:
        """Record a payload that has arrived or was given up, and the work before a reply."""
        assert self.recorder is not None
        kind = way if _is_train_type(trip.kind) else f"{trip.kind.partition('.')[0]}-{way}"
        self.recorder.transfer(
            TransferRow(
                round=trip.round,
                message=int(trip.message_id),
                kind=kind,
                source=delivery.source,
                destination=delivery.destination,
                released=trip.pushed if way == "down" else trip.computed,
                started=delivery.started,
                first_byte=delivery.first_byte,
                finished=delivery.finished,
                size_bytes=delivery.size_bytes,
                outcome=delivery.outcome,
                route=tuple(self.network.link_name(link) for link in delivery.route),
            )
        )
        if way == "up":
            self.recorder.compute(
                ComputeRow(
                    round=trip.round,
                    device=trip.device,
                    kind=trip.kind.partition(".")[0],
                    started=trip.started,
                    finished=trip.computed,
                )
            )

    def _reply_bytes(self, trip: Trip) -> int:
        """Return what the reply weighs, now that it sets off."""
        flight = self._flights.get(trip.message_id)
        if flight is None:  # abandoned, and nobody kept the instruction
            size = self._forgotten.pop(trip.message_id)
        elif flight.known_bytes is not None:
            size = flight.known_bytes
        else:
            if flight.reply is None:
                self._compute(needed=flight)
            assert flight.reply is not None
            size = self._count(flight.reply.content) if flight.reply.has_content() else 0
        size += self._header_bytes
        self._traffic.messages_sent += 1
        self._traffic.bytes_up += size
        return size

    def _arrive(self, trip: Trip) -> None:
        """Note that the reply is here, or can no longer come."""
        self._forgotten.pop(trip.message_id, None)
        flight = self._flights.get(trip.message_id)
        if trip.is_lost:
            self._traffic.messages_lost += 1
        elif flight is not None and trip.finished > flight.expires:
            trip.outcome = "expired"
        if trip.is_lost:
            self._lost.add(trip.message_id)
            self._uncomputed.pop(trip.message_id, None)
            if flight is not None:
                self._lose(flight)
        self._settle(trip.message_id, has_arrived=not trip.is_lost)
        self._waiting.discard(trip.message_id)

    def _lose(self, flight: _Flight) -> None:
        if self._loss_reply == "missing" or flight.message is None:
            del self._flights[flight.trip.message_id]
            return
        is_offline = flight.trip.outcome == "offline"
        code = compat.NODE_UNAVAILABLE if is_offline else compat.MESSAGE_UNAVAILABLE
        flight.reply = Message(Error(code, flight.trip.outcome), reply_to=flight.message)

    def _abandon(self, flight: _Flight) -> None:
        """Keep a late instruction only for as long as its sender does.

        `send_and_receive` gave it up, so only who still has the `Message` can know its id. Without
        this every late reply of a long run would keep a global model alive.
        """
        message, message_id = flight.message, flight.trip.message_id
        if message is None or flight.known_bytes is None or self._executor.is_stateful:
            return
        self._uncomputed.pop(message_id, None)

        def forget(_: object) -> None:
            if self._flights.pop(message_id, None) and flight.trip.outcome == "pending":
                self._forgotten[message_id] = flight.known_bytes or 0

        flight.sender = weakref.ref(message, forget)
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
            flights = [flight for flight in flights if not math.isnan(flight.trip.received)]
            flights.sort(key=lambda flight: flight.trip.received)
        messages = [flight.message for flight in flights if flight.message is not None]
        for flight, reply in zip(flights, self._executor(messages), strict=True):
            compat.set_message_id(reply, f"r{flight.trip.message_id}")
            flight.reply = reply
            self._uncomputed.pop(flight.trip.message_id, None)

    def _ready(self, ids: Iterable[str]) -> list[_Flight]:
        flights = (self._flights.get(message_id) for message_id in ids)
        return [flight for flight in flights if flight is not None and flight.is_ready]

    def _collect(self, ids: Iterable[str]) -> list[Message]:
        """Hand over the replies that are there, in the order of their instructions."""
        ready = sorted(self._ready(ids), key=lambda flight: int(flight.trip.message_id))
        late = [flight for flight in ready if flight.reply is None and flight.message is None]
        for flight in late:  # its sender has come back for it
            flight.message = flight.sender() if flight.sender else None
        if any(flight.reply is None for flight in ready):
            self._compute(late)
        replies, errors = [], []
        for flight in ready:
            assert flight.reply is not None
            del self._flights[flight.trip.message_id]
            self._note(flight.trip, flight.reply)
            replies.append(flight.reply)
            if flight.trip.outcome == "error":
                errors.append(f"device {flight.trip.device}: {flight.reply.error.reason}")
        if errors:
            self._traffic.error_replies += len(errors)
            _log.warning("%d of %d are error replies; %s", len(errors), len(replies), errors[0])
        return replies

    def _note(self, trip: Trip, reply: Message) -> None:
        """Count a reply that is handed over, and tell in it how it travelled."""
        if reply.has_error():
            trip.outcome = trip.outcome if trip.is_lost else "error"
            return
        records = reply.content.values()
        metrics = next((r for r in records if isinstance(r, MetricRecord)), None)
        if metrics is not None:
            noted = self._traffic.evaluate
            if _is_train_type(trip.kind):
                self._traffic.replied.add(trip.device)
                noted = self._traffic.train
            noted.append((trip.device, dict(metrics)))
        delivery = {
            "sent_bytes": trip.bytes_up,
            "received_bytes": trip.bytes_down,
            "started": trip.pushed,
            "finished": trip.finished,
        }
        compat.fill(reply.content, {"delivery": compat.fill(ConfigRecord(), delivery)})

    def _run_until(self, open_ids: set[str], deadline: float, *, needed: int) -> None:
        """Advance virtual time until `needed` of the instructions are decided, or `deadline`."""
        self._waiting = open_ids
        enough = len(open_ids) - needed
        env = self.env
        while len(self._waiting) > enough and (time := env.peek()) <= deadline:
            if math.isinf(time):
                why = self.network.why_stalled() or "no event is left in virtual time"
                raise NetworkError(
                    f"{len(self._waiting)} message(s) can never be delivered: {why}. Set "
                    "round_timeout to go on without them."
                )
            env.step()
        if len(self._waiting) > enough and env.now < deadline:
            env.run(until=deadline)


def _is_train(message: Message) -> bool:
    return _is_train_type(message.metadata.message_type)


def _is_train_type(message_type: str) -> bool:
    return message_type.partition(".")[0] == "train"
