"""`compression:` in a scenario."""

import pytest

import fedsim
from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario, json_schema
from fedsim.simulation import build, check

PARAMETERS = 64 * 10 + 10


def scenario(**changes):
    base = {
        "rounds": 3,
        "data": {"dataset": "digits", "devices": 6},
        "training": {"local_epochs": 1, "batch_size": 32, "learning_rate": 0.3},
        "strategies": {"linear": {"kind": "fedavg"}},
    }
    return Scenario.from_mapping(base | changes)


def rounds_of(made, name="linear"):
    return fedsim.run(made).strategies[name].rounds


def test_every_strategy_of_a_scenario_is_compressed_unless_it_says_otherwise():
    made = scenario(
        compression={"up": {"kind": "quantise", "levels": 4}, "down": "cast"},
        strategies={
            "linear": {"kind": "fedavg"},
            "half": {"kind": "fedavg", "compression": {"down": {"dtype": "float16"}}},
            "adam": {"kind": "fedadam", "eta": 0.05},
            "none": {"kind": "fedavg", "compression": None},
        },
    )
    results = fedsim.run(made).strategies
    dense = 6 * 4 * PARAMETERS
    first = {name: result.rounds[0] for name, result in results.items()}
    assert [first[n].bytes_down for n in ("linear", "half", "none")] == [dense, dense / 2, dense]
    assert first["none"].bytes_up == dense
    assert first["linear"].bytes_up < dense / 5
    for result in results.values():
        assert result.rounds[-1].eval_accuracy > result.rounds[0].eval_accuracy - 0.05
        assert result.summary["bytes_total"] == sum(r.bytes_total for r in result.rounds)


def test_a_broadcast_downlink_counts_what_is_the_same_for_all_once():
    dense = 4 * PARAMETERS
    down = {"kind": "quantise", "levels": 4}
    given = {"kind": "fedavg"}, {"kind": "fedavg", "compression": {"down": down}}
    rand = {"kind": "compressed_sgd", "algorithm": "rand_mcm"}
    strategies = {"plain": given[0], "coded": given[1], "rand": rand}
    world = {"server_bandwidth": "8 kbit/s", "kind": "star", "bandwidth": "1 Gbit/s", "latency": 0}

    def runs(downlink):
        made = scenario(strategies=strategies, topology=world, network={"downlink": downlink})
        return fedsim.run(made).strategies

    each, once = runs("unicast"), runs("broadcast")
    for name in strategies:
        assert each[name].rounds[0].bytes_down == 6 * once[name].rounds[0].bytes_down == 6 * dense
        assert [r.eval_loss for r in each[name].rounds] == [r.eval_loss for r in once[name].rounds]
    for name in ("plain", "coded"):
        for one, other in zip(each[name].rounds, once[name].rounds, strict=True):
            assert one.bytes_down == 6 * other.bytes_down
    # messages of their own are charged to each device
    own = [[r.bytes_down for r in runs["rand"].rounds[1:]] for runs in (each, once)]
    assert own[0] == own[1]
    saved = [each[n].rounds[0].virtual_time - once[n].rounds[0].virtual_time for n in strategies]
    assert saved == pytest.approx([5 * dense / 1000] * 3, rel=1e-3)


def test_results_do_not_depend_on_the_executor():
    options = {"compression": {"up": {"kind": "top_k", "fraction": 0.1}, "down": "quantise"}}
    both = [rounds_of(scenario(executor=kind, **options)) for kind in ("vectorised", "client_app")]
    for one, other in zip(*both, strict=True):
        assert one.bytes_down == other.bytes_down
        assert one.bytes_up == pytest.approx(other.bytes_up, rel=0.01)
        assert one.eval_loss == pytest.approx(other.eval_loss, rel=1e-3)


def test_devices_clip_what_is_then_encoded():
    private = {"kind": "dp_client_fixed", "noise_multiplier": 1e-6, "clipping_norm": 0.5}
    private |= {"num_sampled_clients": 6, "strategy": {"kind": "fedavg"}}
    made = scenario(compression={"up": "natural", "down": "natural"}, strategies={"p": private})
    rounds = rounds_of(made, "p")
    assert rounds[-1].devices_replied == 6
    assert rounds[-1].bytes_up == 6 * (-(-9 * 640 // 8) + -(-9 * 10 // 8))
    assert rounds[-1].eval_loss < rounds[0].eval_loss


def test_gossip_may_be_compressed_where_it_sends_models_after_the_work():
    made = scenario(
        topology={"kind": "ring"},
        compression={"up": {"kind": "cast", "dtype": "bfloat16"}},
        strategies={"g": {"kind": "gossip", "order": "adapt_then_combine"}},
    )
    rounds = rounds_of(made, "g")
    assert rounds[0].bytes_peer == 6 * 2 * 2 * PARAMETERS
    assert rounds[-1].eval_accuracy > 0.3


def test_what_is_resolved_loads_back():
    made = scenario(compression={"up": "quantise"})
    spelled = made.resolved()["compression"]["up"]
    assert spelled == {
        "kind": "quantise",
        "block": 0,
        "levels": 1,
        "encoding": "sparse",
        "precision": "float32",
    }
    assert Scenario.from_mapping(made.resolved()) == made
    assert "compressor" in json_schema()["$defs"]


@pytest.mark.parametrize(
    ("compression", "said"),
    [
        ({}, "compression: give up, down or both"),
        ("quantise", "compression: 'quantise' should be a mapping"),
        ({"up": "zip"}, "compression.up: 'zip' is no compressor"),
        ({"up": "quantize"}, "did you mean 'quantise'"),
        ({"up": {"kind": "quantise", "levels": 0}}, "compression.up.*levels is 0.*at least 1"),
        ({"up": {"kind": "quantise", "level": 2}}, "compression.up.level: unknown key"),
        ({"up": {"kind": "quantise", "levels": "x"}}, "compression.up.levels: 'x'"),
        ({"down": "sign", "down_rate": 1.5}, "compression.down_rate: 1.5"),
        ({"up": "sign", "down_rate": 0.5}, "down_rate needs down"),
        ({"down": "sign", "error_feedback": True}, "error_feedback needs up"),
        ({"up": {"kind": "top_k", "k": 0}}, "compression.up: k is 0"),
        ({"upp": "sign"}, "compression.upp: unknown key; did you mean 'up'"),
    ],
    ids=str,
)
def test_wrong_compression_is_refused_with_its_place_and_what_is_valid(compression, said):
    with pytest.raises(ScenarioError, match=said):
        scenario(compression=compression)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"compression": {"up": {"kind": "top_k", "k": 11}}},
            "strategies.linear: compression: up: k is 11, more than the 10 coordinates",
        ),
        (
            {"strategies": {"m": {"kind": "compressed_sgd", "up": {"kind": "top_k", "k": 11}}}},
            "strategies.m: up: k is 11, more than the 10",
        ),
        (
            {"strategies": {"m": {"kind": "compressed_sgd", "up": ["sign", {"kind": "zip"}]}}},
            r"strategies.m: .*up\[1\]: compressor 'zip' is not one of cast",
        ),
        (
            {"strategies": {"m": {"kind": "compressed_sgd", "algorithm": "diana", "groups": 3}}},
            "groups is 3, but diana has no downlink memory",
        ),
        (
            {"compression": {"up": "sign"}, "strategies": {"m": {"kind": "compressed_sgd"}}},
            "strategies.m: compression: CompressedSGD compresses its messages itself",
        ),
    ],
    ids=["too many", "too many in mcm", "one of a list", "unused", "twice"],
)
def test_what_only_building_shows_is_refused_as_well(changes, said):
    with pytest.raises(ScenarioError, match=said):
        check(scenario(**changes))


@pytest.mark.parametrize(
    ("up", "said"),
    [
        (5, "m.up: 5 should be a valid string or a mapping (key: value) or a valid array"),
        (["sign", 5], "m.up.1: 5 should be a valid string or a mapping (key: value)"),
    ],
    ids=["not in a list", "in a list"],
)
def test_a_value_that_is_none_of_several_things_is_one_problem(up, said):
    with pytest.raises(ScenarioError) as caught:
        scenario(strategies={"m": {"kind": "compressed_sgd", "up": up}})
    assert str(caught.value).endswith(said)


def test_divergence_is_reported_and_no_number_is_nan():
    strategies = {
        "mcm": {"kind": "compressed_sgd", "algorithm": "mcm_no_memory", "learning_rate": 1e5},
        "avg": {"kind": "fedavg", "training": {"learning_rate": 1e20}},
    }
    made = scenario(
        rounds=30,
        strategies=strategies,
        data={"dataset": "least_squares", "devices": 4, "partition": {"kind": "natural"}},
        model="linear_regression",
    )
    for name in strategies:
        result = fedsim.run(made).strategies[name]
        assert result.summary["diverged"] is True
        assert all(v == v for v in result.summary.values())
    assert build(made, "mcm").strategy.scheme.down_rate == 0.0
