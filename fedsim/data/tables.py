"""Data sets for convex studies, and text: a9a, w8a, Shakespeare's speakers."""

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.data.clusters import cluster
from fedsim.data.datasets import Dataset, split_test
from fedsim.data.files import find, need
from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = ["load_a9a", "load_tinyshakespeare", "load_w8a"]

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
