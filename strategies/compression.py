"""Messages of stacked rows: compressors by name, rows packed, weighed, encoded and read back.

`pack` compresses the rows of many devices at once. The result knows the values that a receiver
decodes, the true size of each row's message without building it, and builds the bytes of a row only
when somebody reads them. Both ends go on from the decoded values, so copies of a memory stay equal
to the last bit. What a compressor does is in `compressors`, `quantisers` and `sparsifiers`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

from strategies.compressors import Cast, Codes, Compressor, Identity
from strategies.halves import Draws
from strategies.quantisers import Natural, Quantise, Sign
from strategies.sparsifiers import RandomK, Sparsify, TopK

__all__ = [
    "COMPRESSORS",
    "Cast",
    "Compressor",
    "EncodedArray",
    "Identity",
    "Natural",
    "Packed",
    "Quantise",
    "RandomK",
    "Sign",
    "Sparsify",
    "TopK",
    "check_sizes",
    "compressor",
    "pack",
    "published_bits",
    "qsgd_bits",
    "unpack",
]

IntArray = NDArray[np.int64]
_TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = MappingProxyType(
    {
        "float": ("a number", (int, float)),
        "int": ("a whole number", (int,)),
        "bool": ("true or false", (bool,)),
    }
)
"""Of a parameter: its type as annotated → in words, and as types of values."""

COMPRESSORS: Mapping[str, type[Compressor]] = MappingProxyType(
    {
        "cast": Cast,
        "identity": Identity,
        "natural": Natural,
        "quantise": Quantise,
        "random_k": RandomK,
        "sign": Sign,
        "sparsify": Sparsify,
        "top_k": TopK,
    }
)
"""Name in a scenario → compressor."""


def compressor(spec: str | Mapping[str, Any] | Compressor, name: str = "") -> Compressor:
    """Return the compressor that a name, or a mapping with `kind` and parameters, stands for.

    Parameters
    ----------
    spec : str, mapping or Compressor
    name : str
        Of the argument that it is given as, for messages.

    Raises
    ------
    ValueError
        If the name or a parameter is unknown, or a value out of its range.

    Examples
    --------
    >>> compressor({"kind": "quantise", "levels": 4}).variance_bound(16)
    1.0
    """
    if isinstance(spec, Compressor):
        return spec
    try:
        return _compressor(spec)
    except ValueError as error:
        raise ValueError(f"{name}: {error}" if name else str(error)) from None


def _compressor(spec: str | Mapping[str, Any]) -> Compressor:
    given: dict[str, Any] = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in COMPRESSORS:
        names = ", ".join(COMPRESSORS)
        if kind is None:
            raise ValueError(f"a compressor needs a kind, one of {names}")
        raise ValueError(f"compressor {kind!r} is not one of {names}{_meant(kind, COMPRESSORS)}")
    types = {each.name: str(each.type) for each in fields(COMPRESSORS[kind])}
    for name, value in given.items():
        if name not in types:
            valid = ", ".join(types)
            raise ValueError(
                f"{kind} has no parameter {name!r}; valid: {valid}{_meant(name, types)}"
            )
        for word, (needed, of) in _TYPES.items():
            is_other = value is None or not re.search(rf"\b{word}\b", types[name])
            fits = isinstance(value, of) and isinstance(value, bool) == (bool in of)
            if not (is_other or fits):
                raise ValueError(f"{name} of {kind} is {value!r}; it must be {needed}")
    return COMPRESSORS[kind](**given)


def _meant(name: object, valid: Iterable[str]) -> str:
    near = get_close_matches(str(name), valid, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


# --- rows of messages -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring blocks of one size."""

    start: int
    count: int
    size: int


class Packed:
    """The compressed rows of several devices.

    Parameters
    ----------
    used : Compressor
    values : Tensor, shape (n, P)
        What a receiver decodes.
    parts : list of (run, codes)
        Of each run of blocks, what the messages are made of.

    Attributes
    ----------
    values : Tensor, shape (n, P)
    """

    def __init__(self, used: Compressor, values: Tensor, parts: list[tuple[_Run, Codes]]) -> None:
        self.values = values
        self._used = used
        self._parts = parts

    @cached_property
    def sizes(self) -> IntArray:
        """Bytes of each row's message, shape (n,)."""
        total = np.zeros(len(self.values), np.int64)
        for run, codes in self._parts:
            n_bytes = (self._used.bits(codes, run.size).cpu().numpy() + 7) >> 3
            total += n_bytes if run.count == 1 else n_bytes.reshape(-1, run.count).sum(1)
        return total

    @cached_property
    def _shapes(self) -> list[tuple[int]]:
        """Shape of each row's message as an array of bytes."""
        return [(size,) for size in self.sizes.tolist()]

    def encode(self, row: int) -> bytes:
        """Return the message of a row: its blocks in order, each padded to a whole byte."""
        return b"".join(
            self._used.encode(codes, row * run.count + i)
            for run, codes in self._parts
            for i in range(run.count)
        )

    def array(self, row: int) -> "EncodedArray":
        """Return the message of a row as a Flower array."""
        return EncodedArray(self, row)


def runs_of(used: Compressor, shape: Sequence[int]) -> list[_Run]:
    """Return the blocks of tensors of these sizes, equal neighbours in one run."""
    runs: list[_Run] = []
    start = 0
    for size in shape:
        step = used.block or size
        for count, length in ((size // step, step), (1, size % step)):
            if count * length == 0:
                continue
            if runs and runs[-1].size == length:
                runs[-1] = _Run(runs[-1].start, runs[-1].count + count, length)
            else:
                runs.append(_Run(start, count, length))
            start += count * length
    return runs


def check_sizes(used: Compressor, shape: Sequence[int], name: str) -> None:
    """Raise a ValueError that begins with a name if tensors of these sizes cannot be compressed."""
    for run in runs_of(used, shape):
        try:
            used.check(run.size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def pack(used: Compressor, rows: Tensor, draws: Draws, tensors: Sequence[int] = ()) -> Packed:
    """Compress rows, each tensor with a scale of its own.

    Parameters
    ----------
    used : Compressor
    rows : Tensor, shape (n, P), float32 or float64
    draws : callable
        `draws(shape, dtype)` gives uniform numbers, one row for each row (or a constant).
    tensors : sequence of int
        Sizes of the tensors in a row, summing to P; default: the row is one.

    Raises
    ------
    ValueError
        If there are more coordinates to keep than a block has.
    """
    runs = runs_of(used, tensors or (rows.shape[1],))
    if len(runs) == 1 and runs[0].count == 1:
        values, codes = used.compress(rows, draws)
        return Packed(used, values, [(runs[0], codes)])
    values = torch.empty_like(rows)
    parts = []
    for run in runs:
        part = slice(run.start, run.start + run.count * run.size)
        blocks = rows[:, part].reshape(-1, run.size)
        done, codes = used.compress(blocks, _in_blocks(draws, run))
        values[:, part] = done.view(len(rows), -1)
        parts.append((run, codes))
    return Packed(used, values, parts)


def _in_blocks(draws: Draws, run: _Run) -> Draws:
    def blocks(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        drawn = draws((run.count, *shape), dtype)
        return drawn.reshape(-1, *shape) if isinstance(drawn, Tensor) else drawn

    return blocks


def unpack(
    used: Compressor, data: bytes, tensors: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values (P,) of an encoded row: equal to `Packed.values` to the last bit.

    Raises
    ------
    ValueError
        If `data` is not a message of this compressor for these tensors.
    """
    values, at = [], 0
    for run in runs_of(used, tensors):
        for _ in range(run.count):
            block, n_bytes = used.decode(data[at:], run.size, dtype)
            values.append(block)
            at += n_bytes
    if at != len(data):
        raise ValueError(f"a message of {len(data)} bytes: {type(used).__name__} needs {at}")
    return torch.cat(values)


class EncodedArray(Array):
    """A Flower array of the bytes of a message, built only if somebody reads them.

    dtype uint8 and shape ``(n_bytes,)``: elements × itemsize is the true size.

    Parameters
    ----------
    packed : Packed
    row : int
    """

    packed: Packed
    row: int

    def __init__(self, packed: Packed, row: int) -> None:
        self.__dict__.update(  # past Array.__setattr__, whose bookkeeping needs `data`
            packed=packed,
            row=row,
            dtype="uint8",
            shape=packed._shapes[row],
            stype="numpy.ndarray",
        )

    @property
    def decoded(self) -> Tensor:
        """The values that a receiver decodes, shape (P,), without a round trip through bytes."""
        return self.packed.values[self.row]

    def numpy(self) -> NDArray[Any]:
        """Return the message's bytes."""
        return np.frombuffer(self.packed.encode(self.row), np.uint8).copy()

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The `.npy` bytes."""
        return Array(self.numpy()).data

    def deflate(self) -> bytes:
        """Return what a plain `Array` of these bytes deflates to: real grids know only that."""
        return Array(self.numpy()).deflate()

    def __copy__(self) -> "EncodedArray":
        return EncodedArray(self.packed, self.row)

    def __deepcopy__(self, memo: dict[int, Any]) -> Array:
        return Array(self.numpy())

    def __reduce__(self) -> tuple[type[Array], tuple[NDArray[Any]]]:
        return Array, (self.numpy(),)


def qsgd_bits(levels: int, d: int) -> float:
    """Return QSGD's bound on the bits of a message, for comparison only."""
    r = levels * (levels + math.sqrt(d))
    return (3 + 1.5 * math.log2(2 * (levels**2 + d) / r)) * r + 32


def published_bits(levels: int, d: int, n_devices: int) -> float:
    """Return what the MCM paper's program counts for a direction and round, for comparison only."""
    if levels == 0:
        return 32.0 * d * n_devices
    r = levels * (levels + math.sqrt(d))
    return n_devices * 4.5 * math.log(2 * (levels**2 + d) / r) * r + 32
