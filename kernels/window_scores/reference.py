"""Column sums of attention probabilities in XLA, one block of scores at a time.

Two passes: log-sum-exp of every query's scores (or the one that attention has computed
already), then exp(score - lse) summed over queries. fp32 throughout; a query's softmax runs
over ALL the keys it sees, its own window's included.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 128
KEY_BLOCK = 256


def window_scores(
    q: Float[Array, "B W N H"],
    query_positions: Int[Array, "B W"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: int = 1,
    group: str | None = None,
) -> Float[Array, "B X T"]:
    """See `kvjax.kernels.window_scores`."""
    q_BKRH, row_positions_BR = _grouped(q, query_positions, k.shape[2])
    k_XBKSH, starts_X = _key_blocks(k, KEY_BLOCK)

    def block_scores(k_BKSH, start):
        return _scores(q_BKRH, row_positions_BR, k_BKSH, start, lengths, window)

    def add_to_lse(lse_BKR, block):
        return jnp.logaddexp(lse_BKR, jax.nn.logsumexp(block_scores(*block), axis=-1)), None

    lse_BKR, _ = lax.scan(
        add_to_lse, jnp.full(q_BKRH.shape[:-1], -jnp.inf, jnp.float32), (k_XBKSH, starts_X)
    )
    lse_BKR = jnp.where(lse_BKR == -jnp.inf, 0.0, lse_BKR)  # a query left out: exp(-inf) = 0

    def columns(block):
        p_BKRS = jnp.exp(block_scores(*block) - lse_BKR[..., None]) ** power
        return p_BKRS.reshape(*p_BKRS.shape[:2], -1, q.shape[1], p_BKRS.shape[-1]).sum(-2)

    return _join(lax.map(columns, (k_XBKSH, starts_X)), k.shape[1], group)


def accumulated_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lse: Float[Array, "B N T"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: int = 1,
    group: str | None = None,
) -> Float[Array, "B X T"]:
    """See `kvjax.kernels.window_scores`."""
    batch, tokens, heads, _ = q.shape
    kv_heads, block = k.shape[2], min(QUERY_BLOCK, tokens)
    blocks = -(-tokens // block)
    pad = blocks * block - tokens
    positions_BT = jnp.broadcast_to(jnp.arange(tokens), (batch, tokens))
    positions_BT = jnp.where(positions_BT < lengths[:, None], positions_BT, -1)
    positions_BT = jnp.pad(positions_BT, ((0, 0), (0, pad)), constant_values=-1)
    q_BTNH = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    # A padding row's lse may be -inf (it sees nothing), and -inf - -inf would be NaN.
    lse_BNT = jnp.pad(lse, ((0, 0), (0, 0), (0, pad)))
    lse_BNT = jnp.where(positions_BT[:, None] >= 0, lse_BNT, 0.0)
    k_XBKSH, starts_X = _key_blocks(k, KEY_BLOCK)
    key_block = k_XBKSH.shape[-2]

    def columns(key):
        k_BKSH, start = key

        def add_queries(index, sums_BKGS):
            offset = index * block
            q_BKRH, rows_BR = _grouped(
                lax.dynamic_slice_in_dim(q_BTNH, offset, block, axis=1),
                lax.dynamic_slice_in_dim(positions_BT, offset, block, axis=1),
                kv_heads,
            )
            s_BKRS = _scores(q_BKRH, rows_BR, k_BKSH, start, lengths, window)
            lse_BNQ = lax.dynamic_slice_in_dim(lse_BNT, offset, block, axis=2)
            p_BKRS = jnp.exp(s_BKRS - lse_BNQ.reshape(*s_BKRS.shape[:-1], 1)) ** power
            return sums_BKGS + p_BKRS.reshape(batch, kv_heads, -1, block, key_block).sum(-2)

        last = blocks
        if window is not None:
            last = jnp.minimum(blocks, (start + key_block + window - 2) // block + 1)
        return lax.fori_loop(
            start // block,
            last,
            add_queries,
            jnp.zeros((batch, kv_heads, heads // kv_heads, key_block), jnp.float32),
        )

    return _join(lax.map(columns, (k_XBKSH, starts_X)), tokens, group)


def _grouped(q_BWNH, positions_BW, kv_heads):
    """Queries beside their KV head, R = G * W rows of each, and the rows' positions."""
    batch, window, heads, head_dim = q_BWNH.shape
    q_BKGWH = q_BWNH.reshape(batch, window, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    rows_BR = jnp.tile(positions_BW, (1, heads // kv_heads))
    return q_BKGWH.reshape(batch, kv_heads, -1, head_dim), rows_BR


def _key_blocks(k_BTKH, size):
    """`[X, B, K, S, H]` blocks of keys and the position at which each starts."""
    batch, tokens, kv_heads, head_dim = k_BTKH.shape
    size = min(size, tokens)
    count = -(-tokens // size)
    k_BTKH = jnp.pad(k_BTKH, ((0, 0), (0, count * size - tokens), (0, 0), (0, 0)))
    blocks = k_BTKH.reshape(batch, count, size, kv_heads, head_dim).transpose(1, 0, 3, 2, 4)
    return blocks, jnp.arange(count) * size


def _scores(q_BKRH, positions_BR, k_BKSH, start, lengths, window):
    s_BKRS = jnp.einsum("BKRH,BKSH->BKRS", q_BKRH, k_BKSH, preferred_element_type=jnp.float32)
    s_BKRS = s_BKRS * q_BKRH.shape[-1] ** -0.5  # in fp32, not in q's dtype
    seen_BRS = _visible(positions_BR, start + jnp.arange(k_BKSH.shape[2]), lengths, window)
    return jnp.where(seen_BRS[:, None], s_BKRS, -jnp.inf)


def _join(sums_XBKGS, tokens, how):
    blocks, batch, kv_heads, _, size = sums_XBKGS.shape
    sums_BKGT = sums_XBKGS.transpose(1, 2, 3, 0, 4).reshape(batch, kv_heads, -1, blocks * size)
    sums_BKGT = sums_BKGT[..., :tokens]
    if how is None:
        return sums_BKGT.reshape(batch, -1, tokens)
    return sums_BKGT.max(2) if how == "max" else sums_BKGT.mean(2)


def _visible(
    query_positions: Int[Array, "#B Q"],
    key_positions: Int[Array, " S"],
    lengths: Int[Array, " B"],
    window: int | None,
) -> jax.Array:
    """`[B, Q, S]`: key at or before the query, inside its window, and not padding."""
    query_BQ1, key_11S = query_positions[:, :, None], key_positions[None, None]
    seen = (key_11S <= query_BQ1) & (key_11S < lengths[:, None, None])
    return seen if window is None else seen & (query_BQ1 - key_11S < window)
