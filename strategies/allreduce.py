"""Synchronous data-parallel SGD whose gradients are summed by a collective: BML, ring, and others.

Every device is a rank. In a round each takes one stochastic gradient (or some local steps) at the
common model, a collective gives all ranks the mean, and all make the same step. In a simulator the
record ``exchange`` of the instructions says which collective carries the gradients; a plain Flower
app computes the same models without it.

Decision: the strategy keeps one row of model and optimiser state for all ranks as long as these
agree to the last bit, which they do under every fault-free collective but ``all_to_all`` (whose
ranks add in orders of their own). From when they differ it keeps one row a rank.
"""

from collections.abc import Callable, Iterable, Sequence
from logging import INFO, WARNING
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from strategies.common import mean_metrics, row_records, stack_of
from strategies.compat import log, sample_nodes
from strategies.layout import Layout, tensors_of
from strategies.optimizers import Kind, Moments, RankOptimizer
from strategies.reduction import ChunkFaults, Reduction, one_of, schedule_for
from topologies.placement import COLLECTIVES
from topologies.profiles import PROFILES
from topologies.profiles import profile as find_profile
from topologies.schedules import Schedule

__all__ = ["AllReduceSGD"]

_NEED_ALL = ("bml", "dimension_rings", "rotated_rings")
_STATISTICS = ("running_mean", "running_var")  # of BatchNorm: averaged, never stepped


class AllReduceSGD(Strategy):
    """Distributed SGD by a collective: g = Σ w_i g_i on all ranks, then one optimiser step on each.

    With an `exchange_period` K above 1 the devices make K local steps, x → y_i, and the collective
    averages what they moved by: g = Σ w_i (x - y_i). The outer ``sgd`` at rate 1 is then periodic
    averaging (local SGD), ``nesterov`` at rate 0.7 DiLoCo.

    Parameters
    ----------
    collective : str
        A key of `topologies.placement.COLLECTIVES`: bml, ring, ps_colocated, halving_doubling, …
    exchange_period : int
        K, local steps between two collectives. 1 sends stochastic gradients.
    optimizer : {"sgd", "momentum", "nesterov", "adam"}
        What every rank does with the mean.
    learning_rate : float, optional
        Of the optimiser (K = 1), or of the local steps (K > 1). Default: the train config's.
    server_learning_rate : float, optional
        Of the optimiser where K > 1; default 1.
    momentum : float
        m of ``momentum`` and ``nesterov``.
    betas : (float, float)
        Decay rates of Adam's moments.
    epsilon : float
        Added to the root of Adam's second moment.
    weight_decay : float
        Times the model, added to the mean gradient.
    rate_schedule : callable, optional
        ``round -> factor`` on `learning_rate`, rounds from 1.
    weighted_by_key : str, optional
        Metric that weighs the gradients, such as ``num-examples``; default: all weigh the same.
    arithmetic : {"mean", "schedule"}
        One reduction for all ranks; or real additions in the order of the collective, with its
        rounding and faults.
    levels : int, optional
        k of the BCube, where ``schedule`` is made without a graph: see
        `strategies.reduction.schedule_for`.
    schedule : Schedule, optional
        Of `arithmetic: schedule`, instead of the one made from name and number of ranks.
    wire_dtype : {"float16", "bfloat16", "float32"}, optional
        The vector is rounded to it, summed in it, and weighs as much. Default: the model's own.
    top_k : float, optional
        Share of its entries, the largest, that a device sends, each with an index of 4 bytes. Needs
        ``all_to_all``: partial sums of sparse vectors fill up. At least one is sent.
    error_feedback : bool
        Whether a device keeps what `top_k` left out and adds it to its next gradient.
    chunk_loss, chunk_corruption : float
        Probability that a message inside the collective is lost, or arrives with a flipped bit,
        and nobody notices. Needs `arithmetic: schedule`.
    profile : str, optional
        Time the tensors of this model (``vgg19``) instead of those of the model that is trained: a
        key of `topologies.profiles.PROFILES`. Its bytes are charged, and compute overlaps by its
        layers; how long compute takes is the devices' affair.
    payload : int, optional
        Charge so many bytes, whatever the model.
    barrier : {"global", "local"}
        Whether a rank goes on to the next step of the collective when everybody, or it, is ready.
    fusion_bytes : int, optional
        Size of the buckets of tensors that are summed one after another; 0: each by itself.
    overlap : bool
        Whether buckets set off while the backward pass goes on.
    on_failure : {"error", "reroute", "wait"}
        What the network does where a link of the collective is down.
    on_device_failure : {"error", "shrink"}
        Whether the run ends or the survivors go on where a device goes away, those of a collective
        that needs all devices of its topology (``bml``) by ``ps_colocated`` until it is back.
    step_latency : float
        Seconds that each step takes on top (the α of cost models).
    fraction_evaluate : float
        Share of the devices that evaluate after a round.
    min_available_nodes : int
        Devices to wait for before the first round.
    seed : int
        Of faults.

    Attributes
    ----------
    device_models : dict of Tensor, shape (n_devices, *shape)
        Every rank's model if they differ; empty while all ranks agree to the last bit.

    Raises
    ------
    ValueError
        If an argument is unknown or out of its range, or two do not go together.

    References
    ----------
    .. [1] Wang et al., "BML: A high-performance, low-cost gradient synchronization algorithm for
       DML training", NeurIPS 2018.
    .. [2] Stich, "Local SGD converges fast and communicates little", ICLR 2019.
    .. [3] Douillard et al., "DiLoCo: Distributed low-communication training of language models",
       2023, Algorithm 1.
    """

    def __init__(
        self,
        *,
        collective: str = "ring",
        exchange_period: int = 1,
        optimizer: Kind = "sgd",
        learning_rate: float | None = None,
        server_learning_rate: float | None = None,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        rate_schedule: Callable[[int], float] | None = None,
        weighted_by_key: str | None = None,
        arithmetic: Literal["mean", "schedule"] = "mean",
        levels: int | None = None,
        schedule: Schedule | None = None,
        wire_dtype: Literal["float16", "bfloat16", "float32"] | None = None,
        top_k: float | None = None,
        error_feedback: bool = True,
        chunk_loss: float = 0.0,
        chunk_corruption: float = 0.0,
        profile: str | None = None,
        payload: int | None = None,
        barrier: Literal["global", "local"] = "global",
        fusion_bytes: int | None = None,
        overlap: bool = False,
        on_failure: Literal["error", "reroute", "wait"] = "error",
        on_device_failure: Literal["error", "shrink"] = "error",
        step_latency: float = 0.0,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        seed: int = 0,
    ) -> None:
        self.collective = collective
        self.exchange_period = exchange_period
        self.optimizer = RankOptimizer(
            optimizer, momentum, (betas[0], betas[1]), epsilon, weight_decay
        )
        self.learning_rate = learning_rate
        self.server_learning_rate = server_learning_rate
        self.rate_schedule = rate_schedule
        self.weighted_by_key = weighted_by_key
        faults = ChunkFaults(chunk_loss, chunk_corruption, seed)
        self.reduction = Reduction(arithmetic, wire_dtype, top_k, faults)
        self.levels = levels
        self.schedule = schedule
        self.error_feedback = error_feedback
        self.profile = profile
        self.payload = payload
        self.barrier = barrier
        self.fusion_bytes = fusion_bytes
        self.overlap = overlap
        self.on_failure = on_failure
        self.on_device_failure = on_device_failure
        self.step_latency = step_latency
        self.fraction_evaluate = fraction_evaluate
        self.min_available_nodes = min_available_nodes
        self._check()
        self._forget()

    def _check(self) -> None:
        """Refuse arguments that are unknown, out of range or do not go together."""
        one_of("collective", self.collective, COLLECTIVES)
        one_of("barrier", self.barrier, ("global", "local"))
        one_of("on_failure", self.on_failure, ("error", "reroute", "wait"))
        one_of("on_device_failure", self.on_device_failure, ("error", "shrink"))
        _at_least("exchange_period", self.exchange_period, 1)
        for name in ("learning_rate", "server_learning_rate", "fusion_bytes", "step_latency"):
            _at_least(name, getattr(self, name), 0)
        if not 0 <= self.fraction_evaluate <= 1:
            raise ValueError(f"fraction_evaluate = {self.fraction_evaluate}: must be from 0 to 1")
        if self.exchange_period == 1 and self.server_learning_rate is not None:
            raise ValueError(
                f"server_learning_rate = {self.server_learning_rate}: with exchange_period = 1 the "
                "one rate is learning_rate"
            )
        top_k = self.reduction.top_k
        if top_k is not None and self.collective != "all_to_all":
            raise ValueError(
                f"top_k = {top_k} with collective = {self.collective!r}: partial sums of "
                "sparse vectors fill up; use all_to_all"
            )
        one_of("profile", self.profile, (None, *PROFILES))
        _at_least("payload", self.payload, 1)

    # --- what is remembered -------------------------------------------------------------------

    def _forget(self) -> None:
        self.round = 0
        self.nodes: list[int] = []  # of the ranks, ascending
        self._most = 0  # ranks that there ever were
        self._layout: Layout | None = None
        self._keys: list[str] = []
        self._others: dict[str, Tensor] = {}  # arrays that are not floating: counters
        self._models = torch.empty(0, 0)  # (1, p) while all ranks agree, else (n, p)
        self._moments: Moments = {}
        self._left_out: Tensor | None = None  # (n, p), of top_k
        self._steps = 0
        self._rate: float | None = None
        self._schedules: dict[int, Schedule] = {}

    @property
    def device_models(self) -> dict[str, Tensor]:
        """Every rank's model if they differ: name → Tensor ``(n_devices, *shape)``; else empty."""
        return self._stacks(self._models) if len(self._models) > 1 else {}

    def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
        """Start from `initial_arrays` on every rank; see `flwr.serverapp.strategy.Strategy`."""
        self._forget()
        return super().start(grid, initial_arrays, *args, **kwargs)

    def summary(self) -> None:
        """Log the configuration."""
        log(
            INFO, "\t├──> AllReduceSGD by %s, every %d steps", self.collective, self.exchange_period
        )
        log(INFO, "\t└──> %s, arithmetic: %s", self.optimizer, self.reduction.arithmetic)

    # --- a round ------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask every device that is there for its gradient at its model, and for the collective."""
        _, online = sample_nodes(grid, self.min_available_nodes, 0)
        self.round = server_round
        self._take_up(arrays)
        self._enrol(sorted(online))
        self._most = max(self._most, len(self.nodes))
        content = {"config": self._config(config), "exchange": self._exchange()}
        return self._messages(self.nodes, arrays, content, "train")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Sum the gradients as the collective does and step; return the model and the metrics.

        The metrics are the devices' own, weighted by examples, and ``consensus_distance``, the mean
        of ‖x_i - x̄‖² over ranks.

        Raises
        ------
        ValueError
            If gradients were asked for and a reply has none, or if the schedule is for another
            number of ranks.
        """
        valid = self._valid(replies)
        if not valid:
            return None, None
        if len(valid) < len(self.nodes):
            log(WARNING, "%d of %d ranks replied: the mean is theirs", len(valid), len(self.nodes))
        self._enrol([message.metadata.src_node_id for message in valid])
        vectors = self._vectors(valid)
        mean = self._reduce(vectors, self._weights(valid))
        self._steps += 1
        models = self._models.to(mean.device)
        stepped, self._moments = self.optimizer.step(
            models, mean, self._moments, self._optimizer_rate(), self._steps
        )
        is_local = self.exchange_period > 1
        self._models = self._with_statistics(stepped, models - mean if is_local else models)
        if is_local:
            self._average_counters(valid)
        metrics = mean_metrics(valid)
        distance = (self._models - self._models.mean(0)).square().sum(1, dtype=torch.float64)
        metrics["consensus_distance"] = float(distance.mean())
        return self._mean_model(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask a share of the devices to evaluate their models."""
        online = list(grid.get_node_ids())
        n_asked = round(self.fraction_evaluate * len(online))
        if n_asked == 0:
            return []
        chosen, _ = sample_nodes(grid, 0, n_asked)
        asked = [node for node in sorted(chosen) if len(self._models) < 2 or node in self.nodes]
        content = {"config": ConfigRecord({**config, "server-round": server_round})}
        return self._messages(asked, arrays, content, "evaluate")

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return the devices' metrics, weighted by their examples."""
        valid = self._valid(replies, among=None)
        return mean_metrics(valid) if valid else None

    def _messages(
        self,
        nodes: Sequence[int],
        arrays: ArrayRecord,
        content: dict[str, ConfigRecord],
        kind: Literal["train", "evaluate"],
    ) -> list[Message]:
        """Return one message a node: all with one content, or each with its own model."""
        if len(self._models) > 1:
            rows = [self.nodes.index(node) for node in nodes]
            models = row_records(self.device_models, rows)
            contents = [RecordDict({"arrays": model, **content}) for model in models]
        else:
            contents = [RecordDict({"arrays": arrays, **content})] * len(nodes)
        return [
            Message(each, dst_node_id=node, message_type=kind)
            for node, each in zip(nodes, contents, strict=True)
        ]

    def _config(self, config: ConfigRecord) -> ConfigRecord:
        rate = config.get("learning-rate") if self.learning_rate is None else self.learning_rate
        self._rate = float(rate) if isinstance(rate, int | float) else None
        if self._rate is not None and self.rate_schedule is not None:
            self._rate *= float(self.rate_schedule(self.round))
        asked = ConfigRecord({**config, "server-round": self.round, "mode": "gradient"})
        if self.exchange_period > 1:
            asked.pop("local-epochs", None)
            asked["mode"] = "local_sgd"
            asked["local-steps"] = self.exchange_period
        if self._rate is not None:
            asked["learning-rate"] = self._rate
        return asked

    def _exchange(self) -> ConfigRecord:
        """Return how the gradients travel."""
        asked = {
            "kind": "collective",
            "collective": self._collective_now(),
            "when": "with" if self.overlap else "after",
            "profile": None if self.fusion_bytes is None else self.profile,
            "payload_bytes": self.payload_bytes(),
            "barrier": self.barrier,
            "fusion_bytes": self.fusion_bytes,
            "on_failure": self.on_failure,
            "on_device_failure": self.on_device_failure,
            "step_latency": float(self.step_latency),
        }
        return ConfigRecord({key: value for key, value in asked.items() if value is not None})

    def _collective_now(self) -> str:
        """Return the collective: one that takes any number while devices are away."""
        is_short = len(self.nodes) < self._most
        if is_short and self.on_device_failure == "shrink" and self.collective in _NEED_ALL:
            return "ps_colocated"
        return self.collective

    def payload_bytes(self) -> int | None:
        """Return what each rank's vector weighs on the wire; None: what its reply weighs."""
        if self.payload is not None:
            return self.payload
        if self.profile is not None:
            size = find_profile(self.profile).parameters
            return self.reduction.payload_bytes(size, torch.float32)
        is_plain = self.reduction.wire_dtype is None and self.reduction.top_k is None
        if self._layout is None or is_plain:
            return None
        return self.reduction.payload_bytes(self._layout.starts[-1], self._layout.dtype)

    # --- arithmetic ---------------------------------------------------------------------------

    def _vectors(self, valid: Sequence[Message]) -> Tensor:
        """Return what each rank brings to the sum, ``(n, p)``: gradients, or x - y_i."""
        assert self._layout is not None
        if self.exchange_period > 1:
            worked = self._layout.flatten(stack_of(valid))
            return self._models.to(worked.device) - worked
        for message in valid:
            if "gradients" not in message.content:
                raise ValueError(
                    f"node {message.metadata.src_node_id} was asked for gradients and replied "
                    f"{list(message.content)}: its app ignores 'mode' in the config"
                )
        return self._layout.flatten(stack_of(valid))

    def _weights(self, valid: Sequence[Message]) -> Tensor:
        """Return the ranks' weights, summing to 1."""
        weights = torch.ones(len(valid), dtype=torch.float64)
        if self.weighted_by_key is not None:
            for i, message in enumerate(valid):
                metrics = next(r for r in message.content.values() if isinstance(r, MetricRecord))
                value = metrics.get(self.weighted_by_key)
                if not isinstance(value, int | float):
                    raise ValueError(
                        f"weighted_by_key = {self.weighted_by_key!r}: node "
                        f"{message.metadata.src_node_id} replied the metrics {', '.join(metrics)}"
                    )
                weights[i] = value
            if not weights.sum() > 0:
                raise ValueError(f"weighted_by_key: every reply's {self.weighted_by_key!r} is 0")
        return weights / weights.sum()

    def _reduce(self, vectors: Tensor, weights: Tensor) -> Tensor:
        """Return the mean as the ranks hold it; remember what top_k left out."""
        if self.reduction.top_k is not None:
            if self._left_out is not None:
                vectors = vectors + self._left_out.to(vectors.device)
            kept = self.reduction.sparse(vectors)
            self._left_out = vectors - kept if self.error_feedback else None
            vectors = kept
        return self.reduction.total(vectors, weights, self._schedule, self.round)

    def _schedule(self, n_ranks: int) -> Schedule:
        """Return the order of additions; where survivors' number has none, the servers'."""
        if self.schedule is not None and len(self.schedule.workers) == n_ranks:
            return self.schedule
        if n_ranks not in self._schedules:
            try:
                made = schedule_for(self.collective, n_ranks, self.levels)
            except ValueError:
                if self.on_device_failure == "error":
                    raise
                made = schedule_for("ps_colocated", n_ranks)
            self._schedules[n_ranks] = made
        return self._schedules[n_ranks]

    def _optimizer_rate(self) -> float:
        if self.exchange_period > 1:
            return 1.0 if self.server_learning_rate is None else self.server_learning_rate
        if self._rate is None:
            raise ValueError(
                "learning_rate: give the strategy one, or a train config with 'learning-rate'"
            )
        return self._rate

    # --- rows and records ---------------------------------------------------------------------

    def _take_up(self, arrays: ArrayRecord) -> None:
        """Go on from the model given, which a wrapper may have changed, if all ranks share it."""
        if len(self._models) > 1:
            return
        tensors = tensors_of(arrays)
        self._layout = self._layout or Layout.of(tensors)
        self._keys = self._keys or list(tensors)
        self._models = self._layout.flatten({key: value[None] for key, value in tensors.items()})
        self._others = {k: v for k, v in tensors.items() if not v.is_floating_point()}

    def _enrol(self, nodes: Sequence[int]) -> None:
        """Make `nodes` the ranks. Who is new takes the first rank's state and no memory."""
        nodes = sorted(nodes)
        if nodes == self.nodes:
            return
        row_of = {node: row for row, node in enumerate(self.nodes)}
        rows = torch.tensor([row_of.get(node, 0) for node in nodes])
        if self.nodes:
            self._models = _picked(self._models, rows)
            self._moments = {key: _picked(value, rows) for key, value in self._moments.items()}
        if self._left_out is not None:
            is_old = torch.tensor([node in row_of for node in nodes])
            picked = self._left_out[rows.to(self._left_out.device)]
            self._left_out = picked * is_old[:, None].to(picked)
        self.nodes = nodes

    def _valid(
        self, replies: Iterable[Message], among: Literal["ranks"] | None = "ranks"
    ) -> list[Message]:
        """Return the replies with content, one a node, in the order of ranks."""
        found: dict[int, Message] = {}
        for message in replies:
            node = message.metadata.src_node_id
            if message.has_error():
                log(WARNING, "node %d: %s", node, message.error.reason)
            elif among is None or node in self.nodes:
                found.setdefault(node, message)
        return [found[node] for node in sorted(found)]

    def _with_statistics(self, stepped: Tensor, average: Tensor) -> Tensor:
        """Return stepped models with the statistics of BatchNorm as they are in `average`."""
        assert self._layout is not None
        for name, columns in self._layout.columns().items():
            if name.endswith(_STATISTICS):
                stepped[:, columns] = average[:, columns]
        return stepped

    def _average_counters(self, valid: Sequence[Message]) -> None:
        if self._others:
            stacks = stack_of(valid)
            for key, value in self._others.items():
                self._others[key] = stacks[key].double().mean(0).round().to("cpu", value.dtype)

    def _stacks(self, rows: Tensor) -> dict[str, Tensor]:
        assert self._layout is not None
        stacks = self._layout.views(rows)
        for key, value in self._others.items():
            stacks[key] = value.expand(len(rows), *value.shape)
        return {key: stacks[key] for key in self._keys}

    def _mean_model(self) -> ArrayRecord:
        """Return the model, or the mean over ranks, in the types of the arrays."""
        models = self._models if len(self._models) == 1 else self._models.mean(0, keepdim=True)
        stacks = self._stacks(models)
        return ArrayRecord({k: Array(np.asarray(v[0].cpu().numpy())) for k, v in stacks.items()})


def _picked(rows: Tensor, which: Tensor) -> Tensor:
    """Return some of the rows; one row for all stays one."""
    return rows if len(rows) == 1 else rows[which.to(rows.device)]


def _at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise ValueError(f"{name} = {value}: must be at least {least}")
