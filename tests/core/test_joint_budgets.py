"""One budget over all layers and heads: counts among the largest, KV-Compress, joint PrefixKV.

Oracles sort in float64, or add up in fractions; KV-Compress's own rule, block by block, is one too.
"""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvjax import CompressionConfig, Probe, compress, exact
from kvjax.cache.attend import attend
from kvjax.compression import allocators
from kvjax.compression.compress import make_plan
from kvjax.compression.scorers import ScorerInput, score

B, L, K, S = 2, 2, 3, 6
X = L * K  # curves of a row
LEVELS = [0.0, 0.0, 1.0, 1.0, 0.25, 0.1, 3.0, 7.5, 1e-30, 1e30]
ODD = [*LEVELS, np.nan, np.inf, -np.inf, -1.0]

examples = settings(max_examples=50, deadline=None, derandomize=True)
select_top = jax.jit(exact.select_top)
kth_largest = jax.jit(exact.kth_largest, static_argnames="axes")
count_top = jax.jit(exact.count_top, static_argnames="axes")
global_heads = jax.jit(allocators.global_heads)
joint_heads = jax.jit(allocators.joint_heads, static_argnames="floor")


def ints(values) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def scores_of(values):
    """Scores full of ties; rows without any mass, or all alike, come up often."""
    drawn = arrays(np.float32, (B, L, K, S), elements=st.sampled_from([float(v) for v in values]))
    same = st.sampled_from([0.0, 0.1]).map(lambda v: np.full((B, L, K, S), v, np.float32))
    return st.one_of(drawn, drawn, same)


def untied(seed: int) -> np.ndarray:
    """Positive scores, no two equal, heads of unlike curves."""
    rng = np.random.default_rng(seed)
    power = 2 ** rng.uniform(-1, 5, (B, L, K, 1))
    return (1e-3 + rng.random((B, L, K, S)) ** power).astype(np.float32)


counts = partial(st.lists, min_size=B, max_size=B)
masks = arrays(bool, (B, L, K, S))
any_mask = st.one_of(masks, st.just(np.ones((B, L, K, S), bool)))
whole = arrays(np.int32, (B, L, K, S), elements=st.integers(0, 100))
seeds = st.integers(0, 2**32 - 1)
totals = counts(st.integers(0, X * S + 3))
floors = st.sampled_from((0.0, 0.2, 0.5, 1.0))


def clean(scores) -> np.ndarray:
    return np.where(scores > 0, scores, 0.0).astype(np.float64)


# ---------------------------------------------------------------------------- counting
keys_of = arrays(np.uint32, (B, L, K, S), elements=st.sampled_from([0, 1, 2, 7, 2**31, 2**32 - 1]))


@examples
@given(st.one_of(keys_of, arrays(np.uint32, (B, L, K, S))), st.integers(1, 3), st.data())
def test_kth_largest_of_several_axes_is_a_sort(keys, axes, data):
    """[B, L, K, S]: over S; over K and S; over layers, heads and S at once."""
    flat = keys.reshape(*keys.shape[: 4 - axes], -1).astype(np.int64)
    k = data.draw(arrays(int, flat.shape[:-1], elements=st.integers(-1, flat.shape[-1])))
    falling = -np.sort(-flat, axis=-1)
    at_k = np.take_along_axis(falling, np.maximum(k - 1, 0)[..., None], axis=-1)[..., 0]
    found = kth_largest(jnp.asarray(keys), ints(k), axes=axes)
    np.testing.assert_array_equal(found, np.where(k > 0, at_k, 2**32 - 1))


def count_oracle(ranks: np.ndarray, eligible: np.ndarray, k: int) -> np.ndarray:
    """Each row's members among the k largest eligible of all rows: a flat, stable sort."""
    order = np.argsort(np.where(eligible, -ranks, np.inf).ravel(), kind="stable")
    kept = np.zeros(ranks.size, bool)
    kept[order[: max(k, 0)]] = True
    return (kept.reshape(ranks.shape) & eligible).sum(-1)


@examples
@given(st.one_of(keys_of, arrays(np.uint32, (B, L, K, S))), st.sampled_from([2, 3]), st.data())
def test_count_top_is_a_flat_sort(keys, axes, data):
    shape = keys.shape[: 4 - axes]
    k = data.draw(arrays(int, shape, elements=st.integers(-1, K * S * (axes - 1) + 2)))
    found = np.asarray(count_top(jnp.asarray(keys), ints(k), axes=axes))
    for index in np.ndindex(*shape):
        one = keys[index].astype(np.float64)
        np.testing.assert_array_equal(found[index], count_oracle(one, one > 0, k[index]))


def test_count_top_by_hand():
    keys = jnp.array([[9, 5, 5, 0], [5, 5, 1, 0], [7, 5, 0, 0]], jnp.uint32)
    at = {0: [0, 0, 0], 1: [1, 0, 0], 2: [1, 0, 1], 3: [2, 0, 1], 5: [3, 1, 1], 7: [3, 2, 2]}
    for k, sizes in (at | {8: [3, 3, 2], 99: [3, 3, 2], -1: [0, 0, 0]}).items():
        assert count_top(keys, ints(k)).tolist() == sizes, k


# ---------------------------------------------------------------------------- KV-Compress
V4 = {"A": [5.0, 1.0, 4.0, 2.0, 3.0], "B": [2.5, 0.5]}


def evict_blocks(metrics: dict[str, list[float]], size: int, blocks: int) -> dict[str, list]:
    """KV-Compress as its authors free `blocks` blocks of `size` entries: what each head loses.

    The first costs what the head's last block holds; its price is the largest metric to go.
    """
    prices, costs = [], {}
    for head, values in metrics.items():
        rising, last = sorted(values), (len(values) - 1) % size + 1
        costs[head] = range(last, len(values) + 1, size)
        prices += [(rising[cost - 1], head) for cost in costs[head]]
    freed = [head for _, head in sorted(prices)[:blocks]]
    lost = {head: (0, *costs[head])[freed.count(head)] for head in metrics}
    return {head: sorted(values)[: lost[head]] for head, values in metrics.items()}


def of_heads(metrics: dict[str, list[float]]) -> tuple[jax.Array, jax.Array]:
    """Metrics as [1, 1, K, S] scores and what is eligible of them."""
    rows = [values + [np.nan] * (S - len(values)) for values in metrics.values()]
    scores = jnp.asarray([[rows]], jnp.float32)
    return scores, ~jnp.isnan(scores)


def test_kv_compress_v4():
    """The authors' blocks of two, and entries: the same number of them, the better ones."""
    assert evict_blocks(V4, 2, 2) == {"A": [1.0], "B": [0.5, 2.5]}
    assert evict_blocks(V4, 2, 3) == {"A": [1.0, 2.0, 3.0], "B": [0.5, 2.5]}
    # Four entries stay: by blocks A's 5, 4, 2, 3; here A's 5, 4, 3 and B's 2.5. Two: 5 and 4.
    at = [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [4, 1], [5, 1], [5, 2], [5, 2]]
    for budget, sizes in enumerate(at):
        assert global_heads(*of_heads(V4), ints([budget])).tolist() == [[sizes]]


@examples
@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=S), min_size=2, max_size=4))
def test_kv_compress_with_blocks_of_one_entry(drawn):
    """Its own rule at that size is `global_heads`, whatever is evicted."""
    unlike = [
        [n + index / 7 + i / 97 for i, n in enumerate(row)] for index, row in enumerate(drawn)
    ]
    metrics = dict(enumerate(unlike))
    most, total = 4, sum(map(len, drawn))  # one shape for all
    scores, eligible = of_heads(metrics | {index: [] for index in range(len(drawn), most)})
    for blocks in (0, 1, total // 2, total):
        kept = global_heads(scores, eligible, ints([total - blocks]))[0, 0].tolist()
        lost = evict_blocks(metrics, 1, blocks)
        assert kept[: len(drawn)] == [len(row) - len(lost[h]) for h, row in metrics.items()]
        assert not any(kept[len(drawn) :])


@examples
@given(scores_of(ODD), any_mask, totals)
def test_global_is_a_flat_sort_of_the_row(scores, eligible, budget):
    """NaN and negative scores are 0; ties go to the lower layer, then the lower head."""
    found = np.asarray(global_heads(jnp.asarray(scores), jnp.asarray(eligible), ints(budget)))
    for row in range(B):
        expected = count_oracle(clean(scores[row]), eligible[row], budget[row])
        np.testing.assert_array_equal(found[row], expected)


@examples
@given(scores_of(ODD), any_mask, totals)
def test_what_global_evicts_is_never_better_than_what_it_keeps_v8(scores, eligible, budget):
    """So no sizes of the same sum, such as joint's or even ones, retain more."""
    args, worth = (jnp.asarray(scores), jnp.asarray(eligible)), clean(scores)
    sizes = global_heads(*args, ints(budget))
    joint = joint_heads(*args, ints(budget) // X, ints(budget), floor=0.0)
    kept, others = (np.asarray(select_top(args[0], each, args[1])) for each in (sizes, joint))
    np.testing.assert_array_equal(kept.sum(-1), sizes)
    for row in range(B):
        evicted = worth[row][eligible[row] & ~kept[row]]
        survivors = worth[row][kept[row]]
        if evicted.size and survivors.size:
            assert evicted.max() <= survivors.min()
        finite = np.where(np.isfinite(worth[row]), worth[row], 1e35)
        retained, other = (finite[mask[row]].sum() for mask in (kept, others))
        assert retained >= other * (1 - 1e-12)


def attended(new_NH, k_TKH, v_TKH, keep_KT) -> np.ndarray:
    """Oracle: dense attention in float64, over what is kept."""
    group = len(new_NH) // len(keep_KT)
    out = []
    for head, query in enumerate(new_NH.astype(np.float64)):
        keep = keep_KT[head // group]
        weights = np.exp(k_TKH[keep, head // group] @ query / np.sqrt(len(query)))
        out.append(weights @ v_TKH[keep, head // group] / weights.sum())
    return np.stack(out)


def test_kv_compress_keeps_a_row_s_best_and_attends_to_them_alone_v8():
    """From keys to attention: an exact budget, no evicted score above a kept one."""
    rng, tokens, lengths, budget = np.random.default_rng(4), 40, [40, 25], 17
    q, k, v = (rng.normal(size=(2, B, tokens, n, 8)).astype(np.float32) for n in (4, 2, 2))
    config = CompressionConfig.named("kv-compress", budget, window=4)

    @jax.jit
    def run(queries, keys, values, new):
        probes = [Probe(queries=2 * layer[:, -4:]) for layer in queries]
        plan = make_plan(config, ints(lengths), tokens, (None, None))
        layers = zip(probes, keys, values, strict=True)
        scores = [score(ScorerInput(*one, plan.rows, config, plan.key, None)) for one in layers]
        cache = compress(
            list(keys), list(values), probes, config, lengths=ints(lengths), tail_slots=1
        )
        seen = [attend(new, ints(lengths)[:, None], cache, layer, None) for layer in range(2)]
        return cache.kept_mask(tokens), jnp.stack(scores, 1), jnp.stack(seen, 1)

    new = rng.normal(size=(B, 1, 4, 8)).astype(np.float32)
    kept, scores, seen = map(np.asarray, run(*map(jnp.asarray, (q, k, v, new))))
    np.testing.assert_array_equal(kept.sum((1, 2, 3)), 2 * 2 * budget)
    assert len(set(kept[0].sum(-1).ravel().tolist())) > 1
    for row, n in enumerate(lengths):
        assert kept[row, :, :, n - 4 : n].all()
        chosen, gone = kept[row, :, :, : n - 4], ~kept[row, :, :, : n - 4]
        worth = scores[row, :, :, : n - 4]
        assert worth[gone].max() <= worth[chosen].min()
        for layer in range(2):
            dense = attended(new[row, 0], k[layer, row], v[layer, row], kept[row, layer])
            np.testing.assert_allclose(seen[row, layer, 0], dense, atol=2e-6)


# ---------------------------------------------------------------------------- joint PrefixKV
def joint_oracle(scores, eligible, base: int, budget: int, floor: float) -> list[int]:
    """Joint PrefixKV by its definition, in fractions, trying every threshold there is."""
    rows = zip(scores.reshape(-1, S), eligible.reshape(-1, S), strict=True)
    ranked = [sorted(map(Fraction, row[can].tolist()), reverse=True) for row, can in rows]
    least = int(Fraction(round(floor * 1000), 1000) * base)
    whole = [sum(row) or 1 for row in ranked]

    def share(row, mass, i) -> Fraction:  # without any mass, last of all, but for the floor
        return Fraction(0 if i < least else sum(row[:i]) / mass if any(row) else 1)

    curves = zip(ranked, whole, strict=True)
    before = [[share(row, mass, i) for i in range(len(row))] for row, mass in curves]

    def sizes_at(p):
        return [sum(one < p for one in row) for row in before]

    if budget >= sum(map(len, ranked)):
        return [len(row) for row in ranked]
    p = max(p for row in before for p in row if sum(sizes_at(p)) <= budget)
    sizes = sizes_at(p)
    spare = budget - sum(sizes)
    tied = [x for x in range(X) if p in before[x]]
    for x in sorted(tied, key=lambda x: -ranked[x][sizes[x]] / whole[x]):
        more = min(spare, before[x].count(p))
        sizes[x], spare = sizes[x] + more, spare - more
    return sizes


@examples
@given(st.one_of(whole, seeds.map(untied)), any_mask, counts(st.integers(0, S)), floors)
def test_joint_equals_its_definition(scores, eligible, base, floor):
    """Whole scores tie exactly in float32 too; the others have no near-ties."""
    budget = X * np.array(base) + [0, 2]  # what does not divide, too
    scores = np.where(eligible, scores, 0).astype(np.float32)
    args = jnp.asarray(scores), jnp.asarray(eligible), ints(base), ints(budget)
    found = np.asarray(joint_heads(*args, floor=floor)).reshape(B, X).tolist()
    rows = zip(scores, eligible, base, budget.tolist(), strict=True)
    assert found == [joint_oracle(*row, floor) for row in rows]


TWO = np.array([[[[0.7, 0.1, 0.1, 0.1], [0.25] * 4]]], np.float32)
ONE = TWO * [[0], [1]] + [[[[97, 1, 1, 1], [0] * 4]]]  # one entry of the first head has it all


@pytest.mark.parametrize(
    ("scores", "floor", "budget", "sizes"),
    [
        (TWO, 0.0, 4, [1, 3]),  # V3: p in (0.5, 0.7]
        (TWO, 0.0, 1, [1, 0]),  # both first entries tie at 0: the heavier
        (TWO, 0.0, 5, [2, 3]),
        (TWO, 0.0, 7, [3, 4]),
        (TWO, 1.0, 4, [2, 2]),
        (ONE, 0.7, 5, [1, 4]),  # the floor of 0.7 times a base of 2 is 1,
        (ONE, 1.0, 5, [2, 3]),  # of 1.0 times 2 it is 2
        (TWO * [[1], [1e-6]], 0.0, 4, [1, 3]),  # only shares within a head matter
        (TWO * [[1], [0]], 0.0, 3, [3, 0]),  # without any mass: last of all,
        (TWO * [[1], [0]], 0.5, 4, [3, 1]),  # but for the floor,
        (TWO * [[1], [0]], 0.0, 6, [4, 2]),  # or when all others have everything
    ],
)
def test_joint_by_hand(scores, floor, budget, sizes):
    args = jnp.asarray(scores, jnp.float32), jnp.ones((1, 1, 2, 4), bool)
    found = joint_heads(*args, ints([budget // 2]), ints([budget]), floor=floor)
    assert found.tolist() == [[sizes]]


def test_a_weak_head_starves_under_one_threshold_of_scores_alone():
    """KV-Compress compares scores of all heads, joint PrefixKV shares within each."""
    scores = jnp.asarray(TWO[:, :, [1, 1]] * [[1], [1e-3]], jnp.float32)
    every = jnp.ones((1, 1, 2, 4), bool)
    assert global_heads(scores, every, ints([4])).tolist() == [[[4, 0]]]
    assert joint_heads(scores, every, ints([2]), ints([4]), floor=0.0).tolist() == [[[2, 2]]]


@examples
@given(scores_of(ODD), any_mask, totals, floors)
def test_joint_sums_floors_and_room(scores, eligible, budget, floor):
    base = np.array(budget) // X
    args = jnp.asarray(scores), jnp.asarray(eligible), ints(base), ints(budget)
    sizes = np.asarray(joint_heads(*args, floor=floor))
    room = eligible.sum(-1)
    np.testing.assert_array_equal(sizes.sum((1, 2)), np.minimum(budget, room.sum((1, 2))))
    least = np.array([int(Fraction(round(floor * 1000), 1000) * int(b)) for b in base])
    assert (sizes >= np.minimum(least[:, None, None], room)).all()
    assert (sizes <= room).all()


@examples
@given(scores_of(LEVELS), floors)
def test_joint_at_every_budget_is_monotone(scores, floor):
    """All budgets at once, as rows: with the base that each has, and with one base for all."""
    bases = np.arange(S + 2)
    rows = jnp.broadcast_to(jnp.asarray(scores[0]), (S + 2, L, K, S))
    every = jnp.ones(rows.shape, bool)
    sizes = np.asarray(joint_heads(rows, every, ints(bases), ints(X * bases), floor=floor))
    assert (np.diff(sizes, axis=0) >= 0).all()
    more = X + np.arange(S + 2) * 3
    sizes = np.asarray(joint_heads(rows, every, ints(0 * bases + 1), ints(more), floor=floor))
    assert (np.diff(sizes, axis=0) >= 0).all()


@examples
@given(scores_of(ODD), any_mask)
def test_global_at_every_budget_is_monotone(scores, eligible):
    rows, can = (
        jnp.broadcast_to(jnp.asarray(x[0]), (X * S + 2, L, K, S)) for x in (scores, eligible)
    )
    sizes = np.asarray(global_heads(rows, can, ints(np.arange(X * S + 2))))
    assert (np.diff(sizes, axis=0) >= 0).all()
    assert (sizes[0] == 0).all()
    np.testing.assert_array_equal(sizes[-1], eligible[0].sum(-1))


# ---------------------------------------------------------------------------- both
BOTH = {
    "global": global_heads,
    "joint": lambda scores, can, budget: joint_heads(scores, can, budget // X, budget, floor=0.2),
}
either = st.sampled_from(sorted(BOTH))


@examples
@given(either, seeds, st.permutations(range(L)), st.permutations(range(K)), totals)
def test_sizes_move_with_layers_and_heads(name, seed, layers, heads, budget):
    scores, every = untied(seed), jnp.ones((B, L, K, S), bool)
    sizes = np.asarray(BOTH[name](jnp.asarray(scores), every, ints(budget)))
    moved = BOTH[name](jnp.asarray(scores[:, layers][:, :, heads]), every, ints(budget))
    np.testing.assert_array_equal(moved, sizes[:, layers][:, :, heads])


@examples
@given(either, scores_of(LEVELS), masks, totals)
def test_what_is_not_eligible_never_counts(name, scores, eligible, budget):
    plain = np.asarray(BOTH[name](jnp.asarray(scores), jnp.asarray(eligible), ints(budget)))
    assert (plain <= eligible.sum(-1)).all()
    for filler in (np.nan, np.inf, 1e38):
        filled = np.where(eligible, scores, np.float32(filler))
        again = BOTH[name](jnp.asarray(filled), jnp.asarray(eligible), ints(budget))
        np.testing.assert_array_equal(again, plain)


@examples
@given(either, scores_of(LEVELS), masks, totals)
def test_nan_is_a_score_of_0(name, scores, spoiled, budget):
    """It takes nothing from its head's other entries, and is kept last."""
    every = jnp.ones((B, L, K, S), bool)
    plain = BOTH[name](jnp.asarray(np.where(spoiled, 0, scores)), every, ints(budget))
    for value in (np.nan, -1.0):
        odd = np.where(spoiled, np.float32(value), scores)
        found = BOTH[name](jnp.asarray(odd), every, ints(budget))
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("name", sorted(BOTH))
def test_a_row_alone_is_the_row_in_a_batch(name):
    lengths, budget = np.array([S, 4, 1]), ints([20, 13, 6])
    scores = jnp.asarray(np.concatenate([untied(0), untied(1)[:1]]))
    can = jnp.asarray(np.broadcast_to(np.arange(S) < lengths[:, None, None, None], scores.shape))
    together = np.asarray(BOTH[name](scores, can, budget))
    assert together.sum((1, 2)).tolist() == [20, 13, 6]
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone = BOTH[name](scores[one], can[one], budget[one])
        short = BOTH[name](scores[one, :, :, :n], can[one, :, :, :n], budget[one])
        np.testing.assert_array_equal(alone[0], together[row])
        np.testing.assert_array_equal(short[0], together[row])
