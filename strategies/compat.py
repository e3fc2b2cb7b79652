"""Every name of Flower's that strategies use and that Flower does not export, in one place.

Checked against flwr 1.41 and 1.42. All are what Flower's own strategies are made of:

=========================================  =========================================================
name                                       needed because
=========================================  =========================================================
``log``                                    `start` tells of rounds where Flower's own strategies do
``sample_nodes``                           waits for nodes and draws from them
``aggregate_metricrecords``                the default of `FedAvg`'s metrics, which has a fast form
``validate_message_reply_consistency``     refuses replies that cannot be averaged
=========================================  =========================================================
"""

from flwr.serverapp.strategy.strategy_utils import (
    aggregate_metricrecords,
    sample_nodes,
    validate_message_reply_consistency,
)
from flwr.supercore import log

__all__ = ["aggregate_metricrecords", "log", "sample_nodes", "validate_message_reply_consistency"]
