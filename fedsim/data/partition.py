"""Who holds which samples: partitioners that give every sample to exactly one device.

Each is `partition_x(labels, n_devices, *, rng, ..., min_samples=1) -> list[IntArray]`: one sorted
array of sample indices for every device, each of at least `min_samples`.
"""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError

__all__ = [
    "check_parts",
    "partition_dirichlet",
    "partition_dirichlet_quantity",
    "partition_flower",
    "partition_iid",
    "partition_natural",
    "partition_pathological",
    "partition_shards",
]

IntArray = NDArray[np.int64]


def check_parts(parts: Any, n_devices: int, n_samples: int) -> list[IntArray]:
    """Return what a partitioner gave as index arrays, if it is a split of so many samples.

    Parameters
    ----------
    parts : sequence of sequence of int
        Sample indices of each device.
    n_devices, n_samples : int

    Raises
    ------
    ScenarioError
        If there is not one part a device, or one is empty or holds anything but sample indices.
    """
    if not isinstance(parts, Sequence) or len(parts) != n_devices:
        said = f"{len(parts)} parts" if isinstance(parts, Sequence) else type(parts).__name__
        raise ScenarioError(
            f"data.partition: gives {said}, not a list of one part for each of {n_devices} devices"
        )
    arrays = [np.asarray(part) for part in parts]
    for device, part in enumerate(arrays):
        if part.ndim != 1 or not len(part) or part.dtype.kind not in "iu":
            said = f"an array of shape {part.shape} and type {part.dtype}"
            raise ScenarioError(
                f"data.partition: gives device {device} {said}, not sample indices (at least one)"
            )
        if part.min() < 0 or part.max() >= n_samples:
            raise ScenarioError(
                f"data.partition: gives device {device} indices {part.min()}..{part.max()}, "
                f"there are samples 0..{n_samples - 1}"
            )
    return [part.astype(np.int64, copy=False) for part in arrays]


def partition_iid(
    labels: IntArray, n_devices: int, *, rng: np.random.Generator, min_samples: int = 1
) -> list[IntArray]:
    """Deal the samples out at random, in equal parts (sizes differ by at most one).

    Parameters
    ----------
    labels : ndarray of int64, shape (n_samples,)
    n_devices : int
    rng : numpy.random.Generator
    min_samples : int
        Fewest samples that a device may hold.

    Returns
    -------
    list of ndarray of int64
        Indices into `labels`, one sorted array a device; every index is in exactly one of them.

    Raises
    ------
    ScenarioError
        If there are not `min_samples` for every device.
    """
    _check_enough(len(labels), n_devices, min_samples)
    owner = np.empty(len(labels), np.int64)
    owner[rng.permutation(len(labels))] = np.arange(len(labels)) % n_devices
    return _by_device(owner, n_devices)


def partition_dirichlet(
    labels: IntArray,
    n_devices: int,
    *,
    rng: np.random.Generator,
    alpha: float,
    min_samples: int = 1,
) -> list[IntArray]:
    """Split each class over the devices in proportions drawn from Dirichlet(alpha).

    Devices left below `min_samples` get random samples from those that hold most.

    Parameters
    ----------
    alpha : float
        Greater is more alike: 0.1 gives each device one or two classes, 100 is nearly IID.

    See Also
    --------
    partition_iid : The other parameters, the result and the errors.

    References
    ----------
    .. [1] Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated
       visual classification", 2019, arXiv:1909.06335 (here the proportions are drawn by class).
    """
    _check_enough(len(labels), n_devices, min_samples)
    _check_classes(labels, "dirichlet")
    _check_positive("alpha", alpha)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        bounds = np.cumsum(_proportions(rng, alpha, n_devices)) * len(members)
        owner[members] = np.searchsorted(bounds[:-1], np.arange(len(members)), side="right")
    return _by_device(_fill_up(owner, n_devices, min_samples, rng), n_devices)


def partition_dirichlet_quantity(
    labels: IntArray,
    n_devices: int,
    *,
    rng: np.random.Generator,
    alpha: float,
    min_samples: int = 1,
) -> list[IntArray]:
    """Give the devices unequal amounts, in proportions drawn from Dirichlet(alpha), labels IID.

    Parameters
    ----------
    alpha : float
        Greater is more equal.

    See Also
    --------
    partition_iid : The other parameters, the result and the errors.
    """
    _check_enough(len(labels), n_devices, min_samples)
    _check_positive("alpha", alpha)
    bounds = np.cumsum(_proportions(rng, alpha, n_devices)) * len(labels)
    owner = np.empty(len(labels), np.int64)
    owner[rng.permutation(len(labels))] = np.searchsorted(
        bounds[:-1], np.arange(len(labels)), side="right"
    )
    return _by_device(_fill_up(owner, n_devices, min_samples, rng), n_devices)


def partition_shards(
    labels: IntArray,
    n_devices: int,
    *,
    rng: np.random.Generator,
    shards_per_device: int = 2,
    min_samples: int = 1,
) -> list[IntArray]:
    """Sort by label, cut into equal shards, give each device `shards_per_device` at random.

    See Also
    --------
    partition_iid : The other parameters, the result and the errors.

    References
    ----------
    .. [1] McMahan et al., "Communication-efficient learning of deep networks from decentralized
       data", AISTATS 2017, section 3 (200 shards, two a client).
    """
    _check_enough(len(labels), n_devices, min_samples)
    _check_classes(labels, "shards")
    _check_positive("shards_per_device", shards_per_device)
    n_shards = n_devices * shards_per_device
    # Shuffled first: which samples of a class share a shard must not depend on the file's order.
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shard = np.arange(len(labels)) * n_shards // len(labels)
    holder = rng.permutation(n_shards) // shards_per_device
    owner = np.empty(len(labels), np.int64)
    owner[by_label] = holder[shard]
    return _large_enough(_by_device(owner, n_devices), min_samples, "shards")


def partition_pathological(
    labels: IntArray,
    n_devices: int,
    *,
    rng: np.random.Generator,
    classes_per_device: int = 2,
    min_samples: int = 1,
) -> list[IntArray]:
    """Give each device `classes_per_device` classes; a class is shared equally by its holders.

    Classes are handed out evenly: the numbers of holders of two classes differ by at most one.

    Raises
    ------
    ScenarioError
        Also if the devices together cannot hold every class.

    See Also
    --------
    partition_iid : The other parameters and the result.
    """
    _check_enough(len(labels), n_devices, min_samples)
    _check_classes(labels, "pathological")
    classes, index = np.unique(labels, return_inverse=True)
    if not 1 <= classes_per_device <= len(classes):
        raise ScenarioError(
            f"data.partition.classes_per_device: {classes_per_device} is not in 1..{len(classes)}"
        )
    if n_devices * classes_per_device < len(classes):
        raise ScenarioError(
            f"data.partition: {n_devices} devices with {classes_per_device} classes each cannot "
            f"hold all {len(classes)} classes"
        )
    holders: list[list[int]] = [[] for _ in classes]
    for device in range(n_devices):
        held = np.array([len(h) for h in holders])
        for label in np.lexsort((rng.random(len(classes)), held))[:classes_per_device]:
            holders[label].append(device)
    owner = np.empty(len(labels), np.int64)
    for label, devices in enumerate(holders):
        members = rng.permutation(np.flatnonzero(index == label))
        owner[members] = rng.permutation(devices)[np.arange(len(members)) % len(devices)]
    return _large_enough(_by_device(owner, n_devices), min_samples, "pathological")


def partition_natural(
    labels: IntArray,
    n_devices: int,
    *,
    rng: np.random.Generator,
    device_ids: IntArray | None,
    min_samples: int = 1,
) -> list[IntArray]:
    """Give each device what it has by nature: the samples of one writer or speaker.

    Parameters
    ----------
    device_ids : ndarray of int64, shape (n_samples,)
        `Dataset.device_train`. Ids with fewer than `min_samples` samples are left out; if more
        than `n_devices` remain, a random choice of them is used. Devices follow ascending ids.

    Raises
    ------
    ScenarioError
        If the data set knows no device ids, or too few of them.

    See Also
    --------
    partition_iid : The other parameters and the result.
    """
    if device_ids is None:
        raise ScenarioError(
            "data.partition: natural needs a data set with device ids "
            "(an .npz file with device_train, or tinyshakespeare)"
        )
    ids, index, counts = np.unique(device_ids, return_inverse=True, return_counts=True)
    eligible = np.flatnonzero(counts >= min_samples)
    if len(eligible) < n_devices:
        raise ScenarioError(
            f"data.devices: {n_devices}, but the data hold {len(eligible)} natural devices with "
            f"at least {min_samples} samples ({len(ids)} in all)"
        )
    chosen = np.sort(rng.choice(eligible, n_devices, replace=False))
    parts = _by_device(index.astype(np.int64), len(ids))
    return [parts[i] for i in chosen]


def partition_flower(
    labels: IntArray,
    n_devices: int,
    *,
    rng: np.random.Generator,
    partitioner: str,
    arguments: Mapping[str, Any] | None = None,
    min_samples: int = 1,
) -> list[IntArray]:
    """Split with one of Flower's own partitioners (needs the package `flwr-datasets`).

    Parameters
    ----------
    partitioner : str
        Name of a class of `flwr_datasets.partitioner`, for example ``"DirichletPartitioner"``.
    arguments : mapping, optional
        Its further arguments; the number of partitions, the column of labels and a seed drawn
        from `rng` are filled in where it takes them.

    Returns
    -------
    list of ndarray of int64
        As `partition_iid`, except that some of Flower's partitioners drop samples.

    Raises
    ------
    ScenarioError
        If the package or the class is missing, or the class refuses its arguments.
    """
    _check_enough(len(labels), n_devices, min_samples)
    try:
        table = import_module("datasets").Dataset
        flower = import_module("flwr_datasets.partitioner")
    except ImportError as error:
        raise ScenarioError(
            "data.partition: flower needs the package flwr-datasets (pip install flwr-datasets)"
        ) from error
    make = getattr(flower, partitioner, None)
    if make is None:
        raise ScenarioError(f"data.partition.partitioner: flwr_datasets has no {partitioner!r}")
    known = inspect.signature(make).parameters
    usual = {
        "num_partitions": n_devices,
        "partition_by": "label",
        "seed": int(rng.integers(2**31)),
    }
    try:
        chosen = make(
            **{key: value for key, value in usual.items() if key in known} | dict(arguments or {})
        )
        chosen.dataset = table.from_dict({"index": np.arange(len(labels)), "label": labels})
        parts = [
            np.sort(np.asarray(chosen.load_partition(i)["index"], np.int64))
            for i in range(n_devices)
        ]
    except (TypeError, ValueError, KeyError) as error:
        raise ScenarioError(f"data.partition: {partitioner}: {error}") from error
    return _large_enough(parts, min_samples, partitioner)


def _proportions(rng: np.random.Generator, alpha: float, n: int) -> NDArray[np.float64]:
    """Draw from a symmetric Dirichlet; a tiny alpha that underflows picks one device."""
    drawn = rng.dirichlet(np.full(n, alpha))
    if not np.isfinite(drawn).all() or drawn.sum() == 0:
        drawn = np.zeros(n)
        drawn[rng.integers(n)] = 1.0
    return drawn


def _by_device(owner: IntArray, n_devices: int) -> list[IntArray]:
    """Return the indices that each device owns, ascending."""
    order = np.argsort(owner, kind="stable")
    bounds = np.cumsum(np.bincount(owner, minlength=n_devices))[:-1]
    return np.split(order, bounds)


def _fill_up(
    owner: IntArray, n_devices: int, min_samples: int, rng: np.random.Generator
) -> IntArray:
    """Move samples from the largest devices until every device has `min_samples`."""
    counts = np.bincount(owner, minlength=n_devices)
    wanting = np.maximum(min_samples - counts, 0)
    if not wanting.any():
        return owner
    shuffled = rng.permutation(len(owner))
    order = shuffled[np.argsort(owner[shuffled], kind="stable")]
    start = np.cumsum(counts) - counts
    rank = np.arange(len(owner)) - start[owner[order]]
    # The highest ranks within their device go first, so the largest devices shrink to one level.
    moved = order[np.argsort(-rank, kind="stable")[: wanting.sum()]]
    result = owner.copy()
    result[moved] = np.repeat(np.arange(n_devices), wanting)
    return result


def _large_enough(parts: list[IntArray], min_samples: int, kind: str) -> list[IntArray]:
    smallest = min(len(part) for part in parts)
    if smallest < min_samples:
        raise ScenarioError(
            f"data.partition: {kind} leaves a device with {smallest} samples, fewer than "
            f"min_samples: {min_samples}; use fewer devices or more data"
        )
    return parts


def _check_enough(n_samples: int, n_devices: int, min_samples: int) -> None:
    if n_devices < 1:
        raise ScenarioError(f"data.devices: {n_devices} is not at least 1")
    if min_samples < 1:
        raise ScenarioError(f"data.partition.min_samples: {min_samples} is not at least 1")
    if n_devices * min_samples > n_samples:
        raise ScenarioError(
            f"data.devices: {n_devices} devices with at least {min_samples} samples each need "
            f"{n_devices * min_samples} training samples, there are {n_samples}"
        )


def _check_positive(name: str, value: Any) -> None:
    if not value > 0 or not np.isfinite(value):
        raise ScenarioError(f"data.partition.{name}: {value} is not above 0")


def _check_classes(labels: NDArray[Any], kind: str) -> None:
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ScenarioError(
            f"data.partition: {kind} splits by class, but this data set has no class per sample; "
            "use iid, dirichlet_quantity or natural"
        )
