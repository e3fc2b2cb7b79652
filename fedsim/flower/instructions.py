"""What an instruction asks of a device: read once, used for its time and for the work itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from fedsim.errors import PayloadError, ScenarioError
from fedsim.learning.config import LocalConfig

__all__ = ["Exchange", "WorkPlan", "read_exchange", "round_of", "training_config"]

_EVALUATION_SHARE = 1 / 3  # a forward pass costs a third of a training step
_EXCHANGE = "exchange"
_EXCHANGE_KEYS = frozenset({"kind", "when", "payload_bytes"})
_KINDS = ("server",)


@dataclass(frozen=True, slots=True)
class Exchange:
    """How a message travels: the record named ``exchange`` of an instruction.

    Attributes
    ----------
    kind : str
        ``server``: download from the server, work, upload to the server.
    payload_bytes : int or None
        What the reply weighs, if not what its arrays weigh.
    """

    kind: str = "server"
    payload_bytes: int | None = None


def read_exchange(content: RecordDict) -> Exchange:
    """Return how an instruction with this content travels.

    Raises
    ------
    PayloadError
        If the record ``exchange`` has an unknown key or kind, or a value of the wrong type.
    """
    record = content.get(_EXCHANGE)
    if record is None:
        return Exchange()
    if not isinstance(record, ConfigRecord):
        raise PayloadError(f"'exchange' must be a ConfigRecord, not {type(record).__name__}")
    unknown = sorted(set(record) - _EXCHANGE_KEYS)
    if unknown:
        valid = ", ".join(sorted(_EXCHANGE_KEYS))
        raise PayloadError(f"exchange has the unknown key {unknown[0]!r}; valid: {valid}")
    kind = record.get("kind", "server")
    if kind not in _KINDS:
        raise PayloadError(
            f"exchange.kind is {kind!r}; this network grid carries: {', '.join(_KINDS)}"
        )
    when = record.get("when", "after")
    if when != "after":
        raise PayloadError(f"exchange.when is {when!r}; by way of the server it must be 'after'")
    size = record.get("payload_bytes")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
        raise PayloadError(f"exchange.payload_bytes is {size!r}; it must be an int, 0 or more")
    return Exchange(str(kind), size)


def round_of(message: Message) -> int:
    """Return the round that keys an instruction's random draws.

    It is the config's ``server-round``; a strategy that sends none gets the message's own number.
    """
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(record.get("server-round"), int):
            return int(record["server-round"])  # type: ignore[arg-type]
    return int(message.metadata.message_id)


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
    """

    defaults: LocalConfig
    sizes: NDArray[np.int64]
    seed: int = 0

    def local_config(self, content: RecordDict) -> LocalConfig:
        """Return the local work that an instruction asks for.

        The keys `mode`, `local-epochs`, `local-steps`, `batch-size`, `learning-rate` and
        `proximal-mu` of any ConfigRecord count; the record `exchange` does not.

        Raises
        ------
        PayloadError
            If a value is of the wrong type or out of range.
        """
        keys: dict[str, Any] = {}
        for name, record in content.items():
            if isinstance(record, ConfigRecord) and name != _EXCHANGE:
                keys.update({k: record[k] for k in _CONFIG_KEYS if k in record})
        if not keys:
            return self.defaults
        changes: dict[str, Any] = {_CONFIG_KEYS[key]: value for key, value in keys.items()}
        if "local_epochs" in changes:
            changes.setdefault("local_steps", None)
        try:
            return replace(self.defaults, **changes)
        except (ScenarioError, TypeError, ValueError) as error:
            raise PayloadError(f"an instruction's config asks for {keys}: {error}") from error

    def samples(self, message: Message, config: LocalConfig, device: int) -> float:
        """Return the work of an instruction in training samples.

        Epochs × the device's data, or steps × batch; evaluation counts a third of its data;
        anything else nothing.
        """
        size = int(self.sizes[device])
        action = message.metadata.message_type.partition(".")[0]
        if action == "evaluate":
            return size * _EVALUATION_SHARE
        if action != "train":
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
    "proximal-mu": "proximal_mu",
}
