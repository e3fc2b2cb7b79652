"""Compressors that send some of the coordinates: random ones, or the largest."""

import struct
from dataclasses import dataclass, field
from typing import ClassVar

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
from strategies.encodings import BitReader, join_bits, omega_codes, sparse_bits
from strategies.halves import Draws

__all__ = ["RandomK", "Sparsify", "TopK"]


@dataclass(frozen=True)
class _Subset(Compressor):
    """Some of the coordinates: their number, the gaps between them, and their values."""

    precision: Precision = field(default="float32", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_precision(self.precision)

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
        return sparse_bits(codes[0], 8 * FLOATS[self.precision].itemsize)

    def encode(self, codes: Codes, row: int) -> bytes:
        """See `Compressor`."""
        at = np.flatnonzero(codes[0][row].cpu().numpy())
        values = codes[1][row].cpu().double().numpy()[at].astype(FORMATS[self.precision])
        word = np.dtype(FORMATS[self.precision].replace("f", "u"))
        gaps, gap_bits = omega_codes(np.diff(at, prepend=-1))
        count, count_bits = omega_codes(np.array([len(at) + 1]))
        words = values.view(word).astype(np.uint64)
        body = np.stack([gaps, words], 1).reshape(-1)
        lengths = np.stack([gap_bits, np.full_like(gap_bits, 8 * word.itemsize)], 1).reshape(-1)
        return join_bits(np.concatenate([count, body]), np.concatenate([count_bits, lengths]))

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        width = FLOATS[self.precision].itemsize
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
        require("probability", q, 0 < q <= 1, "above 0 and at most 1")

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
            require("k", self.k, self.k >= 1, "at least 1")
        if self.fraction is not None:
            require("fraction", self.fraction, 0 < self.fraction <= 1, "above 0 and at most 1")

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
