"""Task losses: one value for each sample, and what counts as a hit."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name)
from torch import Tensor

from fedsim.errors import ScenarioError

__all__ = ["LOSSES", "Loss", "loss_of"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A task loss.

    Parameters
    ----------
    name : str
    per_sample : callable
        `(outputs (n, ...), y (n, ...)) -> Tensor (n,)`.
    gradient : callable, optional
        `(outputs (k, n, c), y (k, n)) -> (losses (k, n), gradient by outputs (k, n, c))`, the
        derivative written out for the hand-batched kernels; it may overwrite `outputs`.
    predict : callable, optional
        `outputs (n, ...) -> Tensor of int64`, the class that each output means; None if the task
        has no classes.
    """

    name: str
    per_sample: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    predict: Callable[[Tensor], Tensor] | None = None


def _cross_entropy(outputs: Tensor, y: Tensor) -> Tensor:
    if outputs.dim() > 2:  # a sequence (n, length, c): the mean over its positions
        return F.cross_entropy(outputs.movedim(-1, 1), y, reduction="none").mean(1)
    return F.cross_entropy(outputs, y, reduction="none")


def _cross_entropy_gradient(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(outputs, -1)
    label = y.unsqueeze(-1)
    losses = log_p.gather(-1, label).squeeze(-1).neg_()
    p = log_p.exp_()
    return losses, p.scatter_add_(-1, label, p.new_full((1, 1, 1), -1.0).expand(label.shape))


def _squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs.flatten(1) - y.to(outputs.dtype).reshape(len(y), -1)).square().sum(1)


def _squared_error_gradient(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    error = outputs - y.to(outputs.dtype).reshape(outputs.shape)
    return error.square().sum(-1), error.mul(2.0)


def _logistic(outputs: Tensor, y: Tensor) -> Tensor:
    return F.softplus((1.0 - 2.0 * y.to(outputs.dtype)) * outputs.flatten(1).squeeze(1))


def _logistic_gradient(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    sign = (1.0 - 2.0 * y.to(outputs.dtype)).unsqueeze(-1)
    signed = sign * outputs
    return F.softplus(signed).squeeze(-1), torch.sigmoid(signed) * sign


def _output(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.flatten(1).sum(1) if outputs.dim() > 1 else outputs


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        # -log softmax(outputs)[y]; for sequences the mean over positions.
        Loss("cross_entropy", _cross_entropy, _cross_entropy_gradient, lambda o: o.argmax(-1)),
        # ‖outputs - y‖², without a factor 1/2.
        Loss("squared_error", _squared_error, _squared_error_gradient),
        # log(1 + exp(-s·output)), s = +1 for y = 1 and -1 for y = 0; one output.
        Loss(
            "logistic",
            _logistic,
            _logistic_gradient,
            lambda o: (o.flatten(1).squeeze(1) > 0).to(torch.int64),
        ),
        # The model computes its own loss (the quadratic reference problem).
        Loss("output", _output),
    )
}


def loss_of(loss: str | Loss | Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """Return the loss of that name, or one made of a function `(outputs, y) -> Tensor (n,)`.

    Raises
    ------
    ScenarioError
        If the name is unknown.
    """
    if isinstance(loss, Loss):
        return loss
    if callable(loss):
        return Loss(getattr(loss, "__name__", "custom"), loss, None, lambda o: o.argmax(-1))
    if loss not in LOSSES:
        raise ScenarioError(
            f"training.loss: {loss!r} is not one of {', '.join(LOSSES)}, nor package.module:name "
            "of a function of outputs and targets"
        )
    return LOSSES[loss]
