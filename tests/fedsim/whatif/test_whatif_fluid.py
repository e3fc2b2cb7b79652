import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import topologies as tp
from fedsim.whatif import time_schedule
from topologies import collectives

REFERENCE = json.loads(
    gzip.decompress(
        (Path(__file__).parents[3] / "fedsim/reference/collectives.json.gz").read_bytes()
    )
)
MODEL = tp.CostModel(step_latency=0.01, reduce_seconds_per_byte=0.02)
BCUBES = [(2, 2), (3, 2), (4, 2), (2, 3), (3, 3)]


def plan_of(make, graph):
    return tp.LoadPlan(make(graph), tp.Router(graph))


def both(plan, **run):
    return [time_schedule(plan, 1.0, engine=engine, **run).seconds for engine in ("load", "fluid")]


@pytest.mark.parametrize(
    "graph",
    [
        tp.star(9, bandwidth=8.0),
        tp.star(8, servers=3, bandwidth=8.0),
        tp.bcube(3, 2, bandwidth=8.0),
        tp.bcube(2, 3, bandwidth=8.0),
        tp.fat_tree(4, bandwidth=8.0),
        tp.fat_tree(4, oversubscription=4, bandwidth=8.0),
        tp.torus((3, 3), bandwidth=8.0),
    ],
    ids=lambda graph: graph.graph["name"],
)
def test_bar_3_engines_agree(graph):
    for make in tp.placement.COLLECTIVES.values():
        try:
            plan = plan_of(make, graph)
        except ValueError:
            continue
        load, fluid = both(plan, model=MODEL)
        assert fluid == pytest.approx(load, rel=1e-9), plan.schedule.name


def test_bar_3_fluid_times_are_those_of_the_reference():
    for case in REFERENCE["times"]["cases"]:
        if not case["topology"].startswith("bcube") or case["bw_coeff_maxmin"] is None:
            continue
        n, k = (int(v) for v in re.findall(r"\d+", case["topology"]))
        name = case["collective"].split("(")[0]
        if name not in ("bml", "ring", "ps_colocated"):
            continue
        plan = plan_of(tp.placement.COLLECTIVES[name], tp.bcube(n, k, bandwidth=8.0))
        seconds = time_schedule(plan, 1.0, engine="fluid").seconds
        assert seconds == pytest.approx(case["bw_coeff_maxmin"], rel=1e-6)


@pytest.mark.parametrize(("n", "k"), BCUBES)
@pytest.mark.parametrize("barrier", ["global", "local"])
def test_bar_6_rerouting_takes_as_long_by_either_engine(n, k, barrier):
    graph = tp.bcube(n, k, bandwidth=8.0)
    plan = plan_of(tp.bml_schedule, graph)
    for target in ((0, n**k), n**k):  # a port, and a switch of level 0
        dead = tp.LinkChange(target, (0.0,), (0.0,))
        load, fluid = both(plan, changes=[dead], on_failure="reroute", barrier=barrier)
        healthy = time_schedule(plan, 1.0).seconds
        assert load == pytest.approx(k / (k - 1) * healthy)
        if barrier == "global":
            assert fluid == pytest.approx(load)
        else:
            assert healthy <= fluid <= 1.5 * load


@pytest.mark.parametrize("barrier", ["global", "local"])
@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ([tp.LinkChange((0, 9), (0.2, 0.5), (0.0, 1.0))], 1.1888888889),
        ([tp.LinkChange(None, (0.4,), (0.25,))], 2.3555555556),
        ([tp.LinkChange(None, tuple(0.1 * i for i in range(20)), (1.0, 0.5) * 10)], 1.1777777778),
        ([tp.LinkChange((0, 9), (4 / 9,), (0.5,))], 4 / 3),
    ],
)
def test_bar_7_changing_rates(changes, seconds, barrier):
    plan = plan_of(tp.bml_schedule, tp.bcube(3, 2, bandwidth=8.0))
    found = time_schedule(
        plan, 1.0, engine="fluid", changes=changes, on_failure="wait", barrier=barrier
    )
    assert found.seconds == pytest.approx(seconds, rel=1e-6)


def test_bar_6_policies_say_what_fails():
    plan = plan_of(tp.bml_schedule, tp.bcube(3, 2, bandwidth=8.0))
    dead = tp.LinkChange((0, 9), (0.5,), (0.0,))
    for barrier in ("global", "local"):
        run = {"engine": "fluid", "changes": [dead], "barrier": barrier}
        with pytest.raises(
            ValueError, match=r"link .* is down at 0.5 s, in step 2 of bml\(3,2\): rank"
        ):
            time_schedule(plan, 1.0, **run)
        with pytest.raises(ValueError, match=r"waits forever: link .* does not come back"):
            time_schedule(plan, 1.0, on_failure="wait", **run)
    single = plan_of(tp.bml_schedule, tp.bcube(3, 1, bandwidth=8.0))
    dead = tp.LinkChange((0, 3), (0.1,), (0.0,))
    with pytest.raises(ValueError, match="no path exists"):
        time_schedule(single, 1.0, engine="fluid", changes=[dead], on_failure="reroute")


def test_each_message_sends_on_what_is_left_of_it():
    # 0 to 1 over the short way until it dies half-way, then over 3 and 2: 0.5 + 0.5 s.
    graph = tp.ring(4, bandwidth=8.0)
    step = tp.schedules.step_of([(0, 1, 0, 1, "reduce")])
    plan = tp.LoadPlan(tp.Schedule("one", 4, 1, (step,), (0, 1, 2, 3)), tp.Router(graph))
    dead = tp.LinkChange((0, 1), (0.5,), (0.0,))
    load, fluid = both(plan, changes=[dead], on_failure="reroute")
    assert (load, fluid) == (pytest.approx(1.0), pytest.approx(1.0))


@settings(max_examples=20)
@given(st.integers(2, 7), st.integers(0, 100), st.sampled_from(["global", "local"]))
def test_fluid_is_never_faster_than_the_busiest_link(devices, seed, barrier):
    graph = tp.random_geometric(devices, 0.8, connected=True, seed=seed, bandwidth=8.0)
    rng = np.random.default_rng(seed)
    for _, _, data in graph.edges(data=True):
        data["bandwidth"] = float(rng.uniform(1, 8))
    plan = plan_of(tp.ps_colocated_schedule, graph)
    load, fluid = both(plan, barrier=barrier, start=rng.random(devices))
    assert fluid >= time_schedule(plan, 1.0).seconds * (1 - 1e-9) or barrier == "local"
    if barrier == "global":
        assert fluid >= load * (1 - 1e-9)


def test_local_barrier_lets_the_others_go_on():
    plan = plan_of(lambda graph: collectives.binomial_tree(8), tp.star(8, bandwidth=8.0))
    late = [0.0] * 4 + [1.0] + [0.0] * 3
    load, fluid = both(plan, start=late, barrier="local")
    assert load == fluid == pytest.approx(6.0)
    assert both(plan, start=late)[1] == pytest.approx(7.0)
