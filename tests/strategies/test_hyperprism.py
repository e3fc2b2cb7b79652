"""Power means (the bars of the specification) and the strategy made of them."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st

import topologies as tp
from strategies import mirror
from strategies.degrees import (
    Adaptation,
    direct_degrees,
    hypernetwork_degrees,
    learn,
    new_direct,
    new_hypernetworks,
)
from strategies.gossip import DPSGD
from strategies.hyperprism import HyperPrism, part_columns
from strategies.mirror import (
    NEGATIVE_ENTROPY,
    mirror_mean,
    power_map,
    signed_power,
    weighted_power_mean,
    weighted_power_mean_and_slope,
)
from tests.plain_grid import PlainGrid, flower_identity
from tests.strategies.peer_worlds import RING, start, tv8
from tests.strategies.test_peers import mixed_app, scattered

torch.set_num_threads(1)
DTYPES = [torch.float32, torch.float64]
DEGREES = [1.0, 1.5, 3.0, 15.0, 64.0]


def weights_of(n, density=0.5, seed=0):
    return tp.metropolis(tp.erdos_renyi(n, density, seed=seed))


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def reference(x, weights, degree):
    """Return power means and largest magnitudes by a plain loop over receivers, in float64."""
    x = np.asarray(x, np.float64)
    means, tops = np.zeros((len(weights), x.shape[1])), np.zeros((len(weights), x.shape[1]))
    for i, row in enumerate(weights):
        near = np.flatnonzero(row > 0)
        top = np.abs(x[near]).max(0)
        scale = np.where(top > 0, top, 1)
        s = row[near] @ (np.sign(x[near]) * (np.abs(x[near]) / scale) ** degree)
        means[i], tops[i] = np.sign(s) * np.abs(s) ** (1 / degree) * top, top
    return means, tops


# --- bars 1 to 7 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("path", ["linear", "generic", "per device", "slope"])
def test_bar_1_degree_1_is_linear(dtype, path):
    x, w = normal(20, 300, dtype=dtype), weights_of(20)
    if path == "slope":
        found, _ = weighted_power_mean_and_slope(x, w, 1.0)
    else:
        degree = {"linear": 1.0, "generic": torch.tensor([1.0] * 20), "per device": torch.ones(20)}
        found = weighted_power_mean(x, w, degree[path])
    bound = 1e-6 if dtype == torch.float32 else 1e-12
    assert np.abs(found.numpy() - w @ x.numpy()).max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degree", [*DEGREES, "per device"])
def test_bar_2_equal_models_come_back(dtype, degree):
    x = normal(300, dtype=dtype).repeat(20, 1)
    p = torch.linspace(1, 64, 20) if degree == "per device" else degree
    found = weighted_power_mean(x, weights_of(20), p)
    assert float(((found - x) / x).abs().max()) <= (1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degree", [3.0, 9.0, 64.0])
def test_bar_3_equivariant_odd_and_homogeneous(dtype, degree):
    x, w = normal(20, 300, dtype=dtype), weights_of(20)
    _, top = reference(x, w, degree)
    mean = weighted_power_mean(x, w, degree).numpy()
    order = np.random.default_rng(1).permutation(20)
    moved = weighted_power_mean(x[order], w[order][:, order], degree).numpy()
    error = np.abs(moved - mean[order]) / top[order]
    assert error.max() <= (1e-3 if dtype == torch.float32 else 1e-9)
    assert np.quantile(error, 0.99) <= 1e-6
    assert (weighted_power_mean(-x, w, degree).numpy() == -mean).all()
    small = weighted_power_mean(x * 1e-3, w, degree).numpy()
    assert (np.abs(small - 1e-3 * mean) / (1e-3 * top)).max() <= 1e-4


def test_bar_4_monotone_for_positive_inputs_and_between_the_extremes():
    x, w = normal(20, 300).abs(), weights_of(20)
    means = [weighted_power_mean(x, w, p) for p in (1, 1.5, 2, 3, 5, 9, 15, 33, 64)]
    for lower, higher in pairwise(means):
        assert float(((lower - higher) / higher).max()) <= 1e-6


@given(st.integers(0, 1000), st.sampled_from([1, 3, 5, 9, 15]))
def test_bar_4_bounds(seed, degree):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 500)) * np.exp(rng.standard_normal(500))
    w = rng.dirichlet([0.5] * 8)[None]
    mean = weighted_power_mean(torch.from_numpy(x), w, float(degree)).numpy()[0]
    linear, low, high, top = w[0] @ x, x.min(0), x.max(0), np.abs(x).max(0)
    slack, share = 1e-9 * top, 1 / (2 * degree)
    assert (mean >= low - slack).all()
    assert (mean <= high + slack).all()
    assert (mean >= share * linear + (1 - share) * low - slack).all()
    assert (mean <= share * linear + (1 - share) * high + slack).all()
    positive = weighted_power_mean(torch.from_numpy(np.abs(x)), w, float(degree)).numpy()[0]
    linear, high = w[0] @ np.abs(x), np.abs(x).max(0)
    assert (positive >= linear - slack).all()
    assert (positive <= linear / degree + (1 - 1 / degree) * high + slack).all()


def is_stable(mean, x, w, degree):
    """Tell whether float32 means pass bar 5."""
    exact, top = reference(x, w, degree)
    found = np.asarray(mean, np.float64)
    if not np.isfinite(found).all() or ((found == 0) & (exact != 0)).any():
        return False
    power = lambda v: np.sign(v) * np.abs(v) ** degree  # noqa: E731
    residual = np.abs(power(found / top) - power(exact / top))
    return bool(np.quantile(np.abs(found - exact) / top, 0.99) <= 1e-6 and residual.max() <= 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("degree", [3.0, 7.3, 64.0])
@pytest.mark.parametrize("decades", [0.5, 12.0, 40.0])
@pytest.mark.parametrize("is_dual", [False, True])
def test_products_of_matrices_give_the_means_of_the_long_way(dtype, degree, decades, is_dual):
    rng = np.random.default_rng(4)
    # Each device has a scale of its own: one's inputs may all be far below the largest of all.
    size = 10.0 ** rng.uniform(-decades / 2, decades / 2, (20, 1))
    x = torch.from_numpy(size * rng.standard_normal((20, 200))).to(dtype)
    x[:, :5], x[:7, 5] = 0, 0
    shift = torch.from_numpy(rng.standard_normal((20, 200))).to(dtype) if is_dual else None
    w = weights_of(20)
    assert mirror._is_dense(w)
    exact = mirror._power_means(
        x.double(), w, degree, None if shift is None else shift.double(), with_slope=False
    )[0]
    top = torch.where(torch.from_numpy(w > 0)[:, :, None], x.double().abs(), 0).amax(1)
    if shift is not None:
        top = torch.maximum(top, shift.double().abs() ** (1 / degree))
    found = weighted_power_mean(x, w, degree, shift)
    assert found.dtype == dtype
    assert ((found == 0) == (exact == 0)).all()
    power = lambda v: torch.sign(v) * v.abs() ** degree  # noqa: E731
    scale = torch.where(top > 0, top, 1)
    residual = (power(found.double() / scale) - power(exact / scale)).abs().max()
    assert residual <= (1e-13 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("degree", [1.0, 3.0, 9.0, 15.0, 33.0, 64.0])
@pytest.mark.parametrize("low", [-8.0, 0.0, 3.0])
def test_bar_5_float32_is_stable_and_the_unscaled_formula_is_not(degree, low):
    rng = np.random.default_rng(int(degree))
    magnitude = 10 ** rng.uniform(min(low, 2.5), 3, (20, 500))
    x = torch.from_numpy((rng.choice([-1, 1], (20, 500)) * magnitude).astype(np.float32))
    w = weights_of(20).astype(np.float32).astype(np.float64)
    assert is_stable(weighted_power_mean(x, w, degree), x, w, degree)
    assert is_stable(weighted_power_mean(x, w, torch.full((20,), degree)), x, w, degree)
    if degree >= 15:
        assert not is_stable(mirror_mean(x, w, power_map(degree)), x, w, degree)


@pytest.mark.parametrize("degree", [1.0, 3.0, 7.3])
@pytest.mark.parametrize("step", [0.0, 0.05])
def test_bar_6_the_slope_by_the_degree_matches_differences(degree, step):
    x, w, h = normal(20, 300), weights_of(20), 1e-5
    shift = step * normal(20, 300, seed=1) if step else None
    _, slope = weighted_power_mean_and_slope(x, w, degree, shift)
    high, low = (
        weighted_power_mean(x, w, torch.full((20,), degree + d, dtype=torch.float64), shift)
        for d in (h, -h)
    )
    differences = (high - low) / (2 * h)
    assert torch.isfinite(slope).all()
    relative = (differences - slope).abs() / (differences.abs() + 1e-9)
    assert float(relative.median()) <= 1e-6
    _, clipped = weighted_power_mean_and_slope(x, w, degree, shift, clip=0.1)
    assert float(clipped.abs().max()) <= 0.1 * max(4.5, float(x.abs().max()) + 1)


def test_bar_6_slopes_are_0_where_inputs_are_equal_or_nothing():
    w = weights_of(4, 1.0)
    x = torch.tensor([[2.0, 0.0, 1.0]] * 2 + [[2.0, 0.0, -1.0]] * 2)
    mean, slope = weighted_power_mean_and_slope(x, w, 3.0)
    assert slope.abs().max() <= 1e-6
    assert torch.isfinite(mean).all()


def test_bar_7_mixing_of_a_path_and_of_the_isolated():
    graph = tp.line(3)
    graph.add_node(3, role="device")
    w = tp.metropolis(graph)
    third = 1 / 3
    expected = [[2 * third, third, 0, 0], [third] * 3 + [0], [0, third, 2 * third, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(w, expected, atol=1e-12)
    x = normal(4, 9)
    assert torch.equal(weighted_power_mean(x, w, 9.0)[3].sign(), x[3].sign())
    np.testing.assert_allclose(weighted_power_mean(x, w, 9.0)[3], x[3], rtol=1e-14)


# --- mirror maps ----------------------------------------------------------------------------------


@given(st.floats(0.2, 20), st.integers(0, 100))
def test_scaled_and_unscaled_power_means_agree_where_both_exist(degree, seed):
    x, w = normal(6, 40, seed=seed).abs() + 0.5, weights_of(6, seed=seed)
    scaled = weighted_power_mean(x, w, degree)
    np.testing.assert_allclose(scaled, mirror_mean(x, w, power_map(degree)), rtol=1e-12)


def test_negative_entropy_gives_geometric_means_and_wants_positive_parameters():
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0]], dtype=torch.float64)
    w = np.full((2, 2), 0.5)
    assert (
        mirror_mean(x, w, NEGATIVE_ENTROPY).tolist() == [[pytest.approx(2), pytest.approx(4)]] * 2
    )
    stepped = mirror_mean(x, w, NEGATIVE_ENTROPY, torch.full((2, 2), 0.1, dtype=torch.float64))
    np.testing.assert_allclose(stepped, [[2 * np.exp(-0.1), 4 * np.exp(-0.1)]] * 2)
    with pytest.raises(ValueError, match=r"the lowest is -3\.0"):
        mirror_mean(torch.tensor([[-3.0], [1.0]]), w, NEGATIVE_ENTROPY)


def test_signed_powers_of_integers_and_others():
    x = torch.tensor([-2.0, -0.0, 0.5], dtype=torch.float64)
    for degree in (1, 2, 3, 7, 64, 2.5, 0.3):
        expected = np.sign(x.numpy()) * np.abs(x.numpy()) ** degree
        np.testing.assert_allclose(signed_power(x, degree), expected, rtol=1e-14)


def test_negative_weights_have_no_power_mean():
    with pytest.raises(ValueError, match=r"weights: -0\.5 is negative"):
        weighted_power_mean(torch.ones(2, 1), np.array([[1.5, -0.5]]), 3.0)


# --- the strategy ---------------------------------------------------------------------------------

QUIET = {"fraction_evaluate": 0.0, "learning_rate": 0.05}


def rows(seed=0):
    return np.random.default_rng(seed).standard_normal((8, 10))


@pytest.mark.parametrize(
    ("space", "order"), [("dual", "combine_then_adapt"), ("primal", "adapt_then_combine")]
)
def test_degree_1_is_dpsgd_over_100_rounds_of_a_changing_graph(space, order):
    linear, _ = start(scattered(DPSGD(order=order, graph=tv8, **QUIET), rows()), 100)
    for degree in (1.0, [1.0] * 8, {"all": 1.0}):
        prism = HyperPrism(degree=degree, gradient_space=space, graph=tv8, **QUIET)
        found, _ = start(scattered(prism, rows()), 100 if degree == 1.0 else 5)
        if degree == 1.0:
            np.testing.assert_allclose(found, linear, rtol=0, atol=1e-12)


@pytest.mark.parametrize("space", ["primal", "dual"])
@pytest.mark.parametrize("degree", [3.0, 9.0])
def test_the_strategy_follows_a_plain_loop(space, degree):
    from tests.strategies import peer_worlds as q8

    x, w = rows(), q8.metropolis(RING)
    power = lambda v, p: np.sign(v) * np.abs(v) ** p  # noqa: E731
    for _ in range(15):
        step = 0.05 * q8.gradients(x)
        if space == "primal":
            x = power(w @ power(x - step, degree), 1 / degree)
        else:
            x = power(w @ power(x, degree) - step, 1 / degree)
    prism = HyperPrism(degree=degree, gradient_space=space, graph=RING, **QUIET)
    found, _ = start(scattered(prism, rows()), 15)
    np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-8)


def test_degrees_of_parts_layers_and_devices_apply_where_they_should():
    columns = {"body.w": slice(0, 4), "body.b": slice(4, 5), "head.w": slice(5, 8)}
    layers = {"body": [slice(0, 4), slice(4, 5)], "head": [slice(5, 8)]}
    assert part_columns(columns, "layers") == layers
    assert part_columns(columns, {"first": ["body.*"], "rest": ["*"]}) == {
        "first": layers["body"],
        "rest": layers["head"],
    }
    parts = {"matrix": ["w"], "rest": ["*"]}
    kinds = [
        {"degree": {"matrix": 1.0, "rest": 3.0}, "parts": parts},
        {"degree": [[1.0, 3.0]] * 3, "parts": parts},
        {"degree": 1.0},
        {"degree": 3.0, "parts": "layers"},
        {"degree": [3.0] * 3},
    ]
    found = []
    for kind in kinds:
        strategy = HyperPrism(**kind, **QUIET)
        with flower_identity(0):
            strategy.start(PlainGrid(mixed_app(), 3), _mixed(), num_rounds=2)
        found.append([float(strategy.device_models[k].flatten()[0]) for k in ("w", "scale")])
    (w1, s3), by_device, (linear_w, linear_s), (cubic_w, cubic_s), same = found
    assert [w1, s3] == [linear_w, cubic_s] == by_device
    assert [cubic_w, cubic_s] == pytest.approx(same, rel=1e-6)
    assert cubic_w > linear_w + 0.01
    assert cubic_s > linear_s + 0.01


def _mixed():
    record = ArrayRecord()
    record["w"] = Array(np.ones((2, 3), np.float32))
    record["scale"] = Array(np.asarray(2.0, np.float64))
    return record


def test_scheduled_degrees_go_down_linearly():
    prism = HyperPrism(degree=9, last_degree=1, decay_rounds=4, graph=RING, **QUIET)
    _, result = start(prism, 6)
    degrees = [m["degree"] for m in result.train_metrics_clientapp.values()]
    assert degrees == [9, 7, 5, 3, 1, 1]


@pytest.mark.parametrize("degree", ["adaptive", "learned"])
@pytest.mark.parametrize("space", ["primal", "dual"])
def test_learned_degrees_move_against_the_slope_of_the_loss(degree, space):
    """The closed form equals what automatic differentiation through the mixing gives."""
    from tests.strategies import peer_worlds as q8

    how = Adaptation(learning_rate=0.5, clip=1e9, candidates=(1.0, 2.0, 3.0))
    how = how if degree == "adaptive" else Adaptation(learning_rate=0.5, clip=1e9)
    w = q8.metropolis(RING)

    def chosen(parameters):
        of = hypernetwork_degrees if degree == "adaptive" else direct_degrees
        return of(parameters, 1, how)

    new = new_hypernetworks if degree == "adaptive" else new_direct
    parameters = {k: v.double().requires_grad_() for k, v in new(range(1000, 1008), 1, how).items()}
    x = torch.from_numpy(rows())
    step = 0.05 * torch.from_numpy(q8.gradients(rows()))
    p = chosen(parameters)
    powers = lambda v, e: torch.sign(v) * v.abs() ** e  # noqa: E731
    weights = torch.from_numpy(w)
    mixed = []
    for i in range(8):
        if space == "primal":
            dual = weights[i] @ powers(x - step, p[i])
        else:
            dual = weights[i] @ powers(x, p[i]) - step[i]
        mixed.append(powers(dual, 1 / p[i]))
    mixed = torch.stack(mixed)
    loss = (torch.einsum("ni,nij,nj->n", mixed, torch.from_numpy(q8.H), mixed) / 2).sum()
    loss = loss - (torch.from_numpy(q8.B) * mixed).sum()
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    prism = HyperPrism(degree=degree, gradient_space=space, adaptation=how, graph=RING, **QUIET)
    start(scattered(prism, rows()), 2)
    for (key, value), slope in zip(parameters.items(), slopes, strict=True):
        expected = value.detach() - 0.5 * slope
        np.testing.assert_allclose(prism.state[key], expected, rtol=2e-4, atol=2e-5)


def test_hypernetworks_depend_on_seed_and_node_alone_and_start_in_the_middle():
    how = Adaptation(seed=3)
    all_three = new_hypernetworks([1000, 1001, 1002], 2, how)
    alone = new_hypernetworks([1001], 2, how)
    assert all(torch.equal(all_three[k][1:2], alone[k]) for k in alone)
    assert [tuple(v.shape[1:]) for v in alone.values()] == [
        (1, 16), (16, 64), (64, 64), (64, 64), (64, 16),
    ]  # fmt: skip
    degrees = hypernetwork_degrees(all_three, 2, how)
    assert degrees.shape == (3, 2)
    assert ((degrees > 5) & (degrees < 11)).all()
    assert not any(torch.equal(all_three[k][0], all_three[k][1]) for k in alone)
    still = learn(all_three, torch.zeros(3, 2), 2, how, 1.0)
    assert all(torch.equal(still[k], all_three[k]) for k in still)
    down = learn(all_three, torch.tensor([[1.0, 0], [0, 0], [0, 0]]), 2, how, 1.0)
    moved = hypernetwork_degrees(down, 2, how)
    assert moved[0, 0] < degrees[0, 0]
    assert torch.equal(moved[1:], degrees[1:])


def test_other_mirror_maps_mix_in_their_own_space():
    """exp/log of one's own equals the built-in entropy; the identity is linear averaging."""
    positive = np.abs(rows()) + 3
    mixes = []
    for arguments in (
        {"mirror": "negative_entropy"},
        {"forward": torch.log, "inverse": torch.exp},
    ):
        prism = HyperPrism(**arguments, graph=RING, **QUIET | {"learning_rate": 0.001})
        mixes.append(start(scattered(prism, positive), 3)[0])
    np.testing.assert_allclose(mixes[0], mixes[1], rtol=1e-15)
    same = HyperPrism(forward=lambda x: x, inverse=lambda x: x, graph=RING, **QUIET)
    linear = DPSGD(order="adapt_then_combine", graph=RING, **QUIET)
    np.testing.assert_array_equal(
        start(scattered(same, rows()), 9)[0], start(scattered(linear, rows()), 9)[0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 2, "signed": False}, r"degree = 2\.0: without signed powers only odd"),
        ({"degree": 2.5, "signed": False}, r"degree = 2\.5: without signed"),
        ({"degree": "adaptive", "signed": False}, "degrees that change need signed powers"),
        ({"degree": 0}, r"degree = 0\.0: must be above 0"),
        ({"degree": -3}, r"degree = -3\.0"),
        ({"degree": float("nan")}, "degree = nan"),
        ({"degree": {"all": -1}}, r"degree = -1\.0"),
        ({"degree": [1, 0]}, r"degree = 0\.0"),
        ({"degree": "clever"}, "degree = 'clever': a number, adaptive or learned"),
        ({"degree": 3, "last_degree": 0}, "degree = 0"),
        ({"degree": 3, "decay_rounds": -1}, "decay_rounds = -1"),
        ({"degree": 3, "gradient_space": "both"}, "primal or dual"),
        ({"degree": 3, "mirror": "negative_entropy"}, "only the power map has a degree"),
        ({"mirror": "concave"}, "mirror = 'concave'"),
        ({"forward": torch.log}, "give both or neither"),
    ],
)
def test_degrees_and_maps_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HyperPrism(**arguments)


def test_an_odd_plain_degree_is_the_signed_one():
    plain = start(scattered(HyperPrism(degree=3, signed=False, graph=RING, **QUIET), rows()), 3)
    signed = start(scattered(HyperPrism(degree=3, graph=RING, **QUIET), rows()), 3)
    np.testing.assert_array_equal(plain[0], signed[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 3, "parts": {"a": ["w"], "b": ["conv*"]}}, r"parts.b: 'conv\*' fits no param"),
        ({"degree": 3, "parts": {"a": ["x"]}}, "parts.a: 'x' fits no parameter; there are w"),
        ({"degree": 3, "parts": "halves"}, "parts = 'halves'"),
        ({"degree": {"head": 3}}, "degree names the parts head; the parts are all"),
        ({"degree": [3.0] * 5}, "a list of 5 for 8 devices"),
        ({"degree": "learned", "adaptation": Adaptation(start=20)}, "start = 20"),
    ],
)
def test_parts_and_degrees_must_fit_model_and_devices(arguments, message):
    with pytest.raises(ValueError, match=message):
        start(HyperPrism(**arguments, **QUIET), 1)


def test_every_parameter_needs_a_part():
    strategy = HyperPrism(degree=3, parts={"a": ["w"]}, **QUIET)
    with (
        flower_identity(0),
        pytest.raises(ValueError, match="no pattern fits the parameter 'scale'"),
    ):
        strategy.start(PlainGrid(mixed_app(), 3), _mixed(), num_rounds=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidates": ()}, "at least one degree"),
        ({"candidates": (1, -3)}, "degree = -3"),
        ({"clip": 0}, "clip = 0"),
        ({"start": -1}, "degree = -1"),
    ],
)
def test_ways_to_learn_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Adaptation(**arguments)
