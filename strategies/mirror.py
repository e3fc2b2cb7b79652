"""Weighted means in the dual space of a mirror map, of which the power mean is the main one.

Every function takes models as rows ``(n, p)`` and weights ``(m, n)``, row i of which belongs to
receiver i, and returns one mean a receiver, coordinate by coordinate.

Decision: powers are signed, S_p(x) = sign(x) |x|^p, a bijection for every real p > 0; and they are
taken of ratios to the largest magnitude among a receiver's own inputs, coordinate by coordinate.
Unscaled, float32 loses |x| = 0.01 from p = 33 on and overflows at |x| = 1000 from p = 15 on.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.arrivals import matrix, mix

__all__ = [
    "NEGATIVE_ENTROPY",
    "MirrorMap",
    "check_degree",
    "mirror_mean",
    "power_map",
    "signed_power",
    "weighted_power_mean",
    "weighted_power_mean_and_slope",
]

FloatArray = NDArray[np.float64]
Degree = float | Tensor
_CHUNK = 1 << 18  # entries (receiver, input, coordinate) that are worked on at once
_DENSE = 20  # receivers per input of one, up to which a product of matrices is faster
_SMALLEST_LOG = math.log(1e-290)  # of a power in float64, with room above the subnormal ones
_NO_SLOPE = 1e-12  # of |s|, below which the slope by the degree is taken as 0


# --- mirror maps ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MirrorMap:
    """A mirror map φ, by its increasing derivative and the inverse of that.

    Parameters
    ----------
    forward : callable
        φ', from models to the dual space, element by element.
    inverse : callable
        Its inverse.
    """

    forward: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]


def signed_power(values: Tensor, degree: Degree) -> Tensor:
    """Return sign(x) |x|^degree.

    Examples
    --------
    >>> signed_power(torch.tensor([-2.0, 0.0, 3.0]), 2.0)
    tensor([-4.,  0.,  9.])
    """
    return torch.copysign(_raise(values.abs(), degree), values)


def power_map(degree: float) -> MirrorMap:
    """Return φ(x) = |x|^(p+1) / (p+1), unscaled; `weighted_power_mean` is what to compute with."""
    check_degree(degree)
    return MirrorMap(
        lambda values: signed_power(values, degree), lambda values: signed_power(values, 1 / degree)
    )


def _log(values: Tensor) -> Tensor:
    lowest = float(values.min())
    if not lowest > 0:
        raise ValueError(f"the negative entropy needs positive parameters; the lowest is {lowest}")
    return values.log()


NEGATIVE_ENTROPY = MirrorMap(_log, torch.exp)
"""φ(x) = x ln x - x on positive parameters: weighted geometric means, multiplicative steps."""


def mirror_mean(
    values: Tensor, weights: FloatArray, mirror: MirrorMap, shift: Tensor | None = None
) -> Tensor:
    """Return ``inverse(weights @ forward(values) - shift)``.

    Parameters
    ----------
    values : Tensor, shape (n, p)
    weights : ndarray, shape (m, n)
        Rows sum to 1.
    mirror : MirrorMap
    shift : Tensor, shape (m, p), optional
        A step in the dual space.
    """
    dual = mix(weights, mirror.forward(values))
    return mirror.inverse(dual if shift is None else dual - shift)


# --- power means ----------------------------------------------------------------------------------


def check_degree(degree: float, *, signed: bool = True) -> None:
    """Check that a power mean of this degree exists.

    Raises
    ------
    ValueError
        If it is not positive and finite; without signed powers, if it is not an odd integer.
    """
    if not (degree > 0 and math.isfinite(degree)):
        raise ValueError(f"degree = {degree}: must be above 0")
    if not signed and degree % 2 != 1:
        raise ValueError(
            f"degree = {degree}: without signed powers only odd integers keep signs; "
            "use 1, 3, 5, …, or signed powers"
        )


def weighted_power_mean(
    values: Tensor, weights: FloatArray, degree: Degree, shift: Tensor | None = None
) -> Tensor:
    """Return each receiver's S_p⁻¹(Σ_j a_j S_p(x_j) - shift), with S_p(x) = sign(x) |x|^p.

    Degree 1 is linear averaging, large degrees tend to the value of largest magnitude.

    Parameters
    ----------
    values : Tensor, shape (n, p), float32 or float64
    weights : ndarray, shape (m, n)
        Non-negative; rows sum to 1.
    degree : float, or Tensor of shape (m,)
        Of every receiver.
    shift : Tensor, shape (m, p), optional
        A step in the dual space.

    Returns
    -------
    Tensor, shape (m, p)

    Raises
    ------
    ValueError
        If a degree is not positive, or a weight negative.

    Notes
    -----
    Where positive and negative inputs cancel, the result is uncertain, since |s|^(1/p) is
    infinitely steep at 0: what is accurate there is its image in the dual space.

    Examples
    --------
    >>> weights = np.array([[0.5, 0.5]])
    >>> float(weighted_power_mean(torch.tensor([[1.0], [3.0]]), weights, 2.0)[0, 0]) ** 2
    5.0
    """
    if isinstance(degree, float | int) and degree == 1:
        mean = mix(weights, values)
        return mean if shift is None else mean - shift
    if not isinstance(degree, Tensor) and _is_dense(weights):
        return _dense_power_means(values, weights, degree, shift)
    return _power_means(values, weights, degree, shift, with_slope=False)[0]


def weighted_power_mean_and_slope(
    values: Tensor,
    weights: FloatArray,
    degree: Degree,
    shift: Tensor | None = None,
    *,
    clip: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Return the power means and their derivatives by the degree.

    With s = Σ_j a_j S_p(x_j), r_j = a_j S_p(x_j)/s: dx̄/dp = (x̄/p) Σ_j r_j ln(|x_j|/|x̄|).

    Parameters
    ----------
    values, weights, degree, shift
        See `weighted_power_mean`.
    clip : float
        Greatest slope, relative to the largest magnitude of a receiver's inputs. The slope is
        unbounded near cancellation, and taken as 0 where it does not exist.

    Returns
    -------
    mean, slope : Tensor, shape (m, p)
    """
    mean, slope = _power_means(values, weights, degree, shift, with_slope=True, clip=clip)
    assert slope is not None
    return mean, slope


def _is_dense(weights: FloatArray) -> bool:
    """Return whether a matrix product costs less than a power of every input of every receiver."""
    return bool(_DENSE * (weights > 0).sum(axis=1).max() >= weights.shape[1])


def _dense_power_means(
    values: Tensor, weights: FloatArray, degree: float, shift: Tensor | None
) -> Tensor:
    """Return the same as `_power_means` of one degree for all, by one product of matrices.

    Powers are taken in float64 of ratios to the largest of all inputs, whoever receives them, which
    loses nothing as long as the smallest power is a normal number. Other columns take the long way.
    """
    check_degree(degree)
    if (weights < 0).any():
        raise ValueError(f"weights: {weights.min()} is negative; a power mean has no meaning")
    mean = values.new_empty(len(weights), values.shape[1])
    for at in _chunks(values.shape[1], max(weights.shape)):
        x = values[:, at].double()
        step = None if shift is None else shift[:, at].double()
        size = x.abs()
        root = None if step is None else step.abs().pow(1 / degree)
        sizes = size if root is None else torch.cat([size, root])
        top = sizes.amax(0)
        safe = torch.where(top > 0, top, 1.0)
        lowest = torch.where(sizes > 0, sizes, safe).amin(0) / safe
        powers = torch.copysign(_raise(size.div_(safe), degree), x)
        s = matrix(weights, powers) @ powers
        if root is not None and step is not None:
            s -= signed_power(torch.copysign(root / safe, step), degree)
        mean[:, at] = (signed_power(s, 1 / degree) * top).to(mean.dtype)
        rest = torch.nonzero(lowest.log() * degree < _SMALLEST_LOG)[:, 0]
        if len(rest):
            columns = rest + at.start
            part = None if shift is None else shift[:, columns]
            mean[:, columns] = _power_means(
                values[:, columns], weights, degree, part, with_slope=False
            )[0]
    return mean


def _power_means(
    values: Tensor,
    weights: FloatArray,
    degree: Degree,
    shift: Tensor | None,
    *,
    with_slope: bool,
    clip: float = math.inf,
) -> tuple[Tensor, Tensor | None]:
    lowest = float(degree.min()) if isinstance(degree, Tensor) else degree
    check_degree(lowest)
    if (weights < 0).any():
        raise ValueError(f"weights: {weights.min()} is negative; a power mean has no meaning")
    inputs, shares = _inputs(weights)
    gather = torch.from_numpy(inputs).to(values.device)
    a = matrix(shares, values)[:, None]  # (m, 1, k)
    p = degree
    if isinstance(p, Tensor):
        p = p.to(values.device, values.dtype).reshape(-1, 1)
    mean = values.new_empty(len(weights), values.shape[1])
    slope = torch.empty_like(mean) if with_slope else None
    for at in _chunks(values.shape[1], inputs.size):
        x = values[:, at][gather]  # (m, k, c)
        root = None if shift is None else _raise(shift[:, at].abs(), 1 / p)
        top = x.abs().amax(1)
        if root is not None:
            top = torch.maximum(top, root)
        safe = torch.where(top > 0, top, 1.0)
        ratio = x.div_(safe[:, None])
        magnitude = ratio.abs()
        logs = None
        if with_slope or not _is_small_integer(p):
            # Of ratios up to 1 this is as accurate as pow, and faster.
            logs = magnitude.log_()
            powers = (logs * (p[:, None] if isinstance(p, Tensor) else p)).exp_()
        else:
            powers = _raise(magnitude, p)
        powers = torch.copysign(powers, ratio, out=powers)
        total = s = (a @ powers)[:, 0]
        if root is not None and shift is not None:
            s = total - signed_power(torch.copysign(root / safe, shift[:, at]), p)
        mean[:, at] = signed_power(s, 1 / p) * top
        if slope is not None and logs is not None:
            logs = logs.masked_fill_(logs.isinf(), 0.0)
            exists = (s.abs() > _NO_SLOPE) & (top > 0)
            s_safe = torch.where(exists, s, 1.0)
            # Σ_j t_j ln|x_j| of the inputs alone: a step in the dual space has no ln of its own.
            inner = (a @ powers.mul_(logs))[:, 0] + (total - s) * safe.log()
            found = mean[:, at] / p * (inner / s_safe - s_safe.abs().log() / p)
            bound = clip * top if math.isfinite(clip) else torch.full_like(top, math.inf)
            slope[:, at] = torch.where(exists, found, 0.0).clamp(-bound, bound)
    return mean, slope


def _inputs(weights: FloatArray) -> tuple[NDArray[np.int64], FloatArray]:
    """Return, for every receiver, its inputs and their weights; short rows repeat the first."""
    is_input = weights > 0
    width = int(is_input.sum(axis=1).max())
    order = np.argsort(~is_input, axis=1, kind="stable")[:, :width]
    shares = np.take_along_axis(weights, order, axis=1)
    return np.where(shares > 0, order, order[:, :1]), shares


def _chunks(n_columns: int, entries_per_column: int) -> Iterator[slice]:
    width = max(1, _CHUNK // max(1, entries_per_column))
    for start in range(0, n_columns, width):
        yield slice(start, min(start + width, n_columns))


def _is_small_integer(degree: Degree) -> bool:
    return not isinstance(degree, Tensor) and degree == int(degree) and degree <= 64


def _raise(base: Tensor, degree: Degree) -> Tensor:
    """Return base^degree of a non-negative base; small integers by multiplication."""
    if isinstance(degree, Tensor) or not _is_small_integer(degree):
        return base.pow(degree)
    exponent, result = int(degree), None
    while True:
        if exponent & 1:
            result = base.clone() if result is None else result.mul_(base)
        exponent >>= 1
        if not exponent:
            return base.clone() if result is None else result
        base = base.square()
