"""Two copies of every memory, on the server and on a device, whatever becomes of the messages."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.flower import compat
from fedsim.flower.server import initial_arrays
from fedsim.flower.session import session
from strategies.bidirectional import SCHEMES
from strategies.mcm import CompressedSGD
from tests.strategies.least_squares_worlds import N, make_world

ALGORITHMS = sorted(SCHEMES)
STATEFUL = [a for a in ALGORITHMS if a not in ("sgd", "qsgd", "ghost")]


class Copies:
    """Compares what devices hold with what the server held when it sent or received it."""

    def __init__(self, world):
        self.world, self.strategy = world, world.strategy
        self.sent = {}  # (group, version) -> what devices hold after that message
        self.n_compared = 0
        server_send, begin = self.strategy._log, self.strategy._begin

        def log(group, array, step):
            server_send(group, array, step)
            version = self.strategy._sent_versions[group]
            self.sent[group, version] = self.held(group)

        def started(arrays):
            begin(arrays)
            self.strategy.server.grow(N)
            groups = self.strategy.server.down_memory.shape[1] or 1
            self.sent |= {(group, 0): self.held(group) for group in range(groups)}

        self.strategy._log, self.strategy._begin = log, started

    def held(self, group):
        server = self.strategy.server
        if server.scheme.downlink == "model":
            return server.down_memory[0, group].clone()
        return server.model[0].clone()

    def mine(self, row):
        """Return a device's uplink memory in the version that the server has."""
        version = self.strategy._versions[row]
        state = self.world.state(row, "mcm")
        if version == 0:
            return torch.zeros_like(self.strategy.server.model[0])
        behind = int(state["version"]) - version
        assert behind in (0, 1)
        return state["memory_before" if behind else "memory"]

    def check(self, server_round):
        strategy, server = self.strategy, self.strategy.server
        scheme = strategy.scheme
        for node, row in strategy._rows.items():
            state = self.world.state(node - 1000, "mcm")
            if not state:
                assert strategy._versions[row] == 0
                continue
            if scheme.up_memory and strategy.correction == "pp1":
                assert torch.equal(self.mine(row), server.memory[0, row])
                self.n_compared += 1
            if scheme.downlink in ("gradient", "model"):
                seen = int(state["seen"])
                assert seen >= strategy._seen[row]
                held = torch.cat([v.flatten() for k, v in state.items() if k.startswith("model/")])
                assert torch.equal(held, self.sent[strategy._group(row), seen])
                self.n_compared += 1
        if scheme.up_memory and strategy.correction == "pp2":
            mean = torch.stack([self.mine(row) for row in range(N)]).mean(0)
            assert torch.allclose(mean, server.memory[0, 0], rtol=0, atol=1e-13)
            self.n_compared += 1


def run_with_copies_checked(strategy, seed, *, rounds=8, timeout=None, **options):
    rng = np.random.default_rng(seed)
    world = make_world(
        strategy,
        up=rng.uniform(2e3, 5e4, N),
        down=rng.uniform(2e3, 5e4, N),
        latency=rng.uniform(0, 0.02, N),
        seed=seed,
        **options,
    )
    copies = Copies(world)
    world.run(rounds, timeout=timeout, observe=copies.check)
    assert len(world.models) == rounds
    return world, copies


@pytest.mark.parametrize("algorithm", STATEFUL)
@settings(max_examples=2)
@given(
    seed=st.integers(0, 10**6),
    loss=st.sampled_from([0.2, 0.0, 0.5]),
    timeout=st.sampled_from([0.08, 0.03, None]),
    executor=st.sampled_from(["vectorised", "client_app"]),
    groups=st.sampled_from([1, 0, 2]),
    reply=st.sampled_from(["missing", "error"]),
)
def test_no_loss_or_delay_parts_the_copies(algorithm, seed, loss, timeout, executor, groups, reply):
    options = {"groups": groups} if SCHEMES[algorithm].downlink == "model" else {}
    strategy = CompressedSGD(algorithm=algorithm, learning_rate=0.01, seed=seed, **options)
    run_with_copies_checked(
        strategy, seed, timeout=timeout, executor=executor, loss=loss, loss_reply=reply
    )


@pytest.mark.parametrize(
    ("algorithm", "correction"),
    [
        ("bi_qsgd", "pp1"),
        ("artemis", "pp1"),
        ("artemis", "pp2"),
        ("dore", "pp1"),
        ("mcm", "pp1"),
        ("rand_mcm", "pp2"),
    ],
)
def test_bar_8_a_device_that_returns_holds_what_it_should(algorithm, correction):
    strategy = CompressedSGD(
        algorithm=algorithm,
        learning_rate=0.01,
        participation=0.4,
        correction=correction,
        momentum=0.5 if algorithm == "dore" else 0.0,
    )
    world, copies = run_with_copies_checked(strategy, 2, rounds=20, loss=0.1)
    assert copies.n_compared > 20
    by_device = [[t.round for t in world.trips() if t.device == i] for i in range(N)]
    assert max(max(np.diff(rounds)) for rounds in by_device) > 3  # somebody was away for long


def test_devices_whose_app_fails_start_anew():
    """An error reply tells nothing of what the device holds: its memories are zero again."""
    strategy = CompressedSGD(algorithm="artemis", learning_rate=0.01)
    world = make_world(strategy, executor="client_app")
    copies = Copies(world)
    app, calls = world.executor.app, []

    def failing(message, context):
        calls.append(context.node_id)
        if calls.count(1002) in (4, 5) and context.node_id == 1002:
            context.state.array_records.clear()
            raise RuntimeError("out of memory")
        return app(message=message, context=context)

    world.executor.app = failing
    world.run(9, observe=copies.check)
    sizes = {t.round: t.bytes_down for t in world.trips() if t.device == 2}
    assert sizes[5] == sizes[6] == 6 * 8 > sizes[7]


@pytest.mark.parametrize("algorithm", ["mcm", "artemis", "double_squeeze"])
def test_copies_are_compared_at_all_and_a_wrong_one_is_seen(algorithm):
    strategy = CompressedSGD(algorithm=algorithm, learning_rate=0.01)
    world, copies = run_with_copies_checked(strategy, 1, loss=0.2)
    assert copies.n_compared > 20
    assert {trip.outcome for trip in world.trips()} > {"ok"}
    strategy.server.memory += 1e-12
    copies.sent = {key: held + 1e-12 for key, held in copies.sent.items()}
    with pytest.raises(AssertionError):
        copies.check(9)


def test_an_instruction_that_was_overtaken_does_not_bring_back_old_memories():
    strategy = CompressedSGD(algorithm="artemis", learning_rate=0.01)
    world = make_world(strategy)
    start = initial_arrays(world.trainer)
    with session(world.grid, 0):
        sent = []
        for k in (1, 2):  # the reply to the first is late, so the second names the same memory
            asked = strategy.configure_train(k, start, ConfigRecord(), world.grid)
            sent.append(next(iter(asked)))
            compat.set_message_id(sent[-1], str(k))
        for message in sent:
            world.executor([message])
    world.executor.settle("2", has_arrived=True)
    held = world.state(0, "mcm")
    world.executor.settle("1", has_arrived=True)
    assert all(torch.equal(value, held[key]) for key, value in world.state(0, "mcm").items())
