"""Every private name of Flower that fedsim touches, in one place.

Checked against flwr 1.41 and 1.42 (the names below exist there as imported). What each is for:

=========================  =========================================================
name                       needed because
=========================  =========================================================
``TaskIdentity``           an instruction `Message` cannot be built unless it is set
``Run``                    the abstract `Grid.run` property returns one
``ErrorCode``              an error reply carries one of its numbers
``strategy_utils.sleep``   `sample_nodes` waits for nodes with it, in wall time
``Metadata._message_id``   a grid sets it; there is no public setter
``Metadata.__dict__``      a hundred replies are made of a first one: the constructor reads the
                           clock and checks each argument, which costs more than local training
``ClientApp._call``,       whether an app has a train function is told before a run begins
``._registered_funcs``
``TypedDict._data``        a record checks each value as it is set, which costs more than
                           simulating the message; values made here need no check. Reading
                           one key costs as much as ten of a plain dict
=========================  =========================================================
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from logging import ERROR, INFO, getLogger
from typing import Any, TypeVar

from flwr.app import (
    DEFAULT_TTL,
    ArrayRecord,
    ConfigRecord,
    Message,
    Metadata,
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
    "has_train_function",
    "identity",
    "patched_sleep",
    "quiet_flower",
    "record_of",
    "replies_to",
    "set_message_id",
    "values_of",
]

CLIENT_APP_RAISED = int(ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
MESSAGE_UNAVAILABLE = int(ErrorCode.MESSAGE_UNAVAILABLE)
NODE_UNAVAILABLE = int(ErrorCode.NODE_UNAVAILABLE)

RecordT = TypeVar("RecordT", bound=ArrayRecord | ConfigRecord | MetricRecord | RecordDict)

_REPLY_TO = {
    "_run_id": "_run_id",
    "_src_node_id": "_dst_node_id",
    "_dst_node_id": "_src_node_id",
    "_reply_to_message_id": "_message_id",
    "_group_id": "_group_id",
    "_message_type": "_message_type",
    "_src_task_id": "_dst_task_id",
    "_dst_task_id": "_src_task_id",
}  # what a reply takes from which field of its instruction
_IDENTITY_FIELDS = ("_run_id", "_node_id", "_task_id")


def fill(record: RecordT, values: Mapping[str, Any]) -> RecordT:
    """Put values of the right types into a new record without checking each; return it."""
    record.__dict__["_data"].update(values)
    return record


def values_of(record: ArrayRecord | ConfigRecord | MetricRecord | RecordDict) -> dict[str, Any]:
    """Return the very dict that a record keeps its values in; what is put there is not checked."""
    values: dict[str, Any] = record.__dict__["_data"]
    return values


def record_of(kind: type[RecordT], values: dict[str, Any]) -> RecordT:
    """Return a new record that holds this very dict; nothing is checked."""
    record = kind.__new__(kind)
    record.__dict__.update(_empty(kind), _data=values)  # type: ignore[arg-type]  # it is hashable
    return record


@cache
def _empty(kind: Callable[[], Any]) -> dict[str, Any]:
    """Return what an empty record of a kind has in its `__dict__`."""
    return dict(kind().__dict__)


def has_train_function(app: object) -> bool:
    """Return whether a `ClientApp` answers train instructions; True where it cannot be told."""
    if getattr(app, "_call", None) is not None:  # the old interface, which answers all
        return True
    registered = getattr(app, "_registered_funcs", None)
    return registered is None or any(name.partition(".")[0] == "train" for name in registered)


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


def replies_to(messages: Sequence[Message], contents: Sequence[RecordDict]) -> list[Message]:
    """Return ``Message(content, reply_to=message)`` for each message."""
    replies: list[Message] = []
    first: dict[str, Any] = {}
    swapped: list[tuple[str, str]] = []
    ttl = None
    for message, content in zip(messages, contents, strict=True):
        asked = message.metadata.__dict__
        if not replies or asked["_ttl"] != ttl:
            replies.append(Message(content, reply_to=message))
            first, ttl = replies[-1].metadata.__dict__, asked["_ttl"]
            swapped = [(to, of) for to, of in _REPLY_TO.items() if to in first]
            continue
        metadata, reply = Metadata.__new__(Metadata), Message.__new__(Message)
        metadata.__dict__.update(first)
        metadata.__dict__.update([(to, asked[of]) for to, of in swapped])
        reply.__dict__.update(_metadata=metadata, _content=content, _error=None)
        replies.append(reply)
    return replies


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
