"""Collectives on the network engine's max-min fair rates, instead of the loads' bound.

The answer differs from `topologies.timing` where a fair share leaves a link idle that a loaded one
waits for; where all links of a step are equally loaded, and in all reference cases, both agree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.network.engine import Flow, FluidNetwork
from topologies import timing
from topologies.clocks import Clocks, LinkChange
from topologies.timing import Barrier, CostModel, LoadPlan, OnFailure, Timing

__all__ = ["Engine", "time_schedule"]

FloatArray = NDArray[np.float64]
Engine = Literal["load", "fluid"]
_CHANGE, _RELEASE = 0, 1


def time_schedule(
    plan: LoadPlan,
    size_bytes: float,
    *,
    engine: Engine = "load",
    model: CostModel | None = None,
    bandwidth: FloatArray | None = None,
    start: float | Sequence[float] = 0.0,
    barrier: Barrier = "global",
    changes: Sequence[LinkChange] = (),
    on_failure: OnFailure = "error",
) -> Timing:
    """Return when the steps of a collective run, by either engine.

    Parameters
    ----------
    engine : str
        ``load`` is `topologies.timing.time_schedule`; ``fluid`` shares every link max-min fairly
        among the messages on it. A message with several paths keeps its split. Under ``reroute``
        each message sends what is left of it over its new way.

    The other parameters, the result and the errors are those of `topologies.timing.time_schedule`.
    """
    if engine == "load":
        return timing.time_schedule(
            plan,
            size_bytes,
            model=model,
            bandwidth=bandwidth,
            start=start,
            barrier=barrier,
            changes=changes,
            on_failure=on_failure,
        )
    rates = plan.links.bandwidth if bandwidth is None else bandwidth
    ready = np.broadcast_to(np.asarray(start, dtype=np.float64), plan.schedule.ranks)
    run = _FluidRun(plan, float(size_bytes), model or CostModel(), rates, changes, on_failure)
    return run.time(ready, is_global=barrier == "global")


@dataclass(eq=False)
class _FluidRun:
    plan: LoadPlan
    size_bytes: float
    model: CostModel
    rates: FloatArray
    changes: Sequence[LinkChange]
    policy: OnFailure
    now: float = 0.0
    down: frozenset[tuple[int, int] | int] = frozenset()
    flows: dict[Flow, None] = field(default_factory=dict)

    def time(self, ready: FloatArray, *, is_global: bool) -> Timing:
        """Let all ranks run to the end."""
        steps, n_ranks = self.plan.schedule.steps, self.plan.schedule.ranks
        self.clocks = Clocks(self.plan.links, self.changes)
        self.net = FluidNetwork(self.rates * self._factors(0.0))
        self.routes: dict[tuple[int, Any], list[list[tuple[int, float]]]] = {}
        self.heap: list[tuple[float, int, int, int]] = []  # time, kind, step, rank (-1: all)
        self.finish = np.zeros(len(steps))
        self.first = np.full(len(steps), np.inf)
        times = {t for change in self.changes for t in change.times}
        for time in times:
            heappush(self.heap, (time, _CHANGE, 0, 0))
        self.down = self._down(0.0)
        # Messages of each step that a rank still waits for, its own included.
        self.missing = [
            np.bincount(s.destination, minlength=n_ranks) + np.bincount(s.source, minlength=n_ranks)
            for s in steps
        ]
        self.at = np.zeros(n_ranks, dtype=np.int64)  # the step that each rank is in
        self.begun = np.full(n_ranks, -1)  # the last one whose messages it has sent
        self.ready = ready.copy()
        self.is_global = is_global
        if is_global:
            self._release(0, -1, float(ready.max()))
        else:
            for rank in range(n_ranks):
                self._release(0, rank, float(ready[rank]))
        while self.heap or self.flows:
            due = self.heap[0][0] if self.heap else math.inf
            self.now = min(due, self.net.next_completion())
            if math.isinf(self.now) or (not self.flows and not self._has_releases()):
                break
            for flow in self.net.finished(self.now):
                self._arrive(flow)
            while self.heap and self.heap[0][0] <= self.now:
                _, kind, step, rank = heappop(self.heap)
                if kind == _CHANGE:
                    self._change()
                else:
                    self._send(step, rank)
            self.net.solve(self.now)
        if self.flows:
            step = min(flow.owner[0] for flow in self.flows)
            link = next(i for f in self.flows for i, _ in f.uses if self.net.capacity[i] == 0)
            raise ValueError(
                f"step {step} of {self.plan.schedule.name} waits forever: link "
                f"{self.plan.links.name(link)} does not come back"
            )
        return self._timing(ready)

    def _has_releases(self) -> bool:
        return any(kind == _RELEASE for _, kind, _, _ in self.heap)

    def _timing(self, ready: FloatArray) -> Timing:
        plan = self.plan
        busy = [
            plan.busy(kind, self.size_bytes, self.model, self.rates)
            for kind in range(len(plan.loads))
        ]
        worst = np.array([int(np.argmax(b)) if b.any() else -1 for b in busy])
        needed = np.array([float(b.max()) for b in busy])
        end = float(self.finish.max())
        first = np.where(np.isfinite(self.first), self.first, 0.0)
        kinds = plan.step_kind
        return Timing(end - float(ready.min()), first, self.finish, worst[kinds], needed[kinds])

    def _factors(self, time: float) -> FloatArray:
        values = np.array([clock.factor(time) for clock in self.clocks.clocks])
        return np.asarray(values[self.clocks.group])

    def _down(self, time: float) -> frozenset[tuple[int, int] | int]:
        return self.clocks.down_at(time) if self.policy == "reroute" else frozenset()

    def _release(self, step: int, rank: int, time: float) -> None:
        """Let a rank (all: -1) begin a step: its messages leave after the step's overhead."""
        overhead = self.plan.overhead(int(self.plan.step_kind[step]), self.model)
        self.first[step] = min(self.first[step], time)
        heappush(self.heap, (time + overhead, _RELEASE, step, rank))

    def _uses(self, step: int) -> list[list[tuple[int, float]]]:
        """Return each message's links and shares, around what is down now."""
        kind = int(self.plan.step_kind[step])
        key = kind, self.down
        if key not in self.routes:
            plan, data = self.plan.without(self.down), self.plan.schedule.steps[step]
            hosts = self.plan.hosts
            routes = plan.router.routes(hosts[data.source], hosts[data.destination])
            share = routes.share
            if self.model.incast_efficiency < 1:
                crowded = plan.at_hosts[1] & (plan.counts[kind] > self.model.incast_fan_in)
                share = np.where(crowded[routes.link], share / self.model.incast_efficiency, share)
            uses: list[dict[int, float]] = [{} for _ in range(len(data))]
            for message, link, part in zip(
                routes.message.tolist(), routes.link.tolist(), share.tolist(), strict=True
            ):
                uses[message][link] = uses[message].get(link, 0.0) + part
            self.routes[key] = [list(u.items()) for u in uses]
        return self.routes[key]

    def _send(self, step: int, rank: int) -> None:
        data = self.plan.schedule.steps[step]
        chosen = range(len(data)) if rank < 0 else np.flatnonzero(data.source == rank).tolist()
        uses = self._uses(step)
        bits = (data.hi - data.lo) * (8.0 * self.size_bytes / self.plan.schedule.chunks)
        for message in chosen:
            flow = Flow(uses[message], float(bits[message]), owner=(step, message))
            self._refuse(flow)
            self.flows[flow] = None
            self.net.add(flow, self.now)
        if rank >= 0:
            self.begun[rank] = step
            self._advance(rank)
        elif not len(data):
            self._end_global(step)

    def _arrive(self, flow: Flow) -> None:
        del self.flows[flow]
        step, message = flow.owner
        self.finish[step] = max(self.finish[step], self.now)
        data = self.plan.schedule.steps[step]
        if self.is_global:
            if not self.flows:
                self._end_global(step)
            return
        for rank in (int(data.source[message]), int(data.destination[message])):
            self.missing[step][rank] -= 1
            self._advance(rank)

    def _end_global(self, step: int) -> None:
        gamma = self.model.reduce_seconds_per_byte
        shared = float(self.plan.reduced[self.plan.step_kind[step]]) * self.size_bytes
        self.finish[step] = self.now + gamma * shared
        if step + 1 < len(self.plan.schedule.steps):
            self._release(step + 1, -1, float(self.finish[step]))

    def _advance(self, rank: int) -> None:
        """Let a rank go on to the next step once its messages of this one have come and gone."""
        step = int(self.at[rank])
        if step >= len(self.plan.schedule.steps) or self.missing[step][rank]:
            return
        if self.begun[rank] < step:
            return
        data = self.plan.schedule.steps[step]
        here = data.destination == rank
        end = float(self.ready[rank])
        if here.any() or (data.source == rank).any():
            part = ((data.hi - data.lo) * data.reduces)[here].sum() / self.plan.schedule.chunks
            end = self.now + self.model.reduce_seconds_per_byte * float(part) * self.size_bytes
            self.finish[step] = max(self.finish[step], end)
        self.ready[rank] = end
        self.at[rank] += 1
        if step + 1 < len(self.plan.schedule.steps):
            self._release(step + 1, rank, end)

    def _change(self) -> None:
        factors = self._factors(self.now)
        for link in np.flatnonzero(self.rates * factors != self.net.capacity).tolist():
            self.net.set_capacity(link, float(self.rates[link] * factors[link]), self.now)
        if self.policy == "error":
            for flow in self.flows:
                self._refuse(flow)
        before, self.down = self.down, self._down(self.now)
        if self.down <= before:
            return
        for flow in [f for f in self.flows if any(self.net.capacity[i] == 0 for i, _ in f.uses)]:
            step, message = flow.owner
            bits = self.net.remove(flow, self.now)
            del self.flows[flow]
            again = Flow(self._uses(step)[message], bits, owner=flow.owner)
            self.flows[again] = None
            self.net.add(again, self.now)

    def _refuse(self, flow: Flow) -> None:
        if self.policy != "error":
            return
        for link, _ in flow.uses:
            if self.net.capacity[link] == 0:
                step, message = flow.owner
                data = self.plan.schedule.steps[step]
                raise ValueError(
                    f"link {self.plan.links.name(link)} is down at {self.now:g} s, in step {step} "
                    f"of {self.plan.schedule.name}: rank {data.source[message]} to "
                    f"{data.destination[message]} uses it (on_failure: reroute or wait)"
                )
