"""KV-Compress's eviction while decoding: one threshold over all layers and heads of a row.

Rehg 2024 (arXiv 2410.00161, section 3.3) with pages of one slot: of all entries that nothing
protects, wherever they are, those of the smallest sums go, as many as are too many. Layers then
have other sizes. What a smaller layer keeps beyond its last slot moves into its free ones, pages
that it leaves go to layers which grow, and the tail's survivors fill what is free.

B batch, L layers, K KV heads, M slots, P pages, R pages of a layer, U slots of the tail, X = K U,
E = M + L X entries, C slots that are moved at once.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from kvjax import exact
from kvjax.cache.packing import quantized
from kvjax.cache.slot_moves import grown
from kvjax.cache.slots import Slots
from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail
from kvjax.config import Recompress

# Slots that are moved at once: as many may have to, so that they go in a loop.
MOVED = 512


class Places(NamedTuple):
    """Which layer may use each slot of a pool (L for none), and its number in that layer."""

    layer: Int[Array, "B M"]
    number: Int[Array, "B M"]


def evict_everywhere(
    cache: Cache,
    slots: Slots,
    rule: Recompress,
    windows: tuple[int | None, ...],
    room: Int[Array, " B"] | None = None,
) -> Slots:
    """Keep the budget's entries of slots and tail; afterwards every layer's slots are full.

    Args:
      cache: with tokens in its tail, its sums settled.
      slots: the cache's, on one device, with a table.
      rule: the budget, sinks and last tokens.
      windows: each layer's sliding window; what no later token can see goes first.
      room: entries that each row keeps, at most `slots.room`, which is the default.
    """
    places = places_of(slots)
    room_B = jnp.full((len(slots.owners),), slots.room, jnp.int32) if room is None else room
    keep_BE = _chosen(cache, slots, rule, windows, places, room_B)
    layers, kv_heads = slots.counts.shape[1:]
    keep_BM, keep_BX = keep_BE[:, : slots.size], keep_BE[:, slots.size :]
    keep_BLX = keep_BX.reshape(len(keep_BX), layers, -1)
    rows_B1 = jnp.arange(len(keep_BE))[:, None]
    counts_BLK = keep_BLX.reshape(*keep_BLX.shape[:2], kv_heads, -1).sum(-1, dtype=jnp.int32)
    held = places.layer, jnp.maximum(slots.owners, 0).astype(jnp.int32)
    # A slot of no layer goes out of bounds, where it is dropped.
    counts_BLK = counts_BLK.at[rows_B1, *held].add(keep_BM.astype(jnp.int32), mode="drop")
    sizes_BL = counts_BLK.sum(-1, dtype=jnp.int32)
    slots = _closed_up(slots, places, keep_BM, sizes_BL)
    assert slots.table is not None
    widest = slots.table.shape[2] * slots.page
    slots = grown(slots, sizes_BL, slots.size // slots.page, widest).replace(counts=counts_BLK)
    return _filled_up(slots, cache.tail, keep_BLX)


def places_of(slots: Slots) -> Places:
    """Where each slot of a pool belongs, from the table of its layers' pages."""
    assert slots.table is not None
    batch, layers, width = slots.table.shape
    pages = slots.size // slots.page
    number_R = jnp.arange(width, dtype=jnp.int32)
    used_BLR = number_R < -(-slots.lengths // slots.page)[..., None]
    page_BX = jnp.where(used_BLR, slots.table, pages).reshape(batch, -1)
    code_X = jnp.arange(layers * width, dtype=jnp.int32)
    code_BP = jnp.full((batch, pages), layers * width, jnp.int32)
    code_BP = code_BP.at[jnp.arange(batch)[:, None], page_BX].set(code_X, mode="drop")
    first_BP1 = (code_BP % width * slots.page)[..., None]
    number_BM = (first_BP1 + jnp.arange(slots.page)).reshape(batch, -1)
    layer_BM = jnp.repeat(code_BP // width, slots.page, axis=1)
    mine_BM = number_BM < _at_layer(slots.lengths, layer_BM)
    return Places(jnp.where(mine_BM, layer_BM, layers), number_BM)


def _at_layer(x_BL: Array, layer: Int[Array, "B M"]) -> Array:
    """Each slot's number of its layer; 0 for a slot of none."""
    return jnp.take_along_axis(jnp.pad(x_BL, ((0, 0), (0, 1))), layer, axis=1)


def _chosen(cache, slots: Slots, rule, windows, places: Places, room_B) -> Bool[Array, "B E"]:
    """Entries that stay: the last tokens, the sinks, and the largest sums of all others."""
    tail = cache.tail
    layers, kv_heads = slots.counts.shape[1:]
    batch, tokens = tail.positions.shape
    each = layers, kv_heads, tokens
    layer_E = jnp.arange(layers * kv_heads * tokens, dtype=jnp.int32) // (kv_heads * tokens)
    head_E = jnp.arange(layers * kv_heads * tokens, dtype=jnp.int32) // tokens % kv_heads
    tail_BE = jnp.broadcast_to(tail.positions[:, None, None], (batch, *each)).reshape(batch, -1)
    slot_BM = jnp.where(places.layer < layers, slots.positions, -1)

    def both(of_slots, of_tail):
        of_tail = jnp.broadcast_to(of_tail, (batch, layer_E.size))
        return jnp.concatenate([of_slots, of_tail.astype(of_slots.dtype)], axis=1)

    position_BE = both(jnp.where(slots.owners >= 0, slot_BM, -1), tail_BE)
    layer_BE = jnp.minimum(both(places.layer, layer_E), layers - 1)
    head_BE = both(jnp.maximum(slots.owners, 0).astype(jnp.int32), head_E)
    sums_BE = both(slots.sums, jnp.stack(tail.sums, axis=1).reshape(batch, -1))
    next_B1 = cache.next_positions[:, None]
    reach_L = jnp.array([exact.MOST if window is None else window for window in windows], jnp.int32)
    can_BE = (position_BE >= 0) & (next_B1 - position_BE < reach_L[layer_BE])
    share_B1 = (room_B // (layers * kv_heads))[:, None]
    recent_B1 = jnp.minimum(rule.recent, share_B1 // 2)
    sinks_B1 = jnp.minimum(rule.sinks, share_B1 - recent_B1)
    always_BE = can_BE & ((position_BE >= next_B1 - recent_B1) | (position_BE < sinks_B1))
    rest_B = room_B - always_BE.sum(-1, dtype=jnp.int32)
    order = layer_BE * kv_heads + head_BE, jnp.maximum(position_BE, 0)
    return always_BE | exact.select_in_order(sums_BE, rest_B, can_BE & ~always_BE, order)


def _in_turn(mask_BM: Bool[Array, "B M"], layer: Int[Array, "B M"], layers: int):
    """Slots `[B, M]` where a mask holds, layer after layer; where each layer's begin; how many."""
    key_BM = jnp.where(mask_BM, layer, layers)
    order_BM = jnp.argsort(key_BM, axis=1, stable=True).astype(jnp.int32)
    counts_BL = jnp.zeros((len(mask_BM), layers), jnp.int32)
    rows_B1 = jnp.arange(len(mask_BM))[:, None]
    counts_BL = counts_BL.at[rows_B1, key_BM].add(1, mode="drop")
    return order_BM, jnp.cumsum(counts_BL, axis=1, dtype=jnp.int32) - counts_BL, counts_BL


def _closed_up(slots: Slots, places: Places, keep_BM, sizes_BL: Int[Array, "B L"]) -> Slots:
    """The slots without what is not kept, each layer's entries below its new size."""
    layers, size = sizes_BL.shape[1], slots.size
    below_BM = places.number < _at_layer(sizes_BL, places.layer)
    beyond_BM, free_BM = keep_BM & ~below_BM, (places.layer < layers) & below_BM & ~keep_BM
    from_BM, first_BL, count_BL = _in_turn(beyond_BM, places.layer, layers)
    free_BM, free_BL, _ = _in_turn(free_BM, places.layer, layers)
    count_B = count_BL.sum(1, dtype=jnp.int32)
    moves_BM = jnp.arange(size) < count_B[:, None]
    layer_BM = jnp.where(moves_BM, jnp.take_along_axis(places.layer, from_BM, axis=1), layers)
    at_BM = jnp.arange(size) + _at_layer(free_BL - first_BL, layer_BM)
    to_BM = jnp.take_along_axis(free_BM, jnp.clip(at_BM, 0, size - 1), axis=1)
    to_BM = jnp.where(moves_BM, to_BM, size)  # out of bounds, where it is dropped
    gone_BM = jnp.where(moves_BM, from_BM, size)
    rows_B1 = jnp.arange(len(keep_BM))[:, None]

    def move(x, empty):
        x = jnp.where(keep_BM, x, jnp.asarray(empty, x.dtype))
        moved = jnp.take_along_axis(x, from_BM, axis=1)
        x = x.at[rows_B1, gone_BM].set(jnp.asarray(empty, x.dtype), mode="drop")
        return x.at[rows_B1, to_BM].set(moved, mode="drop")

    some = min(MOVED, size)

    def step(index, entries):
        # The last ones begin earlier where the pool ends: to move twice changes nothing.
        from_BC, to_BC = (
            lax.dynamic_slice_in_dim(x, index * some, some, axis=1) for x in (from_BM, to_BM)
        )
        rows_BCE = jnp.take_along_axis(entries, from_BC[..., None], axis=1)
        return entries.at[rows_B1, to_BC].set(rows_BCE, mode="drop")

    entries = lax.fori_loop(0, -(-count_B.max() // some), step, slots.entries)
    scales = slots.scales
    if scales is not None:
        scales = jnp.stack([move(scales[:, half], 0) for half in (0, 1)], axis=1)
    return slots.replace(
        entries=entries,
        owners=move(slots.owners, -1),
        positions=move(slots.positions, -1),
        scales=scales,
        sums=move(slots.sums, 0),
    )


def _filled_up(slots: Slots, tail: Tail, keep_BLX: Bool[Array, "B L X"]) -> Slots:
    """The slots with the tail's survivors in the free ones of their layers."""
    batch, layers, count = keep_BLX.shape
    tokens = tail.positions.shape[1]
    places = places_of(slots)
    free_BM = (places.layer < layers) & (slots.owners < 0)
    free_BM, first_BL, _ = _in_turn(free_BM, places.layer, layers)
    rows_B1 = jnp.arange(batch)[:, None]
    position_BX = jnp.tile(tail.positions, (1, count // tokens))
    head_X = jnp.arange(count) // tokens
    entries, owners, positions, scales, sums = (
        slots.entries, slots.owners, slots.positions, slots.scales, slots.sums
    )  # fmt: skip
    for index in range(layers):
        keep_BX = keep_BLX[:, index]
        rank_BX = first_BL[:, index, None] + jnp.cumsum(keep_BX, axis=1, dtype=jnp.int32) - 1
        slot_BX = jnp.take_along_axis(free_BM, jnp.clip(rank_BX, 0, slots.size - 1), axis=1)
        at = rows_B1, jnp.where(keep_BX, slot_BX, slots.size)

        def put(x, new, at=at):
            return x.at[at].set(new.astype(x.dtype), mode="drop")

        halves = [x[index].reshape(batch, count, -1) for x in (tail.keys, tail.values)]
        if scales is not None:
            whole, found = zip(*map(quantized, halves), strict=True)
            halves = list(whole)
            scales = jnp.stack([put(scales[:, half], found[half]) for half in (0, 1)], axis=1)
        entries = put(entries, jnp.concatenate(halves, axis=-1))
        owners = put(owners, jnp.broadcast_to(head_X, keep_BX.shape))
        positions = put(positions, position_BX)
        sums = put(sums, tail.sums[index].reshape(batch, count))
    return slots.replace(
        entries=entries, owners=owners, positions=positions, scales=scales, sums=sums
    )
