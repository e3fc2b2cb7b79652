"""Recordings in CSV files: piecewise constant in time, repeated, each device with its own offset.

Every error names the file, the line and the reason.
"""

import csv
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import ScenarioError
from fedsim.streams import stream

__all__ = ["StepTrace", "draw_phases", "read_numbers", "read_steps", "trace_files"]


class StepTrace:
    """A piecewise constant function of time that repeats for ever.

    Parameters
    ----------
    times : sequence of float, s
        Ascending from 0; value k holds from time k to the next, the last time is the period.
    values : sequence of float, one fewer than `times`
        0 or more, not all 0.

    Attributes
    ----------
    period : float, s
    total : float
        Integral over one period.
    """

    def __init__(self, times: Sequence[float], values: Sequence[float]) -> None:
        self._times = list(times)
        self._values = list(values)
        steps = np.diff(self._times) * np.asarray(self._values)
        self._sums: list[float] = [0.0, *np.cumsum(steps).tolist()]
        self.period = self._times[-1]
        self.total = self._sums[-1]

    @property
    def mean(self) -> float:
        """Mean over one period."""
        return self.total / self.period

    def scaled(self, factor: float) -> "StepTrace":
        """Return the trace with all its values multiplied."""
        return StepTrace(self._times, [factor * value for value in self._values])

    def integral(self, start: float, end: float) -> float:
        """Return the integral from `start` to `end` (s), exact to rounding."""
        return self._sum_until(end) - self._sum_until(start)

    def reach(self, start: float, amount: float) -> float:
        """Return when the integral from `start` (s) on first is `amount`."""
        if amount <= 0:
            return start
        n_periods, rest = divmod(self._sum_until(start) + amount, self.total)
        if rest == 0:  # at the end of a period, or earlier if its end adds nothing
            n_periods, rest = n_periods - 1, self.total
        k = max(bisect_left(self._sums, rest), 1) - 1
        within = self._times[k] + (rest - self._sums[k]) / self._values[k]
        return max(n_periods * self.period + within, start)

    def _sum_until(self, time: float) -> float:
        n_periods, rest = divmod(time, self.period)
        k = min(bisect_right(self._times, rest), len(self._values)) - 1
        part = self._sums[k] + (rest - self._times[k]) * self._values[k]
        return n_periods * self.total + part


def trace_files(path: str) -> list[Path]:
    """Return a trace file, or the ``*.csv`` of a directory, by name.

    Raises
    ------
    ScenarioError
        If a directory holds none.
    """
    place = Path(path)
    if not place.is_dir():
        return [place]
    files = sorted(place.glob("*.csv"))
    if not files:
        raise ScenarioError(f"trace {place}: no *.csv in this directory")
    return files


def read_numbers(path: Path, header: Sequence[str]) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Yield the lines of a CSV file of finite numbers, each with its place for messages.

    Parameters
    ----------
    path : Path
    header : sequence of str
        What the first line must be.

    Yields
    ------
    str
        ``trace FILE, line N``.
    tuple of float
        A number for each column.

    Raises
    ------
    ScenarioError
        If the file is missing or empty, has another header, or a line that is not numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ScenarioError(f"trace {path}: {reason}") from error
    if not any(line.strip() for line in lines):
        raise ScenarioError(f"trace {path}: the file is empty")
    if [cell.strip() for cell in lines[0].split(",")] != list(header):
        raise ScenarioError(f"trace {path}, line 1: should be '{','.join(header)}'")
    if len(lines) == 1:
        raise ScenarioError(f"trace {path}: no line after the header (empty)")
    for number, row in enumerate(csv.reader(lines[1:]), start=2):
        where, text = f"trace {path}, line {number}", ",".join(row)
        if len(row) != len(header) or not all(cell.strip() for cell in row):
            raise ScenarioError(f"{where}: {text!r} should be {len(header)} values (a gap)")
        try:
            values = tuple(map(float, row))
        except ValueError:
            raise ScenarioError(f"{where}: {text!r} is not {len(header)} numbers") from None
        if not all(map(math.isfinite, values)):
            raise ScenarioError(f"{where}: {text!r} is not finite")
        yield where, values


def read_steps(path: Path, column: str) -> tuple[list[float], list[float]]:
    """Read times and values of a trace.

    Parameters
    ----------
    path : Path
        CSV with the header ``time_s,COLUMN``: a value holds until the next line's time; the last
        line only marks the end.
    column : str
        Name of the values, which must be 0 or more.

    Returns
    -------
    times : list of float, s
        Ascending from 0.
    values : list of float
        One fewer.

    Raises
    ------
    ScenarioError
        As `read_numbers` does, and if times are unsorted or a value is negative.
    """
    times: list[float] = []
    values: list[float] = []
    for where, (time, value) in read_numbers(path, ("time_s", column)):
        if value < 0:
            raise ScenarioError(f"{where}: {column} is {value:g}; it must be 0 or more")
        if not times and time != 0:
            raise ScenarioError(f"{where}: a trace begins at time 0, not at {time:g} s")
        if times and time <= times[-1]:
            raise ScenarioError(f"{where}: time {time:g} s is not after {times[-1]:g} s (unsorted)")
        times.append(time)
        values.append(value)
    if len(times) < 2:
        raise ScenarioError(f"trace {path}: needs two lines of values, the last marks the end")
    changes = [k for k in range(len(times) - 1) if k == 0 or values[k] != values[k - 1]]
    return [*(times[k] for k in changes), times[-1]], [values[k] for k in changes]


def draw_phases(
    phase: float | Literal["random"],
    period: float | NDArray[np.float64],
    n_devices: int,
    seed: int,
    purpose: str,
) -> NDArray[np.float64]:
    """Return where in its period each device is at time 0 (s): all alike, or drawn uniformly."""
    if phase == "random":
        return np.asarray(stream(seed, purpose).random(n_devices) * period)
    return np.broadcast_to(phase % np.asarray(period), n_devices).copy()
