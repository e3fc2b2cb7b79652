"""Data sets as plain arrays: what was measured, its labels, and a test set.

Every loader is `load_x(*, ..., data_dir=None, seed=0) -> Dataset` and takes only what it needs:
`test_fraction` and `seed` where there is no official test set, `data_dir` where files are read.
"""

import zipfile
import zlib
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = ["Dataset", "hold_out", "load_digits", "load_npz", "shorten", "split_test"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples with labels, checked when made.

    Parameters
    ----------
    name : str
    x_train, x_test : ndarray, shape (n_samples, *input_shape)
        Floats, integer tokens, or uint8 images (then `mean` and `std` say how to normalise).
    y_train, y_test : ndarray, shape (n_samples,), or (n_samples, length) for sequences
        Classes 0..n_classes-1 as int64, or float targets when `n_classes` is 0.
    n_classes : int
        0 for a regression.
    device_train : ndarray of int64, shape (n_train,), optional
        The device that each training sample belongs to by nature: a writer, a speaker.
    x_validation, y_validation : ndarray, optional
        Samples held out of the training part (`hold_out`).
    mean, std : tuple of float, optional
        For uint8 images: `(x / 255 - mean) / std` for each channel, applied when a batch is made.

    Raises
    ------
    ScenarioError
        If lengths differ, a value is not finite or a label is not one of the classes.
    """

    name: str
    x_train: NDArray[Any]
    y_train: NDArray[Any]
    x_test: NDArray[Any]
    y_test: NDArray[Any]
    n_classes: int
    device_train: IntArray | None = None
    x_validation: NDArray[Any] | None = None
    y_validation: NDArray[Any] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.device_train is not None and len(self.device_train) != len(self.y_train):
            raise ScenarioError(
                f"data set {self.name!r}: device_train has {len(self.device_train)} entries "
                f"for {len(self.y_train)} training samples"
            )
        for part, x, y in self._parts():
            if len(x) != len(y):
                raise ScenarioError(
                    f"data set {self.name!r}: x_{part} has {len(x)} samples, y_{part} has {len(y)}"
                )
            if part != "validation" and not len(x):
                raise ScenarioError(f"data set {self.name!r}: x_{part} has no samples")
            if x.shape[1:] != self.x_train.shape[1:] or x.dtype != self.x_train.dtype:
                raise ScenarioError(
                    f"data set {self.name!r}: a sample of x_{part} is {x.dtype}{x.shape[1:]}, one "
                    f"of x_train {self.x_train.dtype}{self.x_train.shape[1:]}"
                )
            _check_finite(self.name, f"x_{part}", x)
            _check_finite(self.name, f"y_{part}", y)
            if self.n_classes:
                _check_labels(self.name, f"y_{part}", y, self.n_classes)

    def _parts(self) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
        parts = [("train", self.x_train, self.y_train), ("test", self.x_test, self.y_test)]
        if self.x_validation is not None and self.y_validation is not None:
            parts.append(("validation", self.x_validation, self.y_validation))
        return parts

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self.x_train.shape[1:]


def _check_finite(name: str, key: str, values: NDArray[Any]) -> None:
    if values.dtype.kind not in "fiub":
        raise ScenarioError(
            f"data set {name!r}: {key} has dtype {values.dtype}, numbers are needed"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))[0])
        raise ScenarioError(f"data set {name!r}: {key} holds NaN or infinity, first in row {row}")


def _check_labels(name: str, key: str, labels: NDArray[Any], n_classes: int) -> None:
    if labels.dtype.kind not in "iu":
        raise ScenarioError(f"data set {name!r}: {key} has dtype {labels.dtype}, not integers")
    if labels.size and (labels.min() < 0 or labels.max() >= n_classes):
        raise ScenarioError(
            f"data set {name!r}: {key} holds labels {labels.min()}..{labels.max()}; "
            f"{n_classes} classes need labels 0..{n_classes - 1}"
        )


def split_test(
    x: NDArray[Any], y: NDArray[Any], *, test_fraction: float, rng: np.random.Generator
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return x_train, y_train, x_test, y_test: a random share of the samples becomes the test set.

    Raises
    ------
    ScenarioError
        If `test_fraction` is not between 0 and 1, or leaves one of the two parts empty.
    """
    n_test = _share(len(y), test_fraction, "test_fraction")
    if not 0 < n_test < len(y):
        raise ScenarioError(
            f"data.test_fraction: {test_fraction:g} of {len(y)} samples leaves a part empty"
        )
    order = rng.permutation(len(y))
    # Sorted: the order of a split's members is then that of the source.
    test, train = np.sort(order[:n_test]), np.sort(order[n_test:])
    return x[train], y[train], x[test], y[test]


def _share(n: int, fraction: float, key: str) -> int:
    if not 0 <= fraction < 1:
        raise ScenarioError(f"data.{key}: {fraction:g} is not in [0, 1)")
    return round(n * fraction)


def hold_out(dataset: Dataset, *, validation_fraction: float, seed: int) -> Dataset:
    """Return the data set with a random share of its training samples as validation set.

    Raises
    ------
    ScenarioError
        If the fraction is not in [0, 1) or leaves no training sample.
    """
    n = len(dataset.y_train)
    n_validation = _share(n, validation_fraction, "validation_fraction")
    if n_validation == 0:
        return dataset
    if n_validation == n:
        raise ScenarioError(
            f"data.validation_fraction: {validation_fraction:g} of {n} samples leaves none to train"
        )
    order = stream(seed, "validation-split").permutation(n)
    held, kept = np.sort(order[:n_validation]), np.sort(order[n_validation:])
    return replace(
        dataset,
        x_train=dataset.x_train[kept],
        y_train=dataset.y_train[kept],
        device_train=None if dataset.device_train is None else dataset.device_train[kept],
        x_validation=dataset.x_train[held],
        y_validation=dataset.y_train[held],
    )


def shorten(dataset: Dataset, *, samples: int, seed: int) -> Dataset:
    """Return the data set with at most `samples` (1 or more) random test and validation samples.

    The choice depends on `seed` and the part alone.
    """
    chosen = {
        part: np.sort(stream(seed, f"{part}-samples").permutation(len(y))[:samples])
        for part, _, y in dataset._parts()
        if part != "train"
    }
    return replace(
        dataset,
        **{
            f"{axis}_{part}": getattr(dataset, f"{axis}_{part}")[rows]
            for part, rows in chosen.items()
            for axis in "xy"
        },
    )


def load_digits(
    *, test_fraction: float = 0.25, seed: int = 0, data_dir: Path | None = None
) -> Dataset:
    """Return scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, 10 classes.

    Parameters
    ----------
    test_fraction : float
        Share of the samples that becomes the test set.
    seed : int
        Chooses the test samples.
    data_dir : Path, optional
        Not needed: the images come with scikit-learn.

    Returns
    -------
    Dataset
        x float32, shape (n, 64), in [0, 1].

    References
    ----------
    .. [1] E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    x, y = _sklearn_digits()
    x_train, y_train, x_test, y_test = split_test(
        (x / 16.0).astype(np.float32),
        y.astype(np.int64),
        test_fraction=test_fraction,
        rng=stream(seed, "test-split"),
    )
    return Dataset("digits", x_train, y_train, x_test, y_test, n_classes=10)


def _sklearn_digits() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return scikit-learn's digits, images (1797, 64) and labels, from the file it reads itself.

    To import its data sets takes as long as PyTorch does; only where the file has moved are they.
    """
    spec = find_spec("sklearn")
    file = Path((spec and spec.origin) or "").parent / "datasets" / "data" / "digits.csv.gz"
    if not file.exists():
        from sklearn.datasets import load_digits as sklearn_digits

        images, labels = sklearn_digits(return_X_y=True)
        return images, labels
    table = np.loadtxt(file, delimiter=",")
    return table[:, :-1], table[:, -1]


_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(*, path: str | Path, data_dir: Path | None = None) -> Dataset:
    """Return your own data from one `.npz` file.

    Parameters
    ----------
    path : str or Path
        File with `x_train, y_train, x_test, y_test` and optionally `device_train`, the id of the
        device that holds each training sample. Integer labels must be 0..C-1 (a classification);
        float `y` makes a regression. float64 inputs stay float64, uint8 images become [0, 1].
    data_dir : Path, optional
        Where a relative `path` is looked for if it is not found from the working directory.

    Raises
    ------
    ScenarioError
        If the file is missing, unreadable or lacks a key, or its content is inconsistent.
    """
    found = Path(path)
    if not found.exists() and data_dir is not None:
        found = Path(data_dir) / path
    if not found.is_file():
        raise ScenarioError(
            f"data.dataset.path: no file {str(path)!r} (looked for {found.absolute()})"
        )
    if not zipfile.is_zipfile(found):
        raise ScenarioError(f"data.dataset.path: {found} is no .npz file")
    try:
        with np.load(found, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in (*_NPZ_KEYS, "device_train")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ScenarioError(f"data.dataset.path: cannot read {found} as .npz: {error}") from error
    missing = [key for key in _NPZ_KEYS if key not in arrays]
    if missing:
        raise ScenarioError(
            f"data.dataset.path: {found} lacks {', '.join(missing)}; needed are "
            f"{', '.join(_NPZ_KEYS)} and optionally device_train"
        )
    scalar = [key for key in arrays if arrays[key].ndim == 0]
    if scalar:
        raise ScenarioError(
            f"data.dataset.path: {scalar[0]} in {found} is a single number, not an array"
        )
    for key in ("x_train", "x_test"):
        if arrays[key].dtype == np.uint8:
            arrays[key] = arrays[key].astype(np.float32) / 255
        elif arrays[key].dtype == np.float16:
            arrays[key] = arrays[key].astype(np.float32)
    n_classes = 0
    if arrays["y_train"].dtype.kind in "iu":
        n_classes = _count_classes(found.stem, arrays["y_train"], arrays["y_test"])
        arrays["y_train"] = arrays["y_train"].astype(np.int64)
        if arrays["y_test"].dtype.kind in "iu":
            arrays["y_test"] = arrays["y_test"].astype(np.int64)
    device = arrays.get("device_train")
    if device is not None:
        if device.dtype.kind not in "iu":
            raise ScenarioError(f"data set {found.stem!r}: device_train must hold integers")
        device = device.astype(np.int64)
    return Dataset(
        found.stem,
        arrays["x_train"],
        arrays["y_train"],
        arrays["x_test"],
        arrays["y_test"],
        n_classes,
        device,
    )


def _count_classes(name: str, y_train: NDArray[Any], y_test: NDArray[Any]) -> int:
    """Return C for labels that are exactly 0..C-1 in the training part."""
    present = np.unique(y_train)
    if not np.array_equal(present, np.arange(len(present))):
        shown = ", ".join(str(value) for value in present[:6])
        raise ScenarioError(
            f"data set {name!r}: labels must be 0..C-1, y_train holds {shown}"
            f"{', …' if len(present) > 6 else ''}"
        )
    return max(len(present), 2)
