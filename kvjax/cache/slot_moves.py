"""Other pages for the slots of a pool: dealt out to devices, with room to grow, of another size.

B rows, L layers, M slots of a pool, R pages of a layer, P pages of a pool.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax.cache.slots import Slots, first_page, in_pages, page_size


def reshard_slots(slots: Slots, parts: int) -> Slots:
    """The same entries dealt out to `parts` devices, of which the page is a multiple.

    One part is all slots in order. From several to several copies the pool twice.
    """
    if parts == slots.parts:
        return slots
    if slots.page % parts:
        page, layers = page_size(parts), slots.counts.shape[1]
        slots = repaged(reshard_slots(slots, 1), page, in_pages(slots.size, None, layers, page)[0])
    if slots.parts > 1 and parts > 1:
        slots = reshard_slots(slots, 1)

    def deal(x: Any, axis: int) -> Any:  # of JAX or of NumPy
        halves = (-1, parts) if parts > 1 else (slots.parts, -1)
        split = x.reshape(*x.shape[:axis], *halves, *x.shape[axis + 1 :])
        return split.swapaxes(axis, axis + 1).reshape(x.shape)

    return slots.replace(
        entries=deal(slots.entries, 1),
        owners=deal(slots.owners, 1),
        positions=deal(slots.positions, 1),
        scales=None if slots.scales is None else deal(slots.scales, 2),
        sums=None if slots.sums is None else deal(slots.sums, 1),
        parts=parts,
    )


# ---------------------------------------------------------------------------- a layer
def _first_pages(slots: Slots) -> Int[Array, "B L"]:
    """Where each layer's slots begin: the number of its first page."""
    return jnp.stack([first_page(slots, layer) for layer in range(slots.counts.shape[1])], axis=1)


def grown(slots: Slots, sizes: Int[Array, "B L"], pages: int, widest: int) -> Slots:
    """The slots with more pages: a layer keeps those it has and gets free ones, up to its size.

    Nothing moves: pages are added at the end, and the table is written anew.

    Args:
      slots: to grow.
      sizes: slots that each layer may use afterwards, at least as many as it holds entries.
      pages: of a pool afterwards, enough for all layers' sizes; never fewer than it has.
      widest: the most slots that any layer may use.
    """
    page, have = slots.page, slots.size // slots.page
    pages = max(pages, have)
    wanted_BL = -(-sizes // page)
    own_BL = jnp.minimum(_has_pages(slots), wanted_BL)
    width = max(-(-widest // page), 1)
    number_R = jnp.arange(width, dtype=jnp.int32)
    if slots.table is None:
        old_BLR = _first_pages(slots)[..., None] + number_R
    else:
        old_BLR = jnp.pad(slots.table, ((0, 0), (0, 0), (0, max(0, width - slots.table.shape[2]))))
        old_BLR = old_BLR[..., :width]
    kept_BLR = number_R < own_BL[..., None]
    rows_B1 = jnp.arange(sizes.shape[0])[:, None]
    used_BP = jnp.zeros((sizes.shape[0], pages), bool)
    taken_BX = jnp.where(kept_BLR, old_BLR, pages).reshape(sizes.shape[0], -1)
    used_BP = used_BP.at[rows_B1, taken_BX].set(True, mode="drop")
    free_BP = jnp.argsort(used_BP, axis=1, stable=True).astype(jnp.int32)
    more_BL = wanted_BL - own_BL
    before_BL = jnp.cumsum(more_BL, axis=1, dtype=jnp.int32) - more_BL
    place_BLR = jnp.clip(before_BL[..., None] + number_R - own_BL[..., None], 0, pages - 1)
    new_BLR = jax.vmap(lambda free, at: free[at])(free_BP, place_BLR)
    table_BLR = jnp.where(kept_BLR, old_BLR, new_BLR)
    table_BLR = jnp.where(number_R < wanted_BL[..., None], table_BLR, 0)

    def longer(x: Array, axis: int, empty: int) -> Array:
        more = (pages - have) * page // slots.parts
        split = x.reshape(*x.shape[:axis], slots.parts, -1, *x.shape[axis + 1 :])
        widths = [(0, more if at == axis + 1 else 0) for at in range(split.ndim)]
        split = jnp.pad(split, widths, constant_values=empty)
        return split.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    return slots.replace(
        entries=longer(slots.entries, 1, 0),
        owners=longer(slots.owners, 1, -1),
        positions=longer(slots.positions, 1, -1),
        scales=None if slots.scales is None else longer(slots.scales, 2, 0),
        sums=None if slots.sums is None else longer(slots.sums, 1, 0),
        table=table_BLR,
        sizes=sizes,
        runs=None,
    )


def _has_pages(slots: Slots) -> Int[Array, "B L"]:
    """How many pages each layer has, of which the first ones hold its entries."""
    if slots.runs is None:
        return -(-slots.lengths // slots.page)
    pages_L = jnp.array([(end - first) // slots.page for first, end in slots.runs], jnp.int32)
    return jnp.broadcast_to(pages_L, slots.lengths.shape)


def repaged(slots: Slots, page: int, size: int) -> Slots:
    """The same slots in other pages, one layer after the other; copies the pool.

    Layers that may use more slots than they hold entries keep a table, the others need none.

    Args:
      slots: on one device.
      page: slots of a page.
      size: of the pool, enough for whole pages of all layers' lengths.
    """
    pages_BL = -(-slots.lengths // page)
    firsts_BL = jnp.cumsum(pages_BL, axis=1, dtype=jnp.int32) - pages_BL
    # Which layer each new slot is of, and which of its slots.
    number_M = jnp.arange(size, dtype=jnp.int32)
    find = jax.vmap(lambda firsts: jnp.searchsorted(firsts * page, number_M, side="right") - 1)
    layer_BM = find(firsts_BL)
    offset_BM = number_M - jnp.take_along_axis(firsts_BL, layer_BM, axis=1) * page
    filled_BM = offset_BM < jnp.take_along_axis(slots.lengths, layer_BM, axis=1)
    if slots.table is None:
        first_BM = jnp.take_along_axis(_first_pages(slots), layer_BM, axis=1)
        page_BM = first_BM + offset_BM // slots.page
    else:
        width = slots.table.shape[2]
        place_BM = layer_BM * width + jnp.minimum(offset_BM // slots.page, width - 1)
        page_BM = jnp.take_along_axis(slots.table.reshape(len(slots.table), -1), place_BM, axis=1)
    source_BM = jnp.where(filled_BM, page_BM * slots.page + offset_BM % slots.page, 0)

    def move(x: Array, empty: int) -> Array:
        at = source_BM.reshape(*source_BM.shape, *(1,) * (x.ndim - 2))
        filled = filled_BM.reshape(at.shape)
        return jnp.where(filled, jnp.take_along_axis(x, at, axis=1), jnp.asarray(empty, x.dtype))

    scales, table = slots.scales, None
    if scales is not None:
        scales = move(scales.swapaxes(1, 2), 0).swapaxes(1, 2)
    if slots.table is not None and slots.sizes is not None:
        width = -(-slots.table.shape[2] * slots.page // page)
        table = jnp.minimum(firsts_BL[..., None] + jnp.arange(width), size // page - 1)
    return slots.replace(
        entries=move(slots.entries, 0),
        owners=move(slots.owners, -1),
        positions=move(slots.positions, -1),
        scales=scales,
        sums=None if slots.sums is None else move(slots.sums, 0),
        table=table,
        runs=None,
        page=page,
    )
