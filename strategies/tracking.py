"""Gossip that is exact on heterogeneous data: gradient tracking, EXTRA and D².

All of them ask for one gradient a round at the devices' models and send after it. Pairs mix in both
directions or not at all, so that the mean of what they track stays what it should be.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from strategies.arrivals import Arrivals, mix, pair_weights
from strategies.peers import PeerStrategy, State, row_bytes

__all__ = ["D2", "DSGT", "EXTRA"]


class DSGT(PeerStrategy):
    """Gradient tracking: a second row estimates the mean gradient of all devices.

    With the trackers Y, Y⁰ = G(X⁰): combine-then-adapt X⁺ = W X - η Y, Y⁺ = W Y + G(X⁺) - G(X);
    adapt-then-combine X⁺ = W (X - η Y), Y⁺ = W (Y + G(X⁺) - G(X)). The mean of Y is the mean
    gradient at every step. Two models on each link a round, the tracker complete with this round's
    gradient: hence sent after the work. (Adapt-then-combine really needs the second only when the
    first has been mixed; both are charged to one exchange.)

    Parameters
    ----------
    order : {"combine_then_adapt", "adapt_then_combine"}
    **kwargs
        See `strategies.peers.PeerStrategy`.

    References
    ----------
    .. [1] Di Lorenzo, Scutari, "NEXT: in-network nonconvex optimization", IEEE TSIPN 2016.
    .. [2] Nedić, Olshevsky, Shi, "Achieving geometric convergence for distributed optimization over
       time-varying graphs", SIAM Journal on Optimization 2017 (DIGing).
    """

    mode = "gradient"

    def __init__(
        self,
        *,
        order: Literal["combine_then_adapt", "adapt_then_combine"] = "combine_then_adapt",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if order not in ("combine_then_adapt", "adapt_then_combine"):
            raise ValueError(f"order = {order!r}: combine_then_adapt or adapt_then_combine")
        self.order = order

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember the tracker and the last gradient, and whether there was one."""
        nothing = torch.zeros_like(models)
        return {
            "models": models,
            "trackers": nothing,
            "gradients": nothing,
            "started": torch.zeros(len(models), 1, dtype=torch.bool),
        }

    def payload_bytes(self, state: State) -> int:
        """Return twice the model."""
        return 2 * row_bytes(state["models"])

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Update the tracker by the new gradient, then the model."""
        weights = pair_weights(arrivals)
        models = state["models"]
        tracked = state["trackers"] + work - state["gradients"]
        gradients = {"gradients": work, "started": torch.ones_like(state["started"])}
        if self.order == "combine_then_adapt":
            moved = mix(weights, models) - self.rate * tracked
            return {"models": moved, "trackers": mix(weights, tracked), **gradients}
        # The first tracker is the gradient itself, which nobody has mixed.
        mixed = torch.where(state["started"], mix(weights, tracked), tracked)
        moved = mix(weights, models - self.rate * mixed)
        return {"models": moved, "trackers": mixed, **gradients}


class EXTRA(PeerStrategy):
    """EXTRA: gossip whose last two steps cancel the bias of heterogeneous data.

    X¹ = W X⁰ - η G(X⁰), then X⁺⁺ = (I + W) X⁺ - (I + W)/2 X - η (G(X⁺) - G(X)). One model on each
    link a round; a device keeps the mixture of the round before. Made for a fixed graph.

    References
    ----------
    .. [1] Shi, Ling, Wu, Yin, "EXTRA: an exact first-order algorithm for decentralized consensus
       optimization", SIAM Journal on Optimization 2015, Algorithm 1.
    """

    mode = "gradient"

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember the model before, as mixed and not, and its gradient."""
        nothing = torch.zeros_like(models)
        return {"models": models, "before": models, "mixed": models, "gradients": nothing}

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Mix the models and correct by the round before."""
        models = state["models"]
        mixed = mix(pair_weights(arrivals), models)
        moved = (
            models
            + mixed
            - (state["before"] + state["mixed"]) / 2
            - self.rate * (work - state["gradients"])
        )
        return {"models": moved, "before": models, "mixed": mixed, "gradients": work}


class D2(PeerStrategy):
    """D², also known as exact diffusion: adapt-then-combine without the bias of heterogeneous data.

    X¹ = W̃ (X⁰ - η G(X⁰)), then X⁺⁺ = W̃ (2 X⁺ - X - η (G(X⁺) - G(X))) with W̃ = (I + W)/2, which
    needs nothing of the eigenvalues of W. One model on each link a round. Made for a fixed graph.

    References
    ----------
    .. [1] Tang, Lian, Yan, Zhang, Liu, "D²: decentralized training over decentralized data",
       ICML 2018, Algorithm 1 (with W for W̃).
    .. [2] Yuan, Ying, Zhao, Sayed, "Exact diffusion for distributed optimization and learning",
       IEEE Transactions on Signal Processing 2019.
    """

    mode = "gradient"

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember the model before and its gradient."""
        return {"models": models, "before": models, "gradients": torch.zeros_like(models)}

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Extrapolate, descend, and mix half."""
        models = state["models"]
        moved = 2 * models - state["before"] - self.rate * (work - state["gradients"])
        mixed = (moved + mix(pair_weights(arrivals), moved)) / 2
        return {"models": mixed, "before": models, "gradients": work}
