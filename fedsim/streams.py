"""Randomness by name: one seed, and every history or draw keyed by what it is for.

Decision: nothing in fedsim draws from a shared sequential generator. A *history* (a link, a
device, the data split) has its own generator, `stream(seed, purpose, entity)`; a *draw* (the loss
of one message, the order of samples in one epoch) is a keyed hash, `uniform(seed, purpose, ...)`.
Adding a device, a link or a strategy therefore never shifts the numbers of another.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bits", "digest", "mix64", "stream", "uniform"]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def digest(name: str | int) -> int:
    """Return a fixed 64-bit number for a name (an int stands for itself, modulo 2**64)."""
    if isinstance(name, int):
        return name & 0xFFFFFFFFFFFFFFFF
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def stream(seed: int, purpose: str, entity: str | int = 0) -> np.random.Generator:
    """Return the generator of one history.

    Parameters
    ----------
    seed : int
        The scenario's seed.
    purpose : str
        What the numbers are for, for example ``"device-speed"``.
    entity : str or int
        Whose history it is: a link's name, a device's id.

    Returns
    -------
    numpy.random.Generator
        The same for the same three arguments, whatever else was drawn before.
    """
    key = (digest(purpose), digest(entity))
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the splitmix64 finaliser of each value (wraps modulo 2**64).

    References
    ----------
    .. [1] Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    with np.errstate(over="ignore"):
        return _mixed(values)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = np.asarray(values + _GOLDEN, dtype=np.uint64)
    z ^= z >> _30
    z *= _MIX_1
    z ^= z >> _27
    z *= _MIX_2
    z ^= z >> _31
    return z


def bits(seed: int | NDArray[np.int64], purpose: str, *words: ArrayLike) -> NDArray[np.uint64]:
    """Return keyed 64-bit draws; `seed` and `words` are integers or arrays that broadcast.

    Returns
    -------
    ndarray of uint64
        One draw for each element of the broadcast words; a 0-d array if all are scalars.
    """
    start = digest(seed) if isinstance(seed, int) else seed.astype(np.uint64)
    with np.errstate(over="ignore"):
        key = _mixed(np.asarray(start, np.uint64))
        key = _mixed(key ^ np.uint64(digest(purpose)))
        for word in words:
            key = _mixed(key ^ np.asarray(word).astype(np.uint64))
    return key


def uniform(seed: int, purpose: str, *words: ArrayLike) -> NDArray[np.float64]:
    """Return keyed draws, uniform in [0, 1), with 53 random bits each (see `bits`)."""
    return np.asarray((bits(seed, purpose, *words) >> np.uint64(11)) * 2.0**-53)
