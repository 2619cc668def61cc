"""Causal attention that can be differentiated, for training.

B batch, T tokens, N query heads, K KV heads, G = N // K, H head dim, X (row, KV head) pairs.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kvjax.kernels.platform import platform

QUERY_BLOCK = 128


def training_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    window: int | None = None,
) -> Float[Array, "B T N H"]:
    """Attend each token of unpadded sequences to the tokens at and before it.

    On an accelerator this is `jax.nn.dot_product_attention`. On a CPU, where that one's `[B, N, T,
    T]` scores cost more to move than to compute (2.6 times the time of a step at T = 1024), KV
    heads are mapped one at a time and their scores are computed again in the backward pass.

    Args:
      q, k, v: queries, keys and values after RoPE; K divides N.
      window: a query at p sees keys p - window + 1 .. p; None for all of them.
    """
    if platform() == "cpu":
        return blockwise(q, k, v, window)
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local)


def blockwise(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    window: int | None,
) -> Float[Array, "B T N H"]:
    """`training_attention` on a CPU: memory is one KV head's scores."""
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q_BKGTH = q.reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_XGTH = q_BKGTH.reshape(batch * kv_heads, -1, tokens, head_dim)
    k_XSH, v_XSH = (
        x.transpose(0, 2, 1, 3).reshape(batch * kv_heads, tokens, head_dim) for x in (k, v)
    )

    @jax.checkpoint
    def one_head(args):
        q_GTH, k_SH, v_SH = args
        blocks = []
        for start in range(0, tokens, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, tokens)
            first = 0 if window is None else max(0, start - window + 1)
            blocks.append(
                _attend(
                    q_GTH[:, start:end], k_SH[first:end], v_SH[first:end], start - first, window
                )
            )
        return jnp.concatenate(blocks, axis=1)

    out_XGTH = lax.map(one_head, (q_XGTH, k_XSH, v_XSH))
    out_BKGTH = out_XGTH.reshape(batch, kv_heads, -1, tokens, head_dim)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, heads, head_dim)


def _attend(q_GTH, k_SH, v_SH, offset: int, window: int | None):
    """One block of queries, the first of them at key `offset`."""
    distance_TS = offset + jnp.arange(q_GTH.shape[1])[:, None] - jnp.arange(k_SH.shape[0])
    seen_TS = distance_TS >= 0
    if window is not None:
        seen_TS &= distance_TS < window
    s_GTS = jnp.einsum("GTH,SH->GTS", q_GTH, k_SH, preferred_element_type=jnp.float32)
    s_GTS = jnp.where(seen_TS, s_GTS * q_GTH.shape[-1] ** -0.5, -jnp.inf)
    p_GTS = jax.nn.softmax(s_GTS, axis=-1).astype(v_SH.dtype)
    return jnp.einsum("GTS,SH->GTH", p_GTS, v_SH)
