"""MSCCL-style XML: a user's all-reduce as thread blocks of send and receive steps.

Read is what an in-place all-reduce needs: buffers ``i`` and ``o`` are one vector of
``nchunksperloop`` pieces; steps ``s``, ``r``, ``rcs``, ``rrc``, ``rrs``, ``rrcs``, ``nop``, in
the order of their thread block, after the step named by ``depid`` and ``deps``. The scratch buffer
and local steps (``cpy``, ``re``) are refused.

References
----------
.. [1] Cowan, Maleki, Musuvathi, Saarikivi, Xiong, "MSCCLang: Microsoft collective communication
   language", ASPLOS 2023.
"""

import xml.etree.ElementTree as ElementTree
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path

from topologies.schedules import Schedule, Send, check, step_of

__all__ = ["from_msccl_xml"]

_RECEIVES = {"r", "rcs", "rrc", "rrs", "rrcs"}
_SENDS = {"s", "rcs", "rrs", "rrcs"}
_REDUCES = {"rrc", "rrs", "rrcs"}
_KINDS = _RECEIVES | _SENDS | {"nop"}


@dataclass(slots=True)
class _Step:
    """One step of a thread block, and when its parts happen (the number of a schedule's step)."""

    where: str
    kind: str
    source: int
    target: int
    count: int
    peer_send: int
    peer_receive: int
    channel: str
    after: tuple[tuple[int, int, int], ...]
    before: list["_Step"] = field(default_factory=list)
    received: int = 0
    sent: int = 0


def from_msccl_xml(path: str | Path) -> Schedule:
    """Read an all-reduce in MSCCL's XML, and check it.

    Parameters
    ----------
    path : str or Path

    Returns
    -------
    Schedule
        A message is in the earliest step that its thread blocks and dependencies allow.

    Raises
    ------
    ValueError
        If an attribute is missing, a step is of a kind that is not read, a send has no matching
        receive, the blocks wait for each other, or the sum is wrong (`schedules.check`).
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"{path}: not XML: {error}") from error
    if root.tag != "algo":
        raise ValueError(f"{path}: <{root.tag}>: an MSCCL file starts with <algo>")
    if root.get("coll", "allreduce") != "allreduce":
        raise ValueError(f"{path}: coll = {root.get('coll')!r}: only allreduce is read")
    chunks = _integer(root, "nchunksperloop", "<algo>")
    gpus = root.findall("gpu")
    ranks = int(root.get("ngpus", len(gpus)))
    blocks = _blocks(gpus)
    messages = _matched(blocks)
    _level(blocks, messages)
    sends: dict[int, list[Send]] = defaultdict(list)
    for sender, receiver, a, b in messages:
        lo = sender.target if sender.kind != "s" else sender.source
        place = receiver.target
        if lo != place or sender.count != receiver.count:
            raise ValueError(
                f"{sender.where} sends pieces from {lo} ({sender.count}), {receiver.where} puts "
                f"them at {place} ({receiver.count}): only in-place algorithms are read"
            )
        operation = "reduce" if receiver.kind in _REDUCES else "copy"
        sends[sender.sent].append(Send(a, b, lo, lo + sender.count, operation))
    steps = tuple(step_of(sends[t]) for t in range(max(sends, default=-1) + 1))
    schedule = Schedule(
        root.get("name", Path(path).stem), ranks, chunks, steps, tuple(range(ranks))
    )
    check(schedule)
    return schedule


def _integer(element: ElementTree.Element, name: str, where: str) -> int:
    value = element.get(name)
    try:
        return int(value if value is not None else "missing")
    except ValueError:
        raise ValueError(f"{where}: attribute {name} = {value!r}: must be an integer") from None


def _blocks(gpus: list[ElementTree.Element]) -> dict[tuple[int, int], list[_Step]]:
    blocks: dict[tuple[int, int], list[_Step]] = {}
    for gpu in gpus:
        rank = _integer(gpu, "id", "<gpu>")
        for tb in gpu.findall("tb"):
            block = _integer(tb, "id", f"gpu {rank}: <tb>")
            name = f"gpu {rank}, tb {block}"
            peers = _integer(tb, "send", name), _integer(tb, "recv", name)
            steps = [_step(e, rank, name, peers, tb.get("chan", "0")) for e in tb.findall("step")]
            blocks[rank, block] = steps
    return blocks


def _step(
    element: ElementTree.Element, rank: int, block: str, peers: tuple[int, int], channel: str
) -> _Step:
    where = f"{block}, step {element.get('s', '?')}"
    kind = element.get("type", "missing")
    if kind not in _KINDS:
        raise ValueError(f"{where}: type {kind!r}: must be one of {', '.join(sorted(_KINDS))}")
    after: tuple[tuple[int, int, int], ...] = ()
    if element.get("depid", "-1") != "-1":
        after = ((rank, _integer(element, "depid", where), _integer(element, "deps", where)),)
    if kind == "nop":
        return _Step(where, kind, 0, 0, 0, *peers, channel, after)
    used = {"srcbuf"} if kind == "s" else {"dstbuf"} if kind == "r" else {"srcbuf", "dstbuf"}
    for name in sorted(used):
        if element.get(name) not in ("i", "o"):
            raise ValueError(
                f"{where}: {name} = {element.get(name)!r}: only the buffers i and o are read"
            )
    count = _integer(element, "cnt", where)
    source = _integer(element, "srcoff", where)
    target = _integer(element, "dstoff", where)
    return _Step(where, kind, source, target, count, *peers, channel, after)


def _matched(blocks: dict[tuple[int, int], list[_Step]]) -> list[tuple[_Step, _Step, int, int]]:
    """Pair the n-th send with the n-th receive between two gpus on one channel."""
    outgoing: dict[tuple[int, int, str], deque[_Step]] = defaultdict(deque)
    incoming: dict[tuple[int, int, str], deque[_Step]] = defaultdict(deque)
    for (rank, _), steps in blocks.items():
        for step in steps:
            if step.kind in _SENDS:
                outgoing[rank, step.peer_send, step.channel].append(step)
            if step.kind in _RECEIVES:
                incoming[step.peer_receive, rank, step.channel].append(step)
    messages = []
    for key in {**outgoing, **incoming}:
        ours, theirs = outgoing[key], incoming[key]
        if len(ours) != len(theirs):
            raise ValueError(
                f"gpu {key[0]} sends {len(ours)} messages to gpu {key[1]} on channel {key[2]}, "
                f"which receives {len(theirs)}"
            )
        messages += [(a, b, key[0], key[1]) for a, b in zip(ours, theirs, strict=True)]
    return messages


def _level(
    blocks: dict[tuple[int, int], list[_Step]], messages: list[tuple[_Step, _Step, int, int]]
) -> None:
    """Give every message the earliest step of the schedule in which it can travel.

    What a step receives can be used one step later. A send reads the state before its step, so a
    receive that follows it may share the step.
    """
    for steps in blocks.values():
        for i, step in enumerate(steps):
            step.before = [steps[i - 1]] if i else []
            for rank, block, number in step.after:
                if (rank, block) not in blocks or number >= len(blocks[rank, block]):
                    raise ValueError(f"{step.where}: depends on tb {block}, step {number}: none")
                step.before.append(blocks[rank, block][number])
    idle = [step for steps in blocks.values() for step in steps if step.kind == "nop"]
    changed = True
    while changed:
        changed = False
        for step in idle:
            time = max((_earliest(e, to_send=True) for e in step.before), default=0)
            changed |= time > step.received
            step.received = time
        for sender, receiver, _, _ in messages:
            times = [_earliest(e, to_send=True) for e in sender.before]
            times += [_earliest(e, to_send=False) for e in receiver.before]
            if sender.kind != "s":  # it forwards what it has received
                times.append(sender.received + 1)
            time = max(times, default=0)
            if time > len(messages):
                raise ValueError(f"{sender.where}: waits forever for the other thread blocks")
            if time > sender.sent:
                sender.sent = receiver.received = time
                changed = True


def _earliest(earlier: _Step, *, to_send: bool) -> int:
    """Return the first step of the schedule for what comes after an earlier step."""
    times = [0]
    if earlier.kind in _RECEIVES:
        times.append(earlier.received + 1)
    if earlier.kind in _SENDS:
        times.append(earlier.sent + to_send)
    if earlier.kind == "nop":
        times.append(earlier.received)
    return max(times)
