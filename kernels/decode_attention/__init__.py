"""Attention of a few new tokens to cached entries, in parts that merge by log-sum-exp.

B batch, T new tokens, X pools, M slots of a pool, R pages of a layer, N query heads, K KV heads,
H head dim, E = 2 H.
"""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from kvjax.kernels.decode_attention import gpu, packed, tpu
from kvjax.kernels.decode_attention.packed import in_order
from kvjax.kernels.decode_attention.padded import Evicted, padded_attention
from kvjax.kernels.decode_attention.reference import decode_attention, merge
from kvjax.kernels.platform import Platform, platform

__all__ = [
    "Evicted",
    "decode_attention",
    "in_order",
    "merge",
    "padded_attention",
    "paged_attention",
]

Implementation = Literal["xla", "pallas", "triton"]

_BY_PLATFORM: dict[Platform, Implementation] = {"tpu": "pallas", "gpu": "triton"}
_MODULES: dict[str, Any] = {"xla": packed, "pallas": tpu, "triton": gpu}


def paged_attention(
    q: Float[Array, "B T N H"],
    query_positions: Int[Array, "B T"],
    entries: Float[Array, "X M E"] | Int8[Array, "X M E"],
    owners: Int8[Array, "X M"],
    positions: Int[Array, "X M"],
    table: Int[Array, "B R"],
    lengths: Int[Array, " B"],
    *,
    page: int,
    kv_heads: int,
    window: int | None = None,
    evicted: tuple[Int[Array, "B K"], Int[Array, "B T K"]] | None = None,
    scales: Float[Array, "X 2 M"] | None = None,
    consecutive: bool = False,
    run: tuple[int, int] | None = None,
    scores: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """Attend new tokens to one layer's slots, which lie in pages of a pool.

    A layer's slots are numbered through in the order of its pages. Every query head counts those
    whose owner is its KV head. Few rows (new tokens x query heads) are multiplied with every slot;
    many are taken head by head, each with its own slots.

    Args:
      q: queries after RoPE; K divides N.
      query_positions: true positions of the new tokens.
      entries: keys (after RoPE) and values side by side, of X = B rows, or of one pool that all
        rows share; what an unowned slot holds is not read into any result, NaN included.
      owners: KV head of each slot, in any order; -1 for none.
      positions: true position of each slot's entry.
      table: pages of the layer, in order.
      lengths: slots of the layer, from its first page on.
      page: slots of a page.
      kv_heads: K.
      window: a query at p sees positions p - window + 1 .. p; None for all up to p.
      evicted: first and, for each query, one past the last slot of each head that it does not see
        any more, as the layer numbers them.
      scales: of int8 entries: what each slot's key and value are multiplied with.
      consecutive: whether the layer's pages follow `table[:, 0]`; every row then has its own pool,
        and no other column is read.
      run: of consecutive pages, static [first, end) slots that hold the layer in every row.
      scores: whether to give every slot's scores too; of one new token, and through a table.
      implementation: "xla", "pallas" (TPU) or "triton" (GPU); by default the platform's own, and
        "xla" where that one cannot take the call.

    Returns:
      The softmax-weighted values of these slots `[B, T, N, H]` and the log-sum-exp of the scaled
      scores `[B, T, N]`, fp32. A query that sees no slot gets zeros and -inf. With `scores` also
      `[B, G, Y]`, Y at least the R pages' slots as the layer numbers them: the scaled scores that
      the G query heads of its owner's group give each slot, at most -1e30 where they do not see it,
      and anything past `lengths`.

    Raises:
      ValueError: shapes that do not fit one another; scores of several tokens, or without a table.
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
    if entries.shape[0] != q.shape[0] and (consecutive or entries.shape[0] != 1):
        raise ValueError(f"entries have {entries.shape[0]} pools, expected q's {q.shape[0]} or 1")
    if scores and (consecutive or q.shape[1] != 1):
        raise ValueError(f"scores=True, expected one token, got {q.shape[1]}, and a table of pages")
    start = jnp.zeros_like(lengths)
    if consecutive:
        start = table[:, 0] * page
        evicted = evicted and (evicted[0] + start[:, None], evicted[1] + start[:, None, None])
    pages = None if consecutive else (table, page)
    module = _module(implementation, q, entries, pages)
    pool = entries, owners, positions, start, start + lengths
    return module.slot_attention(
        q, query_positions, *pool, kv_heads=kv_heads, window=window, evicted=evicted, scales=scales,
        region=run, pages=pages, scores=scores,
    )  # fmt: skip


def _module(implementation: str | None, q: Array, entries: Array, pages) -> Any:
    if implementation is None:
        implementation = _BY_PLATFORM.get(platform(), "xla")
        kernel = _MODULES[implementation]
        if implementation != "xla" and not kernel.supports(q.shape, entries.dtype, pages):
            implementation = "xla"
    if implementation not in _MODULES:
        raise ValueError(f"implementation={implementation!r}, expected xla, pallas or triton")
    return _MODULES[implementation]
