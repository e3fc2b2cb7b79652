"""Models as rows: which columns hold which array."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

__all__ = ["Layout", "tensors_of"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which columns of a row hold which array; floating arrays only, in the widest type.

    Attributes
    ----------
    names : tuple of str
    shapes : tuple of tuple of int
    dtypes : tuple of torch.dtype
    starts : tuple of int
        First column of each array, and the number of columns.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of one model's arrays.

        Raises
        ------
        ValueError
            If none of them is of a floating type.
        """
        floats = {key: value for key, value in tensors.items() if value.is_floating_point()}
        if not floats:
            raise ValueError(f"arrays {list(tensors)}: none of them is of a floating type")
        starts = np.cumsum([0, *(value.numel() for value in floats.values())]).tolist()
        shapes = tuple(tuple(value.shape) for value in floats.values())
        return cls(tuple(floats), shapes, tuple(v.dtype for v in floats.values()), tuple(starts))

    @property
    def dtype(self) -> torch.dtype:
        """The type of rows: the widest of the arrays' types."""
        widest = self.dtypes[0]
        for dtype in self.dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest

    def columns(self) -> dict[str, slice]:
        """Return the columns of each array."""
        ends = zip(self.names, self.starts, self.starts[1:], strict=False)
        return {name: slice(start, stop) for name, start, stop in ends}

    def flatten(self, stacks: Mapping[str, Tensor]) -> Tensor:
        """Return rows ``(n, p)`` of stacked tensors ``(n, *shape)``; others are left out."""
        parts = [stacks[name].reshape(len(stacks[name]), -1) for name in self.names]
        return torch.cat([part.to(self.dtype) for part in parts], dim=1)

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the stacked tensors of rows, each in its own type."""
        found = zip(self.columns().values(), self.shapes, self.dtypes, strict=True)
        tensors = [rows[:, at].reshape(-1, *shape).to(dtype) for at, shape, dtype in found]
        return dict(zip(self.names, tensors, strict=True))


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """Return private tensors of the arrays of a record."""
    return {key: torch.from_numpy(np.array(array.numpy())) for key, array in arrays.items()}
