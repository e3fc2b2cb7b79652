"""One optimiser step on whole rows, the same on every rank: SGD, momentum, Nesterov, Adam."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Kind", "Moments", "RankOptimizer"]

Kind = Literal["sgd", "momentum", "nesterov", "adam"]
Moments = dict[str, Tensor]
"""What an optimiser remembers: rows like the models', or one row for all."""


@dataclass(frozen=True, slots=True)
class RankOptimizer:
    """An update rule; `step` is pure.

    Parameters
    ----------
    kind : {"sgd", "momentum", "nesterov", "adam"}
    momentum : float
        m of ``v = m v + g``; ``momentum`` steps with v, ``nesterov`` with g + m v.
    betas : (float, float)
        Decay rates of Adam's moments.
    epsilon : float
        Added to the root of Adam's second moment.
    weight_decay : float
        Times the model, added to the gradient.

    Raises
    ------
    ValueError
        If a value is out of its range.
    """

    kind: Kind = "sgd"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"optimizer = {self.kind!r}: must be one of {', '.join(get_args(Kind))}"
            )
        for name, value in (("momentum", self.momentum), *(("betas", b) for b in self.betas)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} = {value}: must be at least 0 and less than 1")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon = {self.epsilon}: must be above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay = {self.weight_decay}: must be at least 0")

    def step(
        self, models: Tensor, gradients: Tensor, moments: Moments, rate: float, number: int
    ) -> tuple[Tensor, Moments]:
        """Return the models after a step, and the new moments; nothing given is changed.

        Parameters
        ----------
        models, gradients : Tensor, shape (n, p) or (1, p)
        moments : dict of Tensor
            Of the step before; empty at the first.
        rate : float
        number : int
            Steps done, this one included (for Adam's bias correction).
        """
        if self.weight_decay:
            gradients = gradients + self.weight_decay * models
        if self.kind == "sgd":
            return models - rate * gradients, {}
        if self.kind == "adam":
            return self._adam(models, gradients, moments, rate, number)
        before = moments.get("velocity")
        velocity = gradients if before is None else self.momentum * before + gradients
        ahead = gradients + self.momentum * velocity if self.kind == "nesterov" else velocity
        return models - rate * ahead, {"velocity": velocity}

    def _adam(
        self, models: Tensor, gradients: Tensor, moments: Moments, rate: float, number: int
    ) -> tuple[Tensor, Moments]:
        (beta1, beta2), zero = self.betas, torch.zeros_like(gradients)
        first = beta1 * moments.get("first", zero) + (1 - beta1) * gradients
        second = beta2 * moments.get("second", zero) + (1 - beta2) * gradients.square()
        root = (second / (1 - beta2**number)).sqrt() + self.epsilon
        step = rate / (1 - beta1**number)
        return models - step * first / root, {"first": first, "second": second}
