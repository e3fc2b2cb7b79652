"""Models as rows: named tensors side by side, and rows that travelled as encoded arrays."""

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
    parts = [v.reshape(len(v), -1) for v in tensors.values() if v.is_floating_point()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def shaped(rows: Tensor, template: Mapping[str, Tensor]) -> Tensors:
    """Return rows (n, P) as named tensors; what is not floating-point as it is in `template`."""
    sizes = sizes_of(template)
    parts = iter(torch.split(rows, sizes, 1))
    return {
        key: next(parts).reshape(value.shape).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in template.items()
    }


def sizes_of(tensors: Mapping[str, Tensor]) -> list[int]:
    """Return the elements of a row of each floating-point tensor ``(n, *shape)``."""
    return [v[0].numel() for v in tensors.values() if v.is_floating_point()]
