"""Who sends what to whom for one instruction; knows nothing of Flower.

An instruction is a `Trip`: its device waits for its turn, works, and a reply becomes available.
Every kind of exchange drives trips: `serve`, here, goes by way of the server,
`fedsim.network.neighbours` between devices, `fedsim.network.collective` by a schedule. Nothing is a
SimPy process: a trip is driven by the callbacks of a few events.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import simpy

from fedsim.errors import NetworkError
from fedsim.network.clock import At
from fedsim.network.transfers import Delivery, Network

__all__ = ["Broadcast", "Compute", "Trip", "serve", "then"]


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
    payloads : dict of int to object
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
    payloads: dict[int, Any] = field(default_factory=dict)
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


def serve(
    network: Network,
    compute: Compute,
    trip: Trip,
    *,
    reply_bytes: Callable[[Trip], int],
    done: Callable[[Trip], None],
    observe: Callable[[Trip, str, Delivery], None] | None = None,
    server: int | None = None,
) -> None:
    """Send `trip` from the server to its device, let it work there, and bring the reply back.

    Parameters
    ----------
    network, compute
        Who carries and who works.
    trip : Trip
        Its times and outcome are filled in as they happen.
    reply_bytes : callable
        Called when the work is done, gives the size of the reply.
    done : callable
        Called once, when the reply has arrived or can no longer come.
    observe : callable, optional
        Called with the trip, ``down`` or ``up``, and the delivery, when either payload has arrived
        or was given up.
    server : int, optional
        The node that serves; default: the network's server.

    Raises
    ------
    NetworkError
        If there is no server, or no route between it and the device.
    """
    env = network.env
    server = network.server if server is None else server
    if server is None:
        raise NetworkError("the network has no server; an exchange by way of it needs one")
    node = server

    def end(outcome: str) -> None:
        trip.outcome, trip.finished, trip.transfer = outcome, env.now, None
        done(trip)

    def is_delivered(event: simpy.Event, way: str) -> bool:
        delivery = cast(Delivery, event.value)
        if observe is not None:
            observe(trip, way, delivery)
        if delivery.outcome == "delivered":
            return True
        end(f"{'cancelled' if trip.is_cancelled else delivery.outcome}-{way}")
        return False

    def receive(event: simpy.Event) -> None:
        if not is_delivered(event, "down"):
            return
        trip.received, trip.transfer = env.now, None
        if not compute.is_available(trip.device, env.now):
            end("offline")
            return
        compute.count_bytes(trip.device, received=trip.bytes_down)
        trip.started, ended, is_done = compute.occupy(trip.device, env.now, trip.samples)
        if is_done:
            trip.computed = ended
            At(env, ended, reply)
        else:
            At(env, ended, lambda _: end("failed-device"))

    def reply(_: simpy.Event) -> None:
        if trip.is_cancelled:
            end("cancelled")
            return
        trip.bytes_up = reply_bytes(trip)
        compute.count_bytes(trip.device, sent=trip.bytes_up)
        trip.transfer = upload = network.transfer(trip.device, node, trip.bytes_up)
        then(upload, arrive)

    def arrive(event: simpy.Event) -> None:
        if is_delivered(event, "up"):
            end("ok")

    if compute.is_available(trip.device, env.now):
        copies = None if trip.broadcast is None else trip.broadcast.copies
        download = network.transfer(node, trip.device, trip.bytes_down, copies=copies)
        trip.transfer = download
        then(download, receive)
    else:
        At(env, env.now, lambda _: end("offline"))


def then(event: simpy.Event, callback: Callable[[simpy.Event], None]) -> None:
    """Call back when an event happens; at once if it has."""
    if event.callbacks is None:  # already happened
        callback(event)
    else:
        event.callbacks.append(callback)
