"""One topology with one collective: every payload, rate, latency, failure and trace of a study."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from fedsim.errors import FedsimError, ScenarioError
from fedsim.whatif.fluid import time_schedule
from fedsim.whatif.study import (
    Failure,
    Study,
    Trace,
    build_topology,
    payload_of,
    schedule_on,
)
from topologies.attributes import Graph, devices_of
from topologies.clocks import LinkChange
from topologies.closed_forms import ClosedForm, closed_form, lower_bound
from topologies.cost import hardware
from topologies.overlap import Iteration, iteration_time
from topologies.routing import Router, link_table
from topologies.timing import CostModel, LoadPlan, Timing

__all__ = ["COLUMNS", "Line", "PairResult", "evaluate_pair"]

COLUMNS = (
    "topology",
    "devices",
    "collective",
    "payload",
    "payload_bytes",
    "bandwidth_bps",
    "latency_s",
    "failure",
    "steps",
    "seconds",
    "closed_form_seconds",
    "lower_bound_seconds",
    "gap",
    "iteration_seconds",
    "switches",
    "switch_ports",
    "nic_ports",
    "cables",
    "price",
    "critical_link",
    "note",
)
# Different places of a failure that are tried to find the worst; alike cables count once.
_MAX_TRIED = 32
# Rows of the table of links that are kept for one pair.
_MAX_LINK_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Line:
    """A collective's time as a straight line over the size, for one network."""

    topology: str
    devices: int
    collective: str
    bandwidth_bps: float
    latency_s: float
    failure: str
    intercept: float
    seconds_per_byte: float
    price: float


@dataclass(slots=True)
class PairResult:
    """What came out for one topology with one collective.

    Attributes
    ----------
    rows : list of dict
        Keys of `COLUMNS`.
    lines : list of Line
        For networks that do not change while the collective runs.
    links : list of dict
        Each step and link, for the first payload on the first healthy network.
    reason : str
        Why the pair makes no sense; empty if it does.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""


def evaluate_pair(
    study: Study, topology: Mapping[str, Any], collective: Mapping[str, Any]
) -> PairResult:
    """Return all rows of one topology with one collective.

    Raises
    ------
    ScenarioError
        If the topology cannot be built. A collective that does not fit it is a row with a note.
    """
    pair = _Pair(study, topology, collective)
    result = PairResult()
    try:
        pair.prepare()
    except ScenarioError:
        raise
    except ValueError as error:
        result.reason = str(error)
        result.rows.append(pair.blank() | {"note": result.reason})
        return result
    for rate, latency in product(pair.rates, study.latency):
        network = _Network(pair, rate, latency)
        for failure, trace in product(study.failures, study.traces):
            result.rows += network.rows(failure, trace)
            result.lines += network.lines(failure, trace)
        if not result.links:
            result.links = network.link_table()
    return result


class _Pair:
    """The parts that all rows share: graph, schedule, routes, hardware."""

    def __init__(
        self, study: Study, topology: Mapping[str, Any], collective: Mapping[str, Any]
    ) -> None:
        self.study = study
        self.topology = dict(topology)
        self.collective = collective
        self.name = str(collective["kind"])
        servers = int(collective.get("servers", 1)) if self.name == "ps_dedicated" else 0
        if servers and topology["kind"] == "star":
            # A dedicated server is one more machine with one port, not the switch itself.
            self.topology.setdefault("servers", servers)
        self.rates: Sequence[float] = study.bandwidth
        if "bandwidth" in topology:
            self.rates = study.bandwidth[:1]
        self.graph = self.graph_at(self.rates[0])
        self.label = _spelled(collective)
        self.servers = 0
        self.hardware = hardware(self.graph)

    def graph_at(self, rate: float) -> Graph:
        return build_topology(self.topology, bandwidth=rate, seed=self.study.seed)

    def prepare(self) -> None:
        """Make the schedule and its loads; ValueError if the pair makes no sense."""
        self.schedule = schedule_on(self.collective, self.graph)
        devices = len(devices_of(self.graph))
        if len(self.schedule.workers) != devices:
            raise ValueError(
                f"{self.schedule.name} has {len(self.schedule.workers)} workers, the topology "
                f"{devices} devices"
            )
        mode: Any = "hash" if self.study.losses.hash == "on" else self.study.routing
        if mode == "spray":
            mode = "auto"
        self.plan = LoadPlan(self.schedule, Router(self.graph, mode=mode, seed=self.study.seed))
        self.servers = self.schedule.ranks - devices
        self.hardware = hardware(self.graph, spares_used=self.servers)
        if self.name in ("json", "msccl"):
            self.label = self.schedule.name
        self.payloads = [(text, payload_of(text)) for text in self.study.payloads]

    def blank(self) -> dict[str, Any]:
        """Return a row without results."""
        bought = self.hardware
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {
            "topology": self.graph.graph["name"],
            "devices": len(devices_of(self.graph)),
            "collective": self.label,
            "failure": "none",
            "switches": bought.switches,
            "switch_ports": bought.switch_ports,
            "nic_ports": bought.nic_ports,
            "cables": bought.cables,
            "price": self.study.prices.prices().of(bought),
            "critical_link": "",
            "note": "",
        }
        return row


def _spelled(collective: Mapping[str, Any]) -> str:
    """Return a collective as tables print it."""
    options = ", ".join(f"{k}={v}" for k, v in collective.items() if k != "kind")
    return f"{collective['kind']}({options})" if options else str(collective["kind"])


class _Network:
    """A pair on one rate and latency."""

    def __init__(self, pair: _Pair, rate: float, latency: float) -> None:
        self.pair, self.study = pair, pair.study
        self.rate, self.latency = rate, latency
        self.graph = pair.graph_at(rate)
        self.model: CostModel = pair.study.model(latency)
        self.bandwidth = link_table(self.graph).bandwidth
        self.bound = lower_bound(self.graph, 1.0, servers_used=pair.servers)
        if not np.isfinite(self.bandwidth).any():
            raise ScenarioError(f"{self.graph.graph['name']}: no link has a finite bandwidth")

    def time(
        self, size: float, changes: Sequence[LinkChange], policy: Any, start: float = 0.0
    ) -> Timing:
        return time_schedule(
            self.pair.plan,
            size,
            engine=self.study.engine,
            model=self.model,
            bandwidth=self.bandwidth,
            start=start,
            barrier=self.study.barrier,
            changes=changes,
            on_failure=policy,
        )

    def rows(self, failure: Failure | None, trace: Trace | None) -> Iterator[dict[str, Any]]:
        for text, model_profile in self.pair.payloads:
            row = self.pair.blank() | {
                "payload": text,
                "payload_bytes": model_profile.n_bytes,
                "bandwidth_bps": self._shown_rate(),
                "latency_s": self.latency,
                "failure": _label(failure, trace),
                "steps": len(self.pair.schedule.steps),
            }
            notes = [f"losses: {self.study.losses}"] if not self._is_ideal() else []
            try:
                changes, where = self._changes(failure, trace, model_profile.n_bytes)
                notes += [where] if where else []
                timings: list[Timing] = []
                iteration = self._iteration(model_profile, changes, failure, timings)
            except ValueError as error:
                yield row | {"note": "; ".join([*notes, str(error)])}
                continue
            is_healthy = failure is None and trace is None
            row |= self._explained(iteration, timings, trace, is_healthy)
            notes += self._remarks(iteration)
            yield row | {"note": "; ".join(notes)}

    def _shown_rate(self) -> float:
        """Return the study's rate, or the slowest of a topology that has its own."""
        own = "bandwidth" in self.pair.topology
        return float(self.bandwidth.min()) if own else self.rate

    def _is_ideal(self) -> bool:
        return self.model.is_ideal and self.study.losses.hash == "off"

    def _iteration(
        self,
        model_profile: Any,
        changes: Sequence[LinkChange],
        failure: Failure | None,
        timings: list[Timing],
    ) -> Iteration:
        """Return an iteration; failures and traces count from its first message."""
        policy = failure.on_failure if failure else "wait"
        origin: list[float] = []

        def sync(size: float, start: float) -> float:
            origin.append(start)
            timings.append(self.time(size, changes, policy, start - origin[0]))
            return timings[-1].seconds

        return iteration_time(
            model_profile,
            sync,
            compute=self.study.compute or 0.0,
            fusion_bytes=self.study.fusion,
            overlap=self.study.overlap,
        )

    def _explained(
        self, iteration: Iteration, timings: list[Timing], trace: Trace | None, is_healthy: bool
    ) -> dict[str, Any]:
        form = self._closed_form() if is_healthy else None
        expected = None
        if form is not None:
            rate = self._port_rate()
            expected = sum(form.seconds(size, rate, self.model) for size in iteration.buckets)
        peak = max(1.0, *(trace.rates if trace else (1.0,)))
        bound = sum(self.latency + self.bound / peak * size for size in iteration.buckets)
        if iteration.sync < bound * (1 - 1e-9):
            raise FedsimError(
                f"{self.pair.label} on {self.graph.graph['name']} takes {iteration.sync:g} s, less "
                f"than the lower bound of {bound:g} s: this is an error of the timing"
            )
        longest = max(timings, key=lambda timing: timing.seconds)
        link = longest.critical_link
        return {
            "seconds": iteration.sync,
            "closed_form_seconds": expected,
            "lower_bound_seconds": bound,
            "gap": iteration.sync / bound - 1 if bound else None,
            "iteration_seconds": None if self.study.compute is None else iteration.seconds,
            "critical_link": self.pair.plan.links.name(link) if link >= 0 else "latency",
        }

    def _closed_form(self) -> ClosedForm | None:
        if not self._is_ideal() or self.study.routing != "spray" or self._port_rate() is None:
            return None
        return closed_form(self.pair.name, self.graph, servers=max(1, self.pair.servers))

    def _port_rate(self) -> Any:
        """Return the rate that all hosts' cables share, None if they differ."""
        leaves, enters = self.pair.plan.at_hosts
        rates = np.unique(self.bandwidth[leaves | enters])
        return float(rates[0]) if len(rates) == 1 else None

    def _remarks(self, iteration: Iteration) -> list[str]:
        found = []
        empty = len(iteration.buckets) * self.time(0.0, [], "wait").seconds
        if empty > 0.5 * iteration.sync:
            share = 100 * empty / iteration.sync
            found.append(f"{share:.0f} % of the time is latency: the links hardly matter")
        if self.study.compute and self.study.overlap:
            share = 100 * (1 - iteration.exposed / iteration.sync) if iteration.sync else 100
            found.append(f"{share:.0f} % hidden behind the backward pass")
        if len(iteration.buckets) > 1:
            found.append(f"{len(iteration.buckets)} buckets")
        return found

    def _changes(
        self, failure: Failure | None, trace: Trace | None, size: int
    ) -> tuple[list[LinkChange], str]:
        changes, where = [], ""
        if trace is not None:
            changes.append(LinkChange(trace.target, *trace.points()))
        if failure is not None:
            target = failure.target
            if target is None:
                target = self._worst(failure, size)
                where = f"worst cable: {target[0]}-{target[1]}"
            changes.append(_change(failure, target))
        return changes, where

    def _worst(self, failure: Failure, size: int) -> tuple[int, int]:
        """Return the cable whose failure takes longest (or cannot be survived)."""
        plan = self.pair.plan
        slowest: tuple[float, tuple[int, int]] | None = None
        for cable in _kinds_of_cables(plan):
            changes = [_change(failure, cable)]
            try:
                seconds = self.time(size, changes, failure.on_failure).seconds
            except ValueError:
                return cable
            if slowest is None or seconds > slowest[0] * (1 + 1e-12):
                slowest = seconds, cable
        if slowest is None:
            raise ValueError("no cable carries anything")
        return slowest[1]

    def lines(self, failure: Failure | None, trace: Trace | None) -> Iterator[Line]:
        is_constant = failure is None or (failure.at == 0 and failure.until is None)
        if trace is not None or not is_constant or self.study.fusion is not None:
            return
        policy = failure.on_failure if failure else "wait"
        far = 1e6
        try:
            changes, _ = self._changes(failure, None, round(far))
            here, there = (self.time(size, changes, policy).seconds for size in (0.0, far))
        except ValueError:
            return
        row = self.pair.blank()
        yield Line(
            str(row["topology"]),
            int(row["devices"]),
            str(row["collective"]),
            self._shown_rate(),
            self.latency,
            _label(failure, None),
            here,
            (there - here) / far,
            float(row["price"]),
        )

    def link_table(self) -> list[dict[str, Any]]:
        plan = self.pair.plan
        if int((plan.loads[plan.step_kind] > 0).sum()) > _MAX_LINK_ROWS:
            return []
        size = self.pair.payloads[0][1].n_bytes
        timing = self.time(size, [], "wait")
        head = {"topology": self.graph.graph["name"], "collective": self.pair.label}
        rows = plan.table(size, timing, self.model, self.bandwidth)
        return [head | {"payload": self.pair.payloads[0][0]} | row for row in rows]


def _change(failure: Failure, target: tuple[int, int] | int) -> LinkChange:
    if failure.until is None:
        return LinkChange(target, (failure.at,), (failure.rate,))
    return LinkChange(target, (failure.at, failure.until), (failure.rate, 1.0))


def _label(failure: Failure | None, trace: Trace | None) -> str:
    return " + ".join(str(part) for part in (failure, trace) if part is not None) or "none"


def _kinds_of_cables(plan: LoadPlan) -> list[tuple[int, int]]:
    """Return one cable of each kind, those with the same loads in every step being alike."""
    links = plan.links
    weight = np.bincount(plan.step_kind, minlength=len(plan.loads))
    seen: dict[bytes, tuple[float, tuple[int, int]]] = {}
    backward = links.find(links.target, links.source)
    for link in np.flatnonzero(links.source < links.target):
        both = np.sort(plan.loads[:, [link, backward[link]]], axis=1)
        total = float(weight @ both.sum(axis=1))
        is_host = plan.at_hosts[0][[link, backward[link]]]
        key = np.round(both, 9).tobytes() + is_host.tobytes()
        if total > 0 and key not in seen:
            seen[key] = total, (int(links.source[link]), int(links.target[link]))
    ranked = sorted(seen.values(), key=lambda pair: (-pair[0], pair[1]))
    return [cable for _, cable in ranked[:_MAX_TRIED]]
