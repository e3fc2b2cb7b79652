"""`flwr run .`: a scenario in Flower's own engine."""

import shutil
import tomllib

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load_file

import fedsim
from fedsim import app, runner
from fedsim.errors import NoNodesError, ScenarioError
from fedsim.executors.inner_grid import InnerGridExecutor, find_nodes
from fedsim.results import load_run
from fedsim.simulation import build
from tests.fedsim.flower_runs import ROOT, flwr_run, running
from tests.plain_grid import PlainGrid, flower_identity

SCENARIO = """
name: as a Flower app
rounds: 2
seed: 5
data: {dataset: digits, devices: 4, partition: {kind: dirichlet, alpha: 0.5}}
training: {learning_rate: 0.3, batch_size: 16}
devices: {speed: {kind: lognormal, median: 500 samples/s, sigma: 0.5}}
topology: {kind: star, bandwidth: 1 Mbit/s, latency: 20 ms}
network: {message_loss: 0.05}
strategies:
  linear: {kind: fedavg}
  compressed: {kind: compressed_sgd}
"""


def written(tmp_path):
    path = tmp_path / "scenario.yaml"
    path.write_text(SCENARIO, "utf-8")
    return path


def run_here(path):
    """Run the scenario in this process, without the report, whose figures take a second each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_report", lambda out: None)
        fedsim.run(fedsim.load_scenario(path, ["executor=client_app"]), path.parent / "here")


def assert_same_runs(tmp_path, there):
    """Bar 7: virtual times and outcomes are equal, arrays to 1e-6."""
    here = load_run(tmp_path / "here")
    assert list(there.strategies) == list(here.strategies)
    for name, one in here.strategies.items():
        assert len(one.rounds) == 2
        for ours, theirs in zip(one.rounds, there.strategies[name].rounds, strict=True):
            assert ours.virtual_time == theirs.virtual_time
            assert ours.bytes_total == theirs.bytes_total
            assert ours.messages_lost == theirs.messages_lost
            assert ours.devices_replied == theirs.devices_replied
            assert ours.eval_loss == pytest.approx(theirs.eval_loss, abs=1e-6)
        models = [load_file(tmp_path / at / name / "model.safetensors") for at in ("here", "there")]
        for key, value in models[0].items():
            assert np.allclose(value, models[1][key], rtol=0, atol=1e-6)


@pytest.mark.flower
def test_flwr_run_gives_the_records_of_fedsim_run(tmp_path):
    pytest.importorskip("ray", reason='needs Ray: pip install "fedsim[ray]"')
    path = written(tmp_path)
    run_here(path)
    home = tmp_path / "home"
    said = flwr_run(
        ROOT, home, nodes=4, config={"scenario": str(path), "out": str(tmp_path / "there")}
    )
    assert (tmp_path / "there" / "report.html").exists(), said[-3000:]
    assert_same_runs(tmp_path, load_run(tmp_path / "there"))
    assert "round 1 of 2" in said
    assert running(home) == []


def contexts(config):
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)


def test_server_app_and_client_app_agree_with_fedsim_run(tmp_path, monkeypatch):
    path = written(tmp_path)
    run_here(path)
    monkeypatch.setattr(runner, "write_report", lambda out: None)
    grid = PlainGrid(app.client_app, 4, first=70)
    config = {"scenario": str(path), "out": str(tmp_path / "there"), "set": "record.transfers=true"}
    with flower_identity(0):
        app.server_app(grid=grid, context=contexts(config))
    assert_same_runs(tmp_path, load_run(tmp_path / "there"))
    assert (tmp_path / "there" / "linear" / "transfers.parquet").exists()


def test_nodes_are_found_by_what_they_hold():
    grid = PlainGrid(app.client_app, 3, first=70)
    grid.contexts[70].node_config["partition-id"] = 2
    grid.contexts[72].node_config["partition-id"] = 0
    with flower_identity(0):
        assert find_nodes(grid, 3) == [72, 71, 70]
        assert find_nodes(grid, 2) == [72, 71]


def test_without_an_answer_nodes_go_by_order_with_a_warning(caplog):
    class Silent(PlainGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return []

    with flower_identity(0):
        assert find_nodes(Silent(None, 3), 2) == [1000, 1001]
    assert "0 of 3 nodes say which partition they hold" in caplog.text


def test_fewer_nodes_than_devices_are_an_error():
    with pytest.raises(NoNodesError, match=r"data\.devices is 5, but after 0\.2 s only 3 nodes"):
        find_nodes(PlainGrid(None, 3), 5, wait=0.2)


def test_a_scenario_that_is_nowhere_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScenarioError, match=rf"no file 'no\.yaml' in {tmp_path}, nor in .*{ROOT}"):
        app.server_app(grid=PlainGrid(None, 1), context=contexts({"scenario": "no.yaml"}))


def test_a_message_from_elsewhere_is_refused():
    with flower_identity(0):
        grid = PlainGrid(app.client_app, 1)
        with pytest.raises(Exception, match="the record 'fedsim' is missing"):
            list(grid.send_and_receive([Message(RecordDict(), 1000, "train")]))


def test_an_inner_node_that_does_not_reply_is_an_error_reply(tmp_path):
    path = written(tmp_path)

    class Deaf(PlainGrid):
        def push_messages(self, messages):
            return super().push_messages([m for m in messages if m.metadata.dst_node_id != 71])

    grid = Deaf(app.client_app, 4, first=70)
    orders = app._Orders
    scenario = fedsim.load_scenario(path, ["network.message_loss=0"])
    simulation = build(
        scenario,
        "linear",
        executor=lambda world, name: InnerGridExecutor(
            grid, [70, 71, 72, 73], order=orders(world, name, None)
        ),
    )
    rows = []
    simulation.run(rows.append)
    assert [row.devices_replied for row in rows] == [3, 3]
    assert [row.extra["error_replies"] for row in rows] == [1, 1]


def test_messages_of_one_device_keep_their_order():
    class Echo(PlainGrid):
        def push_messages(self, messages):
            sent = list(messages)
            BATCHES.append([m.metadata.dst_node_id for m in sent])
            return super().push_messages(sent)

    BATCHES.clear()
    grid = Echo(lambda message, context: Message(message.content, reply_to=message), 2, first=70)
    with flower_identity(0):
        contents = [RecordDict({"c": ConfigRecord({"i": i})}) for i in range(3)]
        nodes = [1000, 1001, 1000]
        messages = [Message(c, n, "train") for c, n in zip(contents, nodes, strict=True)]
        replies = InnerGridExecutor(grid, [70, 71])(messages)
    assert [reply.content["c"]["i"] for reply in replies] == [0, 1, 2]
    assert BATCHES == [[70, 71], [70]]


BATCHES = []


def test_the_versions_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == fedsim.__version__


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_what_flower_packs_is_enough(tmp_path):
    """The app's copy has every file that a run reads, and nothing of the tests."""
    from flwr.cli.build import build_fab_from_disk

    (tmp_path / "app.zip").write_bytes(build_fab_from_disk(ROOT))
    shutil.unpack_archive(tmp_path / "app.zip", tmp_path / "app")
    packed = {str(p.relative_to(tmp_path / "app")) for p in (tmp_path / "app").rglob("*.*")}
    assert not [name for name in packed if name.startswith("tests")]
    needed = [*(ROOT / "fedsim" / "report").glob("*.md"), *(ROOT / "scenarios").glob("*.yaml")]
    code = [
        p for room in ("fedsim", "strategies", "topologies") for p in (ROOT / room).rglob("*.py")
    ]
    assert {str(p.relative_to(ROOT)) for p in [*needed, *code]} <= packed
