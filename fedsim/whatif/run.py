"""Run a study: all pairs, over cores if asked, and the files that answer it."""

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd

from fedsim.document import write_yaml
from fedsim.errors import ScenarioError
from fedsim.whatif.answers import crossovers, fastest, job_completion, recommendations
from fedsim.whatif.evaluate import COLUMNS, Line, PairResult, evaluate_pair
from fedsim.whatif.plots import write_study_plots
from fedsim.whatif.study import Study

__all__ = ["StudyResult", "evaluate_study", "run_study", "write_study"]

_NUMBERS = {"devices", "switches", "switch_ports", "nic_ports", "cables"}
_WORDS = {"topology", "collective", "payload", "failure", "critical_link", "note"}
_COUNTS = {"payload_bytes", "steps"}


@dataclass(frozen=True, slots=True, eq=False)
class StudyResult:
    """Everything a study found.

    Attributes
    ----------
    frame : DataFrame
        The rows of ``results.csv``, columns as in `evaluate.COLUMNS`.
    lines : list of Line
        Times as straight lines over the size, for plots and crossovers.
    crossovers, fastest, job_completion, links : DataFrame
        See `answers` and `topologies.timing.LoadPlan.table`.
    recommendations : list of str
    """

    study: Study
    frame: pd.DataFrame
    lines: list[Line]
    crossovers: pd.DataFrame
    fastest: pd.DataFrame
    job_completion: pd.DataFrame
    links: pd.DataFrame
    recommendations: list[str]


def run_study(study: Study, out: Path | None = None, jobs: int = 1) -> pd.DataFrame:
    """Run a study and return its rows; with `out`, write all files there.

    Parameters
    ----------
    study : Study
    out : Path, optional
        Gets ``results.csv``, ``results.parquet``, ``crossovers.csv``, ``fastest.csv``,
        ``job_completion.csv`` (if the study gives `compute`), ``links.csv``,
        ``recommendations.txt``, ``study.yaml`` and ``plots/``.
    jobs : int
        Processes.

    Raises
    ------
    ScenarioError
        If a topology cannot be built, or no pair of topology and collective makes sense.
    """
    result = evaluate_study(study, jobs)
    if out is not None:
        write_study(result, out)
    return result.frame


def evaluate_study(study: Study, jobs: int = 1) -> StudyResult:
    """Run a study without writing anything."""
    if jobs < 1:
        raise ScenarioError(f"jobs = {jobs}: must be at least 1")
    pairs = list(product(study.topologies, study.collectives))
    if jobs == 1 or len(pairs) == 1:
        found = [evaluate_pair(study, *pair) for pair in pairs]
    else:
        # Fresh processes: the same result whatever the parent has imported or started.
        with ProcessPoolExecutor(min(jobs, len(pairs)), get_context("spawn")) as pool:
            found = list(pool.map(evaluate_pair, [study] * len(pairs), *zip(*pairs, strict=True)))
    return _gathered(study, found)


def _gathered(study: Study, found: list[PairResult]) -> StudyResult:
    if all(result.reason for result in found):
        reasons = "\n".join(sorted({f"  {result.reason}" for result in found}))
        raise ScenarioError(f"no pair of topology and collective makes sense:\n{reasons}")
    frame = _typed([row for result in found for row in result.rows])
    lines = [line for result in found for line in result.lines]
    return StudyResult(
        study=study,
        frame=frame,
        lines=lines,
        crossovers=crossovers(lines),
        fastest=fastest(lines),
        job_completion=job_completion(frame, study),
        links=pd.DataFrame([row for result in found for row in result.links]),
        recommendations=recommendations(frame),
    )


def _typed(rows: list[Mapping[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    kinds = dict.fromkeys(COLUMNS, "float64")
    kinds |= dict.fromkeys(_NUMBERS, "int64")
    kinds |= dict.fromkeys(_COUNTS, "Int64")
    kinds |= dict.fromkeys(_WORDS, "object")
    return frame.astype(kinds)


def write_study(result: StudyResult, out: Path) -> None:
    """Write the files of a study into a directory."""
    out.mkdir(parents=True, exist_ok=True)
    result.frame.to_csv(out / "results.csv", index=False)
    result.frame.to_parquet(out / "results.parquet", index=False)
    result.crossovers.to_csv(out / "crossovers.csv", index=False)
    result.fastest.to_csv(out / "fastest.csv", index=False)
    result.links.to_csv(out / "links.csv", index=False)
    if len(result.job_completion):
        result.job_completion.to_csv(out / "job_completion.csv", index=False)
    text = "\n".join(result.recommendations)
    (out / "recommendations.txt").write_text(f"{text}\n", encoding="utf-8")
    resolved = result.study.model_dump(mode="json")
    (out / "study.yaml").write_text(write_yaml(resolved), encoding="utf-8")
    write_study_plots(result.frame, result.lines, out / "plots")
