"""Rotary embedding's frequencies, worked out by hand."""

import dataclasses

import numpy as np
import pytest

from kvjax.models.config import ModelConfig, RopeScaling
from kvjax.models.layers import rope_frequencies

# Four pairs of a head of 8: 10,000 ** -(0, 1/4, 1/2, 3/4).
PLAIN = [1.0, 0.1, 0.01, 0.001]
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1,
    head_dim=8, rope_theta=10_000.0, max_position_embeddings=8192,
)  # fmt: skip


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, PLAIN),
        (RopeScaling("linear", 4.0), [0.25, 0.025, 0.0025, 0.00025]),
        # 1,257 positions are 200 waves of the first pair, 20 of the second, 2 of the third and a
        # fifth of the fourth. More than 4 waves: kept; less than 1: slowed by 8; 2 lie a third of
        # the way from 1 to 4, so a third of 0.01 and two thirds of 0.00125.
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 1257), [1.0, 0.1, 0.0041667, 0.000125]),
    ],
)
def test_frequencies_by_hand(scaling, expected):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-3)
