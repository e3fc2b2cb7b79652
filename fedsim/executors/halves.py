"""Device halves over all rows of a batch, and the state that devices keep for them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import Tensor

from fedsim.errors import PayloadError
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan, round_of, server_round
from fedsim.flower.records import LazyArray, LazyArrayRecord, stack_records, stacked_record
from fedsim.learning.config import LocalTerms
from fedsim.learning.layout import Layout

__all__ = ["DeviceHalf", "DeviceWork", "HalvesOfDevices", "joined_terms"]

Tensors = dict[str, Tensor]
Work = Callable[[Sequence[Message], Sequence[int], LocalTerms | None], list[RecordDict]]
_SPREAD = 4  # rows kept alive for each row in use before states are gathered anew


class DeviceHalf(Protocol):
    """What a strategy says a device does; see `strategies.halves.DeviceHalf`."""

    @property
    def name(self) -> str:
        """Names the half's state, and in replies that it was applied."""

    @property
    def goes_round_mods(self) -> bool:
        """Whether Flower's own mods see what the half decodes and is yet to encode."""

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
    plan : WorkPlan
        Reads instructions.
    layout : Layout
        Of the model.
    place : torch.device
        Where tensors are worked on.
    """

    def __init__(
        self, halves: Sequence[DeviceHalf], plan: WorkPlan, layout: Layout, place: torch.device
    ) -> None:
        self._halves = tuple(halves)
        self._plan, self._layout, self._place = plan, layout, place
        # Of each device: the states of a batch, one for each half, and its row there.
        self._states: dict[int, tuple[list[Tensors], int]] = {}
        self._open: dict[str, tuple[int, list[Tensors], int]] = {}
        self._busy: dict[int, int] = {}  # node id → messages computed and not settled
        self._latest: dict[int, int] = {}  # node id → the last message whose states were taken up

    def is_settled(self, message: Message) -> bool:
        """Return whether no earlier message may still change what this one meets."""
        meta = message.metadata
        is_train = meta.message_type.startswith("train")
        return not is_train or not self._busy.get(meta.dst_node_id)

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

    def around(
        self, work: Work, messages: Sequence[Message], devices: Sequence[int]
    ) -> list[RecordDict]:
        """Return the contents of the replies: receive, work, reply.

        Parameters
        ----------
        work : callable
            ``(messages, devices, terms) -> contents`` of plain training and evaluation.
        messages, devices
            Instructions, and the device of each.
        """
        groups: dict[Any, list[int]] = defaultdict(list)
        structures: dict[int, Any] = {}  # many messages share one content
        for i, message in enumerate(messages):
            if message.metadata.message_type.startswith("train"):
                groups[self._likeness(message, structures)].append(i)
        inner = list(messages)
        contents: list[RecordDict] = [RecordDict()] * len(messages)
        batches = []
        together = dict.fromkeys(range(len(messages)))  # without terms: one call for all
        for rows in groups.values():
            batch = _Batch(
                [messages[i] for i in rows], [devices[i] for i in rows], self._halves, self._place
            )
            batch.states = self._gather(
                [messages[i].metadata.dst_node_id for i in rows], self._place
            )
            for i, message in zip(rows, batch.receive(), strict=True):
                inner[i] = message
            batches.append((rows, batch))
            terms = joined_terms(batch.local(), self._layout)
            if terms is not None:
                batch.note_work(self._plan)
                _place(contents, rows, work, inner, devices, terms)
                for i in rows:
                    del together[i]
        _place(contents, list(together), work, inner, devices)
        for rows, batch in batches:
            for i, content in zip(rows, batch.reply([contents[i] for i in rows]), strict=True):
                contents[i] = content
            for row, i in enumerate(rows):
                meta = messages[i].metadata
                self._open[meta.message_id] = meta.dst_node_id, batch.states, row
                self._busy[meta.dst_node_id] = self._busy.get(meta.dst_node_id, 0) + 1
        self._compact()
        return contents

    def _likeness(self, message: Message, structures: dict[int, Any]) -> Any:
        """Return what all rows of a call have in common: config, arrays, entries of the state."""
        content = message.content
        if id(content) not in structures:
            structures[id(content)] = _structure(content)
        states, _ = self._states.get(message.metadata.dst_node_id, ([], 0))
        return structures[id(content)], tuple(tuple(state) for state in states)

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

    def __init__(
        self,
        messages: Sequence[Message],
        devices: Sequence[int],
        halves: Sequence[DeviceHalf],
        place: torch.device,
    ) -> None:
        self._messages = messages
        self._devices = devices
        self._halves = halves
        self._place = place
        self._config = _config(messages[0].content)
        number = server_round(messages[0].content)
        rounds = [round_of(m) for m in messages] if number is None else [number] * len(messages)
        self._draws = [half.draws(rounds, devices, place) for half in halves]

    def receive(self) -> list[Message]:
        """Return the instructions as the trainer reads them: with the models to work on."""
        states = []
        arrays = self._unpacked([message.content for message in self._messages])
        for half, state, draws in zip(self._halves, self.states, self._draws, strict=True):
            arrays, state = half.receive(arrays, state, self._config, draws)
            states.append(state)
        self.states = states
        others: dict[int, dict[str, Any]] = {}
        inner = []
        for row, message in enumerate(self._messages):
            content = message.content
            if id(content) not in others:
                kept = {k: r for k, r in content.items() if not isinstance(r, ArrayRecord)}
                others[id(content)] = kept
            records: dict[str, Any] = {"arrays": stacked_record(arrays, row)}
            records |= others[id(content)]
            instruction = copy(message)
            instruction.content = compat.fill(RecordDict(), records)
            inner.append(instruction)
        return inner

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
        rounds = np.array([round_of(message) for message in self._messages], np.int64)
        steps, rates = plan.steps_and_rates(
            self._messages[0].content, np.asarray(self._devices, np.int64), rounds
        )
        made = {"steps-made": torch.from_numpy(steps), "rate-used": torch.from_numpy(rates)}
        self._config |= _moved(made, self._place)

    def reply(self, contents: Sequence[RecordDict]) -> list[RecordDict]:
        """Return what is sent of the work's results; the states move on."""
        name = "gradients" if "gradients" in contents[0] else "arrays"
        work: Mapping[str, Any] = stack_records([content[name] for content in contents])  # type: ignore[misc]
        states = list(self.states)
        for h in range(len(self._halves) - 1, -1, -1):
            work, states[h] = self._halves[h].reply(
                dict(work), states[h], self._config, self._draws[h]
            )
        self.states = states
        applied = ConfigRecord({"halves": [half.name for half in reversed(self._halves)]})
        replies = []
        for row, content in enumerate(contents):
            arrays = {
                key: LazyArray(value, row) if isinstance(value, Tensor) else value.array(row)
                for key, value in work.items()
            }
            records: dict[str, Any] = {name: compat.fill(LazyArrayRecord(), arrays)}
            records |= {k: r for k, r in content.items() if k != name}
            records["applied"] = applied
            replies.append(compat.fill(RecordDict(), records))
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


def _place(
    contents: list[RecordDict],
    rows: Sequence[int],
    work: Work,
    messages: Sequence[Message],
    devices: Sequence[int],
    terms: LocalTerms | None = None,
) -> None:
    """Have these rows worked on, and put what they give into their places."""
    if not rows:
        return
    done = work([messages[i] for i in rows], [devices[i] for i in rows], terms)
    for i, content in zip(rows, done, strict=True):
        contents[i] = content


def _structure(content: RecordDict) -> Any:
    """Return a content's config and the names of its arrays."""
    return tuple(
        (name, tuple(record))
        if isinstance(record, ArrayRecord)
        else (name, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in record.items()))
        for name, record in content.items()
        if isinstance(record, ArrayRecord | ConfigRecord)
    )


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
