"""Random layers whose draws are keyed, and batch statistics that do not see padding.

A torch-function mode stands between a module and `torch.nn.functional`, so the module's own code
stays as it is. Dropout masks depend on (key, how-manieth call of the forward pass, position) alone:
the same in any chunk, engine and on any kind of device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own name)
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["KeyedLayers", "keyed_mask"]

_LOW = 0xFFFFFFFF
# Dropout of whole channels draws once for these leading dimensions (batch, channel).
_DROPOUTS: dict[Callable[..., Tensor], int | None] = {
    F.dropout: None,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
}


def _hash32(z: Tensor) -> Tensor:
    """Return a 32-bit hash of each integer, in int64 arithmetic that every device can do."""
    z = z & _LOW
    z = ((z ^ (z >> 16)) * 0x45D9F3B) & _LOW
    z = ((z ^ (z >> 16)) * 0x45D9F3B) & _LOW
    return z ^ (z >> 16)


def keyed_mask(key: Tensor, call: int, shape: Sequence[int], rate: float) -> Tensor:
    """Return which numbers dropout keeps.

    Parameters
    ----------
    key : Tensor of int64, shape () or (k,)
        Names the step of a device.
    call : int
        How-manieth random layer of the forward pass it is.
    shape : sequence of int
        Shape of one device's activations, the batch first.
    rate : float
        Share that is dropped.

    Returns
    -------
    Tensor of bool, shape `shape` or (k, *shape)
    """
    n = 1
    for length in shape:
        n *= length
    position = _hash32(torch.arange(n, device=key.device)).view(tuple(shape))
    seed = _hash32(_hash32(key + call) ^ (key >> 32))
    if key.dim():
        seed = seed.view(-1, *[1] * len(shape))
    return _hash32(seed ^ position) >= int(rate * 2**32)


class KeyedLayers(TorchFunctionMode):
    """While active, dropout is keyed and batch normalisation looks at true samples only.

    Parameters
    ----------
    key : Tensor of int64, shape ()
    weight : Tensor, shape (width,), optional
        Weights of the batch's samples, 0 for padding; None if nothing is padded.
    """

    def __init__(self, key: Tensor, weight: Tensor | None) -> None:
        super().__init__()
        self.key, self.weight, self.calls = key, weight, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See `torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(_DROPOUTS[func], *args, **kwargs)
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(
        self,
        drawn: int | None,
        x: Tensor,
        p: float = 0.5,
        training: bool = True,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        if not training or p == 0:
            return x
        self.calls += 1
        if p == 1:
            return x * 0
        shape = x.shape if drawn is None else (*x.shape[:drawn], *[1] * (x.dim() - drawn))
        kept = keyed_mask(self.key, self.calls, shape, p)
        return x * (kept.to(x.dtype) / (1 - p))

    def _batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if x.dtype == torch.bfloat16:  # its statistics are kept in float32
            normed = self._batch_norm(
                x.float(),
                running_mean,
                running_var,
                None if weight is None else weight.float(),
                None if bias is None else bias.float(),
                training,
                momentum,
                eps,
            )
            return normed.to(x.dtype)
        if not training or self.weight is None:
            return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        ones = [1] * (x.dim() - 2)
        true = (self.weight > 0).to(x.dtype).view(-1, 1, *ones)
        dims = [0, *range(2, x.dim())]
        n = true.sum() * (x[0, 0].numel())
        mean = (x * true).sum(dims) / n
        centred = x - mean.view(-1, *ones)
        var = (centred.square() * true).sum(dims) / n
        if running_mean is not None and running_var is not None:
            running_mean.mul_(1 - momentum).add_(mean.detach() * momentum)
            running_var.mul_(1 - momentum).add_(
                var.detach() * (momentum * n / (n - 1).clamp(min=1))
            )
        out = centred * torch.rsqrt(var + eps).view(-1, *ones)
        if weight is not None:
            out = out * weight.view(-1, *ones)
        return out if bias is None else out + bias.view(-1, *ones)
