"""Messages in virtual time; knows nothing of Flower."""

from fedsim.network.build import graph_network, star_network
from fedsim.network.failures import Failure, Scheduled
from fedsim.network.fluid import check_rates, max_min_rates
from fedsim.network.links import (
    Constant,
    Correlated,
    GilbertElliott,
    LinkModel,
    LinkState,
    OnOff,
    Redraw,
    Sinusoid,
)
from fedsim.network.mobility import Mobility
from fedsim.network.options import TransferOptions
from fedsim.network.payloads import Delivery, LinkUse
from fedsim.network.replay import replay
from fedsim.network.traces import Trace, read_trace
from fedsim.network.transfers import Network, Transfer

__all__ = [
    "Constant",
    "Correlated",
    "Delivery",
    "Failure",
    "GilbertElliott",
    "LinkModel",
    "LinkState",
    "LinkUse",
    "Mobility",
    "Network",
    "OnOff",
    "Redraw",
    "Scheduled",
    "Sinusoid",
    "Trace",
    "Transfer",
    "TransferOptions",
    "check_rates",
    "graph_network",
    "max_min_rates",
    "read_trace",
    "replay",
    "star_network",
]
