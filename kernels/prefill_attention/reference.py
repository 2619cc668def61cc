"""Chunked online softmax in XLA (Milakov & Gimelshein 2018; Rabe & Staats 2021).

Query blocks are mapped; each walks over its key blocks only, from the first that its window
reaches to the diagonal, so memory is a block's scores and arithmetic is the causal half. Scores
have keys in rows and queries in columns: a CPU finds the largest of many columns at once, but goes
through a row number by number.

B batch, T prompt tokens, N query heads, K KV heads, G = N // K, H head dim; C keys of a block, Q
queries of a block, X = G Q of a KV head, Y blocks.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Of queries and of keys. A KV head's scores in fp32, 256 KiB times G, stay in a core's L2 cache.
BLOCK = 256
Running = tuple[Float[Array, "B K X"], Float[Array, "B K X"], Float[Array, "B K H X"]]
_STEP = 8  # blocks of a short or odd prompt are multiples of it


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """See `kvjax.kernels.prefill_attention`."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads, blocks = k.shape[2], -(-tokens // BLOCK)
    block = tokens if blocks == 1 else -(-tokens // (blocks * _STEP)) * _STEP
    filled = ((0, 0), (0, blocks * block - tokens), (0, 0), (0, 0))
    q, k, v = (jnp.pad(x, filled) for x in (q, k, v))
    q_BTKGH = q.reshape(batch, -1, kv_heads, heads // kv_heads, head_dim)
    k_BKTH, v_BKHT = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 3, 1)

    def attend_block(index):
        q_BQKGH = lax.dynamic_slice_in_dim(q_BTKGH, index * block, block, axis=1)
        q_BKHX = q_BQKGH.transpose(0, 2, 4, 3, 1).reshape(batch, kv_heads, head_dim, -1)
        padding = index * block >= lengths.max()
        return _online_softmax(q_BKHX, k_BKTH, v_BKHT, index, block, padding, window)

    if blocks == 1:
        out, lse = attend_block(0)
    else:
        out, lse = lax.map(attend_block, jnp.arange(blocks))
    out_YBKHGQ = out.reshape(blocks, batch, kv_heads, head_dim, -1, block)
    out_BTNH = out_YBKHGQ.transpose(1, 0, 5, 2, 4, 3).reshape(batch, -1, heads, head_dim)
    lse_BNT = lse.reshape(blocks, batch, heads, block).transpose(1, 2, 0, 3)
    lse_BNT = lse_BNT.reshape(batch, heads, -1)
    return out_BTNH[:, :tokens].astype(v.dtype), lse_BNT[:, :, :tokens]


def _online_softmax(q_BKHX, k_BKTH, v_BKHT, index, block, padding, window):
    """Query block `index` over the key blocks that it sees; of padding, over its own alone."""
    at_X = index * block + jnp.tile(jnp.arange(block), q_BKHX.shape[3] // block)

    def step(masked, number, carry):
        offset = number * block
        k_BKCH = lax.dynamic_slice_in_dim(k_BKTH, offset, block, axis=2)
        v_BKHC = lax.dynamic_slice_in_dim(v_BKHT, offset, block, axis=3)
        s_BKCX = jnp.einsum("BKCH,BKHX->BKCX", k_BKCH, q_BKHX, preferred_element_type=jnp.float32)
        s_BKCX = s_BKCX * q_BKHX.shape[2] ** -0.5  # in fp32, not in q's dtype
        if masked:  # lengths need no mask: what lies before a real query is real
            back_CX = at_X - (offset + jnp.arange(block))[:, None]
            seen_CX = (back_CX >= 0) if window is None else (back_CX >= 0) & (back_CX < window)
            s_BKCX = jnp.where(seen_CX, s_BKCX, -jnp.inf)
        return added(carry, s_BKCX, v_BKHC)

    carry = nothing_yet(q_BKHX)
    if k_BKTH.shape[2] > block:
        first = whole = 0
        stop = jnp.where(padding, 0, index)
        if window is not None:
            first = jnp.minimum(jnp.maximum(index * block - window + 1, 0) // block, stop)
            # Before `whole` the window's edge cuts through a block.
            whole = jnp.clip(-(-((index + 1) * block - window) // block), first, stop)
            carry = lax.fori_loop(first, whole, partial(step, True), carry)
        carry = lax.fori_loop(whole, stop, partial(step, False), carry)
    peak, total, acc_BKHX = step(True, index, carry)
    return acc_BKHX / total[:, :, None], peak + jnp.log(total)


def nothing_yet(q_BKHX: Float[Array, "B K H X"]) -> Running:
    """The running softmax of columns of queries before any block of keys."""
    batch, kv_heads, _, columns = q_BKHX.shape
    return (
        jnp.full((batch, kv_heads, columns), -jnp.inf, jnp.float32),
        jnp.zeros((batch, kv_heads, columns), jnp.float32),
        jnp.zeros(q_BKHX.shape, jnp.float32),
    )


def added(
    carry: Running, s_BKCX: Float[Array, "B K C X"], v_BKHC: Float[Array, "B K H C"]
) -> Running:
    """The running softmax with one more block of scores and values.

    Args:
      carry: of each column the largest score, the sum of weights, and of weighted values.
      s_BKCX: scaled scores in fp32, -inf for what a query does not see.
      v_BKHC: values, finite for all keys.
    """
    peak_BKX, total_BKX, acc_BKHX = carry
    new_BKX = jnp.maximum(peak_BKX, s_BKCX.max(2))
    anchor_BKX = jnp.where(new_BKX == -jnp.inf, 0.0, new_BKX)
    p_BKCX = jnp.exp(s_BKCX - anchor_BKX[:, :, None])
    decay_BKX = jnp.exp(peak_BKX - anchor_BKX)
    pv_BKHX = jnp.einsum(
        "BKHC,BKCX->BKHX", v_BKHC, p_BKCX.astype(v_BKHC.dtype), preferred_element_type=jnp.float32
    )
    acc_BKHX = acc_BKHX * decay_BKX[:, :, None] + pv_BKHX
    return new_BKX, total_BKX * decay_BKX + p_BKCX.sum(2), acc_BKHX
