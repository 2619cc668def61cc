"""Attention of many new tokens to padded slots on a CPU: slots in rows, queries in columns.

A CPU finds the largest of many columns at once, but goes through a row number by number. On a TPU
this order needs twice the memory on the way (a v6e, 16 rows), so it is a CPU's alone.

B batch, T new tokens, S slots, N query heads, K KV heads, G = N // K, H head dim; C slots of a
block, X = G T queries of a KV head.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax

from kvjax.kernels.decode_attention.reference import in_sight
from kvjax.kernels.prefill_attention.reference import added, nothing_yet

# Scores that exist at once, 4 MiB in fp32, and slots of a block: they stay in the caches.
SCORES = 2**20
BLOCK = 256


def attend_blocks(q, query_positions, evicted, k, v, positions, window, block, blocks):
    """Attend to one block of slots after the other.

    Args:
      q, query_positions, k, v, positions, window, evicted: as of `padded_attention`.
      block: slots of a block.
      blocks: how many hold entries, from the first slot on.

    Returns:
      As `padded_attention`.
    """
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
