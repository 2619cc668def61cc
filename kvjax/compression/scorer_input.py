"""What a scorer sees of one layer: of a prompt, or of a cache while an answer is decoded.

Where a scorer goes by keys alone it is written once, for keys that lie in either way.

B batch, T prompt tokens, N query heads, K KV heads, H head dim, R vectors of a head, W queries;
of a cache Y slots of a layer, U slots of the tail, S = Y + U.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.compression.row_budgets import Rows, eligible
from kvjax.methods import Settings
from kvjax.model_interface import Probe


def unit(x: Float[Array, "*shape H"]) -> Float[Array, "*shape H"]:
    """The same direction in fp32, of length 1; 0 stays 0."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def norms(x: Float[Array, "B T K H"]) -> Float[Array, "B K T"]:
    """Lengths of a prompt's keys or values, in fp32."""
    return jnp.linalg.norm(x.astype(jnp.float32), axis=-1).swapaxes(1, 2)


class PromptKeys(NamedTuple):
    """Every head's keys of a prompt, token by token."""

    keys: Float[Array, "B T K H"]

    def units(self) -> "PromptKeys":
        """Their directions."""
        return PromptKeys(unit(self.keys))

    def norms(self) -> Float[Array, "B K T"]:
        """Their lengths."""
        return norms(self.keys)

    def total(self, where: Bool[Array, " B #K T"]) -> Float[Array, "B K H"]:
        """Each head's sum over the tokens where this holds, in fp32."""
        mine_BTK1 = where.swapaxes(1, 2)[..., None]
        return jnp.where(mine_BTK1, self.keys.astype(jnp.float32), 0).sum(1)

    def dot(self, x: Float[Array, "B K R H"]) -> Float[Array, "B K R T"]:
        """Products with vectors of each head, in fp32."""
        products = "BKRH,BTKH->BKRT"
        return jnp.einsum(products, x, self.keys, preferred_element_type=jnp.float32)


class HeldKeys(NamedTuple):
    """Keys in a cache: those of the slots, which have owners, and each head's in the tail.

    Attributes:
      slots: keys in slots, 0 in empty ones; int8 to be multiplied with `scales`.
      owned: by which head.
      tail: of the tokens since.
      scales: of int8 keys, else None.
    """

    slots: Array
    owned: Bool[Array, "B K Y"]
    tail: Float[Array, "B K U H"]
    scales: Float[Array, "B Y"] | None = None

    def units(self) -> "HeldKeys":
        """Their directions; a scale has none."""
        slots = unit(self.slots.astype(jnp.float32))
        return self._replace(slots=slots, tail=unit(self.tail), scales=None)

    def norms(self) -> Float[Array, "B K S"]:
        """Their lengths, a slot's for every head."""
        slots_BY, tail_BKU = (
            jnp.linalg.norm(x.astype(jnp.float32), axis=-1) for x in (self.slots, self.tail)
        )
        if self.scales is not None:
            slots_BY = slots_BY * self.scales
        slots_BKY = jnp.broadcast_to(slots_BY[:, None], self.owned.shape)
        return jnp.concatenate([slots_BKY, tail_BKU], axis=-1)

    def total(self, where: Bool[Array, "B K S"]) -> Float[Array, "B K H"]:
        """Each head's sum over its entries where this holds, in fp32."""
        slots = self.owned.shape[-1]
        mine_BKY = (where[..., :slots] & self.owned).astype(jnp.float32)
        if self.scales is not None:
            mine_BKY = mine_BKY * self.scales[:, None]
        total_BKH = jnp.einsum("BKY,BYH->BKH", mine_BKY, self.slots.astype(jnp.float32))
        mine_BKU1 = where[..., slots:, None]
        return total_BKH + jnp.where(mine_BKU1, self.tail.astype(jnp.float32), 0).sum(2)

    def dot(self, x: Float[Array, "B K R H"]) -> Float[Array, "B K R S"]:
        """Products with vectors of each head, in fp32; what others own is multiplied too."""
        wide = {"preferred_element_type": jnp.float32}
        slots_BKRY = jnp.einsum("BKRH,BYH->BKRY", x, self.slots.astype(x.dtype), **wide)
        if self.scales is not None:
            slots_BKRY = slots_BKRY * self.scales[:, None, None]
        tail_BKRU = jnp.einsum("BKRH,BKUH->BKRU", x, self.tail, **wide)
        return jnp.concatenate([slots_BKRY, tail_BKRU], axis=-1)


class ScorerInput(NamedTuple):
    """One layer of a prompt, as its scorer sees it.

    Attributes:
      probe: what attention left.
      keys, values: the layer's; keys after RoPE.
      rows: each row's budget.
      config: the settings.
      key: random key, for "random": one for all rows, or `[B]`.
      window: width of a sliding-window layer, or None.
    """

    probe: Probe
    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K H"]
    rows: Rows
    config: Settings
    key: Key[Array, "*row"]
    window: int | None

    @property
    def held_keys(self) -> PromptKeys:
        """The keys, to be summed and multiplied."""
        return PromptKeys(self.keys)

    @property
    def can(self) -> Bool[Array, "B 1 T"]:
        """Which entries a later token can see."""
        return eligible(self.rows, self.keys.shape[1], self.window)[:, None]

    @property
    def real(self) -> Bool[Array, "B 1 T"]:
        """Which tokens are not padding."""
        return (jnp.arange(self.keys.shape[1]) < self.rows.lengths[:, None])[:, None]

    def read(self, name: str) -> Array:
        """What the probe holds under `name`; ValueError where it holds nothing."""
        found = getattr(self.probe, name)
        if found is None:
            scorer = self.config.scorer
            raise ValueError(f"probe.{name} is None, expected {name} for scorer={scorer!r}")
        return found


class HeldInput(NamedTuple):
    """One layer of a cache, slots and then the tail, as its scorer sees it while decoding.

    Attributes:
      held_keys: the keys.
      filled: which entries each head has.
      can: those of them that a later token can see.
      positions: of the entries.
      queries: the last ones, where the scorer scores by them; their positions, -1 for none.
      window: width of a sliding-window layer, or None.
      sums: squared probabilities that the entries have received, where the scorer reads them.
    """

    held_keys: HeldKeys
    filled: Bool[Array, "B K S"]
    can: Bool[Array, "B K S"]
    positions: Int[Array, "B S"]
    queries: Float[Array, "B W N H"] | None
    query_positions: Int[Array, "B W"] | None
    window: int | None
    sums: Float[Array, "B K S"] | None = None
