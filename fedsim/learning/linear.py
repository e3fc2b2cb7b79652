"""Modules that are nothing but a stack of linear layers."""

from dataclasses import dataclass

from torch import nn

__all__ = ["Layer", "linear_layers"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a linear stack: its kind, the names of its tensors, its dropout rate."""

    kind: str
    weight: str = ""
    bias: str | None = None
    rate: float = 0.0


_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}


def linear_layers(module: nn.Module) -> list[Layer] | None:
    """Return the layers of a stack of linear layers, or None if the module is not one.

    It may begin with a flatten, ends with a linear layer and shares no weights. Only exact types
    count: a subclass may do something else, and so may hooks and parametrisations.
    """
    layers = _layers(module, "")
    if not layers or layers[-1].kind != "linear":
        return None
    tensors = module.state_dict(keep_vars=True).values()
    is_unshared = len({id(tensor) for tensor in tensors}) == len(tensors)
    n_modules = len([m for m in module.modules() if type(m) is nn.Linear])
    is_unshared &= n_modules == sum(layer.kind == "linear" for layer in layers)
    is_front = all(layer.kind != "flatten" for layer in layers[1:])
    return layers if is_front and is_unshared else None


def _layers(module: nn.Module, prefix: str) -> list[Layer] | None:
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return None
    if type(module) is nn.Linear and all(p.requires_grad for p in module.parameters()):
        return [
            Layer("linear", f"{prefix}weight", f"{prefix}bias" if module.bias is not None else None)
        ]
    if type(module) in _ACTIVATIONS:
        return [Layer(_ACTIVATIONS[type(module)])]
    if type(module) is nn.Dropout and module.p < 1:
        return [Layer("dropout", rate=module.p)] if module.p else []
    if type(module) is nn.Identity:
        return []
    if type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
        return [Layer("flatten")]
    if type(module) is not nn.Sequential:
        return None
    layers: list[Layer] = []
    for name, child in module.named_children():
        inner = _layers(child, f"{prefix}{name}.")
        if inner is None:
            return None
        layers += inner
    return layers
