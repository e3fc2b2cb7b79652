"""All devices' data side by side in one tensor, ready for the trainer."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.datasets import Dataset
from fedsim.errors import ScenarioError

__all__ = ["DeviceData", "FederatedData", "federate"]

IntArray = NDArray[np.int64]


class DeviceData(Protocol):
    """What training asks of data: `FederatedData` holds all, `StreamedData` draws it when asked."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def size(self) -> IntArray: ...  # noqa: D102
    @property
    def x_test(self) -> Tensor: ...  # noqa: D102
    @property
    def y_test(self) -> Tensor: ...  # noqa: D102
    @property
    def n_classes(self) -> int: ...  # noqa: D102
    @property
    def n_devices(self) -> int: ...  # noqa: D102
    @property
    def input_shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def mean(self) -> tuple[float, ...] | None: ...  # noqa: D102
    @property
    def std(self) -> tuple[float, ...] | None: ...  # noqa: D102

    def pack(self, devices: IntArray) -> tuple[Tensor, Tensor, IntArray]:
        """Return x, y that hold the devices' training samples, and each device's first row."""

    def local_set(
        self, devices: IntArray, split: Literal["train", "test"]
    ) -> tuple[Tensor, Tensor, IntArray, IntArray]:
        """Return x, y, and for each device the first row and the number of its samples."""

    def label_counts(self) -> IntArray:
        """Return how many training samples of each class each device holds."""


@dataclass(frozen=True, slots=True)
class FederatedData:
    """What every device holds, and the sets that models are judged by.

    Parameters
    ----------
    name : str
    x : Tensor, shape (n_samples, *input_shape)
    y : Tensor, shape (n_samples,) or (n_samples, length)
    start, size : ndarray of int64, shape (n_devices,)
        Device i trains on rows `start[i] : start[i] + size[i]`.
    x_test, y_test : Tensor
        The global test set.
    n_classes : int
        0 for a regression.
    x_validation, y_validation : Tensor, optional
    local_test_start, local_test_size : ndarray of int64, optional
        Rows of `x` that each device keeps for its own test (personalisation).
    mean, std : tuple of float, optional
        For uint8 images: normalisation for each channel, applied when a batch is made.
    """

    name: str
    x: Tensor
    y: Tensor
    start: IntArray
    size: IntArray
    x_test: Tensor
    y_test: Tensor
    n_classes: int
    x_validation: Tensor | None = None
    y_validation: Tensor | None = None
    local_test_start: IntArray | None = None
    local_test_size: IntArray | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def n_devices(self) -> int:
        """Number of devices."""
        return len(self.size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.x_test.shape[1:])

    def pack(self, devices: IntArray) -> tuple[Tensor, Tensor, IntArray]:
        """Return x, y and the first row of each of the devices (no copy)."""
        return self.x, self.y, self.start[devices]

    def local_set(
        self, devices: IntArray, split: Literal["train", "test"]
    ) -> tuple[Tensor, Tensor, IntArray, IntArray]:
        """Return x, y, and for each device the first row and number of its own samples.

        Raises
        ------
        ScenarioError
            If a local test set is asked for and there is none.
        """
        if split == "train":
            return self.x, self.y, self.start[devices], self.size[devices]
        if self.local_test_start is None or self.local_test_size is None:
            raise ScenarioError(
                "evaluation: the devices have no test samples of their own; "
                "set data.local_test_fraction"
            )
        return self.x, self.y, self.local_test_start[devices], self.local_test_size[devices]

    def label_counts(self) -> IntArray:
        """Return how many training samples of each class each device holds.

        Returns
        -------
        ndarray of int64, shape (n_devices, n_classes)
            No columns for a regression.
        """
        if self.n_classes == 0:
            return np.zeros((self.n_devices, 0), np.int64)
        per_sample = self.y[0].numel() if len(self.y) else 1
        device = np.repeat(np.arange(self.n_devices), self.size)
        offset = np.arange(len(device)) - np.repeat(np.cumsum(self.size) - self.size, self.size)
        labels = self.y.reshape(len(self.y), -1).cpu().numpy()[self.start[device] + offset]
        cell = np.repeat(device, per_sample) * self.n_classes + labels.reshape(-1)
        counts = np.bincount(cell, minlength=self.n_devices * self.n_classes)
        return counts.reshape(self.n_devices, self.n_classes).astype(np.int64)


def federate(
    dataset: Dataset,
    parts: list[IntArray],
    *,
    local_test_fraction: float = 0.0,
    rng: np.random.Generator | None = None,
) -> FederatedData:
    """Lay the devices' samples side by side.

    Parameters
    ----------
    dataset : Dataset
    parts : list of ndarray of int64
        Indices of the training samples of each device, as a partitioner gives them.
    local_test_fraction : float
        Share of its samples that a device keeps for its own test; at least one sample trains.
    rng : numpy.random.Generator, optional
        Chooses those; needed only then.

    Raises
    ------
    ScenarioError
        If a device is empty.
    """
    size = np.array([len(part) for part in parts], np.int64)
    empty = np.flatnonzero(size == 0)
    if len(empty):
        raise ScenarioError(f"data: device {empty[0]} holds no sample ({len(empty)} such devices)")
    test_size = None
    if local_test_fraction:
        if not 0 < local_test_fraction < 1 or rng is None:
            raise ScenarioError(f"data.local_test_fraction: {local_test_fraction:g} not in [0, 1)")
        parts = [rng.permutation(part) for part in parts]
        test_size = np.minimum(np.rint(size * local_test_fraction).astype(np.int64), size - 1)
    index = np.concatenate(parts)
    start = np.cumsum(size) - size
    train_size = size if test_size is None else size - test_size
    x_validation, y_validation = dataset.x_validation, dataset.y_validation
    return FederatedData(
        name=dataset.name,
        x=_tensor(dataset.x_train[index]),
        y=_tensor(dataset.y_train[index]),
        start=start,
        size=train_size,
        x_test=_tensor(dataset.x_test),
        y_test=_tensor(dataset.y_test),
        n_classes=dataset.n_classes,
        x_validation=None if x_validation is None else _tensor(x_validation),
        y_validation=None if y_validation is None else _tensor(y_validation),
        local_test_start=None if test_size is None else start + train_size,
        local_test_size=test_size,
        mean=dataset.mean,
        std=dataset.std,
    )


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor of its own memory: torch warns about read-only arrays."""
    if array.dtype.kind in "iu" and array.dtype != np.uint8:
        array = array.astype(np.int64)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
