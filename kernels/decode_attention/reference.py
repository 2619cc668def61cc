"""Masked attention over padded slots in XLA.

B batch, T new tokens, S slots, N query heads, K KV heads, G = N // K, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    filled: Bool[Array, "#B #K S"],
    visible: Bool[Array, "#B #K #T S"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend new tokens to the slots of one segment of the cache.

    Args:
      q: queries after RoPE; K divides N, keys and values are never repeated.
      k, v: the segment; a slot that is not filled may hold anything, NaN included.
      filled: slots that hold an entry.
      visible: slots that each query may see; only looked at where `filled`.

    Returns:
      The softmax-weighted values within this segment and the log-sum-exp of the scaled
      scores, both fp32. A query that sees no slot gets zeros and -inf.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    if heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads, expected a divisor of q's {heads}")
    q_BKGTH = q.reshape(batch, tokens, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    s_BKSGT = jnp.einsum("BKSH,BKGTH->BKSGT", k, q_BKGTH, preferred_element_type=jnp.float32)
    s_BKGTS = s_BKSGT.transpose(0, 1, 3, 4, 2)
    s_BKGTS = s_BKGTS * head_dim**-0.5  # in fp32, not in q's dtype
    visible_BKTS = filled[:, :, None] & visible
    s_BKGTS = jnp.where(visible_BKTS[:, :, None], s_BKGTS, -jnp.inf)
    peak_BKGT = s_BKGTS.max(-1)
    anchor_BKGT = jnp.where(peak_BKGT == -jnp.inf, 0.0, peak_BKGT)
    p_BKGTS = jnp.exp(s_BKGTS - anchor_BKGT[..., None])
    total_BKGT = p_BKGTS.sum(-1)
    v = jnp.where(filled[..., None], v, 0)  # 0 * NaN would be NaN
    o_BKGTH = jnp.einsum(
        "BKGTS,BKSH->BKGTH", p_BKGTS.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    o_BKGTH = o_BKGTH / jnp.where(total_BKGT > 0, total_BKGT, 1.0)[..., None]
    lse_BKGT = anchor_BKGT + jnp.log(total_BKGT)
    o_BTNH = o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q.shape)
    return o_BTNH, lse_BKGT.transpose(0, 3, 1, 2).reshape(batch, tokens, heads)


def in_sight(key_positions: Array, query_positions: Array, window: int | None) -> Array:
    """Whether a query sees a key, by their true positions."""
    visible = key_positions <= query_positions
    return visible if window is None else visible & (query_positions - key_positions < window)


def merge(
    parts: list[tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]],
) -> Float[Array, "B T N H"]:
    """One attention from attention over disjoint segments: weights are softmax of their lse.

    A query that sees nothing in any segment gets zeros.
    """
    weight_PBTN, _ = merge_weights(jnp.stack([lse for _, lse in parts]))
    return sum(
        (w[..., None] * o for w, (o, _) in zip(weight_PBTN, parts, strict=True)), jnp.zeros(())
    )


def merge_weights(
    lse: Float[Array, "P ..."],
) -> tuple[Float[Array, "P ..."], Float[Array, "..."]]:
    """What each of P disjoint segments counts for, and the log-sum-exp of all of them.

    The weights of a query that sees nothing in any segment are zeros.
    """
    peak = lse.max(0)
    safe = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(lse - safe)
    total = weights.sum(0)
    return weights / jnp.where(total > 0, total, 1.0), safe + jnp.log(total)


def query_rows(
    query_positions: Int[Array, "B T"],
    heads: int,
    kv_heads: int,
    evicted: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None,
) -> Int[Array, "B R 4"]:
    """What a kernel knows of each of its R = T N rows, one for every token and query head.

    KV head, position, and the first and one past the last slot that are evicted (0, 0 for none).
    """
    batch, tokens = query_positions.shape
    head_N = jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads)
    first_BTN = last_BTN = jnp.zeros((batch, tokens, heads), jnp.int32)
    if evicted is not None:
        first_BTN = jnp.broadcast_to(evicted[0][:, None, head_N], first_BTN.shape)
        last_BTN = evicted[1][:, :, head_N]
    owner_BTN = jnp.broadcast_to(head_N, first_BTN.shape)
    position_BTN = jnp.broadcast_to(query_positions[..., None], first_BTN.shape)
    columns = owner_BTN, position_BTN, first_BTN, last_BTN
    return jnp.stack(columns, axis=-1).astype(jnp.int32).reshape(batch, tokens * heads, 4)
