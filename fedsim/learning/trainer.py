"""Local training of many devices at once.

Decision: which engine and which chunk size are used follows from the model, the batch size and the
kind of device, never from a measurement: another choice changes the results by rounding, and the
same scenario must write the same bytes every time.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsim.data.federated import DeviceData
from fedsim.errors import ScenarioError
from fedsim.learning import evaluation
from fedsim.learning.attacks import Attacks
from fedsim.learning.batches import Batches, make_batches
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.draws import KeyedLayers
from fedsim.learning.kernels import Batch, Kernel, LinearKernel, VmapKernel
from fedsim.learning.layout import Layout
from fedsim.learning.linear import linear_layers
from fedsim.learning.losses import Loss, loss_of
from fedsim.learning.memory import check_room, free_bytes
from fedsim.learning.optimizers import Updater
from fedsim.learning.stack import ModelStack, Precision, State, torch_device
from fedsim.streams import bits

__all__ = ["Collect", "LocalResult", "Trainer"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Collect = Callable[[IntArray, Tensor], None]
Engine = Literal["auto", "linear", "vmap", "loop"]
# On a processor mapping saves 0.3 to 0.5 ms of dispatch a step, but convolutions and attention run
# slower mapped than one after another: it pays below about this many operations a step, and as
# long as a model's weights and gradient stay in the cache. Recurrent layers cannot be mapped there.
_MAPPED_FLOPS, _MAPPED_BYTES = 25_000_000, 400_000
_NO_TERMS = LocalTerms()
_NO_KEYS = torch.zeros(0, dtype=torch.int64)
_MAP_ERRORS = (RuntimeError, ValueError, TypeError, NotImplementedError)


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
    rates: FloatArray
    x: Tensor
    y: Tensor
    config: LocalConfig
    terms: LocalTerms


class Trainer:
    """Trains and scores models of many devices; stateless between calls.

    Parameters
    ----------
    module : nn.Module
        The model. It is copied and never changed.
    data : FederatedData or StreamedData
    loss : str, Loss or callable, optional
        A name of `losses.LOSSES` or a function `(outputs, y) -> Tensor (n,)`; default: what the
        model was made for (`models`), else cross-entropy or, without classes, the squared error.
    seed : int
        Of the sample order and of all other draws.
    chunk : int, optional
        Devices computed together; default: as many as the caches (or the GPU's memory) like.
    engine : {"auto", "linear", "vmap", "loop"}
        `linear`: hand-batched matrix products, for stacks of linear layers; `vmap`: any module,
        mapped over the devices; `loop`: device after device, the reference. `auto` takes the first
        that serves, loops over models too large to gain by mapping, and falls back to the loop,
        with one warning, if a module cannot be mapped.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``.
    precision : {"exact", "tf32", "bfloat16"}
        Of the arithmetic; weights, optimiser state and results keep the module's type.
    attacks : Attacks, optional
        What devices do to their results.

    Raises
    ------
    ScenarioError
        If the model does not fit the data, or the engine or device cannot serve.
    """

    def __init__(
        self,
        module: nn.Module,
        data: DeviceData,
        *,
        loss: str | Loss | Callable[[Tensor, Tensor], Tensor] | None = None,
        seed: int,
        chunk: int | None = None,
        engine: Engine = "auto",
        device: str = "cpu",
        precision: Precision = "exact",
        attacks: Attacks | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise ScenarioError(f"chunk: {chunk} is not at least 1")
        self.data, self.seed, self.chunk, self.engine = data, seed, chunk, engine
        self.attacks = attacks
        if loss is None:
            usual = "cross_entropy" if data.n_classes else "squared_error"
            loss = str(getattr(module, "task_loss", usual))
        self.stack = ModelStack(module, data, loss_of(loss), torch_device(device), precision)
        self._kernel = self._choose_kernel()
        # The extra losses (None for none) that could be mapped, and could not, in the last calls.
        self._proven: list[object] = []
        self._refused: list[object] = []
        self._has_flat_norm = any(isinstance(m, nn.BatchNorm1d) for m in module.modules())
        self._may_draw = True  # whether the plain module has, or may have, layers that draw
        self._resident: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def layout(self) -> Layout:
        """Names, shapes and places of the model's tensors in a row."""
        return self.stack.layout

    def _choose_kernel(self) -> Kernel | None:
        layers = linear_layers(self.stack.module)
        loss = self.stack.loss
        can_batch = (
            layers is not None and loss.gradient is not None and not self.stack.compute_dtype
        )
        if self.engine == "linear" and not can_batch:
            raise ScenarioError(
                "engine: linear needs a stack of linear layers and a built-in loss, not "
                f"{type(self.stack.module).__name__} with {loss.name!r} in this precision"
            )
        if self.engine == "loop":
            return None
        if layers is not None and can_batch and self.engine != "vmap":
            return LinearKernel(layers, self.layout, loss)
        return VmapKernel(self.stack)

    def initial(self) -> Tensor:
        """Return the weights that the module came with, shape (P,) (see `models.build_model`)."""
        return self.stack.initial.clone()

    def workload(
        self, devices: IntArray, rounds: IntArray, config: LocalConfig
    ) -> tuple[IntArray, IntArray]:
        """Return how many local steps each device makes, and how many samples it goes through.

        Parameters
        ----------
        devices, rounds : ndarray of int64, shape (k,)
        config : LocalConfig

        Returns
        -------
        steps, samples : ndarray of int64, shape (k,)
        """
        size = self.data.size[devices]
        steps = config.steps_of(size, seed=self.seed, rounds=rounds, devices=devices)
        batch = config.batch_of(size)
        if config.drop_last:
            return steps, steps * batch
        per_epoch = -(-size // batch)
        epochs, rest = np.divmod(steps, per_epoch)
        return steps, epochs * size + np.minimum(rest * batch, size)

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
        terms : LocalTerms
            What the strategy adds to the local objective.
        collect : callable, optional
            `(rows (c,), params (c, P))` is called as each chunk is done, and the result holds no
            models: memory then grows with the chunk, not with k.

        Raises
        ------
        ScenarioError
            If shapes do not fit together, a module cannot be mapped and `engine` is ``"vmap"``,
            or one device alone does not fit into the GPU's memory.
        """
        try:
            work = self._plan(base, base_rows, devices, rounds, config, terms)
        except torch.OutOfMemoryError as error:
            raise ScenarioError(
                f"device: the data and the models sent do not fit into {self.stack.device}"
            ) from error
        k = len(devices)
        loss = np.empty(k)
        order = np.lexsort((-work.size, -work.steps))
        params = None
        if collect is None:
            check_room(self.stack.device, k * self.layout.size * work.base.dtype.itemsize, k)
            params = torch.empty(
                (k, self.layout.size), dtype=work.base.dtype, device=work.base.device
            )
        kernel = self._kernel_for(work)
        first, limit = 0, k
        while first < k:
            size = min(self._chunk_size(kernel, work, int(order[first])), limit)
            rows = order[first : first + size]
            try:
                with torch.no_grad(), self.stack.arithmetic():
                    done, losses = self._run(kernel, work, rows)
                    if isinstance(done, dict) and (params is None or self.attacks is not None):
                        done = self.stack.matrix(done)
            except torch.OutOfMemoryError as error:
                limit = len(rows) // 2
                if limit == 0:
                    raise ScenarioError(
                        f"device: the training of one device does not fit into {self.stack.device}"
                    ) from error
            if limit < len(rows):  # the frames that held the chunk are gone by now
                torch.cuda.empty_cache()
                continue
            loss[rows] = losses
            is_whole = collect is None and self.attacks is None and _is_range(rows, k)
            if is_whole and isinstance(done, Tensor):
                params = done
            else:
                self._hand_over(work, rows, done, params, collect)
            first += len(rows)
        return LocalResult(params, loss, work.size, work.steps)

    def _hand_over(
        self,
        work: _Work,
        rows: IntArray,
        done: State | Tensor,
        params: Tensor | None,
        collect: Collect | None,
    ) -> None:
        """Put a chunk's models, as stacked tensors or as rows, into `params`, or let collect."""
        if isinstance(done, dict):
            assert params is not None
            self.stack.write(done, params, rows)
            return
        if self.attacks is not None:
            came = work.base[torch.from_numpy(work.base_rows[rows]).to(work.base.device)]
            is_gradient = work.config.mode == "gradient"
            self.attacks.apply(
                came, done, work.devices[rows], work.rounds[rows], is_gradient=is_gradient
            )
        if collect is not None:
            collect(rows, done)
        elif params is not None:
            params.index_copy_(0, torch.from_numpy(rows).to(params.device), done)

    def _plan(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        rounds: IntArray,
        config: LocalConfig,
        terms: LocalTerms,
    ) -> _Work:
        k, p = len(devices), self.layout.size
        if terms.proximal_mu is not None:
            config = replace(config, proximal_mu=terms.proximal_mu)
        if base.dim() != 2 or base.shape[1] != p:
            raise ScenarioError(
                f"model versions of shape {tuple(base.shape)} do not fit a model of {p} numbers"
            )
        if not k == len(base_rows) == len(rounds):
            raise ScenarioError("devices, base_rows and rounds must be of one length")
        for name, matrix in (("control", terms.control), ("center", terms.center)):
            if matrix is not None and matrix.shape != (k, p):
                raise ScenarioError(
                    f"{name} of shape {tuple(matrix.shape)} does not fit {k} devices, {p} numbers"
                )
        devices, rounds = np.asarray(devices, np.int64), np.asarray(rounds, np.int64)
        x, y, start = self._pack(devices)
        size = self.data.size[devices]
        return _Work(
            base=base.detach().to(self.stack.device, self.stack.dtype),
            base_rows=np.asarray(base_rows, np.int64),
            devices=devices,
            rounds=rounds,
            start=start,
            size=size,
            batch=config.batch_of(size),
            steps=config.steps_of(size, seed=self.seed, rounds=rounds, devices=devices),
            rates=config.rates(rounds),
            x=x,
            y=y,
            config=config,
            terms=terms,
        )

    def _kernel_for(self, work: _Work) -> Kernel | None:
        """Return the kernel for this call; None is the loop."""
        kernel, extra = self._kernel, work.terms.extra_loss
        if kernel is not None and extra is not None:
            kernel = VmapKernel(self.stack, extra)
        if self._refused == [extra]:
            return None
        if not isinstance(kernel, VmapKernel) or self.engine != "auto":
            return kernel
        if self.stack.device.type != "cpu":
            return kernel
        flops = 3 * self.stack.forward_flops * int(work.batch.max(initial=0))
        n_bytes = self.layout.size * self.stack.dtype.itemsize
        is_recurrent = any(isinstance(m, nn.RNNBase) for m in self.stack.module.modules())
        pays = flops < _MAPPED_FLOPS and n_bytes < _MAPPED_BYTES and not is_recurrent
        return kernel if pays else None

    def _pack(self, devices: IntArray) -> tuple[Tensor, Tensor, IntArray]:
        """Return the devices' data where the model is; data that stay the same are moved once."""
        x, y, start = self.data.pack(devices)
        if self.stack.device.type == "cpu":
            return x, y, start
        if self._resident is None or self._resident[0] is not x:
            self._resident = x, x.to(self.stack.device), y.to(self.stack.device)
        return self._resident[1], self._resident[2], start

    def _chunk_size(self, kernel: Kernel | None, work: _Work, row: int) -> int:
        """Return how many devices to compute together from this one on, the largest of the rest.

        Past about 16 MB for one stacked tensor the C library maps and clears its memory anew at
        each step, which costs more than batching gains. The hand-batched kernel makes so few
        passes that it pays to keep a chunk's weights small: of 6 to 16 MB, the best depends on the
        processor and on its load (benchmarks/learning.py chunks). A GPU takes
        what fits: weights, gradients, optimiser state, and three times the largest activation for
        each layer.
        """
        if self.chunk is not None:
            return self.chunk
        itemsize = self.stack.dtype.itemsize
        activation = self.stack.largest_activation * int(work.batch[row]) * itemsize
        weights = self.layout.size * itemsize
        if self.stack.device.type == "cuda":
            one = 6 * weights + 3 * len(self.layout.parameters) * activation
            return _clamp(int(0.8 * free_bytes(self.stack.device)) // one, 1, 16_384)
        if isinstance(kernel, LinearKernel):
            return _clamp(min(8_000_000 // weights, 16_000_000 // activation), 4, 2048)
        largest = max(max(self.layout.numel) * itemsize, activation)
        return _clamp(16_000_000 // largest, 8, 2048)

    def _run(
        self, kernel: Kernel | None, work: _Work, rows: IntArray
    ) -> tuple[State | Tensor, FloatArray]:
        """Train the devices at `rows` (sorted by steps); return their models and mean losses."""
        extra = work.terms.extra_loss
        if kernel is None or self._kernel is None or self._refused == [extra]:
            return self._run_loop(work, rows)
        if isinstance(kernel, LinearKernel) or self._proven == [extra]:
            return self._run_stacked(kernel, work, rows)
        try:
            result = self._run_stacked(kernel, work, rows)
        except torch.OutOfMemoryError:
            raise
        except _MAP_ERRORS as error:
            name = type(self.stack.module).__name__
            name += "" if extra is None else " with a strategy's extra loss"
            reason = str(error).strip().splitlines()[0]
            message = f"{name} cannot be mapped over devices: {reason}"
            if self.engine == "vmap":
                raise ScenarioError(f"engine: vmap: {message}") from error
            warnings.warn(
                f"{message}; training device after device instead", RuntimeWarning, stacklevel=4
            )
            if extra is None:
                self._kernel = None
            self._refused = [extra]
            return self._run_loop(work, rows)
        self._proven = [extra]
        return result

    def _batches(self, work: _Work, rows: IntArray) -> Batches:
        batches = make_batches(
            self.seed,
            work.rounds[rows],
            work.devices[rows],
            work.start[rows],
            work.size[rows],
            work.batch[rows],
            work.steps[rows],
            drop_last=work.config.drop_last,
        )
        if self._has_flat_norm and batches.count.min() == 1:
            raise ScenarioError(
                "training.batch_size: a device's batch has one sample, whose variance BatchNorm1d "
                "cannot take; choose another batch_size, or drop_last: true"
            )
        return batches

    def _updater(self, work: _Work, rows: IntArray, params: Sequence[Tensor]) -> Updater:
        rates = work.rates[rows]
        rate: float | Tensor = float(rates[0])
        if (rates != rates[0]).any():
            rate = torch.from_numpy(rates).to(self.stack.device, self.stack.dtype)
        control = self.stack.trained(work.terms.control, rows)
        return Updater(
            work.config, params, rate, control, self.stack.trained(work.terms.center, rows)
        )

    def _run_stacked(
        self, kernel: Kernel, work: _Work, rows: IntArray
    ) -> tuple[State | Tensor, FloatArray]:
        """Train a chunk; between the copies here and the last line a GPU is never waited for."""
        stack, config, device = self.stack, work.config, self.stack.device
        batches = self._batches(work, rows)
        versions = work.base_rows[rows]
        is_gradient = config.mode == "gradient"
        shared = is_gradient and bool((versions == versions[0]).all())
        if is_gradient and isinstance(kernel, LinearKernel) and _is_range(versions, len(work.base)):
            state = stack.views(work.base)  # nothing is ever written to
        else:
            state = stack.gather(work.base, versions[:1] if shared else versions)
        stack.module.train()
        kernel.bind(state, shared=shared)
        updater = self._updater(work, rows, [state[name] for name in self.layout.parameters])
        index = torch.from_numpy(batches.index).to(device)
        weights = torch.from_numpy(batches.weight).to(device, stack.dtype)
        labels = work.y.index_select(0, index)
        keys = _NO_KEYS
        if kernel.draws:
            keys = self._keys(work, rows, len(batches.active)).to(device)
        extra = {n: v[torch.from_numpy(rows)].to(device) for n, v in work.terms.rows.items()}
        losses = torch.empty(0)
        width = batches.width
        grads: list[Tensor] = []
        for t, (k, begin) in enumerate(
            zip(batches.active.tolist(), batches.offset.tolist(), strict=True)
        ):
            part, y, weight = index, labels, weights
            if k * width < len(index):
                step = slice(begin, begin + k * width)
                part, y, weight = index[step], labels[step], weights[step]
            x = stack.inputs(work.x.index_select(0, part))
            batch = Batch(
                x.view(k, width, *x.shape[1:]),
                y.view(k, width, *y.shape[1:]),
                weight.view(k, width),
                keys[t, :k] if kernel.draws else keys,
                {name: value[:k] for name, value in extra.items()},
            )
            if isinstance(kernel, LinearKernel) and updater.is_plain and not is_gradient:
                step_losses = kernel.plain_step(batch, updater.rate, config.weight_decay)
            else:
                grads, step_losses = kernel.gradients(batch)
                if not is_gradient:
                    updater.step(k, grads)
            if t == 0:  # every device makes one
                losses = step_losses.to(stack.dtype)
            else:
                losses[:k].add_(step_losses)
        done = stack.gradient_matrix(grads) if is_gradient else state
        return done, _numbers(losses) / work.steps[rows]

    def _run_loop(self, work: _Work, rows: IntArray) -> tuple[Tensor, FloatArray]:
        """Train device after device with the plain module: the reference of all that is batched."""
        batches = self._batches(work, rows)
        index = torch.from_numpy(batches.index).to(self.stack.device)
        seeds = self._keys(work, rows, len(batches.active))
        matrix = work.base.new_empty((len(rows), self.layout.size))
        losses = work.base.new_empty(len(rows), dtype=torch.float64)
        self.stack.module.train()
        first_block = batches.offset // batches.width
        with _own_generator(self.stack.device):
            for i in range(len(rows)):
                blocks = first_block[: work.steps[rows[i]]] + i
                chosen = [
                    index[b * batches.width : b * batches.width + n]
                    for b, n in zip(blocks.tolist(), batches.count[blocks].tolist(), strict=True)
                ]
                matrix[i], losses[i] = self._train_one(work, rows[i : i + 1], chosen, seeds[:, i])
        self.stack.release()
        return matrix, _numbers(losses)

    def _train_one(
        self, work: _Work, one: IntArray, batches: list[Tensor], seeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Train one device on these batches of rows; return its model and mean loss."""
        stack, config = self.stack, work.config
        state = stack.gather(work.base, work.base_rows[one])
        stack.load(state)
        params = [stack.module.get_parameter(name) for name in self.layout.parameters]
        updater = self._updater(work, one, [state[name] for name in self.layout.parameters])
        extra = {name: value[one[0]] for name, value in work.terms.rows.items()}
        losses = []
        keys = seeds.to(stack.device)
        for chosen, key, number in zip(batches, keys, seeds.tolist(), strict=False):
            x = stack.inputs(work.x.index_select(0, chosen))
            y = work.y.index_select(0, chosen)
            _seed(stack.device, number)  # for what draws without `KeyedLayers`
            with torch.enable_grad():
                if self._may_draw:
                    with KeyedLayers(key, None) as layers:
                        outputs = self._forward(x)
                    # Standing between module and torch costs as much as a small model's step.
                    self._may_draw = layers.calls > 0 or stack.compute_dtype is not None
                else:
                    outputs = self._forward(x)
                each = stack.loss.per_sample(outputs, y)
                if work.terms.extra_loss is not None:
                    each = each + work.terms.extra_loss(outputs, x, y, extra)
                loss = each.mean()
                found = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            grads = [g.unsqueeze(0) for g in found]
            losses.append(loss.detach())
            if config.mode == "gradient":
                return stack.gradient_matrix(grads)[0], loss.detach().double()
            updater.step(1, grads)
        return stack.matrix(state)[0], torch.stack(losses).double().mean()

    def _forward(self, x: Tensor) -> Tensor:
        if self.stack.compute_dtype is None:
            outputs: Tensor = self.stack.module(x)
            return outputs
        return self.stack.call(dict(self.stack.module.named_parameters()), {}, x)

    def _keys(self, work: _Work, rows: IntArray, n_steps: int) -> Tensor:
        """Return the key of each (step, device) for random layers, shape (n_steps, k)."""
        steps = np.arange(n_steps)[:, None]
        keys = bits(self.seed, "local-draws", work.rounds[rows], work.devices[rows], steps)
        return torch.from_numpy((keys >> np.uint64(2)).astype(np.int64))

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
        return evaluation.evaluate(self.stack, self._kernel, params, x, y)

    def confusion(self, params: Tensor, x: Tensor, y: Tensor) -> IntArray:
        """Return how often each model takes a sample of one class for another.

        Returns
        -------
        ndarray of int64, shape (k, n_classes, n_classes)
            Rows are the true classes, columns the predicted ones.
        """
        return evaluation.confusion(self.stack, self._kernel, params, x, y)

    def evaluate_devices(
        self,
        base: Tensor,
        base_rows: IntArray,
        devices: IntArray,
        *,
        split: Literal["train", "test"] = "train",
    ) -> tuple[FloatArray, FloatArray, IntArray]:
        """Return the loss and accuracy of a model on each device's own data.

        Parameters
        ----------
        base : Tensor, shape (V, P)
        base_rows, devices : ndarray of int64, shape (k,)
        split : {"train", "test"}
            The device's training samples, or those it keeps for its own test (personalisation).

        Returns
        -------
        loss, accuracy : ndarray of float64, shape (k,)
            NaN for a device without such samples.
        samples : ndarray of int64, shape (k,)
        """
        x, y, start, size = self.data.local_set(np.asarray(devices, np.int64), split)
        loss, accuracy = evaluation.evaluate_devices(
            self.stack, base, np.asarray(base_rows, np.int64), x, y, start, size
        )
        return loss, accuracy, size


@contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _seed(device: torch.device, key: int) -> None:
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(key)


def _numbers(values: Tensor) -> FloatArray:
    """Bring results from wherever they are: the one place where a GPU is waited for."""
    numbers: FloatArray = values.double().cpu().numpy()
    return numbers


def _is_range(rows: IntArray, n: int) -> bool:
    """Return whether these are the rows 0..n-1, in order."""
    return len(rows) == n and bool((rows == np.arange(n)).all())


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
