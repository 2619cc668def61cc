"""Exact arithmetic in 32 bits: products, sums, ranks and shares without a rounding error.

JAX counts in 32 bits, and a row of 80 layers, 64 heads and 1M tokens has 5.4e9 entries. What a
cache holds must fit int32, for a slot is an int32 index; what is only counted or multiplied on the
way to it need not, and is exact here without int64. Everything of kvjax is traced and run in 32
bits, with JAX_ENABLE_X64=1 too (`in_32_bits`), so the programs are the same with it and without.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

# The largest int32: most slots of a row.
MOST = 2**31 - 1
_HALF = 16
# Fractions are held in whole parts, so that the arithmetic is exact: Ada-KV's floor in thousandths,
# budgets and profiles in millionths.
THOUSAND = 1000
MILLION = 1_000_000


def in_32_bits() -> AbstractContextManager:
    """Inside, JAX's default integers and floats have 32 bits, those of Python's numbers too."""
    return jax.enable_x64(False)


def always_32_bits[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The function, `in_32_bits` as long as it runs; also where a caller's program is traced."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        with in_32_bits():
            return function(*args, **kwargs)

    return inside


def floor_of_product(t: Array, x: Array | int, n: Array | int, bits: int = 23) -> Array:
    """t * x // n for 0 <= t < 2**31 and 0 <= x <= n < 2**bits, as int32; see `divided_product`."""
    return divided_product(t, x, n, bits)[0]


def divided_product(
    t: Array, x: Array | int, n: Array | int, bits: int = 23
) -> tuple[Array, Array]:
    """Quotient and remainder of t * x by n, for 0 <= t < 2**31 and 0 <= x <= n < 2**bits.

    Long division by digits of t, as wide as 32 bits allow.

    Args:
      bits: bound of n, at most 30; a lower one takes fewer steps.
    """
    digit = 31 - bits
    t, x, n = (jnp.asarray(number).astype(jnp.uint32) for number in (t, x, n))
    whole = rest = jnp.zeros((), jnp.uint32)
    for shift in reversed(range(0, 31, digit)):
        part = (t >> shift) & jnp.uint32(2**digit - 1)
        rest = (rest << digit) + part * x  # below 2**digit * (n + n)
        whole, rest = (whole << digit) + rest // n, rest % n
    return whole.astype(jnp.int32), rest.astype(jnp.int32)


def total(counts: Int[Array, "..."], axes: int | tuple[int, ...] = -1) -> Array:
    """Sum of up to 32,768 int32 numbers >= 0; MOST where it is more than that."""
    return _joined(*(half.sum(axes, dtype=jnp.int32) for half in _halves(counts)))


def total_before(counts: Int[Array, "*shape X"]) -> Int[Array, "*shape X"]:
    """`total` of what comes before each number of the last axis."""
    halves = _halves(counts)
    return _joined(*(jnp.cumsum(half, axis=-1, dtype=jnp.int32) - half for half in halves))


def _halves(counts: Array) -> tuple[Array, Array]:
    return counts >> _HALF, counts & (2**_HALF - 1)


def _joined(high: Array, low: Array) -> Array:
    high, low = high + (low >> _HALF), low & (2**_HALF - 1)
    return jnp.where(high < 2 ** (31 - _HALF), (high << _HALF) | low, MOST)


# ---------------------------------------------------------------------------- selection
def ranking_keys(
    scores: Float[Array, "*shape"], eligible: Bool[Array, "*shape"]
) -> UInt[Array, "*shape"]:
    """Non-negative fp32 scores as integers in the same order; 0 marks what is not eligible.

    The bit pattern of a non-negative float grows with its value. NaN counts as 0.
    """
    clean = jnp.where(scores > 0, scores, 0.0).astype(jnp.float32)
    keys = lax.bitcast_convert_type(clean, jnp.uint32) + jnp.uint32(1)
    return jnp.where(eligible, keys, jnp.uint32(0))


def kth_largest(
    keys: UInt[Array, "..."], k: Int[Array, "*shape"], axes: int = 1
) -> UInt[Array, "*shape"]:
    """The k-th largest key of the last `axes` axes, exactly, by 32 counts; all ones where k <= 0.

    Each bit from the top is set if at least k keys are still not below the candidate. Nothing but
    counts leaves the last axes: where they are split over a mesh, counts are all that chips
    exchange.
    """
    counted, rows = tuple(range(-axes, 0)), tuple(range(1 - axes, 0))

    def try_bit(index, found):
        candidate = found | (jnp.uint32(1) << jnp.asarray(31 - index, jnp.uint32))
        count = (keys >= jnp.expand_dims(candidate, counted)).sum(-1, dtype=jnp.int32)
        count = total(count, rows) if rows else count
        return jnp.where(count >= k, candidate, found)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(k.shape, jnp.uint32))


def select_top(
    scores: Float[Array, "*shape S"],
    k: Int[Array, "*shape"],
    eligible: Bool[Array, "*shape S"],
) -> Bool[Array, "*shape S"]:
    """Mask of the k best eligible scores of the last axis; ties go to the lower index.

    Fewer than k eligible: all of them. Scores are >= 0.
    """
    return select_largest(ranking_keys(scores, eligible), k)


def select_largest(
    keys: UInt[Array, "*shape S"], k: Int[Array, "*shape"]
) -> Bool[Array, "*shape S"]:
    """Mask of the k largest keys of the last axis above 0; ties go to the lower index."""
    eligible = keys > 0
    k = jnp.minimum(k, eligible.sum(-1, dtype=jnp.int32))
    threshold = kth_largest(keys, k)[..., None]
    above, tied = keys > threshold, (keys == threshold) & eligible
    spare = (k - above.sum(-1, dtype=jnp.int32))[..., None]
    rank_among_tied = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    return above | (tied & (rank_among_tied <= spare))


def select_in_order(
    scores: Float[Array, "*shape S"],
    k: Int[Array, "*shape"],
    eligible: Bool[Array, "*shape S"],
    order: Sequence[Int[Array, "*#shape S"]],
) -> Bool[Array, "*shape S"]:
    """Mask of the k best eligible scores of the last axis; ties go to what comes first in `order`.

    Fewer than k eligible: all of them. What is chosen does not depend on where it lies.

    Args:
      scores: >= 0.
      k: how many.
      eligible: which may be chosen.
      order: numbers from 0 to MOST - 1 that tell any two eligible entries apart, taken together:
        the lowest first number comes first, among its equals the lowest second one, and so on.
    """
    k = jnp.minimum(k, eligible.sum(-1, dtype=jnp.int32))
    tied, chosen = eligible, jnp.zeros_like(eligible)
    ranks = [(MOST - numbers).astype(jnp.uint32) for numbers in order]
    for keys in (ranking_keys(scores, eligible), *ranks):
        keys = jnp.where(tied, keys, jnp.uint32(0))
        threshold = kth_largest(keys, k)[..., None]
        above = tied & (keys > threshold)
        chosen, tied = chosen | above, tied & (keys == threshold)
        k = k - above.sum(-1, dtype=jnp.int32)
    return chosen | (tied & (k > 0)[..., None])


def count_top(
    keys: UInt[Array, "..."], k: Int[Array, "*shape"], axes: int = 2
) -> Int[Array, "..."]:
    """How many of the k largest keys of the last `axes` axes lie in each row of the last one.

    Ties go to the earlier row. Keys of 0 are not eligible; fewer than k others: all of them.

    Args:
      keys: `[*shape, *rows, S]`, with axes - 1 axes of rows, such as heads, or layers and heads.

    Returns:
      `[*shape, *rows]` counts that sum to min(k, eligible) over the rows.
    """
    rows = tuple(range(1 - axes, 0))
    eligible = (keys > 0).sum(-1, dtype=jnp.int32)
    k = jnp.minimum(k, total(eligible, rows))
    threshold = jnp.expand_dims(kth_largest(keys, k, axes), tuple(range(-axes, 0)))
    above = (keys > threshold).sum(-1, dtype=jnp.int32)
    tied = ((keys == threshold) & (keys > 0)).sum(-1, dtype=jnp.int32)
    queue = tied.reshape(*k.shape, -1)
    spare = jnp.maximum(k - above.sum(rows, dtype=jnp.int32), 0)
    return above + give_in_turn(queue, spare).reshape(above.shape)


def give_in_turn(
    queue: Int[Array, "*shape X"], amount: Int[Array, "*shape"]
) -> Int[Array, "*shape X"]:
    """Give `amount` away, each place of the queue in order taking all that it can."""
    return jnp.clip(amount[..., None] - total_before(queue), 0, queue)


# ---------------------------------------------------------------------------- sharing out
def largest_remainder(
    numerators: Int[Array, "*shape X"], denominator: Int[Array, "*#shape"] | int
) -> Int[Array, "*shape X"]:
    """Integers near numerators / denominator whose sum is the quotients' sum, rounded down.

    Hamilton's method: round down, then one more to the largest remainders, ties to the lower
    index. Each result is the quotient rounded down or up. Numerators may be negative; X times the
    denominator is below 2**31.
    """
    denominator = jnp.asarray(denominator, jnp.int32)[..., None]
    floors, remainders = numerators // denominator, numerators % denominator
    spare = remainders.sum(-1, dtype=jnp.int32) // denominator[..., 0]
    one_more = select_largest(remainders.astype(jnp.uint32), spare)
    return floors + one_more


def spread(
    wanted: Int[Array, "*shape X"],
    caps: Int[Array, "*shape X"],
    budget: Int[Array, "*shape"],
    least: Int[Array, "*shape X"] | int = 0,
) -> Int[Array, "*shape X"]:
    """`wanted` clipped to [least, caps]; the others take what the caps cut off, or make up `least`.

    The result is wanted + level, clipped, with the highest integer level whose sum is at most the
    budget; what is left goes one each to the lowest indices that the next level would raise. It
    sums to the budget, as far as the bounds allow. No entry falls when the budget grows, nor when
    an entry of `wanted` and the budget grow alike.

    Args:
      wanted: sizes >= 0.
      caps, least: bounds, 0 <= least <= caps.
      budget: what the sizes sum to.
    """

    room = jnp.maximum(caps - wanted, 0)

    def sizes_at(level):
        raised = wanted + jnp.minimum(level[..., None], room)  # never past int32
        return jnp.maximum(jnp.minimum(raised, caps), least)

    def halve(_, bounds):
        low, high = bounds
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up
        fits = total(sizes_at(middle)) <= budget
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    zero = jnp.zeros(budget.shape, jnp.int32)
    level, _ = lax.fori_loop(
        0, 32, halve, (zero - wanted.max(), zero + jnp.minimum(caps.max(), MOST - 1))
    )
    sizes = sizes_at(level)
    spare = (budget - total(sizes))[..., None]
    can_grow = sizes_at(level + 1) > sizes
    return sizes + (can_grow & (jnp.cumsum(can_grow, axis=-1, dtype=jnp.int32) <= spare))


def shortest_prefixes(
    scores: Float[Array, " B *X S"],
    eligible: Bool[Array, " B *X S"],
    room: Int[Array, " B *X"],
    least: Int[Array, " B *X"],
    budget: Int[Array, " B"],
) -> Int[Array, " B *X"]:
    """Entries of each curve `[B, *X]` below the highest threshold of mass that the budget allows.

    A curve keeps at most `room` and at least `least` (<= room) entries; the counts sum to
    min(budget, room).
    """
    curves, axes = scores.shape[1:-1], scores.ndim - 1
    flat = (scores.shape[0], -1)
    ranked = -jnp.sort(-jnp.where(eligible & (scores > 0), scores, 0.0), axis=-1)  # NaN is 0
    mass = jnp.cumsum(ranked, axis=-1)
    whole = jnp.where(mass[..., -1:] > 0, mass[..., -1:], 1.0)
    before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1) / whole
    before = jnp.where(mass[..., -1:] > 0, before, 1.0)  # without any mass, last of all
    rank = jnp.arange(scores.shape[-1])
    before = jnp.where(rank < least[..., None], 0.0, before)
    usable = rank < room[..., None]

    # Smallest keys first: rank by the complement of the bit pattern.
    keys = jnp.where(usable, ~lax.bitcast_convert_type(before, jnp.uint32), jnp.uint32(0))
    budget = jnp.minimum(budget, total(room.reshape(flat)))
    threshold = jnp.expand_dims(kth_largest(keys, budget, axes), tuple(range(-axes, 0)))
    above = (keys > threshold).sum(-1, dtype=jnp.int32)
    tied = ((keys == threshold) & usable).sum(-1, dtype=jnp.int32)
    last = scores.shape[-1] - 1
    next_rank = jnp.minimum(above, last)[..., None]
    next_token = jnp.take_along_axis(ranked / whole, next_rank, axis=-1)[..., 0]
    above, tied, next_token = (x.reshape(flat) for x in (above, tied, next_token))
    spare = budget - above.sum(-1, dtype=jnp.int32)
    return (above + _in_order(tied, next_token, spare)).reshape(-1, *curves)


def _in_order(
    available: Int[Array, "B L"], priority: Float[Array, "B L"], amount: Int[Array, " B"]
) -> Int[Array, "B L"]:
    """Give `amount` away, each layer in falling priority taking all that it can."""
    order = jnp.argsort(-priority, axis=-1, stable=True)
    given = give_in_turn(jnp.take_along_axis(available, order, axis=-1), amount)
    return jnp.take_along_axis(given, jnp.argsort(order, axis=-1), axis=-1)
