"""The scores on a GPU: Triton kernels, called through jax-triton.

B batch, W queries, T keys, P splits, N query heads, K KV heads, H head dim.
"""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kvjax.kernels.platform import triton_options

# Keys that a program reads at once, queries of a block, and programs that the chip should have.
TILE = 64
ROWS = 64
PROGRAMS = 264
_GROUPS = {None: 0, "mean": 1, "max": 2}  # as the kernel numbers them


def supports(q_shape: tuple[int, ...], kv_heads: int, tokens: int) -> bool:
    """Whether the kernels take these queries, and jax-triton is installed."""
    del kv_heads, tokens  # any will do
    return 16 <= q_shape[-1] <= 256 and find_spec("jax_triton") is not None


def window_scores(
    q: Float[Array, "B W N H"],
    query_positions: Int[Array, "B W"],
    k: Float[Array, "B T K H"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: int = 1,
    group: str | None = None,
) -> Float[Array, "B X T"]:
    """See `kvjax.kernels.window_scores`."""
    import jax_triton

    from kvjax.kernels.window_scores.triton_kernel import log_sums_kernel

    batch, queries, heads, _ = q.shape
    tokens, kv_heads = k.shape[1:3]
    rows = max(16, pl.next_power_of_2(queries * heads // kv_heads))
    splits = max(1, min(64, -(-PROGRAMS // (batch * kv_heads)), -(-tokens // TILE)))
    q = q.astype(k.dtype)
    positions = query_positions.astype(jnp.int32)
    lse_BNPW = jax_triton.triton_call(
        q,
        positions,
        k,
        lengths.astype(jnp.int32),
        kernel=log_sums_kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, splits, queries), jnp.float32),
        grid=(batch * kv_heads, splits),
        name="window_log_sums",
        **_sizes(q, k, window),
        ROWS=rows,
        SPLITS=splits,
        **triton_options(),
    )
    lse_BNW = jax.nn.logsumexp(lse_BNPW, axis=2)
    # A query that sees nothing: its scores are masked.
    lse_BNW = jnp.where(lse_BNW == -jnp.inf, 0.0, lse_BNW)
    return _columns(q, positions, k, lengths, lse_BNW, window, power, group, False)


def accumulated_scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    lse: Float[Array, "B N T"],
    lengths: Int[Array, " B"],
    *,
    window: int | None = None,
    power: int = 1,
    group: str | None = None,
) -> Float[Array, "B X T"]:
    """See `kvjax.kernels.window_scores`: every token is a query."""
    batch, tokens = q.shape[:2]
    positions_BT = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    positions_BT = jnp.where(positions_BT < lengths[:, None], positions_BT, -1)
    lse = jnp.where(lse == -jnp.inf, 0.0, lse)
    q = q.astype(k.dtype)
    return _columns(q, positions_BT, k, lengths, lse, window, power, group, True)


def _columns(q, positions, k, lengths, lse_BNW, window, power, group, causal):
    import jax_triton

    from kvjax.kernels.window_scores.triton_kernel import columns_kernel

    batch, queries, heads, _ = q.shape
    tokens, kv_heads = k.shape[1:3]
    rows = heads if group is None else kv_heads
    return jax_triton.triton_call(
        q,
        positions,
        k,
        lengths.astype(jnp.int32),
        lse_BNW,
        kernel=columns_kernel,
        out_type=jax.ShapeDtypeStruct((batch, rows, tokens), jnp.float32),
        grid=(batch * kv_heads, -(-tokens // TILE)),
        name="window_columns",
        **_sizes(q, k, window),
        ROWS=min(ROWS, max(16, pl.next_power_of_2(queries))),
        POWER=power,
        GROUP=_GROUPS[group],
        CAUSAL=causal,
        **triton_options(),
    )


def _sizes(q: Array, k: Array, window: int | None) -> dict[str, Any]:
    _, queries, heads, head_dim = q.shape
    return {
        "W": queries,
        "N": heads,
        "K": k.shape[2],
        "T": k.shape[1],
        "H": head_dim,
        "SCALE": head_dim**-0.5,
        "WIDTH": pl.next_power_of_2(head_dim),
        "TILE": TILE,
        "WINDOW": window or 0,
    }
