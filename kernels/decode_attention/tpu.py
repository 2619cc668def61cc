"""Pallas (Mosaic) kernel for TPU: all query heads against tiles of a packed pool.

B batch, R rows (T new tokens x N query heads, padded to 8), M slots, C slots of a tile, H head dim,
E = 2 H.

A tile is read once, keys and values side by side, and every row is multiplied with all of it: the
mask, owner == the row's KV head, does the rest. Arithmetic that others' slots waste is free on a
matrix unit: decoding is bound by memory. How many tiles a layer has is a run-time number (the grid
is dynamic), tiles that its first and last slot cut are masked.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention.reference import query_rows

# Slots of a tile: 1 MiB of bf16 entries at H = 128. Beside it lies the one that is being fetched.
TILE = 2048
_LANES, _SUBLANES = 128, 8
_NOTHING = -1e30  # below every score, and finite: differences of it are 0, not NaN


def supports(q_shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernel takes queries of this shape and entries of this dtype.

    Where 2 H is no multiple of 128, some TPUs keep the pool in another layout and copy it once.
    """
    return q_shape[-1] % 16 == 0 and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32, jnp.int8)


def pool_attention(
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    entries: Float[Array, "B M E"] | Int8[Array, "B M E"],
    owners: Int8[Array, "B M"],
    positions: Int[Array, "B M"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    kv_heads: int,
    window: int | None = None,
    dead: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None = None,
    scales: Float[Array, "B 2 M"] | None = None,
    tile: int = TILE,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `kvjax.kernels.decode_attention`."""
    batch, tokens, heads, head_dim = q.shape
    rows, slots = tokens * heads, entries.shape[1]
    padded = -(-rows // _SUBLANES) * _SUBLANES
    tile = min(tile, -(-slots // _LANES) * _LANES)
    # Zeros beside the query: a tile's keys and values go through the matrix unit side by side.
    q_BRE = jnp.concatenate([q, jnp.zeros_like(q)], axis=-1)
    q_BRE = q_BRE.astype(entries.dtype if scales is None else q.dtype)
    q_BRE = _pad_rows(q_BRE.reshape(batch, rows, 2 * head_dim), padded, 0)
    rows_BR4 = _pad_rows(query_rows(query_positions, heads, kv_heads, dead), padded, -2)
    tiles_B = jnp.where(end > start, (end + tile - 1) // tile - start // tile, 0)
    o_BRE, lse_BRX = pl.pallas_call(
        partial(
            _kernel,
            scale=head_dim**-0.5,
            tile=tile,
            window=window,
            evicts=dead is not None,
            quantized=scales is not None,
        ),
        grid_spec=_grid(batch, tiles_B, padded, slots, 2 * head_dim, tile, scales is not None),
        out_shape=[
            jax.ShapeDtypeStruct(q_BRE.shape, jnp.float32),
            jax.ShapeDtypeStruct((batch, padded, _LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="pool_attention",
    )(
        start.astype(jnp.int32),
        end.astype(jnp.int32),
        q_BRE,
        rows_BR4,
        entries,
        owners[:, None],
        positions[:, None],
        *(() if scales is None else (scales,)),
    )
    o_BTNH = o_BRE[:, :rows, head_dim:].reshape(q.shape)
    return o_BTNH, lse_BRX[:, :rows, 0].reshape(batch, tokens, heads)


def _grid(
    batch: int, tiles_B: Array, rows: int, slots: int, width: int, tile: int, quantized: bool
) -> pltpu.PrefetchScalarGridSpec:
    """One step for every row and each of its layer's tiles; scratch for the online softmax."""
    last_tile = max(-(-slots // tile) - 1, 0)

    def slot_block(row, step, start_B, end_B):
        # A tile that the row does not have is the last one again: nothing is fetched twice.
        reached = jnp.minimum(start_B[row] // tile + step, (end_B[row] - 1) // tile)
        return jnp.clip(reached, 0, last_tile)

    def of_row(row, step, start_B, end_B):
        return row, 0, 0

    def columns(row, step, start_B, end_B):
        return row, 0, slot_block(row, step, start_B, end_B)

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, jnp.maximum(tiles_B.max(), 1)),
        in_specs=[
            pl.BlockSpec((1, rows, width), of_row),
            pl.BlockSpec((1, rows, 4), of_row),
            pl.BlockSpec((1, tile, width), lambda b, i, *s: (b, slot_block(b, i, *s), 0)),
            pl.BlockSpec((1, 1, tile), columns),
            pl.BlockSpec((1, 1, tile), columns),
            *([pl.BlockSpec((1, 2, tile), columns)] if quantized else []),
        ],
        out_specs=[
            pl.BlockSpec((1, rows, width), of_row),
            pl.BlockSpec((1, rows, _LANES), of_row),
        ],
        scratch_shapes=[
            pltpu.VMEM((rows, _LANES), jnp.float32),
            pltpu.VMEM((rows, _LANES), jnp.float32),
            pltpu.VMEM((rows, width), jnp.float32),
        ],
    )


def _pad_rows(x: Array, rows: int, value: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)), constant_values=value)


def _kernel(
    start_B, end_B, q_ref, rows_ref, entries_ref, owners_ref, positions_ref, *refs,
    scale: float, tile: int, window: int | None, evicts: bool, quantized: bool,
):  # fmt: skip
    o_ref, lse_ref, peak_ref, total_ref, acc_ref = refs[-5:]
    row, step = pl.program_id(0), pl.program_id(1)
    start, end = start_B[row], end_B[row]
    first = (start // tile + step) * tile

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, _NOTHING)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(first < end)
    def _():
        q_RE, rows_R4, entries_CE = q_ref[0], rows_ref[0], entries_ref[0].astype(q_ref.dtype)
        slot_1C = first + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
        owners_1C = owners_ref[0].astype(jnp.int32)
        owners_1C = jnp.where((slot_1C >= start) & (slot_1C < end), owners_1C, -1)
        distance_RC = rows_R4[:, 1:2] - positions_ref[0]
        # No row's head is -1.
        seen_RC = (owners_1C == rows_R4[:, 0:1]) & (distance_RC >= 0)
        if window is not None:
            seen_RC &= distance_RC < window
        if evicts:
            seen_RC &= (slot_1C < rows_R4[:, 2:3]) | (slot_1C >= rows_R4[:, 3:4])
        s_RC = scale * jax.lax.dot_general(
            q_RE, entries_CE, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        s_RC = s_RC * refs[0][0, 0:1] if quantized else s_RC
        s_RC = jnp.where(seen_RC, s_RC, _NOTHING)
        old_R1 = peak_ref[:, :1]
        peak_R1 = jnp.maximum(old_R1, s_RC.max(axis=1, keepdims=True))
        p_RC = jnp.where(seen_RC, jnp.exp(s_RC - peak_R1), 0.0)
        decay_R1 = jnp.exp(old_R1 - peak_R1)
        total_ref[...] = total_ref[...] * decay_R1 + p_RC.sum(axis=1, keepdims=True)
        p_RC = jnp.where(seen_RC, p_RC * refs[0][0, 1:2], 0.0) if quantized else p_RC
        # 0 * NaN would be NaN: slots of other layers are zeros by selection, and so is every NaN,
        # as empty slots hold anything. (A NaN in a held key still shows, through its score.)
        slot_C1 = first + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        inside_C1 = (slot_C1 >= start) & (slot_C1 < end)
        clean_CE = jnp.where(inside_C1 & (entries_CE == entries_CE), entries_CE, 0)
        o_RE = jax.lax.dot_general(
            p_RC.astype(clean_CE.dtype), clean_CE, (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        acc_ref[...] = acc_ref[...] * decay_R1 + o_RE
        peak_ref[...] = jnp.broadcast_to(peak_R1, peak_ref.shape)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total_R1 = total_ref[:, :1]
        o_ref[0] = acc_ref[...] / jnp.where(total_R1 > 0, total_R1, 1.0)
        lse = jnp.where(total_ref[...] > 0, peak_ref[...] + jnp.log(total_ref[...]), -jnp.inf)
        lse_ref[0] = lse
