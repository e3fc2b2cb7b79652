import numpy as np

from fedsim import streams


def test_stream_depends_on_all_three_names_only():
    first = streams.stream(7, "link", "up-3").random(4)
    streams.stream(7, "link", "up-4").random(100)
    assert np.array_equal(first, streams.stream(7, "link", "up-3").random(4))
    others = [(8, "link", "up-3"), (7, "speed", "up-3"), (7, "link", "up-4")]
    assert all(not np.array_equal(first, streams.stream(*o).random(4)) for o in others)


def test_keyed_draws_broadcast_and_do_not_depend_on_company():
    devices = np.arange(50)
    together = streams.uniform(3, "loss", devices, 9)
    alone = [float(streams.uniform(3, "loss", d, 9)) for d in devices]
    assert together.tolist() == alone
    assert streams.bits(3, "order", devices[:, None], np.arange(7)).shape == (50, 7)


def test_keyed_draws_are_uniform():
    draws = streams.uniform(1, "check", np.arange(100_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 100_000)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.015
