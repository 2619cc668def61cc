"""The packed layout: one pool for all layers, whose slots carry their owner and true position.

B batch, M slots, L layers, K KV heads, T prompt tokens, H head dim, E = 2 H (a slot's key and value
side by side), R slots that a layer may take.

    slot      0   1   2   3   4   5   6   7        layer 0: slots 0..4, head 0 kept 3 entries and
    owner     0   0   0   1   1   0   1   1        head 1 two; layer 1: slots 5..7. Which head a
    position  p0  p3  p9  p0  p9  p9  p0  p9       slot belongs to is data: the shapes are the
                                                   budget's, whatever Ada-KV or PrefixKV decide.
"""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int8


@no_type_check  # jax maps trees to other leaves than arrays
class Pool(struct.PyTreeNode):
    """Kept entries of all layers. A layer's slots are contiguous, in the order of its heads.

    Attributes:
      entries: `[B, M, 2H]`; keys after RoPE, then values; zeros in empty slots. int8 where they
        are quantized: whole numbers to be multiplied with `scales`.
      owners: `[B, M]` int8, the KV head that an entry belongs to; -1 in an empty slot.
      positions: `[B, M]` int32, the entry's position in the prompt; -1 in an empty slot.
      counts: `[B, L, K]` int32, entries of each layer and head.
      regions: [first, end) of each layer where that is the same for every prompt, or None where
        layers lie back to back from run-time starts.
      starts: `[B, L + 1]` first slot of each layer, and the end, where entries come and go while
        decoding: a layer then has these slots whatever they hold, in any order. Else None.
      widest: most slots of a layer where `regions` is None, or None where that is not known.
      scales: `[B, 2, M]` fp32 of quantized entries, keys' and values'; else None.
      dtype: of keys and values before they were quantized.
      parts: devices that the slots are dealt out to: slot j, in the order above, is slot j // parts
        of device j % parts, and the arrays are one device's slots after the other's.
    """

    entries: Float[Array, "B M E"] | Int8[Array, "B M E"]
    owners: Int8[Array, "B M"]
    positions: Int[Array, "B M"]
    counts: Int[Array, "B L K"]
    regions: tuple[tuple[int, int], ...] | None = struct.field(pytree_node=False, default=None)
    starts: Int[Array, "B X"] | None = None
    widest: int | None = struct.field(pytree_node=False, default=None)
    scales: Float[Array, "B 2 M"] | None = None
    dtype: Any = struct.field(pytree_node=False, default=None)
    parts: int = struct.field(pytree_node=False, default=1)

    def bounds(self, layer: int) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
        """First slot of a layer, and the first one after it."""
        if self.starts is not None:
            return self.starts[:, layer], self.starts[:, layer + 1]
        sizes_BL = self.counts.sum(-1, dtype=jnp.int32)
        if self.regions is not None:
            start_B = jnp.full(sizes_BL.shape[:1], self.regions[layer][0], jnp.int32)
        else:
            start_B = sizes_BL[:, :layer].sum(-1, dtype=jnp.int32)
        return start_B, start_B + sizes_BL[:, layer]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values with their scales, empty slots included."""
        return self.entries.nbytes + (0 if self.scales is None else self.scales.nbytes)


def empty_pool(
    like: Float[Array, "B T K H"],
    layers: int,
    slots: int,
    regions: tuple[tuple[int, int], ...] | None,
    quantize: bool = False,
    parts: int = 1,
) -> Pool:
    """A pool without entries, for keys of this shape and dtype, which may be quantized to int8.

    Of `parts` devices each has equally many slots.
    """
    batch, _, kv_heads, head_dim = like.shape
    slots += -slots % parts
    if kv_heads > jnp.iinfo(jnp.int8).max:
        raise ValueError(f"keys have {kv_heads} heads, expected at most 127 (owners are int8)")
    return Pool(
        entries=jnp.zeros((batch, slots, 2 * head_dim), jnp.int8 if quantize else like.dtype),
        owners=jnp.full((batch, slots), -1, jnp.int8),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        counts=jnp.zeros((batch, layers, kv_heads), jnp.int32),
        regions=regions,
        scales=jnp.zeros((batch, 2, slots), jnp.float32) if quantize else None,
        dtype=jnp.dtype(like.dtype),
        parts=parts,
    )


def reshard_slots(pool: Pool, parts: int) -> Pool:
    """The same entries dealt out to `parts` devices; slots are added up to a multiple of it.

    One part is all slots in order. From several to several copies the pool twice.
    """
    if parts == pool.parts:
        return pool
    if pool.parts > 1 and parts > 1:
        pool = reshard_slots(pool, 1)
    more = -pool.owners.shape[1] % parts

    def deal(x: Array, axis: int, empty: int = 0) -> Array:
        widths = [(0, more if at == axis else 0) for at in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=empty)
        halves = (-1, parts) if parts > 1 else (pool.parts, -1)
        split = x.reshape(*x.shape[:axis], *halves, *x.shape[axis + 1 :])
        return split.swapaxes(axis, axis + 1).reshape(x.shape)

    return pool.replace(
        entries=deal(pool.entries, 1),
        owners=deal(pool.owners, 1, -1),
        positions=deal(pool.positions, 1, -1),
        scales=None if pool.scales is None else deal(pool.scales, 2),
        parts=parts,
    )


def quantized(
    x: Float[Array, "B R H"],
) -> tuple[Int8[Array, "B R H"], Float[Array, "B R"]]:
    """Whole numbers from -127 to 127 and what they are to be multiplied with, one a vector.

    An entry is off by at most half its scale, that is max |x| / 254.
    """
    scale_BR = jnp.abs(x).max(-1).astype(jnp.float32) / 127
    whole = jnp.round(x.astype(jnp.float32) / jnp.where(scale_BR > 0, scale_BR, 1.0)[..., None])
    return whole.astype(jnp.int8), scale_BR


def put_layer(
    pool: Pool,
    layer: int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    keep: Bool[Array, "B K T"],
    room: int,
) -> Pool:
    """Write one layer's kept entries behind those of the layers before it.

    `room` is at least the most entries that the layer's heads keep together. Were it less, the last
    heads' last ones would be lost, and `counts` would say so: it counts what is stored.
    """
    counts_BK = stored(pool, layer, keep, room)
    batch, tokens, kv_heads, head_dim = keys.shape
    running_BX = jnp.cumsum(keep.reshape(batch, -1), axis=-1, dtype=jnp.int32)
    wanted_R = jnp.arange(1, room + 1, dtype=jnp.int32)
    found_BR = jax.vmap(lambda running: jnp.searchsorted(running, wanted_R))(running_BX)
    found_BR = found_BR.astype(jnp.int32)
    filled_BR = wanted_R <= counts_BK.sum(-1, keepdims=True, dtype=jnp.int32)
    found_BR = jnp.minimum(found_BR, kv_heads * tokens - 1)
    owner_BR, position_BR = found_BR // tokens, found_BR % tokens
    # Rows are taken from [B, T * K, H] as it lies: no transposed copy of the prompt.
    row_BR1 = (position_BR * kv_heads + owner_BR)[..., None]
    halves = [
        jnp.take_along_axis(x.reshape(batch, -1, head_dim), row_BR1, axis=1) for x in (keys, values)
    ]
    new = [
        jnp.where(filled_BR, owner_BR, -1).astype(jnp.int8),
        jnp.where(filled_BR, position_BR, -1),
    ]
    old = [pool.owners, pool.positions]
    if pool.scales is not None:
        whole, scales = zip(*map(quantized, halves), strict=True)
        halves = list(whole)
        new += [jnp.where(filled_BR, scale, 0.0) for scale in scales]
        old += [pool.scales[:, 0], pool.scales[:, 1]]
    new.append(jnp.where(filled_BR[..., None], jnp.concatenate(halves, axis=-1), 0))
    old.append(pool.entries)
    owners, positions, *scales, entries = _written(pool, layer, old, new, filled_BR)
    return pool.replace(
        entries=entries,
        owners=owners,
        positions=positions,
        counts=pool.counts.at[:, layer].set(counts_BK),
        scales=jnp.stack(scales, axis=1) if scales else None,
    )


def stored(pool: Pool, layer: int, keep: Bool[Array, "B K T"], room: int) -> Int[Array, "B K"]:
    """How many of the entries that a layer's heads keep have a slot there."""
    start_B, _ = pool.bounds(layer)
    end = pool.owners.shape[1] if pool.regions is None else pool.regions[layer][1]
    ends_BK = jnp.cumsum(keep.sum(-1, dtype=jnp.int32), axis=-1, dtype=jnp.int32)
    ends_BK = jnp.minimum(ends_BK, jnp.minimum(room, end - start_B)[:, None])
    return jnp.diff(ends_BK, axis=-1, prepend=0)


def _written(pool: Pool, layer: int, old: list[Array], new: list[Array], filled_BR: Array):
    """Arrays of slots with a layer's rows in their place."""
    if pool.regions is not None:
        first, end = pool.regions[layer]
        return [
            lax.dynamic_update_slice_in_dim(a, b[:, : end - first], first, axis=1)
            for a, b in zip(old, new, strict=True)
        ]
    start_B, _ = pool.bounds(layer)
    # What is not filled goes out of bounds, where it is dropped.
    slot_BR = start_B[:, None] + jnp.arange(filled_BR.shape[1], dtype=jnp.int32)
    slot_BR = jnp.where(filled_BR, slot_BR, pool.entries.shape[1])
    rows_B1 = jnp.arange(filled_BR.shape[0])[:, None]
    return [
        a.at[rows_B1, slot_BR].set(b, mode="drop", unique_indices=False)
        for a, b in zip(old, new, strict=True)
    ]


def kept_mask(pool: Pool, layer: int, tokens: int) -> Bool[Array, "B K T"]:
    """Which tokens each head of a layer holds."""
    pool = reshard_slots(pool, 1)
    start_B, end_B = pool.bounds(layer)
    slots_M = jnp.arange(pool.owners.shape[1])
    mine_BM = (slots_M >= start_B[:, None]) & (slots_M < end_B[:, None]) & (pool.owners >= 0)
    batch, kv_heads = pool.counts.shape[0], pool.counts.shape[2]
    mask_BKT = jnp.zeros((batch, kv_heads, tokens), bool)
    rows_B1 = jnp.arange(batch)[:, None]
    position_BM = jnp.where(mine_BM, pool.positions, tokens)
    owner_BM = jnp.maximum(pool.owners, 0).astype(jnp.int32)
    return mask_BKT.at[rows_B1, owner_BM, position_BM].set(True, mode="drop")
