"""Accelerated decentralised methods: Mudag and ADOM."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.arrivals import Arrivals, laplacian, matrix, mix, pair_weights
from strategies.peers import PeerStrategy, State, row_bytes

__all__ = ["ADOM", "Mudag", "chebyshev_momentum", "fast_mix"]


def fast_mix(weights: NDArray[np.float64], rows: Tensor, steps: int, momentum: float) -> Tensor:
    """Return the rows after `steps` steps of Chebyshev gossip; their mean stays.

    z⁻¹ = z⁰ = x, z⁺ = (1 + ω) W z - ω z⁻.

    Parameters
    ----------
    weights : ndarray, shape (n, n)
        Symmetric, doubly stochastic.
    rows : Tensor, shape (n, p)
    steps : int
    momentum : float
        ω; 0 is plain mixing. Best: `chebyshev_momentum` of the weights.
    """
    before = now = rows
    for _ in range(steps):
        before, now = now, (1 + momentum) * mix(weights, now) - momentum * before
    return now


def chebyshev_momentum(weights: NDArray[np.float64]) -> float:
    """Return ω = (1 - √(1 - λ₂²)) / (1 + √(1 - λ₂²)), λ₂ the second largest eigenvalue."""
    values = np.sort(np.linalg.eigvalsh(weights))
    second = float(values[-2]) if len(values) > 1 else 0.0
    root = sqrt(max(0.0, 1 - second**2))
    return (1 - root) / (1 + root)


class Mudag(PeerStrategy):
    """Mudag: Nesterov's acceleration over gossip that is itself accelerated.

    x⁺ = FastMix(y + x - y⁻ - η (G(y) - G(y⁻)), K), y⁺ = x⁺ + β (x⁺ - x), β = (1 - α)/(1 + α),
    α = √(μ/L). FastMix needs the eigenvalue λ₂ of a fixed mixing matrix: as soon as the links
    change, or in a round that loses a message, plain mixing (ω = 0) takes its place. A round's K
    exchanges are charged as one of K models.

    Parameters
    ----------
    condition : float
        L/μ, at least 1.
    mixing_steps : int
        K. Too few diverge on poorly connected graphs.
    **kwargs
        See `strategies.peers.PeerStrategy`; η should be 1/L.

    References
    ----------
    .. [1] Ye, Luo, Zhou, Zhang, "Multi-consensus decentralized accelerated gradient descent",
       JMLR 2023 (arXiv 2005.00797), Algorithms 1 and 2.
    """

    mode = "gradient"

    def __init__(self, *, condition: float = 10.0, mixing_steps: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_condition(condition)
        if mixing_steps < 1:
            raise ValueError(f"mixing_steps = {mixing_steps}: must be at least 1")
        self.condition = condition
        self.mixing_steps = mixing_steps

    def _forget(self) -> None:
        super()._forget()
        self._links: NDArray[np.bool_] | None = None
        self._momentum = 0.0
        self._is_fixed = True

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Remember the point ahead of the model, the one before, and its gradient."""
        nothing = torch.zeros_like(models)
        return {"models": models, "ahead": models, "before": models, "gradients": nothing}

    def query(self, state: State) -> Tensor:
        """Return the extrapolated models."""
        return state["ahead"]

    def payload_bytes(self, state: State) -> int:
        """Return one model for each mixing."""
        return self.mixing_steps * row_bytes(state["models"])

    def metrics(self, state: State) -> dict[str, float]:
        """Return ω, 0 where mixing is plain."""
        return {"mixing_momentum": self._momentum if self._is_fixed else 0.0}

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Descend, mix, and extrapolate."""
        weights = pair_weights(arrivals)
        models, ahead = state["models"], state["ahead"]
        moved = ahead + (models - state["before"]) - self.rate * (work - state["gradients"])
        mixed = fast_mix(weights, moved, self.mixing_steps, self._omega(weights, arrivals))
        root = sqrt(self.condition)
        beta = (root - 1) / (root + 1)
        return {
            "models": mixed,
            "ahead": mixed + beta * (mixed - models),
            "before": ahead,
            "gradients": work,
        }

    def _omega(self, weights: NDArray[np.float64], arrivals: Arrivals) -> float:
        if self._links is None and arrivals.is_complete:
            self._links = arrivals.linked
            self._momentum = chebyshev_momentum(weights)
        self._is_fixed &= self._links is None or np.array_equal(self._links, arrivals.linked)
        return self._momentum if self._is_fixed and arrivals.is_complete else 0.0


class ADOM(PeerStrategy):
    """ADOM: a dual accelerated method for changing graphs.

    Each W(k) is the graph Laplacian over its largest eigenvalue; χ bounds the ratio of its largest
    to its smallest non-zero eigenvalue. With g = ∇F*(τ z + (1 - τ) z_f), η_d = 2 √(μL)/(7χ),
    Δ = W (m - η_d g): m⁺ = m - η_d g - Δ, z⁺ = z + η_d/(2L) (z_g - z) + Δ, z_f⁺ = z_g - μ W g. The
    rows of z sum to 0 always. Two models on each link a round.

    It needs the gradient of the conjugate, ∇f_i*(z) = argmin_x f_i(x) - ⟨z, x⟩. Where `conjugate`
    computes it, the method is exact. Otherwise one gradient step a round, g ← g - η (∇f_i(g) - z_g)
    from the round before, stands for it: an approximation, whose model is g.

    Parameters
    ----------
    condition : float
        L/μ, at least 1.
    graph_condition : float, optional
        χ. Default: the largest of the graphs so far.
    conjugate : callable, optional
        Tensor (n, p) of dual rows → Tensor (n, p), row i by ∇f_i*, for all devices in order. The
        devices' gradients then count for their time only.
    **kwargs
        See `strategies.peers.PeerStrategy`; η should be 1/L.

    References
    ----------
    .. [1] Kovalev, Shulgin, Richtárik, Rogozin, Gasnikov, "ADOM: accelerated decentralized
       optimization method for time-varying networks", ICML 2021, Algorithm 2.
    """

    mode = "gradient"

    def __init__(
        self,
        *,
        condition: float = 10.0,
        graph_condition: float | None = None,
        conjugate: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_condition(condition)
        if graph_condition is not None and not graph_condition >= 1:
            raise ValueError(f"graph_condition = {graph_condition}: must be at least 1")
        self.condition = condition
        self.graph_condition = graph_condition
        self.conjugate = conjugate

    def _forget(self) -> None:
        super()._forget()
        self._seen_condition = 1.0

    def initial(self, models: Tensor, nodes: Sequence[int]) -> State:
        """Start all dual rows at 0."""
        nothing = torch.zeros_like(models)
        return {"models": models, "dual": nothing, "dual_ahead": nothing, "memory": nothing}

    def models(self, state: State) -> Tensor:
        """Return ∇F*(z_f), or what stands for it."""
        if self.conjugate is not None:
            return self.conjugate(state["dual_ahead"])
        return state["models"]

    def payload_bytes(self, state: State) -> int:
        """Return twice the model."""
        return 2 * row_bytes(state["models"])

    def step(self, state: State, work: Tensor, arrivals: Arrivals) -> State:
        """Do one step in the dual."""
        scaled, condition = self._scaled(laplacian(arrivals))
        smoothness = 1 / self.rate
        convexity = smoothness / self.condition
        eta = 2 * sqrt(convexity * smoothness) / (7 * condition)
        tau = sqrt(convexity / smoothness) / (7 * condition)
        dual = state["dual"]
        mean = tau * dual + (1 - tau) * state["dual_ahead"]
        if self.conjugate is not None:
            primal = self.conjugate(mean)
        else:
            primal = state["models"] - self.rate * (work - mean)
        w = matrix(scaled, primal)
        memory = state["memory"] - eta * primal
        pushed = w @ memory
        return {
            "models": primal,
            "dual": dual + eta / (2 * smoothness) * (mean - dual) + pushed,
            "dual_ahead": mean - convexity * (w @ primal),
            "memory": memory - pushed,
        }

    def _scaled(self, graph: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        """Return the Laplacian over its largest eigenvalue, and χ."""
        values = np.linalg.eigvalsh(graph)
        if values[-1] < 1e-9:
            return graph, self.graph_condition or self._seen_condition
        lowest = values[values > 1e-9 * values[-1]][0]
        self._seen_condition = max(self._seen_condition, float(values[-1] / lowest))
        return graph / values[-1], self.graph_condition or self._seen_condition


def _check_condition(condition: float) -> None:
    if not condition >= 1:
        raise ValueError(f"condition = {condition}: L/μ must be at least 1")
