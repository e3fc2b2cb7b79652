"""Replay of reference cases through the real engines, to see whether answers are still right.

The cases ship with the package (`fedsim/reference`), so that a user can check an installation, and
the tests read the same files. Those of the network were computed by SimGrid, an independent
simulator; the tolerance is relative to each flow's duration.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from math import inf
from pathlib import Path
from typing import Any

from fedsim.errors import ScenarioError
from fedsim.network import replay

__all__ = ["TOLERANCE", "FamilyResult", "network_error", "verify"]

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """How well the cases of one family agree.

    Attributes
    ----------
    family : str
    n_cases, n_flows : int
    worst : float
        Largest error of a flow relative to its duration; inf if one failed that should not have,
        or the reverse.
    worst_case : str
        The case where it occurs.
    tolerance : float
    """

    family: str
    n_cases: int
    n_flows: int
    worst: float
    worst_case: str
    tolerance: float = TOLERANCE

    @property
    def is_passed(self) -> bool:
        """Whether the worst error is within the tolerance."""
        return self.worst <= self.tolerance


def verify(cases: Path | None = None) -> list[FamilyResult]:
    """Replay reference cases.

    Parameters
    ----------
    cases : Path, optional
        A directory of ``*.json`` or ``*.json.gz`` files, each with one case or a list of cases, or
        one such file; by default the cases that ship with the package.

    Returns
    -------
    list of FamilyResult
        One for each family, in order of its name.

    Raises
    ------
    ScenarioError
        If there are no cases, or a file is not readable as one.
    """
    found: dict[str, list[tuple[str, int, float]]] = {}
    for name, case in _read(cases):
        family = str(case.get("family", "network"))
        found.setdefault(family, []).append((name, len(case["flows"]), network_error(case)))
    if not found:
        raise ScenarioError(f"{cases}: no reference cases (*.json) there")
    results = []
    for family, entries in sorted(found.items()):
        worst_case, _, worst = max(entries, key=lambda entry: entry[2])
        n_flows = sum(entry[1] for entry in entries)
        results.append(FamilyResult(family, len(entries), n_flows, worst, worst_case))
    return results


def network_error(case: Mapping[str, Any]) -> float:
    """Return the largest error of a flow's completion, relative to its duration.

    Parameters
    ----------
    case : mapping
        As `fedsim.network.replay` takes it, with the answers ``finish_s`` (flow id → time, null if
        the flow fails).
    """
    worst = 0.0
    for flow, finished in zip(case["flows"], replay(case), strict=True):
        expected = case["finish_s"].get(flow["id"])
        if (expected is None) != (finished is None):
            return inf
        if expected is not None and finished is not None:
            duration = max(expected - flow["start_s"], 1e-9)
            worst = max(worst, abs(finished - expected) / duration)
    return worst


def _read(cases: Path | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, case) of every case."""
    if cases is None:
        data = resources.files("fedsim").joinpath("reference/network.json.gz").read_bytes()
        yield from _cases_of("network.json.gz", data)
        return
    if not cases.exists():
        raise ScenarioError(f"{cases}: no such file or directory")
    files: Iterable[Path] = [cases]
    if cases.is_dir():
        files = sorted([*cases.glob("*.json"), *cases.glob("*.json.gz")])
    for file in files:
        yield from _cases_of(str(file), file.read_bytes())


def _cases_of(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = gzip.decompress(data) if name.endswith(".gz") else data
        content = json.loads(text)
    except (OSError, EOFError, ValueError) as error:
        raise ScenarioError(f"{name}: not JSON ({error})") from error
    for index, case in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(case, dict) or not {"links", "flows", "finish_s"} <= case.keys():
            raise ScenarioError(
                f"{name}: entry {index} is no network case (needs links, flows and finish_s)"
            )
        yield str(case.get("name", name)), case
