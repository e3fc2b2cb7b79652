"""A Flower app as the tutorials write it: it knows nothing of fedsim."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small network for 8 x 8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        """Return logits."""
        return self.fc2(torch.relu(self.fc1(x)))


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """Return loaders over this partition's training and test samples."""
    from sklearn.datasets import load_digits  # takes seconds, which who wants the model saves

    digits = load_digits()
    x = torch.tensor(digits.data[partition_id::num_partitions] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[partition_id::num_partitions])
    n_test = len(x) // 5
    train, test = TensorDataset(x[n_test:], y[n_test:]), TensorDataset(x[:n_test], y[:n_test])
    return DataLoader(train, batch_size=batch_size, shuffle=True), DataLoader(test, batch_size=64)


app = ClientApp()


def _start(message: Message, context: Context):
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loaders = load_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
    )
    return model, *loaders


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model, loader, _ = _start(msg, context)
    optimizer = torch.optim.SGD(model.parameters(), lr=msg.content["config"]["lr"], momentum=0.9)
    criterion = nn.CrossEntropyLoss()
    total = 0.0
    for _ in range(context.run_config["local-epochs"]):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    metrics = {
        "train_loss": total / len(loader) / context.run_config["local-epochs"],
        "num-examples": len(loader.dataset),
    }
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model, _, loader = _start(msg, context)
    loss, correct = 0.0, 0
    with torch.no_grad():
        for x, y in loader:
            outputs = model(x)
            loss += nn.functional.cross_entropy(outputs, y, reduction="sum").item()
            correct += (outputs.argmax(1) == y).sum().item()
    n = len(loader.dataset)
    metrics = {"eval_loss": loss / n, "eval_acc": correct / n, "num-examples": n}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
