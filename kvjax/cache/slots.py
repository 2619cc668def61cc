"""The packed layout: slots in pages for all layers; a slot carries its owner and true position.

B rows, X pools of slots (one a row), M slots of a pool, L layers, K KV heads, R pages of a layer,
T prompt tokens, H head dim, E = 2 H (a slot's key and value side by side), Y slots of a layer.

    page               0       |       1       |       2           pages of 4 slots
    slot       0   1   2   3   | 4   5   6   7 | 8   9  10  11
    owner      0   0   0   1   | 1  -1  -1  -1 | 0   1   1  -1     table: layer 0 has pages 0, 1
    position  p0  p3  p9  p0   | p9            | p9  p0  p9               layer 1 has page 2

Of layer 0, head 0 kept three entries and head 1 two. Which head a slot belongs to is data: shapes
are the budget's, whatever an adaptive method decides. To a layer its slots are numbered through, in
the order of its pages; a packed prompt's pages follow one another, so that a layer is a slice and
no table is needed. To grow is to get a table.
"""

from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Int8

from kvjax.kernels.decode_attention import in_order
from kvjax.kernels.platform import platform

# Slots of a page: what a copy of a page moves is worth starting it, and less than one is empty at
# the end of each layer, below 1 % at 1,024 entries of 8 heads. Where a pool is split, each device
# has at least a tile's rows of every page (16 of bf16 on a TPU).
_PAGES = {"cpu": 16, "gpu": 64, "tpu": 64}
_LEAST = {"cpu": 1, "gpu": 1, "tpu": 16}


def page_size(parts: int = 1) -> int:
    """Slots of a page on this platform, a multiple of the `parts` that a pool is split into."""
    slots = max(_PAGES[platform()], parts * _LEAST[platform()])
    return -(-slots // parts) * parts


@no_type_check  # jax maps trees to other leaves than arrays
class Slots(struct.PyTreeNode):
    """Kept entries of all layers.

    Attributes:
      entries: `[X, M, 2H]`; keys after RoPE, then values. int8 where they are quantized: whole
        numbers to be multiplied with `scales`.
      owners: `[X, M]` int8, the KV head that an entry belongs to; -1 in an empty slot, whose entry
        may be anything.
      positions: `[X, M]` int32, the entry's position in the prompt; -1 in an empty slot.
      counts: `[B, L, K]` int32, entries of each layer and head.
      table: `[B, L, R]` int32, the pages of each layer in order; None where they follow one
        another, layer after layer, as far as counts say or where `runs` are.
      sizes: `[B, L]` int32, slots that each layer of a table may use, from its first page on; the
        rest of its last page stays empty. Else None: a layer has as many as it has entries.
      runs: [first, end) slots of each layer, where there is no table and every row has the same: a
        program then cuts slices. Else None.
      room: slots that a row's layers may use together, without what their last pages leave empty.
      most: slots that one layer may use at most, where that is known beforehand.
      alike: whether every layer of every row may use `most` slots.
      page: slots of a page, on all `parts` together.
      scales: `[X, 2, M]` fp32 of quantized entries, keys' and values'; else None.
      sums: `[X, M]` fp32, squared attention probabilities that each entry has received
        (`kvjax.cache.sums`); None where nobody asked for them.
      dtype: of keys and values before they were quantized.
      parts: devices that the slots are dealt out to: slot j, in the order above, is slot j // parts
        of device j % parts, and the arrays are one device's slots after the other's. So every
        device has an equal part of each page.
    """

    entries: Float[Array, "X M E"] | Int8[Array, "X M E"]
    owners: Int8[Array, "X M"]
    positions: Int[Array, "X M"]
    counts: Int[Array, "B L K"]
    table: Int[Array, "B L R"] | None = None
    sizes: Int[Array, "B L"] | None = None
    scales: Float[Array, "X 2 M"] | None = None
    sums: Float[Array, "X M"] | None = None
    runs: tuple[tuple[int, int], ...] | None = struct.field(pytree_node=False, default=None)
    room: int = struct.field(pytree_node=False, default=0)
    most: int | None = struct.field(pytree_node=False, default=None)
    alike: bool = struct.field(pytree_node=False, default=False)
    page: int = struct.field(pytree_node=False, default=1)
    dtype: Any = struct.field(pytree_node=False, default=None)
    parts: int = struct.field(pytree_node=False, default=1)

    @property
    def size(self) -> int:
        """Slots of a pool, on all devices."""
        return self.owners.shape[1]

    @property
    def lengths(self) -> Int[Array, "B L"]:
        """Slots of each layer that may hold an entry, from its first page on."""
        return self.counts.sum(-1, dtype=jnp.int32) if self.sizes is None else self.sizes

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values with their scales, empty slots included."""
        return self.entries.nbytes + (0 if self.scales is None else self.scales.nbytes)


def in_pages(
    slots: int, runs: tuple[tuple[int, int], ...] | None, layers: int, page: int
) -> tuple[int, tuple[tuple[int, int], ...] | None]:
    """Slots of a pool, and each layer's, where every layer begins a page of its own.

    Args:
      slots: that all layers take together without pages.
      runs: [first, end) of each layer where that is known beforehand, or None.
      layers: how many.
      page: slots of a page.
    """
    if runs is None:
        return -(-(slots + layers * (page - 1)) // page) * page, None
    ends, end = [], 0
    for first, last in runs:
        ends.append((end, end + -(-(last - first) // page) * page))
        end = ends[-1][1]
    return end, tuple(ends)


def empty_slots(
    like: Float[Array, "B T K H"],
    layers: int,
    room: int,
    runs: tuple[tuple[int, int], ...] | None,
    *,
    page: int,
    quantize: bool = False,
    sums: bool = False,
    parts: int = 1,
) -> Slots:
    """Slots without entries, for keys of this shape and dtype, which may be quantized to int8.

    Args:
      like: keys of a layer.
      layers: how many.
      room: slots that a row's layers may use together.
      runs: [first, end) of each layer where that is known beforehand, else None.
      page: slots of a page, a multiple of `parts`.
      quantize: whether entries become int8.
      sums: whether they have sums.
      parts: devices, each with equally many slots.
    """
    batch, _, kv_heads, head_dim = like.shape
    sizes = [end - first for first, end in runs or ()]
    slots, runs = in_pages(room, runs, layers, page)
    if kv_heads > jnp.iinfo(jnp.int8).max:
        raise ValueError(f"keys have {kv_heads} heads, expected at most 127 (owners are int8)")
    return Slots(
        entries=jnp.zeros((batch, slots, 2 * head_dim), jnp.int8 if quantize else like.dtype),
        owners=jnp.full((batch, slots), -1, jnp.int8),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        counts=jnp.zeros((batch, layers, kv_heads), jnp.int32),
        scales=jnp.zeros((batch, 2, slots), jnp.float32) if quantize else None,
        sums=jnp.zeros((batch, slots), jnp.float32) if sums else None,
        runs=runs,
        room=room,
        most=max(sizes, default=None),
        alike=len(set(sizes)) == 1,
        page=page,
        dtype=jnp.dtype(like.dtype),
        parts=parts,
    )


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
def first_page(slots: Slots, layer: int) -> Int[Array, " B"]:
    """Where a layer begins whose pages lie behind those of the layers before it."""
    if slots.runs is not None:
        return jnp.full(slots.counts.shape[:1], slots.runs[layer][0] // slots.page, jnp.int32)
    entries_BL = slots.counts[:, :layer].sum(-1, dtype=jnp.int32)
    return (-(-entries_BL // slots.page)).sum(-1, dtype=jnp.int32)


def _first_pages(slots: Slots) -> Int[Array, "B L"]:
    return jnp.stack([first_page(slots, layer) for layer in range(slots.counts.shape[1])], axis=1)


def pages_of(slots: Slots, layer: int) -> Int[Array, "B R"]:
    """A layer's pages in order, or the first one alone where the others follow it."""
    return first_page(slots, layer)[:, None] if slots.table is None else slots.table[:, layer]


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
