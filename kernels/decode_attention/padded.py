"""Attention of new tokens to padded slots, masked by true position, in XLA.

B batch, T new tokens, S slots, N query heads, K KV heads, H head dim, C slots read at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.kernels.decode_attention import padded_cpu
from kvjax.kernels.decode_attention.reference import decode_attention, in_sight, merge_weights
from kvjax.kernels.platform import platform

# Scores that exist at once where a call has more than one new token: 16 MiB in fp32.
SCORES = 2**22
BLOCK = 512


class Evicted(NamedTuple):
    """What each head has evicted: entries whose number `order` is in [first, last).

    Attributes:
      order: numbers of the slots' entries; arange(S) where a slot's place is its number.
      first, last: of each head, and for each query.
    """

    order: Int[Array, "#B #K S"]
    first: Int[Array, "B K"]
    last: Int[Array, "B T K"]

    def mask(self) -> Bool[Array, "B K T S"]:
        """Which slots each query no longer sees."""
        order = self.order[:, :, None]
        last_BKT1 = self.last.swapaxes(1, 2)[..., None]
        return (order >= self.first[..., None, None]) & (order < last_BKT1)


def padded_attention(
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "#B #K S"],
    *,
    window: int | None = None,
    evicted: Evicted | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend new tokens to padded slots.

    Where scores of all tokens and slots would be many, tokens are taken in parts and slots in
    blocks, up to the last that holds an entry.

    Args:
      q: queries after RoPE; K divides N.
      query_positions: true positions of the new tokens, -1 for padding.
      k, v: keys (after RoPE) and values; what an empty slot holds is not read into any result.
      positions: true positions of the slots' entries, -1 for none; one head's for all, or each's.
      window: a query at p sees positions p - window + 1 .. p; None for all up to p.
      evicted: what each head has evicted.

    Returns:
      The softmax-weighted values and the log-sum-exp of the scaled scores, both fp32. A query that
      sees no slot gets zeros and -inf.
    """
    batch, tokens, heads, _ = q.shape
    slots = k.shape[2]
    most, block, attend_blocks = SCORES, BLOCK, _blocks
    if platform() == "cpu":
        most, block, attend_blocks = padded_cpu.SCORES, padded_cpu.BLOCK, padded_cpu.attend_blocks
    if tokens == 1 or batch * tokens * heads * slots <= most:
        return _whole(q, query_positions, k, v, positions, window, evicted)
    block = min(block, slots)
    filled = jnp.arange(1, slots + 1, dtype=jnp.int32) * (positions >= 0)
    blocks = -(-filled.max() // block)

    def attend(q, query_positions, last_BTK):
        mine = None if evicted is None else evicted._replace(last=last_BTK)
        return attend_blocks(q, query_positions, mine, k, v, positions, window, block, blocks)

    queries = q, query_positions, None if evicted is None else evicted.last
    return over_tokens(attend, queries, max(1, most // (batch * heads * block)))


def _whole(q, query_positions, k, v, positions, window, evicted):
    visible_BKTS = in_sight(positions[:, :, None], query_positions[:, None, :, None], window)
    if evicted is not None:
        visible_BKTS = visible_BKTS & ~evicted.mask()
    return decode_attention(q, k, v, positions >= 0, visible_BKTS)


def _blocks(q, query_positions, evicted, k, v, positions, window, block, blocks):
    """One block of slots after the other, merged by log-sum-exp."""
    slots = k.shape[2]

    def step(index, found):
        wanted = index * block
        offset = jnp.minimum(wanted, slots - block)

        def cut(x, axis):
            return lax.dynamic_slice_in_dim(x, offset, block, axis)

        # A block that the end pushed back does not count its first slots again.
        fresh_C = offset + jnp.arange(block) >= wanted
        at_BKC = jnp.where(fresh_C, cut(positions, 2), -1)
        mine = evicted and evicted._replace(order=cut(evicted.order, 2))
        held = cut(k, 2), cut(v, 2), at_BKC
        return _merged(found, _whole(q, query_positions, *held, window, mine))

    nothing = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    return lax.fori_loop(0, blocks, step, nothing)


def _merged(found, part):
    (out, lse), (more, more_lse) = found, part
    (old_BTN, new_BTN), lse = merge_weights(jnp.stack([lse, more_lse]))
    return out * old_BTN[..., None] + more * new_BTN[..., None], lse


def over_tokens(attend: Callable[..., Any], arrays: Any, most: int) -> Any:
    """`attend(*arrays)`, at most `most` tokens at a time, in as few parts as may be.

    Args:
      attend: from arrays to arrays, whose second axis is tokens; rows do not look at one another.
      arrays: the first one is there, others may be None.
      most: tokens of a part, at least 1.
    """
    tokens = arrays[0].shape[1]
    if tokens <= most:
        return attend(*arrays)
    part = -(-tokens // -(-tokens // most))

    def split(x: Array) -> Array:
        # What fills the last part up has position -1, as padding has.
        empty = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        widths = [(0, -tokens % part if axis == 1 else 0) for axis in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=empty)
        return x.reshape(x.shape[0], -1, part, *x.shape[2:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :tokens]

    found = lax.map(lambda some: attend(*some), jax.tree.map(split, arrays))
    return jax.tree.map(join, found)
