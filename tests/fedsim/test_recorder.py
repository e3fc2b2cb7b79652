import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsim.errors import ScenarioError
from fedsim.recorder import (
    ComputeRow,
    LinkRow,
    NetworkWorld,
    Recorder,
    RoundRow,
    TransferRow,
    World,
    dump_json,
    strategy_directory,
    summarise,
    world_record,
    write_summary,
    write_world,
)

ROUND_KEYS = [
    "round", "virtual_time", "wall_time", "train_loss", "eval_loss", "eval_accuracy",
    "accuracy_std", "consensus_distance", "bytes_down", "bytes_up", "bytes_peer", "messages_sent",
    "messages_lost", "devices_selected", "devices_replied", "mean_staleness",
]  # fmt: skip
SUMMARY_KEYS = [
    "rounds", "virtual_time", "wall_time", "bytes_total", "final_accuracy", "best_accuracy",
    "final_loss", "rounds_to_target", "time_to_target", "bytes_to_target", "diverged",
]  # fmt: skip


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def row(number: int, **values) -> RoundRow:
    return RoundRow(round=number, virtual_time=10.0 * number, wall_time=0.5 * number, **values)


measure = st.none() | st.floats(allow_nan=True, allow_infinity=True)


@st.composite
def rows(draw):
    count = st.integers(0, 2**60)
    values = {name: draw(measure) for name in RoundRow.MEASURES}
    values |= {name: draw(count) for name in RoundRow.COUNTS if name != "round"}
    extra = draw(st.dictionaries(st.text(), measure, max_size=3))
    return row(draw(st.integers(0, 10**6)), **values, extra=extra)


@given(rows())
def test_a_line_holds_the_contract_keys_in_order_no_nan_and_reads_back_equal(any_row):
    record = strict(dump_json(any_row.to_record()))
    assert list(record)[:16] == ROUND_KEYS
    assert all(key.startswith("strategy.") for key in list(record)[16:])
    assert RoundRow.from_record(record) == any_row


def test_numpy_scalars_are_recorded_as_plain_numbers():
    line = row(
        np.int64(3), eval_loss=np.float32(0.5), bytes_up=np.int32(7), extra={"p": np.int8(2)}
    )
    assert dump_json(line.to_record()).count("0.5") == 1
    assert strict(dump_json(line.to_record()))["strategy.p"] == 2
    assert type(line.bytes_up) is int


@pytest.mark.parametrize("time", [math.nan, math.inf])
def test_a_clock_that_is_not_finite_is_an_error(time):
    with pytest.raises(ValueError, match="virtual_time is"):
        RoundRow(round=1, virtual_time=time, wall_time=0.0)


def test_dump_json_turns_whatever_is_not_finite_into_null():
    value = {"a": [np.nan, {"b": np.array([[1.0, -np.inf]])}], np.inf: np.float16("inf"), "c": (1,)}
    assert strict(dump_json(value)) == {"a": [None, {"b": [[1.0, None]]}], "None": None, "c": [1]}
    with pytest.raises(TypeError, match="no form in JSON"):
        dump_json({"x": object()})


def test_each_round_is_on_disk_before_the_next_one_starts(tmp_path):
    with Recorder(tmp_path, "fedavg") as recorder:
        for number in (1, 2):
            recorder.round(row(number))
            lines = (tmp_path / "fedavg" / "rounds.jsonl").read_text().splitlines()
            assert [strict(line)["round"] for line in lines] == list(range(1, number + 1))
    assert recorder.rows == [row(1), row(2)]


def test_a_second_recorder_of_the_same_name_starts_anew(tmp_path):
    with Recorder(tmp_path, "a", transfers=True) as recorder:
        recorder.round(row(1))
    with Recorder(tmp_path, "a"):
        pass
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["rounds.jsonl"]
    assert (tmp_path / "a" / "rounds.jsonl").read_bytes() == b""


def test_in_memory_nothing_is_written_and_everything_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Recorder(None, "any / name", transfers=True) as recorder:
        recorder.round(row(1))
        recorder.compute(ComputeRow(round=1, device=4, kind="train", started=0.0, finished=2.5))
        tables = recorder.tables()
    assert recorder.rows == [row(1)]
    assert tables["compute"].to_pylist() == [
        {"round": 1, "device": 4, "kind": "train", "started": 0.0, "finished": 2.5}
    ]
    assert tables["transfers"].num_rows == 0
    assert not list(tmp_path.iterdir())


def transfer(message: int) -> TransferRow:
    return TransferRow(
        round=1, message=message, kind="up", source=2, destination=9, released=0.0, started=0.1,
        first_byte=None, finished=None, size_bytes=100, outcome="failed", route=["up-2", "server"],
    )  # fmt: skip


def test_transfers_and_links_come_back_from_parquet_also_after_an_interruption(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("fedsim.recorder._ROWS_PER_GROUP", 2)
    link = LinkRow(
        link="up-2", bandwidth_bps=math.inf, latency=0.0, carried_bytes=100.0, busy_time=1.5,
        change_times=[0.0, 7.0], change_rates_bps=[1e6, 0.0],
    )  # fmt: skip

    def interrupted() -> None:
        with Recorder(tmp_path, "s", transfers=True) as recorder:
            for message in range(5):
                recorder.transfer(transfer(message))
            recorder.link(link)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    table = pq.read_table(tmp_path / "s" / "transfers.parquet")
    assert table.schema == TransferRow.SCHEMA
    assert table["message"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["route"][0].as_py() == ["up-2", "server"]
    assert (
        pq.read_table(tmp_path / "s" / "links.parquet").to_pylist()[0]["bandwidth_bps"] == math.inf
    )
    assert pq.read_table(tmp_path / "s" / "compute.parquet").num_rows == 0


def test_same_rows_give_the_same_bytes(tmp_path):
    for run in ("a", "b"):
        with Recorder(tmp_path / run, "s", transfers=True) as recorder:
            recorder.round(row(1, extra={"x": 0.1 + 0.2}))
            recorder.transfer(transfer(1))
    for file in ("rounds.jsonl", "transfers.parquet"):
        assert (tmp_path / "a/s" / file).read_bytes() == (tmp_path / "b/s" / file).read_bytes()


@pytest.mark.parametrize(
    "name", ["", "..", "a/b", "a\\b", "plots", "Summary.json", "a\nb", "x" * 300]
)
def test_a_name_that_is_no_directory_is_refused(name):
    with pytest.raises(ScenarioError, match="cannot be the name of a directory"):
        strategy_directory(Path("run"), name)


def test_summary_of_nothing_has_all_keys():
    entry = summarise([], target=0.9)
    assert list(entry) == SUMMARY_KEYS
    assert entry["rounds"] == entry["bytes_total"] == 0
    assert entry["final_accuracy"] is entry["time_to_target"] is None


def test_summary_takes_the_first_time_at_the_target_and_the_last_evaluation():
    run = [
        row(1, eval_accuracy=0.5, eval_loss=2.0, bytes_down=10, bytes_up=1),
        row(2, bytes_peer=5),
        row(3, eval_accuracy=0.9, eval_loss=0.7, bytes_down=10),
        row(4, eval_accuracy=0.8, eval_loss=0.9, bytes_down=10),
        row(5, bytes_down=10),
    ]
    assert summarise(run, target=0.9) == {
        "rounds": 5,
        "virtual_time": 50.0,
        "wall_time": 2.5,
        "bytes_total": 46,
        "final_accuracy": 0.8,
        "best_accuracy": 0.9,
        "final_loss": 0.9,
        "rounds_to_target": 3,
        "time_to_target": 30.0,
        "bytes_to_target": 26,
        "diverged": False,
    }
    assert summarise(run)["rounds_to_target"] is None


def test_divergence_names_the_round_and_the_device():
    run = [row(1, eval_loss=9.0, eval_accuracy=0.2), row(2, eval_loss=math.nan, eval_accuracy=0.1)]
    entry = summarise(run, diverged=True, diverged_device=3, diverged_reason="too far")
    assert list(entry) == [*SUMMARY_KEYS, "diverged_at"]
    assert entry["diverged_at"] == {"round": 2, "device": 3, "reason": "too far"}
    assert (entry["final_loss"], entry["final_accuracy"]) == (None, 0.1)


@given(st.lists(rows(), max_size=6), st.none() | st.floats(0, 1))
def test_summary_is_json_and_its_bytes_are_those_of_the_rows(run, target):
    entry = strict(dump_json(summarise(run, target=target)))
    assert entry["bytes_total"] == sum(r.bytes_down + r.bytes_up + r.bytes_peer for r in run)
    assert (entry["time_to_target"] is None) == (entry["bytes_to_target"] is None)


def test_write_summary_replaces_the_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    entry = summarise([row(1, eval_loss=math.inf)])
    write_summary(path, name="ü", seed=1, versions={"flwr": "1.41"}, strategies={"a": entry})
    before = path.read_bytes()
    assert list(strict(before.decode())) == ["name", "seed", "versions", "strategies"]

    def full_disk(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_summary(path, name="b", seed=1, versions={}, strategies={})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert path.read_bytes() == before


def world_of(n_devices: int) -> World:
    return World(
        name="w", seed=1, strategies=["a"], rounds=3, target=None, dataset="digits",
        partition="iid", classes=2, test_samples=5, model="softmax", parameters=10, model_bytes=40,
        samples=np.arange(n_devices), speed=np.full(n_devices, np.inf),
        label_counts=np.stack([np.arange(n_devices), np.zeros(n_devices, int)], 1),
        networks=[
            NetworkWorld(strategies=["a"], topology="star", links=2 * n_devices,
                         uplink_bps=np.full(n_devices, np.inf), latency=0.02, message_loss=0.1)
        ],
    )  # fmt: skip


def test_world_has_no_nan_and_one_value_for_each_device(tmp_path):
    write_world(tmp_path / "world.json", world_of(3))
    world = strict((tmp_path / "world.json").read_text())
    assert world == world_record(world_of(3))
    assert world["devices"]["samples"] == [0, 1, 2]
    assert world["devices"]["label_counts"] == [[0, 0], [1, 0], [2, 0]]
    assert world["devices"]["speed_samples_per_s"] == [None, None, None]
    assert world["data"]["train_samples"] == 3
    assert world["networks"][0]["latency_s"] == [0.02] * 3
    assert world["networks"][0]["downlink_bps"] is None


def test_world_of_very_many_devices_lists_some_and_counts_all(tmp_path):
    write_world(tmp_path / "world.json", world_of(100_000))
    world = strict((tmp_path / "world.json").read_text())
    listed = world["devices"]["listed"]
    assert len(listed) == len(world["devices"]["samples"]) == 5_000
    assert (listed[0], listed[-1]) == (0, 99_999)
    assert world["devices"]["count"] == 100_000
    assert world["data"]["class_samples"] == [sum(range(100_000)), 0]
