"""What the server does. Without `network` this is an ordinary Flower app."""

from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

import fedsim
from flower_app.task import Net
from strategies.gossip import DPSGD

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy, on a simulated network if the run config names one."""
    config = context.run_config
    if not config["network"]:
        run(grid, context)
        return
    world = Path(__file__).parents[1] / str(config["network"])
    with fedsim.NetworkGrid.wrap(grid, world, str(config["out"]) or None) as network:
        run(network, context)
        print(f"{network.now:.1f} s of virtual time")  # noqa: T201


def run(grid: Grid, context: Context) -> None:
    """Do what the app did before it had a network."""
    config = context.run_config
    rounds = int(config["num-server-rounds"])
    strategy: Strategy = DPSGD() if config["strategy"] == "gossip" else FedAvg()
    strategy.start(grid, ArrayRecord(Net().state_dict()), num_rounds=rounds)
