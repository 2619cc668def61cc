"""Compression while decoding: every so many tokens, evict and write the new ones in their place.

    decode n tokens into the tail -> score, allocate, evict -> tail rows into freed slots -> ...

The slots' shapes never change. A layer has pages of its own (`room.py`), filled in any order; rows
that survive in the tail are scattered into the slots that others left, so the slots are never
copied. Kept entries keep their true positions.

Scores and choice are the prompt's own (`scorers.py`, `compress.best`).

B batch, L layers, K KV heads, H head dim, Y slots of a layer, U slots of the tail, S = Y + U,
X = K U.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax import exact
from kvjax.cache.packing import quantized
from kvjax.cache.ratio import Ratio, allowed, ratio_of
from kvjax.cache.slot_layers import LayerSlots, layer_slots, of_layer
from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.slots import Slots
from kvjax.cache.state import Cache, with_own_entries
from kvjax.cache.sums import begin, settle
from kvjax.compression import scorers
from kvjax.compression.compress import best
from kvjax.compression.one_threshold import evict_everywhere
from kvjax.compression.room import add_pages
from kvjax.compression.scorer_input import HeldInput, HeldKeys
from kvjax.config import Recompress
from kvjax.methods import Settings


def make_room(
    cache: Cache,
    rule: Recompress,
    heads: int,
    windows: tuple[int | None, ...],
    asked: bool,
    new: int = 0,
    fraction: float = 1.0,
) -> tuple[Cache, Ratio | None]:
    """The cache with room for what an answer adds, and the ratio that it keeps, if it keeps one.

    What PrefixKV's ratio has evicted by now is a mask in such a cache; here it goes for good, so
    that nothing comes back under a rule that knows of budgets alone.

    Args:
      cache: of a prompt, with a question behind it or not; rows that share entries get their own.
      rule: when and to what.
      heads: query heads N.
      windows: each layer's sliding window.
      asked: whether tokens may have come since the prompt.
      new, fraction: see `kvjax.compression.room.slots_needed`.
    """
    masked = cache.keep_ratio and rule.budget is not None and asked
    cache = with_own_entries(cache)
    if rule.sums:
        cache = settle(begin(cache) if cache.tail.slot_sums is None else cache)
    roomy, ratio = add_pages(cache, rule, heads, new, fraction, windows)
    if masked and roomy.slots is not None:
        held = reshard_slots(roomy.slots, 1)
        roomy = evict(roomy, ratio_of(held, roomy.prompt_lengths), rule, windows)
    return begin(roomy) if rule.sums else roomy, ratio


def evict(
    cache: Cache,
    ratio: Ratio | None,
    rule: Recompress,
    windows: tuple[int | None, ...],
    room: Int[Array, " B"] | None = None,
) -> Cache:
    """Score, allocate and evict in every layer; what survives of the tail moves into slots.

    The tail is empty afterwards. A cache to whose entries attention adds goes on doing so.

    Args:
      cache: from `add_pages`, with tokens in its tail.
      ratio: from `add_pages`.
      rule: when and to what.
      windows: each layer's sliding window.
      room: entries that each row keeps, where one threshold is for all layers; see
        `evict_everywhere`.
    """
    adds = cache.tail.slot_sums is not None
    cache = settle(cache)
    assert cache.slots is not None  # `add_pages` made some
    slots = cache.slots
    everywhere = ratio is None and rule.layers == "global"
    if everywhere:
        ordered = evict_everywhere(cache, reshard_slots(slots, 1), rule, windows, room)
        slots = reshard_slots(ordered, slots.parts)
    for index, window in enumerate(() if everywhere else windows):
        layer = layer_slots(slots, index)
        if ratio is not None:
            keep_BKS = _by_ratio(cache, ratio, layer, index, window)
        else:
            keep_BKS = _by_budget(cache, slots, rule, layer, index, window)
        slots = _reuse(slots, cache, layer, index, keep_BKS)
        # One layer after the other, so that what one needs on the way is there once.
        slots, tail = lax.optimization_barrier((slots, cache.tail))
        cache = cache.replace(tail=tail)
    tail = cache.tail
    fresh = {"positions": jnp.full_like(tail.positions, -1), "cursor": jnp.zeros_like(tail.cursor)}
    tail = tail.replace(**fresh, sums=tuple(map(jnp.zeros_like, tail.sums)))
    cache = cache.replace(slots=slots, tail=tail)
    return begin(cache) if adds else cache


def _held(cache: Cache, layer: LayerSlots, window: int | None):
    """Slots and tail of a layer: positions `[B, S]`, who holds them, and what can still be seen."""
    tail = cache.tail
    positions_BS = jnp.concatenate([layer.positions, tail.positions], axis=1)
    batch, kv_heads, _ = layer.owned.shape
    filled_BKU = jnp.broadcast_to(
        (tail.positions >= 0)[:, None], (batch, kv_heads, tail.positions.shape[1])
    )
    filled_BKS = can_BKS = jnp.concatenate([layer.owned, filled_BKU], axis=-1)
    if window is not None:
        can_BKS &= (positions_BS > (cache.next_positions - window)[:, None])[:, None]
    return positions_BS, filled_BKS, can_BKS


def _by_ratio(cache, ratio, layer: LayerSlots, index: int, window) -> Bool[Array, "B K S"]:
    """PrefixKV: in position order from the frozen point on, as many go as keep the ratio."""
    positions_BS, _, held_BKS = _held(cache, layer, window)
    grown_B = cache.next_positions - cache.prompt_lengths
    offered_B = cache.prompt_lengths
    if window is not None:
        offered_B = jnp.minimum(offered_B, max(window - 1, 1))
    allowed_BK = allowed(ratio.kept[:, index], offered_B, grown_B[:, None])
    total_B = jnp.minimum(allowed_BK.sum(-1), layer.size)
    may_go_BKS = held_BKS & (positions_BS[:, None] >= ratio.frozen[:, index][..., None])
    # Where the slots do not hold so many, a head that may evict makes up for one that may not.
    stays_BK = (held_BKS & ~may_go_BKS).sum(-1, dtype=jnp.int32)
    allowed_BK = exact.spread(allowed_BK, allowed_BK, total_B, stays_BK)
    excess_BK = held_BKS.sum(-1, dtype=jnp.int32) - allowed_BK
    # Earliest first; a position is exact in fp32 below 2**24.
    order = jnp.broadcast_to((2.0**24 - positions_BS)[:, None], held_BKS.shape)
    return held_BKS & ~exact.select_top(order, excess_BK, may_go_BKS)


def _by_budget(cache, slots: Slots, rule, layer: LayerSlots, index, window) -> Bool[Array, "B K S"]:
    """The last tokens, the sinks, and what scores best of the others."""
    entries = _scorer_input(cache, slots, rule, layer, index, window)
    decoding = scorers.SCORERS[rule.scorer].decoding
    assert decoding is not None  # `Recompress` takes no others
    scores_BKS = decoding(entries)
    kv_heads = scores_BKS.shape[1]
    each_B1 = (layer.size // kv_heads)[:, None]
    recent_B1 = jnp.minimum(rule.recent, each_B1 // 2)
    sinks_B1 = jnp.minimum(rule.sinks, each_B1 - recent_B1)
    always_BS = entries.positions >= cache.next_positions[:, None] - recent_B1
    always_BS |= entries.positions < sinks_B1
    kept_BKS = entries.can & always_BS[:, None]
    rest_B = layer.size - kept_BKS.sum((1, 2), dtype=jnp.int32)
    held_B = (recent_B1 + sinks_B1)[:, 0]
    divided = Settings(heads=rule.heads, floor=rule.floor)
    can_BKS = entries.can & ~kept_BKS
    return kept_BKS | best(scores_BKS, rest_B // kv_heads, can_BKS, held_B, divided, total=rest_B)


def _scorer_input(cache, slots: Slots, rule, layer: LayerSlots, index: int, window) -> HeldInput:
    """What a scorer sees of a layer."""
    tail = cache.tail
    head_dim = tail.keys[index].shape[-1]
    k_BYH = of_layer(slots, slots.entries, index)[..., :head_dim]
    held_keys = HeldKeys(
        slots=jnp.where(layer.owned.any(1)[..., None], k_BYH, 0),
        owned=layer.owned,
        tail=tail.keys[index],
        scales=None if slots.scales is None else of_layer(slots, slots.scales[:, 0], index),
    )
    positions_BS, filled_BKS, can_BKS = _held(cache, layer, window)
    return HeldInput(
        held_keys=held_keys,
        filled=filled_BKS,
        can=can_BKS,
        positions=positions_BS,
        queries=tail.queries[index] if tail.queries else None,
        query_positions=tail.query_positions if tail.queries else None,
        window=window,
        sums=_sums(slots, tail, layer, index) if rule.sums else None,
    )


def _sums(slots: Slots, tail, layer: LayerSlots, index: int) -> Float[Array, "B K S"]:
    """What the entries of a layer have received; a slot's for every head."""
    assert slots.sums is not None  # `begin` has seen to it
    slots_BY = of_layer(slots, slots.sums, index)
    slots_BKY = jnp.broadcast_to(slots_BY[:, None], layer.owned.shape)
    return jnp.concatenate([slots_BKY, tail.sums[index]], axis=-1)


def _reuse(slots: Slots, cache: Cache, layer: LayerSlots, index: int, keep_BKS) -> Slots:
    """Free what is not kept, and write the tail's survivors into the layer's free slots."""
    tail = cache.tail
    width = layer.numbers.shape[1]
    stays_BY = keep_BKS[:, :, :width].any(1)
    free_BY = (layer.numbers < slots.size) & ~stays_BY
    survives_BX = keep_BKS[:, :, width:].reshape(keep_BKS.shape[0], -1)
    count = survives_BX.shape[1]
    wanted_X = jnp.arange(1, count + 1)
    find = jax.vmap(lambda running: jnp.searchsorted(running, wanted_X))
    from_BX = find(jnp.cumsum(survives_BX, axis=1, dtype=jnp.int32))
    to_BX = find(jnp.cumsum(free_BY, axis=1, dtype=jnp.int32))
    moves_BX = (from_BX < count) & (to_BX < width)
    slot_BX = jnp.take_along_axis(layer.numbers, jnp.minimum(to_BX, width - 1), axis=1)
    slot_BX = jnp.where(moves_BX, slot_BX, slots.size)  # out of bounds, where it is dropped
    source_BX = jnp.minimum(from_BX, count - 1)

    def rows(arrays):
        flat = arrays[index].reshape(survives_BX.shape[0], count, -1)
        return jnp.take_along_axis(flat, source_BX[..., None], axis=1)

    tail_slots = tail.positions.shape[1]
    batch_B1 = jnp.arange(slot_BX.shape[0])[:, None]
    at_BX = jnp.where(moves_BX, to_BX, width)

    def put(array, new, empty):
        # The layer's own slots first: to write into the pool twice takes twice the memory.
        now_BY = jnp.where(free_BY, jnp.asarray(empty, array.dtype), of_layer(slots, array, index))
        now_BY = now_BY.at[batch_B1, at_BX].set(new.astype(array.dtype), mode="drop")
        return array.at[batch_B1, layer.numbers].set(now_BY, mode="drop")

    halves, scales = [rows(tail.keys), rows(tail.values)], slots.scales
    if scales is not None:
        whole, found = zip(*map(quantized, halves), strict=True)
        halves = list(whole)
        scales = jnp.stack([put(scales[:, i], found[i], 0) for i in (0, 1)], axis=1)
    entries = slots.entries.at[batch_B1, slot_BX].set(
        jnp.concatenate(halves, axis=-1).astype(slots.entries.dtype), mode="drop"
    )
    sums = slots.sums
    if sums is not None:  # an entry that nothing was added to does not inherit what it replaces
        received = rows(tail.sums)[..., 0] if tail.sums else jnp.zeros(source_BX.shape)
        sums = put(sums, received, 0)
    position_BX = jnp.take_along_axis(tail.positions, source_BX % tail_slots, axis=1)
    return slots.replace(
        entries=entries,
        owners=put(slots.owners, source_BX // tail_slots, -1),
        positions=put(slots.positions, position_BX, -1),
        scales=scales,
        sums=sums,
        counts=slots.counts.at[:, index].set(keep_BKS.sum(-1, dtype=jnp.int32)),
    )
