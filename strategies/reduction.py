"""Sums of rows as a collective forms them: order of additions, wire format, lost and bad chunks.

A row is one rank's vector. `run_schedule` does what `topologies.schedules.execute` does, on tensors
of any type, and lets messages be lost or corrupted. `schedule_for` makes the named schedules from
the number of ranks alone, for who has no graph.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.halves import KeyedDraws
from topologies import collectives
from topologies.placement import COLLECTIVES
from topologies.schedules import Schedule

__all__ = ["ChunkFaults", "Reduction", "keep_largest", "one_of", "run_schedule", "schedule_for"]

BoolArray = NDArray[np.bool_]
_WIRE_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class ChunkFaults:
    """What goes wrong with the messages of a collective, unnoticed by its ranks.

    Parameters
    ----------
    loss : float
        Probability that a message never comes: its receiver goes on with what it has.
    corruption : float
        Probability that one bit of one of a message's numbers arrives flipped.
    seed : int
        Of the draws, which are keyed by round, step and place in the step.

    Raises
    ------
    ValueError
        If a probability is not from 0 to 1.
    """

    loss: float = 0.0
    corruption: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("loss", "corruption"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"chunk_{name} = {getattr(self, name)}: must be from 0 to 1")

    def __bool__(self) -> bool:
        return self.loss > 0 or self.corruption > 0

    def lost(self, number: int, step: int, n_sends: int) -> BoolArray:
        """Return which messages of a step of round `number` are lost, shape (n_sends,)."""
        return self._draw("chunk-loss", number, step, n_sends) < self.loss

    def corrupted(self, number: int, step: int, n_sends: int) -> BoolArray:
        """Return which messages arrive with a flipped bit, shape (n_sends,)."""
        return self._draw("chunk-corruption", number, step, n_sends) < self.corruption

    def flip(self, part: Tensor, number: int, step: int, send: int) -> Tensor:
        """Return a message ``(n,)`` with one bit of one number flipped."""
        width = 8 * part.element_size()
        where, which = KeyedDraws(self.seed, "flipped-bit", number, step, send)((2,))[0].tolist()
        flipped = part.clone()
        words = flipped.view(_WORDS[part.element_size()])
        bit = int(which * width)
        mask = 1 << bit if bit < width - 1 else -(1 << (width - 1))
        words[int(where * len(words))] ^= mask
        return flipped

    def _draw(self, purpose: str, number: int, step: int, n_sends: int) -> NDArray[np.float64]:
        return np.asarray(KeyedDraws(self.seed, purpose, number, step)((n_sends,))[0].numpy())


@dataclass(frozen=True, slots=True)
class Reduction:
    """How Σ w_i g_i is formed of the ranks' vectors.

    Parameters
    ----------
    arithmetic : {"mean", "schedule"}
        One reduction for all ranks; or real additions in the order of a collective.
    wire_dtype : {"float16", "bfloat16", "float32"}, optional
        The vectors are rounded to it and summed in it. Default: their own type.
    top_k : float, optional
        Share of its entries, the largest, that a rank sends; at least one.
    faults : ChunkFaults
        Of `arithmetic: schedule`.

    Raises
    ------
    ValueError
        If a value is unknown or out of its range, or two do not go together.
    """

    arithmetic: Literal["mean", "schedule"] = "mean"
    wire_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    top_k: float | None = None
    faults: ChunkFaults = ChunkFaults()

    def __post_init__(self) -> None:
        one_of("arithmetic", self.arithmetic, ("mean", "schedule"))
        one_of("wire_dtype", self.wire_dtype, (None, *_WIRE_TYPES))
        if self.top_k is not None and not 0 < self.top_k <= 1:
            raise ValueError(f"top_k = {self.top_k}: must be above 0 and at most 1")
        if self.faults and self.arithmetic != "schedule":
            raise ValueError("chunk_loss and chunk_corruption need arithmetic = 'schedule'")

    def payload_bytes(self, size: int, dtype: torch.dtype) -> int:
        """Return what a vector of so many numbers of a type weighs: an index takes 4 bytes."""
        each = self._wire(dtype).itemsize
        return size * each if self.top_k is None else self._n_kept(size) * (each + 4)

    def sparse(self, vectors: Tensor) -> Tensor:
        """Return what of each vector travels under `top_k`, rounded, the rest zero."""
        kept = keep_largest(vectors, self._n_kept(vectors.shape[1]))
        return kept.to(self._wire(vectors.dtype)).to(vectors.dtype)

    def total(
        self,
        vectors: Tensor,
        weights: Tensor,
        schedule: Callable[[int], Schedule],
        number: int = 0,
    ) -> Tensor:
        """Return Σ w_i g_i as the ranks hold it: one row if all hold the same, else one each.

        Parameters
        ----------
        vectors : Tensor, shape (n, p)
        weights : Tensor of float64, shape (n,)
        schedule : callable
            Number of ranks → the order of additions.
        number : int
            The round, which keys the faults.
        """
        dtype, wire = vectors.dtype, self._wire(vectors.dtype)
        weights = weights.to(vectors.device, dtype)
        if self.arithmetic == "mean" or len(vectors) == 1:
            if wire == dtype:
                return (weights @ vectors)[None]
            shares = (weights[:, None] * vectors).to(wire).to(dtype)
            return shares.sum(0, keepdim=True).to(wire).to(dtype)
        shares = (weights[:, None] * vectors).to(wire)
        held = run_schedule(schedule(len(shares)), shares, number=number, faults=self.faults)
        is_common = bool((held == held[0]).all())
        return (held[:1] if is_common else held).to(dtype)

    def _wire(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if self.wire_dtype is None else _WIRE_TYPES[self.wire_dtype]

    def _n_kept(self, size: int) -> int:
        return size if self.top_k is None else max(1, round(self.top_k * size))


def run_schedule(
    schedule: Schedule, rows: Tensor, *, number: int = 0, faults: ChunkFaults | None = None
) -> Tensor:
    """Return what each worker holds after a schedule, every sum rounded to the type of `rows`.

    All messages of a step carry what their sender held at its start.

    Parameters
    ----------
    schedule : Schedule
        As many workers as there are rows.
    rows : Tensor, shape (n_workers, n_elements)
        Row i is the vector of ``schedule.workers[i]``; not written to.
    number : int
        The round, which keys the faults.
    faults : ChunkFaults, optional

    Returns
    -------
    Tensor, shape (n_workers, n_elements)

    Raises
    ------
    ValueError
        If the schedule is for another number of workers.

    Examples
    --------
    >>> run_schedule(collectives.bml(2, 2), torch.arange(8.0).reshape(4, 2))[3].tolist()
    [12.0, 16.0]
    """
    if len(rows) != len(schedule.workers):
        raise ValueError(
            f"{schedule.name} sums {len(schedule.workers)} vectors, there are {len(rows)}"
        )
    cut = (np.arange(schedule.chunks + 1) * rows.shape[1] // schedule.chunks).tolist()
    held = rows.new_zeros((schedule.ranks, rows.shape[1]))
    held[list(schedule.workers)] = rows
    for at, step in enumerate(schedule.steps):
        n_sends = len(step)
        is_lost = faults.lost(number, at, n_sends) if faults else np.zeros(n_sends, bool)
        is_bad = faults.corrupted(number, at, n_sends) if faults else np.zeros(n_sends, bool)
        sent = []
        for i, (source, destination, lo, hi, operation) in enumerate(step.sends()):
            part = held[source, cut[lo] : cut[hi]]
            if is_lost[i] or not len(part):
                continue
            if faults and is_bad[i]:
                part = faults.flip(part, number, at, i)
            sent.append((destination, cut[lo], cut[hi], operation, part.clone()))
        for destination, lo, hi, operation, part in sent:
            if operation == "reduce":
                held[destination, lo:hi] += part
            else:
                held[destination, lo:hi] = part
    return held[list(schedule.workers)]


def keep_largest(rows: Tensor, k: int) -> Tensor:
    """Return rows ``(n, p)`` with all but the k entries of largest magnitude set to zero."""
    places = rows.abs().topk(k, dim=1).indices
    return torch.zeros_like(rows).scatter_(1, places, rows.gather(1, places))


def schedule_for(collective: str, ranks: int, levels: int | None = None) -> Schedule:
    """Return a named schedule for so many ranks, without a graph.

    Parameters
    ----------
    collective : str
        A key of `topologies.placement.COLLECTIVES`.
    ranks : int
        Workers.
    levels : int, optional
        Of the BCube that they form (n^levels servers): for ``bml`` and rings in each dimension.
        Default: the fewest from 2 on that fit, else 1. Given, ``ring`` follows the Gray order.

    Raises
    ------
    ValueError
        If the name is unknown, there are fewer than 2 ranks, or their number is no such power.

    Examples
    --------
    >>> schedule_for("bml", 16).name, schedule_for("bml", 16, levels=4).name
    ('bml(4,2)', 'bml(2,4)')
    """
    one_of("collective", collective, COLLECTIVES)
    if ranks < 2:
        raise ValueError(f"ranks = {ranks}: a collective needs at least 2")
    if collective in ("bml", "dimension_rings", "rotated_rings") or (
        collective == "ring" and levels is not None
    ):
        n, k = _bcube_of(ranks, levels)
        made: dict[str, Callable[[], Schedule]] = {
            "bml": lambda: collectives.bml(n, k),
            "dimension_rings": lambda: collectives.dimension_rings((n,) * k),
            "rotated_rings": lambda: collectives.dimension_rings((n,) * k, rotated=True),
            "ring": lambda: collectives.ring(ranks, collectives.gray_order(n, k)),
        }
        return made[collective]()
    if collective == "ps_hierarchical":
        size = max(1, round(ranks**0.5))
        groups = [list(range(i, min(i + size, ranks))) for i in range(0, ranks, size)]
        return collectives.hierarchical_parameter_server(groups)
    plain: dict[str, Callable[[int], Schedule]] = {
        "all_to_all": collectives.all_to_all,
        "binomial_tree": collectives.binomial_tree,
        "double_binary_tree": collectives.double_binary_tree,
        "halving_doubling": collectives.halving_doubling,
        "ps_colocated": collectives.sharded_parameter_server,
        "ps_dedicated": collectives.parameter_server,
        "recursive_doubling": collectives.recursive_doubling,
        "ring": collectives.ring,
    }
    return plain[collective](ranks)


def _bcube_of(ranks: int, levels: int | None) -> tuple[int, int]:
    """Return n and k with n^k = ranks."""
    most = math.floor(math.log2(ranks))
    tried = [levels] if levels is not None else [*range(2, most + 1), 1]
    for k in tried:
        n = round(ranks ** (1 / k)) if k >= 1 else 0
        if n >= 2 and n**k == ranks:
            return n, k
    raise ValueError(f"levels = {levels}: {ranks} ranks are no BCube(n, {levels})")


def one_of(name: str, value: object, valid: Iterable[object]) -> None:
    """Raise a ValueError that names the choices if a value is none of them."""
    choices = list(valid)
    if value not in choices:
        words = ", ".join(str(each) for each in choices if each is not None)
        raise ValueError(f"{name} = {value!r}: must be one of {words}")
