"""Gossip over directed links: mass travels with its weight, and a lost message returns both."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from strategies.arrivals import Arrivals, matrix, push_weights
from strategies.peers import PeerStrategy, State, row_bytes
from topologies.attributes import Graph
from topologies.dynamics import one_peer_exponential

__all__ = ["SGP", "PushDIGing"]


class SGP(PeerStrategy):
    """Stochastic gradient push: push-sum averaging, gradients at the unbiased models.

    P splits a device's mass evenly between itself and those it sends to (columns sum to 1). With
    local work Z → Y: X⁺ = P (X + Y - Z), w⁺ = P w, Z = X / w. Sends the model and its weight.
    The sum of the weights stays n, and that of X changes by the local work alone, whatever is lost.

    Parameters
    ----------
    fanout : {"one-peer", "all"}
        One receiver a round, 2^(round mod log₂ n) devices further on, or all neighbours. With a
        `graph`, whoever it says.
    **kwargs
        See `strategies.peers.PeerStrategy`; `graph` may be directed.

    References
    ----------
    .. [1] Assran, Loizou, Ballas, Rabbat, "Stochastic gradient push for distributed deep learning",
       ICML 2019, Algorithm 1.
    """

    def __init__(self, *, fanout: Literal["one-peer", "all"] = "one-peer", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if fanout not in ("one-peer", "all"):
            raise ValueError(f"fanout = {fanout!r}: one-peer or all")
        self.fanout = fanout

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember mass and weight; the model is their ratio."""
        return {"mass": models, "weight": models.new_ones(len(models), 1)}

    def query(self, state: State) -> Tensor:
        """Return the models."""
        return self.models(state)

    def models(self, state: State) -> Tensor:
        """Return mass over weight."""
        return state["mass"] / state["weight"]

    def exchange(self) -> dict[str, Any]:
        """Leave the choice of the receiver to the network where no graph is given."""
        if self.graph is not None or self.fanout == "all":
            return {}
        return {"fanout": "one-peer", "order": "exponential"}

    def without_network(self, n_devices: int) -> Graph:
        """Return the one-peer exponential graph of this round, or everybody."""
        if self.fanout == "all" or n_devices < 2:
            return super().without_network(n_devices)
        return one_peer_exponential(n_devices)(self.round - 1)

    def payload_bytes(self, state: State) -> int:
        """Return the model and the weight."""
        return row_bytes(state["mass"]) + state["weight"].element_size()

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Add the local work to the mass and push."""
        push = matrix(push_weights(arrivals), work)
        mass = state["mass"] + (work - self.models(state))
        return {"mass": push @ mass, "weight": push @ state["weight"]}


class PushDIGing(PeerStrategy):
    """Push-DIGing: gradient tracking over directed links.

    U⁺ = P (U - η Y), v⁺ = P v, X⁺ = U⁺ / v⁺, Y⁺ = P Y + G(X⁺) - G(X), from Y⁰ = G(X⁰), v⁰ = 1.
    Sends U, Y and v together. Exact on heterogeneous data and changing directed graphs.

    References
    ----------
    .. [1] Nedić, Olshevsky, Shi, "Achieving geometric convergence for distributed optimization over
       time-varying graphs", SIAM Journal on Optimization 2017, Algorithm 2.
    """

    mode = "gradient"

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember mass, weight, tracker and the last gradient."""
        nothing = torch.zeros_like(models)
        weight = models.new_ones(len(models), 1)
        return {"mass": models, "weight": weight, "trackers": nothing, "gradients": nothing}

    def query(self, state: State) -> Tensor:
        """Return the models."""
        return self.models(state)

    def models(self, state: State) -> Tensor:
        """Return mass over weight."""
        return state["mass"] / state["weight"]

    def payload_bytes(self, state: State) -> int:
        """Return twice the model and the weight."""
        return 2 * row_bytes(state["mass"]) + state["weight"].element_size()

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Update the tracker by the new gradient, and push."""
        push = matrix(push_weights(arrivals), work)
        tracked = state["trackers"] + work - state["gradients"]
        return {
            "mass": push @ (state["mass"] - self.rate * tracked),
            "weight": push @ state["weight"],
            "trackers": push @ tracked,
            "gradients": work,
        }
