"""What a device does in one round, as a value."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError

__all__ = ["LocalConfig"]

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LocalConfig:
    """Hyperparameters of local work.

    The order of the terms of a step is: gradient, `weight_decay`, proximal term, control variate,
    clipping, then momentum (or Adam's moments) and the update. Optimiser state starts at zero in
    every round.

    Parameters
    ----------
    mode : {"local_sgd", "gradient"}
        `gradient`: no step is made; the result is the plain gradient of the loss on one batch
        (the first that training would use), at the model that was sent.
    local_epochs : int
        Passes over the device's data; ignored if `local_steps` is given.
    local_steps : int, optional
        Steps instead of epochs; the data are reshuffled after each pass.
    batch_size : int
        0 is all samples of the device. A device with fewer has smaller batches.
    drop_last : bool
        Leave out an epoch's last batch if it is short; a device with less than one batch keeps it.
    learning_rate : float
    optimizer : {"sgd"}
    momentum : float
        0 is plain SGD.
    nesterov : bool
    weight_decay : float
        Coefficient of the squared norm's gradient.
    proximal_mu : float
        FedProx's μ: adds μ (w - w_received) to the gradient.
    clip_norm : float, optional
        Greatest norm of a device's gradient over all parameters.

    Raises
    ------
    ScenarioError
        If a value is out of its range.
    """

    mode: Literal["local_sgd", "gradient"] = "local_sgd"
    local_epochs: int = 1
    local_steps: int | None = None
    batch_size: int = 32
    drop_last: bool = False
    learning_rate: float = 0.1
    optimizer: Literal["sgd"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _choice("mode", self.mode, ("local_sgd", "gradient"))
        _choice("optimizer", self.optimizer, ("sgd",))
        for name in ("batch_size", "learning_rate", "weight_decay", "proximal_mu"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("local_epochs", self.local_epochs, self.local_epochs >= 1, "at least 1")
        if self.local_steps is not None:
            _check("local_steps", self.local_steps, self.local_steps >= 1, "at least 1")
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        if self.nesterov:
            _check("nesterov", self.nesterov, self.momentum > 0, "used without momentum")
        if self.clip_norm is not None:
            _check("clip_norm", self.clip_norm, self.clip_norm > 0, "above 0")

    def batch_of(self, size: IntArray) -> IntArray:
        """Return how many samples a full batch has on devices with `size` samples."""
        return np.minimum(size, self.batch_size) if self.batch_size else size

    def steps_of(self, size: IntArray) -> IntArray:
        """Return how many local steps devices with `size` samples make."""
        if self.mode == "gradient":
            return np.ones_like(size)
        if self.local_steps is not None:
            return np.full_like(size, self.local_steps)
        batch = self.batch_of(size)
        per_epoch = size // batch if self.drop_last else -(-size // batch)
        return per_epoch * self.local_epochs


def _choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ScenarioError(f"training.{name}: {value!r} is not one of {', '.join(valid)}")


def _check(name: str, value: object, holds: bool, needed: str) -> None:
    if not holds:
        raise ScenarioError(f"training.{name}: {value} is not {needed}")
