"""The packed pool's attention on a GPU: a Triton kernel, called through jax-triton.

Few rows (T new tokens x N query heads) are one block, which meets every slot of a layer. Many are
blocks of one KV head each, with the slots that it owns (`by_head.py`).

B batch, Y rows in X blocks, M slots, P splits, H head dim, E = 2 H.
"""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention.by_head import Blocks, by_token, in_blocks
from kvjax.kernels.decode_attention.packed import in_order
from kvjax.kernels.decode_attention.reference import merge_weights, query_rows
from kvjax.kernels.platform import triton_options

# Slots that a program reads at once, and programs that the chip should have at least.
TILE = 64
PROGRAMS = 264  # two for each of an H200's 132 multiprocessors
MOST_SPLITS = 64
LEAST_TILES = 8  # of a split: what it leaves to be merged is small beside what it reads
FEW = 64  # rows of several tokens that may meet every slot, in one block
MOST_ROWS = 64  # of a block of many


def supports(q_shape: tuple[int, ...], dtype: jnp.dtype, pages=None) -> bool:
    """Whether the kernel takes queries of this shape and such entries; jax-triton is installed.

    It takes any table and size of pages.
    """
    *_, heads, head_dim = q_shape
    fits = heads <= 128 and 16 <= head_dim <= 256
    return fits and jnp.dtype(dtype).itemsize in (1, 2, 4) and find_spec("jax_triton") is not None


def splits(blocks: int, slots: int) -> int:
    """Programs that share a block's slots; a static number, of a pool's size and not of its use."""
    wanted = -(-PROGRAMS // blocks)
    return max(1, min(wanted, MOST_SPLITS, slots // (LEAST_TILES * TILE)))


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
    """See `kvjax.kernels.decode_attention`; numbers of slots as in `packed.py`."""
    batch, tokens, heads, _ = q.shape
    rows = tokens * heads
    many = tokens > 1 and rows > FEW
    if many:
        blocks = in_blocks(
            q, query_positions, in_order(owners, pages), start, end,
            kv_heads=kv_heads, evicted=evicted, region=region,
            size=max(16, min(MOST_ROWS, pl.next_power_of_2(rows // kv_heads))),
        )  # fmt: skip
    else:
        blocks = Blocks(
            q=q.reshape(batch, rows, -1),
            rows=query_rows(query_positions, heads, kv_heads, evicted),
            first=start[:, None],
            end=end[:, None],
            size=max(16, pl.next_power_of_2(rows)),
        )
    pool = entries, owners, positions, scales
    group = heads // kv_heads if scores else 0
    o_BYH, lse_BY1, *slots = _attend(blocks, pool, pages, window, evicted is not None, group)
    if many:
        o_BTNH, lse_BTN1 = (by_token(x, tokens, heads, kv_heads) for x in (o_BYH, lse_BY1))
        return o_BTNH, lse_BTN1[..., 0]
    return o_BYH.reshape(q.shape), lse_BY1.reshape(batch, tokens, heads), *slots


def _attend(blocks: Blocks, pool, pages, window: int | None, evicts: bool, group: int):
    """Output and log-sum-exp of each block's rows, against the slots between its bounds.

    With query heads of a `group` also the slots' scores.
    """
    import jax_triton

    from kvjax.kernels.decode_attention.triton_kernel import slot_attention_kernel

    entries, owners, positions, scales = pool
    batch, rows, head_dim = blocks.q.shape
    each = blocks.first.shape[1]
    table, page = pages or (blocks.first, 1)
    parts = splits(batch * each, entries.shape[1] if pages is None else table.shape[1] * page)
    out = [
        jax.ShapeDtypeStruct((batch, parts, rows, head_dim), jnp.float32),
        jax.ShapeDtypeStruct((batch, parts, rows), jnp.float32),
    ]
    if group:
        out.append(jax.ShapeDtypeStruct((batch, group, table.shape[1] * page), jnp.float32))
    o_BPYH, lse_BPY, *scores = jax_triton.triton_call(
        blocks.q.astype(entries.dtype if scales is None else blocks.q.dtype),
        blocks.rows,
        entries,
        positions if scales is None else scales,
        owners,
        positions,
        blocks.first.astype(jnp.int32),
        blocks.end.astype(jnp.int32),
        table.astype(jnp.int32),
        kernel=slot_attention_kernel,
        out_type=tuple(out),
        grid=(batch * each, parts),
        name="slot_attention",
        R=rows,
        M=entries.shape[1],
        POOLS=entries.shape[0],
        PAGES=table.shape[1] if pages else 0,
        PAGE=page,
        H=head_dim,
        SCALE=head_dim**-0.5,
        ROWS=blocks.size,
        BLOCKS=each,
        WIDTH=pl.next_power_of_2(head_dim),
        TILE=TILE,
        SPLITS=parts,
        WINDOW=window or 0,
        EVICTS=evicts,
        QUANTIZED=scales is not None,
        GROUP=group,
        **({} if group else {"scores_ptr": None}),
        **triton_options(),
    )
    weight_PBY, lse_BY = merge_weights(lse_BPY.swapaxes(0, 1))
    o_BYH = jnp.einsum("PBY,BPYH->BYH", weight_PBY, o_BPYH)
    return o_BYH, lse_BY[..., None], *scores
