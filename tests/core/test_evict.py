"""One compression of a running cache, against float64 numpy and by hand."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eviction_cases import (
    LAYERS,
    LENGTHS,
    B,
    H,
    K,
    N,
    T,
    U,
    entries,
    normal,
    prompt_cache,
    with_answer,
)

import kvjax
from kvjax import CompressionConfig, ConfigError, Recompress
from kvjax.cache.ratio import allowed
from kvjax.cache.slot_layers import kept_mask
from kvjax.cache.state import with_room
from kvjax.compression.recompress import evict as evict_
from kvjax.compression.recompress import make_room
from kvjax.compression.room import add_pages, check_held, slots_needed

evict = jax.jit(evict_, static_argnums=(2, 3))
RULE = Recompress(every=U, budget=12, window=4, sinks=2, floor=0.0)


def assert_room(cache, slots: int):
    """Layers may use so many slots together; pages are of one layer, and less than one is over."""
    pool = cache.slots
    assert pool.lengths.sum(1).tolist() == [slots] * B
    pages = -(-np.asarray(pool.lengths) // pool.page)
    assert pool.size <= (slots // pool.page + LAYERS) * pool.page
    for row in range(B):
        mine = [pool.table[row, layer, : pages[row, layer]].tolist() for layer in range(LAYERS)]
        assert len({page for layer in mine for page in layer}) == pages[row].sum()
        assert max(map(max, mine)) < pool.size // pool.page


def attention(cache, held: dict, layer: int, row: int, sliding) -> dict:
    """Mean attention of the remembered queries of the head's group, entry by entry."""
    queries = np.asarray(cache.tail.queries[layer][row], np.float64)
    at, total = np.asarray(cache.tail.query_positions[row]), {place: 0.0 for place in held}
    for head in range(K):
        mine = [place for place in held if place[0] == head]
        for w, query_at in enumerate(at):
            for n in range(head * N // K, (head + 1) * N // K):
                seen = [
                    p for p in mine
                    if p[1] <= query_at >= 0 and (sliding is None or query_at - p[1] < sliding)
                ]  # fmt: skip
                logits = np.array([queries[w, n] @ held[p][:H] for p in seen]) / np.sqrt(H)
                weights = np.exp(logits - logits.max(initial=0))
                for place, weight in zip(seen, weights / max(weights.sum(), 1e-300), strict=True):
                    total[place] += weight / (len(at) * N // K)
    return total


def unlikeness(held: dict) -> dict:
    unit = {p: e[:H] / np.linalg.norm(e[:H]) for p, e in held.items()}
    anchors = [sum(u for p, u in unit.items() if p[0] == head) for head in range(K)]
    anchors = [a / np.linalg.norm(a) for a in anchors]
    return {p: 1 - u @ anchors[p[0]] for p, u in unit.items()}


def expected_kept(cache, rule, layer, row, sliding) -> set:
    """The last tokens and the sinks; of the rest the best, of each head or of all heads."""
    held, after = entries(cache, layer, row, True), int(cache.next_positions[row])
    if sliding is not None:
        held = {p: e for p, e in held.items() if p[1] > after - sliding}
    if rule.scorer == "window":
        # Scores count everything that a query could see, whether it can still be seen or not.
        scores = attention(cache, entries(cache, layer, row, True), layer, row, sliding)
    elif rule.scorer == "key-norm":
        scores = {p: 1 / np.linalg.norm(e[:H]) for p, e in held.items()}
    else:
        scores = unlikeness(held)
    kept = {p for p in held if p[1] >= after - rule.recent or p[1] < rule.sinks}
    room = K * rule.budget - len(kept)
    best = sorted(set(held) - kept, key=lambda p: -scores[p])
    if rule.heads == "ada":
        return kept | set(best[:room])
    for head in range(K):
        kept |= set([p for p in best if p[0] == head][: room // K])
    return kept


@pytest.mark.parametrize(
    ("scorer", "heads", "sliding"),
    [*product(("window", "key-diff"), ("ada", "uniform"), (None, 20)), ("key-norm", "ada", 20)],
)
def test_one_eviction_matches_float64(scorer, heads, sliding):
    rule = Recompress(every=U, budget=12, window=4, sinks=2, floor=0.0, scorer=scorer, heads=heads)
    cache, ratio = with_answer(prompt_cache(sliding=sliding), rule)
    assert ratio is None
    after = evict(cache, None, rule, (sliding,) * LAYERS)
    for layer in range(LAYERS):
        for row in range(B):
            before, found = entries(cache, layer, row, True), entries(after, layer, row, False)
            expected = expected_kept(cache, rule, layer, row, sliding)
            # With an odd number of entries left to share out, one more goes to some head.
            assert expected <= set(found)
            assert len(found) - len(expected) <= 1
            for place, entry in found.items():
                np.testing.assert_array_equal(entry, before[place])
            counts = [sum(head == p[0] for p in found) for head in range(K)]
            assert after.slots.counts[row, layer].tolist() == counts
            assert sum(counts) == min(K * rule.budget, len(found))
    assert (after.tail.positions == -1).all()
    assert int(after.tail.cursor) == 0
    slots = -(-K * 12 // 16) * 16  # whole pages
    assert after.nbytes == cache.nbytes == B * LAYERS * slots * 2 * H * 4


@pytest.mark.parametrize("scorer", ["window", "key-diff", "key-norm"])
def test_int8_entries_are_scored_as_what_they_stand_for(scorer):
    """Of whole numbers with scales the same goes as of the same entries in floats."""
    rule = Recompress(every=U, budget=12, window=4, sinks=2, scorer=scorer, heads="uniform")
    cache, _ = with_answer(prompt_cache(quantize="int8"), rule)
    slots, scales = cache.slots, np.repeat(cache.slots.scales, H, axis=1).swapaxes(1, 2)
    exact = slots.replace(entries=slots.entries.astype(jnp.float32) * scales, scales=None)
    found, expected = (
        evict(cache.replace(slots=one), None, rule, (None,) * LAYERS).slots
        for one in (slots, exact)
    )
    assert found.entries.dtype == jnp.int8
    assert int((found.positions >= LENGTHS[:, None]).sum()) > 0
    for name in ("owners", "positions", "counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_eviction_by_hand():
    """One head, two slots, one new token: the older entry that the query ignores gives way."""
    keys = np.zeros((1, 4, 1, 2), np.float32)
    keys[0, :, 0] = [[1, 0], [0, 3], [3, 0], [0, 1]]
    config = CompressionConfig.named("streaming-llm", 3, sinks=2, recent=1, layout="packed")
    cache = kvjax.compress([jnp.asarray(keys)], [jnp.asarray(keys * 10)], [kvjax.Probe()], config)
    assert np.flatnonzero(kept_mask(cache.slots, 0, 4)[0, 0]).tolist() == [0, 1, 3]
    rule = Recompress(every=2, budget=4, window=1, sinks=0)
    cache, _ = add_pages(with_room(cache, 2), rule, 1)
    tail = cache.tail.replace(
        keys=(jnp.array([[[[1.0, 1], [0, 0]]]]),),
        values=(jnp.array([[[[5.0, 5], [6, 6]]]]),),
        positions=jnp.array([[4, 5]]),
        queries=(jnp.array([[[[0.0, 9]]]]),),  # looks along the second axis
        query_positions=jnp.array([[5]]),
    )
    after = evict(cache.replace(tail=tail, next_positions=jnp.array([6])), None, rule, (None,))
    assert np.flatnonzero(kept_mask(after.slots, 0, 6)[0, 0]).tolist() == [1, 3, 4, 5]
    # Position 0 lay in slot 0, which is written anew, with what the empty one did not take.
    assert after.slots.positions[0, :4].tolist() == [4, 1, 3, 5]
    assert (after.slots.owners[0, 4:] == -1).all()  # the rest of the page
    np.testing.assert_array_equal(after.slots.entries[0, 0], [1, 1, 5, 5])
    np.testing.assert_array_equal(after.slots.entries[0, 1], [0, 3, 0, 30])


def test_the_ratio_by_hand():
    """PrefixKV: 100 of 400 kept; after 200 more 300 - 150 = 150; and what is frozen stays."""
    kept, lengths = jnp.array([[100, 400, 0]]), jnp.array([400])
    assert allowed(kept, lengths, 200).tolist() == [[150, 600, 0]]
    assert allowed(kept, lengths, 0).tolist() == [[100, 400, 0]]
    assert slots_needed(100, 4, Recompress(every=8), new=10, fraction=0.25) == 100 + 4 * 5
    assert slots_needed(40, 4, Recompress(every=8, budget=12), new=10, fraction=1.0) == 48


def test_by_ratio_the_earliest_after_the_frozen_point_go():
    rule = Recompress(every=U)
    cache, ratio = with_answer(prompt_cache("prefixkv", 0.5), rule)
    after = evict(cache, ratio, rule, (None,) * LAYERS)
    gone = 0
    for layer in range(LAYERS):
        for row in range(B):
            before, found = entries(cache, layer, row, True), entries(after, layer, row, False)
            grown = int(cache.next_positions[row]) - LENGTHS[row]
            for head in range(K):
                mine = sorted(p for h, p in before if h == head)
                kept = int(ratio.kept[row, layer, head])
                may_go = min(25, kept - kept // 2)
                assert int(ratio.frozen[row, layer, head]) == mine[: -grown or None][-may_go]
                room = kept + grown - grown * (LENGTHS[row] - kept) // LENGTHS[row]
                loose = [p for p in mine if p >= int(ratio.frozen[row, layer, head])]
                excess = len(mine) - room
                expected = [p for p in mine if p not in loose[:excess]]
                assert sorted(p for h, p in found if h == head) == expected
                gone += excess
    assert gone > 10


def test_what_freed_slots_and_the_tail_hold_changes_nothing():
    """NaN in every slot that nobody owns, in the holes of the tail, in stale queries."""
    cache, _ = with_answer(prompt_cache(), RULE)
    expected = evict(cache, None, RULE, (None,) * LAYERS)
    hole_BKU1 = (cache.tail.positions < 0)[:, None, :, None]
    free = (cache.slots.owners < 0)[..., None]
    assert bool(free.any())
    assert bool(hole_BKU1.any())
    stale = (cache.tail.query_positions < 0)[..., None, None]

    def poisoned(arrays, where):
        return tuple(jnp.where(where, jnp.nan, x) for x in arrays)

    tail = cache.tail.replace(
        keys=poisoned(cache.tail.keys, hole_BKU1),
        values=poisoned(cache.tail.values, hole_BKU1),
        queries=poisoned(cache.tail.queries, stale),
    )
    pool = cache.slots.replace(entries=jnp.where(free, jnp.nan, cache.slots.entries))
    found = evict(cache.replace(tail=tail, slots=pool), None, RULE, (None,) * LAYERS)
    filled = found.slots.owners >= 0
    np.testing.assert_array_equal(found.slots.owners, expected.slots.owners)
    np.testing.assert_array_equal(found.slots.positions, expected.slots.positions)
    np.testing.assert_array_equal(
        np.where(filled[..., None], found.slots.entries, 0), np.where(
            filled[..., None], expected.slots.entries, 0)
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("method", ["snapkv", "ada-snapkv", "joint-snapkv", "prefixkv"])
def test_more_pages_hold_every_entry_and_add_room(method, layout):
    cache = prompt_cache(method, 0.25, layout)
    rule = Recompress(every=U, budget=T)
    loose, _ = add_pages(cache, rule, N)
    packed = prompt_cache(method, 0.25, "packed")
    for layer in range(LAYERS):
        for row in range(B):
            before, after = (entries(c, layer, row, False) for c in (packed, loose))
            assert before.keys() == after.keys()
            for place, entry in before.items():
                np.testing.assert_array_equal(entry, after[place])
    assert_room(loose, LAYERS * K * rule.budget)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": 1}, "recompress.every=1, expected an integer of at least 2"),
        ({"budget": 3}, "recompress.budget=3, expected an integer of at least 4"),
        ({"floor": 2.0}, "recompress.floor=2.0, expected a number from 0 to 1"),
        ({"layers": "ada"}, "recompress.layers='ada', expected one of uniform, global"),
        (
            {"layers": "global", "budget": 9},
            "recompress.layers='global', expected 'uniform' without scorer='squared-sum' and a"
            " budget",
        ),
        (
            {"layers": "global", "budget": 9, "scorer": "squared-sum", "heads": "uniform"},
            "recompress.heads='uniform', expected 'ada' with layers='global', whose threshold"
            " divides both",
        ),
        ({"window": 9}, "recompress.window=9, expected at most every=8"),
        ({"budget": 8, "window": 5}, "recompress.window=5, expected with 4 sinks less than 8"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Recompress(**({"every": 8} | changes))


def test_a_budget_below_what_is_held_is_refused():
    with pytest.raises(ConfigError, match="budget=8, expected at least the 10 entries a head"):
        add_pages(prompt_cache(), Recompress(every=8, budget=8), N)
    with pytest.raises(ConfigError, match="budget=8, expected at least the 9 entries a head"):
        check_held(Recompress(every=8, budget=8), 4, 33)
    check_held(Recompress(every=8, budget=8), 4, 32)
    huge = Recompress(every=8, budget=10**8)
    with pytest.raises(ConfigError, match="budget=100000000 comes to 6400000000 slots for 64 he"):
        slots_needed(0, 64, huge, 0, 1.0)


@pytest.mark.parametrize(
    ("method", "budget", "layout"),
    [("full", None, None), ("ada-snapkv", 0.25, "padded"), ("prefixkv", 12, "packed")],
)
def test_a_budget_of_what_is_held_is_enough(method, budget, layout):
    """Of 10 and 9 tokens, in whatever slots the bucket of 40 or the padded layout has for them."""
    lengths = np.array([10, 9], np.int32)
    cache = prompt_cache(method, budget, layout, lengths=lengths)
    most = -(-int(cache.counts.sum((1, 2)).max()) // (LAYERS * K))
    rule = Recompress(every=U, budget=max(most, 4))
    assert cache.nbytes > B * LAYERS * K * rule.budget * 2 * H * 4
    loose, _ = add_pages(cache, rule, N)
    assert_room(loose, LAYERS * K * rule.budget)
    for layer, row in np.ndindex(LAYERS, B):
        found = entries(loose, layer, row, False)
        held = np.argwhere(np.asarray(cache.kept_mask(T))[row, layer])
        assert sorted(found) == list(map(tuple, held.tolist()))


def test_padded_layers_that_differ_keep_what_they_hold():
    """PrefixKV kept 46 entries of one layer and 50 of the other, side by side in equal buffers."""
    cache = prompt_cache("snapkv", 25, "padded", lengths=np.array([T, T], np.int32))
    first = cache.layers[0]  # each head loses its last two
    mask = jnp.arange(first.positions.shape[2]) < 23
    first = first.replace(positions=jnp.where(mask, first.positions, -1))
    cache = cache.replace(layers=(first, *cache.layers[1:]))
    assert cache.counts[0].sum(-1).tolist() == [46, 50]
    roomy, _ = add_pages(cache, Recompress(every=U, budget=24), N)
    np.testing.assert_array_equal((roomy.slots.owners >= 0).sum(1), [96] * B)
    for layer, row in np.ndindex(LAYERS, B):
        held = np.argwhere(np.asarray(cache.kept_mask(T))[row, layer])
        assert sorted(entries(roomy, layer, row, False)) == list(map(tuple, held.tolist()))


def test_a_second_rule_may_have_less_room():
    """What the first left empty is not held; layers need not be alike by then."""
    cache, _ = with_answer(prompt_cache(), Recompress(every=U, budget=30, window=4))
    cache = evict(cache, None, Recompress(every=U, budget=30, window=4), (None, 7))
    counts = np.asarray(cache.slots.counts)
    assert (counts[:, 0] > counts[:, 1]).all()
    most = -(-int(counts.sum((1, 2)).max()) // (LAYERS * K))
    loose, _ = add_pages(cache, Recompress(every=U, budget=most), N)
    for layer, row in np.ndindex(LAYERS, B):
        before, after = (entries(c, layer, row, False) for c in (cache, loose))
        assert before.keys() == after.keys()
        for place, entry in before.items():
            np.testing.assert_array_equal(entry, after[place])


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sliding_windows_get_no_room_that_they_cannot_fill(layout):
    """A window of 7 sees 6 entries a head; what is left of the budget goes to the other layer."""
    cache, rule = prompt_cache("snapkv", 5, layout), Recompress(every=U, budget=20)
    mixed, _ = add_pages(cache, rule, N, windows=(None, 7))
    assert mixed.slots.lengths.tolist() == [[K * 34, K * 6]] * B
    both, _ = add_pages(cache, rule, N, windows=(7, 7))
    assert_room(both, 2 * K * 6)
    assert both.slots.lengths.tolist() == [[K * 6, K * 6]] * B
    np.testing.assert_array_equal(both.counts, cache.counts)


def test_the_room_of_a_row_is_its_own():
    """Five tokens, alone and beside 40: by the ratio, what they hold and the answer's part."""
    rule = Recompress(every=U)
    room = {}
    for lengths in ((5, 5), (5, 40)):
        cache = prompt_cache("prefixkv", 0.1, lengths=np.array(lengths, np.int32))
        loose, _ = add_pages(cache, rule, N, 30, 0.1)
        sizes = np.asarray(loose.slots.lengths)
        room[lengths] = sizes[0].tolist()
        held = np.asarray(cache.counts.sum((1, 2)))
        assert sizes.sum(1).tolist() == (held + LAYERS * K * (3 + 2)).tolist()
    assert room[5, 5] == room[5, 40]


def test_heads_that_may_not_evict_take_from_those_that_may():
    """Some 40 and 8 entries of 48, and 100 tokens since, in 48 slots: what is frozen stays."""
    norms = np.where(np.arange(48)[:, None] < np.array([40, 8]), 0.1, 10.0)[None, :, :, None]
    keys = [normal(seed, 1, 48, K, H) * norms.astype(np.float32) for seed in range(LAYERS)]
    config = CompressionConfig.named(
        "kv-compress", 0.5, scorer="key-norm", recent=1, keep_ratio=True, layout="packed"
    )
    cache = kvjax.compress(keys, keys, [kvjax.Probe()] * LAYERS, config)
    assert (cache.counts[0, :, 0] > 35).all()
    cache = with_room(cache, 100)
    tail = cache.tail.replace(positions=48 + jnp.arange(100)[None], cursor=jnp.asarray(100))
    cache = cache.replace(tail=tail, next_positions=jnp.array([148]))
    loose, _ = make_room(cache, Recompress(every=4, budget=24), N, (None,) * LAYERS, asked=True)
    for layer in range(LAYERS):
        found = [head for head, _ in entries(loose, layer, 0, False)]
        assert [found.count(head) for head in range(K)] == loose.counts[0, layer].tolist()
        assert len(found) == int(loose.slots.lengths[0, layer])
