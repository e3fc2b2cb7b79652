"""Workers on Ray: processes of this machine or of a cluster that do pieces of a batch.

Decision: a worker keeps nothing that a piece of work changes, and what it needs (data, model) is
placed once in the object store. Ray can therefore start a worker that died anew, on another
machine if need be, and repeat its piece: a round is not lost, and its result is the same.
"""

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
from typing import Any, Self
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.errors import ExecutorError, ScenarioError
from fedsim.learning.shares import shares_of

__all__ = ["Crew", "Tool", "Wanted"]

IntArray = NDArray[np.int64]

_START_SECONDS = 180.0
_RETRIES = 3  # of one piece of work


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
        return shares_of(work, len(self._workers))

    def map(
        self, function: Callable[..., Any], tool: Tool, pieces: Sequence[tuple[Any, ...]]
    ) -> list[Any]:
        """Return ``function(tool, *piece)`` of each piece, one a worker, in order.

        Raises
        ------
        ExecutorError
            If a worker has died with the same piece again and again.
        Exception
            What `function` raises.
        """
        ray = _ray()
        needed = [self._put(part) for part in (tool.make, *tool.parts)]
        refs = [
            worker.run.remote(function, tool.key, needed, piece)
            for worker, piece in zip(self._workers, pieces, strict=False)
        ]
        try:
            return list(ray.get(refs))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            raise ExecutorError(
                f"a worker has died {_RETRIES + 1} times with the same piece of work (out of "
                f"memory?): {str(error).strip().splitlines()[0]}"
            ) from error

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
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ScenarioError(f"executor.address: no Ray at {place}: {said[0]}") from error
        self._has_started_ray = True

    def _hire(self, wanted: Wanted, number: int) -> None:
        ray = _ray()
        worker = ray.remote(_Worker).options(
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            max_restarts=-1,
            max_task_retries=_RETRIES,
        )
        self._workers = [worker.remote() for _ in range(number)]
        self._wanted = wanted
        pings = [each.ping.remote() for each in self._workers]
        ready, late = ray.wait(pings, num_returns=number, timeout=_START_SECONDS)
        if late:
            self._dismiss()
            raise ExecutorError(
                f"only {len(ready)} of {number} Ray workers could be started within "
                f"{_START_SECONDS:g} s: is the cluster busy? Ask for fewer (executor.workers)"
            )
        ray.get(pings)  # raises what keeps a worker from starting

    def _dismiss(self) -> None:
        if self._workers:
            ray = _ray()
            for worker in self._workers:
                ray.kill(worker)
        self._workers, self._wanted = [], None


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
