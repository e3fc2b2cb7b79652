"""Replay of reference cases through the real engines, to see whether answers are still right.

The cases ship with the package (`fedsim/reference`), so that a user can check an installation, and
the tests read the same files. Those of the network were computed by SimGrid, an independent
simulator (the tolerance is relative to each flow's duration); those of collectives are exact
counts, send lists and times.
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
from topologies.replay import Replayed, is_collective_reference, replay_collectives

__all__ = ["TOLERANCE", "FamilyResult", "network_error", "verify"]

TOLERANCE = 1e-6
"""Of the network's answers."""

_SHIPPED = ("collectives.json.gz", "network.json.gz")


@dataclass(frozen=True, slots=True)
class FamilyResult:
    """How well the cases of one family agree.

    Attributes
    ----------
    family : str
    n_cases : int
    worst : float
        Largest relative error; inf if something failed that should not have, or the reverse.
    worst_case : str
        The case where it occurs.
    tolerance : float
    """

    family: str
    n_cases: int
    worst: float
    worst_case: str
    tolerance: float

    @property
    def is_passed(self) -> bool:
        """Whether the worst error is within the tolerance."""
        return self.worst <= self.tolerance


def verify(cases: Path | None = None) -> list[FamilyResult]:
    """Replay reference cases.

    Parameters
    ----------
    cases : Path, optional
        A directory of ``*.json`` or ``*.json.gz`` files, or one such file; by default the cases
        that ship with the package. A file holds one network case, a list of them, or answers for
        collectives.

    Returns
    -------
    list of FamilyResult
        One for each family, in order of its name.

    Raises
    ------
    ScenarioError
        If there are no cases, or a file is not readable as one.
    """
    found: dict[str, list[Replayed]] = {}
    for name, content in _read(cases):
        for answer in _replay(name, content):
            found.setdefault(answer.family, []).append(answer)
    if not found:
        raise ScenarioError(f"{cases}: no reference cases (*.json) there")
    results = []
    for family, answers in sorted(found.items()):
        worst = max(answers, key=lambda answer: (answer.error > answer.tolerance, answer.error))
        results.append(FamilyResult(family, len(answers), worst.error, worst.case, worst.tolerance))
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


def _replay(name: str, content: Any) -> Iterator[Replayed]:
    if is_collective_reference(content):
        yield from replay_collectives(content)
        return
    for index, case in enumerate(content if isinstance(content, list) else [content]):
        if not isinstance(case, dict) or not {"links", "flows", "finish_s"} <= case.keys():
            raise ScenarioError(
                f"{name}: entry {index} is neither a network case (links, flows, finish_s) nor "
                "answers for collectives"
            )
        family = f"network {case.get('family', 'case')}"
        yield Replayed(family, str(case.get("name", name)), network_error(case), TOLERANCE)


def _read(cases: Path | None) -> Iterator[tuple[str, Any]]:
    """Yield the name and content of every file."""
    if cases is None:
        for name in _SHIPPED:
            data = resources.files("fedsim").joinpath("reference", name).read_bytes()
            yield name, _content(name, data)
        return
    if not cases.exists():
        raise ScenarioError(f"{cases}: no such file or directory")
    files: Iterable[Path] = [cases]
    if cases.is_dir():
        files = sorted([*cases.glob("*.json"), *cases.glob("*.json.gz")])
    for file in files:
        yield str(file), _content(str(file), file.read_bytes())


def _content(name: str, data: bytes) -> Any:
    try:
        return json.loads(gzip.decompress(data) if name.endswith(".gz") else data)
    except (OSError, EOFError, ValueError) as error:
        raise ScenarioError(f"{name}: not JSON ({error})") from error
