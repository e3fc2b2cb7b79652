"""Instructions by way of edge servers: the first node on a device's way to the server serves it.

An edge server may first fetch the model from the server, once for all its devices, and afterwards
send the server one payload that stands for the replies of all of them (`Backhaul`). What the edge
server does with the replies in between is the strategy's business and takes no time.

Decision: an edge server with a payload to send waits for all its devices of a push whose replies
can still come. A round's timeout, which the server keeps, is what bounds the wait.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, cast

import simpy

from fedsim.errors import NetworkError
from fedsim.network.exchange import Service, Trip, then
from fedsim.network.payloads import Delivery
from fedsim.network.transfers import Network

__all__ = ["Backhaul", "edge_of", "serve_by_edge"]

Backhaul = Literal["none", "down", "up", "both"]


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
    service: Service,
    trips: Sequence[Trip],
    edge: int,
    backhaul: Backhaul,
    *,
    release: Callable[[Trip], None],
    post: Callable[[str, int], None],
) -> None:
    """Send the trips of one push from their edge server to its devices, and bring replies back.

    Parameters
    ----------
    service : Service
        Whose `observe` is told ``backhaul`` for payloads between server and edge server.
    trips : sequence of Trip
        All devices of `edge`, with one size down. Their times and outcomes are filled in.
    edge : int
        Node of the edge server.
    backhaul : {"none", "down", "up", "both"}
        What travels between server and edge server: the model before, the devices' replies as one
        payload of a reply's size after, or both. A trip is over when its reply is at the edge
        server, or, if something is sent up, when that is at the server.
    release : callable
        Told a trip whose payload sets off from the edge server.
    post : callable
        Told the way (``down``, ``up``) and size of a payload between server and edge server.
    """
    network = service.network
    assert network.server is not None
    server, open_trips, arrived = network.server, len(trips), list[Trip]()

    def begin() -> None:
        for trip in trips:
            release(trip)
            by_edge.serve(trip, edge)

    def fail(failed: Sequence[Trip], outcome: str) -> None:
        for trip in failed:
            trip.outcome, trip.finished = outcome, network.env.now
            service.done(trip)

    def carry(way: str, size: int, go_on: Callable[[], None], who: Sequence[Trip]) -> None:
        ends = (server, edge) if way == "down" else (edge, server)
        post(way, size)

        def come(event: simpy.Event) -> None:
            delivery = cast(Delivery, event.value)
            service.observe(who[0], "backhaul", delivery)
            if delivery.outcome == "delivered":
                go_on()
            else:
                fail(who, f"{delivery.outcome}-{way}")

        then(network.transfer(*ends, size), come)

    def settle(trip: Trip) -> None:
        nonlocal open_trips
        open_trips -= 1
        if trip.outcome == "ok" and backhaul in ("up", "both"):
            trip.outcome = "pending"  # it is at the edge server only
            arrived.append(trip)
        else:
            service.done(trip)
        if not open_trips and arrived:
            carry("up", max(each.bytes_up for each in arrived), finish, arrived)

    def finish() -> None:
        for trip in arrived:
            trip.outcome = "cancelled" if trip.is_cancelled else "ok"
            trip.finished = network.env.now
            service.done(trip)

    by_edge = replace(service, done=settle)
    if backhaul in ("down", "both"):
        carry("down", max(trip.bytes_down for trip in trips), begin, trips)
    else:
        begin()
