"""Ada-KV's bound holds, and sharing a layer's budget by Ada-KV never makes it larger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import CompressionConfig, exact, figures, tiny
from kvjax.compression import allocators
from kvjax.studies.attention_loss import FOLLOWING, layer_loss, markdown, measure, relative

B, W, T, P, K, G, H, D = 2, 5, 45, 40, 3, 2, 4, 6
ada_heads = jax.jit(allocators.ada_heads, static_argnames="floor")
select_top = jax.jit(exact.select_top)


def layer(seed: int, sharpness: float):
    """Queries, keys, values and output weights of a layer whose heads attend unlike each other."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, W, K, G, H)) * sharpness * rng.random((K, 1, 1)) * 3
    arrays = (
        q.reshape(B, W, K * G, H),
        rng.normal(size=(B, T, K, H)),
        rng.normal(size=(B, T, K, H)),
        rng.normal(size=(K * G * H, D)),
    )
    return [np.asarray(x, np.float32) for x in arrays]


def expected(q, k, v, o, keep):
    """(moved, size, missed, bound) in float64, one query head at a time."""
    q, k, v, o = (x.astype(np.float64) for x in (q, k, v, o))
    full, left, missed, most = np.zeros((B, W, D)), np.zeros((B, W, D)), [], 0.0
    for b, n in np.ndindex(B, K * G):
        h, part = n // G, o[n * H : (n + 1) * H]
        most = max(most, np.abs(v[b, :, h] @ part).sum(-1).max())
        for w in range(W):
            last = T - W + w
            p = np.exp(q[b, w, n] @ k[b, : last + 1, h].T / H**0.5)
            held = np.array([t >= P or keep[b, h, t] for t in range(last + 1)])
            p /= p.sum()
            missed.append(p[~held].sum())
            full[b, w] += p @ v[b, : last + 1, h] @ part
            left[b, w] += (p * held / p[held].sum()) @ v[b, : last + 1, h] @ part
    bound = 2 * most * np.mean(missed) * K * G
    moved = np.abs(full - left).sum(-1).mean()
    return moved, np.abs(full).sum(-1).mean(), np.mean(missed), bound


def test_loss_is_that_of_the_definition():
    arrays = layer(0, 1.0)
    keep = np.random.default_rng(1).random((B, K, P)) < 0.4
    found = layer_loss(*arrays, keep)
    np.testing.assert_allclose(found, expected(*arrays, keep), rtol=2e-5)
    nothing = layer_loss(*arrays, np.ones((B, K, P), bool))
    assert float(nothing.moved) == pytest.approx(0, abs=1e-5)
    assert float(nothing.bound) == pytest.approx(0, abs=1e-4)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31 - 1),
    sharpness=st.sampled_from([0.0, 0.3, 1.0, 3.0, 10.0]),
    base=st.integers(0, P),
    floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)
def test_bound_of_ada_is_never_above_uniforms(seed, sharpness, base, floor):
    """At equal budgets, for what the window looked at: the very queries that scores come from."""
    q, k, _, _ = layer(seed, sharpness)
    s_BKGWP = np.einsum("BWKGH,BTKH->BKGWT", q.reshape(B, W, K, G, H), k[:, :P]) * H**-0.5
    scores_BKP = jnp.asarray(jax.nn.softmax(s_BKGWP).mean((2, 3)))
    every_BKP, base_B = jnp.ones((B, K, P), bool), jnp.full(B, base, jnp.int32)
    ada_BK = ada_heads(scores_BKP, every_BKP, base_B, floor=floor)
    even_BK = jnp.full((B, K), base, jnp.int32)
    assert ada_BK.sum(-1).tolist() == even_BK.sum(-1).tolist()
    missed = [
        np.where(select_top(scores_BKP, sizes, every_BKP), 0, np.float64(scores_BKP)).sum((1, 2))
        for sizes in (ada_BK, even_BK)
    ]
    assert (missed[0] <= missed[1] + 1e-12).all()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), sharpness=st.sampled_from([0.0, 1.0, 4.0]))
def test_loss_is_never_above_the_bound(seed, sharpness):
    keep = np.random.default_rng(seed).random((B, K, P)) < 0.3
    found = layer_loss(*layer(seed, sharpness), keep)
    assert float(found.moved) <= float(found.bound) * (1 + 1e-4) + 1e-4


def test_the_bundled_models_layers(tmp_path):
    model, _ = tiny.load()
    tokens = np.random.default_rng(0).integers(3, 300, (2, 128 + FOLLOWING))
    names = "snapkv", "ada-snapkv", "streaming-llm"
    found = measure(model, tokens, {name: CompressionConfig.named(name, 32) for name in names})
    assert all(0 < float(loss.missed) < 1 for losses in found.values() for loss in losses)
    assert relative(found["streaming-llm"]).mean() > relative(found["snapkv"]).mean()
    lines = markdown({32: found}).splitlines()
    assert [line.count("|") for line in lines] == [7] * 5
    assert lines[2].startswith("| 32 | `snapkv` | ")
    if figures.available():
        shares = {"32": {name: relative(losses) for name, losses in found.items()}}
        assert figures.layer_losses(tmp_path / "loss.png", shares).stat().st_size > 5_000
