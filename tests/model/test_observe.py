"""What a model's attention leaves for its scorers, in float64 from its own weights; CriticalKV."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax import CompressionConfig, Probe, compress
from kvjax.compression.compress import choose
from kvjax.compression.row_budgets import Rows, make_rows
from kvjax.compression.scorers import output_aware
from kvjax.generation.prefill import prefill
from kvjax.model_interface import ProbeRequest
from kvjax.models.checkpoints.weights import load_decoder
from kvjax.models.observe import expected_queries, output_norms

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hf"
T, LENGTHS = 24, (24, 11, 17, 3)
FUTURE, SKIPPED = 6, 4
choose_ = jax.jit(choose, static_argnames=("config", "window"))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def double(array) -> np.ndarray:
    return np.asarray(array, np.float64)


# --------------------------------------------------------------------------- a model's probe
@jax.jit
def observed(model, tokens, lengths):
    """Each layer's input and what its prefill left of it."""
    request = ProbeRequest(future=FUTURE, skipped=SKIPPED, output_norms=True)
    x, found = model.embed(tokens), []
    for layer in model.layers:
        before = x
        x, _, _, probe = layer.prefill(x, lengths, request)
        found.append((before, probe))
    return found


# Biases; a norm of every query head; three query heads to a KV head.
@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama2-gqa"])
def layers(request):
    """(config, weights, input, probe) of every layer of a model, in a ragged batch."""
    model = load_decoder(FIXTURES / request.param, progress=False)
    tokens = np.random.default_rng(0).integers(3, 80, (len(LENGTHS), T)).astype(np.int32)
    found = observed(model, tokens, jnp.array(LENGTHS))
    return [(model.config, layer, x, p) for layer, (x, p) in zip(model.layers, found, strict=True)]


def normed(x, norm, config) -> np.ndarray:
    scale = double(getattr(norm, f"scale_{norm.axis}")[...])
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale


def projected(x_BTD, layer, name: str, config) -> np.ndarray:
    """Queries or values of a layer's input, before RoPE."""
    attention = layer.attention
    weight = double(getattr(attention, {"q": "q_DX", "v": "v_DY"}[name])[...])
    bias = getattr(attention, {"q": "q_bias_X", "v": "v_bias_Y"}[name])
    out = normed(double(x_BTD), layer.attention_norm, config) @ weight
    out = out if bias is None else out + double(bias[...])
    return out.reshape(*out.shape[:2], -1, config.head_dim)


def rotation(position: int, config) -> np.ndarray:
    """R(p): the matrix that turns pair (i, i + H / 2) by p theta^(-2i / H)."""
    half = config.head_dim // 2
    matrix = np.zeros((2 * half, 2 * half))
    for i in range(half):
        angle = position * config.rope_theta ** (-i / half)
        matrix[[i, i + half], [i, i + half]] = np.cos(angle)
        matrix[i, i + half], matrix[i + half, i] = -np.sin(angle), np.sin(angle)
    return matrix


def test_expected_queries_of_a_model(layers):
    """m = R mean, C = R cov R', R the mean rotation of the next positions (equations 4 and 5)."""
    for config, layer, x_BTD, probe in layers:
        q_BTNH = projected(x_BTD, layer, "q", config)
        if config.qk_norm:
            q_BTNH = normed(q_BTNH, layer.attention.q_norm, config)
        for row, n in enumerate(LENGTHS):
            turn = np.mean([rotation(n + i, config) for i in range(FUTURE)], axis=0)
            for head in range(config.num_heads):
                q_SH = q_BTNH[row, SKIPPED:n, head]  # nothing of the row of 3: all zero
                mean = turn @ q_SH.mean(0) if len(q_SH) else np.zeros(config.head_dim)
                cov = np.cov(q_SH.T, bias=True) if len(q_SH) else np.zeros((config.head_dim,) * 2)
                found = probe.future_mean[row, head], probe.future_cov[row, head]
                np.testing.assert_allclose(found[0], mean, rtol=1e-4, atol=2e-6)
                np.testing.assert_allclose(found[1], turn @ cov @ turn.T, rtol=1e-4, atol=2e-6)
                assert not len(q_SH) or np.abs(mean).max() > 1e-3


def test_output_norms_of_a_model(layers):
    """|v_i W_n|_1, the mean over the query heads n of the KV head."""
    for config, layer, x_BTD, probe in layers:
        v_BTKH = projected(x_BTD, layer, "v", config)
        o_NHD = double(layer.attention.o_XD[...]).reshape(-1, config.head_dim, config.hidden_size)
        for row, n in enumerate(LENGTHS):
            for head in range(config.num_kv_heads):
                group = o_NHD[head * config.group_size : (head + 1) * config.group_size]
                parts_GSD = v_BTKH[row, :n, head] @ group
                expected = np.abs(parts_GSD).sum(-1).mean(0)
                found = probe.output_norms[row, head, :n]
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_what_padding_holds_does_not_reach_the_expectation():
    q_BTNH, lengths = normal(1, 3, T, 4, 8), np.array([T, 9, 5])
    frequencies = jnp.array([1.0, 0.3, 0.1, 0.02])
    call = jax.jit(lambda q, n: expected_queries(q, n, frequencies, FUTURE, SKIPPED))
    clean = call(q_BTNH, lengths)
    padding = np.arange(T) >= lengths[:, None]
    unseen = padding | (np.arange(T) < SKIPPED)
    found = call(np.where(unseen[..., None, None], np.nan, q_BTNH), lengths)
    alone = call(q_BTNH[1:2], lengths[1:2])
    for with_nan, without, row in zip(found, clean, alone, strict=True):
        np.testing.assert_array_equal(with_nan, without)
        np.testing.assert_allclose(row[0], without[1], rtol=1e-5, atol=1e-6)
    assert np.abs(clean[0]).min() > 0
    assert not np.asarray(clean[1][2]).any()  # one query has no covariance


def test_expectation_by_each_rows_frequencies_and_a_factor():
    """Queries that are 1.5 times as long have a mean 1.5 and a covariance 2.25 times as large."""
    q_BTNH, lengths = jnp.asarray(normal(1, 3, T, 4, 8)), jnp.array([T, 9, 5])
    rows_BC = jnp.array([[1.0, 0.3, 0.1, 0.02], [1.0, 0.2, 0.04, 0.01], [0.9, 0.3, 0.1, 0.0]])
    call = jax.jit(expected_queries, static_argnums=(3, 4), static_argnames="factor")
    together = call(q_BTNH, lengths, rows_BC, FUTURE, SKIPPED)
    longer = call(q_BTNH, lengths, rows_BC, FUTURE, SKIPPED, factor=1.5)
    for times, found, one in zip((1.5, 2.25), longer, together, strict=True):
        np.testing.assert_allclose(found, times * np.asarray(one), rtol=1e-5, atol=1e-6)
    for row in range(3):
        mine = slice(row, row + 1)
        alone = call(q_BTNH[mine], lengths[mine], rows_BC[row], FUTURE, SKIPPED)
        for found, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(found[row], one[0], rtol=1e-5, atol=1e-6)


def test_expected_queries_by_hand():
    # Queries (9, 9), (1, 0), (3, 0): the sink left out, mean (2, 0), variance 1 along the first.
    q = jnp.array([[9.0, 9], [1, 0], [3, 0]]).reshape(1, 3, 1, 2)
    quarter = jnp.array([np.pi / 2])  # positions 3 and 4 turn by 270 and 360 degrees
    one = expected_queries(q, jnp.array([3]), quarter, 1, 1)
    np.testing.assert_allclose(one[0][0, 0], [0, -2], atol=1e-5)
    np.testing.assert_allclose(one[1][0, 0], [[0, 0], [0, 1]], atol=1e-5)
    # The mean of the two rotations takes (x, 0) to (x, -x) / 2.
    # M-RoPE has what follows one position further, or two earlier.
    for shift, turned in ((1, [2, 0]), (-2, [0, 2])):
        one = expected_queries(q, jnp.array([3]), quarter, 1, 1, jnp.array([shift]))
        np.testing.assert_allclose(one[0][0, 0], turned, atol=1e-5)
    two = expected_queries(q, jnp.array([3]), quarter, 2, 1)
    np.testing.assert_allclose(two[0][0, 0], [1, -1], atol=1e-5)
    np.testing.assert_allclose(two[1][0, 0], [[0.25, -0.25], [-0.25, 0.25]], atol=1e-5)


@pytest.mark.parametrize("tokens", [2048, 1500])
def test_output_norms_of_a_long_prompt(tokens):
    """In blocks where they divide the bucket, and whole where they do not."""
    v_BTKH, o_XD = normal(2, 2, tokens, 2, 4), normal(3, 4 * 4, 6)
    expected = np.zeros((2, 2, tokens))
    for head in range(4):
        part_BTD = double(v_BTKH[:, :, head // 2]) @ double(o_XD[4 * head : 4 * head + 4])
        expected[:, head // 2] += np.abs(part_BTD).sum(-1) / 2
    np.testing.assert_allclose(jax.jit(output_norms)(v_BTKH, o_XD), expected, rtol=1e-5)


def test_one_request_for_two():
    """Each asks for its own part of the probe, and gets the numbers that it would get alone."""
    model = load_decoder(FIXTURES / "llama2-gqa", progress=False)
    tokens = np.random.default_rng(0).integers(3, 80, (1, 16)).astype(np.int32)
    requests = ProbeRequest(future=FUTURE, skipped=SKIPPED), ProbeRequest(output_norms=True)
    run = jax.jit(prefill, static_argnums=3)
    first, second, both = (
        run(model, tokens, jnp.array([16]), request).probes[1]
        for request in (*requests, requests[1] | requests[0])
    )
    assert jax.tree.leaves(first.replace(future_mean=None, future_cov=None)) == []
    assert jax.tree.leaves(second.replace(output_norms=None)) == []
    together = first.replace(output_norms=second.output_norms)
    assert jax.tree.structure(both) == jax.tree.structure(together)
    for one, other in zip(jax.tree.leaves(both), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


# --------------------------------------------------------------------------- CriticalKV
def critical(heads="uniform", **settings) -> CompressionConfig:
    settings = {"budget": 10, "sinks": 1, "recent": 2, "floor": 0.0} | settings
    return CompressionConfig(scorer="window", heads=heads, output_aware=True, **settings)


def best(values, count: int, among) -> set[int]:
    return set(sorted(among, key=lambda i: (-values[i], i))[:count])


def critical_oracle(s_KT, norm_KT, n: int, size: int, heads: str) -> list[set[int]]:
    """Algorithm 1 of a row whose sink and last two are kept: half by A, half by (A + 1e-4) |vW|."""
    held = {0, n - 2, n - 1}
    among = set(range(n)) - held
    counts = [size - 3] * len(s_KT)
    if heads == "ada":  # a flat ranking of all heads' entries
        flat = {(h, i): s_KT[h, i] for h in range(len(s_KT)) for i in among}
        won = best(flat, sum(counts), flat)
        counts = [sum(h == head for h, _ in won) for head in range(len(s_KT))]
    kept = []
    for s_T, norm_T, count in zip(s_KT, norm_KT, counts, strict=True):
        first = best(s_T, count // 2, among)
        rest = best((s_T + 1e-4) * norm_T, count - count // 2, among - first)
        kept.append(held | first | rest)
    return kept


@pytest.mark.parametrize("heads", ["uniform", "ada"])
def test_critical_selection_matches_numpy(heads):
    lengths, kv_heads = (T, 13, 17), 3
    config = critical(heads)
    rows = make_rows(config, jnp.array(lengths))
    rng = np.random.default_rng(4)
    scores = rng.gamma(0.5, size=(3, kv_heads, T)).astype(np.float32)
    norms = rng.gamma(0.5, size=(3, kv_heads, T)).astype(np.float32)
    padded = np.arange(T) >= np.array(lengths)[:, None, None]
    poison = np.where(padded, np.nan, norms)
    masked = np.where(padded, 0, scores)
    keep = choose_(masked, rows.base, rows, config, None, poison)
    by_scores = choose_(masked, rows.base, rows, config, None)
    for row, n in enumerate(lengths):
        found = [set(np.flatnonzero(head).tolist()) for head in np.asarray(keep[row])]
        expected = critical_oracle(double(scores[row]), double(norms[row]), n, 10, heads)
        assert found == expected
        alone = Rows(**{name: x[row : row + 1] for name, x in rows.__dict__.items()})
        same = choose_(masked[row : row + 1], alone.base, alone, config, None, norms[row : row + 1])
        np.testing.assert_array_equal(same[0], keep[row])
    assert (keep != by_scores).any()
    # Values that all do as much to the output leave the choice to the scores, whatever they do.
    for level in (1e-3, 1.0, 1e3):
        even = choose_(masked, rows.base, rows, config, None, np.full_like(norms, level))
        np.testing.assert_array_equal(even, by_scores)
    # Powers of two: the products are exact, and their order stays.
    scaled = choose_(masked, rows.base, rows, config, None, 8 * norms)
    np.testing.assert_array_equal(scaled, keep)


def test_critical_selection_by_hand():
    # Five of 1..7: by score 1 and 2; of 3..7, whose products are .1 .4 .9 .8 1, the best three.
    scores = jnp.array([[[9.0, 5, 4, 1, 0.4, 0.3, 0.2, 0.1, 9, 9]]])
    norms = jnp.array([[[0.0, 0, 0, 0.1, 1, 3, 4, 10, 9, 9]]])
    config, size = critical(), jnp.array([8])
    rows = make_rows(config, jnp.array([10]))
    pick = partial(choose_, scores, size, rows, config, None)
    assert np.flatnonzero(pick(None)[0, 0]).tolist() == [0, 1, 2, 3, 4, 5, 8, 9]
    assert np.flatnonzero(pick(norms)[0, 0]).tolist() == [0, 1, 2, 5, 6, 7, 8, 9]


def test_importance_of_nothing_still_counts_its_value():
    weighed = output_aware(jnp.array([[[0.0, 0.0099, 1.0]]]), jnp.array([[[200.0, 1.0, 0.0]]]))
    np.testing.assert_allclose(weighed[0, 0], [0.02, 0.01, 0], rtol=1e-5)


def test_compress_hands_the_norms_on():
    keys, queries = normal(5, 1, T, 2, 8), normal(6, 1, 4, 4, 8)
    config = critical(budget=8, window=4, layout="padded")
    norms = jnp.zeros((1, 2, T)).at[0, 0, 9].set(1e6).at[0, 1, 14].set(1e6)
    kept = []
    for given in (norms, jnp.ones_like(norms)):
        probe = Probe(queries=jnp.asarray(queries), output_norms=given)
        cache = compress([jnp.asarray(keys)], [jnp.asarray(keys)], [probe], config)
        kept.append(np.asarray(cache.layers[0].kept_mask(T))[0])
    assert kept[0][0, 9]
    assert kept[0][1, 14]
    assert (kept[0] != kept[1]).any(-1).all()
