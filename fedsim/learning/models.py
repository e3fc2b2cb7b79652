"""Small models: factories `(input_shape, n_classes, **arguments) -> nn.Module`."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fedsim.streams import stream

__all__ = ["build_model", "mlp", "softmax"]

Shape = tuple[int, ...]


def build_model(
    factory: Callable[..., nn.Module],
    input_shape: Shape,
    n_classes: int,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    **arguments: Any,
) -> nn.Module:
    """Return the factory's module with initial weights that depend on the seed alone.

    Parameters
    ----------
    factory : callable
        One of this module's functions, or any `nn.Module` class that takes
        `(input_shape, n_classes, **arguments)`.
    input_shape : tuple of int
        Shape of one sample.
    n_classes : int
    seed : int
    dtype : torch.dtype, optional
        Type that the module is converted to; default: what the factory made.

    Returns
    -------
    nn.Module
        Torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(stream(seed, "model").integers(2**62)))
        module = factory(input_shape, n_classes, **arguments)
    return module if dtype is None else module.to(dtype)


def softmax(input_shape: Shape, n_classes: int) -> nn.Sequential:
    """Return softmax regression: one linear layer, `(features + 1) * n_classes` parameters."""
    return mlp(input_shape, n_classes, hidden=())


def mlp(input_shape: Shape, n_classes: int, *, hidden: Sequence[int] = (128,)) -> nn.Sequential:
    """Return a multilayer perceptron with ReLU between its layers.

    Parameters
    ----------
    hidden : sequence of int
        Widths of the hidden layers.
    """
    sizes = [math.prod(input_shape), *hidden, n_classes]
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for i, (n_in, n_out) in enumerate(pairwise(sizes), 1):
        if i > 1:
            layers[f"relu{i - 1}"] = nn.ReLU()
        layers[f"fc{i}"] = nn.Linear(n_in, n_out)
    return nn.Sequential(layers)
