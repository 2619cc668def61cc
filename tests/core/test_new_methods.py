"""A scorer or an allocator of one's own: one function and one row of a table, and nothing else."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import probe_of

from kvjax import CompressionConfig, ConfigError, Probe, Recompress, compress, probe_request
from kvjax.compression import allocators, scorers
from kvjax.compression.allocators import HeadAllocator, LayerAllocator
from kvjax.compression.recompress import evict, make_room
from kvjax.compression.row_budgets import eligible, largest, protected
from kvjax.compression.scorers import Scorer
from kvjax.compression.slot_bounds import Bound, any_layer
from kvjax.model_interface import ProbeRequest

B, T, L, N, K, H = 2, 40, 3, 4, 2, 8
LENGTHS = (40, 14)
LAYOUTS = ("padded", "packed")


def row(monkeypatch, module, table: str, **rows):
    """A copy of a table with more rows, for one test."""
    monkeypatch.setattr(module, table, MappingProxyType({**getattr(module, table), **rows}))


def compressed(config: CompressionConfig, **probe):
    """What is kept `[B, L, K, T]` of random keys; entries are stored as `counts` says."""
    keys = [jax.random.normal(jax.random.key(layer), (B, T, K, H)) for layer in range(L)]
    probes = [jax.tree.map(jnp.asarray, probe_of(layer, B, T, N, K, H, T)) for layer in range(L)]
    probes = [one.replace(**probe) for one in probes]
    cache = compress(keys, keys, probes, config, lengths=jnp.array(LENGTHS))
    kept = np.asarray(cache.kept_mask(T))
    np.testing.assert_array_equal(kept.sum(-1), cache.counts)
    return kept


# ---------------------------------------------------------------------------- scorers
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scorer_by_one_row(monkeypatch, layout):
    """Importance by the longest value part, which no method goes by alone; it is asked for."""
    mine = Scorer(
        function=lambda layer: layer.read("output_norms"),
        words="norms of the values' part in the output",
        reads=("output_norms",),
        request=lambda settings, window: ProbeRequest(output_norms=True),
        window=3,
    )
    row(monkeypatch, scorers, "SCORERS", mine=mine)
    config = CompressionConfig(scorer="mine", budget=10, layout=layout)
    assert probe_request(config, T) == ProbeRequest(output_norms=True)
    assert not CompressionConfig(scorer="mine", budget=10, recent=1).uses_window
    assert largest(config, T).window == 3
    kept = compressed(config)
    for layer in range(L):
        norms = probe_of(layer, B, T, N, K, H, T).output_norms
        for i, n in enumerate(LENGTHS):
            for head in range(K):
                best = np.argsort(-norms[i, head, : n - 3])[:7]
                expected = sorted([*best, n - 3, n - 2, n - 1])
                assert np.flatnonzero(kept[i, layer, head]).tolist() == expected
    with pytest.raises(ValueError, match="probe 0 has output_norms=None"):
        compressed(config, output_norms=None)


def test_a_scorer_while_decoding_by_the_same_row(monkeypatch):
    """The entries with the largest first component stay; int8 keys count with their scale."""

    def first(layer):
        e_BK1H = jnp.zeros((B, K, 1, H)).at[..., 0].set(1.0)
        return jnp.exp(layer.held_keys.dot(e_BK1H)[:, :, 0])

    mine = Scorer(function=first, words="a component of the keys", decoding=first)
    row(monkeypatch, scorers, "SCORERS", mine=mine)
    # First components are further apart than what int8 rounds.
    rng = np.random.default_rng(0)
    firsts = rng.permuted(np.broadcast_to(np.linspace(-2, 2, T), (L, B, K, T)), axis=-1)
    keys = [jax.random.normal(jax.random.key(layer), (B, T, K, H)) for layer in range(L)]
    keys = [k.at[..., 0].set(x.swapaxes(1, 2)) for k, x in zip(keys, firsts, strict=True)]
    config = CompressionConfig(scorer="mine", budget=14, recent=1, quantize="int8")
    rule = Recompress(every=4, budget=14, scorer="mine", window=2, sinks=1, heads="uniform")
    assert rule.queries == 0
    cache = compress(keys, keys, [Probe()] * L, config, lengths=jnp.array(LENGTHS), tail_slots=4)
    for i, n in enumerate(LENGTHS):
        for layer, head in np.ndindex(L, K):
            best = np.argsort(-np.asarray(keys[layer])[i, : n - 1, head, 0])[:13]
            kept = np.flatnonzero(cache.kept_mask(T)[i, layer, head]).tolist()
            assert kept == sorted([*best, n - 1])
    cache, _ = make_room(cache, rule, N, (None,) * L, asked=False)
    # Four tokens come: a large one and the last two push out what is smallest.
    new = jnp.zeros((B, K, 4, H)).at[..., 0].set(jnp.array([-9.0, 9.0, -9.0, -9.0]))
    tail = cache.tail.replace(
        keys=(new,) * L, values=(new,) * L, cursor=jnp.array(4),
        positions=jnp.array(LENGTHS)[:, None] + jnp.arange(4),
    )  # fmt: skip
    following = jnp.array(LENGTHS) + 4
    after = evict(cache.replace(tail=tail, next_positions=following), None, rule, (None,) * L)
    kept = np.asarray(after.kept_mask(T + 4))
    before = np.asarray(cache.kept_mask(T))
    for i, n in enumerate(LENGTHS):
        for layer, head in np.ndindex(L, K):
            held = [p for p in np.flatnonzero(before[i, layer, head]) if p > 0]
            sink = [0] if before[i, layer, head, 0] else []
            best = sorted(held, key=lambda p: -keys[layer][i, p, head, 0])[: 11 - len(sink)]
            expected = sorted([*sink, *best, n + 1, n + 2, n + 3])
            assert np.flatnonzero(kept[i, layer, head]).tolist() == expected


def test_a_scorer_that_reads_a_probe_is_refused_while_decoding():
    expected = "scorer='kvzip', expected one of window, squared-sum, key-norm, key"
    with pytest.raises(ConfigError, match=expected):
        Recompress(every=4, budget=10, scorer="kvzip")


def test_a_scorer_without_a_row_is_refused():
    with pytest.raises(ConfigError, match="scorer='mine', expected one of none, window"):
        CompressionConfig(scorer="mine", budget=10)


# ---------------------------------------------------------------------------- allocators
def first_layers(layers: allocators.LayerInput):
    """Always-kept entries everywhere, the rest of the budget to the first that can hold it."""
    held_BL, caps_BL = layers.counts(protected), layers.counts(eligible)
    rest_B = len(layers.windows) * layers.rows.base - held_BL.sum(1)
    before_BL = jnp.cumsum(caps_BL - held_BL, axis=1) - (caps_BL - held_BL)
    return held_BL + jnp.clip(rest_B[:, None] - before_BL, 0, caps_BL - held_BL)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_allocator_by_one_row(monkeypatch, layout):
    """Of 3 x 12 entries a head 24 are open; row 1 has but 10 in a layer."""
    mine = LayerAllocator(sizes=first_layers, bound=any_layer)
    row(monkeypatch, allocators, "LAYERS", first=mine)
    config = CompressionConfig(layers="first", budget=12, window=4, layout=layout)
    kept = compressed(config).sum(-1)
    assert kept.tolist() == [[[28] * K, [4] * K, [4] * K], [[14] * K, [14] * K, [8] * K]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_allocator_by_one_row(monkeypatch, layout):
    """Head 0 gets what is open for both heads, as far as it has so many."""

    def sizes(heads):
        both_B = K * heads.size
        first_B = jnp.minimum(both_B, heads.can[:, 0].sum(-1, dtype=jnp.int32))
        return jnp.stack([first_B, both_B - first_B], axis=1)

    mine = HeadAllocator(sizes=sizes, bound=lambda config, size, kv_heads: kv_heads * size)
    row(monkeypatch, allocators, "HEADS", first=mine)
    config = CompressionConfig(heads="first", budget=12, window=4, layout=layout)
    kept = compressed(config).sum(-1)
    assert kept.tolist() == [[[20, 4]] * L, [[14, 10]] * L]


def test_an_allocator_has_a_bound():
    with pytest.raises(TypeError, match="bound"):
        LayerAllocator(sizes=first_layers)
    with pytest.raises(TypeError, match="bound"):
        HeadAllocator(sizes=lambda heads: heads.size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bound_of_nothing_still_holds_what_is_always_kept(monkeypatch, layout):
    layers = LayerAllocator(
        sizes=lambda layers: layers.counts(protected), bound=lambda bucket: Bound([0] * L, 0, 0)
    )
    heads = HeadAllocator(
        sizes=lambda heads: jnp.stack([heads.size] * K, axis=1),
        bound=lambda config, size, kv_heads: 0,
    )
    row(monkeypatch, allocators, "LAYERS", nothing=layers)
    row(monkeypatch, allocators, "HEADS", nothing=heads)
    config = CompressionConfig(
        layers="nothing", heads="nothing", budget=12, sinks=2, window=4, layout=layout
    )
    kept = compressed(config)
    for i, n in enumerate(LENGTHS):
        for head in kept[i].reshape(-1, T):
            assert np.flatnonzero(head).tolist() == [0, 1, *range(n - 4, n)]
