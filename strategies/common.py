"""What several strategies share: models of many devices as rows of stacked tensors."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from numpy.typing import NDArray

from strategies.compat import fill

__all__ = [
    "RowArray",
    "check",
    "mean_metrics",
    "mean_of",
    "record_of",
    "row_records",
    "show_arguments",
    "stack_of",
    "tensor_of",
]


class RowArray(Array):
    """A Flower `Array` that is one row of a stacked tensor, serialised only if bytes are read.

    Parameters
    ----------
    stack : Tensor, shape (n_devices, *shape)
        Not to be written to afterwards.
    row : int
    """

    stack: torch.Tensor
    row: int

    def __init__(self, stack: torch.Tensor, row: int) -> None:
        self.__dict__.update(  # past Array.__setattr__, whose bookkeeping needs `data`
            stack=stack,
            row=row,
            dtype=_name_of(stack.dtype),
            shape=tuple(stack.shape[1:]),
            stype="numpy.ndarray",
        )

    def numpy(self) -> NDArray[Any]:
        """Return a private copy of the values."""
        return np.array(self.stack[self.row].detach().cpu().numpy())

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The `.npy` bytes."""
        return self._plain().data

    def deflate(self) -> bytes:
        """Return what a plain `Array` of these values deflates to: real grids know only that."""
        return self._plain().deflate()

    def _plain(self) -> Array:
        return Array(self.numpy())

    def __copy__(self) -> "RowArray":
        return RowArray(self.stack, self.row)

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        return self._plain()

    def __reduce__(self) -> tuple[type[Array], tuple[NDArray[Any]]]:
        return Array, (self.numpy(),)


@cache
def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def row_records(stacks: Mapping[str, torch.Tensor], rows: Sequence[int]) -> list[ArrayRecord]:
    """Return one record for each of `rows`, its arrays rows of `stacks` ``(n, *shape)``."""
    return [
        fill(ArrayRecord(), {key: RowArray(stack, row) for key, stack in stacks.items()})
        for row in rows
    ]


def record_of(reply: Message) -> ArrayRecord:
    """Return the first ArrayRecord of a reply."""
    return next(r for r in reply.content.values() if isinstance(r, ArrayRecord))


def tensor_of(array: Array) -> torch.Tensor:
    """Return an array's values; of a row of a stack, a view. Do not write to the result."""
    stack: torch.Tensor | None = getattr(array, "stack", None)
    return torch.from_numpy(array.numpy()) if stack is None else stack[array.row]  # type: ignore[attr-defined]


def stack_of(replies: Sequence[Message]) -> dict[str, torch.Tensor]:
    """Return the arrays of all replies, one tensor ``(n_replies, *shape)`` per key.

    Replies whose arrays are rows of a common stack (they have the attributes ``stack`` and
    ``row``, as fedsim's do) give that stack, without a copy where they are all of its rows in
    order; the others are stacked from their values. Do not write to the result.

    Parameters
    ----------
    replies : sequence of Message
        At least one; each with one ArrayRecord of the same keys and shapes.
    """
    stacks = {}
    for key, arrays in _columns(replies).items():
        common, rows = _common_stack(arrays)
        if common is None:
            stacks[key] = torch.stack([torch.from_numpy(array.numpy()) for array in arrays])
        elif rows == list(range(len(common))):
            stacks[key] = common
        else:
            stacks[key] = common[torch.tensor(rows, device=common.device)]
    return stacks


def mean_of(replies: Sequence[Message], weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weighted mean of the arrays of all replies, one ``weights @ stack`` per key.

    Parameters
    ----------
    replies : sequence of Message
        As for `stack_of`.
    weights : Tensor of float64, shape (n_replies,)
        Summing to 1.

    Returns
    -------
    dict of Tensor, shape ``shape``
        Integers (counters of batch normalisation) are averaged in float64.
    """
    means = {}
    for key, arrays in _columns(replies).items():
        common, rows = _common_stack(arrays)
        mean = None
        if common is not None and len(common) <= 2 * len(rows):
            # Rows that did not reply weigh nothing: cheaper than copying those that did, unless
            # one of them is not finite, whose product with zero is not zero.
            spread = torch.zeros(len(common), dtype=torch.float64)
            spread.index_add_(0, torch.tensor(rows), weights)
            mean = _product(spread, common)
            if not torch.isfinite(mean).all():
                mean = None
        if mean is None:
            mean = _product(weights, stack_of(replies)[key])
        means[key] = mean
    return means


def mean_metrics(replies: Sequence[Message]) -> MetricRecord:
    """Return the mean of every metric that all replies have, weighted by ``num-examples``.

    What Flower's own strategies report, in one product a metric instead of a loop. Replies without
    ``num-examples`` count as one example each; lists of different lengths are left out.
    """
    nothing = MetricRecord()
    records = [
        next((r for r in reply.content.values() if isinstance(r, MetricRecord)), nothing)
        for reply in replies
    ]
    if len(records) == 1:
        own = {key: value for key, value in records[0].items() if key != "num-examples"}
        return fill(MetricRecord(), own)
    weights = np.array([record.get("num-examples", 1) for record in records], np.float64)
    if not weights.any():
        weights[:] = 1
    means = {}
    for key in records[0]:
        if key == "num-examples" or any(key not in record for record in records):
            continue
        values = [record[key] for record in records]
        if len({len(value) if isinstance(value, list) else -1 for value in values}) == 1:
            means[key] = (weights @ np.array(values, np.float64) / weights.sum()).tolist()
    return fill(MetricRecord(), means)


def _columns(replies: Sequence[Message]) -> dict[str, list[Array]]:
    records = [record_of(reply) for reply in replies]
    return {key: [record[key] for record in records] for key in records[0]}


def _common_stack(arrays: Sequence[Array]) -> tuple[torch.Tensor | None, list[int]]:
    """Return the stack that all arrays are rows of, and their rows."""
    common: torch.Tensor | None = getattr(arrays[0], "stack", None)
    if common is None or any(getattr(array, "stack", None) is not common for array in arrays):
        return None, []
    return common, [array.row for array in arrays]  # type: ignore[attr-defined]


def _product(weights: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    if not stack.is_floating_point():
        stack = stack.double()
    flat = stack.reshape(len(stack), -1)
    return (weights.to(stack.device, stack.dtype) @ flat).reshape(stack.shape[1:])


def check(holds: bool, name: str, value: object, needed: str) -> None:
    """Refuse a hyperparameter that is out of its range.

    Raises
    ------
    ValueError
        Names the parameter, its value and what it must be.
    """
    if not holds:
        raise ValueError(f"{name} = {value}: must be {needed}")


def show_arguments(cls: type) -> None:
    """Let the signature of a class show the arguments that it passes on to its bases as well."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for each in own:
            if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL):
                found.setdefault(each.name, each.replace(kind=each.KEYWORD_ONLY))
        if not any(each.kind is each.VAR_KEYWORD for each in own):
            break
    cls.__signature__ = inspect.Signature(list(found.values()))  # type: ignore[attr-defined]
