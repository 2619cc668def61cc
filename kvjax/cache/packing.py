"""Packing: a layer's kept entries on their way into slots.

B batch, T prompt tokens, K KV heads, H head dim, E = 2 H, M slots, Y slots of a layer, P devices,
R slots of a layer as every device sees them, C slots written at once on a device.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8

from kvjax import sharding
from kvjax.cache.slots import Slots, first_page
from kvjax.sharding import GROUP, HEADS, REST


def quantized(
    x: Float[Array, "*B Y H"],
) -> tuple[Int8[Array, "*B Y H"], Float[Array, "*B Y"]]:
    """Whole numbers from -127 to 127 and what they are to be multiplied with, one a vector.

    An entry is off by at most half its scale, that is max |x| / 254.
    """
    scale_BY = jnp.abs(x).max(-1).astype(jnp.float32) / 127
    whole = jnp.round(x.astype(jnp.float32) / jnp.where(scale_BY > 0, scale_BY, 1.0)[..., None])
    return whole.astype(jnp.int8), scale_BY


def stored(slots: Slots, layer: int, keep: Bool[Array, "B K T"], room: int) -> Int[Array, "B K"]:
    """How many of the entries that a layer's heads keep have a slot there."""
    if slots.runs is not None:
        first, end = slots.runs[layer]
        space_B = jnp.asarray(end - first, jnp.int32)
    else:
        space_B = slots.size - first_page(slots, layer) * slots.page
    ends_BK = jnp.cumsum(keep.sum(-1, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    ends_BK = jnp.minimum(ends_BK, jnp.minimum(room, space_B)[..., None])
    return jnp.diff(ends_BK, axis=-1, prepend=0)


def put_layer(
    slots: Slots,
    layer: int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    keep: Bool[Array, "B K T"],
    room: int,
    sums: Float[Array, "B K T"] | None = None,
) -> Slots:
    """Write one layer's kept entries into the pages behind those of the layers before it.

    `room` is at least the most entries that the layer's heads keep together. Were it less, the last
    heads' last ones would be lost, and `counts` would say so: it counts what is stored. `sums` go
    beside the entries where the slots have any.

    Where slots are split over a mesh, a device gathers what its own heads keep; nothing but that,
    and counts, goes to the others.
    """
    if slots.parts > 1:
        return _put_on_devices(slots, layer, keys, values, keep, room, sums)
    counts_BK = stored(slots, layer, keep, room)
    place_Y = jnp.arange(room, dtype=jnp.int32)
    filled_BY = place_Y < counts_BK.sum(-1, keepdims=True, dtype=jnp.int32)
    place_BY = jnp.broadcast_to(place_Y, filled_BY.shape)
    owner_BY, position_BY, halves = _gathered(keys, values, keep, place_BY)
    new = [
        jnp.where(filled_BY, owner_BY, -1).astype(jnp.int8),
        jnp.where(filled_BY, position_BY, -1),
    ]
    old = [slots.owners, slots.positions]
    if slots.scales is not None:
        whole, scales = zip(*map(quantized, halves), strict=True)
        halves = list(whole)
        new += [jnp.where(filled_BY, scale, 0.0) for scale in scales]
        old += [slots.scales[:, 0], slots.scales[:, 1]]
    if slots.sums is not None:
        new.append(jnp.where(filled_BY, _sums_of(sums, owner_BY, position_BY), 0.0))
        old.append(slots.sums)
    new.append(jnp.where(filled_BY[..., None], jnp.concatenate(halves, axis=-1), 0))
    old.append(slots.entries)
    owners, positions, *more, entries = _written(slots, layer, old, new, filled_BY)
    written = None if slots.sums is None else more.pop()
    return slots.replace(
        entries=entries,
        owners=owners,
        positions=positions,
        scales=jnp.stack(more, axis=1) if more else None,
        sums=written,
        counts=slots.counts.at[:, layer].set(counts_BK),
    )


def _gathered(keys, values, keep, place: Int[Array, "B Y"]):
    """Head, position, and halves of the entries that are kept: those at these places among them.

    Entries are counted head after head, each in the order of positions.
    """
    batch, tokens, heads, head_dim = keys.shape
    running_BX = jnp.cumsum(keep.reshape(batch, -1), axis=-1, dtype=jnp.int32)
    found_BY = jax.vmap(jnp.searchsorted)(running_BX, place + 1).astype(jnp.int32)
    found_BY = jnp.minimum(found_BY, heads * tokens - 1)
    head_BY, position_BY = found_BY // tokens, found_BY % tokens
    # Rows are taken from [B, T * K, H] as it lies: no transposed copy of the prompt.
    row_BY1 = (position_BY * heads + head_BY)[..., None]
    halves = [
        jnp.take_along_axis(x.reshape(batch, -1, head_dim), row_BY1, axis=1) for x in (keys, values)
    ]
    return head_BY, position_BY, halves


def _sums_of(sums, head_BY, position_BY) -> Float[Array, "B Y"]:
    """The sums of some heads' entries at some positions."""
    batch, _, tokens = sums.shape
    return jnp.take_along_axis(sums.reshape(batch, -1), head_BY * tokens + position_BY, axis=1)


def _written(slots: Slots, layer: int, old: list[Array], new: list[Array], filled_BY: Array):
    """Arrays of slots with a layer's rows in their place."""
    if slots.runs is not None:
        first, end = slots.runs[layer]
        return [
            lax.dynamic_update_slice_in_dim(a, b[:, : end - first], first, axis=1)
            for a, b in zip(old, new, strict=True)
        ]
    start_B = first_page(slots, layer) * slots.page
    # What is not filled goes out of bounds, where it is dropped.
    slot_BY = start_B[:, None] + jnp.arange(filled_BY.shape[1], dtype=jnp.int32)
    slot_BY = jnp.where(filled_BY, slot_BY, slots.size)
    rows_B1 = jnp.arange(filled_BY.shape[0])[:, None]
    return [
        a.at[rows_B1, slot_BY].set(b, mode="drop", unique_indices=False)
        for a, b in zip(old, new, strict=True)
    ]


# ---------------------------------------------------------------------------- over a mesh
def _put_on_devices(slots: Slots, layer: int, keys, values, keep, room: int, sums) -> Slots:
    keep = sharding.constrain(keep, "BKT")
    counts_BK = sharding.constrain(stored(slots, layer, keep, room), "B.")
    start_B = first_page(slots, layer) * slots.page
    body = partial(_put_here, room=room, parts=slots.parts, summed=slots.sums is not None)
    arrays = [slots.entries, slots.owners, slots.positions]
    arrays += [x for x in (slots.scales, slots.sums) if x is not None]
    letters = "BME,BM,BM" + ",B2M" * (slots.scales is not None)
    letters += ",BM" * (slots.sums is not None)
    rest, axes = [keys, values, keep, counts_BK, start_B], "BTKH,BTKH,BKT,B.,B"
    if slots.sums is not None:
        rest, axes = [*rest, sharding.constrain(sums, "BKT")], f"{axes},BKT"
    found = sharding.by_device(body, f"{axes},{letters}->{letters}", *rest, *arrays)
    entries, owners, positions, *more = found
    written = None if slots.sums is None else more.pop()
    return slots.replace(
        entries=entries,
        owners=owners,
        positions=positions,
        scales=more[0] if more else None,
        sums=written,
        counts=slots.counts.at[:, layer].set(counts_BK),
    )


def _put_here(keys, values, keep, counts_BK, start_B, *slots, room: int, parts: int, summed: bool):
    """One device's part: its heads' kept entries out, its slots of all heads' in."""
    sums, slots = (slots[0], slots[1:]) if summed else (None, slots)
    tokens, heads = keys.shape[1:3]
    first_head = lax.axis_index(HEADS) * heads
    ends_BK = jnp.cumsum(counts_BK, axis=1, dtype=jnp.int32)
    own_B1 = lax.dynamic_slice_in_dim(ends_BK - counts_BK, first_head, 1, axis=1)
    mine_B1 = lax.dynamic_slice_in_dim(counts_BK, first_head, heads, axis=1).sum(1, keepdims=True)
    # Rows of slots, one slot a device: a page begins with a whole row.
    rows = -(-room // parts)
    place_BR = jnp.arange(rows * parts, dtype=jnp.int32) - own_B1
    valid_BR = (place_BR >= 0) & (place_BR < mine_B1)
    head_BR, position_BR, halves = _gathered(keys, values, keep, place_BR)
    entries_BRE = jnp.where(valid_BR[..., None], jnp.concatenate(halves, axis=-1), 0)
    entries_BCE = _to_slots(entries_BRE, rows)
    code_BR = (first_head + head_BR) * tokens + position_BR + 1
    code_BC = _to_slots(jnp.where(valid_BR, code_BR, 0), rows) - 1
    sums_BC = None
    if summed:
        sums_BC = _to_slots(jnp.where(valid_BR, _sums_of(sums, head_BR, position_BR), 0.0), rows)
    return _written_here(slots, entries_BCE, code_BC, start_B // parts, tokens, sums_BC)


def _to_slots(x: Array, rows: int) -> Array:
    """Sum over the KV heads' devices of `[B, rows x P, ...]`, this device's slot of each row."""
    sizes = [lax.axis_size(axis) for axis in (HEADS, GROUP, REST)]
    x = x.reshape(x.shape[0], rows, sizes[0], sizes[1] * sizes[2], *x.shape[2:])
    x = lax.psum_scatter(x, HEADS, scatter_dimension=2)
    return lax.dynamic_index_in_dim(x, lax.axis_index((GROUP, REST)), axis=2, keepdims=False)


def _written_here(slots, entries_BCE, code_BC, first_B, tokens: int, sums_BC):
    """This device's slots with a layer's entries from slot `first_B` on; code -1 is no entry."""
    sums, slots = ((), slots) if sums_BC is None else (slots[-1:], slots[:-1])
    filled_BC = code_BC >= 0
    new = [
        jnp.where(filled_BC, code_BC // tokens, -1).astype(jnp.int8),
        jnp.where(filled_BC, code_BC % tokens, -1),
    ]
    if len(slots) > 3:
        halves = jnp.split(entries_BCE, 2, axis=-1)
        (k_BCH, k_BC), (v_BCH, v_BC) = map(quantized, halves)
        entries_BCE = jnp.concatenate([k_BCH, v_BCH], axis=-1)
        new.append(jnp.stack([k_BC, v_BC], axis=-1))
    new = [entries_BCE, *new]
    # What is not filled goes out of bounds, where it is dropped.
    slot_BC = first_B[:, None] + jnp.arange(code_BC.shape[1], dtype=jnp.int32)
    slot_BC = jnp.where(filled_BC, slot_BC, slots[1].shape[1])
    rows_B1 = jnp.arange(code_BC.shape[0])[:, None]
    old = [*slots[:3], *(x.swapaxes(1, 2) for x in slots[3:])]
    out = [a.at[rows_B1, slot_BC].set(b, mode="drop") for a, b in zip(old, new, strict=True)]
    sums = tuple(x.at[rows_B1, slot_BC].set(sums_BC, mode="drop") for x in sums)
    return (*out[:3], *(x.swapaxes(1, 2) for x in out[3:]), *sums)
