"""An app for Flower's Ray simulation that does the work of the test world `digits_trainer(20)`."""

from flwr.app import ArrayRecord, Message
from flwr.clientapp import ClientApp

from fedsim.executors.vectorised import train_or_evaluate
from fedsim.flower.instructions import WorkPlan
from tests.fedsim.worlds import LOCAL, digits_trainer

app = ClientApp()


@app.train()
def train(message, context):
    trainer = digits_trainer(20)
    plan = WorkPlan(LOCAL, trainer.data.size)
    device = int(context.node_config["partition-id"])
    (content,) = train_or_evaluate(trainer, plan, [message], [device])
    content["arrays"] = ArrayRecord(content["arrays"].to_torch_state_dict())
    return Message(content, reply_to=message)
