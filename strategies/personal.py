"""Parts of the model that stay on their devices: BatchNorm layers (FedBN), personal heads.

`KeepLocal` goes round a strategy that knows nothing of it. What is kept local neither travels nor
is averaged: instructions and replies carry the rest alone, and a device puts its own part to it
before it trains or evaluates. Devices begin with the part of the first model.

Decision: the strategy still sees whole models, with the first model's values in the place of what
stays at home, so that any strategy runs unchanged; the mean of equal values is that value.

References
----------
.. [1] Li et al., "FedBN: federated learning on non-IID features via local batch normalization",
   ICLR 2021, Algorithm 1 (`batch_norm`).
.. [2] Andreux et al., "Siloed federated learning for multi-centric histopathology datasets", DCL
   2020 (SiloBN: `batch_norm_statistics`).
.. [3] Arivazhagan et al., "Federated learning with personalization layers", 2019 (FedPer: the
   names of the last layers).
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from strategies.common import row_records, tensor_of
from strategies.halves import DeviceHalf, Draws, Tensors
from strategies.peers import PeerStrategy

__all__ = ["KeepLocal", "LocalHalf", "local_names"]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_GROUPS = ("batch_norm", "batch_norm_statistics")


def local_names(names: Iterable[str], local: Sequence[str]) -> tuple[str, ...]:
    """Return the tensors of a model that stay on their devices.

    Parameters
    ----------
    names : iterable of str
        Of the model's `state_dict`, in order.
    local : sequence of str
        ``batch_norm`` (all tensors of layers with running statistics), ``batch_norm_statistics``
        (the running statistics alone), or patterns of names such as ``fc.*``.

    Raises
    ------
    ValueError
        If one of `local` means no tensor of the model, or nothing is left to share.
    """
    names = tuple(names)
    norms = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] == "running_mean"}
    statistics = {n for n in names if n.rpartition(".")[2] in _STATISTICS}
    groups = {
        "batch_norm": {n for n in names if n.rpartition(".")[0] in norms},
        "batch_norm_statistics": statistics,
    }
    found: set[str] = set()
    for each in local:
        chosen = groups.get(each, {n for n in names if fnmatchcase(n, each)})
        if not chosen:
            raise ValueError(
                f"{each!r} means no tensor of this model; give {' or '.join(_GROUPS)} where it has "
                f"BatchNorm layers, or patterns of its names: {', '.join(names)}"
            )
        found |= chosen
    if len(found) == len(names):
        raise ValueError(f"{', '.join(local)} is the whole model; nothing is left to share")
    return tuple(name for name in names if name in found)


@dataclass(frozen=True)
class LocalHalf(DeviceHalf):
    """What a device does: put its own part to what it is sent, and keep it from what it sends.

    Parameters
    ----------
    names : tuple of str
        Of all tensors of the model, in order.
    initial : mapping of str to Tensor
        The part that stays at home, as the first model has it.
    """

    names: tuple[str, ...] = ()
    initial: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    name: ClassVar[str] = "local"
    completes_models: ClassVar[bool] = True

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Tensors, Tensors]:
        """Return the whole model; the state stays as it is."""
        n = len(next(iter(arrays.values())))
        place = next(iter(arrays.values())).device
        own = {
            key: state[key] if state else value.to(place).expand(n, *value.shape)
            for key, value in self.initial.items()
        }
        whole = {name: own[name] if name in own else arrays[name] for name in self.names}
        return whole | {k: v for k, v in arrays.items() if k not in whole}, state

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Draws
    ) -> tuple[Mapping[str, Tensor], Tensors]:
        """Return what is shared, and keep the rest.

        Raises
        ------
        ValueError
            In gradient mode, where devices have no models of their own.
        """
        if config.get("mode") == "gradient":
            raise ValueError("a strategy of gradients has no models of which a part could stay")
        shared = {key: value for key, value in work.items() if key not in self.initial}
        return shared, {key: work[key].clone() for key in self.initial}


class KeepLocal(Strategy):
    """Lets a part of the model stay on the devices, whatever the strategy.

    Works round any strategy by way of a server that leaves the rounds to Flower's
    `Strategy.start`.

    Parameters
    ----------
    strategy : Strategy
        What is wrapped.
    local : sequence of str
        See `local_names`.

    Attributes
    ----------
    device_halves : tuple
        Known once the model is (`begin`): ``ClientApp(mods=[as_mod(strategy.device_halves[0])])``.

    Raises
    ------
    ValueError
        If there is nothing to keep, or the strategy has no server that sends models.
    """

    def __init__(self, strategy: Strategy, *, local: Sequence[str]) -> None:
        kind = type(strategy).__name__
        if not local:
            raise ValueError("name what stays on the devices")
        if isinstance(strategy, PeerStrategy) or type(strategy).start is not Strategy.start:
            raise ValueError(
                f"{kind} does not send a server's model in rounds, so that no part of it can stay "
                "on the devices"
            )
        self.strategy, self.local = strategy, tuple(local)
        self.device_halves: tuple[DeviceHalf, ...] = ()
        self._whole: dict[str, Tensor] = {}  # the model that this round began with, (1, *shape)

    def begin(self, arrays: ArrayRecord) -> ArrayRecord:
        """Take the first model, with whose part devices begin; return what of it is shared.

        Raises
        ------
        ValueError
            See `local_names`.
        """
        names = local_names(arrays, self.local)
        initial = {name: tensor_of(arrays[name]).detach().cpu().clone() for name in names}
        self.device_halves = (LocalHalf(names=tuple(arrays), initial=initial),)
        shared = self._without(arrays)
        assert isinstance(shared, ArrayRecord)
        return shared

    # --- what Flower asks for -----------------------------------------------------------------

    def summary(self) -> None:
        """Log the strategy's own summary."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's instructions, without what stays on the devices."""
        if server_round == 1 or not self.device_halves:
            self.begin(arrays)
        self._whole = {key: tensor_of(array).unsqueeze(0) for key, array in arrays.items()}
        messages = self.strategy.configure_train(server_round, arrays, config, grid)
        return self._shared(messages)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Let the strategy aggregate whole models."""
        return self.strategy.aggregate_train(server_round, [self._completed(r) for r in replies])

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the strategy's instructions, without what stays on the devices."""
        return self._shared(self.strategy.configure_evaluate(server_round, arrays, config, grid))

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the strategy's metrics."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    # --- the two ways -------------------------------------------------------------------------

    @property
    def _names(self) -> Mapping[str, Tensor]:
        (half,) = self.device_halves
        assert isinstance(half, LocalHalf)
        return half.initial

    def _shared(self, messages: Iterable[Message]) -> Iterable[Message]:
        """Return instructions whose models lack what stays on the devices."""
        contents: dict[int, tuple[RecordDict, RecordDict]] = {}
        shared = []
        for message in messages:
            content = message.content
            if id(content) not in contents:
                contents[id(content)] = (
                    content,
                    RecordDict({name: self._without(record) for name, record in content.items()}),
                )
            instruction = copy(message)
            instruction.content = contents[id(content)][1]
            shared.append(instruction)
        return shared

    def _without(self, record: Any) -> Any:
        if not isinstance(record, ArrayRecord):
            return record
        kept = ArrayRecord()
        for key, array in record.items():
            if key not in self._names:
                kept[key] = array
        return kept

    def _completed(self, reply: Message) -> Message:
        """Return a reply with a whole model: of what stays, the values that the round began with.

        Raises
        ------
        ValueError
            If the device did not apply the half.
        """
        if reply.has_error():
            return reply
        applied: Any = reply.content.config_records.get("applied", {"halves": []})
        if LocalHalf.name not in applied["halves"]:
            raise ValueError(
                f"node {reply.metadata.src_node_id} did not apply the half {LocalHalf.name!r}: "
                "ClientApp(mods=[as_mod(strategy.device_halves[0])])"
            )
        (own,) = row_records({name: self._whole[name] for name in self._names}, [0])
        records: dict[str, Any] = {}
        for name, record in reply.content.items():
            if isinstance(record, ArrayRecord):
                whole = ArrayRecord()
                for key in self._whole:
                    whole[key] = own[key] if key in own else record[key]
                for key, array in record.items():
                    if key not in whole:
                        whole[key] = array
                record = whole
            records[name] = record
        answer = copy(reply)
        answer.content = RecordDict(records)
        return answer
