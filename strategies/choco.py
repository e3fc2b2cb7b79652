"""Compressed gossip: CHOCO-SGD."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from strategies.arrivals import Arrivals, matrix, pair_weights
from strategies.peers import PeerStrategy, State, row_bytes

__all__ = ["ChocoSGD", "top_k", "top_k_bytes"]


def top_k(rows: Tensor, k: int) -> Tensor:
    """Return each row with all but its k entries of largest magnitude set to 0.

    Parameters
    ----------
    rows : Tensor, shape (n, p)
    k : int
    """
    if k >= rows.shape[1]:
        return rows
    kept = rows.abs().topk(k, dim=1).indices
    return torch.zeros_like(rows).scatter(1, kept, rows.gather(1, kept))


def top_k_bytes(k: int, n_params: int, itemsize: int) -> int:
    """Return k values and k indices, each of as many bytes (1, 2, 4 or 8) as all places need."""
    needed = max(1, math.ceil((n_params - 1).bit_length() / 8))
    return k * (itemsize + (1 << (needed - 1).bit_length()))


class ChocoSGD(PeerStrategy):
    """CHOCO-SGD: gossip on public copies of the models, which only compressed differences update.

    Local work X → Y, then X̂ ← X̂ + Q(Y - X̂), of which Q alone is sent, and X ← Y + γ (W - I) X̂.
    Every neighbour keeps a copy of x̂. A difference that not all neighbours of its sender got is
    taken back by all of them (and is part of the next), so that copies stay equal. Made for fixed
    neighbours: new ones are taken to know the copies, and nothing is charged for that.

    Parameters
    ----------
    consensus_step : float
        γ in (0, 1]; too large diverges, the more so the coarser the compression.
    share : float
        Q keeps this share of the entries, those of largest magnitude; 1 sends all.
    k : int, optional
        Number of entries kept, instead of a share.
    **kwargs
        See `strategies.peers.PeerStrategy`.

    References
    ----------
    .. [1] Koloskova, Stich, Jaggi, "Decentralized stochastic optimization and gossip algorithms
       with compressed communication", ICML 2019, Algorithm 2.
    """

    def __init__(
        self,
        *,
        consensus_step: float = 0.5,
        share: float = 0.1,
        k: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < consensus_step <= 1:
            raise ValueError(f"consensus_step = {consensus_step}: must be in (0, 1]")
        if not 0 < share <= 1:
            raise ValueError(f"share = {share}: must be in (0, 1]")
        if k is not None and k < 1:
            raise ValueError(f"k = {k}: must be at least 1")
        self.consensus_step = consensus_step
        self.share = share
        self.k = k

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Start the public copies at 0."""
        return {"models": models, "public": torch.zeros_like(models)}

    def payload_bytes(self, state: State) -> int:
        """Return the bytes of k values and their places, or of the model if all are sent."""
        rows = state["models"]
        k = self._kept(rows)
        if k >= rows.shape[1]:
            return row_bytes(rows)
        return top_k_bytes(k, rows.shape[1], rows.element_size())

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Update the public copies, and move towards the neighbours'."""
        public = state["public"]
        difference = top_k(work - public, self._kept(work))
        is_known = torch.from_numpy((arrivals.linked == arrivals.received).all(axis=0))
        public = torch.where(is_known.to(work.device)[:, None], public + difference, public)
        pull = matrix(pair_weights(arrivals), work) @ public - public
        return {"models": work + self.consensus_step * pull, "public": public}

    def _kept(self, rows: Tensor) -> int:
        n_params = rows.shape[1]
        return min(self.k or max(1, round(self.share * n_params)), n_params)
