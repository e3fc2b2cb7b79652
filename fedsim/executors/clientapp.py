"""An ordinary Flower `ClientApp`, called in this process for one device after another."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.clientapp.typing import Mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
)

from fedsim.errors import ScenarioError
from fedsim.executors.halves import DeviceHalf, DeviceWork, joined_terms
from fedsim.executors.vectorised import train_or_evaluate
from fedsim.flower import compat
from fedsim.flower.instructions import WorkPlan, round_of
from fedsim.flower.records import private_copy, stack_records
from fedsim.learning.trainer import Trainer
from fedsim.streams import bits

__all__ = ["ClientAppExecutor", "call_app", "check_app", "device_app", "mods_needed_by"]

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
    run_config : mapping, optional
        What the app finds in ``context.run_config``.
    seed : int
        Of the global generators of `random`, numpy and torch, which an app may draw from.

    Attributes
    ----------
    app, run_config
        As given.
    contexts : dict of int to Context
        Node id → what the app keeps.
    """

    is_stateful = True

    def __init__(
        self,
        app: Callable[..., Message],
        n_devices: int,
        *,
        node_base: int,
        run_config: Mapping[str, bool | int | float | str] | None = None,
        seed: int = 0,
    ) -> None:
        self.app = app
        self._n_devices = n_devices
        self._node_base = node_base
        self.run_config = dict(run_config or {})
        self._seed = seed
        self.contexts: dict[int, Context] = {}
        self._n_answered: Counter[int] = Counter()

    def reply_bytes(self, message: Message) -> int | None:
        """Return None: only the app knows what it replies."""
        return None

    def __call__(self, messages: Sequence[Message]) -> list[Message]:
        """Return the app's reply to each message, in order."""
        return [
            call_app(
                self.app,
                message,
                self.context_of(message.metadata.dst_node_id),
                self.seed_of(message),
            )
            for message in messages
        ]

    def seed_of(self, message: Message) -> int:
        """Return the seed of the global generators while this message is answered."""
        node_id = message.metadata.dst_node_id
        device, nth = node_id - self._node_base, self._n_answered[node_id]
        self._n_answered[node_id] += 1
        return int(bits(self._seed, "client-app", device, round_of(message), nth))

    def context_of(self, node_id: int) -> Context:
        """Return a node's context, a new one at its first message."""
        if node_id not in self.contexts:
            self.contexts[node_id] = Context(
                run_id=1,
                node_id=node_id,
                node_config={
                    "partition-id": node_id - self._node_base,
                    "num-partitions": self._n_devices,
                },
                state=RecordDict(),
                run_config=dict(self.run_config),
            )
        return self.contexts[node_id]

    def kept(self, name: str) -> dict[str, torch.Tensor]:
        """Return what devices keep for a half, one tensor ``(n, *shape)`` per key."""
        nodes = sorted(node for node, each in self.contexts.items() if name in each.state)
        records = [self.contexts[node].state.array_records[name] for node in nodes]
        return stack_records(records) if records else {}


def call_app(app: Callable[..., Message], message: Message, context: Context, seed: int) -> Message:
    """Return an app's reply to a message of its own; an error reply if it raises.

    Parameters
    ----------
    app : ClientApp
    message : Message
        It is not changed.
    context : Context
        The app may change it.
    seed : int
        Of the global generators, which are put back afterwards.
    """
    private = copy(message)
    private.content = private_copy(message.content)
    try:
        with _global_generators(seed):
            reply = app(message=private, context=context)
        if not isinstance(reply, Message):
            raise TypeError(f"the client app returned {reply!r}, not a Message")
        return reply
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        _log.debug("the client app raised", exc_info=True)
        return Message(Error(compat.CLIENT_APP_RAISED, repr(error)), reply_to=message)


@contextmanager
def _global_generators(seed: int) -> Iterator[None]:
    """Seed the global generators of `random`, numpy and torch; put them back afterwards.

    An app shuffles with them, and Flower samples nodes with the first: each would shift the
    other's numbers, and what a device draws would depend on who was computed before it.
    """
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002
    has_gpus = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    gpus = range(torch.cuda.device_count()) if has_gpus else ()
    is_bare = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    # For devices that are not there torch.manual_seed writes stack traces, 2 ms long.
    seed_torch = torch.default_generator.manual_seed if is_bare else torch.manual_seed
    with torch.random.fork_rng(devices=gpus):
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        seed_torch(seed)
        try:
            yield
        finally:
            np.random.set_state(array)  # noqa: NPY002
            random.setstate(python)


def check_app(app: object) -> None:
    """Refuse what is no `ClientApp`, and one without a train function.

    Raises
    ------
    ScenarioError
        Says what it is instead, or what it lacks.
    """
    if not isinstance(app, ClientApp):
        name = f" {app.__qualname__!r}" if hasattr(app, "__qualname__") else ""
        raise ScenarioError(
            f"executor.app: this is a {type(app).__name__}{name}, not a Flower ClientApp"
        )
    if not compat.has_train_function(app):
        raise ScenarioError(
            "executor.app: this ClientApp has no train function; decorate one with @app.train()"
        )


def device_app(
    trainer: Trainer,
    plan: WorkPlan,
    mods: Sequence[Mod] = (),
    halves: Sequence[DeviceHalf] = (),
) -> ClientApp:
    """Return fedsim's own app: the work of the vectorised executor, for one device at a time.

    Parameters
    ----------
    trainer, plan
        Who works, and who reads the instructions.
    mods : sequence of Mod
        Flower mods around training, which some of Flower's own strategies need.
    halves : sequence of device halves
        The strategy's; the first receives first and replies last.
    """
    app = ClientApp()
    mods = [*(half.as_mod() for half in halves if half.goes_round_mods), *mods]
    halves = [half for half in halves if not half.goes_round_mods]

    def answer(message: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        works: list[DeviceWork] = []
        inner = copy(message)
        if not halves or not message.metadata.message_type.startswith("train"):
            for half in halves:
                if half.completes_models:
                    inner.content = half.work(inner, context).content
            content = train_or_evaluate(trainer, plan, [inner], [device])[0]
            return Message(content, reply_to=message)
        for half in halves:
            works.append(half.work(inner, context))
            inner.content = works[-1].content
        terms = joined_terms([work.terms for work in works], trainer.layout)
        where = np.array([device]), np.array([round_of(inner)])
        steps, rates = plan.steps_and_rates(inner.content, *where)
        content = train_or_evaluate(trainer, plan, [inner], [device], terms)[0]
        made = (None, None) if terms is None else (int(steps[0]), float(rates[0]))
        for work in reversed(works):
            content = work.sent(content, *made)
        return Message(content, reply_to=message)

    app.train(mods=list(mods))(answer)
    app.evaluate()(answer)
    return app


def mods_needed_by(strategy: object) -> list[Mod]:
    """Return the mods that a strategy, or one that it wraps, expects on the devices.

    Flower's client-side differential privacy leaves the clipping to a mod; without it updates
    travel unclipped, under noise that is far too small for them.
    """
    mods: list[Mod] = []
    while strategy is not None:
        if isinstance(strategy, DifferentialPrivacyClientSideFixedClipping):
            mods.append(fixedclipping_mod)
        elif isinstance(strategy, DifferentialPrivacyClientSideAdaptiveClipping):
            mods.append(adaptiveclipping_mod)
        strategy = getattr(strategy, "strategy", None)
    return mods
