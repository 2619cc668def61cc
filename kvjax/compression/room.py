"""Room for what an answer adds: pages for every layer, before a cache is compressed again.

B batch, L layers, K KV heads, N query heads, Y slots of a layer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvjax import exact, sharding
from kvjax.cache.ratio import Ratio, allowed, ratio_of
from kvjax.cache.slot_layers import compacted, layer_slots
from kvjax.cache.slot_moves import grown, repaged, reshard_slots
from kvjax.cache.slots import Slots, empty_slots, page_size
from kvjax.cache.state import Cache
from kvjax.cache.tail import remember
from kvjax.compression.capacity import layer_capacity, pool_shape
from kvjax.compression.row_budgets import visible
from kvjax.config import CompressionConfig, ConfigError, Recompress
from kvjax.exact import MOST


def slots_needed(slots: int, heads: int, rule: Recompress, new: int, fraction: float) -> int:
    """Slots of a row's pool: the budget's, or what the ratio comes to after the answer.

    Args:
      slots: of the prompt's pool, of all layers and heads, empty ones included.
      heads: KV heads of all layers together.
      rule: when and to what.
      new: tokens to come, and
      fraction: the part of them that is kept, where the rule keeps the ratio.

    Raises:
      ConfigError: a budget of more slots than an index can count.
    """
    if rule.budget is None:
        return slots + _grown(heads, new, fraction)
    if heads * rule.budget > MOST:
        raise ConfigError(
            f"recompress.budget={rule.budget} comes to {heads * rule.budget} slots for {heads}"
            f" heads, expected at most {MOST}"
        )
    return heads * rule.budget


def _grown(heads: int, new: int, fraction: float) -> int:
    """Entries that `new` tokens add at the ratio, with two a head for what is rounded up."""
    return heads * (math.ceil(fraction * new) + 2)


def check_held(rule: Recompress, heads: int, held: int):
    """Raise ConfigError where a budget is less than what is kept of a prompt.

    Args:
      rule: when and to what.
      heads: KV heads of all layers together.
      held: entries that the fullest row holds, of all layers and heads; empty slots do not count.
    """
    if rule.budget is not None and heads * rule.budget < held:
        raise ConfigError(
            f"recompress.budget={rule.budget}, expected at least the {-(-held // heads)} entries"
            " a head that are held of the prompt"
        )


def add_pages(
    cache: Cache,
    rule: Recompress,
    heads: int,
    new: int = 0,
    fraction: float = 1.0,
    windows: tuple[int | None, ...] = (),
) -> tuple[Cache, Ratio | None]:
    """The cache with room for what comes, a tail that remembers queries, and the ratio to keep.

    Every layer keeps the entries that it has and gets an equal part of the slots beside them.
    What a row gets depends on what it holds alone: by a budget all slots, by the ratio what it
    holds and the answer's part.

    Args:
      cache: of a prompt, in either layout; it is not changed.
      rule: when and to what.
      heads: query heads N.
      new, fraction: see `slots_needed`.
      windows: each layer's sliding window, () for none: a layer gets no slots beyond what a later
        token can see of it, the others get them.

    Raises:
      ConfigError: a budget below what is held. Not while tracing, where nobody can know; who
        compiles this calls `check_held`.
    """
    slots = slots_of(cache) if cache.slots is None else reshard_slots(cache.slots, 1)
    layers, kv_heads = slots.counts.shape[1:]
    held_BL = slots.counts.sum(-1, dtype=jnp.int32)
    if not isinstance(held_BL, jax.core.Tracer):
        check_held(rule, layers * kv_heads, int(held_BL.sum(-1).max()))
    total = slots_needed(slots.room, layers * kv_heads, rule, new, fraction)
    total, caps = _shared(total, slots.room, windows or [None] * layers, kv_heads)
    dense = cache.slots is not None and slots.table is None
    before = _Extent(slots.room, slots.most, slots.alike, packed=dense)
    most, alike = _most(before, rule, total, caps)
    pages = layers * -(-most // slots.page) if alike else total // slots.page + layers
    slots = slots if dense else compacted(slots)
    if pages * slots.page < slots.size:  # empty slots were more than the budget
        slots = repaged(slots, slots.page, pages * slots.page)
    wanted_BL = held_BL
    if rule.budget is None:
        most_BLK = allowed(slots.counts, cache.prompt_lengths, new)
        wanted_BL = jnp.maximum(wanted_BL, most_BLK.sum(-1, dtype=jnp.int32))
        room_B = held_BL.sum(-1, dtype=jnp.int32) + _grown(layers * kv_heads, new, fraction)
    else:
        room_B = jnp.full(held_BL.shape[:1], total, jnp.int32)
    caps_BL = jnp.maximum(jnp.array([min(cap, total) for cap in caps], jnp.int32), held_BL)
    if alike:
        wanted_BL = caps_BL = jnp.full_like(held_BL, most)
    sizes_BL = exact.spread(wanted_BL, caps_BL, room_B, held_BL)
    slots = grown(slots, sizes_BL, pages, most).replace(room=total, most=most, alike=alike)
    ratio = ratio_of(slots, cache.prompt_lengths) if rule.budget is None else None
    tail = cache.tail
    if rule.queries and not tail.queries:
        tail = remember(tail, rule.queries, heads)
    slots = reshard_slots(slots, sharding.parts())
    return cache.replace(layers=(), slots=slots, tail=tail, keep_ratio=False), ratio


class _Extent(NamedTuple):
    """What is known beforehand of the slots that are to grow; as in `Slots`.

    `packed` where a prompt was just packed, so that layers have no slots beyond their entries'.
    """

    room: int
    most: int | None
    alike: bool
    packed: bool


def _most(slots: _Extent, rule: Recompress, total: int, caps: Sequence[int]) -> tuple[int, bool]:
    """Most slots that a layer may use of `total`, and whether all may use so many.

    Layers that are alike are alike again where a budget has room for all slots of each, or where
    all hold the same, as they do in slots that were just packed.
    """
    layers, same = len(caps), len(set(caps)) == 1
    if rule.layers == "global":  # any layer may come to have the largest sums
        return total, False
    most = slots.most or slots.room
    if slots.alike:
        width = total // layers
        if rule.budget is not None and same and (width >= most or slots.packed):
            return width, True
    if not same:  # what sliding windows leave may go to any other layer
        return total, False
    if rule.budget is None:
        return most + total - slots.room, False
    # A layer that holds most of a row, and an equal part of the others' slots.
    return total if most >= total else most + -(-(total - most) // layers), False


def widest_layer(
    config: CompressionConfig,
    tokens: int,
    rule: Recompress,
    windows: tuple[int | None, ...],
    kv_heads: int,
) -> int:
    """Slots that a layer may use at most once `add_pages` has given a prompt room by a budget.

    Args:
      config: how prompts are compressed, packed.
      tokens: the bucket.
      rule: with a budget.
      windows: each layer's sliding window.
      kv_heads: of a layer.
    """
    layers, whole = len(windows), config.skips(tokens)
    if whole:
        sizes = [kv_heads * visible(tokens, tokens, window) for window in windows]
        room, alike = sum(sizes), len(set(sizes)) == 1
    else:
        room, runs = pool_shape(config, tokens, windows, kv_heads)
        every = range(layers)
        sizes = [kv_heads * layer_capacity(config, tokens, index, windows) for index in every]
        sizes, alike = [min(size, room) for size in sizes], runs is not None
    total, caps = _shared(
        slots_needed(room, layers * kv_heads, rule, 0, 1.0), room, windows, kv_heads
    )
    return _most(_Extent(room, max(sizes), alike, packed=not whole), rule, total, caps)[0]


def _shared(
    total: int, room: int, windows: Sequence[int | None], kv_heads: int
) -> tuple[int, list[int]]:
    """Slots that layers share of `total`, and the most that each can fill, by its window."""
    caps = [total if w is None else kv_heads * max(w - 1, 1) for w in windows]
    return min(total, max(sum(caps), room)), caps


def slots_of(cache: Cache) -> Slots:
    """The slots of a cache in the padded layout, with a table; its empty ones stay empty."""
    batch, kv_heads = cache.layers[0].positions.shape[:2]
    sizes = [kv_heads * layer.positions.shape[2] for layer in cache.layers]
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    apart = tuple((end - size, end) for end, size in zip(ends, sizes, strict=True))
    like = cache.layers[0].keys.swapaxes(1, 2)
    slots = empty_slots(like, len(sizes), ends[-1], apart, page=page_size())
    assert slots.runs is not None  # they were given
    owner_K1 = jnp.arange(kv_heads, dtype=jnp.int8)[:, None]
    entries: list[Array] = []
    owners: list[Array] = []
    positions: list[Array] = []
    for layer, (first, end) in zip(cache.layers, slots.runs, strict=True):
        both = jnp.concatenate([layer.keys, layer.values], axis=-1)
        owner_BKS = jnp.where(layer.positions >= 0, owner_K1, jnp.int8(-1))
        more = end - first - owner_K1.shape[0] * layer.positions.shape[2]
        for found, x, empty in (
            (entries, both, 0), (owners, owner_BKS, -1), (positions, layer.positions, -1)
        ):  # fmt: skip
            flat = x.reshape(batch, -1, *x.shape[3:])
            widths = [(0, more if axis == 1 else 0) for axis in range(flat.ndim)]
            found.append(jnp.pad(flat, widths, constant_values=empty))
    slots = slots.replace(
        entries=jnp.concatenate(entries, axis=1),
        owners=jnp.concatenate(owners, axis=1),
        positions=jnp.concatenate(positions, axis=1),
        counts=cache.counts,
    )
    sizes_BL = jnp.broadcast_to(jnp.array(sizes, jnp.int32), (batch, len(sizes)))
    return grown(slots, sizes_BL, 0, max(sizes))


def entries_of_prompt(slots: Slots, lengths: Int[Array, " B"]) -> Int[Array, "B L K"]:
    """Entries that each row, layer and head holds of a prompt of this length, not of answers."""
    slots, found = reshard_slots(slots, 1), []
    for index in range(slots.counts.shape[1]):
        layer = layer_slots(slots, index)
        before_BY = layer.positions < lengths[:, None]
        found.append((layer.owned & before_BY[:, None]).sum(-1, dtype=jnp.int32))
    return jnp.stack(found, axis=1)
