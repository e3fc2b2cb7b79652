import json
import math
from pathlib import Path

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg
from safetensors.numpy import load_file

import fedsim
from fedsim import runner
from fedsim.errors import ScenarioError
from fedsim.results import load_run
from fedsim.scenario import Scenario

TINY = {
    "name": "tiny",
    "seed": 3,
    "rounds": 3,
    "data": {"dataset": "digits", "devices": 6, "partition": {"kind": "dirichlet", "alpha": 0.5}},
    "training": {"learning_rate": 0.3, "batch_size": 16},
    "devices": {"speed": {"kind": "lognormal", "median": "200 samples/s", "sigma": 0.7}},
    "topology": {
        "kind": "star",
        "uplink": {"kind": "lognormal", "median": "64 kbit/s", "sigma": 0.5},
        "downlink": "256 kbit/s",
        "latency": "20 ms",
    },
    "links": {"kind": "on_off", "mean_up": "30 s", "mean_down": "5 s"},
    "network": {"message_loss": 0.05},
    "round_timeout": "20 s",
    "evaluation": {"target": 0.6},
    "strategies": {"linear": {"kind": "fedavg"}, "fedadam": {"kind": "fedadam", "eta": 0.05}},
}


@pytest.fixture
def no_report(monkeypatch):
    """Leave the page and its plots out where a test is about something else: they take seconds."""
    monkeypatch.setattr(runner, "write_report", lambda directory: directory)


def tiny(*overrides, **changes):
    return Scenario.from_mapping(TINY | changes, overrides)


def lines(directory):
    """Return the rounds of each strategy without their wall time."""
    found = {}
    for path in sorted(Path(directory).glob("*/rounds.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{k: v for k, v in r.items() if k != "wall_time"} for r in rows]
    return found


def test_a_run_writes_the_files_of_the_contract(tmp_path):
    out = tmp_path / "run"
    told = []
    result = fedsim.run(tiny(), out, progress=told.append)
    assert {p.name for p in out.iterdir()} == {
        "scenario.yaml", "summary.json", "world.json", "report.html", "plots", "linear", "fedadam",
    }  # fmt: skip
    assert {p.name for p in (out / "linear").iterdir()} == {"rounds.jsonl", "model.safetensors"}
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["strategies"]) == ["linear", "fedadam"]
    assert list(summary["strategies"]["linear"]) == [
        "rounds", "virtual_time", "wall_time", "bytes_total", "final_accuracy", "best_accuracy",
        "final_loss", "rounds_to_target", "time_to_target", "bytes_to_target", "diverged",
    ]  # fmt: skip
    first = json.loads((out / "linear" / "rounds.jsonl").read_text().splitlines()[0])
    assert list(first) == [
        "round", "virtual_time", "wall_time", "train_loss", "eval_loss", "eval_accuracy",
        "accuracy_std", "consensus_distance", "bytes_down", "bytes_up", "bytes_peer",
        "messages_sent", "messages_lost", "devices_selected", "devices_replied", "mean_staleness",
    ]  # fmt: skip
    model = load_file(out / "linear" / "model.safetensors")
    assert sum(array.size for array in model.values()) == 650
    assert [p.state for p in told if p.strategy == "linear"] == ["running"] * 4 + ["done"]
    frame = result.to_pandas()
    assert len(frame) == 6
    assert set(frame.strategy) == {"linear", "fedadam"}


@pytest.mark.usefixtures("no_report")
def test_same_seed_same_bytes_whatever_the_jobs(tmp_path):
    fedsim.run(tiny(), tmp_path / "one")
    fedsim.run(tiny(), tmp_path / "two")
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    for name in ("scenario.yaml", "world.json", "linear/model.safetensors"):
        one, two = (tmp_path / d / name for d in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    fedsim.run(tiny("seed=4"), tmp_path / "other")
    assert lines(tmp_path / "other") != lines(tmp_path / "one")


@pytest.mark.usefixtures("no_report")
@pytest.mark.slow
def test_processes_write_the_same_files(tmp_path):
    fedsim.run(tiny(), tmp_path / "one")
    fedsim.run(tiny(), tmp_path / "two", jobs=2)
    assert lines(tmp_path / "one") == lines(tmp_path / "two")
    for name in ("scenario.yaml", "world.json", "linear/model.safetensors"):
        one, two = (tmp_path / d / name for d in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("executor", ["{kind: vectorised, chunk: 2}", "client_app"])
def test_another_chunk_or_executor_changes_rounding_only(tmp_path, executor):
    fedsim.run(tiny(), tmp_path / "one")
    fedsim.run(tiny(f"executor={executor}"), tmp_path / "two")
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, rows in one.items():
        for a, b in zip(rows, two[name], strict=True):
            for key in ("virtual_time", "bytes_down", "bytes_up", "messages_lost"):
                assert a[key] == b[key]
            for key in ("train_loss", "eval_loss"):
                assert a[key] == pytest.approx(b[key], abs=1e-5)
            assert a["eval_accuracy"] == pytest.approx(b["eval_accuracy"], abs=2.5 / 449)


def test_strategies_see_the_same_world_and_may_override_it():
    strategies = {
        "linear": {"kind": "fedavg"},
        "fast": {"kind": "fedavg", "topology": {"uplink": "1 Gbit/s"}},
        "longer": {"kind": "fedavg", "training": {"local_epochs": 3}},
    }
    result = fedsim.run(tiny(strategies=strategies))
    time = {name: r.summary["virtual_time"] for name, r in result.strategies.items()}
    assert time["fast"] < time["linear"] < time["longer"]
    first = {name: r.rounds[0] for name, r in result.strategies.items()}
    assert first["linear"].bytes_down == first["longer"].bytes_down


@pytest.mark.usefixtures("no_report")
def test_a_strategy_that_diverges_is_reported_and_the_others_finish(tmp_path):
    strategies = {
        "wild": {"kind": "fedavg", "training": {"learning_rate": 1e6}},
        "linear": {"kind": "fedavg"},
    }
    result = fedsim.run(tiny(strategies=strategies), tmp_path)
    assert result.strategies["wild"].summary["diverged"] is True
    assert result.strategies["wild"].summary["diverged_at"]["round"] == 1
    assert "loss is" in result.strategies["wild"].summary["diverged_at"]["reason"]
    assert result.strategies["linear"].summary["diverged"] is False
    assert len(result.strategies["linear"].rounds) == 3


def refuse(value):
    raise AssertionError(f"{value} in a JSON file")


@pytest.mark.usefixtures("no_report")
def test_no_json_file_holds_nan(tmp_path):
    strategies = {
        "wild": {"kind": "fedprox", "proximal_mu": 5.0, "training": {"learning_rate": 1e6}},
        "linear": {"kind": "fedavg"},
    }
    fedsim.run(tiny("evaluation.every=2", strategies=strategies), tmp_path)
    for path in tmp_path.rglob("*.json*"):
        for line in (
            path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        ):
            json.loads(line, parse_constant=refuse)


def test_a_target_reached_stops_and_counts(tmp_path):
    result = fedsim.run(tiny("rounds=30", "stop={accuracy: 0.5}", "evaluation={every: 1}"))
    summary = result.strategies["linear"].summary
    assert summary["rounds"] < 30
    assert summary["rounds_to_target"] == summary["rounds"]
    assert summary["time_to_target"] == summary["virtual_time"]
    assert summary["bytes_to_target"] == summary["bytes_total"]


@pytest.mark.usefixtures("no_report")
def test_an_existing_directory_is_refused_resumed_or_replaced(tmp_path):
    out = tmp_path / "run"
    fedsim.run(tiny(), out)
    before = lines(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ScenarioError, match=r"--resume.*--force"):
        fedsim.run(tiny(), out)
    with pytest.raises(ScenarioError, match=r"training.learning_rate: 0.3, now 0.1"):
        fedsim.run(tiny("training.learning_rate=0.1"), out, resume=True)
    fedsim.run(tiny("training.learning_rate=0.1"), out, force=True)
    assert lines(out) != before
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_report")
def test_an_earlier_run_that_cannot_be_moved_aside_stays_whole(tmp_path, monkeypatch):
    def names():
        return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))

    fedsim.run(tiny("rounds=1"), tmp_path)
    before = names()
    moved = []
    rename = Path.rename

    def refuse(path, target):
        if path.name == "linear" and ".replaced" in str(target):
            raise PermissionError(13, "Permission denied")
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(
        Path, "iterdir", lambda path: (path / n for n in ("summary.json", "linear", "fedadam"))
    )
    with pytest.raises(ScenarioError, match=r"--out: cannot write .*: Permission denied"):
        fedsim.run(tiny("rounds=2"), tmp_path, force=True)
    assert names() == before
    assert moved == ["summary.json", "summary.json"]


@pytest.mark.usefixtures("no_report")
def test_an_earlier_run_that_cannot_be_deleted_is_out_of_the_way(tmp_path, monkeypatch, caplog):
    fedsim.run(tiny("rounds=1"), tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("shutil.rmtree", refuse)
    result = fedsim.run(tiny("rounds=2"), tmp_path, force=True)
    assert [len(strategy.rounds) for strategy in result.strategies.values()] == [2, 2]
    assert ".replaced-" in caplog.text


@pytest.mark.usefixtures("no_report")
def test_data_that_change_between_two_runs_are_read_again(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "own.npz"
    found = []
    for n in (40, 60):
        x, y = rng.normal(size=(n, 3)).astype(np.float32), np.arange(n) % 2
        np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
        data = {"dataset": {"kind": "npz", "path": str(path)}, "devices": 4}
        result = fedsim.run(tiny("rounds=1", data=data), tmp_path / f"run-{n}")
        found.append(sum(result.world["devices"]["samples"]))
    assert found == [40, 60]


@pytest.mark.usefixtures("no_report")
def test_an_interrupted_run_resumes_to_the_same_result(tmp_path):
    fedsim.run(tiny(), tmp_path / "whole")

    def interrupt(progress):
        if progress.strategy == "fedadam" and progress.round == 2:
            raise KeyboardInterrupt

    out = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        fedsim.run(tiny(), out, progress=interrupt)
    found = load_run(out)
    assert found.strategies["linear"].complete
    assert not found.strategies["fedadam"].complete
    assert len(found.strategies["fedadam"].rounds) == 2
    kept = (out / "linear" / "rounds.jsonl").read_bytes()
    fedsim.run(tiny(), out, resume=True)
    assert (out / "linear" / "rounds.jsonl").read_bytes() == kept
    assert lines(out) == lines(tmp_path / "whole")
    assert load_run(out).strategies["fedadam"].complete


@pytest.mark.usefixtures("no_report")
def test_nothing_is_written_when_a_strategy_cannot_be_built(tmp_path):
    strategies = {"linear": {"kind": "fedavg"}, "odd": {"kind": "collections:OrderedDict"}}
    with pytest.raises(ScenarioError, match=r"strategies.odd.*not a Flower Strategy"):
        fedsim.run(tiny(strategies=strategies), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_report")
def test_a_strategy_that_fails_does_not_take_the_others_along(tmp_path, monkeypatch):
    strategies = {"broken": {"kind": "tests.fedsim.test_session:Broken"}, "linear": "fedavg"}
    with pytest.raises(runner.RunError, match="broken strategy") as error:
        fedsim.run(tiny(strategies=strategies), tmp_path)
    assert str(error.value).endswith("strategy'). Every other strategy is complete.")
    found = load_run(tmp_path)
    assert found.strategies["linear"].complete
    assert not found.strategies["broken"].complete
    assert "broken strategy" in found.strategies["broken"].failure
    assert "broken" not in json.loads((tmp_path / "summary.json").read_text())["strategies"]
    kept = (tmp_path / "linear" / "rounds.jsonl").read_bytes()
    monkeypatch.setattr("tests.fedsim.test_session.Broken.aggregate_train", FedAvg.aggregate_train)
    again = fedsim.run(tiny(strategies=strategies), tmp_path, resume=True)
    assert again.strategies["broken"].complete
    assert again.strategies["broken"].failure is None
    assert (tmp_path / "linear" / "rounds.jsonl").read_bytes() == kept


def test_nothing_is_said_of_other_strategies_where_there_are_none():
    strategies = {"broken": {"kind": "tests.fedsim.test_session:Broken"}}
    with pytest.raises(runner.RunError) as error:
        fedsim.run(tiny(strategies=strategies))
    assert str(error.value).endswith("strategy').")


def test_evaluation_on_devices_and_on_validation():
    federated = fedsim.run(tiny("evaluation={on: devices}"))
    free = fedsim.run(tiny("evaluation={on: devices, cost: free}"))
    name = "linear"
    last = federated.strategies[name].rounds[-1]
    assert last.accuracy_std > 0
    assert 0 <= last.extra["accuracy_worst_10_percent"] < last.eval_accuracy
    times = [r.strategies[name].summary["virtual_time"] for r in (free, federated)]
    assert times[0] < times[1]
    held_out = fedsim.run(tiny("evaluation={on: validation}", "data.validation_fraction=0.2"))
    assert held_out.strategies[name].rounds[-1].eval_accuracy > 0.3


@pytest.mark.usefixtures("no_report")
def test_the_world_that_is_recorded_is_the_one_that_ran(tmp_path):
    fedsim.run(tiny(), tmp_path)
    world = json.loads((tmp_path / "world.json").read_text())
    simulation = fedsim.build(tiny(), "linear")
    data = simulation.trainer.data
    assert world["devices"]["samples"] == data.size.tolist()
    assert np.array_equal(world["devices"]["label_counts"], data.label_counts())
    assert world["networks"][0]["strategies"] == ["linear", "fedadam"]
    assert world["model"]["size_bytes"] == 2600
    assert all(math.isclose(x, 256e3) for x in world["networks"][0]["downlink_bps"])


@pytest.mark.usefixtures("no_report")
def test_transfers_and_work_are_recorded_on_request(tmp_path):
    fedsim.run(tiny("record.transfers=true"), tmp_path)
    found = load_run(tmp_path).strategies["linear"]
    transfers = found.table("transfers").to_pandas()
    work = found.table("compute").to_pandas()
    rows = found.rounds
    assert transfers[transfers.kind == "down"].size_bytes.sum() == sum(r.bytes_down for r in rows)
    arrived = transfers[(transfers.kind == "up") & (transfers.outcome == "delivered")]
    assert len(arrived) >= sum(row.devices_replied for row in rows)
    assert (transfers.outcome == "lost").sum() == sum(row.messages_lost for row in rows)
    assert (transfers.finished >= transfers.released).all()
    assert (work.finished > work.started).all()
    assert transfers.route[0].tolist()[-1].startswith("down-")
    assert (transfers.destination == 6).equals(transfers.kind == "up")


def test_scores_may_be_taken_on_a_fixed_part_of_the_common_samples(tmp_path, no_report):
    result = fedsim.run(tiny(rounds=1, evaluation={"samples": 50}), tmp_path)
    assert json.loads((tmp_path / "world.json").read_text())["data"]["test_samples"] == 50
    accuracy = result.strategies["linear"].summary["final_accuracy"]
    assert round(50 * accuracy, 9).is_integer()


def test_data_made_on_devices_have_no_common_samples_to_choose_from():
    with pytest.raises(
        ScenarioError, match=r"evaluation\.samples: synthetic is made on the devices"
    ):
        fedsim.run(tiny(data={"dataset": "synthetic", "devices": 6}, evaluation={"samples": 9}))


@pytest.mark.usefixtures("no_report")
def test_the_last_models_confusion_matrix_is_written(tmp_path):
    run = fedsim.run(tiny("evaluation.confusion=true"), tmp_path / "out")
    text = (tmp_path / "out/linear/confusion.csv").read_text().splitlines()
    counts = np.array([line.split(",")[1:] for line in text[1:]], int)
    assert [line.split(",")[0] for line in text] == ["true", *map(str, range(10))]
    share = counts.trace() / counts.sum()
    assert run.strategies["linear"].rounds[-1].eval_accuracy == pytest.approx(share)
    with pytest.raises(ScenarioError, match="not 'on: devices'"):
        tiny("evaluation={on: devices, confusion: true}")
