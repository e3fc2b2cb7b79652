"""What an instruction asks of a device: read once, used for its time and for the work itself."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fedsim.errors import PayloadError, ScenarioError
from fedsim.flower import compat
from fedsim.learning.config import ROUNDS, LocalConfig
from fedsim.network.edges import Backhaul
from fedsim.network.neighbours import Manner
from fedsim.network.plan import Conduct
from fedsim.problems import nearest
from topologies.placement import COLLECTIVES
from topologies.profiles import PROFILES, profile

__all__ = [
    "NODE_BASE",
    "Collective",
    "Exchange",
    "WorkPlan",
    "read_exchange",
    "round_of",
    "server_round",
    "training_config",
    "wants_steps",
]

NODE_BASE = 1000
"""Flower node id of device 0 (0 and 1 mean something else in Flower)."""

_EVALUATION_SHARE = 1 / 3  # a forward pass costs a third of a training step
_EXCHANGE = "exchange"


@dataclass(frozen=True, slots=True)
class Collective:
    """Which collective a group of instructions runs.

    Attributes
    ----------
    name : str
        A key of `topologies.placement.COLLECTIVES`.
    group : str
        The instructions of one push with the same group add up their vectors.
    conduct : Conduct
    fusion_bytes : int or None
        Size at which a bucket of tensors is closed; 0 sends every tensor by itself, None all
        together.
    root : int or None
        Node id of the root of a tree.
    profile : str or None
        A key of `topologies.profiles.PROFILES`: whose layers are timed, if not the model's.
    """

    name: str
    group: str
    conduct: Conduct
    fusion_bytes: int | None = None
    root: int | None = None
    profile: str | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a message travels: the record named ``exchange`` of an instruction.

    Attributes
    ----------
    kind : {"server", "neighbours", "collective"}
        ``server``: download from the server, work, upload to the server. ``neighbours``: work, and
        send to the device's neighbours. ``collective``: work, and add up with the other devices of
        the group. The strategy's own model travels at no cost in the last two.
    payload_bytes : int or None
        What a payload weighs, if not what its arrays weigh.
    manner : Manner
        How devices send to their neighbours and wait for them.
    peers : tuple of int or None
        Node ids of whom to send to; None leaves it to the scenario's graph.
    collective : Collective or None
        What a ``collective`` is.
    by_edge : bool
        By way of the device's edge server instead of the server.
    backhaul : {"none", "down", "up", "both"}
        What edge servers fetch from the server before, or send to it after.
    """

    kind: str = "server"
    payload_bytes: int | None = None
    manner: Manner = field(default_factory=Manner)
    peers: tuple[int, ...] | None = None
    collective: Collective | None = None
    by_edge: bool = False
    backhaul: Backhaul = "none"


def read_exchange(content: RecordDict) -> Exchange:
    """Return how an instruction with this content travels.

    Raises
    ------
    PayloadError
        If the record ``exchange`` has an unknown key or kind, or a value that it cannot have.
    """
    record = compat.values_of(content).get(_EXCHANGE)
    if record is None:
        return _SERVED
    if not isinstance(record, ConfigRecord):
        raise PayloadError(f"'exchange' must be a ConfigRecord, not {type(record).__name__}")
    kind = _choice(record, "kind", ("server", "neighbours", "collective"))
    keys = _KEYS | _OWN_KEYS[kind]
    if unknown := sorted(set(record) - keys):
        valid = ", ".join(sorted(keys))
        raise PayloadError(
            f"exchange has the unknown key {unknown[0]!r}; valid with kind {kind!r}: {valid}"
        )
    size = _count(record, "payload_bytes")
    if kind == "server":
        if record.get("when", "after") != "after":
            raise PayloadError(
                f"exchange.when is {record['when']!r}; by way of the server it must be 'after'"
            )
        server = _choice(record, "server", ("root", "edge"))
        backhaul = _choice(record, "backhaul", ("none", "down", "up", "both"))
        if server == "root" and backhaul != "none":
            raise PayloadError(
                f"exchange.backhaul is {backhaul!r}; it goes with exchange.server 'edge'"
            )
        return Exchange(kind, size, by_edge=server == "edge", backhaul=backhaul)  # type: ignore[arg-type]
    if kind == "collective":
        asked = _read_collective(record)
        if size is None and asked.profile is not None:
            size = _bytes_of(asked.profile)
        return Exchange(kind, size, collective=asked)
    return Exchange(kind, size, _read_manner(record), _read_peers(record))


@cache
def _bytes_of(model: str) -> int:
    return profile(model).n_bytes


def _read_manner(record: ConfigRecord) -> Manner:
    barrier = _choice(record, "barrier", ("global", "local", "deadline"))
    deadline = record.get("deadline")
    if (deadline is None) == (barrier == "deadline"):
        raise PayloadError(
            f"exchange.deadline is {deadline!r} and exchange.barrier {barrier!r}; the barrier "
            "'deadline' needs a deadline in seconds, no other has one"
        )
    is_number = isinstance(deadline, int | float) and not isinstance(deadline, bool)
    if deadline is not None and not (is_number and 0 <= deadline < math.inf):  # type: ignore[operator]
        raise PayloadError(f"exchange.deadline is {deadline!r}; it must be seconds, 0 or more")
    fanout = _choice(record, "fanout", ("all", "one-peer", "pairwise"))
    order = _choice(record, "order", ("exponential", "random"))
    if "order" in record and fanout != "one-peer":
        raise PayloadError(f"exchange.order goes with fanout 'one-peer', not with {fanout!r}")
    return Manner(
        when=_choice(record, "when", ("after", "before", "with")),  # type: ignore[arg-type]
        fanout=order if fanout == "one-peer" else fanout,  # type: ignore[arg-type]
        barrier=barrier,  # type: ignore[arg-type]
        deadline=math.inf if deadline is None else float(deadline),  # type: ignore[arg-type]
    )


def _read_collective(record: ConfigRecord) -> Collective:
    name, group = record.get("collective"), record.get("group", "all")
    if name not in COLLECTIVES:
        near = nearest(str(name), COLLECTIVES)
        meant = f" (did you mean {near!r}?)" if near else ""
        valid = ", ".join(COLLECTIVES)
        raise PayloadError(f"exchange.collective is {name!r}{meant}; it must be one of {valid}")
    if not isinstance(group, str):
        raise PayloadError(f"exchange.group is {group!r}; it must be a str")
    latency = record.get("step_latency", 0.0)
    is_number = isinstance(latency, int | float) and not isinstance(latency, bool)
    if not (is_number and 0 <= latency < math.inf):  # type: ignore[operator]
        raise PayloadError(f"exchange.step_latency is {latency!r}; it must be seconds, 0 or more")
    root = _count(record, "root")
    if root is not None and name != "binomial_tree":
        raise PayloadError(
            f"exchange.root goes with the collective 'binomial_tree', not with {name!r}"
        )
    conduct = Conduct(
        barrier=_choice(record, "barrier", ("global", "local")),  # type: ignore[arg-type]
        on_failure=_choice(record, "on_failure", ("error", "reroute", "wait")),  # type: ignore[arg-type]
        on_device_failure=_choice(record, "on_device_failure", ("error", "shrink")),  # type: ignore[arg-type]
        step_latency=float(latency),  # type: ignore[arg-type]
        is_overlapped=_choice(record, "when", ("after", "with")) == "with",
    )
    layers = _choice(record, "profile", ("", *PROFILES)) or None
    return Collective(str(name), group, conduct, _count(record, "fusion_bytes"), root, layers)


def _count(record: ConfigRecord, key: str) -> int | None:
    """Return a number that is no less than 0, if there is one."""
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise PayloadError(f"exchange.{key} is {value!r}; it must be an int, 0 or more")
    return value


def _read_peers(record: ConfigRecord) -> tuple[int, ...] | None:
    peers = record.get("peers")
    if peers is None:
        return None
    is_list = isinstance(peers, list) and all(map(_is_int, peers))
    if not is_list or len(set(peers)) < len(peers):  # type: ignore[arg-type]
        raise PayloadError(f"exchange.peers is {peers!r}; it must be a list of different node ids")
    return tuple(peers)  # type: ignore[arg-type]


def _choice(record: ConfigRecord, key: str, valid: tuple[str, ...]) -> str:
    """Return one of a few words; the first is the default."""
    value = record.get(key, valid[0])
    if value not in valid:
        words = ", ".join(map(repr, valid))
        raise PayloadError(f"exchange.{key} is {value!r}; this grid carries: {words}")
    return str(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_SERVED = Exchange()
_KEYS = frozenset({"kind", "when", "payload_bytes"})
_OWN_KEYS = {
    "server": frozenset({"server", "backhaul"}),
    "neighbours": frozenset({"fanout", "order", "barrier", "deadline", "peers"}),
    "collective": frozenset(
        {
            "collective",
            "group",
            "barrier",
            "fusion_bytes",
            "on_failure",
            "on_device_failure",
            "step_latency",
            "root",
            "profile",
        }
    ),
}


def round_of(message: Message) -> int:
    """Return the round that keys an instruction's random draws.

    It is the config's ``server-round``; a strategy that sends none gets the message's own number.
    Where a device is sent the same round again, as by asynchronous strategies, the config's
    ``repeat`` says the how-manieth time, from 1; the key is then repeat · `ROUNDS` more, which
    schedules leave out.
    """
    number = server_round(message.content)
    if number is None:
        return int(message.metadata.message_id)
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(record.get("repeat"), int):
            return number + ROUNDS * int(record["repeat"])  # type: ignore[arg-type]
    return number


def server_round(content: RecordDict) -> int | None:
    """Return the round that a config names; None if none does."""
    for record in compat.values_of(content).values():
        if isinstance(record, ConfigRecord):
            number = compat.values_of(record).get("server-round")
            if isinstance(number, int):
                return int(number)
    return None


def wants_steps(content: RecordDict) -> bool:
    """Return whether a config asks for the metric ``local_steps``: ``report`` is "steps"."""
    record = content.get("config")
    return isinstance(record, ConfigRecord) and record.get("report") == "steps"


def training_config(
    config: LocalConfig, extra: Mapping[str, bool | int | float | str] | None = None
) -> ConfigRecord:
    """Return the local work of a scenario as an app reads it: Flower's keys are kebab-case.

    Parameters
    ----------
    config : LocalConfig
    extra : mapping, optional
        Further entries; they win.
    """
    record = ConfigRecord({"learning-rate": config.learning_rate, "batch-size": config.batch_size})
    if config.local_steps is None:
        record["local-epochs"] = config.local_epochs
    elif isinstance(config.local_steps, int):  # a range is drawn from by fedsim's own app only
        record["local-steps"] = config.local_steps
    for key, value in (extra or {}).items():
        record[key] = value
    return record


@lru_cache(maxsize=1024)
def _changed(defaults: LocalConfig, asked: tuple[tuple[str, type, Any], ...]) -> LocalConfig:
    """Return the local work with what an instruction's config asks for instead."""
    keys = {key: value for key, _, value in asked}
    changes: dict[str, Any] = {_CONFIG_KEYS[key]: value for key, value in keys.items()}
    if "local_epochs" in changes:
        changes.setdefault("local_steps", None)
    try:
        return replace(defaults, **changes)
    except (ScenarioError, TypeError, ValueError) as error:
        raise PayloadError(f"an instruction's config asks for {keys}: {error}") from error


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """What the scenario's `training` and a config together ask of a device.

    Parameters
    ----------
    defaults : LocalConfig
        The scenario's training, used for every key that a config leaves out.
    sizes : ndarray of int, shape (n_devices,)
        Training samples of each device.
    seed : int
        Of the numbers of local steps, where devices draw them.
    idle : frozenset of int
        Devices that do not train.
    """

    defaults: LocalConfig
    sizes: NDArray[np.int64]
    seed: int = 0
    idle: frozenset[int] = frozenset()

    def local_config(self, content: RecordDict) -> LocalConfig:
        """Return the local work that an instruction asks for.

        The keys `mode`, `local-epochs`, `local-steps`, `batch-size`, `learning-rate`,
        `momentum` and `proximal-mu` of any ConfigRecord count; the record `exchange` does not.

        Raises
        ------
        PayloadError
            If a value is of the wrong type or out of range.
        """
        keys: dict[str, Any] = {}
        for name, record in compat.values_of(content).items():
            if isinstance(record, ConfigRecord) and name != _EXCHANGE:
                pairs = compat.values_of(record).items()
                keys.update((k, v) for k, v in pairs if k in _CONFIG_KEYS)
        if not keys:
            return self.defaults
        # With the types, since 1 and 1.0 are one key but not both a number of steps.
        asked = tuple((key, type(value), value) for key, value in keys.items())
        is_hashable = not any(isinstance(value, list) for value in keys.values())
        return (_changed if is_hashable else _changed.__wrapped__)(self.defaults, asked)

    def steps_and_rates(
        self, content: RecordDict, devices: NDArray[np.int64], rounds: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return how many local steps devices make for an instruction, and their learning rates."""
        config = self.local_config(content)
        steps = config.steps_of(self.sizes[devices], seed=self.seed, rounds=rounds, devices=devices)
        return steps, config.rates(rounds)

    def last_step(self, message: Message, config: LocalConfig, device: int) -> float:
        """Return the share of an instruction's work that its last local step takes."""
        row = {"rounds": np.array([round_of(message)]), "devices": np.array([device])}
        return 1.0 / float(config.steps_of(self.sizes[[device]], seed=self.seed, **row)[0])

    def samples(self, message: Message, config: LocalConfig, device: int) -> float:
        """Return the work of an instruction in training samples.

        Epochs × the device's data, or steps × batch; evaluation counts a third of its data;
        anything else nothing.
        """
        size = int(self.sizes[device])
        action = message.metadata.message_type.partition(".")[0]
        if action == "evaluate":
            return size * _EVALUATION_SHARE
        if action != "train" or device in self.idle:
            return 0.0
        if config.mode == "local_sgd" and config.local_steps is None:
            return float(config.local_epochs * size)
        low, high = config.step_range
        steps = 1 if config.mode == "gradient" else low
        if high > low:
            row = np.array([size]), np.array([round_of(message)]), np.array([device])
            steps = int(config.steps_of(row[0], seed=self.seed, rounds=row[1], devices=row[2])[0])
        return float(steps * min(config.batch_size or size, size))


_CONFIG_KEYS = {
    "mode": "mode",
    "local-epochs": "local_epochs",
    "local-steps": "local_steps",
    "batch-size": "batch_size",
    "learning-rate": "learning_rate",
    "momentum": "momentum",
    "proximal-mu": "proximal_mu",
}
