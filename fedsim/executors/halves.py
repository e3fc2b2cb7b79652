"""Device halves over all rows of a batch, and the state that devices keep for them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedsim.errors import PayloadError
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan, round_of, server_round, wants_steps
from fedsim.flower.records import LazyArray, LazyArrayRecord, stacked_records
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.layout import Layout
from fedsim.learning.trainer import Trainer

__all__ = ["DeviceHalf", "DeviceWork", "HalvesOfDevices", "joined_terms"]

Tensors = dict[str, Tensor]
Evaluate = Callable[[Sequence[Message], Sequence[int]], list[RecordDict]]
_NO_STATES: tuple[list[Tensors], int] = [], 0
_SPREAD = 4  # rows kept alive for each row in use before states are gathered anew


class DeviceHalf(Protocol):
    """What a strategy says a device does; see `strategies.halves.DeviceHalf`."""

    @property
    def name(self) -> str:
        """Names the half's state, and in replies that it was applied."""

    @property
    def goes_round_mods(self) -> bool:
        """Whether Flower's own mods see what the half decodes and is yet to encode."""

    @property
    def completes_models(self) -> bool:
        """Whether models to evaluate, too, lack what the half keeps."""

    def check(self, sizes: Sequence[int]) -> None:
        """Raise a ValueError if a model with tensors of these sizes does not fit."""

    def draws(self, rounds: Any, devices: Any, device: Any = "cpu") -> Any:
        """Return the draws of these devices in these rounds."""

    def as_mod(self) -> Any:
        """Return the half as a Flower client mod."""

    def work(self, message: Message, context: Any) -> "DeviceWork":
        """Return the half's part in one instruction, with its state in a Flower `Context`."""

    def unpack(self, contents: Sequence[RecordDict]) -> Tensors:
        """Return the arrays of instructions, one tensor ``(n, ...)`` per key."""

    def receive(
        self, arrays: Tensors, state: Tensors, config: Mapping[str, Any], draws: Any
    ) -> tuple[Tensors, Tensors]:
        """Return the model to work on, and the new state."""

    def local(self, state: Tensors, config: Mapping[str, Any]) -> Any:
        """Return what is added to the local objective, None for nothing."""

    def reply(
        self, work: Tensors, state: Tensors, config: Mapping[str, Any], draws: Any
    ) -> tuple[Mapping[str, Any], Tensors]:
        """Return what is sent back instead of the work, and the new state."""


class DeviceWork(Protocol):
    """One instruction's way through a half; see `strategies.halves.DeviceWork`."""

    @property
    def content(self) -> RecordDict:
        """The instruction, with the model to work on."""

    @property
    def terms(self) -> Any:
        """What is added to the local objective, one row; None for nothing."""

    def sent(
        self, content: RecordDict, steps: int | None = None, rate: float | None = None
    ) -> RecordDict:
        """Return the content of the reply; the state moves on."""


class HalvesOfDevices:
    """Applies halves around the work of a batch, and keeps the devices' states.

    Parameters
    ----------
    halves : sequence of DeviceHalf
    trainer : Trainer
        Does the local work.
    plan : WorkPlan
        Reads instructions.
    """

    def __init__(self, halves: Sequence[DeviceHalf], trainer: Trainer, plan: WorkPlan) -> None:
        self._halves = tuple(halves)
        self._trainer, self._plan = trainer, plan
        self._place = trainer.stack.device
        # Of each device: the states of a batch, one for each half, and its row there.
        self._states: dict[int, tuple[list[Tensors], int]] = {}
        self._open: dict[str, tuple[int, list[Tensors], int]] = {}
        self._busy: dict[int, int] = {}  # node id → messages computed and not settled
        self._latest: dict[int, int] = {}  # node id → the last message whose states were taken up
        self._completes = any(half.completes_models for half in halves)

    def is_settled(self, message: Message) -> bool:
        """Return whether no earlier message may still change what this one meets."""
        meta = message.metadata
        meets_state = self._completes or meta.message_type.startswith("train")
        return not meets_state or not self._busy.get(meta.dst_node_id)

    def settle(self, message_id: str, *, has_arrived: bool) -> None:
        """Take up or drop the states after a message; one that a later has overtaken is dropped."""
        if message_id not in self._open:
            return
        node, states, row = self._open.pop(message_id)
        self._busy[node] -= 1
        if has_arrived and int(message_id) > self._latest.get(node, 0):
            self._latest[node] = int(message_id)
            self._states[node] = states, row

    def state_of(self, node_id: int) -> dict[str, Tensors]:
        """Return a device's state: name of the half → its tensors."""
        states, row = self._states.get(node_id, ([{} for _ in self._halves], 0))
        return {
            half.name: {key: value[row] for key, value in state.items()}
            for half, state in zip(self._halves, states, strict=True)
        }

    def kept(self, name: str) -> Tensors:
        """Return what devices keep for a half, one tensor ``(n, *shape)`` per key."""
        nodes = sorted(self._states)
        h = [half.name for half in self._halves].index(name)
        return self._gather(nodes, self._place)[h] if nodes else {}

    def around(
        self, evaluate: Evaluate, messages: Sequence[Message], devices: Sequence[int]
    ) -> list[RecordDict]:
        """Return the contents of the replies: receive, train, reply; or a plain evaluation.

        Models go from half to trainer and back as rows, without a message for each.

        Parameters
        ----------
        evaluate : callable
            ``(messages, devices) -> contents`` of instructions that are not for the halves.
        messages, devices
            Instructions, and the device of each.
        """
        layout = self._trainer.layout
        contents: list[RecordDict] = [RecordDict()] * len(messages)
        trains = [m.metadata.message_type.startswith("train") for m in messages]
        groups = self._alike(messages, [i for i, is_train in enumerate(trains) if is_train])
        others = [i for i, is_train in enumerate(trains) if not is_train]
        if others:
            whole = self._completed(messages, devices, others)
            done = evaluate(whole, [devices[i] for i in others])
            for i, content in zip(others, done, strict=True):
                contents[i] = content
        batches = []
        together: dict[LocalConfig, list[_Batch]] = defaultdict(list)  # those without terms
        for rows in groups:
            batch = self._received(messages, devices, rows, self._halves)
            batches.append((rows, batch))
            config = self._plan.local_config(batch.content)
            terms = joined_terms(batch.local(), layout)
            if terms is None:
                together[config].append(batch)
            else:
                batch.note_work(self._plan)
                _train(self._trainer, config, [batch], terms)
        for config, alike in together.items():
            _train(self._trainer, config, alike, LocalTerms())
        for rows, batch in batches:
            for row, (i, content) in enumerate(zip(rows, batch.reply(), strict=True)):
                contents[i] = content
                node = batch.nodes[row]
                self._open[messages[i].metadata.message_id] = node, batch.states, row
                self._busy[node] = self._busy.get(node, 0) + 1
        self._compact()
        return contents

    def _received(
        self,
        messages: Sequence[Message],
        devices: Sequence[int],
        rows: Sequence[int],
        halves: Sequence[DeviceHalf],
    ) -> "_Batch":
        """Return the instructions in these rows, with the models that some halves make of them."""
        batch = _Batch([messages[i] for i in rows], [devices[i] for i in rows], halves, self._place)
        states = self._gather(batch.nodes, self._place)
        batch.states = [states[self._halves.index(half)] for half in halves]
        batch.receive(self._trainer.layout)
        return batch

    def _completed(
        self, messages: Sequence[Message], devices: Sequence[int], rows: Sequence[int]
    ) -> list[Message]:
        """Return instructions to evaluate, with the models that halves make whole."""
        halves = [half for half in self._halves if half.completes_models]
        whole = {i: messages[i] for i in rows}
        for alike in self._alike(messages, rows) if halves else ():
            batch = self._received(messages, devices, alike, halves)
            records = stacked_records(self._trainer.layout.views(batch.model))
            for i, record in zip(alike, records, strict=True):
                content = messages[i].content
                kept = {k: r for k, r in content.items() if not isinstance(r, ArrayRecord)}
                whole[i] = copy(messages[i])
                whole[i].content = compat.record_of(RecordDict, {"arrays": record, **kept})
        return list(whole.values())

    def _alike(self, messages: Sequence[Message], rows: Sequence[int]) -> list[list[int]]:
        """Return those of these rows that one call serves.

        They have the same config, arrays and entries in their states.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        structures: dict[int, Any] = {}  # many messages share one content, many contents one config
        configs: dict[int, Any] = {}
        numbers: dict[Any, int] = {}
        entries: dict[int, Any] = {}  # many devices share one batch of states
        for i in rows:
            meta, content = messages[i].metadata, messages[i].content
            if id(content) not in structures:
                structure = _structure(content, configs)
                structures[id(content)] = numbers.setdefault(structure, len(numbers))
            states, _ = self._states.get(meta.dst_node_id, _NO_STATES)
            if id(states) not in entries:
                entries[id(states)] = tuple(tuple(state) for state in states)
            groups[structures[id(content)], entries[id(states)]].append(i)
        return list(groups.values())

    def _gather(self, nodes: Sequence[int], place: torch.device) -> list[Tensors]:
        """Return the states of some devices as rows of one batch."""
        held = [self._states.get(node) for node in nodes]
        first = held[0]
        if first is None:
            return [{} for _ in self._halves]
        states, rows = first[0], [each[1] for each in held if each is not None]
        is_one = all(each is not None and each[0] is states for each in held)
        n_rows = next((len(v) for state in states for v in state.values()), 0)
        if is_one and rows == list(range(n_rows)):
            return states
        if is_one:
            index = torch.tensor(rows, device=place)
            return [{k: v[index.to(v.device)] for k, v in state.items()} for state in states]
        return [
            {
                key: torch.stack([each[0][h][key][each[1]] for each in held if each is not None])
                for key in state
            }
            for h, state in enumerate(states)
        ]

    def _compact(self) -> None:
        """Gather states anew once old batches are kept alive for a few of their rows."""
        batches = {id(states): states for states, _ in self._states.values()}
        if len(batches) < 2:
            return
        alive = sum(_n_rows(states) for states in batches.values())
        if alive <= _SPREAD * len(self._states):
            return
        groups: dict[Any, list[int]] = defaultdict(list)
        for node, (states, _) in self._states.items():
            groups[tuple(tuple(state) for state in states)].append(node)
        for nodes in groups.values():
            gathered = self._gather(nodes, torch.device("cpu"))
            self._states.update({node: (gathered, row) for row, node in enumerate(nodes)})


class _Batch:
    """Rows with one config, the same arrays and the same entries in their state."""

    states: list[Tensors]
    model: Tensor  # to work on, (n, P)
    name: str  # of what came of it
    work: Tensors  # (n, ...)
    metrics: list[dict[str, Any]]

    def __init__(
        self,
        messages: Sequence[Message],
        devices: Sequence[int],
        halves: Sequence[DeviceHalf],
        place: torch.device,
    ) -> None:
        self.devices = np.array(devices, np.int64)
        self.nodes = [message.metadata.dst_node_id for message in messages]
        self._contents = [message.content for message in messages]
        self.content = self._contents[0]
        self._halves = halves
        self._place = place
        self._config = _config(self.content)
        if server_round(self.content) is None:
            self.rounds = np.array([round_of(message) for message in messages], np.int64)
        else:  # the config is common to all, and with it the round and the how-manieth time
            self.rounds = np.full(len(messages), round_of(messages[0]), np.int64)
        self._draws = [half.draws(self.rounds, self.devices, place) for half in halves]

    def receive(self, layout: Layout) -> None:
        """Let the halves make the models to work on."""
        states = []
        arrays = self._unpacked(self._contents)
        for half, state, draws in zip(self._halves, self.states, self._draws, strict=True):
            arrays, state = half.receive(arrays, state, self._config, draws)
            states.append(state)
        self.states = states
        if list(arrays) != list(layout.names):
            raise PayloadError(
                f"a message carries the arrays {list(arrays)}, the model has {list(layout.names)}"
            )
        self.model = layout.flatten(arrays)

    def _unpacked(self, contents: Sequence[RecordDict]) -> Tensors:
        """Return the arrays of instructions; of one content for all they are read once."""
        if any(content is not contents[0] for content in contents):
            return _moved(self._halves[0].unpack(contents), self._place)
        one = _moved(self._halves[0].unpack(contents[:1]), self._place)
        return {key: value.expand(len(contents), *value.shape[1:]) for key, value in one.items()}

    def local(self) -> list[Any]:
        """Return what each half adds to the local objective."""
        return [
            half.local(state, self._config)
            for half, state in zip(self._halves, self.states, strict=True)
        ]

    def note_work(self, plan: WorkPlan) -> None:
        """Let `reply` know how many steps the devices make, and at which rate."""
        steps, rates = plan.steps_and_rates(self.content, self.devices, self.rounds)
        made = {"steps-made": torch.from_numpy(steps), "rate-used": torch.from_numpy(rates)}
        self._config |= _moved(made, self._place)

    def reply(self) -> list[RecordDict]:
        """Return what is sent of the work's results; the states move on."""
        work: Mapping[str, Any] = self.work
        states = list(self.states)
        for h in range(len(self._halves) - 1, -1, -1):
            work, states[h] = self._halves[h].reply(
                dict(work), states[h], self._config, self._draws[h]
            )
        self.states = states
        applied = ConfigRecord({"halves": [half.name for half in reversed(self._halves)]})
        replies = []
        for row, metrics in enumerate(self.metrics):
            arrays = {
                key: LazyArray(value, row) if isinstance(value, Tensor) else value.array(row)
                for key, value in work.items()
            }
            records: dict[str, Any] = {
                self.name: compat.record_of(LazyArrayRecord, arrays),
                "metrics": compat.record_of(MetricRecord, metrics),
                "applied": applied,
            }
            replies.append(compat.record_of(RecordDict, records))
        return replies


def joined_terms(terms: Sequence[Any], layout: Layout) -> LocalTerms | None:
    """Return what some halves together add to the local objective, as the trainer takes it.

    Control variates add up; of everything else there can be one.

    Parameters
    ----------
    terms : sequence of strategies.halves.LocalTerms or None
        One of each half.
    layout : Layout
        Of the model.

    Raises
    ------
    PayloadError
        If tensors do not belong to the model, or two halves give one thing.
    """
    given = [each for each in terms if each is not None]
    if not given:
        return None
    found: dict[str, Any] = {}
    for name in ("proximal_mu", "center", "extra_loss"):
        values = [getattr(each, name) for each in given if getattr(each, name) is not None]
        if len(values) > 1:
            raise PayloadError(f"two device halves add a {name} to one local objective")
        found |= dict.fromkeys([name] * len(values), *values)
    controls = [_matrix(each.control, layout) for each in given if each.control is not None]
    if "center" in found:
        missing = set(layout.parameters) - set(found["center"])
        if missing:
            raise PayloadError(f"the center of a proximal term has no {min(missing)!r}")
        found["center"] = _matrix(found["center"], layout)
    rows = {key: value for each in given for key, value in each.rows.items()}
    return LocalTerms(
        control=torch.stack(controls).sum(0) if controls else None, rows=rows, **found
    )


def _matrix(tensors: Tensors, layout: Layout) -> Tensor:
    """Return stacked tensors of a model as a matrix (n, P), zero where there are none."""
    unknown = sorted(set(tensors) - set(layout.names))
    if unknown or not tensors:
        shown = f"a tensor {unknown[0]!r}" if unknown else "no tensors"
        raise PayloadError(
            f"a device half adds {shown} to the local objective of a model with "
            f"{', '.join(layout.parameters)}"
        )
    some = next(iter(tensors.values()))
    full = {
        name: tensors[name] if name in tensors else some.new_zeros((len(some), *shape))
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    return layout.flatten(full)


def _train(
    trainer: Trainer, config: LocalConfig, batches: Sequence[_Batch], terms: LocalTerms
) -> None:
    """Train the rows of some batches in one call; each gets its part of what came of it."""
    models = [batch.model for batch in batches]
    base = models[0] if len(models) == 1 else torch.cat(models)
    devices = np.concatenate([batch.devices for batch in batches])
    rounds = np.concatenate([batch.rounds for batch in batches])
    result = trainer.train(base, np.arange(len(base)), devices, rounds, config, terms=terms)
    assert result.params is not None
    samples = trainer.data.size[devices].tolist()
    metrics: list[dict[str, Any]] = [
        {"num-examples": n, "train_loss": loss}
        for n, loss in zip(samples, result.loss.tolist(), strict=True)
    ]
    start = 0
    for batch in batches:
        part = slice(start, start + len(batch.devices))
        start = part.stop
        batch.name = "gradients" if config.mode == "gradient" else "arrays"
        batch.work = trainer.layout.views(result.params[part])
        batch.metrics = metrics[part]
        if wants_steps(batch.content):
            for row, steps in zip(batch.metrics, result.steps[part].tolist(), strict=True):
                row["local_steps"] = steps


def _structure(content: RecordDict, configs: dict[int, Any]) -> Any:
    """Return a content's config and the names of its arrays; `configs` are known by their id."""
    found: list[Any] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found.append((name, tuple(record.keys())))
        elif isinstance(record, ConfigRecord):
            if id(record) not in configs:
                pairs = record.items()
                configs[id(record)] = tuple(
                    (k, tuple(v) if isinstance(v, list) else v) for k, v in pairs
                )
            found.append((name, configs[id(record)]))
    return tuple(found)


def _config(content: RecordDict) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ConfigRecord) and name != "exchange":
            merged.update(record)
    return merged


def _moved(tensors: Tensors, place: torch.device) -> Tensors:
    return {key: value.to(place) for key, value in tensors.items()}


def _n_rows(states: Sequence[Tensors]) -> int:
    return max((len(v) for state in states for v in state.values()), default=0)
