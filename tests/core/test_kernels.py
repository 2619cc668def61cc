"""Attention and column sums against float64 numpy, over shapes, dtypes and block boundaries."""

import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.kernels.decode_attention import decode_attention, merge
from kvjax.kernels.prefill_attention import gpu, prefill_attention, tpu
from kvjax.kernels.prefill_attention import reference as prefill_reference
from kvjax.kernels.window_scores import accumulated_scores, window_scores
from kvjax.kernels.window_scores import reference as scores_reference

QUERY_BLOCK, KEY_BLOCK = 16, 32  # what `small_blocks` shrinks the references' blocks to

QUICK = {"xla_backend_optimization_level": 0}  # compile time is all that these tests cost

# (tokens, query heads, KV heads, head dim, sliding window, real tokens of each row, dtype)
CASES = {
    "one-token": (1, 2, 1, 8, None, (1, 1), "float32"),
    "odd-short": (20, 4, 2, 16, None, (20, 1), "float32"),  # falls back to one block
    "rest-odd-head": (75, 3, 3, 10, None, (75, 33), "float32"),
    "one-kv-head": (100, 6, 1, 10, None, (17, 100), "float32"),
    "window-1": (41, 2, 2, 10, 1, (41, 20), "float32"),
    "window-under-a-block": (100, 6, 2, 8, 7, (100, 50), "float32"),
    "window-of-a-block": (96, 2, 1, 8, 32, (96, 65), "float32"),
    "window-over-a-block": (100, 4, 2, 10, 50, (100, 64), "float32"),
    "window-over-all": (41, 4, 2, 16, 500, (41, 30), "float32"),
    "bfloat16-window": (100, 3, 3, 10, 20, (100, 64), "bfloat16"),
}


@pytest.fixture
def small_blocks(monkeypatch):
    shrink(monkeypatch)


def shrink(monkeypatch):
    monkeypatch.setattr(prefill_reference, "BLOCK", QUERY_BLOCK)
    monkeypatch.setattr(scores_reference, "QUERY_BLOCK", QUERY_BLOCK)
    monkeypatch.setattr(scores_reference, "KEY_BLOCK", KEY_BLOCK)


def compiled(function, **settings):
    """`function` jitted anew, so that nothing traced with other block sizes is reused."""
    run = jax.jit(lambda *arrays: function(*arrays, **settings), compiler_options=QUICK)
    return lambda *arrays: jax.tree.map(np.asarray, run(*arrays))


def poisoned(array: np.ndarray, *where) -> np.ndarray:
    array = array.copy()
    array[where] = np.nan
    return array


def tolerance(dtype, reduction: int) -> float:
    """A few roundings of inputs and weights, and an fp32 sum of `reduction` random terms."""
    single = float(jnp.finfo(jnp.float32).eps)
    return 4 * float(jnp.finfo(dtype).eps) + 4 * single * math.sqrt(reduction)


def close(actual, expected, dtype, reduction: int, scale: float = 1.0):
    limit = scale * tolerance(dtype, reduction)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=limit, atol=limit)


def normal(seed: int, *shape: int, dtype="float32") -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(jnp.dtype(dtype))


def causal(query_positions, keys: int, lengths, window) -> np.ndarray:
    """`[B, Q, S]` by the definition, one entry at a time."""
    seen = np.zeros((len(lengths), query_positions.shape[1], keys), bool)
    for b, w, s in np.ndindex(seen.shape):
        p = query_positions[b, w]
        seen[b, w, s] = s <= p and s < lengths[b] and (window is None or s > p - window)
    return seen


def oracle(q, k, v, seen):
    """`[B, T, N, H]` output, `[B, N, T]` log-sum-exp, `[B, N, T, S]` probabilities."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    s = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(q.shape[-1])
    s = np.where(seen[:, None], s, -np.inf)
    peak = s.max(-1, keepdims=True)
    weights = np.exp(s - np.where(np.isinf(peak), 0, peak))
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, peak + np.log(total), -np.inf)[..., 0]
    p = weights / np.where(total > 0, total, 1)
    return np.einsum("bnts,bsnh->btnh", p, v), lse, p


def prompt_mask(tokens, lengths, window):
    positions = np.broadcast_to(np.arange(tokens), (len(lengths), tokens))
    return causal(positions, tokens, lengths, window)


# --------------------------------------------------------------------------- by hand
def test_two_tokens_by_hand():
    # H = 4, so scores are halved: the second query's are (0, ln 3), its weights (1/4, 3/4).
    q = jnp.zeros((1, 2, 1, 4)).at[..., 0].set(2.0)
    k = jnp.zeros((1, 2, 1, 4)).at[0, 1, 0, 0].set(math.log(3))
    v = jnp.zeros((1, 2, 1, 4)).at[0, :, 0, 1].set(jnp.array([1.0, 5.0]))
    out, lse = compiled(prefill_attention)(q, k, v, jnp.array([2]))
    np.testing.assert_allclose(out[0, :, 0, 1], [1, 1 / 4 + 15 / 4], rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0], [0, math.log(4)], rtol=1e-6)
    # Columns: the first key gets 1 + 1/4, the second 3/4; of the last query alone 1/4 and 3/4.
    sums = compiled(accumulated_scores)(q, k, lse, jnp.array([2]))
    np.testing.assert_allclose(sums[0, 0], [5 / 4, 3 / 4], rtol=1e-6)
    sums = compiled(window_scores)(q[:, 1:], jnp.array([[1]]), k, jnp.array([2]))
    np.testing.assert_allclose(sums[0, 0], [1 / 4, 3 / 4], rtol=1e-6)
    out, lse = compiled(decode_attention)(
        q[:, 1:], k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.ones((1, 1, 2), bool),
        jnp.ones((1, 1, 1, 2), bool),
    )  # fmt: skip
    np.testing.assert_allclose(out[0, 0, 0], [0, 4, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0], [math.log(4)], rtol=1e-6)


# --------------------------------------------------------------------------- prefill
@pytest.fixture(scope="module", params=CASES)
def case(request):
    """One case's inputs, what the operations make of them in small blocks, and the oracle's."""
    tokens, heads, kv_heads, width, window, lengths, dtype = CASES[request.param]
    q = normal(0, 2, tokens, heads, width, dtype=dtype)
    k, v = (normal(seed, 2, tokens, kv_heads, width, dtype=dtype) for seed in (1, 2))
    # The last five positions of each row, those before its start left out.
    positions = np.array(lengths)[:, None] - np.arange(5, 0, -1)
    positions = np.where(positions >= 0, positions, -1)
    recent = q[np.arange(2)[:, None], np.maximum(positions, 0)]

    def run(q, k, v, recent, positions, lengths):
        out, lse = prefill_attention(q, k, v, lengths, window=window)
        return (
            out,
            lse,
            accumulated_scores(q, k, lse, lengths, window=window),
            window_scores(recent, positions, k, lengths, window=window),
        )

    arrays = q, k, v, recent, jnp.array(positions), jnp.array(lengths)
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        out, lse, accumulated, observed = compiled(run)(*arrays)
    expected, expected_lse, p = oracle(q, k, v, prompt_mask(tokens, lengths, window))
    real = np.arange(tokens) < np.array(lengths)[:, None]
    _, _, recent_p = oracle(recent, k, k[..., :1], causal(positions, tokens, lengths, window))
    return SimpleNamespace(
        dtype=dtype,
        tokens=tokens,
        lengths=np.array(lengths),
        out=out,
        expected=expected,
        lse=lse,
        expected_lse=expected_lse,
        accumulated=accumulated,
        expected_accumulated=np.where(real[:, None, :, None], p, 0).sum(2),
        observed=observed,
        observers=(positions >= 0).sum(1),
        expected_observed=recent_p.sum(2),
    )


def test_prefill_matches_numpy(case):
    assert (case.out.dtype.name, case.lse.dtype.name) == (case.dtype, "float32")
    assert np.isfinite(case.out.astype(np.float32)).all()
    for row, length in enumerate(case.lengths):
        close(case.out[row, :length], case.expected[row, :length], case.dtype, case.tokens)
        lse, expected_lse = case.lse[row, :, :length], case.expected_lse[row, :, :length]
        close(lse, expected_lse, case.dtype, case.tokens)


def test_prefill_with_its_own_blocks():
    assert prefill_reference.BLOCK == 256
    q, k, v = (normal(seed, 1, 700, 1, 8) for seed in range(3))  # three blocks of 240
    out, lse = compiled(prefill_attention, window=300)(q, k, v, jnp.array([690]))
    expected, expected_lse, _ = oracle(q, k, v, prompt_mask(700, [690], 300))
    close(out[:, :690], expected[:, :690], q.dtype, 700)
    close(lse[..., :690], expected_lse[..., :690], q.dtype, 700)


def test_blocks_of_padding_see_only_themselves(small_blocks):
    # Two rows of 96 tokens, 33 and 20 real: blocks 3, 4, 5 hold padding alone and cost one step.
    q, k, v = (normal(seed, 2, 96, 2, 8) for seed in range(3))
    out, lse = compiled(prefill_attention)(q, k, v, jnp.array([33, 20]))
    own = slice(64, 80)
    expected, expected_lse, _ = oracle(
        q[:, own], k[:, own], v[:, own], prompt_mask(16, [16, 16], None)
    )
    close(out[:, own], expected, q.dtype, 16)
    close(lse[..., own], expected_lse, q.dtype, 16)


def test_large_scores_do_not_overflow(small_blocks):
    q, k, v = (normal(seed, 1, 75, 2, 8) for seed in range(3))
    q, lengths = 100 * q, jnp.array([75])
    seen = prompt_mask(75, [75], None)
    out, lse = compiled(prefill_attention)(q, k, v, lengths)
    expected, expected_lse, p = oracle(q, k, v, seen)
    assert np.abs(expected_lse).max() > 200  # exp would overflow
    scale = np.abs(expected_lse).max()
    close(out, expected, q.dtype, 75, scale)
    close(lse, expected_lse, q.dtype, 75, scale)
    sums = compiled(accumulated_scores)(q, k, lse, lengths)
    close(sums, p.sum(2), q.dtype, 75, 4 * scale)
    sums = compiled(window_scores)(q, jnp.arange(75)[None], k, lengths)
    close(sums, p.sum(2), q.dtype, 75, 4 * scale)


@pytest.mark.parametrize("window", [None, 8])
def test_prefill_reads_only_the_blocks_that_count(small_blocks, window):
    # 0 * NaN would be NaN: an untouched output proves that the block of values was not read.
    q, k, v = (normal(seed, 1, 128, 2, 8) for seed in range(3))
    attend, lengths = compiled(prefill_attention, window=window), jnp.array([128])
    clean, _ = attend(q, k, v, lengths)
    late, _ = attend(q, k, poisoned(v, slice(None), slice(64, None)), lengths)
    np.testing.assert_array_equal(late[:, :64], clean[:, :64])
    assert np.isnan(late[:, 64:]).all()
    early, _ = attend(q, k, poisoned(v, slice(None), slice(32)), lengths)
    if window is None:
        assert np.isnan(early).all()
    else:
        np.testing.assert_array_equal(early[:, 48:], clean[:, 48:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "window", "dtype"),
    [(6, 2, 10, 40, "float32"), (2, 2, 128, None, "bfloat16")],
)
def test_splash_matches_numpy(heads, kv_heads, width, window, dtype):
    q = normal(0, 2, 128, heads, width, dtype=dtype)
    k, v = (normal(seed, 2, 128, kv_heads, width, dtype=dtype) for seed in (1, 2))
    lengths = jnp.array([128, 70])
    out, lse = compiled(tpu.prefill_attention, window=window, interpret=True)(q, k, v, lengths)
    expected, expected_lse, _ = oracle(q, k, v, prompt_mask(128, lengths, window))
    assert (out.dtype, lse.dtype) == (v.dtype, np.float32)
    assert np.isfinite(out.astype(np.float32)).all()
    for row, length in enumerate((128, 70)):
        close(out[row, :length], expected[row, :length], q.dtype, 128)
        close(lse[row, :, :length], expected_lse[row, :, :length], q.dtype, 128)


def test_prefill_refuses():
    q, k, lengths = jnp.zeros((1, 5, 3, 8)), jnp.zeros((1, 5, 2, 8)), jnp.array([5])
    with pytest.raises(ValueError, match=r"^k has 2 heads, expected a divisor of q's 3$"):
        prefill_attention(q, k, k, lengths)
    for name, kernel in (("cudnn", gpu), ("splash", tpu)):
        assert not kernel.supports(q.shape, q.dtype)
        with pytest.raises(NotImplementedError, match=r"\(1, 5, 3, 8\)"):
            prefill_attention(q, q, q, lengths, implementation=name)


# --------------------------------------------------------------------------- column sums
def test_accumulated_scores_are_column_sums(case):
    assert case.accumulated.dtype == np.float32
    close(case.accumulated, case.expected_accumulated, case.dtype, case.tokens)
    # Every real query gives away exactly 1.
    for row, length in enumerate(case.lengths):
        close(case.accumulated[row].sum(-1) / length, 1, case.dtype, case.tokens)
        assert not case.accumulated[row, :, length:].any()


def test_window_scores_are_column_sums(case):
    assert case.observed.dtype == np.float32
    close(case.observed, case.expected_observed, case.dtype, case.tokens)
    for row, (length, queries) in enumerate(zip(case.lengths, case.observers, strict=True)):
        close(case.observed[row].sum(-1) / queries, 1, case.dtype, case.tokens)
        assert not case.observed[row, :, length:].any()


def test_window_scores_at_any_positions(small_blocks):
    q, k = normal(0, 2, 4, 6, 8), normal(1, 2, 75, 2, 8)
    # The first row's query at 40 is past its 30 tokens: it sees those alone.
    positions, lengths = np.array([[40, -1, 3, 40], [-1, -1, -1, 70]]), [30, 71]
    sums = compiled(window_scores)(q, jnp.array(positions), k, jnp.array(lengths))
    _, _, p = oracle(q, k, k, causal(positions, 75, lengths, None))
    close(sums, p.sum(2), q.dtype, 75)
    close(sums.sum(-1), np.repeat([[3], [1]], 6, axis=1), q.dtype, 75)


@pytest.mark.parametrize("window", [None, 20])
def test_padding_keys_change_nothing(small_blocks, window):
    q, k, v = (normal(seed, 2, 75, 2, 8) for seed in range(3))
    lengths = jnp.array([40, 75])
    _, lse = compiled(prefill_attention, window=window)(q, k, v, lengths)
    accumulated = compiled(accumulated_scores, window=window)
    observed = compiled(window_scores, window=window)
    padding = slice(40, None)
    dirty_q, dirty_k = poisoned(q, 0, padding), poisoned(k, 0, padding)
    dirty_lse = poisoned(lse, 0, slice(None), padding)
    np.testing.assert_array_equal(
        accumulated(dirty_q, dirty_k, dirty_lse, lengths), accumulated(q, k, lse, lengths)
    )
    positions = jnp.array([[38, 39], [-1, 74]])
    recent = np.stack([q[0, 38:40], q[1, 73:75]])
    np.testing.assert_array_equal(
        observed(poisoned(recent, 1, 0), positions, dirty_k, lengths),
        observed(recent, positions, k, lengths),
    )


def temporaries(function, *shapes) -> int:
    """Bytes that the compiled function needs beside its arguments and results."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_nothing_is_tokens_by_tokens():
    tokens, heads = 2048, 4
    q, k = ((1, tokens, heads, 16), "float32"), ((1, tokens, 2, 16), "float32")
    lengths, lse = ((1,), "int32"), ((1, heads, tokens), "float32")
    limit = heads * tokens * tokens * 4 // 16  # a sixteenth of one matrix of scores
    assert temporaries(prefill_attention, q, k, k, lengths) < limit
    assert temporaries(accumulated_scores, q, k, lse, lengths) < limit

    def matrix(q, k, v):
        scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2))
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), jnp.repeat(v, 2, axis=2))

    assert temporaries(matrix, q, k, k) > 16 * limit  # the yardstick itself can fail


# --------------------------------------------------------------------------- decode
def segment(batch, slots, kv_heads, width, dtype="float32"):
    k, v = (normal(seed, batch, kv_heads, slots, width, dtype=dtype) for seed in (1, 2))
    return k, v, np.random.default_rng(0).random((batch, kv_heads, slots)) < 0.7


def decode_oracle(q, k, v, seen):
    """Per KV head, since heads see different slots; `seen` is `[B, K, T, S]`."""
    group = q.shape[2] // k.shape[1]
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        rows = (x[:, head, :, None] for x in (k, v))
        part, part_lse, _ = oracle(q[:, :, mine], *rows, seen[:, head])
        out[:, :, mine], lse[:, :, mine] = part, part_lse.transpose(0, 2, 1)
    return out, lse


@pytest.mark.parametrize(
    ("tokens", "slots", "heads", "kv_heads", "width", "dtype"),
    [
        (1, 1, 2, 2, 8, "float32"),
        (1, 37, 6, 2, 10, "float32"),
        (5, 64, 3, 3, 16, "float32"),
        (3, 37, 4, 1, 16, "bfloat16"),
    ],
)
def test_decode_matches_numpy(tokens, slots, heads, kv_heads, width, dtype):
    q = normal(9, 2, tokens, heads, width, dtype=dtype)
    k, v, filled = segment(2, slots, kv_heads, width, dtype)
    visible = np.random.default_rng(3).random((2, kv_heads, tokens, slots)) < 0.8
    out, lse = compiled(decode_attention)(q, k, v, filled, visible)
    expected, expected_lse = decode_oracle(q, k, v, filled[:, :, None] & visible)
    assert (out.dtype, lse.dtype) == (np.float32, np.float32)
    close(out, expected, q.dtype, slots)
    close(lse, expected_lse, q.dtype, slots)


def test_unfilled_slots_may_hold_anything():
    q, (k, v, filled) = normal(9, 2, 3, 4, 8), segment(2, 20, 2, 8)
    visible = np.ones((1, 1, 3, 20), bool)
    attend = compiled(decode_attention)
    clean = attend(q, k, v, filled, visible)
    for poison in (np.nan, np.inf):
        dirty = (np.where(filled[..., None], x, x.dtype.type(poison)) for x in (k, v))
        for a, b in zip(attend(q, *dirty, filled, visible), clean, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_query_that_sees_nothing():
    q, (k, v, _) = normal(9, 1, 2, 4, 8), segment(1, 20, 2, 8)
    nothing, everything = np.zeros((1, 1, 20), bool), np.ones((1, 1, 20), bool)
    visible = np.stack([nothing, everything], axis=2)  # the second query sees all
    attend, join = compiled(decode_attention), compiled(merge)
    out, lse = attend(q, k, v, everything, visible)
    assert not out[:, 0].any()
    assert (lse[:, 0] == -np.inf).all()
    assert np.isfinite(lse[:, 1]).all()
    empty = attend(q, np.full_like(k, np.nan), np.full_like(v, np.nan), nothing, visible)
    assert not join([empty, empty]).any()
    np.testing.assert_array_equal(join([empty, (out, lse)]), out)


@pytest.mark.parametrize("cuts", [(20,), (1, 30)])
def test_merge_is_attention_over_the_concatenation(cuts):
    q, (k, v, filled) = 5 * normal(9, 2, 3, 4, 8), segment(2, 37, 2, 8)
    visible = np.broadcast_to(np.arange(37) < 33, (1, 1, 3, 37))

    def in_parts(q, k, v, filled, visible):
        spans = itertools.starmap(slice, itertools.pairwise([0, *cuts, 37]))
        held = ((k[:, :, s], v[:, :, s], filled[:, :, s], visible[..., s]) for s in spans)
        return merge([decode_attention(q, *part) for part in held])

    expected, lse = decode_oracle(q, k, v, filled[:, :, None] & visible)
    scale = max(1, np.abs(lse).max())
    close(compiled(in_parts)(q, k, v, filled, visible), expected, q.dtype, 37, scale)


def test_decode_refuses_heads_that_do_not_group():
    q, (k, v, filled) = np.zeros((1, 1, 3, 8), np.float32), segment(1, 5, 2, 8)
    with pytest.raises(ValueError, match=r"^k has 2 heads, expected a divisor of q's 3$"):
        decode_attention(*map(jnp.asarray, (q, k, v, filled, filled[:, :, None])))
