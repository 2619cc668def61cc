"""The forward pass of training: differentiable, equal to prefill; checkpoints written and read."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.generation import prefill
from kvjax.kernels.prefill_attention.training import blockwise, training_attention
from kvjax.model_interface import ProbeRequest
from kvjax.models.checkpoints.export import save_decoder
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.models.config import load_config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if (path / "config.json").exists())


@pytest.mark.parametrize(
    ("tokens", "window"), [(5, None), (128, 1), (128, 128), (300, None), (300, 50)]
)
def test_blockwise_attention_and_its_gradient(tokens, window):
    """Against jax.nn.dot_product_attention, which materialises everything."""
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, tokens, 6, 8))
    k, v = (jax.random.normal(key, (2, tokens, 3, 8)) for key in keys[1:3])
    weight = jax.random.normal(keys[3], q.shape)
    local = None if window is None else (window - 1, 0)

    def ours(q, k, v):
        return (blockwise(q, k, v, window) * weight).sum()

    def plain(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)
        return (out * weight).sum()

    np.testing.assert_allclose(
        jax.jit(partial(training_attention, window=window))(q, k, v),
        jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local),
        atol=2e-6,
    )
    mine, theirs = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, plain))
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert np.isfinite(a).all()


@pytest.mark.parametrize("name", ["llama-bias", "llama31", "mistral", "qwen2", "qwen3"])
def test_forward_pass_is_prefill(name):
    """Sliding windows, biases and q/k norms included."""
    model = load_decoder(FIXTURES / name, progress=False)
    tokens = np.random.default_rng(0).integers(3, 80, (2, 33))
    tokens = jnp.asarray(tokens, jnp.int32)
    logits = jax.jit(lambda model: model(tokens))(model)
    run = jax.jit(lambda lengths: prefill.prefill(model, tokens, lengths, ProbeRequest()).logits)
    for length in (33, 20):
        last = run(jnp.array([length, length], jnp.int32))
        np.testing.assert_allclose(logits[:, length - 1], last, atol=1e-4)


def test_gradients_reach_every_weight():
    model = load_decoder(FIXTURES / NAMES[0], progress=False)
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 80, (2, 24)))
    gradients = nnx.grad(lambda m: m(tokens).std())(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(leaf).max()) > 0, path


@pytest.mark.parametrize("name", NAMES)
def test_saved_checkpoint_is_the_one_that_was_loaded(name, tmp_path):
    model = load_decoder(FIXTURES / name, progress=False)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    save_decoder(model, tmp_path / "new" / "folder", config, dtype=jnp.float32)
    again = load_decoder(tmp_path / "new" / "folder", progress=False)
    assert load_config(tmp_path / "new" / "folder") == load_config(FIXTURES / name)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_halves_the_file(tmp_path):
    model = load_decoder(FIXTURES / NAMES[0], progress=False)
    config = json.loads((FIXTURES / NAMES[0] / "config.json").read_text())
    sizes = [
        save_decoder(model, tmp_path / dtype, config, dtype=dtype).stat().st_size
        for dtype in ("float32", "bfloat16")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    rounded = jax.tree.leaves(load_decoder(tmp_path / "bfloat16", progress=False))
    for a, b in zip(jax.tree.leaves(model), rounded, strict=True):
        np.testing.assert_array_equal(a.astype(jnp.bfloat16).astype(jnp.float32), b)
