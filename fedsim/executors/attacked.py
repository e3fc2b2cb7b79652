"""An attacker's `ClientApp`, where the app is a user's own."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from flwr.app import Array, ArrayRecord, Context, Message

from fedsim.flower.instructions import round_of
from fedsim.learning.attacks import Attacks

__all__ = ["AttackedApp"]


@dataclass(frozen=True, slots=True)
class AttackedApp:
    """Calls an app, and replaces what attackers reply to train instructions.

    Parameters
    ----------
    app : callable
        ``(message, context) -> Message``.
    attacks : Attacks
    """

    app: Callable[..., Message]
    attacks: Attacks

    def __call__(self, message: Message, context: Context) -> Message:
        """Return the app's reply, or what an attacker makes of it."""
        device = int(context.node_config["partition-id"])
        is_train = message.metadata.message_type.startswith("train")
        if not is_train or device not in self.attacks.by_device:
            return self.app(message=message, context=context)
        number = round_of(message)
        came = _floats(next(iter(message.content.array_records.values()), ArrayRecord()))
        reply = self.app(message=message, context=context)
        if reply.has_error():
            return reply
        name, record = next(iter(reply.content.array_records.items()))
        work = _floats(record)
        row, is_gradient = _row(work), name == "gradients"
        base = _row({key: came[key] for key in work}) if came.keys() >= work.keys() else row.clone()
        self.attacks.apply(base, row, [device], [number], is_gradient=is_gradient)
        sent, start = ArrayRecord(), 0
        for key, array in record.items():
            sent[key] = array
            if key in work:
                values = row[0, start : start + work[key].numel()]
                sent[key] = Array(values.view(work[key].shape).numpy())
                start += work[key].numel()
        reply.content[name] = sent
        return reply


def _floats(record: ArrayRecord) -> dict[str, torch.Tensor]:
    tensors = {key: torch.from_numpy(array.numpy()) for key, array in record.items()}
    return {key: value for key, value in tensors.items() if value.is_floating_point()}


def _row(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return tensors as one row, shape (1, P)."""
    return torch.cat([value.reshape(1, -1) for value in tensors.values()], dim=1)
