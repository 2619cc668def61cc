"""Pallas (Mosaic) kernels for TPU: log-sum-exp of some queries, then column sums of their softmax.

B batch, X query blocks, R rows of a block (G heads x W queries), T keys, C keys of a tile, N query
heads, K KV heads, G = N // K, H head dim, E lanes that are read at once.

Scores are computed transposed, `[C, R]`: what belongs to a query (position, log-sum-exp) is a row
of lanes then, and sums over queries are a matrix product with ones. Keys are read as they lie,
`[B, T, K H]`; heads narrower than the lanes are read together, beside zeros in the query.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

_LANES, _SUBLANES = 128, 8
_NOTHING = -1e30
KEY_TILE = 512
QUERY_BLOCK = 128


def supports(q_shape: tuple[int, ...], kv_heads: int, tokens: int) -> bool:
    """Whether the kernels take these queries and this many keys."""
    head_dim = q_shape[-1]
    whole = head_dim % _LANES == 0 or _LANES % head_dim == 0
    return whole and (kv_heads * head_dim) % _LANES == 0 and tokens % _LANES == 0


def window_scores(
    q: Float[Array, "B W N H"],
    query_positions: Int[Array, "B W"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: int = 1,
    group: str | None = None,
    interpret: Any = False,
) -> Float[Array, "B X T"]:
    """See `kvjax.kernels.window_scores`."""
    queries, block = q.shape[1], -(-q.shape[1] // _SUBLANES) * _SUBLANES
    pad = block - queries
    positions_BW = jnp.pad(query_positions, ((0, 0), (0, pad)), constant_values=-1)
    q_BWNH = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    rows, at = _rows(q_BWNH, positions_BW, k.shape[2], block)
    lse = _log_sums(rows, at, k, lengths, window, interpret)
    settings = (window, power, group, block, interpret)
    return _columns(rows, at, lse, k, lengths, *settings)


def accumulated_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lse: Float[Array, "B N T"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: int = 1,
    group: str | None = None,
    interpret: Any = False,
) -> Float[Array, "B X T"]:
    """See `kvjax.kernels.window_scores`: every token is a query, in blocks."""
    batch, tokens, heads, _ = q.shape
    kv_heads, block = k.shape[2], QUERY_BLOCK
    positions_BT = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    positions_BT = jnp.where(positions_BT < lengths[:, None], positions_BT, -1)
    rows, at = _rows(q, positions_BT, kv_heads, block)
    lse_BKGXW = lse.reshape(batch, kv_heads, heads // kv_heads, -1, block)
    lse_BKX1R = lse_BKGXW.transpose(0, 1, 3, 2, 4).reshape(batch, kv_heads, tokens // block, 1, -1)
    # A padding row's may be -inf, and its scores are masked by its position.
    lse_BKX1R = jnp.where(lse_BKX1R == -jnp.inf, 0.0, lse_BKX1R)
    settings = (window, power, group, block, interpret)
    return _columns(rows, at, lse_BKX1R, k, lengths, *settings)


def _rows(q_BWNH, positions_BW, kv_heads: int, block: int):
    """Queries as `[B, K, X, R, E]` and their positions as `[B, X, 1, R]`."""
    batch, queries, heads, head_dim = q_BWNH.shape
    group, count = heads // kv_heads, queries // block
    q_BXWKGH = q_BWNH.reshape(batch, count, block, kv_heads, group, head_dim)
    q_BKXGWH = q_BXWKGH.transpose(0, 3, 1, 4, 2, 5)
    q_BKXRH = q_BKXGWH.reshape(batch, kv_heads, count, group * block, head_dim)
    beside = max(1, _LANES // head_dim)  # heads that share the lanes of a tile
    if beside > 1:
        place_KP = (jnp.arange(kv_heads) % beside)[:, None] == jnp.arange(beside)
        q_BKXRPH = jnp.where(place_KP[:, None, None, :, None], q_BKXRH[..., None, :], 0)
        q_BKXRH = q_BKXRPH.reshape(*q_BKXRH.shape[:-1], beside * head_dim)
    positions_BX1R = jnp.tile(positions_BW.reshape(batch, count, 1, block), (1, 1, 1, group))
    return q_BKXRH, positions_BX1R.astype(jnp.int32)


def _specs(q_BKXRE, kv_heads: int, head_dim: int, tile: int, order):
    """Block specs of queries, positions and keys; `order` maps grid indices to (b, k, x, c)."""
    rows, lanes = q_BKXRE.shape[-2:]

    def queries(*grid):
        b, k, x, _ = order(*grid[:-1])
        return b, k, x, 0, 0

    def positions(*grid):
        b, _, x, _ = order(*grid[:-1])
        return b, x, 0, 0

    def keys(*grid):
        b, k, _, c = order(*grid[:-1])
        return b, c, k * head_dim // lanes

    return [
        pl.BlockSpec((1, 1, 1, rows, lanes), queries),
        pl.BlockSpec((1, 1, 1, rows), positions),
        pl.BlockSpec((1, tile, lanes), keys),
    ]


def _transposed_scores(q_ref, positions_ref, k_ref, length, first, scale, window):
    """`[C, R]` scaled scores of a tile whose first key is at `first`, and which of them count."""
    k_CE, q_RE = k_ref[0], q_ref[0, 0, 0]
    s_CR = lax.dot_general(k_CE, q_RE, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    key_C1 = first + lax.broadcasted_iota(jnp.int32, (k_CE.shape[0], 1), 0)
    distance_CR = positions_ref[0, 0] - key_C1
    seen_CR = (distance_CR >= 0) & (key_C1 < length)
    if window is not None:
        seen_CR &= distance_CR < window
    return s_CR * scale, seen_CR


def _log_sums(q_BKXRE, positions_BX1R, k, lengths, window, interpret):
    """Pass one: each query's log-sum-exp over all keys it sees, `[B, K, X, 1, R]`."""
    batch, kv_heads, count, rows, _ = q_BKXRE.shape
    tokens, head_dim = k.shape[1], k.shape[3]
    tile = _tile(tokens)

    def kernel(lengths_ref, q_ref, positions_ref, k_ref, lse_ref, peak_ref, total_ref):
        row, step = pl.program_id(0), pl.program_id(3)

        @pl.when(step == 0)
        def _():
            peak_ref[...] = jnp.full_like(peak_ref, _NOTHING)
            total_ref[...] = jnp.zeros_like(total_ref)

        first = step * tile

        @pl.when((first < lengths_ref[row]) & (positions_ref[0, 0].max() >= first))
        def _():
            s_CR, seen_CR = _transposed_scores(
                q_ref, positions_ref, k_ref, lengths_ref[row], first, head_dim**-0.5, window
            )
            s_CR = jnp.where(seen_CR, s_CR, _NOTHING)
            peak_1R = jnp.maximum(peak_ref[...], s_CR.max(axis=0, keepdims=True))
            p_CR = jnp.where(seen_CR, jnp.exp(s_CR - peak_1R), 0.0)
            total_ref[...] = total_ref[...] * jnp.exp(peak_ref[...] - peak_1R) + p_CR.sum(
                axis=0, keepdims=True
            )
            peak_ref[...] = peak_1R

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            total = total_ref[...]
            lse_ref[0, 0, 0] = jnp.where(total > 0, peak_ref[...] + jnp.log(total), 0.0)

    in_specs = _specs(q_BKXRE, kv_heads, head_dim, tile, lambda b, k, x, c: (b, k, x, c))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, count, tokens // tile),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, 1, 1, 1, rows), lambda b, k, x, c, _: (b, k, x, 0, 0)),
            scratch_shapes=[pltpu.VMEM((1, rows), jnp.float32)] * 2,
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, count, 1, rows), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="window_log_sums",
    )(lengths.astype(jnp.int32), q_BKXRE, positions_BX1R, _flat(k))


def _columns(q_BKXRE, positions_BX1R, lse_BKX1R, k, lengths, window, power, how, block, interpret):
    """Pass two: sums over queries of (softmax ** power), `[B, N or K, T]`."""
    batch, kv_heads, count, rows, _ = q_BKXRE.shape
    tokens, head_dim = k.shape[1], k.shape[3]
    tile, group = _tile(tokens), rows // block
    padded = -(-group // _SUBLANES) * _SUBLANES
    members = group if how is None else 1

    def kernel(lengths_ref, q_ref, positions_ref, k_ref, lse_ref, out_ref, sums_ref):
        row, step = pl.program_id(0), pl.program_id(3)
        first = pl.program_id(2) * tile

        @pl.when(step == 0)
        def _():
            sums_ref[...] = jnp.zeros_like(sums_ref)

        @pl.when((first < lengths_ref[row]) & (positions_ref[0, 0].max() >= first))
        def _():
            s_CR, seen_CR = _transposed_scores(
                q_ref, positions_ref, k_ref, lengths_ref[row], first, head_dim**-0.5, window
            )
            p_CR = jnp.where(seen_CR, jnp.exp(s_CR - lse_ref[0, 0, 0]), 0.0)
            p_CR = p_CR * p_CR if power == 2 else p_CR
            mine = lax.broadcasted_iota(jnp.int32, (padded, rows), 0) * block
            at = lax.broadcasted_iota(jnp.int32, (padded, rows), 1)
            one_GR = jnp.where((at >= mine) & (at < mine + block), 1.0, 0.0)
            sums_ref[...] += lax.dot_general(
                one_GR, p_CR, (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32,
            )  # fmt: skip

        @pl.when(step == pl.num_programs(3) - 1)
        def _():
            sums_GC = sums_ref[:group]
            if how is not None:
                reduce = jnp.max if how == "max" else jnp.mean
                sums_GC = reduce(sums_GC, axis=0, keepdims=True)
            out_ref[0, 0] = sums_GC

    in_specs = _specs(q_BKXRE, kv_heads, head_dim, tile, lambda b, k, c, x: (b, k, x, c))
    in_specs.append(pl.BlockSpec((1, 1, 1, 1, rows), lambda b, k, c, x, _: (b, k, x, 0, 0)))
    sums_BKGT = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, kv_heads, tokens // tile, count),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((1, 1, members, tile), lambda b, k, c, x, _: (b, k, 0, c)),
            scratch_shapes=[pltpu.VMEM((padded, tile), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, members, tokens), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="window_columns",
    )(lengths.astype(jnp.int32), q_BKXRE, positions_BX1R, _flat(k), lse_BKX1R)
    return sums_BKGT.reshape(batch, kv_heads * members, tokens)


def _tile(tokens: int) -> int:
    return next(size for size in (KEY_TILE, 384, 256, _LANES) if tokens % size == 0)


def _flat(k: Float[Array, "B T K H"]) -> Float[Array, "B T X"]:
    return k.reshape(*k.shape[:2], -1)
