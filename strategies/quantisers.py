"""Compressors that round every coordinate: to levels of the norm, to its sign, to powers of two."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from strategies.compressors import (
    FLOATS,
    FORMATS,
    Codes,
    Compressor,
    Precision,
    check_precision,
    require,
)
from strategies.encodings import (
    BitReader,
    field_bits,
    is_small,
    join_bits,
    omega_codes,
    sparse_bits,
)
from strategies.halves import Draws

__all__ = ["Natural", "Quantise", "Sign"]


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
        require("levels", self.levels, self.levels >= 1, "at least 1 (no compression: identity)")
        valid = ("sparse", "dense")
        require("encoding", self.encoding, self.encoding in valid, f"one of {', '.join(valid)}")
        check_precision(self.precision)

    def variance_bound(self, d: int) -> float:
        """Return min(d/s², √d/s)."""
        return min(d / self.levels**2, math.sqrt(d) / self.levels)

    def compress(self, rows: Tensor, draws: Draws) -> tuple[Tensor, Codes]:
        """See `Compressor`."""
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if is_small(rows):
            return self._compress_small(rows, norm, draws(rows.shape[1:], rows.dtype))
        sent = norm if self.precision == "float64" else norm.float().to(rows.dtype)
        least = torch.finfo(norm.dtype).smallest_normal * torch.finfo(norm.dtype).eps
        level = rows.abs().div_(norm.clamp(min=least))  # of a zero row: zero
        if self.levels > 1:
            level.mul_(self.levels)
        level = level.add_(draws(rows.shape[1:], rows.dtype)).floor_()
        level = level.clamp_(max=self.levels).copysign_(rows)
        values = level * sent if self.levels == 1 else (level / self.levels).mul_(sent)
        return values, (level, sent[:, 0])

    def _compress_small(self, rows: Tensor, norm: Tensor, drawn: Tensor) -> tuple[Tensor, Codes]:
        """Do the same with numpy, whose calls are shorter."""
        v, scale = rows.numpy(), norm.numpy()
        with np.errstate(all="ignore"):  # a model that diverges is reported elsewhere
            sent = scale if self.precision == "float64" else scale.astype("f4").astype(v.dtype)
            level = np.abs(v)
            level /= np.maximum(scale, np.finfo(v.dtype).smallest_subnormal)
            if self.levels > 1:
                level *= self.levels
            level += np.asarray(drawn)
            np.floor(level, out=level)
            np.minimum(level, self.levels, out=level)
            np.copysign(level, v, out=level)
            values = level * sent if self.levels == 1 else level / self.levels * sent
        return torch.from_numpy(values), (torch.from_numpy(level), torch.from_numpy(sent[:, 0]))

    def bits(self, codes: Codes, d: int) -> Tensor:
        """See `Compressor`."""
        level, norm = codes
        scale = 8 * FLOATS[self.precision].itemsize
        if self.encoding == "dense":
            body = torch.full_like(norm, d * self._width, dtype=torch.int64)
        else:
            body = sparse_bits(level, 1, self.levels)  # of one bit: the sign
        return body.masked_fill_(norm == 0, 0).add_(scale)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        norm = np.array(float(codes[1][row]), FORMATS[self.precision]).tobytes()
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
        start = FLOATS[self.precision].itemsize
        norm = float(np.frombuffer(data, FORMATS[self.precision], 1)[0])
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
        check_precision(self.precision)

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
        return torch.full_like(codes[1], 8 * FLOATS[self.precision].itemsize + d, dtype=torch.int64)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        mean = np.array(float(codes[1][row]), FORMATS[self.precision]).tobytes()
        return mean + np.packbits(codes[0][row].cpu().numpy()).tobytes()

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        start = FLOATS[self.precision].itemsize
        mean = float(np.frombuffer(data, FORMATS[self.precision], 1)[0])
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
