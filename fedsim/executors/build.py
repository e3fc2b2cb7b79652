"""From a scenario's `executor` to who computes."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fedsim import registry
from fedsim.data.federated import DeviceData
from fedsim.errors import ScenarioError
from fedsim.executors.attacked import AttackedApp
from fedsim.executors.clientapp import ClientAppExecutor, check_app, device_app, mods_needed_by
from fedsim.executors.crew import Crew, Wanted
from fedsim.executors.flower import FlowerExecutor, own_app, users_app
from fedsim.executors.halves import DeviceHalf
from fedsim.executors.ray import RayTrainer
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower.grid import NODE_BASE, Executor
from fedsim.flower.instructions import WorkPlan, training_config
from fedsim.learning.attacks import Attacks
from fedsim.learning.shares import trainer_on
from fedsim.learning.trainer import Trainer
from fedsim.scenario import Scenario
from fedsim.sections import FlowerExecution, RayExecution, Spec

__all__ = ["added_config", "halves_of", "make_executor", "make_trainer", "reserve_workers"]

_log = logging.getLogger(__name__)
_ENGINE = ("chunk", "engine", "precision")


def make_trainer(
    module: Any, data: DeviceData, execution: Spec, crew: Crew, **options: Any
) -> Trainer:
    """Return who trains devices: in this process, or by workers on Ray.

    Parameters
    ----------
    module, data, **options
        See `Trainer`.
    execution : Spec
        The scenario's `executor`.
    crew : Crew
        Whose workers may be used.

    Raises
    ------
    ScenarioError
        If Ray is needed and not installed.
    """
    made = registry.build("executor", execution.spec())
    options |= {key: value for key, value in asdict(made).items() if key in _ENGINE}
    if not isinstance(made, RayExecution):
        return trainer_on(module, data, **options)
    crew.check(execution.kind)
    return RayTrainer(module, data, crew=crew, wanted=_wanted(made), **options)


def make_executor(
    scenario: Scenario, trainer: Trainer, plan: WorkPlan, strategy: object, crew: Crew
) -> Executor:
    """Return who computes replies for one strategy.

    Parameters
    ----------
    scenario : Scenario
        As the strategy sees it.
    trainer, plan
        Who trains, and who reads instructions.
    strategy : flwr.serverapp.strategy.Strategy
        Its device halves and mods are applied.
    crew : Crew
        Whose workers may be used.

    Raises
    ------
    ScenarioError
        If the app is none, or Ray is needed and not installed.
    """
    mods, halves = mods_needed_by(strategy), halves_of(strategy)
    kind = scenario.executor.kind
    execution = registry.build("executor", scenario.executor.spec())
    if kind in ("vectorised", "ray"):
        if not mods:
            return VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=halves)
        instead = {"vectorised": "client_app", "ray": "flower"}[kind]
        _log.warning(
            "%s: clipping happens in a mod on the devices, so they run one at a time "
            "(executor %s) instead of vectorised",
            ", ".join(scenario.strategies),
            instead,
        )
    given = getattr(execution, "app", None)
    if given is not None:
        check_app(given)
        _check_attacks(trainer.attacks)
    defaults = {
        **training_config(plan.defaults),
        "num-server-rounds": scenario.rounds,
        **(getattr(execution, "run_config", None) or {}),
    }
    options: dict[str, Any] = {
        "node_base": NODE_BASE,
        "run_config": defaults,
        "seed": scenario.seed,
    }
    n_devices = scenario.data.devices
    if isinstance(execution, FlowerExecution | RayExecution):
        crew.check(kind)
        tool = own_app(trainer, plan, mods, halves)
        if given is not None:
            tool = users_app(scenario.executor.arguments["app"], trainer.attacks)
        wanted = _wanted(execution)
        return FlowerExecutor(tool, n_devices, crew=crew, wanted=wanted, **options)
    app: Any = given or device_app(trainer, plan, mods, halves)
    if given is not None and trainer.attacks is not None:
        app = AttackedApp(given, trainer.attacks)
    return ClientAppExecutor(app, n_devices, **options)


def _check_attacks(attacks: Attacks | None) -> None:
    kinds = set() if attacks is None else {a.kind for a in attacks.by_device.values()}
    if "label_flip" in kinds:
        raise ScenarioError(
            "attacks: label_flip changes the scenario's data, and executor.app loads its own; let "
            "the app flip its labels, or use another attack"
        )


def added_config(scenario: Scenario) -> Mapping[str, bool | int | float | str]:
    """Return what the user adds to the config of train instructions."""
    execution = registry.build("executor", scenario.executor.spec())
    return getattr(execution, "train_config", None) or {}


def reserve_workers(scenario: Scenario, crew: Crew) -> None:
    """See to it that the workers that a scenario's executor wants can be had, if it wants any.

    Raises
    ------
    ScenarioError
        If Ray cannot be reached, or has no room for them.
    """
    execution = registry.build("executor", scenario.executor.spec())
    if isinstance(execution, FlowerExecution | RayExecution):
        crew.reserve(_wanted(execution))


def _wanted(execution: FlowerExecution | RayExecution) -> Wanted:
    return Wanted(execution.address, execution.workers, execution.cpus, execution.gpus)


def halves_of(strategy: Any) -> tuple[DeviceHalf, ...]:
    """Return the device halves of a strategy and of those that it wraps, the outermost first."""
    found: list[DeviceHalf] = []
    while strategy is not None:
        found += getattr(strategy, "device_halves", ())
        strategy = getattr(strategy, "strategy", None)
    return tuple(found)
