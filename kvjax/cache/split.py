"""The cache over a mesh: a packed pool split over its SLOTS, everything else over KV heads.

B batch, T new tokens, M slots, N query heads, n = N's share of a device, K KV heads, H head dim,
E = 2 H, R slots of a layer, P devices, C slots written at once on a device.

Slot j of the pool, as layers and heads lie one after the other, is on device j % P, as its slot
j // P. So every device has equally many slots of every layer, whatever heads an adaptive budget
favours, a layer's slots are still one run on each device, and the first and last slot of that run
follow from the layer's bounds. In memory the pool is device after device (`Pool.parts`).

A query is made known to all devices, each attends with all query heads to its own slots, and what
they found is sent to the devices that have those heads, which merge it by log-sum-exp.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax import sharding
from kvjax.cache import attend as whole
from kvjax.cache import slots as pools
from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slots import Pool
from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail
from kvjax.kernels.decode_attention import merge, pool_attention
from kvjax.sharding import GROUP, HEADS, MODEL, QUERY_HEADS, REST


# ---------------------------------------------------------------------------- packing
def put_layer(
    pool: Pool,
    layer: int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    keep: Bool[Array, "B K T"],
    room: int,
) -> Pool:
    """`pool.put_layer`, where a mesh is in use with every device's heads and slots apart.

    A device gathers what its own heads keep; nothing but that, and counts, goes to the others.
    """
    if pool.parts == 1:
        return pools.put_layer(pool, layer, keys, values, keep, room)
    keep = sharding.constrain(keep, "BKT")
    counts_BK = sharding.constrain(pools.stored(pool, layer, keep, room), "B.")
    start_B, _ = pool.bounds(layer)
    scaled = pool.scales is not None
    body = partial(_put_here, room=room, parts=pool.parts)
    slots = "BME,BM,BM" + ",B2M" * scaled
    arrays = [keys, values, keep, counts_BK, start_B, pool.entries, pool.owners, pool.positions]
    arrays += [] if pool.scales is None else [pool.scales]
    found = sharding.by_device(body, f"BTKH,BTKH,BKT,B.,B,{slots}->{slots}", *arrays)
    entries, owners, positions, *scales = found
    return pool.replace(
        entries=entries,
        owners=owners,
        positions=positions,
        counts=pool.counts.at[:, layer].set(counts_BK),
        scales=scales[0] if scaled else None,
    )


def _put_here(keys, values, keep, counts_BK, start_B, *slots, room: int, parts: int):
    """One device's part: its heads' kept entries out, its slots of all heads' in."""
    batch, tokens, heads, head_dim = keys.shape
    first_head = lax.axis_index(HEADS) * heads
    ends_BK = jnp.cumsum(counts_BK, axis=1, dtype=jnp.int32)
    own_B1 = lax.dynamic_slice_in_dim(ends_BK - counts_BK, first_head, 1, axis=1)
    mine_B1 = lax.dynamic_slice_in_dim(counts_BK, first_head, heads, axis=1).sum(1, keepdims=True)
    # Rows of slots, one slot a device, from the row that holds the layer's first slot.
    rows = -(-(room + parts - 1) // parts)
    place_BR = jnp.arange(rows * parts, dtype=jnp.int32) - (start_B % parts)[:, None]
    place_BR = place_BR - own_B1
    valid_BR = (place_BR >= 0) & (place_BR < mine_B1)
    running_BX = jnp.cumsum(keep.reshape(batch, -1), axis=-1, dtype=jnp.int32)
    found_BR = jax.vmap(jnp.searchsorted)(running_BX, place_BR + 1).astype(jnp.int32)
    found_BR = jnp.minimum(found_BR, heads * tokens - 1)
    head_BR, position_BR = found_BR // tokens, found_BR % tokens
    row_BR1 = (position_BR * heads + head_BR)[..., None]
    halves = [
        jnp.take_along_axis(x.reshape(batch, -1, head_dim), row_BR1, axis=1) for x in (keys, values)
    ]
    entries_BRE = jnp.where(valid_BR[..., None], jnp.concatenate(halves, axis=-1), 0)
    entries_BCE = _to_slots(entries_BRE, rows)
    code_BR = (first_head + head_BR) * tokens + position_BR + 1
    code_BC = _to_slots(jnp.where(valid_BR, code_BR, 0), rows) - 1
    return _written(slots, entries_BCE, code_BC, start_B // parts, tokens)


def _to_slots(x: Array, rows: int) -> Array:
    """Sum over the KV heads' devices of `[B, rows x P, ...]`, this device's slot of each row."""
    sizes = [lax.axis_size(axis) for axis in (HEADS, GROUP, REST)]
    x = x.reshape(x.shape[0], rows, sizes[0], sizes[1] * sizes[2], *x.shape[2:])
    x = lax.psum_scatter(x, HEADS, scatter_dimension=2)
    return lax.dynamic_index_in_dim(x, lax.axis_index((GROUP, REST)), axis=2, keepdims=False)


def _written(slots, entries_BCE, code_BC, first_B, tokens: int):
    """This device's slots with a layer's entries from slot `first_B` on; code -1 is no entry."""
    filled_BC = code_BC >= 0
    new = [
        jnp.where(filled_BC, code_BC // tokens, -1).astype(jnp.int8),
        jnp.where(filled_BC, code_BC % tokens, -1),
    ]
    if len(slots) > 3:
        halves = jnp.split(entries_BCE, 2, axis=-1)
        (k_BCH, k_BC), (v_BCH, v_BC) = map(pools.quantized, halves)
        entries_BCE = jnp.concatenate([k_BCH, v_BCH], axis=-1)
        new.append(jnp.stack([k_BC, v_BC], axis=-1))
    new = [entries_BCE, *new]
    # What is not filled goes out of bounds, where it is dropped.
    slot_BC = first_B[:, None] + jnp.arange(code_BC.shape[1], dtype=jnp.int32)
    slot_BC = jnp.where(filled_BC, slot_BC, slots[1].shape[1])
    rows_B1 = jnp.arange(code_BC.shape[0])[:, None]
    old = [*slots[:3], *(x.swapaxes(1, 2) for x in slots[3:])]
    out = [a.at[rows_B1, slot_BC].set(b, mode="drop") for a, b in zip(old, new, strict=True)]
    return (*out[:3], *(x.swapaxes(1, 2) for x in out[3:]))


# ---------------------------------------------------------------------------- attention
def attend(
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    cache: Cache,
    layer: int,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """`attend.attend`, where a mesh is in use with every device's heads and slots apart."""
    if sharding.current() is None:
        return whole.attend(q, positions, cache, layer, window)
    tail, pool = cache.tail, cache.pool
    common = q, positions, tail.keys[layer], tail.values[layer], tail.positions
    equation = "BTNH,BT,BKUH,BKUH,BU,B,"
    # What rows share lies on every device of the data axis.
    row = "B" if cache.shared == 1 else "."
    rules = {"window": window, "keep_ratio": cache.keep_ratio}
    if pool is None:
        held = cache.layers[layer]
        body = partial(_attend_padded, **rules)
        equation += f"{row}KSH,{row}KSH,{row}KS->BTNH"
        rest = [held.keys, held.values, held.positions]
    else:
        if pool.parts != sharding.parts():
            raise ValueError(
                f"the cache's pool is split into {pool.parts}, expected {sharding.parts()} parts"
            )
        region = None
        if pool.regions is not None:
            first, end = pool.regions[layer]
            region = first // pool.parts, -(-end // pool.parts)
        body = partial(_attend_pool, **rules, region=region)
        equation += f"{row}.,{row},{row},{row}ME,{row}M,{row}M"
        equation += f",{row}2M" * (pool.scales is not None) + "->BTNH"
        rest = [pool.counts[:, layer], *pool.bounds(layer)]
        rest += [pool.entries, pool.owners, pool.positions]
        rest += [pool.scales] if pool.scales is not None else []
    return sharding.by_device(body, equation, *common, cache.prompt_lengths, *rest)


def _attend_padded(q, positions, k, v, at, lengths, *held, window, keep_ratio):
    """Heads do not look at one another's keys: no device needs another's."""
    layer = PaddedLayer(*held)
    cache = Cache((layer,), _tail(k, v, at), lengths, lengths, keep_ratio=keep_ratio)
    return whole.attend(q, positions, cache, 0, window)


def _tail(k_BKUH, v_BKUH, positions_BU) -> Tail:
    return Tail((k_BKUH,), (v_BKUH,), positions_BU, jnp.zeros((), jnp.int32))


def _attend_pool(
    q, positions, k, v, at, lengths, counts_XK, start, end, *slots, window, keep_ratio, region
):
    tail, kv_heads = _tail(k, v, at), counts_XK.shape[1]
    rows = q.shape[0] // counts_XK.shape[0]
    of_tail = evicted = None
    if keep_ratio:
        counts_BK = jnp.repeat(counts_XK, rows, axis=0)
        gone, of_tail = whole.evicted_ranges(counts_BK, lengths, positions, window, tail)
        gone = whole.folded_evicted(gone, rows)
        run_XK = start[:, None] + jnp.cumsum(counts_XK, axis=-1) - counts_XK
        evicted = run_XK + gone.first, run_XK[:, None] + gone.last
        mine = partial(
            lax.dynamic_slice_in_dim,
            start_index=lax.axis_index(HEADS) * k.shape[1],
            slice_size=k.shape[1],
        )
        of_tail = of_tail._replace(
            order=mine(of_tail.order, axis=1),
            first=mine(of_tail.first, axis=1),
            last=mine(of_tail.last, axis=2),
        )
    entries, owners, places, *scales = slots
    part = pool_attention(
        whole.folded(lax.all_gather(q, QUERY_HEADS, axis=2, tiled=True), rows),
        whole.folded(positions, rows),
        entries,
        owners,
        places,
        *(_here(bound) for bound in (start, end)),
        kv_heads=kv_heads,
        window=window,
        evicted=evicted and (_here(evicted[0]), _here(evicted[1])),
        scales=scales[0] if scales else None,
        region=region,
    )
    parts = _to_heads(*whole.unfolded(part, rows))
    tail_part = whole.attend_tail(q, positions, tail, 0, window, of_tail)
    return merge([*parts, tail_part]).astype(q.dtype)


def _here(slot: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
    """How many of this device's slots come before a slot of the whole pool."""
    return -((lax.axis_index(MODEL) - slot) // lax.axis_size(MODEL))


def _to_heads(out_BTNH, lse_BTN) -> list[tuple[Array, Array]]:
    """What every device found for this one's query heads, output and log-sum-exp in one message."""
    both = jnp.concatenate([out_BTNH, lse_BTN[..., None]], axis=-1)
    parts = lax.axis_size(QUERY_HEADS)
    both = both.reshape(*both.shape[:2], parts, -1, both.shape[-1])
    both = lax.all_to_all(both, QUERY_HEADS, split_axis=2, concat_axis=0)
    if lax.axis_size(REST) > 1:
        both = lax.all_gather(both, REST).reshape(-1, *both.shape[1:])
    return [(part[..., :-1], part[..., -1]) for part in both]


def reshard(cache: Cache) -> Cache:
    """The cache as the mesh in use needs it: its pool dealt out to that many devices."""
    if cache.pool is None:
        return cache
    return cache.replace(pool=pools.reshard_slots(cache.pool, sharding.parts()))
