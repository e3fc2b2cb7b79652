"""Made-up data: convex problems with known answers, and any number of devices.

`load_synthetic` can serve a million registered devices: a device's samples come from its own
random stream whenever it takes part, so memory grows with the devices of a round.
"""

from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedsim.data.datasets import Dataset
from fedsim.data.federated import FederatedData
from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = [
    "StreamedData",
    "SyntheticSpec",
    "load_least_squares",
    "load_logistic",
    "load_quadratic",
    "load_synthetic",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
# Below this all samples are made at once; above, when a device takes part.
_RESIDENT_BYTES = 256 * 2**20
_TEST_DEVICES, _TEST_SAMPLES = 200, 10


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """Synthetic(α, β): how a device's classification task is drawn.

    Device k labels x by argmax(W x + b), with W, b ~ N(u, 1), u ~ N(0, α); its x ~ N(v, Σ), Σ
    diagonal with j^-1.2, v ~ N(B, 1), B ~ N(0, β).

    Parameters
    ----------
    alpha : float
        Variance of the tasks' means (the authors' program takes it for a standard deviation; the
        same for 0 and 1).
    beta : float
        Variance of the inputs' means.
    iid : bool
        One task for all, inputs around 0: `alpha` and `beta` do not count.
    n_features, n_classes : int

    References
    ----------
    .. [1] Li et al., "Federated optimization in heterogeneous networks", MLSys 2020, section 5.1.
    """

    alpha: float = 1.0
    beta: float = 1.0
    iid: bool = False
    n_features: int = 60
    n_classes: int = 10

    def task(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Draw W (n_classes, n_features), b (n_classes,) and v (n_features,)."""
        u = 0.0 if self.iid else rng.normal(0, np.sqrt(self.alpha))
        w = rng.normal(u, 1, (self.n_classes, self.n_features))
        b = rng.normal(u, 1, self.n_classes)
        v = rng.normal(rng.normal(0, np.sqrt(self.beta)), 1, self.n_features)
        return w, b, np.zeros_like(v) if self.iid else v

    def samples(self, seed: int, device: int, n: int, purpose: str) -> tuple[FloatArray, IntArray]:
        """Draw n samples of a device; `purpose` tells training from test samples."""
        w, b, v = self.task(stream(seed, "synthetic-task", 0 if self.iid else device))
        scale = np.arange(1, self.n_features + 1) ** -0.6
        rng = stream(seed, purpose, device)
        x = v + scale * rng.standard_normal((n, self.n_features))
        return x, np.argmax(x @ w.T + b, axis=1)


@dataclass(frozen=True, slots=True)
class StreamedData:
    """Data of devices that are made when asked for (see `federated.DeviceData`).

    Parameters
    ----------
    name : str
    spec : SyntheticSpec
    seed : int
    size : ndarray of int64, shape (n_devices,)
    x_test, y_test : Tensor
        Samples of some of the devices, other than those they train on.
    """

    name: str
    spec: SyntheticSpec
    seed: int
    size: IntArray
    x_test: Tensor
    y_test: Tensor
    mean: None = None
    std: None = None
    x_validation: None = None
    y_validation: None = None

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return self.spec.n_classes

    @property
    def n_devices(self) -> int:
        """Number of registered devices."""
        return len(self.size)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.spec.n_features,)

    def pack(self, devices: IntArray) -> tuple[Tensor, Tensor, IntArray]:
        """Make the devices' samples; return x, y and the first row of each device."""
        unique, inverse = np.unique(devices, return_inverse=True)
        size = self.size[unique]
        start = np.cumsum(size) - size
        x = np.empty((int(size.sum()), self.spec.n_features), np.float32)
        y = np.empty(len(x), np.int64)
        for device, begin, n in zip(unique.tolist(), start.tolist(), size.tolist(), strict=True):
            x[begin : begin + n], y[begin : begin + n] = self.spec.samples(
                self.seed, device, n, "synthetic-train"
            )
        return torch.from_numpy(x), torch.from_numpy(y), start[inverse]

    def local_set(
        self, devices: IntArray, split: Literal["train", "test"]
    ) -> tuple[Tensor, Tensor, IntArray, IntArray]:
        """See `federated.DeviceData.local_set`.

        Raises
        ------
        ScenarioError
            For test sets of the devices' own, which there are none of.
        """
        if split == "test":
            raise ScenarioError("evaluation: synthetic devices keep no test samples of their own")
        x, y, start = self.pack(devices)
        return x, y, start, self.size[devices]

    def label_counts(self) -> IntArray:
        """Return no rows: counting would mean to make everybody's data."""
        return np.zeros((0, self.n_classes), np.int64)

    def materialise(self) -> FederatedData:
        """Return the same data with all samples held in memory."""
        x, y, start = self.pack(np.arange(self.n_devices))
        return FederatedData(
            self.name, x, y, start, self.size, self.x_test, self.y_test, self.n_classes
        )


def load_synthetic(
    *,
    n_devices: int,
    alpha: float = 1.0,
    beta: float = 1.0,
    iid: bool = False,
    n_features: int = 60,
    n_classes: int = 10,
    log_mean: float = 4.0,
    log_sigma: float = 2.0,
    min_samples: int = 50,
    max_samples: int = 10_000,
    seed: int = 0,
) -> FederatedData | StreamedData:
    """Return Synthetic(α, β) for any number of devices, which hold their data by nature.

    Parameters
    ----------
    n_devices : int
    alpha, beta, iid, n_features, n_classes
        See `SyntheticSpec`.
    log_mean, log_sigma : float
        A device has `min_samples` + exp(N(log_mean, log_sigma)) samples.
    min_samples, max_samples : int
    seed : int

    Returns
    -------
    FederatedData or StreamedData
        The latter, with the same samples, if all of them would take more than 256 MiB.

    Raises
    ------
    ScenarioError
        If a number is out of its range.
    """
    checks = {
        "devices": n_devices >= 1,
        "alpha": alpha >= 0,
        "beta": beta >= 0,
        "n_features": n_features >= 1,
        "n_classes": n_classes >= 2,
        "log_sigma": log_sigma >= 0,
        "min_samples": min_samples >= 1,
        "max_samples": max_samples >= min_samples,
    }
    for name, holds in checks.items():
        if not holds:
            raise ScenarioError(f"data.{name}: out of range for synthetic data")
    spec = SyntheticSpec(alpha, beta, iid, n_features, n_classes)
    drawn = stream(seed, "synthetic-sizes").lognormal(log_mean, log_sigma, n_devices)
    size = np.minimum(min_samples + drawn, max_samples).astype(np.int64)
    chosen = np.unique(np.linspace(0, n_devices - 1, min(n_devices, _TEST_DEVICES)).astype(int))
    test = [spec.samples(seed, int(d), _TEST_SAMPLES, "synthetic-test") for d in chosen]
    streamed = StreamedData(
        f"synthetic({alpha:g}, {beta:g})" if not iid else "synthetic(iid)",
        spec,
        seed,
        size,
        torch.from_numpy(np.concatenate([x for x, _ in test]).astype(np.float32)),
        torch.from_numpy(np.concatenate([y for _, y in test])),
    )
    is_small = int(size.sum()) * 4 * n_features <= _RESIDENT_BYTES
    return streamed.materialise() if is_small else streamed


def load_least_squares(
    *,
    n_devices: int = 20,
    samples: int = 200,
    n_features: int = 20,
    noise: float = 0.4,
    heterogeneous: bool = False,
    problem: Literal["drawn", "lsrA", "lsrB"] = "drawn",
    seed: int = 0,
) -> Dataset:
    """Return a least-squares problem in float64, split by nature; its test set is all samples.

    Features are N(0, Σ) with Σ_ij = 0.6^|i-j|, after a first column of ones; the true weights are
    2 for it and (-1)^(j+1) exp(-j/10) for feature j.

    Parameters
    ----------
    n_devices, samples : int
        Samples of each device.
    n_features : int
        The column of ones included.
    noise : float
        Standard deviation of the noise.
    heterogeneous : bool
        The noise is one constant for each device (the intercepts differ) instead of one number
        for each sample.
    problem : {"drawn", "lsrA", "lsrB"}
        Instead of drawing one, a problem that ships with the package: `lsrA` (10 devices, 100
        samples, 40 features, each device with weights of its own), or `lsrB` (20, 200, 20), the
        published data of [1]_.
    seed : int

    References
    ----------
    .. [1] Philippenko, Dieuleveut, "Preserved central model for faster bidirectional compression
       in distributed settings", NeurIPS 2021 (the published data have the constant noise).
    """
    if problem != "drawn":
        return _shipped(problem, n_devices)
    _check_counts(n_devices, samples, n_features)
    rng = stream(seed, "least-squares")
    lag = np.abs(np.subtract.outer(np.arange(n_features - 1), np.arange(n_features - 1)))
    root = np.linalg.cholesky(0.6**lag) if n_features > 1 else np.zeros((0, 0))
    features = rng.standard_normal((n_devices, samples, n_features - 1)) @ root.T
    x = np.concatenate([np.ones((n_devices, samples, 1)), features], axis=2)
    j = np.arange(1, n_features)
    weights = np.concatenate([[2.0], (-1.0) ** (j + 1) * np.exp(-j / 10)])
    error = rng.normal(0, noise, (n_devices, 1 if heterogeneous else samples))
    return _by_nature("least_squares", x, x @ weights + error, n_classes=0)


def _shipped(problem: str, n_devices: int) -> Dataset:
    """Return a problem of the reference cases."""
    if problem not in ("lsrA", "lsrB"):
        raise ScenarioError(f"data.dataset.problem: {problem!r} is not one of lsrA, lsrB")
    name = f"{problem}_data.npz"
    with resources.files("fedsim").joinpath("reference", name).open("rb") as file:
        arrays = np.load(file)
        x, y = arrays["X"], arrays["Y"]
    if n_devices != len(x):
        raise ScenarioError(f"data.devices: {n_devices}, but {problem} is held by {len(x)} devices")
    return _by_nature(problem, x, y, n_classes=0)


def load_logistic(
    *, n_devices: int = 20, samples: int = 200, heterogeneous: bool = False, seed: int = 0
) -> Dataset:
    """Return a logistic regression in two dimensions, float64; its test set is all samples.

    Parameters
    ----------
    n_devices, samples : int
        Samples of each device.
    heterogeneous : bool
        Every second device has other true weights, (10, -10) instead of (10, 10), and its first
        feature is mirrored.
    seed : int
    """
    _check_counts(n_devices, samples, 2)
    rng = stream(seed, "logistic")
    x = rng.standard_normal((n_devices, samples, 2)) + np.array([0.5, 0.0])
    weights = np.tile([10.0, 10.0], (n_devices, 1))
    if heterogeneous:
        weights[1::2, 1] = -10.0
        x[1::2, :, 0] *= -1.0
    chance = 1 / (1 + np.exp(-np.einsum("dnf,df->dn", x, weights)))
    y = (rng.random((n_devices, samples)) < chance).astype(np.int64)
    return _by_nature("logistic", x, y, n_classes=2)


def load_quadratic(
    *, n_devices: int = 8, dimension: int = 10, problem_seed: int = 20240501
) -> Dataset:
    """Return strongly heterogeneous quadratic problems f_i(w) = w·H_i w / 2 - b_i·w, in float64.

    A device has one sample, H_i and b_i side by side; the model `quadratic` computes f_i(w). The
    defaults are the reference problem Q8, whose minimum x* has norm 2.397050.

    Parameters
    ----------
    n_devices, dimension : int
    problem_seed : int
        Of numpy's default generator, which draws H_i = M Mᵀ/d + I/2 and b_i = 3 N(0, I) in turn.

    Returns
    -------
    Dataset
        x, shape (n_devices, d, d + 1); the test set is the same, so the loss there is the mean of
        all f_i.
    """
    _check_counts(n_devices, 1, dimension)
    rng = np.random.default_rng(problem_seed)
    x = np.empty((n_devices, dimension, dimension + 1))
    for i in range(n_devices):
        m = rng.standard_normal((dimension, dimension))
        x[i, :, :-1] = m @ m.T / dimension + 0.5 * np.eye(dimension)
        x[i, :, -1] = 3 * rng.standard_normal(dimension)
    y = np.zeros(n_devices)
    return Dataset("quadratic", x, y, x, y, n_classes=0, device_train=np.arange(n_devices))


def _by_nature(
    name: str, x: FloatArray, y: NDArray[np.float64] | IntArray, n_classes: int
) -> Dataset:
    """Flatten (device, sample, ...) and remember the device."""
    n_devices, samples = y.shape
    flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.reshape(-1)
    device = np.repeat(np.arange(n_devices), samples)
    return Dataset(name, flat_x, flat_y, flat_x, flat_y, n_classes, device)


def _check_counts(n_devices: int, samples: int, n_features: int) -> None:
    if min(n_devices, samples, n_features) < 1:
        raise ScenarioError(
            f"data: devices {n_devices}, samples {samples} and features {n_features} must be "
            "at least 1"
        )
