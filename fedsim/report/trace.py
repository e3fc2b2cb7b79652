"""A run as a Chrome trace file, for Perfetto (ui.perfetto.dev) and chrome://tracing.

Every strategy is a process; its rounds, and each device's work, incoming and outgoing transfers,
are its threads. One virtual microsecond is one of the trace's.

References
----------
.. [1] "Trace Event Format", Google, 2016: complete (X), counter (C) and metadata (M) events.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.recorder import dump_json
from fedsim.report.timeline import Spans, place_of, side_of, spans_of
from fedsim.results import RunResult, StrategyResult

__all__ = ["trace_events", "write_chrome_trace"]

_MICRO = 1e6


def write_chrome_trace(path: Path, events: Iterable[Mapping[str, Any]]) -> None:
    """Write events as a JSON object with `traceEvents`, one a line, as they come."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for index, event in enumerate(events):
            file.write((",\n" if index else "") + dump_json(event))
        file.write("\n]}\n")


def trace_events(run: RunResult) -> Iterator[dict[str, Any]]:
    """Return the events of a run: rounds always; work, transfers and links where recorded."""
    for process, (name, result) in enumerate(run.strategies.items(), start=1):
        yield _named("process_name", process, 0, name)
        yield _named("thread_name", process, 0, "rounds")
        yield from _rounds(process, result)
        spans = spans_of(result)
        if spans is not None:
            yield from _spans(process, spans)
        yield from _links(process, result)


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _rounds(process: int, result: StrategyResult) -> Iterator[dict[str, Any]]:
    start = 0.0
    for row in result.rounds:
        yield {
            "ph": "X", "name": f"round {row.round}", "cat": "round", "pid": process, "tid": 0,
            "ts": start * _MICRO, "dur": (row.virtual_time - start) * _MICRO,
            "args": {"accuracy": row.eval_accuracy, "loss": row.eval_loss,
                     "bytes": row.bytes_total, "lost": row.messages_lost},
        }  # fmt: skip
        start = row.virtual_time


def _spans(process: int, spans: Spans) -> Iterator[dict[str, Any]]:
    free: dict[tuple[int, str], list[float]] = {}  # per device and side: when its lanes are free
    threads: dict[tuple[int, str, int], int] = {}
    for index in np.lexsort((spans.end, spans.start)).tolist():
        start, end = float(spans.start[index]), float(spans.end[index])
        node, side = place_of(spans, index), side_of(spans, index)
        lanes = free.setdefault((node, side), [])
        lane = next((i for i, until in enumerate(lanes) if until <= start), len(lanes))
        lanes[lane:] = [end, *lanes[lane + 1 :]]
        key = (node, side, lane)
        if key not in threads:
            threads[key] = len(threads) + 1
            order = 6 * node + ["in", "work", "out"].index(side) + 1
            label = f"device {node} {side}" + (f" {lane + 1}" if lane else "")
            yield _named("thread_name", process, threads[key], label)
            yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": threads[key],
                   "args": {"sort_index": order}}  # fmt: skip
        event = {
            "ph": "X", "name": spans.kind[index], "pid": process, "tid": threads[key],
            "cat": "compute" if spans.is_compute[index] else "transfer",
            "ts": start * _MICRO, "dur": (end - start) * _MICRO,
            "args": {"round": spans.round[index]},
        }  # fmt: skip
        if not spans.is_compute[index]:
            event["args"] |= {
                "source": spans.source[index],
                "destination": spans.destination[index],
                "bytes": spans.size_bytes[index],
                "outcome": spans.outcome[index],
                "route": " > ".join(spans.route[index]),
            }
        yield event


def _links(process: int, result: StrategyResult) -> Iterator[dict[str, Any]]:
    table = result.table("links")
    for row in [] if table is None else table.to_pylist():
        if len(row["change_times"] or ()) > 1:
            for time, rate in zip(row["change_times"], row["change_rates_bps"], strict=True):
                yield {"ph": "C", "name": f"link {row['link']}", "pid": process, "tid": 0,
                       "ts": time * _MICRO, "args": {"Mbit/s": rate / 1e6}}  # fmt: skip
