"""Squared attention probabilities that entries receive: KV-Compress's metric, step by step.

    sum over new tokens and the query heads of the entry's group of  exp(2 (score - lse))

(Rehg 2024, arXiv 2410.00161, section 3.2) where lse is the log-sum-exp of all that a query sees,
slots and tail. The attention kernel has left the scores of one new token's queries; those of many
tokens are multiplied anew, as the scores of a whole question would not fit.

B batch, X pools (B, or one that all rows share), T new tokens, M slots of a pool, P pages of it,
R pages of a layer, Y slots of a layer, C slots of a block, N query heads, K KV heads, G = N // K,
H head dim, E = 2 H, S slots of the tail.
"""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8

from kvjax.kernels.decode_attention import packed

# Slots whose sums are raised at once.
BLOCK = 512


def _squares(scores: Array, lse: Array) -> Array:
    """Squared probabilities; 0 for what a query does not see, nothing included."""
    seen = (scores > -1e29) & (lse > -jnp.inf)
    return jnp.where(seen, jnp.exp(2 * jnp.where(seen, scores - lse, 0.0)), 0.0)


def add_scored(
    sums: Float[Array, "X M"],
    scores: Float[Array, "B G Y"],
    lse: Float[Array, "B 1 N"],
    owners: Int8[Array, "X M"],
    table: Int[Array, "B R"],
    lengths: Int[Array, " B"],
    *,
    page: int,
) -> Float[Array, "X M"]:
    """Add to the sums of one layer's slots what one token gives them.

    Args:
      sums: of all slots of the pools.
      scores: as `paged_attention(scores=True)` gives them.
      lse: of everything that each query head saw.
      owners, table, lengths, page: as of `paged_attention`.

    Returns:
      The sums; those of other layers' slots, and of unowned ones, are as they were. A page is one
      row's: what rows share would be added to in no order that holds.
    """
    batch, group, _ = scores.shape
    pools = sums.shape[0]
    lse_BKG = lse.reshape(batch, -1, group)
    each = max(1, min(BLOCK // page, table.shape[1]))
    pool_B1 = jnp.arange(batch)[:, None] % pools

    def step(index, sums_XPC):
        # The last block begins earlier where the table ends, and leaves out what has been.
        at = jnp.minimum(index * each, table.shape[1] - each)
        page_BX = lax.dynamic_slice_in_dim(table, at, each, axis=1)
        number_C = at * page + jnp.arange(each * page)
        owner_BC = owners.reshape(pools, -1, page)[pool_B1, page_BX].reshape(batch, -1)
        mine_BC = (number_C >= index * each * page) & (number_C < lengths[:, None])
        mine_BC &= owner_BC >= 0
        head_BC = jnp.maximum(owner_BC, 0).astype(jnp.int32)
        lse_BGC = jnp.take_along_axis(lse_BKG, head_BC[..., None], axis=1).swapaxes(1, 2)
        scores_BGC = lax.dynamic_slice_in_dim(scores, at * page, each * page, axis=2)
        more_BC = jnp.where(mine_BC, _squares(scores_BGC, lse_BGC).sum(1), 0.0)
        return sums_XPC.at[pool_B1, page_BX].add(more_BC.reshape(batch, each, page))

    blocks = -(-lengths.max() // (each * page))
    return lax.fori_loop(0, blocks, step, sums.reshape(pools, -1, page)).reshape(sums.shape)


def add_slots(
    sums: Float[Array, "B M"],
    lse: Float[Array, "B T N"],
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    entries: Float[Array, "B M E"] | Int8[Array, "B M E"],
    owners: Int8[Array, "B M"],
    positions: Int[Array, "B M"],
    table: Int[Array, "B R"],
    lengths: Int[Array, " B"],
    *,
    page: int,
    kv_heads: int,
    window: int | None = None,
    evicted: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None = None,
    scales: Float[Array, "B 2 M"] | None = None,
    consecutive: bool = False,
) -> Float[Array, "B M"]:
    """Add to the sums of one layer's slots what several tokens give them; reads the keys again.

    Args:
      sums: of all slots of the pools.
      lse: of everything that each query saw.
      Others: as of `paged_attention`.

    Returns:
      The sums; those of other layers' slots, and of unowned ones, are as they were.
    """
    start = jnp.zeros_like(lengths)
    pages: tuple[Array, int] | None = (table, page)
    if consecutive:
        start, pages = table[:, 0] * page, None
        evicted = evicted and (evicted[0] + start[:, None], evicted[1] + start[:, None, None])
    bounds = start, start + lengths
    rules = query_positions, *bounds, kv_heads, window, evicted
    pool: tuple[Array, ...] = (entries, owners, positions)
    if scales is not None:
        pool = *pool, scales[:, 0], scales[:, 1]
    visible = partial(packed._visible, rules, q.shape[2])
    block, first, read = packed._reader(pool, start, pages)
    rows_B1 = jnp.arange(q.shape[0])[:, None]

    def step(index, sums):
        held, number_BC = read(first + index * block)
        s_BTNC = packed._partial(q, held, number_BC, bounds, visible)[-1]
        more_BC = _squares(s_BTNC, lse[..., None]).sum((1, 2))
        slot_BC = number_BC
        if pages is not None:
            page_BC = jnp.minimum(number_BC // page, table.shape[1] - 1)
            slot_BC = jnp.take_along_axis(table, page_BC, axis=1) * page + number_BC % page
        inside_BC = (number_BC >= bounds[0][:, None]) & (number_BC < bounds[1][:, None])
        slot_BC = jnp.where(inside_BC, slot_BC, sums.shape[1])  # out of bounds, where it is dropped
        return sums.at[rows_B1, slot_BC].add(more_BC, mode="drop")

    blocks = (bounds[1] - first + block - 1).max() // block
    return lax.fori_loop(0, blocks, step, sums)


def add_tail(
    sums: Float[Array, "B K S"],
    lse: Float[Array, "B T N"],
    q: Float[Array, "B T N H"],
    keys: Float[Array, "B K S H"],
    visible: Bool[Array, " B #K T S"],
) -> Float[Array, "B K S"]:
    """Add to the sums of a tail's entries what new tokens give them.

    Args:
      sums: of the tail's entries.
      lse: of everything that each query saw.
      q: queries after RoPE; K divides N.
      keys: after RoPE.
      visible: entries that each query sees.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    q_BTKGH = q.reshape(batch, tokens, kv_heads, -1, head_dim)
    wide = {"preferred_element_type": jnp.float32}
    s_BKTGS = jnp.einsum("BTKGH,BKSH->BKTGS", q_BTKGH, keys, **wide) * head_dim**-0.5
    s_BKTGS = jnp.where(visible[:, :, :, None], s_BKTGS, -jnp.inf)
    lse_BKTG = lse.reshape(batch, tokens, kv_heads, heads // kv_heads).swapaxes(1, 2)
    return sums + _squares(s_BKTGS, lse_BKTG[..., None]).sum((2, 3))
