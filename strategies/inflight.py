"""Instructions under way: who is busy, since when, and with which version of the model.

What asynchronous and deadline strategies need of a grid, whatever the grid: a simulated one tells
the virtual time (`now`), waits in it, and knows which messages are lost (`lost_messages`);
Flower's own answer at once, with an error reply for what is lost, and are asked again a little
later.
"""

import hashlib
import time
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from strategies.compat import sample_nodes

__all__ = ["InFlight", "Sent"]

_POLL = 0.1  # seconds between two questions to a grid that does not wait


@dataclass(frozen=True, slots=True)
class Sent:
    """What a device was sent last.

    Attributes
    ----------
    node : int
    version : int
        Of the model, in server versions.
    base : dict of Tensor
        The model.
    time : float
        When (s), on the grid's clock.
    """

    node: int
    version: int
    base: dict[str, Tensor]
    time: float


class InFlight:
    """Keeps devices busy, one instruction each.

    Parameters
    ----------
    grid : Grid
    seed : int
        Of the choice among idle devices.
    """

    def __init__(self, grid: Grid, seed: int = 0) -> None:
        self.grid = grid
        self._seed = seed
        self._is_virtual = hasattr(grid, "now")
        self._sent: dict[int, Sent] = {}  # of busy nodes
        self._nodes: dict[str, int] = {}  # message id → node
        self._unsent: set[int] = set()
        self._online: Sequence[int] = ()
        self._members: Set[int] = frozenset()
        self._idle: list[int] = []
        self._draws = 0
        self._seen_losses = 0

    def __len__(self) -> int:
        return len(self._sent)

    @property
    def now(self) -> float:
        """The time on the grid's clock (s)."""
        return float(self.grid.now) if self._is_virtual else time.time()  # type: ignore[attr-defined]

    # --- whom to send to ----------------------------------------------------------------------

    def choose(self, under_way: int | None, minimum: int) -> list[int]:
        """Return idle nodes, drawn evenly, so that `under_way` (None: all) devices are busy.

        While nobody is busy, waits for `minimum` nodes to come online.
        """
        self._refresh()
        if not self._sent and len(self._online) < max(1, minimum):
            sample_nodes(self.grid, max(1, minimum), 0)  # Flower's wait
            self._refresh()
        idle = self._idle
        wanted = len(idle) if under_way is None else max(0, under_way - len(self._sent))
        if wanted >= len(idle):
            chosen, self._idle = idle, []
            return sorted(chosen)
        return sorted(self._draw() for _ in range(wanted))

    def _draw(self) -> int:
        """Take one idle node; which, follows from the seed and how many were drawn before."""
        self._draws += 1
        key = hashlib.blake2b(f"{self._seed}/idle/{self._draws}".encode(), digest_size=8)
        place = int.from_bytes(key.digest(), "big") % len(self._idle)
        self._idle[place], self._idle[-1] = self._idle[-1], self._idle[place]
        return self._idle.pop()

    def _refresh(self) -> None:
        """Look who is online; the list of idle nodes is made anew only if that has changed."""
        online = self.grid.get_node_ids()
        if not isinstance(online, Sequence):
            online = list(online)
        if online != self._online:
            self._online, self._members = online, frozenset(online)
            self._idle = [node for node in online if node not in self._sent]

    # --- sending and waiting ------------------------------------------------------------------

    def note(self, nodes: Iterable[int], version: int, base: dict[str, Tensor]) -> None:
        """Count nodes as busy with a version from now on."""
        now = self.now
        for node in nodes:
            self._sent[node] = Sent(node, version, base, now)
            self._unsent.add(node)

    def send(self, messages: Iterable[Message]) -> None:
        """Push instructions to nodes that were noted."""
        batch = list(messages)
        if batch:
            for message_id, message in zip(self.grid.push_messages(batch), batch, strict=True):
                self._nodes[message_id] = message.metadata.dst_node_id
                self._unsent.discard(message.metadata.dst_node_id)

    def free(self, node: int) -> Sent | None:
        """Count a node as idle; return what it was sent, None if it was idle."""
        sent = self._sent.pop(node, None)
        if sent is not None and node in self._members:
            self._idle.append(node)
        return sent

    def free_unsent(self) -> None:
        """Count as idle the nodes that were noted, and whose instructions others have sent."""
        for node in sorted(self._unsent):
            self.free(node)
        self._unsent.clear()

    def wait(self) -> list[Message]:
        """Return the next replies, in the order of sending; none if the next event is a loss."""
        # A view: a simulated grid then looks only at what is there.
        ids = self._nodes.keys() if self._is_virtual else list(self._nodes)
        return self._settled(list(self.grid.pull_messages(ids)))

    def wait_until(self, deadline: float) -> list[Message]:
        """Return the replies there are when all have come or at a time (s), but at least one.

        Empty only if all that was under way is lost.
        """
        replies: list[Message] = []
        if self._is_virtual and hasattr(self.grid, "wait"):
            self.grid.wait(self._nodes.keys(), timeout=deadline - self.now)
        while self._nodes and (not replies or (not self._is_virtual and self.now < deadline)):
            replies += self.wait()
        return replies

    def _settled(self, replies: list[Message]) -> list[Message]:
        """Forget the instructions answered and lost; duplicates and strangers are left out."""
        known = [
            reply
            for reply in replies
            if self._nodes.pop(reply.metadata.reply_to_message_id, None) is not None
        ]
        if not known and not self._is_virtual:
            time.sleep(_POLL)
        lost: Set[str] = getattr(self.grid, "lost_messages", frozenset())
        if len(lost) != self._seen_losses:
            self._seen_losses = len(lost)
            for message_id in [i for i in self._nodes if i in lost]:
                self.free(self._nodes.pop(message_id))
        return known
