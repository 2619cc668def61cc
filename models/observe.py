"""Compute what a layer's attention leaves in the `Probe`.

B batch, T prompt tokens, W observed queries, N query heads, K KV heads, G = N // K, H head dim,
D model dim, X = N H, C half of H.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.sharding import across_group

# Values whose part in the output is looked at together: D numbers each, for every query head.
BLOCK = 1024


def last_queries(
    q_BTNH: Float[Array, "B T N H"], lengths: Int[Array, " B"], count: int
) -> Float[Array, "B W N H"]:
    """The last `count` real queries of each row, right-aligned."""
    rows_BW = lengths[:, None] - jnp.arange(count, 0, -1)
    return jnp.take_along_axis(q_BTNH, jnp.maximum(rows_BW, 0)[:, :, None, None], axis=1)


def expected_queries(
    q_BTNH: Float[Array, "B T N H"],
    lengths: Int[Array, " B"],
    frequencies: Float[Array, " C"] | Float[Array, "B C"],
    future: int,
    skipped: int,
    shift: Int[Array, " B"] | None = None,
    factor: float = 1.0,
) -> tuple[Float[Array, "B N H"], Float[Array, "B N H H"]]:
    """Mean and covariance of the queries to come (Expected Attention, Devoto et al. 2025).

    The prompt's own before RoPE, rotated by the mean of the rotations of the next positions:
    R m and R C R', R = mean of R(p) over p = length .. length + future - 1 (+ shift).

    Args:
      q_BTNH: queries before RoPE.
      lengths: real tokens of each row.
      frequencies: RoPE's angle per position of each pair, the same for all rows or each row's.
      future: positions that are averaged over, at least 1.
      skipped: first queries, which are left out: attention sinks are unlike the others.
      shift: rotary minus true position of what follows the prompt (M-RoPE), 0 by default.
      factor: what RoPE multiplies queries by (YaRN, LongRoPE).
    """
    positions_T = jnp.arange(q_BTNH.shape[1])
    counted_BT = (positions_T >= skipped) & (positions_T < lengths[:, None])
    count = jnp.maximum(counted_BT.sum(-1), 1).astype(jnp.float32)[:, None, None]
    weight = counted_BT[..., None, None]
    q_BTNH = jnp.where(weight, q_BTNH.astype(jnp.float32), 0.0)
    mean_BNH = q_BTNH.sum(1) / count
    centered_BTNH = jnp.where(weight, q_BTNH - mean_BNH[:, None], 0.0)
    cov_BNHI = jnp.einsum("BTNH,BTNI->BNHI", centered_BTNH, centered_BTNH) / count[..., None]

    next_B = lengths if shift is None else lengths + shift
    ahead = (next_B[:, None] + jnp.arange(future)).astype(jnp.float32)
    frequencies = frequencies if frequencies.ndim == 1 else frequencies[:, None]
    angles = ahead[..., None] * frequencies
    cos_BC, sin_BC = jnp.cos(angles).mean(1), jnp.sin(angles).mean(1)
    if factor != 1.0:
        cos_BC, sin_BC = factor * cos_BC, factor * sin_BC

    def rotated(x):
        """R applied to the last axis; R is one matrix for each row."""
        left, right = jnp.split(x, 2, axis=-1)
        shape = (x.shape[0], *(1,) * (x.ndim - 2), -1)
        cos, sin = cos_BC.reshape(shape), sin_BC.reshape(shape)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    return rotated(mean_BNH), rotated(rotated(cov_BNHI).swapaxes(-1, -2))


def output_norms(
    v_BTKH: Float[Array, "B T K H"], o_XD: Float[Array, "X D"]
) -> Float[Array, "B K T"]:
    """L1 norm of each value's part in the layer's output, |v W_n|_1, the mean over the group.

    One query head and BLOCK tokens at a time (CriticalKV, Feng et al. 2025).
    """
    batch, tokens, kv_heads, head_dim = v_BTKH.shape
    heads = o_XD.shape[0] // head_dim
    o_NHD = o_XD.reshape(heads, head_dim, -1)

    def of_block(v_BSKH):
        def of_head(head):
            v_BSH = v_BSKH[:, :, head // (heads // kv_heads)]
            return jnp.abs((v_BSH @ o_NHD[head]).astype(jnp.float32)).sum(-1)

        norms_NBS = lax.map(of_head, jnp.arange(heads))
        return norms_NBS.reshape(kv_heads, -1, *norms_NBS.shape[1:]).mean(1)

    block = BLOCK if tokens % BLOCK == 0 else tokens
    blocks = v_BTKH.reshape(batch, -1, block, kv_heads, head_dim).swapaxes(0, 1)
    norms_XKBS = lax.map(of_block, blocks)
    norms_BKT = norms_XKBS.transpose(2, 1, 0, 3).reshape(batch, kv_heads, tokens)
    return across_group(norms_BKT, "mean")
