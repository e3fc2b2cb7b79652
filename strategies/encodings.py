"""Bits of messages: Elias-omega numbers, joined without a loop over numbers, and read back."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "BitReader",
    "big_endian",
    "field_bits",
    "from_big_endian",
    "is_small",
    "join_bits",
    "omega_codes",
    "omega_lengths",
    "sparse_bits",
]

IntArray = NDArray[np.int64]
_SMALL = 1 << 16  # numbers below which numpy's calls are shorter than torch's


def omega_codes(numbers: IntArray) -> tuple[NDArray[np.uint64], IntArray]:
    """Return the Elias-omega code of each number, as an integer, and its length in bits.

    A number is preceded by its length less one, that by its own, and so on; a zero ends the code.

    Parameters
    ----------
    numbers : ndarray of int64
        From 1 to 2**31.

    References
    ----------
    .. [1] Elias, "Universal codeword sets and representations of the integers", IEEE Trans. Inf.
       Theory 21(2), 1975.

    Examples
    --------
    >>> codes, lengths = omega_codes(np.array([1, 2, 4, 100]))
    >>> [format(int(c), f"0{n}b") for c, n in zip(codes, lengths)]
    ['0', '100', '101000', '1011011001000']
    """
    left = np.array(numbers, np.int64)
    codes = np.zeros(len(left), np.uint64)
    lengths = np.ones(len(left), np.int64)
    while len(todo := np.flatnonzero(left > 1)):
        bits = np.frexp(left[todo].astype(np.float64))[1].astype(np.int64)
        codes[todo] |= left[todo].astype(np.uint64) << lengths[todo].astype(np.uint64)
        lengths[todo] += bits
        left[todo] = bits - 1
    return codes, lengths


_TABLE = torch.from_numpy(omega_codes(np.maximum(np.arange(4096), 1))[1])


def omega_lengths(numbers: torch.Tensor, largest: int) -> torch.Tensor:
    """Return the length in bits of the Elias-omega code of each number.

    Parameters
    ----------
    numbers : Tensor of int64
        From 1 to `largest`.
    largest : int
        At most 2**31.
    """
    table = _TABLE.to(numbers.device)
    if largest < len(table):
        return table[numbers]
    lengths = table[numbers.clamp(max=len(table) - 1)]
    large = numbers >= len(table)
    bits = torch.frexp(numbers[large].double())[1].long()
    lengths[large] = table[bits - 1] + bits
    return lengths


def is_small(rows: torch.Tensor) -> bool:
    """Return whether numpy is faster on these numbers than torch."""
    has_type = rows.dtype != torch.bfloat16
    return rows.numel() < _SMALL and rows.device.type == "cpu" and has_type


def sparse_bits(rows: torch.Tensor, fixed: int, largest: int = 0) -> torch.Tensor:
    """Return the length of each row's sparse code in bits, shape (n,), int64.

    Elias-omega codes of the number of entries that are not zero, plus 1, and of the gap before each
    of them, counted from the row's previous one.

    Parameters
    ----------
    rows : Tensor, shape (n, d)
    fixed : int
        Further bits of an entry that is not zero.
    largest : int
        Above 0: the Elias-omega code of its magnitude, at most this, besides.
    """
    n, d = rows.shape
    if is_small(rows):
        return torch.from_numpy(_few_sparse_bits(rows.numpy(), fixed, largest))
    row, column = rows.nonzero(as_tuple=True)
    gap = column + 1
    gap[1:] -= torch.where(row[1:] == row[:-1], gap[:-1], 0)
    each = omega_lengths(gap, d) + fixed
    if largest == 1:
        each += 1
    elif largest:
        each += omega_lengths(rows[row, column].abs().long().clamp(1, largest), largest)
    total = omega_lengths(torch.bincount(row, minlength=n) + 1, d + 1)
    return total.index_add_(0, row, each)


def _few_sparse_bits(rows: NDArray[Any], fixed: int, largest: int) -> IntArray:
    """Return what `sparse_bits` does, with fewer and shorter calls."""
    n, d = rows.shape
    at = np.flatnonzero(rows)
    row = at // d
    before = np.empty_like(at)
    before[:1], before[1:] = -1, at[:-1]
    each = _lengths(at - np.maximum(before, row * d - 1), d) + fixed
    if largest == 1:
        each += 1
    elif largest:
        sizes = np.nan_to_num(np.abs(rows.reshape(-1)[at]), nan=1)  # of a model that diverges
        each += _lengths(np.clip(sizes, 1, largest).astype(np.int64), largest)
    total = _lengths(np.bincount(row, minlength=n) + 1, d + 1)
    total += np.bincount(row, each, n).astype(np.int64)
    return total


def _lengths(numbers: IntArray, largest: int) -> IntArray:
    """Return what `omega_lengths` does."""
    return _TABLE.numpy()[numbers] if largest < len(_TABLE) else omega_codes(numbers)[1]


def join_bits(codes: NDArray[np.uint64], lengths: IntArray) -> bytes:
    """Return codes one after another, most significant bit first, padded with zeros at the end."""
    total = int(lengths.sum())
    within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    shift = np.repeat(lengths, lengths) - 1 - within
    bits = (np.repeat(codes, lengths) >> shift.astype(np.uint64)) & np.uint64(1)
    return np.packbits(bits.astype(np.uint8)).tobytes()


def field_bits(data: bytes, width: int, count: int) -> IntArray:
    """Return the first `count` unsigned numbers of `width` bits each."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=width * count)
    powers = 1 << np.arange(width - 1, -1, -1, dtype=np.int64)
    return np.asarray(bits.reshape(count, width) @ powers, np.int64)


class BitReader:
    """Reads bits and Elias-omega numbers one after another.

    Parameters
    ----------
    data : bytes
    """

    def __init__(self, data: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8)).tobytes()
        self._at = 0

    def bit(self) -> int:
        """Read one bit.

        Raises
        ------
        ValueError
            If there is none left.
        """
        if self._at >= len(self._bits):
            raise ValueError(f"a message of {len(self._bits) // 8} bytes ends too early")
        self._at += 1
        return self._bits[self._at - 1]

    def number(self, width: int) -> int:
        """Read an unsigned number of `width` bits."""
        value = 0
        for _ in range(width):
            value = 2 * value + self.bit()
        return value

    def omega(self) -> int:
        """Read an Elias-omega number."""
        value = 1
        while self.bit():
            rest = self.number(value)
            value = (1 << value) | rest
        return value

    @property
    def n_bytes(self) -> int:
        """Bytes read from, the last one counted in full."""
        return -(-self._at // 8)


def big_endian(values: torch.Tensor) -> bytes:
    """Return numbers as bytes, most significant first."""
    if values.dtype == torch.bfloat16:
        return values.cpu().view(torch.int16).numpy().byteswap().tobytes()
    return values.cpu().contiguous().numpy().byteswap().tobytes()


def from_big_endian(data: bytes, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the first d numbers of `big_endian`."""
    if dtype == torch.bfloat16:
        return torch.from_numpy(np.frombuffer(data, ">i2", d).astype(np.int16)).view(dtype)
    name = str(dtype).removeprefix("torch.")
    read = np.frombuffer(data, np.dtype(name).newbyteorder(">"), d)
    return torch.from_numpy(read.astype(name))
