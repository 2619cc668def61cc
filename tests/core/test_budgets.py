"""Allocators: hand-worked vectors, numpy oracles, and the invariants that hold for any scores."""

import json
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvjax import exact
from kvjax.compression import allocators

B, L, K, S = 2, 3, 4, 8
FLOORS = (0.0, 0.2, 0.5, 1.0)
LEVELS = [0.0, 0.0, 1.0, 1.0, 1e-30, 0.25, 0.1, 3.0, 7.5, 1e30]
ODD = [*LEVELS, np.nan, np.inf, -np.inf, -1.0]

examples = settings(max_examples=50, deadline=None, derandomize=True)
select_top = jax.jit(exact.select_top)
kth_largest = jax.jit(exact.kth_largest)
largest_remainder = jax.jit(exact.largest_remainder, static_argnums=1)
spread = jax.jit(exact.spread)
uniform_layers = jax.jit(allocators.uniform_layers)
pyramid_layers = jax.jit(allocators.pyramid_layers, static_argnames="beta")
profile_layers = jax.jit(allocators.profile_layers)
prefix_layers = jax.jit(allocators.prefix_layers)
ada_heads = jax.jit(allocators.ada_heads, static_argnames="floor")


def ints(values) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def floats(values) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def scores_of(shape: tuple[int, ...], values=LEVELS):
    """Scores full of ties, sometimes all equal; all-zero ones come up often."""
    drawn = arrays(np.float32, shape, elements=st.sampled_from([float(v) for v in values]))
    same = st.sampled_from([0.0, 1.0, 0.1]).map(lambda v: np.full(shape, v, np.float32))
    return st.one_of(drawn, drawn, same)


def untied(shape: tuple[int, ...]):
    """Positive scores, no two equal, in any order."""
    return st.permutations(range(1, 1 + int(np.prod(shape)))).map(
        lambda values: np.array(values, np.float32).reshape(shape)
    )


counts = partial(st.lists, min_size=B, max_size=B)
masks = arrays(bool, (B, S))
bases = counts(st.integers(0, S))
lengths = counts(st.integers(1, S))


def rows_eligible(row_lengths, heads: int) -> np.ndarray:
    return np.arange(S) < np.zeros((B, heads, 1), int) + np.reshape(row_lengths, (B, 1, 1))


# ---------------------------------------------------------------------------- selection
def best(scores: np.ndarray, k: int, eligible: np.ndarray) -> np.ndarray:
    """Oracle: a stable sort of what is eligible; NaN and negative scores count as 0."""
    clean = np.where(scores > 0, scores, 0.0)
    order = np.argsort(np.where(eligible, -clean, np.inf), kind="stable")
    kept = np.zeros(scores.shape, bool)
    kept[order[: max(k, 0)]] = True
    return kept & eligible


@examples
@given(scores_of((B, S), ODD), counts(st.integers(-1, S + 2)), masks)
def test_select_top_is_a_stable_sort(scores, k, eligible):
    kept = np.asarray(select_top(floats(scores), ints(k), jnp.asarray(eligible)))
    expected = [best(*row) for row in zip(scores, k, eligible, strict=True)]
    np.testing.assert_array_equal(kept, expected)


@examples
@given(arrays(np.uint32, (B, S)), counts(st.integers(-1, S)))
def test_kth_largest_is_a_sort(keys, k):
    found = kth_largest(jnp.asarray(keys), ints(k))
    falling = -np.sort(-keys.astype(np.int64), axis=-1)
    expected = [row[n - 1] if n > 0 else 2**32 - 1 for row, n in zip(falling, k, strict=True)]
    np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------------------- sharing out
def hamilton(quotas: list[Fraction], first: list[int] | None = None) -> list[int]:
    """Oracle: largest remainder, ties to the order of `first`, or to the lower index."""
    sizes = [int(quota) for quota in quotas]
    order = first or list(range(len(quotas)))
    queue = sorted(range(len(quotas)), key=lambda i: (int(quotas[i]) - quotas[i], order.index(i)))
    for index in queue[: int(sum(quotas)) - sum(sizes)]:
        sizes[index] += 1
    return sizes


@examples
@given(st.lists(st.integers(0, 10_000), min_size=L, max_size=L), st.sampled_from([1, 3, 7, 1000]))
def test_largest_remainder_is_hamiltons_method(numerators, denominator):
    numerators[-1] += -sum(numerators) % denominator
    expected = hamilton([Fraction(number, denominator) for number in numerators])
    assert largest_remainder(ints(numerators), denominator).tolist() == expected


@examples
@given(arrays(int, (3, 5), elements=st.integers(0, 12)), st.integers(0, 70), st.integers(0, 5))
def test_spread_levels_between_bounds_and_is_monotone(drawn, total, raised):
    wanted, caps, least = drawn[0], drawn[1], np.minimum(*drawn[1:])
    sizes = np.asarray(spread(ints(wanted), ints(caps), ints(total), ints(least)))
    assert sizes.sum() == np.clip(total, least.sum(), caps.sum())
    levels = [np.clip(wanted + level, least, caps) for level in range(-13, 15)]
    at = max(i for i in range(27) if levels[i].sum() <= max(total, least.sum()))
    grows = levels[at + 1] > levels[at]
    spare = total - levels[at].sum()
    np.testing.assert_array_equal(sizes, levels[at] + (grows & (np.cumsum(grows) <= spare)))

    wanted = wanted + (np.arange(5) == raised)  # or none
    more = spread(ints(wanted), ints(caps), ints(total + 1), ints(least))
    assert (np.asarray(more) >= sizes).all()


# ---------------------------------------------------------------------------- layers
LAYERS = 32


def test_pyramid_at_1024_of_8000_v2():
    caps = ints(np.full((1, LAYERS), 8000 - 32))
    sizes = np.asarray(pyramid_layers(ints([1024 - 32]), caps, 20))[0]
    high = 2 * 992 - 992 // 20
    upstream = high - np.arange(LAYERS) * ((high - 992 // 20) // (LAYERS - 1))
    assert (upstream.sum(), upstream[-1]) == (32160, 75)  # the step rounded down: 1.3 % too many
    assert sizes.sum() == LAYERS * 992 == 31744
    assert (sizes[0], sizes[-1]) == (1935, 49)
    assert (np.diff(sizes) < 0).all()
    exact = high - np.arange(LAYERS) * (high - 49) / (LAYERS - 1)
    assert (np.abs(sizes - exact) < 1).all()


def test_pyramid_flattens_where_the_prompt_is_short():
    sizes = np.asarray(pyramid_layers(ints([96, 96]), ints([[100] * 4, [96] * 4]), 20))
    np.testing.assert_array_equal(sizes, [[100, 97, 95, 92], [96] * 4])


@pytest.mark.parametrize("beta", [1, 20])
@pytest.mark.parametrize("caps_are", ["equal", "mixed", "one-token"])
def test_layer_sizes_at_every_budget(beta, caps_are):
    """Exact, capped, and (but for 1) monotone, from no entry to more than there are."""
    rng = np.random.default_rng(beta)
    caps = {"equal": 50, "mixed": rng.integers(0, 61, LAYERS), "one-token": 1}[caps_are]
    caps = np.zeros(LAYERS, int) + caps
    base = np.arange(64)
    every = np.broadcast_to(caps, (64, LAYERS))
    expected = np.minimum(LAYERS * base, caps.sum())
    uniform = np.asarray(uniform_layers(ints(base), ints(every)))
    largest = np.minimum(base, caps.max())
    pyramid = np.asarray(pyramid_layers(ints(largest), ints(every), beta))
    np.testing.assert_array_equal(uniform.sum(1), expected)
    np.testing.assert_array_equal(pyramid.sum(1), np.minimum(LAYERS * largest, caps.sum()))
    assert ((uniform <= caps) & (pyramid <= caps)).all()
    assert (np.diff(uniform, axis=0) >= 0).all()
    assert (np.diff(pyramid, axis=0) >= -1).all()
    if caps_are == "equal":
        np.testing.assert_array_equal(uniform, np.minimum(base, 50)[:, None] + 0 * uniform)
        assert (np.diff(pyramid, axis=1) <= 0).all()


def test_every_published_profile(shared_data):
    files = sorted((shared_data / "prefixkv_confs").glob("*.json"))
    assert len(files) == 20
    n, base = 626, 100
    for path in files:
        retained = 1 - np.array(json.loads(path.read_text()))
        layers = len(retained)
        assert layers == (32 if "7b" in path.name else 40)
        caps, none = ints(np.full((1, layers), n)), ints(np.zeros((1, layers)))
        sizes = profile_layers(floats(retained), None, caps, none, ints([n]))
        assert sizes.sum() == round(n * retained.sum())
        assert (np.abs(np.asarray(sizes) - n * retained) < 1).all()
        if path.name == "prefixkv_llava-v1.5-7b_0.5.json":
            assert sizes.sum() == 10_035
        scaled = profile_layers(floats(retained), ints([base]), caps, none, ints([n]))
        assert scaled.sum() == layers * base


@examples
@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.33, 0.5, 1.0]), min_size=L, max_size=L).filter(any),
    bases,
    lengths,
    st.integers(0, 2),
)
def test_profile_keeps_the_budget_and_what_is_protected(retained, base, n, held):
    n = np.array(n)
    base, held = np.minimum(base, n), np.minimum(held, np.minimum(base, n))
    caps, protected = (np.broadcast_to(row[:, None], (B, L)) for row in (n, held))
    args = ints(caps), ints(protected), ints(n)
    sizes = np.asarray(profile_layers(floats(retained), ints(base), *args))
    np.testing.assert_array_equal(sizes.sum(1), L * base)
    assert ((protected <= sizes) & (sizes <= caps)).all()


def test_profile_is_exact_above_2_to_the_24():
    rng, n = np.random.default_rng(71), 2**20
    caps = ints(np.full((1, 40), n))
    base = ints([500_123])
    sizes = profile_layers(floats(rng.random(40)), base, caps, 0 * caps, ints([n]))
    assert sizes.sum() == 40 * 500_123


# ---------------------------------------------------------------------------- PrefixKV
def prefix_oracle(scores: np.ndarray, room: np.ndarray, budget: int) -> list[int]:
    """PrefixKV by its definition, in fractions, trying every threshold there is."""
    ranked = [sorted(map(Fraction, row.tolist()), reverse=True) for row in scores]
    whole = [sum(row) or 1 for row in ranked]
    before = [  # without any mass, last of all
        [sum(row[:i]) / Fraction(mass) if sum(row) else Fraction(1) for i in range(n)]
        for row, mass, n in zip(ranked, whole, room, strict=True)
    ]

    def sizes_at(p):
        return [sum(share < p for share in row) for row in before]

    if budget >= sum(room):
        return list(room)
    p = max(p for row in before for p in row if sum(sizes_at(p)) <= budget)
    sizes = sizes_at(p)
    spare = budget - sum(sizes)
    tied = [layer for layer, row in enumerate(before) if p in row]
    for layer in sorted(tied, key=lambda layer: -ranked[layer][sizes[layer]] / whole[layer]):
        more = min(spare, before[layer].count(p))
        sizes[layer], spare = sizes[layer] + more, spare - more
    return sizes


def test_prefix_v3():
    scores = floats([[[0.7, 0.1, 0.1, 0.1], [0.25] * 4]])
    sizes = prefix_layers(scores, jnp.ones((1, 2, 4), bool), ints([[0, 0]]), ints([2]))
    assert sizes.tolist() == [[1, 3]]


def test_prefix_gives_what_ties_to_the_heaviest_next_token():
    scores = floats([[[0.5, 0.5], [0.9, 0.1], [0.6, 0.4]]])
    can, none = jnp.ones((1, 3, 2), bool), ints([[0, 0, 0]])
    # At p = 0 all first tokens tie: one each, or, with two protected, one for the heaviest.
    assert prefix_layers(scores, can, none, ints([1])).tolist() == [[1, 1, 1]]
    assert prefix_layers(scores, can, ints([[0, 1, 1]]), ints([1])).tolist() == [[0, 2, 1]]


whole_scores = arrays(np.int32, (B, L, S), elements=st.integers(0, 100))
real_scores = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).gamma(0.3, size=(B, L, S)).astype(np.float32)
)


@examples
@given(
    st.one_of(whole_scores, real_scores),
    counts(st.lists(st.integers(0, S), min_size=L, max_size=L)),
    counts(st.integers(0, 2)),
    bases,
)
def test_prefix_equals_its_definition(scores, room, held, base):
    """Whole scores tie exactly in float32 too; real ones have no near-ties."""
    held = np.minimum(held, base)[:, None] + np.zeros((B, L), int)
    room = np.minimum(room, S - held)
    eligible = np.arange(S) < (room + held)[..., None]
    ranked = np.where(eligible, scores, 0)
    sizes = np.asarray(prefix_layers(floats(scores), jnp.asarray(eligible), ints(held), ints(base)))
    for row in range(B):
        expected = prefix_oracle(ranked[row], room[row], L * base[row] - held[row].sum())
        assert (sizes[row] - held[row]).tolist() == expected


@examples
@given(scores_of((B, L, S), ODD), lengths, counts(st.integers(0, 2)), bases)
def test_prefix_sums_floors_and_growth(scores, n, held, base):
    base = np.minimum(base, n)
    protected = np.broadcast_to(np.minimum(held, base)[:, None], (B, L))
    args = floats(scores), jnp.asarray(rows_eligible(n, L)), ints(protected)
    sizes = np.asarray(prefix_layers(*args, ints(base)))
    np.testing.assert_array_equal(sizes.sum(1), L * base)
    assert ((protected <= sizes) & (sizes <= np.array(n)[:, None])).all()
    more = np.asarray(prefix_layers(*args, ints(np.minimum(base + 1, n))))
    assert (more >= sizes).all()


# ---------------------------------------------------------------------------- heads
V1 = [[[0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.3, 0.2, 0.1, 0.05, 0.04, 0.03]]]


@pytest.mark.parametrize(
    ("floor", "cap", "sizes"),
    [
        (0.0, 9, [6, 2]),
        (0.2, 9, [6, 2]),
        (0.5, 9, [5, 3]),
        (1.0, 9, [4, 4]),
        (0.0, 5, [5, 3]),
        (0.2, 4, [4, 4]),
    ],
)
def test_ada_v1(floor, cap, sizes):
    every = jnp.ones((1, 2, 6), bool)
    assert ada_heads(floats(V1), every, ints([4]), floor=floor, cap=ints([cap])).tolist() == [sizes]


def test_ada_never_takes_a_member_from_a_head_that_both_budgets_give_it():
    """n = (2, 1, 0), uniform (1, 1, 1): at alpha = 0.5 the second head has its one, whole."""
    scores = floats([[[0.91, 0.31, 0, 0], [0.9, 0, 0, 0], [0.3, 0.3, 0.3, 0.3]]])
    found = ada_heads(scores, scores >= 0, ints([1]), floor=0.5)
    assert found.tolist() == [[2, 1, 0]]


def mixed_counts(scores, eligible, base: int, cap: int, floor: float) -> list[int]:
    """Oracle: a flat stable sort of what the cap leaves, then Hamilton in thousandths."""
    heads = len(scores)
    contenders = np.stack([best(*row) for row in zip(scores, [cap] * heads, eligible, strict=True)])
    flat = best(scores.ravel(), heads * base, contenders.ravel()).reshape(scores.shape)
    alpha, count = Fraction(round(floor * 1000), 1000), flat.sum(-1).tolist()
    mean = Fraction(sum(count), heads)
    mass = np.where(eligible, scores, 0).sum(-1)
    first = np.argsort(-mass, kind="stable").tolist()
    return hamilton([(1 - alpha) * n + alpha * mean for n in count], first)


@examples
@given(untied((B, K, S)), lengths, bases, st.sampled_from(FLOORS), st.integers(0, S))
def test_ada_counts_are_a_flat_sort(scores, n, base, floor, slack):
    eligible, caps = rows_eligible(n, K), np.array(base) + slack
    args = floats(scores), jnp.asarray(eligible), ints(base)
    sizes = ada_heads(*args, floor=floor, cap=ints(caps))
    rows = zip(scores, eligible, base, caps.tolist(), strict=True)
    expected = [mixed_counts(*row, floor) for row in rows]
    np.testing.assert_array_equal(sizes, expected)


def retained_mass(scores, eligible, sizes) -> np.ndarray:
    falling = -np.sort(-np.where(eligible, scores, 0).astype(np.float64), axis=-1)
    return (falling * (np.arange(S) < np.asarray(sizes)[..., None])).sum((-2, -1))


@examples
@given(scores_of((B, K, S)), lengths, st.sampled_from(FLOORS), st.integers(0, 2))
def test_ada_invariants_at_every_budget(scores, n, floor, slack):
    """Exact, floored, capped, monotone; and V8: never less mass than uniform heads retain."""
    eligible = rows_eligible(n, K)
    args, alpha = (floats(scores), jnp.asarray(eligible)), Fraction(round(floor * 1000), 1000)
    before = np.zeros((B, K), int)
    for base in range(S + 1):
        even = np.minimum(base, n)[:, None] + np.zeros((B, K), int)
        sizes = np.asarray(ada_heads(*args, ints([base] * B), floor=floor, cap=ints([S] * B)))
        np.testing.assert_array_equal(sizes.sum(1), even.sum(1))
        assert (sizes <= np.array(n)[:, None]).all()
        assert (sizes >= np.minimum(int(alpha * base), even)).all()
        assert (sizes >= before).all()
        capped = np.asarray(
            ada_heads(*args, ints([base] * B), floor=floor, cap=ints([base + slack] * B))
        )
        np.testing.assert_array_equal(capped.sum(1), even.sum(1))
        assert (capped <= base + slack).all()
        pure = ada_heads(*args, ints([base] * B), floor=0.0, cap=ints([S] * B))
        masses = [retained_mass(scores, eligible, each) for each in (even, sizes, pure)]
        assert (np.diff(masses, axis=0) >= -1e-9 * masses[2]).all()
        before = sizes


@examples
@given(untied((B, K, S)), st.permutations(range(K)), bases, st.sampled_from(FLOORS))
def test_ada_permutes_with_heads(scores, order, base, floor):
    scores = 1.0 + scores**3  # no two heads of the same mass
    rest = jnp.ones((B, K, S), bool), ints(base)
    sizes = np.asarray(ada_heads(floats(scores), *rest, floor=floor, cap=ints([S] * B)))
    again = ada_heads(floats(scores[:, order]), *rest, floor=floor, cap=ints([S] * B))
    np.testing.assert_array_equal(again, sizes[:, order])


# ---------------------------------------------------------------------------- rows
def test_a_row_alone_is_the_row_in_a_batch():
    rng = np.random.default_rng(0)
    scores, n = floats(rng.gamma(0.3, size=(B, L, S))), ints([S, 5])
    can, caps = jnp.asarray(rows_eligible(n, L)), ints([[S] * L, [5, 3, 5]])
    base, held, retained = ints([6, 3]), ints(np.ones((B, L))), floats([1.0, 0.2, 0.5])
    calls = {
        uniform_layers: (base, caps),
        partial(pyramid_layers, beta=20): (base, caps),
        partial(profile_layers, retained): (base, caps, held, n),
        prefix_layers: (scores, can, held, base),
        partial(ada_heads, floor=0.2): (scores, can, base),
    }
    for call, rows in calls.items():
        together = call(*rows)
        alone = [call(*(array[row : row + 1] for array in rows))[0] for row in range(B)]
        np.testing.assert_array_equal(together, alone)
