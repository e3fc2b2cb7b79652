"""The model, the data and the training loop."""

from typing import Any

import torch
from flwr.app import Context
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small network for 8 x 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 32)
        self.output = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return self.output(self.hidden(x).relu())


def load_data(context: Context) -> tuple[TensorDataset, TensorDataset]:
    """Return this node's training and test samples."""
    digits: Any = load_digits()
    node = context.node_config
    mine = slice(int(node["partition-id"]), None, int(node["num-partitions"]))
    x = torch.tensor(digits.data[mine] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[mine])
    cut = len(x) // 5
    return TensorDataset(x[cut:], y[cut:]), TensorDataset(x[:cut], y[:cut])


def train(model: nn.Module, data: TensorDataset, epochs: int, learning_rate: float) -> float:
    """Train in place; return the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    loss = torch.tensor(0.0)
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=16, shuffle=True):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
    return loss.item()


def test(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    """Return loss and accuracy."""
    x, y = data.tensors
    with torch.no_grad():
        outputs = model(x)
    return cross_entropy(outputs, y).item(), (outputs.argmax(1) == y).float().mean().item()
