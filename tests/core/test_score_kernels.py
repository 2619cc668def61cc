"""The TPU kernels of the scores, in interpret mode, against the XLA reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kvjax.kernels.prefill_attention import prefill_attention
from kvjax.kernels.window_scores import reference, tpu

# Query heads, KV heads, head width: twins of Llama-3-8B, a 70B's shard, narrow heads, wide heads.
SHAPES = {
    "llama-3-8b": (32, 8, 128),
    "llama-3-70b/tp8": (8, 1, 128),
    "width 64": (12, 4, 64),
    "width 32": (8, 4, 32),
    "width 256": (4, 2, 256),
}


def arrays(seed, *shapes, dtype="float32"):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("name", SHAPES)
def test_window_scores_match(name):
    heads, kv_heads, head_dim = SHAPES[name]
    q, k = arrays(0, (2, 5, heads, head_dim), (2, 256, kv_heads, head_dim))
    lengths = jnp.array([256, 131])
    positions = lengths[:, None] - jnp.arange(5, 0, -1)
    expected = reference.window_scores(q, positions, k, lengths)
    out = tpu.window_scores(q, positions, k, lengths, interpret=True)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(out.sum(-1), 5.0, atol=1e-4)  # every query gives 1


@pytest.mark.parametrize("window", [None, 40])
def test_masks_and_left_out_queries(window):
    """Sliding windows, queries at -1, keys past a row's length (NaN there changes nothing)."""
    q, k = arrays(1, (2, 12, 4, 64), (2, 384, 2, 64))
    lengths = jnp.array([300, 20])
    positions = jnp.maximum(lengths[:, None] - jnp.arange(12, 0, -1), -1).at[0, 3].set(-1)
    expected = reference.window_scores(q, positions, k, lengths, window=window)
    dirty = k.at[0, 300:].set(jnp.nan).at[1, 20:].set(jnp.nan)
    out = tpu.window_scores(q, positions, dirty, lengths, window=window, interpret=True)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert not np.asarray(out[1, :, 20:]).any()


@pytest.mark.parametrize("power", [1, 2])
def test_power_of_the_softmax(power):
    q, k = arrays(2, (1, 3, 4, 64), (1, 128, 2, 64))
    positions, lengths = jnp.array([[5, 90, 127]]), jnp.array([128])
    out = tpu.window_scores(q, positions, k, lengths, power=power, interpret=True)
    q64, k64 = np.asarray(q, np.float64)[0], np.asarray(k, np.float64)[0]
    expected = np.zeros((4, 128))
    for w, head in np.ndindex(3, 4):
        place = int(positions[0, w]) + 1
        weights = np.exp(k64[:place, head // 2] @ q64[w, head] / 8.0)
        expected[head, :place] += (weights / weights.sum()) ** power
    np.testing.assert_allclose(out[0], expected, atol=2e-6)


@pytest.mark.parametrize("group", ["mean", "max"])
def test_query_heads_of_a_group_are_reduced(group):
    q, k = arrays(6, (2, 5, 6, 64), (2, 256, 2, 64))
    lengths = jnp.array([256, 131])
    positions = lengths[:, None] - jnp.arange(5, 0, -1)
    each = np.asarray(reference.window_scores(q, positions, k, lengths)).reshape(2, 2, 3, 256)
    expected = each.mean(2) if group == "mean" else each.max(2)
    out = reference.window_scores(q, positions, k, lengths, group=group)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    out = tpu.window_scores(q, positions, k, lengths, group=group, interpret=True)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    lse = prefill_attention(jnp.zeros((2, 256, 6, 64)), k, k, lengths)[1]
    call = (jnp.zeros((2, 256, 6, 64)), k, lse, lengths)
    each = np.asarray(reference.accumulated_scores(*call)).reshape(2, 2, 3, 256)
    out = reference.accumulated_scores(*call, group=group)
    np.testing.assert_allclose(out, each.mean(2), atol=1e-5)  # the three heads are alike here


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("shape", [(4, 2, 64), (8, 2, 128)])
def test_accumulated_scores_match(shape, window):
    heads, kv_heads, head_dim = shape
    q, k, v = arrays(3, (2, 256, heads, head_dim), *[(2, 256, kv_heads, head_dim)] * 2)
    lengths = jnp.array([256, 77])
    _, lse = prefill_attention(q, k, v, lengths, window=window)
    expected = reference.accumulated_scores(q, k, lse, lengths, window=window)
    out = tpu.accumulated_scores(q, k, lse, lengths, window=window, interpret=True)
    np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("head_dim", [64, 128])  # 128 ** -0.5 is no power of two
def test_bfloat16_is_scored_in_float32(head_dim):
    q, k = arrays(4, (1, 4, 4, head_dim), (1, 256, 2, head_dim), dtype="bfloat16")
    positions, lengths = jnp.array([[252, 253, 254, 255]]), jnp.array([256])
    exact = reference.window_scores(q.astype("float32"), positions, k.astype("float32"), lengths)
    out = tpu.window_scores(q, positions, k, lengths, interpret=True)
    np.testing.assert_allclose(out, exact, atol=2e-6)


def test_no_races():
    q, k = arrays(5, (1, 4, 4, 64), (1, 256, 2, 64))
    positions, lengths = jnp.array([[252, 253, 254, 255]]), jnp.array([256])
    interpret = pltpu.InterpretParams(detect_races=True)
    run = jax.jit(partial(tpu.window_scores, interpret=interpret))
    expected = reference.window_scores(q, positions, k, lengths)
    np.testing.assert_allclose(run(q, positions, k, lengths), expected, atol=2e-6)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    assert interpreter.races is not None
    assert not interpreter.races.races_found
