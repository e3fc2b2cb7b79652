"""What all peer strategies share: rows, records, lost messages, silent devices, wrong input."""

import copy
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

from strategies.accelerated import ADOM, Mudag
from strategies.arrivals import Arrivals, mix, pair_weights, push_weights, row_weights
from strategies.choco import ChocoSGD
from strategies.common import RowArray, row_records, stack_of
from strategies.gossip import DPSGD
from strategies.hyperprism import HyperPrism
from strategies.pairwise import ADPSGD, SwarmSGD
from strategies.push_sum import SGP, PushDIGing
from strategies.tracking import D2, DSGT, EXTRA
from tests.plain_grid import PlainGrid, flower_identity
from tests.strategies import peer_worlds as q8
from tests.strategies.peer_worlds import D8, RING, DeliveringGrid, start

torch.set_num_threads(1)
MEAN_KEEPING = {
    "dpsgd_pair": lambda **k: DPSGD(lost="pair", **k),
    "dsgt": DSGT,
    "dsgt_atc": lambda **k: DSGT(order="adapt_then_combine", **k),
    "extra": EXTRA,
    "d2": D2,
    "mudag": lambda **k: Mudag(mixing_steps=2, **k),
    "choco": lambda **k: ChocoSGD(k=3, consensus_step=0.2, **k),
    "swarm": SwarmSGD,
}
PUSHING = {"sgp": lambda **k: SGP(fanout="all", **k), "push_diging": PushDIGing}
OTHERS = {
    "dpsgd": DPSGD,
    "dpsgd_atc": lambda **k: DPSGD(order="adapt_then_combine", **k),
    "adom": ADOM,
    "hyperprism": lambda **k: HyperPrism(degree=3, **k),
    "adaptive": HyperPrism,
    "learned": lambda **k: HyperPrism(degree="learned", gradient_space="dual", **k),
}
ALL = MEAN_KEEPING | PUSHING | OTHERS
QUIET = {"fraction_evaluate": 0.0}


def scattered(strategy, rows):
    """Let a strategy start from different models."""
    initial = strategy.initial
    strategy.initial = lambda models, nodes: initial(torch.from_numpy(rows.copy()), nodes)
    return strategy


arrivals = st.builds(
    lambda seed, density, loss: _arrivals(np.random.default_rng(seed), density, loss),
    st.integers(0, 10_000),
    st.floats(0, 1),
    st.floats(0, 1),
)


def _arrivals(rng, density, loss):
    upper = np.triu(rng.random((7, 7)) < density, 1)
    linked = upper | upper.T
    return Arrivals(linked, linked & (rng.random((7, 7)) >= loss))


@given(arrivals)
def test_weights_are_stochastic_whatever_is_lost(found):
    row, pair, push = row_weights(found), pair_weights(found), push_weights(found)
    for weights in (row, pair, push):
        assert (weights >= -1e-15).all()
        assert (np.diag(weights) > 0).all()
        assert not weights[~found.received & ~np.eye(7, dtype=bool)].any()
    np.testing.assert_allclose(row.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(pair.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(pair, pair.T, atol=0)
    np.testing.assert_allclose(push.sum(0), 1, atol=1e-12)


def test_metropolis_weights_of_a_path():
    linked = np.array([[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    weights = row_weights(Arrivals(linked, linked))
    third = 1 / 3
    expected = [[2 / 3, third, 0, 0], [third] * 3 + [0], [0, third, 2 / 3, 0], [0, 0, 0, 1]]
    np.testing.assert_allclose(weights, expected, atol=1e-15)


@given(arrivals, st.sampled_from([torch.float32, torch.float64]))
def test_mixing_leaves_equal_rows_unchanged_to_the_bit(found, dtype):
    rows = torch.randn(5, dtype=dtype).repeat(7, 1)
    assert torch.equal(mix(row_weights(found), rows), rows)


@pytest.mark.parametrize("name", MEAN_KEEPING)
def test_the_mean_stays_whatever_is_lost_on_one_way(name):
    rng = np.random.default_rng(3)
    lost = rng.random((20, 8, 8)) < 0.3
    strategy = scattered(MEAN_KEEPING[name](learning_rate=0.0, **QUIET), q8.B)
    grid = DeliveringGrid(RING, lambda number, i, j: lost[number, i, j])
    models, _ = start(strategy, 8, grid=grid)
    np.testing.assert_allclose(models.mean(0), q8.B.mean(0), atol=1e-12)
    if name not in ("extra", "mudag"):  # which promise nothing on graphs that change
        assert q8.consensus(models) < 0.9 * q8.consensus(q8.B)


@pytest.mark.parametrize("name", PUSHING)
@pytest.mark.parametrize("graph", [D8, RING], ids=["D8", "ring"])
def test_mass_is_kept_whatever_is_lost(name, graph):
    rng = np.random.default_rng(4)
    lost = rng.random((40, 8, 8)) < 0.3
    strategy = scattered(PUSHING[name](learning_rate=0.0, **QUIET), q8.B)
    grid = DeliveringGrid(graph, lambda number, i, j: lost[number, i, j])
    models, _ = start(strategy, 30, grid=grid)
    assert float(strategy.state["weight"].sum()) == pytest.approx(8, abs=1e-12)
    np.testing.assert_allclose(strategy.state["mass"].mean(0), q8.B.mean(0), atol=1e-12)
    assert q8.consensus(models) < 0.05 * q8.consensus(q8.B)


def test_push_sum_loses_exactly_the_steps():
    rng = np.random.default_rng(4)
    lost = rng.random((40, 8, 8)) < 0.3
    strategy = SGP(learning_rate=0.05, fanout="all", **QUIET)
    step, steps = strategy.step, []

    def noted(state, work, found):
        steps.append(work - strategy.models(state))
        return step(state, work, found)

    strategy.step = noted
    start(strategy, 20, grid=DeliveringGrid(D8, lambda number, i, j: lost[number, i, j]))
    moved = torch.stack(steps).sum((0, 1))
    np.testing.assert_allclose(strategy.state["mass"].sum(0), moved, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_equal_models_without_gradients_stay_equal_when_messages_are_lost(name):
    rng = np.random.default_rng(5)
    lost = rng.random((9, 8, 8)) < 0.4
    row = np.tile(rng.standard_normal(10), (8, 1))
    strategy = ALL[name](learning_rate=1e-300, **QUIET)
    if name == "adom":  # starts from its dual rows, not from the models
        pytest.skip("the models of ADOM follow from gradients")
    grid = DeliveringGrid(RING, lambda number, i, j: lost[number, i, j])
    models, _ = start(scattered(strategy, row), 5, grid=grid)
    if name == "choco":  # public copies begin at 0
        assert q8.consensus(models) < 0.5
        return
    np.testing.assert_allclose(models, row, rtol=1e-14)
    if name in ("dpsgd", "dpsgd_pair", "dpsgd_atc", "swarm", "extra"):
        assert (models == row).all()


@pytest.mark.parametrize("name", ALL)
def test_a_device_without_reply_keeps_its_row(name):
    strategy = ALL[name](learning_rate=0.01, graph=RING, **QUIET)
    grid = DeliveringGrid(RING, lambda *_: False, lambda number, i: number == 3 and i in (2, 5))
    start(strategy, 2, grid=grid)
    seen = {k: v.clone() for k, v in strategy.state.items()}
    strategy = ALL[name](learning_rate=0.01, graph=RING, **QUIET)
    start(strategy, 3, grid=grid)
    for key, value in strategy.state.items():
        assert torch.equal(value[[2, 5]], seen[key][[2, 5]]), key
    moved = strategy.models(strategy.state) != strategy.models(seen)
    assert bool(moved[[0, 1, 3, 4]].any(1).all())


@pytest.mark.parametrize("name", sorted(set(ALL) - {"swarm", "adaptive"}))
def test_devices_are_treated_alike(name):
    """Relabelling devices relabels the models."""
    order = np.random.default_rng(6).permutation(8)
    graph = nx.relabel_nodes(RING, {i: int(np.argwhere(order == i)[0, 0]) for i in RING})
    moved = nx.Graph()
    moved.add_nodes_from(range(8))
    moved.add_edges_from(graph.edges)
    found = []
    for links, h, b in ((RING, q8.H, q8.B), (moved, q8.H[order], q8.B[order])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(q8, "H", h)
            patch.setattr(q8, "B", b)
            found.append(start(ALL[name](learning_rate=0.03, graph=links, **QUIET), 6)[0])
    np.testing.assert_allclose(found[1], found[0][order], rtol=1e-7, atol=1e-9)


def test_the_network_says_who_mixes_with_whom():
    """Without a graph of its own a strategy follows `delivery`."""
    there = start(DPSGD(learning_rate=0.05, **QUIET), 9, grid=DeliveringGrid(q8.tv8, lambda *_: 0))
    here = start(DPSGD(learning_rate=0.05, graph=q8.tv8, **QUIET), 9)
    np.testing.assert_array_equal(there[0], here[0])


def test_everything_arrives_and_everybody_is_a_neighbour_in_a_plain_app():
    models, _ = start(DPSGD(learning_rate=0.05, order="adapt_then_combine", **QUIET), 5)
    assert q8.consensus(models) < 1e-28


EXCHANGES = {
    "dpsgd": ("with", None, {}),
    "dpsgd_atc": ("after", None, {}),
    "dsgt": ("after", 160, {}),
    "extra": ("after", None, {}),
    "d2": ("after", None, {}),
    "mudag": ("after", 160, {}),
    "adom": ("after", 160, {}),
    "choco": ("after", 3 * (8 + 1), {}),
    "swarm": ("after", None, {"fanout": "pairwise"}),
    "sgp": ("after", 88, {}),
    "push_diging": ("after", 168, {}),
    "hyperprism": ("after", None, {}),
    "learned": ("with", None, {}),
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_instructions_say_how_models_travel_and_what_they_weigh(name):
    when, size, more = EXCHANGES[name]
    grid = DeliveringGrid(RING, lambda *_: False)
    start(ALL[name](learning_rate=0.01, **QUIET), 1, grid=grid)
    expected = {"kind": "neighbours", "when": when} | more
    if size is not None:
        expected["payload_bytes"] = size
    assert all(dict(record) == expected for record in grid.exchanges)


def test_a_graph_fills_in_the_peers_even_if_there_are_none():
    graph = nx.Graph([(0, 1), (1, 2)])
    graph.add_nodes_from(range(8))
    grid = DeliveringGrid(graph, lambda *_: False)
    start(DPSGD(learning_rate=0.01, graph=graph, **QUIET), 1, grid=grid)
    peers = [record["peers"] for record in grid.exchanges]
    assert peers == [[1001], [1000, 1002], [1001], [], [], [], [], []]


def test_sgp_leaves_the_one_peer_to_the_network():
    grid = DeliveringGrid(q8.one_peer, lambda *_: False)
    models, _ = start(SGP(learning_rate=0.05, **QUIET), 6, grid=grid)
    assert grid.exchanges[0]["fanout"] == "one-peer"
    assert grid.exchanges[0]["order"] == "exponential"
    np.testing.assert_array_equal(models, start(SGP(learning_rate=0.05, **QUIET), 6)[0])


# --- rows and records -----------------------------------------------------------------------------


def mixed_app(fails=()):
    """Return an app that adds its number + 1 to every array."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        i = context.node_config["partition-id"] + 1
        if i - 1 in fails:
            return Message(Error(1, "boom"), reply_to=message)
        record = ArrayRecord()
        for key, array in message.content["arrays"].items():
            value = array.numpy()
            record[key] = Array(np.asarray(value + np.asarray(i, value.dtype)))
        metrics = MetricRecord({"num-examples": i, "train_loss": float(i)})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        value = float(message.content["arrays"]["scale"].numpy())
        metrics = MetricRecord({"num-examples": 1, "eval_accuracy": value})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def mixed_arrays():
    record = ArrayRecord()
    record["seen"] = Array(np.asarray(7, np.int64))
    record["w"] = Array(np.ones((2, 3), np.float32))
    record["scale"] = Array(np.asarray(2.0, np.float64))
    return record


def test_types_shapes_and_order_are_kept_and_counters_are_not_mixed():
    strategy = DPSGD(learning_rate=0.1, order="adapt_then_combine")
    with flower_identity(0):
        result = strategy.start(PlainGrid(mixed_app(), 3), mixed_arrays(), num_rounds=1)
    assert list(result.arrays) == ["seen", "w", "scale"]
    assert [a.dtype for a in result.arrays.values()] == ["int64", "float32", "float64"]
    assert [tuple(a.shape) for a in result.arrays.values()] == [(), (2, 3), ()]
    assert strategy.device_models["seen"].tolist() == [8, 9, 10]
    assert result.arrays["seen"].numpy() == 9
    np.testing.assert_allclose(strategy.device_models["w"].numpy(), 3.0, rtol=1e-6)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["train_loss"] == pytest.approx(14 / 6)
    assert result.evaluate_metrics_clientapp[1]["eval_accuracy"] == pytest.approx(4.0)


def test_error_replies_and_empty_rounds_are_survived():
    strategy = DPSGD(learning_rate=0.1, fraction_evaluate=0.5)
    with flower_identity(0):
        strategy.start(PlainGrid(mixed_app(fails={1}), 3), mixed_arrays(), num_rounds=2)
        assert strategy.device_models["w"][1].flatten().tolist() == [1.0] * 6
        assert strategy.aggregate_train(3, []) == (None, None)


def test_nothing_that_was_given_is_changed():
    config = ConfigRecord({"learning-rate": 0.1, "local-epochs": 3})
    initial = mixed_arrays()
    kept = copy.deepcopy(initial)
    strategy = HyperPrism(degree=3, local_steps=2, **QUIET)
    grid = PlainGrid(mixed_app(), 3)
    with flower_identity(0):
        strategy._forget()
        messages = list(strategy.configure_train(1, initial, config, grid))
        sent = copy.deepcopy([m.content["arrays"] for m in messages])
        replies = grid.send_and_receive(messages)
        before = copy.deepcopy([dict(r.content["arrays"]) for r in replies])
        strategy.aggregate_train(1, replies)
    assert dict(config) == {"learning-rate": 0.1, "local-epochs": 3}
    assert messages[0].content["config"]["local-steps"] == 2
    assert "local-epochs" not in messages[0].content["config"]
    for old, new in [
        (kept, initial),
        *zip(before, [r.content["arrays"] for r in replies], strict=True),
    ]:
        assert all((old[k].numpy() == new[k].numpy()).all() for k in old)
    for old, message in zip(sent, messages, strict=True):
        assert all((old[k].numpy() == message.content["arrays"][k].numpy()).all() for k in old)


def test_a_late_device_joins_with_the_mean_model_in_its_place():
    grid = PlainGrid(mixed_app(), 3)
    all_nodes = list(grid.contexts)
    grid.get_node_ids = lambda: [all_nodes[0], all_nodes[2]]
    strategy = DPSGD(learning_rate=0.1, **QUIET)
    with flower_identity(0):
        arrays = mixed_arrays()
        arrays, _ = strategy.aggregate_train(
            1, grid.send_and_receive(strategy.configure_train(1, arrays, ConfigRecord(), grid))
        )
        grid.get_node_ids = lambda: all_nodes
        strategy.configure_train(2, arrays, ConfigRecord(), grid)
    assert strategy.nodes == all_nodes
    np.testing.assert_allclose(strategy.device_models["w"][:, 0, 0].numpy(), [2, 3, 4])
    assert strategy.device_models["seen"].tolist() == [8, 9, 10]


def test_rows_are_serialised_only_when_asked():
    stack = torch.arange(12.0).reshape(3, 2, 2)
    (record,) = row_records({"w": stack}, [1])
    array = record["w"]
    assert isinstance(array, RowArray)
    assert "data" not in vars(array)
    assert array.numpy().tolist() == [[4, 5], [6, 7]]
    plain = Array(stack[1].numpy())
    assert array.data == plain.data
    assert array.deflate() == plain.deflate()
    assert copy.deepcopy(array) == plain
    assert copy.copy(array).stack is stack
    with flower_identity(0):
        question = Message(RecordDict(), dst_node_id=1, message_type="train")
        replies = [
            Message(RecordDict({"arrays": r}), reply_to=question)
            for r in row_records({"w": stack}, [0, 1, 2])
        ]
    assert stack_of(replies)["w"] is stack


# --- wrong input ----------------------------------------------------------------------------------


def test_an_app_that_ignores_the_mode_is_told():
    with flower_identity(0), pytest.raises(ValueError, match="ignores 'mode'"):
        EXTRA(learning_rate=0.1).start(PlainGrid(mixed_app(), 3), mixed_arrays(), num_rounds=1)


def test_a_learning_rate_comes_from_the_train_config_or_is_asked_for():
    given, _ = start(EXTRA(learning_rate=0.05, graph=RING, **QUIET), 4)
    found, _ = start(EXTRA(graph=RING, **QUIET), 4, config={"learning-rate": 0.05})
    np.testing.assert_array_equal(given, found)
    with pytest.raises(ValueError, match="learning_rate: give the strategy one"):
        start(EXTRA(graph=RING, **QUIET), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPSGD(graph=nx.path_graph(5)), "0 to 7; in one and not the other: 5, 6, 7"),
        (lambda: DPSGD(graph=lambda _: nx.path_graph(9)), "not the other: 8"),
    ],
)
def test_a_graph_of_other_devices_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        start(make(), 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPSGD(graph=nx.Graph([("a", "b")])), "nodes must be the devices"),
        (lambda: DPSGD(learning_rate=-1), "learning_rate = -1"),
        (lambda: DPSGD(local_steps=0), "local_steps = 0"),
        (lambda: DPSGD(fraction_evaluate=2), "fraction_evaluate = 2"),
        (lambda: DPSGD(order="both"), "combine_then_adapt or adapt_then_combine"),
        (lambda: DPSGD(lost="found"), "own or pair"),
        (lambda: DSGT(order="both"), "combine_then_adapt or adapt_then_combine"),
        (lambda: SGP(fanout="some"), "one-peer or all"),
        (lambda: Mudag(condition=0.5), "condition = 0.5"),
        (lambda: Mudag(mixing_steps=0), "mixing_steps = 0"),
        (lambda: ADOM(graph_condition=0.1), "graph_condition = 0.1"),
        (lambda: ChocoSGD(consensus_step=0), "consensus_step = 0"),
        (lambda: ChocoSGD(share=1.5), "share = 1.5"),
        (lambda: ChocoSGD(k=0), "k = 0"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- pairs ----------------------------------------------------------------------------------------


def test_a_random_pair_contracts_the_distance_as_expected():
    """One random pair of eight averages: by 1 - 1/7 in expectation."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 3))
    x -= x.mean(0)
    first, second = rng.integers(8, size=20_000), rng.integers(7, size=20_000)
    second += second >= first
    middle = (x[first] + x[second]) / 2
    lost = (x[first] ** 2 + x[second] ** 2 - 2 * middle**2).sum(1)
    assert 1 - lost.mean() / (x**2).sum() == pytest.approx(1 - 1 / 7, rel=0.01)


def test_swarm_averages_disjoint_random_pairs():
    strategy = scattered(SwarmSGD(learning_rate=0.0, seed=3, **QUIET), q8.B)
    models, _ = start(strategy, 1)
    pairs = {tuple(sorted(np.argwhere((models == row).all(1)).ravel())) for row in models}
    assert all(len(pair) == 2 for pair in pairs)
    for i, j in pairs:
        np.testing.assert_allclose(models[i], (q8.B[i] + q8.B[j]) / 2, atol=1e-15)
    ring, _ = start(scattered(SwarmSGD(learning_rate=0.0, graph=RING, **QUIET), q8.B), 1)
    pairs = {tuple(np.argwhere((ring == row).all(1)).ravel()) for row in ring}
    assert {pair for pair in pairs if len(pair) == 2} <= {(i, i + 1) for i in range(7)} | {(0, 7)}


class ClockGrid(PlainGrid):
    """A plain grid with a clock: device i needs `seconds[i]` for an instruction."""

    def __init__(self, seconds):
        super().__init__(q8.q8_app(), len(seconds))
        self.seconds, self.now, self.due = seconds, 0.0, {}

    def push_messages(self, messages):
        messages = list(messages)
        ids = super().push_messages(messages)
        for message, i in zip(messages, ids, strict=True):
            self.due[i] = self.now + self.seconds[message.metadata.dst_node_id - 1000]
        return ids

    def pull_messages(self, message_ids):
        self.now = max(self.now, min((self.due[i] for i in message_ids), default=self.now))
        ready = [i for i in message_ids if self.due[i] <= self.now]
        return super().pull_messages(ready)

    def send_and_receive(self, messages, *, timeout=None):
        ids = self.push_messages(messages)
        self.now = max((self.due[i] for i in ids), default=self.now)
        return self.pull_messages(ids)


def test_adpsgd_without_gradients_only_averages():
    strategy = scattered(ADPSGD(learning_rate=0.0, **QUIET), q8.B)
    step, seen = strategy.step, [q8.consensus(q8.B)]

    def noted(state, work, found):
        new = step(state, work, found)
        seen.append(q8.consensus(new["models"].numpy()))
        return new

    strategy.step = noted
    models, _ = start(strategy, 6, grid=ClockGrid([1.0] * 8))
    np.testing.assert_allclose(models.mean(0), q8.B.mean(0), atol=1e-12)
    assert len(seen) == 49
    assert all(b <= a + 1e-15 for a, b in pairwise(seen))
    assert seen[-1] < 0.1 * seen[0]


def time_to(strategy, seconds, target):
    """Return the virtual time at which the mean model is that good."""
    grid, times = ClockGrid(seconds), []

    def evaluate(_, arrays):
        if q8.error(arrays["w"].numpy()[None]) < target:
            times.append(grid.now)

    with flower_identity(0):
        strategy.start(
            grid, ArrayRecord({"w": Array(np.zeros(10))}), num_rounds=40, evaluate_fn=evaluate
        )
    return times[0]


def test_one_slow_device_does_not_hold_up_adpsgd():
    """The others' problems do not depend on it much: less than twice the time; D-PSGD: ten."""
    even, uneven = [1.0] * 8, [1.0] * 5 + [10.0] + [1.0] * 2
    asynchronous = [time_to(ADPSGD(learning_rate=0.05, **QUIET), s, 0.3) for s in (even, uneven)]
    assert asynchronous[1] < 2 * asynchronous[0]
    synchronous = [time_to(DPSGD(learning_rate=0.05, **QUIET), s, 0.3) for s in (even, uneven)]
    assert synchronous[1] == pytest.approx(10 * synchronous[0])


def test_adpsgd_records_a_round_for_as_many_gradients_as_devices():
    strategy = ADPSGD(learning_rate=0.05, graph=q8.tv8, **QUIET)
    models, result = start(strategy, 5, grid=ClockGrid([1.0] * 7 + [3.0]))
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(result.arrays["w"].numpy(), models.mean(0), atol=1e-12)
    again, _ = start(
        ADPSGD(learning_rate=0.05, graph=q8.tv8, **QUIET), 5, grid=ClockGrid([1.0] * 7 + [3.0])
    )
    np.testing.assert_array_equal(models, again)
