"""Whole numbers beyond int32: helpers against Python's, and allocators at large numbers.

Shapes are small: 80 layers, 64 heads and 1M tokens, or a row as large as slots can be, as numbers.
"""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax import CompressionConfig, exact
from kvjax.compression import allocators
from kvjax.compression.row_budgets import make_rows
from kvjax.exact import MOST, divided_product, total, total_before

LAYERS, HEADS, TOKENS = 80, 64, 1_000_000
# Entries a head of a row of 80 layers that has as many slots a head as an index can count.
HUGE = MOST // LAYERS

examples = settings(max_examples=40, deadline=None, derandomize=True)
product = jax.jit(divided_product, static_argnames="bits")
spread = jax.jit(exact.spread)
uniform_layers = jax.jit(allocators.uniform_layers)
pyramid_layers = jax.jit(allocators.pyramid_layers, static_argnames="beta")
profile_layers = jax.jit(allocators.profile_layers)


def ints(values) -> jax.Array:
    return jnp.asarray(np.asarray(values), jnp.int32)


# ---------------------------------------------------------------------------- helpers
def triples(bits: int):
    corners = [(t, n - d, n) for n in (2**bits - 1, 2, 1) for d in (0, 1) for t in (0, MOST)]
    drawn = st.integers(1, 2**bits - 1).flatmap(
        lambda n: st.tuples(st.integers(0, MOST), st.integers(0, n), st.just(n))
    )
    return st.lists(drawn, min_size=20, max_size=20).map(lambda cases: cases + corners)


@pytest.mark.parametrize("bits", [23, 27, 30])
def test_products_are_divided_exactly(bits):
    @examples
    @given(triples(bits))
    def check(cases):
        found = product(*ints(np.array(cases).T), bits=bits)
        expected = [divmod(t * x, n) for t, x, n in cases]
        np.testing.assert_array_equal(np.stack(found, axis=1), expected)

    check()


counted = st.lists(st.integers(0, MOST) | st.integers(0, 9), min_size=6, max_size=6)


@examples
@given(counted)
def test_totals_stop_at_the_largest_int32(numbers):
    sums = [min(int(one), MOST) for one in np.cumsum(np.array(numbers, np.int64))]
    assert total_before(ints(numbers)).tolist() == [0, *sums[:-1]]
    assert int(total(ints(numbers))) == sums[-1]
    assert int(total(ints(numbers).reshape(2, 3), (-2, -1))) == sums[-1]


def test_the_total_of_many_heads():
    every = np.full((LAYERS, HEADS), TOKENS)  # 5.12e9
    assert int(total(ints(every), (-2, -1))) == MOST
    assert int(total(ints(every // 3), (-2, -1))) == (every // 3).sum()
    assert total_before(ints(every.ravel()))[-1] == MOST


# ---------------------------------------------------------------------------- allocators
def leveled(wanted, caps, budget: int, least) -> list[int]:
    """`spread` by its definition, in Python's integers."""

    def sizes_at(level):
        every = zip(wanted, caps, least, strict=True)
        return [max(min(w + level, c), low) for w, c, low in every]

    low, high = -max(wanted), max(caps)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(sizes_at(middle)) <= budget else (low, middle - 1)
    sizes, spare = sizes_at(low), budget - sum(sizes_at(low))
    for index, more in enumerate(sizes_at(low + 1)):
        if more > sizes[index] and spare > 0:
            sizes[index], spare = sizes[index] + 1, spare - 1
    return sizes


@pytest.mark.parametrize(
    ("layers", "heads", "budget"), [(32, 32, 131_072), (80, 8, 1_000_000), (80, 1, HUGE)]
)
def test_slots_are_spread_over_layers(layers, heads, budget):
    """A pool's layers, with room for any of them to take all of it."""
    slots = layers * heads * budget
    held = np.random.default_rng(0).integers(0, heads * budget, layers)
    caps = np.full(layers, slots)
    sizes = spread(ints([held]), ints([caps]), ints([slots]), ints([held]))[0].tolist()
    assert sizes == leveled(held.tolist(), caps.tolist(), slots, held.tolist())
    assert sum(sizes) == slots


@examples
@given(
    st.lists(st.integers(0, MOST), min_size=4, max_size=4),
    st.lists(st.integers(0, MOST), min_size=4, max_size=4),
    st.integers(0, MOST),
    st.integers(0, 8),
)
def test_spread_is_exact_at_any_number(wanted, caps, budget, eighths):
    least = [cap * eighths // 8 for cap in caps]
    sizes = spread(ints([wanted]), ints([caps]), ints([budget]), ints([least]))
    assert sizes[0].tolist() == leveled(wanted, caps, budget, least)


@pytest.mark.parametrize("base", [TOKENS, HUGE])
def test_layers_get_exactly_the_budget(base):
    caps = ints([[2 * base] * LAYERS])
    assert uniform_layers(ints([base]), caps)[0].tolist() == [base] * LAYERS
    sizes = np.asarray(pyramid_layers(ints([base]), caps, 20))[0].astype(np.int64)
    high, low = 2 * base - base // 20, base // 20
    exact = [high - Fraction(index * (high - low), LAYERS - 1) for index in range(LAYERS)]
    assert sizes.sum() == LAYERS * base
    assert all(abs(size - one) < 1 for size, one in zip(sizes.tolist(), exact, strict=True))


@pytest.mark.parametrize("base", [None, TOKENS // 3, HUGE // 3])
def test_profiles_are_exact(base):
    shares = np.random.default_rng(1).integers(300_000, 700_000, LAYERS)  # millionths
    n = TOKENS if base is None else 3 * base
    caps, none = ints([[MOST // 2] * LAYERS]), ints(np.zeros((1, LAYERS)))
    retained = jnp.asarray(shares / 1e6, jnp.float32)
    given_base = None if base is None else ints([base])
    sizes = profile_layers(retained, given_base, caps, none, ints([n]))[0].tolist()
    whole = Fraction(n * int(shares.sum()), 10**6) if base is None else Fraction(LAYERS * base)
    assert sum(sizes) == int(whole + Fraction(1, 2))
    wanted = [whole * int(share) / int(shares.sum()) for share in shares]
    assert all(abs(size - one) < 1 for size, one in zip(sizes, wanted, strict=True))


def test_heads_of_more_than_two_million_entries():
    """A thousandth of a head's entries is a number that fits; a thousand times as many are not."""
    entries, base = 2_200_000, 2_190_000
    scores = np.zeros((1, 2, entries), np.float32)
    scores[0, 0], scores[0, 1, : base // 2] = 2.0, 1.0
    first = entries - (entries - base) // 5  # all that it has, and a fifth less of the excess
    heads = jax.jit(partial(allocators.ada_heads, floor=0.2))
    found = heads(jnp.asarray(scores), jnp.ones(scores.shape, bool), ints([base]))
    assert found[0].tolist() == [first, 2 * base - first]


def test_a_floor_of_more_than_two_million_entries():
    scores = jnp.asarray([[[[1.0, 1.0, 1.0], [9.0, 0.1, 0.1]]]])
    # Every entry lies below its head's floor, so all come first, the heaviest next one before.
    for base, sizes in ((0, [2, 1]), (2_200_000, [0, 3])):
        heads = jax.jit(partial(allocators.joint_heads, floor=1.0))
        assert heads(scores, scores >= 0, ints([base]), ints([3])).tolist() == [[sizes]]


@pytest.mark.parametrize("n", [2**21 + 5, 8_388_608, MOST])
def test_a_fraction_of_any_prompt(n):
    rows = make_rows(CompressionConfig.named("streaming-llm", 0.999999), ints([n]))
    assert int(rows.base[0]) == n * 999_999 // 10**6
