"""Who sends what to whom for one instruction; knows nothing of Flower.

An instruction is a `Trip`: its device waits for its turn, works, and a reply becomes available.
Every kind of exchange drives trips: `Service`, here, goes by way of the server,
`fedsim.network.neighbours` between devices, `fedsim.network.collective` by a schedule. Nothing is a
SimPy process: a trip is driven by the callbacks of a few events.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import simpy

from fedsim.errors import NetworkError
from fedsim.network.clock import At
from fedsim.network.payloads import Delivery
from fedsim.network.transfers import Network

__all__ = ["Broadcast", "Compute", "Service", "Trip", "then"]


class Compute(Protocol):
    """What a trip needs to know of the devices."""

    def is_available(self, device: int, time: float) -> bool:
        """Return whether the device is there at `time`."""

    def forecast(self, device: int, time: float, samples: float) -> tuple[float, float, bool]:
        """Return when work would begin (NaN: never) and end (s), and whether it would be done.

        It waits behind what the device does already; what is not done is dropped by a device that
        goes away.
        """

    def occupy(self, device: int, time: float, samples: float) -> tuple[float, float, bool]:
        """Queue such work, and return the same."""

    def count_bytes(self, device: int, *, sent: int = 0, received: int = 0) -> None:
        """Count what a device has sent or received, headers included."""

    def next_change(self, time: float) -> float:
        """Return when a device next comes or goes after `time`; inf if none ever does."""


class Cancellable(Protocol):
    """What can be taken off the network."""

    def cancel(self) -> None:
        """Take it off; without effect if it is over."""


@dataclass(slots=True, eq=False)
class Broadcast:
    """What is the same for several devices, sent once to all of them.

    Attributes
    ----------
    copies : mapping of int to int
        Link id → how many of the devices are reached over it.
    is_counted : bool
        Whether its bytes were counted.
    """

    copies: Mapping[int, int]
    is_counted: bool = False


@dataclass(slots=True, eq=False)
class Trip:
    """One instruction and its reply in virtual time.

    Attributes
    ----------
    message_id, device, kind
        The instruction's id, the device it goes to, its type ("train", "evaluate", ...).
    round : int
        The round it belongs to.
    samples : float
        Training samples' worth of work at the device.
    last_step : float
        Share of its work that its last step of optimisation takes.
    bytes_down, bytes_up : int
        Payloads that came to the device and that it sent, known when they are on their way.
    pushed, received, started, computed, finished : float
        Virtual seconds: handed over by the strategy, at the device, work begins, work done, the
        device's part is over (its reply is at the server, or the trip failed). NaN until they
        happen; `started` and `computed` are known, and set, as soon as the device begins.
    exchange : {"server", "neighbours", "collective"}
        How it travels.
    server : int or None
        The edge server that serves it, if one does.
    neighbours : tuple of int
        Devices that it sent its payload to (between neighbours), or whose vectors are in the sum
        besides its own (collective).
    payloads : dict of int to object, or None
        Sender → what its payload carries, of those that came in time (between neighbours only).
    is_closed : bool
        Nobody asks for its reply any more: it was handed over or given up.
    outcome : str
        ``pending``, ``ok``, ``error`` (the app failed), ``offline``, ``lost-down``, ``lost-up``,
        ``failed-down``, ``failed-up`` (a link broke), ``failed-device`` (the device went away and
        dropped the work), ``cancelled-down``, ``cancelled`` (during its work), ``cancelled-up``
        or ``expired`` (the reply outlived its TTL).
    transfer : Cancellable or None
        What is under way for it: a payload between server and device, or a whole collective.
    broadcast : Broadcast or None
        What its download is a copy of.
    """

    message_id: str
    device: int
    kind: str
    pushed: float
    round: int = 0
    samples: float = 0.0
    last_step: float = 1.0
    bytes_down: int = 0
    bytes_up: int = 0
    received: float = math.nan
    started: float = math.nan
    computed: float = math.nan
    finished: float = math.nan
    outcome: str = "pending"
    exchange: str = "server"
    server: int | None = None
    neighbours: tuple[int, ...] = ()
    payloads: dict[int, Any] | None = None
    is_closed: bool = False
    is_cancelled: bool = False
    transfer: Cancellable | None = None
    broadcast: Broadcast | None = None

    def cancel(self) -> None:
        """Take what is under way for it off the network; send no reply when its work is done."""
        self.is_cancelled = True
        if self.transfer is not None:
            self.transfer.cancel()

    @property
    def has_arrived(self) -> bool:
        """Whether a reply is available."""
        return self.outcome in ("ok", "error")

    @property
    def is_lost(self) -> bool:
        """Whether no reply will ever come."""
        return self.outcome != "pending" and not self.has_arrived


@dataclass(frozen=True, slots=True)
class Service:
    """Instructions by way of the server: one serves any number of them.

    Attributes
    ----------
    network, compute
        Who carries and who works.
    reply_bytes : callable
        Called when a trip's work is done, gives the size of the reply.
    done : callable
        Called once for each trip, when its reply has arrived or can no longer come.
    observe : callable
        Called with the trip, ``down`` or ``up``, and the delivery, when either payload has arrived
        or was given up.
    known_bytes : callable
        Gives the size of a reply where it is known before the work is done.
    """

    network: Network
    compute: Compute
    reply_bytes: Callable[[Trip], int]
    done: Callable[[Trip], None]
    observe: Callable[[Trip, str, Delivery], None] = lambda trip, way, delivery: None
    known_bytes: Callable[[Trip], int | None] = lambda trip: None

    def serve(self, trip: Trip, server: int | None = None) -> None:
        """Send `trip` from the server to its device, let it work there, and bring the reply back.

        Parameters
        ----------
        trip : Trip
            Its times and outcome are filled in as they happen.
        server : int, optional
            The node that serves; default: the network's server.

        Raises
        ------
        NetworkError
            If there is no server, or no route between it and the device.
        """
        network, env = self.network, self.network.env
        server = network.server if server is None else server
        if server is None:
            raise NetworkError("the network has no server; an exchange by way of it needs one")
        if not self.compute.is_available(trip.device, env.now):
            At(env, env.now, partial(self._end, trip, "offline"))
            return
        copies = None if trip.broadcast is None else trip.broadcast.copies
        download = network.transfer(server, trip.device, trip.bytes_down, copies=copies)
        trip.transfer = download
        then(download, partial(self._receive, trip, server))

    def _receive(self, trip: Trip, server: int, event: simpy.Event) -> None:
        if not self._is_delivered(trip, event, "down"):
            return
        env, compute = self.network.env, self.compute
        trip.received, trip.transfer = env.now, None
        if not compute.is_available(trip.device, env.now):
            self._end(trip, "offline")
            return
        compute.count_bytes(trip.device, received=trip.bytes_down)
        trip.started, ended, is_done = compute.occupy(trip.device, env.now, trip.samples)
        if is_done:
            trip.computed = ended
            At(env, ended, partial(self._reply, trip, server))
        else:
            At(env, ended, partial(self._end, trip, "failed-device"))

    def _reply(self, trip: Trip, server: int, event: simpy.Event) -> None:
        if trip.is_cancelled:
            self._end(trip, "cancelled")
            return
        trip.bytes_up = self.reply_bytes(trip)
        self.compute.count_bytes(trip.device, sent=trip.bytes_up)
        trip.transfer = upload = self.network.transfer(trip.device, server, trip.bytes_up)
        then(upload, partial(self._arrive, trip))

    def _arrive(self, trip: Trip, event: simpy.Event) -> None:
        if self._is_delivered(trip, event, "up"):
            self._end(trip, "ok")

    def _is_delivered(self, trip: Trip, event: simpy.Event, way: str) -> bool:
        delivery = cast(Delivery, event.value)
        self.observe(trip, way, delivery)
        if delivery.outcome == "delivered":
            return True
        self._end(trip, f"{'cancelled' if trip.is_cancelled else delivery.outcome}-{way}")
        return False

    def _end(self, trip: Trip, outcome: str, event: simpy.Event | None = None) -> None:
        trip.outcome, trip.finished, trip.transfer = outcome, self.network.env.now, None
        self.done(trip)


def then(event: simpy.Event, callback: Callable[[simpy.Event], None]) -> None:
    """Call back when an event happens; at once if it has."""
    if event.callbacks is None:  # already happened
        callback(event)
    else:
        event.callbacks.append(callback)
