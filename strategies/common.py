"""What several strategies share: the replies of a round as one stack of rows."""

from collections.abc import Sequence

import torch
from flwr.app import Array, ArrayRecord, Message

__all__ = ["record_of", "stack_of", "weighted_mean"]


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
    records = [record_of(reply) for reply in replies]
    return {key: _stack([record[key] for record in records]) for key in records[0]}


def _stack(arrays: Sequence[Array]) -> torch.Tensor:
    common = getattr(arrays[0], "stack", None)
    if common is None or any(getattr(array, "stack", None) is not common for array in arrays):
        return torch.stack([torch.from_numpy(array.numpy()) for array in arrays])
    rows = [array.row for array in arrays]  # type: ignore[attr-defined]
    if rows == list(range(len(common))):
        return torch.as_tensor(common)
    stack: torch.Tensor = torch.as_tensor(common)
    return stack[torch.tensor(rows, device=stack.device)]


def weighted_mean(weights: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """Return ``weights @ stack`` over the leading axis.

    Parameters
    ----------
    weights : Tensor of float64, shape (n,)
        Summing to 1.
    stack : Tensor, shape (n, *shape)
        Integers (counters of batch normalisation) are averaged in float64.

    Returns
    -------
    Tensor, shape ``shape``
    """
    if not stack.is_floating_point():
        stack = stack.double()
    flat = stack.reshape(len(stack), -1)
    mean = weights.to(device=stack.device, dtype=stack.dtype) @ flat
    return mean.reshape(stack.shape[1:])
