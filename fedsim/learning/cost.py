"""What a model costs: its parameters, its bytes and its arithmetic."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.learning.layout import Layout, layout_of
from fedsim.learning.linear import linear_layers

__all__ = ["ModelCost", "model_cost"]


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
    abstract = copy.deepcopy(module).to("meta").eval()
    dtype = torch.int64 if tokens else layout.dtype
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.random.fork_rng(devices=[]):
        abstract(torch.zeros((1, *input_shape), dtype=dtype, device="meta"))
    return int(counter.get_total_flops())
