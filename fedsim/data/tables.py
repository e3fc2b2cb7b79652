"""Data sets for convex studies, and text: a9a, w8a, LIBSVM's format, Shakespeare's speakers."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedsim.data.clusters import cluster, rebalance
from fedsim.data.datasets import Dataset, split_test
from fedsim.data.files import find, need
from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = ["clustered", "load_a9a", "load_libsvm", "load_tinyshakespeare", "load_w8a"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Workers = Literal["none", "published", "clusters"]


def load_a9a(
    *,
    standardise: bool = False,
    bias: bool = False,
    workers: Workers = "none",
    n_devices: int = 20,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Dataset:
    """Return a9a: 32,561 + 16,281 people of the 1994 census, 123 binary features, income above 50k.

    Parameters
    ----------
    standardise : bool
        Give each feature mean 0 and deviation 1 over the training samples.
    bias : bool
        Put a column of ones first (for models without a bias of their own).
    workers : {"none", "published", "clusters"}
        Who holds what by nature, for `partition: natural`. `published`: the split over 20 workers
        of [1]_ (clusters of a t-SNE embedding, rebalanced). `clusters`: k-means of the standardised
        features, one group for each of `n_devices`, rebalanced (`clusters.cluster`).
    n_devices, seed
        Of `clusters`.
    data_dir : Path, optional
        Directory that holds `a9a/a9a.npz`, or LIBSVM's text files `a9a` and `a9a.t`.

    Returns
    -------
    Dataset
        x float64, shape (n, 123) or (n, 124); classes 0 and 1 (LIBSVM's -1 and +1).

    Raises
    ------
    ScenarioError
        If a file is missing or damaged, or the published split is not of these samples.

    References
    ----------
    .. [1] Philippenko, Dieuleveut, "Preserved central model for faster bidirectional compression in
       distributed settings", NeurIPS 2021.
    """
    x, y = _sparse("a9a", "train", 123, data_dir)
    x_test, y_test = _sparse("a9a", "test", 123, data_dir)
    device = _workers(x, workers, n_devices, seed)
    return _binary("a9a", x, y, x_test, y_test, standardise, bias, device)


def load_w8a(
    *,
    standardise: bool = False,
    bias: bool = False,
    workers: Literal["none", "clusters"] = "none",
    n_devices: int = 20,
    test_fraction: float = 0.2,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Dataset:
    """Return w8a: 49,749 web pages, 300 binary features, 3 % of class 1 (see `load_a9a`).

    Parameters
    ----------
    workers : {"none", "clusters"}
        Of the published split no record is known.
    test_fraction, seed
        Used if the official test part (`w8a.t`) is not there, see `datasets.load_digits`.
    """
    x, y = _sparse("w8a", "train", 300, data_dir)
    if find("w8a", "test", data_dir) is not None:
        x_test, y_test = _sparse("w8a", "test", 300, data_dir)
    else:
        x, y, x_test, y_test = split_test(
            x, y, test_fraction=test_fraction, rng=stream(seed, "test-split")
        )
    device = _workers(x, workers, n_devices, seed)
    return _binary("w8a", x, y, x_test, y_test, standardise, bias, device)


def load_libsvm(
    *,
    path: str | Path,
    standardise: bool = False,
    bias: bool = False,
    workers: Literal["none", "file", "clusters"] = "none",
    n_devices: int = 20,
    test_fraction: float = 0.25,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Dataset:
    """Return samples of two classes from a file of one's own (see `load_a9a`).

    Parameters
    ----------
    path : str or Path
        LIBSVM's text, or an ``.npz`` of compressed sparse rows: ``indptr``, ``indices``, ``data``,
        ``shape``, labels ``y`` (positive or not) and, for `workers`, a ``cluster`` for each sample.
    workers : {"none", "file", "clusters"}
        `file`: the file's clusters, one for each device, rebalanced (`clusters.rebalance`).
    test_fraction : float
        Share of the samples kept for testing; 0 tests on the training samples.
    data_dir : Path, optional
        Where a relative `path` is looked for if it is not found from the working directory.

    Raises
    ------
    ScenarioError
        If the file is missing or damaged, or its clusters are not those of the devices.
    """
    file = Path(path)
    if not file.is_file() and data_dir is not None:
        file = Path(data_dir) / path
    if not file.is_file():
        raise ScenarioError(
            f"data.dataset.path: no file {str(path)!r} (looked for {file.absolute()})"
        )
    if workers not in ("none", "file", "clusters"):
        raise ScenarioError(f"data.dataset.workers: {workers!r} is not one of none, file, clusters")
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as opened:
                arrays = dict(opened)
        else:
            arrays = _from_text(file)
    except (OSError, ValueError, BadZipFile) as error:
        raise ScenarioError(f"data.dataset.path: cannot read {file}: {error}") from error
    name = f"data.dataset.path: {file}"
    x, y = _dense(name, arrays)
    place = np.arange(len(y))[:, None]
    train, y_train, test, y_test = place, y, place, y
    if test_fraction:
        rng = stream(seed, "test-split")
        train, y_train, test, y_test = split_test(place, y, test_fraction=test_fraction, rng=rng)
    x_train, x_test = x[train[:, 0]], x[test[:, 0]]
    device = None
    if workers == "clusters":
        device = cluster(_standardised(x_train, x_train), n_devices, seed=seed)
    elif workers == "file":
        device = rebalance(_groups(name, arrays, n_devices)[train[:, 0]], n_devices)
    return _binary(file.stem, x_train, y_train, x_test, y_test, standardise, bias, device)


def clustered(name: str, arrays: Mapping[str, NDArray[Any]]) -> Dataset:
    """Return a problem as published studies prepare it: standardised, with a bias, rebalanced.

    Parameters
    ----------
    name : str
        Of the file, for errors.
    arrays : mapping
        See `load_libsvm`; the test set is the training set.

    Raises
    ------
    ScenarioError
        If they do not fit together.
    """
    x, y = _dense(name, arrays)
    groups = _groups(name, arrays, None)
    device = rebalance(groups, int(groups.max()) + 1)
    return _binary(name, x, y, x, y, True, True, device)


def _from_text(file: Path) -> dict[str, NDArray[Any]]:
    from sklearn.datasets import load_svmlight_file

    rows, y = load_svmlight_file(str(file))
    parts = {"indptr": rows.indptr, "indices": rows.indices, "data": rows.data, "y": y}
    return parts | {"shape": np.array(rows.shape)}


def _dense(name: str, arrays: Mapping[str, NDArray[Any]]) -> tuple[FloatArray, IntArray]:
    """Return dense features and classes 0, 1 of compressed sparse rows."""
    needed = ("indptr", "indices", "data", "shape", "y")
    if missing := [key for key in needed if key not in arrays]:
        raise ScenarioError(f"{name}: has no array {missing[0]!r}, only {', '.join(arrays)}")
    indptr, indices, data, shape, y = (arrays[key] for key in needed)
    if any(arrays[key].dtype.kind not in "fiu" for key in needed):
        raise ScenarioError(f"{name}: {', '.join(needed)} must be numbers")
    if shape.shape != (2,) or len(indptr) != shape[0] + 1 or len(y) != shape[0]:
        raise ScenarioError(
            f"{name}: {len(indptr) - 1} rows and {len(y)} labels do not fit the shape "
            f"{shape.tolist()}"
        )
    counts = np.diff(indptr)
    fits = len(indices) == len(data) == indptr[-1] and (counts >= 0).all() and indptr[0] == 0
    if not (fits and len(y) and (indices >= 0).all() and (indices < shape[1]).all()):
        raise ScenarioError(f"{name}: indptr, indices and data are no rows of that shape")
    x = np.zeros((int(shape[0]), int(shape[1])))
    x[np.repeat(np.arange(len(y)), counts), indices] = data
    if not np.isfinite(x).all():
        raise ScenarioError(f"{name}: data has entries that are not finite")
    return x, (y > 0).astype(np.int64)


def _groups(name: str, arrays: Mapping[str, NDArray[Any]], n_devices: int | None) -> IntArray:
    """Return the cluster of each sample; all numbers from 0 on are there."""
    if "cluster" not in arrays:
        raise ScenarioError(f"{name}: has no array 'cluster', only {', '.join(arrays)}")
    groups: IntArray = arrays["cluster"].astype(np.int64)
    found = np.unique(groups)
    n = len(found) if n_devices is None else n_devices
    if groups.shape != arrays["y"].shape or not np.array_equal(found, np.arange(n)):
        raise ScenarioError(
            f"{name}: cluster must give each of {len(arrays['y'])} samples a number from 0 to "
            f"{n - 1}, each at least once; it has {len(groups)} of {found[:3].tolist()}..."
            f"{found[-1:].tolist()}"
        )
    return groups


def _workers(x: FloatArray, workers: Workers, n_devices: int, seed: int) -> IntArray | None:
    """Return the device that holds each training sample by nature, if any."""
    if workers == "none":
        return None
    if workers == "clusters":
        return cluster(_standardised(x, x), n_devices, seed=seed)
    if workers != "published":
        raise ScenarioError(
            f"data.dataset.workers: {workers!r} is not one of none, published, clusters"
        )
    with resources.files("fedsim").joinpath("reference", "a9a_workers.npz").open("rb") as file:
        known: IntArray = np.load(file)["worker"].astype(np.int64)
    if len(known) != len(x) or n_devices != 20:
        raise ScenarioError(
            f"data.dataset.workers: the published split is of {len(known)} samples over 20 "
            f"devices, not of {len(x)} over {n_devices}"
        )
    return known


def _standardised(x: FloatArray, like: FloatArray) -> FloatArray:
    """Return x, shifted and scaled as gives the columns of `like` mean 0 and deviation 1."""
    std = like.std(0)
    std[std == 0] = 1.0
    result: FloatArray = (x - like.mean(0)) / std
    return result


def _sparse(
    dataset: str, part: str, n_features: int, data_dir: Path | None
) -> tuple[FloatArray, IntArray]:
    """Return dense features and classes 0, 1, from .npz (CSR of ones) or LIBSVM text."""
    path = need(dataset, part, data_dir)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                indices, indptr = file[f"indices_{part}"], file[f"indptr_{part}"]
                labels = file[f"y_{part}"]
            x = np.zeros((len(labels), n_features))
            x[np.repeat(np.arange(len(labels)), np.diff(indptr)), indices] = 1.0
        else:
            from sklearn.datasets import load_svmlight_file

            sparse, labels = load_svmlight_file(str(path), n_features=n_features)
            x = np.asarray(sparse.toarray())
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise ScenarioError(f"data: cannot read {path}: {error}") from error
    return x, (labels > 0).astype(np.int64)


def _binary(
    name: str,
    x_train: FloatArray,
    y_train: IntArray,
    x_test: FloatArray,
    y_test: IntArray,
    standardise: bool,
    bias: bool,
    device_train: IntArray | None,
) -> Dataset:
    if standardise:
        x_train, x_test = _standardised(x_train, x_train), _standardised(x_test, x_train)
    if bias:
        x_train, x_test = (np.insert(x, 0, 1.0, axis=1) for x in (x_train, x_test))
    return Dataset(name, x_train, y_train, x_test, y_test, 2, device_train)


def load_tinyshakespeare(
    *, length: int = 80, test_fraction: float = 0.1, data_dir: Path | None = None
) -> Dataset:
    """Return lines of Shakespeare's plays by speaker, for next-character prediction.

    Parameters
    ----------
    length : int
        Characters of a sample; its targets are the characters that follow each of them.
    test_fraction : float
        The last share of each speaker's samples becomes the test set (by time, as in LEAF).
    data_dir : Path, optional
        Directory that holds `tinyshakespeare/input.txt`.

    Returns
    -------
    Dataset
        x, y int64, shape (n, length): the 65 characters in code order; `device_train` is the
        speaker, in order of first appearance. Speakers with fewer than `length + 1` characters
        have no sample.

    Raises
    ------
    ScenarioError
        If the file is missing, or no speaker says enough.

    References
    ----------
    .. [1] Caldas et al., "LEAF: a benchmark for federated settings", 2018.
    """
    if length < 1 or not 0 <= test_fraction < 1:
        raise ScenarioError(
            f"data: length: {length}, test_fraction: {test_fraction:g} are out of range"
        )
    text = need("tinyshakespeare", "text", data_dir).read_text(encoding="utf-8")
    symbols = np.array(sorted(set(text)))
    spoken = _by_speaker(text)
    x: list[Any] = []
    device: list[int] = []
    is_test: list[bool] = []
    for speaker, said in enumerate(spoken.values()):
        codes = np.searchsorted(symbols, np.array(list(said)))
        n = (len(codes) - 1) // length
        x += [codes[i * length : (i + 1) * length + 1] for i in range(n)]
        device += [speaker] * n
        n_test = int(n * test_fraction)
        is_test += [False] * (n - n_test) + [True] * n_test
    if not x or not any(is_test):
        raise ScenarioError(f"data: no speaker says {length + 1} characters for training and test")
    windows, test = np.stack(x).astype(np.int64), np.array(is_test)
    train = ~test
    return Dataset(
        "tinyshakespeare",
        windows[train, :-1],
        windows[train, 1:],
        windows[test, :-1],
        windows[test, 1:],
        n_classes=len(symbols),
        device_train=np.array(device)[train],
    )


def _by_speaker(text: str) -> dict[str, str]:
    """Return what each speaker says in all, by name, in order of first appearance."""
    spoken: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        name, _, said = block.strip("\n").partition(":\n")
        if said:
            spoken.setdefault(name, []).append(said)
    return {name: "\n".join(parts) for name, parts in spoken.items()}
