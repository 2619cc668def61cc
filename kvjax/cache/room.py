"""Pools whose entries come and go while decoding: every layer has a range of slots of its own.

B batch, L layers, K KV heads, N query heads, M slots of the pool, R slots looked at for one layer.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Int

from kvjax import exact, sharding
from kvjax.cache.slots import Pool, reshard_slots
from kvjax.cache.state import FROZEN_POINT, Cache
from kvjax.cache.tail import remember
from kvjax.config import ConfigError, Recompress
from kvjax.exact import MOST, floor_of_product


@no_type_check  # jax maps trees to other leaves than arrays
class Ratio(struct.PyTreeNode):
    """What PrefixKV's rule needs to know of the prompt, `[B, L, K]` int32.

    Attributes:
      kept: entries that each head kept of the prompt.
      frozen: the first position that may be evicted; what lies before stays for good.
    """

    kept: Int[Array, "B L K"]
    frozen: Int[Array, "B L K"]


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


def loosen(
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
    holds and the answer's part. Copies the pool, once.

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
    pool = reshard_slots(cache.pool, 1) if cache.pool is not None else pool_of(cache)
    layers, kv_heads = pool.counts.shape[1:]
    held_BL = pool.counts.sum(-1, dtype=jnp.int32)
    if not isinstance(held_BL, jax.core.Tracer):
        check_held(rule, layers * kv_heads, int(held_BL.sum(-1).max()))
    total = slots_needed(pool.owners.shape[1], layers * kv_heads, rule, new, fraction)
    caps = [total if w is None else kv_heads * max(w - 1, 1) for w in windows or [None] * layers]
    total = min(total, max(sum(caps), pool.owners.shape[1]))
    caps_BL = jnp.maximum(jnp.array([min(cap, total) for cap in caps], jnp.int32), held_BL)
    wanted_BL, ratio = held_BL, None
    if rule.budget is None:
        ratio = ratio_of(cache, pool)
        most_BLK = allowed(ratio.kept, cache.prompt_lengths, new)
        wanted_BL = jnp.maximum(wanted_BL, most_BLK.sum(-1, dtype=jnp.int32))
        room_B = held_BL.sum(-1, dtype=jnp.int32) + _grown(layers * kv_heads, new, fraction)
    else:
        room_B = jnp.full(held_BL.shape[:1], total, jnp.int32)
    regions, widest = _places(pool, rule, total, caps)
    if regions is not None:
        wanted_BL = caps_BL = jnp.full_like(held_BL, total // layers)
    sizes_BL = exact.spread(wanted_BL, caps_BL, room_B, held_BL)
    starts = jnp.pad(jnp.cumsum(sizes_BL, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))
    pool = _moved(pool, held_BL, starts, total)
    pool = pool.replace(starts=starts, regions=regions, widest=widest)
    pool = reshard_slots(pool, sharding.parts())
    tail = cache.tail
    if rule.queries and not tail.queries:
        tail = remember(tail, rule.queries, heads)
    return cache.replace(layers=(), pool=pool, tail=tail, keep_ratio=False), ratio


def _places(pool: Pool, rule: Recompress, total: int, caps: Sequence[int]):
    """Each layer's region in a pool of `total` slots where it is fixed, and a layer's most slots.

    Layers that have equal regions have equal ones again where a budget has room for all slots
    of each, or where all hold the same, as they do in a pool that was just packed.
    """
    slots, layers = pool.owners.shape[1], pool.counts.shape[1]
    widest, alike = pool.widest or slots, len(set(caps)) == 1
    if pool.regions is not None:
        widest = max(end - first for first, end in pool.regions)
        width = total // layers
        if rule.budget is not None and alike and (width >= widest or pool.starts is None):
            return tuple((width * layer, width * (layer + 1)) for layer in range(layers)), None
    if not alike:  # what sliding windows leave may go to any other layer
        return None, total
    if rule.budget is None:
        return None, widest + total - slots
    # A layer that holds most of a row, and an equal part of the others' slots.
    return None, total if widest >= total else widest + -(-(total - widest) // layers)


def pool_of(cache: Cache) -> Pool:
    """The pool of a cache in the padded layout; its empty slots stay empty."""
    batch, kv_heads, _, head_dim = cache.layers[0].keys.shape
    owner_K1 = jnp.arange(kv_heads, dtype=jnp.int8)[:, None]
    entries, owners, positions, regions = [], [], [], []
    end = 0
    for layer in cache.layers:
        both = jnp.concatenate([layer.keys, layer.values], axis=-1)
        entries.append(both.reshape(batch, -1, 2 * head_dim))
        owner_BKS = jnp.where(layer.positions >= 0, owner_K1, jnp.int8(-1))
        owners.append(owner_BKS.reshape(batch, -1))
        positions.append(layer.positions.reshape(batch, -1))
        regions.append((end, end + entries[-1].shape[1]))
        end = regions[-1][1]
    starts = jnp.array([0, *[last for _, last in regions]], jnp.int32)
    same = len({last - first for first, last in regions}) == 1
    return Pool(
        entries=jnp.concatenate(entries, axis=1),
        owners=jnp.concatenate(owners, axis=1),
        positions=jnp.concatenate(positions, axis=1),
        counts=cache.counts,
        starts=jnp.broadcast_to(starts, (batch, len(regions) + 1)),
        regions=tuple(regions) if same else None,
        dtype=cache.layers[0].keys.dtype,
    )


def _moved(pool: Pool, held_BL, starts, total: int) -> Pool:
    """The pool with `total` slots: each layer's entries in order, in its first slots."""
    slots_M = jnp.arange(total, dtype=jnp.int32)
    find = jax.vmap(lambda ends: jnp.searchsorted(ends, slots_M, side="right"))
    layer_BM = jnp.minimum(find(starts[:, 1:]), held_BL.shape[1] - 1)
    offset_BM = slots_M - jnp.take_along_axis(starts, layer_BM, axis=1)
    filled_BM = offset_BM < jnp.take_along_axis(held_BL, layer_BM, axis=1)
    # Layers lie one after the other, so entries are counted through; empty slots are passed over.
    before_BL = jnp.cumsum(held_BL, axis=1, dtype=jnp.int32) - held_BL
    number_BM = jnp.take_along_axis(before_BL, layer_BM, axis=1) + offset_BM + 1
    running_BM = jnp.cumsum(pool.owners >= 0, axis=1, dtype=jnp.int32)
    source_BM = jax.vmap(jnp.searchsorted)(running_BM, number_BM)
    source_BM = jnp.where(filled_BM, source_BM, 0)

    def move(array, empty):
        taken = jnp.take_along_axis(array, source_BM, axis=1)
        return jnp.where(filled_BM, taken, jnp.asarray(empty, array.dtype))

    entries = jnp.take_along_axis(pool.entries, source_BM[..., None], axis=1)
    scales = None
    if pool.scales is not None:
        scales = jnp.stack([move(pool.scales[:, half], 0) for half in (0, 1)], axis=1)
    return pool.replace(
        entries=jnp.where(filled_BM[..., None], entries, jnp.zeros((), entries.dtype)),
        owners=move(pool.owners, -1),
        positions=move(pool.positions, -1),
        scales=scales,
    )


def ratio_of(cache: Cache, pool: Pool) -> Ratio:
    """The 25 last entries of each head may go, half of them where there are fewer."""
    kept_BLK = pool.counts
    may_go_BLK = jnp.where(kept_BLK > FROZEN_POINT, FROZEN_POINT, kept_BLK - kept_BLK // 2)
    frozen = []
    for index in range(kept_BLK.shape[1]):
        layer, may_go_BK = look(pool, index), may_go_BLK[:, index]
        rank_BKR = jnp.where(layer.owned, layer.positions[:, None] + 1, 0).astype(jnp.uint32)
        nth_BK = exact.kth_largest(rank_BKR, may_go_BK)
        position_BK = jnp.where(may_go_BK > 0, nth_BK, 1).astype(jnp.int32) - 1
        frozen.append(jnp.where(may_go_BK > 0, position_BK, cache.prompt_lengths[:, None]))
    return Ratio(kept=kept_BLK, frozen=jnp.stack(frozen, axis=1))


def allowed(kept: Int[Array, "B ..."], lengths: Int[Array, " B"], grown) -> Int[Array, "B ..."]:
    """Entries of a head at the prompt's ratio, `grown` tokens after it (PrefixKV)."""
    lengths = lengths.reshape(-1, *(1,) * (kept.ndim - 1))
    grown = jnp.broadcast_to(jnp.asarray(grown, jnp.int32), kept.shape)
    return kept + grown - floor_of_product(grown, jnp.maximum(lengths - kept, 0), lengths)


# ---------------------------------------------------------------------------- a layer
class Slots(NamedTuple):
    """R slots of the pool: their numbers (M: another layer's), owners, positions; the layer's."""

    slots: Int[Array, "B R"]
    offset: Int[Array, " B"]
    owned: Bool[Array, "B K R"]
    positions: Int[Array, "B R"]
    size: Int[Array, " B"]


def look(pool: Pool, index: int) -> Slots:
    """The slots among which a layer's lie; its own exactly where that is known beforehand."""
    start_B, end_B = pool.bounds(index)
    slots = pool.owners.shape[1]
    if pool.regions is not None:
        first, last = pool.regions[index]
        offset_B, width = jnp.full_like(start_B, first), last - first
    else:
        width = min(pool.widest or slots, slots)
        offset_B = jnp.minimum(start_B, slots - width)
    slots_BR = offset_B[:, None] + jnp.arange(width)
    mine_BR = (slots_BR >= start_B[:, None]) & (slots_BR < end_B[:, None])
    owner_BR, positions_BR = (
        cut(pool, x, index, offset_B, width) for x in (pool.owners, pool.positions)
    )
    heads_K1 = jnp.arange(pool.counts.shape[2])[:, None]
    owned_BKR = mine_BR[:, None] & (owner_BR[:, None] == heads_K1)
    mine = jnp.where(mine_BR, slots_BR, slots)
    return Slots(mine, offset_B, owned_BKR, positions_BR, end_B - start_B)


def cut(pool: Pool, array: Array, index: int, offset_B, width: int) -> Array:
    """What the slots that `look` looks at hold."""
    if pool.regions is not None:
        first, last = pool.regions[index]
        return array[:, first:last]
    return jax.vmap(lambda x, at: lax.dynamic_slice_in_dim(x, at, width))(array, offset_B)


def entries_of_prompt(pool: Pool, lengths: Int[Array, " B"]) -> Int[Array, "B L K"]:
    """Entries that each row, layer and head holds of a prompt of this length, not of answers."""
    pool, found = reshard_slots(pool, 1), []
    for index in range(pool.counts.shape[1]):
        layer = look(pool, index)
        before_BR = layer.positions < lengths[:, None]
        found.append((layer.owned & before_BR[:, None]).sum(-1, dtype=jnp.int32))
    return jnp.stack(found, axis=1)
