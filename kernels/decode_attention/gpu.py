"""The packed pool's attention on a GPU: a Triton kernel, called through jax-triton.

B batch, R rows (T new tokens x N query heads), M slots, P splits, H head dim, E = 2 H.
"""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention.reference import merge_weights, query_rows
from kvjax.kernels.platform import triton_options

# Slots that a program reads at once, and programs that the chip should have at least.
TILE = 64
PROGRAMS = 264  # two for each of an H200's 132 multiprocessors
MOST_SPLITS = 64
LEAST_TILES = 8  # of a split: what it leaves to be merged is small beside what it reads


def supports(q_shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernel takes queries of this shape and such entries; jax-triton is installed."""
    _, tokens, heads, head_dim = q_shape
    fits = tokens * heads <= 128 and 16 <= head_dim <= 256
    return fits and jnp.dtype(dtype).itemsize in (1, 2, 4) and find_spec("jax_triton") is not None


def splits(batch: int, slots: int) -> int:
    """Programs that share one row's slots; a static number, of a pool's size and not of its use."""
    wanted = -(-PROGRAMS // batch)
    return max(1, min(wanted, MOST_SPLITS, slots // (LEAST_TILES * TILE)))


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
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """See `kvjax.kernels.decode_attention`."""
    import jax_triton

    from kvjax.kernels.decode_attention.triton_kernel import pool_attention_kernel

    batch, tokens, heads, head_dim = q.shape
    slots, rows = entries.shape[1], tokens * heads
    parts = splits(batch, slots)
    q = q.astype(entries.dtype if scales is None else q.dtype)
    o_BPRH, lse_BPR = jax_triton.triton_call(
        q.reshape(batch, rows, head_dim),
        query_rows(query_positions, heads, kv_heads, dead),
        entries,
        positions if scales is None else scales,
        owners,
        positions,
        start.astype(jnp.int32),
        end.astype(jnp.int32),
        kernel=pool_attention_kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, parts, rows, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, parts, rows), jnp.float32),
        ),
        grid=(batch, parts),
        name="pool_attention",
        R=rows,
        M=slots,
        H=head_dim,
        SCALE=head_dim**-0.5,
        ROWS=max(16, pl.next_power_of_2(rows)),
        WIDTH=pl.next_power_of_2(head_dim),
        TILE=TILE,
        SPLITS=parts,
        WINDOW=window or 0,
        EVICTS=dead is not None,
        QUANTIZED=scales is not None,
        **triton_options(),
    )
    weight_PBR, lse_BR = merge_weights(lse_BPR.swapaxes(0, 1))
    o_BRH = jnp.einsum("PBR,BPRH->BRH", weight_PBR, o_BPRH)
    return o_BRH.reshape(q.shape), lse_BR.reshape(batch, tokens, heads)
