"""Image data sets: MNIST, Fashion-MNIST, CIFAR-10 and folders of pictures.

Images are uint8 with channels first, `(n, channels, height, width)`; they are normalised when a
batch is made, which takes a quarter of the memory.
"""

import gzip
import io
import math
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.data.datasets import Dataset, split_test
from fedsim.data.files import find, missing, need
from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = ["load_cifar10", "load_fashion_mnist", "load_image_folder", "load_mnist"]

_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_mnist(*, data_dir: Path | None = None) -> Dataset:
    """Return MNIST: 60,000 + 10,000 handwritten digits of 28x28 pixels.

    Parameters
    ----------
    data_dir : Path, optional
        Directory that holds `mnist/` (gzipped or plain IDX files), see `files.data_directories`.

    Raises
    ------
    ScenarioError
        If a file is missing or no IDX file.
    """
    return _load_idx("mnist", (0.1307,), (0.3081,), data_dir)


def load_fashion_mnist(*, data_dir: Path | None = None) -> Dataset:
    """Return Fashion-MNIST: 60,000 + 10,000 articles of clothing (see `load_mnist`)."""
    return _load_idx("fashion_mnist", (0.2860,), (0.3530,), data_dir)


def _load_idx(
    dataset: str, mean: tuple[float], std: tuple[float], data_dir: Path | None
) -> Dataset:
    x_train, y_train, x_test, y_test = (
        read_idx(need(dataset, part, data_dir))
        for part in ("train-images", "train-labels", "t10k-images", "t10k-labels")
    )
    return Dataset(
        dataset,
        x_train[:, None],
        y_train.astype(np.int64),
        x_test[:, None],
        y_test.astype(np.int64),
        n_classes=10,
        mean=mean,
        std=std,
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an IDX file of bytes, gzipped or not.

    Raises
    ------
    ScenarioError
        If it is no such file, or is cut off.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, n_dims = struct.unpack(">HBB", raw[:4])
        shape = struct.unpack(f">{n_dims}I", raw[4 : 4 + 4 * n_dims])
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise ScenarioError(f"data: cannot read {path}: {error}") from error
    if (zero, kind) != (0, 8) or len(raw) != 4 + 4 * n_dims + math.prod(shape):
        raise ScenarioError(f"data: {path} is not an IDX file of bytes, or is cut off")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


def load_cifar10(
    *, variant: Literal["batches", "jpeg", "6k"] = "batches", data_dir: Path | None = None
) -> Dataset:
    """Return CIFAR-10: 50,000 + 10,000 colour images of 32x32 pixels.

    Parameters
    ----------
    variant : {"batches", "jpeg", "6k"}
        The standard Python batches; all images as JPEG, slightly lossy (needs Pillow); or a
        balanced part of 5,000 + 1,000 images.
    data_dir : Path, optional
        See `load_mnist`.

    Raises
    ------
    ScenarioError
        If a file is missing or damaged.

    References
    ----------
    .. [1] A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """
    if variant == "batches":
        names = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
        if find("cifar10", names[0], data_dir) is None:
            raise missing("cifar10", (*names, "jpeg", "6k"), data_dir)
        parts = [_cifar_batch(need("cifar10", name, data_dir)) for name in names]
        x_train, y_train = (np.concatenate([p[i] for p in parts[:-1]]) for i in (0, 1))
        x_test, y_test = parts[-1]
    elif variant in ("jpeg", "6k"):
        with np.load(need("cifar10", variant, data_dir), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        x_train, x_test = (
            arrays[f"x_{part}"].transpose(0, 3, 1, 2)
            if variant == "6k"
            else _decode_jpeg(arrays[f"jpeg_{part}"], arrays[f"offset_{part}"])
            for part in ("train", "test")
        )
        y_train, y_test = arrays["y_train"], arrays["y_test"]
    else:
        raise ScenarioError(f"data.variant: {variant!r} is not one of batches, jpeg, 6k")
    return Dataset(
        "cifar10",
        x_train,
        y_train.astype(np.int64),
        x_test,
        y_test.astype(np.int64),
        n_classes=10,
        mean=_CIFAR_MEAN,
        std=_CIFAR_STD,
    )


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled numpy arrays and plain containers; anything else could run code."""

    _ALLOWED = frozenset(
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"holds {module}.{name}, which is no array")
        return super().find_class(module, name)


def _cifar_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        return batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"], np.int64)
    except (OSError, EOFError, pickle.UnpicklingError, KeyError, ValueError, TypeError) as error:
        raise ScenarioError(f"data: {path} is not a CIFAR-10 batch: {error}") from error


def _decode_jpeg(data: NDArray[np.uint8], offset: NDArray[np.int64]) -> NDArray[np.uint8]:
    from PIL import Image

    images = np.empty((len(offset) - 1, 32, 32, 3), np.uint8)
    for i in range(len(images)):
        with Image.open(io.BytesIO(data[offset[i] : offset[i + 1]].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return images.transpose(0, 3, 1, 2)


_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}


def load_image_folder(
    *,
    path: str | Path,
    size: int = 32,
    colour: bool = True,
    test_fraction: float = 0.25,
    seed: int = 0,
    data_dir: Path | None = None,
) -> Dataset:
    """Return pictures from folders named after their classes.

    Parameters
    ----------
    path : str or Path
        Holds `train/CLASS/*.png` and `test/CLASS/*.png`, or `CLASS/*.png` alone: then
        `test_fraction` of the pictures become the test set. Also JPEG and other usual formats.
    size : int
        Height and width that pictures are scaled to.
    colour : bool
        Three channels, or one of grey.
    test_fraction, seed
        See `datasets.load_digits`.
    data_dir : Path, optional
        Where a relative `path` is looked for if it is not found from the working directory.

    Raises
    ------
    ScenarioError
        If there are no folders of pictures, or a picture cannot be read.
    """
    root = Path(path)
    if not root.is_dir() and data_dir is not None:
        root = Path(data_dir) / path
    if not root.is_dir():
        raise ScenarioError(
            f"data.dataset.path: no directory {str(path)!r} (looked for {root.absolute()})"
        )
    is_split = (root / "train").is_dir() and (root / "test").is_dir()
    classes = sorted(p.name for p in (root / "train" if is_split else root).iterdir() if p.is_dir())
    if len(classes) < 2:
        raise ScenarioError(
            f"data.dataset.path: {root} holds {len(classes)} class folders, 2 are needed"
        )
    if is_split:
        x_train, y_train = _read_folders(root / "train", classes, size, colour)
        x_test, y_test = _read_folders(root / "test", classes, size, colour)
    else:
        x, y = _read_folders(root, classes, size, colour)
        x_train, y_train, x_test, y_test = split_test(
            x, y, test_fraction=test_fraction, rng=stream(seed, "test-split")
        )
    half = (0.5,) * (3 if colour else 1)
    return Dataset(root.name, x_train, y_train, x_test, y_test, len(classes), mean=half, std=half)


def _read_folders(
    root: Path, classes: list[str], size: int, colour: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    from PIL import Image, UnidentifiedImageError

    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((root / name).glob("*")):
            if file.suffix.lower() not in _PICTURES:
                continue
            try:
                with Image.open(file) as image:
                    scaled = image.convert("RGB" if colour else "L").resize((size, size))
                    images.append(np.asarray(scaled).reshape(size, size, -1))
            except (OSError, UnidentifiedImageError) as error:
                raise ScenarioError(f"data: cannot read the picture {file}: {error}") from error
            labels.append(label)
    if not images:
        raise ScenarioError(f"data.dataset.path: no pictures in the class folders of {root}")
    return np.stack(images).transpose(0, 3, 1, 2), np.array(labels, np.int64)
