"""Which samples a device looks at in which local step, for many devices at once.

The order of a device's samples is a sort by keyed hashes of (seed, round, epoch, device, position):
it never depends on which other devices are computed with it. Devices come sorted by their number
of steps, most first, so that those still active at step t are the first `active[t]` rows: a prefix,
for which slices are views and nothing is computed for a device that has finished.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.streams import bits, mix64

__all__ = ["Batches", "first_batches", "make_batches"]

IntArray = NDArray[np.int64]
_SEGMENT_BITS = 20
_RANKS = np.uint64((1 << _SEGMENT_BITS) - 1)
_BLOCK = 1 << 15  # keys of samples hashed at a time: they stay in the cache


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of a chunk of devices, step after step.

    Parameters
    ----------
    width : int
        Samples in a batch, padding included.
    active : ndarray of int64, shape (n_steps,)
        How many devices (a prefix) take part in each step.
    offset : ndarray of int64, shape (n_steps,)
        Where a step's block of `active[t] * width` entries begins in `index` and `weight`.
    index : ndarray of int64
        Rows of the data tensor.
    weight : ndarray of float64
        1 / (true size of the batch); 0 for padding.
    count : ndarray of int64
        True sizes: entry `offset[t] // width + row`.
    """

    width: int
    active: IntArray
    offset: IntArray
    index: IntArray
    weight: NDArray[np.float64]
    count: IntArray


def make_batches(
    seed: int,
    rounds: IntArray,
    devices: IntArray,
    start: IntArray,
    size: IntArray,
    batch: IntArray,
    steps: IntArray,
    *,
    drop_last: bool = False,
) -> Batches:
    """Return the batches of devices that are sorted by `steps`, most first.

    Parameters
    ----------
    seed : int
    rounds, devices, start, size, batch, steps : ndarray of int64, shape (k,)
        For each device: round, id, first row of its data, number of samples, size of a batch
        (at most `size`), number of local steps. Epochs follow one another without a gap.
    drop_last : bool
        Leave out an epoch's last batch if it is short.
    """
    is_one_size = (size == size[0]).all() and (batch == batch[0]).all()
    if steps[0] == 1 and is_one_size and batch[0] < size[0] < 1 << _SEGMENT_BITS:
        return _one_step(seed, rounds, devices, start, int(size[0]), int(batch[0]))
    per_epoch = size // batch if drop_last else -(-size // batch)
    epochs = -(-steps // per_epoch)
    width = int(batch.max())
    n_steps = int(steps[0])
    active = np.searchsorted(-steps, -np.arange(n_steps), side="left")
    offset = (np.cumsum(active) - active) * width

    # One segment for each (device, epoch), one entry for each sample in it.
    row_of_segment = np.repeat(np.arange(len(size)), epochs)
    epoch = _within(epochs)
    key = bits(seed, "sample-order", rounds[row_of_segment], epoch, devices[row_of_segment])
    length = size[row_of_segment]
    segment = np.repeat(np.arange(len(length)), length)
    rank = _within(length)
    order = _sort_within(segment, mix64(key[segment] ^ rank.astype(np.uint64)))
    sample = rank[order]

    row = row_of_segment[segment]
    within = rank // batch[row]
    step = epoch[segment] * per_epoch[row] + within
    used = step < steps[row]
    if drop_last:
        used &= within < per_epoch[row]
    if not used.all():
        row, rank, sample, step, within = (a[used] for a in (row, rank, sample, step, within))
    block = offset[step] // width + row
    place = block * width + rank - within * batch[row]

    n_blocks = int(active.sum())
    row_of_block = np.arange(n_blocks) - np.repeat(offset // width, active)
    index = np.repeat(start[row_of_block], width)  # padding repeats the device's own first sample
    index[place] = start[row] + sample
    weight = np.zeros(n_blocks * width)
    count = np.bincount(block, minlength=n_blocks)
    weight[place] = 1.0 / count[block]
    return Batches(width, active, offset, index, weight, count)


def _one_step(
    seed: int, rounds: IntArray, devices: IntArray, start: IntArray, size: int, batch: int
) -> Batches:
    """Return the batches of one step of devices of one size, without sorting all their samples."""
    k = len(devices)
    chosen = start[:, None] + first_batches(seed, rounds, devices, size, batch)
    return Batches(
        width=batch,
        active=np.array([k]),
        offset=np.array([0]),
        index=chosen.reshape(-1),
        weight=np.full(k * batch, 1.0 / batch),
        count=np.full(k, batch),
    )


def first_batches(
    seed: int | IntArray, rounds: IntArray, devices: IntArray, size: int, batch: int
) -> IntArray:
    """Return the first batches of `make_batches` of devices of one size, without all the others.

    Parameters
    ----------
    seed, rounds, devices : int or ndarray of int64
        They broadcast to a common shape.
    size : int
        Samples of each device.
    batch : int
        At most `size`.

    Returns
    -------
    ndarray of int64, shape (*common, batch)
        Positions among the device's samples, in the order of `make_batches`.
    """
    if batch == size:
        shape = np.broadcast_shapes(np.shape(seed), rounds.shape, devices.shape)
        return np.broadcast_to(np.arange(size), (*shape, size))
    key = bits(seed, "sample-order", rounds, 0, devices)
    flat, rank = key.reshape(-1, 1), np.arange(size, dtype=np.uint64)
    first = np.empty((len(flat), batch), np.uint64)
    step = max(1, _BLOCK // size)
    for start in range(0, len(flat), step):
        # As `_sort_within` does: by the upper bits of the hash, then by rank.
        drawn = mix64(flat[start : start + step] ^ rank)
        drawn &= ~_RANKS
        drawn |= rank
        if batch == 1:
            drawn.min(-1, out=first[start : start + step, 0])
        else:
            drawn.partition(batch - 1, axis=-1)
            first[start : start + step] = np.sort(drawn[:, :batch], axis=-1)
    return (first & _RANKS).astype(np.int64).reshape(*key.shape, batch)


def _within(lengths: IntArray) -> IntArray:
    """Return 0..n-1 for each of the lengths, one after another."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _sort_within(segment: IntArray, key: NDArray[np.uint64]) -> IntArray:
    """Return the order by (segment, key); one sort where the segment fits into a key's top bits."""
    if len(segment) and segment[-1] < 1 << _SEGMENT_BITS:
        top = segment.astype(np.uint64) << np.uint64(64 - _SEGMENT_BITS)
        return np.argsort(top | (key >> np.uint64(_SEGMENT_BITS)), kind="stable")
    return np.lexsort((key >> np.uint64(_SEGMENT_BITS), segment))
