"""The cache: what is kept of the prompt, in either layout, and the tail of tokens since.

B batch, L layers, K KV heads, T tokens. All pytrees; state goes in and comes out.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from kvjax.cache.history import History
from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slot_layers import kept_mask
from kvjax.cache.slot_moves import reshard_slots
from kvjax.cache.slots import Slots
from kvjax.cache.tail import Tail, resized
from kvjax.sharding import parts


@no_type_check  # jax maps trees to other leaves than arrays
class Cache(struct.PyTreeNode):
    """A prompt's compressed cache with its tail.

    Attributes:
      layers: kept entries in the padded layout, one a layer; constant while decoding.
      slots: kept entries in the packed layout, and `layers` is empty then.
      tail: tokens since.
      prompt_lengths: `[B]` tokens of the prompt before compression.
      next_positions: `[B]` position of the row's next token, whatever was evicted.
      keep_ratio: whether the retained ratio is held while the answer grows (PrefixKV).
      rotary_shift: `[B]` rotary minus true position of new tokens (M-RoPE), or None for 0.
      rope_length: `[B]` tokens that each row's rotary frequencies were chosen for, where the model
        scales them by length (dynamic NTK, LongRoPE); None elsewhere. They stay as they are,
        whatever is asked later.
      origin: fingerprint of the model that made it (`kvjax.cache.origin`); None inside of programs,
        and for one's own model (`kvjax.compress`).
      history: what each row has read (`kvjax.cache.history`), or all rows; None where `origin` is.
    """

    layers: tuple[PaddedLayer, ...]
    tail: Tail
    prompt_lengths: Int[Array, " B"]
    next_positions: Int[Array, " B"]
    slots: Slots | None = None
    keep_ratio: bool = struct.field(pytree_node=False, default=False)
    rotary_shift: Int[Array, " B"] | None = None
    rope_length: Int[Array, " B"] | None = None
    origin: str | None = struct.field(pytree_node=False, default=None)
    history: tuple[History, ...] | None = struct.field(pytree_node=False, default=None)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.prompt_lengths.shape[0]

    @property
    def shared(self) -> int:
        """Rows that hold one prompt's entries together; 1 where each has its own."""
        held = self.slots.counts if self.slots is not None else self.layers[0].positions
        return self.batch // held.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the prompt's keys and values occupy, empty slots included."""
        if self.slots is not None:
            return self.slots.nbytes
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def counts(self) -> Int[Array, "B L K"]:
        """Entries that each row, layer and head holds; one row's where several share them."""
        if self.slots is not None:
            return self.slots.counts
        return jnp.stack([layer.lengths for layer in self.layers], axis=1)

    def kept_mask(self, tokens: int) -> Bool[Array, "B L K T"]:
        """Which of the prompt's first `tokens` tokens are held, by row as `counts`, layer, head."""
        if self.slots is not None:
            layers = range(self.slots.counts.shape[1])
            return jnp.stack([kept_mask(self.slots, layer, tokens) for layer in layers], axis=1)
        return jnp.stack([layer.kept_mask(tokens) for layer in self.layers], axis=1)

    def without_tail(self) -> "Cache":
        """The prompt's entries alone: no layer has a tail."""
        nothing = jnp.zeros((self.batch, 0), jnp.int32)
        return self.replace(tail=Tail((), (), nothing, jnp.zeros((), jnp.int32)))


def with_room(cache: Cache, slots: int) -> Cache:
    """The cache with a tail of at least `slots` slots; what the tail holds stays."""
    if slots <= cache.tail.positions.shape[1]:
        return cache
    return cache.replace(tail=resized(cache.tail, slots))


def reshard(cache: Cache) -> Cache:
    """The cache as the mesh in use needs it: its slots dealt out to that many devices."""
    if cache.slots is None:
        return cache
    return cache.replace(slots=reshard_slots(cache.slots, parts()))


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
    own = cache.replace(layers=(), slots=None)
    own = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0) if x.ndim else x, own)
    return own.replace(layers=cache.layers, slots=cache.slots)


def with_own_entries(cache: Cache) -> Cache:
    """The cache with entries for every row, where its rows hold one prompt's together."""
    if cache.shared == 1:
        return cache
    layers, slots = jax.tree.map(
        lambda x: jnp.repeat(x, cache.shared, axis=0), (cache.layers, cache.slots)
    )
    return cache.replace(layers=layers, slots=slots)
