"""Servers that do not wait for everybody: FedAsync, FedBuff, rounds with a deadline.

Devices train on the version of the model that they were sent, and the server takes what arrives
when it arrives. How far the model has moved on meanwhile is an update's *staleness*, in server
versions; all three weigh stale updates less. A "round" of records and evaluations is a version of
the server's model.

They need nothing but `push_messages` and `pull_messages`. On a simulated grid pulling lets virtual
time pass; on Flower's own grids they ask again ten times a second.
"""

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Annotated, Any, Literal

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from strategies.common import (
    check,
    mean_metrics,
    row_records,
    show_arguments,
    tensor_of,
)
from strategies.compat import fill, instructions, log
from strategies.inflight import InFlight, Sent
from strategies.screening import is_finite

__all__ = ["AsyncStrategy", "DeadlineFedAvg", "FedAsync", "FedBuff", "Staleness", "Update"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
Tensors = dict[str, Tensor]
Seconds = Annotated[float, "seconds"]
Staleness = Literal["constant", "polynomial", "hinge"]

_FAILURES = 200, 10  # errors and losses in a row before we give up: so many, and for each device


@dataclass(frozen=True, slots=True)
class Update:
    """What a device has made of a version of the model.

    Attributes
    ----------
    arrays : mapping of str to Array
        The model after local training.
    base : dict of Tensor
        The version that it began with.
    staleness : int
        Versions that the server has made since.
    seconds : float
        Between sending the version and taking the reply; a deadline's, at the deadline.
    examples : float
        Training samples of the device.
    """

    arrays: Mapping[str, Array]
    base: Tensors
    staleness: int
    seconds: float = 0.0
    examples: float = 1.0

    @property
    def work(self) -> Tensors:
        """The model after local training, in the types of its base: integers as float64."""
        return {key: tensor_of(self.arrays[key]).to(base.dtype) for key, base in self.base.items()}


class AsyncStrategy(Strategy):
    """Base of strategies whose server does not wait for all it has asked.

    A subclass says what becomes of an update (`absorb`), on `model`.

    Parameters
    ----------
    concurrency : int, optional
        Devices at work at any time; default: all that are there.
    staleness : {"constant", "polynomial", "hinge"}
        How much an update weighs that is s versions old: 1; (s + 1)^-a; or 1 up to a threshold b,
        then 1 / (a (s - b) + 1).
    staleness_exponent : float
        The polynomial's a.
    hinge_slope, hinge_threshold : float
        The hinge's a and b.
    max_staleness : int, optional
        Updates staler than this are dropped.
    drop_non_finite : bool
        Whether replies with a NaN or an infinity are dropped, as if they were errors.
    proximal_mu : float
        Devices are pulled towards the version that they were sent.
    min_available_nodes : int
        Devices to wait for where none is at work.
    seed : int
        Of the choice among idle devices.

    Attributes
    ----------
    model : dict of Tensor
        The server's model; buffers of integers are averaged in float64.
    version : int
    round_metrics : dict of float
        Of the last version: mean and largest staleness of its updates (versions), mean staleness
        in seconds, updates dropped.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        show_arguments(cls)

    def __init__(
        self,
        *,
        concurrency: int | None = None,
        staleness: Staleness = "polynomial",
        staleness_exponent: float = 0.5,
        hinge_slope: float = 10.0,
        hinge_threshold: float = 4.0,
        max_staleness: int | None = None,
        drop_non_finite: bool = False,
        proximal_mu: float = 0.0,
        min_available_nodes: int = 1,
        seed: int = 0,
    ) -> None:
        check(concurrency is None or concurrency >= 1, "concurrency", concurrency, "at least 1")
        kinds = ("constant", "polynomial", "hinge")
        check(staleness in kinds, "staleness", staleness, f"one of {', '.join(kinds)}")
        for name, value in (
            ("staleness_exponent", staleness_exponent),
            ("hinge_slope", hinge_slope),
            ("hinge_threshold", hinge_threshold),
            ("max_staleness", 0 if max_staleness is None else max_staleness),
            ("proximal_mu", proximal_mu),
        ):
            check(value >= 0, name, value, "at least 0")
        self.concurrency = concurrency
        self.staleness = staleness
        self.staleness_exponent = staleness_exponent
        self.hinge_slope = hinge_slope
        self.hinge_threshold = hinge_threshold
        self.max_staleness = max_staleness
        self.drop_non_finite = drop_non_finite
        self.proximal_mu = proximal_mu
        self.min_available_nodes = min_available_nodes
        self.seed = seed
        self.model: Tensors = {}
        self._flights: InFlight | None = None

    # --- what a method is ---------------------------------------------------------------------

    @abstractmethod
    def absorb(self, update: Update) -> bool:
        """Take an update; return whether it has completed a new version of `model`.

        No tensor that was given or that `model` held before is changed.
        """

    def end_of_replies(self) -> bool:
        """Return whether a new version is complete once all replies of a moment were taken."""
        return False

    def replies(self, flights: InFlight) -> list[Message]:
        """Wait for replies."""
        return flights.wait()

    def weight(self, staleness: int) -> float:
        """Return how much an update counts that is so many versions old, 1 for a fresh one."""
        if self.staleness == "constant":
            return 1.0
        if self.staleness == "polynomial":
            return float((staleness + 1) ** -self.staleness_exponent)
        late = max(0.0, staleness - self.hinge_threshold)
        return 1.0 / (self.hinge_slope * late + 1.0)

    # --- Flower's interface -------------------------------------------------------------------

    def summary(self) -> None:
        """Log the hyperparameters."""
        for name in inspect.signature(type(self)).parameters:
            log(INFO, "\t├──> %s: %s", name, getattr(self, name))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run until the server has made `num_rounds` versions; see Flower's `Strategy`.

        `timeout` and `evaluate_config` have no meaning here: nobody waits for a round, and only
        `evaluate_fn` evaluates.

        Raises
        ------
        RuntimeError
            If nothing but errors and losses comes back.
        """
        log(INFO, "Starting %s strategy:", type(self).__name__)
        self.summary()
        config = ConfigRecord() if train_config is None else train_config
        result = Result()
        if evaluate_fn and (scores := evaluate_fn(0, initial_arrays)) is not None:
            result.evaluate_metrics_serverapp[0] = scores
        self.begin(initial_arrays)
        flights = self._flights = InFlight(grid, self.seed)
        while self.version < num_rounds:
            flights.send(self.configure_train(self.version + 1, self.arrays, config, grid))
            for _ in self._versions(self.replies(flights)):
                result.arrays = self.arrays
                result.train_metrics_clientapp[self.version] = self._metrics
                if evaluate_fn and (scores := evaluate_fn(self.version, self.arrays)) is not None:
                    result.evaluate_metrics_serverapp[self.version] = scores
                if self.version == num_rounds:
                    break
        return result

    def begin(self, arrays: ArrayRecord) -> None:
        """Forget everything, and begin with a model."""
        self.model = {key: _widened(tensor_of(array)) for key, array in arrays.items()}
        self._dtypes = {key: tensor_of(array).dtype for key, array in arrays.items()}
        self._shapes = {key: tuple(value.shape) for key, value in self.model.items()}
        self.version = 0
        self.round_metrics: dict[str, float] = {}
        self._asked: dict[int, tuple[int, int]] = {}  # node → last version sent, how often before
        self._open: list[tuple[Update, Message]] = []  # absorbed since the last version
        self._dropped = self._failures = 0
        self._not_finite: set[int] = set()  # nodes that were reported
        self._flights = None
        self._alike: dict[str, Any] = {}  # what instructions have in common
        self._publish()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask idle devices, as many as may be at work, to train the current version."""
        if not self.model:
            self.begin(arrays)
        if self._flights is None:
            self._flights = InFlight(grid, self.seed)
        self._flights.free_unsent()
        nodes = self._flights.choose(self.concurrency, self.min_available_nodes)
        self._flights.note(nodes, self.version, self.model)
        contents = [self._content(node, config) for node in nodes]
        return instructions("train", contents, nodes, self._alike)

    def _content(self, node: int, config: ConfigRecord) -> RecordDict:
        version, repeats = self._asked.get(node, (-1, -1))
        repeats = repeats + 1 if version == self.version else 0
        self._asked[node] = self.version, repeats
        own: dict[str, float] = {"server-round": self.version + 1}
        if repeats:
            own["repeat"] = repeats
        if self.proximal_mu:
            own["proximal-mu"] = self.proximal_mu
        asked = fill(config.copy(), own)
        return fill(RecordDict(), {"arrays": self.arrays, "config": asked})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Absorb the replies; return the last version that they complete, None if they do not."""
        versions = list(self._versions(list(replies)))
        return (self.arrays, self._metrics) if versions else (None, None)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: devices are busy training."""
        return []

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return nothing."""
        return None

    # --- from replies to versions -------------------------------------------------------------

    def _versions(self, replies: Sequence[Message]) -> Iterable[int]:
        """Absorb replies; yield whenever a version is complete."""
        assert self._flights is not None
        faults = [self._fault(reply) for reply in replies]
        self._watch(faults)
        for reply, fault in zip(replies, faults, strict=True):
            sent = self._flights.free(reply.metadata.src_node_id)
            if sent is None or fault:  # nobody has asked it, or it is of no use
                continue
            update = self._update(reply, sent)
            if self.max_staleness is not None and update.staleness > self.max_staleness:
                self._dropped += 1
                continue
            self._open.append((update, reply))
            if self.absorb(update):
                yield self._close()
        if self.end_of_replies():
            yield self._close()

    def _update(self, reply: Message, sent: Sent) -> Update:
        """Return what a reply brings to whom a version was sent."""
        assert self._flights is not None
        arrays, examples = self._contents(reply)
        return Update(
            arrays,
            sent.base,
            self.version - sent.version,
            self._flights.now - sent.time,
            examples,
        )

    def _contents(self, reply: Message) -> tuple[ArrayRecord, float]:
        """Return the arrays of a reply and its number of examples.

        Raises
        ------
        ValueError
            If its arrays are not those of the model, or ``num-examples`` is no number of examples.
        """
        records = reply.content.values()
        said = f"the reply of node {reply.metadata.src_node_id}"
        arrays = next((r for r in records if isinstance(r, ArrayRecord)), None)
        if arrays is None:
            raise ValueError(f"{said} has no ArrayRecord")
        shapes = {key: tuple(array.shape) for key, array in arrays.items()}
        if not shapes.items() >= self._shapes.items():
            wrong = next(key for key, shape in self._shapes.items() if shapes.get(key) != shape)
            raise ValueError(
                f"{said} does not fit the model: {wrong!r} is {shapes.get(wrong, 'missing')}, not "
                f"{self._shapes[wrong]}"
            )
        metrics = next((r for r in records if isinstance(r, MetricRecord)), None)
        examples = 1.0 if metrics is None else metrics.get("num-examples", 1.0)
        if not (isinstance(examples, int | float) and 0 <= examples < math.inf):
            raise ValueError(
                f"{said} has num-examples {examples!r}; it must be a number, 0 or more"
            )
        return arrays, float(examples)

    def _fault(self, reply: Message) -> str:
        """Return, and log, why a reply is of no use; nothing if it is."""
        node = reply.metadata.src_node_id
        if reply.has_error():
            fault = reply.error.reason or "an error"
            log(WARNING, "node %d: %s", node, fault)
        elif self.drop_non_finite and not is_finite(reply):
            fault = f"the reply of node {node} is not finite"
            self._dropped += 1
            if node not in self._not_finite:
                self._not_finite.add(node)
                log(WARNING, "%s: dropped", fault)
        else:
            fault = ""
        return fault

    def _watch(self, faults: Sequence[str]) -> None:
        """Give up where nothing but faults and losses comes back."""
        if not all(faults):
            self._failures = 0
            return
        self._failures += max(1, len(faults))
        if self._failures > max(_FAILURES[0], _FAILURES[1] * len(self._asked)):
            said = faults[-1] if faults else "lost"
            raise RuntimeError(
                f"{self._failures} instructions in a row have come to nothing; the last: {said}"
            )

    def _close(self) -> int:
        """End a version: its arrays, metrics and staleness."""
        self.version += 1
        self._publish()
        updates = [update for update, _ in self._open]
        stale = [update.staleness for update in updates]
        self._metrics = mean_metrics([reply for _, reply in self._open])
        self.round_metrics = {
            "mean_staleness": sum(stale) / len(stale),
            "max_staleness": float(max(stale)),
            "staleness_seconds": sum(update.seconds for update in updates) / len(stale),
            "updates": float(len(updates)),
            "updates_dropped": float(self._dropped),
        }
        told = {key: self.round_metrics[key] for key in ("mean_staleness", "updates_dropped")}
        fill(self._metrics, told)
        self._open, self._dropped = [], 0
        return self.version

    def _publish(self) -> None:
        """Make the record of the current version; rows of it are shared, never written to."""
        stacks = {}
        for key, value in self.model.items():
            dtype = self._dtypes[key]
            whole = value if dtype.is_floating_point else value.round().to(dtype)
            stacks[key] = whole[None]
        self.arrays = row_records(stacks, [0])[0]


class FedAsync(AsyncStrategy):
    """FedAsync: the server moves towards each model as it arrives.

    x ← (1 - α_t) x + α_t y with α_t = α s(t - τ), for a model y made of version τ.

    Parameters
    ----------
    mixing_rate : float
        α, above 0 and up to 1.
    **kwargs
        See `AsyncStrategy`.

    References
    ----------
    .. [1] Xie, Koyejo, Gupta, "Asynchronous federated optimization", OPT 2020, Algorithm 1 and
       section 4 (staleness functions).
    """

    def __init__(self, *, mixing_rate: float = 0.6, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check(0 < mixing_rate <= 1, "mixing_rate", mixing_rate, "above 0 and up to 1")
        self.mixing_rate = mixing_rate

    def absorb(self, update: Update) -> bool:
        """Mix the model in."""
        rate = self.mixing_rate * self.weight(update.staleness)
        model, work = _beside(self.model, update.work)
        self.model = dict(zip(self.model, torch._foreach_lerp(model, work, rate), strict=True))
        return True


class FedBuff(AsyncStrategy):
    """FedBuff: the server steps along the mean of every K updates, stale ones weighing less.

    v ← m v + (1/K) Σ s(τ_i) (y_i - x_τi); x ← x + η_g v.

    Parameters
    ----------
    buffer_size : int
        K, updates a version.
    server_learning_rate : float
        η_g.
    server_momentum : float
        m, from 0 to below 1.
    **kwargs
        See `AsyncStrategy`.

    References
    ----------
    .. [1] Nguyen et al., "Federated learning with buffered asynchronous aggregation", AISTATS
       2022, Algorithm 1; weights 1/√(1 + staleness) in section 5.
    """

    def __init__(
        self,
        *,
        buffer_size: int = 10,
        server_learning_rate: float = 1.0,
        server_momentum: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check(buffer_size >= 1, "buffer_size", buffer_size, "at least 1")
        check(server_learning_rate > 0, "server_learning_rate", server_learning_rate, "above 0")
        check(0 <= server_momentum < 1, "server_momentum", server_momentum, "in [0, 1)")
        self.buffer_size = buffer_size
        self.server_learning_rate = server_learning_rate
        self.server_momentum = server_momentum

    def begin(self, arrays: ArrayRecord) -> None:
        """Empty the buffer, and begin with a model."""
        super().begin(arrays)
        self._buffer: list[Update] = []
        self._velocity: Tensors = {}

    def absorb(self, update: Update) -> bool:
        """Add the update to the buffer; step once it is full."""
        self._buffer.append(update)
        if len(self._buffer) < self.buffer_size:
            return False
        weights = [self.weight(update.staleness) for update in self._buffer]
        step = _mean(self._buffer, weights, self.buffer_size)
        if self.server_momentum:
            if self._velocity:
                step = {k: self.server_momentum * self._velocity[k] + v for k, v in step.items()}
            self._velocity = step
        self.model = _stepped(self.model, step, self.server_learning_rate)
        self._buffer = []
        return True


class DeadlineFedAvg(AsyncStrategy):
    """Rounds with a deadline: late models count in the round in which they arrive.

    A round ends when all that is under way has arrived, or at its deadline: then
    x ← x + η_g Σ n_i s(τ_i) (y_i - x_τi) / Σ n_i s(τ_i) over the updates that are there, fresh and
    late. Who is late stays at work; the next round asks others, up to `concurrency`. With an
    infinite deadline this is FedAvg. If nothing has arrived by the deadline, the round waits for
    the first reply.

    Parameters
    ----------
    deadline : float, s
        Of a round, from its begin; virtual seconds on a simulated grid.
    server_learning_rate : float
        η_g.
    **kwargs
        See `AsyncStrategy`; ``max_staleness=0`` drops what is late.

    References
    ----------
    .. [1] Wu et al., "SAFA: a semi-asynchronous protocol for fast federated learning with low
       overhead", IEEE Trans. Computers 2021 (late updates are kept for the next round; there
       without our weights).
    """

    def __init__(
        self, *, deadline: Seconds, server_learning_rate: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check(deadline > 0, "deadline", deadline, "above 0")
        check(server_learning_rate > 0, "server_learning_rate", server_learning_rate, "above 0")
        self.deadline = deadline
        self.server_learning_rate = server_learning_rate

    def begin(self, arrays: ArrayRecord) -> None:
        """Begin with a model."""
        super().begin(arrays)
        self._buffer: list[Update] = []

    def replies(self, flights: InFlight) -> list[Message]:
        """Wait until all is there, or for the deadline."""
        return flights.wait_until(flights.now + self.deadline)

    def absorb(self, update: Update) -> bool:
        """Keep it for the round's end."""
        self._buffer.append(update)
        return False

    def end_of_replies(self) -> bool:
        """Step by the weighted mean of the round's updates; stay where none has any examples."""
        if not self._buffer:
            return False
        weights = [update.examples * self.weight(update.staleness) for update in self._buffer]
        if total := sum(weights):
            step = _mean(self._buffer, weights, total)
            self.model = _stepped(self.model, step, self.server_learning_rate)
        self._buffer = []
        return True


def _mean(updates: Sequence[Update], weights: Sequence[float], divisor: float) -> Tensors:
    """Return the weighted sum of updates over a divisor.

    One after the other at once, not as each arrives: so few operations on so little data cost most
    where the processor has forgotten them in between.
    """
    total: tuple[Tensor, ...] = ()
    for update, weight in zip(updates, weights, strict=True):
        base, work = _beside(update.base, update.work)
        changes = torch._foreach_sub(work, base)
        if total:
            torch._foreach_add_(total, changes, alpha=weight)
        else:
            total = torch._foreach_mul(changes, weight)
    return dict(zip(updates[0].base, torch._foreach_div(total, divisor), strict=True))


def _stepped(model: Tensors, step: Tensors, rate: float) -> Tensors:
    values, steps = _beside(model, step)
    return dict(zip(model, torch._foreach_add(values, steps, alpha=rate), strict=True))


def _beside(values: Tensors, others: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors of both in the order of the first, on the device of the others."""
    here, there = list(values.values()), [others[key] for key in values]
    if here[0].device != there[0].device:
        here = [value.to(there[0].device) for value in here]
    return here, there


def _widened(value: Tensor) -> Tensor:
    return value if value.is_floating_point() else value.double()
