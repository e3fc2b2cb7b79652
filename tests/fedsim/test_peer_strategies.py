"""Peer strategies on the network grid: the same as in a plain app, and safe on links that fail."""

import logging
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import simpy
import torch
from flwr.app import ConfigRecord

from fedsim.data.federated import federate
from fedsim.data.synthetic import load_quadratic
from fedsim.devices import DeviceFleet
from fedsim.errors import ScenarioError
from fedsim.executors.clientapp import device_app
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.grid import NODE_BASE, NetworkGrid
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.records import stacked_record
from fedsim.flower.session import start
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import build_model, quadratic
from fedsim.learning.trainer import Trainer
from fedsim.network import graph_network
from fedsim.runner import run
from fedsim.scenario import Scenario, load_scenario
from fedsim.simulation import build, check
from strategies.accelerated import ADOM, Mudag
from strategies.choco import ChocoSGD
from strategies.gossip import DPSGD
from strategies.hyperprism import HyperPrism
from strategies.pairwise import ADPSGD, SwarmSGD
from strategies.push_sum import SGP, PushDIGing
from strategies.tracking import D2, DSGT, EXTRA
from tests.fedsim.worlds import digits_trainer, make_world
from tests.plain_grid import PlainGrid, flower_identity
from tests.strategies.peer_worlds import after
from tests.strategies.test_gossip import CASES
from topologies.generators import complete, ring

N = 8
STEP = LocalConfig(local_steps=1, batch_size=0, learning_rate=0.3)
STRATEGIES = {
    "gossip": DPSGD,
    "gossip_atc": lambda **k: DPSGD(order="adapt_then_combine", **k),
    "dsgt": DSGT,
    "extra": EXTRA,
    "d2": D2,
    "mudag": lambda **k: Mudag(mixing_steps=2, **k),
    "adom": ADOM,
    "sgp": SGP,
    "sgp_all": lambda **k: SGP(fanout="all", **k),
    "push_diging": PushDIGing,
    "choco_sgd": ChocoSGD,
    "swarm_sgd": SwarmSGD,
    "hyperprism": HyperPrism,
    "hyperprism_dual": lambda **k: HyperPrism(degree=3, gradient_space="dual", **k),
}
QUIET = {"fraction_evaluate": 0.0, "learning_rate": 0.3}


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def changing(number):
    """Return the graph of a round, from 0; in the second round nobody is linked."""
    return nx.gnp_random_graph(N, 0.0 if number == 1 else 0.5, seed=number)


def q8_world():
    """Return the reference problem, as data and model of a scenario, on a perfect network."""
    data = federate(dataset := load_quadratic(), [np.array([i]) for i in dataset.device_train])
    model = build_model(quadratic, data.input_shape, 0, seed=0)
    trainer = Trainer(model, data, loss="output", seed=0)
    local = LocalConfig(local_steps=1, batch_size=0)
    plan = WorkPlan(local, data.size)
    env = simpy.Environment()
    grid = NetworkGrid(
        env,
        graph_network(env, complete(N)),
        DeviceFleet(np.full(N, 1e3), None),
        VectorisedExecutor(trainer, plan, node_base=NODE_BASE),
        plan,
        peers=lambda _: complete(N),
    )
    return grid, stacked_record(trainer.layout.views(trainer.initial()[None]), 0)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"one-peer SGP", "one-peer SGP, 0.02"}))
def test_the_reference_problem_gives_the_same_through_trainer_and_network(name):
    loop, make, _ = CASES[name]
    (expected,) = after(loop(), 12)
    grid, initial = q8_world()
    strategy = make()
    start(strategy, grid, initial, rounds=12, seed=1)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(models(strategy), expected, rtol=0, atol=1e-12 * scale)


def models(strategy):
    return torch.cat([v.reshape(N, -1) for v in strategy.device_models.values()], 1).numpy()


@pytest.mark.parametrize("has_graph", [True, False], ids=["graph", "everybody"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_perfect_network_changes_nothing(name, has_graph):
    """Zero latency, no loss: the models of a plain grid that calls the same app."""
    if name == "swarm_sgd" and not has_graph:
        pytest.skip("the network draws other pairs than a plain app")
    arguments = QUIET | ({"graph": changing} if has_graph else {})
    world = make_world(N, local=STEP, graph=complete(N), peers=lambda _: complete(N))
    ours = STRATEGIES[name](**arguments)
    start(ours, world.grid, world.initial(), rounds=4, seed=5)
    trainer = digits_trainer(N)
    theirs = STRATEGIES[name](**arguments)
    with flower_identity(1):
        grid = PlainGrid(device_app(trainer, WorkPlan(STEP, trainer.data.size)), N)
        theirs.start(grid, world.initial(), num_rounds=4, train_config=ConfigRecord())
    found, expected = models(ours), models(theirs)
    if name == "hyperprism_dual":  # compared where it is not infinitely steep
        found, expected = found**3, expected**3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(models(ours) - models(ours)[0]).max() > 0 or not has_graph


@pytest.mark.parametrize("name", STRATEGIES)
def test_links_that_fail_stop_nobody_and_keep_the_mass(name):
    world = make_world(
        N, local=STEP, loss=0.3, graph=ring(N, bandwidth=1e6, latency=0.01), peers=lambda _: ring(N)
    )
    strategy = STRATEGIES[name](**QUIET)
    rows = []
    start(strategy, world.grid, world.initial(), rounds=5, seed=5, record=rows.append)
    assert len(rows) == 5
    assert sum(row.messages_lost for row in rows) > 0
    assert np.isfinite(models(strategy)).all()
    if "weight" in strategy.state:
        assert float(strategy.state["weight"].sum()) == pytest.approx(N, rel=1e-6)
    if "trackers" in strategy.state:
        sums = strategy.state["trackers"].sum(0), strategy.state["gradients"].sum(0)
        np.testing.assert_allclose(*sums, atol=1e-4)


@pytest.mark.parametrize("learning_rate", [0.3, 0.0])
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_link_that_fails_between_two_neighbours_pushes_breaks_nothing(name, learning_rate):
    """Device 0 is done and sends at once; its slow neighbour 1 finds the link between them down."""
    speed = [1e6, 1e2] * (N // 2)
    world = make_world(
        N,
        local=STEP,
        speed=speed,
        graph=complete(N, bandwidth=1e6, latency=0.001),
        peers=lambda _: complete(N),
        network_options={"link_down": "fail"},
    )
    env, network = world.grid.env, world.grid.network

    def cut_and_mend():
        while True:
            for up, pause in ((False, 0.2), (True, 0.4)):  # shorter than the slow ones' work
                yield env.timeout(pause)
                for a, b in ((0, 1), (2, 3), (4, 7)):
                    network.set_link(f"{a}-{b}", up=up)

    env.process(cut_and_mend())
    strategy = STRATEGIES[name](**QUIET | {"learning_rate": learning_rate})
    lines = []
    if name == "adom" and learning_rate == 0:
        pytest.skip("1 / learning_rate is ADOM's smoothness")
    start(strategy, world.grid, world.initial(), rounds=6, seed=5, record=lines.append)
    assert len(lines) == 6
    if name not in ("sgp", "swarm_sgd"):  # which use few links at a time
        assert 4 * 6 * N < sum(line.messages_sent for line in lines) < 6 * N * (N - 1)
    assert np.isfinite(models(strategy)).all()
    if "weight" in strategy.state:
        assert float(strategy.state["weight"].sum()) == pytest.approx(N, rel=1e-6)
    if learning_rate == 0:
        equal = world.trainer.initial().numpy()[None].repeat(N, 0)
        # Sums of differences and quotients of sums are equal to rounding, means to the bit.
        rounds_off = name in ("sgp", "sgp_all", "push_diging", "mudag", "choco_sgd")
        np.testing.assert_allclose(models(strategy), equal, rtol=0, atol=1e-6 * rounds_off)


def test_devices_that_do_not_wait_are_not_held_up_by_a_slow_one():
    speed = [1e3] * (N - 1) + [1e2]
    times = []
    for make in (ADPSGD, DPSGD):
        world = make_world(
            N,
            local=STEP,
            speed=speed,
            graph=complete(N, bandwidth=1e7),
            peers=lambda _: complete(N),
        )
        rows = []
        start(make(**QUIET), world.grid, world.initial(), rounds=6, seed=5, record=rows.append,
              evaluate=world.evaluate)  # fmt: skip
        assert [row.round for row in rows] == [1, 2, 3, 4, 5, 6]
        assert rows[-1].eval_loss < 2.2
        times.append(world.grid.now)
    assert times[0] < 0.4 * times[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"degree": 3, "parts": {"a": ["conv*"]}}, r"strategies.h: parts.a: 'conv\*' fits no par"),
        ({"degree": [1, 3]}, r"strategies.h: degree: a list of 2 for 6 devices and 1 part\(s\)"),
        ({"degree": [[1, 3], [5]]}, r"degree = \[\[1.0, 3.0\], \[5.0\]\]: each device needs"),
    ],
)
def test_degrees_that_fit_no_model_are_refused_before_anything_runs(arguments, message):
    scenario = Scenario.from_mapping(
        {
            "rounds": 1,
            "data": {"devices": 6},
            "peers": "ring",
            "strategies": {"h": {"kind": "hyperprism"} | arguments},
        }
    )
    with pytest.raises(ScenarioError, match=message):
        check(scenario)


def test_every_peer_strategy_runs_from_a_scenario(tmp_path):
    kinds = ["ad_psgd", "adom", "choco_sgd", "d2", "dsgt", "extra", "gossip", "hyperprism"]
    kinds += ["mudag", "push_diging", "sgp", "swarm_sgd"]
    path = tmp_path / "all.yaml"
    path.write_text(
        "{name: all, rounds: 2, data: {dataset: digits, devices: 6}, "
        "training: {learning_rate: 0.05, local_steps: 1}, "
        "topology: {kind: ring, bandwidth: 1 Mbit/s, latency: 5 ms}, "
        f"strategies: {{{', '.join(f'{kind}: {{kind: {kind}}}' for kind in kinds)}}}}}"
    )
    result = run(load_scenario(path))
    for kind in kinds:
        summary = result.strategies[kind].summary
        assert summary["rounds"] == 2
        assert summary["bytes_total"] > 0
        assert summary["final_loss"] < 2.6


@pytest.mark.study
def test_the_quickstart_shows_the_early_gain():
    """Rounds to 0.85, mean of three seeds: p = 5 needs at most 0.6 of tuned linear averaging."""
    path = Path(__file__).parents[2] / "scenarios/hyperprism_quickstart.yaml"
    needed = {}
    for name, rate in (("p5", 10), ("linear", 3), ("linear", 100)):
        found = []
        for seed in (1, 2, 3):
            overrides = [f"seed={seed}", f"strategies.{name}.learning_rate={rate}", "rounds=40"]
            rows = []
            build(load_scenario(path, overrides), name).run(rows.append)
            found.append(next(row.round for row in rows if row.eval_accuracy >= 0.85))
        needed[name, rate] = np.mean(found)
    assert needed["p5", 10] <= 0.6 * min(needed["linear", 3], needed["linear", 100])
