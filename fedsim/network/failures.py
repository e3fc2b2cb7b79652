"""Failures on a timetable: a link, a node or a partition is down from one time to another."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from fedsim.errors import ScenarioError
from fedsim.network.links import LinkEnds
from fedsim.units import Duration

__all__ = ["Failure", "Scheduled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One failure: exactly one of `link`, `node` and `parts`.

    Attributes
    ----------
    link : str, optional
        A link's name: ``up-17``, ``access-17`` (both directions), ``3-7`` (both), ``3>7``.
    node : int, optional
        A node: its links are down, and payloads from or to it fail, now and until it returns.
    parts : sequence of sequences of int, optional
        A partition of nodes: links between nodes of different parts are down. Nodes that are
        named nowhere keep all their links.
    start, end : float, s
        Down from `start` until `end`; for good without one.
    """

    link: str | None = None
    node: int | None = None
    parts: list[list[int]] | None = None
    start: Duration = 0.0
    end: Duration | None = None

    def __post_init__(self) -> None:
        given = sum(each is not None for each in (self.link, self.node, self.parts))
        if given != 1:
            raise ScenarioError(f"a failure has one of link, node and parts; this one has {given}")
        if not 0 <= self.start < self.until:
            raise ScenarioError(
                f"a failure must end after its start, from {self.start:g} s to {self.end} s"
            )
        if self.parts is not None:
            nodes = [node for part in self.parts for node in part]
            if len(self.parts) < 2 or len(set(nodes)) < len(nodes):
                raise ScenarioError("a partition has two parts or more, without common nodes")

    @property
    def until(self) -> float:
        """Time (s) at which it ends; inf if it never does."""
        return inf if self.end is None else self.end

    def sides(self) -> dict[int, int]:
        """Return which part of a partition each node is in."""
        return {node: index for index, part in enumerate(self.parts or []) for node in part}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduled:
    """Links that fail on a timetable and else never change.

    Attributes
    ----------
    failures : list of Failure
    """

    failures: list[Failure]

    def bind(self, seed: int, link: LinkEnds) -> None:
        """Return None: the network itself follows the timetable, for nodes as well as links."""


def windows(failures: Iterable[Failure]) -> list[tuple[float, float]]:
    """Return the times (s) during which any failure holds, merged and ascending."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted((failure.start, failure.until) for failure in failures):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def is_within(spans: Sequence[tuple[float, float]], time: float) -> bool:
    """Tell whether a time is in any window."""
    return any(start <= time < end for start, end in spans)


def next_edge(spans: Sequence[tuple[float, float]], time: float) -> float:
    """Return the first time after `time` at which a window begins or ends; inf if never."""
    return min((edge for span in spans for edge in span if edge > time), default=inf)
