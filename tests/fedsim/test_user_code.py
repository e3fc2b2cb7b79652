"""What users bring along, through scenarios: privacy wrappers, Flower apps, models."""

import logging
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch.nn.functional import cross_entropy

import fedsim
from fedsim.errors import ScenarioError
from fedsim.flower.compat import identity
from fedsim.flower.session import start
from fedsim.scenario import Scenario
from fedsim.simulation import build
from tests.fedsim.worlds import make_world

torch.set_num_threads(1)

WORLD = {
    "seed": 3,
    "rounds": 2,
    "data": {"dataset": "digits", "devices": 6},
    "training": {"learning_rate": 0.3, "batch_size": 16},
}


def scenario(**keys):
    return Scenario.from_mapping(WORLD | keys)


def private(kind, clipping, **arguments):
    """Return a scenario with one privacy wrapper round FedAvg, without noise."""
    arguments |= {"noise_multiplier": 0.0, "num_sampled_clients": 6}
    entry = {"kind": kind, "strategy": "fedavg", **clipping, **arguments}
    return {"private": entry}


def distance_moved(made):
    simulation = build(made)
    before = simulation.trainer.initial().numpy()
    arrays = simulation.run().arrays
    after = np.concatenate(
        [arrays[name].numpy().ravel() for name in simulation.trainer.layout.names]
    )
    return np.linalg.norm(after - before)


@pytest.mark.parametrize("executor", ["vectorised", "client_app"])
@pytest.mark.parametrize("kind", ["dp_client_fixed", "dp_server_fixed"])
def test_clipping_to_almost_nothing_hardly_moves_the_model(kind, executor):
    entries = private(kind, {"clipping_norm": 1e-6})
    moved = distance_moved(scenario(strategies=entries, executor=executor))
    assert 0 < moved < 1e-5


def test_adaptive_clipping_on_devices_runs_and_a_warning_names_its_executor(caplog):
    entries = private("dp_client_adaptive", {"initial_clipping_norm": 0.1})
    with caplog.at_level(logging.WARNING, logger="fedsim"):
        result = fedsim.run(scenario(rounds=3, strategies=entries))
    rows = result.strategies["private"].rounds
    assert [row.devices_replied for row in rows] == [6, 6, 6]
    assert rows[-1].eval_accuracy > rows[0].eval_accuracy - 0.05
    assert [r.message for r in caplog.records if "client_app" in r.message] == [
        "private: clipping happens in a mod on the devices, so they run one at a time "
        "(executor client_app) instead of vectorised"
    ]


TUTORIAL = "tests.fedsim.tutorial_app"


def tutorial(**keys):
    """Return the scenario of the tutorial app, evaluated on the devices."""
    executor = {
        "kind": "client_app",
        "app": f"{TUTORIAL}:app",
        "run_config": {"local-epochs": 2},
        "train_config": {"lr": 0.05},
    }
    rest = {"evaluation": {"on": "devices"}, "strategies": {"linear": "fedavg"}}
    return scenario(**({"model": f"{TUTORIAL}:Net", "executor": executor} | rest | keys))


def test_an_unmodified_tutorial_app_learns():
    result = fedsim.run(tutorial(rounds=4))
    rows = result.strategies["linear"].rounds
    assert [row.devices_replied for row in rows] == [6] * 4
    assert rows[-1].eval_accuracy > 0.7
    assert rows[-1].eval_loss < rows[0].eval_loss
    assert rows[-1].train_loss < rows[0].train_loss
    assert result.strategies["linear"].summary["final_accuracy"] == rows[-1].eval_accuracy


seen = ClientApp()


@seen.train()
def note(message, context):
    """Reply with the model that came, and keep what else came."""
    NOTED.append((dict(message.content["config"]), dict(context.run_config)))
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)


NOTED = []


def test_configs_hold_the_local_work_and_what_the_user_adds():
    NOTED.clear()
    added = {"a": 1, "b": 0.5, "c": "text", "d": True}
    executor = {
        "kind": "client_app",
        "app": f"{__name__}:seen",
        "run_config": added | {"local-epochs": 3},
        "train_config": added | {"learning-rate": 0.01},
    }
    made = scenario(rounds=1, executor=executor, strategies={"linear": "fedavg"})
    build(Scenario.from_mapping(made.resolved())).run()
    work = {"batch-size": 16, "local-epochs": 1, "learning-rate": 0.3}
    assert len(NOTED) == 6
    for config, run_config in NOTED:
        assert config == {"server-round": 1} | work | added | {"learning-rate": 0.01}
        assert run_config == {"num-server-rounds": 1} | work | added | {"local-epochs": 3}
        assert {type(run_config[key]) for key in added} == {int, float, str, bool}


@pytest.mark.parametrize("value", [[1], {"x": 1}, None])
def test_a_config_holds_plain_values_only(value):
    executor = {"kind": "client_app", "run_config": {"x": value}}
    with pytest.raises(ScenarioError, match=r"executor\.run_config\.x"):
        scenario(executor=executor, strategies={"linear": "fedavg"})


@pytest.mark.parametrize(("name", "what"), [("train", "function 'train'"), ("Net", "type 'Net'")])
def test_an_app_that_is_none_is_named_when_it_is_built(name, what):
    executor = {"kind": "client_app", "app": f"{TUTORIAL}:{name}"}
    with pytest.raises(ScenarioError, match=rf"executor\.app: this is a {what}, not a Flower"):
        build(tutorial(executor=executor))


lonely = ClientApp()
lonely.evaluate()(lambda message, context: None)


@pytest.mark.parametrize("kind", ["client_app", "flower"])
def test_an_app_without_a_train_function_is_refused_when_it_is_built(kind):
    executor = {"kind": kind, "app": f"{__name__}:lonely"}
    with pytest.raises(ScenarioError, match=r"executor\.app: this ClientApp has no train function"):
        build(scenario(executor=executor, strategies={"linear": "fedavg"}))


@pytest.mark.parametrize("name", ["eval_accuracy", "eval_acc", "accuracy"])
@pytest.mark.parametrize("loss", ["eval_loss", "loss"])
def test_devices_may_name_their_scores_in_several_ways(name, loss):
    rows = []
    app = ClientApp()

    @app.evaluate()
    def _(message, context):
        metrics = {name: 0.25 * context.node_config["partition-id"], loss: 2.0, "num-examples": 1}
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    app.train()(note)
    world = make_world(3, executor="client_app", app=app)
    start(FedAvg(), world.grid, world.initial(), rounds=1, seed=1, record=rows.append)
    assert (rows[0].eval_accuracy, rows[0].eval_loss) == (0.25, 2.0)
    assert rows[0].accuracy_std == pytest.approx(np.std([0, 0.25, 0.5]))
    assert rows[0].extra["accuracy_worst_10_percent"] == 0


restless = ClientApp()


@restless.train()
def wander(message, context):
    """Move the model by draws of all three global generators."""
    drawn = random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002
    DRAWN.append((context.node_config["partition-id"], drawn))
    arrays = [a.numpy() + np.float32(0.01 * sum(drawn)) for a in message.content["arrays"].values()]
    named = zip(message.content["arrays"], map(Array, arrays), strict=True)
    metrics = MetricRecord({"num-examples": 1, "train_loss": sum(drawn)})
    content = RecordDict({"arrays": ArrayRecord(dict(named)), "metrics": metrics})
    return Message(content, reply_to=message)


DRAWN = []


def restless_scenario(**keys):
    half = {"kind": "fedavg", "fraction_train": 0.5}
    executor = {"kind": "client_app", "app": f"{__name__}:restless"}
    return scenario(**({"strategies": {"one": half, "two": half}, "executor": executor} | keys))


def test_a_server_that_does_not_wait_says_where_it_does_and_where_it_has_no_scores(caplog):
    drop = {"kind": "drop_non_finite", "strategy": {"kind": "fedbuff", "buffer_size": 2}}
    build(scenario(strategies={"one": drop}))
    assert "strategies.one: DropNonFinite works in rounds, and so does the FedBuff" in caplog.text
    caplog.clear()
    build(scenario(strategies={"one": "fedasync"}))
    assert not caplog.text
    build(scenario(strategies={"one": "fedasync"}, evaluation={"on": "devices"}))
    assert "strategies.one: FedAsync asks no device to evaluate" in caplog.text


def replies(error):
    """Return an app whose train function does on device 1 what only some apps do."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] == 1:
            return error()
        metrics = {"num-examples": 3, "train_loss": [1.0, 2.0], "by_class": [0.1, 0.2]}
        content = RecordDict(
            {"arrays": message.content["arrays"], "metrics": MetricRecord(metrics)}
        )
        return Message(content, reply_to=message)

    return app


returns_nothing = replies(lambda: None)
exits = replies(sys.exit)


@pytest.mark.parametrize(
    ("app", "why"),
    [("returns_nothing", "returned None, not a Message"), ("exits", "SystemExit")],
)
@pytest.mark.parametrize("kind", ["fedavg", "fedbuff"])
def test_an_app_that_returns_nothing_or_exits_has_replied_with_an_error(app, why, kind, caplog):
    executor = {"kind": "client_app", "app": f"{__name__}:{app}"}
    result = fedsim.run(scenario(executor=executor, strategies={"one": kind}))
    assert result.strategies["one"].rounds[0].extra["error_replies"] >= 1
    assert any("device 1" in r.message and why in r.message for r in caplog.records)


def test_metrics_that_are_lists_are_the_strategys_and_no_figures_of_a_line():
    executor = {"kind": "client_app", "app": f"{__name__}:exits"}
    result = fedsim.run(scenario(executor=executor, strategies={"one": "fedavg"}))
    assert [row.train_loss for row in result.strategies["one"].rounds] == [None, None]
    assert result.strategies["one"].rounds[1].devices_replied == 5


def test_a_module_that_exits_when_it_is_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "leaves_at_once.py").write_text("import sys\nsys.exit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    executor = {"kind": "client_app", "app": "leaves_at_once:app"}
    with pytest.raises(ScenarioError, match=r"cannot import 'leaves_at_once:app' \(SystemExit: 5"):
        scenario(executor=executor)


def test_an_app_that_draws_from_global_generators_is_reproducible():
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    DRAWN.clear()
    result = fedsim.run(restless_scenario())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    one, two = (result.strategies[name].rounds for name in ("one", "two"))
    assert [replace(row, wall_time=0) for row in one] == [replace(row, wall_time=0) for row in two]
    assert len(DRAWN) == 12
    assert DRAWN[:6] == DRAWN[6:]
    assert len({drawn for _, drawn in DRAWN}) == 6


def test_what_an_app_draws_does_not_disturb_who_is_sampled():
    sampled = []
    for executor in ({"kind": "vectorised"}, restless_scenario().executor.spec()):
        made = restless_scenario(rounds=4, executor=executor)
        simulation = build(made, "one")
        simulation.grid.trips = []
        simulation.run()
        sampled.append([(trip.round, trip.device) for trip in simulation.grid.trips])
    assert len(sampled[0]) == 12
    assert sampled[0] == sampled[1]


def test_what_a_device_draws_depends_on_it_and_how_often_it_was_asked():
    DRAWN.clear()
    world = make_world(3, executor="client_app", app=restless)
    config = ConfigRecord({"server-round": 1})
    content = RecordDict({"arrays": world.initial(), "config": config})
    with identity():
        for devices in ([0, 1, 2], [2], [1]):
            world.grid.send_and_receive([Message(content, 1000 + i, "train") for i in devices])
    by_device = {i: [drawn for device, drawn in DRAWN if device == i] for i in range(3)}
    assert [len(by_device[i]) for i in range(3)] == [1, 2, 2]
    assert len({drawn for _, drawn in DRAWN}) == 5


def test_the_example_in_the_documentation_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "flower.md").read_text(encoding="utf-8")
    files = re.findall(r"^`([\w./]+)`[^\n]*:\n\n```\w+\n(.*?)^```", text, re.M | re.S)
    assert [name for name, _ in files] == ["my_app/task.py", "my_app/client_app.py", "my_app.yaml"]
    for name, content in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    result = fedsim.run(fedsim.load_scenario(tmp_path / "my_app.yaml"))
    assert result.strategies["linear"].rounds[-1].eval_accuracy > 0.8
    for module in ("my_app", "my_app.task", "my_app.client_app"):
        del sys.modules[module]


def smoothed(outputs, y):
    return cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


def averaged(outputs, y):
    return cross_entropy(outputs, y)


class Pair(torch.nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return super().forward(x), x


def test_a_loss_may_be_a_function_of_ones_own():
    entries = {"strategies": {"mine": {"kind": "fedavg"}}}
    training = WORLD["training"] | {"loss": f"{__name__}:smoothed"}
    simulation = build(scenario(training=training, **entries))
    rows = []
    simulation.run(rows.append)
    arrays = torch.zeros(2, 10), torch.tensor([1, 3])
    assert torch.equal(simulation.trainer.stack.loss.per_sample(*arrays), smoothed(*arrays))
    assert rows[-1].eval_loss < np.log(10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"training": {"loss": f"{__name__}:averaged"}}, r"training\.loss: 'averaged' gives shape"),
        ({"training": {"loss": f"{__name__}:WORLD"}}, r"training\.loss: .* is a dict, not a funct"),
        ({"training": {"loss": f"{__name__}:absent"}}, r"training\.loss: cannot import"),
        ({"training": {"loss": "huber"}}, r"training\.loss: 'huber' is not one of"),
        ({"model": {"kind": f"{__name__}:Pair"}}, "model: Pair gives a tuple, not one tensor"),
    ],
)
def test_losses_and_models_of_the_wrong_form_are_refused_when_built(keys, message):
    with pytest.raises(ScenarioError, match=message):
        build(scenario(strategies={"mine": {"kind": "fedavg"}}, **keys))
