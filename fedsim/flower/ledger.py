"""What is counted and recorded of the messages on a grid."""

import logging
from dataclasses import dataclass, field
from typing import Any

from fedsim.flower.collectives import steps_of
from fedsim.network import Delivery, Network, plan
from fedsim.network.exchange import Trip
from fedsim.recorder import ComputeRow, Recorder, TransferRow

__all__ = ["Ledger", "Traffic", "is_train_type"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Traffic:
    """What has happened on the grid since somebody last asked (see `NetworkGrid.take_traffic`).

    Attributes
    ----------
    bytes_down, bytes_up, bytes_peer : int
        Payloads released, counted once, end to end, lost ones included.
    messages_sent, messages_lost : int
        Messages released on the network, and those that did not arrive.
    error_replies : int
        Replies in which a device's app reported an error.
    first_error : str
        What the first of them says, and which device it is from.
    not_finite : list of int
        Devices whose train replies hold numbers that are not finite.
    selected, replied : set of int
        Devices that were sent a train instruction, and whose train reply was handed over.
    train, evaluate : list of (device, metrics)
        The metrics of the replies handed over.
    collectives : list of Report
        What the time of each collective that is over went into.
    """

    bytes_down: int = 0
    bytes_up: int = 0
    bytes_peer: int = 0
    messages_sent: int = 0
    messages_lost: int = 0
    error_replies: int = 0
    first_error: str = ""
    not_finite: list[int] = field(default_factory=list)
    selected: set[int] = field(default_factory=set)
    replied: set[int] = field(default_factory=set)
    train: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    evaluate: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    collectives: list[plan.Report] = field(default_factory=list)


class Ledger:
    """Counts messages, and records their payloads and the devices' work where asked to.

    Parameters
    ----------
    network : Network
        Names the links.

    Attributes
    ----------
    traffic : Traffic
        Of what has happened since it was last taken.
    recorder : Recorder or None
        Gets every payload and every span of work.
    """

    def __init__(self, network: Network) -> None:
        self.traffic = Traffic()
        self.recorder: Recorder | None = None
        self._network = network
        self._reported: set[int] = set()  # devices whose replies were not finite

    def take(self) -> Traffic:
        """Return what was counted, and start anew."""
        taken, self.traffic = self.traffic, Traffic()
        return taken

    def post(self, way: str, size_bytes: int, messages: int = 1) -> None:
        """Count what sets off: ``up`` or ``down``, to or from a server, or to a ``peer``."""
        traffic = self.traffic
        traffic.messages_sent += messages
        if way == "peer":
            traffic.bytes_peer += size_bytes
        elif way == "up":
            traffic.bytes_up += size_bytes
        else:
            traffic.bytes_down += size_bytes

    def observe(self, trip: Trip, way: str, delivery: Delivery) -> None:
        """Record a payload that has arrived or was given up.

        One between server and device that does not arrive is counted with its trip.
        """
        if way not in ("down", "up") and delivery.outcome != "delivered":
            self.traffic.messages_lost += 1
        if self.recorder is None:
            return
        kind = way if is_train_type(trip.kind) else f"{trip.kind.partition('.')[0]}-{way}"
        released = {"down": trip.pushed, "up": trip.computed}.get(way, delivery.started)
        self.recorder.transfer(
            TransferRow(
                round=trip.round,
                message=int(trip.message_id),
                kind=kind,
                source=delivery.source,
                destination=delivery.destination,
                released=released,
                started=delivery.started,
                first_byte=delivery.first_byte,
                finished=delivery.finished,
                size_bytes=delivery.size_bytes,
                outcome=delivery.outcome,
                route=tuple(self._network.link_name(link) for link in delivery.route),
            )
        )
        if way == "up":
            self.record_work(trip)

    def record_work(self, trip: Trip) -> None:
        """Record what a trip's device has done."""
        if self.recorder is not None:
            self.recorder.compute(
                ComputeRow(
                    round=trip.round,
                    device=trip.device,
                    kind=trip.kind.partition(".")[0],
                    started=trip.started,
                    finished=trip.computed,
                )
            )

    def note_collective(self, report: plan.Report) -> None:
        """Keep what the time of a collective went into."""
        self.traffic.collectives.append(report)
        if self.recorder is not None:
            for row in steps_of(report):
                self.recorder.step(row)

    def note_metrics(self, trip: Trip, metrics: dict[str, Any]) -> None:
        """Keep the metrics of a reply that is handed over; lists have no place in a line."""
        metrics = {k: value for k, value in metrics.items() if not isinstance(value, list)}
        if is_train_type(trip.kind):
            self.traffic.replied.add(trip.device)
            self.traffic.train.append((trip.device, metrics))
        else:
            self.traffic.evaluate.append((trip.device, metrics))

    def note_errors(self, errors: list[str], n_replies: int) -> None:
        """Count and report the error replies among those that are handed over."""
        self.traffic.error_replies += len(errors)
        self.traffic.first_error = self.traffic.first_error or errors[0]
        _log.warning("%d of %d are error replies; %s", len(errors), n_replies, errors[0])

    def note_not_finite(self, trip: Trip) -> None:
        """Report a train reply with numbers that are not finite: the strategy still gets it."""
        self.traffic.not_finite.append(trip.device)
        if trip.device not in self._reported:
            self._reported.add(trip.device)
            _log.warning(
                "round %d: device %d replied with numbers that are not finite",
                trip.round,
                trip.device,
            )


def is_train_type(message_type: str) -> bool:
    """Return whether a message of this type asks for training."""
    return message_type == "train" or message_type.startswith("train.")
