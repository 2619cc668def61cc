"""The packed layout: slots with owners, packed, grown and moved."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.cache import packing
from kvjax.cache.slot_layers import kept_mask, layer_slots, of_layer
from kvjax.cache.slot_moves import grown, reshard_slots
from kvjax.cache.slots import empty_slots, first_page, in_pages, page_size, pages_of
from kvjax.kernels.platform import assume

QUICK = {"xla_backend_optimization_level": 0}
put_layer = jax.jit(packing.put_layer, static_argnums=(1, 5), compiler_options=QUICK)
mask_of = jax.jit(kept_mask, static_argnums=(1, 2), compiler_options=QUICK)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------------------- packing
def test_put_by_hand():
    """The picture in kvjax/cache/slots.py: ten tokens, two layers, two heads."""
    keys = np.arange(1.0, 21).astype(np.float32).reshape(1, 10, 2, 1)  # 2 p + 1 and 2 p + 2
    kept = [([0, 3, 9], [0, 9]), ([9], [0, 9])]
    slots = empty_slots(jnp.asarray(keys), 2, 6, None, page=4)
    for layer, heads in enumerate(kept):
        keep = np.zeros((1, 2, 10), bool)
        for head, places in enumerate(heads):
            keep[0, head, places] = True
        slots = put_layer(slots, layer, keys, -keys, keep, 6)
    np.testing.assert_array_equal(slots.owners, [[0, 0, 0, 1, 1, -1, -1, -1, 0, 1, 1, -1]])
    np.testing.assert_array_equal(slots.positions, [[0, 3, 9, 0, 9, -1, -1, -1, 9, 0, 9, -1]])
    expected = [1, 7, 19, 2, 20, 0, 0, 0, 19, 2, 20, 0]
    np.testing.assert_array_equal(slots.entries[0, :, 0], expected)
    np.testing.assert_array_equal(slots.entries[..., 1], -slots.entries[..., 0])
    np.testing.assert_array_equal(slots.counts, [[[3, 2], [1, 2]]])
    assert [first_page(slots, layer).tolist() for layer in (0, 1)] == [[0], [2]]
    assert slots.lengths.tolist() == [[5, 3]]
    assert slots.nbytes == 12 * 2 * 4
    mask = np.asarray(mask_of(slots, 0, 10))
    assert [np.flatnonzero(head).tolist() for head in mask[0]] == [[0, 3, 9], [0, 9]]


PAGE = 4


@pytest.mark.parametrize("runs", [None, ((0, 4), (4, 8))])
def test_counts_say_what_is_stored(runs):
    """Two layers of six entries in eight slots: what has no slot is not counted."""
    keys = np.arange(12, dtype=np.float32).reshape(1, 6, 2, 1)
    slots = empty_slots(jnp.asarray(keys), 2, 5, runs, page=4)
    slots = slots.replace(**{name: getattr(slots, name)[:, :8] for name in ("owners", "positions")})
    slots = slots.replace(entries=slots.entries[:, :8])
    keep = np.zeros((1, 2, 6), bool)
    keep[0, 0, :4] = keep[0, 1, 4:] = True
    for layer in (0, 1):
        slots = put_layer(slots, layer, keys, keys, keep, 6)
    expected = [[[4, 2], [0, 0]]] if runs is None else [[[4, 0], [4, 0]]]
    assert slots.counts.tolist() == expected
    assert int((slots.owners >= 0).sum()) == int(slots.counts.sum())


@partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def packed_layers(keys, values, keep, wanted):
    """Slots of all layers, and which tokens they say that each head holds."""
    layers, _, heads, tokens = keep.shape
    slots = empty_slots(keys[0], layers, wanted, None, page=PAGE)
    for layer in range(layers):
        arrays = keys[layer], values[layer], keep[layer]
        slots = packing.put_layer(slots, layer, *arrays, min(heads * tokens, wanted))
    return slots, [kept_mask(slots, layer, tokens) for layer in range(layers)]


@st.composite
def keeps(draw):
    """Masks of a few layers, whose totals differ by row, layer and head."""
    # A few shapes only: each is compiled.
    layers, batch, heads, tokens = draw(
        st.sampled_from([(1, 1, 1, 1), (2, 3, 2, 12), (3, 2, 4, 7)])
    )
    seed, share = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    return np.random.default_rng(seed).random((layers, batch, heads, tokens)) < share


@given(keep=keeps(), spare=st.booleans())
@settings(max_examples=40, deadline=None)
def test_every_kept_entry_is_found_under_its_owner(keep, spare):
    layers, batch, heads, tokens = keep.shape
    if spare:
        slots = layers * heads * tokens + 3
    else:
        slots = layers * heads * tokens // 2 + 1
        # No row keeps more than there are slots.
        keep &= (
            keep.swapaxes(0, 1)
            .reshape(batch, -1)
            .cumsum(1)
            .reshape(batch, layers, heads, tokens)
            .swapaxes(0, 1)
            <= slots
        )
    keys, values = (normal(seed, layers, batch, tokens, heads, 4) for seed in (0, 1))
    # What is not kept may hold anything.
    dirty = np.where(keep.swapaxes(2, 3)[..., None], keys, np.float32(np.nan))
    held, masks = packed_layers(dirty, values, keep, slots)
    pool = jax.tree.map(np.asarray, held)
    np.testing.assert_array_equal(pool.counts, keep.sum(-1).swapaxes(0, 1))
    for row in range(batch):
        at, empty = 0, np.ones(pool.owners.shape[1], bool)
        for layer in range(layers):
            at = -(-at // PAGE) * PAGE  # a page of its own
            assert int(first_page(held, layer)[row]) * PAGE == at
            for head in range(heads):
                places = np.flatnonzero(keep[layer, row, head])
                run = slice(at, at + len(places))
                at, empty[run] = run.stop, False
                assert (pool.owners[row, run] == head).all()
                np.testing.assert_array_equal(pool.positions[row, run], places)
                both = np.concatenate([keys, values], -1)[layer, row, places, head]
                np.testing.assert_array_equal(pool.entries[row, run], both)
        assert (pool.owners[row, empty] == -1).all()
        assert (pool.positions[row, empty] == -1).all()
        assert (pool.entries[row, empty] == 0).all()
    np.testing.assert_array_equal(masks, keep)


def test_fixed_regions_hold_the_same():
    """Every layer at its own place; rows that keep less leave empty slots there."""
    rng = np.random.default_rng(0)
    keep = rng.random((2, 3, 2, 8)) < 0.5
    keys, values = normal(0, 2, 3, 8, 2, 4), normal(1, 2, 3, 8, 2, 4)
    runs = ((0, 16), (16, 32))
    behind, fixed = (empty_slots(jnp.asarray(keys[0]), 2, 32, r, page=PAGE) for r in (None, runs))
    for layer in range(2):
        arrays = keys[layer], values[layer], keep[layer]
        behind, fixed = (put_layer(p, layer, *arrays, 16) for p in (behind, fixed))
    for layer in range(2):
        np.testing.assert_array_equal(mask_of(fixed, layer, 8), keep[layer])
        for row in range(3):
            a, b = (
                np.asarray(p.entries)[row, first : first + int(p.lengths[row, layer])]
                for p in (behind, fixed)
                for first in [int(first_page(p, layer)[row]) * PAGE]
            )
            np.testing.assert_array_equal(a, b)
    assert first_page(fixed, 1).tolist() == [4] * 3


def test_owners_are_int8():
    with pytest.raises(ValueError, match="keys have 128 heads, expected at most 127"):
        empty_slots(jnp.zeros((1, 2, 128, 4)), 1, 4, None, page=4)


# ---------------------------------------------------------------------------- growing
def filled(kept=(5, 3), page=4):
    """One row, a layer for each number of kept entries of one head; keys count from 0."""
    tokens = max(kept)
    keys = np.arange(len(kept) * tokens, dtype=np.float32).reshape(len(kept), 1, tokens, 1, 1)
    slots = empty_slots(jnp.asarray(keys[0]), len(kept), sum(kept), None, page=page)
    for layer, count in enumerate(kept):
        keep = (np.arange(tokens) < count)[None, None]
        slots = put_layer(slots, layer, keys[layer], -keys[layer], keep, tokens)
    return slots


def test_growing_by_hand():
    """Layers of 5 and 3 entries in pages 0, 1 and 2; to 9 and 6 slots come pages 3 and 4."""
    slots = filled()
    more = grown(slots, jnp.array([[9, 6]]), 5, 9)
    assert more.table.tolist() == [[[0, 1, 3], [2, 4, 0]]]
    assert more.lengths.tolist() == [[9, 6]]
    assert more.size == 20
    np.testing.assert_array_equal(more.entries[:, :16], slots.entries)
    assert (more.owners[:, 16:] == -1).all()
    for layer, count in enumerate((5, 3)):
        held = of_layer(more, more.owners, layer)[0, : int(more.lengths[0, layer])]
        assert (held >= 0).tolist() == [True] * count + [False] * (len(held) - count)
    # A page that a layer gives up is free for another; none is added.
    less = grown(more, jnp.array([[5, 10]]), 5, 10)
    assert less.table.tolist() == [[[0, 1, 0], [2, 4, 3]]]
    assert less.size == 20


def test_shares_of_a_page_are_dealt_out():
    """Four devices have a slot each of every page, and growing leaves the others' alone."""
    slots = grown(filled(), jnp.array([[9, 6]]), 5, 9)
    split = reshard_slots(slots, 4)
    assert split.owners.reshape(4, 5).tolist() == slots.owners.reshape(5, 4).T.tolist()
    again = grown(split, jnp.array([[9, 10]]), 6, 10)
    whole = grown(slots, jnp.array([[9, 10]]), 6, 10)
    back = reshard_slots(again, 1)
    for name in ("entries", "owners", "positions", "table"):
        np.testing.assert_array_equal(getattr(back, name), getattr(whole, name))


@pytest.mark.parametrize("parts", [2, 4])
def test_a_layer_of_a_dealt_out_pool_is_the_same(parts):
    """In the order of its pages, and `numbers` say where its slots lie."""
    slots = grown(filled(), jnp.array([[9, 6]]), 5, 9)
    split = reshard_slots(slots, parts)
    for layer in range(2):
        whole, found = layer_slots(slots, layer), layer_slots(split, layer)
        for name in ("owned", "positions", "size"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
        held = of_layer(split, split.entries, layer)
        np.testing.assert_array_equal(held, of_layer(slots, slots.entries, layer))
        mine = np.asarray(found.numbers[0]) < split.size
        assert mine.sum() == found.size[0]
        np.testing.assert_array_equal(split.entries[0][found.numbers[0][mine]], held[0][mine])


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("parts", [1, 4])
def test_pages_waste_less_than_a_hundredth(platform, parts):
    """Of 1,024 entries for each of 8 heads; nothing where the layers are even."""
    layers, even = 32, tuple((8192 * layer, 8192 * layer + 8192) for layer in range(32))
    with assume(platform):
        page = page_size(parts)
    assert in_pages(layers * 8192, even, layers, page)[0] == layers * 8192
    assert in_pages(layers * 8192, None, layers, page)[0] < 1.01 * layers * 8192
    # Of a small model it is more: 2 layers of 2 heads with 16 entries take 3 pages of 16 a layer.
    assert in_pages(2 * 32, None, 2, 16)[0] == 96


def test_pages_of_another_size_hold_the_same():
    """A page of 4 cannot be dealt out to 3 devices: it becomes one of 18."""
    more = grown(filled(), jnp.array([[9, 6]]), 5, 9)
    for slots in (filled(), more):
        split = reshard_slots(slots, 3)
        assert split.page == 18
        np.testing.assert_array_equal(split.lengths, slots.lengths)
        one = reshard_slots(split, 1)
        for layer, count in enumerate((5, 3)):
            for held in (split, one):
                np.testing.assert_array_equal(kept_mask(held, layer, 5), kept_mask(slots, layer, 5))
            first = int(pages_of(one, layer)[0, 0]) * one.page
            found = one.entries[0, first : first + count, 0]
            np.testing.assert_array_equal(found, np.arange(count) + 5 * layer)


# ---------------------------------------------------------------------------- int8
def test_quantized_by_hand():
    x = jnp.array([[[254.0, -127.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    whole, scale = packing.quantized(x)
    np.testing.assert_array_equal(whole, [[[127, -64, 0, 0], [0, 0, 0, 0]]])  # halves to even
    np.testing.assert_array_equal(scale, [[2.0, 0.0]])


def test_quantized_is_off_by_half_a_scale_at_most():
    x = normal(0, 3, 50, 16) * np.exp(normal(1, 3, 50, 1))
    whole, scale = packing.quantized(jnp.asarray(x))
    error = np.abs(np.asarray(whole) * np.asarray(scale)[..., None] - x)
    assert (error <= np.asarray(scale)[..., None] * 0.5001).all()
    assert np.abs(np.asarray(whole)).max(-1).min() == 127
