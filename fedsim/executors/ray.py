"""Shares of the device axis, each trained by a worker on Ray."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.federated import DeviceData
from fedsim.executors.crew import Crew, Tool, Wanted
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.trainer import Collect, LocalResult, Trainer

__all__ = ["RayTrainer"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class RayTrainer(Trainer):
    """A trainer whose devices are trained by workers on Ray, each on its share of them.

    Models of the global test set are still scored in this process.

    Parameters
    ----------
    module, data, **options
        See `Trainer`. Workers compute on the GPU that Ray gives them, else on the processor.
    crew : Crew
        The workers.
    wanted : Wanted
        Which of them.
    """

    def __init__(
        self, module: nn.Module, data: DeviceData, *, crew: Crew, wanted: Wanted, **options: Any
    ) -> None:
        super().__init__(module, data, **options)
        self._crew, self._wanted = crew, wanted
        options["device"] = "cuda" if wanted.gpus else "cpu"
        self._tool = Tool(partial(_trainer, module, options), (data,))

    def train(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        rounds: IntArray,
        config: LocalConfig,
        *,
        terms: LocalTerms = LocalTerms(),  # noqa: B008 - frozen
        collect: Collect | None = None,
    ) -> LocalResult:
        """Return the devices' models after local training; see `Trainer.train`."""
        _, samples = self.workload(devices, rounds, config)
        rows = self._crew.shares(samples, self._wanted)
        pieces = [
            (
                *_bases(base, base_rows[share]),
                devices[share],
                rounds[share],
                config,
                _moved(terms.part(torch.from_numpy(share))),
            )
            for share in rows
        ]
        home = self.stack.device
        params = torch.empty((len(devices), self.layout.size), dtype=self.stack.dtype, device=home)
        loss = np.empty(len(devices))
        samples, steps = (np.empty(len(devices), np.int64) for _ in range(2))
        for share, result in zip(rows, self._crew.map(_train, self._tool, pieces), strict=True):
            params[torch.from_numpy(share).to(home)] = _tensor(result[0]).to(home)
            loss[share], samples[share], steps[share] = result[1:]
        if collect is not None:
            collect(np.arange(len(devices)), params)
        return LocalResult(None if collect else params, loss, samples, steps)

    def evaluate_devices(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        *,
        split: Literal["train", "test"] = "train",
    ) -> tuple[FloatArray, FloatArray, IntArray]:
        """Return loss and accuracy on each device's own data; see `Trainer.evaluate_devices`."""
        rows = self._crew.shares(self.data.size[devices], self._wanted)
        pieces = [(*_bases(base, base_rows[share]), devices[share], split) for share in rows]
        loss, accuracy = np.empty(len(devices)), np.empty(len(devices))
        samples = np.empty(len(devices), np.int64)
        for share, result in zip(rows, self._crew.map(_evaluate, self._tool, pieces), strict=True):
            loss[share], accuracy[share], samples[share] = result
        return loss, accuracy, samples


def _trainer(module: nn.Module, options: dict[str, Any], data: DeviceData) -> Trainer:
    return Trainer(module, data, **options)


def _bases(base: Tensor, base_rows: IntArray) -> tuple[NDArray[Any], IntArray]:
    """Return the versions of the model that a share needs, and which each device has."""
    used, rows = np.unique(base_rows, return_inverse=True)
    versions = base.detach().cpu()
    if len(used) < len(versions):
        versions = versions[torch.from_numpy(used)]
    return versions.numpy(), rows.astype(np.int64)


def _moved(terms: LocalTerms) -> LocalTerms:
    """Return terms as they travel: on the processor."""
    return replace(
        terms,
        control=None if terms.control is None else terms.control.cpu(),
        center=None if terms.center is None else terms.center.cpu(),
        rows={name: value.cpu() for name, value in terms.rows.items()},
    )


def _train(
    trainer: Trainer,
    base: NDArray[Any],
    base_rows: IntArray,
    devices: IntArray,
    rounds: IntArray,
    config: LocalConfig,
    terms: LocalTerms,
) -> tuple[NDArray[Any], FloatArray, IntArray, IntArray]:
    result = trainer.train(_tensor(base), base_rows, devices, rounds, config, terms=terms)
    assert result.params is not None
    return result.params.cpu().numpy(), result.loss, result.samples, result.steps


def _evaluate(
    trainer: Trainer,
    base: NDArray[Any],
    base_rows: IntArray,
    devices: IntArray,
    split: Literal["train", "test"],
) -> tuple[FloatArray, FloatArray, IntArray]:
    return trainer.evaluate_devices(_tensor(base), base_rows, devices, split=split)


def _tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor of its own memory: the object store's is read-only."""
    return torch.from_numpy(np.array(array))
