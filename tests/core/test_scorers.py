"""Scorers against float64 numpy written from the papers, numbers by hand, padding and rows."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import probe_of

from kvjax.compression import scorers as scorers
from kvjax.compression.compress import choose
from kvjax.compression.row_budgets import Rows, largest, make_rows
from kvjax.compression.scorers import SCORERS, ScorerInput
from kvjax.config import CompressionConfig
from kvjax.model_interface import Probe

B, T, W, N, K, H = 4, 24, 4, 6, 2, 8
G = N // K
LENGTHS = (24, 9, 17, 1)
KEY = jax.random.key(3)
SCORING = [name for name in SCORERS if name != "none"]
choose_ = jax.jit(choose, static_argnames=("config", "window"))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def configured(scorer: str, **settings) -> CompressionConfig:
    return CompressionConfig(**({"budget": 8, "scorer": scorer, "sinks": 2} | settings))


@partial(jax.jit, static_argnames=("config", "window"))
def scored(probe, keys, values, rows, key, config, window):
    return scorers.score(ScorerInput(probe, keys, values, rows, config, key, window))


def score(config, probe, keys, values=None, rows=None, lengths=None, key=KEY, window=None):
    """Of whole rows unless lengths say otherwise, each with the budget that its length gives it."""
    keys = jnp.asarray(keys)
    values = keys if values is None else jnp.asarray(values)
    lengths = [keys.shape[1]] * len(keys) if lengths is None else lengths
    rows = make_rows(config, jnp.asarray(lengths)) if rows is None else rows
    return np.asarray(scored(probe, keys, values, rows, key, config, window))


def rows_of(n: int, **numbers: int) -> Rows:
    fields = {"lengths": n, "base": n, "window": 1, "sinks": 0, "recent": 1} | numbers
    return Rows(**{name: jnp.asarray([value], jnp.int32) for name, value in fields.items()})


def doubles(*arrays) -> list[np.ndarray]:
    return [np.asarray(array, np.float64) for array in arrays]


def case(seed: int = 0):
    """A probe with everything, keys and values of the ragged batch."""
    return probe_of(seed, B, T, N, K, H, W), normal(50, B, T, K, H), normal(51, B, T, K, H)


# --------------------------------------------------------------------------- attention seen
def probabilities(q_NH, k_TKH, position: int, window: int | None) -> np.ndarray:
    """`[N, T]`: the softmax of one query of each head over the keys that it sees."""
    p_NT = np.zeros((len(q_NH), len(k_TKH)))
    first = 0 if window is None else max(0, position - window + 1)
    for head, q_H in enumerate(q_NH):
        logits = k_TKH[first : position + 1, head // (len(q_NH) // k_TKH.shape[1])] @ q_H
        exps = np.exp(logits / np.sqrt(len(q_H)))
        p_NT[head, first : position + 1] = exps / exps.sum()
    return p_NT


def l2_window_oracle(q_WNH, k_TKH, n: int, observed: int, reach: int, window=None) -> np.ndarray:
    """KV-Compress: sum over the group of smooth(sum over queries of A^2), before the window."""
    squares_NT = np.zeros((N, T))
    for back in range(1, observed + 1):
        squares_NT += probabilities(q_WNH[-back], k_TKH, n - back, window) ** 2
    squares_NT[:, n - observed :] = 0
    scores_KT = np.zeros((K, T))
    for head, i in np.ndindex(N, n - observed):
        scores_KT[head // G, i] += squares_NT[head, max(0, i - reach) : i + reach + 1].max()
    return scores_KT


@pytest.mark.parametrize("window", [None, 7])
def test_l2_window_matches_numpy(window):
    config, (probe, keys, _) = configured("l2-window", kernel=5), case()
    scores = score(config, probe, keys, lengths=LENGTHS, window=window)
    q_BWNH, k_BTKH = doubles(probe.queries, keys)
    for row, (n, observed) in enumerate(zip(LENGTHS, (4, 4, 4, 0), strict=True)):
        expected = l2_window_oracle(q_BWNH[row], k_BTKH[row], n, observed, 2, window)
        np.testing.assert_allclose(scores[row], expected, rtol=2e-5, atol=1e-7)


# Keys whose attention under q = 1 and q = -1 is in ratios of 1 2 3 4, and of their inverses.
COUNTING = np.log(np.arange(1.0, 5)).astype(np.float32).reshape(1, 4, 1, 1)


def counting_scores(config, queries):
    """Of one KV head of width 1, one row of 4 tokens that observes 2; `queries` is `[N]`."""
    probe = Probe(queries=jnp.tile(jnp.asarray(queries)[:, None], (1, 2, 1, 1)))
    return score(config, probe, COUNTING, rows=rows_of(4, window=2))[0, 0]


def test_l2_window_by_hand():
    # q = 1: 1/6 2/6 3/6 and then 1/10 .. 4/10. q = -1: 6/11 3/11 2/11 and then 12/25 6/25 ..
    up = np.array([1 / 36 + 1 / 100, 4 / 36 + 4 / 100])
    down = np.array([36 / 121 + 144 / 625, 9 / 121 + 36 / 625])
    plain, pooled = configured("l2-window", pooling="none"), configured("l2-window", kernel=3)
    for queries, expected in (([1.0], up), ([-1.0], down), ([1.0, -1.0], up + down)):
        scores = counting_scores(plain, queries)
        np.testing.assert_allclose(scores, [*expected, 0, 0], rtol=1e-5)
    # The metric that decoding goes on adding to: the window's own entries have theirs, too.
    whole = counting_scores(configured("squared-sum", pooling="none"), [1.0])
    np.testing.assert_allclose(whole, [*up, 9 / 36 + 9 / 100, 16 / 100], rtol=1e-5)
    # Pooled before the group's sum: each head's best counts, though they lie apart.
    most = up[1] + down[0]
    np.testing.assert_allclose(counting_scores(pooled, [1.0, -1.0]), [most, most, 0, 0], rtol=1e-5)


def test_tova_is_the_mean_over_heads_of_the_last_query():
    config, (probe, keys, _) = configured("tova", heads="shared"), case()
    scores = score(config, probe, keys, lengths=LENGTHS)
    q_BWNH, k_BTKH = doubles(probe.queries, keys)
    for row, n in enumerate(LENGTHS):
        p_NT = probabilities(q_BWNH[row, -1], k_BTKH[row], n - 1, None)
        p_NT[:, n - 1 :] = 0  # the last token itself is always kept
        group_KT = p_NT.reshape(K, G, T).mean(1)
        np.testing.assert_allclose(scores[row], group_KT, rtol=2e-5, atol=1e-7)
        np.testing.assert_allclose(scores[row].mean(0), p_NT.mean(0), rtol=2e-5, atol=1e-7)


def test_tova_by_hand():
    # Of the last query alone: (1/10 + 12/25) / 2, (2/10 + 6/25) / 2, (3/10 + 4/25) / 2.
    queries = jnp.array([[[[100.0], [7.0]], [[1.0], [-1.0]]]])
    scores = score(configured("tova"), Probe(queries=queries), COUNTING)
    np.testing.assert_allclose(scores[0, 0], [0.29, 0.22, 0.23, 0], rtol=1e-5)


# --------------------------------------------------------------------------- attention expected
def expected_oracle(mean_NH, cov_NHH, k_TKH, v_TKH, n: int, sinks: int) -> np.ndarray:
    """|v_i| times the group's mean of z_i / sum z, z = exp(m.k / sqrt(H) + k'Ck / 2H)."""
    tokens, kv_heads, width = k_TKH.shape
    scores_KT = np.zeros((kv_heads, tokens))
    group = len(mean_NH) // kv_heads
    for head, (mean_H, cov_HH) in enumerate(zip(mean_NH, cov_NHH, strict=True)):
        k_SH, v_SH = (x_TKH[sinks:n, head // group] for x_TKH in (k_TKH, v_TKH))
        square_S = np.einsum("si,ij,sj->s", k_SH, cov_HH, k_SH)
        z_S = np.exp(k_SH @ mean_H / np.sqrt(width) + square_S / (2 * width))
        part_S = z_S / z_S.sum() * np.linalg.norm(v_SH, axis=-1)
        scores_KT[head // group, sinks:n] += part_S / group
    return scores_KT


def test_expected_attention_matches_numpy():
    config, (probe, keys, values) = configured("expected-attention"), case()
    scores = score(config, probe, keys, values, lengths=LENGTHS)
    arrays = doubles(probe.future_mean, probe.future_cov, keys, values)
    for row, (n, sinks) in enumerate(zip(LENGTHS, (2, 2, 2, 1), strict=True)):
        expected = expected_oracle(*(x[row] for x in arrays), n, sinks)
        np.testing.assert_allclose(scores[row], expected, rtol=5e-5, atol=1e-8)


@pytest.mark.parametrize("tokens", [2048, 1500])
def test_expected_attention_of_a_long_prompt(tokens):
    """In blocks where they divide the bucket, and whole where they do not."""
    probe, keys, values = probe_of(1, 1, tokens, 2, 1, 4, 1), *normal(2, 2, 1, tokens, 1, 4)
    n = tokens - 100
    scores = score(configured("expected-attention"), probe, keys, values, lengths=[n])
    arrays = doubles(probe.future_mean, probe.future_cov, keys, values)
    expected = expected_oracle(*(x[0] for x in arrays), n, 2)
    np.testing.assert_allclose(scores[0], expected, rtol=1e-4, atol=1e-9)


def test_expected_attention_by_hand():
    # H = 4: m.k / 2 = x ln 2 and k'Ck / 8 = x^2 ln 2, so z = 2^(x + x^2) = 1, 4, 64 of x = 0, 1, 2.
    keys, values = np.zeros((2, 1, 3, 1, 4), np.float32)
    keys[0, :, 0, 0], values[0, :, 0, 1] = [0, 1, 2], [1, -2, 3]
    mean, cov = np.zeros((1, 1, 4), np.float32), np.zeros((1, 1, 4, 4), np.float32)
    mean[..., 0], cov[..., 0, 0] = 2 * np.log(2), 8 * np.log(2)
    probe, config = Probe(future_mean=mean, future_cov=cov), configured("expected-attention")
    scores = partial(score, config, probe, keys, values)
    np.testing.assert_allclose(scores(rows=rows_of(3))[0, 0], [1 / 69, 8 / 69, 192 / 69], rtol=1e-5)
    # Epsilon: values alone count, 1, 2 and 3 times it; a sink stays 0.
    more = score(replace(config, epsilon=0.5), probe, keys, values, rows=rows_of(3, sinks=1))[0, 0]
    np.testing.assert_allclose(more, [0, 8 / 68 + 1, 192 / 68 + 1.5], rtol=1e-5)
    one_sink = scores(rows=rows_of(3, sinks=1))[0, 0]
    np.testing.assert_allclose(one_sink, [0, 8 / 68, 192 / 68], rtol=1e-5)
    # What a sliding layer no longer sees is not expected to be seen: the next token sees two back.
    sliding = score(config, probe, keys, values, rows=rows_of(3), window=3)[0, 0]
    np.testing.assert_allclose(sliding, [0, 8 / 68, 192 / 68], rtol=1e-5)
    # A second query head of the group that expects nothing: 1/3 each.
    both = Probe(*[None] * 2, np.repeat(mean, 2, 1) * [[1], [0]], np.repeat(cov, 2, 1))
    both = both.replace(future_cov=both.future_cov * np.array([1, 0])[:, None, None])
    scores = score(config, jax.tree.map(jnp.float32, both), keys, values, rows=rows_of(3))[0, 0]
    expected = np.array([1 / 69 + 1 / 3, 8 / 69 + 2 / 3, 192 / 69 + 1]) / 2
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


# --------------------------------------------------------------------------- keys alone
def test_key_norm():
    keys = np.array([[[3, 4], [0, 1], [0.5, 0], [0, 2]]], np.float32)[:, :, None]
    np.testing.assert_allclose(score(configured("key-norm"), Probe(), keys)[0, 0], [0.2, 1, 2, 0.5])
    keys = normal(5, B, T, K, H)
    scores = score(configured("key-norm"), Probe(), keys, lengths=LENGTHS)
    for row, n in enumerate(LENGTHS):
        norms = np.linalg.norm(keys[row, :n].astype(np.float64), axis=-1).T
        np.testing.assert_allclose(scores[row, :, :n], 1 / norms, rtol=1e-6)
    # A key of nothing but zeros is the best there is, and not NaN.
    keys[0, 3] = 0
    scores = score(configured("key-norm"), Probe(), keys, lengths=LENGTHS)
    assert np.isfinite(scores).all()
    assert (scores[0].argmax(-1) == 3).all()


def test_key_diff_by_hand():
    # Units (1, 0) (1, 0) (0, 1), their mean (2, 1) / 3: cosines 2, 2 and 1 over the root of 5.
    keys = np.array([[[1, 0], [2, 0], [0, 3]]], np.float32)[:, :, None]
    expected = 1 - np.array([2, 2, 1]) / np.sqrt(5)
    scores = score(configured("key-diff"), Probe(), keys)[0, 0]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    opposite = np.array([[[1, 0], [1, 0], [-7, 0]]], np.float32)[:, :, None]
    scores = score(configured("key-diff"), Probe(), opposite)[0, 0]
    np.testing.assert_allclose(scores, [0, 0, 2], atol=1e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_key_diff_matches_numpy(window):
    keys = normal(6, B, T, K, H)
    scores = score(configured("key-diff"), Probe(), keys, lengths=LENGTHS, window=window)
    for row, n in enumerate(LENGTHS):
        first = 0 if window is None else max(0, n - window + 1)
        for head in range(K):
            k_SH = keys[row, first:n, head].astype(np.float64)
            norm_S = np.linalg.norm(k_SH, axis=-1)
            anchor_H = (k_SH / norm_S[:, None]).mean(0)
            cosine_S = k_SH @ anchor_H / (norm_S * np.linalg.norm(anchor_H))
            np.testing.assert_allclose(scores[row, head, first:n], 1 - cosine_S, atol=1e-6)


# --------------------------------------------------------------------------- what does not matter
@pytest.mark.parametrize("scorer", SCORING)
def test_only_expected_attention_looks_at_values(scorer):
    config, (probe, keys, values) = configured(scorer), case()
    scores = partial(score, config, probe, keys, lengths=LENGTHS)
    before, fourfold, others = scores(values), scores(4 * values), scores(values[::-1])
    if scorer == "expected-attention":
        np.testing.assert_array_equal(fourfold, 4 * before)  # a power of two: exactly
        assert (others != before)[:3].any((1, 2)).all()
    else:
        np.testing.assert_array_equal(fourfold, before)
        np.testing.assert_array_equal(others, before)


@pytest.mark.parametrize("scorer", ["window", "l2-window", "tova", "expected-attention"])
def test_queries_and_keys_of_another_scale(scorer):
    """What the keys lose the queries gain: the same logits, so the same attention."""
    config, (probe, keys, values) = configured(scorer), case()
    before = score(config, probe, keys, values, lengths=LENGTHS)
    doubled = probe.replace(
        queries=2 * probe.queries,
        future_mean=2 * probe.future_mean,
        future_cov=4 * probe.future_cov,
    )
    np.testing.assert_array_equal(score(config, doubled, keys / 2, values, lengths=LENGTHS), before)
    assert (score(config, doubled, keys, values, lengths=LENGTHS) != before)[0].any()


def test_keys_of_another_scale():
    keys = normal(7, 1, T, K, H)
    each = keys * 2.0 ** np.random.default_rng(8).integers(-3, 4, (1, T, K, 1)).astype(np.float32)
    diff, norm = (partial(score, configured(name), Probe()) for name in ("key-diff", "key-norm"))
    np.testing.assert_allclose(diff(each), diff(keys), atol=1e-6)
    np.testing.assert_array_equal(norm(4 * keys), norm(keys) / 4)
    np.testing.assert_array_equal(norm(3 * keys).argsort(), norm(keys).argsort())
    assert (norm(each).argsort() != norm(keys).argsort()).any()


@pytest.mark.parametrize("scorer", [name for name in SCORING if name != "random"])
def test_kv_heads_are_scored_apart(scorer):
    """The other order of KV heads with their query heads: the other order of scores."""
    config, (probe, keys, values) = configured(scorer), case()
    heads = np.r_[G:N, :G]
    turned = Probe(
        queries=probe.queries[:, :, heads],
        column_sums=probe.column_sums[:, heads],
        future_mean=probe.future_mean[:, heads],
        future_cov=probe.future_cov[:, heads],
        reconstruction=probe.reconstruction[:, ::-1],
    )
    before = score(config, probe, keys, values, lengths=LENGTHS)
    after = score(config, turned, keys[:, :, ::-1], values[:, :, ::-1], lengths=LENGTHS)
    np.testing.assert_allclose(after[:, ::-1], before, rtol=1e-6)


# --------------------------------------------------------------------------- chunks
def test_chunks_by_hand():
    # The sink (9) and the recent one (7) do not count: means 2 (of 1 and 3), 4 and 5.
    raw = jnp.array([[[9.0, 1, 3, 2, 6, 4, 5, 7]]])
    config, rows = configured("kvzip", chunk=3), rows_of(8, base=4, sinks=1)
    scores = score(config, Probe(reconstruction=raw), np.ones((1, 8, 1, 2)), rows=rows)
    np.testing.assert_allclose(scores[0, 0, 1:7], [2, 2, 4, 4, 4, 5], rtol=1e-6)
    keep = choose_(jnp.asarray(scores), rows.base, rows, config, None)  # two more than 0 and 7
    assert np.flatnonzero(keep[0, 0]).tolist() == [0, 3, 6, 7]


@pytest.mark.parametrize("size", [3, 5, 100])
@pytest.mark.parametrize("window", [None, 12])
def test_chunks_match_numpy(size, window):
    config = configured("kvzip", budget=12, chunk=size, recent=2)
    raw = np.random.default_rng(9).random((B, K, T)).astype(np.float32)
    probe, keys = Probe(reconstruction=raw), normal(10, B, T, K, H)
    scores = score(config, probe, keys, lengths=LENGTHS, window=window)
    rows = make_rows(config, jnp.array(LENGTHS))
    keep = np.asarray(choose_(jnp.asarray(scores), rows.base - 2, rows, config, window))
    for row, head in np.ndindex(B, K):
        n, sinks, recent = LENGTHS[row], int(rows.sinks[row]), int(rows.recent[row])
        first = sinks if window is None else max(sinks, n - window + 1)
        kept_of_chunks = []
        for start in range(0, T, size):
            mine = [p for p in range(start, start + size) if first <= p < n - recent]
            mean = raw[row, head, mine].astype(np.float64).mean() if mine else 0
            np.testing.assert_allclose(scores[row, head, mine], mean, rtol=1e-6)
            kept_of_chunks.append(keep[row, head, mine].tolist())
        cut = [kept for kept in kept_of_chunks if len(set(kept)) == 2]
        assert len(cut) <= 1
        assert all(kept == sorted(kept, reverse=True) for kept in cut)  # its front is kept


# --------------------------------------------------------------------------- padding and rows
def poisoned(probe: Probe, keys, values, rows: Rows):
    """NaN wherever a row has nothing: behind its last token, and before its observed queries."""
    padding_BT = np.arange(T) >= np.array(LENGTHS)[:, None]
    unseen_BW = np.arange(W, 0, -1) > np.asarray(rows.window)[:, None]

    def per_entry(x_BXT):
        return np.where(padding_BT[:, None], np.nan, x_BXT)

    probe = probe.replace(
        queries=np.where(unseen_BW[..., None, None], np.nan, probe.queries),
        column_sums=per_entry(probe.column_sums),
        output_norms=per_entry(probe.output_norms),
        reconstruction=per_entry(probe.reconstruction),
    )
    return probe, *(np.where(padding_BT[..., None, None], np.nan, x) for x in (keys, values))


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("scorer", SCORING)
def test_padding_changes_nothing(scorer, chunk):
    config, arrays = configured(scorer, chunk=chunk, recent=3), case()
    rows = make_rows(config, jnp.array(LENGTHS))
    probe, keys, values = poisoned(*arrays, rows)
    scores = score(config, probe, keys, values, rows, key=jax.random.split(KEY, B))
    clean = score(config, *arrays, rows, key=jax.random.split(KEY, B))
    np.testing.assert_array_equal(scores, clean)
    assert (scores.shape, scores.dtype) == ((B, K, T), np.float32)
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
    assert (scores[:3].max((1, 2)) > 0).all()
    assert not scores[np.arange(T) >= np.array(LENGTHS)[:, None, None] + np.zeros((K, 1))].any()


@pytest.mark.parametrize("scorer", SCORING)
def test_a_row_alone_is_the_row_in_a_ragged_batch(scorer):
    """In the batch's bucket and in one of its own length; sums in another order differ by ulps."""
    config, arrays, keys_of_rows = configured(scorer), case(), jax.random.split(KEY, B)
    rows = make_rows(config, jnp.array(LENGTHS))
    scores = score(config, *arrays, rows, key=keys_of_rows)
    row, n = 2, LENGTHS[2]
    probe, keys, values = jax.tree.map(lambda x: x[row : row + 1], arrays)
    alone = make_rows(config, jnp.array([n]))
    same = score(config, probe, keys, values, alone, key=keys_of_rows[row])
    np.testing.assert_allclose(same[0], scores[row], rtol=1e-6, atol=1e-9)
    per_entry = ("column_sums", "output_norms", "reconstruction")
    short = probe.replace(**{name: getattr(probe, name)[..., :n] for name in per_entry})
    cut = score(config, short, keys[:, :n], values[:, :n], alone, key=keys_of_rows[row])
    np.testing.assert_allclose(cut[0], scores[row, :, :n], rtol=2e-6, atol=1e-9)
    if scorer not in ("positional", "random"):  # those do not know a row's contents
        assert (same[0, :, :9] != scores[1, :, :9]).any()


def test_what_the_scorers_read_by_default():
    windowed = [name for name in SCORING if SCORERS[name].question]
    assert [name for name in SCORING if SCORERS[name].reads == ("queries",)] == windowed
    assert {name: largest(configured(name, budget=99), 200).window for name in windowed} == {
        "window": 32,
        "l2-window": 8,
        "squared-sum": 8,
        "tova": 1,
    }
