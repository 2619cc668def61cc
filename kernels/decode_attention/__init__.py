"""Attention of a few new tokens to cached entries, in parts that merge by log-sum-exp.

B batch, T new tokens, M slots of a pool, N query heads, K KV heads, H head dim, E = 2 H.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention import gpu, packed, tpu
from kvjax.kernels.decode_attention.padded import Evicted, padded_attention
from kvjax.kernels.decode_attention.parts import over_tokens
from kvjax.kernels.decode_attention.reference import decode_attention, merge, merge_over
from kvjax.kernels.platform import Platform, platform

__all__ = ["Evicted", "decode_attention", "merge", "padded_attention", "pool_attention"]

Implementation = Literal["xla", "pallas", "triton"]

_BY_PLATFORM: dict[Platform, Implementation] = {"tpu": "pallas", "gpu": "triton"}
_MODULES: dict[str, Any] = {"xla": packed, "pallas": tpu, "triton": gpu}
# Rows (new tokens x query heads, of a whole batch) that are ordered by KV head at once: what they
# need on the way, 1 to 2 KB each, takes 250 MB at most.
MOST_ROWS = 2**17


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
    evicted: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None = None,
    scales: Float[Array, "B 2 M"] | None = None,
    region: tuple[int, int] | None = None,
    axis: str | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend new tokens to one layer's slots of a packed pool.

    Every query head counts the slots whose owner is its KV head. Few rows (new tokens x query
    heads) are multiplied with every slot; many are taken head by head, each with its own slots.

    Args:
      q: queries after RoPE; K divides N.
      query_positions: true positions of the new tokens.
      entries: keys (after RoPE) and values side by side; what an unowned slot holds is not read
        into any result, NaN included.
      owners: KV head of each slot, in any order; -1 for none.
      positions: true position of each slot's entry.
      start, end: the layer's slots are start <= m < end, unaligned, by row.
      kv_heads: K.
      window: a query at p sees positions p - window + 1 .. p; None for all up to p.
      evicted: first and, for each query, one past the last slot of each head that is evicted.
      scales: of int8 entries: what each slot's key and value are multiplied with.
      region: static bounds that hold start and end of every row, where there are any.
      axis: inside `jax.shard_map`, the mesh axis over whose devices the slots are split into equal
        runs; start, end and evicted count slots of the whole pool; every device gets the result.
      implementation: "xla", "pallas" (TPU) or "triton" (GPU); by default the platform's own, and
        "xla" where that one cannot take the call.

    Returns:
      The softmax-weighted values of these slots and the log-sum-exp of the scaled scores, fp32.
      A query that sees no slot gets zeros and -inf.
    """
    heads, head_dim = q.shape[2:]
    if heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads}, expected a divisor of q's {heads} heads")
    if entries.shape[-1] != 2 * head_dim:
        raise ValueError(
            f"entries are {entries.shape[-1]} wide, expected {2 * head_dim} (keys beside values)"
        )
    if (scales is not None) != (entries.dtype == jnp.int8):
        raise ValueError(f"entries are {entries.dtype}, expected int8 with scales, or neither")
    if axis is not None:
        if region is not None:
            raise ValueError(f"region={region}, expected None with axis={axis!r}: slots are split")
        start, end, evicted = _on_this_device(axis, owners.shape[1], start, end, evicted)
    module = _module(implementation, q, entries)
    rules: dict[str, Any] = {
        "kv_heads": kv_heads, "window": window, "scales": scales, "region": region
    }  # fmt: skip

    def attend(q, query_positions, last):
        gone = None if evicted is None else (evicted[0], last)
        pool = entries, owners, positions, start, end
        return module.pool_attention(q, query_positions, *pool, evicted=gone, **rules)

    queries = q, query_positions, None if evicted is None else evicted[1]
    part = over_tokens(attend, queries, max(1, MOST_ROWS // (q.shape[0] * heads)))
    return part if axis is None else merge_over(axis, part)


def _module(implementation: str | None, q: Array, entries: Array) -> Any:
    if implementation is None:
        implementation = _BY_PLATFORM.get(platform(), "xla")
        kernel = _MODULES[implementation]
        if implementation != "xla" and not kernel.supports(q.shape, entries.dtype):
            implementation = "xla"
    if implementation not in _MODULES:
        raise ValueError(f"implementation={implementation!r}, expected xla, pallas or triton")
    return _MODULES[implementation]


def _on_this_device(axis, slots, start, end, evicted):
    """Slots of the whole pool as slots of this device's run of them."""
    first = lax.axis_index(axis) * slots
    start, end = (jnp.clip(bound - first, 0, slots) for bound in (start, end))
    return start, end, evicted and (evicted[0] - first, evicted[1] - first)
