"""Attention of new tokens to padded slots, masked by true position, in XLA.

B batch, T new tokens, S slots, N query heads, K KV heads, G = N // K, H head dim; C slots of a
block, X = G T queries of a KV head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.kernels.decode_attention.reference import decode_attention
from kvjax.kernels.prefill_attention.reference import added, nothing_yet

# Scores that exist at once where a call has more than one new token: 4 MiB in fp32.
SCORES = 2**20
BLOCK = 256


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
    if tokens == 1 or batch * tokens * heads * slots <= SCORES:
        return _whole(q, query_positions, k, v, positions, window, evicted)
    block = min(BLOCK, slots)
    filled = jnp.arange(1, slots + 1, dtype=jnp.int32) * (positions >= 0)
    blocks = -(-filled.max() // block)

    def attend(q, query_positions, last_BTK):
        mine = None if evicted is None else evicted._replace(last=last_BTK)
        return _blocks(q, query_positions, mine, k, v, positions, window, block, blocks)

    queries = q, query_positions, None if evicted is None else evicted.last
    return over_tokens(attend, queries, max(1, SCORES // (batch * heads * block)))


def _whole(q, query_positions, k, v, positions, window, evicted):
    visible_BKTS = in_sight(positions[:, :, None], query_positions[:, None, :, None], window)
    if evicted is not None:
        visible_BKTS = visible_BKTS & ~evicted.mask()
    return decode_attention(q, k, v, positions >= 0, visible_BKTS)


def _blocks(q, query_positions, evicted, k, v, positions, window, block, blocks):
    """One block of slots after the other, scores with slots in rows and queries in columns."""
    batch, tokens, heads, head_dim = q.shape
    slots, kv_heads = k.shape[2], k.shape[1]
    group = heads // kv_heads
    q_BKHGT = q.reshape(batch, tokens, kv_heads, group, head_dim).transpose(0, 2, 4, 3, 1)
    q_BKHX = q_BKHGT.reshape(batch, kv_heads, head_dim, -1)

    def step(index, carry):
        wanted = index * block
        offset = jnp.minimum(wanted, slots - block)

        def cut(x, axis):
            return lax.dynamic_slice_in_dim(x, offset, block, axis)

        # A block that the end pushed back does not count its first slots again.
        fresh_C = offset + jnp.arange(block) >= wanted
        at_BKC1 = jnp.where(fresh_C, cut(positions, 2), -1)[..., None]
        held = cut(k, 2), cut(v, 2), at_BKC1
        order = None if evicted is None else cut(evicted.order, 2)
        if evicted is not None or window is not None:
            return read_masked(held, order, carry)
        clear = (at_BKC1.min() >= 0) & (at_BKC1.max() <= query_positions.min())
        read = partial(add, held), partial(read_masked, held, order)
        return lax.cond(clear, *read, carry)

    def read_masked(held, order, carry):
        k_BKCH, v_BKCH, at_BKC1 = held
        seen_BKCT = (at_BKC1 >= 0) & in_sight(at_BKC1, query_positions[:, None, None], window)
        if evicted is not None:
            seen_BKCT &= ~evicted._replace(order=order).mask().swapaxes(2, 3)
        v_BKCH = jnp.where(at_BKC1 >= 0, v_BKCH, 0)  # 0 * NaN would be NaN
        return add((k_BKCH, v_BKCH, at_BKC1), carry, jnp.tile(seen_BKCT, group))

    def add(held, carry, mask_BKCX=None):
        k_BKCH, v_BKCH, _ = held
        s_BKCX = jnp.einsum("BKCH,BKHX->BKCX", k_BKCH, q_BKHX, preferred_element_type=jnp.float32)
        s_BKCX = s_BKCX * head_dim**-0.5  # in fp32, not in q's dtype
        if mask_BKCX is not None:
            s_BKCX = jnp.where(mask_BKCX, s_BKCX, -jnp.inf)
        # On a CPU a product with what lies the other way round takes half as long again.
        return added(carry, s_BKCX, lax.optimization_barrier(v_BKCH.swapaxes(2, 3)))

    peak, total, acc_BKHX = lax.fori_loop(0, blocks, step, nothing_yet(q_BKHX))
    out_BKHX = acc_BKHX / jnp.where(total > 0, total, 1.0)[:, :, None]
    out_BKHGT = out_BKHX.reshape(q_BKHGT.shape)
    lse_BNT = (jnp.where(total > 0, peak, 0.0) + jnp.log(total)).reshape(batch, heads, tokens)
    return out_BKHGT.transpose(0, 4, 1, 3, 2).reshape(q.shape), lse_BNT.swapaxes(1, 2)


def in_sight(key_positions: Array, query_positions: Array, window: int | None) -> Array:
    """Whether a query sees a key, by their true positions."""
    visible = key_positions <= query_positions
    return visible if window is None else visible & (query_positions - key_positions < window)


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
