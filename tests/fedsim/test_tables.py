import io

import pytest
from rich.console import Console
from sample_run import Sample, write_sample

from fedsim.recorder import RoundRow, summarise
from fedsim.report import tables
from fedsim.results import RunResult, StrategyResult, load_run


def result(name: str, accuracy: float | None, seconds: float = 10.0, **options) -> StrategyResult:
    rows = [
        RoundRow(
            round=1, virtual_time=seconds, wall_time=1.0, eval_accuracy=accuracy, bytes_up=1500,
            messages_sent=200, messages_lost=3,
        )
    ]  # fmt: skip
    complete = options.pop("complete", True)
    return StrategyResult(name, summarise(rows, target=0.9, **options), rows, complete)


def run_of(*results: StrategyResult, target: float | None = 0.9) -> RunResult:
    return RunResult("demo", 1, {r.name: r for r in results}, world={"target": target, "rounds": 8})


def printed(run: RunResult, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(tables.comparison_table(run, width=width))
    return console.file.getvalue()


def test_cells_have_units_for_people_and_exact_values_for_programs():
    row = tables.comparison_rows(run_of(result("a", 0.91234567, 75.25)))["a"]
    assert row["final_accuracy"] == tables.Cell("91.2 %", 0.91234567)
    assert row["time_to_target"] == tables.Cell("1 min 15 s", 75.25)
    assert row["bytes_to_target"] == tables.Cell("1.5 kB", 1500)
    assert row["lost_share"] == tables.Cell("1.5 %", 0.015)


def test_the_best_of_a_column_is_marked_and_ties_share_it():
    rows = tables.comparison_rows(
        run_of(result("a", 0.95, 30.0), result("b", 0.95, 20.0), result("c", 0.5, 1.0))
    )
    assert [r["final_accuracy"].is_best for r in rows.values()] == [True, True, False]
    assert [r["time_to_target"].is_best for r in rows.values()] == [False, True, False]
    assert not any(r["virtual_time"].is_best for r in rows.values())


def test_a_single_strategy_and_a_diverged_one_are_best_in_nothing():
    alone = tables.comparison_rows(run_of(result("a", 0.95)))
    assert not any(cell.is_best for cell in alone["a"].values())
    rows = tables.comparison_rows(
        run_of(result("a", 0.92), result("b", 0.92, diverged=True), result("c", 0.91))
    )
    assert rows["a"]["final_accuracy"].is_best
    assert not any(cell.is_best for cell in rows["b"].values())


def test_without_a_target_its_columns_are_left_out():
    rows = tables.comparison_rows(run_of(result("a", 0.95), target=None))
    assert "time_to_target" not in rows["a"]
    assert "to target" not in printed(run_of(result("a", 0.95), target=None))


def test_a_strategy_without_rounds_has_dashes_and_no_errors():
    empty = StrategyResult("a", summarise([]), [], complete=False)
    row = tables.comparison_rows(run_of(empty))["a"]
    assert row["final_accuracy"].text == row["lost_share"].text == "–"
    assert row["state"].text == "not run"
    assert printed(RunResult("nothing", 1, {})).startswith("nothing")


def test_notes_say_what_went_wrong_and_where():
    run = run_of(
        result("a", 0.1, diverged=True, diverged_device=3),
        result("b", 0.1, diverged=True),
        result("c", 0.5, complete=False),
        StrategyResult("d", summarise([]), [], complete=False),
        result("e", 0.9),
        StrategyResult("f", summarise([]), [], complete=False, failure="no luck."),
        result("g", 0.1, diverged=True, diverged_reason="the loss is 2e+03"),
    )
    assert tables.notes(run) == [
        "a diverged in round 1 on device 3: its loss or parameters are not finite.",
        "b diverged in round 1: its loss or parameters are not finite.",
        "c was interrupted after round 1 of 8.",
        "d has not been run.",
        "f failed: no luck.",
        "g diverged in round 1: the loss is 2e+03.",
    ]
    assert [tables.state_of(result) for result in run.strategies.values()] == [
        "diverged", "diverged", "interrupted", "not run", "done", "failed", "diverged",
    ]  # fmt: skip
    assert all(line in printed(run) for line in tables.notes(run))


def test_names_with_markup_are_printed_as_they_are():
    text = printed(run_of(result("[bold]x[/bold]", 0.95), result("[/nope]", 0.9)))
    assert "[bold]x[/bold]" in text
    assert "[/nope]" in text


def test_names_are_never_broken_and_the_state_is_always_there():
    names = ["bidirectional-compression", "x" * 40]
    run = run_of(*(result(name, 0.95, complete=False) for name in names))
    for width in (100, 120):
        lines = printed(run, width).splitlines()
        assert all(any(name in line and "interrupted" in line for line in lines) for name in names)


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_table_fits_the_terminal_and_keeps_its_numbers_whole(tmp_path, width):
    run = load_run(write_sample(tmp_path, Sample(rounds=40, interrupted=("fedadam",))))
    text = printed(run, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "…" not in text
    for name, row in tables.comparison_rows(run).items():
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert row["final_accuracy"].text in line
        assert row["time_to_target"].text in line


def test_sizes_and_rates_keep_three_digits_in_every_range():
    sizes = [0, 1, 999, 1000, 999_500, 1e6, 123_456_789, 1e18, 1e24]
    texts = [tables.format_bytes(size) for size in sizes]
    assert texts[:7] == ["0 B", "1 B", "999 B", "1 kB", "1 MB", "1 MB", "123 MB"]
    assert texts[7:] == ["1000 PB", "1000000000 PB"]
    assert tables.format_rate(None) == tables.format_rate(float("inf")) == "unlimited"
    assert tables.format_rate(12_500) == "12.5 kbit/s"


def test_durations_never_show_sixty_of_anything():
    for seconds in (0.9996, 59.96, 59.4, 119.6, 3599.7, 86_399.0, 7199.9, 0.0, 1e-7):
        text = tables.format_duration(seconds)
        assert "60" not in text, text
        assert "1e+" not in text
    assert tables.format_duration(59.96) == "1 min 00 s"
    assert tables.format_duration(3599.7) == "1 h 00 min"
    assert tables.format_duration(86_399.0) == "1 d 00 h"
    assert tables.format_duration(None) == "–"
