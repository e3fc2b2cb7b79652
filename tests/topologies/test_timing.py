import gzip
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import topologies as tp
from topologies import collectives

REFERENCE = json.loads(
    gzip.decompress(
        (Path(__file__).parents[2] / "fedsim/reference/collectives.json.gz").read_bytes()
    )
)
TIMES, DEGRADED = REFERENCE["times"], REFERENCE["degraded"]
GBIT = 1e9


def numbers(text):
    return [int(v) for v in re.findall(r"\d+", text)]


def graph_of(case, rate=8.0):
    family, sizes = case["topology"].split("(")[0], numbers(case["topology"])
    if family == "star":
        workers = case.get("workers", sizes[0])
        return tp.star(workers, servers=sizes[0] - workers, bandwidth=rate)
    if family == "fattree":
        return tp.fat_tree(4, oversubscription=sizes[1], bandwidth=rate)
    return (
        tp.torus(sizes, bandwidth=rate) if family == "torus" else tp.bcube(*sizes, bandwidth=rate)
    )


def schedule_of(case, graph):
    name = case["collective"].split("(")[0]
    if name == "ps_dedicated":
        return tp.ps_dedicated_schedule(graph, servers=numbers(case["collective"])[0])
    if name == "dim_rings":
        dims = numbers(case["collective"])
        return collectives.dimension_rings(dims, rotated=case["collective"].endswith("rot"))
    if name == "ps_hier":
        group = (
            {4: 4, 8: 4, 9: 3, 16: 4}[case["workers"]] if "bcube" not in case["topology"] else None
        )
        return tp.ps_hierarchical_schedule(graph, group=group)
    return tp.placement.COLLECTIVES[name](graph)


def plan_of(case, **routing):
    graph = graph_of(case)
    return tp.LoadPlan(schedule_of(case, graph), tp.Router(graph, **routing))


def case_id(case):
    return f"{case['topology']}-{case['collective']}".replace(" ", "")


@pytest.mark.parametrize("case", TIMES["cases"], ids=case_id)
def test_bar_3_reference_times(case):
    plan = plan_of(case)
    assert (len(plan.schedule.steps), plan.schedule.n_sends) == (case["steps"], case["sends"])
    assert tp.time_schedule(plan, 1.0).seconds == pytest.approx(case["bw_coeff"], rel=1e-9)
    if case["bw_coeff_maxmin"] is not None:
        assert tp.time_schedule(plan, 1.0).seconds == pytest.approx(
            case["bw_coeff_maxmin"], rel=1e-9
        )
    model = tp.CostModel(step_latency=TIMES["alpha_s"])
    for payload, by_rate in case["seconds"].items():
        for rate, seconds in by_rate.items():
            bandwidth = plan.links.bandwidth * TIMES["bytes_per_s"][rate]
            found = tp.time_schedule(
                plan, TIMES["bytes"][payload], model=model, bandwidth=bandwidth
            )
            assert found.seconds == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("case", TIMES["cases"], ids=case_id)
def test_local_barrier_equals_the_global_one_among_equals(case):
    plan = plan_of(case)
    model = tp.CostModel(step_latency=0.01)
    together = tp.time_schedule(plan, 1.0, model=model).seconds
    apart = tp.time_schedule(plan, 1.0, model=model, barrier="local").seconds
    assert apart <= together * (1 + 1e-9)
    symmetric = case["collective"].startswith(("bml", "ring", "dim_rings", "halving"))
    if symmetric and "oversub" not in case["topology"]:
        assert apart == pytest.approx(together, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_bar_3_bml_takes_the_closed_form(n, k):
    graph = tp.bcube(n, k, bandwidth=10 * GBIT)
    plan = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    total = n**k
    for size in (100e6, 574_668_960):
        ideal = 2 * (total - 1) / (total * k) * size * 8 / (10 * GBIT)
        assert tp.time_schedule(plan, size).seconds == pytest.approx(ideal, rel=1e-9)
        model = tp.CostModel(step_latency=20e-6)
        assert tp.time_schedule(plan, size, model=model).seconds == pytest.approx(ideal, rel=0.01)


@pytest.mark.parametrize(("n", "k", "ports"), [(3, 2, 4), (4, 2, 4), (2, 3, 4), (2, 4, 4)])
def test_bar_4_bml_is_k_times_faster_than_the_parameter_server(n, k, ports):
    size = tp.profile("vgg19").n_bytes
    graphs = (
        tp.bcube(n, k, bandwidth=10 * GBIT),
        tp.fat_tree(ports, devices=n**k, bandwidth=10 * GBIT),
    )
    bml = tp.LoadPlan(tp.bml_schedule(graphs[0]), tp.Router(graphs[0]))
    server = tp.LoadPlan(tp.ps_colocated_schedule(graphs[1]), tp.Router(graphs[1]))
    model = tp.CostModel(step_latency=20e-6)
    ratio = tp.time_schedule(server, size, model=model).seconds
    ratio /= tp.time_schedule(bml, size, model=model).seconds
    assert ratio == pytest.approx(k, rel=0.02)


def test_bar_4_small_vectors_favour_the_parameter_server():
    model = tp.CostModel(step_latency=20e-6)
    plans = []
    for graph, make in (
        (tp.bcube(3, 2, bandwidth=10 * GBIT), tp.bml_schedule),
        (tp.fat_tree(4, devices=9, bandwidth=10 * GBIT), tp.ps_colocated_schedule),
    ):
        plans.append(tp.LoadPlan(make(graph), tp.Router(graph)))

    def seconds(size):
        return [tp.time_schedule(plan, size, model=model).seconds for plan in plans]

    bml, server = seconds(tp.profile("lenet5").n_bytes)
    assert server / bml == pytest.approx(1.53, abs=0.01)
    assert seconds(56_249)[1] < seconds(56_249)[0]
    assert seconds(56_251)[1] > seconds(56_251)[0]
    sizes = 1e3, 1e6
    lines = [tuple(seconds(size)[i] for size in sizes) for i in (0, 1)]
    assert tp.crossover_bytes(sizes, *lines) == pytest.approx(56_250)


def port_of(graph):
    """Return server 0's first cable."""
    return 0, min(graph[0])


@pytest.mark.parametrize("case", DEGRADED["cases"], ids=lambda c: f"{case_id(c)}-{c['case'][:28]}")
def test_bar_6_and_7_degraded_networks(case):
    graph = graph_of(case)
    plan = tp.LoadPlan(schedule_of(case | {"workers": None}, graph), tp.Router(graph))
    port, text, policy = port_of(graph), case["case"], "wait"
    if "switch" in text:
        change, policy = tp.LinkChange(port[1], (0.0,), (0.0,)), "reroute"
    elif "half of the healthy time" in text:
        change = tp.LinkChange(port, (case["healthy_coeff"] / 2,), (0.5,))
    elif "1/2 rate" in text:
        change = tp.LinkChange(port, (0.0,), (0.5,))
    elif "t=0.2 to t=0.5" in text:
        change = tp.LinkChange(port, (0.2, 0.5), (0.0, 1.0))
    elif "1/4 at t=0.4" in text:
        change = tp.LinkChange(None, (0.4,), (0.25,))
    elif "alternates" in text:
        change = tp.LinkChange(None, tuple(0.1 * i for i in range(20)), (1.0, 0.5) * 10)
    else:
        change, policy = tp.LinkChange(port, (0.0,), (0.0,)), "reroute"
    for barrier in ("global", "local"):
        run = {"changes": [change], "on_failure": policy, "barrier": barrier}
        if case["coeff"] is None:
            with pytest.raises(ValueError, match="no path exists"):
                tp.time_schedule(plan, 1.0, **run)
        else:
            assert tp.time_schedule(plan, 1.0, **run).seconds == pytest.approx(
                case["coeff"], rel=1e-9
            )


@pytest.mark.parametrize(("n", "k", "factor"), [(3, 2, 2.0), (4, 2, 2.0), (2, 3, 1.5), (3, 3, 1.5)])
def test_bar_6_rerouting_around_a_dead_port(n, k, factor):
    graph = tp.bcube(n, k, bandwidth=8.0)
    plan = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    healthy = tp.time_schedule(plan, 1.0).seconds
    dead = tp.LinkChange(port_of(graph), (0.0,), (0.0,))
    broken = tp.time_schedule(plan, 1.0, changes=[dead], on_failure="reroute").seconds
    assert broken == pytest.approx(factor * healthy, rel=0.01)


def test_bar_6_policies_say_what_fails():
    graph = tp.bcube(3, 2, bandwidth=8.0)
    plan = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    dead = tp.LinkChange((0, 9), (0.5,), (0.0,))
    with pytest.raises(
        ValueError, match=r"link 0>9 is down at 0.5 s, in step 2 of bml\(3,2\): ranks 0 to"
    ):
        tp.time_schedule(plan, 1.0, changes=[dead])
    with pytest.raises(
        ValueError, match=r"step 2 of bml\(3,2\) waits forever: link .* does not come back"
    ):
        tp.time_schedule(plan, 1.0, changes=[dead], on_failure="wait")
    with pytest.raises(ValueError, match="waits forever"):
        tp.time_schedule(plan, 1.0, changes=[dead], on_failure="wait", barrier="local")
    with pytest.raises(ValueError, match="is down"):
        tp.time_schedule(plan, 1.0, changes=[dead], barrier="local")
    single = tp.bcube(3, 1, bandwidth=8.0)
    alone = tp.LoadPlan(tp.bml_schedule(single), tp.Router(single))
    with pytest.raises(ValueError, match=r"step 0 of .* no path exists"):
        tp.time_schedule(
            alone, 1.0, changes=[tp.LinkChange((0, 3), (0.0,), (0.0,))], on_failure="reroute"
        )


def test_rerouting_in_the_middle_of_a_step_sends_what_is_left():
    graph = tp.bcube(3, 2, bandwidth=8.0)
    plan = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    # Step 0 takes 1/3; half of it is done, the rest takes twice as long, as do the other steps.
    dead = tp.LinkChange((0, 9), (1 / 6,), (0.0,))
    seconds = tp.time_schedule(plan, 1.0, changes=[dead], on_failure="reroute").seconds
    assert seconds == pytest.approx(1 / 6 + 2 * (8 / 9 - 1 / 6))


@given(
    st.lists(st.tuples(st.floats(0.01, 0.3), st.floats(0.1, 1.0)), min_size=1, max_size=6),
    st.floats(0.1, 2.0),
)
def test_bar_7_changing_rates_are_integrated_exactly(pieces, size):
    graph = tp.bcube(2, 2, bandwidth=8.0)
    plan = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    times = tuple(np.cumsum([length for length, _ in pieces]).tolist())
    change = tp.LinkChange(None, times, tuple(factor for _, factor in pieces))
    end = tp.time_schedule(plan, size, changes=[change]).seconds
    cuts = [0.0, *(t for t in times if t < end), end]
    moved = sum((b - a) * change.at(a) for a, b in pairwise(cuts))
    assert moved == pytest.approx(0.75 * size, rel=1e-9)


@pytest.mark.parametrize(
    ("make", "mean", "exact"),
    [
        (tp.ps_colocated_schedule, 2.47, None),
        (tp.halving_doubling_schedule, 4.56, None),
        (tp.ring_schedule, 1.875, 1.875),
    ],
)
def test_bar_8_hashing_costs_what_was_measured(make, mean, exact):
    graph = tp.fat_tree(4, bandwidth=8.0)
    schedule = make(graph)
    draws = [
        tp.time_schedule(
            tp.LoadPlan(schedule, tp.Router(graph, mode="hash", seed=seed)), 1.0
        ).seconds
        for seed in range(40)
    ]
    assert np.mean(draws) == pytest.approx(mean, rel=0.05)
    assert min(draws) >= 1.875 - 1e-9
    if exact:
        np.testing.assert_allclose(draws, exact)


def test_bar_8_ideal_job_completion_table():
    table = {
        0: (50, 66.7, 75),
        0.1: (45.5, 60.6, 68.2),
        0.25: (40, 53.3, 60),
        0.5: (33.3, 44.4, 50),
    }
    table |= {1: (25, 33.3, 37.5), 2: (16.7, 22.2, 25), 4: (10, 13.3, 15)}
    for ratio, row in table.items():
        for k, percent in zip((2, 3, 4), row, strict=True):
            assert 100 * tp.job_reduction(k, ratio) == pytest.approx(percent, abs=0.05)


def test_bar_8_the_ideal_model_refuses_what_it_cannot_explain():
    with pytest.raises(ValueError, match="not in"):
        tp.required_efficiency(0.45, 2, 0.0)
    pairs = [(0.872, 0.0), (0.8, 0.064), (0.7, 0.152), (0.6, 0.241), (0.5, 0.330)]
    for efficiency, ratio in pairs:
        assert tp.required_efficiency(0.564, 2, ratio) == pytest.approx(efficiency, abs=0.001)


def test_bar_8_incast_reaches_the_papers_reduction_with_stated_parameters():
    rate, size = 10 * GBIT, tp.profile("vgg19").n_bytes
    model = tp.CostModel(step_latency=20e-6, incast_efficiency=0.8, incast_fan_in=4)
    plans = {}
    for graph, make in (
        (tp.bcube(3, 2, bandwidth=rate), tp.bml_schedule),
        (tp.fat_tree(4, devices=9, bandwidth=rate), tp.ps_colocated_schedule),
    ):
        plan = tp.LoadPlan(make(graph), tp.Router(graph))
        plans[make] = tp.time_schedule(plan, size, model=model).seconds
    server = plans[tp.ps_colocated_schedule]
    compute = 0.064 * server
    reduction = 1 - (plans[tp.bml_schedule] + compute) / (server + compute)
    assert reduction == pytest.approx(0.564, abs=0.005)
    assert not model.is_ideal


def test_message_cost_is_serialised_on_a_port():
    graph = tp.bcube(3, 2)
    bml = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    model = tp.CostModel(message_seconds=1.0)
    assert tp.time_schedule(bml, 0, model=model).seconds == pytest.approx(2 * 2 * 2)
    star = tp.star(9)
    server = tp.LoadPlan(tp.ps_colocated_schedule(star), tp.Router(star))
    assert tp.time_schedule(server, 0, model=model).seconds == pytest.approx(2 * 8)


@pytest.mark.parametrize("name", ["ring", "ps_colocated", "halving_doubling", "binomial_tree"])
@pytest.mark.parametrize("ranks", [2, 4, 7, 16])
def test_closed_forms_hold_with_latency_and_reduction(name, ranks):
    graph = tp.star(ranks, bandwidth=8.0)
    plan = tp.LoadPlan(tp.placement.COLLECTIVES[name](graph), tp.Router(graph))
    model = tp.CostModel(step_latency=0.01, reduce_seconds_per_byte=0.3)
    form = tp.closed_form(name, graph)
    found = tp.time_schedule(plan, 5.0, model=model).seconds
    assert found == pytest.approx(form.seconds(5.0, 8.0, model), rel=1e-9)


@pytest.mark.parametrize("case", TIMES["cases"], ids=case_id)
def test_no_time_is_below_the_lower_bound(case):
    plan = plan_of(case)
    servers = numbers(case["collective"])[0] if "dedicated" in case["collective"] else 0
    bound = tp.lower_bound(plan.router.graph, 1.0, servers_used=servers)
    assert bound <= tp.time_schedule(plan, 1.0).seconds * (1 + 1e-12)


def test_bml_and_the_ring_reach_the_lower_bound():
    for graph, make in (
        (tp.bcube(3, 2, bandwidth=8.0), tp.bml_schedule),
        (tp.star(7, bandwidth=8.0), tp.ring_schedule),
    ):
        plan = tp.LoadPlan(make(graph), tp.Router(graph))
        assert tp.time_schedule(plan, 1.0).seconds == pytest.approx(tp.lower_bound(graph, 1.0))


def test_local_barrier_lets_the_others_go_on():
    graph = tp.star(8, bandwidth=8.0)
    plan = tp.LoadPlan(collectives.binomial_tree(8), tp.Router(graph))
    late = [0.0] * 7 + [3.0]
    apart = tp.time_schedule(plan, 1.0, start=late, barrier="local")
    together = tp.time_schedule(plan, 1.0, start=late)
    assert together.seconds == pytest.approx(3.0 + 6.0)
    assert apart.seconds == pytest.approx(3.0 + 6.0)  # the last rank is on the critical path
    late = [0.0] * 4 + [1.0] + [0.0] * 3  # rank 4 is needed in step 2 only
    early = tp.time_schedule(plan, 1.0, start=late, barrier="local")
    assert early.seconds == pytest.approx(6.0)
    assert tp.time_schedule(plan, 1.0, start=late).seconds == pytest.approx(7.0)


def test_links_serve_messages_in_the_order_of_release():
    # 0 and 1 send to 2 through its one port; 1 is released while 0's message is under way.
    graph = tp.star(3, bandwidth=8.0)
    step = tp.schedules.step_of([(0, 2, 0, 1, "reduce"), (1, 2, 0, 1, "reduce")])
    plan = tp.LoadPlan(tp.Schedule("two to one", 3, 1, (step,), (0, 1, 2)), tp.Router(graph))
    for start, end in (([0.0, 0.0, 0.0], 2.0), ([0.0, 0.5, 0.0], 2.0), ([0.0, 1.5, 0.0], 2.5)):
        timing = tp.time_schedule(plan, 1.0, start=start, barrier="local")
        assert timing.finish[-1] == pytest.approx(end)


def test_the_table_names_the_critical_link():
    graph = tp.bcube(3, 2, bandwidth=8.0)
    plan = tp.LoadPlan(tp.bml_schedule(graph), tp.Router(graph))
    slow = plan.links.bandwidth.copy()
    slow[plan.links.find(np.array([4]), np.array(sorted(graph[4])[:1]))] /= 2
    timing = tp.time_schedule(plan, 1.0, bandwidth=slow)
    assert plan.links.name(timing.critical_link) == f"4>{min(graph[4])}"
    rows = plan.table(1.0, timing)
    assert sum(row["bytes"] for row in rows) == pytest.approx(2 * 2 * 8)  # 2 links a message
    assert sum(row["is_critical"] for row in rows) == 4


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(0, 1000), st.floats(0, 1e9))
def test_time_is_affine_in_the_size(devices, seed, size):
    graph = tp.random_geometric(devices, 0.9, connected=True, seed=seed, bandwidth=8.0)
    plan = tp.LoadPlan(tp.ps_colocated_schedule(graph), tp.Router(graph))
    model = tp.CostModel(step_latency=0.5)
    unit = tp.time_schedule(plan, 1.0).seconds
    assert tp.time_schedule(plan, size, model=model).seconds == pytest.approx(1.0 + size * unit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size_bytes": -1}, "size_bytes = -1"),
        ({"size_bytes": 1, "barrier": "loose"}, "barrier = 'loose'"),
        ({"size_bytes": 1, "on_failure": "pray"}, "on_failure = 'pray'"),
        (
            {"size_bytes": 1, "changes": [tp.LinkChange((0, 1), (0.0,), (0.5,))]},
            r"no link at \(0, 1\)",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    graph = tp.star(3, bandwidth=8.0)
    plan = tp.LoadPlan(tp.ring_schedule(graph), tp.Router(graph))
    with pytest.raises(ValueError, match=message):
        tp.time_schedule(plan, **arguments)


def test_changes_and_models_refuse_nonsense():
    with pytest.raises(ValueError, match="ascending"):
        tp.LinkChange(None, (2.0, 1.0), (1.0, 1.0))
    with pytest.raises(ValueError, match="must not be negative"):
        tp.LinkChange(None, (0.0,), (-1.0,))
    with pytest.raises(ValueError, match="incast_efficiency = 0"):
        tp.CostModel(incast_efficiency=0)
    with pytest.raises(ValueError, match="step_latency = -1"):
        tp.CostModel(step_latency=-1)
    with pytest.raises(ValueError, match="needs 3 hosts"):
        tp.LoadPlan(collectives.ring(3), tp.Router(tp.ring(2)))
