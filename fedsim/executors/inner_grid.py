"""Another Flower grid does the work: Flower's simulation engine, or a real deployment.

A batch goes to the inner grid's nodes in one `send_and_receive`, in wall time; the replies travel
the simulated network in virtual time.
"""

import logging
import time
from collections.abc import Callable, Sequence

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedsim.errors import NoNodesError
from fedsim.flower import compat
from fedsim.flower.instructions import NODE_BASE
from fedsim.flower.records import private_copy

__all__ = ["InnerGridExecutor", "find_nodes"]

_log = logging.getLogger(__name__)
_QUERY_SECONDS = 600.0  # the first message may wait for the engine to start


class InnerGridExecutor:
    """Passes instructions on to the nodes of another grid.

    Parameters
    ----------
    grid : Grid
        The one that Flower hands to a `ServerApp`.
    nodes : sequence of int
        Its node id for each device (see `find_nodes`).
    order : callable, optional
        ``message -> ConfigRecord`` that a message carries besides, named ``fedsim``.
    """

    is_stateful = True

    def __init__(
        self,
        grid: Grid,
        nodes: Sequence[int],
        *,
        order: Callable[[Message], ConfigRecord] | None = None,
    ) -> None:
        self._grid = grid
        self._nodes = list(nodes)
        self._order = order

    def reply_bytes(self, message: Message) -> int | None:
        """Return None: only the app knows what it replies."""
        return None

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """Return the reply to each message, in order; an error reply where none came."""
        replies: dict[int, Message] = {}
        waiting = dict(enumerate(messages))
        while waiting:  # a node's messages one after another, in their order
            firsts: dict[int, int] = {}
            for i, message in waiting.items():
                firsts.setdefault(message.metadata.dst_node_id, i)
            batch = [waiting.pop(i) for i in firsts.values()]
            replies.update(zip(firsts.values(), self._send(batch), strict=True))
        return [replies[i] for i in range(len(messages))]

    def _send(self, messages: Sequence[Message]) -> list[Message]:
        inner = {}
        for message in messages:
            node = self._nodes[message.metadata.dst_node_id - NODE_BASE]
            content = private_copy(message.content)
            if self._order is not None:
                content["fedsim"] = self._order(message)
            meta = message.metadata
            inner[node] = Message(content, node, meta.message_type, group_id=meta.group_id)
        came = {
            reply.metadata.src_node_id: reply
            for reply in self._grid.send_and_receive(list(inner.values()))
        }
        return [_answer(came.get(node), to) for node, to in zip(inner, messages, strict=True)]


def _answer(reply: Message | None, message: Message) -> Message:
    """Return what the inner node replied as the reply to our message."""
    if reply is None:
        error = Error(compat.NODE_UNAVAILABLE, "the inner grid has no reply of its node")
        return Message(error, reply_to=message)
    if reply.has_error():
        return Message(Error(reply.error.code, reply.error.reason), reply_to=message)
    return Message(reply.content, reply_to=message)


def find_nodes(grid: Grid, n_devices: int, *, wait: float = 120.0) -> list[int]:
    """Return the node of a grid that plays each device.

    The nodes are asked for their ``partition-id`` by a ``query`` message, which fedsim's own
    `ClientApp` answers with a ConfigRecord. Where an app does not, devices are given to nodes in
    the order of registration, with a warning: data and device may then not belong together from
    one run to the next.

    Parameters
    ----------
    grid : Grid
    n_devices : int
        Devices of the scenario; nodes beyond that are not used.
    wait : float
        Wall seconds to wait for that many nodes.

    Raises
    ------
    NoNodesError
        If there are fewer nodes.
    """
    deadline = time.monotonic() + wait
    while len(nodes := list(grid.get_node_ids())) < n_devices:
        if time.monotonic() > deadline:
            raise NoNodesError(
                f"data.devices is {n_devices}, but after {wait:g} s only {len(nodes)} nodes are "
                "connected: ask for as many (flwr run: --federation-config "
                f'"num-supernodes={n_devices}"), or lower data.devices'
            )
        time.sleep(0.1)
    found = _ask(grid, nodes)
    if set(range(n_devices)) <= set(found):
        return [found[device] for device in range(n_devices)]
    _log.warning(
        "%d of %d nodes say which partition they hold; devices are given to nodes in the order of "
        "their registration",
        len(found),
        len(nodes),
    )
    known = {info.node_id: str(getattr(info, "registered_at", "")) for info in grid.get_nodes()}
    return sorted(nodes, key=lambda node: (known.get(node, ""), node))[:n_devices]


def _ask(grid: Grid, nodes: Sequence[int]) -> dict[int, int]:
    """Return partition → node, of the nodes that say theirs."""
    questions = [Message(RecordDict(), node, "query") for node in nodes]
    found = {}
    for reply in grid.send_and_receive(questions, timeout=_QUERY_SECONDS):
        if reply.has_error():
            continue
        for record in reply.content.values():
            partition = record.get("partition-id")
            if isinstance(partition, int):
                found[partition] = reply.metadata.src_node_id
    return found
