"""What instructions to run a collective mean on the grid: who with whom, by which schedule."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from typing import cast

from fedsim.errors import PayloadError
from fedsim.flower.instructions import NODE_BASE, Collective, Exchange
from fedsim.network.plan import Bucket, Plan, Report
from fedsim.network.transfers import Network
from fedsim.recorder import StepRow
from topologies.attributes import Graph, servers_of
from topologies.generators import star
from topologies.overlap import FORWARD, buckets_of
from topologies.placement import COLLECTIVES, among
from topologies.profiles import Profile, profile
from topologies.schedules import Schedule, Step, step_of

__all__ = ["Planner", "steps_of", "times_of"]

# Where some of the devices are gone, these give way to a collective that takes any number.
_NEED_ALL = ("bml", "dimension_rings", "rotated_rings")
_INSTEAD = "ps_colocated"
_ALONE = Schedule("nobody", 1, 1, (step_of([]),), (0,))


class Planner:
    """Sorts the instructions of a push by group, and says how each group runs its collective.

    Parameters
    ----------
    network : Network
    n_devices : int
        Devices are nodes 0 to n_devices - 1.
    profile : callable, optional
        Returns the layers of the model, for instructions that fuse tensors and name no profile.
    """

    def __init__(
        self, network: Network, n_devices: int, profile: Callable[[], Profile] | None = None
    ) -> None:
        self._network = network
        self._profile = None if profile is None else cache(profile)
        self._n_devices = n_devices
        self._schedule = lru_cache(maxsize=64)(self._make_schedule)

    @cached_property
    def _graph(self) -> Graph:
        graph = self._network.graph
        return star(self._n_devices) if graph is None else cast(Graph, graph)

    def groups(self, pushed: Sequence[tuple[int, Exchange]]) -> list[tuple[list[int], Plan]]:
        """Return the groups among the instructions of one push.

        Parameters
        ----------
        pushed : sequence of (int, Exchange)
            Device and exchange of each instruction; those of another kind are passed over.

        Returns
        -------
        list of (list of int, Plan)
            The group's instructions, as places in `pushed` by ascending device, and its plan.

        Raises
        ------
        PayloadError
            If instructions of a group differ or go to the same device, or the collective does not
            fit the network or the number of devices; says which numbers do.
        """
        places: dict[str, list[int]] = {}
        for place, (_, exchange) in enumerate(pushed):
            if exchange.collective is not None:
                places.setdefault(exchange.collective.group, []).append(place)
        found = []
        for group, members in places.items():
            members.sort(key=lambda place: pushed[place][0])
            devices = [pushed[place][0] for place in members]
            said = {pushed[place][1].collective for place in members}
            if len(said) > 1:
                raise PayloadError(f"instructions of group {group!r} differ in their collective")
            if len(set(devices)) < len(devices):
                raise PayloadError(f"group {group!r} has two instructions for one device")
            asked = said.pop()
            assert asked is not None
            found.append((members, self._plan(asked, devices)))
        return found

    def _plan(self, asked: Collective, devices: Sequence[int], lost: Sequence[int] = ()) -> Plan:
        if len(devices) == 1 and lost:
            return self._alone(asked, devices, lost)
        try:
            schedule = self._schedule(asked.name, tuple(devices), asked.root)
        except ValueError as error:
            raise PayloadError(
                f"group {asked.group!r}: {len(devices)} devices cannot run {asked.name!r}: {error}"
            ) from error
        n_servers = schedule.ranks - len(schedule.workers)
        return Plan(
            group=asked.group,
            conduct=asked.conduct,
            schedule=schedule,
            hosts=(*devices, *servers_of(self._graph)[:n_servers]),
            cut=self._cut(asked),
            replan=self._replan(asked, devices, lost),
            lost=frozenset(lost),
        )

    def _alone(self, asked: Collective, devices: Sequence[int], lost: Sequence[int]) -> Plan:
        """Return the plan of the last device that is left: a step without messages."""
        return Plan(
            group=asked.group,
            conduct=replace(asked.conduct, step_latency=0.0),
            schedule=_ALONE,
            hosts=tuple(devices),
            cut=self._cut(asked),
            replan=self._replan(asked, devices, lost),
            lost=frozenset(lost),
        )

    def _cut(self, asked: Collective) -> Callable[[int], list[Bucket]]:
        """Return what cuts a vector into buckets."""
        if asked.fusion_bytes is None:
            return lambda size: [Bucket(size)]
        if asked.profile is not None:
            return partial(_fused, profile(asked.profile), asked.fusion_bytes)
        if self._profile is None:
            raise PayloadError(
                "exchange.fusion_bytes needs the layers of the model: give the grid a profile, or "
                "name one in exchange.profile"
            )
        return partial(_fused, self._profile(), asked.fusion_bytes)

    def _replan(
        self, asked: Collective, devices: Sequence[int], lost: Sequence[int]
    ) -> Callable[[Sequence[int]], Plan]:
        """Return what plans for the devices that are left."""

        def replan(left: Sequence[int]) -> Plan:
            name = _INSTEAD if asked.name in _NEED_ALL else asked.name
            has_root = asked.root is not None and asked.root - NODE_BASE in left
            root = asked.root if has_root else None
            gone = [*lost, *(device for device in devices if device not in left)]
            return self._plan(replace(asked, name=name, root=root), left, gone)

        return replan

    def _make_schedule(self, name: str, devices: tuple[int, ...], root: int | None) -> Schedule:
        schedule = COLLECTIVES[name](among(self._graph, devices))
        if root is None:
            return schedule
        if root - NODE_BASE not in devices:
            raise ValueError(f"the root, node {root}, is none of them")
        ahead = devices.index(root - NODE_BASE)
        return replace(
            schedule,
            steps=tuple(map(partial(_turned, ahead=ahead, n=len(devices)), schedule.steps)),
        )


def _turned(step: Step, *, ahead: int, n: int) -> Step:
    """Return a step with all ranks that many further on."""
    return replace(
        step, source=(step.source + ahead) % n, destination=(step.destination + ahead) % n
    )


def steps_of(report: Report) -> list[StepRow]:
    """Return the steps of a collective as they are recorded."""
    return [
        StepRow(
            round=report.round,
            group=report.group,
            collective=report.collective,
            bucket=span.bucket,
            step=span.step,
            started=span.started,
            finished=span.finished,
        )
        for span in report.spans
    ]


def times_of(reports: Sequence[Report]) -> dict[str, float]:
    """Return the parts of iterations, in virtual seconds, as a line of ``rounds.jsonl`` has them.

    Groups that were pushed together count once, by the one that took longest; the figures of
    pushes one after the other are added up.
    """
    slowest: dict[float, Report] = {}
    for report in reports:
        other = slowest.get(report.pushed)
        if other is None or report.seconds > other.seconds:
            slowest[report.pushed] = report
    if not slowest:
        return {}
    parts = ("compute", "sync", "exposed")
    return {
        f"{part}_seconds": sum(getattr(report, part) for report in slowest.values())
        for part in parts
    }


def _fused(layers: Profile, fusion_bytes: int, size_bytes: int) -> list[Bucket]:
    """Return the buckets of a vector that is as large as it is, its layers in proportion."""
    scale = size_bytes / layers.n_bytes
    if not scale:
        return [Bucket(0)]
    buckets, done, end = [], 0, 0
    for size, known in buckets_of(layers, fusion_bytes / scale):
        done += size
        start, end = end, done * size_bytes // layers.n_bytes
        if end > start:
            buckets.append(Bucket(end - start, FORWARD + (1 - FORWARD) * known))
    return buckets
