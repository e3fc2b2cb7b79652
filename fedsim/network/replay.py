"""Replay of a reference case: one small network, its flows, and when each of them completes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import simpy

from fedsim.errors import ScenarioError
from fedsim.network.links import LinkEnds, LinkState, Steps
from fedsim.network.options import TransferOptions
from fedsim.network.payloads import Delivery
from fedsim.network.transfers import Network
from fedsim.network.wiring import LinkTable, ListedWiring

__all__ = ["deliveries_of", "replay"]


def replay(case: Mapping[str, Any]) -> list[float | None]:
    """Return the completion time (s) of each flow of a case, in order; None if it failed.

    Parameters
    ----------
    case : mapping
        ``links``: each with ``id``, ``bandwidth_bps``, ``latency_s``; optionally ``profile``
        ([[time, bit/s], …]), ``state_profile`` ([[time, 0 or 1], …]; going down fails what is on
        the link), ``sharing`` (``fatpipe``: not shared; ``airtime``: capacity is seconds of air a
        second) and ``station_rate_bps`` (airtime: PHY rate of each station).
        ``flows``: each with ``route`` (link ids), ``bytes``, ``start_s``; optionally ``cap_bps``,
        ``weight``, ``consumption`` (link id → capacity that one bit/s takes), or ``src`` and
        ``dst`` (airtime: the flow is sent by the one and received by the other station).

    Raises
    ------
    ScenarioError
        If the case lacks a field or names a link that it does not have.
    """
    try:
        deliveries = deliveries_of(case)
    except (KeyError, TypeError, ValueError) as error:
        name = case.get("name", "?") if isinstance(case, Mapping) else "?"
        raise ScenarioError(
            f"network case {name!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    return [
        delivery.finished if delivery is not None and delivery.outcome == "delivered" else None
        for delivery in deliveries
    ]


def deliveries_of(case: Mapping[str, Any]) -> list[Delivery | None]:
    """Return what became of each flow; None if nothing did."""
    links = {str(link["id"]): link for link in case["links"]}
    if len(links) < len(case["links"]):
        raise ValueError("a link is named twice")
    # A link may begin without bandwidth here; its profile then says so from time 0.
    table = LinkTable(
        np.array([float(link["bandwidth_bps"]) or 1.0 for link in links.values()]),
        np.array([float(link.get("latency_s") or 0.0) for link in links.values()]),
        unshared=np.array([link.get("sharing") == "fatpipe" for link in links.values()]),
    )
    env = simpy.Environment()
    network = Network(
        env,
        table,
        ListedWiring(list(links)),
        options=TransferOptions(link_down="fail"),
        link_model=_Profiles(links),
    )
    deliveries: list[Delivery | None] = [None] * len(case["flows"])

    def send(index: int, flow: Mapping[str, Any]) -> simpy.events.ProcessGenerator:
        yield env.timeout(float(flow["start_s"]))
        deliveries[index] = yield network.transfer(
            0,
            0,
            flow["bytes"],
            weight=_or(flow.get("weight"), 1.0),
            cap_bps=_or(flow.get("cap_bps"), np.inf),
            route=[str(link) for link in flow["route"]],
            consumption=_consumption(flow, links),
        )

    for index, flow in enumerate(case["flows"]):
        env.process(send(index, flow))
    env.run()
    return deliveries


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _consumption(
    flow: Mapping[str, Any], links: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Return what one bit/s of a flow takes of its airtime links."""
    given = {str(link): float(value) for link, value in (flow.get("consumption") or {}).items()}
    for name in map(str, flow["route"]):
        rates = links[name].get("station_rate_bps") or {}
        if links[name].get("sharing") == "airtime" and name not in given:
            hops = [rates[end] for end in (flow.get("src"), flow.get("dst")) if end in rates]
            if hops:
                given[name] = sum(1 / rate for rate in hops)
    return given


class _Profiles:
    """The link model of a case: what its profiles say."""

    def __init__(self, links: Mapping[str, Mapping[str, Any]]) -> None:
        self._links = links

    def bind(self, seed: int, link: LinkEnds) -> Steps | None:
        """Return the history of one link; None if it has no profile."""
        given = self._links[link.name]
        bandwidth = float(given["bandwidth_bps"])
        rates = [(float(time), float(rate)) for time, rate in given.get("profile") or ()]
        states = [(float(time), bool(up)) for time, up in given.get("state_profile") or ()]
        if not rates and not states and bandwidth > 0:
            return None
        changes: dict[float, tuple[float, bool]] = {}
        is_up = True
        events = [(0.0, 0, bandwidth)]
        events += [(time, 0, rate) for time, rate in rates]
        events += [(time, 1, up) for time, up in states]
        for time, kind, value in sorted(events, key=lambda event: event[0]):
            if kind == 0:
                bandwidth = float(value)
            else:
                is_up = bool(value)
            changes[time] = (bandwidth, is_up)
        return Steps(
            list(changes),
            [LinkState(is_up=up, bandwidth_bps=rate) for rate, up in changes.values()],
        )
