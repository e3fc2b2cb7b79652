"""All-reduce SGD with real training on the network grid: models, times, bytes (bml.md §5)."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

import topologies as tp
from fedsim.devices import Intervals
from fedsim.errors import ScenarioError
from fedsim.executors.clientapp import device_app
from fedsim.flower.instructions import WorkPlan
from fedsim.flower.session import start
from fedsim.learning.batches import make_batches
from fedsim.learning.config import LocalConfig
from fedsim.learning.threads import one_thread
from fedsim.network.failures import Failure
from fedsim.scenario import load_scenario
from fedsim.simulation import build, check
from strategies.allreduce import AllReduceSGD
from strategies.reduction import run_schedule, schedule_for
from tests.fedsim.worlds import digits_trainer, make_world
from tests.plain_grid import PlainGrid, flower_identity
from topologies.placement import COLLECTIVES

BATCH = LocalConfig(batch_size=4, learning_rate=0.3)  # every device has at least 4 samples
RATE, ALPHA = 1e9, 20e-6
SIZE = 650 * 4  # bytes of softmax on digits
VGG19 = 574_668_960
BCUBE = tp.bcube(3, 2, bandwidth=RATE)
FAT_TREE = tp.fat_tree(4, devices=9, bandwidth=RATE)


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("flwr").setLevel(logging.ERROR)


def train(graph, rounds=20, *, world=None, local=BATCH, speed=1e3, **options):
    """Run a strategy on a graph; return it, its model as a row, and its record lines."""
    n_devices = len(tp.devices_of(graph))
    world = world or make_world(n_devices, graph=graph, local=local, speed=speed)
    strategy = AllReduceSGD(fraction_evaluate=0.0, learning_rate=0.3, **options)
    rows = []
    result = start(strategy, world.grid, world.initial(), rounds=rounds, seed=1, record=rows.append)
    return strategy, row_of(result.arrays), rows


def row_of(arrays):
    return np.concatenate([array.numpy().ravel() for array in arrays.values()])


def large_batch_sgd(n_devices, rounds, *, batch=4, momentum=0.0):
    """One process: plain torch on the union of the devices' batches."""
    trainer = digits_trainer(n_devices)
    data, devices = trainer.data, np.arange(n_devices)
    x, y, first = data.pack(devices)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    views = trainer.layout.views(trainer.initial()[None])
    for parameter, value in zip(model.parameters(), views.values(), strict=True):
        parameter.data = value[0].clone()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for number in range(1, rounds + 1):
        size = data.size[devices]
        each = np.minimum(size, batch) if batch else size
        drawn = make_batches(
            trainer.seed, np.full(n_devices, number), devices, first, size, each,
            np.ones(n_devices, np.int64),
        )  # fmt: skip
        index = torch.from_numpy(drawn.index[drawn.weight > 0])
        loss = torch.nn.functional.cross_entropy(model(x[index]), y[index])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(momentum).add_(g)
                p -= 0.3 * v
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


# --- the same model -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "arithmetic", "collectives"),
    [
        (BCUBE, "schedule", ["bml", "ring", "all_to_all"]),
        pytest.param(
            BCUBE,
            "schedule",
            sorted(set(COLLECTIVES) - {"ps_dedicated"}),
            marks=pytest.mark.slow,
        ),
        (FAT_TREE, "schedule", ["ps_dedicated", "ps_colocated"]),
        (FAT_TREE, "mean", ["ps_colocated"]),
    ],
    ids=["bcube", "all on bcube", "fat_tree", "one reduction"],
)
def test_all_collectives_train_the_model_of_one_process(graph, arithmetic, collectives):
    expected = large_batch_sgd(9, 20)
    start_at = row_of(make_world(9, graph=graph).initial())
    assert relative(start_at, expected) > 0.1
    for collective in collectives:
        strategy, found, rows = train(graph, collective=collective, arithmetic=arithmetic)
        assert relative(found, expected) < 1e-6, collective
        assert len(rows) == 20
        if collective != "all_to_all":
            assert strategy.device_models == {}, collective  # bitwise equal on all ranks


def test_ranks_of_bml_are_bitwise_equal_with_real_gradients():
    """The gradients of one round, added up in BML's order: nine equal rows that are not exact."""
    trainer = digits_trainer(9)
    base = trainer.initial()[None]
    config = LocalConfig(batch_size=4, mode="gradient")
    zeros = np.zeros(9, np.int64)
    gradients = trainer.train(base, zeros, np.arange(9), zeros + 1, config).params
    held = run_schedule(schedule_for("bml", 9), gradients)
    assert (held == held[0]).all()
    exact = gradients.double().sum(0)
    assert 0 < float((held[0].double() - exact).abs().max()) < 1e-6 * float(exact.abs().max())


def test_samples_weigh_as_in_one_batch_of_all_data():
    local = LocalConfig(batch_size=0)
    _, found, _ = train(BCUBE, 10, local=local, collective="bml", weighted_by_key="num-examples")
    assert relative(found, large_batch_sgd(9, 10, batch=0)) < 1e-6


def test_momentum_is_that_of_one_process():
    _, found, _ = train(BCUBE, 20, collective="bml", optimizer="momentum", momentum=0.9)
    assert relative(found, large_batch_sgd(9, 20, momentum=0.9)) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"collective": "bml", "arithmetic": "schedule"},
        {"collective": "all_to_all", "top_k": 0.1},
        {"collective": "ring", "wire_dtype": "bfloat16", "optimizer": "adam"},
        {"collective": "ring", "exchange_period": 5},
        {"collective": "bml", "arithmetic": "schedule", "chunk_loss": 0.02},
    ],
    ids=["bml", "top-k", "bfloat16", "local", "lossy"],
)
def test_a_plain_flower_app_computes_the_same_trajectory(options):
    strategy, found, _ = train(BCUBE, 8, **options)
    trainer = digits_trainer(9)
    initial = make_world(9, graph=BCUBE).initial()
    plain = AllReduceSGD(fraction_evaluate=0.0, learning_rate=0.3, **options)
    with flower_identity(1):
        grid = PlainGrid(device_app(trainer, WorkPlan(BATCH, trainer.data.size)), 9)
        result = plain.start(grid, initial, num_rounds=8, train_config=ConfigRecord())
    assert relative(row_of(result.arrays), found) < 1e-6
    assert plain.device_models.keys() == strategy.device_models.keys()
    assert ("chunk_loss" in options) == bool(strategy.device_models)


# --- times ----------------------------------------------------------------------------------------


def parts(rows):
    """Return compute, synchronisation and whole time of each iteration."""
    times = np.diff([0.0, *(row.virtual_time for row in rows)])
    compute = np.array([row.extra["compute_seconds"] for row in rows])
    sync = np.array([row.extra["sync_seconds"] for row in rows])
    return compute, sync, times


@pytest.mark.parametrize(("n", "k"), [(3, 2), (2, 3), (2, 4)])
def test_iterations_take_compute_and_the_collectives_time(n, k):
    """Bars 3, 4 and 8: C and S of the run, PS/BML = k, the ideal reduction (1 - 1/k)/(1 + c)."""
    devices = n**k
    each = 8 * VGG19 / 10e9
    ideal = 2 * (devices - 1) / devices * each
    bcube = tp.bcube(n, k, bandwidth=10e9)
    fat_tree = tp.fat_tree(4, devices=devices, bandwidth=10e9)
    for ratio in (0.0, 0.25, 4.0):
        speed = 4 / (ratio * ideal) if ratio else 1e12
        job = {}
        for collective, graph in (("bml", bcube), ("ps_colocated", fat_tree)):
            _, _, rows = train(graph, 2, speed=speed, collective=collective, payload=VGG19)
            compute, sync, times = parts(rows)
            np.testing.assert_allclose(compute, ratio * ideal, rtol=1e-9, atol=1e-11)
            np.testing.assert_allclose(times, compute + sync, rtol=1e-9)
            np.testing.assert_allclose(sync, ideal / (k if collective == "bml" else 1), rtol=1e-9)
            job[collective] = times.sum()
        reduction = 1 - job["bml"] / job["ps_colocated"]
        assert reduction == pytest.approx(tp.job_reduction(k, ratio), abs=1e-9)
        assert reduction <= 1 - 1 / k + 1e-9


def test_with_latency_the_ratio_is_that_of_the_paper_and_short_vectors_favour_the_server():
    """Bar 4: LeNet-5 at 10 Gbit/s and 20 us gives 1.53; below 56 250 bytes the server wins."""
    ratio = {}
    for size in (246_824, 56_000, 56_500):
        seconds = []
        for collective, graph in (
            ("bml", tp.bcube(3, 2, bandwidth=10e9)),
            ("ps_colocated", tp.fat_tree(4, devices=9, bandwidth=10e9)),
        ):
            _, _, rows = train(graph, 1, collective=collective, payload=size, step_latency=ALPHA)
            seconds.append(parts(rows)[1][0])
        ratio[size] = seconds[1] / seconds[0]
    assert ratio[246_824] == pytest.approx(1.53, abs=0.01)
    assert ratio[56_000] < 1 < ratio[56_500]


def test_56_percent_need_a_baseline_that_is_slower_than_the_model():
    """Bar 8: with e = 0.8 of the rate for the parameter server and c = 0.064 it is 56.4 %."""
    ideal = 16 / 9 * 8 * VGG19 / RATE
    speed = 4 / (0.064 * ideal / 0.8)  # c is relative to what the server really takes
    job = []
    for collective, graph, efficiency in (("bml", BCUBE, 1.0), ("ps_colocated", FAT_TREE, 0.8)):
        options = {"header_efficiency": efficiency}
        world = make_world(9, graph=graph, local=BATCH, speed=speed, network_options=options)
        _, _, rows = train(graph, 2, world=world, collective=collective, payload=VGG19)
        job.append(rows[-1].virtual_time)
    reduction = 1 - job[0] / job[1]
    assert reduction == pytest.approx(0.564, abs=0.005)
    assert reduction == pytest.approx(tp.job_reduction(2, 0.064, efficiency=0.8), rel=1e-9)


def test_a_wire_of_half_the_width_takes_half_the_time():
    whole = train(BCUBE, 1, collective="bml")[2]
    half = train(BCUBE, 1, collective="bml", wire_dtype="float16")[2]
    assert parts(half)[1] == pytest.approx(parts(whole)[1] / 2, rel=1e-9)
    assert whole[0].bytes_peer == 2 * 8 * SIZE
    assert half[0].bytes_peer == 8 * SIZE
    sparse = train(BCUBE, 1, collective="all_to_all", top_k=0.1)[2]
    assert sparse[0].bytes_peer == 9 * 8 * 65 * (4 + 4)


def test_a_dead_port_changes_times_and_not_the_model():
    """Bar 6 in training: rerouted, the same bits in twice the time; without a way around, named."""
    port = Failure(link=f"0-{min(BCUBE[0])}")
    models = []
    for failures in ((), (port,)):
        world = make_world(
            9, graph=BCUBE, local=BATCH, network_options={"failures": list(failures)}
        )
        options = {"collective": "bml", "arithmetic": "schedule", "on_failure": "reroute"}
        _, model, rows = train(BCUBE, 3, world=world, **options)
        models.append((model, parts(rows)[1]))
    np.testing.assert_array_equal(models[0][0], models[1][0])
    np.testing.assert_allclose(models[1][1], 2 * models[0][1], rtol=0.01)


def test_local_steps_take_their_time_and_one_collective():
    _, _, rows = train(BCUBE, 2, collective="bml", exchange_period=5, speed=100.0)
    compute, sync, _ = parts(rows)
    np.testing.assert_allclose(compute, 5 * 4 / 100, rtol=1e-9)
    np.testing.assert_allclose(sync, 8 / 9 * 8 * SIZE / RATE, rtol=1e-9)


def test_devices_that_are_away_are_done_without_until_they_come_back():
    """Device 4 goes away in the second iteration and is back for the fourth."""
    there = {4: [(0.0, 1.5), (2.6, 100.0)]}
    world = make_world(
        9, graph=BCUBE, local=BATCH, speed=4.0, on_leave="drop",
        timetable=Intervals(devices=there, others="always").start(9, 0),
    )  # fmt: skip
    options = {"collective": "bml", "arithmetic": "schedule", "on_device_failure": "shrink"}
    strategy, _, rows = train(BCUBE, 4, world=world, **options)
    assert [row.devices_selected for row in rows] == [9, 9, 8, 9]
    assert [row.devices_replied for row in rows] == [9, 8, 8, 9]
    servers = 2 * 7 * SIZE  # what eight co-located servers exchange
    assert [row.bytes_peer for row in rows] == [2 * 8 * SIZE, servers, servers, 2 * 8 * SIZE]
    assert strategy.device_models == {}
    assert rows[3].train_loss < rows[0].train_loss


# --- the scenarios that ship ----------------------------------------------------------------------

PAPER = Path(__file__).parents[2] / "scenarios/paper"
MILLISECONDS = {
    "bml": 408.7, "fat_tree": 817.3, "fat_tree_lossy": 1021.7, "fat_tree_hashed": 1123.8,
    "two_ports": 408.7, "bml_overlapped": 409.1, "ring_on_bcube": 817.6, "ps_on_bcube": 613.0,
}  # fmt: skip


def test_vgg19_takes_the_times_that_the_scenario_names():
    scenario = load_scenario(PAPER / "bml_vgg19.yaml", ["rounds=1"])
    job = {}
    with one_thread():
        for name, sync in MILLISECONDS.items():
            rows = []
            build(scenario, name, device="cpu").run(rows.append)
            assert 1e3 * rows[0].extra["compute_seconds"] == pytest.approx(65.4, abs=0.05)
            assert 1e3 * rows[0].extra["sync_seconds"] == pytest.approx(sync, abs=0.05)
            job[name] = rows[0].virtual_time
            assert (rows[0].extra["exposed_seconds"] < 0.366) == (name == "bml_overlapped")
    assert 1 - job["bml"] / job["fat_tree"] == pytest.approx(0.463, abs=5e-4)
    assert 1 - job["bml"] / job["fat_tree_lossy"] == pytest.approx(0.564, abs=5e-4)


def test_the_scenario_of_lenet5_is_valid():
    scenario = load_scenario(PAPER / "bml_lenet5.yaml")
    assert list(scenario.strategies) == ["bml", "parameter_server", "two_ports"]


def test_a_collective_that_does_not_fit_is_refused_before_anything_runs():
    changes = ["strategies.bml.topology={kind: fat_tree, ports: 4}"]
    scenario = load_scenario(PAPER / "bml_vgg19.yaml", changes)
    with pytest.raises(
        ScenarioError, match=r"strategies.bml.collective: bml needs a BCube, not fat_tree\(ports=4"
    ):
        check(scenario, device="cpu")


@pytest.mark.slow
def test_the_strategies_of_the_page_on_bml_run(tmp_path):
    """DiLoCo with AdamW on the devices among them."""
    page = (PAPER.parents[1] / "docs/bml.md").read_text("utf-8")
    block = next(part for part in page.split("```") if part.startswith("yaml"))
    path = tmp_path / "page.yaml"
    path.write_text(
        """
name: page
rounds: 2
data: {dataset: digits, devices: 9}
training: {learning_rate: 0.1, batch_size: 16}
topology: {kind: bcube, n: 3, k: 2, bandwidth: 1 Gbit/s}
"""
        + block.removeprefix("yaml")
    )
    scenario = load_scenario(path, ["strategies.diloco.exchange_period=20"])
    with one_thread():
        for name in scenario.strategies:
            rows = []
            build(scenario, name, device="cpu").run(rows.append)
            assert rows[-1].eval_loss < rows[0].train_loss, name
