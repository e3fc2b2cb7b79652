"""What becomes of each message where that is drawn at random."""

from collections.abc import Iterable

from fedsim.network.options import TransferOptions
from fedsim.streams import bits

__all__ = ["Fates", "keyed_uniform"]

_MASK = 0xFFFFFFFFFFFFFFFF


def keyed_uniform(key: int, words: Iterable[int]) -> float:
    """Return `streams.uniform(seed, purpose, *words)` for scalars, given ``bits(seed, purpose)``.

    numpy takes some 40 µs for one message's draw; this takes 2.
    """
    for word in words:
        z = ((key ^ (word & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        key = z ^ (z >> 31)
    return (key >> 11) * 2.0**-53


class Fates:
    """Draws for the messages of a network: they depend on seed, pair of nodes and number alone.

    Parameters
    ----------
    seed : int
    options : TransferOptions

    Attributes
    ----------
    are_drawn : bool
        Whether chance decides at all.
    """

    def __init__(self, seed: int, options: TransferOptions) -> None:
        self.are_drawn = options.message_loss > 0 or options.loss == "drop"
        self._message_loss = options.message_loss
        self._can_drop = options.loss == "drop"
        self._counts: dict[tuple[int, int], int] = {}
        self._loss_key = int(bits(seed, "message-loss"))
        self._drop_key = int(bits(seed, "packet-loss"))

    def draw(self, source: int, destination: int) -> tuple[bool, float]:
        """Return whether the pair's next message will be lost, and a number in [0, 1).

        The number is compared with the probability that no packet of the message is dropped; 0
        where packets never are.
        """
        pair = source, destination
        count = self._counts.get(pair, 0)
        self._counts[pair] = count + 1
        words = (*pair, count)
        loss = self._message_loss
        is_lost = loss > 0 and keyed_uniform(self._loss_key, words) < loss
        return is_lost, keyed_uniform(self._drop_key, words) if self._can_drop else 0.0
