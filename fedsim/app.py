"""The door of `flwr run`: a `ServerApp` that runs a scenario, and the app of its devices.

``flwr run . --run-config "scenario='my.yaml' out='runs/mine'"`` trains in Flower's simulation
engine or on a deployment, while messages travel the scenario's network in virtual time; the
records and the report are those of `fedsim run`.

Every message to a node carries a ConfigRecord ``fedsim``: the strategy, the resolved scenario (so
that a remote node needs no file) and a seed. It weighs nothing in virtual time.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim.document import read_value
from fedsim.errors import FedsimError, PayloadError, ScenarioError
from fedsim.executors.clientapp import ClientAppExecutor, call_app
from fedsim.executors.inner_grid import InnerGridExecutor, find_nodes
from fedsim.flower.instructions import NODE_BASE, round_of
from fedsim.learning.threads import one_thread
from fedsim.runner import Progress, run
from fedsim.scenario import Scenario, load_scenario
from fedsim.simulation import build
from fedsim.streams import bits

__all__ = ["client_app", "server_app"]

_log = logging.getLogger("flwr.fedsim")  # Flower shows it
_log.setLevel(logging.INFO)  # also while Flower's own logger is kept quiet

server_app = ServerApp()
client_app = ClientApp()


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario that the run config names, on the nodes of this grid."""
    config = context.run_config
    try:
        scenario = load_scenario(
            _find(str(config.get("scenario", ""))),
            [text.strip() for text in str(config.get("set", "")).split(";") if text.strip()],
        )
        out = str(config.get("out", "")) or None
        data_dir = str(config.get("data-dir", "")) or None
        nodes = find_nodes(grid, scenario.data.devices)

        def make(world: Scenario, strategy: str) -> InnerGridExecutor:
            return InnerGridExecutor(grid, nodes, order=_Orders(world, strategy, data_dir))

        result = run(
            scenario,
            out,
            data_dir=None if data_dir is None else Path(data_dir),
            force=bool(config.get("force", False)),
            progress=_show,
            executor=make,
        )
    except FedsimError as error:
        _log.error("fedsim: %s", error)
        raise
    for name, strategy in result.strategies.items():
        _log.info("fedsim: %s: %s", name, strategy.summary)
    if out is not None:
        _log.info("fedsim: records and report in %s", Path(out).absolute())


def _find(scenario: str) -> Path:
    """Return a scenario's file: below the working directory, else in the app's own folder."""
    places = [Path.cwd() / scenario, Path(__file__).parents[1] / scenario]
    for place in places:
        if place.is_file():
            return place
    raise ScenarioError(
        f"run config, scenario: there is no file '{scenario}' in {places[0].parent}, nor in the "
        f"app's folder {places[1].parent}"
    )


def _show(progress: Progress) -> None:
    accuracy = "" if progress.accuracy is None else f", accuracy {progress.accuracy:.3f}"
    _log.info(
        "fedsim: %s: round %d of %d, %.3g s of virtual time, %.4g MB%s%s",
        progress.strategy,
        progress.round,
        progress.rounds,
        progress.virtual_time,
        progress.bytes_total / 1e6,
        accuracy,
        f" ({progress.state}: {progress.message})" if progress.message else "",
    )


class _Orders:
    """Makes the record ``fedsim`` of each message of one strategy."""

    def __init__(self, world: Scenario, strategy: str, data_dir: str | None) -> None:
        self._told = {"strategy": strategy, "scenario": world.to_yaml(), "data-dir": data_dir or ""}
        self._seed = world.seed
        self._asked: dict[int, int] = {}

    def __call__(self, message: Message) -> ConfigRecord:
        node = message.metadata.dst_node_id
        nth = self._asked.get(node, 0)
        self._asked[node] = nth + 1
        seed = bits(self._seed, "client-app", node - NODE_BASE, round_of(message), nth)
        return ConfigRecord({**self._told, "seed": int(seed)})


# --- on the devices -------------------------------------------------------------------------------


@client_app.query()
def tell(message: Message, context: Context) -> Message:
    """Reply with the partition that this node holds."""
    record = ConfigRecord({"partition-id": _partition(context)})
    return Message(RecordDict({"node": record}), reply_to=message)


def _partition(context: Context) -> int:
    if "partition-id" not in context.node_config:
        raise PayloadError(
            "this node does not know its partition: start flower-supernode with "
            "--node-config 'partition-id=…'"
        )
    return int(context.node_config["partition-id"])


@client_app.train()
@client_app.evaluate()
def work(message: Message, context: Context) -> Message:
    """Do what the instruction's strategy does on this device."""
    if "fedsim" not in message.content:
        raise PayloadError("this app works for fedsim's ServerApp: the record 'fedsim' is missing")
    order = message.content.config_records["fedsim"]
    del message.content["fedsim"]
    strategy = str(order["strategy"])
    device = _device(str(order["scenario"]), strategy, str(order["data-dir"]))
    node_config = context.node_config | {
        "partition-id": _partition(context),
        "num-partitions": device.n_devices,
    }
    inside = Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=node_config,
        state=_state_of(strategy, context),
        run_config=device.run_config,
    )
    seed = order["seed"]
    assert isinstance(seed, int)
    with one_thread():
        reply = call_app(device.app, message, inside, seed)
    for name, record in inside.state.items():
        context.state[f"{strategy}/{name}"] = record
    return reply


def _state_of(strategy: str, context: Context) -> RecordDict:
    """Return what this device keeps for one strategy."""
    prefix = f"{strategy}/"
    kept = context.state.items()
    return RecordDict({k.removeprefix(prefix): v for k, v in kept if k.startswith(prefix)})


@dataclass(frozen=True, slots=True)
class _Device:
    app: Callable[..., Message]
    run_config: dict[str, bool | int | float | str]
    n_devices: int


@lru_cache(maxsize=1)
def _device(text: str, strategy: str, data_dir: str) -> _Device:
    """Return the app of a strategy's devices; a process keeps the last one that it needed."""
    data = read_value(text, "the scenario of the message")
    kind = data["executor"]["kind"]
    if kind not in ("client_app", "flower"):
        data["executor"] = {"kind": "client_app"}
    elif kind == "flower":
        own = ("app", "run_config", "train_config")
        data["executor"] = {"kind": "client_app"} | {k: data["executor"][k] for k in own}
    scenario = Scenario.from_mapping(data)
    made = build(scenario, strategy, data_dir=Path(data_dir) if data_dir else None)
    executor = made.executor
    assert isinstance(executor, ClientAppExecutor)
    return _Device(executor.app, executor.run_config, scenario.data.devices)
