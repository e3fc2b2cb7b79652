"""Device halves: what a device does besides local training, written once for many rows.

The vectorised executor of a simulator calls a half on all rows of a round; `as_mod` makes a Flower
client mod of the same code, for one device, with its state in `Context.state`.

Decision: a draw is the splitmix64 sequence of a key made of (seed, purpose, round, device), in
integer arithmetic that is equal on every kind of processor. A half therefore draws the same numbers
in a simulator, in an app, and in any batch.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

__all__ = [
    "DeviceHalf",
    "DeviceWork",
    "Draws",
    "KeyedDraws",
    "LocalTerms",
    "Payload",
    "RoundDraws",
    "as_mod",
    "merged_config",
]

Tensors = dict[str, Tensor]
ROUNDS = 1 << 32  # rounds are below; its multiples tell apart the draws of work that is repeated
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_STEP, _FIRST, _SECOND = np.uint64(_GOLDEN), np.uint64(_MIX_1), np.uint64(_MIX_2)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_ROUND = "-round"  # of the instruction that a state was made by
_BLOCK = 1 << 15  # numbers hashed at a time: they stay in the cache
_AHEAD = 1 << 16  # numbers drawn at a time for rounds to come


class Draws(Protocol):
    """Uniform draws of a call of a half: one row for each device."""

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a tensor ``(n, *shape)`` of uniform numbers in [0, 1), new at each call."""


class Payload(Protocol):
    """Rows that are sent in an encoding of their own, such as `compression.Packed`."""

    def array(self, row: int) -> Array:
        """Return what one row sends."""


class KeyedDraws:
    """Uniform draws named by a seed, a purpose and words such as round and device.

    Parameters
    ----------
    seed : int or ndarray of int, shape (n,)
    purpose : str
    *words : int or ndarray of int
        They broadcast to shape (n,).
    device : torch.device
        Where the numbers are wanted.
    first_call : int
        How many calls to leave out.
    """

    def __init__(
        self,
        seed: ArrayLike,
        purpose: str,
        *words: ArrayLike,
        device: torch.device | str = "cpu",
        first_call: int = 0,
    ) -> None:
        with np.errstate(over="ignore"):
            key = np.atleast_1d(_mixed(np.asarray(seed).astype(np.uint64) ^ _digest(purpose)))
            for word in words:
                key = _mixed(key ^ np.asarray(word).astype(np.uint64))
        self._key: NDArray[np.uint64] = key
        self._calls = first_call
        self._device = device
        self._on_cpu = torch.device(device).type == "cpu"

    def __call__(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Return a tensor ``(n, *shape)``; float32 has 24 random bits, float64 53."""
        key = _mixed(self._key ^ np.uint64(self._calls)) if self._calls else self._key
        self._calls += 1
        width = math.prod(shape)
        bits = 53 if dtype == torch.float64 else 24
        if self._on_cpu:
            return _drawn(key, width, bits).to(dtype).view(len(key), *shape)
        first = torch.from_numpy(key.view(np.int64)).to(self._device)[:, None]
        out = torch.empty((len(key), width), dtype=dtype, device=self._device)
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            z = torch.arange(start + 1, stop + 1, device=self._device)
            z = z.mul_(_signed(_GOLDEN)).add(first)
            z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(_MIX_1))
            z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(_MIX_2))
            z.bitwise_xor_(_shifted(z, 31))
            out[:, start:stop] = _shifted(z, 64 - bits)
        return out.mul_(2.0**-bits).view(len(key), *shape)


def _drawn(key: NDArray[np.uint64], width: int, bits: int) -> Tensor:
    """Return uniform numbers of so many bits, (n, width), made in parts that stay in the cache."""
    out = np.empty((len(key), width), np.float64 if bits > 24 else np.float32)
    step = max(1, _BLOCK // max(1, len(key)))
    for start in range(0, width, step):
        stop = min(start + step, width)
        z = _stirred(np.arange(start + 1, stop + 1, dtype=np.uint64) * _STEP + key[:, None])
        z >>= np.uint64(64 - bits)
        np.multiply(z.view(np.int64), 2.0**-bits, out=out[:, start:stop], casting="same_kind")
    return torch.from_numpy(out)


class RoundDraws:
    """The `KeyedDraws` of the same rows in round after round, many rounds in one go.

    Parameters
    ----------
    seed : ndarray of int, shape (n,)
    purpose : str
    device : ndarray of int, shape (n,)
        The word after the round.
    place : torch.device
        Where the numbers are wanted.
    """

    def __init__(
        self,
        seed: NDArray[np.int64],
        purpose: str,
        device: NDArray[np.int64],
        place: torch.device | str = "cpu",
    ) -> None:
        self._seed, self._purpose, self._device, self._place = seed, purpose, device, place
        # Of each call in a round: the first round drawn, the shape and dtype, and (n, *shape) each.
        self._drawn: dict[int, tuple[int, Any, Sequence[Tensor]]] = {}

    def at(self, k: int) -> Draws:
        """Return the draws of round k."""
        calls = count()

        def draws(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
            call = next(calls)
            kind = (tuple(shape), dtype)
            first, known, drawn = self._drawn.get(call, (k, kind, ()))
            if known != kind or not 0 <= k - first < len(drawn):
                first, drawn = k, self._draw(k, call, shape, dtype)
                self._drawn[call] = k, kind, drawn
            return drawn[k - first]

        return draws

    def _draw(
        self, k: int, call: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Sequence[Tensor]:
        """Return call number `call` of round k and, if it is a small one, of some that follow."""
        n = len(self._seed)
        rounds = max(1, _AHEAD // (n * math.prod(shape) or 1))
        each = np.arange(k, k + rounds).repeat(n)
        seed, device = np.tile(self._seed, rounds), np.tile(self._device, rounds)
        keyed = KeyedDraws(seed, self._purpose, each, device, device=self._place, first_call=call)
        return keyed(shape, dtype).view(rounds, n, *shape).unbind()


class DrawsAhead:
    """The draws of a half: of rounds to come, too, where the same devices work round after round.

    It holds nothing but what could be drawn again; copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        # Devices and round of the last draws; where it came after the one before, what is ahead.
        self._last: tuple[NDArray[np.int64], int, RoundDraws | None] | None = None

    def __reduce__(self) -> tuple[type["DrawsAhead"], tuple[()]]:
        return DrawsAhead, ()

    def of(
        self, seed: int, purpose: str, rounds: ArrayLike, devices: ArrayLike, place: Any
    ) -> Draws:
        """Return ``KeyedDraws(seed, purpose, rounds, devices, device=place)``, or its equal."""
        number, device = np.asarray(rounds), np.asarray(devices)
        if device.ndim != 1 or not len(device) or (number != (k := number.flat[0])).any():
            return KeyedDraws(seed, purpose, rounds, devices, device=place)
        last = self._last
        if last is None or last[1] + 1 != k or not np.array_equal(last[0], device):
            self._last = device, int(k), None
            return KeyedDraws(seed, purpose, rounds, devices, device=place)
        ahead = last[2] or RoundDraws(np.full(len(device), seed), purpose, device, place)
        self._last = device, int(k), ahead
        return ahead.at(int(k))


def _signed(value: int) -> int:
    return value - (1 << 64)


def _shifted(z: Tensor, n: int) -> Tensor:
    """Shift to the right with zeros (torch copies the sign)."""
    return (z >> n).bitwise_and_((1 << (64 - n)) - 1)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _stirred(np.asarray(values + _STEP))


def _stirred(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit words in place (SplitMix64's finaliser, as `fedsim.streams`); return them."""
    z ^= z >> _30
    z *= _FIRST
    z ^= z >> _27
    z *= _SECOND
    z ^= z >> _31
    return z


@cache
def _digest(purpose: str) -> np.uint64:
    return np.uint64(
        int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "big")
    )


@dataclass(frozen=True)
class LocalTerms:
    """What a half adds to the local objective of its devices.

    In a step, after the weight decay: the proximal pull, then the control variate, then clipping
    and the optimiser. In gradient mode no step is made, and only the extra loss counts.

    Parameters
    ----------
    control : dict of Tensor, shape (n, *shape), optional
        Added to the gradients of every step, by the names of the model's parameters; a name left
        out adds nothing. SCAFFOLD's c - c_i, FedDyn's -h_i.
    proximal_mu : float, optional
        Strength μ of the pull μ (w - center); default: the config's ``proximal-mu``.
    center : dict of Tensor, shape (n, *shape), optional
        Where to; default: the model received.
    extra_loss : callable, optional
        ``(outputs (b, ...), x (b, ...), y (b, ...), rows) -> Tensor (b,)`` of one device, added to
        the loss of each sample. It treats samples one by one (a batch may be padded) and is made
        of differentiable torch operations without branches on values.
    rows : dict of Tensor, shape (n, ...)
        What `extra_loss` is given of its device, without the leading axis.
    """

    control: Tensors | None = None
    proximal_mu: float | None = None
    center: Tensors | None = None
    extra_loss: Callable[[Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor] | None = None
    rows: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceHalf:
    """What a device does around its local work; subclasses override what they need.

    All tensors have the device as leading axis. All rows of a call have the same config, the same
    arrays and the same entries in their state; what a method returns is never written to.

    Parameters
    ----------
    seed : int
        Of the half's draws.

    Attributes
    ----------
    name : str
        Names the half's state and its draws, and replies that it was applied.
    goes_round_mods : bool
        Whether Flower's own mods (clipping) see what the half decodes and is yet to encode.
    completes_models : bool
        Whether models to evaluate, too, lack what the half keeps: `receive` is then called for
        them as well, and the state that it returns is dropped.
    """

    seed: int = 0
    _ahead: DrawsAhead = field(default_factory=DrawsAhead, init=False, repr=False, compare=False)
    name: ClassVar[str] = "half"
    goes_round_mods: ClassVar[bool] = False
    completes_models: ClassVar[bool] = False

    def draws(self, rounds: ArrayLike, devices: ArrayLike, device: Any = "cpu") -> Draws:
        """Return the draws of these devices in these rounds."""
        return self._ahead.of(self.seed, self.name, rounds, devices, device)

    def as_mod(self) -> Callable[[Message, Context, ClientAppCallable], Message]:
        """Return the half as a Flower client mod; see `as_mod`."""
        return as_mod(self)

    def work(self, message: Message, context: Context) -> "DeviceWork":
        """Return what a training loop of one's own needs of the half; see `DeviceWork`."""
        return DeviceWork(self, message, context)

    def check(self, sizes: Sequence[int]) -> None:
        """Raise a ValueError if a model with floating-point tensors of these sizes does not fit."""

    def unpack(self, contents: Sequence[RecordDict]) -> Tensors:
        """Return the arrays of instructions, one tensor ``(n, *shape)`` per key."""
        records = [next(iter(content.array_records.values())) for content in contents]
        return {key: stacked([record[key] for record in records]) for key in records[0]}

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Return the model to work on, and the new state."""
        return arrays, state

    def local(self, state: Tensors, config: Mapping[str, Any]) -> LocalTerms | None:
        """Return what is added to the local objective, None for nothing.

        `state` is what `receive` returned.
        """
        return None

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Mapping[str, Tensor | Payload], Tensors]:
        """Return what is sent back instead of the work, and the new state.

        A half with a `local` part finds two more entries in `config`: ``steps-made`` (Tensor of
        int64, shape (n,)), how many local steps each device made, and ``rate-used`` (Tensor of
        float64, shape (n,)), at which learning rate.
        """
        return work, state


def stacked(arrays: Sequence[Array]) -> Tensor:
    """Return arrays of one shape as rows; rows of a common stack are taken from it."""
    common: Tensor | None = getattr(arrays[0], "stack", None)
    if common is not None and all(getattr(a, "stack", None) is common for a in arrays):
        return common[[a.row for a in arrays]]  # type: ignore[attr-defined]
    if all(array is arrays[0] for array in arrays):
        one = torch.from_numpy(arrays[0].numpy())
        return one.expand(len(arrays), *one.shape)
    return torch.stack([torch.from_numpy(array.numpy()) for array in arrays])


def merged_config(content: RecordDict) -> dict[str, Any]:
    """Return the config of an instruction: all its ConfigRecords but ``exchange``."""
    merged: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ConfigRecord) and name != "exchange":
            merged.update(record)
    return merged


class DeviceWork:
    """One instruction's way through a half, around a training loop of one's own.

    ::

        @app.train()
        def train(message, context):
            work = half.work(message, context)
            model.load_state_dict(work.arrays)
            ...
                loss = (criterion(outputs, y) + work.extra_loss(outputs, x, y)).mean()
                loss.backward()
                work.add_to_gradients(model)
                optimizer.step()
            return work.reply(model.state_dict(), metrics, steps=n_steps)

    Parameters
    ----------
    half : DeviceHalf
        Its state is kept in ``context.state`` under the half's name.
    message : Message
        The train instruction.
    context : Context

    Attributes
    ----------
    arrays : dict of Tensor, shape (*shape)
        The model to work on.
    config : dict
        The instruction's.
    terms : LocalTerms or None
        What is added to the local objective, one row.
    content : RecordDict
        The instruction with `arrays` instead of what was sent.
    """

    def __init__(self, half: DeviceHalf, message: Message, context: Context) -> None:
        self.config = merged_config(message.content)
        device = int(context.node_config.get("partition-id", context.node_id))
        number, repeat = _turn(self.config)
        self._draws = half.draws(number + ROUNDS * repeat, device)
        saved = context.state.array_records.get(half.name, ArrayRecord())
        state = {key: torch.from_numpy(array.numpy())[None] for key, array in saved.items()}
        received = half.unpack([message.content])
        params, self._state = half.receive(received, state, self.config, self._draws)
        self.terms = half.local(self._state, self.config)
        self.arrays = {key: value[0] for key, value in params.items()}
        self.content = _replaced(message.content, "arrays", _record(params))
        self.content.pop(half.name, None)  # what is for the half alone: some mods count records
        self._half, self._message, self._context = half, message, context

    def extra_loss(self, outputs: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return what the half adds to the loss of each sample, shape (b,)."""
        if self.terms is None or self.terms.extra_loss is None:
            return outputs.new_zeros(len(outputs))
        rows = {key: value[0].to(outputs.device) for key, value in self.terms.rows.items()}
        return self.terms.extra_loss(outputs, x, y, rows)

    @torch.no_grad()
    def add_to_gradients(self, module: nn.Module) -> None:
        """Add the proximal pull and the control variate to the gradients of a module."""
        terms = self.terms or LocalTerms()
        mu = terms.proximal_mu
        mu = float(self.config.get("proximal-mu", 0.0)) if mu is None else mu
        for name, parameter in module.named_parameters():
            if parameter.grad is None:
                continue
            if mu:
                center = self.arrays[name] if terms.center is None else terms.center[name][0]
                parameter.grad += mu * (parameter - center.to(parameter))
            if terms.control is not None and name in terms.control:
                parameter.grad += terms.control[name][0].to(parameter)

    def reply(
        self,
        arrays: Mapping[str, Tensor],
        metrics: MetricRecord,
        *,
        steps: int,
        rate: float | None = None,
    ) -> Message:
        """Return the answer, and keep the half's new state.

        Parameters
        ----------
        arrays : mapping of Tensor, shape (*shape)
            The model after the work.
        metrics : MetricRecord
            With ``num-examples``.
        steps : int
            Local steps made.
        rate : float, optional
            The learning rate; default: the config's ``learning-rate``.
        """
        record = _record({key: value.detach()[None] for key, value in arrays.items()})
        content = RecordDict({"arrays": record, "metrics": metrics})
        rate = self.config["learning-rate"] if rate is None else rate
        return Message(self.sent(content, steps, float(rate)), reply_to=self._message)

    def sent(
        self, content: RecordDict, steps: int | None = None, rate: float | None = None
    ) -> RecordDict:
        """Return the content of a reply as the half sends it; keep the half's new state.

        Parameters
        ----------
        content : RecordDict
            Of the reply that plain training gives.
        steps, rate
            Local steps made and their learning rate, for a half with a `local` part.
        """
        name, record = next(iter(content.array_records.items()))
        work = {key: torch.from_numpy(array.numpy())[None] for key, array in record.items()}
        config = self.config
        if steps is not None:
            rates = torch.tensor([rate], dtype=torch.float64)
            config = config | {"steps-made": torch.tensor([steps]), "rate-used": rates}
        payload, state = self._half.reply(work, self._state, config, self._draws)
        self._keep(state)
        content = _replaced(content, name, _record(payload))
        applied = content.config_records.get("applied", ConfigRecord({"halves": []}))
        names = [*applied["halves"], self._half.name]  # type: ignore[misc]
        content["applied"] = ConfigRecord({"halves": names})
        return content

    def _keep(self, state: Tensors) -> None:
        """Keep a state, unless a later round's instruction has overtaken this one on its way."""
        name, kept = self._half.name, self._context.state
        turn = _turn(self.config)
        if turn >= _turn(kept.config_records.get(name + _ROUND, {})):
            kept[name] = _record(state)
            kept[name + _ROUND] = ConfigRecord({"server-round": turn[0], "repeat": turn[1]})


def _turn(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return an instruction's round, and how often its device was sent that round before."""
    return int(config.get("server-round", 0)), int(config.get("repeat", 0))


def as_mod(half: DeviceHalf) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """Return a Flower client mod that applies a half: ``ClientApp(mods=[as_mod(half)])``.

    Parameters
    ----------
    half : DeviceHalf
        Its state is kept in ``Context.state`` under the half's name. An instruction of an earlier
        round than the last one, overtaken on its way, leaves the state as it is.

    Raises
    ------
    ValueError
        If the half has a `local` part: only the training loop itself can call that.
    """
    if type(half).local is not DeviceHalf.local:
        raise ValueError(
            f"the half {half.name!r} has a local part, which a mod cannot apply: let the training "
            "loop use half.work(message, context), see strategies.halves.DeviceWork"
        )

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        is_train = message.metadata.message_type.startswith("train")
        if not (is_train or half.completes_models):
            return call_next(message, context)
        work = half.work(message, context)
        inner = copy(message)
        inner.content = work.content
        answer = call_next(inner, context)
        if is_train and not answer.has_error():
            answer.content = work.sent(answer.content)
        return answer

    return mod


def _record(payload: Mapping[str, Tensor | Payload]) -> ArrayRecord:
    record = ArrayRecord()
    for key, value in payload.items():
        if isinstance(value, Tensor):
            record[key] = Array(np.asarray(value[0].cpu().numpy()))
        else:
            record[key] = value.array(0)
    return record


def _replaced(content: RecordDict, name: str, record: ArrayRecord) -> RecordDict:
    """Return a content with its ArrayRecords replaced by one."""
    kept = {k: r for k, r in content.items() if not isinstance(r, ArrayRecord)}
    return RecordDict({name: record, **kept})
