"""fedsim: federated learning on the network you really have."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.errors import FedsimError
    from fedsim.flower.grid import NetworkGrid
    from fedsim.results import RunResult
    from fedsim.runner import run
    from fedsim.scenario import Scenario, load_scenario
    from fedsim.simulation import build

__version__ = "0.1.0"

__all__ = [
    "FedsimError",
    "NetworkGrid",
    "RunResult",
    "Scenario",
    "build",
    "load_scenario",
    "run",
]

_HOME = {
    "FedsimError": "fedsim.errors",
    "NetworkGrid": "fedsim.flower.grid",
    "RunResult": "fedsim.results",
    "Scenario": "fedsim.scenario",
    "build": "fedsim.simulation",
    "load_scenario": "fedsim.scenario",
    "run": "fedsim.runner",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import fedsim` itself stays cheap."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
