"""What a device does."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_app.task import Net, load_data, test, train

app = ClientApp()


@app.train()
def train_here(msg: Message, context: Context) -> Message:
    """Train the model that came on this node's samples."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    data, _ = load_data(context)
    config = context.run_config
    loss = train(model, data, int(config["local-epochs"]), float(config["learning-rate"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(data)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


@app.evaluate()
def evaluate_here(msg: Message, context: Context) -> Message:
    """Score the model that came on this node's test samples."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, data = load_data(context)
    loss, accuracy = test(model, data)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
