"""Gradients of many devices' models in one go.

A kernel is bound to a chunk's weights and then asked, step after step, for the gradients of the
first k devices. `LinearKernel` multiplies stacks of matrices and knows the derivative of linear
layers by heart; `VmapKernel` maps any module with `torch.func`. Both are equal to the plain loop
(`trainer`) up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name)
from torch import Tensor
from torch.func import grad, vmap

from fedsim.learning.config import ExtraLoss
from fedsim.learning.draws import KeyedLayers, keyed_mask
from fedsim.learning.layout import Layout
from fedsim.learning.linear import Layer
from fedsim.learning.losses import Loss
from fedsim.learning.optimizers import per_row
from fedsim.learning.stack import ModelStack, State

__all__ = ["Batch", "Kernel", "LinearKernel", "VmapKernel"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's samples of the first k devices of a chunk.

    Parameters
    ----------
    x, y : Tensor, shape (k, width, ...)
    weight : Tensor, shape (k, width)
        Of each sample in its device's loss; 0 for padding.
    keys : Tensor of int64, shape (k,)
        Name the random draws of this step.
    rows : dict of Tensor, shape (k, ...)
        What an extra loss needs of each device.
    """

    x: Tensor
    y: Tensor
    weight: Tensor
    keys: Tensor
    rows: State


class Kernel(Protocol):
    """Gradients of the first k devices of a bound chunk.

    Attributes
    ----------
    draws : bool
        Whether the keys of a batch may matter.
    """

    draws: bool

    def bind(self, state: State, *, shared: bool) -> None:
        """Use these stacked tensors `(c, *shape)`; `shared`: one row that serves all devices."""

    def gradients(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """Return the gradients by trained name, each (k, *shape), and the losses (k,)."""

    def outputs(self, x: Tensor) -> Tensor:
        """Return every bound model's outputs, (c, n, ...), for common inputs x (n, ...)."""


class LinearKernel:
    """Stacks of linear layers, activations and dropout, with a hand-written derivative."""

    def __init__(self, layers: Sequence[Layer], layout: Layout, loss: Loss) -> None:
        if loss.gradient is None:
            raise ValueError(f"loss {loss.name!r} has no hand-written gradient")
        self.layers = [layer for layer in layers if layer.kind != "flatten"]
        self.first = next(i for i, layer in enumerate(self.layers) if layer.kind == "linear")
        self.draws = any(layer.kind == "dropout" for layer in self.layers)
        self.trained = layout.parameters
        self.loss_gradient = loss.gradient
        self.state: State = {}
        self.shared = False

    def bind(self, state: State, *, shared: bool) -> None:
        """See `Kernel.bind`."""
        self.state, self.shared = state, shared

    def gradients(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """See `Kernel.gradients`."""
        grads: dict[str, Tensor] = {}

        def keep(layer: Layer, d: Tensor, h: Tensor) -> None:
            grads[layer.weight] = torch.bmm(d.transpose(1, 2), h)
            if layer.bias is not None:
                grads[layer.bias] = d.sum(1)

        losses = self._backward(batch, keep)
        return [grads[name] for name in self.trained], losses

    def plain_step(self, batch: Batch, rate: float | Tensor, weight_decay: float) -> Tensor:
        """Make a step of plain SGD and return the losses (k,); no gradient is ever stored.

        The weights take the rank-`width` update straight from the two factors of their gradient,
        which saves writing and reading as many numbers as the model has.
        """

        def apply(layer: Layer, d: Tensor, h: Tensor) -> None:
            alpha = 1.0
            if isinstance(rate, Tensor):
                d = d * per_row(rate, d)
            else:
                alpha = rate
            for name in (layer.weight, layer.bias):
                if name is None:
                    continue
                value = self.state[name][: len(d)]
                if weight_decay:
                    by = per_row(rate, value) if isinstance(rate, Tensor) else rate
                    value.mul_(1.0 - weight_decay * by)
                if name == layer.weight:
                    value.baddbmm_(d.transpose(1, 2), h, alpha=-alpha)
                else:
                    value.sub_(d.sum(1), alpha=alpha)

        return self._backward(batch, apply)

    def _backward(self, batch: Batch, visit: Callable[[Layer, Tensor, Tensor], None]) -> Tensor:
        """Run forward and backward; `visit(layer, d, h)` gets each linear layer's two factors."""
        k = len(batch.x)
        values = [batch.x.flatten(2)]  # values[i] enters layer i, values[i + 1] leaves it
        masks: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if layer.kind == "dropout":
                kept = keyed_mask(batch.keys, len(masks) + 1, values[-1].shape[1:], layer.rate)
                masks[i] = kept.to(values[-1].dtype) / (1 - layer.rate)
                values.append(values[-1] * masks[i])
            else:
                values.append(self._forward(layer, values[-1], k))
        losses, d = self.loss_gradient(values[-1], batch.y)
        d = d.mul_(batch.weight.unsqueeze(-1))
        for i in range(len(self.layers) - 1, self.first - 1, -1):
            layer = self.layers[i]
            if layer.kind == "linear":
                back = self._times_weight(d, layer, k) if i > self.first else d
                visit(layer, d, values[i])
                d = back
            elif layer.kind == "dropout":
                d = d.mul_(masks[i])
            else:
                d = d.mul_(_slope(layer.kind, values[i + 1]))
        return losses.mul_(batch.weight).sum(1)

    def _forward(self, layer: Layer, h: Tensor, k: int) -> Tensor:
        if layer.kind != "linear":
            return h if layer.kind == "dropout" else _activate(layer.kind, h)
        w = self.state[layer.weight]
        b = None if layer.bias is None else self.state[layer.bias]
        if self.shared:
            return F.linear(h, w[0], None if b is None else b[0])
        if b is None:
            return torch.bmm(h, w[:k].transpose(1, 2))
        return torch.baddbmm(b[:k].unsqueeze(1), h, w[:k].transpose(1, 2))

    def _times_weight(self, d: Tensor, layer: Layer, k: int) -> Tensor:
        w = self.state[layer.weight]
        return d @ w[0] if self.shared else torch.bmm(d, w[:k])

    def outputs(self, x: Tensor) -> Tensor:
        """See `Kernel.outputs`."""
        k = len(self.state[self.trained[0]])
        h = x.reshape(1, len(x), -1).expand(k, -1, -1)
        for layer in self.layers:
            h = self._forward(layer, h, k)
        return h


def _activate(kind: str, h: Tensor) -> Tensor:
    if kind == "relu":
        return torch.relu(h)
    return torch.tanh(h) if kind == "tanh" else torch.sigmoid(h)


def _slope(kind: str, output: Tensor) -> Tensor:
    """Return an activation's derivative, from its own output."""
    if kind == "relu":
        return output > 0
    return 1.0 - output.square() if kind == "tanh" else output * (1.0 - output)


class VmapKernel:
    """Any module, mapped over the device axis."""

    draws = True

    def __init__(self, stack: ModelStack, extra_loss: ExtraLoss | None = None) -> None:
        self.layout = stack.layout
        self.state: State = {}
        self.shared = False
        loss = stack.loss

        def device_loss(
            params: State,
            others: State,
            x: Tensor,
            y: Tensor,
            weight: Tensor,
            key: Tensor,
            rows: State,
        ) -> tuple[Tensor, tuple[Tensor, State]]:
            others = {name: value.clone() for name, value in others.items()}
            with KeyedLayers(key, weight):
                outputs = stack.call(params, others, x)
            losses = loss.per_sample(outputs, y)
            if extra_loss is not None:
                losses = losses + extra_loss(outputs, x, y, rows)
            total = (losses * weight).sum()
            return total, (total.detach(), others)

        gradient = grad(device_loss, has_aux=True)
        self.own = vmap(gradient, in_dims=0, randomness="error")
        self.common = vmap(gradient, in_dims=(None, 0, 0, 0, 0, 0, 0), randomness="error")
        self.model = vmap(
            lambda state, x: stack.call(state, {}, x), in_dims=(0, None), randomness="error"
        )

    def bind(self, state: State, *, shared: bool) -> None:
        """See `Kernel.bind`."""
        self.state, self.shared = state, shared

    def gradients(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """See `Kernel.gradients`."""
        k, trained = len(batch.x), self.layout.parameters
        others = {
            name: value.expand(k, *value.shape[1:]) if self.shared else value[:k]
            for name, value in self.state.items()
            if name not in trained
        }
        params = {name: self.state[name][0 if self.shared else slice(k)] for name in trained}
        mapped = self.common if self.shared else self.own
        grads, (losses, changed) = mapped(
            params, others, batch.x, batch.y, batch.weight, batch.keys, batch.rows
        )
        if not self.shared:
            for name in self.layout.buffers:
                self.state[name][:k].copy_(changed[name])
        return [grads[name] for name in trained], losses

    def outputs(self, x: Tensor) -> Tensor:
        """See `Kernel.outputs`."""
        mapped: Tensor = self.model(self.state, x)
        return mapped
