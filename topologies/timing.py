"""How long a collective takes: the alpha-beta-gamma model on routed links, bound by their loads.

A step lasts ``alpha + max over links (bytes on the link / its rate) + gamma * bytes reduced``, and
the next starts when it ends (global barrier). Links are full duplex, switches have no limit of
their own, bytes are not stored and forwarded. Rates that change are integrated exactly: a link's
clock counts the seconds it has worked at its full rate.

With a local barrier a rank goes on as soon as it has all messages of its step and its own have
arrived. A link then serves messages in the order in which they are released, those released
together share it, so that equal ranks take the same time as with the global barrier.

Decision: what the ideal model leaves out (incast, a cost per message; hash imbalance is the
router's mode) is off unless asked for, in `CostModel`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from topologies.attributes import hosts_of
from topologies.clocks import Clocks, LinkChange
from topologies.routing import Router
from topologies.schedules import Schedule, Step

__all__ = ["Barrier", "CostModel", "LoadPlan", "OnFailure", "Timing", "time_schedule"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
OnFailure = Literal["error", "reroute", "wait"]
Barrier = Literal["global", "local"]


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a step costs besides its bytes.

    Attributes
    ----------
    step_latency : float
        alpha, seconds per step, however many messages a rank sends in it.
    reduce_seconds_per_byte : float
        gamma, at the rank that adds most.
    incast_efficiency : float
        Loss model: the share of its rate that a host's link delivers while more than
        `incast_fan_in` messages arrive on it at once. 1 is off.
    incast_fan_in : int
    message_seconds : float
        Loss model: the cost of starting a message, one after the other on a port. 0 is off.
    """

    step_latency: float = 0.0
    reduce_seconds_per_byte: float = 0.0
    incast_efficiency: float = 1.0
    incast_fan_in: int = 4
    message_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("step_latency", "reduce_seconds_per_byte", "message_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")
        if not 0 < self.incast_efficiency <= 1:
            raise ValueError(f"incast_efficiency = {self.incast_efficiency}: must be in (0, 1]")

    @property
    def is_ideal(self) -> bool:
        """Whether no loss is modelled."""
        return self.incast_efficiency == 1 and self.message_seconds == 0


@dataclass(frozen=True, slots=True, eq=False)
class Timing:
    """When each step of a collective ran and which link it waited for.

    Attributes
    ----------
    seconds : float
        From when the first rank is ready to the end of the last step.
    start, finish : ndarray, shape (n_steps,)
        Seconds.
    critical : ndarray of int, shape (n_steps,)
        The link that ends the step, -1 where no link carries anything.
    transfer : ndarray, shape (n_steps,)
        Seconds that this link needs at its full rate.
    """

    seconds: float
    start: FloatArray
    finish: FloatArray
    critical: IntArray
    transfer: FloatArray

    @property
    def critical_link(self) -> int:
        """The link that the collective waits for longest, -1 if for none."""
        if not self.transfer.any():
            return -1
        links = np.unique(self.critical)
        return int(links[np.argmax([self.transfer[self.critical == link].sum() for link in links])])


class LoadPlan:
    """What every step of a schedule puts on every link, for one vector of unit size.

    Parameters
    ----------
    schedule : Schedule
        Its rank r is host r of the router's graph.
    router : Router

    Attributes
    ----------
    step_kind : ndarray of int, shape (n_steps,)
        Steps with the same messages and sizes share a row of the following.
    loads : ndarray, shape (n_kinds, n_links)
        Share of the vector that crosses the link.
    counts : ndarray, shape (n_kinds, n_links)
        Messages that cross the link.
    reduced : ndarray, shape (n_kinds,)
        Share of the vector that the busiest rank adds.

    Raises
    ------
    ValueError
        If the graph has fewer hosts than the schedule has ranks, or no route for a message.
    """

    def __init__(self, schedule: Schedule, router: Router) -> None:
        hosts = np.array(hosts_of(router.graph), dtype=np.int64)
        if len(hosts) < schedule.ranks:
            raise ValueError(f"{schedule.name} needs {schedule.ranks} hosts, not {len(hosts)}")
        self.schedule = schedule
        self.router = router
        self.links = router.links
        self.hosts = hosts
        kinds: dict[tuple[bytes, ...], int] = {}
        rows: list[tuple[FloatArray, FloatArray, float]] = []
        step_kind = []
        for number, step in enumerate(schedule.steps):
            width = step.hi - step.lo
            columns = (step.source, step.destination, width, step.reduces)
            key = tuple(column.tobytes() for column in columns)
            if key not in kinds:
                kinds[key] = len(rows)
                rows.append(self._row(step, number))
            step_kind.append(kinds[key])
        self.step_kind = np.array(step_kind, dtype=np.int64)
        self.loads = np.array([row[0] for row in rows])
        self.counts = np.array([row[1] for row in rows])
        self.reduced = np.array([row[2] for row in rows])
        self.without = lru_cache(maxsize=8)(self._without)

    def _row(self, step: Step, number: int) -> tuple[FloatArray, FloatArray, float]:
        part = (step.hi - step.lo) / self.schedule.chunks
        source, destination = self.hosts[step.source], self.hosts[step.destination]
        try:
            load, count = self.router.loads(source, destination, part, np.ones(len(part)))
        except ValueError as error:
            raise ValueError(f"step {number} of {self.schedule.name}: {error}") from error
        added = np.bincount(step.destination, part * step.reduces)
        return load, count, float(added.max(initial=0.0))

    def _without(self, down: frozenset[tuple[int, int] | int]) -> "LoadPlan":
        """Return the plan in which no message uses the links and nodes given."""
        return LoadPlan(self.schedule, self.router.without(down)) if down else self

    @cached_property
    def at_hosts(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether each link leaves a host, and whether it enters one."""
        is_host = np.zeros(self.links.n_nodes, dtype=bool)
        is_host[self.hosts] = True
        return is_host[self.links.source], is_host[self.links.target]

    def busy(
        self, kind: int, size_bytes: float, model: CostModel, bandwidth: FloatArray
    ) -> FloatArray:
        """Return the seconds at full rate that each link needs in a step of one kind."""
        load = self.loads[kind] * (8.0 * size_bytes)
        if model.incast_efficiency < 1:
            crowded = self.at_hosts[1] & (self.counts[kind] > model.incast_fan_in)
            load = np.where(crowded, load / model.incast_efficiency, load)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where(load > 0, load / bandwidth, 0.0))

    def overhead(self, kind: int, model: CostModel) -> float:
        """Return the seconds that a step of one kind takes before its bytes move."""
        if not model.message_seconds:
            return model.step_latency
        most = float(self.counts[kind][self.at_hosts[0]].max(initial=0.0))
        return model.step_latency + model.message_seconds * most

    def table(
        self,
        size_bytes: float,
        timing: Timing,
        model: CostModel | None = None,
        bandwidth: FloatArray | None = None,
    ) -> list[dict[str, Any]]:
        """Return one row for each step and loaded link: bytes, busy seconds, utilisation."""
        model = model or CostModel()
        rates = self.links.bandwidth if bandwidth is None else bandwidth
        rows = []
        for number, kind in enumerate(self.step_kind):
            busy = self.busy(int(kind), size_bytes, model, rates)
            length = float(timing.finish[number] - timing.start[number])
            rows += [
                {
                    "step": number,
                    "link": self.links.name(link),
                    "bytes": float(self.loads[kind][link] * size_bytes),
                    "busy_seconds": float(busy[link]),
                    "utilisation": float(busy[link] / length) if length else 0.0,
                    "is_critical": link == timing.critical[number],
                }
                for link in np.flatnonzero(self.loads[kind]).tolist()
            ]
        return rows


def time_schedule(
    plan: LoadPlan,
    size_bytes: float,
    *,
    model: CostModel | None = None,
    bandwidth: FloatArray | None = None,
    start: float | Sequence[float] = 0.0,
    barrier: Barrier = "global",
    changes: Sequence[LinkChange] = (),
    on_failure: OnFailure = "error",
) -> Timing:
    """Return when the steps of a collective run.

    Parameters
    ----------
    plan : LoadPlan
    size_bytes : float
        The whole vector at one worker.
    model : CostModel, optional
        Without it only bytes take time.
    bandwidth : ndarray, shape (n_links,), optional
        bit/s, instead of the graph's; a plan serves any rates.
    start : float or sequence of float
        When the ranks are ready (s), one value or one for each rank.
    barrier : str
        ``global``: a step starts when the last one of all ranks has ended; ``local``: when the
        rank's own messages of the last one have come and gone.
    changes : sequence of LinkChange
    on_failure : str
        What a message does whose link goes down: ``error`` stops with the link, the step and the
        ranks; ``reroute`` sends what is left over another way (with a local barrier only messages
        released afterwards); ``wait`` goes on when the link returns.

    Returns
    -------
    Timing

    Raises
    ------
    ValueError
        If a link of rate 0 is used, fails under ``error``, never returns under ``wait``, or leaves
        no path under ``reroute``.

    Examples
    --------
    >>> from topologies.collectives import bml
    >>> from topologies.datacentre import bcube
    >>> plan = LoadPlan(bml(3, 2), Router(bcube(3, 2, bandwidth=8.0)))
    >>> round(9 * time_schedule(plan, 1.0).seconds, 9)
    8.0
    """
    if not size_bytes >= 0:
        raise ValueError(f"size_bytes = {size_bytes}: must not be negative")
    if on_failure not in ("error", "reroute", "wait"):
        raise ValueError(f"on_failure = {on_failure!r}: must be error, reroute or wait")
    model = model or CostModel()
    rates = plan.links.bandwidth if bandwidth is None else bandwidth
    run = _Run(plan, float(size_bytes), model, rates, Clocks(plan.links, changes), on_failure)
    ready = np.broadcast_to(np.asarray(start, dtype=np.float64), plan.schedule.ranks)
    if barrier == "local":
        return _local(run, ready.copy())
    if barrier != "global":
        raise ValueError(f"barrier = {barrier!r}: must be global or local")
    timing = _changing(run, float(ready.max())) if changes else _constant(run, float(ready.max()))
    return replace(timing, seconds=float(timing.finish[-1] - ready.min()))


@dataclass(frozen=True)
class _Run:
    plan: LoadPlan
    size_bytes: float
    model: CostModel
    bandwidth: FloatArray
    clocks: Clocks
    on_failure: OnFailure

    def busy(self, plan: LoadPlan, kind: int) -> FloatArray:
        busy = plan.busy(kind, self.size_bytes, self.model, self.bandwidth)
        dead = np.flatnonzero(np.isinf(busy))
        if len(dead):
            raise ValueError(f"link {plan.links.name(int(dead[0]))} has no bandwidth, but is used")
        return busy

    def reduce_seconds(self, kind: int) -> float:
        share = float(self.plan.reduced[kind])
        return self.model.reduce_seconds_per_byte * share * self.size_bytes


def _constant(run: _Run, begin: float) -> Timing:
    plan = run.plan
    lengths, critical, transfer = [], [], []
    for kind in range(len(plan.loads)):
        busy = run.busy(plan, kind)
        worst = int(np.argmax(busy))
        critical.append(worst if busy[worst] > 0 else -1)
        transfer.append(float(busy[worst]))
        lengths.append(plan.overhead(kind, run.model) + transfer[-1] + run.reduce_seconds(kind))
    finish = begin + np.cumsum(np.array(lengths)[plan.step_kind])
    first = np.concatenate([[begin], finish[:-1]])
    which, needed = np.array(critical)[plan.step_kind], np.array(transfer)[plan.step_kind]
    return Timing(float(finish[-1]) - begin, first, finish, which, needed)


def _changing(run: _Run, begin: float) -> Timing:
    rows = []
    now = begin
    for number, kind in enumerate(run.plan.step_kind):
        first = now
        now += run.plan.overhead(int(kind), run.model)
        now, critical, transfer = _step_end(run, number, int(kind), now)
        now += run.reduce_seconds(int(kind))
        rows.append((first, now, critical, transfer))
    start, finish, critical_links, transfers = (np.array(c) for c in zip(*rows, strict=True))
    return Timing(now - begin, start, finish, critical_links, transfers)


def _step_end(run: _Run, number: int, kind: int, now: float) -> tuple[float, int, float]:
    """Return when the bytes of a step that start now have arrived, and the last link's work."""
    left, clocks = 1.0, run.clocks
    while True:
        down = clocks.down_at(now) if run.on_failure == "reroute" else frozenset()
        plan = run.plan.without(down)
        # A plan around failures may tell other steps apart: its own number of this kind.
        busy = left * run.busy(plan, int(plan.step_kind[number]))
        ends, longest = clocks.finish(now, busy)
        slowest = int(np.argmax(ends))
        finish, critical = float(ends[slowest]), int(longest[slowest])
        if run.on_failure == "error":
            _refuse_failures(run, number, busy, now, finish)
        elif run.on_failure == "reroute":
            fails = clocks.first_failure(busy, now, finish)
            if fails is not None:
                # All messages of the step have come equally far: as far as the slowest link's.
                left *= 1.0 - clocks.progress(now, fails, busy)
                now = fails
                continue
        if math.isinf(finish):
            raise ValueError(
                f"step {number} of {run.plan.schedule.name} waits forever: link "
                f"{plan.links.name(critical)} does not come back"
            )
        return finish, critical if busy[critical] > 0 else -1, float(busy[critical])


def _refuse_failures(run: _Run, number: int, busy: FloatArray, now: float, end: float) -> None:
    for link in np.flatnonzero(busy > 0):
        time = run.clocks.clock_of(int(link)).down_between(now, end)
        if time is None:
            continue
        step, hosts = run.plan.schedule.steps[number], run.plan.hosts
        routes = run.plan.router.routes(hosts[step.source], hosts[step.destination])
        users = np.unique(routes.message[routes.link == link])
        pairs = ", ".join(f"{step.source[m]} to {step.destination[m]}" for m in users[:4])
        raise ValueError(
            f"link {run.plan.links.name(int(link))} is down at {time:g} s, in step {number} of "
            f"{run.plan.schedule.name}: ranks {pairs}{' and more' if len(users) > 4 else ''} "
            "use it (on_failure: reroute or wait)"
        )


def _local(run: _Run, ready: FloatArray) -> Timing:
    plan, links, clocks = run.plan, run.plan.links, run.clocks
    begin = float(ready.min())
    free = np.zeros(len(links))  # what each link's clock must show before it is free again
    rows = []
    for number, step in enumerate(plan.schedule.steps):
        if not len(step):
            continue
        kind = int(plan.step_kind[number])
        released = ready[step.source] + plan.overhead(kind, run.model)
        down: frozenset[tuple[int, int] | int] = frozenset()
        if run.on_failure == "reroute":
            down = clocks.down_at(float(released.min()))
        routes = plan.without(down).router.routes(
            plan.hosts[step.source], plan.hosts[step.destination]
        )
        # What a whole step would keep the link busy, over its bytes, is a byte's time on it.
        now_plan = plan.without(down)
        now_kind = int(now_plan.step_kind[number])
        busy, carried = run.busy(now_plan, now_kind), now_plan.loads[now_kind]
        part = (step.hi - step.lo) / plan.schedule.chunks
        need = (
            part[routes.message]
            * routes.share
            * (busy / np.where(carried > 0, carried, 1))[routes.link]
        )
        done = _serve(clocks, routes.link, released[routes.message], need, free)
        if run.on_failure == "error":
            _refuse_failures(run, number, busy, float(released.min()), float(done.max()))
        if np.isinf(done).any():
            link = int(routes.link[np.argmax(done)])
            raise ValueError(
                f"step {number} of {plan.schedule.name} waits forever: link {links.name(link)} "
                "does not come back"
            )
        arrived = released.copy()
        np.maximum.at(arrived, routes.message, done)
        last = int(np.argmax(done))
        added = np.bincount(step.destination, part * step.reduces, len(ready)) * run.size_bytes
        after = np.full(len(ready), -np.inf)
        np.maximum.at(after, step.destination, arrived)
        after += run.model.reduce_seconds_per_byte * added
        rows.append(
            (
                float(ready[step.source].min()),
                float(after.max()),
                int(routes.link[last]),
                float(need[last]),
            )
        )
        np.maximum.at(after, step.source, arrived)
        ready = np.maximum(ready, after)
    start, finish, critical, transfer = (np.array(c) for c in zip(*rows, strict=True))
    return Timing(float(finish.max()) - begin, start, finish, critical, transfer)


def _serve(
    clocks: Clocks, link: IntArray, release: FloatArray, need: FloatArray, free: FloatArray
) -> FloatArray:
    """Return when each link has served each of its parts, first released first; moves `free`."""
    order = np.lexsort((release, link))
    link_s, release_s, need_s = link[order], release[order], need[order]
    mark = clocks.work(link_s, release_s)
    begin = np.flatnonzero(np.diff(link_s, prepend=-1))
    rank = np.arange(len(link_s)) - np.repeat(begin, np.diff(np.append(begin, len(link_s))))
    end = np.empty(len(link_s))
    for turn in range(int(rank.max(initial=-1)) + 1):
        rows = np.flatnonzero(rank == turn)
        end[rows] = np.maximum(free[link_s[rows]], mark[rows]) + need_s[rows]
        free[link_s[rows]] = end[rows]
    # Parts released together on one link share it and end together.
    group = (
        np.cumsum((np.diff(link_s, prepend=-1) != 0) | (np.diff(release_s, prepend=-1) != 0)) - 1
    )
    latest = np.full(int(group.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(latest, group, end)
    out = np.empty(len(link_s))
    out[order] = clocks.when(link_s, latest[group])
    return out
