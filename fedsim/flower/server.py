"""The server's side of a simulated run: the first model, its scores, the file of the last one."""

from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from safetensors.torch import save_file

from fedsim.data.federated import FederatedData
from fedsim.flower.records import stack_records, stacked_record
from fedsim.flower.session import Evaluation
from fedsim.learning.trainer import Trainer

__all__ = ["initial_arrays", "save_arrays", "score"]


def initial_arrays(trainer: Trainer) -> ArrayRecord:
    """Return the model that every strategy starts from."""
    return stacked_record(trainer.layout.views(trainer.initial()[None]), 0)


def score(trainer: Trainer, arrays: ArrayRecord, on: str = "global_test") -> Evaluation:
    """Return the scores of a model on a common set.

    Parameters
    ----------
    trainer : Trainer
    arrays : ArrayRecord
        Keys and shapes of the trainer's model.
    on : {"global_test", "validation"}
    """
    data = trainer.data
    x, y = data.x_test, data.y_test
    if on == "validation":
        assert isinstance(data, FederatedData)
        assert data.x_validation is not None
        assert data.y_validation is not None
        x, y = data.x_validation, data.y_validation
    model = trainer.layout.flatten(stack_records([arrays]))
    loss, accuracy = trainer.evaluate(model, x, y)
    return Evaluation(float(loss[0]), None if np.isnan(accuracy[0]) else float(accuracy[0]))


def save_arrays(path: Path, arrays: ArrayRecord) -> None:
    """Write a model as a safetensors file."""
    tensors = {key: torch.from_numpy(array.numpy()) for key, array in arrays.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
