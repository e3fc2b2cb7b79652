"""Every private name of Flower that fedsim touches, in one place.

Checked against flwr 1.41 (the names below exist there as imported). What each is for:

=========================  =========================================================
name                       needed because
=========================  =========================================================
``TaskIdentity``           an instruction `Message` cannot be built unless it is set
``Run``                    the abstract `Grid.run` property returns one
``ErrorCode``              an error reply carries one of its numbers
``strategy_utils.sleep``   `sample_nodes` waits for nodes with it, in wall time
``Metadata._message_id``   a grid sets it; there is no public setter
``TypedDict._data``        a record checks each value as it is set, which costs more than
                           simulating the message; values made here need no check
=========================  =========================================================
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, INFO, getLogger
from typing import Any, TypeVar

from flwr.app import (
    DEFAULT_TTL,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from flwr.serverapp.strategy import strategy_utils
from flwr.supercore.run import Run

try:
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # releases in which messages need no identity
    TaskIdentity = None  # type: ignore[assignment,misc]


__all__ = [
    "CLIENT_APP_RAISED",
    "DEFAULT_TTL",
    "MESSAGE_UNAVAILABLE",
    "NODE_UNAVAILABLE",
    "Run",
    "empty_run",
    "fill",
    "identity",
    "patched_sleep",
    "quiet_flower",
    "set_message_id",
]

CLIENT_APP_RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
MESSAGE_UNAVAILABLE = int(ErrorCode.MESSAGE_UNAVAILABLE)
NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)

RecordT = TypeVar("RecordT", bound=ArrayRecord | ConfigRecord | MetricRecord | RecordDict)

_IDENTITY_FIELDS = ("_run_id", "_node_id", "_task_id")


def fill(record: RecordT, values: Mapping[str, Any]) -> RecordT:
    """Put values of the right types into a new record without checking each; return it."""
    record.__dict__["_data"].update(values)
    return record


def empty_run(run_id: int = 1) -> Run:
    """Return a `Run` with nothing in it but its id."""
    return Run.create_empty(run_id)


@contextmanager
def quiet_flower(*, verbose: bool = False) -> Iterator[None]:
    """Let Flower log errors only (with `verbose` all it has to say), and put its level back."""
    logger = getLogger("flwr")
    level = logger.level
    logger.setLevel(INFO if verbose else ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, as Flower's own grids do."""
    message.metadata.__dict__["_message_id"] = message_id


@contextmanager
def identity() -> Iterator[None]:
    """Set the process-wide task identity where nobody has, and put it back afterwards."""
    if TaskIdentity is None or TaskIdentity._run_id is not None:
        yield  # inside a real Flower run the identity is Flower's
        return
    saved: dict[str, Any] = {field: getattr(TaskIdentity, field) for field in _IDENTITY_FIELDS}
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    try:
        yield
    finally:
        for field, value in saved.items():
            setattr(TaskIdentity, field, value)


@contextmanager
def patched_sleep(sleep: Callable[[float], None]) -> Iterator[None]:
    """Let `sample_nodes` wait with `sleep` (virtual seconds) while the context is open."""
    real = vars(strategy_utils)["sleep"]
    vars(strategy_utils)["sleep"] = sleep
    try:
        yield
    finally:
        vars(strategy_utils)["sleep"] = real
