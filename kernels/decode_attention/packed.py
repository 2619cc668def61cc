"""Attention of new tokens to a packed pool in XLA: every query head looks at every slot.

Where a call has many rows (new tokens x query heads), they are taken in blocks of one KV head each
(`by_head.py`), and scores exist for one block of rows and one of slots at a time.

B batch, T new tokens, M slots, N query heads, K KV heads, G = N // K, H head dim, E = 2 H, R rows
of one KV head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention.by_head import block_size, by_token, in_blocks
from kvjax.kernels.decode_attention.padded import SCORES

# Slots that are read at once where a layer's place in the pool is known only while running.
BLOCK = 512
# Rows of one call that every slot may meet.
FEW = 256


def slot_attention(
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    entries: Float[Array, "X M E"] | Int8[Array, "X M E"],
    owners: Int8[Array, "X M"],
    positions: Int[Array, "X M"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    kv_heads: int,
    window: int | None = None,
    evicted: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None = None,
    scales: Float[Array, "X 2 M"] | None = None,
    region: tuple[int, int] | None = None,
    pages: tuple[Int[Array, "B R"], int] | None = None,
    scores: bool = False,
) -> tuple[Array, ...]:
    """See `kvjax.kernels.decode_attention`.

    Bounds and evicted slots are numbered as the pool's are, or through `pages`: the layer's table
    and the slots of a page.
    """
    rules = (query_positions, start, end, kv_heads, window, evicted)
    pool: tuple[Array, ...] = (entries, owners, positions)
    if scales is not None:
        pool = *pool, scales[:, 0], scales[:, 1]
    if q.shape[1] > 1 and _many(q.shape, region):
        return _by_head(q, pool, rules, region, pages)
    visible = partial(_visible, rules, q.shape[2])
    if region is not None:
        first, last = region
        pool = tuple(x[:, first:last] for x in pool)
        slots_BM = jnp.broadcast_to(jnp.arange(first, last), pool[1].shape)
        found = _partial(q, pool, slots_BM, (start, end), visible)[:3]
    else:
        found = _blocks(q, pool, (start, end), visible, pages, kv_heads if scores else 0)
    return *_divided(*found[:3]), *found[3:]


def _many(q_shape, region) -> bool:
    batch, tokens, heads, _ = q_shape
    if region is None:
        return tokens * heads > FEW
    return batch * tokens * heads * (region[1] - region[0]) > SCORES


def _divided(peak, total, o_BTNH):
    o_BTNH = o_BTNH / jnp.where(total > 0, total, 1.0)[..., None]
    return o_BTNH, jnp.where(total > 0, peak, 0.0) + jnp.log(total)


def _by_head(q_BTNH, pool, rules, region, pages):
    """Block after block of one KV head's rows, each against the slots that its head owns."""
    query_positions, start, end, kv_heads, window, evicted = rules
    batch, tokens, heads, _ = q_BTNH.shape
    most = max(16, SCORES // (batch * BLOCK) // 16 * 16)
    size = block_size(tokens * heads // kv_heads, most, 16)
    blocks = in_blocks(
        q_BTNH, query_positions, in_order(pool[1], pages), start, end,
        kv_heads=kv_heads, evicted=evicted, region=region, size=size,
    )  # fmt: skip

    def apart(x_BYC):
        return x_BYC.reshape(batch, -1, size, x_BYC.shape[-1]).swapaxes(0, 1)

    def attend(block):
        q_BRH, rows_BR4, first_B, end_B = block
        visible = partial(_visible_by_row, rows_BR4, window, evicted is not None)
        found = _blocks(q_BRH[:, :, None], pool, (first_B, end_B), visible, pages)
        return _divided(*found)

    each = apart(blocks.q), apart(blocks.rows), blocks.first.T, blocks.end.T
    o_XBR1H, lse_XBR1 = lax.map(attend, each)

    def together(x_XBRC):
        found_BYC = x_XBRC.swapaxes(0, 1).reshape(batch, -1, x_XBRC.shape[-1])
        return by_token(found_BYC, tokens, heads, kv_heads)

    return together(o_XBR1H[:, :, :, 0]), together(lse_XBR1)[..., 0]


def _blocks(q_BTNH, pool, bounds, visible, pages, scored=0):
    """Online softmax over as many blocks as the longest row needs.

    With `scored` KV heads every slot's scores beside it, `[B, G, Y]`; one token's, through pages.
    """
    start, end = bounds
    block, first, read = _reader(pool, start, pages)

    def step(index, carry):
        peak, total, o_BTNH, *scores = carry
        held, slots_BM = read(first + index * block)
        *part, s_BTNM = _partial(q_BTNH, held, slots_BM, bounds, visible)
        if scores:
            s_BKGM = s_BTNM.reshape(s_BTNM.shape[0], scored, -1, block)
            at = (0, 0, index * block)
            scores = [lax.dynamic_update_slice(scores[0], s_BKGM.max(1), at)]
        top = jnp.maximum(peak, part[0])
        safe = jnp.where(top == -jnp.inf, 0.0, top)
        old, new = jnp.exp(peak - safe), jnp.exp(part[0] - safe)
        return (
            top,
            total * old + part[1] * new,
            o_BTNH * old[..., None] + part[2] * new[..., None],
            *scores,
        )

    shape = q_BTNH.shape[:-1]
    nothing = [
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros(q_BTNH.shape, jnp.float32),
    ]
    if scored:
        slots = -(-pages[0].shape[1] * pages[1] // block) * block
        group = q_BTNH.shape[2] // scored
        # As wide as the table may be; whoever reads it goes no further than the row's slots.
        nothing.append(lax.empty((q_BTNH.shape[0], group, slots), jnp.float32))
    return lax.fori_loop(0, (end - first + block - 1).max() // block, step, tuple(nothing))


def _reader(pool, start_B, pages):
    """Slots of a block, where the first one begins, and what reads the block at some slot.

    Reading gives the pool's arrays and the slots' numbers, which are past all bounds where a block
    holds no slot of its own.
    """
    if pages is None:
        slots = pool[0].shape[1]
        block = min(BLOCK, slots)

        def cut(wanted_B):
            offset_B = jnp.clip(wanted_B, 0, slots - block)
            slots_BM = offset_B[:, None] + jnp.arange(block)
            # A block that the pool's end pushed back does not count its first slots again.
            slots_BM = jnp.where(slots_BM >= wanted_B[:, None], slots_BM, slots)
            here = jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, block))
            return tuple(here(x, offset_B) for x in pool), slots_BM

        return block, start_B, cut
    table_BR, page = pages
    each = max(1, BLOCK // page)
    table_BR = jnp.pad(table_BR, ((0, 0), (0, -table_BR.shape[1] % each)))
    block = each * page

    def gather(wanted_B):
        at_B = wanted_B // page
        here_BX = jax.vmap(lambda row, at: lax.dynamic_slice_in_dim(row, at, each))(table_BR, at_B)
        return tuple(in_order(x, (here_BX, page)) for x in pool), wanted_B[:, None] + jnp.arange(
            block
        )

    return block, start_B // block * block, gather


def in_order(array: Array, pages) -> Array:
    """`[B, R page, ...]` of an array `[X, M, ...]` in the order of a table `[B, R]` of its pages.

    Without pages the array itself. X is B, or 1 for a pool that all rows share.
    """
    if pages is None:
        return array
    table_BR, page = pages
    paged = array.reshape(array.shape[0], -1, page, *array.shape[2:])
    if array.shape[0] == 1:
        taken = paged[0][table_BR]
    else:
        taken = jax.vmap(lambda pool, at: pool[at])(paged, table_BR)
    return taken.reshape(table_BR.shape[0], -1, *array.shape[2:])


def _partial(q_BTNH, pool, slots_BM, bounds, visible):
    """(peak, sum of exponentials, weighted sum, scores) over some slots.

    Where a row sees none they are -inf, 0, 0, and so is the score of what it does not see, -inf.
    `visible(slots_BM, owners_BM, positions_BM)` says which rows see which of these slots.
    """
    entries_BME, owners_BM, positions_BM, *scales_BM = pool
    start, end = bounds
    head_dim = q_BTNH.shape[-1]
    mine_BM = (owners_BM >= 0) & (slots_BM >= start[:, None]) & (slots_BM < end[:, None])
    # Values, because 0 * NaN would be NaN. Keys too, so that XLA cuts both halves out of a fixed
    # region once, before the loop of decode steps: bare slices it would cut again in every step.
    k_BMH, v_BMH = (
        jnp.where(mine_BM[..., None], half, 0)
        for half in (entries_BME[..., :head_dim], entries_BME[..., head_dim:])
    )
    if scales_BM:  # int8 entries: whole numbers in the query's dtype, exactly
        k_BMH, v_BMH = k_BMH.astype(q_BTNH.dtype), v_BMH.astype(q_BTNH.dtype)
    # Entries first: the other way round a CPU's matrix product wants them transposed, a copy of the
    # layer at every step.
    s_BMTN = jnp.einsum("BMH,BTNH->BMTN", k_BMH, q_BTNH, preferred_element_type=jnp.float32)
    s_BTNM = s_BMTN.transpose(0, 2, 3, 1)
    s_BTNM = s_BTNM * head_dim**-0.5
    if scales_BM:
        s_BTNM = s_BTNM * scales_BM[0][:, None, None]
    visible_BTNM = mine_BM[:, None, None] & visible(slots_BM, owners_BM, positions_BM)
    s_BTNM = jnp.where(visible_BTNM, s_BTNM, -jnp.inf)
    peak_BTN = s_BTNM.max(-1)
    p_BTNM = jnp.exp(s_BTNM - jnp.where(peak_BTN == -jnp.inf, 0.0, peak_BTN)[..., None])
    total_BTN = p_BTNM.sum(-1)
    if scales_BM:
        p_BTNM = jnp.where(visible_BTNM, p_BTNM * scales_BM[1][:, None, None], 0.0)
    o_BTNH = jnp.einsum(
        "BTNM,BMH->BTNH", p_BTNM.astype(v_BMH.dtype), v_BMH, preferred_element_type=jnp.float32
    )
    return peak_BTN, total_BTN, o_BTNH, s_BTNM


def _visible(rules, heads, slots_BM, owners_BM, positions_BM):
    """Which query heads of which tokens see which slots, by position and owner."""
    query_positions, _, _, kv_heads, window, evicted = rules
    distance_BTM = query_positions[..., None] - positions_BM[:, None]
    visible_BTM = distance_BTM >= 0
    if window is not None:
        visible_BTM &= distance_BTM < window
    if evicted is not None:
        owner_BM = jnp.maximum(owners_BM, 0).astype(jnp.int32)
        first_BM = jnp.take_along_axis(evicted[0], owner_BM, axis=1)
        last_BTM = jnp.take_along_axis(evicted[1], owner_BM[:, None], axis=2)
        visible_BTM &= ~((slots_BM >= first_BM)[:, None] & (slots_BM[:, None] < last_BTM))
    head_N = jnp.arange(heads) // (heads // kv_heads)
    return visible_BTM[:, :, None] & (owners_BM[:, None, None] == head_N[:, None])


def _visible_by_row(rows_BR4, window, evicts, slots_BM, owners_BM, positions_BM):
    """The same for rows of one KV head, `[B, R, 1, M]`."""
    owner_BR1, at_BR1, first_BR1, last_BR1 = (rows_BR4[..., i : i + 1] for i in range(4))
    distance_BRM = at_BR1 - positions_BM[:, None]
    visible_BRM = (owners_BM[:, None] == owner_BR1) & (distance_BRM >= 0)
    if window is not None:
        visible_BRM &= distance_BRM < window
    if evicts:
        slot_B1M = slots_BM[:, None]
        visible_BRM &= (slot_B1M < first_BR1) | (slot_B1M >= last_BR1)
    return visible_BRM[:, :, None]
