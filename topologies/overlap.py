"""One training iteration: tensor fusion, and synchronisation that overlaps back-propagation."""

from collections.abc import Callable
from dataclasses import dataclass

from topologies.profiles import Profile

__all__ = ["FORWARD", "Iteration", "buckets_of", "iteration_time"]

FORWARD = 1 / 3
"""Of an iteration's compute time, the part before the backward pass: one of three equal parts."""


@dataclass(frozen=True, slots=True)
class Iteration:
    """An iteration's parts, in seconds.

    Attributes
    ----------
    seconds : float
        Compute, then what is left of synchronisation.
    compute, sync : float
        Synchronisation is the sum over all buckets.
    exposed : float
        The part of synchronisation that compute does not hide.
    buckets : tuple of int
        Bytes of each bucket in the order in which they are sent.
    """

    seconds: float
    compute: float
    sync: float
    exposed: float
    buckets: tuple[int, ...]


def buckets_of(profile: Profile, fusion_bytes: float | None) -> list[tuple[int, float]]:
    """Return buckets of tensors, last layer first: their bytes and when they are ready.

    Parameters
    ----------
    profile : Profile
    fusion_bytes : float, optional
        A bucket is closed when it has reached that size; 0 sends every tensor by itself, None all
        tensors together.

    Returns
    -------
    list of (int, float)
        Bytes, and the share of the backward pass that is over when the last of them is known.

    Examples
    --------
    >>> from topologies.profiles import profile
    >>> [size for size, _ in buckets_of(profile("lenet5"), 100_000)]
    [236536, 10288]
    """
    buckets = []
    total = profile.flops or 1.0
    done, size = 0.0, 0
    for tensor in reversed(profile.tensors):
        done += tensor.flops
        size += tensor.parameters * profile.itemsize
        if fusion_bytes is not None and size >= fusion_bytes:
            buckets.append((size, done / total))
            size = 0
    if size:
        buckets.append((size, done / total))
    return buckets


def iteration_time(
    profile: Profile,
    sync_seconds: Callable[[float, float], float],
    *,
    compute: float = 0.0,
    fusion_bytes: int | None = None,
    overlap: bool = False,
) -> Iteration:
    """Return how long one synchronous iteration takes.

    Buckets are synchronised one after the other. With `overlap` a bucket starts as soon as its
    gradients are known, else when the backward pass is over. Forward takes a third of `compute`;
    within the backward pass time goes with the tensors' FLOPs.

    Parameters
    ----------
    profile : Profile
    sync_seconds : callable (size_bytes, start) -> float
        How long the collective takes for so many bytes, started at a time (s).
    compute : float
        Seconds of forward and backward pass.
    fusion_bytes : int, optional
        See `buckets_of`.
    overlap : bool

    Examples
    --------
    >>> from topologies.profiles import profile
    >>> parts = iteration_time(profile("lenet5"), lambda size, start: size * 1e-6, compute=0.2)
    >>> round(parts.seconds, 6), round(parts.exposed, 6)
    (0.446824, 0.246824)
    """
    if not compute >= 0:
        raise ValueError(f"compute = {compute} s: must not be negative")
    buckets = buckets_of(profile, fusion_bytes)
    now, sync = 0.0, 0.0
    for size, ready in buckets:
        known = compute * (FORWARD + (1 - FORWARD) * ready) if overlap else compute
        start = max(now, known)
        length = sync_seconds(float(size), start)
        sync += length
        now = start + length
    seconds = max(now, compute)
    sizes = tuple(size for size, _ in buckets)
    return Iteration(seconds, compute, sync, seconds - compute, sizes)
