"""The tail: tokens since the prompt, every head alike.

    slot      0    1    2   3        One cursor for all rows; a hole (-1) is where a shorter row had
    row 0     p10  p11  -1  -1       no token.
    row 1     p6   -1   p7  -1

Rows that come and go (`kvjax.serve`) have a cursor each.

B batch, K KV heads, T slots of the tail, N query heads, W remembered queries, H head dim.
"""

from typing import no_type_check

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slots import Slots
from kvjax.sharding import constrain


@no_type_check  # jax maps trees to other leaves than arrays
class Tail(struct.PyTreeNode):
    """Tokens since the prompt, every head alike; holes at -1.

    Attributes:
      keys, values: one `[B, K, T, H]` a layer.
      positions: `[B, T]` int32, -1 for holes and for slots not written yet.
      cursor: int32, the next slot to be written, of all rows or `[B]` of each. What a row has no
        room for is dropped where it has a cursor of its own.
      queries: one `[B, W, N, H]` a layer, the last W tokens' after RoPE: token number c of the
        tail has row c % W. Empty unless they are to be remembered (`remember`).
      query_positions: `[B, W]` theirs, -1 where there is none yet.
      sums: one `[B, K, T]` a layer, squared attention probabilities that these entries have
        received; empty where nobody asked for them.
      slot_sums: `[X, M]` what the cache's slots have received, from `kvjax.cache.sums.begin` on;
        None where nothing is added.
    """

    keys: tuple[Float[Array, "B K T H"], ...]
    values: tuple[Float[Array, "B K T H"], ...]
    positions: Int[Array, "B T"]
    cursor: Int[Array, ""]
    queries: tuple[Float[Array, "B W N H"], ...] = ()
    query_positions: Int[Array, "B W"] | None = None
    sums: tuple[Float[Array, "B K T"], ...] = ()
    slot_sums: Float[Array, "X M"] | None = None


def empty_tail(entries: tuple[PaddedLayer, ...] | Slots, slots: int) -> Tail:
    """A tail of `slots` empty slots that fits these entries."""
    if isinstance(entries, Slots):
        batch, layers, kv_heads = entries.counts.shape
        head_dim, dtype = entries.entries.shape[-1] // 2, entries.dtype or entries.entries.dtype
    else:
        batch, kv_heads, _, head_dim = entries[0].keys.shape
        layers, dtype = len(entries), entries[0].keys.dtype
    # Arrays of their own: a stream donates its tail.
    keys, values = (
        tuple(jnp.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(layers))
        for _ in range(2)
    )
    return Tail(
        keys=keys,
        values=values,
        positions=jnp.full((batch, slots), -1, jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )


def remember(tail: Tail, queries: int, heads: int) -> Tail:
    """The tail with room for the last `queries` queries of `heads` query heads, none yet."""
    batch, _, _, head_dim = tail.keys[0].shape
    shape, dtype = (batch, queries, heads, head_dim), tail.keys[0].dtype
    return tail.replace(
        queries=tuple(jnp.zeros(shape, dtype) for _ in tail.keys),
        query_positions=jnp.full((batch, queries), -1, jnp.int32),
    )


def forget(tail: Tail) -> Tail:
    """The tail without the queries that it remembers."""
    return tail.replace(queries=(), query_positions=None)


def resized(tail: Tail, slots: int) -> Tail:
    """The tail with `slots` slots, at least as many as it has taken."""
    more = slots - tail.positions.shape[1]

    def resize(array: Array, axis: int, empty: int) -> Array:
        if more <= 0:
            return lax.slice_in_dim(array, 0, slots, axis=axis)
        widths = [(0, more if at == axis else 0) for at in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=empty)

    rows = tail.keys, tail.values, tail.sums
    keys, values, sums = (tuple(resize(x, 2, 0) for x in xs) for xs in rows)
    return tail.replace(
        keys=keys, values=values, positions=resize(tail.positions, 1, -1), sums=sums
    )


def compact(tail: Tail) -> Tail:
    """The tail with each row's tokens side by side from slot 0 on: no more holes between them.

    It has taken as many slots as its longest row has tokens. No queries are remembered.
    """
    filled_BT = tail.positions >= 0
    order_BT = jnp.argsort(~filled_BT, axis=1, stable=True)

    def moved(x_BKTH: Array) -> Array:
        taken = jnp.take_along_axis(x_BKTH, order_BT[:, None, :, None], axis=2)
        return constrain(taken, "BKTH")

    return tail.replace(
        keys=tuple(map(moved, tail.keys)),
        values=tuple(map(moved, tail.values)),
        sums=tuple(jnp.take_along_axis(x, order_BT[:, None], axis=2) for x in tail.sums),
        positions=jnp.take_along_axis(tail.positions, order_BT, axis=1),
        cursor=filled_BT.sum(1, dtype=jnp.int32).max(),
    )


def write_positions(tail: Tail, positions: Int[Array, "B T"]) -> Tail:
    """Claim tail slots for a block of tokens (-1 for padding) and move the cursor past them."""
    if tail.cursor.ndim:
        claimed = tail.positions.at[_own_slots(tail.cursor, positions)].set(positions, mode="drop")
    else:
        claimed = lax.dynamic_update_slice(tail.positions, positions, (0, tail.cursor))
    tail = tail.replace(positions=claimed, cursor=tail.cursor + positions.shape[1])
    if tail.query_positions is None:
        return tail
    remembered = _put_last(tail, tail.query_positions, positions)
    return tail.replace(query_positions=remembered)


def _put_last(tail: Tail, remembered: Array, block: Array) -> Array:
    """A block of what the tail claimed last, in the rows of the tokens that it remembers."""
    count = min(block.shape[1], remembered.shape[1])
    number_C = jnp.arange(count) - count
    if tail.cursor.ndim:
        rows_BC = (tail.cursor[:, None] + number_C) % remembered.shape[1]
        batch_B1 = jnp.arange(rows_BC.shape[0])[:, None]
        return remembered.at[batch_B1, rows_BC].set(block[:, -count:])
    rows = (tail.cursor + number_C) % remembered.shape[1]
    return remembered.at[:, rows].set(block[:, -count:])


def _own_slots(first_B: Array, block: Array) -> tuple[Array, Array]:
    """Rows and slots of a block that begins at each row's own slot."""
    number_C = jnp.arange(block.shape[1], dtype=jnp.int32)
    return jnp.arange(first_B.shape[0])[:, None], first_B[:, None] + number_C


def write_layer(
    tail: Tail,
    layer: int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    queries: Float[Array, "B T N H"] | None = None,
) -> Tail:
    """Write one layer's keys and values into the slots that `write_positions` claimed last.

    Queries go where the tail remembers them.
    """
    first = tail.cursor - keys.shape[1]
    if tail.queries and queries is not None:
        last = _put_last(tail, tail.queries[layer], queries)
        tail = tail.replace(queries=(*tail.queries[:layer], last, *tail.queries[layer + 1 :]))

    def put(arrays: tuple[Array, ...], block: Array) -> tuple[Array, ...]:
        if first.ndim:
            row_B1, slot_BC = _own_slots(first, block)
            new = arrays[layer].at[row_B1, :, slot_BC].set(block, mode="drop")
        else:
            start = (0, 0, first, 0)
            new = lax.dynamic_update_slice(arrays[layer], block.transpose(0, 2, 1, 3), start)
        new = constrain(new, "BKTH")
        return (*arrays[:layer], new, *arrays[layer + 1 :])

    return tail.replace(keys=put(tail.keys, keys), values=put(tail.values, values))
