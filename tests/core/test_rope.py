"""Rotary embedding's frequencies, worked out by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.models.config import ModelConfig
from kvjax.models.layers import rope_frequencies, rotate
from kvjax.models.rope_scaling import DynamicNtk, LongRope, RopeScaling, Yarn

# Four pairs of a head of 8: 10,000 ** -(0, 1/4, 1/2, 3/4).
PLAIN = [1.0, 0.1, 0.01, 0.001]
ORIGINAL = "original_max_position_embeddings"
YARN = Yarn(factor=4.0, original_max_position_embeddings=1257, attention_factor=1.5)
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
        # Pair log10(200 / 32) = 0.796 turns 32 times and pair log10(200) = 2.301 once: a ramp from
        # pair 0 to pair 3. A third of the second pair is slowed by 4, two thirds of the third.
        (YARN, [1.0, 0.075, 0.005, 0.00025]),
        # From 0.796 to 2.301 the second pair is 0.1356 on its way, the third 0.8.
        (dataclasses.replace(YARN, truncate=False), [1.0, 0.089829, 0.004, 0.00025]),
        # Pairs log10(200 / 2) = 2 and 2.301: from 2 to 3 none but the last is slowed.
        (dataclasses.replace(YARN, beta_fast=2.0), [1.0, 0.1, 0.01, 0.00025]),
        # Of 20 waves and fewer, log10(200 / 20) = 1: both ends are the second pair.
        (
            dataclasses.replace(YARN, beta_fast=20.1, beta_slow=20.1, truncate=False),
            [1.0, 0.025, 0.0025, 0.00025],
        ),
    ],
)
def test_frequencies_by_hand(scaling, expected):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    np.testing.assert_allclose(rope_frequencies(config), expected, rtol=1e-3)


def test_dynamic_frequencies_of_each_row():
    """2 * 250 / 100 - 1 = 4, and 4 ** (8 / 6) = 6.35: a base of 63,496 of fourth root 15.87."""
    scaling = DynamicNtk(factor=2.0, original_max_position_embeddings=100)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    found = np.asarray(rope_frequencies(config, jnp.array([7, 100, 250])))
    np.testing.assert_array_equal(found[0], rope_frequencies(CONFIG))
    np.testing.assert_array_equal(found[1], rope_frequencies(CONFIG))
    np.testing.assert_allclose(found[2], [1.0, 0.062996, 0.0039685, 0.00025], rtol=1e-4)


def test_longrope_frequencies_of_each_row():
    scaling = LongRope(
        short_factor=(1.0, 2.0, 4.0, 5.0), long_factor=(2.0, 4.0, 5.0, 10.0),
        original_max_position_embeddings=100, attention_factor=1.2,
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    found = rope_frequencies(config, jnp.array([100, 101]))
    np.testing.assert_allclose(found[0], [1.0, 0.05, 0.0025, 0.0002], rtol=1e-6)
    np.testing.assert_allclose(found[1], [0.5, 0.025, 0.002, 0.0001], rtol=1e-6)


def test_frequencies_by_length_need_one():
    scaling = DynamicNtk(factor=2.0, original_max_position_embeddings=100)
    config = dataclasses.replace(CONFIG, rope_scaling=scaling)
    with pytest.raises(ValueError, match=r"^rope_length=None, expected .* is 'dynamic'\)$"):
        rope_frequencies(config)


def test_rotation_by_each_rows_frequencies_and_a_factor():
    """A quarter turn, and none, of (1, 0); both half as long again."""
    x_BTXH = jnp.broadcast_to(jnp.array([1.0, 0.0]), (2, 1, 1, 2))
    frequencies = jnp.array([[np.pi / 2], [2 * np.pi]])
    found = rotate(x_BTXH, jnp.array([[1], [1]]), frequencies, 1.5)
    np.testing.assert_allclose(found[:, 0, 0], [[0.0, 1.5], [1.5, 0.0]], atol=1e-6)
