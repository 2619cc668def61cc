"""Scorers: numbers by hand, SnapKV's scores from numpy, and what padding and masks may change."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.compression import scorers as scorers
from kvjax.compression.row_budgets import Rows
from kvjax.compression.scorers import ScorerInput, over_group, smooth
from kvjax.config import CompressionConfig
from kvjax.model_interface import Probe

KEY = jax.random.key(3)
# Compile time is all that these tests cost.
compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(compiled, static_argnames=("config", "window"))
def scored(probe, keys, values, rows, key, *, config, window):
    return scorers.score(ScorerInput(probe, keys, values, rows, config, key, window))


def score(queries, sums, keys, rows, config, key, window, values=None, **probe):
    probe = Probe(queries=queries, column_sums=sums, **probe)
    values = keys if values is None else values
    return scored(probe, keys, values, rows, key, config=config, window=window)


def rows_of(lengths, windows) -> Rows:
    lengths, windows = jnp.array(lengths, jnp.int32), jnp.array(windows, jnp.int32)
    zeros = jnp.zeros_like(lengths)
    return Rows(lengths=lengths, base=windows + 1, window=windows, sinks=zeros, recent=windows)


def configured(scorer="window", **settings) -> CompressionConfig:
    return CompressionConfig(budget=8, scorer=scorer, **settings)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------- pooling
def test_pooling_by_hand():
    # V5: of 1 0 0 with kernel 3, zero padding divides by 3 at the edge too: 1/3 1/3 0.
    raw = jnp.array([[[1.0, 0.0, 0.0]]])
    np.testing.assert_allclose(smooth(raw, "average", 3)[0, 0], [1 / 3, 1 / 3, 0], rtol=1e-6)
    np.testing.assert_array_equal(smooth(raw, "max", 3)[0, 0], [1, 1, 0])
    for same in (smooth(raw, "none", 3), smooth(raw, "max", 1), smooth(raw, "average", 1)):
        np.testing.assert_array_equal(same, raw)
    # Kernel 5 over 6 0 3 0 0 9 1: sums of up to five neighbours over 5, and their maxima.
    raw = jnp.array([[[6.0, 0, 3, 0, 0, 9, 1]]])
    average = [9 / 5, 9 / 5, 9 / 5, 12 / 5, 13 / 5, 10 / 5, 10 / 5]
    np.testing.assert_allclose(smooth(raw, "average", 5)[0, 0], average, rtol=1e-6)
    np.testing.assert_array_equal(smooth(raw, "max", 5)[0, 0], [6, 6, 6, 9, 9, 9, 9])


@pytest.mark.parametrize("how", ["max", "average"])
@pytest.mark.parametrize(("tokens", "kernel"), [(20, 7), (3, 7), (1, 3)])
def test_pooling_matches_numpy(how, tokens, kernel):
    raw = np.abs(normal(0, 2, 3, tokens))
    expected = np.zeros_like(raw)
    for i in range(tokens):
        near = raw[..., max(0, i - kernel // 2) : i + kernel // 2 + 1]
        expected[..., i] = near.max(-1) if how == "max" else near.sum(-1) / kernel
    np.testing.assert_allclose(smooth(jnp.array(raw), how, kernel), expected, rtol=1e-6)


def test_group_by_hand():
    # Four query heads, two KV heads: heads 0 and 1 share the first.
    sums = jnp.array([[[1.0, 4.0], [3.0, 0.0], [5.0, 5.0], [5.0, 9.0]]])
    np.testing.assert_array_equal(over_group(sums, 2, "mean"), [[[2, 2], [5, 7]]])
    np.testing.assert_array_equal(over_group(sums, 2, "max"), [[[3, 4], [5, 9]]])
    np.testing.assert_array_equal(over_group(sums, 4, "max"), sums)


# --------------------------------------------------------------------------- window
def test_window_scores_by_hand():
    # V6: n = 4 keys, w = 2. H = 1, so scores are q * k; keys are ln 1, ln 2, ln 3, ln 4, q = 1.
    # Query 2 sees keys 0..2: 1/6 2/6 3/6. Query 3 sees all: 1/10 2/10 3/10 4/10.
    keys = jnp.log(jnp.array([1.0, 2, 3, 4])).reshape(1, 4, 1, 1)
    queries = jnp.ones((1, 2, 1, 1))
    settings = {"pooling": "none", "window": 2}

    def scores(reduce):
        config = configured(reduce=reduce, **settings)
        return score(queries, None, keys, rows_of([4], [2]), config, KEY, None)[0, 0]

    # Columns 2 and 3 are the window's own: dropped after the softmax.
    kept = np.array([1 / 6 + 1 / 10, 2 / 6 + 2 / 10, 0, 0])
    np.testing.assert_allclose(scores("sum"), kept, rtol=1e-5)
    np.testing.assert_allclose(scores("mean"), kept / 2, rtol=1e-5)
    assert float(scores("mean").sum()) < 1  # (3/6 + 3/10) / 2: rows do not renormalise
    np.testing.assert_allclose(scores("mean").sum(), 0.4, rtol=1e-5)


def snapkv(queries, keys, length, observed, config, window):
    """One row in float64, query by query: `[K, T]` scores, padding included."""
    tokens, kv_heads, width = keys.shape
    heads = queries.shape[1]
    raw = np.zeros((heads, length - observed))
    for back in range(1, observed + 1):
        position = length - back
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            k = keys[first : position + 1, head // (heads // kv_heads)].astype(np.float64)
            p = np.exp(k @ queries[-back, head].astype(np.float64) / math.sqrt(width))
            whole = np.zeros(length)
            whole[first : position + 1] = p / p.sum()
            raw[head] += whole[: length - observed]
    if config.reduce == "mean":
        raw /= observed
    grouped = raw.reshape(kv_heads, -1, length - observed)
    grouped = grouped.max(1) if config.group == "max" else grouped.mean(1)
    scores = np.zeros((kv_heads, tokens))
    reach = config.kernel // 2
    for i in range(length - observed):
        near = grouped[:, max(0, i - reach) : i + reach + 1]
        pooled = {"max": near.max(-1), "average": near.sum(-1) / config.kernel}
        scores[:, i] = pooled.get(config.pooling, grouped[:, i])
    return scores


@pytest.mark.parametrize(
    ("settings", "kv_heads", "window"),
    [
        ({}, 2, None),
        ({"reduce": "sum", "group": "max"}, 1, None),
        ({"pooling": "average", "kernel": 5}, 4, None),
        ({"pooling": "none", "group": "max"}, 2, 9),
    ],
)
def test_window_scores_match_numpy(settings, kv_heads, window):
    # Rows of 30, 9 and 21 tokens that observe their last 4, 2 and 3 of the 4 queries handed in.
    lengths, observed = [30, 9, 21], [4, 2, 3]
    queries, keys = normal(0, 3, 4, 4, 10), normal(1, 3, 30, kv_heads, 10)
    config, rows = configured(**settings), rows_of(lengths, observed)
    scores = score(jnp.array(queries), None, jnp.array(keys), rows, config, KEY, window)
    assert (scores.shape, scores.dtype) == ((3, kv_heads, 30), jnp.float32)
    for row in range(3):
        expected = snapkv(queries[row], keys[row], lengths[row], observed[row], config, window)
        np.testing.assert_allclose(scores[row], expected, rtol=2e-5, atol=1e-6)


def test_pooling_does_not_reach_into_the_window_or_the_padding():
    # The window's own columns, at 24..27, draw nearly everything; the padding holds NaN.
    keys = normal(1, 1, 32, 1, 8)
    queries = np.ones((1, 4, 1, 8), np.float32)
    keys[0, 24:28], keys[0, 28:] = 5.0, np.nan
    config = configured(kernel=7, pooling="max", reduce="sum")
    arguments = jnp.array(queries), None, jnp.array(keys), rows_of([28], [4]), config, KEY, None
    scores = np.asarray(score(*arguments))
    assert np.isfinite(scores).all()
    assert (scores[0, 0, :24] > 0).all()
    assert scores[0, 0, :24].max() < 1e-3
    assert not scores[0, 0, 24:].any()


def test_observed_queries_are_the_last_ones():
    # A row with a window of 2 ignores the older queries that were handed in beside them.
    queries, keys = normal(0, 1, 4, 2, 8), jnp.array(normal(1, 1, 20, 2, 8))
    rows, config = rows_of([20], [2]), configured()
    expected = score(jnp.array(queries[:, 2:]), None, keys, rows, config, KEY, None)
    queries[:, :2] = np.nan
    scores = score(jnp.array(queries), None, keys, rows, config, KEY, None)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


# --------------------------------------------------------------------------- the other scorers
@pytest.mark.parametrize("group", ["mean", "max"])
def test_accumulated(group):
    sums, keys = np.abs(normal(0, 2, 6, 12)), jnp.array(normal(1, 2, 12, 3, 8))
    sums[1, :, 7:] = np.nan
    config, rows = configured("accumulated", group=group), rows_of([12, 7], [2, 2])
    scores = np.asarray(score(None, jnp.array(sums), keys, rows, config, KEY, None))
    pairs = sums.reshape(2, 3, 2, 12)
    expected = pairs.max(2) if group == "max" else pairs.mean(2)
    np.testing.assert_allclose(scores[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(scores[1, :, :7], expected[1, :, :7], rtol=1e-6)
    assert not scores[1, :, 7:].any()


def test_positional_prefers_the_latest():
    config, keys = configured("positional"), jnp.array(normal(1, 2, 6, 2, 8))
    scores = score(None, None, keys, rows_of([6, 4], [1, 1]), config, KEY, None)
    np.testing.assert_array_equal(scores[0], [[1, 2, 3, 4, 5, 6]] * 2)
    np.testing.assert_array_equal(scores[1], [[1, 2, 3, 4, 0, 0]] * 2)


def random_scores(tokens, lengths, key=KEY, kv_heads=3):
    keys, rows = (
        jnp.zeros((len(lengths), tokens, kv_heads, 4)),
        rows_of(lengths, [1] * len(lengths)),
    )
    return np.asarray(score(None, None, keys, rows, configured("random"), key, None))


def test_random_depends_on_key_and_position_alone():
    scores = random_scores(40, [40, 25])
    assert scores.dtype == np.float32
    assert ((scores >= 0) & (scores < 1)).all()
    assert not scores[1, :, 25:].any()
    np.testing.assert_array_equal(scores[0, :, :25], scores[1, :, :25])  # not on the batch
    np.testing.assert_array_equal(random_scores(64, [25])[0, :, :25], scores[1, :, :25])
    other = random_scores(40, [40], jax.random.key(4))
    for different in (other[0], np.roll(scores[0], 1, axis=0), np.roll(scores[0], 1, axis=1)):
        assert (different != scores[0]).mean() > 0.99
    two = random_scores(40, [40, 40], jax.random.split(KEY))  # a key a row
    assert (two[0] != two[1]).mean() > 0.99
    np.testing.assert_array_equal(two[1], random_scores(40, [40], jax.random.split(KEY)[1])[0])
    mean = random_scores(2000, [2000]).mean()
    assert abs(mean - 0.5) < 6 / math.sqrt(12 * 6000)  # six standard errors of 6000 draws


@pytest.mark.parametrize("scorer", ["positional", "random"])
def test_a_probe_that_was_not_asked_for_is_not_read(scorer):
    keys, rows, config = jnp.array(normal(1, 1, 12, 2, 8)), rows_of([12], [2]), configured(scorer)
    queries, sums = jnp.array(normal(0, 1, 2, 4, 8)), jnp.ones((1, 4, 12))
    np.testing.assert_array_equal(
        score(queries, sums, keys, rows, config, KEY, None),
        score(None, None, keys, rows, config, KEY, None),
    )


@pytest.mark.parametrize(
    ("scorer", "missing"),
    [(name, row.reads[0]) for name, row in scorers.SCORERS.items() if row.reads],
)
def test_a_scorer_without_its_probe(scorer, missing):
    keys, rows = jnp.array(normal(1, 1, 12, 2, 8)), rows_of([12], [2])
    message = f"probe.{missing} is None, expected {missing} for scorer='{scorer}'"
    with pytest.raises(ValueError, match=message):
        score(None, None, keys, rows, configured(scorer), KEY, None)
