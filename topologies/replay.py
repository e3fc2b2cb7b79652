"""Replay of reference answers for collectives: counts, send lists, times, degraded networks.

The files' format is that of the answers that ship with the project; what a file holds is told by
its keys. Whoever made the answers used another program.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from topologies.attributes import Graph
from topologies.clocks import LinkChange
from topologies.collectives import (
    bml,
    dimension_rings,
    halving_doubling,
    ring,
    sharded_parameter_server,
)
from topologies.cost import bcube_counts, fat_tree_counts, pro_rated_ratio
from topologies.datacentre import bcube, fat_tree, smallest_fat_tree
from topologies.generators import star, torus
from topologies.placement import COLLECTIVES, ps_dedicated_schedule, ps_hierarchical_schedule
from topologies.routing import Router
from topologies.schedules import Schedule
from topologies.timing import CostModel, LoadPlan, time_schedule

__all__ = ["Replayed", "is_collective_reference", "replay_collectives"]

_EXACT = 1e-9
_SECONDS = 1e-6
_MEAN_OF_HASHES = 0.05
_DRAWS = 60


@dataclass(frozen=True, slots=True)
class Replayed:
    """One reference answer against ours.

    Attributes
    ----------
    family : str
        ``collective counts``, ``schedules``, ``times``, ``failures`` or ``hashing``.
    case : str
    error : float
        Relative; 0 or inf where the answer is not a number.
    tolerance : float
    """

    family: str
    case: str
    error: float
    tolerance: float


def is_collective_reference(content: Any) -> bool:
    """Return whether the content of a JSON file holds answers that `replay_collectives` knows."""
    if isinstance(content, list):
        return bool(content) and all(
            isinstance(row, dict) and {"ranks", "chunks", "steps"} <= row.keys() for row in content
        )
    if not isinstance(content, dict):
        return False
    if {"counts", "schedules", "times", "degraded"} & content.keys():
        return True
    rows = content.get("cases")
    has_cases = isinstance(rows, list) and all("collective" in row for row in rows)
    return {"bcube", "fattree"} <= content.keys() or has_cases


def replay_collectives(content: Any) -> Iterator[Replayed]:
    """Yield every answer of a reference file with our error.

    Parameters
    ----------
    content : list or dict
        Counts (keys ``bcube``, ``fattree``), schedules (a list), times (``bytes``, ``cases``),
        degraded networks (``cases``), or a mapping with these under ``counts``, ``schedules``,
        ``times``, ``degraded``.
    """
    if isinstance(content, list):
        yield from _schedules(content)
    elif {"counts", "schedules", "times", "degraded"} & content.keys():
        for part in content.values():
            yield from replay_collectives(part)
    elif "bcube" in content:
        yield from _counts(content)
    elif "bytes_per_s" in content:
        yield from _times(content)
    else:
        yield from _degraded(content["cases"])
        yield from _hashing(content.get("ecmp_hash_fattree4", {}))


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _relative(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs) if theirs else abs(ours)


def _counts(content: Mapping[str, Any]) -> Iterator[Replayed]:
    found: dict[str, int | str]
    for row in content["bcube"]:
        n, k = row["n"], row["k"]
        counts, ports = bcube_counts(n, k), smallest_fat_tree(n**k)
        full = fat_tree_counts(ports)
        found = {
            "servers": counts.devices,
            "bcube_switches": counts.switches,
            "bcube_nic_ports": counts.nic_ports,
            "bcube_cables": counts.cables,
            "ratio": str(pro_rated_ratio(k)),
            "smallest_full_fattree_ports": ports,
            "smallest_full_fattree_servers": full.devices,
            "smallest_full_fattree_switches": full.switches,
            "smallest_full_fattree_cables": full.cables,
        }
        right = all(row[key] == value for key, value in found.items())
        yield Replayed("collective counts", f"bcube({n},{k})", 0.0 if right else np.inf, 0.0)
    for row in content["fattree"]:
        full = fat_tree_counts(row["p"])
        found = {"servers": full.devices, "switches": full.switches, "cables": full.cables}
        right = all(row[key] == value for key, value in found.items())
        yield Replayed("collective counts", f"fat_tree({row['p']})", 0.0 if right else np.inf, 0.0)


def _schedules(rows: Sequence[Mapping[str, Any]]) -> Iterator[Replayed]:
    for row in rows:
        name, sizes = row["name"], _numbers(row["name"])
        if name.startswith("bml"):
            ours = bml(*sizes)
        else:
            known = {"ring": ring, "halving_doubling": halving_doubling}
            ours = known.get(name, sharded_parameter_server)(row["ranks"])
        found = [sorted(map(tuple, step.sends())) for step in ours.steps]
        right = found == [sorted(map(tuple, step)) for step in row["steps"]]
        right &= (ours.ranks, ours.chunks) == (row["ranks"], row["chunks"])
        yield Replayed("collective schedules", name, 0.0 if right else np.inf, 0.0)


def _times(content: Mapping[str, Any]) -> Iterator[Replayed]:
    model = CostModel(step_latency=content["alpha_s"])
    for case in content["cases"]:
        graph = _graph(case["topology"], case["workers"])
        plan = LoadPlan(_schedule(case, graph), Router(graph))
        name = f"{case['collective']} on {case['topology']}"
        right = len(plan.schedule.steps) == case["steps"]
        right &= plan.schedule.n_sends == case["sends"]
        error = _relative(time_schedule(plan, 1.0).seconds, case["bw_coeff"])
        yield Replayed("collective times", name, error if right else np.inf, _EXACT)
        for payload, by_rate in case["seconds"].items():
            for rate, seconds in by_rate.items():
                bandwidth = plan.links.bandwidth * content["bytes_per_s"][rate]
                size = content["bytes"][payload]
                ours = time_schedule(plan, size, model=model, bandwidth=bandwidth).seconds
                error = _relative(ours, seconds)
                yield Replayed("collective times", f"{name}, {payload}, {rate}", error, _SECONDS)


def _graph(topology: str, workers: int | None = None) -> Graph:
    """Return a topology of the files with links of one byte per second."""
    sizes = _numbers(topology)
    if topology.startswith("star"):
        count = sizes[0] if workers is None else workers
        return star(count, servers=sizes[0] - count, bandwidth=8.0)
    if topology.startswith("fattree"):
        return fat_tree(sizes[0], oversubscription=sizes[1], bandwidth=8.0)
    if topology.startswith("torus"):
        return torus(sizes, bandwidth=8.0)
    return bcube(*sizes, bandwidth=8.0)


def _schedule(case: Mapping[str, Any], graph: Graph) -> Schedule:
    name, sizes = case["collective"].partition("(")[0], _numbers(case["collective"])
    if name == "ps_dedicated":
        return ps_dedicated_schedule(graph, servers=sizes[0])
    if name == "dim_rings":
        return dimension_rings(sizes, rotated=case["collective"].endswith("rot"))
    if name == "ps_hier":
        # Groups of the reference: those of level 0 of BCube, else 3 for 9 workers and 4 else.
        on_bcube = case["topology"].startswith("bcube")
        group = None if on_bcube else 3 if case["workers"] == 9 else 4
        return ps_hierarchical_schedule(graph, group=group)
    return COLLECTIVES[name](graph)


def _degraded(cases: Sequence[Mapping[str, Any]]) -> Iterator[Replayed]:
    for case in cases:
        graph = _graph(case["topology"])
        plan = LoadPlan(_schedule(case, graph), Router(graph))
        name = f"{case['collective']} on {case['topology']}: {case['case']}"
        change, policy = _change(case, (0, min(graph[0])))
        try:
            ours = time_schedule(plan, 1.0, changes=[change], on_failure=policy).seconds
        except ValueError as refused:
            right = case["coeff"] is None and case["error"] in str(refused)
            yield Replayed("collective failures", name, 0.0 if right else np.inf, _EXACT)
            continue
        error = np.inf if case["coeff"] is None else _relative(ours, case["coeff"])
        yield Replayed("collective failures", name, error, _EXACT)


def _change(case: Mapping[str, Any], port: tuple[int, int]) -> tuple[LinkChange, Any]:
    """Return what a case's words say happens to server 0's first port (or its switch)."""
    text = case["case"]
    if "switch" in text:
        return LinkChange(port[1], (0.0,), (0.0,)), "reroute"
    if "half of the healthy time" in text:
        return LinkChange(port, (case["healthy_coeff"] / 2,), (0.5,)), "wait"
    if "1/2 rate" in text:
        return LinkChange(port, (0.0,), (0.5,)), "wait"
    if "t=0.2 to t=0.5" in text:
        return LinkChange(port, (0.2, 0.5), (0.0, 1.0)), "wait"
    if "1/4 at t=0.4" in text:
        return LinkChange(None, (0.4,), (0.25,)), "wait"
    if "alternates" in text:
        times = tuple(0.1 * i for i in range(100))
        return LinkChange(None, times, (1.0, 0.5) * 50), "wait"
    return LinkChange(port, (0.0,), (0.0,)), "reroute"


def _hashing(rows: Mapping[str, Mapping[str, float]]) -> Iterator[Replayed]:
    """Compare the mean over hashed draws, which depend on the generator, with the reference's."""
    graph = fat_tree(4, bandwidth=8.0)
    for name, row in rows.items():
        schedule = COLLECTIVES[name](graph)
        draws = [
            time_schedule(LoadPlan(schedule, Router(graph, mode="hash", seed=seed)), 1.0).seconds
            for seed in range(_DRAWS)
        ]
        error = _relative(float(np.mean(draws)), row["hash_mean"])
        if min(draws) < row["spray"] * (1 - _EXACT):
            error = np.inf
        yield Replayed("collective hashing", name, error, _MEAN_OF_HASHES)
