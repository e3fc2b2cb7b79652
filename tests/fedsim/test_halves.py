"""Device halves: what a strategy adds to local work, vectorised and in an app of one's own."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedsim.data.datasets import Dataset
from fedsim.data.federated import federate
from fedsim.errors import PayloadError
from fedsim.executors.clientapp import ClientAppExecutor, device_app
from fedsim.executors.vectorised import VectorisedExecutor
from fedsim.flower import compat
from fedsim.flower.instructions import NODE_BASE, WorkPlan
from fedsim.learning import models
from fedsim.learning.batches import make_batches
from fedsim.learning.config import LocalConfig
from fedsim.learning.models import build_model
from fedsim.learning.trainer import Trainer
from fedsim.streams import stream
from strategies.halves import DeviceHalf, LocalTerms, as_mod
from tests.plain_grid import flower_identity

torch.set_num_threads(1)
SIZES = (12, 3, 9, 20, 5)
N = len(SIZES)


@pytest.fixture(autouse=True)
def _identity():
    with flower_identity(1):
        yield


@dataclass(frozen=True)
class Corrected(DeviceHalf):
    """A control variate as SCAFFOLD's, which a device carries from round to round."""

    name: ClassVar[str] = "corrected"

    def receive(self, arrays, state, config, draws):
        own = {k: state.get(k, torch.zeros_like(v)) for k, v in arrays.items()}
        return arrays, own | {f"sent/{k}": v for k, v in arrays.items()}

    def local(self, state, config):
        return LocalTerms(control={k: -state[k] for k in ("fc1.weight", "fc1.bias") if k in state})

    def reply(self, work, state, config, draws):
        kept = {}
        for key, value in work.items():
            scale = (config["steps-made"] * config["rate-used"]).to(value)
            moved = (state[f"sent/{key}"] - value) / scale.view(-1, *[1] * (value.dim() - 1))
            kept[key] = state[key] + 0.5 * moved
        return work, kept


@dataclass(frozen=True)
class Pulled(DeviceHalf):
    """A proximal pull towards the model that the device had after its last round."""

    name: ClassVar[str] = "pulled"

    def local(self, state, config):
        return LocalTerms(proximal_mu=0.3, center=dict(state) or None)

    def reply(self, work, state, config, draws):
        return work, work


def towards_teacher(outputs, x, y, rows):
    teacher = x.flatten(1) @ rows["weight"].transpose(0, 1)
    return 0.1 * (outputs - teacher).square().sum(-1)


@dataclass(frozen=True)
class Taught(DeviceHalf):
    """Distillation from a linear teacher that each device draws for itself once."""

    name: ClassVar[str] = "taught"

    def receive(self, arrays, state, config, draws):
        return arrays, state or {"weight": draws((4, 36), torch.float64) - 0.5}

    def local(self, state, config):
        return LocalTerms(extra_loss=towards_teacher, rows=dict(state))


HALVES = {
    "control": (Corrected(),),
    "proximal": (Pulled(),),
    "extra loss": (Taught(),),
    "all of them": (Taught(), Corrected(), Pulled()),
}
MODELS = {
    "mlp": lambda: build_model(models.mlp, (1, 6, 6), 4, seed=1, hidden=(7,), dtype=torch.float64),
    "cnn": lambda: build_model(
        models.cnn, (1, 6, 6), 4, seed=1, channels=(3,), dtype=torch.float64
    ),
}


def make_trainer(model="mlp", **options):
    rng = stream(2, "halves")
    n = sum(SIZES)
    x, y = rng.standard_normal((n, 1, 6, 6)), rng.integers(4, size=n)
    parts = np.split(np.arange(n), np.cumsum(SIZES)[:-1])
    data = federate(Dataset("random", x, y, x[:5], y[:5], 4), parts)
    return Trainer(MODELS[model](), data, seed=5, **options)


def plan_of(trainer, **training):
    config = LocalConfig(batch_size=4, local_epochs=2, learning_rate=0.2, **training)
    return WorkPlan(config, trainer.data.size, 5)


def instructions(arrays, number, devices=range(N), **config):
    """Return train messages of one round to some devices."""
    content = RecordDict(
        {
            "arrays": arrays,
            "config": ConfigRecord({"server-round": number, "learning-rate": 0.2} | config),
        }
    )
    messages = []
    for device in devices:
        message = Message(content, NODE_BASE + device, "train", group_id=str(number))
        message.metadata.__dict__["_message_id"] = str(100 * number + device)
        messages.append(message)
    return messages


def model_record(trainer):
    row = trainer.layout.views(trainer.initial()[None])
    return ArrayRecord({k: v[0] for k, v in row.items()})


def rounds_of(executor, trainer, rounds=3):
    """Return each device's model after rounds in which it goes on from its own."""
    records = [model_record(trainer)] * N
    for number in range(1, rounds + 1):
        messages = [instructions(records[d], number, [d])[0] for d in range(N)]
        replies = executor(messages)
        assert not [r for r in replies if r.has_error()], replies[0]
        if hasattr(executor, "settle"):
            for message in messages:
                executor.settle(message.metadata.message_id, has_arrived=True)
        records = [reply.content["arrays"] for reply in replies]
    return torch.stack(
        [torch.cat([torch.from_numpy(a.numpy()).flatten() for a in r.values()]) for r in records]
    )


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", HALVES)
def test_terms_are_equal_over_rows_in_fedsims_app_and_in_a_plain_loop(kind, model, momentum):
    halves, trainer = HALVES[kind], make_trainer(model, chunk=3)
    plan = plan_of(trainer, momentum=momentum)
    vectorised = VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=halves)
    ours = rounds_of(vectorised, trainer)
    loop = make_trainer(model, engine="loop")
    app = device_app(loop, plan, halves=halves)
    assert (ours - rounds_of(ClientAppExecutor(app, N, node_base=NODE_BASE), loop)).abs().max() < (
        1e-10
    )
    if len(halves) == 1:
        own = ClientAppExecutor(plain_app(trainer, plan, halves[0]), N, node_base=NODE_BASE)
        assert (ours - rounds_of(own, trainer)).abs().max() < 1e-10
    without = VectorisedExecutor(trainer, plan, node_base=NODE_BASE)
    assert (ours - rounds_of(without, trainer)).abs().max() > 1e-3


def plain_app(trainer, plan, half):
    """Return an app with a loop as anybody would write it; it shares the order of samples."""
    app, module, data = ClientApp(), trainer.stack.module, trainer.data
    config = plan.defaults

    @app.train()
    def train(message: Message, context: Context) -> Message:
        work = half.work(message, context)
        device = int(context.node_config["partition-id"])
        model = copy.deepcopy(module)
        model.load_state_dict(work.arrays)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=config.learning_rate, momentum=config.momentum
        )
        one, size = np.array([device]), data.size[[device]]
        number = np.array([work.config["server-round"]])
        steps = config.steps_of(size, seed=5, rounds=number, devices=one)
        made = make_batches(5, number, one, data.start[one], size, config.batch_of(size), steps)
        for t, count in enumerate(made.count):
            rows = torch.from_numpy(made.index[t * made.width : t * made.width + count])
            x, y = data.x[rows], data.y[rows]
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y) + work.extra_loss(outputs, x, y).mean()
            optimizer.zero_grad()
            loss.backward()
            work.add_to_gradients(model)
            optimizer.step()
        metrics = MetricRecord({"num-examples": int(size[0]), "train_loss": 0.0})
        return work.reply(model.state_dict(), metrics, steps=len(made.count))

    return app


@dataclass(frozen=True)
class Noisy(DeviceHalf):
    """Noise on what is sent, and the round's noise once more in the state."""

    name: ClassVar[str] = "noisy"

    def reply(self, work, state, config, draws):
        noise = {key: draws(value.shape[1:]).to(value) for key, value in work.items()}
        return {key: work[key] + noise[key] for key in work}, noise


def test_a_round_that_is_sent_again_has_draws_of_its_own_in_every_form():
    half, trainer = Noisy(), make_trainer()
    plan = plan_of(trainer)

    def in_a_plain_app(message, context):
        mod = as_mod(half)
        return mod(message, context, device_app(trainer, plan))

    executors = [
        VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=(half,)),
        ClientAppExecutor(device_app(trainer, plan, halves=(half,)), N, node_base=NODE_BASE),
        ClientAppExecutor(in_a_plain_app, N, node_base=NODE_BASE),
    ]
    sent = []
    for executor in executors:
        found = []
        for turn, (number, repeat) in enumerate([(1, {}), (1, {"repeat": 1}), (2, {})]):
            messages = instructions(model_record(trainer), number, **repeat)
            for message in messages:
                compat.set_message_id(message, str(100 * turn + message.metadata.dst_node_id))
            replies = executor(messages)
            for message in messages:
                getattr(executor, "settle", lambda *_, **__: None)(
                    message.metadata.message_id, has_arrived=True
                )
            records = [reply.content["arrays"] for reply in replies]
            found.append(np.concatenate([a.numpy().ravel() for r in records for a in r.values()]))
        sent.append(found)
    for found in sent[1:]:
        for one, other in zip(sent[0], found, strict=True):
            assert np.abs(one - other).max() < 1e-10
    assert np.abs(sent[0][0] - sent[0][1]).max() > 0.1
    last = [executor.context_of(NODE_BASE).state["noisy"] for executor in executors[1:]]
    assert all(np.array_equal(last[0][key].numpy(), last[1][key].numpy()) for key in last[0])


def test_replies_name_the_halves_from_the_inside_out():
    trainer = make_trainer()
    plan = plan_of(trainer)
    halves = (Taught(), Corrected())
    for executor in (
        VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=halves),
        ClientAppExecutor(device_app(trainer, plan, halves=halves), N, node_base=NODE_BASE),
    ):
        reply = executor(instructions(model_record(trainer), 1))[0]
        assert reply.content["applied"]["halves"] == ["corrected", "taught"]


def test_a_state_moves_on_only_when_its_reply_arrives():
    trainer = make_trainer()
    executor = VectorisedExecutor(
        trainer, plan_of(trainer), node_base=NODE_BASE, halves=(Corrected(),)
    )
    first = instructions(model_record(trainer), 1)
    replies = executor(first)
    for i, message in enumerate(first):
        executor.settle(message.metadata.message_id, has_arrived=i != 2)
    again = executor(instructions(model_record(trainer), 1))
    for i, (a, b) in enumerate(zip(replies, again, strict=True)):
        same = np.array_equal(
            a.content["arrays"]["fc1.weight"].numpy(), b.content["arrays"]["fc1.weight"].numpy()
        )
        assert same == (i == 2)


def test_steps_and_rates_are_those_of_each_device():
    seen = []

    @dataclass(frozen=True)
    class Noting(Corrected):
        def reply(self, work, state, config, draws):
            seen.append((config["steps-made"].tolist(), config["rate-used"].tolist()))
            return work, {}

    trainer = make_trainer()
    executor = VectorisedExecutor(
        trainer, plan_of(trainer), node_base=NODE_BASE, halves=(Noting(),)
    )
    executor(instructions(model_record(trainer), 1, **{"learning-rate": 0.5}))
    assert seen == [([6, 2, 6, 10, 4], [0.5] * N)]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([{"control": {"fc9.weight": torch.zeros(N, 3)}}], r"adds a tensor 'fc9\.weight'.*fc1"),
        ([{"control": {}}], "adds no tensors"),
        ([{"center": {"fc1.bias": torch.zeros(N, 7)}}], r"has no 'fc1\.weight'"),
        ([{"proximal_mu": 1.0}] * 2, "two device halves add a proximal_mu"),
    ],
)
def test_terms_that_do_not_fit_are_refused(terms, message):
    @dataclass(frozen=True)
    class Wrong(DeviceHalf):
        given: tuple = ()

        def local(self, state, config):
            return LocalTerms(**self.given[0])

    trainer = make_trainer()
    halves = tuple(Wrong(given=(each,)) for each in terms)
    executor = VectorisedExecutor(trainer, plan_of(trainer), node_base=NODE_BASE, halves=halves)
    with pytest.raises(PayloadError, match=message):
        executor(instructions(model_record(trainer), 1))


def test_an_extra_loss_that_cannot_be_mapped_is_looped_with_one_warning():
    def branching(outputs, x, y, rows):
        return towards_teacher(outputs, x, y, rows) * (1.0 if outputs.sum().item() else 2.0)

    @dataclass(frozen=True)
    class Branching(Taught):
        def local(self, state, config):
            return LocalTerms(extra_loss=branching, rows=dict(state))

    trainer = make_trainer(chunk=2)
    plan = plan_of(trainer)
    with pytest.warns(RuntimeWarning, match="extra loss cannot be mapped") as caught:
        looped = rounds_of(
            VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=(Branching(),)), trainer
        )
    assert len(caught) == 1
    mapped = VectorisedExecutor(trainer, plan, node_base=NODE_BASE, halves=(Taught(),))
    assert (rounds_of(mapped, trainer) - looped).abs().max() < 1e-10


def test_a_mod_refuses_a_half_with_a_local_part():
    with pytest.raises(ValueError, match=r"'corrected' has a local part.*half\.work"):
        as_mod(Corrected())
