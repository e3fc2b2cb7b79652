"""Bars 5 to 10 of the MCM family that are statistical, over fixed seeds."""

import pytest
import torch

from benchmarks.mcm import bars


@pytest.mark.study
def test_bars_5_to_10_on_convex_problems():
    """The committed output is benchmarks/results/mcm.jsonl; a9a needs its data in FEDSIM_DATA."""
    torch.set_num_threads(1)
    found = list(bars(lambda **_: None))
    assert len(found) >= 40
    assert not [text for text, holds in found if not holds]
