"""Degrees of power means that are learned: by a hypernetwork for each device, or directly.

Both are pairs of pure functions over tensors whose leading axis is the device, so that the
hypernetworks of all devices are one batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from strategies.mirror import check_degree

__all__ = [
    "Adaptation",
    "direct_degrees",
    "hypernetwork_degrees",
    "learn",
    "new_direct",
    "new_hypernetworks",
]

_LAYERS = 3
Parameters = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Adaptation:
    """How degrees are learned.

    Parameters
    ----------
    learning_rate : float, optional
        Of the hypernetwork or the degrees themselves; default: the models'. With 0.01 degrees
        hardly move in 100 rounds, with 1 they fall towards 1.
    candidates : sequence of float
        A hypernetwork's degree is a convex combination of these, and starts near their mean; a
        degree learned directly lies between 1 and the greatest.
    start : float
        First degree where it is learned directly.
    embedding, width : int
        Size of a device's embedding and of the three layers of its hypernetwork.
    clip : float
        Greatest slope of a parameter by the degree, relative to the largest input: the slope is
        unbounded where inputs of both signs cancel.
    seed : int
        Of the initial weights.
    """

    learning_rate: float | None = None
    candidates: Sequence[float] = (1.0, 3.0, 5.0, 7.0, 9.0, 11.0, 13.0, 15.0)
    start: float = 3.0
    embedding: int = 16
    width: int = 64
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("candidates: give at least one degree")
        for degree in self.candidates:
            check_degree(degree)
        if not self.clip > 0:
            raise ValueError(f"clip = {self.clip}: must be above 0")
        check_degree(self.start)


def new_hypernetworks(nodes: Sequence[int], n_parts: int, how: Adaptation) -> Parameters:
    """Return the initial weights of one hypernetwork a node, uniform within 1/√inputs, no biases.

    Returns
    -------
    dict of Tensor, shape (n, ...), float32
        What a node starts from depends on the seed and its id alone.
    """
    sizes = [how.embedding, *[how.width] * _LAYERS, n_parts * len(how.candidates)]
    rows = []
    for node in nodes:
        rng = torch.Generator().manual_seed((how.seed << 32) + node)
        row = [torch.randn(1, how.embedding, generator=rng)]
        for n_in, n_out in pairwise(sizes):
            row.append((torch.rand(n_in, n_out, generator=rng) * 2 - 1) / math.sqrt(n_in))
        rows.append(row)
    return {
        f"hypernetwork/{i}": torch.stack(each) for i, each in enumerate(zip(*rows, strict=True))
    }


def hypernetwork_degrees(parameters: Parameters, n_parts: int, how: Adaptation) -> Tensor:
    """Return the degrees ``(n, n_parts)``: mean candidates, weighted by the heads' softmax.

    The embedding passes three layers with ReLU; a head a part gives logits over the candidates.
    """
    x, *layers = parameters.values()
    for layer in layers[:-1]:
        x = torch.relu(x @ layer)
    logits = (x @ layers[-1]).reshape(len(x), n_parts, -1)
    return torch.softmax(logits, -1) @ logits.new_tensor(list(how.candidates))


def new_direct(nodes: Sequence[int], n_parts: int, how: Adaptation) -> Parameters:
    """Return what `direct_degrees` maps to the degree `start` for every device and part."""
    greatest = max(how.candidates)
    if not 1 < how.start < greatest:
        raise ValueError(
            f"start = {how.start}: must be between 1 and {greatest}, the greatest candidate"
        )
    share = (how.start - 1) / (greatest - 1)
    return {"degree": torch.full((len(nodes), n_parts), math.log(share / (1 - share)))}


def direct_degrees(parameters: Parameters, n_parts: int, how: Adaptation) -> Tensor:
    """Return 1 + (greatest candidate - 1) sigmoid(u), shape ``(n, n_parts)``."""
    return 1 + (max(how.candidates) - 1) * torch.sigmoid(parameters["degree"])


def learn(
    parameters: Parameters,
    slopes: Tensor,
    n_parts: int,
    how: Adaptation,
    learning_rate: float,
) -> Parameters:
    """Return the parameters after one descent step of all devices, in one vectorised pass.

    Parameters
    ----------
    parameters : dict of Tensor, shape (n, ...)
        Of `new_hypernetworks` or `new_direct`.
    slopes : Tensor, shape (n, n_parts)
        Derivative of each device's loss by its degrees.
    n_parts : int
    how : Adaptation
    learning_rate : float
    """
    degrees_of = direct_degrees if "degree" in parameters else hypernetwork_degrees
    with torch.enable_grad():
        leaves = {key: value.detach().requires_grad_() for key, value in parameters.items()}
        surrogate = (degrees_of(leaves, n_parts, how) * slopes.detach()).sum()
        gradients = torch.autograd.grad(surrogate, list(leaves.values()))
    return {
        key: value - learning_rate * gradient
        for (key, value), gradient in zip(parameters.items(), gradients, strict=True)
    }
