"""Every strategy of a scenario run in the same world, here or in processes, and recorded."""

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from fedsim.errors import FedsimError, ScenarioError
from fedsim.executors.build import reserve_workers
from fedsim.executors.crew import Crew
from fedsim.flower.server import (
    save_arrays,
    save_confusion,
)
from fedsim.learning.threads import one_thread
from fedsim.network import Network
from fedsim.output import describe_world, prepare, versions
from fedsim.processes import start_manager, start_worker
from fedsim.recorder import (
    LinkRow,
    Recorder,
    RoundRow,
    summarise,
    write_summary,
)
from fedsim.report.html import write_report
from fedsim.results import FAILED, RunResult, StrategyResult, load_run, strategy_result
from fedsim.scenario import Scenario
from fedsim.simulation import Loader, MakeExecutor, Simulation, build, connect

__all__ = ["Progress", "RunError", "Runs", "record_links", "run"]

_log = logging.getLogger(__name__)

State = Literal["running", "done", "diverged", "failed"]


class RunError(FedsimError):
    """A strategy could not be run to its end; the others were."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one strategy is.

    Attributes
    ----------
    strategy : str
    round, rounds : int
        Done, and asked for.
    virtual_time : float
        Seconds.
    accuracy : float or None
        The last one known.
    bytes_total : int
        In all directions, so far.
    state : {"running", "done", "diverged", "failed"}
    message : str
        Why it diverged or failed.
    """

    strategy: str
    round: int
    rounds: int
    virtual_time: float
    accuracy: float | None
    bytes_total: int
    state: State
    message: str = ""


def run(
    scenario: Scenario,
    out: Path | str | None = None,
    *,
    jobs: int = 1,
    device: str = "auto",
    data_dir: Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    executor: MakeExecutor | None = None,
) -> RunResult:
    """Run every strategy of a scenario in the same world, and write the records.

    Parameters
    ----------
    scenario : Scenario
        From `fedsim.load_scenario`.
    out : Path, optional
        The directory to write (see the file contract in docs); None keeps everything in memory.
    jobs : int
        Strategies to run side by side, in processes; the files are the same. More than 1 needs
        ``if __name__ == "__main__":`` around the call in a script, which each process imports.
    device : str
        ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    data_dir : Path, optional
        Where data files are looked for.
    resume : bool
        Keep the strategies that `out` has complete, under the same scenario; run the others.
    force : bool
        Replace an earlier run in `out`.
    progress : callable
        Called after each round of each strategy, in this process.
    executor : callable, optional
        Makes who computes, instead of what the scenario says; goes with one job.

    Returns
    -------
    RunResult

    Raises
    ------
    ScenarioError
        If the scenario or `out` cannot be used; nothing is written then.
    RunError
        If a strategy failed; all the others are complete and on disk.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False) and jobs > 1:
        raise SystemExit(1)  # a process of ours imports an unguarded script; the parent tells
    if jobs < 1:
        raise ScenarioError(f"jobs: {jobs} is not at least 1")
    if jobs > 1 and executor is not None:
        raise ScenarioError(f"jobs: {jobs} strategies at once cannot share one executor")
    out = None if out is None else Path(out)
    names = list(scenario.strategies)
    with one_thread(), ExitStack() as stack:
        load, crew = Loader(scenario, data_dir), stack.enter_context(Crew())
        simulations = {
            name: connect(scenario, name, device, load, crew, executor) for name in names
        }
        manager = stack.enter_context(start_manager()) if jobs > 1 and len(names) > 1 else None
        if executor is None:
            with crew if manager is None else Crew() as own:  # processes connect by themselves
                for simulation in simulations.values():
                    reserve_workers(simulation.scenario, own)
        finished: dict[str, StrategyResult] = {}
        if out is not None:
            finished = prepare(scenario, out, resume=resume, force=force)
            describe_world(out / "world.json", scenario, simulations)
        runs = Runs(scenario, out, finished)
        for name, kept in finished.items():
            progress(_kept(name, kept, scenario.rounds))
        todo = [name for name in names if name not in finished]
        if manager is None or len(todo) < 2:
            for name in todo:
                runs.note(name, *_run_one(simulations.pop(name), out, progress))
        else:
            simulations.clear()
            settings = (scenario, out, device, data_dir)
            queue = manager.Queue()
            _run_in_processes(runs, todo, min(jobs, len(todo)), settings, queue, progress)
    result = runs.result()
    if out is not None:
        write_report(out)
    if runs.failures:
        failed = "; ".join(f"{name}: {why.rstrip('. ')}" for name, why in runs.failures.items())
        others = " Every other strategy is complete." if len(runs.failures) < len(names) else ""
        raise RunError(f"{failed}.{others}")
    return result


class Runs:
    """What has been run so far; `summary.json` is replaced after each strategy."""

    def __init__(
        self, scenario: Scenario, out: Path | None, finished: Mapping[str, StrategyResult]
    ) -> None:
        self._scenario = scenario
        self._out = out
        self._results = dict(finished)
        self.failures: dict[str, str] = {}
        self._save()

    def note(self, name: str, result: StrategyResult | None, failure: str) -> None:
        """Take up the end of one strategy."""
        if result is not None:
            self._results[name] = result
        if failure:
            self.failures[name] = failure
        self._save()

    def _ordered(self) -> dict[str, StrategyResult]:
        return {n: self._results[n] for n in self._scenario.strategies if n in self._results}

    def _save(self) -> None:
        if self._out is not None:
            write_summary(
                self._out / "summary.json",
                name=self._scenario.name,
                seed=self._scenario.seed,
                versions=versions(),
                strategies={name: r.summary for name, r in self._ordered().items()},
            )

    def result(self) -> RunResult:
        """Return all that is complete."""
        if self._out is not None:
            return load_run(self._out)
        return RunResult(
            name=self._scenario.name,
            seed=self._scenario.seed,
            strategies=self._ordered(),
            versions=versions(),
            scenario=self._scenario.to_yaml(versions()),
        )


def _kept(name: str, result: StrategyResult, rounds: int) -> Progress:
    """Return what to tell of a strategy that a resumed run keeps."""
    summary = result.summary
    return Progress(
        strategy=name,
        round=result.rounds[-1].round if result.rounds else 0,
        rounds=rounds,
        virtual_time=summary["virtual_time"],
        accuracy=summary["final_accuracy"],
        bytes_total=summary["bytes_total"],
        state="diverged" if summary["diverged"] else "done",
    )


def _run_one(
    simulation: Simulation, out: Path | None, progress: Callable[[Progress], None]
) -> tuple[StrategyResult | None, str]:
    """Run one strategy; return its result, or why it failed."""
    scenario, name = simulation.scenario, simulation.name
    accuracy: float | None = None
    traffic = 0

    def tell(row: RoundRow | None, state: State, message: str = "") -> None:
        rounds, now = scenario.rounds, simulation.env.now
        number = row.round if row is not None else 0
        progress(Progress(name, number, rounds, now, accuracy, traffic, state, message))

    with Recorder(out, name, transfers=scenario.record.transfers) as recorder:

        def record(row: RoundRow) -> None:
            nonlocal accuracy, traffic
            recorder.round(row)
            traffic += row.bytes_total
            accuracy = accuracy if row.eval_accuracy is None else row.eval_accuracy
            tell(row, "running")

        failed = None if recorder.directory is None else recorder.directory / FAILED
        if failed is not None:
            failed.unlink(missing_ok=True)
        tell(None, "running")
        try:
            outcome = simulation.run(record, recorder)
        except Exception as error:  # of the strategy, which may be anybody's code
            _log.debug("strategy %s failed", name, exc_info=True)
            why = str(error) if isinstance(error, FedsimError) else repr(error)
            if failed is not None:
                failed.write_text(f"{why}\n", encoding="utf-8")
            tell(recorder.rows[-1] if recorder.rows else None, "failed", why)
            return None, why
        target = scenario.evaluation.target
        if target is None and scenario.stop is not None:
            target = scenario.stop.accuracy
        if recorder.has_transfers:
            record_links(recorder, simulation.network)
        summary = summarise(
            recorder.rows,
            target=target,
            diverged=outcome.diverged is not None,
            diverged_device=outcome.diverged_device,
            diverged_reason=outcome.diverged,
        )
        if recorder.directory is not None:
            save_arrays(recorder.directory / "model.safetensors", outcome.arrays)
            if scenario.evaluation.confusion:
                path = recorder.directory / "confusion.csv"
                save_confusion(path, simulation.trainer, outcome.arrays, scenario.evaluation.on)
        last = recorder.rows[-1] if recorder.rows else None
        tell(last, "diverged" if outcome.diverged else "done", outcome.diverged or "")
    return strategy_result(recorder, summary), ""


def record_links(recorder: Recorder, network: Network) -> None:
    """Record what each link that was used has carried, and how it varied."""
    end = network.env.now
    for use in network.link_uses():
        history = network.timeline(use.name, 0.0, end)
        is_constant = len(history) < 2 and history[:1] == [(0.0, use.bandwidth_bps)]
        recorder.link(
            LinkRow(
                link=use.name,
                bandwidth_bps=use.bandwidth_bps,
                latency=use.latency,
                carried_bytes=use.carried_bytes,
                busy_time=use.busy_time,
                change_times=[] if is_constant else [time for time, _ in history],
                change_rates_bps=[] if is_constant else [rate for _, rate in history],
            )
        )


def _run_in_processes(
    runs: Runs,
    names: Sequence[str],
    jobs: int,
    settings: tuple[Scenario, Path | None, str, Path | None],
    queue: Any,
    progress: Callable[[Progress], None],
) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=start_worker) as pool:
        futures = {pool.submit(_work, settings, name, queue): name for name in names}
        pending = set(futures)
        try:
            while pending or not queue.empty():
                while not queue.empty():
                    progress(Progress(*queue.get()))
                done = {future for future in pending if future.done()}
                for future in sorted(done, key=lambda f: names.index(futures[f])):
                    runs.note(futures[future], *future.result())
                pending -= done
                if pending and not done:
                    wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
        except BaseException:
            for process in pool._processes.values():
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _work(
    settings: tuple[Scenario, Path | None, str, Path | None], name: str, queue: Any
) -> tuple[StrategyResult | None, str]:
    """Run one strategy in a process of its own."""
    scenario, out, device, data_dir = settings
    with one_thread():
        simulation = build(scenario, name, device=device, data_dir=data_dir)
        # Plain values: what holds the queue would import this module to know a `Progress`.
        return _run_one(simulation, out, lambda progress: queue.put(astuple(progress)))
