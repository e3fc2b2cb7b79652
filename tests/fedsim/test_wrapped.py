"""A user's own Flower app on a simulated network: the example app, and `NetworkGrid.wrap`."""

import sys
import tomllib

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

import fedsim
from fedsim.errors import NoNodesError, ScenarioError
from fedsim.results import load_run
from tests.fedsim.flower_runs import ROOT
from tests.plain_grid import PlainGrid, flower_identity

EXAMPLE = ROOT / "examples" / "flower_app"
DEFAULTS = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))
DEFAULTS = DEFAULTS["tool"]["flwr"]["app"]["config"]


class ForgivingGrid(PlainGrid):
    """What an app raises becomes an error reply, as on Flower's own grids."""

    def __init__(self, app, n_nodes, run_config=None, **options):
        def answer(message, context):
            try:
                return app(message=message, context=context)
            except Exception as error:
                return Message(Error(2, repr(error)), reply_to=message)

        super().__init__(answer, n_nodes, **options)
        for context in self.contexts.values():
            context.run_config.update(run_config or {})


@pytest.fixture
def example(monkeypatch):
    """Return what runs the example app with a run config, and its module of the task."""
    monkeypatch.syspath_prepend(EXAMPLE)
    from flower_app import client_app, server_app, task

    def run(**config):
        config = DEFAULTS | {"num-server-rounds": 2} | config
        grid = ForgivingGrid(client_app.app, 4, config, first=70)
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config
        )
        with flower_identity(0):
            server_app.app(grid=grid, context=context)

    yield run, task
    for module in [name for name in sys.modules if name.startswith("flower_app")]:
        del sys.modules[module]


def test_the_example_app_runs_without_a_network(example):
    run, _ = example
    run()
    run(strategy="gossip")


@pytest.mark.parametrize("strategy", ["fedavg", "gossip"])
def test_the_example_app_runs_on_a_network_and_leaves_records(
    example, strategy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("fedsim.wrapped.write_report", lambda out: None)
    run, _ = example
    world = {"fedavg": "network.yaml", "gossip": str(tmp_path / "ring.yaml")}[strategy]
    ring = (EXAMPLE / "network.yaml").read_text("utf-8") + "peers: {kind: ring}\n"
    (tmp_path / "ring.yaml").write_text(ring, "utf-8")
    run(network=world, out=str(tmp_path / "out"), strategy=strategy)
    rows = load_run(tmp_path / "out").strategies["app"].rounds
    assert [row.round for row in rows] == [1, 2]
    assert all(row.bytes_total > 0 for row in rows)
    assert 0 < rows[0].virtual_time < rows[1].virtual_time
    assert f"{rows[1].virtual_time:.1f} s of virtual time" in capsys.readouterr().out
    if strategy == "fedavg":
        assert rows[1].eval_accuracy > 0.2
        down = 4 * 2 * 4 * (64 * 32 + 32 + 32 * 10 + 10)  # to train and to evaluate
        assert rows[0].bytes_down == down


WORLD = """
data: {dataset: digits, devices: 3}
topology: {kind: star, bandwidth: 1 Mbit/s, latency: 10 ms}
"""


def world(tmp_path, more=""):
    path = tmp_path / "world.yaml"
    path.write_text(WORLD + more, "utf-8")
    return path


echo = ClientApp()


@echo.train()
def give_back(message, context):
    """Reply with the model that came, if the device is not told to fail."""
    content = RecordDict({"arrays": message.content["arrays"]})
    return Message(content, reply_to=message)


def test_a_wrapped_grid_is_on_time(tmp_path):
    grid = ForgivingGrid(echo, 3)
    with flower_identity(0), fedsim.NetworkGrid.wrap(grid, world(tmp_path)) as net:
        arrays = ArrayRecord([np.zeros(1000, np.float32)])
        messages = [Message(RecordDict({"arrays": arrays}), 1000 + i, "train") for i in range(3)]
        replies = net.send_and_receive(messages)
        samples = net._work.sizes.max()
        way = 8 * 4000 / 1e6 + 0.01
        assert net.now == pytest.approx(2 * way + samples / 500)
    assert len(replies) == 3


def test_an_apps_exception_passes_through(tmp_path):
    with (
        flower_identity(0),
        pytest.raises(ZeroDivisionError),
        fedsim.NetworkGrid.wrap(ForgivingGrid(echo, 3), world(tmp_path)),
    ):
        1 / 0  # noqa: B018


def test_a_strategy_that_waits_for_nodes_does_not_wait_for_ever(tmp_path):
    with (
        flower_identity(0),
        pytest.raises(NoNodesError, match="waits for more devices than the 3"),
        fedsim.NetworkGrid.wrap(ForgivingGrid(echo, 3), world(tmp_path)) as net,
    ):
        FedAvg(min_available_nodes=4).start(net, ArrayRecord([np.zeros(3)]), num_rounds=1)


def test_too_few_nodes_and_bad_worlds_are_refused(tmp_path):
    with flower_identity(0):
        with pytest.raises(NoNodesError, match=r"data\.devices is 3"):
            fedsim.NetworkGrid.wrap(ForgivingGrid(echo, 2), world(tmp_path), wait=0.1).__enter__()
        bad = world(tmp_path, "topologi: {}\n")
        with pytest.raises(ScenarioError, match="topologi"):
            fedsim.NetworkGrid.wrap(ForgivingGrid(echo, 3), bad).__enter__()
