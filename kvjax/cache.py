"""The cache: what is kept of the prompt (padded layout), and the tail of tokens since.

B batch, K KV heads, S slots of a layer, T slots of the tail, H head dim. All pytrees; state
goes in and comes out. Position is not slot: every entry carries its true position.

    layer:  slot   0   1   2   3   4          tail:  slot      0   1   2   3
            head 0 p0  p3  p7  p9  -1                row 0     p10 p11 -1  -1
            head 1 p0  p8  p9  -1  -1                row 1     p6  -1  p7  -1
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.pool import Pool, kept_mask
from kvjax.sharding import constrain

# PrefixKV (upstream's constant, from Elastic Cache): decoding evicts from this far before the
# end of the prompt's kept entries; what lies before stays for good.
FROZEN_POINT = 25


@no_type_check  # jax maps trees to other leaves than arrays
class PaddedLayer(struct.PyTreeNode):
    """One layer's kept entries. Survivors lie in slots [0, length) of each head, in order.

    Attributes:
      keys, values: `[B, K, S, H]`; keys after RoPE, zeros in empty slots.
      positions: `[B, K, S]` int32, the entry's position in the prompt; -1 in an empty slot.
    """

    keys: Float[Array, "B K S H"]
    values: Float[Array, "B K S H"]
    positions: Int[Array, "B K S"]

    @property
    def lengths(self) -> Int[Array, "B K"]:
        """Entries that each head holds."""
        return (self.positions >= 0).sum(-1, dtype=jnp.int32)

    def kept_mask(self, tokens: int) -> Bool[Array, "B K T"]:
        """Which tokens each head holds."""
        batch, kv_heads, _ = self.positions.shape
        place = jnp.where(self.positions >= 0, self.positions, tokens)
        rows, heads = jnp.arange(batch)[:, None, None], jnp.arange(kv_heads)[:, None]
        return (
            jnp.zeros((batch, kv_heads, tokens), bool).at[rows, heads, place].set(True, mode="drop")
        )


@no_type_check  # jax maps trees to other leaves than arrays
class Tail(struct.PyTreeNode):
    """Tokens since the prompt, every head alike: one cursor for all rows, holes at -1.

    Attributes:
      keys, values: one `[B, K, T, H]` a layer.
      positions: `[B, T]` int32, -1 for holes and for slots not written yet.
      cursor: int32, the next slot to be written.
      queries: one `[B, W, N, H]` a layer, the last W tokens' after RoPE: token number c of the
        tail has row c % W. Empty unless they are to be remembered (`remember`).
      query_positions: `[B, W]` theirs, -1 where there is none yet.
    """

    keys: tuple[Float[Array, "B K T H"], ...]
    values: tuple[Float[Array, "B K T H"], ...]
    positions: Int[Array, "B T"]
    cursor: Int[Array, ""]
    queries: tuple[Float[Array, "B W N H"], ...] = ()
    query_positions: Int[Array, "B W"] | None = None


@no_type_check  # jax maps trees to other leaves than arrays
class Cache(struct.PyTreeNode):
    """A prompt's compressed cache with its tail.

    Attributes:
      layers: kept entries in the padded layout, one a layer; constant while decoding.
      pool: kept entries in the packed layout, and `layers` is empty then.
      tail: tokens since.
      prompt_lengths: `[B]` tokens of the prompt before compression.
      next_positions: `[B]` position of the row's next token, whatever was evicted.
      keep_ratio: whether the retained ratio is held while the answer grows (PrefixKV).
      rotary_shift: `[B]` rotary minus true position of new tokens (M-RoPE), or None for 0.
      origin: fingerprint of the model that made it (`kvjax.origin`); None inside of programs, and
        for one's own model (`kvjax.compress`).
    """

    layers: tuple[PaddedLayer, ...]
    tail: Tail
    prompt_lengths: Int[Array, " B"]
    next_positions: Int[Array, " B"]
    pool: Pool | None = None
    keep_ratio: bool = struct.field(pytree_node=False, default=False)
    rotary_shift: Int[Array, " B"] | None = None
    origin: str | None = struct.field(pytree_node=False, default=None)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.prompt_lengths.shape[0]

    @property
    def shared(self) -> int:
        """Rows that hold one prompt's entries together; 1 where each has its own."""
        entries = self.pool.owners if self.pool is not None else self.layers[0].positions
        return self.batch // entries.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the prompt's keys and values occupy, empty slots included."""
        if self.pool is not None:
            return self.pool.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def counts(self) -> Int[Array, "B L K"]:
        """Entries that each row, layer and head holds; one row's where several share them."""
        if self.pool is not None:
            return self.pool.counts
        return jnp.stack([layer.lengths for layer in self.layers], axis=1)

    def kept_mask(self, tokens: int) -> Bool[Array, "B L K T"]:
        """Which of the prompt's first `tokens` tokens are held, by row as `counts`, layer, head."""
        if self.pool is not None:
            layers = range(self.pool.counts.shape[1])
            return jnp.stack([kept_mask(self.pool, layer, tokens) for layer in layers], axis=1)
        return jnp.stack([layer.kept_mask(tokens) for layer in self.layers], axis=1)

    def without_tail(self) -> "Cache":
        """The prompt's entries alone: no layer has a tail."""
        nothing = jnp.zeros((self.batch, 0), jnp.int32)
        return self.replace(tail=Tail((), (), nothing, jnp.zeros((), jnp.int32)))


def empty_tail(entries: tuple[PaddedLayer, ...] | Pool, slots: int) -> Tail:
    """A tail of `slots` empty slots that fits these entries."""
    if isinstance(entries, Pool):
        batch, layers, kv_heads = entries.counts.shape
        head_dim, dtype = entries.entries.shape[-1] // 2, entries.dtype or entries.entries.dtype
    else:
        batch, kv_heads, _, head_dim = entries[0].keys.shape
        layers, dtype = len(entries), entries[0].keys.dtype
    # Arrays of their own: a stream donates its tail.
    keys, values = (
        tuple(jnp.zeros((batch, kv_heads, slots, head_dim), dtype) for _ in range(layers))
        for _ in range(2)
    )
    return Tail(
        keys=keys,
        values=values,
        positions=jnp.full((batch, slots), -1, jnp.int32),
        cursor=jnp.zeros((), jnp.int32),
    )


def with_room(cache: Cache, slots: int) -> Cache:
    """The cache with a tail of at least `slots` slots; what the tail holds stays."""
    if slots <= cache.tail.positions.shape[1]:
        return cache
    return cache.replace(tail=resized(cache.tail, slots))


def remember(tail: Tail, queries: int, heads: int) -> Tail:
    """The tail with room for the last `queries` queries of `heads` query heads, none yet."""
    batch, _, _, head_dim = tail.keys[0].shape
    shape, dtype = (batch, queries, heads, head_dim), tail.keys[0].dtype
    return tail.replace(
        queries=tuple(jnp.zeros(shape, dtype) for _ in tail.keys),
        query_positions=jnp.full((batch, queries), -1, jnp.int32),
    )


def forget(tail: Tail) -> Tail:
    """The tail without the queries that it remembers."""
    return tail.replace(queries=(), query_positions=None)


def resized(tail: Tail, slots: int) -> Tail:
    """The tail with `slots` slots, at least as many as it has taken."""
    more = slots - tail.positions.shape[1]

    def resize(array: Array, axis: int, empty: int) -> Array:
        if more <= 0:
            return lax.slice_in_dim(array, 0, slots, axis=axis)
        widths = [(0, more if at == axis else 0) for at in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=empty)

    keys, values = (tuple(resize(x, 2, 0) for x in xs) for xs in (tail.keys, tail.values))
    return tail.replace(keys=keys, values=values, positions=resize(tail.positions, 1, -1))


def compact(tail: Tail) -> Tail:
    """The tail with each row's tokens side by side from slot 0 on: no more holes between them.

    It has taken as many slots as its longest row has tokens. No queries are remembered.
    """
    filled_BT = tail.positions >= 0
    order_BT = jnp.argsort(~filled_BT, axis=1, stable=True)

    def moved(x_BKTH: Array) -> Array:
        taken = jnp.take_along_axis(x_BKTH, order_BT[:, None, :, None], axis=2)
        return constrain(taken, "BKTH")

    return tail.replace(
        keys=tuple(map(moved, tail.keys)),
        values=tuple(map(moved, tail.values)),
        positions=jnp.take_along_axis(tail.positions, order_BT, axis=1),
        cursor=filled_BT.sum(1, dtype=jnp.int32).max(),
    )


def for_rows(cache: Cache, rows: int) -> Cache:
    """One row's cache for `rows` questions about the same prompt.

    The prompt's entries are held once, by all of them; each row has a tail of its own.

    Raises:
      ValueError: a cache of several rows, and another number of questions.
    """
    if cache.batch not in (1, rows):
        raise ValueError(f"the cache has {cache.batch} rows, expected 1 or the prompts' {rows}")
    if cache.batch == rows:
        return cache
    own = cache.replace(layers=(), pool=None)
    own = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0) if x.ndim else x, own)
    return own.replace(layers=cache.layers, pool=cache.pool)


def with_own_entries(cache: Cache) -> Cache:
    """The cache with entries for every row, where its rows hold one prompt's together."""
    if cache.shared == 1:
        return cache
    layers, pool = jax.tree.map(
        lambda x: jnp.repeat(x, cache.shared, axis=0), (cache.layers, cache.pool)
    )
    return cache.replace(layers=layers, pool=pool)


def full_layer(
    keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"], lengths: Int[Array, " B"]
) -> PaddedLayer:
    """Every entry of a prefilled layer, uncompressed."""
    batch, tokens, kv_heads, _ = keys.shape
    positions_T = jnp.arange(tokens, dtype=jnp.int32)
    positions_BT = jnp.where(positions_T < lengths[:, None], positions_T, -1)
    return PaddedLayer(
        keys=keys.transpose(0, 2, 1, 3),
        values=values.transpose(0, 2, 1, 3),
        positions=jnp.broadcast_to(positions_BT[:, None], (batch, kv_heads, tokens)),
    )


def pack(
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    keep: Bool[Array, "B K T"],
    slots: int,
) -> PaddedLayer:
    """Gather each head's kept entries, in position order, into `slots` slots.

    `slots` is at least the most that any head keeps.
    """
    batch, tokens, kv_heads, head_dim = keys.shape
    running_BKT = jnp.cumsum(keep, axis=-1, dtype=jnp.int32)
    wanted_S = jnp.arange(1, slots + 1, dtype=jnp.int32)
    find = jax.vmap(jax.vmap(lambda running: jnp.searchsorted(running, wanted_S)))
    found_BKS = find(running_BKT).astype(jnp.int32)
    filled_BKS = found_BKS < tokens
    # Rows are taken from [B, T * K, H] as it lies: no transposed copy of the prompt.
    row_BKS = jnp.minimum(found_BKS, tokens - 1) * kv_heads + jnp.arange(kv_heads)[:, None]

    def gather(array: Array) -> Array:
        rows = array.reshape(batch, tokens * kv_heads, head_dim)
        taken = jnp.take_along_axis(rows, row_BKS.reshape(batch, -1, 1), axis=1)
        return jnp.where(filled_BKS[..., None], taken.reshape(*row_BKS.shape, head_dim), 0)

    return PaddedLayer(
        keys=gather(keys), values=gather(values), positions=jnp.where(filled_BKS, found_BKS, -1)
    )


def write_positions(tail: Tail, positions: Int[Array, "B T"]) -> Tail:
    """Claim tail slots for a block of tokens (-1 for padding) and move the cursor past them."""
    claimed = lax.dynamic_update_slice(tail.positions, positions, (0, tail.cursor))
    tail = tail.replace(positions=claimed, cursor=tail.cursor + positions.shape[1])
    if tail.query_positions is None:
        return tail
    remembered = _put_last(tail, tail.query_positions, positions)
    return tail.replace(query_positions=remembered)


def _put_last(tail: Tail, remembered: Array, block: Array) -> Array:
    """A block of what the tail claimed last, in the rows of the tokens that it remembers."""
    count = min(block.shape[1], remembered.shape[1])
    rows = (tail.cursor - count + jnp.arange(count)) % remembered.shape[1]
    return remembered.at[:, rows].set(block[:, -count:])


def write_layer(
    tail: Tail,
    layer: int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    queries: Float[Array, "B T N H"] | None = None,
) -> Tail:
    """Write one layer's keys and values into the slots that `write_positions` claimed last.

    Queries go where the tail remembers them.
    """
    start = (0, 0, tail.cursor - keys.shape[1], 0)
    if tail.queries and queries is not None:
        last = _put_last(tail, tail.queries[layer], queries)
        tail = tail.replace(queries=(*tail.queries[:layer], last, *tail.queries[layer + 1 :]))

    def put(arrays: tuple[Array, ...], block: Array) -> tuple[Array, ...]:
        new = lax.dynamic_update_slice(arrays[layer], block.transpose(0, 2, 1, 3), start)
        new = constrain(new, "BKTH")
        return (*arrays[:layer], new, *arrays[layer + 1 :])

    return tail.replace(keys=put(tail.keys, keys), values=put(tail.values, values))
