"""Pallas (Mosaic) kernel for TPU: all query heads against tiles of a packed pool.

B batch, R rows (T new tokens x N query heads, padded to 8), M slots, C slots of a tile, H head dim,
E = 2 H.

A tile is read once, keys and values side by side, and every row is multiplied with all of it: the
mask, owner == the row's KV head, does the rest. Arithmetic that others' slots waste is free on a
matrix unit: decoding is bound by memory. How many tiles a layer has is a run-time number (the grid
is dynamic), tiles that its first and last slot cut are masked.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int8

# Slots of a tile: 1 MiB of bf16 entries at H = 128. Beside it lies the one that is being fetched.
TILE = 2048
_LANES, _SUBLANES = 128, 8
_NOTHING = -1e30  # below every score, and finite: differences of it are 0, not NaN


def supports(q_shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernel takes queries of this shape and dtype."""
    return q_shape[-1] % 64 == 0 and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)


def pool_attention(
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    entries: Float[Array, "B M E"],
    owners: Int8[Array, "B M"],
    positions: Int[Array, "B M"],
    start: Int[Array, " B"],
    end: Int[Array, " B"],
    *,
    kv_heads: int,
    window: int | None = None,
    tile: int = TILE,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `kvjax.kernels.decode_attention`; no dead ranges."""
    batch, tokens, heads, head_dim = q.shape
    slots, width = entries.shape[1:]
    tile = min(tile, -(-slots // _LANES) * _LANES)
    rows = tokens * heads
    padded = -(-rows // _SUBLANES) * _SUBLANES
    scaled = q.astype(jnp.float32) * head_dim**-0.5
    # Scaling before rounding to the entries' dtype loses nothing: head_dim ** -0.5 is a power of
    # two times at most 2 ** 0.5, and fp32 queries stay fp32.
    q_BRE = jnp.concatenate([scaled, jnp.zeros_like(scaled)], axis=-1).astype(entries.dtype)
    q_BRE = _pad_rows(q_BRE.reshape(batch, rows, width), padded, 0)
    head_N = jnp.arange(heads, dtype=jnp.int32) // (heads // kv_heads)
    owner_R1 = _pad_rows(jnp.tile(head_N, tokens)[None, :, None], padded, -2)[0]
    position_BR1 = _pad_rows(jnp.repeat(query_positions, heads, axis=1)[..., None], padded, -1)
    last_tile = max(-(-slots // tile) - 1, 0)
    tiles_B = (end + tile - 1) // tile - start // tile
    tiles_B = jnp.where(end > start, tiles_B, 0)

    def slot_block(row, step, start_B, end_B):
        # A tile that the row does not have is the last one again: nothing is fetched twice.
        reached = jnp.minimum(start_B[row] // tile + step, (end_B[row] - 1) // tile)
        return jnp.clip(reached, 0, last_tile)

    def of_row(row, step, start_B, end_B):
        return row, 0, 0

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, jnp.maximum(tiles_B.max(), 1)),
        in_specs=[
            pl.BlockSpec((1, padded, width), of_row),
            pl.BlockSpec((padded, 1), lambda *_: (0, 0)),
            pl.BlockSpec((1, padded, 1), of_row),
            pl.BlockSpec((1, tile, width), lambda b, i, *s: (b, slot_block(b, i, *s), 0)),
            pl.BlockSpec((1, 1, tile), lambda b, i, *s: (b, 0, slot_block(b, i, *s))),
            pl.BlockSpec((1, 1, tile), lambda b, i, *s: (b, 0, slot_block(b, i, *s))),
        ],
        out_specs=[
            pl.BlockSpec((1, padded, width), of_row),
            pl.BlockSpec((1, padded, _LANES), of_row),
        ],
        scratch_shapes=[
            pltpu.VMEM((padded, _LANES), jnp.float32),
            pltpu.VMEM((padded, _LANES), jnp.float32),
            pltpu.VMEM((padded, width), jnp.float32),
        ],
    )

    def kernel(*refs):
        _kernel(*refs, tile=tile, window=window)

    o_BRE, lse_BRX = pl.pallas_call(
        kernel,
        grid_spec=spec,
        out_shape=[
            jax.ShapeDtypeStruct((batch, padded, width), jnp.float32),
            jax.ShapeDtypeStruct((batch, padded, _LANES), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="pool_attention",
    )(
        start.astype(jnp.int32),
        end.astype(jnp.int32),
        q_BRE,
        owner_R1,
        position_BR1.astype(jnp.int32),
        entries,
        owners[:, None],
        positions[:, None],
    )
    o_BTNH = o_BRE[:, :rows, head_dim:].reshape(batch, tokens, heads, head_dim)
    return o_BTNH, lse_BRX[:, :rows, 0].reshape(batch, tokens, heads)


def _pad_rows(x: Array, rows: int, value: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows - x.shape[1]), (0, 0)), constant_values=value)


def _kernel(
    start_B, end_B, q_ref, owner_ref, row_position_ref, entries_ref, owners_ref, positions_ref,
    o_ref, lse_ref, peak_ref, total_ref, acc_ref, *, tile: int, window: int | None,
):  # fmt: skip
    row, step = pl.program_id(0), pl.program_id(1)
    start, end = start_B[row], end_B[row]

    @pl.when(step == 0)
    def _():
        peak_ref[...] = jnp.full_like(peak_ref, _NOTHING)
        total_ref[...] = jnp.zeros_like(total_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    first = (start // tile + step) * tile

    @pl.when(first < end)
    def _():
        entries_CE, positions_1C = entries_ref[0], positions_ref[0]
        owners_1C = owners_ref[0].astype(jnp.int32)
        slot_1C = first + jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
        mine_1C = (owners_1C >= 0) & (slot_1C >= start) & (slot_1C < end)
        s_RC = jax.lax.dot_general(
            q_ref[0], entries_CE, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        distance_RC = row_position_ref[0] - positions_1C
        seen_RC = mine_1C & (owners_1C == owner_ref[...]) & (distance_RC >= 0)
        if window is not None:
            seen_RC &= distance_RC < window
        s_RC = jnp.where(seen_RC, s_RC, _NOTHING)
        old_R1 = peak_ref[:, :1]
        peak_R1 = jnp.maximum(old_R1, s_RC.max(axis=1, keepdims=True))
        p_RC = jnp.where(seen_RC, jnp.exp(s_RC - peak_R1), 0.0)
        decay_R1 = jnp.exp(old_R1 - peak_R1)
        # 0 * NaN would be NaN: slots of others and empty ones are zeros, by selection.
        slot_C1 = first + jax.lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        inside_C1 = (slot_C1 >= start) & (slot_C1 < end)
        clean_CE = jnp.where(inside_C1, entries_CE, jnp.zeros_like(entries_CE))
        clean_CE = jnp.where(clean_CE == clean_CE, clean_CE, jnp.zeros_like(clean_CE))
        o_RE = jax.lax.dot_general(
            p_RC.astype(clean_CE.dtype), clean_CE, (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        acc_ref[...] = acc_ref[...] * decay_R1 + o_RE
        total_ref[...] = total_ref[...] * decay_R1 + p_RC.sum(axis=1, keepdims=True)
        peak_ref[...] = jnp.broadcast_to(peak_R1, peak_ref.shape)

    @pl.when(step == pl.num_programs(1) - 1)
    def _():
        total_R1 = total_ref[:, :1]
        o_ref[0] = acc_ref[...] / jnp.where(total_R1 > 0, total_R1, 1.0)
        lse = jnp.where(total_ref[...] > 0, peak_ref[...] + jnp.log(total_ref[...]), -jnp.inf)
        lse_ref[0] = lse
