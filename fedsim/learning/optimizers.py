"""One update step for many devices: lists of stacked tensors in, changed in place.

`torch.optim` is not used: it knows one model at a time, and importing it costs a second.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.learning.config import LocalConfig

__all__ = ["Updater"]


class Updater:
    """The local optimiser of a chunk of devices, its state included.

    Parameters
    ----------
    config : LocalConfig
    params : sequence of Tensor, shape (c, *shape)
        The chunk's weights, changed by `step`.
    rate : float or Tensor, shape (c,)
        Learning rate, alike for all or one for each device.
    control : sequence of Tensor, shape (c, *shape), optional
        Added to every gradient (a control variate).
    """

    def __init__(
        self,
        config: LocalConfig,
        params: Sequence[Tensor],
        rate: float | Tensor,
        control: Sequence[Tensor] | None = None,
    ) -> None:
        self.config = config
        self.params = list(params)
        self.rate = rate
        self.control = control
        self.center = [p.clone() for p in params] if config.proximal_mu else []
        self.momentum = [torch.zeros_like(p) for p in params] if config.momentum else []

    @property
    def is_plain(self) -> bool:
        """Whether a step is `w <- (1 - rate * weight_decay) w - rate * gradient` and no more."""
        c = self.config
        return (
            c.optimizer == "sgd"
            and not (c.momentum or c.proximal_mu or c.clip_norm)
            and self.control is None
        )

    def step(self, k: int, grads: list[Tensor]) -> None:
        """Update the first k devices; `grads`, shape (k, *shape), are used up."""
        config, params = self.config, [p[:k] for p in self.params]
        if config.weight_decay:
            torch._foreach_add_(grads, params, alpha=config.weight_decay)
        if config.proximal_mu:
            pull = torch._foreach_sub(params, [c[:k] for c in self.center])
            torch._foreach_add_(grads, pull, alpha=config.proximal_mu)
        if self.control is not None:
            torch._foreach_add_(grads, [c[:k] for c in self.control])
        if config.clip_norm is not None:
            _clip(grads, config.clip_norm)
        if config.momentum:
            moments = [m[:k] for m in self.momentum]
            torch._foreach_mul_(moments, config.momentum)
            torch._foreach_add_(moments, grads)
            if config.nesterov:
                torch._foreach_add_(grads, moments, alpha=config.momentum)
            else:
                grads = moments
        _descend(params, grads, self.rate)


def _descend(params: list[Tensor], direction: list[Tensor], rate: float | Tensor) -> None:
    """Subtract `rate * direction`."""
    if isinstance(rate, Tensor):
        for p, d in zip(params, direction, strict=True):
            p.addcmul_(d, per_row(rate, d), value=-1.0)
    else:
        torch._foreach_add_(params, direction, alpha=-rate)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return one value a row, shaped to multiply the stack `like`."""
    return values[: len(like)].view(-1, *[1] * (like.dim() - 1))


def _clip(grads: list[Tensor], limit: float) -> None:
    """Scale each device's gradient to a norm of at most `limit`, as torch's clip_grad_norm_."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
    scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(per_row(scale, g))
