"""A module whose tensors can be those of any row of a matrix."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.federated import DeviceData
from fedsim.errors import ScenarioError
from fedsim.learning.cost import model_cost, model_profile
from fedsim.learning.layout import layout_of
from fedsim.learning.losses import Loss
from topologies.profiles import Profile

__all__ = ["ModelStack", "Precision", "State", "torch_device"]

IntArray = NDArray[np.int64]
State = dict[str, Tensor]
Precision = Literal["exact", "tf32", "bfloat16"]
_MODEL_ERRORS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


class ModelStack:
    """One module, its layout, and the ways between rows of a matrix and stacked tensors.

    Parameters
    ----------
    module : nn.Module
        Copied, never changed.
    data : FederatedData or StreamedData
        What the model must fit; says how images are normalised.
    loss : Loss
    device : torch.device
    precision : {"exact", "tf32", "bfloat16"}
        Of the arithmetic; the weights keep the module's own type.

    Raises
    ------
    ScenarioError
        If the model does not fit the data or the loss.
    """

    def __init__(
        self,
        module: nn.Module,
        data: DeviceData,
        loss: Loss,
        device: torch.device,
        precision: Precision = "exact",
    ) -> None:
        self.module = copy.deepcopy(module).to(device)
        self.device, self.loss, self.n_classes = device, loss, data.n_classes
        self.layout = layout_of(self.module)
        self.dtype = self.layout.dtype
        self.precision = precision
        self.compute_dtype = torch.bfloat16 if precision == "bfloat16" else None
        # Each tensor once: shared ones go by their first name.
        self.alias = {name for name, _ in self.layout.aliases}
        self.slots: dict[str, Tensor] = dict(self.module.named_parameters())
        self.slots |= dict(self.module.named_buffers())
        self._scale, self._shift = self._normalisation(data)
        state = self.module.state_dict()
        rows = {name: tensor.detach().unsqueeze(0).clone() for name, tensor in state.items()}
        self.initial = self.layout.flatten(rows)[0]
        self._sample = data.x_test[:1]
        self.largest_activation = self._try(data)

    def _normalisation(self, data: DeviceData) -> tuple[Tensor | None, Tensor | None]:
        """Return scale and shift for uint8 images: x * scale - shift."""
        if data.x_test.dtype != torch.uint8:
            return None, None
        mean, std = data.mean or (0.0,), data.std or (1.0,)
        shape = (-1, 1, 1) if len(data.input_shape) == 3 else (-1,)
        scale = torch.tensor([1 / (255 * s) for s in std], dtype=self.dtype).view(shape)
        shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=self.dtype)
        return scale.to(self.device), shift.view(shape).to(self.device)

    def inputs(self, x: Tensor) -> Tensor:
        """Return inputs on the device, in the model's type, images normalised; tokens as is."""
        x = x.to(self.device)
        if self._scale is not None and self._shift is not None:
            return x.to(self.dtype).mul_(self._scale).sub_(self._shift)
        return x.to(self.dtype) if x.dtype.is_floating_point else x

    @cached_property
    def forward_flops(self) -> int:
        """Operations of one sample's forward pass; 0 if they cannot be counted."""
        shape, tokens = (
            tuple(self._sample.shape[1:]),
            not self.inputs(self._sample).is_floating_point(),
        )
        try:
            return model_cost(self.module, shape, tokens=tokens).forward_flops
        except _MODEL_ERRORS:  # for example a branch on data, which an abstract run cannot take
            return 0

    def profile(self) -> Profile:
        """Return the model's layers with the operations of each.

        Raises
        ------
        ScenarioError
            If they cannot be counted.
        """
        shape = tuple(self._sample.shape[1:])
        is_symbols = not self.inputs(self._sample).is_floating_point()
        try:
            return model_profile(self.module, shape, tokens=is_symbols)
        except _MODEL_ERRORS as error:
            raise ScenarioError(f"model: its layers cannot be timed: {error}") from error

    def _try(self, data: DeviceData) -> int:
        """Check the model on one sample; return its largest activation in numbers a sample."""
        largest = [1]

        def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                largest[0] = max(largest[0], output.numel())

        hooks = [m.register_forward_hook(measure) for m in self.module.modules()]
        x, y = self.inputs(data.x_test[:1]), data.y_test[:1].to(self.device)
        name = type(self.module).__name__
        self.module.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = self.module(x)
        except _MODEL_ERRORS as error:
            raise ScenarioError(
                f"model: {name} cannot take inputs of shape {data.input_shape} and type "
                f"{x.dtype}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(outputs, Tensor):
            raise ScenarioError(f"model: {name} gives a {type(outputs).__name__}, not one tensor")
        n_outputs = outputs.shape[-1] if outputs.dim() > 1 else 1
        if self.loss.name == "cross_entropy" and n_outputs < data.n_classes:
            raise ScenarioError(
                f"model: {name} has {n_outputs} outputs, the data have labels "
                f"0..{data.n_classes - 1}"
            )
        try:
            losses = self.loss.per_sample(outputs, y)
        except _MODEL_ERRORS as error:
            raise ScenarioError(
                f"model: output {tuple(outputs.shape)} of {name} does not fit the loss "
                f"{self.loss.name!r} with targets {tuple(y.shape)}: {error}"
            ) from error
        if losses.shape != (1,):
            raise ScenarioError(
                f"training.loss: {self.loss.name!r} gives shape {tuple(losses.shape)} for a batch "
                "of one sample; it must give one value for each (reduction='none'), shape (1,)"
            )
        return largest[0]

    def gather(self, base: Tensor, versions: IntArray) -> State:
        """Return working copies of the models at these rows, one stack for each tensor."""
        if len(base) == 1:
            matrix = base.expand(len(versions), -1)
        else:
            matrix = base.index_select(0, torch.from_numpy(versions).to(self.device))
        return {
            n: v.clone(memory_format=torch.contiguous_format) for n, v in self.views(matrix).items()
        }

    def views(self, matrix: Tensor) -> State:
        """Return the stacked tensors of a matrix, shared ones once."""
        views = self.layout.views(matrix)
        return {name: view for name, view in views.items() if name not in self.alias}

    def matrix(self, state: State) -> Tensor:
        """Return the matrix of stacked tensors, the inverse of `gather`."""
        shared = {name: state[first] for name, first in self.layout.aliases}
        return self.layout.flatten(state | shared)

    def write(self, state: State, matrix: Tensor, rows: IntArray) -> None:
        """Write stacked tensors to these rows of a matrix, without building them as rows first."""
        places = torch.from_numpy(rows).to(matrix.device)
        shared = {name: state[first] for name, first in self.layout.aliases}
        for name, value in (state | shared).items():
            part = matrix[:, self.layout.columns(name)]
            part.index_copy_(0, places, value.reshape(len(rows), -1).to(matrix.dtype))

    def gradient_matrix(self, grads: list[Tensor]) -> Tensor:
        """Return gradients as a matrix, zero for what is not trained."""
        found = dict(zip(self.layout.parameters, grads, strict=True))
        k = len(grads[0])
        return torch.cat(
            [
                found[name].reshape(k, -1) if name in found else grads[0].new_zeros((k, n))
                for name, n in zip(self.layout.names, self.layout.numel, strict=True)
            ],
            dim=1,
        )

    def trained(self, matrix: Tensor | None, rows: IntArray) -> list[Tensor] | None:
        """Return the trained tensors at these rows of a matrix."""
        if matrix is None:
            return None
        views = self.layout.views(matrix[torch.from_numpy(rows)].to(self.device, self.dtype))
        return [views[name] for name in self.layout.parameters]

    def load(self, state: State, row: int = 0) -> None:
        """Let the module's tensors be those of one row of a stack (no copy)."""
        for name, value in state.items():
            self.slots[name].data = value[row]

    def release(self) -> None:
        """Let go of the stack whose row was loaded last: it may be large."""
        self.load(self.views(self.initial.unsqueeze(0)))

    def call(self, params: Mapping[str, Tensor], others: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the module's output with these tensors, computed in the wanted precision."""
        if self.compute_dtype is not None:
            params = {name: value.to(self.compute_dtype) for name, value in params.items()}
            x = x.to(self.compute_dtype) if x.dtype.is_floating_point else x
        outputs: Tensor = torch.func.functional_call(self.module, {**params, **others}, (x,))
        return outputs if self.compute_dtype is None else outputs.to(self.dtype)

    @contextmanager
    def arithmetic(self) -> Iterator[None]:
        """Let a GPU use TF32 if that is the wanted precision, and not otherwise."""
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        wanted = self.precision != "exact"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = wanted
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def torch_device(name: str) -> torch.device:
    """Return the torch device of that name; ``"auto"`` is a GPU if there is one.

    Raises
    ------
    ScenarioError
        If the name is no device, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ScenarioError(f"device: {name!r} is not cpu, cuda, cuda:N or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise ScenarioError(f"device: {name!r} is not cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ScenarioError(f"device: {name!r} was asked for, but torch finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ScenarioError(
            f"device: {name!r} was asked for, there are {torch.cuda.device_count()} CUDA devices"
        )
    return device
