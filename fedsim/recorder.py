"""Write down what happens while it happens: rounds, transfers, summaries, the world.

The files are those of `fedsim.results`, which reads them back; this module holds their one schema.

Decision: JSON files never hold NaN or infinity, which are no JSON; a number that has no meaning is
``null``. Decision: a key of `summary.json` other than the contract's appears in one case only, a
strategy that diverged, which says at which round and device, and why.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from fedsim.errors import ScenarioError

__all__ = [
    "ComputeRow",
    "LinkRow",
    "NetworkWorld",
    "Recorder",
    "RoundRow",
    "StepRow",
    "TransferRow",
    "World",
    "dump_json",
    "strategy_directory",
    "summarise",
    "world_record",
    "write_summary",
    "write_world",
]

_OWN = "strategy."
_LISTED_DEVICES = 5_000
_ROWS_PER_GROUP = 65_536
_TAKEN = {"", ".", "..", "plots", "report.html", "scenario.yaml", "summary.json", "world.json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRow:
    """One line of `rounds.jsonl`: the state after a round and what happened since the last line.

    Numbers may come as numpy scalars; one that is not finite is kept as None.

    Attributes
    ----------
    round : int
        The round, or the server's version where a strategy is asynchronous.
    virtual_time, wall_time : float
        Seconds since the strategy started, on the simulated clock and on the wall's.
    train_loss : float or None
        Mean over the replies, weighted by their samples.
    eval_loss, eval_accuracy, accuracy_std : float or None
        None in rounds without evaluation; the spread is that over devices.
    consensus_distance : float or None
        Root mean square distance of the devices' models to their mean.
    bytes_down, bytes_up, bytes_peer : int
        Payload released since the last line: from the server, to it, between devices.
    messages_sent, messages_lost, devices_selected, devices_replied : int
        Since the last line.
    mean_staleness : float or None
        In server versions.
    extra : mapping
        A strategy's own numbers, written as ``strategy.<key>``.

    Raises
    ------
    ValueError
        If a time is not finite.
    """

    round: int
    virtual_time: float
    wall_time: float
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    accuracy_std: float | None = None
    consensus_distance: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_peer: int = 0
    messages_sent: int = 0
    messages_lost: int = 0
    devices_selected: int = 0
    devices_replied: int = 0
    mean_staleness: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    MEASURES: ClassVar[tuple[str, ...]] = (
        "train_loss",
        "eval_loss",
        "eval_accuracy",
        "accuracy_std",
        "consensus_distance",
        "mean_staleness",
    )
    COUNTS: ClassVar[tuple[str, ...]] = (
        "round",
        "bytes_down",
        "bytes_up",
        "bytes_peer",
        "messages_sent",
        "messages_lost",
        "devices_selected",
        "devices_replied",
    )

    def __post_init__(self) -> None:
        for name in self.COUNTS:
            if type(getattr(self, name)) is not int:
                object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("virtual_time", "wall_time"):
            seconds = float(getattr(self, name))
            if not math.isfinite(seconds):
                raise ValueError(f"round {self.round}: {name} is {seconds}, it must be finite")
            object.__setattr__(self, name, seconds)
        for name in self.MEASURES:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _finite(getattr(self, name)))
        object.__setattr__(self, "extra", {k: _plain(v) for k, v in self.extra.items()})

    @property
    def bytes_total(self) -> int:
        """Payload bytes of this line in all directions."""
        return self.bytes_down + self.bytes_up + self.bytes_peer

    def to_record(self) -> dict[str, Any]:
        """Return the line as written: the contract's keys in order, then the strategy's own."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        return record | {_OWN + key: value for key, value in self.extra.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return the row that a line holds; keys of neither kind are left out.

        Raises
        ------
        KeyError, TypeError, ValueError
            If the line misses its round or times, or a value is of the wrong type.
        """
        known = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        own = {k.removeprefix(_OWN): v for k, v in record.items() if k.startswith(_OWN)}
        return cls(**known | {"extra": own})


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRow:
    """One payload on its way, a row of `transfers.parquet` (times in virtual seconds).

    Attributes
    ----------
    round : int
        The round it belongs to.
    message : int
        Number of the message, in the order of release.
    kind : str
        ``down`` and ``up`` (server), ``evaluate-down``, ``evaluate-up``, ``peer``, ``collective``.
    source, destination : int
        Graph nodes.
    released, started, first_byte, finished : float or None
        Handed to the network; first byte on the wire; first byte and last byte at the destination.
    size_bytes : int
        Payload, without headers.
    outcome : str
        ``delivered``, ``lost``, ``failed`` or ``cancelled``.
    route : sequence of str
        Names of the links crossed.
    """

    round: int
    message: int
    kind: str
    source: int
    destination: int
    released: float
    started: float | None
    first_byte: float | None
    finished: float | None
    size_bytes: int
    outcome: str
    route: Sequence[str] = ()

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("round", pa.int32()),
            ("message", pa.int64()),
            ("kind", pa.string()),
            ("source", pa.int64()),
            ("destination", pa.int64()),
            ("released", pa.float64()),
            ("started", pa.float64()),
            ("first_byte", pa.float64()),
            ("finished", pa.float64()),
            ("size_bytes", pa.int64()),
            ("outcome", pa.string()),
            ("route", pa.list_(pa.string())),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeRow:
    """One piece of work of one device, a row of `compute.parquet` (times in virtual seconds).

    `kind` is ``train``, ``evaluate`` or the name that the strategy's instruction gives.
    """

    round: int
    device: int
    kind: str
    started: float
    finished: float

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("round", pa.int32()),
            ("device", pa.int64()),
            ("kind", pa.string()),
            ("started", pa.float64()),
            ("finished", pa.float64()),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """One step of a collective, a row of `steps.parquet` (times in virtual seconds).

    Attributes
    ----------
    round : int
    group, collective : str
        Which instructions it was for, and its schedule.
    bucket, step : int
        Step of the schedule for one bucket of the vector, each from 0.
    started, finished : float
        From when its first rank began it to its last message's arrival.
    """

    round: int
    group: str
    collective: str
    bucket: int
    step: int
    started: float
    finished: float

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("round", pa.int32()),
            ("group", pa.string()),
            ("collective", pa.string()),
            ("bucket", pa.int32()),
            ("step", pa.int32()),
            ("started", pa.float64()),
            ("finished", pa.float64()),
        ]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRow:
    """One link over a whole run, a row of `links.parquet`; links never used may be left out.

    Attributes
    ----------
    link : str
        Its name.
    bandwidth_bps : float
        Nominal rate, bit/s; inf for a link that never limits.
    latency : float
        Seconds.
    carried_bytes : float
        Everything that crossed it, retransmissions and headers included.
    busy_time : float
        Virtual seconds with at least one flow on it.
    change_times, change_rates_bps : sequence of float
        Its history as steps: from each time on it runs at this rate, 0 being down. The first time
        is 0. Both empty for a link that never changes.
    """

    link: str
    bandwidth_bps: float
    latency: float
    carried_bytes: float
    busy_time: float
    change_times: Sequence[float] = ()
    change_rates_bps: Sequence[float] = ()

    SCHEMA: ClassVar[pa.Schema] = pa.schema(
        [
            ("link", pa.string()),
            ("bandwidth_bps", pa.float64()),
            ("latency", pa.float64()),
            ("carried_bytes", pa.float64()),
            ("busy_time", pa.float64()),
            ("change_times", pa.list_(pa.float64())),
            ("change_rates_bps", pa.list_(pa.float64())),
        ]
    )


_STEMS: dict[type[Any], str] = {
    TransferRow: "transfers",
    ComputeRow: "compute",
    StepRow: "steps",
    LinkRow: "links",
}
"""Rows kept where transfers are asked for, and their files."""


class _Parquet:
    """Rows of one kind: on disk as row groups, or in memory where there is no path."""

    def __init__(self, path: Path | None, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[Any] = []
        self._groups: list[pa.RecordBatch] = []
        self._writer = pq.ParquetWriter(path, schema, compression="zstd") if path else None

    def append(self, row: Any) -> None:
        self._rows.append(row)
        if len(self._rows) >= _ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        columns = [
            pa.array([getattr(row, column.name) for row in self._rows], column.type)
            for column in self._schema
        ]
        batch = pa.record_batch(columns, schema=self._schema)
        self._rows = []
        if self._writer is None:
            self._groups.append(batch)
        else:
            self._writer.write_batch(batch)

    def table(self) -> pa.Table:
        self._flush()
        return pa.Table.from_batches(self._groups, self._schema)

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()


class Recorder:
    """The record of one strategy: each round one line, flushed at once; transfers where asked for.

    A context manager: leaving it closes the files, so that they are readable after Ctrl-C as well.

    Parameters
    ----------
    directory : Path or None
        The run's directory; files go to ``directory/name``, earlier ones of the same name are
        replaced. None keeps everything in memory only.
    name : str
        The strategy's name.
    transfers : bool
        Whether to keep transfers, compute spans, steps of collectives and links.

    Attributes
    ----------
    rows : list of RoundRow
        Everything recorded so far.

    Raises
    ------
    ScenarioError
        If `name` cannot be the name of a directory.
    """

    def __init__(self, directory: Path | None, name: str, *, transfers: bool = False) -> None:
        self.name = name
        self.directory = strategy_directory(directory, name) if directory is not None else None
        self.rows: list[RoundRow] = []
        self._lines: IO[str] | None = None
        self._tables: dict[type, _Parquet] = {}
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lines = (self.directory / "rounds.jsonl").open(
                "w", encoding="utf-8", newline="\n"
            )
        for kind, stem in _STEMS.items():
            path = None if self.directory is None else self.directory / f"{stem}.parquet"
            if transfers:
                self._tables[kind] = _Parquet(path, kind.SCHEMA)
            elif path is not None:
                path.unlink(missing_ok=True)

    @property
    def has_transfers(self) -> bool:
        """Whether transfers, compute spans and links are kept (else their rows are dropped)."""
        return bool(self._tables)

    def round(self, row: RoundRow) -> None:
        """Append one line to `rounds.jsonl`, on disk when this returns."""
        self.rows.append(row)
        if self._lines is not None:
            self._lines.write(dump_json(row.to_record()) + "\n")
            self._lines.flush()

    def transfer(self, row: TransferRow) -> None:
        """Keep one transfer."""
        self._append(row)

    def compute(self, row: ComputeRow) -> None:
        """Keep one span of local work."""
        self._append(row)

    def step(self, row: StepRow) -> None:
        """Keep one step of a collective."""
        self._append(row)

    def link(self, row: LinkRow) -> None:
        """Keep the history and the totals of one link, at the end of the run."""
        self._append(row)

    def tables(self) -> dict[str, pa.Table]:
        """Return what was kept in memory, by the names of the files, or nothing."""
        if self.directory is not None or not self._tables:
            return {}
        return {_STEMS[kind]: table.table() for kind, table in self._tables.items()}

    def _append(self, row: Any) -> None:
        if self._tables:
            self._tables[type(row)].append(row)

    def close(self) -> None:
        """Finish the files."""
        if self._lines is not None:
            self._lines.close()
        for table in self._tables.values():
            table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def strategy_directory(directory: Path, name: str) -> Path:
    """Return the directory of a strategy's records.

    Raises
    ------
    ScenarioError
        If `name` is empty, longer than 200 bytes, holds a slash, backslash or control character,
        or is the name of something else in a run's directory.
    """
    unfit = name.lower() in _TAKEN or len(name.encode("utf-8", "replace")) > 200
    if unfit or any(c in "/\\" or not c.isprintable() for c in name):
        raise ScenarioError(
            f"strategies: {name!r} cannot be the name of a directory; use letters, digits, spaces, "
            f"'-', '_', at most 200 bytes, and none of {', '.join(sorted(_TAKEN)[1:])}"
        )
    return directory / name


def summarise(
    rows: Sequence[RoundRow],
    *,
    target: float | None = None,
    diverged: bool = False,
    diverged_device: int | None = None,
    diverged_reason: str | None = None,
) -> dict[str, Any]:
    """Return a strategy's entry of `summary.json`.

    Parameters
    ----------
    rows : sequence of RoundRow
    target : float or None
        Accuracy from which on it counts as reached; None: there is none.
    diverged : bool
        Whether losses or parameters became non-finite; then the entry also has ``diverged_at``,
        the round (None before the first), `diverged_device` (None where it is the server) and
        `diverged_reason`, in words.

    Returns
    -------
    dict
        `final_*` are those of the last line that has an evaluation.
    """
    evaluated = [r for r in rows if r.eval_accuracy is not None or r.eval_loss is not None]
    accuracies = [r.eval_accuracy for r in rows if r.eval_accuracy is not None]
    traffic = np.cumsum([r.bytes_total for r in rows], dtype=np.int64).tolist()
    reached = next(
        (
            (row, total)
            for row, total in zip(rows, traffic, strict=True)
            if target is not None and row.eval_accuracy is not None and row.eval_accuracy >= target
        ),
        None,
    )
    entry: dict[str, Any] = {
        "rounds": len(rows),
        "virtual_time": rows[-1].virtual_time if rows else 0.0,
        "wall_time": rows[-1].wall_time if rows else 0.0,
        "bytes_total": traffic[-1] if rows else 0,
        "final_accuracy": evaluated[-1].eval_accuracy if evaluated else None,
        "best_accuracy": max(accuracies, default=None),
        "final_loss": evaluated[-1].eval_loss if evaluated else None,
        "rounds_to_target": reached[0].round if reached else None,
        "time_to_target": reached[0].virtual_time if reached else None,
        "bytes_to_target": reached[1] if reached else None,
        "diverged": diverged,
    }
    if diverged:
        last = rows[-1].round if rows else None
        entry["diverged_at"] = {
            "round": last,
            "device": diverged_device,
            "reason": diverged_reason,
        }
    return entry


def write_summary(
    path: Path,
    *,
    name: str,
    seed: int,
    versions: Mapping[str, str],
    strategies: Mapping[str, Mapping[str, Any]],
) -> None:
    """Replace `summary.json` atomically: a reader sees the old file or the new one, whole.

    Parameters
    ----------
    path : Path
        The file.
    name, seed, versions
        Of the scenario; `versions` maps package to version.
    strategies : mapping
        Entries of `summarise`, of the finished strategies only, in the scenario's order.
    """
    text = dump_json(
        {"name": name, "seed": seed, "versions": versions, "strategies": strategies}, indent=2
    )
    _replace(path, text + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkWorld:
    """The network that some strategies of a run saw; unlimited rates are inf.

    Attributes
    ----------
    strategies : sequence of str
        Who ran on it.
    topology : str
        For example ``star`` or ``bcube(n=3, k=2)``.
    switches, servers, links : int
        Counts; a full-duplex cable is two links.
    uplink_bps, downlink_bps, latency : array, shape (n_devices,), or None
        Access links and one-way latency of each device; None where devices have no single one.
    link_bps, link_latency : array, shape (links,), or None
        For other graphs: rate and latency of every link.
    server_uplink_bps, server_downlink_bps : float or None
        What all uploads and all downloads share at the server.
    variation : str
        How links vary, in words of the scenario: ``on_off (mean_up 60 s, mean_down 20 s)``.
    message_loss : float
        Probability.
    measures : mapping
        Anything else worth a line: diameter, spectral gap.
    """

    strategies: Sequence[str]
    topology: str
    switches: int = 0
    servers: int = 0
    links: int = 0
    uplink_bps: ArrayLike | None = None
    downlink_bps: ArrayLike | None = None
    latency: ArrayLike | None = None
    link_bps: ArrayLike | None = None
    link_latency: ArrayLike | None = None
    server_uplink_bps: float | None = None
    server_downlink_bps: float | None = None
    variation: str = "constant"
    message_loss: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a report needs beside the other files: who holds which data, how fast devices are.

    Attributes
    ----------
    name, seed : str, int
        Of the scenario.
    strategies : sequence of str
        In the scenario's order, those not run yet included.
    rounds : int
        As asked for.
    target : float or None
        Accuracy that `*_to_target` refer to.
    dataset, partition : str
        In words: ``digits``, ``dirichlet (alpha 0.3)``.
    classes, test_samples : int
        Counts.
    model : str
        In words: ``mlp (hidden 64)``.
    parameters, model_bytes : int
        Its size, and that of its payload.
    samples : array, shape (n_devices,), int
        Training samples of each device.
    label_counts : array, shape (n_devices, classes), int, or None
        None where labels are no classes.
    speed : array, shape (n_devices,), samples/s
        Of local training.
    availability : str
        In words.
    networks : sequence of NetworkWorld
        One for each different network of the comparison.
    """

    name: str
    seed: int
    strategies: Sequence[str]
    rounds: int
    target: float | None
    dataset: str
    partition: str
    classes: int
    test_samples: int
    model: str
    parameters: int
    model_bytes: int
    samples: ArrayLike
    label_counts: ArrayLike | None
    speed: ArrayLike
    availability: str = "always"
    networks: Sequence[NetworkWorld] = ()


def write_world(path: Path, world: World) -> None:
    """Write `world.json`, atomically."""
    _replace(path, dump_json(world_record(world)) + "\n")


def world_record(world: World) -> dict[str, Any]:
    """Return what `world.json` holds, for runs that stay in memory.

    Of more than 5,000 devices it lists 5,000 at equal distances (``devices.listed`` says which);
    totals count all.
    """
    samples = np.asarray(world.samples)
    listed = _spread(len(samples))
    labels = None if world.label_counts is None else np.asarray(world.label_counts)
    record: dict[str, Any] = _plain(
        {
            "name": world.name,
            "seed": world.seed,
            "strategies": list(world.strategies),
            "rounds": world.rounds,
            "target": world.target,
            "data": {
                "dataset": world.dataset,
                "partition": world.partition,
                "classes": world.classes,
                "train_samples": int(samples.sum()),
                "test_samples": world.test_samples,
                "class_samples": None if labels is None else labels.sum(0),
            },
            "model": {
                "kind": world.model,
                "parameters": world.parameters,
                "size_bytes": world.model_bytes,
            },
            "devices": {
                "count": len(samples),
                "availability": world.availability,
                "listed": listed,
                "samples": samples[listed],
                "label_counts": None if labels is None else labels[listed],
                "speed_samples_per_s": np.asarray(world.speed)[listed],
            },
            "networks": [_network(n, len(samples), listed) for n in world.networks],
        }
    )
    return record


def _network(network: NetworkWorld, n_devices: int, listed: Any) -> dict[str, Any]:
    def of_devices(values: ArrayLike | None) -> Any:
        return None if values is None else np.broadcast_to(values, n_devices)[listed]

    def of_links(values: ArrayLike | None) -> Any:
        every = None if values is None else np.broadcast_to(values, network.links)
        return None if every is None else every[_spread(network.links)]

    return {
        "strategies": list(network.strategies),
        "topology": network.topology,
        "switches": network.switches,
        "servers": network.servers,
        "links": network.links,
        "uplink_bps": of_devices(network.uplink_bps),
        "downlink_bps": of_devices(network.downlink_bps),
        "latency_s": of_devices(network.latency),
        "link_bps": of_links(network.link_bps),
        "link_latency_s": of_links(network.link_latency),
        "server_uplink_bps": network.server_uplink_bps,
        "server_downlink_bps": network.server_downlink_bps,
        "variation": network.variation,
        "message_loss": network.message_loss,
        "measures": dict(network.measures),
    }


def _spread(count: int) -> Any:
    return np.unique(
        np.linspace(0, max(count - 1, 0), min(count, _LISTED_DEVICES)).astype(np.int64)
    )


def dump_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON text; numpy values become plain ones, non-finite numbers ``null``.

    Raises
    ------
    TypeError
        If `value` holds something that JSON has no form for.
    """
    return json.dumps(_plain(value), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if type(value) is float:
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return _finite(value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_plain(item) for item in value]
    raise TypeError(f"{value!r} of type {type(value).__name__} has no form in JSON")


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
