"""Local training of many devices at once.

Decision: which engine and which chunk size are used follows from the model, the batch size and the
kind of device, never from a measurement: another choice changes the results by rounding, and the
same scenario must write the same bytes every time.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.federated import FederatedData
from fedsim.errors import ScenarioError
from fedsim.learning.batches import Batches, make_batches
from fedsim.learning.config import LocalConfig
from fedsim.learning.kernels import (
    Kernel,
    LinearKernel,
    VmapKernel,
    linear_layers,
    without_aliases,
)
from fedsim.learning.layout import layout_of
from fedsim.learning.losses import Loss, loss_of
from fedsim.learning.optimizers import Updater
from fedsim.streams import bits

__all__ = ["LocalResult", "Trainer"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Collect = Callable[[IntArray, Tensor], None]
Engine = Literal["auto", "linear", "vmap", "loop"]


@dataclass(frozen=True, slots=True)
class LocalResult:
    """What local training of k devices gave, in the order asked.

    Parameters
    ----------
    params : Tensor, shape (k, P), optional
        Models after training, or gradients in gradient mode (zero for what is not trained);
        None if the chunks were collected.
    loss : ndarray of float64, shape (k,)
        Mean over the local steps of the batch's mean loss.
    samples : ndarray of int64, shape (k,)
        Training samples that each device holds.
    steps : ndarray of int64, shape (k,)
    """

    params: Tensor | None
    loss: FloatArray
    samples: IntArray
    steps: IntArray


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything that a chunk needs to know, with one row for each device asked for."""

    base: Tensor
    base_rows: IntArray
    devices: IntArray
    rounds: IntArray
    start: IntArray
    size: IntArray
    batch: IntArray
    steps: IntArray
    x: Tensor
    y: Tensor
    config: LocalConfig
    control: Tensor | None


class Trainer:
    """Trains and scores models of many devices; stateless between calls.

    Parameters
    ----------
    module : nn.Module
        The model. It is copied and never changed.
    data : FederatedData
    loss : str, Loss or callable
        A name of `losses.LOSSES` or a function `(outputs, y) -> Tensor (n,)`.
    seed : int
        Of the sample order and of all other draws.
    chunk : int, optional
        Devices computed together; default: as many as the caches (or the GPU's memory) like.
    engine : {"auto", "linear", "vmap", "loop"}
        `linear`: hand-batched matrix products, for stacks of linear layers; `vmap`: any module,
        mapped over the devices; `loop`: device after device, the reference. `auto` takes the first
        that serves and falls back to the loop, with one warning, if a module cannot be mapped.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``.

    Raises
    ------
    ScenarioError
        If the model does not fit the data, or the engine or device cannot serve.
    """

    def __init__(
        self,
        module: nn.Module,
        data: FederatedData,
        *,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        seed: int,
        chunk: int | None = None,
        engine: Engine = "auto",
        device: str = "cpu",
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ScenarioError(f"chunk: {chunk} is not at least 1")
        self.device = _device(device)
        self.module = copy.deepcopy(module).to(self.device)
        self.data = data
        self.seed = seed
        self.chunk = chunk
        self.engine = engine
        self.loss = loss_of(loss)
        self.layout = layout_of(self.module)
        self._initial = self._read_module()
        self._slots = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        self._largest = self._try_model()
        self._linear = linear_layers(self.module) if self.loss.gradient is not None else None
        if engine == "linear" and self._linear is None:
            raise ScenarioError(
                f"engine: linear needs a stack of linear layers, not {type(module).__name__}"
            )
        self._kernel = self._choose_kernel(engine)
        self._checked = engine == "loop" or isinstance(self._kernel, LinearKernel)

    def _choose_kernel(self, engine: Engine) -> Kernel | None:
        if engine == "loop":
            return None
        if self._linear is not None and engine != "vmap":
            return LinearKernel(self._linear, self.layout, self.loss)
        return VmapKernel(self.module, self.layout, self.loss)

    def _read_module(self) -> Tensor:
        state = self.module.state_dict()
        return self.layout.flatten({n: t.detach().unsqueeze(0) for n, t in state.items()})[0]

    def _try_model(self) -> int:
        """Check the model on one sample; return its largest activation in numbers a sample."""
        largest = [1]

        def measure(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                largest[0] = max(largest[0], output.numel())

        hooks = [m.register_forward_hook(measure) for m in self.module.modules()]
        x, y = self._inputs(self.data.x_test[:1]), self.data.y_test[:1].to(self.device)
        name = type(self.module).__name__
        self.module.eval()
        try:
            with torch.no_grad():
                outputs = self.module(x)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ScenarioError(
                f"model: {name} cannot take inputs of shape {self.data.input_shape} and type "
                f"{x.dtype}: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        n_outputs = outputs.shape[-1] if outputs.dim() > 1 else 1
        if self.loss.name == "cross_entropy" and n_outputs < self.data.n_classes:
            raise ScenarioError(
                f"model: {name} has {n_outputs} outputs, the data have labels "
                f"0..{self.data.n_classes - 1}"
            )
        try:
            losses = self.loss.per_sample(outputs, y)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ScenarioError(
                f"model: output {tuple(outputs.shape)} of {name} does not fit the loss "
                f"{self.loss.name!r} with targets {tuple(y.shape)}: {error}"
            ) from error
        if losses.shape != (1,):
            raise ScenarioError(
                f"model: loss {self.loss.name!r} gives shape {tuple(losses.shape)} for one sample"
            )
        return largest[0]

    def initial(self) -> Tensor:
        """Return the weights that the module came with, shape (P,) (see `models.build_model`)."""
        return self._initial.clone()

    def _inputs(self, x: Tensor) -> Tensor:
        """Return inputs on the device in the model's type."""
        x = x.to(self.device)
        return x.to(self.layout.dtype) if x.dtype.is_floating_point else x

    def train(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        rounds: IntArray,
        config: LocalConfig,
        *,
        control: Tensor | None = None,
        collect: Collect | None = None,
    ) -> LocalResult:
        """Return the devices' models after local training.

        A device's result depends on its model, data, round and `config`, not on who else is in
        the call, nor (beyond rounding) on the engine or the chunk size.

        Parameters
        ----------
        base : Tensor, shape (V, P)
            The versions of the model that devices start from.
        base_rows : ndarray of int64, shape (k,)
            Which version each device starts from.
        devices, rounds : ndarray of int64, shape (k,)
            Device ids, and the round that each is in.
        config : LocalConfig
        control : Tensor, shape (k, P), optional
            Added to each device's gradients.
        collect : callable, optional
            `(rows (c,), params (c, P))` is called as each chunk is done, and the result holds no
            models: memory then grows with the chunk, not with k.

        Raises
        ------
        ScenarioError
            If shapes do not fit together, or a module cannot be mapped and `engine` is ``"vmap"``.
        """
        work = self._plan(base, base_rows, devices, rounds, config, control)
        k = len(devices)
        loss = np.empty(k)
        order = np.lexsort((-work.size, -work.steps))
        params = None
        if collect is None:
            params = torch.empty((k, self.layout.size), dtype=base.dtype, device=self.device)
        first = 0
        while first < k:
            rows = order[first : first + self._chunk_size(work, int(order[first]))]
            matrix, losses = self._run(work, rows)
            loss[rows] = losses
            if collect is not None:
                collect(rows, matrix)
            elif params is not None:
                params.index_copy_(0, torch.from_numpy(rows).to(self.device), matrix)
            first += len(rows)
        return LocalResult(params, loss, work.size, work.steps)

    def _plan(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        rounds: IntArray,
        config: LocalConfig,
        control: Tensor | None,
    ) -> _Work:
        if base.dim() != 2 or base.shape[1] != self.layout.size:
            raise ScenarioError(
                f"model versions of shape {tuple(base.shape)} do not fit a model of "
                f"{self.layout.size} numbers"
            )
        if not len(devices) == len(base_rows) == len(rounds):
            raise ScenarioError("devices, base_rows and rounds must be of one length")
        if control is not None and control.shape != (len(devices), self.layout.size):
            raise ScenarioError(
                f"control variates of shape {tuple(control.shape)} for {len(devices)} devices"
            )
        base = base.detach().to(self.device, self.layout.dtype)
        devices = np.asarray(devices, np.int64)
        x, y, start = self.data.pack(devices)
        size = self.data.size[devices]
        return _Work(
            base=base,
            base_rows=np.asarray(base_rows, np.int64),
            devices=devices,
            rounds=np.asarray(rounds, np.int64),
            start=start,
            size=size,
            batch=config.batch_of(size),
            steps=config.steps_of(size),
            x=x.to(self.device),
            y=y.to(self.device),
            config=config,
            control=control,
        )

    def _chunk_size(self, work: _Work, row: int) -> int:
        """Return how many devices to compute together from this one on, the largest of the rest.

        Past about 16 MB for one stacked tensor the C library maps and clears its memory anew at
        each step, which costs more than batching gains. The hand-batched kernel makes so few
        passes that it pays to keep all of a chunk's weights in the second-level cache.
        """
        if self.chunk is not None:
            return self.chunk
        itemsize = self.layout.dtype.itemsize
        activation = self._largest * int(work.batch[row]) * itemsize
        if isinstance(self._kernel, LinearKernel):
            weights = self.layout.size * itemsize
            return min(_clamp(4_000_000 // weights, 4), _clamp(16_000_000 // activation, 4))
        largest = max(max(self.layout.numel) * itemsize, activation)
        return _clamp(16_000_000 // largest, 8)

    def _run(self, work: _Work, rows: IntArray) -> tuple[Tensor, FloatArray]:
        """Train the devices at `rows` (sorted by steps); return their models and mean losses."""
        if self._kernel is None:
            return self._run_loop(work, rows)
        if self._checked:
            return self._run_stacked(self._kernel, work, rows)
        try:
            result = self._run_stacked(self._kernel, work, rows)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0]
            message = f"{type(self.module).__name__} cannot be mapped over devices: {reason}"
            if self.engine == "vmap":
                raise ScenarioError(f"engine: vmap: {message}") from error
            warnings.warn(
                f"{message}; training device after device instead", RuntimeWarning, stacklevel=4
            )
            self._kernel = None
            return self._run_loop(work, rows)
        self._checked = True
        return result

    def _batches(self, work: _Work, rows: IntArray) -> Batches:
        return make_batches(
            self.seed,
            work.rounds[rows],
            work.devices[rows],
            work.start[rows],
            work.size[rows],
            work.batch[rows],
            work.steps[rows],
            drop_last=work.config.drop_last,
        )

    def _run_stacked(
        self, kernel: Kernel, work: _Work, rows: IntArray
    ) -> tuple[Tensor, FloatArray]:
        config, dtype = work.config, self.layout.dtype
        batches = self._batches(work, rows)
        versions = work.base_rows[rows]
        is_gradient = config.mode == "gradient"
        shared = is_gradient and bool((versions == versions[0]).all())
        state = self._gather(work.base, versions[:1] if shared else versions)
        self.module.train()
        kernel.bind(state, shared=shared)
        control = self._control(work, rows)
        params = [state[name] for name in self.layout.parameters]
        updater = Updater(config, params, config.learning_rate, control)
        fused = isinstance(kernel, LinearKernel) and updater.is_plain and not is_gradient
        index = torch.from_numpy(batches.index).to(self.device)
        weights = torch.from_numpy(batches.weight).to(self.device, dtype)
        labels = work.y.index_select(0, index)
        keys = self._keys(work, rows, len(batches.active))
        losses = torch.zeros(len(rows), dtype=dtype, device=self.device)
        width = batches.width
        grads: list[Tensor] = []
        for t, (k, begin) in enumerate(
            zip(batches.active.tolist(), batches.offset.tolist(), strict=True)
        ):
            part = slice(begin, begin + k * width)
            x = self._inputs(work.x.index_select(0, index[part]))
            x = x.view(k, width, *x.shape[1:])
            y = labels[part].view(k, width, *labels.shape[1:])
            weight = weights[part].view(k, width)
            if fused and isinstance(kernel, LinearKernel):
                step_losses = kernel.plain_step(
                    k, x, y, weight, config.learning_rate, config.weight_decay
                )
            else:
                grads, step_losses = kernel.gradients(k, x, y, weight, keys[t, :k])
                if not is_gradient:
                    updater.step(k, grads)
            losses[:k] += step_losses
        matrix = self._gradient_matrix(grads) if is_gradient else self._matrix(state)
        return matrix, losses.double().cpu().numpy() / work.steps[rows]

    def _run_loop(self, work: _Work, rows: IntArray) -> tuple[Tensor, FloatArray]:
        matrix = torch.empty((len(rows), self.layout.size), dtype=work.base.dtype)
        matrix = matrix.to(self.device)
        losses = np.empty(len(rows))
        self.module.train()
        with torch.random.fork_rng(devices=[]):
            for i, row in enumerate(rows):
                matrix[i], losses[i] = self._train_one(work, int(row))
        return matrix, losses

    def _train_one(self, work: _Work, row: int) -> tuple[Tensor, float]:
        """Train one device with the plain module: the reference of all that is batched."""
        config, one = work.config, slice(row, row + 1)
        state = self._gather(work.base, work.base_rows[one])
        params = self._load({name: value[0] for name, value in state.items()})
        batches = self._batches(work, np.array([row]))
        index = torch.from_numpy(batches.index).to(self.device)
        keys = self._keys(work, np.array([row]), len(batches.active))
        updater = Updater(
            config,
            [state[name] for name in self.layout.parameters],
            config.learning_rate,
            self._control(work, np.array([row])),
        )
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for t, count in enumerate(batches.count.tolist()):
            begin = t * batches.width
            rows = index[begin : begin + count]
            torch.default_generator.manual_seed(int(keys[t, 0]))
            outputs = self.module(self._inputs(work.x.index_select(0, rows)))
            loss = self.loss.per_sample(outputs, work.y.index_select(0, rows)).mean()
            found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            grads = [g.unsqueeze(0) for g in found]
            total += loss.detach()
            if config.mode == "gradient":
                return self._gradient_matrix(grads)[0], float(total)
            updater.step(1, grads)
        return self._matrix(state)[0], float(total) / len(batches.count)

    def _load(self, row: dict[str, Tensor]) -> list[nn.Parameter]:
        """Let the module's tensors be those of `row` (no copy); return the trained ones."""
        for name, value in row.items():
            self._slots[name].data = value
        return [self.module.get_parameter(name) for name in self.layout.parameters]

    def _gather(self, base: Tensor, versions: IntArray) -> dict[str, Tensor]:
        """Return working copies of the models at these rows, one stack for each tensor."""
        if len(base) == 1:
            matrix = base.expand(len(versions), -1)
        else:
            matrix = base.index_select(0, torch.from_numpy(versions).to(self.device))
        views = without_aliases(self.layout.views(matrix), self.layout)
        return {n: v.clone(memory_format=torch.contiguous_format) for n, v in views.items()}

    def _matrix(self, state: dict[str, Tensor]) -> Tensor:
        for name, first in self.layout.aliases:
            state[name] = state[first]
        return self.layout.flatten(state)

    def _gradient_matrix(self, grads: list[Tensor]) -> Tensor:
        found = dict(zip(self.layout.parameters, grads, strict=True))
        k = len(grads[0])
        return torch.cat(
            [
                found[name].reshape(k, -1) if name in found else grads[0].new_zeros((k, n))
                for name, n in zip(self.layout.names, self.layout.numel, strict=True)
            ],
            dim=1,
        )

    def _control(self, work: _Work, rows: IntArray) -> list[Tensor] | None:
        if work.control is None:
            return None
        chosen = work.control[torch.from_numpy(rows)].to(self.device, self.layout.dtype)
        return [
            chosen[:, self.layout.columns(n)].reshape(-1, *self._slots[n].shape)
            for n in self.layout.parameters
        ]

    def _keys(self, work: _Work, rows: IntArray, n_steps: int) -> Tensor:
        """Return the key of each (step, device) for random layers, shape (n_steps, k)."""
        steps = np.arange(n_steps)[:, None]
        keys = bits(self.seed, "local-draws", work.rounds[rows], work.devices[rows], steps)
        return torch.from_numpy((keys >> np.uint64(2)).astype(np.int64)).to(self.device)

    @torch.no_grad()
    def evaluate(self, params: Tensor, x: Tensor, y: Tensor) -> tuple[FloatArray, FloatArray]:
        """Return the mean loss and the accuracy of each model on common data.

        Parameters
        ----------
        params : Tensor, shape (k, P)
        x : Tensor, shape (n, *input_shape)
        y : Tensor, shape (n,) or (n, length)

        Returns
        -------
        loss, accuracy : ndarray of float64, shape (k,)
            The accuracy is NaN for tasks without classes.
        """
        k, n = len(params), len(y)
        loss, hits = np.zeros(k), np.zeros(k)
        self.module.eval()
        per_block = max(1, 16_000_000 // (self._largest * self.layout.dtype.itemsize))
        for models, kernel in self._model_chunks(params):
            for a in range(0, n, per_block):
                y_block = y[a : a + per_block].to(self.device)
                x_block = self._inputs(x[a : a + per_block])
                outputs = kernel(x_block)
                m = outputs.shape[0]
                flat = outputs.flatten(0, 1)
                labels = y_block.repeat(m, *[1] * (y_block.dim() - 1))
                losses = self.loss.per_sample(flat, labels).view(m, -1)
                loss[models] += losses.double().sum(1).cpu().numpy()
                hits[models] += self._hits(flat, labels).view(m, -1).sum(1).cpu().numpy()
        return loss / n, hits / n

    def _model_chunks(self, params: Tensor) -> list[tuple[slice, Callable[[Tensor], Tensor]]]:
        """Return (rows, function from inputs (n, ...) to outputs (c, n, ...)) for all the models.

        On a processor mapping a forward pass gains nothing for convolutions, so only linear
        stacks are batched there.
        """
        params = params.detach().to(self.device, self.layout.dtype)
        kernel = self._kernel
        if (
            len(params) == 1
            or kernel is None
            or not (isinstance(kernel, LinearKernel) or self.device.type != "cpu")
        ):
            return [
                (slice(i, i + 1), self._one_model(params[i : i + 1])) for i in range(len(params))
            ]
        step = self.chunk or 16
        return [
            (slice(a, min(a + step, len(params))), self._many_models(kernel, params[a : a + step]))
            for a in range(0, len(params), step)
        ]

    def _one_model(self, row: Tensor) -> Callable[[Tensor], Tensor]:
        def outputs(x: Tensor) -> Tensor:
            views = without_aliases(self.layout.views(row), self.layout)
            self._load({name: value[0] for name, value in views.items()})
            result: Tensor = self.module(x)
            return result.unsqueeze(0)

        return outputs

    def _many_models(self, kernel: Kernel, rows: Tensor) -> Callable[[Tensor], Tensor]:
        def outputs(x: Tensor) -> Tensor:
            kernel.bind(without_aliases(self.layout.views(rows), self.layout), shared=False)
            return kernel.outputs(x)

        return outputs

    def _hits(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return which samples are right (for sequences: the share of positions)."""
        if self.loss.predict is None or self.data.n_classes == 0:
            return torch.full((len(y),), float("nan"), dtype=torch.float64, device=self.device)
        right = (self.loss.predict(outputs) == y).double()
        return right.flatten(1).mean(1) if right.dim() > 1 else right

    @torch.no_grad()
    def evaluate_devices(
        self, base: Tensor, base_rows: IntArray, devices: IntArray
    ) -> tuple[FloatArray, FloatArray, IntArray]:
        """Return the loss and accuracy of a model on each device's own training data.

        Parameters
        ----------
        base : Tensor, shape (V, P)
        base_rows, devices : ndarray of int64, shape (k,)

        Returns
        -------
        loss, accuracy : ndarray of float64, shape (k,)
        samples : ndarray of int64, shape (k,)
        """
        x, y, start = self.data.pack(np.asarray(devices, np.int64))
        size = self.data.size[devices]
        loss, hits = np.zeros(len(devices)), np.zeros(len(devices))
        self.module.eval()
        # All the devices that one model goes to are one long batch.
        for version in np.unique(base_rows):
            rows = np.flatnonzero(base_rows == version)
            model = self._one_model(base[version : version + 1].to(self.device, self.layout.dtype))
            owner = np.repeat(np.arange(len(rows)), size[rows])
            begin = np.cumsum(size[rows]) - size[rows]
            index = start[rows][owner] + np.arange(len(owner)) - begin[owner]
            per_block = max(1, 16_000_000 // (self._largest * self.layout.dtype.itemsize))
            for a in range(0, len(index), per_block):
                chosen = torch.from_numpy(index[a : a + per_block])
                labels = y[chosen].to(self.device)
                outputs = model(self._inputs(x[chosen]))[0]
                losses = self.loss.per_sample(outputs, labels).double().cpu().numpy()
                right = self._hits(outputs, labels).cpu().numpy()
                held = owner[a : a + per_block]
                loss[rows] += np.bincount(held, losses, minlength=len(rows))
                hits[rows] += np.bincount(held, right, minlength=len(rows))
        return loss / size, hits / size, size


def _clamp(value: int, low: int) -> int:
    return max(low, min(value, 2048))


def _device(name: str) -> torch.device:
    """Return the torch device of that name, or say what is wrong with it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ScenarioError(f"device: {name!r} is not cpu, cuda, cuda:N or auto") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ScenarioError(f"device: {name!r} was asked for, but torch finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ScenarioError(
            f"device: {name!r} was asked for, there are {torch.cuda.device_count()} CUDA devices"
        )
    return device
