"""All instructions under way as a few large tensor programs, in this process."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from operator import is_not
from typing import Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedsim.errors import PayloadError
from fedsim.executors.halves import DeviceHalf, HalvesOfDevices
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan, round_of, server_round, wants_steps
from fedsim.flower.records import payload_bytes, stack_records, stacked_records
from fedsim.learning.config import LocalConfig, LocalTerms
from fedsim.learning.trainer import Trainer

__all__ = ["VectorisedExecutor", "train_or_evaluate"]


class VectorisedExecutor:
    """Computes a batch of instructions by training all their devices together.

    A reply depends on its message and on the state of its device's halves alone, whatever else is
    in the batch. Instructions with different base models or local configs may share one.

    Decision: a half's state belongs to whole batches, of which a device holds a row. It is computed
    with the reply, but becomes the device's when the reply arrives (`settle`), and is dropped with
    a lost one; until then the device is not computed again (`can_compute`).

    Parameters
    ----------
    trainer : Trainer
        Does the work over a leading device axis.
    plan : WorkPlan
        Reads instructions.
    node_base : int
        Node id of device 0.
    halves : sequence of device halves
        What devices do around their local work, as the strategy says: the first receives first and
        replies last.
    """

    is_stateful = False

    def __init__(
        self,
        trainer: Trainer,
        plan: WorkPlan,
        *,
        node_base: int,
        halves: Sequence[DeviceHalf] = (),
    ) -> None:
        self._trainer = trainer
        self._plan = plan
        self._node_base = node_base
        self._weighed: tuple[list[ArrayRecord], int] = [], 0
        self._halves = None
        if halves:
            self._halves = HalvesOfDevices(halves, trainer, plan)

    def reply_bytes(self, message: Message) -> int | None:
        """Return the dense payload of the reply: a trained model is as large as the one sent.

        None if a half decides what is sent.
        """
        if not message.metadata.message_type.startswith("train"):
            return 0
        if self._halves is not None:
            return None
        content = message.content
        # The messages of a round, or of a version, share their arrays.
        arrays = [r for r in compat.values_of(content).values() if isinstance(r, ArrayRecord)]
        weighed, size = self._weighed
        if len(arrays) != len(weighed) or any(map(is_not, arrays, weighed)):
            size = payload_bytes(content)
            self._weighed = arrays, size
        return size

    def can_compute(self, message: Message) -> bool:
        """Return whether the state of the message's device is known."""
        return self._halves is None or self._halves.is_settled(message)

    def settle(self, message_id: str, *, has_arrived: bool) -> None:
        """Take up the state that a device had after a message, or drop it."""
        if self._halves is not None:
            self._halves.settle(message_id, has_arrived=has_arrived)

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Return what devices keep for a half, one tensor ``(n, *shape)`` per key."""
        return {} if self._halves is None else self._halves.kept(name)

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """Return the reply to each message, in the same order.

        Raises
        ------
        PayloadError
            If a message is of a type that devices do not handle, or its arrays do not fit the
            model.
        """
        devices = [message.metadata.dst_node_id - self._node_base for message in messages]
        evaluate = partial(train_or_evaluate, self._trainer, self._plan)
        if self._halves is None:
            contents = evaluate(messages, devices)
        else:
            contents = self._halves.around(evaluate, messages, devices)
        return compat.replies_to(messages, contents)


def train_or_evaluate(
    trainer: Trainer,
    plan: WorkPlan,
    messages: Sequence[Message],
    devices: Sequence[int],
    terms: LocalTerms | None = None,
) -> list[RecordDict]:
    """Do what each message asks of its device, as few calls of the trainer as possible.

    Parameters
    ----------
    trainer, plan
        Who works, and who reads the instructions.
    messages : sequence of Message
        Types ``train`` and ``evaluate``, with any action.
    devices : sequence of int
        The device each message is for.
    terms : LocalTerms, optional
        What is added to the local objective, one row for each message.

    Returns
    -------
    list of RecordDict
        The contents of the replies, in the same order (design: a train reply holds `arrays` or
        `gradients` and `metrics`; an evaluate reply `metrics`).
    """
    groups: dict[tuple[str, LocalConfig], list[int]] = defaultdict(list)
    configs: dict[tuple[int, ...], LocalConfig] = {}  # many contents share one config
    for i, message in enumerate(messages):
        action = message.metadata.message_type.partition(".")[0]
        if action not in ("train", "evaluate"):
            raise PayloadError(
                f"message type {message.metadata.message_type!r}: simulated devices handle "
                "'train' and 'evaluate'"
            )
        content = message.content
        key = tuple(id(record) for record in content.values() if isinstance(record, ConfigRecord))
        if key not in configs:
            configs[key] = plan.local_config(content)
        groups[action, configs[key]].append(i)
    contents: list[RecordDict] = [RecordDict()] * len(messages)
    for (action, config), members in groups.items():
        batch = [messages[i] for i in members]
        who = np.array([devices[i] for i in members], np.int64)
        base, rows = _bases(trainer, batch)
        if action == "evaluate":
            done = _evaluate(trainer, base, rows, who)
        else:
            added = LocalTerms() if terms is None else terms.part(torch.tensor(members))
            done = _train(trainer, base, rows, who, batch, config, added)
        for i, content in zip(members, done, strict=True):
            contents[i] = content
    return contents


def _bases(trainer: Trainer, batch: Sequence[Message]) -> tuple[torch.Tensor, np.ndarray]:
    """Return the distinct models sent (V, P), and which of them each message carries."""
    row_of: dict[int, int] = {}  # by content, and by its arrays
    records: list[ArrayRecord] = []
    rows = []
    for message in batch:
        content = message.content
        if id(content) not in row_of:
            record = _arrays_of(content)
            if id(record) not in row_of:
                row_of[id(record)] = len(records)
                records.append(record)
            row_of[id(content)] = row_of[id(record)]
        rows.append(row_of[id(content)])
    layout = trainer.layout
    for record in records:
        if list(record) != list(layout.names):
            raise PayloadError(
                f"a message carries the arrays {list(record)}, the model has {list(layout.names)}"
            )
    return layout.flatten(stack_records(records)), np.array(rows, np.int64)


def _arrays_of(content: RecordDict) -> ArrayRecord:
    found = [record for record in content.values() if isinstance(record, ArrayRecord)]
    if len(found) != 1:
        raise PayloadError(f"an instruction carries {len(found)} ArrayRecords; it must carry one")
    return found[0]


def _train(
    trainer: Trainer,
    base: torch.Tensor,
    rows: np.ndarray,
    who: np.ndarray,
    batch: Sequence[Message],
    config: LocalConfig,
    terms: LocalTerms,
) -> list[RecordDict]:
    rounds = _rounds(batch)
    result = trainer.train(base, rows, who, rounds, config, terms=terms)
    assert result.params is not None
    stacks = trainer.layout.views(result.params)
    name = "gradients" if config.mode == "gradient" else "arrays"
    samples = trainer.data.size[who]
    contents = []
    for message, record, n, loss, steps in zip(
        batch,
        stacked_records(stacks),
        samples.tolist(),
        result.loss.tolist(),
        result.steps.tolist(),
        strict=True,
    ):
        figures = {"num-examples": n, "train_loss": loss}
        if wants_steps(message.content):
            figures["local_steps"] = steps
        metrics = compat.record_of(MetricRecord, figures)
        contents.append(compat.record_of(RecordDict, {name: record, "metrics": metrics}))
    return contents


def _rounds(batch: Sequence[Message]) -> np.ndarray:
    """Return the round of each message; those that share a content mostly share it too."""
    named: dict[int, int | None] = {}
    rounds = []
    for message in batch:
        content = message.content
        if id(content) not in named:
            named[id(content)] = None if server_round(content) is None else round_of(message)
        number = named[id(content)]
        rounds.append(round_of(message) if number is None else number)
    return np.array(rounds, np.int64)


def _evaluate(
    trainer: Trainer, base: torch.Tensor, rows: np.ndarray, who: np.ndarray
) -> list[RecordDict]:
    has_tests = getattr(trainer.data, "local_test_size", None) is not None
    split: Literal["train", "test"] = "test" if has_tests else "train"
    loss, accuracy, samples = trainer.evaluate_devices(base, rows, who, split=split)
    return [
        RecordDict(
            {"metrics": MetricRecord({"num-examples": n, "eval_loss": x, "eval_accuracy": a})}
        )
        for n, x, a in zip(samples.tolist(), loss.tolist(), accuracy.tolist(), strict=True)
    ]
