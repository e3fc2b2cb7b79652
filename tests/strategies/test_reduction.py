import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies.reduction import ChunkFaults, keep_largest, run_schedule, schedule_for
from topologies.collectives import bml
from topologies.placement import COLLECTIVES
from topologies.schedules import check, execute

SYMMETRIC = sorted(set(COLLECTIVES) - {"all_to_all"})


@given(
    name=st.sampled_from(sorted(COLLECTIVES)),
    ranks=st.sampled_from([2, 3, 4, 5, 8, 9, 16]),
    size=st.integers(0, 70),
    seed=st.integers(0, 9),
)
def test_tensors_and_arrays_are_added_in_the_same_order(name, ranks, size, seed):
    schedule = schedule_for(name, ranks)
    check(schedule)
    rows = np.random.default_rng(seed).standard_normal((ranks, size)).astype(np.float32)
    found = run_schedule(schedule, torch.from_numpy(rows)).numpy()
    np.testing.assert_array_equal(found, execute(schedule, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_ranks_end_bitwise_equal(name, dtype):
    rows = torch.randn((9, 1000), generator=torch.Generator().manual_seed(1)).to(dtype)
    held = run_schedule(schedule_for(name, 9), rows)
    assert held.dtype == dtype
    assert (held == held[0]).all()


def test_everybody_to_everybody_adds_in_orders_of_their_own():
    rows = torch.randn((9, 1000), generator=torch.Generator().manual_seed(1))
    held = run_schedule(schedule_for("all_to_all", 9), rows)
    assert not (held == held[0]).all()
    torch.testing.assert_close(held, rows.sum(0).expand(9, -1), rtol=0, atol=1e-5)


def test_sums_are_rounded_to_the_type_of_the_rows():
    """2048 + 1 is 2048 in float16: of the four ones only those added to each other first count."""
    rows = torch.tensor([[2048.0], [1.0], [1.0], [1.0]], dtype=torch.float16)
    ring = run_schedule(schedule_for("binomial_tree", 4), rows)
    assert ring.flatten().tolist() == [2050.0] * 4  # (2048 + 1) + (1 + 1)
    assert run_schedule(schedule_for("ring", 4), rows)[0].item() in (2048.0, 2050.0, 2052.0)


def test_a_number_of_ranks_becomes_a_bcube():
    assert schedule_for("bml", 9).name == "bml(3,2)"
    assert schedule_for("bml", 8).name == "bml(2,3)"
    assert schedule_for("bml", 16).name == "bml(4,2)"
    assert schedule_for("bml", 16, levels=4).name == "bml(2,4)"
    assert schedule_for("bml", 5).name == "bml(5,1)"
    assert schedule_for("ring", 9, levels=2).steps[0].destination.tolist() == [
        1, 2, 5, 3, 4, 7, 8, 6, 0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="levels = 3: 9 ranks are no BCube"):
        schedule_for("bml", 9, levels=3)
    with pytest.raises(ValueError, match="levels = 0"):
        schedule_for("bml", 9, levels=0)
    with pytest.raises(ValueError, match="collective = 'bmi': must be one of all_to_all"):
        schedule_for("bmi", 9)
    with pytest.raises(ValueError, match="at least 2"):
        schedule_for("ring", 1)
    with pytest.raises(ValueError, match=r"bml\(2,2\) sums 4 vectors, there are 5"):
        run_schedule(bml(2, 2), torch.ones(5, 3))


def test_lost_chunks_leave_out_contributions():
    rows = torch.ones(9, 90)
    everything = ChunkFaults(loss=1.0)
    assert (run_schedule(bml(3, 2), rows, faults=everything) == 1).all()
    faults = ChunkFaults(loss=0.05, seed=3)
    held = run_schedule(bml(3, 2), rows, number=1, faults=faults)
    assert held.max() == 9
    assert 1 <= held.min() < 9
    assert torch.equal(held, run_schedule(bml(3, 2), rows, number=1, faults=faults))
    assert not torch.equal(held, run_schedule(bml(3, 2), rows, number=2, faults=faults))
    lost = [faults.lost(0, step, 10_000).mean() for step in range(4)]
    assert lost == pytest.approx([0.05] * 4, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_corrupted_chunk_differs_in_one_bit(dtype):
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    part = torch.ones(50, dtype=dtype)
    for send in range(100):
        flipped = ChunkFaults(corruption=1.0).flip(part, 1, 2, send)
        changed = flipped.view(bits) ^ part.view(bits)
        assert (changed != 0).sum() == 1
        assert sum(int(word).bit_count() for word in changed.tolist() if word > 0) <= 1
    assert (part == 1).all()
    held = run_schedule(bml(2, 2), torch.ones(4, 400), faults=ChunkFaults(corruption=1.0))
    assert 0 < (held != 4).sum() < 400


def test_the_largest_entries_are_kept():
    rows = torch.tensor([[1.0, -3.0, 2.0, 0.0], [0.5, 0.1, -0.2, 4.0]])
    assert keep_largest(rows, 2).tolist() == [[0.0, -3.0, 2.0, 0.0], [0.5, 0.0, 0.0, 4.0]]
    assert torch.equal(keep_largest(rows, 4), rows)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_probabilities_are_from_0_to_1(value):
    with pytest.raises(ValueError, match=r"chunk_loss = .*: must be from 0 to 1"):
        ChunkFaults(loss=value)
