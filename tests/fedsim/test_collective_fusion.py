"""Buckets of tensors, and collectives that overlap back-propagation."""

import pytest
from torch import nn

import topologies as tp
from fedsim.errors import PayloadError
from fedsim.learning.cost import model_cost, model_profile
from fedsim.learning.models import build_model, lenet5, softmax
from tests.fedsim.collective_worlds import (
    ALPHA,
    asks,
    collective_world,
    expected,
    expected_iteration,
    run,
)
from tests.plain_grid import flower_identity
from topologies.profiles import profile

FAST = 10e9  # bit/s
BCUBE = tp.bcube(3, 2, bandwidth=FAST)


@pytest.fixture(autouse=True)
def _identity():
    with flower_identity(0):
        yield


@pytest.mark.parametrize("fusion_bytes", [0, 25_000_000, 10**9])
@pytest.mark.parametrize("when", ["after", "with"])
def test_iterations_of_vgg19_are_those_of_the_study(when, fusion_bytes):
    world = collective_world(BCUBE)
    asked = {"profile": "vgg19", "fusion_bytes": fusion_bytes, "when": when, "size": None}
    replies, (report,) = run(world, collective="bml", step_latency=ALPHA, **asked)
    iteration = expected_iteration(
        BCUBE, "bml", profile("vgg19"), 1.0, fusion_bytes, overlap=when == "with"
    )
    parts = iteration.seconds, iteration.compute, iteration.sync, iteration.exposed
    assert (report.seconds, report.compute, report.sync, report.exposed) == pytest.approx(
        parts, rel=1e-9
    )
    sent = sum(reply.content["delivery"]["sent_bytes"] for reply in replies)
    assert sent == 2 * 8 * profile("vgg19").n_bytes
    assert len(report.spans) == 4 * len(iteration.buckets)


def test_only_the_last_of_several_local_steps_makes_what_is_sent():
    layers = profile("vgg19")
    world = collective_world(BCUBE)
    asked = {"fusion_bytes": 25_000_000, "when": "with", "profile": "vgg19", "size": None}
    config = {"local-steps": 4}
    _, (report,) = run(world, collective="bml", step_latency=ALPHA, config=config, **asked)
    one = expected_iteration(BCUBE, "bml", layers, 1.0, 25_000_000, overlap=True)
    assert report.seconds == pytest.approx(3 + one.seconds, rel=1e-9)


def test_with_a_local_barrier_no_rank_waits_for_anothers_bucket_longer_than_it_must():
    asked = {"fusion_bytes": 25_000_000, "when": "with", "profile": "vgg19", "size": None}
    times = {}
    for barrier in ("local", "global"):
        world = collective_world(BCUBE)
        _, (report,) = run(world, collective="bml", barrier=barrier, **asked)
        times[barrier] = report.seconds
    assert times["local"] == pytest.approx(times["global"], rel=1e-9)
    slow = collective_world(BCUBE, speed=[2.0] + [4.0] * 8)
    _, (report,) = run(slow, collective="bml", barrier="local", **asked)
    assert 2 < report.seconds < 1 + times["global"]


def test_layers_of_the_model_are_scaled_to_what_the_vector_weighs():
    model = build_model(lenet5, (1, 28, 28), 10, seed=1)
    layers = model_profile(model, (1, 28, 28))
    half = layers.n_bytes // 2  # sent as float16
    world = collective_world(BCUBE, profile=lambda: layers)
    _, (report,) = run(world, collective="bml", fusion_bytes=50_000, size=half, step_latency=ALPHA)
    buckets = [118_268, 5_144]  # of 100 000 bytes and more in float32
    assert report.sync == pytest.approx(sum(expected(BCUBE, "bml", size) for size in buckets))


def test_the_layers_must_be_known():
    world = collective_world(BCUBE)
    with pytest.raises(PayloadError, match="fusion_bytes needs the layers of the model"):
        world.grid.push_messages(asks(world, collective="bml", fusion_bytes=0))
    with pytest.raises(PayloadError, match="profile is 'vgg20'"):
        world.grid.push_messages(asks(world, collective="bml", profile="vgg20"))


def test_a_models_layers_are_those_of_the_known_profile():
    model = build_model(lenet5, (1, 28, 28), 10, seed=1)
    mine, known = model_profile(model, (1, 28, 28)), profile("lenet5")
    assert [(t.shape, t.flops) for t in mine.tensors] == [(t.shape, t.flops) for t in known.tensors]
    assert (mine.n_bytes, mine.flops) == (known.n_bytes, known.flops)


@pytest.mark.parametrize(
    "model",
    [
        build_model(softmax, (64,), 10, seed=1),
        nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)),
    ],
    ids=["linear", "with batch norm"],
)
def test_all_operations_of_a_model_belong_to_a_layer(model):
    assert model_profile(model, (64,)).flops == model_cost(model, (64,)).forward_flops
