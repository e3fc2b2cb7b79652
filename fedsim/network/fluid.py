"""Rates of concurrent flows on shared links (weighted max-min fairness), as pure functions.

The rates are the one vector for which no link is overloaded and every flow either runs at its cap
or has a *bottleneck*: a full link on which its level (rate / weight) is the highest.

References
----------
.. [1] Bertsekas, Gallager, "Data Networks", 2nd ed., section 6.5.2 (progressive filling).
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["check_rates", "max_min_rates"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TIE = 1e-12  # relative: levels this close are one level, so that ties fall in one pass


def max_min_rates(
    capacity: FloatArray,
    flow: IntArray,
    link: IntArray,
    consumption: FloatArray,
    weight: FloatArray,
    cap: FloatArray,
) -> FloatArray:
    """Return the weighted max-min fair rates by progressive filling.

    Parameters
    ----------
    capacity : ndarray, shape (n_links,), bit/s
    flow, link : ndarray of int, shape (n_uses,)
        Use k: this flow crosses this link. Links that are not shared belong into `cap`.
    consumption : ndarray, shape (n_uses,)
        Capacity that one bit/s of the flow takes on the link.
    weight : ndarray, shape (n_flows,), positive
    cap : ndarray, shape (n_flows,), bit/s, may be infinite

    Returns
    -------
    ndarray, shape (n_flows,), bit/s
        Infinite for flows that nothing bounds.

    Examples
    --------
    Two flows share a link of 10 bit/s; one of them cannot do more than 2.

    >>> max_min_rates(np.array([10.0]), np.array([0, 1]), np.array([0, 0]), np.ones(2),
    ...               np.ones(2), np.array([2.0, np.inf]))
    array([2., 8.])
    """
    n_links, n_flows = len(capacity), len(weight)
    rate = np.zeros(n_flows)
    is_open = np.ones(n_flows, dtype=bool)
    rest = np.asarray(capacity, dtype=float).copy()
    share = consumption * weight[flow]
    limit = cap / weight
    while is_open.any():
        load = np.bincount(link, share * is_open[flow], n_links)
        levels = np.full(n_links, np.inf)
        np.divide(rest, load, out=levels, where=load > 0)
        level = min(levels.min(initial=np.inf), limit[is_open].min())
        if level == np.inf:
            rate[is_open] = np.inf
            break
        most = level * (1 + _TIE)
        stopped = is_open & (limit <= most)
        stopped[flow[levels[link] <= most]] = True
        stopped &= is_open
        rate[stopped] = np.minimum(level * weight[stopped], cap[stopped])
        taken = np.bincount(link, consumption * np.where(stopped, rate, 0.0)[flow], n_links)
        rest = np.maximum(rest - taken, 0.0)
        is_open &= ~stopped
    return rate


def check_rates(
    rate: FloatArray,
    capacity: FloatArray,
    flow: IntArray,
    link: IntArray,
    consumption: FloatArray,
    weight: FloatArray,
    cap: FloatArray,
    *,
    tolerance: float = 1e-9,
) -> str | None:
    """Say why rates are not the max-min fair ones; None if they are.

    Costs O(total route length): the characterisation by bottlenecks needs no solver. Parameters
    are those of `max_min_rates`; `tolerance` is relative.
    """
    n_links = len(capacity)
    if (rate < 0).any() or (rate > cap * (1 + tolerance)).any():
        return f"flow {int(np.argmax((rate < 0) | (rate > cap * (1 + tolerance))))} exceeds its cap"
    used = np.bincount(link, consumption * rate[flow], n_links)
    if (used > capacity * (1 + tolerance)).any():
        return f"link {int(np.argmax(used > capacity * (1 + tolerance)))} is overloaded"
    level = rate / weight
    highest = np.zeros(n_links)
    np.maximum.at(highest, link, level[flow])
    is_full = used >= capacity * (1 - tolerance)
    stops = is_full[link] & (level[flow] >= highest[link] * (1 - tolerance))
    is_stopped = rate >= cap * (1 - tolerance)
    is_stopped[flow[stops]] = True
    if not is_stopped.all():
        return f"flow {int(np.argmin(is_stopped))} has no bottleneck and is below its cap"
    return None
