"""What a device does in one round, as values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedsim.errors import ScenarioError
from fedsim.learning.schedules import Schedule
from fedsim.streams import uniform

__all__ = ["ROUNDS", "ExtraLoss", "LocalConfig", "LocalTerms"]

ROUNDS = 1 << 32
"""Rounds are below this; multiples of it tell apart the draws of repeated work in one round."""

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
# (outputs (n, ...), x (n, ...), y (n, ...), rows: the device's own tensors) -> Tensor (n,)
ExtraLoss = Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]


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
    local_steps : int or (int, int), optional
        Steps instead of epochs; the data are reshuffled after each pass. A pair: each device draws
        its number from this range, both ends included, anew in every round.
    batch_size : int
        0 is all samples of the device. A device with fewer has smaller batches.
    drop_last : bool
        Leave out an epoch's last batch if it is short; a device with less than one batch keeps it.
    learning_rate : float
    schedule : callable, optional
        Rounds (from 1) to factors on the learning rate, see `schedules`.
    optimizer : {"sgd", "adam", "adamw"}
        `adam` adds the weight decay to the gradient, `adamw` shrinks the weights themselves.
    momentum : float
        Of SGD; 0 is plain SGD.
    nesterov : bool
    betas : (float, float)
        Decay rates of Adam's two moments.
    epsilon : float
        Added to the root of Adam's second moment.
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
    local_steps: int | tuple[int, int] | None = None
    batch_size: int = 32
    drop_last: bool = False
    learning_rate: float = 0.1
    schedule: Schedule | None = None
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        _choice("mode", self.mode, ("local_sgd", "gradient"))
        _choice("optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        for name in ("batch_size", "learning_rate", "weight_decay", "proximal_mu"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("local_epochs", self.local_epochs, self.local_epochs >= 1, "at least 1")
        if self.local_steps is not None:
            low, high = self.step_range
            _check("local_steps", self.local_steps, 1 <= low <= high, "at least 1, in order")
        for name, value in zip(
            ("momentum", "betas", "betas"), (self.momentum, *self.betas), strict=True
        ):
            _check(name, value, 0 <= value < 1, "in [0, 1)")
        _check("epsilon", self.epsilon, self.epsilon > 0, "above 0")
        if self.nesterov:
            _check("nesterov", self.nesterov, self.momentum > 0, "used without momentum")
        if self.clip_norm is not None:
            _check("clip_norm", self.clip_norm, self.clip_norm > 0, "above 0")

    @property
    def step_range(self) -> tuple[int, int]:
        """Fewest and most local steps, if steps are given."""
        if isinstance(self.local_steps, tuple):
            return self.local_steps
        return self.local_steps or 0, self.local_steps or 0

    def batch_of(self, size: IntArray) -> IntArray:
        """Return how many samples a full batch has on devices with `size` samples."""
        return np.minimum(size, self.batch_size) if self.batch_size else size

    def steps_of(
        self, size: IntArray, *, seed: int, rounds: IntArray, devices: IntArray
    ) -> IntArray:
        """Return how many local steps devices with `size` samples make in these rounds."""
        if self.mode == "gradient":
            return np.ones_like(size)
        if self.local_steps is not None:
            low, high = self.step_range
            drawn = uniform(seed, "local-steps", rounds, devices) * (high - low + 1)
            return low + drawn.astype(np.int64)
        batch = self.batch_of(size)
        per_epoch = size // batch if self.drop_last else -(-size // batch)
        return per_epoch * self.local_epochs

    def rates(self, rounds: IntArray) -> FloatArray:
        """Return the learning rate in each of the rounds."""
        factor = np.ones(len(rounds)) if self.schedule is None else self.schedule(rounds % ROUNDS)
        return self.learning_rate * factor


@dataclass(frozen=True, slots=True)
class LocalTerms:
    """What a strategy adds to the local objective, one row for each device of a call.

    Parameters
    ----------
    control : Tensor, shape (k, P), optional
        Added to the gradients of every step: a control variate.
    center : Tensor, shape (k, P), optional
        What the proximal term pulls towards; default: the model received.
    proximal_mu : float, optional
        Instead of the config's.
    extra_loss : callable, optional
        `(outputs (n, ...), x, y, rows) -> Tensor (n,)`, added to the loss of each sample; it must
        treat the samples one by one, since a batch may be padded.
    rows : mapping of Tensor, shape (k, ...)
        What `extra_loss` gets of each device: a peer's weights, a temperature.
    """

    control: Tensor | None = None
    center: Tensor | None = None
    extra_loss: ExtraLoss | None = None
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    proximal_mu: float | None = None

    def part(self, rows: Tensor) -> "LocalTerms":
        """Return the terms of the devices at these rows, Tensor of int64."""
        return replace(
            self,
            control=None if self.control is None else self.control[rows],
            center=None if self.center is None else self.center[rows],
            rows={name: value[rows] for name, value in self.rows.items()},
        )


def _choice(name: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ScenarioError(f"training.{name}: {value!r} is not one of {', '.join(valid)}")


def _check(name: str, value: object, holds: bool, needed: str) -> None:
    if not holds:
        raise ScenarioError(f"training.{name}: {value} is not {needed}")
