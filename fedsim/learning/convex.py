"""Finite sums of convex losses over devices: exact minima, and gradients of many runs at once.

A problem is F(w) = (1/N) Σ_i f_i(w), f_i the mean loss of device i: all devices weigh the same,
whatever they hold. The model is linear with one output; its loss is the squared error (no 1/2) or
the logistic loss. `gradients` serves drivers that make several runs at once, without messages; its
batches are those of `Trainer` with the same seed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.federated import DeviceData, FederatedData
from fedsim.errors import ScenarioError
from fedsim.learning.batches import first_batches

__all__ = ["ConvexLoss", "ConvexProblem", "Gradients", "Minimum", "problem_of"]

IntArray = NDArray[np.int64]
ConvexLoss = Literal["squared_error", "logistic"]
Gradients = Callable[[Tensor, int], Tensor]
_AHEAD = 1 << 18  # keys of samples drawn at a time, for rounds to come
_KEPT = 1 << 23  # positions of batches that are kept for other runs with the same seeds
_MAX_NEWTON = 200
_DECREMENT = 1e-14  # of Newton's method: F(w) - F* is about half of it


@dataclass(frozen=True, slots=True)
class Minimum:
    """Where a problem is least.

    Attributes
    ----------
    w : Tensor, shape (P,)
    value : float
        F*.
    """

    w: Tensor
    value: float


class ConvexProblem:
    """F(w) of linear models on what devices hold, in float64.

    Parameters
    ----------
    data : FederatedData
        Labels 0 and 1 for the logistic loss, numbers for the squared error.
    loss : {"squared_error", "logistic"}
    bias : bool
        Whether the model has a bias of its own, its last number.
    """

    def __init__(self, data: FederatedData, loss: ConvexLoss, *, bias: bool = False) -> None:
        rows = np.concatenate(
            [np.arange(a, a + n) for a, n in zip(data.start, data.size, strict=True)]
        )
        x = data.x[torch.from_numpy(rows)].double().flatten(1)
        self.x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if bias else x
        y = data.y[torch.from_numpy(rows)].double().flatten()
        self.y = 2.0 * y - 1.0 if loss == "logistic" else y
        self.loss, self.size = loss, data.size
        self.n_devices, self.width = len(data.size), self.x.shape[1]
        self._start = np.cumsum(self.size) - self.size
        self._of = torch.from_numpy(np.repeat(np.arange(self.n_devices), self.size))
        self._weight = torch.from_numpy(1.0 / np.repeat(self.size * self.n_devices, self.size))

    # --- values ---------------------------------------------------------------------------------

    def value(self, w: Tensor) -> Tensor:
        """Return F of each row of w (R, P), shape (R,)."""
        return self._weight @ self._losses(self.x @ w.T, self.y[:, None])

    def excess(self, w: Tensor) -> Tensor:
        """Return F(w) - F* of each row of w (R, P), shape (R,).

        Of least squares to full relative precision, of the logistic loss to about 1e-15.
        """
        if self.loss == "logistic":
            return self.value(w) - self.minimum.value
        error = w - self.minimum.w
        return ((error @ self._curvature) * error).sum(1) / 2

    @cached_property
    def minimum(self) -> Minimum:
        """The minimum, by Newton's method with step halving.

        Raises
        ------
        ScenarioError
            If it is not found to 1e-12.
        """
        w = torch.zeros(self.width, dtype=torch.float64)
        for _ in range(_MAX_NEWTON):
            gradient, hessian = self._derivatives(w)
            # Columns may depend on one another, so that some directions have no curvature.
            hessian.diagonal().add_(1e-13 * float(hessian.diagonal().max()))
            step = torch.cholesky_solve(gradient[:, None], torch.linalg.cholesky(hessian))[:, 0]
            decrement = float(gradient @ step)
            if decrement < _DECREMENT:
                return Minimum(w - step, float(self.value((w - step)[None])[0]))
            w = self._descend(w, step, decrement)
        raise ScenarioError(
            f"the minimum of the {self.loss} problem is not found to 1e-12 in {_MAX_NEWTON} steps "
            f"of Newton's method (decrement {decrement:.1e})"
        )

    def _descend(self, w: Tensor, step: Tensor, decrement: float) -> Tensor:
        """Return the first of w - step, w - step/2, ... that is enough below w."""
        before = float(self.value(w[None])[0])
        for scale in [2.0**-i for i in range(30)]:
            below = before - float(self.value((w - scale * step)[None])[0])
            if below >= 1e-4 * scale * decrement - 1e-15 * abs(before):
                return w - scale * step
        return w - step

    @cached_property
    def smoothness(self) -> float:
        """The constant L that published step sizes are made of.

        The mean over devices of 2 ‖XᵀX‖/n (squared error) or ‖XᵀX‖/(4 n) (logistic), in the
        Frobenius norm: larger than the usual constant.
        """
        factor = 2.0 if self.loss == "squared_error" else 0.25
        norms = [float((x.T @ x).norm()) / len(x) for x in torch.split(self.x, self.size.tolist())]
        return factor * float(np.mean(norms))

    @cached_property
    def _curvature(self) -> Tensor:
        """Hessian of F for the squared error, (P, P)."""
        return 2.0 * (self.x.T * self._weight) @ self.x

    def _derivatives(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradient (P,) and Hessian (P, P) of F."""
        outputs = self.x @ w
        gradient = self.x.T @ (self._weight * self._slopes(outputs, self.y))
        if self.loss == "squared_error":
            return gradient, self._curvature.clone()
        p = torch.sigmoid(outputs)
        return gradient, (self.x.T * (self._weight * p * (1 - p))) @ self.x

    def _losses(self, outputs: Tensor, y: Tensor) -> Tensor:
        if self.loss == "squared_error":
            return (outputs - y).square()
        return nn.functional.softplus(-y * outputs)

    def _slopes(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the derivatives of the losses by the outputs."""
        if self.loss == "squared_error":
            return 2.0 * (outputs - y)
        return -y * torch.sigmoid(-y * outputs)

    # --- gradients of devices -------------------------------------------------------------------

    def gradients(self, batch_size: int = 0, seeds: Sequence[int] = (0,)) -> Gradients:
        """Return the function ``(x (R N, P), k) -> (R N, P)`` of gradients in round k.

        Parameters
        ----------
        batch_size : int
            Distinct samples drawn afresh in each round; 0 is all of a device's.
        seeds : sequence of int, length R
            Of each run; a `Trainer` with that seed takes the same batches. They are kept, so that
            another run with the same function need not draw them again.
        """
        if not batch_size:
            return self._full_squares if self.loss == "squared_error" else self._full
        batches = _Batches(self.size, self._start, batch_size, np.asarray(seeds, np.int64))

        def stochastic(models: Tensor, k: int) -> Tensor:
            index = batches.at(k)
            x = self.x.index_select(0, index.view(-1)).view(*index.shape, -1)
            outputs = torch.bmm(x, models[:, :, None])[..., 0]
            slopes = self._slopes(outputs, self.y.index_select(0, index.view(-1)).view_as(outputs))
            slopes = slopes / index.shape[1]
            return torch.bmm(slopes[:, None], x)[:, 0]

        return stochastic

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        """2 XᵀX/n (N, P, P) and 2 Xᵀy/n (N, P) of each device."""
        sizes = self.size.tolist()
        pairs = list(zip(torch.split(self.x, sizes), torch.split(self.y, sizes), strict=True))
        grams = torch.stack([2.0 * (x.T @ x) / len(x) for x, _ in pairs])
        return grams, torch.stack([2.0 * (x.T @ y) / len(x) for x, y in pairs])

    def _full_squares(self, models: Tensor, k: int) -> Tensor:
        grams, targets = self._grams
        stacked = models.view(-1, self.n_devices, self.width).permute(1, 2, 0)
        rows = torch.bmm(grams, stacked) - targets[:, :, None]
        return rows.permute(2, 0, 1).reshape(-1, self.width)

    def _full(self, models: Tensor, k: int) -> Tensor:
        stacked = models.view(-1, self.n_devices, self.width)
        parts = []
        for i, (a, n) in enumerate(zip(self._start, self.size, strict=True)):
            x, y = self.x[a : a + n], self.y[a : a + n]
            parts.append(self._slopes(x @ stacked[:, i].T, y[:, None]).T @ x / float(n))
        return torch.stack(parts, 1).view(-1, self.width)


class _Batches:
    """Rows of the batches of all runs and devices, several rounds drawn in one go and kept."""

    def __init__(self, size: IntArray, start: IntArray, batch: int, seeds: IntArray) -> None:
        if batch > size.min():
            raise ScenarioError(
                f"batch_size: {batch} is more than the {size.min()} samples of device "
                f"{int(size.argmin())}"
            )
        self._size, self._start, self._batch, self._seeds = size, start, batch, seeds
        self._rounds = max(1, _AHEAD // int(len(seeds) * size.sum()))
        self._room = max(1, _KEPT // (self._rounds * len(seeds) * len(size) * batch))
        self._drawn: dict[int, Tensor] = {}  # (rounds, R N, batch), int32

    def at(self, k: int) -> Tensor:
        """Return rows of x, shape (R N, batch), int32."""
        block, slot = divmod(k, self._rounds)
        if block not in self._drawn:
            if len(self._drawn) >= self._room:
                self._drawn.clear()
            self._drawn[block] = self._draw(block * self._rounds)
        return self._drawn[block][slot]

    def _draw(self, first: int) -> Tensor:
        rounds = np.arange(first, first + self._rounds)[:, None, None]
        seeds = self._seeds[None, :, None]
        shape = (self._rounds, len(self._seeds), len(self._size), self._batch)
        drawn = np.empty(shape, np.int32)
        for size in np.unique(self._size):
            which = np.flatnonzero(self._size == size)
            positions = first_batches(seeds, rounds, which, int(size), self._batch)
            drawn[:, :, which] = self._start[which, None] + positions
        return torch.from_numpy(drawn.reshape(self._rounds, -1, self._batch))


def problem_of(module: nn.Module, data: DeviceData, loss: str) -> ConvexProblem:
    """Return the problem that training a model on these data solves.

    Raises
    ------
    ScenarioError
        If it is none whose minimum is known how to compute: a linear model with one output, and
        the squared error or the logistic loss.
    """
    if type(module) is not nn.Linear or module.out_features != 1:
        raise ScenarioError(
            "needs a model whose least loss can be computed: linear_regression or "
            f"logistic_regression with one output, not {type(module).__name__}"
        )
    if loss not in ("squared_error", "logistic"):
        raise ScenarioError(f"needs the loss squared_error or logistic, not {loss!r}")
    if not isinstance(data, FederatedData):
        raise ScenarioError("needs data held in memory, not made when a device takes part")
    kind: ConvexLoss = "logistic" if loss == "logistic" else "squared_error"
    return ConvexProblem(data, kind, bias=module.bias is not None)
