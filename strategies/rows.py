"""Models as rows: named tensors side by side, and rows that travelled as encoded arrays."""

import math
from collections.abc import Mapping, Sequence

import torch
from flwr.app import Array
from torch import Tensor

from strategies.compression import Compressor, EncodedArray, unpack

__all__ = ["decoded_rows", "flat", "shaped", "sizes_of"]

Tensors = dict[str, Tensor]


def decoded_rows(
    arrays: Sequence[Array], used: Compressor, blocks: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Return what encoded arrays mean, as rows (n, P), whether or not they went through bytes."""
    first = arrays[0]
    if isinstance(first, EncodedArray):
        packed = first.packed
        encoded = [a for a in arrays if isinstance(a, EncodedArray) and a.packed is packed]
        if len(encoded) == len(arrays):
            rows = [array.row for array in encoded]
            if rows == list(range(len(packed.values))):
                return packed.values
            if rows.count(rows[0]) == len(rows):
                return packed.values[rows[0]].expand(len(rows), -1)
            return packed.values[rows]
    values = [
        a.decoded
        if isinstance(a, EncodedArray)
        else unpack(used, a.numpy().tobytes(), blocks, dtype)
        for a in arrays
    ]
    return torch.stack(values)


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the floating-point tensors ``(n, *shape)`` side by side, (n, P)."""
    found = [v for v in tensors.values() if v.is_floating_point()]
    parts = [v if v.dim() == 2 else v.reshape(len(v), -1) for v in found]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def shaped(rows: Tensor, template: Mapping[str, Tensor]) -> Tensors:
    """Return rows (n, P) as named tensors; what is not floating-point as it is in `template`."""
    found = {}
    start = 0
    for key, value in template.items():
        found[key] = value
        if value.is_floating_point():
            stop = start + math.prod(value.shape[1:])
            part = rows if stop - start == rows.shape[1] else rows[:, start:stop]
            part = part if part.shape == value.shape else part.reshape(value.shape)
            found[key], start = part.to(value.dtype), stop
    return found


def sizes_of(tensors: Mapping[str, Tensor]) -> list[int]:
    """Return the elements of a row of each floating-point tensor ``(n, *shape)``."""
    return [math.prod(v.shape[1:]) for v in tensors.values() if v.is_floating_point()]
