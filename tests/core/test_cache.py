"""The cache: packing, the tail, attention by true position, PrefixKV's eviction as a mask."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import probe_of

from kvjax import CompressionConfig, compress
from kvjax.cache import attend as attending
from kvjax.cache import padded
from kvjax.cache.padded import full_layer
from kvjax.cache.ratio import evicted_range
from kvjax.cache.state import Cache, for_rows, with_own_entries, with_room
from kvjax.cache.tail import Tail, empty_tail, write_layer, write_positions

QUICK = {"xla_backend_optimization_level": 0}  # compile time is all that these tests cost
pack = jax.jit(padded.pack, static_argnums=3, compiler_options=QUICK)
attend = jax.jit(attending.attend, static_argnums=(3, 4), compiler_options=QUICK)
write_positions = jax.jit(write_positions)
write_layer = jax.jit(write_layer, static_argnums=1)


@partial(jax.jit, static_argnums=4, compiler_options=QUICK)
def dead_masks(kept, prompts, positions, tail, slots):
    found = attending.evicted_ranges(kept, prompts, positions, None, tail, slots)
    return [evicted.mask() for evicted in found]


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --------------------------------------------------------------------------- packing
def test_pack_by_hand():
    # The picture in kvjax/cache/padded.py: ten tokens, two heads, five slots.
    keep = np.zeros((1, 2, 10), bool)
    keep[0, 0, [0, 3, 7, 9]] = keep[0, 1, [0, 8, 9]] = True
    keys = np.arange(1.0, 21).astype(np.float32).reshape(1, 10, 2, 1)  # 2 p + 1 and 2 p + 2
    layer = pack(keys, -keys, keep, 5)
    np.testing.assert_array_equal(layer.positions, [[[0, 3, 7, 9, -1], [0, 8, 9, -1, -1]]])
    np.testing.assert_array_equal(layer.keys[..., 0], [[[1, 7, 15, 19, 0], [2, 18, 20, 0, 0]]])
    np.testing.assert_array_equal(layer.values, -layer.keys)
    np.testing.assert_array_equal(layer.lengths, [[4, 3]])
    assert layer.positions.dtype == layer.lengths.dtype == jnp.int32


@pytest.mark.parametrize(("tokens", "slots", "share"), [(40, 40, 0.3), (33, 9, 0.1), (1, 1, 1.0)])
def test_pack_matches_numpy(tokens, slots, share):
    keys, values = normal(0, 3, tokens, 2, 5), normal(1, 3, tokens, 2, 5)
    keep = np.random.default_rng(2).random((3, 2, tokens)) < share
    keep[0, 0] = False
    assert keep.sum(-1).max() <= slots
    # What is not kept may hold anything.
    dirty = np.where(keep.swapaxes(1, 2)[..., None], keys, np.float32(np.nan))
    layer = pack(dirty, values, keep, slots)
    assert layer.keys.shape == layer.values.shape == (3, 2, slots, 5)
    for row, head in np.ndindex(3, 2):
        kept = np.flatnonzero(keep[row, head])
        empty = slots - len(kept)
        at = row, head
        np.testing.assert_array_equal(layer.positions[at], np.append(kept, np.full(empty, -1)))
        for packed, source in ((layer.keys, keys), (layer.values, values)):
            expected = np.concatenate([source[row, kept, head], np.zeros((empty, 5))])
            np.testing.assert_array_equal(packed[at], expected)


def test_full_layer_keeps_the_real_tokens():
    keys, values = normal(0, 2, 6, 3, 4), normal(1, 2, 6, 3, 4)
    layer = full_layer(*map(jnp.array, (keys, values, [6, 2])))
    np.testing.assert_array_equal(layer.keys, keys.transpose(0, 2, 1, 3))
    np.testing.assert_array_equal(layer.values, values.transpose(0, 2, 1, 3))
    rows = [0, 1, 2, 3, 4, 5], [0, 1, -1, -1, -1, -1]
    np.testing.assert_array_equal(layer.positions, [[row] * 3 for row in rows])
    np.testing.assert_array_equal(layer.lengths, [[6] * 3, [2] * 3])


# --------------------------------------------------------------------------- the tail
def small_cache(batch=2, layers=2, tail=0) -> Cache:
    kept = tuple(
        full_layer(
            *(jnp.array(normal(10 * i + j, batch, 5, 2, 4)) for j in (0, 1)),
            jnp.full(batch, 5, jnp.int32),
        )
        for i in range(layers)
    )
    lengths = jnp.full(batch, 5, jnp.int32)
    return Cache(kept, empty_tail(kept, tail), prompt_lengths=lengths, next_positions=lengths)


def test_writing_moves_the_cursor():
    tail = small_cache(tail=6).tail
    assert (tail.positions == -1).all()
    blocks = {}
    for start, positions in ((0, [[5, 6], [5, -1]]), (2, [[7, 8, 9], [6, 7, -1]])):
        tail = write_positions(tail, jnp.array(positions, jnp.int32))
        assert int(tail.cursor) == start + len(positions[0])
        for layer in (0, 1):
            block = normal(start + layer, 2, len(positions[0]), 2, 4)
            tail = write_layer(tail, layer, block, -block)
            blocks[layer, start] = block.transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(tail.positions, [[5, 6, 7, 8, 9, -1], [5, -1, 6, 7, -1, -1]])
    for layer in (0, 1):
        np.testing.assert_array_equal(tail.keys[layer][:, :, :2], blocks[layer, 0])
        np.testing.assert_array_equal(tail.keys[layer][:, :, 2:5], blocks[layer, 2])
        np.testing.assert_array_equal(tail.keys[layer][:, :, 5:], 0)
        np.testing.assert_array_equal(tail.values[layer], -tail.keys[layer])


def test_with_room_keeps_what_the_tail_holds():
    cache = small_cache()
    assert cache.tail.positions.shape == (2, 0)
    cache = with_room(cache, 3)
    block = normal(1, 2, 2, 2, 4)
    tail = write_positions(cache.tail, jnp.array([[5, 6], [5, -1]], jnp.int32))
    cache = cache.replace(tail=write_layer(write_layer(tail, 0, block, -block), 1, -block, block))
    for enough in (0, 2, 3):
        assert with_room(cache, enough) is cache
    wide = with_room(cache, 7)
    np.testing.assert_array_equal(wide.tail.positions[:, :3], cache.tail.positions)
    np.testing.assert_array_equal(wide.tail.positions[:, 3:], np.full((2, 4), -1))
    assert int(wide.tail.cursor) == 2
    pairs = zip(
        (*wide.tail.keys, *wide.tail.values), (*cache.tail.keys, *cache.tail.values), strict=True
    )
    for after, before in pairs:
        assert after.shape == (2, 2, 7, 4)
        np.testing.assert_array_equal(after[:, :, :3], before)
    assert wide.layers is cache.layers


def test_for_rows():
    one, two = small_cache(batch=1, tail=2), small_cache(batch=2)
    three = for_rows(one, 3)
    assert (one.batch, three.batch, three.shared, three.nbytes) == (1, 3, 3, one.nbytes)
    assert one.nbytes == 2 * 2 * (5 * 2 * 4) * 4  # layers, K and V, entries, fp32
    assert three.layers is one.layers  # held once, by all of them
    apart = with_own_entries(three)
    assert (apart.shared, apart.nbytes) == (1, 3 * one.nbytes)
    for after, before in zip(jax.tree.leaves(apart), jax.tree.leaves(one), strict=True):
        if before.ndim:
            before = np.repeat(np.asarray(before), 3, axis=0)
        np.testing.assert_array_equal(after, before)
    assert with_own_entries(two) is two
    assert for_rows(one, 1) is one
    assert for_rows(two, 2) is two
    with pytest.raises(ValueError, match=r"^the cache has 2 rows, expected 1 or the prompts' 3$"):
        for_rows(two, 3)


# --------------------------------------------------------------------------- attention
def random_cache(seed=0, keep_ratio=False) -> tuple[Cache, np.ndarray]:
    """Three rows that keep half of 60, 45 and 12 tokens, then tails with holes; queries too."""
    rng, lengths = np.random.default_rng(seed), np.array([60, 45, 12])
    layers = []
    for layer in range(2):
        keep = (rng.random((3, 2, 60)) < 0.5) & (np.arange(60) < lengths[:, None, None])
        keys, values = normal(seed + layer, 3, 60, 2, 8), normal(seed + layer + 9, 3, 60, 2, 8)
        layers.append(pack(keys, values, keep, 45))
    holes = [[0, 1, 2, -1, 3, 4, 5, -1], [-1, 0, -1, 1, 2, -1, 3, -1], [0, -1, 1, 2, 3, -1, 4, -1]]
    positions = np.where(np.array(holes) < 0, -1, lengths[:, None] + np.array(holes))
    tail = empty_tail(tuple(layers), 8).replace(
        keys=tuple(jnp.array(normal(seed + i, 3, 2, 8, 8)) for i in (20, 21)),
        values=tuple(jnp.array(normal(seed + i, 3, 2, 8, 8)) for i in (22, 23)),
        positions=jnp.array(positions, jnp.int32),
        cursor=jnp.int32(7),
    )
    lengths = jnp.array(lengths, jnp.int32)
    cache = Cache(tuple(layers), tail, lengths, lengths + 5, keep_ratio=keep_ratio)
    return cache, positions[:, 4:7].astype(np.int32)  # the last block of three is asked


def attention(q, positions, cache, layer, window, gone=frozenset()):
    """float64, entry by entry; `gone` holds (row, head, query, position) that were evicted."""
    entries, tail = cache.layers[layer], cache.tail
    out = np.zeros(q.shape)
    for row, token, head in np.ndindex(*q.shape[:3]):
        p, shared = positions[row, token], head // 2
        segments = (
            (
                entries.positions[row, shared],
                entries.keys[row, shared],
                entries.values[row, shared],
            ),
            (tail.positions[row], tail.keys[layer][row, shared], tail.values[layer][row, shared]),
        )
        where, k, v = (np.concatenate(part) for part in zip(*segments, strict=True))
        seen = (where >= 0) & (where <= p)
        if window is not None:
            seen &= where > p - window
        seen &= [(row, shared, token, at) not in gone for at in where]
        if seen.any():
            k, v = k[seen].astype(np.float64), v[seen].astype(np.float64)
            weights = np.exp(k @ q[row, token, head].astype(np.float64) / math.sqrt(8))
            out[row, token, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("window", [None, 1, 9])
def test_attend_matches_numpy(layer, window):
    cache, positions = random_cache()
    q = normal(5, 3, 3, 4, 8)
    out = attend(q, positions, cache, layer, window)
    expected = attention(q, positions, cache, layer, window)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert (positions == -1).any()
    assert not np.asarray(out)[positions == -1].any()


def test_tokens_are_attended_in_parts(monkeypatch):
    """Three tokens of a batch in parts of two: what each part has evicted is its own tokens'."""
    cache, positions = random_cache(keep_ratio=True)
    q = normal(5, 3, 3, 4, 8)
    whole = attend(q, positions, cache, 0, 9)
    sizes = []
    attend_some = attending._attend

    def counted(q, *rest):
        sizes.append(q.shape[1])
        return attend_some(q, *rest)

    monkeypatch.setattr(attending, "_attend", counted)
    monkeypatch.setattr(attending, "MOST_ROWS", 2 * 3 * 4)
    parts = jax.jit(lambda *call: attending.attend(*call, 0, 9))(q, positions, cache)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    assert set(sizes) == {2}


@pytest.mark.parametrize("keep_ratio", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_nan_in_empty_slots_changes_nothing(window, keep_ratio):
    cache, positions = random_cache(keep_ratio=keep_ratio)
    q = normal(5, 3, 3, 4, 8)

    def poison(array, where):
        return jnp.where((where >= 0)[..., None], array, jnp.nan)

    layers = tuple(
        layer.replace(
            keys=poison(layer.keys, layer.positions), values=poison(layer.values, layer.positions)
        )
        for layer in cache.layers
    )
    tail, holes = cache.tail, cache.tail.positions[:, None]
    tail = tail.replace(
        keys=tuple(poison(keys, holes) for keys in tail.keys),
        values=tuple(poison(values, holes) for values in tail.values),
    )
    dirty = attend(q, positions, cache.replace(layers=layers, tail=tail), 0, window)
    np.testing.assert_array_equal(dirty, attend(q, positions, cache, 0, window))


def test_attend_answers_in_the_dtype_of_the_query():
    cache, positions = random_cache()
    out = attend(jnp.ones((3, 3, 4, 8), jnp.bfloat16), positions, cache, 0, None)
    assert out.dtype == jnp.bfloat16


# --------------------------------------------------------------------------- PrefixKV decoding
def upstream(prompt: int, kept: int, steps: int) -> list[list[int]]:
    """Entries that each of `steps` new tokens sees, as upstream evicts: one a step, if too long.

    Entries are numbered in order: 0 .. kept - 1 of the prompt, then the new tokens.
    """
    entries, seen_by = list(range(kept)), []
    slot = kept - 25 if kept - 25 >= 1 else kept // 2
    for step in range(steps):
        entries.append(kept + step)
        seen_by.append(list(entries))
        over = (len(entries) * prompt - (prompt + step + 1) * kept) // prompt
        if over > 0:
            del entries[slot]
    return seen_by


def dead(prompts, kept, steps):
    """`evicted_ranges` of heads that keep `kept` [B, K] of `prompts` [B] tokens, query by query."""
    kept, prompts = np.asarray(kept), np.asarray(prompts, np.int32)
    positions = jnp.array(prompts[:, None] + np.arange(steps, dtype=np.int32))
    tail = Tail((), (), positions, jnp.zeros((), jnp.int32))
    counts, slots = jnp.array(kept, jnp.int32), int(kept.max()) + 3  # three too many
    return map(np.asarray, dead_masks(counts, jnp.array(prompts), positions, tail, slots))


def test_ratio_by_hand():
    # V7: 50 of 100 kept. The query at position 110 has 10 new tokens before it: 5 entries are
    # gone, slots 25..29, so 45 + 10 = 55 are left, and slots 0..24 are frozen.
    prompt, tail = dead([100], [[50]], 61)
    np.testing.assert_array_equal(np.flatnonzero(prompt[0, 0, 10]), [25, 26, 27, 28, 29])
    assert not tail[0, 0, 10].any()
    assert (~prompt[0, 0, 10, :50]).sum() + (~tail[0, 0, 10, :10]).sum() == 55
    assert not prompt[..., :25].any()
    # At 160, 30 are gone: all 25 after the frozen ones and the 5 oldest of the tail.
    np.testing.assert_array_equal(np.flatnonzero(prompt[0, 0, 60, :50]), np.arange(25, 50))
    np.testing.assert_array_equal(np.flatnonzero(tail[0, 0, 60]), [0, 1, 2, 3, 4])
    # The first new token finds everything.
    assert not prompt[0, 0, 0].any()


def test_closed_form_is_upstreams_loop():
    steps, prompts = 130, [1, 2, 10, 26, 50, 51, 100, 137, 400]
    choices = [[1, 2, 24, 25, 26, n // 3, n // 2, n - 1, n] for n in prompts]
    kept = np.clip(choices, 1, np.array(prompts)[:, None])
    prompt_dead, tail_dead = dead(prompts, kept, steps)
    tail_died = 0
    for row, head in np.ndindex(kept.shape):
        m = kept[row, head]
        for step, expected in enumerate(upstream(prompts[row], m, steps)):
            survivors = np.flatnonzero(~prompt_dead[row, head, step, :m]).tolist()
            new = np.flatnonzero(~tail_dead[row, head, step, : step + 1])
            assert survivors + (m + new).tolist() == expected, (prompts[row], m, step)
            tail_died += len(new) < step + 1
        if m == prompts[row]:
            assert expected == list(range(m + steps))  # nothing is ever removed
    assert tail_died > 1000


def test_attend_holds_the_ratio():
    cache, positions = random_cache(keep_ratio=True)
    # Far into the answer, 40 tokens later, some 20 entries of each head are gone.
    tail = np.asarray(cache.tail.positions)
    tail, positions = (np.where(x >= 0, x + 40, -1).astype(np.int32) for x in (tail, positions))
    cache = cache.replace(tail=cache.tail.replace(positions=jnp.array(tail)))
    q, gone = normal(5, 3, 3, 4, 8), set()
    for row, head, token in np.ndindex(3, 2, 3):
        length, p = int(cache.prompt_lengths[row]), int(positions[row, token])
        where = np.asarray(cache.layers[0].positions[row, head])
        kept = where[where >= 0].tolist()
        numbered = [*kept, *range(length, max(p + 1, length))]
        seen = upstream(length, len(kept), max(p - length + 1, 1))[-1]
        alive = {numbered[entry] for entry in seen if entry < len(numbered)}
        gone |= {(row, head, token, at) for at in numbered if at not in alive}
    out = attend(q, positions, cache, 0, None)
    expected = attention(q, positions, cache, 0, None, gone)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    without = attend(q, positions, cache.replace(keep_ratio=False), 0, None)
    assert np.abs(np.asarray(without) - expected).max() > 0.1


def test_ratio_of_a_sliding_window_by_hand():
    """A window of 10 finds 9 of 20 tokens: with all 9 kept none goes, with 3 of them 2 of 3."""
    at = jnp.array([[20, 29, 38]])
    first, last = evicted_range(jnp.array([[9, 3]]), jnp.array([20]), at, 10)
    np.testing.assert_array_equal(first, [[4, 1]])
    np.testing.assert_array_equal(last, [[[4, 4, 4], [1, 7, 13]]])
    _, last = evicted_range(jnp.array([[9, 3]]), jnp.array([20]), at, None)
    np.testing.assert_array_equal(last, [[[4, 8, 13], [1, 8, 16]]])


def test_packed_slots_hold_the_ratio(monkeypatch):
    """Heads of unlike sizes: in slots as in padded layers, which are held against numpy above.

    And three tokens in parts of two, of which each has evicted what its own tokens have.
    """
    k, v = jnp.asarray(normal(0, 2, 48, 2, 8)), jnp.asarray(normal(1, 2, 48, 2, 8))
    probe = jax.tree.map(jnp.asarray, probe_of(2, 2, 48, 4, 2, 8, 48))
    config = CompressionConfig.named("ada-snapkv", 0.5, keep_ratio=True, floor=0.0, window=4)
    found = {}
    for layout in ("padded", "packed"):
        chosen = dataclasses.replace(config, layout=layout)
        cache = compress([k], [v], [probe], chosen, lengths=jnp.array([48, 31]), tail_slots=1)
        assert (cache.counts[:, 0, 0] != cache.counts[:, 0, 1]).any()
        q, at = normal(3, 2, 3, 4, 8), np.array([[56, 63, 70], [34, 39, 44]], np.int32)
        found[layout] = [attend(q, at, cache.replace(keep_ratio=r), 0, None) for r in (True, False)]
    np.testing.assert_allclose(found["packed"][0], found["padded"][0], atol=1e-5)
    assert np.abs(np.asarray(found["packed"][0] - found["packed"][1])).max() > 0.1
    monkeypatch.setattr(attending, "MOST_ROWS", 2 * 2 * 4)
    parts = jax.jit(lambda *call: attending.attend(*call, 0, None))(q, at, cache)
    np.testing.assert_allclose(parts, found["packed"][0], atol=1e-5)
