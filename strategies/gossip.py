"""Gossip averaging: every device trains, sends its model to its neighbours, and mixes linearly."""

from typing import Any, Literal

from torch import Tensor

from strategies.arrivals import Arrivals, mix, pair_weights, row_weights
from strategies.peers import PeerStrategy, State

__all__ = ["DPSGD"]


class DPSGD(PeerStrategy):
    """Decentralised parallel SGD: a step on one's own data and the neighbours' weighted mean.

    With the models X, one row a device, Metropolis weights W and local work X → Y:
    combine-then-adapt X⁺ = W X + (Y - X), whose exchange overlaps the work; adapt-then-combine
    X⁺ = W Y, whose exchange follows it. One model on each link and way a round.

    Parameters
    ----------
    order : {"combine_then_adapt", "adapt_then_combine"}
    lost : {"own", "pair"}
        Weight of what did not arrive: the receiver's own model (the mean of all models may then
        drift), or neither of the two mixes with the other (the mean stays).
    **kwargs
        See `strategies.peers.PeerStrategy`.

    References
    ----------
    .. [1] Lian et al., "Can decentralized algorithms outperform centralized algorithms?",
       NeurIPS 2017, Algorithm 1 (combine-then-adapt).
    .. [2] Chen, Sayed, "Diffusion adaptation strategies for distributed optimization and learning
       over networks", IEEE Transactions on Signal Processing 2012 (adapt-then-combine).
    """

    def __init__(
        self,
        *,
        order: Literal["combine_then_adapt", "adapt_then_combine"] = "combine_then_adapt",
        lost: Literal["own", "pair"] = "own",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if order not in ("combine_then_adapt", "adapt_then_combine"):
            raise ValueError(f"order = {order!r}: combine_then_adapt or adapt_then_combine")
        if lost not in ("own", "pair"):
            raise ValueError(f"lost = {lost!r}: own or pair")
        self.order = order
        self.lost = lost
        self.when = "with" if order == "combine_then_adapt" else "after"

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Mix, then add the local work; or mix its result."""
        weights = (row_weights if self.lost == "own" else pair_weights)(arrivals)
        models = state["models"]
        if self.order == "combine_then_adapt":
            return {"models": mix(weights, models) + (work - models)}
        return {"models": mix(weights, work)}
