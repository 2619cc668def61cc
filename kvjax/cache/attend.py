"""Attention of new tokens to what the cache holds of a layer: kept entries and tail.

B batch, X rows of entries (B, or fewer where rows share them), T new tokens, N query heads, K KV
heads, H head dim, U slots of the tail.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.slots import Pool
from kvjax.cache.state import FROZEN_POINT, Cache
from kvjax.cache.tail import Tail
from kvjax.exact import floor_of_product
from kvjax.kernels.decode_attention import Evicted, merge, padded_attention, pool_attention
from kvjax.kernels.decode_attention.parts import over_tokens

# Rows (new tokens x query heads, of a whole batch) that are attended at once. What they need on the
# way are several fp32 copies of their outputs, 16 MiB each at H = 128; and compilers keep more or
# fewer of them, as it pleases them.
MOST_ROWS = 2**15


def attend(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    cache: Cache,
    layer: int,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Attend new tokens to a layer's kept entries and to the tail, by true position.

    Args:
      q: queries after RoPE; their own keys are in the tail already.
      positions: their positions, -1 for padding (its output is zeros).
      window: width of a sliding-window layer, or None.
    """
    most = max(1, MOST_ROWS // (q.shape[0] * q.shape[2]))
    return over_tokens(
        lambda q, positions: _attend(q, positions, cache, layer, window), (q, positions), most
    )


def _attend(q, positions, cache: Cache, layer: int, window: int | None):
    tail, pool, rows = cache.tail, cache.pool, cache.shared
    of_prompt = of_tail = None
    if cache.keep_ratio:
        if pool is not None:
            kept_XK, slots = pool.counts[:, layer], 0
        else:
            kept_XK = cache.layers[layer].lengths
            slots = cache.layers[layer].positions.shape[-1]
        kept_BK, lengths = jnp.repeat(kept_XK, rows, axis=0), cache.prompt_lengths
        of_prompt, of_tail = evicted_ranges(kept_BK, lengths, positions, window, tail, slots)
        of_prompt = folded_evicted(of_prompt, rows)
    asked = folded(q, rows), folded(positions, rows)
    if pool is not None:
        part = _attend_pool(*asked, pool, layer, window, of_prompt)
    else:
        entries = cache.layers[layer]
        held = entries.keys, entries.values, entries.positions
        part = padded_attention(*asked, *held, window=window, evicted=of_prompt)
    parts = [unfolded(part, rows), attend_tail(q, positions, tail, layer, window, of_tail)]
    return merge(parts).astype(q.dtype)


def attend_tail(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    tail: Tail,
    layer: int,
    window: int | None,
    evicted: Evicted | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend new tokens to one layer of the tail: output and log-sum-exp, in fp32."""
    held = tail.keys[layer], tail.values[layer], tail.positions[:, None]
    return padded_attention(q, positions, *held, window=window, evicted=evicted)


def _attend_pool(q, positions, pool: Pool, layer: int, window, evicted: Evicted | None):
    start_B, end_B = pool.bounds(layer)
    kept_BK = pool.counts[:, layer]
    gone = None
    if evicted is not None:
        # A head's slots are a run: its evicted ones too.
        run_BK = start_B[:, None] + jnp.cumsum(kept_BK, axis=-1) - kept_BK
        gone = run_BK + evicted.first, run_BK[:, None] + evicted.last
    return pool_attention(
        q,
        positions,
        pool.entries,
        pool.owners,
        pool.positions,
        start_B,
        end_B,
        kv_heads=kept_BK.shape[1],
        window=window,
        evicted=gone,
        scales=pool.scales,
        region=pool.regions[layer] if pool.regions is not None else None,
    )


def folded(x: Array, rows: int) -> Array:
    """`[B, T, ...]` of rows that share their entries, `rows` of them, as `[B / rows, rows T, ...]`.

    To attention they are one row with more new tokens: what they share is read once for all.
    """
    return x if rows == 1 else x.reshape(x.shape[0] // rows, -1, *x.shape[2:])


def folded_evicted(evicted: Evicted, rows: int) -> Evicted:
    """What rows that share their entries have evicted of them, as of `folded` rows."""
    return evicted._replace(first=evicted.first[::rows], last=folded(evicted.last, rows))


def unfolded(
    part: tuple[Float[Array, "X Y N H"], Float[Array, "X Y N"]], rows: int
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """What came of folded rows, row by row again."""
    if rows == 1:
        return part
    out, lse = (x.reshape(x.shape[0] * rows, -1, *x.shape[2:]) for x in part)
    return out, lse


def evicted_ranges(
    kept: Int[Array, "B K"],
    prompt_lengths: Int[Array, " B"],
    positions: Int[Array, "B T"],
    window: int | None,
    tail: Tail,
    slots: int = 0,
) -> tuple[Evicted, Evicted]:
    """PrefixKV's eviction while decoding, in closed form (upstream's fixed-point elimination).

    Of a prompt of N tokens a head kept m. When a row has seen N + t tokens, its length is held at
    ratio m / N by removing floor(t (N - m) / N) entries, in position order, from the kept slot
    m - 25 on (m // 2 where m - 25 < 1): first the prompt's last survivors, then the oldest of the
    tail. A query at position p finds what was removed when p tokens had been seen. Of a
    sliding-window layer N is what it could still see, so that one that kept all of it loses none.

    Args:
      kept: m of each head.
      positions: the queries'.
      slots: of each head where the layout is padded.

    Returns:
      Which of a head's kept entries, and which of the tail's, each query no longer sees.
    """
    first_BK, last_BKT = evicted_range(kept, prompt_lengths, positions, window)
    last_BTK = last_BKT.swapaxes(1, 2)
    order_S = jnp.arange(slots, dtype=jnp.int32)[None, None]
    grown_BU = tail.positions - prompt_lengths[:, None]
    order_BKU = kept[..., None] + grown_BU[:, None]
    return Evicted(order_S, first_BK, last_BTK), Evicted(order_BKU, first_BK, last_BTK)


def evicted_range(
    kept: Int[Array, "B K"],
    prompt_lengths: Int[Array, " B"],
    positions: Int[Array, "B T"],
    window: int | None,
) -> tuple[Int[Array, "B K"], Int[Array, "B K T"]]:
    """First removed entry of each head, and for each query the first one after the removed."""
    prompt_B11 = prompt_lengths[:, None, None]
    grown_B1T = jnp.maximum(positions - prompt_lengths[:, None], 0)[:, None]
    offered_B11 = prompt_B11 if window is None else jnp.minimum(prompt_B11, max(window - 1, 1))
    removed_BKT = floor_of_product(grown_B1T, offered_B11 - kept[..., None], offered_B11)
    first_BK = jnp.where(kept > FROZEN_POINT, kept - FROZEN_POINT, kept // 2)
    return first_BK, first_BK[..., None] + removed_BKT
