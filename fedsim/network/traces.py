"""Links that follow a recorded bandwidth: piecewise constant, from a file."""

import csv
import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Literal

from fedsim.errors import ScenarioError
from fedsim.network.links import DOWN, LinkEnds, LinkHistory, LinkState
from fedsim.streams import stream
from fedsim.units import Bandwidth, Duration

__all__ = ["BandwidthTrace", "Trace", "read_trace"]

_HEADER = ["time_s", "bandwidth_bps"]
_GAP_FACTOR = 100.0  # an interval so many times the median is a hole in the recording
_PACKET_BITS = 1500 * 8  # one line of a mahimahi file


@dataclass(frozen=True, slots=True)
class BandwidthTrace:
    """Bandwidth over time: `rates_bps[k]` from `times[k]` to `times[k + 1]`, the last time the end.

    Attributes
    ----------
    times : list of float, s
        Ascending from 0; one more than rates. Equal rates in a row are one interval.
    rates_bps : list of float
    """

    times: list[float]
    rates_bps: list[float]

    @property
    def duration(self) -> float:
        """Length of the recording, s."""
        return self.times[-1]

    @property
    def mean_bps(self) -> float:
        """Mean over time."""
        moved = sum(
            r * (b - a) for r, (a, b) in zip(self.rates_bps, pairwise(self.times), strict=True)
        )
        return moved / self.duration


def read_trace(
    path: Path, *, max_gap: float | None = None, mahimahi_bin: float = 1.0
) -> BandwidthTrace:
    """Read a bandwidth trace.

    Parameters
    ----------
    path : Path
        CSV with the header ``time_s,bandwidth_bps``: a value holds until the next line's time, the
        last line only marks the end. Or, if its first line is a bare integer, a mahimahi file: each
        line is a millisecond at which 1500 bytes may leave.
    max_gap : float, s, optional
        A longer time between two lines is a gap; by default 100 times the median.
    mahimahi_bin : float, s
        Interval over which a mahimahi file is averaged.

    Raises
    ------
    ScenarioError
        If the file is missing, empty, unsorted, or has gaps or values that are no bandwidth; names
        the file, the line and the reason.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ScenarioError(f"trace {path}: {reason}") from error
    if not any(line.strip() for line in lines):
        raise ScenarioError(f"trace {path}: the file is empty")
    if lines[0].strip().isdigit():
        return _read_mahimahi(path, lines, mahimahi_bin)
    if [cell.strip() for cell in lines[0].split(",")] != _HEADER:
        raise ScenarioError(f"trace {path}, line 1: should be 'time_s,bandwidth_bps'")
    times: list[float] = []
    rates: list[float] = []
    for number, row in enumerate(csv.reader(lines[1:]), start=2):
        where = f"trace {path}, line {number}"
        if len(row) != 2 or not all(cell.strip() for cell in row):
            raise ScenarioError(f"{where}: a value is missing (a gap)")
        try:
            time, rate = float(row[0]), float(row[1])
        except ValueError:
            raise ScenarioError(f"{where}: {','.join(row)!r} is not two numbers") from None
        if not (math.isfinite(time) and math.isfinite(rate)):
            raise ScenarioError(f"{where}: {','.join(row)!r} is not finite")
        if rate < 0:
            raise ScenarioError(f"{where}: negative bandwidth {rate:g} bit/s")
        if not times and time != 0:
            raise ScenarioError(f"{where}: a trace begins at time 0, not at {time:g} s")
        if times and time <= times[-1]:
            raise ScenarioError(f"{where}: time {time:g} s is not after {times[-1]:g} s (unsorted)")
        times.append(time)
        rates.append(rate)
    if len(times) < 2:
        raise ScenarioError(f"trace {path}: needs two lines of values, the last marks the end")
    gaps = [b - a for a, b in pairwise(times)]
    most = _GAP_FACTOR * median(gaps) if max_gap is None else max_gap
    for index, gap in enumerate(gaps):
        if gap > most:
            raise ScenarioError(
                f"trace {path}, line {index + 3}: a gap of {gap:g} s after {times[index]:g} s; "
                f"at most {most:g} s are taken for one value (max_gap)"
            )
    return _merged(times, rates[:-1])


def _read_mahimahi(path: Path, lines: list[str], bin_length: float) -> BandwidthTrace:
    stamps: list[int] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip().isdigit():
            raise ScenarioError(f"trace {path}, line {number}: {line!r} is not a millisecond")
        if stamps and int(line) < stamps[-1]:
            raise ScenarioError(f"trace {path}, line {number}: {line} is unsorted")
        stamps.append(int(line))
    n_bins = max(math.ceil(stamps[-1] / 1000 / bin_length), 1)
    counts = [0] * n_bins
    for stamp in stamps:
        counts[min(int(stamp / 1000 / bin_length), n_bins - 1)] += 1
    times = [index * bin_length for index in range(n_bins + 1)]
    return _merged(times, [count * _PACKET_BITS / bin_length for count in counts])


def _merged(times: list[float], rates: list[float]) -> BandwidthTrace:
    starts = [k for k, rate in enumerate(rates) if k == 0 or rate != rates[k - 1]]
    return BandwidthTrace([*(times[k] for k in starts), times[-1]], [rates[k] for k in starts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Links that follow a recording of a real one.

    Attributes
    ----------
    path : str
        A trace file (see `read_trace`), or a directory: each link then follows one of its ``*.csv``
        files, chosen by the seed.
    end : {"loop", "hold", "down"}
        After the recording: from its beginning again; its last value for good; no link any more.
    offset : float, s, or "random"
        Where in the recording a link begins; ``random`` (with loop): a place of its own.
    mean : float, bit/s, optional
        Scale the recording to this mean.
    max_gap : float, s, optional
        As in `read_trace`.
    """

    path: str
    end: Literal["loop", "hold", "down"] = "loop"
    offset: Duration | Literal["random"] = 0.0
    mean: Bandwidth | None = None
    max_gap: Duration | None = None

    def __post_init__(self) -> None:
        for file in self._files():
            trace = read_trace(file, max_gap=self.max_gap)
            if self.mean is not None and trace.mean_bps == 0:
                raise ScenarioError(f"trace {file}: all zero, cannot be scaled to a mean")
        if self.offset == "random" and self.end != "loop":
            raise ScenarioError("trace: a random offset needs end: loop")

    def _files(self) -> list[Path]:
        path = Path(self.path)
        if not path.is_dir():
            return [path]
        files = sorted(path.glob("*.csv"))
        if not files:
            raise ScenarioError(f"trace {path}: no *.csv in this directory")
        return files

    def bind(self, seed: int, link: LinkEnds) -> LinkHistory:
        """Return the history of one link."""
        rng = stream(seed, "link-trace", link.name)
        choice, phase = rng.random(2)
        files = self._files()
        file = files[int(choice * len(files))]
        if ("trace", file) not in link.shared:
            link.shared["trace", file] = self._states(file)
        trace, states = link.shared["trace", file]
        offset = phase * trace.duration if self.offset == "random" else float(self.offset)
        return TraceHistory(trace, states, self.end, offset)

    def _states(self, file: Path) -> tuple[BandwidthTrace, list[LinkState]]:
        trace = read_trace(file, max_gap=self.max_gap)
        factor = 1.0 if self.mean is None else self.mean / trace.mean_bps
        return trace, [LinkState(bandwidth_bps=factor * rate) for rate in trace.rates_bps]


class TraceHistory:
    """The history of a link that follows a trace from an offset on."""

    def __init__(
        self, trace: BandwidthTrace, states: list[LinkState], end: str, offset: float
    ) -> None:
        self._times = trace.times
        self._states = states
        self._duration = trace.duration
        self._end = end
        self._offset = offset
        self._last = (
            -inf,
            0.0,
            0,
        )  # the last answer of `_locate`: state and change are asked in turn

    def _locate(self, time: float) -> tuple[float, int]:
        """Return the start (virtual time) of the pass that a time is in, and the interval there."""
        asked, start, index = self._last
        if asked == time:
            return start, index
        start = -self._offset
        if self._end == "loop":
            n_passes = math.floor((time - start) / self._duration)
            start = n_passes * self._duration - self._offset
            # Rounding must not put a time before the pass, nor at the very end of it.
            if time < start:
                start = (n_passes - 1) * self._duration - self._offset
            elif time >= (n_passes + 1) * self._duration - self._offset:
                start = (n_passes + 1) * self._duration - self._offset
        index = self._index(start, time)
        self._last = (time, start, index)
        return start, index

    def _index(self, start: float, time: float) -> int:
        """Return the interval k with ``start + times[k] <= time``, as `next_change` adds them."""
        times = self._times
        index = max(bisect_right(times, time - start) - 1, 0)
        if index + 1 < len(times) and start + times[index + 1] <= time:
            index += 1
        elif index > 0 and start + times[index] > time:
            index -= 1
        return index

    def state_at(self, time: float) -> LinkState:
        """Return the state at a time."""
        _, index = self._locate(time)
        if index >= len(self._states):
            return DOWN if self._end == "down" else self._states[-1]
        return self._states[index]

    def next_change(self, time: float) -> float:
        """Return the end of the present interval."""
        start, index = self._locate(time)
        states, times = self._states, self._times
        if self._end == "loop":
            if index < len(states) - 1:
                return start + times[index + 1]
            if len(states) == 1:
                return inf
            end = self._next_pass(start)
            return end if states[0] != states[-1] else end + times[1]
        last = len(states) if self._end == "down" else len(states) - 1
        return start + times[index + 1] if index < last else inf

    def _next_pass(self, start: float) -> float:
        n_passes = round((start + self._offset) / self._duration)
        return (n_passes + 1) * self._duration - self._offset
