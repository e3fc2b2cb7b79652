"""Workers on Ray: processes of this machine or of a cluster that do pieces of a batch.

Decision: a worker keeps nothing that a piece of work changes, and what it needs (data, model) is
placed once in the object store. What a worker was at that died, alone or with its whole machine,
another can therefore do at once: a round is not lost, and its result is the same. One that takes
its place joins when Ray has found room for it. Ray's own restarts would wait for that room, which
may never come.
"""

import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import ExecutorError, ScenarioError
from fedsim.learning.shares import shares_of

__all__ = ["Crew", "Tool", "Wanted"]

IntArray = NDArray[np.int64]

_log = logging.getLogger(__name__)

_START_SECONDS = 180.0
_ATTEMPTS = 4  # at one piece of work


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which workers an executor wants.

    Parameters
    ----------
    address : str, optional
        Of a Ray cluster; ``local`` starts one for this run. None: the one that ``RAY_ADDRESS`` or
        ``ray start`` on this machine offers, else ``local``.
    workers : int, optional
        How many; None: as many as fit.
    cpus, gpus : float
        Of each.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class Tool:
    """What workers work with: ``make(*parts)``, made once on each.

    Parameters
    ----------
    make : callable
    parts : tuple
        Each is placed in the object store once, whatever the number of tools and workers.
    """

    make: Callable[..., Any]
    parts: tuple[Any, ...] = ()
    key: str = field(default_factory=lambda: uuid4().hex)


class Crew:
    """The workers of a run. Nothing is started before the first piece of work.

    As a context manager it ends its workers, and Ray if it was started here, when the outermost
    ``with`` is left.

    Raises
    ------
    ScenarioError
        From `check`, `reserve` and `shares`: Ray is not installed, cannot be reached, or no worker
        fits.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._has_started_ray = False
        self._wanted: Wanted | None = None
        self._workers: list[Any] = []
        self._coming: dict[Any, Any] = {}  # first answer of a worker being started → worker
        self._parts: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> Self:
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._dismiss()
            self._parts.clear()
            if self._has_started_ray:
                with _quiet():
                    _ray().shutdown()
                self._has_started_ray = False

    @staticmethod
    def check(kind: str) -> None:
        """Refuse the executor `kind` where Ray is not installed."""
        try:
            is_there = find_spec("ray") is not None
        except (ImportError, ValueError):  # kept from being imported
            is_there = False
        if not is_there:
            raise ScenarioError(
                f"executor.kind: '{kind}' needs Ray, which is not installed: "
                "pip install 'fedsim[ray]'"
            )

    def reserve(self, wanted: Wanted) -> int:
        """Connect to Ray, and return how many of the workers wanted there will be.

        `shares` does so too; this is for who wants to know before anything is computed.
        """
        self._connect(wanted.address)
        have = _ray().cluster_resources()
        fits = [have.get("CPU", 0.0) / wanted.cpus] if wanted.cpus else []
        fits += [have.get("GPU", 0.0) / wanted.gpus] if wanted.gpus else []
        most = int(min(fits)) if fits else 1
        number = wanted.workers or most
        if number < 1 or (fits and number > most):
            raise ScenarioError(
                f"executor.workers: {wanted.workers or 'not one'} of {wanted.cpus:g} CPUs and "
                f"{wanted.gpus:g} GPUs fits into Ray's {have.get('CPU', 0):g} CPUs and "
                f"{have.get('GPU', 0):g} GPUs; at most {most} of them do"
            )
        return number

    def shares(self, work: IntArray, wanted: Wanted) -> list[IntArray]:
        """Return rows of nearly equal work, one share for each worker.

        Workers are started where they are not there yet.
        """
        if wanted != self._wanted:
            self._dismiss()
            self._hire(wanted, self.reserve(wanted))
        elif self._coming:
            self._welcome(len(self._coming), 0.0)
        return shares_of(work, len(self._workers))

    def map(
        self, function: Callable[..., Any], tool: Tool, pieces: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Return ``function(tool, *piece)`` of each piece, one a worker, in order.

        What a worker was at that died is done by those that are left.

        Raises
        ------
        ExecutorError
            If workers have died with the same piece again and again.
        Exception
            What `function` raises.
        """
        ray = _ray()
        needed = [self._put(part) for part in (tool.make, *tool.parts)]
        done: dict[int, Any] = {}
        for attempt in range(_ATTEMPTS):
            left = [i for i in range(len(pieces)) if i not in done]
            begun = [
                (i, worker, worker.run.remote(function, tool.key, needed, pieces[i]))
                for i, worker in zip(left, cycle(self._workers), strict=False)
            ]
            for i, worker, ref in begun:
                try:
                    done[i] = ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                    if attempt == _ATTEMPTS - 1:
                        raise ExecutorError(
                            f"{_ATTEMPTS} workers have died with the same piece of work (out of "
                            f"memory?): {_first_line(error)}"
                        ) from error
                    self._replace(worker)
            if len(done) == len(pieces):
                break
            if not self._workers:
                self._welcome(1, _START_SECONDS)
        return [done[i] for i in range(len(pieces))]

    def _put(self, thing: Any) -> Any:
        """Return a reference to `thing` in the object store, where it is placed once."""
        if id(thing) not in self._parts:
            self._parts[id(thing)] = _ray().put(_pack(thing)), thing
        return self._parts[id(thing)][0]

    def _connect(self, address: str | None) -> None:
        ray = _ray()
        if ray.is_initialized():
            return
        place = address or os.environ.get("RAY_ADDRESS") or "this machine"
        host, colon, port = place.rpartition(":")
        if colon and port.isdigit():  # Ray itself would try for a quarter of an hour
            try:
                socket.create_connection((host.rpartition("/")[2], int(port)), timeout=10).close()
            except OSError as error:
                raise ScenarioError(f"executor.address: no Ray at {place}: {error}") from error
        paths = os.pathsep.join(dict.fromkeys([os.getcwd(), *filter(os.path.isdir, sys.path)]))
        try:
            with _quiet():
                ray.init(
                    address=address,
                    include_dashboard=False if address == "local" else None,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
                )
        except Exception as error:  # Ray raises many kinds
            said = _first_line(error)
            raise ScenarioError(f"executor.address: no Ray at {place}: {said}") from error
        self._has_started_ray = True

    def _hire(self, wanted: Wanted, number: int) -> None:
        self._wanted = wanted
        for _ in range(number):
            self._begin(wanted)
        self._welcome(number, _START_SECONDS)

    def _begin(self, wanted: Wanted) -> None:
        """Let Ray start a worker as soon as there is room for it."""
        kind = _ray().remote(_Worker).options(num_cpus=wanted.cpus, num_gpus=wanted.gpus)
        worker = kind.remote()
        self._coming[worker.ping.remote()] = worker

    def _welcome(self, number: int, seconds: float) -> None:
        """Take in workers that have been started; wait for `number` of them if it takes time."""
        ray = _ray()
        ready, _ = ray.wait(list(self._coming), num_returns=number, timeout=seconds)
        if seconds and len(ready) < number:
            self._dismiss()
            raise ExecutorError(
                f"only {len(ready)} of {number} Ray workers could be started within "
                f"{seconds:g} s: is the cluster busy? Ask for fewer (executor.workers)"
            )
        for ping in ready:
            worker = self._coming.pop(ping)
            try:
                ray.get(ping)
            except ray.exceptions.RayActorError:
                if seconds:  # else it has died like the one whose place it was to take
                    raise
            else:
                self._workers.append(worker)

    def _replace(self, worker: Any) -> None:
        """Do without a worker that has died until another has been started."""
        assert self._wanted is not None
        if worker in self._workers:
            self._workers.remove(worker)
            _ray().kill(worker)
            self._begin(self._wanted)
            _log.warning("a Ray worker has died; %d are left", len(self._workers))

    def _dismiss(self) -> None:
        for worker in (*self._workers, *self._coming.values()):
            _ray().kill(worker)
        self._workers, self._wanted = [], None
        self._coming.clear()


class _Worker:
    """Does pieces of work; keeps the tool that it had last."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._key: str | None = None
        self._tool: Any = None

    def ping(self) -> int:
        """Return the id of the process."""
        return os.getpid()

    def run(
        self, function: Callable[..., Any], key: str, needed: list[Any], piece: tuple[Any, ...]
    ) -> Any:
        """Return ``function(tool, *piece)``."""
        ray = _ray()
        if key != self._key:
            make, *parts = (_unpack(*packed) for packed in ray.get(needed))
            self._tool, self._key = make(*parts), key
        return function(self._tool, *piece)


def _ray() -> Any:
    """Return the package, imported when it is first needed: that takes a second."""
    return import_module("ray")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop the warnings of Ray's own start and end (open files, tips)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _pack(thing: Any) -> tuple[bytes, list[np.ndarray]]:
    """Pickle a thing with the memory of its tensors beside it, for workers to share."""
    base: Any = import_module("ray.cloudpickle").CloudPickler

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is torch.Tensor and obj.device.type == "cpu" and _is_plain(obj):
                return torch.from_numpy, (obj.contiguous().numpy(),)
            return super().reducer_override(obj)

    buffers: list[pickle.PickleBuffer] = []
    stream = BytesIO()
    Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(thing)
    return stream.getvalue(), [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]


def _is_plain(tensor: torch.Tensor) -> bool:
    return not tensor.requires_grad and tensor.dtype != torch.bfloat16


def _unpack(data: bytes, buffers: list[np.ndarray]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return pickle.loads(data, buffers=buffers)
