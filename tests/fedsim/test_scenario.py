import json
import pickle
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim import registry
from fedsim.errors import ScenarioError
from fedsim.scenario import Scenario, json_schema, load_scenario
from fedsim.sections import (
    Data,
    Devices,
    Evaluation,
    Lognormal,
    NetworkOptions,
    Record,
    Stop,
    Topology,
    Training,
    draw,
)

SMALL = """\
name: small
rounds: 3
data: {devices: 4, partition: {kind: dirichlet, alpha: 0.3}}
strategies:
  linear: {kind: fedavg}
"""


@pytest.fixture
def load(tmp_path):
    def load(text, *overrides):
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return load_scenario(path, overrides)

    return load


@pytest.fixture
def said(load):
    """Return the error message of a scenario, without the name of the file."""

    def said(text, *overrides):
        with pytest.raises(ScenarioError) as error:
            load(text, *overrides)
        return str(error.value).partition("file.yaml")[2] or str(error.value)

    return said


def test_defaults_are_filled_in(load):
    scenario = load(SMALL)
    assert scenario.name == "small"
    assert scenario.data.partition.spec() == {"kind": "dirichlet", "alpha": 0.3, "min_samples": 1}
    assert scenario.training.local_epochs == 1
    assert scenario.training.local_steps is None
    assert scenario.evaluation.cost == "free"
    assert scenario.devices.speed.arguments == {"value": "500 samples/s"}
    assert scenario.strategies["linear"].arguments["fraction_train"] == 1.0


def test_the_name_defaults_to_the_file(load):
    assert load(SMALL.replace("name: small\n", "")).name == "file"


FULL = """\
name: "every key: a 'test'"
seed: 11
rounds: 7
stop: {accuracy: 0.9, time: 2 h, traffic: 1 GB}
data:
  dataset: {kind: digits}
  devices: 12
  partition: {kind: pathological, classes_per_device: 3}
  test_fraction: 0.2
  validation_fraction: 0.1
model: {kind: mlp, hidden: [64, 32]}
training: {learning_rate: 1e-2, batch_size: 0, local_steps: 5, momentum: 0.9, nesterov: true,
  weight_decay: 1e-4, clip_norm: 10, drop_last: true}
devices:
  speed: {kind: classes, classes: {phone: {share: 0.75, speed: 200 samples/s},
    hub: {share: 0.25, speed: 2 ksamples/s, sigma: 0.3}}}
  availability: {kind: on_off, mean_on: 10 min, mean_off: 90 s}
topology:
  kind: star
  bandwidth: 20 MB/s
  latency: {kind: uniform, low: 5 ms, high: 0.1 s}
  uplink: {kind: lognormal, median: 2 Mbit/s, sigma: 0.7}
  downlink: {kind: choice, values: [10 Mbit/s, 1 Gbit/s]}
  server_bandwidth: 100 Mbit/s
links: {kind: on_off, mean_up: 60 s, mean_down: 20 s}
network: {message_loss: 0.05, loss_reply: error, link_down: fail, header_bytes: 40,
  accounting: flower}
round_timeout: 2 min
evaluation: {every: 1, on: devices, cost: free, target: 0.8}
executor: {kind: vectorised, chunk: 8}
record: {transfers: true}
strategies:
  prox: {kind: fedprox, proximal_mu: 0.5, min_train_nodes: 12}
  slow:
    kind: fedavg
    topology: {bandwidth: 1 kbit/s}
    training: {local_epochs: 2}
    links: constant
    round_timeout: 1 h
  private:
    kind: dp_server_fixed
    noise_multiplier: 0.1
    clipping_norm: 5
    num_sampled_clients: 12
    strategy: {kind: fedadam, eta: 0.01}
  fair: {kind: qfedavg, q: 0.2}
  bare: flwr.serverapp.strategy:FedAvg
"""


def test_the_resolved_scenario_loads_back_equal(load):
    scenario = load(FULL)
    text = scenario.to_yaml(versions={"fedsim": "1.2.3"})
    assert yaml.safe_load(text)["versions"] == {"fedsim": "1.2.3"}
    again = load(text)
    assert again == scenario
    assert again.resolved() == scenario.resolved()


def test_the_resolved_scenario_shows_units_as_text(load):
    resolved = load(FULL).resolved()
    json.dumps(resolved, allow_nan=False)
    assert resolved["topology"]["bandwidth"] == "160 Mbit/s"
    assert resolved["topology"]["latency"] == {"kind": "uniform", "low": "5 ms", "high": "100 ms"}
    assert resolved["stop"] == {"accuracy": 0.9, "time": "2 h", "traffic": "1 GB"}
    assert resolved["round_timeout"] == "2 min"
    assert resolved["training"]["learning_rate"] == 0.01


def test_bytes_per_second_become_bits_and_never_more(load):
    assert load(FULL).topology.bandwidth == 160e6


def test_a_scenario_survives_pickling(load):
    scenario = load(FULL)
    assert pickle.loads(pickle.dumps(scenario)) == scenario


def test_a_scenario_is_frozen(load):
    with pytest.raises(ValueError, match="frozen"):
        load(SMALL).rounds = 4


def test_constructor_arguments_are_filled_from_the_scenario(load):
    scenario = load(FULL)
    assert scenario.strategies["fair"].arguments["client_learning_rate"] == 0.01
    explicit = load(FULL, "strategies.fair.client_learning_rate=0.5")
    assert explicit.strategies["fair"].arguments["client_learning_rate"] == 0.5


def test_federated_evaluation_is_off_unless_asked_for(load):
    off = load(FULL, "evaluation={on: global_test}").strategies
    assert off["prox"].arguments["fraction_evaluate"] == 0.0
    assert off["private"].arguments["strategy"]["fraction_evaluate"] == 0.0
    assert load(FULL).strategies["prox"].arguments["fraction_evaluate"] == 1.0
    asked = load(SMALL, "strategies.linear.fraction_evaluate=0.5")
    assert asked.strategies["linear"].arguments["fraction_evaluate"] == 0.5


def test_evaluation_on_devices_is_charged_by_default(load):
    assert load(SMALL, "evaluation.on=devices").evaluation.cost == "charged"


def test_a_strategy_overrides_its_world_and_nothing_else(load):
    scenario = load(FULL)
    world = scenario.strategy_world("slow")
    assert list(world.strategies) == ["slow"]
    assert world.strategies["slow"].world == {}
    assert world.topology.bandwidth == 1000.0
    assert world.topology.latency == scenario.topology.latency
    assert (world.training.local_epochs, world.training.local_steps) == (2, None)
    assert world.training.momentum == 0.9
    assert world.links.spec() == {"kind": "constant"}
    assert world.round_timeout == 3600.0
    assert (world.data, world.devices, world.seed) == (
        scenario.data,
        scenario.devices,
        scenario.seed,
    )
    assert scenario.strategy_world("prox").topology == scenario.topology


def test_a_mapping_of_another_kind_replaces(load):
    world = load(FULL, "strategies.slow.model={kind: softmax}").strategy_world("slow")
    assert world.model.spec() == {"kind": "softmax"}


def test_constructor_arguments_follow_the_strategys_own_training(load):
    scenario = load(FULL, "strategies.fair.training={learning_rate: 0.3}")
    assert scenario.strategies["fair"].arguments["client_learning_rate"] == 0.3


def test_an_unknown_strategy_world_names_the_strategies(load):
    with pytest.raises(ScenarioError, match="did you mean 'prox'"):
        load(FULL).strategy_world("pro")


# ── overrides ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.learning_rate=0.05", lambda s: s.training.learning_rate == 0.05),
        ("training.local_steps=3", lambda s: s.training.local_epochs is None),
        ("stop.time=1 h", lambda s: s.stop.time == 3600),
        ("data.dataset.kind=digits", lambda s: s.data.dataset.kind == "digits"),
        ("model=mlp", lambda s: s.model.kind == "mlp"),
        ("data.partition.kind=iid", lambda s: "alpha" not in s.data.partition.arguments),
        ("strategies.linear.fraction_train=0.5", lambda s: True),
        ("strategies.more=fedmedian", lambda s: list(s.strategies) == ["linear", "more"]),
        ("strategies={only: {kind: fedavg}}", lambda s: list(s.strategies) == ["only"]),
        ("name=a=b", lambda s: s.name == "a=b"),
        ("topology.bandwidth=20 MB/s", lambda s: s.topology.bandwidth == 160e6),
        ("devices.speed.value=9 samples/s", lambda s: s.devices.speed.kind == "constant"),
        ("round_timeout=", lambda s: s.round_timeout is None),
    ],
)
def test_any_key_can_be_overridden(load, override, read):
    assert read(load(SMALL, override))


def test_a_strategy_whose_name_has_dots_can_be_overridden(load):
    text = SMALL.replace("linear:", "lr0.1:")
    scenario = load(text, "strategies.lr0.1.fraction_train=0.5")
    assert scenario.strategies["lr0.1"].arguments["fraction_train"] == 0.5


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.learnin_rate=1",
            "--set training.learnin_rate=1: training.learnin_rate: unknown key; "
            "did you mean 'learning_rate'?",
        ),
        ("trainig.momentum=0.5", "--set trainig.momentum=0.5: trainig: unknown key; did you mean"),
        ("rounds", "--set rounds: write KEY=VALUE"),
        ("=3", "--set =3: write KEY=VALUE"),
        ("rounds.a=3", "--set rounds.a=3: rounds is 3, not a mapping"),
        ("rounds=-1", "--set rounds=-1: rounds: -1 should be greater than or equal to 1"),
        ("name=[", "--set name=[, line 1, column 2: not valid YAML"),
        ("topology.bandwidth=20", "20 has no unit; write for example '20 Mbit/s'"),
    ],
)
def test_wrong_overrides_are_named(said, override, expected):
    assert expected in said(SMALL, override)


# ── mistakes of a newcomer ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trainnig: {}", "line 6: trainnig: unknown key; did you mean 'training'? Valid: name,"),
        ("training: {learning_rte: 1}", "training.learning_rte: unknown key; did you mean 'learn"),
        ("learning_rate: 1", "learning_rate: unknown key; did you mean 'training.learning_rate'?"),
        ("network: {uplink: 5 Mbit/s}", "network.uplink: unknown key; did you mean 'topology.upl"),
        ("training: {partition: iid}", "training.partition: unknown key; did you mean 'data.part"),
        ("topology: {kind: star, bandwidth: 20}", "20 has no unit; write for example '20 Mbit/s'"),
        (
            "topology: {kind: star, bandwidth: 20 Mb/s}",
            "topology.bandwidth: '20 Mb/s' is not a bandwidth: write '20 Mbit/s' for bits or "
            "'20 MB/s' for bytes",
        ),
        ("topology: {kind: star, bandwidth: 0}", "bandwidth: 0 should be greater than 0"),
        ("topology: {kind: star, devices: 5}", "topology.devices: 'devices' is filled in by"),
        ("topology: {kind: star, bandwidht: 1}", "did you mean 'bandwidth'?"),
        ("topology: {kind: stra}", "topology.kind: 'stra' is no topology; did you mean 'star'?"),
        (
            "topology: {kind: star, bandwidth: {kind: lognorml, median: 1 Mbit/s}}",
            "topology.bandwidth: 'kind' is 'lognorml'; one of: lognormal, uniform, choice",
        ),
        (
            "topology: {kind: star, bandwidth: {kind: uniform, low: 2 Mbit/s, high: 1 Mbit/s}}",
            "topology.bandwidth: low is above high",
        ),
        ("training: {local_epochs: 1, local_steps: 2}", "give local_epochs or local_steps, not"),
        ("training: {nesterov: true}", "training: nesterov needs a momentum above 0"),
        ("training: {batch_size: 2.5}", "training.batch_size: 2.5 should be a valid integer"),
        ("training: 3", "training: 3 should be a mapping (key: value)"),
        ("evaluation: {on: validation}", "set data.validation_fraction above 0"),
        ("evaluation: {on: globl_test}", "did you mean 'global_test'?"),
        ("evaluation: {cost: charged}", "evaluation: cost 'charged' needs 'on: devices'"),
        ("network: {link_down: reroute}", "network.link_down: 'reroute' needs a second route"),
        ("network: {message_loss: 2 %}", "network.message_loss: '2 %' should be a valid number"),
        ("network: {message_loss: 1}", "network.message_loss: 1 should be less than 1"),
        ("round_timeout: 30", "round_timeout: 30 has no unit; write for example '30 s'"),
        ("round_timeout: 0", "round_timeout: 0 should be greater than 0"),
        ("devices: {speed: {kind: constant, value: 500}}", "write for example '500 samples/s'"),
        ("links: {kind: on_off, mean_up: 60 s}", "links.mean_down: is missing"),
        ("sweep: {seed: [1, 2]}", "line 6: sweep: a file with a sweep is for 'fedsim sweep'"),
        ("peers: {kind: rings}", "peers.kind: 'rings' is no topology; did you mean 'ring'?"),
        ("peers: {kind: ring, redraw: true}", "peers.redraw: 'ring' is the same in every round"),
        ("peers: {kind: star}", "peers.kind: 'star' links devices with other machines only"),
        ("peers: {kind: ring, bandwidth: 5 Mbit/s}", "peers.bandwidth: 'bandwidth' is filled in"),
        ("peers: {kind: ring, redraw: 1}", "peers.redraw: 1 should be a valid boolean"),
        ("peers: {kind: erdos_renyi, density: 2}", "density = 2.0: must be between 0 and 1"),
        (
            "topology: {kind: bcube, n: 3, k: 2}",
            "topology: bcube(n=3, k=2) has 9 devices, but data.devices is 4; write data.devices: 9",
        ),
        ("topology: {kind: ring, uplink: 5 Mbit/s}", "topology.uplink: only a star has it"),
        (
            "  s: {kind: bulyan, num_malicious_nodes: 1}",
            "strategies.s.num_malicious_nodes: 1 needs the replies of 4 · 1 + 3 = 7 devices, else "
            "a round changes nothing (data.devices is 4); write 0 at most",
        ),
        (
            "  s: {kind: krum, num_malicious_nodes: -1}",
            "strategies.s.num_malicious_nodes: -1 should be greater than or equal to 0",
        ),
        (
            "  s: {kind: drop_non_finite, strategy: {kind: fedprox, proximal_mu: -1}}",
            "strategies.s.strategy.proximal_mu: -1.0 should be greater than or equal to 0",
        ),
        ("topology: {kind: tree, fanouts: [2]}", "topology 'tree': devices = 4: (2,) holds 1 to 2"),
        ("compression: {kind: topk}", "compression.kind: unknown key"),
        ("attack: []", "attack: unknown key"),
        ("model: my_nets:Net", "model: cannot import 'my_nets:Net' (ModuleNotFoundError"),
        ("seed: -1", "seed: -1 should be greater than or equal to 0"),
        ("seed: yes", "seed: 'yes' should be a valid integer"),
    ],
)
def test_wrong_keys_and_values_say_what_is_valid(said, line, expected):
    assert expected in said(f"{SMALL}{line}\n")


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("fedprxo", "strategies.linear: 'fedprxo' is no strategy; did you mean 'fedprox'?"),
        ("{kind: fedprxo}", "strategies.linear.kind: 'fedprxo' is no strategy; did you mean"),
        ("{kind: fedavg, fraction_trian: 1}", "fraction_trian: unknown key; did you mean 'fractio"),
        ("{kind: dp_server_fixed}", "strategies.linear.strategy: is missing, and has no default"),
        ("{}", "strategies.linear.kind: is missing; one of: ad_psgd,"),
        ("", "strategies.linear: null should be a name or a mapping with 'kind'"),
        (
            "{kind: fedavg, min_available_nodes: 5}",
            "strategies.linear.min_available_nodes: 5, is above the number of devices "
            "(data.devices is 4); write 4 or less",
        ),
        ("{kind: fedavg, min_train_nodes: 5}", "linear.min_train_nodes: 5, is above the number"),
        (
            "{kind: dp_server_fixed, noise_multiplier: 1, clipping_norm: 1, num_sampled_clients: 4,"
            " strategy: {kind: fedavg, min_train_nodes: 9}}",
            "strategies.linear.strategy.min_train_nodes: 9, is above",
        ),
        (
            "{kind: fedavg, rounds: 3}",
            "linear.rounds: all strategies share the scenario's 'rounds'",
        ),
        ("{kind: fedavg, seed: 3}", "linear.seed: all strategies share the scenario's 'seed'"),
        ("{kind: fedavg, data: {}}", "a strategy can override model, training, topology, links"),
        ("{kind: fedavg, topology: {bandwidth: 5}}", "linear.topology.bandwidth: 5 has no unit"),
        ("{kind: fedavg, links: wobbly}", "linear.links.kind: 'wobbly' is no link model"),
    ],
)
def test_wrong_strategies_say_what_is_valid(said, entry, expected):
    assert expected in said(SMALL.replace("{kind: fedavg}", entry))


def test_one_device_needs_smaller_minimal_numbers(said):
    message = said(SMALL, "data.devices=1")
    assert "min_available_nodes: 2, the strategy's default, is above the number of dev" in message
    assert "min_train_nodes: 2, the strategy's default" in message


@pytest.mark.parametrize("devices", [0, -3])
def test_there_must_be_a_device(said, devices):
    expected = f"data.devices: {devices} should be greater than or equal to 1"
    assert expected in said(SMALL, f"data.devices={devices}")


@pytest.mark.parametrize("name", ["a/b", "..", "-x", "plots", "Plots", "''", "a b", "x" * 65])
def test_strategy_names_must_be_directory_names(said, name):
    assert "the name becomes a directory" in said(SMALL.replace("linear", name))


def test_strategy_names_must_differ_in_more_than_case(said):
    assert "differs from 'linear' by upper and lower case" in said(SMALL + "  Linear: fedavg\n")


def test_strategies_are_required(said):
    assert "strategies: is missing; name at least one" in said(SMALL[: SMALL.index("strateg")])
    assert "{} should be a mapping; name at least one" in said(SMALL, "strategies={}")


def test_several_mistakes_are_reported_at_once_in_the_order_of_the_file(said):
    text = SMALL.replace("rounds: 3", "rounds: -3").replace("alpha", "alfa").replace("avg", "avgg")
    lines = said(text + "toplogy: {kind: star}\n").splitlines()
    assert lines[0] == ": 4 problems"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "line 2",
        "line 3",
        "line 5",
        "line 6",
    ]


def test_what_follows_from_a_mistake_is_not_said(said):
    """Here that the graph cannot be built either."""
    text = SMALL + "peers: {kind: fat_tree, k: 4}\n"
    assert len(said(text).splitlines()) == 3


def test_a_mistake_of_the_world_is_not_repeated_for_each_strategy(said):
    entry = "{kind: fedavg, training: {momentum: 0.5}}"
    message = said(SMALL.replace("{kind: fedavg}", entry), "model=softmx")
    assert message.count("softmx") == 2  # the option and its problem


# ── files ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", " is empty; 'fedsim init' writes a scenario to start from"),
        ("# only a comment\n", " is empty"),
        ("- a\n- b\n", ": a scenario is a mapping (key: value), starting at the top"),
        ("just text", ": a scenario is a mapping"),
        ("a: [1\nb: 2", ", line 2, column 2: not valid YAML: "),
        ("a: 1\n\tb: 2", ", line 2, column 1: not valid YAML: "),
        ("a: 1\nb: !!python/object/apply:os.system [ls]", ", line 2: YAML tags ('!…') are not"),
        ("a: !secret x", ", line 1: YAML tags"),
        ("rounds: 1\nrounds: 2", ", line 2: the key 'rounds' appears twice in one mapping"),
        ("a: {b: {c: 1, c: 2}}", ", line 1: the key 'c' appears twice"),
        ("1: x", ", line 1: a key (1) should be text"),
        ("? [a]\n: x", ", line 1: a key should be text"),
        ("a: 1\n---\nb: 2", "not valid YAML: but found another document"),
        ("a: &x [*x]", ", line 1: an alias refers to what it is part of"),
        ("a: *nothing", "not valid YAML: found undefined alias"),
        ("a: " + "[" * 1500, ": nested too deeply"),
    ],
)
def test_files_that_are_no_scenario_get_one_clear_message(said, text, expected):
    assert expected in said(text)


def test_an_alias_bomb_is_refused(said):
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for i in range(1, 12):
        text += f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n"
    assert "expands to more than 100000 values" in said(text)


def test_ordinary_anchors_are_fine(load):
    text = SMALL.replace("{kind: fedavg}", "&same {kind: fedavg}") + "  other: *same\n"
    assert load(text).strategies["other"] == load(text).strategies["linear"]


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ScenarioError, match=r"cannot read .*nowhere\.yaml: No such file"):
        load_scenario(tmp_path / "nowhere.yaml")
    with pytest.raises(ScenarioError, match="cannot read"):
        load_scenario(tmp_path)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ScenarioError, match="is not text in UTF-8"):
        load_scenario(tmp_path / "x.yaml")


def test_a_huge_file_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1\n" * 300_000)
    with pytest.raises(ScenarioError, match="is larger than 1000000 bytes"):
        load_scenario(tmp_path / "x.yaml")


def test_plain_words_are_read_as_yaml_1_2(load):
    scenario = load(SMALL + "evaluation: {on: global_test}\ntraining: {learning_rate: 5e-2}\n")
    assert scenario.evaluation.on == "global_test"
    assert scenario.training.learning_rate == 0.05


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1)
WORDS = ["on", "yes", "1e3", "0x10", "12:30:45", "null", "~", "a: b", "# x", "2020-01-01", "1_0"]


@settings(max_examples=40)
@given(TEXTS | st.sampled_from(WORDS), st.integers(0, 2**62))
def test_any_name_survives_yaml(tmp_path_factory, name, seed):
    data = {"name": name, "seed": seed, "rounds": 1, "data": {"devices": 2}}
    scenario = Scenario.from_mapping(data | {"strategies": {"a": "fedavg"}})
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(scenario.to_yaml(), encoding="utf-8")
    assert load_scenario(path) == scenario


# ── Python ──────────────────────────────────────────────────────────────────────────────────────


def test_a_mapping_is_checked_like_a_file_and_left_alone():
    data = {"rounds": 1, "data": {"devices": 2}, "strategies": {"a": "fedavg"}}
    before = deepcopy(data)
    assert Scenario.from_mapping(data, ["rounds=2"]).rounds == 2
    assert data == before
    with pytest.raises(ScenarioError, match="the scenario: rounds: 0 should be"):
        Scenario.from_mapping(data | {"rounds": 0})
    with pytest.raises(ScenarioError, match="a scenario holds what YAML can"):
        Scenario.from_mapping(data | {"rounds": {1, 2}})


def test_specs_build_what_they_name(load):
    scenario = load(FULL)
    strategy = registry.build("strategy", scenario.strategies["private"].spec())
    assert strategy.strategy.eta == 0.01
    app = registry.build("executor", scenario.executor.spec())
    assert app.chunk == 8


def test_quantities_are_drawn_for_each_device(load):
    topology, rng = load(FULL).topology, np.random.default_rng
    assert draw(topology.bandwidth, 3, rng(0)).tolist() == [160e6] * 3
    latency = draw(topology.latency, 1000, rng(0))
    assert latency.min() >= 0.005
    assert latency.max() <= 0.1
    assert set(draw(topology.downlink, 100, rng(0))) == {10e6, 1e9}
    uplink = draw(topology.uplink, 10_001, rng(0))
    assert np.median(uplink) == pytest.approx(2e6, rel=0.05)
    assert np.log(uplink).std() == pytest.approx(0.7, rel=0.05)
    assert draw(Lognormal(kind="lognormal", median=5.0, sigma=0.0), 2, rng(0)).tolist() == [5, 5]


# ── schema ──────────────────────────────────────────────────────────────────────────────────────


def test_the_schema_is_json_and_describes_every_key():
    schema = json_schema()
    json.dumps(schema, allow_nan=False)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"data", "rounds", "strategies"}
    assert schema["additionalProperties"] is False
    for key in Scenario.model_fields:
        assert schema["properties"][key]["description"]


def references(node):
    if isinstance(node, dict):
        yield from [node["$ref"]] if "$ref" in node else []
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_in_the_schema_leads_somewhere():
    schema = json_schema()
    named = {f"#/$defs/{name}" for name in schema["$defs"]}
    assert set(references(schema)) == named


def test_the_schema_accepts_scenarios_and_refuses_misspelt_keys(load):
    validator = pytest.importorskip("jsonschema").Draft202012Validator(json_schema())
    validator.check_schema(json_schema())
    for scenario in (load(FULL), load(SMALL)):
        assert list(validator.iter_errors(scenario.resolved())) == []
    for text in (FULL.replace("on_off", "onoff"), SMALL.replace("alpha", "alfa")):
        assert list(validator.iter_errors(yaml.safe_load(text)))


# ── documentation ───────────────────────────────────────────────────────────────────────────────


def test_every_key_is_explained_in_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "scenario.md").read_text(encoding="utf-8")
    sections = [Scenario, Stop, Data, Training, Devices, Topology, NetworkOptions, Evaluation]
    keys = {key for section in [*sections, Record] for key in section.model_fields}
    assert [key for key in sorted(keys) if f"| `{key}` |" not in text] == []
    names = {name for kind in registry.TABLES for name in registry.TABLES[kind]}
    assert [n for n in sorted(names - set(registry.TABLES["strategy"])) if n not in text] == []


def test_devices_evaluate_in_every_round(said):
    text = SMALL + "evaluation: {on: devices, every: 2}\n"
    assert "evaluation.every: 2 needs evaluation on common samples" in said(text)
