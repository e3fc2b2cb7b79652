"""One update step for many devices: lists of stacked tensors in, changed in place.

`torch.optim` is not used: it knows one model at a time, and importing it costs a second.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.learning.config import LocalConfig

__all__ = ["Updater", "per_row"]


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
    center : sequence of Tensor, shape (c, *shape), optional
        What the proximal term pulls towards; default: `params` as they are now.
    """

    def __init__(
        self,
        config: LocalConfig,
        params: Sequence[Tensor],
        rate: float | Tensor,
        control: Sequence[Tensor] | None = None,
        center: Sequence[Tensor] | None = None,
    ) -> None:
        self.config, self.params, self.rate, self.control = config, list(params), rate, control
        self.center = list(center or [p.clone() for p in params]) if config.proximal_mu else []
        self.is_adam = config.optimizer != "sgd"
        keeps_first = self.is_adam or config.momentum
        self.first = [torch.zeros_like(p) for p in params] if keeps_first else []
        self.second = [torch.zeros_like(p) for p in params] if self.is_adam else []
        self.n_steps = 0

    @property
    def is_plain(self) -> bool:
        """Whether a step is `w <- (1 - rate * weight_decay) w - rate * gradient` and no more."""
        c = self.config
        has_terms = c.momentum or c.proximal_mu or c.clip_norm or self.control is not None
        return not self.is_adam and not has_terms

    def step(self, k: int, grads: list[Tensor]) -> None:
        """Update the first k devices; `grads`, shape (k, *shape), are used up."""
        config, params = self.config, [p[:k] for p in self.params]
        self.n_steps += 1
        if config.weight_decay and config.optimizer != "adamw":
            torch._foreach_add_(grads, params, alpha=config.weight_decay)
        if config.proximal_mu:
            pull = torch._foreach_sub(params, [c[:k] for c in self.center])
            torch._foreach_add_(grads, pull, alpha=config.proximal_mu)
        if self.control is not None:
            torch._foreach_add_(grads, [c[:k] for c in self.control])
        if config.clip_norm is not None:
            _clip(grads, config.clip_norm)
        if self.is_adam:
            if config.optimizer == "adamw" and config.weight_decay:
                _shrink(params, self.rate, config.weight_decay)
            grads = self._adam_direction(k, grads)
        elif config.momentum:
            moments = [m[:k] for m in self.first]
            torch._foreach_mul_(moments, config.momentum)
            torch._foreach_add_(moments, grads)
            if config.nesterov:
                torch._foreach_add_(grads, moments, alpha=config.momentum)
            else:
                grads = moments
        _descend(params, grads, self.rate)

    def _adam_direction(self, k: int, grads: list[Tensor]) -> list[Tensor]:
        """Move the moments; return m̂ / (sqrt(v̂) + ε). All active devices have made equal steps."""
        (beta1, beta2), t = self.config.betas, self.n_steps
        first, second = [m[:k] for m in self.first], [v[:k] for v in self.second]
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(second)
        torch._foreach_mul_(root, (1 - beta2**t) ** -0.5)
        torch._foreach_add_(root, self.config.epsilon)
        direction = torch._foreach_div(first, root)
        torch._foreach_mul_(direction, 1 / (1 - beta1**t))
        return list(direction)


def _descend(params: list[Tensor], direction: list[Tensor], rate: float | Tensor) -> None:
    """Subtract `rate * direction`."""
    if isinstance(rate, Tensor):
        for p, d in zip(params, direction, strict=True):
            p.addcmul_(d, per_row(rate, d), value=-1.0)
    else:
        torch._foreach_add_(params, direction, alpha=-rate)


def _shrink(params: list[Tensor], rate: float | Tensor, weight_decay: float) -> None:
    """Multiply by `1 - rate * weight_decay`."""
    for p in params:
        p.mul_(1.0 - weight_decay * (per_row(rate, p) if isinstance(rate, Tensor) else rate))


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return one value a row, shaped to multiply the stack `like`."""
    return values[: len(like)].view(-1, *[1] * (like.dim() - 1))


def _clip(grads: list[Tensor], limit: float) -> None:
    """Scale each device's gradient to a norm of at most `limit`, as torch's clip_grad_norm_."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in grads]).sum(0)
    scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1.0)
    for g in grads:
        g.mul_(per_row(scale, g))
