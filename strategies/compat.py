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
=========================================  =========================================================
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import (
    aggregate_metricrecords,
    sample_nodes,
    validate_message_reply_consistency,
)
from flwr.supercore import log

__all__ = [
    "aggregate_metricrecords",
    "fill",
    "log",
    "sample_nodes",
    "validate_message_reply_consistency",
]

RecordT = TypeVar("RecordT", bound=ArrayRecord | ConfigRecord | MetricRecord | RecordDict)


def fill(record: RecordT, values: Mapping[str, Any]) -> RecordT:
    """Put values of the right types into a record without checking each; return it."""
    record.__dict__["_data"].update(values)
    return record
