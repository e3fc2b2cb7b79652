"""One model as one row: where each tensor of a module's state lies in a flat vector."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedsim.errors import ScenarioError

__all__ = ["Layout", "layout_of"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Names, shapes and places of the tensors of a `state_dict`, in its order.

    Models of many devices are the rows of one matrix `(k, size)` of type `dtype`. Integer buffers
    (BatchNorm's step counter) are kept in it as numbers and come back in their own type.

    Parameters
    ----------
    names, shapes, dtypes, numel : tuple
        One entry for each tensor.
    offsets : tuple of int
        First column of each tensor.
    size : int
        Length P of a row.
    dtype : torch.dtype
        Type of the matrix: the module's floating type.
    parameters : tuple of str
        The names that training changes.
    buffers : tuple of str
        The names that a forward pass may change.
    aliases : tuple of (str, str)
        Names of shared tensors: (name, the trained name that it equals).
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    numel: tuple[int, ...]
    offsets: tuple[int, ...]
    size: int
    dtype: torch.dtype
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    aliases: tuple[tuple[str, str], ...]

    def columns(self, name: str) -> slice:
        """Return where the tensor `name` lies in a row."""
        i = self.names.index(name)
        return slice(self.offsets[i], self.offsets[i] + self.numel[i])

    def views(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return the stacked tensors of a matrix `(k, size)`, by name.

        Returns
        -------
        dict of Tensor, shape (k, *shape)
            Views of the matrix, except for tensors of another type, which are copies.
        """
        return {
            name: matrix[:, offset : offset + n].reshape(-1, *shape)
            if dtype == matrix.dtype or dtype.is_floating_point
            else matrix[:, offset : offset + n].reshape(-1, *shape).round().to(dtype)
            for name, shape, dtype, n, offset in zip(
                self.names, self.shapes, self.dtypes, self.numel, self.offsets, strict=True
            )
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix `(k, size)` of stacked tensors `(k, *shape)`, the inverse of `views`.

        Raises
        ------
        ScenarioError
            If a name is missing or a shape is not this layout's.
        """
        wrong = [
            name
            for name, shape in zip(self.names, self.shapes, strict=True)
            if name not in tensors or tensors[name].shape[1:] != shape
        ]
        if wrong:
            raise ScenarioError(
                f"arrays do not fit the model: {wrong[0]!r} is missing or misshapen"
            )
        return torch.cat(
            [tensors[name].reshape(len(tensors[name]), -1).to(self.dtype) for name in self.names],
            dim=1,
        )


def layout_of(module: nn.Module) -> Layout:
    """Return the layout of a module's `state_dict`.

    Raises
    ------
    ScenarioError
        If the module has no parameters to train, or floating tensors of more than one type.
    """
    state = module.state_dict(keep_vars=True)
    floating = {t.dtype for t in state.values() if t.dtype.is_floating_point}
    if len(floating) > 1:
        shown = ", ".join(sorted(str(dtype) for dtype in floating))
        raise ScenarioError(f"model: tensors of mixed types ({shown}); make them one type")
    parameters = [n for n, p in module.named_parameters() if p.requires_grad and n in state]
    if not parameters:
        raise ScenarioError(f"model: {type(module).__name__} has no parameters to train")
    first: dict[int, str] = {}
    aliases = [
        (name, first[id(tensor)])
        for name, tensor in state.items()
        if first.setdefault(id(tensor), name) != name
    ]
    numel = tuple(t.numel() for t in state.values())
    offsets = tuple(sum(numel[:i]) for i in range(len(numel)))
    buffers = {name for name, _ in module.named_buffers()}
    return Layout(
        names=tuple(state),
        shapes=tuple(t.shape for t in state.values()),
        dtypes=tuple(t.dtype for t in state.values()),
        numel=numel,
        offsets=offsets,
        size=sum(numel),
        dtype=floating.pop(),
        parameters=tuple(parameters),
        buffers=tuple(name for name in state if name in buffers),
        aliases=tuple(aliases),
    )
