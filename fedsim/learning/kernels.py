"""Gradients of many devices' models in one go.

A kernel is bound to a chunk's weights and then asked, step after step, for the gradients of the
first k devices. `LinearKernel` multiplies stacks of matrices and knows the derivative of linear
layers by heart; `VmapKernel` maps any module with `torch.func`. Both are equal to the plain loop
(`trainer`) up to rounding.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedsim.learning.layout import Layout
from fedsim.learning.losses import Loss
from fedsim.learning.optimizers import per_row

__all__ = ["Kernel", "LinearKernel", "VmapKernel", "linear_layers"]

State = dict[str, Tensor]


class Kernel(Protocol):
    """Gradients of the first k devices of a bound chunk."""

    def bind(self, state: State, *, shared: bool) -> None:
        """Use these stacked tensors `(c, *shape)`; `shared`: one row that serves all devices."""

    def gradients(
        self, k: int, x: Tensor, y: Tensor, weight: Tensor, keys: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Return the gradients by trained name, each (k, *shape), and the losses (k,).

        Parameters
        ----------
        k : int
        x, y : Tensor, shape (k, width, ...)
        weight : Tensor, shape (k, width)
            Of each sample in the loss; 0 for padding.
        keys : Tensor of int64, shape (k,)
            Name the random draws of this step.
        """

    def outputs(self, x: Tensor) -> Tensor:
        """Return every bound model's outputs, (c, n, ...), for common inputs x (n, ...)."""


_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
Layer = tuple[str, str, str | None]


def linear_layers(module: nn.Module) -> list[Layer] | None:
    """Return a stack of linear layers as (kind, weight name, bias name), or None if it is not one.

    It may begin with a flatten, ends with a linear layer and shares no weights. Only exact types
    count: a subclass may do something else, and so may hooks and parametrisations.
    """
    layers = _layers(module, "")
    if not layers or layers[-1][0] != "linear":
        return None
    n_weights = sum(kind == "linear" for kind, _, _ in layers)
    is_front = all(kind != "flatten" for kind, _, _ in layers[1:])
    is_unshared = n_weights == len({id(m) for m in module.modules() if type(m) is nn.Linear})
    return layers if is_front and is_unshared and _owns_all(module) else None


def _owns_all(module: nn.Module) -> bool:
    """Whether every tensor of the state has one name only."""
    tensors = module.state_dict(keep_vars=True).values()
    return len({id(tensor) for tensor in tensors}) == len(tensors)


def _layers(module: nn.Module, prefix: str) -> list[Layer] | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if type(module) is nn.Linear and all(p.requires_grad for p in module.parameters()):
        bias = None if module.bias is None else f"{prefix}bias"
        return [("linear", f"{prefix}weight", bias)]
    if type(module) in _ACTIVATIONS:
        return [(_ACTIVATIONS[type(module)], "", None)]
    if type(module) is nn.Identity:
        return []
    if type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
        return [("flatten", "", None)]
    if type(module) is not nn.Sequential:
        return None
    layers: list[Layer] = []
    for name, child in module.named_children():
        inner = _layers(child, f"{prefix}{name}.")
        if inner is None:
            return None
        layers += inner
    return layers


class LinearKernel:
    """Stacks of linear layers and activations, with a hand-written derivative."""

    def __init__(self, layers: Sequence[Layer], layout: Layout, loss: Loss) -> None:
        if loss.gradient is None:
            raise ValueError(f"loss {loss.name!r} has no hand-written gradient")
        self.layers = [layer for layer in layers if layer[0] != "flatten"]
        self.trained = layout.parameters
        self.loss_gradient = loss.gradient
        self.state: State = {}
        self.shared = False

    def bind(self, state: State, *, shared: bool) -> None:
        """See `Kernel.bind`."""
        self.state, self.shared = state, shared

    def gradients(
        self, k: int, x: Tensor, y: Tensor, weight: Tensor, keys: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Kernel.gradients`."""
        grads: dict[str, Tensor] = {}

        def keep(layer: Layer, d: Tensor, h: Tensor) -> None:
            grads[layer[1]] = torch.bmm(d.transpose(1, 2), h)
            if layer[2] is not None:
                grads[layer[2]] = d.sum(1)

        losses = self._backward(k, x, y, weight, keep)
        return [grads[name] for name in self.trained], losses

    def plain_step(
        self,
        k: int,
        x: Tensor,
        y: Tensor,
        weight: Tensor,
        rate: float | Tensor,
        weight_decay: float,
    ) -> Tensor:
        """Make a step of plain SGD and return the losses (k,); no gradient is ever stored.

        The weights take the rank-`width` update straight from the two factors of their gradient,
        which saves writing and reading as many numbers as the model has.
        """
        one_rate = rate if isinstance(rate, float) else 1.0
        beta = 1.0 - one_rate * weight_decay if isinstance(rate, float) else 1.0

        def apply(layer: Layer, d: Tensor, h: Tensor) -> None:
            w = self.state[layer[1]][:k]
            b = None if layer[2] is None else self.state[layer[2]][:k]
            if isinstance(rate, Tensor):
                d = d * per_row(rate, d)
                if weight_decay:
                    w.mul_(1.0 - weight_decay * per_row(rate, w))
                    if b is not None:
                        b.mul_(1.0 - weight_decay * per_row(rate, b))
            w.baddbmm_(d.transpose(1, 2), h, beta=beta, alpha=-one_rate)
            if b is not None:
                if beta != 1.0:
                    b.mul_(beta)
                b.sub_(d.sum(1), alpha=one_rate)

        return self._backward(k, x, y, weight, apply)

    def _backward(self, k: int, x: Tensor, y: Tensor, weight: Tensor, visit: Any) -> Tensor:
        """Run forward and backward; `visit(layer, d, h)` gets each linear layer's two factors."""
        values = [x.flatten(2)]  # values[i] enters layer i, values[i + 1] leaves it
        for layer in self.layers:
            values.append(self._forward(layer, values[-1], k))
        losses, d = self.loss_gradient(values[-1], y)
        d = d.mul_(weight.unsqueeze(-1))
        first = next(i for i, layer in enumerate(self.layers) if layer[0] == "linear")
        for i in range(len(self.layers) - 1, first - 1, -1):
            layer = self.layers[i]
            if layer[0] == "linear":
                back = self._times_weight(d, layer, k) if i > first else d
                visit(layer, d, values[i])
                d = back
            else:
                d = _activation_gradient(layer[0], d, values[i + 1])
        return losses.mul_(weight).sum(1)

    def _forward(self, layer: Layer, h: Tensor, k: int) -> Tensor:
        kind, name, bias_name = layer
        if kind != "linear":
            return _activate(kind, h)
        w = self.state[name]
        b = None if bias_name is None else self.state[bias_name]
        if self.shared:
            return torch.nn.functional.linear(h, w[0], None if b is None else b[0])
        if b is None:
            return torch.bmm(h, w[:k].transpose(1, 2))
        return torch.baddbmm(b[:k].unsqueeze(1), h, w[:k].transpose(1, 2))

    def _times_weight(self, d: Tensor, layer: Layer, k: int) -> Tensor:
        w = self.state[layer[1]]
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


def _activation_gradient(kind: str, d: Tensor, output: Tensor) -> Tensor:
    if kind == "relu":
        return d.mul_(output > 0)
    slope = 1.0 - output.square() if kind == "tanh" else output * (1.0 - output)
    return d.mul_(slope)


class VmapKernel:
    """Any module, mapped over the device axis."""

    def __init__(self, module: nn.Module, layout: Layout, loss: Loss) -> None:
        self.module, self.layout = module, layout
        self.state: State = {}
        self.shared = False

        def device_loss(
            params: State, others: State, x: Tensor, y: Tensor, weight: Tensor, key: Tensor
        ) -> tuple[Tensor, tuple[Tensor, State]]:
            others = {name: value.clone() for name, value in others.items()}
            outputs = functional_call(module, {**params, **others}, (x,))
            total = (loss.per_sample(outputs, y) * weight).sum()
            return total, (total.detach(), others)

        gradient = grad(device_loss, has_aux=True)
        self.own = vmap(gradient, in_dims=(0, 0, 0, 0, 0, 0), randomness="error")
        self.common = vmap(gradient, in_dims=(None, 0, 0, 0, 0, 0), randomness="error")
        self.model = vmap(self._call, in_dims=(0, None), randomness="error")

    def _call(self, state: State, x: Tensor) -> Any:
        return functional_call(self.module, state, (x,))

    def bind(self, state: State, *, shared: bool) -> None:
        """See `Kernel.bind`."""
        self.state, self.shared = state, shared

    def gradients(
        self, k: int, x: Tensor, y: Tensor, weight: Tensor, keys: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Kernel.gradients`."""
        trained = self.layout.parameters
        others = {
            name: value.expand(k, *value.shape[1:]) if self.shared else value[:k]
            for name, value in self.state.items()
            if name not in trained
        }
        if self.shared:
            params = {name: self.state[name][0] for name in trained}
            grads, (losses, _) = self.common(params, others, x, y, weight, keys)
        else:
            params = {name: self.state[name][:k] for name in trained}
            grads, (losses, changed) = self.own(params, others, x, y, weight, keys)
            for name in self.layout.buffers:
                self.state[name][:k].copy_(changed[name])
        return [grads[name] for name in trained], losses

    def outputs(self, x: Tensor) -> Tensor:
        """See `Kernel.outputs`."""
        mapped: Tensor = self.model(self.state, x)
        return mapped


def without_aliases(state: Mapping[str, Tensor], layout: Layout) -> State:
    """Return the tensors that a module owns once, shared ones under their first name."""
    alias = {name for name, _ in layout.aliases}
    return {name: value for name, value in state.items() if name not in alias}
