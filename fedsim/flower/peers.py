"""What instructions to exchange with neighbours mean on the grid: whom with, how, what came."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy

import networkx as nx
from flwr.app import ArrayRecord, Message

from fedsim.errors import NetworkError, PayloadError
from fedsim.flower import compat
from fedsim.flower.instructions import NODE_BASE, Exchange
from fedsim.flower.records import LazyArrayRecord
from fedsim.network.exchange import Trip
from fedsim.network.neighbours import Manner

__all__ = ["Group", "PeerGraph", "agreed_manners", "check_node", "group", "peers_of", "received"]

PeerGraph = Callable[[int], "nx.Graph[int]"]
"""Who may exchange with whom in a round; its nodes are devices."""

Group = tuple[list[Trip], dict[int, list[int]]]
"""Instructions that exchange with each other, and device → whom each may send to."""


def check_node(node_id: int, n_devices: int) -> None:
    """Raise NetworkError if there is no such node."""
    if not 0 <= node_id - NODE_BASE < n_devices:
        last = NODE_BASE + n_devices - 1
        raise NetworkError(f"there is no node {node_id}; nodes are {NODE_BASE} to {last}")


def peers_of(
    node_id: int, exchange: Exchange, number: int | None, graph_at: PeerGraph | None, n_devices: int
) -> list[int]:
    """Return the devices that a node may send to, ascending.

    Parameters
    ----------
    node_id : int
        Whose instruction it is.
    exchange : Exchange
        What the instruction says.
    number : int or None
        The round that it names.
    graph_at : PeerGraph, optional
        Says it for instructions that name no peers.
    n_devices : int

    Raises
    ------
    PayloadError
        If the instruction names no round, or nothing says who its neighbours are.
    NetworkError
        If it names a node that does not exist.
    """
    if number is None:
        raise PayloadError(
            "an exchange between neighbours needs the int 'server-round' in a ConfigRecord: it "
            "says which payloads belong together"
        )
    device = node_id - NODE_BASE
    if exchange.peers is not None:
        for peer in exchange.peers:
            check_node(peer, n_devices)
        if node_id in exchange.peers:
            raise PayloadError(f"exchange.peers of node {node_id} names itself")
        return sorted(peer - NODE_BASE for peer in exchange.peers)
    if graph_at is None:
        raise PayloadError(
            "an exchange between neighbours without neighbours: the topology links no two devices "
            "directly; set 'peers', for example peers: {kind: ring}, or give the strategy a graph"
        )
    graph = graph_at(number)
    return sorted(graph.adj[device]) if device in graph else []


def agreed_manners(said: Sequence[tuple[int | None, Exchange]]) -> dict[int, Manner]:
    """Return round → how its devices exchange, of the instructions of one push.

    Raises
    ------
    PayloadError
        If instructions of one round disagree.
    """
    manners: dict[int, Manner] = {}
    for number, exchange in said:
        if exchange.kind == "neighbours" and number is not None:
            manner = exchange.manner
            if manners.setdefault(number, manner) != manner:
                raise PayloadError(
                    f"instructions of round {number} in one push differ in how they exchange: "
                    f"{manners[number]} and {manner}"
                )
    return manners


def group(trips: Sequence[tuple[Trip, list[int]]]) -> list[Group]:
    """Sort the trips of one push by round; a second one of a device begins another group."""
    groups: list[Group] = []
    for trip, peers in trips:
        for members, known in groups:
            if members[0].round == trip.round and trip.device not in known:
                break
        else:
            members, known = [], {}
            groups.append((members, known))
        members.append(trip)
        known[trip.device] = peers
    return groups


def received(senders: Mapping[int, Message | None]) -> LazyArrayRecord:
    """Return the arrays that devices sent, under ``<node id>/<array>``.

    Parameters
    ----------
    senders : mapping of int to Message or None
        Device → the message whose arrays it sent; None where only the strategy has them.
    """
    record = LazyArrayRecord()
    for device, message in senders.items():
        if message is None:
            continue
        arrays = next(r for r in message.content.values() if isinstance(r, ArrayRecord))
        named = {f"{NODE_BASE + device}/{key}": copy(array) for key, array in arrays.items()}
        compat.fill(record, named)
    return record
