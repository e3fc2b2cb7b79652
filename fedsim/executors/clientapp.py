"""An ordinary Flower `ClientApp`, called in this process for one device after another."""

import logging
from collections.abc import Sequence
from copy import copy

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedsim.executors.vectorised import train_or_evaluate
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import private_copy
from fedsim.learning.trainer import Trainer

__all__ = ["ClientAppExecutor", "device_app"]

_log = logging.getLogger(__name__)


class ClientAppExecutor:
    """Calls a `ClientApp` for each instruction, with one `Context` a device.

    The app finds its device in ``context.node_config["partition-id"]``, as in Flower's own
    simulation, and keeps its state in ``context.state``. What it raises becomes an error reply.

    Parameters
    ----------
    app : ClientApp
        The app.
    n_devices : int
        Devices of the scenario (``num-partitions``).
    node_base : int
        Node id of device 0.
    """

    is_stateful = True

    def __init__(self, app: ClientApp, n_devices: int, *, node_base: int) -> None:
        self._app = app
        self._n_devices = n_devices
        self._node_base = node_base
        self._contexts: dict[int, Context] = {}

    def reply_bytes(self, message: Message) -> int | None:
        """Return None: only the app knows what it replies."""
        return None

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """Return the app's reply to each message, in order."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        private = copy(message)
        private.content = private_copy(message.content)
        try:
            return self._app(message=private, context=self._context(message.metadata.dst_node_id))
        except Exception as error:  # whatever the user's code raises
            _log.debug("the client app raised", exc_info=True)
            return Message(Error(compat.CLIENT_APP_RAISED, repr(error)), reply_to=message)

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            self._contexts[node_id] = Context(
                run_id=1,
                node_id=node_id,
                node_config={
                    "partition-id": node_id - self._node_base,
                    "num-partitions": self._n_devices,
                },
                state=RecordDict(),
                run_config={},
            )
        return self._contexts[node_id]


def device_app(trainer: Trainer, plan: WorkPlan, mods: Sequence[Mod] = ()) -> ClientApp:
    """Return fedsim's own app: the work of the vectorised executor, for one device at a time.

    Parameters
    ----------
    trainer, plan
        Who works, and who reads the instructions.
    mods : sequence of Flower mods
        What the strategy's device halves are here.
    """
    app = ClientApp(mods=list(mods))

    def answer(message: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        return Message(train_or_evaluate(trainer, plan, [message], [device])[0], reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    return app
