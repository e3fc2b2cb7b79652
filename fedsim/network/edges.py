"""Instructions by way of edge servers: the first node on a device's way to the server serves it.

An edge server may first fetch the model from the server, once for all its devices, and afterwards
send the server one payload that stands for the replies of all of them (`Backhaul`). What the edge
server does with the replies in between is the strategy's business and takes no time.

Decision: an edge server with a payload to send waits for all its devices of a push whose replies
can still come. A round's timeout, which the server keeps, is what bounds the wait.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import simpy

from fedsim.errors import NetworkError
from fedsim.network.exchange import Compute, Trip, serve, then
from fedsim.network.transfers import Delivery, Network

__all__ = ["Backhaul", "EdgeHooks", "edge_of", "serve_by_edge"]

Backhaul = Literal["none", "down", "up", "both"]


@dataclass(frozen=True, slots=True)
class EdgeHooks:
    """What a group of trips asks and tells whoever made them.

    Attributes
    ----------
    release : callable
        Told a trip whose payload sets off from the edge server.
    reply_bytes, done
        As for `exchange.serve`.
    post : callable
        Told the way (``down``, ``up``) and size of a payload between server and edge server, and
        ``lost`` and 0 when one does not arrive.
    observe : callable or None
        As for `exchange.serve`; the way is ``backhaul`` between server and edge server.
    """

    release: Callable[[Trip], None]
    reply_bytes: Callable[[Trip], int]
    done: Callable[[Trip], None]
    post: Callable[[str, int], None]
    observe: Callable[[Trip, str, Delivery], None] | None = None


def edge_of(network: Network, device: int) -> int:
    """Return the first node on a device's way to the server.

    Raises
    ------
    NetworkError
        If there is no server, or it is that node itself.
    """
    if network.server is None:
        raise NetworkError("the network has no server; edge servers are on the way to it")
    ends = network.link_ends_of(network.route(device, network.server)[0])
    edge = next(node for node in ends if node != device)
    if edge == network.server:
        raise NetworkError(
            f"device {device} is linked to the server itself: an exchange by way of edge servers "
            "needs a topology that has some, such as {kind: tree, fanouts: [4, 5]}"
        )
    return edge


def serve_by_edge(
    network: Network,
    compute: Compute,
    trips: Sequence[Trip],
    edge: int,
    backhaul: Backhaul,
    hooks: EdgeHooks,
) -> None:
    """Send the trips of one push from their edge server to its devices, and bring replies back.

    Parameters
    ----------
    network, compute
        Who carries and who works.
    trips : sequence of Trip
        All devices of `edge`, with one size down. Their times and outcomes are filled in.
    edge : int
        Node of the edge server.
    backhaul : {"none", "down", "up", "both"}
        What travels between server and edge server: the model before, the devices' replies as one
        payload of a reply's size after, or both. A trip is over when its reply is at the edge
        server, or, if something is sent up, when that is at the server.
    hooks : EdgeHooks
    """
    assert network.server is not None
    server, open_trips, arrived = network.server, len(trips), list[Trip]()

    def begin() -> None:
        for trip in trips:
            hooks.release(trip)
            serve(
                network,
                compute,
                trip,
                reply_bytes=hooks.reply_bytes,
                done=settle,
                observe=hooks.observe,
                server=edge,
            )

    def fail(failed: Sequence[Trip], outcome: str) -> None:
        for trip in failed:
            trip.outcome, trip.finished = outcome, network.env.now
            hooks.done(trip)

    def carry(way: str, size: int, go_on: Callable[[], None], who: Sequence[Trip]) -> None:
        ends = (server, edge) if way == "down" else (edge, server)
        hooks.post(way, size)

        def come(event: simpy.Event) -> None:
            delivery = cast(Delivery, event.value)
            if hooks.observe is not None:
                hooks.observe(who[0], "backhaul", delivery)
            if delivery.outcome == "delivered":
                go_on()
            else:
                hooks.post("lost", 0)
                fail(who, f"{delivery.outcome}-{way}")

        then(network.transfer(*ends, size), come)

    def settle(trip: Trip) -> None:
        nonlocal open_trips
        open_trips -= 1
        if trip.outcome == "ok" and backhaul in ("up", "both"):
            trip.outcome = "pending"  # it is at the edge server only
            arrived.append(trip)
        else:
            hooks.done(trip)
        if not open_trips and arrived:
            carry("up", max(each.bytes_up for each in arrived), finish, arrived)

    def finish() -> None:
        for trip in arrived:
            trip.outcome = "cancelled" if trip.is_cancelled else "ok"
            trip.finished = network.env.now
            hooks.done(trip)

    if backhaul in ("down", "both"):
        carry("down", max(trip.bytes_down for trip in trips), begin, trips)
    else:
        begin()
