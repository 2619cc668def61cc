"""Chunked online softmax in XLA (Milakov & Gimelshein 2018; Rabe & Staats 2021).

Query blocks are mapped; each walks over its key blocks only, from the first that its window
reaches to the diagonal, so memory is a block's scores and arithmetic is the causal half.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# 128 queries x 256 keys of fp32 scores per head fit a core's L2 cache.
QUERY_BLOCK = 128
KEY_BLOCK = 256


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
    kv_heads = k.shape[2]
    query_block, key_block = min(QUERY_BLOCK, tokens), min(KEY_BLOCK, tokens)
    padded = -(-tokens // math.lcm(query_block, key_block)) * math.lcm(query_block, key_block)
    if padded > 2 * tokens:  # an odd short prompt: one block
        query_block = key_block = padded = tokens
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))) for x in (q, k, v))
    q_BKGTH = q.reshape(batch, padded, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)

    def attend_block(index):
        start = index * query_block
        q_BKGQH = lax.dynamic_slice_in_dim(q_BKGTH, start, query_block, axis=3)
        first = 0 if window is None else jnp.maximum(start - window + 1, 0) // key_block
        last = (start + query_block + key_block - 1) // key_block
        return _online_softmax(
            q_BKGQH, k_BKSH, v_BKSH, lengths, start, first, last, key_block, window
        )

    out_XBKGQH, lse_XBKGQ = lax.map(attend_block, jnp.arange(padded // query_block))
    out_BTNH = out_XBKGQH.transpose(1, 0, 4, 2, 3, 5).reshape(batch, padded, heads, head_dim)
    lse_BNT = lse_XBKGQ.transpose(1, 2, 3, 0, 4).reshape(batch, heads, padded)
    return out_BTNH[:, :tokens].astype(v.dtype), lse_BNT[:, :, :tokens]


def _online_softmax(q_BKGQH, k_BKSH, v_BKSH, lengths, start, first, last, key_block, window):
    """One block of queries from position `start` over key blocks first..last - 1."""
    shape = q_BKGQH.shape[:-1]
    query_Q = start + jnp.arange(shape[-1])

    def step(index, carry):
        peak, total, acc = carry
        offset = index * key_block
        kb_BKSH = lax.dynamic_slice_in_dim(k_BKSH, offset, key_block, axis=2)
        vb_BKSH = lax.dynamic_slice_in_dim(v_BKSH, offset, key_block, axis=2)
        s_BKGQS = jnp.einsum(
            "BKGQH,BKSH->BKGQS", q_BKGQH, kb_BKSH, preferred_element_type=jnp.float32
        )
        s_BKGQS = s_BKGQS * q_BKGQH.shape[-1] ** -0.5  # in fp32, not in q's dtype
        seen_BQS = visible(query_Q[None], offset + jnp.arange(key_block), lengths, window)
        s_BKGQS = jnp.where(seen_BQS[:, None, None], s_BKGQS, -jnp.inf)
        new_peak = jnp.maximum(peak, s_BKGQS.max(-1))
        anchor = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        p_BKGQS = jnp.exp(s_BKGQS - anchor[..., None])
        decay = jnp.exp(peak - anchor)
        pv_BKGQH = jnp.einsum(
            "BKGQS,BKSH->BKGQH",
            p_BKGQS.astype(vb_BKSH.dtype),
            vb_BKSH,
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * decay + p_BKGQS.sum(-1), acc * decay[..., None] + pv_BKGQH

    peak, total, acc = lax.fori_loop(
        first,
        last,
        step,
        (
            jnp.full(shape, -jnp.inf, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros(q_BKGQH.shape, jnp.float32),
        ),
    )
    safe = jnp.where(total > 0, total, 1.0)
    return acc / safe[..., None], jnp.where(total > 0, peak + jnp.log(safe), -jnp.inf)


def visible(
    query_positions: Int[Array, "#B Q"],
    key_positions: Int[Array, " S"],
    lengths: Int[Array, " B"],
    window: int | None,
) -> jax.Array:
    """`[B, Q, S]`: key at or before the query, inside its window, and not padding."""
    query_BQ1, key_11S = query_positions[:, :, None], key_positions[None, None]
    seen = (key_11S <= query_BQ1) & (key_11S < lengths[:, None, None])
    return seen if window is None else seen & (query_BQ1 - key_11S < window)
