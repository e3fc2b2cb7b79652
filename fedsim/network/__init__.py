"""Messages in virtual time; knows nothing of Flower."""

from fedsim.network.build import graph_network, star_network
from fedsim.network.links import Constant, LinkState, OnOff
from fedsim.network.replay import replay
from fedsim.network.transfers import Delivery, Network, Transfer, TransferOptions

__all__ = [
    "Constant",
    "Delivery",
    "LinkState",
    "Network",
    "OnOff",
    "Transfer",
    "TransferOptions",
    "graph_network",
    "replay",
    "star_network",
]
