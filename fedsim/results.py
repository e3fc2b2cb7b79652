"""Read the records of a run back.

Everything that tables, plots and reports say comes from here, so a report of yesterday's files is
the same as today's. A run may still be going on, or may have been stopped at any moment.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedsim.errors import ScenarioError
from fedsim.recorder import Recorder, RoundRow, strategy_directory, summarise

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FAILED", "RunResult", "StrategyResult", "load_run", "strategy_result"]

FAILED = "failed.txt"
"""File in a strategy's directory that says why it failed; removed when it is run again."""


@dataclass(frozen=True, slots=True)
class StrategyResult:
    """One strategy of a run.

    Attributes
    ----------
    name : str
    summary : dict
        As in `summary.json`; of an unfinished strategy, the same numbers from its rounds so far.
    rounds : list of RoundRow
    complete : bool
        Whether it ran to its end (divergence is an end).
    tables : mapping
        ``transfers``, ``compute``, ``links``: an Arrow table or the Parquet file that holds it;
        empty if the scenario did not ask for them.
    failure : str or None
        Why it failed, if it did.
    """

    name: str
    summary: dict[str, Any]
    rounds: list[RoundRow]
    complete: bool = True
    tables: Mapping[str, pa.Table | Path] = field(default_factory=dict)
    failure: str | None = None

    def table(self, name: str) -> pa.Table | None:
        """Return the table ``transfers``, ``compute`` or ``links``; None if not recorded.

        Raises
        ------
        ScenarioError
            If its file is no readable Parquet file.
        """
        source = self.tables.get(name)
        if not isinstance(source, Path):
            return source
        try:
            return pq.read_table(source)
        except (pa.ArrowException, OSError) as error:
            raise ScenarioError(f"{source}: no readable Parquet file: {error}") from error


@dataclass(frozen=True, slots=True)
class RunResult:
    """A run: several strategies in the same world.

    Attributes
    ----------
    name, seed : str, int or None
        Of the scenario.
    strategies : dict of str to StrategyResult
        In the scenario's order.
    versions : dict
        Package to version.
    scenario : str
        Text of the resolved scenario, "" if there is none.
    world : dict
        `world.json`, empty if there is none.
    directory : Path or None
        Where the files are.
    problems : tuple of str
        What was wrong with the files and could be passed over, in words.
    """

    name: str
    seed: int | None
    strategies: dict[str, StrategyResult]
    versions: dict[str, str] = field(default_factory=dict)
    scenario: str = ""
    world: dict[str, Any] = field(default_factory=dict)
    directory: Path | None = None
    problems: tuple[str, ...] = ()

    @property
    def target(self) -> float | None:
        """The accuracy that `*_to_target` refer to."""
        target: float | None = self.world.get("target")
        return target

    def to_pandas(self) -> "pd.DataFrame":
        """Return one row per strategy and round: `strategy`, then the keys of `rounds.jsonl`.

        Counts are int64, everything else float64 with NaN where the file says null.
        """
        import pandas as pd  # only notebooks need it, and it is slow to import

        records = [
            {"strategy": name} | row.to_record()
            for name, result in self.strategies.items()
            for row in result.rounds
        ]
        empty = {"strategy": ""} | RoundRow(round=0, virtual_time=0.0, wall_time=0.0).to_record()
        own = dict.fromkeys(key for record in records for key in record if key not in empty)
        frame = pd.DataFrame.from_records(records, columns=[*empty, *own])
        kinds = {name: "int64" if name in RoundRow.COUNTS else "float64" for name in empty | own}
        for name in own:  # a strategy's own entry may be a word or a list
            if not all(isinstance(r.get(name), int | float | None) for r in records):
                kinds[name] = "object"
        return frame.astype(kinds | {"strategy": "str"})


def strategy_result(
    recorder: Recorder, summary: Mapping[str, Any], *, complete: bool = True
) -> StrategyResult:
    """Return what a recorder holds, for a run that is still in memory."""
    tables: dict[str, pa.Table | Path] = dict(recorder.tables())
    if recorder.directory is not None:
        tables |= _table_files(recorder.directory)
    return StrategyResult(recorder.name, dict(summary), list(recorder.rows), complete, tables)


def load_run(directory: Path | str) -> RunResult:
    """Read a directory that `fedsim run` wrote.

    A last line that is cut off, as an interrupted run may leave it, is left out and named in
    `problems`. A strategy whose entry in `summary.json` is missing or does not fit its lines is
    unfinished.

    Raises
    ------
    ScenarioError
        If `directory` is no run, or a file is damaged elsewhere than in its last line.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ScenarioError(f"{directory}: no such directory; name one that `fedsim run` wrote")
    summary, world = _read(directory / "summary.json"), _read(directory / "world.json")
    recorded = sorted(path.parent.name for path in directory.glob("*/rounds.jsonl"))
    if not summary and not world and not recorded:
        raise ScenarioError(
            f"{directory}: no run: neither summary.json nor world.json nor NAME/rounds.jsonl here; "
            "name a directory that `fedsim run` wrote"
        )
    entries = summary.get("strategies", {})
    names = dict.fromkeys([*world.get("strategies", ()), *entries, *recorded])
    problems: list[str] = []
    target = world.get("target")
    strategies = {
        name: _strategy(directory, name, entries.get(name), target, problems) for name in names
    }
    scenario = directory / "scenario.yaml"
    return RunResult(
        name=str(summary.get("name", world.get("name", directory.resolve().name))),
        seed=summary.get("seed", world.get("seed")),
        strategies=strategies,
        versions=dict(summary.get("versions", {})),
        scenario=scenario.read_text("utf-8", errors="replace") if scenario.is_file() else "",
        world=world,
        directory=directory,
        problems=tuple(problems),
    )


def _strategy(
    directory: Path,
    name: str,
    entry: dict[str, Any] | None,
    target: float | None,
    problems: list[str],
) -> StrategyResult:
    home = strategy_directory(directory, name)
    rows = _rounds(home / "rounds.jsonl", problems)
    complete = entry is not None and entry.get("rounds") == len(rows)
    summary = entry if entry is not None and complete else summarise(rows, target=target)
    failed = home / FAILED
    failure = failed.read_text("utf-8", errors="replace").strip() if failed.is_file() else None
    return StrategyResult(name, summary, rows, complete, _table_files(home), failure)


def _table_files(home: Path) -> dict[str, pa.Table | Path]:
    paths = {stem: home / f"{stem}.parquet" for stem in ("transfers", "compute", "steps", "links")}
    return {stem: path for stem, path in paths.items() if path.is_file()}


def _rounds(path: Path, problems: list[str]) -> list[RoundRow]:
    if not path.is_file():
        return []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    rows: list[RoundRow] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(RoundRow.from_record(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number < len(lines):
                raise ScenarioError(f"{path}: line {number} is no round: {error}") from error
            problems.append(f"{path.parent.name}/{path.name}: line {number}, the last, is cut off")
    return rows


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ScenarioError(f"{path}: no readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ScenarioError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
