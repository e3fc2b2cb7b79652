"""What several strategies share: the replies of a round as one stack of rows."""

from collections.abc import Sequence

import torch
from flwr.app import Array, ArrayRecord, Message

__all__ = ["mean_of", "record_of", "stack_of"]


def record_of(reply: Message) -> ArrayRecord:
    """Return the first ArrayRecord of a reply."""
    return next(r for r in reply.content.values() if isinstance(r, ArrayRecord))


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
