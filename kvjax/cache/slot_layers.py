"""One layer of a pool: where its slots lie, and what they hold, in order.

B rows, L layers, K KV heads, T tokens, M slots of a pool, Y slots of a layer, R pages of a layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.slots import Slots, first_page
from kvjax.kernels.decode_attention import in_order


def of_layer(slots: Slots, array: Array, layer: int) -> Array:
    """What the slots of one layer hold, `[B, Y, ...]` of an array `[X, M, ...]`, in order.

    Args:
      slots: with a table; or on one device (`reshard_slots`), with known runs.
      array: `entries`, `owners`, `positions`, or a half of `scales`.
      layer: which.
    """
    if slots.runs is not None:
        first, end = slots.runs[layer]
        return array[:, first:end]
    assert slots.table is not None  # else a layer's size is data
    table_BR, page = slots.table[:, layer], slots.page // slots.parts
    if slots.parts == 1:
        return in_order(array, (table_BR, page))
    if array.ndim == 2:
        # Not page by page: a part of one is too short for a TPU, whose rows of 128 are filled up.
        number_BY = _numbers(slots, layer)
        rows_B1 = jnp.arange(len(array))[:, None]  # one pool serves all rows, or each its own
        return array[rows_B1, number_BY]
    # Every device finds its part of each page by itself.
    dealt = array.reshape(array.shape[0], slots.parts, -1, *array.shape[2:])
    found = jax.vmap(lambda x: in_order(x, (table_BR, page)), 1, 2)(dealt)
    return found.reshape(table_BR.shape[0], -1, *array.shape[2:])


class LayerSlots(NamedTuple):
    """One layer's slots, numbered through: where they lie in the pool, and what they hold.

    Attributes:
      numbers: of the pool; its size for one that the layer may not use.
      owned: by which head.
      positions: of their entries.
      size: slots that the layer may use.
    """

    numbers: Int[Array, "B Y"]
    owned: Bool[Array, "B K Y"]
    positions: Int[Array, "B Y"]
    size: Int[Array, " B"]


def layer_slots(slots: Slots, layer: int) -> LayerSlots:
    """The slots of one layer, through its table."""
    assert slots.table is not None
    number_BY = _numbers(slots, layer)
    size_B = slots.lengths[:, layer]
    mine_BY = jnp.arange(number_BY.shape[1]) < size_B[:, None]
    owner_BY = of_layer(slots, slots.owners, layer)
    head_K1 = jnp.arange(slots.counts.shape[2], dtype=owner_BY.dtype)[:, None]
    return LayerSlots(
        numbers=jnp.where(mine_BY, number_BY, slots.size),
        owned=mine_BY[:, None] & (owner_BY[:, None] == head_K1),
        positions=of_layer(slots, slots.positions, layer),
        size=size_B,
    )


def _numbers(slots: Slots, layer: int) -> Int[Array, "B Y"]:
    """Where the slots of a layer's pages lie in the arrays of the pool."""
    assert slots.table is not None
    page_BR1 = slots.table[:, layer, :, None]
    number_BY = (page_BR1 * slots.page + jnp.arange(slots.page)).reshape(page_BR1.shape[0], -1)
    return place_in_pool(slots, number_BY)


def place_in_pool(slots: Slots, number: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Where slots lie in the arrays of a pool, of their numbers in the order of its pages."""
    each = slots.size // slots.parts
    return number % slots.parts * each + number // slots.parts


def kept_mask(slots: Slots, layer: int, tokens: int) -> Bool[Array, "B K T"]:
    """Which tokens each head of a layer holds."""
    slots = reshard_slots(slots, 1)
    if slots.table is None and slots.runs is None:  # a layer may be as long as the pool
        start_B = first_page(slots, layer) * slots.page
        number_BY = jnp.arange(slots.size) - start_B[:, None]
        owner_BY, position_BY = slots.owners, slots.positions
    else:
        owner_BY, position_BY = (of_layer(slots, x, layer) for x in (slots.owners, slots.positions))
        number_BY = jnp.arange(owner_BY.shape[1])
    mine_BY = (number_BY >= 0) & (number_BY < slots.lengths[:, layer, None]) & (owner_BY >= 0)
    batch, _, kv_heads = slots.counts.shape
    mask_BKT = jnp.zeros((batch, kv_heads, tokens), bool)
    rows_B1 = jnp.arange(batch)[:, None]
    position_BY = jnp.where(mine_BY, position_BY, tokens)
    owner_BY = jnp.maximum(owner_BY, 0).astype(jnp.int32)
    return mask_BKT.at[rows_B1, owner_BY, position_BY].set(True, mode="drop")


# ---------------------------------------------------------------------------- growing


def compacted(slots: Slots) -> Slots:
    """The slots with each layer's entries in its first ones, and no more slots than these.

    On one device, with a table.
    """
    batch, layers, _ = slots.counts.shape
    rows_B1 = jnp.arange(batch)[:, None]
    arrays = [slots.entries, slots.owners, slots.positions]
    arrays += [] if slots.scales is None else [slots.scales[:, 0], slots.scales[:, 1]]
    arrays += [] if slots.sums is None else [slots.sums]
    for layer in range(layers):
        here = layer_slots(slots, layer)
        order_BY = jnp.argsort(~here.owned.any(1), axis=1, stable=True)
        for index, x in enumerate(arrays):
            held = of_layer(slots, x, layer)
            at = order_BY.reshape(*order_BY.shape, *(1,) * (x.ndim - 2))
            moved = jnp.take_along_axis(held, at, axis=1)
            arrays[index] = x.at[rows_B1, here.numbers].set(moved, mode="drop")
    sums = None if slots.sums is None else arrays.pop()
    entries, owners, positions, *scales = arrays
    stacked = jnp.stack(scales, axis=1) if scales else None
    return slots.replace(
        entries=entries, owners=owners, positions=positions, scales=stacked, sums=sums, sizes=None
    )
