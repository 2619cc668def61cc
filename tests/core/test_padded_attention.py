"""Attention to padded slots by true position: blocks of slots and parts of tokens in one matrix."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.kernels.decode_attention import Evicted, padded, padded_attention, padded_cpu


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def oracle(q, at, k, v, positions, window=None, evicted=None):
    """One query head and token at a time, in float64."""
    batch, tokens, heads, head_dim = q.shape
    out, lse = np.zeros(q.shape), np.full(q.shape[:3], -np.inf)
    for b, t, n in np.ndindex(batch, tokens, heads):
        head = n // (heads // k.shape[1])
        places = positions[b, min(head, positions.shape[1] - 1)]
        distance = at[b, t] - places
        seen = (places >= 0) & (distance >= 0)
        if window is not None:
            seen &= distance < window
        if evicted is not None:
            order = np.broadcast_to(evicted.order, k.shape[:3])[b, head]
            seen &= (order < evicted.first[b, head]) | (order >= evicted.last[b, t, head])
        if seen.any():
            scores = k[b, head, seen].astype(np.float64) @ q[b, t, n] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ v[b, head, seen] / weights.sum()
            lse[b, t, n] = scores.max() + np.log(weights.sum())
    return out, lse


def problem(slots: int, heads_differ: bool):
    """Two rows, the second one's last two tokens padded; NaN in empty slots."""
    rng = np.random.default_rng(1)
    positions = rng.integers(0, 60, (2, 2 if heads_differ else 1, slots))
    positions[rng.random(positions.shape) < 0.3] = -1
    positions[..., -slots // 3 :] = -1
    empty = np.broadcast_to(positions < 0, (2, 2, slots))[..., None]
    k, v = (np.where(empty, np.nan, normal(seed, 2, 2, slots, 8)) for seed in (2, 3))
    at = rng.integers(30, 90, (2, 5))
    at[1, 3:] = -1
    return normal(4, 2, 5, 6, 8), at, k.astype(np.float32), v.astype(np.float32), positions


def in_blocks(monkeypatch, scores: int, order: str):
    """Few scores at once, in blocks of 8 slots, in the order of a CPU or of an accelerator."""
    for module in (padded, padded_cpu):
        monkeypatch.setattr(module, "SCORES", scores)
        monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(padded, "platform", lambda: order)


ORDERS = pytest.mark.parametrize("order", ["cpu", "tpu"])


@ORDERS
@pytest.mark.parametrize("scores", [1, 16 * 12, 2**22], ids=["token", "parts", "whole"])
@pytest.mark.parametrize("heads_differ", [False, True])
def test_blocks_match_float64(monkeypatch, scores, heads_differ, order):
    in_blocks(monkeypatch, scores, order)
    arrays = problem(37, heads_differ)
    rng = np.random.default_rng(5)
    first = rng.integers(0, 30, (2, 2))
    evicted = Evicted(
        np.arange(37)[None, None], first, first[:, None] + rng.integers(0, 9, (2, 5, 2))
    )
    for window, gone in ((None, None), (40, evicted)):
        run = partial(padded_attention, window=window)
        jitted = jax.jit(lambda *call, run=run: run(*call[:-1], evicted=call[-1]))
        out, lse = jitted(*jax.tree.map(jnp.asarray, (*arrays, gone)))
        expected, expected_lse = oracle(*arrays, window, gone)
        np.testing.assert_allclose(out, expected, atol=2e-6)
        np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_blocks_that_all_queries_see_need_no_mask(monkeypatch):
    """Slots without holes: of three blocks the queries stand behind two and in the third."""
    in_blocks(monkeypatch, 16 * 12, "cpu")
    q, k, v = normal(4, 2, 5, 6, 8), normal(2, 2, 2, 24, 8), normal(3, 2, 2, 24, 8)
    positions = np.arange(24)[None, None].repeat(2, 0)
    at = np.array([[16, 17, 20, 22, 23], [15, 19, 18, 30, 16]])
    out, lse = jax.jit(padded_attention)(*map(jnp.asarray, (q, at, k, v, positions)))
    expected, expected_lse = oracle(q, at, k, v, positions)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


@ORDERS
def test_slots_that_hold_nothing(monkeypatch, order):
    q, at, k, v, positions = problem(37, heads_differ=False)
    arrays = q, at, k * np.nan, v * np.nan, np.full_like(positions, -1)
    for scores in (2**22, 1):
        in_blocks(monkeypatch, scores, order)
        out, lse = padded_attention(*map(jnp.asarray, arrays))
        assert not out.any()
        assert (lse == -jnp.inf).all()


def test_scores_never_span_a_layer():
    """Temporaries of 128 tokens against a Llama-3-8B's full cache, with 16 times the slots."""

    def temporaries(slots):
        array = jax.ShapeDtypeStruct
        held = array((1, 8, slots, 128), jnp.bfloat16)
        call = array((1, 128, 32, 128), jnp.bfloat16), array((1, 128), jnp.int32)
        places = array((1, 8, slots), jnp.int32)
        compiled = jax.jit(padded_attention).lower(*call, held, held, places).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(2048), temporaries(32_768)
    assert many - few < 0.1 * (32_768 - 2048) * 8 * 512
