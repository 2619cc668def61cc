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

from typing import Any, no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Int8

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


def first_page(slots: Slots, layer: int) -> Int[Array, " B"]:
    """Where a layer begins whose pages lie behind those of the layers before it."""
    if slots.runs is not None:
        return jnp.full(slots.counts.shape[:1], slots.runs[layer][0] // slots.page, jnp.int32)
    entries_BL = slots.counts[:, :layer].sum(-1, dtype=jnp.int32)
    return (-(-entries_BL // slots.page)).sum(-1, dtype=jnp.int32)


def pages_of(slots: Slots, layer: int) -> Int[Array, "B R"]:
    """A layer's pages in order, or the first one alone where the others follow it."""
    return first_page(slots, layer)[:, None] if slots.table is None else slots.table[:, layer]
