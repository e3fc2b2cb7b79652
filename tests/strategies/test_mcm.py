"""MCM and its family on the grid: degenerate cases (bar 4), bytes, participation (bar 8)."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from strategies.bidirectional import SCHEMES
from strategies.compat import instructions
from strategies.mcm import CompressedSGD
from tests.plain_grid import flower_identity
from tests.strategies.least_squares_worlds import N, least_squares, make_world

ALGORITHMS = sorted(SCHEMES)


def iterates(algorithm, rounds=12, world=None, **options):
    strategy = CompressedSGD(algorithm=algorithm, **{"learning_rate": 0.02} | options)
    return make_world(strategy, **world or {}).run(rounds)


# --- degenerate cases -----------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bar_4_without_compression_every_algorithm_is_sgd_bit_for_bit(algorithm):
    sgd = iterates("sgd")
    found = iterates(algorithm, up="identity", down="identity")
    assert np.array_equal(found, sgd)
    if SCHEMES[algorithm].up_memory:
        found = iterates(algorithm, up="identity", down="identity", starts_at_gradient=True)
        assert np.abs(found - sgd).max() <= 1e-12 * np.abs(sgd).max()


@pytest.mark.parametrize(
    ("one", "options", "other"),
    [
        ("mcm", {"down": "identity"}, "diana"),
        ("rand_mcm", {"down": "identity"}, "diana"),
        ("artemis", {"down": "identity"}, "diana"),
        ("diana", {"down": {"kind": "quantise", "levels": 7}}, "diana"),
        ("diana", {"up_rate": 0.0}, "qsgd"),
        ("artemis", {"up_rate": 0.0}, "bi_qsgd"),
        ("dore", {"feedback": 0.0}, "artemis"),
        ("mcm", {"down_rate": 0.0}, "mcm_no_memory"),
        ("mcm", {"down_rate": 1.0}, "mcm_undamped"),
        ("mcm", {"groups": 0}, "rand_mcm"),
        ("mcm", {"participation": 1.0}, "mcm"),
        ("mcm", {"participants": lambda k, nodes: nodes}, "mcm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_bar_4_one_algorithm_is_another_bit_for_bit(one, options, other):
    assert np.array_equal(iterates(one, **options), iterates(other))


def test_bar_4_with_one_device_rand_mcm_is_mcm():
    world = {"data": least_squares(n_devices=1)}
    assert np.array_equal(iterates("rand_mcm", world=world), iterates("mcm", world=world))


def test_groups_share_messages_and_one_each_is_rand_mcm():
    whole, pairs, own = (iterates("mcm", groups=groups) for groups in (1, 2, N))
    assert np.array_equal(own, iterates("rand_mcm"))
    assert not np.array_equal(pairs, whole)
    assert not np.array_equal(pairs, own)


# --- two executions of one device half -----------------------------------------------------------


def but_one(k, nodes):
    """Everybody but one device takes part from round 2 on."""
    return nodes if k == 1 else [node for node in nodes if node % N != k % N]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_plain_app_with_the_mod_gives_the_models_of_the_vectorised_half(algorithm):
    options = {"momentum": 0.5} if algorithm in ("artemis", "mcm") else {}
    options["participants"] = but_one
    vectorised = iterates(algorithm, 6, **options)
    executors = ("client_app", "plain") if algorithm in ("artemis", "rand_mcm") else ("plain",)
    for executor in executors:
        found = iterates(algorithm, 6, world={"executor": executor}, **options)
        assert np.abs(found - vectorised).max() <= 1e-12 * np.abs(vectorised).max()


def test_levels_may_differ_from_device_to_device():
    up = [{"kind": "quantise", "levels": 1}, {"kind": "quantise", "levels": 8}]
    found = iterates("mcm", up=up)
    assert np.abs(found - iterates("mcm", up=up, world={"executor": "plain"})).max() <= 1e-12
    strategy = CompressedSGD(algorithm="mcm", learning_rate=0.02, up=up)
    world = make_world(strategy)
    world.run(15)
    sizes = np.array([t.bytes_up for t in world.trips()]).reshape(15, N)[1:].mean(0)
    assert sizes[1] > sizes[0] + 1
    assert sizes[3] > sizes[2] + 1


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_bar_2_every_byte_counter_is_the_length_of_real_messages(algorithm, participation):
    """Per direction, device and round: arrays are serialised here, and their bytes counted."""
    strategy = CompressedSGD(algorithm=algorithm, learning_rate=0.01, participation=participation)
    world = make_world(strategy)
    down, up = {}, {}

    def weigh(content):
        records = content.array_records.values()
        return sum(array.numpy().nbytes for record in records for array in record.values())

    configure, aggregate = strategy.configure_train, strategy.aggregate_train

    def configured(k, *args):
        messages = list(configure(k, *args))
        down.update({(k, m.metadata.dst_node_id): weigh(m.content) for m in messages})
        return messages

    def aggregated(k, replies):
        up.update({(k, m.metadata.src_node_id): weigh(m.content) for m in replies})
        return aggregate(k, replies)

    strategy.configure_train, strategy.aggregate_train = configured, aggregated
    world.run(10)
    trips = world.trips()
    assert {(t.round, 1000 + t.device): t.bytes_down for t in trips} == down
    assert {(t.round, 1000 + t.device): t.bytes_up for t in trips} == up
    traffic = world.grid.take_traffic()
    assert (traffic.bytes_down, traffic.bytes_up) == (sum(down.values()), sum(up.values()))
    if SCHEMES[algorithm].up_memory and participation == 1:
        first = {size for (k, _), size in up.items() if k == 1}
        assert first == {6 * 8}  # the first gradient travels whole


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_broadcast_a_shared_message_is_charged_once_and_own_ones_each(algorithm):
    strategy = CompressedSGD(algorithm=algorithm, learning_rate=0.01)
    world = make_world(strategy, broadcasts=True)
    traffic = []
    world.run(6, observe=lambda k: traffic.append(world.grid.take_traffic()))
    down = np.array([t.bytes_down for t in world.trips()]).reshape(6, N)
    up = np.array([t.bytes_up for t in world.trips()]).reshape(6, N)
    charged = down[:, 0] if algorithm != "rand_mcm" else down.sum(1)
    charged[0] = 6 * 8  # the first model is the same for all
    assert [t.bytes_down for t in traffic] == charged.tolist()
    assert [t.bytes_up for t in traffic] == up.sum(1).tolist()


def test_broadcast_what_a_device_missed_is_sent_to_it_alone():
    def participants(k, nodes):
        return nodes[1:] if k in (3, 4) else nodes

    strategy = CompressedSGD(algorithm="artemis", learning_rate=0.01, participants=participants)
    world = make_world(strategy, data=least_squares(d=30), broadcasts=True)
    traffic = []
    world.run(6, observe=lambda k: traffic.append(world.grid.take_traffic().bytes_down))
    sizes = {(t.round, t.device): t.bytes_down for t in world.trips()}
    assert sizes[5, 0] > sizes[5, 1]
    assert traffic[4:] == [sizes[5, 0] + sizes[5, 1], sizes[6, 1]]


# --- partial participation ------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["artemis", "dore", "double_squeeze"])
def test_a_device_that_was_away_is_charged_what_it_missed_up_to_a_full_model(algorithm):
    away = range(3, 9)

    def participants(k, nodes):
        return nodes[1:] if k in away else nodes

    strategy = CompressedSGD(algorithm=algorithm, learning_rate=0.01, participants=participants)
    world = make_world(strategy, data=least_squares(d=30))
    world.run(10)
    down = {(t.round, t.device): t.bytes_down for t in world.trips()}
    one = [down[k, 1] for k in range(3, 10)]  # what the others were sent one by one
    assert down[9, 0] == min(sum(one), 30 * 8)
    assert down[10, 0] == down[10, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "mcmc"}, "'mcmc' is not one of sgd, qsgd"),
        ({"up": {"kind": "quantise", "levels": 0}}, "levels is 0; it must be at least 1"),
        ({"up": "zip"}, "'zip' is not one of"),
        ({"up_rate": 1.5}, "up_rate is 1.5; a rate must be between 0 and 1"),
        ({"down_rate": -0.1}, "down_rate is -0.1; a rate"),
        ({"momentum": 1.0}, r"momentum is 1.0; it must be in \[0, 1\)"),
        ({"participation": 0.0}, "participation is 0.0; it must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"correction": "pp3"}, "correction is 'pp3'"),
        ({"algorithm": "qsgd", "correction": "pp2"}, "memories, which qsgd does not have"),
        ({"groups": -1}, "groups is -1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_with_what_is_valid(options, said):
    with pytest.raises(ValueError, match=said):
        CompressedSGD(**options)


def test_more_coordinates_than_the_model_has_are_refused():
    strategy = CompressedSGD(up={"kind": "top_k", "k": 7}, learning_rate=0.01)
    with pytest.raises(ValueError, match="k is 7, more than the 6 coordinates"):
        make_world(strategy).run(1)


def test_instructions_of_a_round_are_those_that_flower_builds():
    contents = [RecordDict({"config": ConfigRecord({"n": n})}) for n in range(3)]
    with flower_identity(0):
        made = instructions("train", contents, [1003, 1001, 1002])
        plain = [Message(c, n, "train") for c, n in zip(contents, (1003, 1001, 1002), strict=True)]
        assert instructions("train", [], []) == []
    for message, other in zip(made, plain, strict=True):
        mine, theirs = (dict(vars(m.metadata)) for m in (message, other))
        assert mine.pop("_created_at") == pytest.approx(theirs.pop("_created_at"), abs=60)
        assert mine == theirs
        assert vars(message).keys() == vars(other).keys()
        assert message.content is other.content
        assert not message.has_error()
        Message(RecordDict(), reply_to=message)
