"""Compression as an ingredient: any strategy's messages, encoded on the way down and up.

`Compressed` goes round a strategy that knows nothing of it. On the way up devices send
``C_up(x' - x + e)``, the compressed change of the model x that they received (FedPAQ), with error
feedback e where the compressor is biased. On the way down the server sends ``C_down(w - R)`` and
the device works on ``x = R + C_down(w - R)``, where R is a reference that both hold and move by
``R += a C_down(w - R)`` (MCM's downlink: the server's model is never degraded). The strategy sees
the models as the server decodes them.

Decision: a reference is named by a number, and a device is sent what refers to the one that its
last reply confirmed; it keeps that one and the one it made of it. So a lost message costs nothing
but itself, a device that was away needs no other messages than its next one, and devices with one
reference share one message. A device without a reference gets the model itself.

References
----------
.. [1] Reisizadeh et al., "FedPAQ: a communication-efficient federated learning method with periodic
   averaging and quantization", AISTATS 2020, Algorithm 1.
.. [2] Philippenko, Dieuleveut, "Preserved central model for faster bidirectional compression in
   distributed settings", NeurIPS 2021 (the downlink).
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies.bidirectional import memory_rate, moves_memory
from strategies.choco import ChocoSGD
from strategies.common import row_records
from strategies.compression import Cast, Compressor, Identity, Packed, check_sizes, compressor, pack
from strategies.halves import DeviceHalf, Draws, KeyedDraws, Payload, Tensors
from strategies.mcm import CompressedSGD
from strategies.peers import PeerStrategy
from strategies.rows import decoded_rows, flat, shaped, sizes_of

__all__ = ["Compressed", "CompressionHalf"]

Spec = str | dict[str, Any]
_NAME = "compression"
_MESSAGE = "message"


# --- what a device does ---------------------------------------------------------------------------


@dataclass(frozen=True)
class CompressionHalf(DeviceHalf):
    """What a device does: decode what it is sent, train, encode what it sends.

    Parameters
    ----------
    up, down : Compressor
    down_rate : float, optional
        a, the rate of the reference; default: what suits the compressor.
    error_feedback : bool
        Whether what `up` left out is added to the next change.
    per_tensor : bool
        Whether each tensor is compressed by itself.
    """

    up: Compressor = field(default_factory=Identity)
    down: Compressor = field(default_factory=Identity)
    down_rate: float | None = None
    error_feedback: bool = False
    per_tensor: bool = True
    name: ClassVar[str] = _NAME
    goes_round_mods: ClassVar[bool] = True

    def blocks(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of what is compressed together."""
        return tuple(sizes) if self.per_tensor else (sum(sizes),)

    def check(self, sizes: Sequence[int]) -> None:
        """Raise a ValueError if tensors of these sizes cannot be compressed."""
        for name, used in (("up", self.up), ("down", self.down)):
            check_sizes(used, self.blocks(sizes), name)

    @property
    def has_reference(self) -> bool:
        """Whether the downlink refers to what the device was sent before."""
        return moves_memory(self.down, self.down_rate)

    def moved(self, reference: Tensor, message: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the reference after a message, ``R + a C(w - R)``."""
        rate = memory_rate(self.down, self.down_rate, self.blocks(sizes), reference)
        return reference + rate * message

    def unpack(self, contents: Sequence[RecordDict]) -> Tensors:
        """Return the arrays of instructions, an encoded model as one tensor ``message`` (n, P)."""
        arrays = super().unpack(contents) if "shapes" not in contents[0].get(_NAME, {}) else {}
        if arrays:
            return arrays
        records = [_array_record(content)[1] for content in contents]
        layout: Any = contents[0][_NAME]
        blocks = self.blocks(_sizes_in(layout))
        dtype = getattr(torch, layout["dtype"])
        values = decoded_rows([r[_MESSAGE] for r in records], self.down, blocks, dtype)
        plain = [key for key in records[0] if key != _MESSAGE]
        others = [RecordDict({"arrays": _only(record, plain)}) for record in records]
        return {**(super().unpack(others) if plain else {}), _MESSAGE: values}

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Return the model x, and the state with the reference after it."""
        state = dict(state)
        model = arrays
        if "shapes" in config:
            message = arrays[_MESSAGE]
            template = _template(config, arrays, len(message))
            base: Tensor | float = 0.0
            if "reference" in config:
                base = _version(state, "reference", int(config["reference"]))
            model = shaped(base + message, template)
            if "next" in config:
                moved = self.moved(torch.as_tensor(base), message, _sizes_in(config))
                _keep(state, "reference", moved, int(config["next"]), int(config["reference"]))
        elif "next" in config:
            _keep(state, "reference", flat(arrays), int(config["next"]), -1)
        if not self.up.is_exact:
            state["model"] = flat(model)
        return model, state

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Mapping[str, Tensor | Payload], Tensors]:
        """Return the encoded change of the model (or gradient), and the state after it."""
        if self.up.is_exact:
            return work, state
        state = dict(state)
        change, model = flat(work), state.pop("model")
        if config.get("mode") != "gradient" and not config.get("whole"):
            change = change - model
        if self.error_feedback:
            change = change + _version(state, "error", int(config["version"]), change)
        packed = pack(self.up, change, draws, self.blocks(sizes_of(work)))
        if self.error_feedback:
            new, old = int(config["server-round"]), int(config["version"])
            _keep(state, "error", change - packed.values, new, old)
        others = {key: value for key, value in work.items() if not value.is_floating_point()}
        return {_MESSAGE: packed, **others}, state


def _keep(state: Tensors, name: str, value: Tensor, number: int, before: int) -> None:
    """Keep a value under its number, and the one that it was made of under its own."""
    old = _version(state, name, before, value) if before >= 0 else value
    state[f"{name}_before"], state[name] = old, value
    numbers = torch.tensor([number, before])
    state[f"{name}_number"] = numbers.expand(len(value), 2).clone()


def _version(state: Tensors, name: str, number: int, like: Tensor | None = None) -> Tensor:
    """Return the rows of the value kept under a number; 0 where nothing was: zeros like `like`."""
    if number == 0 and like is not None:
        return torch.zeros_like(like)
    found = state.get(f"{name}_number")
    if found is not None:
        is_last, is_before = found[:, 0] == number, found[:, 1] == number
        if bool(is_last.all()):
            return state[name]
        if bool((is_last | is_before).all()):
            last = is_last[:, None].to(state[name].device)
            return torch.where(last, state[name], state[f"{name}_before"])
    raise ValueError(f"the server refers to the {name} number {number}, which is not here")


def _template(config: Mapping[str, Any], others: Tensors, n: int) -> Tensors:
    """Return tensors ``(n, *shape)`` of the model's names, shapes and types, without values."""
    template: Tensors = {}
    for name, shape, dtype in zip(config["names"], config["shapes"], config["dtypes"], strict=True):
        if name in others:
            template[name] = others[name]
        else:
            template[name] = torch.empty(1, dtype=getattr(torch, dtype)).expand(n, *_ints(shape))
    return template


def _ints(shape: str) -> tuple[int, ...]:
    return tuple(int(n) for n in shape.split("x") if n)


def _sizes_in(config: Mapping[str, Any]) -> list[int]:
    """Return the elements of each floating-point array of a layout."""
    pairs = zip(config["shapes"], config["dtypes"], strict=True)
    shapes = (_ints(shape) for shape, dtype in pairs if getattr(torch, dtype).is_floating_point)
    return [torch.Size(shape).numel() for shape in shapes]


def _only(record: ArrayRecord, keys: Iterable[str]) -> ArrayRecord:
    kept = ArrayRecord()
    for key in keys:
        kept[key] = record[key]
    return kept


def _array_record(content: RecordDict) -> tuple[str, ArrayRecord]:
    """Return the name and the value of the first ArrayRecord of a content."""
    return next((n, r) for n, r in content.items() if isinstance(r, ArrayRecord))


# --- what the server does -------------------------------------------------------------------------


@dataclass(slots=True)
class _Sent:
    """What the server knows of an instruction that is under way."""

    template: Tensors  # one row
    model: Tensor  # x, (1, P)
    reference: int  # what its device refers to once it has replied; 0: nothing
    number: int  # its round
    is_gradient: bool = False


class Compressed(Strategy):
    """Compresses what a strategy and its devices send each other.

    Works round any strategy that leaves the rounds to Flower's `Strategy.start`: those of Flower,
    its privacy wrappers, and gossip that sends models after the local work (then the model itself
    is compressed, and the device goes on from what its neighbours decode; CHOCO-SGD, which sends
    differences, needs no wrapper). Evaluation travels uncompressed.

    Parameters
    ----------
    strategy : Strategy
        What is wrapped.
    up : str, mapping or Compressor, optional
        Of the changes that devices send: a name, or a mapping with `kind`.
    down : str, mapping or Compressor, optional
        Of the model that they are sent. Cast models travel as such; of other compressors the
        difference to a reference is sent, and the first model a device gets is uncompressed.
    down_rate : float, optional
        Rate a of that reference, in [0, 1]; default: 1/(2(ω+1)), 1/(ω+1) or 1, as suits `down`.
        0 compresses the model itself.
    error_feedback : bool, optional
        Whether devices add what `up` left out to their next change; default: where `up` is biased
        (top-k, signs), but for casts.
    per_tensor : bool
        Whether each tensor is compressed by itself, with a scale of its own.
    seed : int
        Of random rounding.

    Attributes
    ----------
    device_halves : tuple
        ``ClientApp(mods=[as_mod(strategy.device_halves[0])])`` in a plain app.

    Raises
    ------
    ValueError
        If there is nothing to compress, a parameter is out of its range, or the strategy sends
        what cannot be encoded from outside.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        up: Spec | Compressor | None = None,
        down: Spec | Compressor | None = None,
        down_rate: float | None = None,
        error_feedback: bool | None = None,
        per_tensor: bool = True,
        seed: int = 0,
    ) -> None:
        if up is None and down is None:
            raise ValueError("compression: give up, down or both")
        if down_rate is not None and not 0 <= down_rate <= 1:
            raise ValueError(f"down_rate is {down_rate}; a rate must be between 0 and 1")
        self.strategy, self.seed = strategy, seed
        encoder = Identity() if up is None else compressor(up, "up")
        if error_feedback is None:
            error_feedback = not (encoder.is_unbiased or isinstance(encoder, Cast))
        self._is_peer = isinstance(strategy, PeerStrategy)
        _check_fits(strategy, down, error_feedback)
        self.half = CompressionHalf(
            seed=seed,
            up=encoder,
            down=Identity() if down is None else compressor(down, "down"),
            down_rate=down_rate,
            error_feedback=error_feedback and not encoder.is_exact,
            per_tensor=per_tensor,
        )
        self.device_halves: tuple[DeviceHalf, ...] = (self.half,)
        self._begin()

    def _begin(self) -> None:
        self._references: dict[int, Tensor] = {}  # number → R (1, P)
        self._held: dict[int, int] = {}  # node → the reference that it has confirmed
        self._versions: dict[int, int] = {}  # node → round of its last reply
        self._n_references = 0
        self._dtypes: dict[str, torch.dtype] = {}
        self._pending: list[tuple[Message, _Sent]] = []

    # --- what Flower asks for -----------------------------------------------------------------

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
        """Run the strategy; see `flwr.serverapp.strategy.Strategy`."""
        self._begin()
        return super().start(grid, initial_arrays, *args, **kwargs)

    def summary(self) -> None:
        """Log the strategy's own summary."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's instructions, encoded."""
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        return self._encoded(server_round, messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate the replies, decoded."""
        return self.strategy.aggregate_train(server_round, self._decoded(replies))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's instructions as they are."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the strategy's metrics."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    # --- the way down -------------------------------------------------------------------------

    def _encoded(self, server_round: int, messages: Iterable[Message]) -> list[Message]:
        self._pending = []
        made: dict[Any, tuple[ArrayRecord, ConfigRecord, _Sent]] = {}
        contents: dict[Any, RecordDict] = {}
        models: dict[int, tuple[ArrayRecord, Tensors]] = {}
        encoded = []
        for message in messages:
            node, content = message.metadata.dst_node_id, message.content
            name, record = _array_record(content)
            if id(record) not in models:
                models[id(record)] = self._typed(record)
            key = id(record), self._held.get(node, 0)
            if key not in made:
                made[key] = self._encode(server_round, *models[id(record)], key[1])
            arrays, config, sent = made[key]
            sent.is_gradient = _mode(content) == "gradient"
            version = self._versions.get(node, 0) if self.half.error_feedback else 0
            if (id(content), *key, version) not in contents:
                if self.half.error_feedback:
                    config = config.copy()
                    config["version"] = version
                own: dict[str, Any] = {_NAME: config} if len(config) else {}
                other = {k: r for k, r in content.items() if k != name}
                contents[id(content), *key, version] = RecordDict({name: arrays, **other, **own})
            instruction = copy(message)
            instruction.content = contents[id(content), *key, version]
            self._pending.append((instruction, sent))
            encoded.append(instruction)
        return encoded

    def _typed(self, record: ArrayRecord) -> tuple[ArrayRecord, Tensors]:
        """Return a record and its tensors (1, ...), in the types that the first model had.

        Averages of counters, and some of Flower's strategies' models, come out as float64.
        """
        tensors = {key: torch.from_numpy(array.numpy())[None] for key, array in record.items()}
        changed = False
        for key, value in tensors.items():
            dtype = self._dtypes.setdefault(key, value.dtype)
            if value.dtype != dtype:
                changed = True
                tensors[key] = (value if dtype.is_floating_point else value.round()).to(dtype)
        return row_records(tensors, [0])[0] if changed else record, tensors

    def _encode(
        self, server_round: int, record: ArrayRecord, template: Tensors, held: int
    ) -> tuple[ArrayRecord, ConfigRecord, _Sent]:
        """Return what devices with one reference are sent of a model, and what they make of it."""
        half, config, model = self.half, ConfigRecord(), flat(template)
        if self._is_peer:
            config["whole"] = True
        if half.down.is_exact or (half.has_reference and not held):
            following = self._new_reference(model) if half.has_reference else 0
            if following:
                config["next"] = following
            return record, config, _Sent(template, model, following, server_round)
        sizes = sizes_of(template)
        base = self._references[held] if held else torch.zeros_like(model)
        draws = KeyedDraws(self.seed, "compression-down", server_round, held)
        packed = pack(half.down, model - base, draws, half.blocks(sizes))
        following = 0
        if half.has_reference:
            following = self._new_reference(half.moved(base, packed.values, sizes))
            config["reference"], config["next"] = held, following
        config["names"] = list(template)
        config["shapes"] = ["x".join(map(str, value.shape[1:])) for value in template.values()]
        config["dtypes"] = [_name(value) for value in template.values()]
        config["dtype"] = _name(model)
        sent = _Sent(template, base + packed.values, following, server_round)
        return self._record(packed, record, template), config, sent

    def _record(self, packed: Packed, record: ArrayRecord, template: Tensors) -> ArrayRecord:
        encoded = _only(record, (k for k, v in template.items() if not v.is_floating_point()))
        encoded[_MESSAGE] = packed.array(0)
        return encoded

    def _new_reference(self, value: Tensor) -> int:
        self._n_references += 1
        self._references[self._n_references] = value
        return self._n_references

    # --- the way up ---------------------------------------------------------------------------

    def _decoded(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies with models instead of messages; note what devices now hold."""
        sent = {message.metadata.message_id: each for message, each in self._pending}
        found: list[Message] = []
        groups: dict[Any, list[int]] = defaultdict(list)
        for reply in replies:
            asked = sent.get(reply.metadata.reply_to_message_id)
            if asked is None:
                continue
            found.append(reply)
            node = reply.metadata.src_node_id
            if reply.has_error():
                if reply.error.code not in _UNREACHED:  # nobody knows what the device holds
                    self._held.pop(node, None)
                    self._versions.pop(node, None)
                continue
            _check_applied(reply)
            self._versions[node] = asked.number
            if asked.reference:
                self._held[node] = asked.reference
            groups[id(asked)].append(len(found) - 1)
        if not self.half.up.is_exact:
            for rows in groups.values():
                asked = sent[found[rows[0]].metadata.reply_to_message_id]
                decoded = self._decode([found[i] for i in rows], asked)
                for i, reply in zip(rows, decoded, strict=True):
                    found[i] = reply
        self._pending = []
        in_use = set(self._held.values())
        self._references = {k: v for k, v in self._references.items() if k in in_use}
        return found

    def _decode(self, replies: Sequence[Message], asked: _Sent) -> list[Message]:
        records = [_array_record(reply.content) for reply in replies]
        blocks = self.half.blocks(sizes_of(asked.template))
        column = [record[_MESSAGE] for _, record in records]
        rows = decoded_rows(column, self.half.up, blocks, asked.model.dtype)
        if not (asked.is_gradient or self._is_peer):
            rows = asked.model.to(rows.device) + rows
        template = {
            key: value.expand(len(rows), *value.shape[1:])
            if value.is_floating_point()
            else torch.stack([torch.from_numpy(record[key].numpy()) for _, record in records])
            for key, value in asked.template.items()
            if value.is_floating_point() or key in records[0][1]
        }
        models = row_records(shaped(rows, template), range(len(rows)))
        decoded = []
        for reply, (name, _), model in zip(replies, records, models, strict=True):
            plain = copy(reply)
            others = {k: r for k, r in reply.content.items() if k != name}
            plain.content = RecordDict({name: model, **others})
            decoded.append(plain)
        return decoded


_UNREACHED = (3, 4, 5)  # Flower's codes of errors that are the network's: no app has run


def _check_fits(strategy: Strategy, down: object, error_feedback: bool) -> None:
    """Refuse what cannot be compressed from outside."""
    kind = type(strategy).__name__
    if isinstance(strategy, CompressedSGD | ChocoSGD | Compressed):
        raise ValueError(f"{kind} compresses its messages itself; take its own arguments")
    if isinstance(strategy, PeerStrategy):
        if down is not None:
            raise ValueError(f"{kind} has no server that sends models: give up alone, not down")
        if error_feedback:
            raise ValueError(
                f"{kind} sends models, not their changes, so that errors cannot be fed back: "
                "take an unbiased compressor or a cast, or the strategy ChocoSGD (choco_sgd)"
            )
        if strategy.when != "after":
            raise ValueError(
                f"{kind} sends models {strategy.when} the local work, from where it stands; only "
                "what is sent after it can be compressed (gossip: order adapt_then_combine)"
            )
        if type(strategy).payload_bytes is not PeerStrategy.payload_bytes:
            raise ValueError(f"{kind} sends more than its model and cannot be compressed")
    elif type(strategy).start is not Strategy.start:
        raise ValueError(f"{kind} drives its own rounds and cannot be compressed")


def _check_applied(reply: Message) -> None:
    applied: Any = reply.content.config_records.get("applied", {"halves": []})
    if _NAME not in applied["halves"]:
        raise ValueError(
            f"node {reply.metadata.src_node_id} did not apply the half {_NAME!r}: "
            "ClientApp(mods=[as_mod(strategy.device_halves[0])])"
        )


def _mode(content: RecordDict) -> str | None:
    for record in content.config_records.values():
        if "mode" in record:
            return str(record["mode"])
    return None


def _name(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
