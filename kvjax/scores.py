"""Scorers: how important is each entry of a prompt's cache.

A scorer maps what attention left in the `Probe` to fp32 importances `[B, K, T]`, all >= 0.
B batch, T prompt tokens, W observation window, N query heads, K KV heads, G = N // K.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from kvjax.config import CompressionConfig
from kvjax.kernels.window_scores import window_scores
from kvjax.rows import Rows


def score(
    queries: Float[Array, "B W N H"] | None,
    column_sums: Float[Array, "B N T"] | None,
    keys: Float[Array, "B T K H"],
    rows: Rows,
    config: CompressionConfig,
    key: Key[Array, "*row"],
    window: int | None,
) -> Float[Array, "B K T"]:
    """Importance of each entry under `config.scorer`; padding scores 0.

    Args:
      queries: the last W queries of each row after RoPE, right-aligned, for "window".
      column_sums: attention that each key received from all queries, for "accumulated".
      keys: the layer's keys after RoPE.
      key: the layer's random key, for "random": one for all rows, or `[B]`.
      window: width of a sliding-window layer, or None.

    Raises:
      ValueError: what the scorer reads is missing.
    """
    batch, tokens, kv_heads, _ = keys.shape
    positions_T = jnp.arange(tokens)
    real_BT = positions_T < rows.lengths[:, None]
    if config.scorer == "window":
        if queries is None:
            raise ValueError("probe.queries is None, expected queries for scorer='window'")
        return _window(queries, keys, rows, config, window)
    if config.scorer == "accumulated":
        if column_sums is None:
            raise ValueError("probe.column_sums is None, expected sums for scorer='accumulated'")
        return jnp.where(real_BT[:, None], over_group(column_sums, kv_heads, config.group), 0.0)
    if config.scorer == "positional":
        scores_T = positions_T + 1.0
    else:
        # One draw a position, so that neither the bucket nor the batch changes it.
        def draw(key, position):
            return jax.random.uniform(jax.random.fold_in(key, position), (kv_heads,))

        draw_rows = jax.vmap(jax.vmap(draw, (None, 0), 1), (0, None))
        scores_T = draw_rows(jnp.broadcast_to(key, (batch,)), positions_T)
    scores_BKT = jnp.broadcast_to(scores_T, (batch, kv_heads, tokens)).astype(jnp.float32)
    return jnp.where(real_BT[:, None], scores_BKT, 0.0)


def _window(queries, keys, rows, config, window) -> Float[Array, "B K T"]:
    """SnapKV (Li et al. 2024, section 4): attention from the last W queries, pooled.

    The softmax runs over all keys; the window's own columns are dropped after it, so rows do not
    renormalise. The query heads of a group are reduced before pooling (Ada-KV).
    """
    window_size = queries.shape[1]
    back_W = jnp.arange(window_size, 0, -1)  # the last query is 1 from the end
    positions_BW = jnp.where(back_W <= rows.window[:, None], rows.lengths[:, None] - back_W, -1)
    raw_BKT = window_scores(
        queries, positions_BW, keys, rows.lengths, window=window, group=config.group
    )
    if config.reduce == "mean":
        raw_BKT = raw_BKT / jnp.maximum(rows.window, 1)[:, None, None]
    before_B1T = (jnp.arange(keys.shape[1]) < (rows.lengths - rows.window)[:, None])[:, None]
    raw_BKT = jnp.where(before_B1T, raw_BKT, 0.0)
    return jnp.where(before_B1T, pool(raw_BKT, config.pool, config.kernel), 0.0)


def over_group(
    per_query_head: Float[Array, "B N T"], kv_heads: int, how: str
) -> Float[Array, "B K T"]:
    """The mean or the max over the G query heads that share a KV head."""
    batch, _, tokens = per_query_head.shape
    grouped_BKGT = per_query_head.reshape(batch, kv_heads, -1, tokens)
    return grouped_BKGT.max(2) if how == "max" else grouped_BKGT.mean(2)


def pool(scores: Float[Array, "B K T"], how: str, kernel: int) -> Float[Array, "B K T"]:
    """Smooth along the sequence so that neighbours of an important entry survive with it.

    "average" pads with zeros and always divides by `kernel` (edges are biased low, as upstream);
    "max" is over the scores inside the sequence. Example, kernel 3, of 1 0 0:
    average 1/3 1/3 0, max 1 1 0.
    """
    if how == "none" or kernel == 1:
        return scores
    # What is wider than both neighbourhoods of a whole sequence is as wide as they are.
    window = (1, 1, min(kernel, 2 * scores.shape[-1] - 1))
    if how == "average":
        return lax.reduce_window(scores, 0.0, lax.add, window, (1, 1, 1), "SAME") / kernel
    return lax.reduce_window(scores, -jnp.inf, lax.max, window, (1, 1, 1), "SAME")
