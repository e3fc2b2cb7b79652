import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import topologies as tp
from topologies import collectives
from topologies.schedules import Schedule, check, execute, step_of

REFERENCE = Path(__file__).parents[2] / "fedsim/reference/collectives.json.gz"
SCHEDULES = {
    row["name"]: row for row in json.loads(gzip.decompress(REFERENCE.read_bytes()))["schedules"]
}
BML = [(n, k) for n in range(2, 6) for k in range(1, 5)]
ELEMENTS = (1, 17, 1000, 61_706)


def groups_of(ranks, size):
    return [list(range(i, min(i + size, ranks))) for i in range(0, ranks, size)]


def every_collective(ranks):
    yield collectives.ring(ranks)
    yield collectives.ring(
        ranks, [(3 * i + 1) % ranks for i in range(ranks)] if ranks % 3 else None
    )
    yield collectives.halving_doubling(ranks)
    yield collectives.recursive_doubling(ranks)
    yield collectives.binomial_tree(ranks)
    yield collectives.double_binary_tree(ranks)
    yield collectives.double_binary_tree(ranks, pieces=3)
    yield collectives.parameter_server(ranks)
    yield collectives.parameter_server(ranks, 3)
    yield collectives.sharded_parameter_server(ranks)
    yield collectives.all_to_all(ranks)
    yield collectives.hierarchical_parameter_server(groups_of(ranks, 3))
    heads = [ranks + i for i in range(len(groups_of(ranks, 2)))]
    yield collectives.hierarchical_parameter_server(groups_of(ranks, 2), heads, heads[-1] + 1)
    yield collectives.dimension_rings((ranks,))
    for a in range(2, ranks):
        if ranks % a == 0:
            yield collectives.dimension_rings((a, ranks // a))
            yield collectives.dimension_rings((a, ranks // a), rotated=a * a == ranks)


def sums_exactly(schedule, elements, rng):
    values = rng.integers(-1000, 1000, (len(schedule.workers), elements))
    return (execute(schedule, values) == values.sum(axis=0)).all()


@pytest.mark.parametrize(("n", "k"), [*BML[:-1], pytest.param(*BML[-1], marks=pytest.mark.slow)])
def test_bar_1_bml_adds_every_contribution_once(n, k):
    check(tp.collectives.bml(n, k))


@pytest.mark.parametrize(("n", "k"), [(n, k) for n, k in BML if n**k <= 81])
def test_bar_1_bml_sums_integers_exactly(n, k):
    schedule, rng = collectives.bml(n, k), np.random.default_rng(1)
    assert all(
        sums_exactly(schedule, elements, rng)
        for elements in ELEMENTS
        if n**k < 30 or elements < 5000
    )


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(n, k) for n, k in BML if n**k > 81])
def test_bar_1_large_bml_sums_integers_exactly(n, k):
    rng = np.random.default_rng(1)
    assert all(sums_exactly(collectives.bml(n, k), elements, rng) for elements in (1, 17, 1000))


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 9, 13, 16])
def test_bar_1_every_collective_sums_exactly(ranks):
    rng = np.random.default_rng(ranks)
    for schedule in every_collective(ranks):
        check(schedule)
        for elements in ELEMENTS[:3]:
            assert sums_exactly(schedule, elements, rng), (schedule.name, elements)
    assert sums_exactly(collectives.halving_doubling(ranks), ELEMENTS[3], rng)


@pytest.mark.parametrize(("n", "k"), [(3, 2), (2, 3), (5, 2)])
def test_bar_1_bml_servers_end_bitwise_equal(n, k):
    values = np.random.default_rng(3).standard_normal((n**k, 1000)).astype(np.float32)
    result = execute(collectives.bml(n, k), values)
    assert (result.view(np.uint32) == result[0].view(np.uint32)).all()
    np.testing.assert_allclose(result[0], values.sum(axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("bml(2,2)", collectives.bml(2, 2)),
        ("bml(3,2)", collectives.bml(3, 2)),
        ("ring", collectives.ring(4)),
        ("halving_doubling", collectives.halving_doubling(4)),
        ("ps_colocated", collectives.sharded_parameter_server(3)),
    ],
)
def test_bar_2_send_lists_are_the_published_ones(name, schedule):
    row = SCHEDULES[name]
    assert (schedule.ranks, schedule.chunks) == (row["ranks"], row["chunks"])
    ours = [sorted(map(tuple, step.sends())) for step in schedule.steps]
    assert ours == [sorted(map(tuple, step)) for step in row["steps"]]


@pytest.mark.parametrize(("n", "k"), BML)
def test_bar_2_bml_has_the_stated_steps_messages_and_equal_loads(n, k):
    schedule = collectives.bml(n, k)
    servers = n**k
    assert len(schedule.steps) == 2 * k
    assert schedule.n_sends == 2 * k**2 * (n - 1) * servers
    for step in schedule.steps:
        digits = [v[:, None] // n ** np.arange(k) % n for v in (step.source, step.destination)]
        assert ((digits[0] != digits[1]).sum(axis=1) == 1).all()  # one switch
    plan = tp.LoadPlan(schedule, tp.Router(tp.bcube(n, k)))
    assert plan.loads.shape[1] == 2 * k * servers
    assert np.ptp(plan.loads, axis=1).max() < 1e-12


def test_worked_example_of_the_paper_notation():
    steps = collectives.bml(3, 2).steps
    received = [
        sorted((s.lo, s.hi, s.source) for s in step.sends() if s.destination == 5) for step in steps
    ]
    assert received[0] == [(6, 9, 3), (6, 9, 4), (12, 15, 2), (12, 15, 8)]
    assert received[1] == [(7, 8, 2), (7, 8, 8), (14, 15, 3), (14, 15, 4)]
    assert received[2] == [(6, 7, 2), (8, 9, 8), (12, 13, 3), (13, 14, 4)]
    assert received[3] == [(0, 3, 3), (3, 6, 4), (9, 12, 2), (15, 18, 8)]


@pytest.mark.parametrize(("n", "k"), [(2, 2), (3, 2), (5, 3), (2, 5), (4, 1)])
def test_gray_order_changes_one_digit_at_a_time(n, k):
    order = collectives.gray_order(n, k)
    assert sorted(order) == list(range(n**k))
    for a, b in [*pairwise(order), (order[-1], order[0])]:
        digits = zip(tp.bcube_digits(a, n, k), tp.bcube_digits(b, n, k), strict=True)
        assert sum(x != y for x, y in digits) == 1


@given(st.integers(2, 20), st.integers(1, 6), st.integers(0, 2**32))
def test_a_schedule_with_one_send_less_is_found_out(ranks, pieces, seed):
    schedule = collectives.double_binary_tree(ranks, pieces)
    rng = np.random.default_rng(seed)
    steps = [step.sends() for step in schedule.steps]
    filled = [i for i, sends in enumerate(steps) if sends]
    step = steps[filled[rng.integers(len(filled))]]
    step.pop(rng.integers(len(step)))
    broken = Schedule(
        "broken", ranks, schedule.chunks, tuple(map(step_of, steps)), schedule.workers
    )
    with pytest.raises(ValueError, match="lacks the contribution"):
        check(broken)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            [[(0, 1, 0, 2, "reduce")], [(1, 0, 1, 2, "copy")]],
            "piece 0 at rank 0 lacks the .* rank 1",
        ),
        (
            [[(0, 1, 0, 2, "reduce")], [(0, 1, 1, 2, "reduce")]],
            "piece 1 at rank 1 gets .* rank 0 twice in step 1",
        ),
        (
            [[(0, 1, 0, 2, "copy"), (2, 1, 0, 1, "copy")]],
            "piece 0 at rank 1 is written twice in step 0",
        ),
        ([[(0, 3, 0, 2, "reduce")]], r"send \[0, 3, 0, 2, 'reduce'\] needs two of the ranks 0..2"),
        ([[(0, 1, 0, 3, "reduce")]], "pieces within 0..2"),
        ([[(1, 1, 0, 1, "reduce")]], "needs two of the ranks"),
    ],
)
def test_checker_says_which_piece_is_wrong_where(steps, message):
    schedule = Schedule("mine", 3, 2, tuple(map(step_of, steps)), (0, 1, 2))
    with pytest.raises(ValueError, match=message):
        check(schedule)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: collectives.bml(1, 2), "n = 1: must be at least 2"),
        (lambda: collectives.ring(1), "ranks = 1: must be at least 2"),
        (lambda: collectives.ring(3, [0, 1, 1]), "each of the 3 ranks once"),
        (lambda: collectives.dimension_rings((1, 1)), "= 1: must be at least 2"),
        (lambda: collectives.hierarchical_parameter_server([[0, 2]]), "each of the ranks"),
        (lambda: tp.bml_schedule(tp.torus((3, 3))), r"bml needs a BCube, not torus\(dims=3x3\)"),
        (lambda: tp.ps_dedicated_schedule(tp.bcube(3, 2)), "has 0 machines that are no devices"),
        (lambda: tp.rotated_rings_schedule(tp.torus((3, 4))), "needs equal dimensions"),
        (lambda: tp.dimension_rings_schedule(tp.ring(5)), "has none"),
        (
            lambda: tp.ring_schedule(tp.erdos_renyi(5, 0.0)),
            "disconnected: no path from 0 to device 1",
        ),
        (lambda: tp.ring_schedule(tp.star(1)), "devices = 1"),
    ],
)
def test_pairs_that_make_no_sense_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


GRAPHS = [
    tp.bcube(3, 2),
    tp.fat_tree(4, devices=9),
    tp.leaf_spine(3, 2, 4),
    tp.torus((3, 3)),
    tp.star(6, servers=2),
    tp.tree((2, 3)),
    tp.dcell(3, 1),
    tp.hypercube(3),
    tp.random_geometric(8, 0.6, connected=True),
]


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda g: g.graph["name"])
def test_every_collective_placed_on_a_graph_sums_exactly(graph):
    placed = []
    for name, make in tp.placement.COLLECTIVES.items():
        try:
            schedule = make(graph)
        except ValueError:
            continue
        check(schedule)
        plan = tp.LoadPlan(schedule, tp.Router(graph))
        assert (plan.loads >= 0).all()
        placed.append(name)
    assert {"ring", "ps_colocated", "halving_doubling", "ps_hierarchical"} <= set(placed)


def test_hierarchy_of_a_tree_uses_its_edge_servers():
    schedule = tp.ps_hierarchical_schedule(tp.tree((2, 3)))
    first, second = schedule.steps[0].sends(), schedule.steps[1].sends()
    assert {(s.source, s.destination) for s in first} == {(i, 7 + i // 3) for i in range(6)}
    assert {(s.source, s.destination) for s in second} == {(7, 6), (8, 6)}
    assert schedule.workers == tuple(range(6))


def test_only_some_devices_take_part():
    graph = tp.bcube(3, 2)
    smaller = tp.placement.among(graph, [0, 1, 2, 3, 5, 6, 7, 8])  # 4 passes messages on
    assert (tp.devices_of(smaller), tp.devices_of(graph)) == (
        [0, 1, 2, 3, 5, 6, 7, 8],
        list(range(9)),
    )
    for name in ("ring", "ps_colocated", "halving_doubling", "ps_hierarchical"):
        schedule = tp.placement.COLLECTIVES[name](smaller)
        assert schedule.ranks == 8
        check(schedule)
    # The Gray order without server 4: ranks 4 to 7 are servers 5 to 8.
    around = tp.ring_schedule(smaller).steps[0]
    assert around.source.tolist() == [0, 1, 2, 4, 3, 6, 7, 5]
    for name in ("bml", "dimension_rings", "rotated_rings"):
        with pytest.raises(ValueError, match=r"takes all 9 devices of bcube\(n=3, k=2\), not 8"):
            tp.placement.COLLECTIVES[name](smaller)
    assert tp.placement.among(graph, range(9)) is graph
    with pytest.raises(ValueError, match="12 is no device"):
        tp.placement.among(graph, [0, 12])


def test_groups_of_a_tree_are_those_of_the_members():
    graph = tp.tree((2, 3))  # the devices 0-2 and 3-5 under an edge server each
    schedule = tp.ps_hierarchical_schedule(tp.placement.among(graph, [0, 2, 3, 5]))
    check(schedule)
    first = schedule.steps[0]
    assert list(zip(first.source.tolist(), first.destination.tolist(), strict=True)) == [
        (0, 5),
        (1, 5),
        (2, 6),
        (3, 6),
    ]
