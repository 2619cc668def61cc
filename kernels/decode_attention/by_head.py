"""The rows of many new tokens in order of their KV head, in blocks of one head each.

A row is one query head of one new token. Few rows (decoding) meet every slot of a layer, whoever
owns it: the slots have to be read anyway, and what the mask throws away is free. Many rows (a
question, a scored text) are bound by arithmetic. So a block holds rows of ONE KV head, and looks
only at the slots between the first and the last that this head owns.

B batch, T new tokens, M slots, N query heads, K KV heads, G = N // K, H head dim, R rows of a
block, X blocks (those of the first KV head, then those of the second, and so on), Y = X R.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention.reference import query_rows

# KV head of a row that is only there to fill a block: no slot's owner, and not an empty slot's -1.
NOBODY = -2


class Blocks(NamedTuple):
    """Many rows in order of KV head.

    Attributes:
      q: `[B, Y, H]`, zeros where a row only fills its block.
      rows: `[B, Y, 4]` as `query_rows` gives them, NOBODY's where a row only fills its block.
      first, end: `[B, X]` bounds of the slots that a block's head owns, first <= m < end; 0, 0
        where it owns none, or where a block has no real token.
      size: R.
    """

    q: Float[Array, "B Y H"]
    rows: Int[Array, "B Y 4"]
    first: Int[Array, "B X"]
    end: Int[Array, "B X"]
    size: int


def block_size(rows: int, most: int, multiple: int) -> int:
    """Rows of a block where a head has so many: blocks of one size, as full as may be."""
    blocks = -(-rows // most)
    return -(-rows // (blocks * multiple)) * multiple


def in_blocks(
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    owners: Int8[Array, "B M"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    kv_heads: int,
    evicted: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None,
    region: tuple[int, int] | None,
    size: int,
) -> Blocks:
    """Rows in blocks of `size`; the other arguments are `pool_attention`'s."""
    batch, tokens, heads, head_dim = q.shape
    rows_BTN4 = query_rows(query_positions, heads, kv_heads, evicted)
    rows_BKR4 = _ordered(rows_BTN4.reshape(batch, tokens, heads, 4), kv_heads, size, NOBODY)
    blocks = rows_BKR4.shape[2] // size
    # A padded token's position is -1, and so is that of a row which only fills its block.
    live_BKX = (rows_BKR4[..., 1] >= 0).reshape(batch, kv_heads, blocks, size).any(-1)
    first_BX, end_BX = (
        jnp.where(live_BKX, bound_BK[..., None], 0).reshape(batch, -1)
        for bound_BK in owned(owners, start, end, kv_heads, region)
    )
    q_BKRH = _ordered(q, kv_heads, size, 0)
    return Blocks(
        q=q_BKRH.reshape(batch, -1, head_dim),
        rows=rows_BKR4.reshape(batch, -1, 4),
        first=first_BX,
        end=end_BX,
        size=size,
    )


def _ordered(x_BTNC: Array, kv_heads: int, size: int, empty: int) -> Array:
    """`[B, K, T G rounded up to whole blocks, ...]`: a head's rows, token after token."""
    batch, tokens, heads, width = x_BTNC.shape
    grouped = x_BTNC.reshape(batch, tokens, kv_heads, heads // kv_heads, width).swapaxes(1, 2)
    rows = tokens * heads // kv_heads
    more = ((0, 0), (0, 0), (0, -rows % size), (0, 0))
    return jnp.pad(grouped.reshape(batch, kv_heads, rows, width), more, constant_values=empty)


def by_token(
    x: Float[Array, "B Y C"], tokens: int, heads: int, kv_heads: int
) -> Float[Array, "B T N C"]:
    """What was found for rows in order of KV head, in order of token and query head again."""
    batch, _, width = x.shape
    group = heads // kv_heads
    x_BKRC = x.reshape(batch, kv_heads, -1, width)[:, :, : tokens * group]
    x_BTKGC = x_BKRC.reshape(batch, kv_heads, tokens, group, width).swapaxes(1, 2)
    return x_BTKGC.reshape(batch, tokens, heads, width)


def owned(
    owners: Int8[Array, "B M"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    kv_heads: int,
    region: tuple[int, int] | None = None,
) -> tuple[Int[Array, "B K"], Int[Array, "B K"]]:
    """First slot of a layer that each head owns, and one past the last; 0, 0 where it owns none.

    Owners may come in any order. `region`: static bounds of the layer, where there are any.
    """
    first, last = region or (0, owners.shape[1])
    slot_M = jnp.arange(first, last, dtype=jnp.int32)
    owner_BM = owners[:, first:last]
    inside_BM = (slot_M >= start[:, None]) & (slot_M < end[:, None])
    head_K1 = jnp.arange(kv_heads, dtype=owner_BM.dtype)[:, None]
    mine_BKM = inside_BM[:, None] & (owner_BM[:, None] == head_K1)
    end_BK = jnp.where(mine_BKM, slot_M + 1, 0).max(-1, initial=0)
    first_BK = jnp.where(mine_BKM, slot_M, last).min(-1, initial=last)
    return jnp.where(end_BK > 0, first_BK, 0), end_BK
