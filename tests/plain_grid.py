"""A Flower grid without a network: calls a `ClientApp` in a loop, and knows nothing of fedsim."""

import pickle
import random
from contextlib import contextmanager

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class PlainGrid(Grid):
    def __init__(self, app, n_nodes, first=1000):
        self.app = app
        self.contexts = {
            first + i: Context(
                run_id=1,
                node_id=first + i,
                node_config={"partition-id": i, "num-partitions": n_nodes},
                state=RecordDict(),
                run_config={},
            )
            for i in range(n_nodes)
        }
        self.replies = {}
        self.count = 0

    run = property(lambda self: Run.create_empty(1))

    def set_run(self, run): ...

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            self.count += 1
            message.metadata.__dict__["_message_id"] = str(self.count)
            private = pickle.loads(pickle.dumps(message))
            context = self.contexts[message.metadata.dst_node_id]
            self.replies[str(self.count)] = self.app(message=private, context=context)
            ids.append(str(self.count))
        return ids

    def pull_messages(self, message_ids):
        return [self.replies.pop(i) for i in message_ids if i in self.replies]

    def send_and_receive(self, messages, *, timeout=None):
        return self.pull_messages(self.push_messages(messages))


@contextmanager
def flower_identity(sampling_seed, numpy_seed=None):
    """Set what a strategy needs outside a Flower run, seeded like a fedsim session."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
    random.seed(sampling_seed)
    if numpy_seed is not None:
        np.random.seed(numpy_seed)  # noqa: NPY002
    try:
        yield
    finally:
        TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None
