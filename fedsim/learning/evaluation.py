"""Scores of many models: on common data, on each device's own, and their spread."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import ScenarioError
from fedsim.learning.kernels import Kernel, LinearKernel
from fedsim.learning.stack import ModelStack

__all__ = ["confusion", "evaluate", "evaluate_devices", "spread"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
# Numbers of the largest activation that a block of samples may have.
_BLOCK = 4_000_000
_MODELS = 16


def spread(scores: FloatArray) -> dict[str, float]:
    """Return what a distribution over devices is judged by.

    Returns
    -------
    dict
        `mean`, `std`, and `worst_10_percent`: the mean of the lowest tenth (at least one) of the
        scores. Devices without a score (NaN) do not count; NaN if there are none left.
    """
    known = np.sort(scores[np.isfinite(scores)])
    if not len(known):
        return dict.fromkeys(("mean", "std", "worst_10_percent"), float("nan"))
    worst = known[: max(1, len(known) // 10)]
    return {
        "mean": float(known.mean()),
        "std": float(known.std()),
        "worst_10_percent": float(worst.mean()),
    }


@torch.no_grad()
def evaluate(
    stack: ModelStack, kernel: Kernel | None, params: Tensor, x: Tensor, y: Tensor
) -> tuple[FloatArray, FloatArray]:
    """Return the mean loss and the accuracy of each model (see `Trainer.evaluate`)."""
    loss, hits = np.zeros(len(params)), np.zeros(len(params))
    for models, outputs, labels in _outputs(stack, kernel, params, x, y):
        m = outputs.shape[0]
        flat = outputs.flatten(0, 1)
        repeated = labels.repeat(m, *[1] * (labels.dim() - 1))
        losses = stack.loss.per_sample(flat, repeated).view(m, -1)
        loss[models] += losses.double().sum(1).cpu().numpy()
        hits[models] += _hits(stack, flat, repeated).view(m, -1).sum(1).cpu().numpy()
    return loss / len(y), hits / len(y)


@torch.no_grad()
def confusion(
    stack: ModelStack, kernel: Kernel | None, params: Tensor, x: Tensor, y: Tensor
) -> IntArray:
    """Return the confusion matrix of each model (see `Trainer.confusion`)."""
    c = stack.n_classes
    if stack.loss.predict is None or c == 0:
        raise ScenarioError(f"evaluation: the loss {stack.loss.name!r} knows no classes to confuse")
    counts = np.zeros((len(params), c * c), np.int64)
    for models, outputs, labels in _outputs(stack, kernel, params, x, y):
        for i, row in enumerate(range(*models.indices(len(params)))):
            predicted = stack.loss.predict(outputs[i]).flatten()
            known = predicted < c  # a model may have more outputs than there are classes
            cell = (labels.flatten() * c + predicted)[known]
            counts[row] += torch.bincount(cell, minlength=c * c).cpu().numpy()
    return counts.reshape(-1, c, c)


def _outputs(
    stack: ModelStack, kernel: Kernel | None, params: Tensor, x: Tensor, y: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (models, outputs (m, n, ...), labels (n, ...)) for all models and blocks of samples.

    On a processor mapping a forward pass gains nothing for convolutions, so only linear stacks
    are batched there.
    """
    stack.module.eval()
    params = params.detach().to(stack.device, stack.dtype)
    batched = kernel is not None and (
        isinstance(kernel, LinearKernel) or stack.device.type != "cpu"
    )
    step = _MODELS if batched and len(params) > 1 else 1
    with stack.arithmetic():
        for a in range(0, len(params), step):
            models = slice(a, min(a + step, len(params)))
            function = _forward(stack, kernel if step > 1 else None, params[models])
            n_rows = max(1, _BLOCK // stack.largest_activation // (models.stop - a))
            for b in range(0, len(y), n_rows):
                labels = y[b : b + n_rows].to(stack.device)
                yield models, function(stack.inputs(x[b : b + n_rows])), labels
    stack.release()


def _forward(stack: ModelStack, kernel: Kernel | None, rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the function from inputs (n, ...) to the outputs (m, n, ...) of the models `rows`."""
    state = stack.views(rows)
    if kernel is not None:
        kernel.bind(state, shared=False)
        return kernel.outputs
    stack.load(state)
    return lambda x: stack.module(x).unsqueeze(0)


def _hits(stack: ModelStack, outputs: Tensor, y: Tensor) -> Tensor:
    """Return which samples are right (for sequences: the share of positions)."""
    if stack.loss.predict is None or stack.n_classes == 0:
        return torch.full((len(y),), float("nan"), dtype=torch.float64, device=stack.device)
    right = (stack.loss.predict(outputs) == y).double()
    return right.flatten(1).mean(1) if right.dim() > 1 else right


@torch.no_grad()
def evaluate_devices(
    stack: ModelStack,
    base: Tensor,
    base_rows: IntArray,
    x: Tensor,
    y: Tensor,
    start: IntArray,
    size: IntArray,
) -> tuple[FloatArray, FloatArray]:
    """Return the loss and accuracy of each device's model on its own rows of `x`.

    All the devices that one model goes to are one long batch (see `Trainer.evaluate_devices`).
    """
    stack.module.eval()
    loss, hits = np.zeros(len(size)), np.zeros(len(size))
    for version in np.unique(base_rows):
        rows = np.flatnonzero(base_rows == version)
        row = base[version : version + 1].detach().to(stack.device, stack.dtype)
        function = _forward(stack, None, row)
        owner = np.repeat(np.arange(len(rows)), size[rows])
        begin = np.cumsum(size[rows]) - size[rows]
        index = start[rows][owner] + np.arange(len(owner)) - begin[owner]
        n_rows = max(1, _BLOCK // stack.largest_activation)
        for a in range(0, len(index), n_rows):
            chosen = torch.from_numpy(index[a : a + n_rows])
            labels = y[chosen].to(stack.device)
            with stack.arithmetic():
                outputs = function(stack.inputs(x[chosen]))[0]
            losses = stack.loss.per_sample(outputs, labels).double().cpu().numpy()
            right = _hits(stack, outputs, labels).cpu().numpy()
            held = owner[a : a + n_rows]
            loss[rows] += np.bincount(held, losses, minlength=len(rows))
            hits[rows] += np.bincount(held, right, minlength=len(rows))
    stack.release()
    with np.errstate(invalid="ignore"):
        return loss / size, hits / size
