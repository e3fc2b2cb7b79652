"""Collectives that sum a vector over all workers, as schedules made from sizes.

`topologies.placement` makes them from a graph. Times on a non-blocking network are in
`topologies.closed_forms`.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from topologies.attributes import at_least
from topologies.generators import coordinates
from topologies.schedules import Schedule, Send, Step, step_of

__all__ = [
    "all_to_all",
    "binomial_tree",
    "bml",
    "dimension_rings",
    "double_binary_tree",
    "gray_order",
    "halving_doubling",
    "hierarchical_parameter_server",
    "parameter_server",
    "recursive_doubling",
    "ring",
    "sharded_parameter_server",
]

IntArray = NDArray[np.int64]


def bml(n: int, k: int) -> Schedule:
    """Return BML on BCube(n, k): 2k steps in which every port carries the same bytes.

    Thread p of k owns pieces p N .. (p + 1) N - 1, N = n^k. Within it the piece number is a base-n
    number whose most significant digit belongs to level p, the next to level p + 1, and so on
    (mod k). Aggregation step s: on level (p + s) mod k every server receives, from each neighbour,
    the pieces of thread p whose first s + 1 digits are its own, and adds them. The broadcast runs
    the same steps backwards and overwrites.

    Parameters
    ----------
    n : int
        Ports of a switch, at least 2.
    k : int
        Levels, at least 1. k = 1 is `sharded_parameter_server`; n = 2 halves and doubles on all
        dimensions of a hypercube at once.

    Examples
    --------
    >>> n, k = 3, 2
    >>> schedule = bml(n, k)
    >>> len(schedule.steps) == 2 * k, schedule.n_sends == 2 * k**2 * (n - 1) * n**k
    (True, True)

    References
    ----------
    .. [1] Wang et al., "BML: A high-performance, low-cost gradient synchronization algorithm for
       DML training", NeurIPS 2018.
    """
    at_least("n", n, 2)
    at_least("k", k, 1)
    servers = np.arange(n**k)
    digits = servers[:, None] // n ** np.arange(k) % n
    gather, spread = [], []
    for depth in range(k):
        owner, neighbour, lo = [], [], []
        for thread in range(k):
            block = np.full(len(servers), thread * n**k)
            for i in range(depth + 1):
                block += digits[:, (thread + i) % k] * n ** (k - 1 - i)
            level = (thread + depth) % k
            for turn in range(1, n):
                digit = (digits[:, level] + turn) % n
                owner.append(servers)
                neighbour.append(servers + (digit - digits[:, level]) * n**level)
                lo.append(block)
        ours, theirs, first = (np.concatenate(a) for a in (owner, neighbour, lo))
        last = first + n ** (k - depth - 1)
        gather.append(Step(theirs, ours, first, last, np.ones(len(first), dtype=bool)))
        spread.append(Step(ours, theirs, first, last, np.zeros(len(first), dtype=bool)))
    return _schedule(f"bml({n},{k})", n**k, k * n**k, gather + spread[::-1])


def ring(ranks: int, order: Sequence[int] | None = None) -> Schedule:
    """Return reduce-scatter and all-gather around a ring: 2 (N - 1) steps.

    Parameters
    ----------
    ranks : int
    order : sequence of int, optional
        The ranks as they follow each other; 0, 1, ... by default.

    References
    ----------
    .. [1] Patarasuk, Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
       JPDC 2009.
    """
    at_least("ranks", ranks, 2)
    around = np.arange(ranks) if order is None else np.asarray(order, dtype=np.int64)
    if sorted(around.tolist()) != list(range(ranks)):
        raise ValueError(f"order = {order}: must list each of the {ranks} ranks once")
    place, after = np.arange(ranks), np.roll(around, -1)
    steps = []
    for adds in (True, False):
        for t in range(ranks - 1):
            lo = (place - t + (not adds)) % ranks
            steps.append(Step(around, after, lo, lo + 1, np.full(ranks, adds)))
    return _schedule("ring", ranks, ranks, steps)


def gray_order(n: int, k: int) -> list[int]:
    """Return BCube's servers so that each differs from the next, cyclically, in one digit.

    Examples
    --------
    >>> gray_order(3, 2)
    [0, 1, 2, 5, 3, 4, 7, 8, 6]
    """
    weights = n ** np.arange(k)
    digits = np.arange(n**k)[:, None] // weights % n
    above = np.concatenate([digits[:, 1:], np.zeros((n**k, 1), dtype=np.int64)], axis=1)
    return [int(v) for v in ((digits - above) % n) @ weights]


def halving_doubling(ranks: int) -> Schedule:
    """Return recursive halving, then doubling: 2 log2 N steps.

    If N is not a power of two, the first 2 (N - P) ranks, P = 2^floor(log2 N), work in pairs: the
    odd ones add their vector to the even ones' first and get the result last.

    References
    ----------
    .. [1] Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in
       MPICH", IJHPCA 2005.
    """
    core, before, after = _folded(ranks)
    size = len(core)
    gather, spread = [], []
    half = size // 2
    while half:
        pairs = [(i, i ^ half) for i in range(size)]
        gather.append(
            [
                (core[i], core[j], j // half * half, j // half * half + half, "reduce")
                for i, j in pairs
            ]
        )
        spread.append(
            [
                (core[i], core[j], i // half * half, i // half * half + half, "copy")
                for i, j in pairs
            ]
        )
        half //= 2
    rows: list[list[Any]] = [*before, *gather, *spread[::-1], *after]
    steps = [step_of(sends) for sends in rows]
    return _schedule("halving_doubling", ranks, size, steps)


def recursive_doubling(ranks: int) -> Schedule:
    """Return pairwise exchange of whole vectors: log2 N steps, for short vectors.

    Other N than powers of two are folded as in `halving_doubling`.
    """
    core, before, after = _folded(ranks)
    size = len(core)
    exchange = [
        [(core[i], core[i ^ 1 << bit], 0, size, "reduce") for i in range(size)]
        for bit in range(size.bit_length() - 1)
    ]
    rows: list[list[Any]] = [*before, *exchange, *after]
    steps = [step_of(sends) for sends in rows]
    return _schedule("recursive_doubling", ranks, size, steps)


def _folded(ranks: int) -> tuple[list[int], list[list[Send]], list[list[Send]]]:
    """Return the 2^m ranks that go on, and the steps that fold the others in and out."""
    at_least("ranks", ranks, 2)
    size = 1 << ranks.bit_length() - 1
    folded = ranks - size
    core = [*range(0, 2 * folded, 2), *range(2 * folded, ranks)]
    if not folded:
        return core, [], []
    before = [Send(2 * i + 1, 2 * i, 0, size, "reduce") for i in range(folded)]
    after = [Send(2 * i, 2 * i + 1, 0, size, "copy") for i in range(folded)]
    return core, [before], [after]


def binomial_tree(ranks: int) -> Schedule:
    """Return a binomial-tree reduction to rank 0 and the broadcast back: 2 ceil(log2 N) steps."""
    at_least("ranks", ranks, 2)
    up, down = [], []
    for bit in range((ranks - 1).bit_length()):
        leaving = [i for i in range(ranks) if i & (2 << bit) - 1 == 1 << bit]
        up.append(step_of([(i, i - (1 << bit), 0, 1, "reduce") for i in leaving]))
        down.append(step_of([(i - (1 << bit), i, 0, 1, "copy") for i in leaving]))
    return _schedule("binomial_tree", ranks, 1, up + down[::-1])


def double_binary_tree(ranks: int, pieces: int = 16) -> Schedule:
    """Return two pipelined binary trees, each for half of the vector: 2 H + P - 1 steps.

    The second tree is the first with the ranks mirrored (even N) or shifted (odd N), so that inner
    ranks of one are mostly leaves of the other.

    Parameters
    ----------
    ranks : int
    pieces : int
        P, pieces of each half.

    References
    ----------
    .. [1] Sanders, Speck, Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and
       scan", Parallel Computing 2009.
    """
    at_least("ranks", ranks, 2)
    at_least("pieces", pieces, 1)
    numbering = [list(range(ranks)), [(i + 1) % ranks for i in range(ranks)]]
    if ranks % 2 == 0:
        numbering[1] = list(range(ranks))[::-1]
    sends: dict[int, list[Send]] = defaultdict(list)
    for half, names in enumerate(numbering):
        parent = [_tree_parent(i, ranks) for i in range(ranks)]
        depth, height = [0] * ranks, [0] * ranks
        for i in sorted(range(1, ranks), key=lambda v: _tree_depth(v, parent)):
            depth[i] = depth[parent[i]] + 1
        for i in sorted(range(1, ranks), key=lambda v: -depth[v]):
            height[parent[i]] = max(height[parent[i]], height[i] + 1)
        for number in range(pieces):
            lo = half * pieces + number
            for i in range(1, ranks):
                child, above = names[i], names[parent[i]]
                sends[height[i] + number].append(Send(child, above, lo, lo + 1, "reduce"))
                time = height[0] + depth[parent[i]] + number
                sends[time].append(Send(above, child, lo, lo + 1, "copy"))
    steps = [step_of(sends[time]) for time in range(max(sends) + 1)]
    return _schedule("double_binary_tree", ranks, 2 * pieces, steps)


def _tree_parent(i: int, ranks: int) -> int:
    """Return the parent in a binary tree with root 0 whose odd numbers are leaves."""
    if i == 0:
        return 0
    bit = i & -i
    up = i ^ bit | bit << 1
    return i ^ bit if up >= ranks else up


def _tree_depth(i: int, parent: Sequence[int]) -> int:
    return 0 if i == 0 else 1 + _tree_depth(parent[i], parent)


def parameter_server(workers: int, servers: int = 1) -> Schedule:
    """Return push to and pull from dedicated servers, each owning an equal shard: 2 steps.

    Ranks `workers` and up are the servers.
    """
    at_least("workers", workers, 1)
    at_least("servers", servers, 1)
    worker, shard = (a.reshape(-1) for a in np.mgrid[:workers, :servers])
    adds = np.ones(len(worker), dtype=bool)
    push = Step(worker, workers + shard, shard, shard + 1, adds)
    pull = Step(workers + shard, worker, shard, shard + 1, ~adds)
    name = f"ps_dedicated(servers={servers})"
    return Schedule(name, workers + servers, servers, (push, pull), tuple(range(workers)))


def sharded_parameter_server(ranks: int) -> Schedule:
    """Return the parameter server co-located with the workers, each owning 1/N: 2 steps.

    It is the direct reduce-scatter followed by the direct all-gather.
    """
    at_least("ranks", ranks, 2)
    worker, shard = (a.reshape(-1) for a in np.mgrid[:ranks, :ranks])
    worker, shard = worker[worker != shard], shard[worker != shard]
    adds = np.ones(len(worker), dtype=bool)
    push = Step(worker, shard, shard, shard + 1, adds)
    pull = Step(shard, worker, shard, shard + 1, ~adds)
    return _schedule("ps_colocated", ranks, ranks, [push, pull])


def all_to_all(ranks: int) -> Schedule:
    """Return the exchange in which everybody sends the whole vector to everybody: 1 step."""
    at_least("ranks", ranks, 2)
    source, destination = (a.reshape(-1) for a in np.mgrid[:ranks, :ranks])
    apart = source != destination
    source, destination = source[apart], destination[apart]
    lo = np.zeros_like(source)
    step = Step(source, destination, lo, lo + 1, np.ones(len(source), dtype=bool))
    return _schedule("all_to_all", ranks, 1, [step])


def hierarchical_parameter_server(
    groups: Sequence[Sequence[int]], leaders: Sequence[int] | None = None, root: int | None = None
) -> Schedule:
    """Return members to leader, leaders to root, and back: 4 steps.

    Parameters
    ----------
    groups : sequence of sequence of int
        The workers' ranks 0..N-1, each in one group.
    leaders : sequence of int, optional
        One for each group: its first member by default, or dedicated ranks from N on (edge
        servers).
    root : int, optional
        The first leader by default, or a dedicated rank (the cloud).
    """
    workers = sorted(rank for group in groups for rank in group)
    if workers != list(range(len(workers))) or not workers:
        raise ValueError(f"groups = {groups}: must hold each of the ranks 0..N-1 once")
    heads = [group[0] for group in groups] if leaders is None else list(leaders)
    if len(heads) != len(groups):
        raise ValueError(f"leaders = {heads}: one for each of the {len(groups)} groups")
    top = heads[0] if root is None else root
    members = [(rank, head) for group, head in zip(groups, heads, strict=True) for rank in group]
    lower = [(rank, head) for rank, head in members if rank != head]
    upper = [(head, top) for head in heads if head != top]
    steps = [
        step_of([(a, b, 0, 1, "reduce") for a, b in lower]),
        step_of([(a, b, 0, 1, "reduce") for a, b in upper]),
        step_of([(b, a, 0, 1, "copy") for a, b in upper]),
        step_of([(b, a, 0, 1, "copy") for a, b in lower]),
    ]
    ranks = max(*workers, *heads, top) + 1
    return Schedule("ps_hierarchical", ranks, 1, tuple(steps), tuple(workers))


def dimension_rings(dims: Sequence[int], *, rotated: bool = False) -> Schedule:
    """Return a ring in each dimension in turn, reduce-scatter up and all-gather back.

    Rank r has mixed-radix digits ``coordinates(r, dims)``.

    Parameters
    ----------
    dims : sequence of int
        A dimension of size 1 is passed over.
    rotated : bool
        One thread for each dimension, in rotated order, so that all dimensions are busy.

    References
    ----------
    .. [1] Cho et al., "BlueConnect: decomposing all-reduce for deep learning on heterogeneous
       network hierarchy", MLSys 2019.
    .. [2] Mikami et al., "Massively distributed SGD: ImageNet/ResNet-50 training in a flash",
       2018 (2D torus).
    """
    for size in dims:
        at_least("dims", size, 1)
    ranks = at_least("ranks (the product of dims)", math.prod(dims), 2)
    digits = np.array([coordinates(rank, dims) for rank in range(ranks)])
    strides = np.cumprod([1, *dims[:-1]])
    threads = len(dims) if rotated else 1
    lines: list[list[Step]] = []
    for thread in range(threads):
        order = [(thread + i) % len(dims) for i in range(len(dims))]
        gather: list[Step] = []
        spread: list[Step] = []
        base, size = np.full(ranks, thread * ranks), ranks
        for level in order:
            width = size // dims[level]
            onward = (digits[:, level] + 1) % dims[level] - digits[:, level]
            after = np.arange(ranks) + onward * strides[level]
            turns: list[Step] = []
            for turn in range(dims[level] - 1):
                # The pieces travel so that a rank ends with those of its own digit.
                for lag, adds, steps in ((turn + 1, True, gather), (turn, False, turns)):
                    lo = base + (digits[:, level] - lag) % dims[level] * width
                    steps.append(
                        Step(np.arange(ranks), after, lo, lo + width, np.full(ranks, adds))
                    )
            spread = turns + spread
            base, size = base + digits[:, level] * width, width
        lines.append(gather + spread)
    steps = []
    for time in range(len(lines[0])):
        together = [line[time] for line in lines]
        columns = [np.concatenate([getattr(s, c) for s in together]) for c in _COLUMNS]
        steps.append(Step(*columns))
    name = f"{'rotated' if rotated else 'dimension'}_rings({'x'.join(map(str, dims))})"
    return _schedule(name, ranks, threads * ranks, steps)


_COLUMNS = ("source", "destination", "lo", "hi", "reduces")


def _schedule(name: str, ranks: int, chunks: int, steps: Sequence[Step]) -> Schedule:
    return Schedule(name, ranks, chunks, tuple(steps), tuple(range(ranks)))
