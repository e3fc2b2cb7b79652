"""What travels besides the payload, and how fast a protocol lets it: headers, windows, loss.

All of it is off by default. Nothing is corrected behind the user's back: without options a payload
takes the latencies of its route plus 8 × bytes / rate.

References
----------
.. [1] Mathis, Semke, Mahdavi, Ott, "The macroscopic behavior of the TCP congestion avoidance
   algorithm", ACM CCR 27(3), 1997 (rate of loss-based TCP).
.. [2] RFC 6928, "Increasing TCP's Initial Window" (ten segments).
"""

from dataclasses import dataclass
from math import ceil, inf, sqrt
from typing import Literal

from fedsim.errors import NetworkError
from fedsim.units import Duration, Size

__all__ = ["TransferOptions"]

_INITIAL_SEGMENTS = 10
_SEGMENTS_PER_ACK = 2  # delayed acknowledgements
_MIN_LOSSES = 10.0  # below so many expected losses a transfer is not limited by loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """How payloads travel; everything beyond latency and fair sharing is off by default.

    Attributes
    ----------
    message_loss : float
        Probability that a whole message is lost, whatever the links: it uses the network as usual
        and is reported lost at the time it would have arrived.
    loss : {"none", "goodput", "tcp", "drop"}
        What the links' own packet loss p does. ``none``: nothing. ``goodput``: lost packets are
        sent again, so a payload takes 1 / (1 - p) of its rate from each link (congestion control
        that ignores loss, such as BBR). ``tcp``: as goodput, and the rate is at most
        MSS / RTT · sqrt(3 / 4p), for loss-based congestion control; applied where ten losses or
        more are expected, far off for BBR. ``drop``: datagrams, nothing is sent again; a message
        of n packets arrives whole with probability (1 - p)^n, else it is lost.
    link_down : {"stall", "fail", "reroute"}
        What a link that goes down does to payloads on it: they wait and go on where they were;
        they fail at once; they take another route (and wait where there is none).
    stall_timeout : float, s, optional
        A payload fails after its rate has been 0 for this long without interruption.
    timeout : float, s, optional
        A payload fails this long after it was first sent, whatever its state.
    retries : int
        How often a message that was lost or failed (not: timed out) is sent again, from its start.
    backoff : float, s
        Wait before the first retry; doubles with each.
    header_bytes : int
        Added to every message.
    packet_bytes : int
        Payload of one packet (the MSS of TCP over Ethernet with timestamps).
    packet_header_bytes : int
        Added to every packet of a message.
    header_efficiency : float
        Share of the links' capacity that is payload, in (0, 1]; 1448 / 1500 = 0.9653 for TCP over
        1500-byte packets. Use either this or `packet_header_bytes`.
    handshake_rtts : float
        Round trips before a payload sets off.
    startup : {"none", "slow_start"}
        ``slow_start``: the rate begins at ten packets a round trip and doubles with each.
    window_bytes : int, optional
        At most so much is under way: the rate is at most window / RTT.
    fairness : {"maxmin", "rtt", "none"}
        How payloads share a link: equally (times their weight); in inverse proportion to the
        latency of their routes, as TCP Reno approximates; not at all (each as if it were alone).
    multipath : {"spray", "hash", "single"}
        How a collective's messages use several equally short routes: split evenly over them; one
        for each pair of nodes, drawn by a hash; always the first. What else travels takes one.
    """

    message_loss: float = 0.0
    loss: Literal["none", "goodput", "tcp", "drop"] = "none"
    link_down: Literal["stall", "fail", "reroute"] = "stall"
    stall_timeout: Duration | None = None
    timeout: Duration | None = None
    retries: int = 0
    backoff: Duration = 1.0
    header_bytes: Size = 0
    packet_bytes: Size = 1448
    packet_header_bytes: Size = 0
    header_efficiency: float = 1.0
    handshake_rtts: float = 0.0
    startup: Literal["none", "slow_start"] = "none"
    window_bytes: Size | None = None
    fairness: Literal["maxmin", "rtt", "none"] = "maxmin"
    multipath: Literal["spray", "hash", "single"] = "spray"

    def __post_init__(self) -> None:
        choices = {
            "loss": ("none", "goodput", "tcp", "drop"),
            "link_down": ("stall", "fail", "reroute"),
            "startup": ("none", "slow_start"),
            "fairness": ("maxmin", "rtt", "none"),
            "multipath": ("spray", "hash", "single"),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise NetworkError(f"{name} is {getattr(self, name)!r}; one of {', '.join(valid)}")
        rules = [
            (0 <= self.message_loss < 1, "message_loss must be at least 0 and below 1"),
            (
                self.stall_timeout is None or self.stall_timeout > 0,
                "stall_timeout must be positive",
            ),
            (self.timeout is None or self.timeout > 0, "timeout must be positive"),
            (self.retries >= 0, "retries must not be negative"),
            (self.backoff >= 0, "backoff must not be negative"),
            (self.header_bytes >= 0, "header_bytes must not be negative"),
            (self.packet_bytes > 0, "packet_bytes must be positive"),
            (self.packet_header_bytes >= 0, "packet_header_bytes must not be negative"),
            (0 < self.header_efficiency <= 1, "header_efficiency must be above 0, at most 1"),
            (self.handshake_rtts >= 0, "handshake_rtts must not be negative"),
            (self.window_bytes is None or self.window_bytes > 0, "window_bytes must be positive"),
        ]
        for is_kept, rule in rules:
            if not is_kept:
                name = rule.partition(" ")[0]
                raise NetworkError(f"{rule}, got {getattr(self, name)}")

    def packets(self, size_bytes: int) -> int:
        """Return the number of packets of a message."""
        return ceil(size_bytes / self.packet_bytes)

    def wire_bits(self, size_bytes: float) -> float:
        """Return the bits that a message puts on the network, headers included."""
        n_bytes = size_bytes + self.header_bytes
        if self.packet_header_bytes:
            n_bytes += ceil(n_bytes / self.packet_bytes) * self.packet_header_bytes
        return 8.0 * n_bytes

    def setup(self, latency: float) -> float:
        """Return the time (s) before the first byte, given the latency of the route."""
        return latency * (1.0 + 2.0 * self.handshake_rtts)

    def consumption(self, loss: float) -> float:
        """Return the capacity that one bit/s of payload takes on each link."""
        sent_again = 1.0 - loss if self.loss in ("goodput", "tcp") else 1.0
        return 1.0 / (self.header_efficiency * sent_again)

    def rate_cap(self, size_bytes: int, latency: float, loss: float) -> float:
        """Return the largest rate (bit/s) that window and loss allow on a route."""
        if latency <= 0:
            return inf
        rtt = 2.0 * latency
        cap = inf if self.window_bytes is None else 8.0 * self.window_bytes / rtt
        if self.loss == "tcp" and loss * size_bytes / self.packet_bytes >= _MIN_LOSSES:
            segments = sqrt(3.0 / (2.0 * _SEGMENTS_PER_ACK * loss))
            cap = min(cap, 8.0 * self.packet_bytes / rtt * segments)
        return cap

    def first_rate(self, latency: float) -> float:
        """Return the rate (bit/s) of the first round trip of a slow start; inf without one."""
        if self.startup == "none" or latency <= 0:
            return inf
        return 8.0 * _INITIAL_SEGMENTS * self.packet_bytes / (2.0 * latency)

    def weight(self, latency: float) -> float:
        """Return the weight of a payload on a route of this latency."""
        return 1.0 / latency if self.fairness == "rtt" and latency > 0 else 1.0
