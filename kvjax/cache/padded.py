"""The padded layout: equally many slots for every head of a layer, filled from the first on.

    slot     0   1   2   3   4        Position is not slot: every entry carries its true position
    head 0   p0  p3  p7  p9  -1       in the prompt.
    head 1   p0  p8  p9  -1  -1

B batch, K KV heads, S slots of a layer, T prompt tokens, H head dim.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int


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
