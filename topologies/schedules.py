"""A collective as data: steps, each a list of (source, destination, lo, hi, operation).

A vector is cut into `chunks` equal pieces; a send moves pieces lo..hi-1 between two ranks and is
added to (*reduce*) or replaces (*copy*) the destination's. All sends of a step read the state at
the start of the step. A rank that is no worker (a dedicated server) starts with zeros and is not
checked at the end.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Schedule", "Send", "Step", "check", "execute", "from_json", "step_of", "to_json"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

# Workers per word of the checker's sets: half a word, so that sums of words cannot overflow.
_BITS = 32
# Words of the checker's state that are held at once.
_WORDS = 8_000_000


class Send(NamedTuple):
    """One message of a step: pieces lo..hi-1, added or copied."""

    source: int
    destination: int
    lo: int
    hi: int
    operation: str


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Concurrent sends as parallel arrays, each of shape (n_sends,); `reduces` is boolean."""

    source: IntArray
    destination: IntArray
    lo: IntArray
    hi: IntArray
    reduces: BoolArray

    def __len__(self) -> int:
        """Return the number of sends."""
        return len(self.source)

    def sends(self) -> list[Send]:
        """Return the sends one by one."""
        columns = (self.source, self.destination, self.lo, self.hi, self.reduces)
        return [
            Send(a, b, lo, hi, "reduce" if adds else "copy")
            for a, b, lo, hi, adds in zip(*(c.tolist() for c in columns), strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """A collective.

    Attributes
    ----------
    name : str
    ranks : int
        Workers and dedicated servers.
    chunks : int
        Equal pieces of the vector.
    steps : tuple of Step
    workers : tuple of int
        The ranks whose vectors are summed and which end with the sum.
    """

    name: str
    ranks: int
    chunks: int
    steps: tuple[Step, ...]
    workers: tuple[int, ...]

    @property
    def n_sends(self) -> int:
        """The number of messages of all steps."""
        return sum(len(step) for step in self.steps)


def step_of(sends: Iterable[Sequence[Any]]) -> Step:
    """Return a step from (source, destination, lo, hi, operation) rows."""
    rows = list(sends)
    numbers = np.array([row[:4] for row in rows], dtype=np.int64).reshape(-1, 4)
    for row in rows:
        if row[4] not in ("reduce", "copy"):
            raise ValueError(f"send {list(row)}: operation must be 'reduce' or 'copy'")
    source, destination, lo, hi = numbers.T.copy()
    adds = np.array([row[4] == "reduce" for row in rows], dtype=bool)
    return Step(source, destination, lo, hi, adds)


def check(schedule: Schedule) -> None:
    """Make sure that every worker ends with each worker's contribution exactly once.

    Follows the set of contributions in every piece at every rank, so the answer does not depend on
    values.

    Raises
    ------
    ValueError
        If not; names the piece, the rank, the step and the contribution that is missing, counted
        twice, or written twice.

    Examples
    --------
    >>> broken = Schedule("mine", 2, 1, (step_of([(0, 1, 0, 1, "reduce")]),), (0, 1))
    >>> check(broken)
    Traceback (most recent call last):
    ...
    ValueError: mine: piece 0 at rank 0 lacks the contribution of rank 1 at the end
    """
    _check_ranges(schedule)
    n_words = -(-len(schedule.workers) // _BITS)
    block = max(1, _WORDS // (schedule.ranks * n_words))
    for first in range(0, schedule.chunks, block):
        _check_pieces(schedule, first, min(first + block, schedule.chunks), n_words)


def _check_ranges(schedule: Schedule) -> None:
    for number, step in enumerate(schedule.steps):
        wrong = (step.source < 0) | (step.source >= schedule.ranks)
        wrong |= (step.destination < 0) | (step.destination >= schedule.ranks)
        wrong |= (step.source == step.destination) | (step.lo < 0) | (step.hi <= step.lo)
        wrong |= step.hi > schedule.chunks
        if wrong.any():
            send = step.sends()[int(np.flatnonzero(wrong)[0])]
            raise ValueError(
                f"{schedule.name}: step {number}: send {list(send)} needs two of the ranks "
                f"0..{schedule.ranks - 1} and pieces within 0..{schedule.chunks}"
            )


def _check_pieces(schedule: Schedule, first: int, end: int, n_words: int) -> None:
    width = end - first
    state = np.zeros((schedule.ranks * width, n_words), dtype=np.uint64)
    for i, worker in enumerate(schedule.workers):
        rows = slice(worker * width, (worker + 1) * width)
        state[rows, i // _BITS] = np.uint64(1) << np.uint64(i % _BITS)
    everyone = np.bitwise_or.reduce(state, axis=0)
    for number, step in enumerate(schedule.steps):
        lo, hi = np.clip(step.lo, first, end), np.clip(step.hi, first, end)
        length = hi - lo
        send = np.repeat(np.arange(len(step)), length)
        if not len(send):
            continue
        piece = np.arange(len(send)) - np.repeat(np.cumsum(length) - length, length)
        piece += lo[send] - first
        arriving = state[step.source[send] * width + piece]
        target = step.destination[send] * width + piece
        order = np.argsort(target, kind="stable")
        target, arriving, adds = target[order], arriving[order], step.reduces[send[order]]
        at = np.flatnonzero(np.diff(target, prepend=-1))
        cells = target[at]
        many = np.diff(np.append(at, len(target)))
        copies = np.add.reduceat((~adds).astype(np.int64), at)
        mixed = np.flatnonzero((copies > 0) & (many > 1))
        if len(mixed):
            rank, chunk = divmod(int(cells[mixed[0]]), width)
            raise ValueError(
                f"{schedule.name}: piece {first + chunk} at rank {rank} is written twice in step "
                f"{number}, and not only added to"
            )
        kept = np.where((copies > 0)[:, None], np.uint64(0), state[cells])
        total = np.add.reduceat(arriving, at, axis=0) + kept
        union = np.bitwise_or.reduceat(arriving, at, axis=0) | kept
        twice = np.flatnonzero((total != union).any(axis=1))
        if len(twice):
            rank, chunk = divmod(int(cells[twice[0]]), width)
            rows = slice(at[twice[0]], at[twice[0]] + many[twice[0]])
            worker = _repeated([*arriving[rows], kept[twice[0]]], schedule.workers)
            raise ValueError(
                f"{schedule.name}: piece {first + chunk} at rank {rank} gets the contribution of "
                f"rank {worker} twice in step {number}"
            )
        state[cells] = union
    for worker in schedule.workers:
        rest = state[worker * width : (worker + 1) * width] ^ everyone
        lacking = np.flatnonzero(rest.any(axis=1))
        if len(lacking):
            missing = _members(rest[lacking[0]], schedule.workers)[0]
            raise ValueError(
                f"{schedule.name}: piece {first + int(lacking[0])} at rank {worker} lacks the "
                f"contribution of rank {missing} at the end"
            )


def _members(words: NDArray[np.uint64], workers: tuple[int, ...]) -> list[int]:
    values = [int(word) for word in words]
    return [w for i, w in enumerate(workers) if values[i // _BITS] >> i % _BITS & 1]


def _repeated(sets: list[NDArray[np.uint64]], workers: tuple[int, ...]) -> int:
    seen: set[int] = set()
    for words in sets:
        members = set(_members(words, workers))
        if seen & members:
            return min(seen & members)
        seen |= members
    raise AssertionError("no contribution is repeated")


def execute(schedule: Schedule, values: NDArray[Any]) -> NDArray[Any]:
    """Run a schedule on real vectors, in its own order of additions.

    Parameters
    ----------
    schedule : Schedule
    values : ndarray, shape (n_workers, n_elements)
        Row i is the vector of ``schedule.workers[i]``. Piece j is elements floor(j E / chunks) up
        to floor((j + 1) E / chunks).

    Returns
    -------
    ndarray, shape (n_workers, n_elements), dtype of `values`
        What each worker ends with.

    Examples
    --------
    >>> from topologies.collectives import bml
    >>> execute(bml(2, 2), np.arange(8).reshape(4, 2)).tolist()
    [[12, 16], [12, 16], [12, 16], [12, 16]]
    """
    n_elements = values.shape[1]
    cut = np.arange(schedule.chunks + 1) * n_elements // schedule.chunks
    state = np.zeros((schedule.ranks, n_elements), dtype=values.dtype)
    state[list(schedule.workers)] = values
    for step in schedule.steps:
        sent = [
            (b, cut[lo], cut[hi], adds, state[a, cut[lo] : cut[hi]].copy())
            for a, b, lo, hi, adds in zip(
                step.source, step.destination, step.lo, step.hi, step.reduces, strict=True
            )
        ]
        for rank, lo, hi, adds, part in sent:
            if adds:
                state[rank, lo:hi] += part
            else:
                state[rank, lo:hi] = part
    return np.asarray(state[list(schedule.workers)])


def to_json(schedule: Schedule, path: str | Path) -> None:
    """Write a schedule as ``{name, ranks, chunks, workers, steps}``, a send as a list of five."""
    data = {
        "name": schedule.name,
        "ranks": schedule.ranks,
        "chunks": schedule.chunks,
        "workers": list(schedule.workers),
        "steps": [step.sends() for step in schedule.steps],
    }
    Path(path).write_text(json.dumps(data), encoding="utf-8")


def from_json(path: str | Path) -> Schedule:
    """Read a schedule that `to_json` or a user wrote, and check it.

    ``workers`` may be left out: then all ranks are.

    Raises
    ------
    ValueError
        If the file is no schedule, or the schedule does not sum correctly (see `check`).
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        ranks, chunks = int(data["ranks"]), int(data["chunks"])
        steps = tuple(step_of(sends) for sends in data["steps"])
        workers = tuple(int(w) for w in data.get("workers", range(ranks)))
    except (OSError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(f"{path}: not a schedule: {error}") from error
    schedule = Schedule(str(data.get("name", Path(path).stem)), ranks, chunks, steps, workers)
    if ranks < 2 or chunks < 1 or not set(workers) <= set(range(ranks)) or not workers:
        raise ValueError(f"{path}: ranks = {ranks}, chunks = {chunks}, workers = {workers}")
    check(schedule)
    return schedule
