"""Pallas (Mosaic) kernel for TPU: blocks of rows against tiles of a packed pool.

B batch, R rows of a block (new tokens x query heads, padded), X blocks, M slots, C slots of a tile,
H head dim, E = 2 H, W = H or E.

A tile is read once, keys and values side by side, and every row of the block is multiplied with all
of it: the mask, owner == the row's KV head, does the rest. Few rows are one block: arithmetic that
others' slots waste is free on a matrix unit, as decoding is bound by memory. Many are blocks of one
KV head each (`by_head.py`), and visit the tiles between the first and the last slot that it owns.
How many tiles that are is a run-time number (the grid is dynamic), tiles that the first and last
slot cut are masked.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention import tpu_pages
from kvjax.kernels.decode_attention.by_head import NOBODY, Blocks, block_size, by_token, in_blocks
from kvjax.kernels.decode_attention.packed import in_order
from kvjax.kernels.decode_attention.reference import query_rows

# Slots of a tile: 1 MiB of bf16 entries at H = 128. Beside it lies the one that is being fetched.
TILE = 2048
TILE_BYTES = 2**21  # at most, of wider entries
FEW = 256  # rows of several tokens that may meet every slot, in one block
# Rows of a block of many, and slots of the tiles that they meet: their scores take 1 MiB.
MOST_ROWS, MANY_TILE = 256, 1024
_LANES, _SUBLANES = 128, 8
_NOTHING = -1e30  # below every score, and finite: differences of it are 0, not NaN


def supports(q_shape: tuple[int, ...], dtype: jnp.dtype, pages=None) -> bool:
    """Whether the kernel takes queries of this shape and entries of this dtype, and such pages.

    Where 2 H is no multiple of 128, some TPUs keep the pool in another layout and copy it once.
    """
    dtype = jnp.dtype(dtype)
    fits = q_shape[-1] % 16 == 0 and dtype in (jnp.bfloat16, jnp.float32, jnp.int8)
    return fits and (pages is None or tpu_pages.supports(dtype, pages[0].shape, pages[1]))


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
    tile: int | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Array, ...]:
    """See `kvjax.kernels.decode_attention`; numbers of slots as in `packed.py`."""
    batch, tokens, heads, head_dim = q.shape
    # What is small is put in the layer's order outside: 5 bytes a slot beside 4 H.
    owners, positions = in_order(owners, pages), in_order(positions, pages)
    rows, slots = tokens * heads, owners.shape[1]
    many = tokens > 1 and rows > FEW
    tile = tile or _tile(many, 2 * head_dim * entries.dtype.itemsize)
    tile = min(tile, -(-slots // _LANES) * _LANES)
    if many:
        size = block_size(rows // kv_heads, MOST_ROWS, 2 * _SUBLANES)
        blocks = in_blocks(
            q, query_positions, owners, start, end,
            kv_heads=kv_heads, evicted=evicted, region=region, size=size,
        )  # fmt: skip
    else:
        size = -(-rows // _SUBLANES) * _SUBLANES
        q_BRH = _pad_rows(q.reshape(batch, rows, head_dim), size, 0)
        rows_BR4 = _pad_rows(query_rows(query_positions, heads, kv_heads, evicted), size, NOBODY)
        blocks = Blocks(q_BRH, rows_BR4, start[:, None], end[:, None], size)
    if scales is not None and pages is not None:
        scales = in_order(scales.swapaxes(1, 2), pages).swapaxes(1, 2)
    pool = entries, owners, positions, scales
    o_BYH, lse_BY1, *of_slots = _attend(
        blocks, pool, pages, tile, window=window, evicts=evicted is not None, interpret=interpret,
        scored=(heads, heads // kv_heads) if scores else None,
    )  # fmt: skip
    if many:
        o_BTNH, lse_BTN1 = (by_token(x, tokens, heads, kv_heads) for x in (o_BYH, lse_BY1))
        return o_BTNH, lse_BTN1[..., 0]
    lse_BTN = lse_BY1[:, :rows, 0].reshape(batch, tokens, heads)
    return o_BYH[:, :rows].reshape(q.shape), lse_BTN, *of_slots


def _tile(many: bool, entry_bytes: int) -> int:
    """Slots that are read at once: fewer where there are more scores, or entries are wider."""
    return min(MANY_TILE if many else TILE, TILE_BYTES // entry_bytes // _LANES * _LANES)


def _attend(
    blocks: Blocks, pool, pages, tile: int, *, window: int | None, evicts: bool, interpret,
    scored: tuple[int, int] | None,
):  # fmt: skip
    """Output and log-sum-exp of each block's rows, against the slots between its bounds.

    With (query heads, those of a group) `scored` also the slots' scores.
    """
    entries, owners, positions, scales = pool
    head_dim = entries.shape[-1] // 2
    q_BYW = blocks.q.astype(entries.dtype if scales is None else blocks.q.dtype)
    # Where a tile's halves begin at a lane's start they are read apart. Elsewhere keys and values
    # go through the matrix unit side by side, with zeros beside the query.
    apart = head_dim % _LANES == 0
    if not apart:
        q_BYW = jnp.concatenate([q_BYW, jnp.zeros_like(q_BYW)], axis=-1)
    first_BX, end_BX = blocks.first.astype(jnp.int32), blocks.end.astype(jnp.int32)
    tiles_BX = jnp.where(end_BX > first_BX, (end_BX + tile - 1) // tile - first_BX // tile, 0)
    sizes = {"tile": tile, "blocks": first_BX.shape[1]}
    scalars = [first_BX.reshape(-1), end_BX.reshape(-1)]
    if pages is not None:
        scalars.append(pages[0].astype(jnp.int32).reshape(-1))
    shapes = [q_BYW.shape, (*q_BYW.shape[:2], _LANES)]
    padded = -(-scored[1] // _SUBLANES) * _SUBLANES if scored else 0
    if scored:
        shapes.append((owners.shape[0], padded, owners.shape[1]))
    o_BYW, lse_BYX, *scores = pl.pallas_call(
        partial(
            _kernel,
            scale=head_dim**-0.5,
            window=window,
            evicts=evicts,
            quantized=scales is not None,
            apart=apart,
            pages=None if pages is None else (pages[0].shape[1], pages[1]),
            scored=scored,
            **sizes,
        ),
        grid_spec=_grid(
            tiles_BX.max(), blocks.size, owners.shape, entries, q_BYW.shape[-1],
            scales is not None, len(scalars), **sizes, scored=padded,
        ),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="slot_attention",
    )(
        *scalars,
        q_BYW,
        blocks.rows,
        owners[:, None],
        positions[:, None],
        *(() if scales is None else (scales,)),
        entries,
    )  # fmt: skip
    of_slots = [scores_BGY[:, : scored[1]] for scores_BGY in scores] if scored else []
    return o_BYW[..., -head_dim:], lse_BYX[..., :1], *of_slots


def _grid(
    most_tiles: Array, rows: int, layer: tuple[int, int], entries: Array, query_width: int,
    quantized: bool, scalars: int, *, tile: int, blocks: int, scored: int,
) -> pltpu.PrefetchScalarGridSpec:  # fmt: skip
    """One step for every block of rows and each of its tiles; scratch for the online softmax."""
    batch, slots = layer
    width, paged = entries.shape[-1], scalars > 2
    last_tile = max(-(-slots // tile) - 1, 0)

    def slot_block(row, block, step, first_X, end_X, *_):
        at = row * blocks + block
        # A tile that the block does not have is the last one again: nothing is fetched twice.
        reached = jnp.minimum(first_X[at] // tile + step, (end_X[at] - 1) // tile)
        return jnp.clip(reached, 0, last_tile)

    def of_block(row, block, step, *bounds):
        return row, block, 0

    def columns(row, *where):
        return row, 0, slot_block(row, *where)

    a_tile = pl.BlockSpec((1, tile, width), lambda row, *where: (row, slot_block(row, *where), 0))
    scratch = [
        pltpu.VMEM((rows, _LANES), jnp.float32),
        pltpu.VMEM((rows, _LANES), jnp.float32),
        pltpu.VMEM((rows, query_width), jnp.float32),
    ]
    if paged:
        scratch += [pltpu.VMEM((2, tile, width), entries.dtype), pltpu.SemaphoreType.DMA((2,))]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=scalars,
        grid=(batch, blocks, jnp.maximum(most_tiles, 1)),
        in_specs=[
            pl.BlockSpec((1, rows, query_width), of_block),
            pl.BlockSpec((1, rows, 4), of_block),
            pl.BlockSpec((1, 1, tile), columns),
            pl.BlockSpec((1, 1, tile), columns),
            *([pl.BlockSpec((1, 2, tile), columns)] if quantized else []),
            pl.BlockSpec(memory_space=pl.ANY) if paged else a_tile,
        ],
        out_specs=[
            pl.BlockSpec((1, rows, query_width), of_block),
            pl.BlockSpec((1, rows, _LANES), of_block),
            *([pl.BlockSpec((1, scored, tile), columns)] if scored else []),
        ],
        scratch_shapes=scratch,
    )


def _pad_rows(x: Array, rows: int, value: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)), constant_values=value)


def _kernel(
    *all_refs, scale: float, tile: int, blocks: int, window: int | None, evicts: bool,
    quantized: bool, apart: bool, pages: tuple[int, int] | None, scored: tuple[int, int] | None,
):  # fmt: skip
    first_X, end_X, *refs = all_refs
    table_X, refs = (refs[0], refs[1:]) if pages else (None, refs)
    q_ref, rows_ref, owners_ref, positions_ref, *refs = refs
    scales_ref, refs = (refs[0], refs[1:]) if quantized else (None, refs)
    entries_ref, o_ref, lse_ref, *refs = refs
    scores_ref, refs = (refs[0], refs[1:]) if scored else (None, refs)
    peak_ref, total_ref, acc_ref, *fetched = refs
    row, step = pl.program_id(0), pl.program_id(2)
    at = row * blocks + pl.program_id(1)
    start, end = first_X[at], end_X[at]
    first = (start // tile + step) * tile

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, _NOTHING)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(first < end)
    def _():
        if pages is None:
            tile_ref = entries_ref.at[0]
        else:
            width, page = pages
            tiles = tpu_pages.Tiles(table_X, entries_ref, *fetched, row=row, width=width, page=page)
            tile_ref = _fetched(tiles, step, first, end, tile)
        slot_1C = first + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
        owners_1C = owners_ref[0].astype(jnp.int32)
        owners_1C = jnp.where((slot_1C >= start) & (slot_1C < end), owners_1C, -1)
        rows_R4 = rows_ref[0]
        distance_RC = rows_R4[:, 1:2] - positions_ref[0]
        # No row's head is -1.
        visible_RC = (owners_1C == rows_R4[:, 0:1]) & (distance_RC >= 0)
        if window is not None:
            visible_RC &= distance_RC < window
        if evicts:
            visible_RC &= (slot_1C < rows_R4[:, 2:3]) | (slot_1C >= rows_R4[:, 3:4])
        slot_C1 = first + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        inside_C1 = (slot_C1 >= start) & (slot_C1 < end)
        s_RC = _accumulate(
            q_ref[0], tile_ref, None if scales_ref is None else scales_ref[0], visible_RC,
            inside_C1, (peak_ref, total_ref, acc_ref), scale=scale, apart=apart,
        )  # fmt: skip
        if scored:
            heads, group = scored
            # A slot's owner is one KV head: the others' rows do not see it.
            each = [s_RC[head : head + group] for head in range(0, heads, group)]
            scores_ref[0, :group] = reduce(jnp.maximum, each)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        total_R1 = total_ref[:, :1]
        o_ref[0] = acc_ref[...] / jnp.where(total_R1 > 0, total_R1, 1.0)
        lse = jnp.where(total_ref[...] > 0, peak_ref[...] + jnp.log(total_ref[...]), -jnp.inf)
        lse_ref[0] = lse


def _fetched(tiles: tpu_pages.Tiles, step, first, end, tile: int):
    """This step's tile, once it is there; the next one is on its way then."""
    half = step % 2

    @pl.when(step == 0)
    def _():
        tiles.start(half, first, end)

    @pl.when(first + tile < end)
    def _():
        tiles.start(1 - half, first + tile, end)

    tiles.wait(half, first, end)
    return tiles.buffer.at[half]


def _accumulate(q_RW, tile_ref, scales_2C, visible_RC, inside_C1, state, *, scale, apart):
    """Add a tile's slots to the online softmax of a block's rows, and give their scores."""
    peak_ref, total_ref, acc_ref = state
    head_dim = tile_ref.shape[-1] // 2
    k_CW = tile_ref[:, :head_dim] if apart else tile_ref[...]
    v_CW = tile_ref[:, head_dim:] if apart else k_CW
    k_CW, v_CW = k_CW.astype(q_RW.dtype), v_CW.astype(q_RW.dtype)
    s_RC = scale * jax.lax.dot_general(
        q_RW, k_CW, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    s_RC = s_RC if scales_2C is None else s_RC * scales_2C[0:1]
    s_RC = jnp.where(visible_RC, s_RC, _NOTHING)
    old_R1 = peak_ref[:, :1]
    peak_R1 = jnp.maximum(old_R1, s_RC.max(axis=1, keepdims=True))
    p_RC = jnp.where(visible_RC, jnp.exp(s_RC - peak_R1), 0.0)
    decay_R1 = jnp.exp(old_R1 - peak_R1)
    total_ref[...] = total_ref[...] * decay_R1 + p_RC.sum(axis=1, keepdims=True)
    if scales_2C is not None:
        p_RC = jnp.where(visible_RC, p_RC * scales_2C[1:2], 0.0)
    # 0 * NaN would be NaN: slots of other layers are zeros by selection, and so is every NaN,
    # as empty slots hold anything. (A NaN in a held key still shows, through its score.)
    clean_CW = jnp.where(inside_C1 & (v_CW == v_CW), v_CW, 0)
    o_RW = jax.lax.dot_general(
        p_RC.astype(clean_CW.dtype), clean_CW, (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    acc_ref[...] = acc_ref[...] * decay_R1 + o_RW
    peak_ref[...] = jnp.broadcast_to(peak_R1, peak_ref.shape)
    return s_RC
