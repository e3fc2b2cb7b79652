"""A wrapper that keeps replies with numbers that are not finite from any strategy."""

import logging
from collections.abc import Iterable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

__all__ = ["DropNonFinite", "is_finite"]

_log = logging.getLogger(__name__)
_FLOATS = ("float16", "float32", "float64")


class DropNonFinite(Strategy):
    """Drops train replies with a NaN or an infinity, then lets another strategy aggregate.

    One such reply makes every weighted mean NaN; medians and Krum leave out some. Replies are
    dropped before the strategy counts them, as if their devices had not replied. The metrics of a
    round say how many (``dropped_replies``), a warning at the first of a node says whose.

    Parameters
    ----------
    strategy : Strategy
        Whose model it is.
    """

    def __init__(self, strategy: Strategy) -> None:
        super().__init__()
        self.strategy = strategy
        self._reported: set[int] = set()

    def summary(self) -> None:
        """Log the strategy's configuration."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's instructions."""
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return what the strategy makes of the replies that are finite."""
        replies = list(replies)
        kept = [reply for reply in replies if reply.has_error() or is_finite(reply)]
        if len(kept) == len(replies):
            return self.strategy.aggregate_train(server_round, replies)
        dropped = sorted(r.metadata.src_node_id for r in replies if not any(r is k for k in kept))
        if new := sorted(set(dropped) - self._reported):
            self._reported.update(new)
            _log.warning("round %d: nodes %s reply what is not finite: dropped", server_round, new)
        arrays, metrics = self.strategy.aggregate_train(server_round, kept)
        metrics = MetricRecord() if metrics is None else metrics.copy()
        metrics["dropped_replies"] = len(dropped)
        return arrays, metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's instructions."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the strategy's metrics."""
        return self.strategy.aggregate_evaluate(server_round, replies)


def is_finite(reply: Message) -> bool:
    """Return whether all numbers in a reply's arrays are finite; it is no error reply."""
    records = (r for r in reply.content.values() if isinstance(r, ArrayRecord))
    return all(_is_finite_array(array) for record in records for array in record.values())


def _is_finite_array(array: Array) -> bool:
    """Return whether all numbers are finite; integers and encodings are."""
    return array.dtype not in _FLOATS or bool(np.isfinite(array.numpy()).all())
