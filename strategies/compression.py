"""Compressors over stacked rows, with their variance bound and their messages bit by bit.

`pack` compresses the rows of many devices at once. The result knows the values that a receiver
decodes, the true size of each row's message without building it, and builds the bytes of a row only
when somebody reads them. Both ends go on from the decoded values, so copies of a memory stay equal
to the last bit.

Decision: scales (a norm) travel as float32, as in the published encodings; with
``precision="float64"`` they are exact, four bytes longer each.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from flwr.app import Array
from numpy.typing import NDArray
from torch import Tensor

from strategies.encodings import (
    BitReader,
    field_bits,
    join_bits,
    omega_codes,
    omega_lengths,
)
from strategies.halves import Draws

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
    "compressor",
    "pack",
    "published_bits",
    "qsgd_bits",
    "unpack",
]

IntArray = NDArray[np.int64]
Codes = tuple[Tensor, ...]
Precision = Literal["float32", "float64"]
_FLOAT = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_FORMAT = {"float32": ">f4", "float64": ">f8"}


@dataclass(frozen=True)
class Compressor:
    """What all compressors have; a subclass says how one block is compressed and encoded.

    Parameters
    ----------
    block : int
        Coordinates that are compressed together, with a scale of their own; 0 is the whole tensor
        (or the whole model, see `pack`). The last block may be shorter.

    Raises
    ------
    ValueError
        If a parameter is out of its range.
    """

    block: int = field(default=0, kw_only=True)
    is_unbiased: ClassVar[bool] = True
    is_exact: ClassVar[bool] = False  # decoded values are the values given

    def __post_init__(self) -> None:
        _check("block", self.block, self.block >= 0, "at least 0")

    def variance_bound(self, d: int) -> float:
        """Return ω with E‖C(v) - v‖² ≤ ω‖v‖² in dimension d (d: the size of a block)."""
        raise NotImplementedError

    def memory_rate(self, d: int) -> float:
        """Return the rate at which a memory of compressed differences is moved."""
        return 1 / (2 * (self.variance_bound(d) + 1))

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """Return the decoded values of rows (n, d), and what their messages are made of."""
        raise NotImplementedError

    def bits(self, codes: Codes, d: int) -> Tensor:
        """Return the length of each row's message in bits, shape (n,), int64."""
        raise NotImplementedError

    def encode(self, codes: Codes, row: int) -> bytes:
        """Return the message of one row."""
        raise NotImplementedError

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Return the d values at the beginning of `data`, and how many bytes they took."""
        raise NotImplementedError

    def check(self, d: int) -> None:
        """Raise a ValueError if d coordinates cannot be compressed."""


@dataclass(frozen=True)
class Identity(Compressor):
    """No compression: the values in their own type, big-endian. ω = 0."""

    is_exact: ClassVar[bool] = True

    def variance_bound(self, d: int) -> float:
        """Return 0."""
        return 0.0

    def memory_rate(self, d: int) -> float:
        """Return 0: without compression there is nothing to remember."""
        return 0.0

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        return rows, (rows,)

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        return codes[0].new_full((len(codes[0]),), 8 * d * codes[0].itemsize, dtype=torch.int64)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        return _big_endian(codes[0][row])

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        return _from_big_endian(data, d, dtype).to(dtype), d * dtype.itemsize


@dataclass(frozen=True)
class Cast(Compressor):
    """Rounding to a shorter floating-point type. A memory beside it is moved in full.

    Parameters
    ----------
    dtype : {"float32", "float16", "bfloat16"}
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    is_unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = ("float32", "float16", "bfloat16")
        _check("dtype", self.dtype, self.dtype in valid, f"one of {', '.join(valid)}")

    def variance_bound(self, d: int) -> float:
        """Return the square of half a unit in the last place."""
        return float((torch.finfo(getattr(torch, self.dtype)).eps / 2) ** 2)

    def memory_rate(self, d: int) -> float:
        """Return 0: a float is as precise for the model as for a difference."""
        return 0.0

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        short = rows.to(getattr(torch, self.dtype))
        return short.to(rows.dtype), (short,)

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        return codes[0].new_full((len(codes[0]),), 8 * d * codes[0].itemsize, dtype=torch.int64)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        return _big_endian(codes[0][row])

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        short: torch.dtype = getattr(torch, self.dtype)
        return _from_big_endian(data, d, short).to(dtype), d * short.itemsize


@dataclass(frozen=True)
class Quantise(Compressor):
    """Random rounding of each coordinate to one of s levels of the norm (QSGD).

    ``Q_j = ‖v‖ sign(v_j) floor(s|v_j|/‖v‖ + u_j) / s``; unbiased, ω = min(d/s², √d/s).

    Parameters
    ----------
    levels : int
        The paper's s, at least 1: ternary values.
    encoding : {"sparse", "dense"}
        Elias-omega gaps and levels of what is not zero, or a fixed number of bits a coordinate.
    precision : {"float32", "float64"}
        Of the norm that is sent.

    References
    ----------
    .. [1] Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and
       encoding", NeurIPS 2017, section 3.
    """

    levels: int = 1
    encoding: Literal["sparse", "dense"] = "sparse"
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("levels", self.levels, self.levels >= 1, "at least 1 (no compression: identity)")
        valid = ("sparse", "dense")
        _check("encoding", self.encoding, self.encoding in valid, f"one of {', '.join(valid)}")
        _check_precision(self.precision)

    def variance_bound(self, d: int) -> float:
        """Return min(d/s², √d/s)."""
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        sent = norm if self.precision == "float64" else norm.float().to(rows.dtype)
        safe = torch.where(norm == 0, 1.0, norm)
        level = rows.abs().div_(safe)
        if self.levels > 1:
            level.mul_(self.levels)
        level = level.add_(draws(rows.shape[1:], rows.dtype)).floor_()
        level = level.clamp_(max=self.levels).copysign_(rows)
        values = level * sent if self.levels == 1 else (level / self.levels).mul_(sent)
        return values, (level, sent[:, 0])

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        level, norm = codes
        scale = 8 * _FLOAT[self.precision].itemsize
        if self.encoding == "dense":
            body = torch.full_like(norm, d * self._width, dtype=torch.int64)
        else:
            row, gap, column = _gaps(level)
            each = omega_lengths(gap, d) + 1  # the sign
            if self.levels == 1:
                each += 1
            else:
                size = level[row, column].abs().long().clamp(1, self.levels)
                each += omega_lengths(size, self.levels)
            body = omega_lengths(torch.bincount(row, minlength=len(level)) + 1, d + 1)
            body.index_add_(0, row, each)
        return scale + torch.where(norm == 0, 0, body)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        norm = np.array(float(codes[1][row]), _FORMAT[self.precision]).tobytes()
        if not any(norm):
            return norm
        level = codes[0][row].cpu().long().numpy()
        if self.encoding == "dense":
            numbers = (level + self.levels).astype(np.uint64)
            return norm + join_bits(numbers, np.full(len(level), self._width))
        at = np.flatnonzero(level)
        gaps, gap_bits = omega_codes(np.diff(at, prepend=-1))
        sizes, size_bits = omega_codes(np.abs(level[at]))
        count, count_bits = omega_codes(np.array([len(at) + 1]))
        signs = (level[at] < 0).astype(np.uint64)
        body = np.stack([gaps, signs, sizes], 1).reshape(-1)
        lengths = np.stack([gap_bits, np.ones_like(gap_bits), size_bits], 1).reshape(-1)
        return norm + join_bits(
            np.concatenate([count, body]), np.concatenate([count_bits, lengths])
        )

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        start = _FLOAT[self.precision].itemsize
        norm = float(np.frombuffer(data, _FORMAT[self.precision], 1)[0])
        level = np.zeros(d)
        n_bytes = 0
        if norm == 0:
            return torch.zeros(d, dtype=dtype), start
        if self.encoding == "dense":
            n_bytes = -(-d * self._width // 8)
            level[:] = field_bits(data[start:], self._width, d) - self.levels
        else:
            reader = BitReader(data[start:])
            at = -1
            for _ in range(reader.omega() - 1):
                at += reader.omega()
                sign = -1 if reader.bit() else 1
                level[at] = sign * reader.omega()
            n_bytes = reader.n_bytes
        values = (torch.from_numpy(level).to(dtype) / self.levels) * norm
        return values, start + n_bytes

    @property
    def _width(self) -> int:
        """Bits of a coordinate in the dense encoding."""
        return math.ceil(math.log2(2 * self.levels + 1))


@dataclass(frozen=True)
class _Subset(Compressor):
    """Some of the coordinates: their number, the gaps between them, and their values."""

    precision: Precision = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_precision(self.precision)

    def _pick(self, rows: Tensor, draws: Draws) -> tuple[Tensor, float]:
        """Return which coordinates are kept, as a mask (n, d), and their factor."""
        raise NotImplementedError

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        self.check(rows.shape[1])
        kept, factor = self._pick(rows, draws)
        values = torch.where(kept, rows * factor, 0.0)
        if self.precision == "float32":
            values = values.float().to(rows.dtype)
        return values, (kept, values)

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        kept = codes[0]
        row, gap, _ = _gaps(kept)
        body = omega_lengths(torch.bincount(row, minlength=len(kept)) + 1, d + 1)
        return body.index_add_(0, row, omega_lengths(gap, d) + 8 * _FLOAT[self.precision].itemsize)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        at = np.flatnonzero(codes[0][row].cpu().numpy())
        values = codes[1][row].cpu().double().numpy()[at].astype(_FORMAT[self.precision])
        word = np.dtype(_FORMAT[self.precision].replace("f", "u"))
        gaps, gap_bits = omega_codes(np.diff(at, prepend=-1))
        count, count_bits = omega_codes(np.array([len(at) + 1]))
        words = values.view(word).astype(np.uint64)
        body = np.stack([gaps, words], 1).reshape(-1)
        lengths = np.stack([gap_bits, np.full_like(gap_bits, 8 * word.itemsize)], 1).reshape(-1)
        return join_bits(np.concatenate([count, body]), np.concatenate([count_bits, lengths]))

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        width = _FLOAT[self.precision].itemsize
        reader, values, at = BitReader(data), np.zeros(d), -1
        for _ in range(reader.omega() - 1):
            at += reader.omega()
            raw = reader.number(8 * width).to_bytes(width, "big")
            values[at] = struct.unpack(">f" if width == 4 else ">d", raw)[0]
        return torch.from_numpy(values).to(dtype), reader.n_bytes


@dataclass(frozen=True)
class Sparsify(_Subset):
    """Each coordinate kept with probability q, and divided by q. Unbiased, ω = (1 - q)/q.

    Parameters
    ----------
    probability : float
        The paper's q, in (0, 1].
    scaled : bool
        False keeps the values as they are: biased, contraction 1 - q.
    """

    probability: float = 0.1
    scaled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        q = self.probability
        _check("probability", q, 0 < q <= 1, "above 0 and at most 1")

    @property
    def is_unbiased(self) -> bool:  # type: ignore[override]
        """Whether the values are scaled."""
        return self.scaled

    def variance_bound(self, d: int) -> float:
        """Return (1 - q)/q, or 1 - q without scaling."""
        return (1 - self.probability) / (self.probability if self.scaled else 1)

    def memory_rate(self, d: int) -> float:
        """Return 1/(ω + 1)."""
        return 1 / (self.variance_bound(d) + 1)

    def _pick(self, rows: Tensor, draws: Draws) -> tuple[Tensor, float]:
        uniform = torch.as_tensor(draws(rows.shape[1:], rows.dtype), device=rows.device)
        kept = (uniform < self.probability).expand_as(rows)
        return kept, 1 / self.probability if self.scaled else 1.0


@dataclass(frozen=True)
class _CountSubset(_Subset):
    """A fixed number of coordinates: `k`, or the share `fraction` of them."""

    k: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.k is None) == (self.fraction is None):
            raise ValueError(f"give k or fraction, not k={self.k} and fraction={self.fraction}")
        if self.k is not None:
            _check("k", self.k, self.k >= 1, "at least 1")
        if self.fraction is not None:
            _check("fraction", self.fraction, 0 < self.fraction <= 1, "above 0 and at most 1")

    def count(self, d: int) -> int:
        """Return how many of d coordinates are kept."""
        return max(1, round(self.fraction * d)) if self.fraction is not None else self.k or 1

    def check(self, d: int) -> None:
        """Raise a ValueError if `k` is more than d."""
        if self.count(d) > d:
            raise ValueError(f"k is {self.k}, more than the {d} coordinates compressed together")


@dataclass(frozen=True)
class TopK(_CountSubset):
    """The k coordinates of largest magnitude. Biased, contraction 1 - k/d; use error feedback.

    Parameters
    ----------
    k : int, optional
        How many, at most d; or
    fraction : float, optional
        which share of them.
    """

    is_unbiased: ClassVar[bool] = False

    def variance_bound(self, d: int) -> float:
        """Return 1 - k/d."""
        return 1 - self.count(d) / d

    def memory_rate(self, d: int) -> float:
        """Return 1: the memory takes the message as it is."""
        return 1.0

    def _pick(self, rows: Tensor, draws: Draws) -> tuple[Tensor, float]:
        largest = rows.abs().topk(self.count(rows.shape[1]), dim=1, sorted=False).indices
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, largest, True), 1.0


@dataclass(frozen=True)
class RandomK(_CountSubset):
    """Exactly k coordinates, any set of them alike, times d/k. Unbiased, ω = d/k - 1.

    Parameters
    ----------
    k : int, optional
        How many, at most d; or
    fraction : float, optional
        which share of them.
    """

    def variance_bound(self, d: int) -> float:
        """Return d/k - 1."""
        return d / self.count(d) - 1

    def memory_rate(self, d: int) -> float:
        """Return 1/(ω + 1)."""
        return 1 / (self.variance_bound(d) + 1)

    def _pick(self, rows: Tensor, draws: Draws) -> tuple[Tensor, float]:
        k, d = self.count(rows.shape[1]), rows.shape[1]
        uniform = torch.as_tensor(draws((d,), rows.dtype), device=rows.device).expand_as(rows)
        first = uniform.topk(k, dim=1, sorted=False).indices
        return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, first, True), d / k


@dataclass(frozen=True)
class Sign(Compressor):
    """The signs times the mean magnitude ‖v‖₁/d. Biased, contraction at most 1 - 1/d.

    Parameters
    ----------
    precision : {"float32", "float64"}
        Of the mean that is sent.

    References
    ----------
    .. [1] Zheng et al., "Communication-efficient distributed blockwise momentum SGD with
       error-feedback", NeurIPS 2019.
    """

    precision: Precision = "float32"
    is_unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_precision(self.precision)

    def variance_bound(self, d: int) -> float:
        """Return 1 - 1/d."""
        return 1 - 1 / d

    def memory_rate(self, d: int) -> float:
        """Return 1: the memory takes the message as it is."""
        return 1.0

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        mean = rows.abs().mean(1, keepdim=True)
        if self.precision == "float32":
            mean = mean.float().to(rows.dtype)
        values = torch.where(rows < 0, -mean, mean)
        return values, (rows < 0, mean[:, 0])

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        return torch.full_like(codes[1], 8 * _FLOAT[self.precision].itemsize + d, dtype=torch.int64)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        mean = np.array(float(codes[1][row]), _FORMAT[self.precision]).tobytes()
        return mean + np.packbits(codes[0][row].cpu().numpy()).tobytes()

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        start = _FLOAT[self.precision].itemsize
        mean = float(np.frombuffer(data, _FORMAT[self.precision], 1)[0])
        negative = np.unpackbits(np.frombuffer(data[start:], np.uint8), count=d).astype(bool)
        values = torch.full((d,), mean, dtype=dtype)
        return torch.where(torch.from_numpy(negative), -values, values), start + -(-d // 8)


@dataclass(frozen=True)
class Natural(Compressor):
    """Random rounding to the power of two above or below. Unbiased, ω = 1/8; 9 bits a number.

    Magnitudes below 2⁻¹²⁶ are rounded to that or to 0, those above 2¹²⁷ have no message.

    References
    ----------
    .. [1] Horváth et al., "Natural compression for distributed deep learning", 2019, Theorem 1.
    """

    def variance_bound(self, d: int) -> float:
        """Return 1/8."""
        return 1 / 8

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        magnitude = rows.abs()
        exponent = torch.frexp(magnitude)[1] - 1
        is_small = magnitude < 2.0**-126
        low = torch.where(is_small, 0.0, torch.ldexp(torch.ones_like(rows), exponent))
        gap = torch.where(is_small, 2.0**-126, low)
        up = draws(rows.shape[1:], rows.dtype) < (magnitude - low) / gap
        rounded = low + torch.where(up, gap, 0.0)
        return rounded.copysign(rows), (rounded.copysign(rows),)

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        return codes[0].new_full((len(codes[0]),), 9 * d, dtype=torch.int64)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        words = codes[0][row].cpu().float().numpy().view(np.uint32) >> 23
        return join_bits(words.astype(np.uint64), np.full(len(words), 9))

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        words = (field_bits(data, 9, d) << 23).astype(np.uint32)
        return torch.from_numpy(words.view(np.float32).copy()).to(dtype), -(-9 * d // 8)


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


def compressor(spec: str | Mapping[str, Any] | Compressor) -> Compressor:
    """Return the compressor that a name, or a mapping with `kind` and parameters, stands for.

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
    given: dict[str, Any] = {"kind": spec} if isinstance(spec, str) else dict(spec)
    kind = str(given.pop("kind", None))
    if kind not in COMPRESSORS:
        raise ValueError(f"compressor {kind!r} is not one of {', '.join(COMPRESSORS)}")
    valid = [each.name for each in fields(COMPRESSORS[kind])]
    if unknown := sorted(set(given) - set(valid)):
        raise ValueError(f"{kind} has no parameter {unknown[0]!r}; valid: {', '.join(valid)}")
    try:
        return COMPRESSORS[kind](**given)
    except TypeError as error:
        raise ValueError(f"{kind}: {given} has a value of the wrong type ({error})") from error


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
        total = torch.zeros((), dtype=torch.int64)
        for run, codes in self._parts:
            n_bytes = (self._used.bits(codes, run.size) + 7) >> 3
            total = total + (n_bytes if run.count == 1 else n_bytes.view(-1, run.count).sum(1))
        return total.cpu().numpy()

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
            shape=(int(packed.sizes[row]),),
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


def _gaps(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, distance to the row's previous one, and column of all that is not zero."""
    row, column = rows.nonzero(as_tuple=True)
    gap = column + 1
    gap[1:] -= torch.where(row[1:] == row[:-1], gap[:-1], 0)
    return row, gap, column


def _big_endian(values: Tensor) -> bytes:
    if values.dtype == torch.bfloat16:
        return values.cpu().view(torch.int16).numpy().byteswap().tobytes()
    return values.cpu().contiguous().numpy().byteswap().tobytes()


def _from_big_endian(data: bytes, d: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        return torch.from_numpy(np.frombuffer(data, ">i2", d).astype(np.int16)).view(dtype)
    name = str(dtype).removeprefix("torch.")
    read = np.frombuffer(data, np.dtype(name).newbyteorder(">"), d)
    return torch.from_numpy(read.astype(name))


def _check(name: str, value: object, holds: bool, needed: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {needed}")


def _check_precision(precision: str) -> None:
    _check("precision", precision, precision in _FORMAT, "one of float32, float64")
