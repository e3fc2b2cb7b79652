"""Beyond one matrix on one device: means without the stack, several GPUs."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.federated import DeviceData
from fedsim.errors import ScenarioError
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.trainer import Collect, LocalResult, Trainer

__all__ = [
    "RunningMean",
    "SharedTrainer",
    "shares_of",
    "train_shares",
    "trainer_on",
]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_NO_TERMS = LocalTerms()


class RunningMean:
    """A weighted mean of models that are handed over chunk by chunk (`Trainer.train(collect=…)`).

    Parameters
    ----------
    weights : ndarray of float64, shape (k,)
        Of the devices in the order of the call; they are normalised to sum 1.

    Raises
    ------
    ScenarioError
        If the weights do not have a positive sum.
    """

    def __init__(self, weights: FloatArray) -> None:
        if not weights.sum() > 0:
            raise ScenarioError(f"weights of a mean sum to {weights.sum()}, not above 0")
        self.weights = weights / weights.sum()
        self.value: Tensor | None = None

    def __call__(self, rows: IntArray, params: Tensor) -> None:
        """Add the models `params`, shape (c, P), of the devices at these rows."""
        weights = torch.from_numpy(self.weights[rows]).to(params.device, params.dtype)
        part = weights @ params
        self.value = part if self.value is None else self.value + part


def train_shares(
    trainers: Sequence[Trainer],
    base: Tensor,
    base_rows: IntArray,
    devices: IntArray,
    rounds: IntArray,
    config: LocalConfig,
    *,
    terms: LocalTerms | None = None,
) -> LocalResult:
    """Train with one trainer for each GPU, every one on its share of the devices.

    Parameters
    ----------
    trainers : sequence of Trainer
        Alike but for the device they compute on.
    base, base_rows, devices, rounds, config, terms
        See `Trainer.train`.

    Returns
    -------
    LocalResult
        On the first trainer's device; equal to one trainer's result up to rounding.
    """
    terms = terms or LocalTerms()
    _, samples = trainers[0].workload(devices, rounds, config)
    shares = shares_of(samples, len(trainers))

    def work(trainer: Trainer, rows: IntArray) -> LocalResult:
        part = terms.part(torch.from_numpy(rows))
        return Trainer.train(
            trainer, base, base_rows[rows], devices[rows], rounds[rows], config, terms=part
        )

    # What `arithmetic` sets is the process's: set it around all threads, which set the same.
    with trainers[0].stack.arithmetic(), ThreadPoolExecutor(len(shares)) as pool:
        results = list(pool.map(work, trainers[: len(shares)], shares))
    back = np.argsort(np.concatenate(shares))
    home = trainers[0].stack.device
    params = torch.cat([r.params.to(home) for r in results if r.params is not None])
    return LocalResult(
        params[torch.from_numpy(back).to(home)],
        np.concatenate([r.loss for r in results])[back],
        np.concatenate([r.samples for r in results])[back],
        np.concatenate([r.steps for r in results])[back],
    )


def shares_of(work: IntArray, n: int) -> list[IntArray]:
    """Return at most `n` shares of nearly equal work, as rows: dealt out from the largest on."""
    order = np.argsort(-work, kind="stable")
    return [order[i::n] for i in range(min(n, len(order)))]


class SharedTrainer(Trainer):
    """A trainer that spreads the devices of a call over several GPUs.

    Parameters
    ----------
    module, data, **options
        See `Trainer`.
    places : sequence of str
        The GPUs; results and everything but training are on the first.
    """

    def __init__(
        self, module: nn.Module, data: DeviceData, *, places: Sequence[str], **options: Any
    ) -> None:
        super().__init__(module, data, device=places[0], **options)
        self._others = [Trainer(module, data, device=place, **options) for place in places[1:]]

    def train(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        rounds: IntArray,
        config: LocalConfig,
        *,
        terms: LocalTerms = _NO_TERMS,
        collect: Collect | None = None,
    ) -> LocalResult:
        """See `Trainer.train`; chunks that are collected are all computed on the first GPU."""
        call = base, base_rows, devices, rounds, config
        if collect is not None or len(devices) < 2:
            return super().train(*call, terms=terms, collect=collect)
        return train_shares([self, *self._others], *call, terms=terms)


def trainer_on(module: nn.Module, data: DeviceData, *, device: str, **options: Any) -> Trainer:
    """Return a trainer on a device; ``cuda`` and ``auto`` take all GPUs, ``cuda:N`` one.

    Parameters
    ----------
    module, data, **options
        See `Trainer`.
    device : str
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device in ("cuda", "auto") and n_gpus > 1:
        places = [f"cuda:{i}" for i in range(n_gpus)]
        return SharedTrainer(module, data, places=places, **options)
    return Trainer(module, data, device=device, **options)
