"""The scenarios that ship, shrunk, against recorded answers: virtual times exactly."""

import json
from pathlib import Path

import pytest

import fedsim
from fedsim import runner

ROOT = Path(__file__).parents[2]
EXACT = (
    "round", "bytes_down", "bytes_up", "bytes_peer", "messages_sent", "messages_lost",
    "devices_selected", "devices_replied",
)  # fmt: skip
CASES = {"quickstart": ["rounds=6"]}


@pytest.mark.parametrize("name", CASES)
def test_golden_scenario(name, request, monkeypatch):
    monkeypatch.setattr(runner, "write_report", lambda directory: directory)
    scenario = fedsim.load_scenario(ROOT / "scenarios" / f"{name}.yaml", CASES[name])
    result = fedsim.run(scenario, device="cpu")
    measured = {
        strategy: [row.to_record() for row in found.rounds]
        for strategy, found in result.strategies.items()
    }
    path = ROOT / "tests" / "golden" / f"{name}.json"
    if request.config.getoption("--update-golden"):
        for rows in measured.values():
            for row in rows:
                row.pop("wall_time")
        path.write_text(json.dumps(measured, indent=1) + "\n")
        return
    golden = json.loads(path.read_text())
    assert list(measured) == list(golden)
    for strategy, rows in golden.items():
        assert len(measured[strategy]) == len(rows)
        for row, expected in zip(measured[strategy], rows, strict=True):
            assert {key: row[key] for key in EXACT} == {key: expected[key] for key in EXACT}
            assert row["virtual_time"] == pytest.approx(expected["virtual_time"], rel=1e-9)
            for key in ("train_loss", "eval_loss"):
                assert row[key] == pytest.approx(expected[key], rel=1e-3)
            assert row["eval_accuracy"] == pytest.approx(expected["eval_accuracy"], abs=2.5 / 449)
