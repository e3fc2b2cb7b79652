"""What a model costs: its parameters, its bytes and its arithmetic."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.learning.layout import Layout, layout_of
from fedsim.learning.linear import linear_layers
from topologies.profiles import Profile, Tensor

__all__ = ["ModelCost", "model_cost", "model_profile"]


@dataclass(frozen=True, slots=True)
class ModelCost:
    """The cost of a model.

    Parameters
    ----------
    parameters : int
        Numbers that training changes (shared ones once).
    size_bytes : int
        Payload of its state: elements × itemsize of every tensor of the `state_dict`.
    forward_flops : int
        Floating-point operations of one sample's forward pass, in matrix products, convolutions
        and recurrent layers; a multiplication with its addition counts two.
    """

    parameters: int
    size_bytes: int
    forward_flops: int

    @property
    def training_flops(self) -> int:
        """Operations of one sample in training: the backward pass costs two forward passes."""
        return 3 * self.forward_flops


def model_cost(
    module: nn.Module, input_shape: tuple[int, ...], *, tokens: bool = False
) -> ModelCost:
    """Count a model's parameters, bytes and operations, without computing anything.

    Parameters
    ----------
    module : nn.Module
    input_shape : tuple of int
        Shape of one sample.
    tokens : bool
        Whether the inputs are integer symbols.
    """
    layout = layout_of(module)
    sizes = dict(zip(layout.names, layout.numel, strict=True))
    return ModelCost(
        parameters=sum(sizes[name] for name in layout.parameters),
        size_bytes=sum(
            n * dtype.itemsize for n, dtype in zip(layout.numel, layout.dtypes, strict=True)
        ),
        forward_flops=_forward_flops(module, layout, input_shape, tokens),
    )


def _forward_flops(
    module: nn.Module, layout: Layout, input_shape: tuple[int, ...], tokens: bool
) -> int:
    layers = linear_layers(module)
    if layers is not None:  # torch's counter takes a second to import
        return sum(
            2 * layout.numel[layout.names.index(layer.weight)]
            for layer in layers
            if layer.kind == "linear"
        )
    return int(_counted(module, layout, input_shape, tokens).get_total_flops())


def _counted(
    module: nn.Module, layout: Layout, input_shape: tuple[int, ...], tokens: bool
) -> FlopCounterMode:
    """Return torch's counter after an abstract forward pass of one sample."""
    abstract = copy.deepcopy(module).to("meta").eval()
    dtype = torch.int64 if tokens else layout.dtype
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.random.fork_rng(devices=[]):
        abstract(torch.zeros((1, *input_shape), dtype=dtype, device="meta"))
    return counter


def model_profile(
    module: nn.Module, input_shape: tuple[int, ...], *, tokens: bool = False
) -> Profile:
    """Return a model's tensors in the order of its state, with the operations that each makes.

    A layer's operations are its first tensor's, its weight as a rule. Integer tensors (a counter)
    are left out.

    Parameters
    ----------
    module : nn.Module
    input_shape : tuple of int
        Shape of one sample.
    tokens : bool
        Whether the inputs are integer symbols.

    Examples
    --------
    >>> [(t.name, t.flops) for t in model_profile(nn.Linear(8, 2), (8,)).tensors]
    [('weight', 32.0), ('bias', 0.0)]
    """
    layout = layout_of(module)
    counts = _counted(module, layout, input_shape, tokens).get_flop_counts()
    flops = {name: float(sum(made.values())) for name, made in counts.items()}
    own = _own_flops(module, flops)
    tensors = [
        Tensor(name, tuple(shape), own.get(name, 0.0))
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True)
        if dtype.is_floating_point
    ]
    return Profile(type(module).__name__, tuple(tensors), layout.dtype.itemsize)


def _own_flops(module: nn.Module, flops: Mapping[str, float]) -> dict[str, float]:
    """Return, by the name of each module's first own tensor, what the module itself computes."""
    root, own = type(module).__name__, {}
    for path, part in module.named_modules():
        tensors = [name for name, _ in part.named_parameters(recurse=False)]
        if tensors:
            label = f"{root}.{path}" if path else root
            inner = (f"{label}.{name}" for name, _ in part.named_children())
            rest = flops.get(label, 0.0) - sum(flops.get(name, 0.0) for name in inner)
            own[f"{path}.{tensors[0]}" if path else tensors[0]] = rest
    return own
