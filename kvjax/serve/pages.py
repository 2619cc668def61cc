"""Pages for many rows: one pool, rows that come and go, prompts that several rows share.

    pool       page 0 | page 1 | page 2 | page 3        Row 0 reads page 1 and then 3 in some layer,
    held by         1        2        0        1        row 1 reads 1 and then 0: page 1 is shared,
    row 0               1st               2nd           page 2 is free. A page belongs to a layer;
    row 1      2nd      1st                             any head owns any slot of it.

Pure functions from pages to pages. A page that nobody holds is free: there is no list of free ones
that could disagree. Nothing is ever written to a page that is held more than once.

R rows, L layers, K KV heads, W pages of a layer at most, P pages, S slots of a page, H head dim,
U slots of the tail, M slots of a pool.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from kvjax.cache.packing import quantized
from kvjax.cache.slot_layers import place_in_pool
from kvjax.cache.slots import Slots, first_page
from kvjax.cache.tail import Tail


@no_type_check  # jax maps trees to other leaves than arrays
class Pages(struct.PyTreeNode):
    """The pool, who holds which pages, and how far they are filled.

    Attributes:
      slots: one pool for all rows, with every row's counts.
      table: `[R, L, W]` each row's pages in order.
      sizes: `[R, L]` slots that a row may come to use, from its first page on.
      used: `[R, L]` slots of a row that may hold an entry by now, from its first page on.
      holders: `[P]` int32, how many rows and contexts hold each page; 0 where it is free.
    """

    slots: Slots
    table: Int[Array, "R L W"]
    sizes: Int[Array, "R L"]
    used: Int[Array, "R L"]
    holders: Int[Array, " P"]

    @property
    def filled(self) -> Slots:
        """The slots as attention reads them: up to those in use."""
        return self.slots.replace(table=self.table, sizes=self.used)

    @property
    def reserved(self) -> Slots:
        """The slots as compression sees them: all that may come to be used."""
        return self.slots.replace(table=self.table, sizes=self.sizes)


@no_type_check  # jax maps trees to other leaves than arrays
class Lease(struct.PyTreeNode):
    """Pages of one row or context.

    Attributes:
      table: `[L, W]` in order; P where there is none.
      counts: `[L, K]` entries.
      sizes, used: `[L]` slots that may come to be used, and those in use.
    """

    table: Int[Array, "L W"]
    counts: Int[Array, "L K"]
    sizes: Int[Array, " L"]
    used: Int[Array, " L"]


class Shape(NamedTuple):
    """Sizes of the pool; `width` is how many pages a layer of a row has at most."""

    rows: int
    layers: int
    kv_heads: int
    width: int
    pages: int
    page: int


def empty_pages(
    shape: Shape, head_dim: int, dtype: Any, *, quantize: bool = False, parts: int = 1
) -> Pages:
    """Pages that nobody holds, for keys and values of this head dim and dtype.

    Args:
      shape: of the pool.
      head_dim: of keys and of values.
      dtype: theirs, before they are quantized.
      quantize: whether entries become int8.
      parts: devices that every page is dealt out to.
    """
    size = shape.pages * shape.page
    slots = Slots(
        entries=jnp.zeros((1, size, 2 * head_dim), jnp.int8 if quantize else dtype),
        owners=jnp.full((1, size), -1, jnp.int8),
        positions=jnp.full((1, size), -1, jnp.int32),
        counts=jnp.zeros((shape.rows, shape.layers, shape.kv_heads), jnp.int32),
        scales=jnp.zeros((1, 2, size), jnp.float32) if quantize else None,
        room=size,
        page=shape.page,
        dtype=jnp.dtype(dtype),
        parts=parts,
    )
    return Pages(
        slots=slots,
        table=jnp.zeros((shape.rows, shape.layers, shape.width), jnp.int32),
        sizes=jnp.zeros((shape.rows, shape.layers), jnp.int32),
        used=jnp.zeros((shape.rows, shape.layers), jnp.int32),
        holders=jnp.zeros((shape.pages,), jnp.int32),
    )


def lease_of(pages: Pages, row: Int[Array, ""] | int) -> Lease:
    """What a row holds."""
    mine_LW = _mine(pages, pages.sizes[row])
    return Lease(
        table=jnp.where(mine_LW, pages.table[row], pages.holders.shape[0]),
        counts=pages.slots.counts[row],
        sizes=pages.sizes[row],
        used=pages.used[row],
    )


def _mine(pages: Pages, sizes: Int[Array, "*shape"]) -> Bool[Array, "*shape W"]:
    """Which columns of a table these sizes fill."""
    return jnp.arange(pages.table.shape[-1]) < (-(-sizes // pages.slots.page))[..., None]


def view(pages: Pages, lease: Lease) -> Pages:
    """The same pool with one row alone, which has this lease."""
    slots, total = pages.slots, pages.holders.shape[0]
    table_1LW = jnp.where(lease.table < total, lease.table, 0)[None]
    slots = slots.replace(counts=lease.counts[None])
    sizes_1L, used_1L = lease.sizes[None], lease.used[None]
    return pages.replace(slots=slots, table=table_1LW, sizes=sizes_1L, used=used_1L)


def with_pool(pages: Pages, pool: Slots) -> Pages:
    """The pages with what another view of their pool has stored."""
    stored = {name: getattr(pool, name) for name in _STORED}
    return pages.replace(slots=pages.slots.replace(**stored))


# ---------------------------------------------------------------------------- take and give back
def take(
    pages: Pages, sizes: Int[Array, " L"], hold: Int[Array, ""] | int = 0
) -> tuple[Pages, Lease]:
    """Free pages for layers of these sizes, lowest first; their slots are empty.

    There are enough: who calls this has counted.

    Args:
      pages: to take from.
      sizes: slots of each layer.
      hold: pages of all layers together; where that is more than sizes need, layers get more.
    """
    slots, total = pages.slots, pages.holders.shape[0]
    need_L = -(-sizes // slots.page)
    room_L = pages.table.shape[2] - need_L
    before_L = jnp.cumsum(room_L) - room_L
    more_L = jnp.clip(hold - need_L.sum() - before_L, 0, room_L)
    sizes = jnp.where(more_L > 0, (need_L + more_L) * slots.page, sizes)
    mine_LW = _mine(pages, sizes)
    number_LW = (jnp.cumsum(mine_LW.reshape(-1)) - 1).reshape(mine_LW.shape)
    free_P = jnp.argsort(pages.holders > 0, stable=True).astype(jnp.int32)
    table_LW = jnp.where(mine_LW, free_P[jnp.clip(number_LW, 0, total - 1)], total)
    holders = pages.holders.at[table_LW].add(1, mode="drop")
    owners = _by_page(slots.owners, slots, 1).at[0, :, table_LW].set(-1, mode="drop")
    slots = slots.replace(owners=owners.reshape(slots.owners.shape))
    nothing = jnp.zeros_like(sizes)
    lease = Lease(table=table_LW, counts=jnp.zeros_like(slots.counts[0]), sizes=sizes, used=nothing)
    return pages.replace(slots=slots, holders=holders), lease


def give_back(pages: Pages, lease: Lease) -> Pages:
    """One holder fewer of a lease's pages; those that nobody holds any more are free."""
    return pages.replace(holders=pages.holders.at[lease.table].add(-1, mode="drop"))


def put_row(pages: Pages, row: Int[Array, ""] | int, lease: Lease) -> Pages:
    """The pages with a lease in a row's place, which held nothing."""
    slots, total = pages.slots, pages.holders.shape[0]
    table_LW = jnp.where(lease.table < total, lease.table, 0)
    return pages.replace(
        slots=slots.replace(counts=slots.counts.at[row].set(lease.counts)),
        table=pages.table.at[row].set(table_LW),
        sizes=pages.sizes.at[row].set(lease.sizes),
        used=pages.used.at[row].set(lease.used),
    )


def release(pages: Pages, rows: Bool[Array, " R"]) -> Pages:
    """Give back all that these rows hold."""
    slots = pages.slots
    mine_RLW = _mine(pages, pages.sizes) & rows[:, None, None]
    gone_RLW = jnp.where(mine_RLW, pages.table, pages.holders.shape[0])
    stays_R1 = (~rows).astype(jnp.int32)[:, None]
    return pages.replace(
        slots=slots.replace(counts=slots.counts * stays_R1[..., None]),
        sizes=pages.sizes * stays_R1,
        used=pages.used * stays_R1,
        holders=pages.holders.at[gone_RLW].add(-1, mode="drop"),
    )


# ---------------------------------------------------------------------------- write
def with_table(prompt: Slots) -> Slots:
    """The slots of one row with a table of their pages, and with nothing static but their size.

    So prompts of all methods that take as many slots are admitted by one program.
    """
    table, pages = prompt.table, prompt.size // prompt.page
    if table is None:
        firsts = [first_page(prompt, layer)[0] for layer in range(prompt.counts.shape[1])]
        number_W = jnp.arange(pages, dtype=jnp.int32)
        table = jnp.minimum(jnp.stack(firsts)[:, None] + number_W, pages - 1)[None]
    table = jnp.pad(table, ((0, 0), (0, 0), (0, pages - table.shape[2])))
    plain: dict[str, Any] = {"sizes": None, "runs": None, "room": 0, "most": None, "alike": False}
    return prompt.replace(table=table, **plain)


def copy_in(
    pages: Pages, lease: Lease, prompt: Slots, used: Int[Array, " L"] | None = None
) -> tuple[Pages, Lease]:
    """Copy a prompt's entries into the pages of a lease, page by page.

    Args:
      pages: with the lease's pages, which are empty.
      lease: with room for each layer's entries.
      prompt: of one row, from `with_table`; its pages are as large.
      used: first slots of each layer that have all its entries; as many as there are by default.
    """
    slots, total = pages.slots, pages.holders.shape[0]
    held_L = prompt.counts[0].sum(-1, dtype=jnp.int32) if used is None else used
    assert prompt.table is not None  # `with_table`
    width = lease.table.shape[1]
    number_W = jnp.arange(width, dtype=jnp.int32)
    more = max(0, width - prompt.table.shape[2])
    source_LW = jnp.pad(prompt.table[0], ((0, 0), (0, more)))[:, :width]
    filled_LW = number_W < (-(-held_L // slots.page))[:, None]
    theirs = prompt.size // slots.page
    # Each page of the prompt goes to one place or to none.
    to_X = jnp.full((theirs,), total, jnp.int32)
    to_X = to_X.at[jnp.where(filled_LW, source_LW, theirs)].set(lease.table, mode="drop")

    def copied(axis: int, pool: Array, new: Array) -> Array:
        index = (*[slice(None)] * (axis + 1), to_X)
        moved = _by_page(pool, slots, axis).at[index].set(_by_page(new, slots, axis), mode="drop")
        return moved.reshape(pool.shape)

    slots = slots.replace(**_stored(copied, slots, prompt))
    return pages.replace(slots=slots), lease.replace(counts=prompt.counts[0], used=held_L)


def copy_out(pages: Pages, lease: Lease, size: int) -> Slots:
    """A lease's entries as the slots of one row, of `size` pages, as `copy_in` takes them."""
    slots, total = pages.slots, pages.holders.shape[0]
    filled_LW = jnp.arange(lease.table.shape[1]) < (-(-lease.used // slots.page))[:, None]
    order_X = jnp.argsort(~filled_LW.reshape(-1), stable=True)[:size]
    from_X = jnp.minimum(lease.table.reshape(-1)[order_X], total - 1)

    def taken(axis: int, pool: Array) -> Array:
        found = jnp.take(_by_page(pool, slots, axis), from_X, axis=axis + 1)
        return found.reshape(*pool.shape[:axis], -1, *pool.shape[axis + 1 :])

    number_LW = (jnp.cumsum(filled_LW.reshape(-1)) - 1).reshape(filled_LW.shape)
    return slots.replace(
        **_stored(taken, slots),
        counts=lease.counts[None],
        table=jnp.where(filled_LW, number_LW, 0).astype(jnp.int32)[None],
        sizes=None,
        room=0,
    )


def fork(pages: Pages, shared: Lease, more: Int[Array, ""]) -> tuple[Pages, Lease]:
    """A lease that reads another's entries, with room for `more` slots a layer behind them.

    Full pages are held by both; a page that is filled in part is copied, as it will be written to.
    """
    slots, total = pages.slots, pages.holders.shape[0]
    full_L = shared.used // slots.page
    sizes_L = shared.used + more
    own_L = sizes_L - full_L * slots.page
    pages, own = take(pages, own_L)
    number_W = jnp.arange(shared.table.shape[1], dtype=jnp.int32)
    both_LW = number_W < full_L[:, None]
    holders = pages.holders.at[jnp.where(both_LW, shared.table, total)].add(1, mode="drop")
    behind_LW = jnp.maximum(number_W - full_L[:, None], 0)
    table_LW = jnp.where(both_LW, shared.table, jnp.take_along_axis(own.table, behind_LW, axis=1))
    # The page that is filled in part, of each layer; P where none is.
    last_L1 = jnp.minimum(full_L, shared.table.shape[1] - 1)[:, None]
    partly_L = (shared.used % slots.page) > 0
    from_L = jnp.take_along_axis(shared.table, last_L1, axis=1)[:, 0]
    to_L = jnp.where(partly_L, jnp.take_along_axis(table_LW, last_L1, axis=1)[:, 0], total)

    def copied(axis: int, pool: Array) -> Array:
        paged = _by_page(pool, slots, axis)
        moved = jnp.take(paged, jnp.minimum(from_L, total - 1), axis=axis + 1)
        # Read before anything is written: as one operation they would need a copy of the pool.
        paged, moved = lax.optimization_barrier((paged, moved))
        index = (*[slice(None)] * (axis + 1), to_L)
        return paged.at[index].set(moved, mode="drop").reshape(pool.shape)

    slots = pages.slots.replace(**_stored(copied, pages.slots))
    lease = shared.replace(table=table_LW, sizes=sizes_L)
    return pages.replace(slots=slots, holders=holders), lease


def flush(pages: Pages, tail: Tail, rows: Bool[Array, " R"]) -> Pages:
    """Write what the tails of these rows hold behind the entries in their pages.

    Every head's entries of a layer, head after head; a row has room for them.

    Args:
      pages: with the rows' pages, which nobody else holds from `used` on.
      tail: of all rows; a row's tokens may have holes between them.
      rows: whose tails are written.
    """
    slots = pages.slots
    kv_heads, width = slots.counts.shape[2], pages.table.shape[2]
    filled_RU = (tail.positions >= 0) & rows[:, None]
    count_R = filled_RU.sum(1, dtype=jnp.int32)
    rank_RU = jnp.cumsum(filled_RU, axis=1, dtype=jnp.int32) - 1
    head_K1 = jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    place_RKU = head_K1 * count_R[:, None, None] + rank_RU[:, None]
    owner_RKU = jnp.broadcast_to(head_K1, place_RKU.shape)
    position_RKU = jnp.broadcast_to(tail.positions[:, None], place_RKU.shape)
    scales = None if slots.scales is None else [slots.scales[:, 0], slots.scales[:, 1]]
    entries, owners, positions = slots.entries, slots.owners, slots.positions
    sums = slots.sums
    for layer in range(slots.counts.shape[1]):
        number_RKU = pages.used[:, layer, None, None] + place_RKU
        column_RX = jnp.minimum(number_RKU // slots.page, width - 1).reshape(len(number_RKU), -1)
        page_RX = jnp.take_along_axis(pages.table[:, layer], column_RX, axis=1)
        slot_RKU = page_RX.reshape(number_RKU.shape) * slots.page + number_RKU % slots.page
        # What is no token goes out of bounds, where it is dropped.
        slot_RKU = jnp.where(filled_RU[:, None], place_in_pool(slots, slot_RKU), slots.size)
        halves = [tail.keys[layer], tail.values[layer]]
        # One layer after the other: on a mesh each device gets all heads' tokens of a layer.
        entries, halves = lax.optimization_barrier((entries, halves))
        if scales is not None:
            halves, found = map(list, zip(*map(quantized, halves), strict=True))
            scales = [
                one.at[0, slot_RKU].set(new, mode="drop")
                for one, new in zip(scales, found, strict=True)
            ]
        both_RKUE = jnp.concatenate(halves, axis=-1).astype(entries.dtype)
        entries = entries.at[0, slot_RKU].set(both_RKUE, mode="drop")
        owners = owners.at[0, slot_RKU].set(owner_RKU.astype(jnp.int8), mode="drop")
        positions = positions.at[0, slot_RKU].set(position_RKU, mode="drop")
        if sums is not None:
            sums = sums.at[0, slot_RKU].set(tail.sums[layer], mode="drop")
    slots = slots.replace(
        entries=entries,
        owners=owners,
        positions=positions,
        scales=None if scales is None else jnp.stack(scales, axis=1),
        sums=sums,
        counts=slots.counts + count_R[:, None, None],
    )
    return pages.replace(slots=slots, used=pages.used + kv_heads * count_R[:, None])


# What a pool has of every slot, and the axis of its slots.
_STORED = {"entries": 1, "owners": 1, "positions": 1, "scales": 2, "sums": 1}


def _stored(change: Callable[..., Array], slots: Slots, *others: Slots) -> dict[str, Array]:
    """`change(axis, array, its like in the others)` of all that a pool has of every slot."""
    return {
        name: change(axis, *(getattr(pool, name) for pool in (slots, *others)))
        for name, axis in _STORED.items()
        if getattr(slots, name) is not None
    }


def _by_page(array: Array, slots: Slots, axis: int) -> Array:
    """An array of a pool whose axis of slots is split into devices, pages, and slots of a page."""
    paged = (slots.parts, -1, slots.page // slots.parts)
    return array.reshape(*array.shape[:axis], *paged, *array.shape[axis + 1 :])
