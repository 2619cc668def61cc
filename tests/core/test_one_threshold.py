"""One eviction over all layers and heads, against a sort in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eviction_cases import LAYERS, B, K, U, entries, prompt_cache, with_answer

from kvjax import CompressionConfig, ConfigError, Recompress, exact
from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.sums import begin, settle
from kvjax.compression.one_threshold import places_of
from kvjax.compression.recompress import evict as evict_

evict = jax.jit(evict_, static_argnums=(2, 3))
RULE = Recompress(
    every=U, budget=12, window=4, sinks=2, scorer="squared-sum", layers="global"
)  # fmt: skip


def summed(seed=0, windows=(None,) * LAYERS, **changes):
    """A cache with an answer in its tail, some sums of which are alike, and others 0."""
    cache, _ = with_answer(prompt_cache("kv-compress", sums=True, **changes), RULE)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, 9, (LAYERS + 1, B, K * U)) / 8.0
    # The second layer is looked at far more: it is to grow at the first one's cost.
    in_tail = [drawn[i].reshape(B, K, U) + i for i in range(LAYERS)]
    shape = cache.slots.sums.shape
    of_slots = rng.integers(0, 9, shape) / 8.0 + np.asarray(places_of(cache.slots).layer)
    slots = cache.slots.replace(sums=jnp.asarray(of_slots, jnp.float32))
    tail = cache.tail.replace(sums=tuple(jnp.asarray(x, jnp.float32) for x in in_tail))
    return cache.replace(slots=slots, tail=tail)


def sums_of(cache, row: int) -> dict:
    """(layer, head, position) -> sum, of slots and tail."""
    pool, found = cache.slots, {}
    places = places_of(pool)
    for slot in np.flatnonzero(np.asarray(pool.owners[row]) >= 0):
        layer = int(places.layer[row, slot])
        if layer < LAYERS:
            place = layer, int(pool.owners[row, slot]), int(pool.positions[row, slot])
            assert place not in found
            found[place] = float(pool.sums[row, slot])
    for slot, position in enumerate(np.asarray(cache.tail.positions[row])):
        for layer, head in np.ndindex(LAYERS, K) if position >= 0 else ():
            found[layer, head, int(position)] = float(cache.tail.sums[layer][row, head, slot])
    return found


def expected_kept(cache, row: int, windows) -> set:
    """The last tokens, the sinks, and the largest sums; ties in order of layer, head, position."""
    after, sums = int(cache.next_positions[row]), sums_of(cache, row)
    can = {p for p in sums if windows[p[0]] is None or p[2] > after - windows[p[0]]}
    kept = {p for p in can if p[2] >= after - RULE.recent or p[2] < RULE.sinks}
    best = sorted(can - kept, key=lambda p: (-sums[p], p))
    return kept | set(best[: LAYERS * K * RULE.budget - len(kept)])


@pytest.mark.parametrize(
    ("windows", "changes"),
    [((None, None), {}), ((None, 20), {"sliding": 20}), ((None, None), {"quantize": "int8"})],
    ids=["plain", "sliding", "int8"],
)
def test_what_stays_is_what_a_sort_keeps(windows, changes):
    """Twice in a row; whatever lies in slots that nobody owns, and wherever entries have moved."""
    cache = summed(**changes)
    if "quantize" not in changes:
        free = (cache.slots.owners < 0)[..., None]
        poisoned = jnp.where(free, jnp.nan, cache.slots.entries)
        cache = cache.replace(slots=cache.slots.replace(entries=poisoned))
    for _ in range(2):
        after = evict(cache, None, RULE, windows)
        for row in range(B):
            expected, sums = expected_kept(cache, row, windows), sums_of(cache, row)
            found = sums_of(after, row)
            assert set(found) == expected
            for place, value in found.items():
                assert value == sums[place]
            sizes = after.slots.lengths[row].tolist()
            assert sizes == [sum(p[0] == layer for p in expected) for layer in range(LAYERS)]
            assert after.slots.counts[row].tolist() == [
                [sum(p[:2] == (layer, head) for p in expected) for head in range(K)]
                for layer in range(LAYERS)
            ]
            if "quantize" not in changes:
                for layer in range(LAYERS):
                    before = entries(cache, layer, row, True)
                    for place, entry in entries(after, layer, row, False).items():
                        np.testing.assert_array_equal(entry, before[place])
        assert after.slots.entries.shape == cache.slots.entries.shape
        assert (after.tail.positions == -1).all()
        assert all((x == 0).all() for x in after.tail.sums)
        cache = with_more(after)


def with_more(cache):
    """The evicted cache with new tokens in its tail, the first layer's of more weight now."""
    at = cache.next_positions[:, None] + jnp.arange(U)
    rng = np.random.default_rng(5)
    sums = tuple(jnp.asarray(rng.random((B, K, U)) + 9 * (1 - i), jnp.float32) for i in range(2))
    tail = cache.tail.replace(positions=at, cursor=jnp.asarray(U), sums=sums)
    return cache.replace(tail=tail, next_positions=cache.next_positions + U)


def test_layers_grow_and_shrink():
    """The second layer takes the first one's part, and the next segment gives it back."""
    after = evict(summed(), None, RULE, (None,) * LAYERS)
    first = np.asarray(after.slots.lengths)
    assert (first[:, 1] > first[:, 0]).all()
    more = with_more(after)
    forgotten = more.slots.replace(sums=jnp.zeros_like(more.slots.sums))  # ties: the first layer's
    again = evict(more.replace(slots=forgotten), None, RULE, (None,) * LAYERS)
    assert (np.asarray(again.slots.lengths)[:, 0] > first[:, 0]).all()
    assert (np.asarray(again.slots.lengths).sum(1) == LAYERS * K * RULE.budget).all()


def test_sums_begin_and_settle():
    cache = summed()
    begun = begin(cache)
    assert begun.tail.slot_sums.shape == cache.slots.sums.shape
    more = begun.replace(tail=begun.tail.replace(slot_sums=begun.tail.slot_sums + 2))
    settled = settle(more)
    np.testing.assert_array_equal(settled.slots.sums, cache.slots.sums + 2)
    assert settled.tail.slot_sums is None
    # What is evicted while it adds goes on adding.
    after = evict(more, None, RULE, (None,) * LAYERS)
    np.testing.assert_array_equal(
        after.tail.slot_sums, evict(settled, None, RULE, (None,) * LAYERS).slots.sums
    )


def test_sums_need_slots():
    expected = "sums=True, expected True or False, and False with layout='padded'"
    with pytest.raises(ConfigError, match=f"^{expected}$"):
        CompressionConfig.named("snapkv", 8, sums=True, layout="padded")


def test_ties_go_to_what_comes_first():
    scores = jnp.array([[2.0, 1, 1, 1, 0, 1]])
    can = jnp.array([[True, True, True, True, True, False]])
    order = jnp.array([[0, 5, 1, 1, 0, 0]]), jnp.array([[0, 0, 7, 3, 0, 0]])
    for k, expected in (
        (1, [0]),
        (2, [0, 3]),
        (3, [0, 2, 3]),
        (4, [0, 1, 2, 3]),
        (9, [0, 1, 2, 3, 4]),
    ):
        chosen = exact.select_in_order(scores, jnp.array([k]), can, order)
        assert np.flatnonzero(chosen[0]).tolist() == expected


def test_split_slots_keep_their_sums():
    slots = summed().slots
    back = reshard_slots(reshard_slots(slots, 2), 1)
    np.testing.assert_array_equal(back.sums, slots.sums)
    assert not np.array_equal(reshard_slots(slots, 2).sums, slots.sums)
