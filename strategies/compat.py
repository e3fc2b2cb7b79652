"""Every name of Flower's that strategies use and that Flower does not export, in one place.

Checked against flwr 1.41 and 1.42. All are what Flower's own strategies are made of:

=========================================  =========================================================
name                                       needed because
=========================================  =========================================================
``log``                                    `start` tells of rounds where Flower's own strategies do
``sample_nodes``                           waits for nodes and draws from them
``aggregate_metricrecords``                the default of `FedAvg`'s metrics, which has a fast form
``validate_message_reply_consistency``     refuses replies that cannot be averaged
``TypedDict._data``                        a record checks each value as it is set, which costs an
                                           asynchronous server more than its own arithmetic
``Message.__dict__``,                      instructions of a round differ in their receiver
``Metadata.__dict__``                      alone; the constructor checks each argument, every time
=========================================  =========================================================
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import (
    aggregate_metricrecords,
    sample_nodes,
    validate_message_reply_consistency,
)
from flwr.supercore import log

__all__ = [
    "aggregate_metricrecords",
    "fill",
    "instructions",
    "log",
    "sample_nodes",
    "validate_message_reply_consistency",
]

RecordT = TypeVar("RecordT", bound=ArrayRecord | ConfigRecord | MetricRecord | RecordDict)


def fill(record: RecordT, values: Mapping[str, Any]) -> RecordT:
    """Put values of the right types into a record without checking each; return it."""
    record.__dict__["_data"].update(values)
    return record


def instructions(
    message_type: str,
    contents: Sequence[RecordDict],
    nodes: Sequence[int],
    like: dict[str, Any] | None = None,
) -> list[Message]:
    """Return ``Message(content, node, message_type)`` for each content and node.

    `like`, empty at first, is kept by who sends in small portions: what a run's instructions have
    in common. It is a copy, since Flower's own grids write into what they are given.
    """
    like = {} if like is None else like
    messages: list[Message] = []
    now = time.time()
    for content, node in zip(contents, nodes, strict=True):
        if not like:
            messages.append(Message(content, node, message_type))
            like.update(messages[-1].metadata.__dict__)
            continue
        metadata, message = Metadata.__new__(Metadata), Message.__new__(Message)
        metadata.__dict__.update(like, _dst_node_id=node, _created_at=now)
        message.__dict__.update(_metadata=metadata, _content=content, _error=None)
        messages.append(message)
    return messages
