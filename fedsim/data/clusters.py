"""Devices that differ in what they see: samples grouped by their features."""

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = ["cluster", "rebalance"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_PASSES = 50


def cluster(x: FloatArray, n_groups: int, *, seed: int = 0) -> IntArray:
    """Return a group for each sample: k-means from k-means++, then `rebalance`.

    Parameters
    ----------
    x : ndarray, shape (n, d)
    n_groups : int
    seed : int
        Of the first centres.

    Returns
    -------
    ndarray of int64, shape (n,)
    """
    if not 1 <= n_groups <= len(x):
        raise ScenarioError(f"data.devices: {n_groups} groups of {len(x)} samples")
    rng = stream(seed, "clusters")
    square = np.square(x).sum(1)
    centres = x[rng.integers(len(x), size=1)]
    nearest = _distances(x, square, centres)[:, 0]
    while len(centres) < n_groups:
        total = nearest.sum()
        chance = nearest / total if total > 0 else None
        centres = np.concatenate([centres, x[rng.choice(len(x), size=1, p=chance)]])
        nearest = np.minimum(nearest, _distances(x, square, centres[-1:])[:, 0])
    group = np.full(len(x), -1)
    for _ in range(_PASSES):
        before, group = group, _distances(x, square, centres).argmin(1)
        if np.array_equal(before, group):
            break
        for i in range(n_groups):
            members = group == i
            if members.any():
                centres[i] = x[members].mean(0)
    return rebalance(group, n_groups)


def _distances(x: FloatArray, square: FloatArray, centres: FloatArray) -> FloatArray:
    """Return the squared distances of samples to centres, (n, k), at least 0."""
    found: FloatArray = square[:, None] - 2.0 * (x @ centres.T) + np.square(centres).sum(1)
    return np.maximum(found, 0.0)


def rebalance(group: IntArray, n_groups: int) -> IntArray:
    """Return groups of which none is more than ten times another.

    While one is, the first half of the largest (in order of the samples) goes to the smallest.

    References
    ----------
    .. [1] The published experiments of Philippenko, Dieuleveut, "Preserved central model for faster
       bidirectional compression in distributed settings", NeurIPS 2021.
    """
    group = group.copy()
    while True:
        counts = np.bincount(group, minlength=n_groups)
        if 10 * counts.min() >= counts.max():
            return group
        largest = np.flatnonzero(group == counts.argmax())
        group[largest[: len(largest) // 2]] = counts.argmin()
