"""What a compressor is, and those that round to another number format.

Decision: scales (a norm) travel as float32, as in the published encodings; with
``precision="float64"`` they are exact, four bytes longer each.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from strategies.encodings import big_endian, from_big_endian
from strategies.halves import Draws

__all__ = [
    "FLOATS",
    "FORMATS",
    "Cast",
    "Codes",
    "Compressor",
    "Identity",
    "Precision",
    "check_precision",
    "require",
]

Codes = tuple[Tensor, ...]
Precision = Literal["float32", "float64"]
# Types of numbers in messages, and how numpy calls those of scales and values, big-endian.
FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
FORMATS = {"float32": ">f4", "float64": ">f8"}


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
        require("block", self.block, self.block >= 0, "at least 0")

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
        return big_endian(codes[0][row])

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        return from_big_endian(data, d, dtype).to(dtype), d * dtype.itemsize


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
        require("dtype", self.dtype, self.dtype in valid, f"one of {', '.join(valid)}")

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
        return big_endian(codes[0][row])

    def decode(self, data: bytes, d: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """See `Compressor`."""
        short: torch.dtype = getattr(torch, self.dtype)
        return from_big_endian(data, d, short).to(dtype), d * short.itemsize


def require(name: str, value: object, holds: bool, needed: str) -> None:
    """Raise a ValueError that names a parameter, unless what it must be holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {needed}")


def check_precision(precision: str) -> None:
    """Raise a ValueError unless numbers can travel in this precision."""
    require("precision", precision, precision in FORMATS, "one of float32, float64")
