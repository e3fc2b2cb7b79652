"""Starting a strategy: the process-wide state it relies on, one record line a round, early stop.

A line of ``rounds.jsonl`` is closed by each call of `evaluate_fn` with a round of 1 or more; that
is where Flower's own `Strategy.start` ends a round. A strategy whose `start` never calls it gets
one line per batch of train instructions instead.

A strategy that keeps a model for each device says so by its attribute ``device_models``, a mapping
name → Tensor ``(n_devices, *shape)``. It is then evaluated by the mean over devices of each own
model's scores, and its lines tell how far the models are apart.

Whatever figures a strategy has of a round it puts into its attribute ``round_metrics``, a mapping
name → number, before it calls `evaluate_fn`. They are written as ``strategy.<name>``; the mean
staleness has a place of its own in a line.
"""

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Strategy

from fedsim.errors import NoNodesError, PayloadError
from fedsim.flower import compat
from fedsim.flower.collectives import times_of
from fedsim.flower.grid import NetworkGrid
from fedsim.flower.ledger import Traffic
from fedsim.flower.records import tensor_of
from fedsim.learning.evaluation import spread
from fedsim.recorder import RoundRow
from fedsim.streams import digest

__all__ = [
    "Evaluation",
    "Models",
    "Outcome",
    "StopRule",
    "check_strategy",
    "consensus_distance",
    "session",
    "start",
    "watched",
]

Models = Mapping[str, torch.Tensor]
"""One model a device: name → Tensor ``(n_devices, *shape)``."""

_DIVERGED_FACTOR = 1000.0
"""A loss this many times the initial one (or 1, if that is more) is divergence."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one model, or means over devices; None where it has no meaning."""

    loss: float | None = None
    accuracy: float | None = None
    accuracy_std: float | None = None  # over devices
    worst_accuracy: float | None = None  # mean of the lowest tenth of the devices
    excess_loss: float | None = None  # F(w) - F* of the training objective


@dataclass(frozen=True, slots=True)
class StopRule:
    """When to stop before the last round; the first that holds wins.

    Attributes
    ----------
    accuracy : float or None
        Reached by the evaluation accuracy.
    time : float or None
        Virtual seconds.
    traffic : float or None
        Bytes in all directions.
    """

    accuracy: float | None = None
    time: float | None = None
    traffic: float | None = None


@dataclass(slots=True)
class Outcome:
    """How a strategy's run ended.

    Attributes
    ----------
    arrays : ArrayRecord
        The last model.
    rounds : int
        Lines recorded.
    stopped_by : str or None
        Which stop rule ended the run: ``accuracy``, ``time`` or ``traffic``.
    diverged : str or None
        What diverged, in words; the round is that of the last line.
    diverged_device : int or None
        The device whose training diverged first, where one is to blame.
    """

    arrays: ArrayRecord
    rounds: int = 0
    stopped_by: str | None = None
    diverged: str | None = None
    diverged_device: int | None = None


class _Stop(Exception):  # noqa: N818 - it ends a run, it is no error
    """Ends `Strategy.start` from inside `evaluate_fn`."""


@contextmanager
def session(grid: NetworkGrid, seed: int, *, verbose: bool = False) -> Iterator[None]:
    """Set what a strategy relies on, and put all of it back afterwards, whatever happens.

    The task identity, the global generators of `random` and numpy (Flower samples nodes with the
    one and adds privacy noise with the other), the sleep of `sample_nodes` (virtual time instead
    of wall time), the log level, and the garbage collector: Flower runs a full collection per
    reply in some strategies, which costs microseconds instead of half a second once everything
    that was loaded before is frozen.
    """
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    was_frozen = gc.get_freeze_count()
    waits = 0

    def sleep(seconds: float) -> None:
        nonlocal waits
        waits += 1
        if waits > 2_000:
            raise NoNodesError(
                "the strategy has waited 2,000 times for devices to come online: its minimum of "
                "available nodes is never met at one time"
            )
        grid.wait_for_nodes(seconds)

    with ExitStack() as stack:
        stack.enter_context(compat.identity())
        stack.enter_context(compat.quiet_flower(verbose=verbose))
        stack.enter_context(compat.patched_sleep(sleep))
        random.seed(digest(f"{seed}/node-sampling"))
        np.random.seed(digest(f"{seed}/numpy-global") & 0xFFFFFFFF)  # noqa: NPY002
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            if not was_frozen:
                gc.unfreeze()
            np.random.set_state(state[1])  # noqa: NPY002
            random.setstate(state[0])


def check_strategy(strategy: object, n_devices: int) -> None:
    """Refuse what is no strategy, and one that waits for more nodes than there are.

    Raises
    ------
    NoNodesError
        Names the argument (of the strategy or one that it wraps), its value and the number of
        devices.
    TypeError
        If `strategy` is no Flower strategy.
    """
    if not isinstance(strategy, Strategy):
        raise TypeError(f"this makes a {type(strategy).__name__}, not a Flower Strategy")
    inner: object = strategy
    while inner is not None:
        for name in ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes"):
            wanted = getattr(inner, name, 0)
            if isinstance(wanted, int) and wanted > n_devices:
                raise NoNodesError(
                    f"{type(inner).__name__}.{name} is {wanted}, but there are only {n_devices} "
                    f"devices; lower it to {n_devices} or less, or raise data.devices"
                )
        inner = getattr(inner, "strategy", None)


def start(
    strategy: Strategy,
    grid: NetworkGrid,
    initial: ArrayRecord,
    *,
    rounds: int,
    seed: int,
    timeout: float | None = None,
    train_config: ConfigRecord | None = None,
    evaluate: Callable[[ArrayRecord], Evaluation] | None = None,
    evaluate_models: Callable[[Models], Evaluation] | None = None,
    evaluate_every: int = 1,
    record: Callable[[RoundRow], None] = lambda row: None,
    stop: StopRule | None = None,
    verbose: bool = False,
) -> Outcome:
    """Run any Flower strategy on the grid, recording a line a round.

    Parameters
    ----------
    strategy, grid, initial
        What runs, where, and from which model.
    rounds : int
        Rounds asked for.
    seed : int
        Seeds node sampling.
    timeout : float, optional
        Virtual seconds a round may take; None waits for every reply that can come.
    train_config : ConfigRecord, optional
        Given to the strategy, as an app would.
    evaluate : callable, optional
        Scores a model on the server, at no virtual time; None leaves evaluation to the devices.
    evaluate_models : callable, optional
        Scores the models of all devices, of strategies that keep them.
    evaluate_every : int
        Rounds between evaluations; the last round is always evaluated.
    record : callable
        Gets each line as it is closed.
    stop : StopRule, optional
        When to stop early.
    verbose : bool
        Let Flower log.

    Returns
    -------
    Outcome
        With the model just evaluated, where a stop rule or divergence ended the run.
    """
    check_strategy(strategy, len(grid.fleet))
    scorers = _Scorers(strategy, evaluate, evaluate_models)
    books = _Books(grid, rounds, scorers, evaluate_every, record, stop or StopRule(), initial)
    grid.on_train_push = books.close_without_evaluation
    with session(grid, seed, verbose=verbose):
        try:
            result = strategy.start(
                grid,
                initial,
                num_rounds=rounds,
                timeout=timeout,  # type: ignore[arg-type]
                train_config=train_config,
                evaluate_fn=books.evaluate_fn,
            )
            if len(result.arrays):
                books.outcome.arrays = result.arrays
            books.close_without_evaluation()
        except _Stop:
            pass
        finally:
            grid.on_train_push = lambda: None
    return books.outcome


@contextmanager
def watched(grid: NetworkGrid, seed: int, record: Callable[[RoundRow], None]) -> Iterator[None]:
    """Record what a user's own code starts on the grid: a line for each batch of training.

    Parameters
    ----------
    grid : NetworkGrid
    seed : int
        Seeds node sampling.
    record : callable
        Gets each line as it is closed; scores are those of the devices.
    """
    books = _Books(
        grid, 0, _Scorers(None, None, None), 1, record, StopRule(), ArrayRecord(), may_end=False
    )
    grid.on_train_push = books.close_without_evaluation
    try:
        with session(grid, seed, verbose=True):
            yield
            books.close_without_evaluation()
    finally:
        grid.on_train_push = lambda: None


@dataclass(frozen=True, slots=True)
class _Scorers:
    """How a strategy's model, or its models, are scored on the server."""

    strategy: Strategy | None
    evaluate: Callable[[ArrayRecord], Evaluation] | None
    evaluate_models: Callable[[Models], Evaluation] | None

    def models(self) -> Models | None:
        """Return the devices' own models, of the strategy or of one that it wraps."""
        found: Models | None = self._attribute("device_models")
        return found

    def figures(self) -> dict[str, float]:
        """Return the strategy's own figures of the round."""
        return dict(self._attribute("round_metrics") or {})

    def _attribute(self, name: str) -> Any:
        """Return an attribute of the strategy, or of one that it wraps; None if empty."""
        inner: object = self.strategy
        while inner is not None:
            if found := getattr(inner, name, None):
                return found
            inner = getattr(inner, "strategy", None)
        return None

    def score(self, arrays: ArrayRecord, *, own: bool) -> tuple[Evaluation, dict[str, float]]:
        """Return the scores, of the devices' `own` models where there are any, and extras."""
        if self.evaluate is None:
            return Evaluation(), {}
        common = self.evaluate(arrays)
        extra = {} if common.excess_loss is None else {"excess_loss": common.excess_loss}
        models = self.models() if own and self.evaluate_models else None
        if models is None or self.evaluate_models is None:
            return common, extra
        if common.accuracy is not None:
            extra["mean_model_accuracy"] = common.accuracy
        return self.evaluate_models(models), extra


class _Books:
    """Closes one line a round and decides whether to go on."""

    def __init__(
        self,
        grid: NetworkGrid,
        rounds: int,
        scorers: _Scorers,
        every: int,
        record: Callable[[RoundRow], None],
        stop: StopRule,
        initial: ArrayRecord,
        *,
        may_end: bool = True,
    ) -> None:
        self._grid = grid
        self._may_end = may_end
        self._rounds = rounds
        self._scorers = scorers
        self._every = every
        self._record = record
        self._stop = stop
        self._was_called = False  # evaluate_fn, by the strategy's start
        self._has_batch = False  # a train batch since the last line
        self._limit = math.inf  # without an initial score, only what is not finite is divergence
        self._energy = 0.0
        self._bytes = 0
        self._wall = time.perf_counter()
        self.outcome = Outcome(initial)

    def evaluate_fn(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Score the model, close the round's line, and stop the run if it is time."""
        self._was_called = True
        self.outcome.arrays = arrays
        is_due = server_round % self._every == 0 or server_round == self._rounds
        scores, extra = Evaluation(), dict[str, float]()
        if is_due:
            scores, extra = self._scorers.score(arrays, own=server_round >= 1)
        if server_round >= 1:
            self._close(server_round, scores, arrays, extra)
        elif scores.loss is not None and math.isfinite(scores.loss):
            self._limit = _DIVERGED_FACTOR * max(1.0, scores.loss)
        told = {"eval_loss": scores.loss, "eval_accuracy": scores.accuracy}
        return MetricRecord({k: v for k, v in told.items() if v is not None}) or None

    def close_without_evaluation(self) -> None:
        """Close the line of the last train batch, for a `start` that never evaluates."""
        if self._has_batch and not self._was_called:
            self._close(self.outcome.rounds + 1, Evaluation(), None)
        self._has_batch = True

    def _close(
        self,
        server_round: int,
        scores: Evaluation,
        arrays: ArrayRecord | None,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        traffic = self._grid.take_traffic()
        if self.outcome.rounds == 0 and traffic.error_replies and not traffic.replied:
            raise PayloadError(
                f"every device's reply was an error; the first: {traffic.first_error}"
            )
        self._has_batch = False
        self._bytes += traffic.bytes_down + traffic.bytes_up + traffic.bytes_peer
        if self._scorers.evaluate is None:
            scores = _of_devices(traffic)
        worst = scores.worst_accuracy
        models = self._scorers.models()
        own = self._scorers.figures()
        broken = set(traffic.not_finite)  # such a model has no loss; the server's own is checked
        whole = [(device, noted) for device, noted in traffic.train if device not in broken]
        train_loss = _mean(whole or traffic.train, "train_loss")
        row = RoundRow(
            round=server_round,
            virtual_time=self._grid.now,
            wall_time=time.perf_counter() - self._wall,
            train_loss=train_loss,
            eval_loss=scores.loss,
            eval_accuracy=scores.accuracy,
            accuracy_std=scores.accuracy_std,
            consensus_distance=None if models is None else consensus_distance(models),
            bytes_down=traffic.bytes_down,
            bytes_up=traffic.bytes_up,
            bytes_peer=traffic.bytes_peer,
            messages_sent=traffic.messages_sent,
            messages_lost=traffic.messages_lost,
            devices_selected=len(traffic.selected),
            devices_replied=len(traffic.replied),
            mean_staleness=own.pop("mean_staleness", None),
            extra={
                **(extra or {}),
                **({} if worst is None else {"accuracy_worst_10_percent": worst}),
                **own,
                **self._counted(traffic),
            },
        )
        self._record(row)
        self.outcome.rounds += 1
        self.outcome.stopped_by = self._stop_reason(row)
        self._check_divergence((scores.loss, train_loss), traffic, arrays)
        if self._may_end and (self.outcome.diverged or self.outcome.stopped_by):
            raise _Stop

    def _counted(self, traffic: Traffic) -> dict[str, float]:
        """Return what only some runs have: error replies, the parts of collectives, energy."""
        figures: dict[str, float] = {}
        if traffic.error_replies:
            figures["error_replies"] = traffic.error_replies
        if traffic.not_finite:
            figures["not_finite_replies"] = len(traffic.not_finite)
            figures["first_not_finite_device"] = traffic.not_finite[0]
        figures |= times_of(traffic.collectives)
        energy = self._grid.fleet.energy(self._grid.now)
        if energy is not None:
            total = float(energy.sum())
            figures["energy_joules"], self._energy = total - self._energy, total
        return figures

    def _check_divergence(
        self, losses: Sequence[float | None], traffic: Traffic, arrays: ArrayRecord | None
    ) -> None:
        bad = [x for x in losses if x is not None and not (math.isfinite(x) and x <= self._limit)]
        if bad:
            self.outcome.diverged = f"the loss is {bad[0]:.3g}"
        elif arrays is not None and not _is_finite(arrays):
            self.outcome.diverged = "the model has parameters that are not finite"
        if self.outcome.diverged:
            noted = ((device, m.get("train_loss", 0.0)) for device, m in traffic.train)
            blamed = (d for d, x in noted if not (math.isfinite(x) and x <= self._limit))
            first = next(iter(traffic.not_finite), None)
            self.outcome.diverged_device = next(blamed, first)

    def _stop_reason(self, row: RoundRow) -> str | None:
        stop = self._stop
        if stop.accuracy is not None and (row.eval_accuracy or 0.0) >= stop.accuracy:
            return "accuracy"
        if stop.time is not None and row.virtual_time >= stop.time:
            return "time"
        if stop.traffic is not None and self._bytes >= stop.traffic:
            return "traffic"
        return None


def consensus_distance(models: Models) -> float:
    """Return the root mean square distance of the devices' models to their mean.

    Parameters
    ----------
    models : mapping of str to Tensor, shape (n_devices, *shape)
        Integers (counters) do not count.
    """
    squares = [
        (rows - rows.mean(0)).double().square().sum() / len(rows)
        for rows in models.values()
        if rows.is_floating_point()
    ]
    return math.sqrt(float(sum(squares)))


def _scores(metrics: dict[str, float]) -> dict[str, float]:
    """Return what a device reports, its scores under fedsim's names.

    The loss may be called `eval_loss` or `loss`; the accuracy `eval_accuracy`, `eval_acc` (as in
    Flower's tutorials) or `accuracy`. The first one present counts.
    """
    found = dict(metrics)
    for name, others in (("eval_loss", ("loss",)), ("eval_accuracy", ("eval_acc", "accuracy"))):
        for other in others:
            if other in metrics:
                found.setdefault(name, metrics[other])
    return found


def _of_devices(traffic: Traffic) -> Evaluation:
    """Return the devices' own scores of the model, and the spread of their accuracies."""
    noted = [(device, _scores(metrics)) for device, metrics in traffic.evaluate]
    accuracies = [metrics["eval_accuracy"] for _, metrics in noted if "eval_accuracy" in metrics]
    loss, accuracy = _mean(noted, "eval_loss"), _mean(noted, "eval_accuracy")
    if not accuracies:
        return Evaluation(loss, accuracy)
    over = spread(np.array(accuracies, np.float64))
    return Evaluation(loss, accuracy, over["std"], over["worst_10_percent"])


def _mean(noted: list[tuple[int, dict[str, float]]], key: str) -> float | None:
    """Return the mean of one metric over devices, weighted by their examples."""
    pairs = [(m[key], m.get("num-examples", 1)) for _, m in noted if key in m]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None


def _is_finite(arrays: ArrayRecord) -> bool:
    for array in arrays.values():
        whole = tensor_of(array)
        if not whole.is_floating_point() or math.isfinite(float(whole.sum())):
            continue  # a sum can overflow, but never hides what is not finite
        if not bool(whole.isfinite().all()):
            return False
    return True
