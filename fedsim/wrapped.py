"""A user's own Flower app on a scenario's network: `NetworkGrid.wrap`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.serverapp import Grid

from fedsim.document import read_document
from fedsim.errors import ScenarioError
from fedsim.executors.inner_grid import InnerGridExecutor, find_nodes
from fedsim.flower.grid import NetworkGrid
from fedsim.flower.session import watched
from fedsim.learning.threads import one_thread
from fedsim.output import describe_world, prepare
from fedsim.recorder import Recorder, summarise
from fedsim.report.html import write_report
from fedsim.results import strategy_result
from fedsim.runner import Runs, record_links
from fedsim.scenario import Scenario, load_scenario
from fedsim.simulation import Simulation, build

__all__ = ["wrap"]

_NAME = "app"
_PLACEHOLDER = f"strategies.{_NAME}={{kind: fedavg, min_available_nodes: 1, min_train_nodes: 1}}"


@contextmanager
def wrap(
    grid: Grid,
    scenario: str | Path | Scenario,
    out: str | Path | None = None,
    *,
    force: bool = False,
    data_dir: Path | None = None,
    wait: float = 120.0,
) -> Iterator[NetworkGrid]:
    """Put a scenario's network around the grid that Flower hands to a `ServerApp`.

    Your strategy and your `ClientApp` do what they do anyway; when and whether messages arrive,
    and what they weigh, says the scenario. Its ``data`` tells how many devices there are and how
    many samples, hence how much work, each has; its ``training`` how much of it a message asks for
    where the message's own config does not say (``local-epochs``, ``local-steps``, ``batch-size``).
    Keys that your app decides itself (``rounds``, ``strategies``, ``model``) may be left out.

    Parameters
    ----------
    grid : Grid
    scenario : str, Path or Scenario
        A file, or what `fedsim.load_scenario` returns.
    out : str or Path, optional
        Where to write the records of a run, with one strategy named ``app``, and the report.
    force : bool
        Replace an earlier run in `out`.
    data_dir : Path, optional
        Where data files are looked for.
    wait : float
        Wall seconds to wait for as many nodes as there are devices.

    Yields
    ------
    NetworkGrid
        To be given to ``strategy.start``. Node ids are the simulated devices'.

    Raises
    ------
    ScenarioError
        If the scenario or `out` cannot be used.
    NoNodesError
        If the grid has fewer nodes than there are devices.
    """
    made = scenario if isinstance(scenario, Scenario) else _load(Path(scenario))
    if made.attacks:
        raise ScenarioError("attacks: what devices reply is for your own app to say; leave it out")
    out = None if out is None else Path(out)
    nodes = find_nodes(grid, made.data.devices, wait=wait)
    name = _NAME if _NAME in made.strategies else next(iter(made.strategies))
    with one_thread():
        simulation = build(
            made,
            name,
            data_dir=data_dir,
            executor=lambda world, strategy: InnerGridExecutor(grid, nodes),
        )
        if out is not None:
            prepare(made, out, force=force)
            describe_world(out / "world.json", made, {name: simulation})
        yield from _recorded(simulation, out)
        if out is not None:
            write_report(out)


def _load(path: Path) -> Scenario:
    """Return the scenario in a file that may leave out what the app decides."""
    given = read_document(path).data
    overrides = [] if "rounds" in given else ["rounds=1"]
    if "strategies" not in given:
        overrides.append(_PLACEHOLDER)
    return load_scenario(path, overrides)


def _recorded(simulation: Simulation, out: Path | None) -> Iterator[NetworkGrid]:
    """Yield the grid; write what happens on it."""
    grid, scenario = simulation.grid, simulation.scenario
    runs = Runs(scenario, out, {})
    with Recorder(out, simulation.name, transfers=scenario.record.transfers) as recorder:
        if recorder.has_transfers:
            grid.recorder = recorder
        with watched(grid, scenario.seed, recorder.round):
            yield grid
        if recorder.has_transfers:
            record_links(recorder, simulation.network)
        summary = summarise(recorder.rows, target=scenario.evaluation.target)
        runs.note(simulation.name, strategy_result(recorder, summary), "")
