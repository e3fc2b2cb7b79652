"""Instructions that meet nothing else on their way, served by arithmetic instead of events.

In a synchronous round over links of the devices' own nobody shares anything: a payload takes the
latency of its route plus its bits at the narrowest bandwidth, and a device works as soon as its
instruction is there. Then the round's times are known without simulating it.

Decision: only where that is certain, as for collectives that come again (`fedsim.network.reuse`).
In all other cases every payload is simulated, and both ways give the same times to the last bit,
in the same order.
"""

from collections.abc import Sequence
from math import inf
from operator import attrgetter

from fedsim.network.clock import is_alone, pass_to
from fedsim.network.exchange import Service, Trip
from fedsim.network.payloads import Delivery, Way

__all__ = ["serve_alone"]

_Move = tuple[Delivery, Trip, str]  # and which way it went


def serve_alone(service: Service, trips: Sequence[Trip], deadline: float) -> bool:
    """Serve all of `trips` at once, as `Service.serve` does, if they meet nothing on their way.

    The caller answers for it that nobody pushes or cancels anything before.

    Parameters
    ----------
    service : Service
    trips : sequence of Trip
        At least one, released now.
    deadline : float, s
        When the caller will look at what has come.

    Returns
    -------
    bool
        Whether they were served: then virtual time is that of the last reply. Else nothing has
        happened.
    """
    ways = _foreseen(service, trips, deadline)
    if ways is None:
        return False
    network, compute = service.network, service.compute
    now = network.env.now
    ups = {trip.device: up for trip, (_, up) in zip(trips, ways, strict=True)}
    moves: list[_Move] = []
    worked: list[Trip] = []
    for trip, (down, _) in zip(trips, ways, strict=True):
        download = network.carry_alone(down, trip.bytes_down, now)
        moves.append((download, trip, "down"))
    for download, trip, _ in sorted(moves, key=_moment):
        trip.received = download.finished
        compute.count_bytes(trip.device, received=trip.bytes_down)
        trip.started, trip.computed, _ = compute.occupy(trip.device, trip.received, trip.samples)
        worked.append(trip)
    for trip in sorted(worked, key=attrgetter("computed")):
        trip.bytes_up = service.reply_bytes(trip)
        compute.count_bytes(trip.device, sent=trip.bytes_up)
        upload = network.carry_alone(ups[trip.device], trip.bytes_up, trip.computed)
        moves.append((upload, trip, "up"))
    moves.sort(key=_moment)
    pass_to(network.env, moves[-1][0].finished)
    for delivery, trip, way in moves:
        service.observe(trip, way, delivery)
        if way == "up":
            trip.outcome, trip.finished = "ok", delivery.finished
            service.done(trip)
    return True


def _foreseen(
    service: Service, trips: Sequence[Trip], deadline: float
) -> list[tuple[Way, Way]] | None:
    """Return the way down and up of each, if nothing can happen to any of them on it."""
    network, compute = service.network, service.compute
    server, now = network.server, network.env.now
    wire_bits = network.options.wire_bits
    if server is None or not network.is_predictable or not is_alone(network.env, inf):
        return None
    if len({trip.device for trip in trips}) < len(trips) or any(trip.broadcast for trip in trips):
        return None
    ways = [(network.way(server, trip.device), network.way(trip.device, server)) for trip in trips]
    # Its way down and its way up may be one link: it is never on both.
    shared = [{*down.shared, *up.shared} for down, up in ways]
    if len(set().union(*shared)) < sum(map(len, shared)):
        return None
    for trip, (down, up) in zip(trips, ways, strict=True):
        device = trip.device
        _, received = down.times(wire_bits(trip.bytes_down), now)
        _, ended, is_done = compute.forecast(device, received, trip.samples)
        is_there = compute.is_available(device, now) and compute.is_available(device, received)
        if not (is_done and is_there):
            return None
        if deadline < inf:
            size = service.known_bytes(trip)
            if size is None or up.times(wire_bits(size), ended)[1] > deadline:
                return None
    return ways


def _moment(move: _Move) -> tuple[float, float, float]:
    """Return what payloads are in the order of, where several arrive at one instant."""
    delivery = move[0]
    return delivery.finished, delivery.first_byte, delivery.started
