"""Executors on Ray: results of the one in this process, whatever happens to a worker."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fedsim
from fedsim import runner
from fedsim.errors import ScenarioError
from fedsim.executors.crew import Crew, Wanted
from fedsim.scenario import Scenario
from fedsim.simulation import build

LETHAL = "tests.fedsim.lethal"
WORLD = {
    "seed": 3,
    "rounds": 2,
    "data": {"dataset": "digits", "devices": 7, "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "training": {"learning_rate": 0.3, "batch_size": 16},
    "devices": {"speed": {"kind": "lognormal", "median": "500 samples/s", "sigma": 0.5}},
    "topology": {"kind": "star", "bandwidth": "1 Mbit/s", "latency": "20 ms"},
    "peers": {"kind": "ring"},
    "network": {"message_loss": 0.05},
    "strategies": {"linear": "fedavg"},
}
RAY = {"kind": "ray", "address": "local", "workers": 2}
FLOWER = RAY | {"kind": "flower"}
TUTORIAL = {"app": f"{LETHAL}:app", "run_config": {"local-epochs": 1}, "train_config": {"lr": 0.05}}
PRIVATE = {
    "kind": "dp_client_fixed",
    "strategy": "fedavg",
    "clipping_norm": 0.5,
    "noise_multiplier": 0.0,
    "num_sampled_clients": 7,
}
USERS = {"kind": "fedavg", "model": "tests.fedsim.tutorial_app:Net"}
FRAGILE = {"kind": "fedavg", "model": f"{LETHAL}:Net"}
PAIRS = {
    "linear": ("fedavg", {"executor": RAY}),
    "delegated": ("fedavg", {"executor": FLOWER}),
    "gossip": ("gossip", {"executor": RAY}),
    "compressed": ("compressed_sgd", {"executor": RAY}),
    "private": (PRIVATE, {"executor": RAY}),
    "killed": (FRAGILE, {"executor": RAY}),
    "users-killed": (
        USERS | {"executor": {"kind": "client_app"} | TUTORIAL},
        {"executor": FLOWER | TUTORIAL},
    ),
}


def children():
    """Return the command lines of all processes below this one."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text("utf-8").rpartition(")")[2].split()
            commands[int(folder.name)] = (folder / "cmdline").read_text("utf-8")
        except OSError:
            continue
        if stat[0] != "Z":
            parents[int(folder.name)] = int(stat[1])
    below, found = {os.getpid()}, []
    while new := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= new
        found += [commands[pid] for pid in new]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the records and last models of one run with all pairs, each here and on Ray."""
    pytest.importorskip("ray", reason='needs Ray: pip install "fedsim[ray]"')
    entries = {}
    for name, (entry, elsewhere) in PAIRS.items():
        entry = {"kind": entry} if isinstance(entry, str) else entry
        entries |= {f"{name}-here": entry, f"{name}-ray": entry | elsewhere}
    out = tmp_path_factory.mktemp("run")
    before = children()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LETHAL_FOLDER", str(tmp_path_factory.mktemp("deaths")))
        patch.setenv("LETHAL_OWNER", str(os.getpid()))
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setattr(runner, "write_report", lambda out: None)  # its figures take a second each
        result = fedsim.run(Scenario.from_mapping(WORLD | {"strategies": entries}), out / "run")
        deaths = sorted(path.name for path in Path(os.environ["LETHAL_FOLDER"]).iterdir())
    return result, out / "run", deaths, sorted(set(children()) - set(before))


@pytest.mark.flower
@pytest.mark.parametrize("name", PAIRS)
def test_ray_gives_the_results_of_this_process(runs, name):
    from safetensors.numpy import load_file

    result, out, *_ = runs
    here, there = (result.strategies[f"{name}-{place}"].rounds for place in ("here", "ray"))
    assert len(here) == 2
    for one, other in zip(here, there, strict=True):
        assert one.virtual_time == other.virtual_time
        assert one.bytes_total == other.bytes_total
        assert one.devices_replied == other.devices_replied
        assert other.eval_loss == pytest.approx(one.eval_loss, abs=1e-6)
    models = [load_file(out / f"{name}-{place}" / "model.safetensors") for place in ("here", "ray")]
    for key, value in models[0].items():
        assert np.allclose(value, models[1][key], rtol=0, atol=1e-6), key


@pytest.mark.flower
def test_workers_were_killed_in_the_middle_of_a_round(runs):
    assert runs[2] == ["app", "model"]


@pytest.mark.flower
def test_no_process_is_left_behind(runs):
    assert runs[3] == []


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """Return the address of a cluster of two Ray nodes of one processor; one is doomed."""
    pytest.importorskip("ray", reason='needs Ray: pip install "fedsim[ray]"')
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("LETHAL_FOLDER", str(tmp_path))
    monkeypatch.setenv("LETHAL_OWNER", str(os.getpid()))
    size = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
    try:
        doomed = cluster.add_node(**size)
        (tmp_path / "doomed").write_text(doomed.node_id, "utf-8")
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.flower
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
def test_a_machine_of_a_cluster_is_lost_in_the_middle_of_a_round(two_nodes, tmp_path, caplog):
    runs = []
    for executor in ({"kind": "vectorised"}, {"kind": "ray", "address": two_nodes}):
        model = {"model": f"{LETHAL}:Doomed", "executor": executor}
        made = Scenario.from_mapping(WORLD | model | {"rounds": 3})
        runs.append(fedsim.run(made).strategies["linear"].rounds)
    here, there = runs
    assert [row.virtual_time for row in there] == [row.virtual_time for row in here]
    losses = [row.eval_loss for row in here]
    assert [row.eval_loss for row in there] == pytest.approx(losses, abs=1e-6)
    assert "a Ray worker has died; 1 are left" in caplog.text
    assert (tmp_path / "survivor").exists()  # the other worker was on the other machine


@pytest.mark.parametrize("kind", ["ray", "flower"])
def test_without_ray_the_extra_is_named(kind, monkeypatch):
    monkeypatch.setattr("fedsim.executors.crew.find_spec", lambda name: None)
    made = Scenario.from_mapping(WORLD | {"executor": kind})
    with pytest.raises(ScenarioError, match=rf"^executor.kind: '{kind}' needs Ray.*fedsim\[ray\]"):
        build(made)


@pytest.mark.parametrize(
    ("key", "value"), [("workers", 0), ("cpus", 0.0), ("gpus", -1.0), ("addres", "local")]
)
def test_what_a_cluster_cannot_be_is_refused(key, value):
    with pytest.raises(ScenarioError, match=rf"executor\.{key}"):
        Scenario.from_mapping(WORLD | {"executor": {"kind": "ray", key: value}})


@pytest.mark.parametrize(
    ("app", "why"),
    [("no.such:app", "cannot import"), (f"{LETHAL}:Net", "this is a type 'Net', not a")],
)
def test_an_app_that_is_none_is_refused_before_ray_starts(app, why):
    with pytest.raises(ScenarioError, match=rf"executor\.app: .*{why}"):
        build(Scenario.from_mapping(WORLD | {"executor": {"kind": "flower", "app": app}}))


class SmallCluster:
    """What a crew asks of Ray, of a cluster with 4 processors and 2 GPUs."""

    def __init__(self):
        self.asked = []

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 4.0, "GPU": 2.0}

    def remote(self, worker):
        return self

    def options(self, **options):
        self.asked.append(options)
        return SimpleNamespace(remote=lambda: SimpleNamespace(ping=SimpleNamespace(remote=object)))

    def wait(self, pings, **options):
        return pings, []

    def get(self, pings):
        return pings

    def kill(self, worker):
        pass


@pytest.mark.parametrize(
    ("wanted", "most"), [({"workers": 5}, 4), ({"gpus": 4.0}, 0), ({"cpus": 3, "workers": 2}, 1)]
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_workers_that_do_not_fit_are_refused_before_anything_is_written(
    wanted, most, jobs, monkeypatch, tmp_path
):
    monkeypatch.setattr("fedsim.executors.crew._ray", SmallCluster)
    made = Scenario.from_mapping(WORLD | {"executor": {"kind": "ray"} | wanted})
    with pytest.raises(ScenarioError, match=rf"^executor\.workers: .* at most {most} of them"):
        fedsim.run(made, tmp_path / "run", jobs=jobs)
    assert list(tmp_path.iterdir()) == []


def test_workers_get_the_processors_and_gpus_that_are_asked_for(monkeypatch):
    ray = SmallCluster()
    monkeypatch.setattr("fedsim.executors.crew._ray", lambda: ray)
    with Crew() as crew:
        shares = crew.shares(np.ones(6, np.int64), Wanted(cpus=0.5, gpus=0.5))
        assert len(shares) == 4
    assert ray.asked == 4 * [{"num_cpus": 0.5, "num_gpus": 0.5}]


def test_a_cluster_that_is_not_there_is_an_error_at_once():
    executor = {"kind": "ray", "address": "127.0.0.1:1"}
    simulation = build(Scenario.from_mapping(WORLD | {"executor": executor}))
    pytest.importorskip("ray", reason='needs Ray: pip install "fedsim[ray]"')
    with pytest.raises(ScenarioError, match=r"executor\.address: no Ray at 127\.0\.0\.1:1"):
        simulation.run()
