"""Exact arithmetic on whole numbers that would leave int32 on the way.

JAX counts in 32 bits, and a row of 80 layers, 64 heads and 1M tokens has 5.4e9 entries. What a
cache holds must fit int32, for a slot is an int32 index; what is only counted or multiplied on the
way to it need not, and is exact here without int64.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

# The largest int32: most slots of a row.
MOST = 2**31 - 1
_HALF = 16


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
