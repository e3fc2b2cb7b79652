"""Device halves: what a device does besides local training, written once for many rows.

The vectorised executor of a simulator calls a half on all rows of a round; `as_mod` makes a Flower
client mod of the same code, for one device, with its state in `Context.state`.

Decision: a draw is the splitmix64 sequence of a key made of (seed, purpose, round, device), in
integer arithmetic that is equal on every kind of processor. A half therefore draws the same numbers
in a simulator, in an app, and in any batch.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = ["DeviceHalf", "Draws", "KeyedDraws", "Payload", "as_mod", "merged_config"]

Tensors = dict[str, Tensor]
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BLOCK = 1 << 15  # elements of a row hashed at a time: they stay in the cache


class Draws(Protocol):
    """Uniform draws of a call of a half: one row for each device."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a tensor ``(n, *shape)`` of uniform numbers in [0, 1), new at each call."""


class Payload(Protocol):
    """Rows that are sent in an encoding of their own, such as `compression.Packed`."""

    def array(self, row: int) -> Array:
        """Return what one row sends."""


class KeyedDraws:
    """Uniform draws named by a seed, a purpose and words such as round and device.

    Parameters
    ----------
    seed : int or ndarray of int, shape (n,)
    purpose : str
    *words : int or ndarray of int
        They broadcast to shape (n,).
    device : torch.device
        Where the numbers are wanted.
    """

    def __init__(
        self, seed: ArrayLike, purpose: str, *words: ArrayLike, device: torch.device | str = "cpu"
    ) -> None:
        name = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
        key = np.atleast_1d(_mixed(np.asarray(seed).astype(np.uint64) ^ np.uint64(name)))
        for word in words:
            key = _mixed(key ^ np.asarray(word).astype(np.uint64))
        self._key: NDArray[np.uint64] = key
        self._calls = 0
        self._device = device

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a tensor ``(n, *shape)``; float32 has 24 random bits, float64 53."""
        key = _mixed(self._key ^ np.uint64(self._calls)) if self._calls else self._key
        self._calls += 1
        width = math.prod(shape)
        first = torch.from_numpy(key.view(np.int64)).to(self._device)[:, None]
        bits = 53 if dtype == torch.float64 else 24
        out = torch.empty((len(key), width), dtype=dtype, device=self._device)
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            z = torch.arange(start + 1, stop + 1, device=self._device)
            z = z.mul_(_signed(_GOLDEN)).add(first)
            z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(_MIX_1))
            z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(_MIX_2))
            z.bitwise_xor_(_shifted(z, 31))
            out[:, start:stop] = _shifted(z, 64 - bits)
        return out.mul_(2.0**-bits).view(len(key), *shape)


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(z: Tensor, n: int) -> Tensor:
    """Shift to the right with zeros (torch copies the sign)."""
    return (z >> n).bitwise_and_((1 << (64 - n)) - 1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = values + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
        return np.asarray(z ^ (z >> np.uint64(31)))


@dataclass(frozen=True)
class DeviceHalf:
    """What a device does around its local work; subclasses override what they need.

    All tensors have the device as leading axis. All rows of a call have the same config, the same
    arrays and the same entries in their state; what a method returns is never written to.

    Parameters
    ----------
    seed : int
        Of the half's draws.

    Attributes
    ----------
    name : str
        Names the half's state and its draws, and replies that it was applied.
    """

    seed: int = 0
    name: ClassVar[str] = "half"

    def draws(self, rounds: ArrayLike, devices: ArrayLike, device: Any = "cpu") -> Draws:
        """Return the draws of these devices in these rounds."""
        return KeyedDraws(self.seed, self.name, rounds, devices, device=device)

    def as_mod(self) -> Callable[[Message, Context, ClientAppCallable], Message]:
        """Return the half as a Flower client mod; see `as_mod`."""
        return as_mod(self)

    def unpack(self, contents: Sequence[RecordDict]) -> Tensors:
        """Return the arrays of instructions, one tensor ``(n, *shape)`` per key."""
        records = [next(iter(content.array_records.values())) for content in contents]
        return {key: stacked([record[key] for record in records]) for key in records[0]}

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Return the model to work on, and the new state."""
        return arrays, state

    def local(self, state: Tensors, config: Mapping[str, Any]) -> Any:
        """Return what is added to the local objective, None for nothing."""
        return None

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Mapping[str, Tensor | Payload], Tensors]:
        """Return what is sent back instead of the work, and the new state."""
        return work, state


def stacked(arrays: Sequence[Array]) -> Tensor:
    """Return arrays of one shape as rows; rows of a common stack are taken from it."""
    common: Tensor | None = getattr(arrays[0], "stack", None)
    if common is not None and all(getattr(a, "stack", None) is common for a in arrays):
        return common[[a.row for a in arrays]]  # type: ignore[attr-defined]
    if all(array is arrays[0] for array in arrays):
        one = torch.from_numpy(arrays[0].numpy())
        return one.expand(len(arrays), *one.shape)
    return torch.stack([torch.from_numpy(array.numpy()) for array in arrays])


def merged_config(content: RecordDict) -> dict[str, Any]:
    """Return the config of an instruction: all its ConfigRecords but ``exchange``."""
    merged: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ConfigRecord) and name != "exchange":
            merged.update(record)
    return merged


def as_mod(half: DeviceHalf) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """Return a Flower client mod that applies a half: ``ClientApp(mods=[as_mod(half)])``.

    Parameters
    ----------
    half : DeviceHalf
        Its state is kept in ``Context.state`` under the half's name.

    Raises
    ------
    ValueError
        If the half has a `local` part: only the training loop itself can call that.
    """
    if type(half).local is not DeviceHalf.local:
        raise ValueError(
            f"the half {half.name!r} has a local part, which a mod cannot apply: call "
            "half.local(...) in the training loop"
        )

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if not message.metadata.message_type.startswith("train"):
            return call_next(message, context)
        config = merged_config(message.content)
        device = int(context.node_config.get("partition-id", context.node_id))
        draws = half.draws(int(config.get("server-round", 0)), device)
        saved = context.state.array_records.get(half.name, ArrayRecord())
        state = {key: torch.from_numpy(array.numpy())[None] for key, array in saved.items()}
        params, state = half.receive(half.unpack([message.content]), state, config, draws)
        inner = copy(message)
        inner.content = _replaced(message.content, "arrays", _record(params))
        answer = call_next(inner, context)
        if answer.has_error():
            return answer
        name, record = next(iter(answer.content.array_records.items()))
        work = {key: torch.from_numpy(array.numpy())[None] for key, array in record.items()}
        payload, state = half.reply(work, state, config, draws)
        answer.content = _replaced(answer.content, name, _record(payload))
        applied = answer.content.config_records.get("applied", ConfigRecord({"halves": []}))
        answer.content["applied"] = ConfigRecord({"halves": [*applied["halves"], half.name]})  # type: ignore[misc]
        context.state[half.name] = _record(state)
        return answer

    return mod


def _record(payload: Mapping[str, Tensor | Payload]) -> ArrayRecord:
    record = ArrayRecord()
    for key, value in payload.items():
        if isinstance(value, Tensor):
            record[key] = Array(np.asarray(value[0].cpu().numpy()))
        else:
            record[key] = value.array(0)
    return record


def _replaced(content: RecordDict, name: str, record: ArrayRecord) -> RecordDict:
    """Return a content with its ArrayRecords replaced by one."""
    kept = {k: r for k, r in content.items() if not isinstance(r, ArrayRecord)}
    return RecordDict({name: record, **kept})
