"""Bar 8: what training with power means does and does not gain, over three seeds."""

import logging

import pytest
import torch

from benchmarks.hyperprism import relations


@pytest.mark.study
def test_bar_8_training_relations():
    """The committed output is benchmarks/results/hyperprism.jsonl."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    found = list(relations(3, lambda **_: None))
    assert len(found) == 6
    assert not [text for text, holds in found if not holds]
