import json
import math

import numpy as np
import pytest
from sample_run import Sample, write_sample

from fedsim.errors import ScenarioError
from fedsim.recorder import ComputeRow, Recorder, RoundRow, summarise
from fedsim.results import RunResult, load_run, strategy_result


@pytest.fixture
def run_directory(tmp_path):
    return write_sample(tmp_path / "run", Sample(rounds=6))


def test_a_run_reads_back_in_the_order_of_the_scenario(run_directory):
    run = load_run(run_directory)
    assert list(run.strategies) == list(Sample().names)
    assert (run.name, run.seed, run.target) == ("Digits on unequal links", 7, 0.9)
    assert run.versions["flwr"] == "1.41.0"
    assert run.scenario.startswith("name: Digits")
    assert run.problems == ()
    for result in run.strategies.values():
        assert result.complete
        assert [row.round for row in result.rounds] == [1, 2, 3, 4, 5, 6]
        assert result.summary == summarise(result.rounds, target=0.9)


def test_a_path_may_be_a_string(run_directory):
    assert load_run(str(run_directory)).name == "Digits on unequal links"


@pytest.mark.parametrize("content", [None, {"notes.txt": "hello"}])
def test_a_directory_that_is_no_run_is_named(tmp_path, content):
    directory = tmp_path / "there"
    if content:
        directory.mkdir()
        for name, text in content.items():
            (directory / name).write_text(text)
    with pytest.raises(ScenarioError, match=r"there: no (such directory|run)"):
        load_run(directory)


@pytest.mark.parametrize("cut", [1, 30, 5])
def test_a_last_line_that_is_cut_off_is_left_out_and_reported(run_directory, cut):
    path = run_directory / "fedprox" / "rounds.jsonl"
    path.write_bytes(path.read_bytes()[: -cut - 1])
    run = load_run(run_directory)
    if cut == 1:
        assert "line 6" in run.problems[0]
    assert [row.round for row in run.strategies["fedprox"].rounds] == [1, 2, 3, 4, 5]
    assert not run.strategies["fedprox"].complete
    assert run.strategies["fedprox"].summary["rounds"] == 5
    assert run.strategies["fedavg"].complete


@pytest.mark.parametrize("line", ["{", "5", "[]", '"x"', "null", '{"round": 1}', '{"round": "a"}'])
def test_damage_elsewhere_is_an_error_with_file_and_line(run_directory, line):
    path = run_directory / "fedprox" / "rounds.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = line
    path.write_text("\n".join(lines))
    with pytest.raises(ScenarioError, match=r"fedprox/rounds.jsonl: line 3 is no round"):
        load_run(run_directory)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_damaged_summary_is_an_error_that_names_it(run_directory, text):
    (run_directory / "summary.json").write_text(text)
    with pytest.raises(ScenarioError, match=r"summary.json: "):
        load_run(run_directory)


def test_a_run_stopped_before_its_first_summary_is_a_run(tmp_path):
    write_sample(tmp_path, Sample(rounds=6, interrupted=("fedavg",), unstarted=("fedprox",)))
    (tmp_path / "summary.json").unlink()
    run = load_run(tmp_path)
    assert [r.complete for r in run.strategies.values()] == [False] * 4
    assert [len(r.rounds) for r in run.strategies.values()] == [2, 0, 6, 6]
    assert run.seed == 7


def test_records_alone_are_a_run(run_directory):
    for name in ("summary.json", "world.json", "scenario.yaml"):
        (run_directory / name).unlink()
    run = load_run(run_directory)
    assert list(run.strategies) == sorted(Sample().names)
    assert (run.name, run.seed, run.target) == ("run", None, None)


def test_to_pandas_has_a_row_for_each_strategy_and_round(run_directory):
    frame = load_run(run_directory).to_pandas()
    assert len(frame) == 24
    assert list(frame.columns[:4]) == ["strategy", "round", "virtual_time", "wall_time"]
    assert frame.columns[-1] == "strategy.server_momentum"
    assert frame["bytes_up"].dtype == np.int64
    assert frame["consensus_distance"].isna().all()
    assert frame["consensus_distance"].dtype == np.float64
    assert frame.query("strategy == 'fedadam'")["strategy.server_momentum"].notna().all()


def test_to_pandas_of_nothing_has_the_columns_and_no_rows():
    frame = RunResult("x", 1, {}).to_pandas()
    assert len(frame) == 0
    assert frame.shape[1] == 17
    assert frame["round"].dtype == np.int64


def test_a_strategy_may_record_words_of_its_own():
    rows = [RoundRow(round=1, virtual_time=1, wall_time=1, extra={"phase": "burn-in", "p": [1, 2]})]
    with Recorder(None, "s") as recorder:
        recorder.round(rows[0])
    run = RunResult("x", 1, {"s": strategy_result(recorder, summarise(rows))})
    assert run.to_pandas()["strategy.phase"].tolist() == ["burn-in"]


def test_tables_are_the_same_from_memory_and_from_disk(tmp_path):
    tables = []
    for directory in (None, tmp_path):
        with Recorder(directory, "s", transfers=True) as recorder:
            recorder.round(RoundRow(round=1, virtual_time=1.0, wall_time=1.0))
            recorder.compute(ComputeRow(round=1, device=0, kind="train", started=0.0, finished=1.0))
        result = strategy_result(recorder, summarise(recorder.rows))
        tables.append(result.table("compute"))
    assert tables[0] == tables[1] == load_run(tmp_path).strategies["s"].table("compute")
    assert result.table("energy") is None


def test_a_parquet_file_without_its_end_is_an_error_that_names_it(tmp_path):
    write_sample(tmp_path, Sample(rounds=2, transfers=True))
    path = tmp_path / "fedavg" / "transfers.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ScenarioError, match=r"transfers.parquet: no readable Parquet"):
        load_run(tmp_path).strategies["fedavg"].table("transfers")


def test_numbers_that_other_programs_wrote_as_nan_are_read_as_none(run_directory):
    path = run_directory / "fedavg" / "rounds.jsonl"
    record = json.loads(path.read_text().splitlines()[0]) | {"eval_loss": math.nan}
    path.write_text(json.dumps(record))
    assert load_run(run_directory).strategies["fedavg"].rounds[0].eval_loss is None
