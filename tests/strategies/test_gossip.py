"""The numbers of the reference problem: plain numpy loops, and the strategies through Flower."""

import numpy as np
import pytest
import torch

from strategies.accelerated import ADOM, Mudag, chebyshev_momentum, fast_mix
from strategies.choco import ChocoSGD, top_k, top_k_bytes
from strategies.gossip import DPSGD
from strategies.push_sum import SGP, PushDIGing
from strategies.tracking import D2, DSGT, EXTRA
from tests.strategies import peer_worlds as q8
from tests.strategies.peer_worlds import (
    D8,
    RING,
    after,
    consensus,
    error,
    models_after,
    one_peer,
    start,
    tv8,
)

torch.set_num_threads(1)
ATC = "adapt_then_combine"
TINY = 1e-12
ETA = {"learning_rate": 0.05, "fraction_evaluate": 0.0}
ACCELERATED = {
    "learning_rate": 1 / q8.SMOOTHNESS,
    "condition": q8.SMOOTHNESS / q8.CONVEXITY,
    "fraction_evaluate": 0.0,
}


def adom(graph):
    return ADOM(**ACCELERATED, conjugate=q8.conjugate, graph=graph)


def still(graph):
    """Return the first ring of the changing network, which the reference holds fixed for ADOM."""
    return graph(0)


# name → (numpy loop, strategy, {steps: relative error})
CASES = {
    "D-PSGD": (
        lambda: q8.dpsgd(0.05, RING),
        lambda: DPSGD(**ETA, graph=RING),
        {50: 2.02648e-1, 200: 2.13000e-1, 1000: 2.13005e-1},
    ),
    "D-PSGD ATC": (
        lambda: q8.dpsgd(0.05, RING, ATC),
        lambda: DPSGD(**ETA, order=ATC, graph=RING),
        {50: 1.18622e-1, 200: 1.24184e-1, 1000: 1.24187e-1},
    ),
    "EXTRA": (
        lambda: q8.extra(0.05, RING),
        lambda: EXTRA(**ETA, graph=RING),
        {50: 9.45295e-4, 200: 8.10866e-11, 1000: TINY},
    ),
    "DSGT": (
        lambda: q8.dsgt(0.05, RING),
        lambda: DSGT(**ETA, graph=RING),
        {50: 7.45621e-4, 200: 4.03787e-11, 1000: TINY},
    ),
    "DSGT ATC": (
        lambda: q8.dsgt(0.05, RING, ATC),
        lambda: DSGT(**ETA, order=ATC, graph=RING),
        {50: 8.28824e-4, 200: 5.73519e-11, 1000: TINY},
    ),
    "D2": (
        lambda: q8.d2(0.05, RING),
        lambda: D2(**ETA, graph=RING),
        {50: 9.65196e-4, 200: 8.45003e-11, 1000: TINY},
    ),
    "D-PSGD, 0.1": (
        lambda: q8.dpsgd(0.1, RING),
        lambda: DPSGD(**ETA | {"learning_rate": 0.1}, graph=RING),
        {50: 5.67810e-1, 200: 5.69656e-1, 1000: 5.696562e-1},
    ),
    "EXTRA, 0.1": (
        lambda: q8.extra(0.1, RING),
        lambda: EXTRA(**ETA | {"learning_rate": 0.1}, graph=RING),
        {50: 1.30135e-6, 200: TINY, 1000: TINY},
    ),
    "D2, 0.1": (
        lambda: q8.d2(0.1, RING),
        lambda: D2(**ETA | {"learning_rate": 0.1}, graph=RING),
        {50: 1.55413e-6, 200: TINY, 1000: TINY},
    ),
    "DSGT ATC, 0.1": (
        lambda: q8.dsgt(0.1, RING, ATC),
        lambda: DSGT(**ETA | {"learning_rate": 0.1}, order=ATC, graph=RING),
        {50: 3.93403e-5, 200: TINY, 1000: TINY},
    ),
    "TV8 D-PSGD": (
        lambda: q8.dpsgd(0.05, tv8),
        lambda: DPSGD(**ETA, graph=tv8),
        {50: 1.17503e-1, 200: 9.97607e-2, 1000: 7.20673e-2},
    ),
    "TV8 DSGT": (
        lambda: q8.dsgt(0.05, tv8),
        lambda: DSGT(**ETA, graph=tv8),
        {50: 1.0176e-3, 200: 9.4113e-11, 1000: TINY},
    ),
    "TV8 D2": (
        lambda: q8.d2(0.05, tv8),
        lambda: D2(**ETA, graph=tv8),
        {50: 1.0190e-3, 200: 9.4248e-11, 1000: TINY},
    ),
    "Mudag K=3": (
        lambda: q8.mudag(3, RING),
        lambda: Mudag(**ACCELERATED, mixing_steps=3, graph=RING),
        {20: 1.0548e-8, 50: TINY},
    ),
    "Mudag K=6": (
        lambda: q8.mudag(6, RING),
        lambda: Mudag(**ACCELERATED, mixing_steps=6, graph=RING),
        {20: 9.5163e-9},
    ),
    "TV8 ADOM": (
        lambda: q8.adom(tv8),
        lambda: adom(tv8),
        {200: 2.5569e-4, 500: 2.4825e-6, 1000: 1.1052e-9, 2000: TINY},
    ),
    "ADOM": (
        lambda: q8.adom(still(tv8)),
        lambda: adom(still(tv8)),
        {200: 1.1927e-4, 500: 1.2163e-6, 1000: 6.5225e-10},
    ),
    "D8 SGP, 0.02": (
        lambda: q8.sgp(0.02, D8),
        lambda: SGP(**ETA | {"learning_rate": 0.02}, graph=D8),
        {2000: 3.85578e-2},
    ),
    "D8 SGP": (lambda: q8.sgp(0.05, D8), lambda: SGP(**ETA, graph=D8), {2000: 2.05683e-1}),
    "one-peer SGP, 0.02": (
        lambda: q8.sgp(0.02, one_peer),
        lambda: SGP(**ETA | {"learning_rate": 0.02}),
        {2000: 6.21496e-3},
    ),
    "one-peer SGP": (lambda: q8.sgp(0.05, one_peer), lambda: SGP(**ETA), {2000: 3.71414e-2}),
    "Push-DIGing": (
        lambda: q8.push_diging(0.05, D8),
        lambda: PushDIGing(**ETA, graph=D8),
        {200: 9.51108e-11, 2000: TINY},
    ),
    "CHOCO, all": (
        lambda: q8.choco(0.05, 1.0, 10, RING),
        lambda: ChocoSGD(**ETA, consensus_step=1.0, share=1.0, graph=RING),
        {1000: 1.24187e-1},
    ),
    "CHOCO 0.1, top 1": (
        lambda: q8.choco(0.05, 0.1, 1, RING),
        lambda: ChocoSGD(**ETA, consensus_step=0.1, k=1, graph=RING),
        {4000: 3.1710},
    ),
    "CHOCO 0.1, top 3": (
        lambda: q8.choco(0.05, 0.1, 3, RING),
        lambda: ChocoSGD(**ETA, consensus_step=0.1, k=3, graph=RING),
        {4000: 3.1710},
    ),
    "CHOCO 0.4, top 1": (
        lambda: q8.choco(0.05, 0.4, 1, RING),
        lambda: ChocoSGD(**ETA, consensus_step=0.4, k=1, graph=RING),
        {4000: 6.0010e-1},
    ),
    "CHOCO 0.5, top 3": (
        lambda: q8.choco(0.05, 0.5, 3, RING),
        lambda: ChocoSGD(**ETA, consensus_step=0.5, k=3, graph=RING),
        {4000: 4.2668e-1},
    ),
}


def assert_holds(bars, models):
    for bar, x in zip(bars.values(), models, strict=True):
        assert error(x) < TINY if bar == TINY else error(x) == pytest.approx(bar, rel=1e-3)


def test_the_problem_is_the_reference_problem():
    assert np.linalg.norm(q8.OPTIMUM) == pytest.approx(2.397050, abs=1e-6)
    assert q8.OPTIMUM[:3] == pytest.approx([-0.773570, -1.116798, -0.041805], abs=1e-6)
    assert pytest.approx([5.305954, 0.500043], abs=1e-6) == [q8.SMOOTHNESS, q8.CONVEXITY]


@pytest.mark.parametrize("name", CASES)
def test_plain_loops_give_the_reference_numbers(name):
    loop, _, bars = CASES[name]
    assert_holds(bars, after(loop(), *bars))


@pytest.mark.parametrize("name", CASES)
def test_strategies_follow_the_plain_loops(name):
    """Through Flower and a ClientApp, in float64: the same models to 1e-12 after 25 rounds."""
    loop, make, _ = CASES[name]
    (expected,) = after(loop(), 25)
    found, result = start(make(), 25)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
    metrics = result.train_metrics_clientapp[25]
    assert metrics["consensus_distance"] == pytest.approx(consensus(found), rel=1e-9, abs=1e-20)
    np.testing.assert_allclose(result.arrays["w"].numpy(), found.mean(0), rtol=0, atol=1e-12)


LONG = 300  # rounds


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, (_, _, bars) in CASES.items() if min(bars) <= LONG]
)
def test_strategies_give_the_reference_numbers(name):
    _, make, bars = CASES[name]
    early = {steps: bar for steps, bar in bars.items() if steps <= LONG}
    assert_holds(early, models_after(make(), early))


@pytest.mark.study
@pytest.mark.parametrize("name", [name for name, (_, _, bars) in CASES.items() if max(bars) > LONG])
def test_strategies_give_the_reference_numbers_of_long_runs(name):
    """The plain loops, which strategies follow to 1e-12, give them in the default run."""
    _, make, bars = CASES[name]
    late = {steps: bar for steps, bar in bars.items() if steps > LONG}
    assert_holds(late, models_after(make(), late))


def test_dpsgd_settles_where_its_closed_form_says():
    """(I - W) X + η G(X) = 0."""
    eta, w = 0.05, q8.metropolis(RING)
    system = np.kron(np.eye(8) - w, np.eye(10))
    for i in range(8):
        system[10 * i : 10 * i + 10, 10 * i : 10 * i + 10] += eta * q8.H[i]
    fixed = np.linalg.solve(system, eta * q8.B.ravel()).reshape(8, 10)
    assert error(fixed) == pytest.approx(2.13005358e-1, rel=1e-8)
    assert consensus(fixed) == pytest.approx(1.11165, rel=1e-5)
    (x,) = after(q8.dpsgd(eta, RING), 1000)
    np.testing.assert_allclose(x, fixed, atol=1e-9)


def test_tracking_with_a_large_step_is_seen_to_diverge():
    x50, x200 = after(q8.dsgt(0.1, RING), 50, 200)
    assert error(x50) == pytest.approx(1.887e1, rel=1e-3)
    assert error(x200) > 1e5
    found, result = start(DSGT(**ETA | {"learning_rate": 0.1}, graph=RING), 50)
    np.testing.assert_allclose(found, x50, rtol=1e-12)
    assert result.train_metrics_clientapp[50]["spread"] > 1


def test_mudag_diverges_with_one_mixing_a_step():
    assert error(start(Mudag(**ACCELERATED, graph=RING), 20)[0]) > 1e6


def test_trackers_always_sum_to_the_gradients():
    for strategy in (DSGT(**ETA, graph=tv8), DSGT(**ETA, order=ATC, graph=tv8)):
        start(strategy, 20)
        state = strategy.state
        np.testing.assert_allclose(state["trackers"].sum(0), state["gradients"].sum(0), atol=1e-12)


@pytest.mark.parametrize(
    ("steps", "fast", "plain"),
    [
        (3, 3.77672e-2, 6.38828e-2),
        (6, 1.11844e-3, 1.71890e-2),
        (12, 8.93037e-7, 1.26789e-3),
    ],
)
def test_fast_mixing_contracts_as_it_should_and_keeps_the_mean(steps, fast, plain):
    w = q8.metropolis(RING)
    x = torch.from_numpy(q8.B)
    for momentum, bar in ((chebyshev_momentum(w), fast), (0.0, plain)):
        mixed = fast_mix(w, x, steps, momentum)
        assert consensus(mixed.numpy()) / consensus(q8.B) == pytest.approx(bar, rel=1e-3)
        np.testing.assert_allclose(mixed.mean(0), x.mean(0), atol=1e-14)


def test_mudag_mixes_plainly_where_the_graph_changes():
    strategy = Mudag(**ACCELERATED, mixing_steps=3, graph=tv8)
    _, result = start(strategy, 3)
    assert result.train_metrics_clientapp[1]["mixing_momentum"] > 0.2
    assert result.train_metrics_clientapp[3]["mixing_momentum"] == 0


def test_adom_keeps_its_dual_rows_summing_to_zero():
    strategy = adom(tv8)
    start(strategy, 40)
    assert float(strategy.state["dual"].sum(0).abs().max()) < 1e-10
    assert float(strategy.state["dual_ahead"].sum(0).abs().max()) < 1e-10


def test_adom_without_a_conjugate_comes_close():
    """One gradient step a round for the conjugate: slower than exact, but it converges."""
    assert error(start(ADOM(**ACCELERATED, graph=RING), 200)[0]) == pytest.approx(
        2.053e-4, rel=0.01
    )


def test_push_sum_averages_exactly_where_it_should():
    x, w = q8.B.copy(), np.ones((8, 1))
    for step in range(3):
        x, w = q8.push(one_peer(step)) @ x, q8.push(one_peer(step)) @ w
    assert np.abs(x / w - q8.B.mean(0)).max() < 1e-14
    p = q8.push(D8)
    np.testing.assert_allclose(
        p.sum(1), [1.667, 1, 1.333, 0.833, 0.833, 0.833, 0.667, 0.833], atol=1e-3
    )
    x, w = q8.B.copy(), np.ones((8, 1))
    for _ in range(200):
        x, w = p @ x, p @ w
    assert np.abs(x / w - q8.B.mean(0)).max() < 1e-13


def test_push_without_weights_finds_the_wrong_optimum():
    x, p = np.zeros((8, 10)), q8.push(D8)
    for _ in range(2000):
        x = p @ (x - 0.02 * q8.gradients(x))
    assert error(x) == pytest.approx(3.5580e-1, rel=1e-3)


@pytest.mark.parametrize(
    ("gamma", "low", "high"), [(0.05, 8e-17, 1e-16), (0.1, 0, 1e-25), (0.2, 0, 1e-25)]
)
def test_compressed_gossip_reaches_consensus_and_keeps_the_mean(gamma, low, high):
    (x,) = after(q8.choco(0.0, gamma, 1, RING, start=q8.B), 2000)
    assert low <= consensus(x) <= high
    np.testing.assert_allclose(x.mean(0), q8.B.mean(0), atol=1e-12)


def test_compressed_gossip_with_too_large_a_step_diverges():
    (x,) = after(q8.choco(0.0, 0.4, 1, RING, start=q8.B), 2000)
    assert not consensus(x) < consensus(q8.B)


def test_top_k_keeps_the_largest_and_weighs_what_it_sends():
    rows = torch.tensor([[1.0, -5.0, 3.0, 0.0], [0.5, 0.2, -0.1, 4.0]])
    assert top_k(rows, 2).tolist() == [[0, -5, 3, 0], [0.5, 0, 0, 4]]
    assert top_k_bytes(3, 10, 4) == 3 * (4 + 1)
    assert top_k_bytes(7, 256, 4) == 7 * 5
    assert top_k_bytes(7, 257, 4) == 7 * 6
    assert top_k_bytes(7, 70_000, 4) == 7 * 8
