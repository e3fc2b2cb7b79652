"""A `ClientApp` in many processes: the engine under Flower's own simulation, Ray."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedsim import registry
from fedsim.data.federated import DeviceData
from fedsim.executors.attacked import AttackedApp
from fedsim.executors.clientapp import ClientAppExecutor, call_app, device_app
from fedsim.executors.crew import Crew, Tool, Wanted
from fedsim.executors.halves import DeviceHalf
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan
from fedsim.learning.attacks import Attacks
from fedsim.learning.trainer import Trainer

__all__ = ["FlowerExecutor", "own_app", "users_app"]


class FlowerExecutor(ClientAppExecutor):
    """Calls a `ClientApp` for each instruction, in worker processes.

    The devices' contexts stay in this process and travel with the messages, so that any worker can
    take any device, and one that dies takes nothing with it.

    Parameters
    ----------
    app : Tool
        The app: see `own_app`, `users_app`.
    n_devices : int
        Devices of the scenario.
    crew, wanted
        The workers, and which of them.
    **options
        See `ClientAppExecutor`.
    """

    def __init__(
        self, app: Tool, n_devices: int, *, crew: Crew, wanted: Wanted, **options: Any
    ) -> None:
        super().__init__(ClientApp(), n_devices, **options)
        self._tool, self._crew, self._wanted = app, crew, wanted

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """Return the app's reply to each message, in order."""
        by_node: dict[int, list[int]] = {}
        for i, message in enumerate(messages):
            by_node.setdefault(message.metadata.dst_node_id, []).append(i)
        seeds = [self.seed_of(message) for message in messages]
        nodes = list(by_node)
        work = np.array([len(by_node[node]) for node in nodes], np.int64)
        shares = [[nodes[i] for i in share] for share in self._crew.shares(work, self._wanted)]
        order = [[i for node in share for i in by_node[node]] for share in shares]
        pieces = [
            (
                [messages[i] for i in rows],
                [seeds[i] for i in rows],
                {node: self.context_of(node) for node in share},
            )
            for share, rows in zip(shares, order, strict=True)
        ]
        replies: dict[int, Message] = {}
        results = self._crew.map(_answer, self._tool, pieces)
        for rows, (answers, contexts) in zip(order, results, strict=True):
            replies.update(zip(rows, answers, strict=True))
            self.contexts.update(contexts)
        return [replies[i] for i in range(len(messages))]


def own_app(
    trainer: Trainer, plan: WorkPlan, mods: Sequence[Mod], halves: Sequence[DeviceHalf]
) -> Tool:
    """Return fedsim's own app for workers (see `clientapp.device_app`)."""
    options = {
        "loss": trainer.stack.loss,
        "seed": trainer.seed,
        "chunk": trainer.chunk,
        "engine": trainer.engine,
        "precision": trainer.stack.precision,
        "attacks": trainer.attacks,
    }
    module = trainer.stack.module
    make = partial(_own_app, module, options, plan, tuple(mods), tuple(halves))
    return Tool(make, (trainer.data,))


def _own_app(
    module: Any,
    options: dict[str, Any],
    plan: WorkPlan,
    mods: Sequence[Mod],
    halves: Sequence[DeviceHalf],
    data: DeviceData,
) -> ClientApp:
    trainer = Trainer(module.to("cpu"), data, device="auto", **options)
    return device_app(trainer, plan, mods, halves)


def users_app(name: str, attacks: Attacks | None = None) -> Tool:
    """Return the app that "package.module:name" names, imported by each worker."""
    return Tool(partial(_users_app, name, attacks))


def _users_app(name: str, attacks: Attacks | None) -> Any:
    app = registry.import_object(name)
    return app if attacks is None else AttackedApp(app, attacks)


def _answer(
    app: ClientApp, messages: list[Message], seeds: list[int], contexts: dict[int, Context]
) -> tuple[list[Message], dict[int, Context]]:
    """Return the replies, and the contexts as they are afterwards."""
    with compat.identity(), compat.quiet_flower():
        replies = [
            call_app(app, message, contexts[message.metadata.dst_node_id], seed)
            for message, seed in zip(messages, seeds, strict=True)
        ]
    return replies, contexts
