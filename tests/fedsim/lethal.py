"""A model and an app that kill what they run in, once, if it is not the test's own process."""

import os
import signal
from pathlib import Path

from flwr.clientapp import ClientApp
from torch import nn

from tests.fedsim.tutorial_app import evaluate, train

app = ClientApp()


def _die_once(name):
    owner = os.environ.get("LETHAL_OWNER")
    if owner is None or os.getpid() == int(owner):
        return
    try:
        Path(os.environ["LETHAL_FOLDER"], name).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _die_with_machine(node):
    """Kill the Ray node that a worker is on, and the worker."""
    from ray import get_runtime_context

    if get_runtime_context().get_node_id() == node:
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class Net(nn.Module):
    """Logistic regression; kills its process when called for the 20th time."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(64, 10)

    def forward(self, x):
        """Return logits."""
        Net.calls += 1
        if Net.calls >= 20:
            _die_once("model")
        return self.only(x)


class Doomed(Net):
    """The same; kills the Ray node that the file ``doomed`` names when called for the 20th time."""

    def forward(self, x):
        """Return logits."""
        Doomed.calls += 1
        if Doomed.calls == 20 and os.getpid() != int(os.environ["LETHAL_OWNER"]):
            folder = Path(os.environ["LETHAL_FOLDER"])
            _die_with_machine((folder / "doomed").read_text("utf-8"))
            (folder / "survivor").touch()
        return self.only(x)


@app.train()
def train_or_die(message, context):
    """Train in the second round only where it has killed somebody already."""
    if message.content["config"]["server-round"] == 2:
        _die_once("app")
    return train(message, context)


app.evaluate()(evaluate)
