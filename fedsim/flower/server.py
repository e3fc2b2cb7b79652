"""The server's side of a simulated run: the first model, its scores, the file of the last one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord
from safetensors.torch import save_file

from fedsim.data.federated import FederatedData
from fedsim.errors import PayloadError
from fedsim.flower.records import LazyArray, LazyArrayRecord, stack_records, stacked_record
from fedsim.flower.session import Evaluation, Models
from fedsim.learning.convex import ConvexProblem
from fedsim.learning.evaluation import spread
from fedsim.learning.trainer import Trainer

__all__ = [
    "initial_arrays",
    "save_arrays",
    "save_confusion",
    "score",
    "score_models",
    "with_mean",
]


def initial_arrays(trainer: Trainer) -> ArrayRecord:
    """Return the model that every strategy starts from."""
    return stacked_record(trainer.layout.views(trainer.initial()[None]), 0)


def with_mean(arrays: ArrayRecord, kept: Mapping[str, torch.Tensor]) -> ArrayRecord:
    """Return a model in which some tensors are the means of what devices keep of them.

    Parameters
    ----------
    arrays : ArrayRecord
    kept : mapping of str to Tensor, shape (n_devices, *shape)
    """
    completed = LazyArrayRecord(arrays)
    for key, rows in kept.items():
        mean = rows.double().mean(0)
        rounded = mean if rows.is_floating_point() else mean.round()
        completed[key] = LazyArray(rounded.to(rows.dtype))
    return completed


def score(
    trainer: Trainer,
    arrays: ArrayRecord,
    on: str = "global_test",
    problem: ConvexProblem | None = None,
) -> Evaluation:
    """Return the scores of a model on a common set.

    Parameters
    ----------
    trainer : Trainer
    arrays : ArrayRecord
        Keys and shapes of the trainer's model.
    on : {"global_test", "validation"}
    problem : ConvexProblem, optional
        What training minimises: then its excess loss is scored as well.
    """
    model = trainer.layout.flatten(stack_records([arrays]))
    loss, accuracy = trainer.evaluate(model, *_common_set(trainer, on))
    return Evaluation(
        float(loss[0]),
        None if np.isnan(accuracy[0]) else float(accuracy[0]),
        excess_loss=None if problem is None else float(problem.excess(model.double().cpu())[0]),
    )


def score_models(trainer: Trainer, models: Models, on: str = "global_test") -> Evaluation:
    """Return the mean scores of the devices' own models on a common set, and their spread.

    Parameters
    ----------
    trainer : Trainer
    models : mapping of str to Tensor, shape (n_devices, *shape)
        Keys and shapes of the trainer's model.
    on : {"global_test", "validation"}
    """
    names = trainer.layout.names
    if set(models) != set(names):
        raise PayloadError(f"device_models has {list(models)}, the model has {list(names)}")
    rows = trainer.layout.flatten({name: models[name] for name in names})
    loss, accuracy = trainer.evaluate(rows, *_common_set(trainer, on))
    if np.isnan(accuracy).any():
        return Evaluation(float(loss.mean()))
    over = spread(accuracy)
    return Evaluation(float(loss.mean()), over["mean"], over["std"], over["worst_10_percent"])


def save_confusion(path: Path, trainer: Trainer, arrays: ArrayRecord, on: str) -> None:
    """Write the confusion matrix of a model on a common set as CSV, atomically.

    A line for each true class: the class, then how many of its samples were taken for each class.
    """
    model = trainer.layout.flatten(stack_records([arrays]))
    (counts,) = trainer.confusion(model, *_common_set(trainer, on))
    classes = range(len(counts))
    lines = [",".join(["true", *(f"predicted_{c}" for c in classes)])]
    lines += [",".join(map(str, [c, *counts[c].tolist()])) for c in classes]
    scratch = path.with_suffix(".tmp")
    scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scratch.replace(path)


def _common_set(trainer: Trainer, on: str) -> tuple[torch.Tensor, torch.Tensor]:
    data = trainer.data
    if on == "global_test":
        return data.x_test, data.y_test
    assert isinstance(data, FederatedData)
    assert data.x_validation is not None
    assert data.y_validation is not None
    return data.x_validation, data.y_validation


def save_arrays(path: Path, arrays: ArrayRecord) -> None:
    """Write a model as a safetensors file."""
    tensors = {key: torch.from_numpy(array.numpy()) for key, array in arrays.items()}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
