"""PrefixKV's ratio: what goes of each head's entries so that it keeps its share as answers grow.

B batch, L layers, K KV heads, T new tokens, U slots of the tail, S slots of a padded layer, Y slots
of a packed one.
"""

from typing import no_type_check

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from kvjax import exact
from kvjax.cache.slot_layers import layer_slots
from kvjax.cache.slots import Slots
from kvjax.cache.tail import Tail
from kvjax.exact import floor_of_product
from kvjax.kernels.decode_attention import Evicted

# PrefixKV (upstream's constant, from Elastic Cache): decoding evicts from this far before the
# end of the prompt's kept entries; what lies before stays for good.
FROZEN_POINT = 25


# ---------------------------------------------------------------------------- as a mask
def evicted_ranges(
    kept: Int[Array, "B K"],
    prompt_lengths: Int[Array, " B"],
    positions: Int[Array, "B T"],
    window: int | None,
    tail: Tail,
    slots: int = 0,
) -> tuple[Evicted, Evicted]:
    """PrefixKV's eviction while decoding, in closed form (upstream's fixed-point elimination).

    Of a prompt of N tokens a head kept m. When a row has seen N + t tokens, its length is held at
    ratio m / N by removing floor(t (N - m) / N) entries, in position order, from the kept slot
    m - 25 on (m // 2 where m - 25 < 1): first the prompt's last survivors, then the oldest of the
    tail. A query at position p finds what was removed when p tokens had been seen. Of a
    sliding-window layer N is what it could still see, so that one that kept all of it loses none.

    Args:
      kept: m of each head.
      positions: the queries'.
      slots: of each head where the layout is padded.

    Returns:
      Which of a head's kept entries, and which of the tail's, each query no longer sees.
    """
    first_BK, last_BKT = evicted_range(kept, prompt_lengths, positions, window)
    last_BTK = last_BKT.swapaxes(1, 2)
    order_S = jnp.arange(slots, dtype=jnp.int32)[None, None]
    grown_BU = tail.positions - prompt_lengths[:, None]
    order_BKU = kept[..., None] + grown_BU[:, None]
    return Evicted(order_S, first_BK, last_BTK), Evicted(order_BKU, first_BK, last_BTK)


def evicted_range(
    kept: Int[Array, "B K"],
    prompt_lengths: Int[Array, " B"],
    positions: Int[Array, "B T"],
    window: int | None,
) -> tuple[Int[Array, "B K"], Int[Array, "B K T"]]:
    """First removed entry of each head, and for each query the first one after the removed."""
    prompt_B11 = prompt_lengths[:, None, None]
    grown_B1T = jnp.maximum(positions - prompt_lengths[:, None], 0)[:, None]
    offered_B11 = prompt_B11 if window is None else jnp.minimum(prompt_B11, max(window - 1, 1))
    removed_BKT = floor_of_product(grown_B1T, offered_B11 - kept[..., None], offered_B11)
    first_BK = jnp.where(kept > FROZEN_POINT, kept - FROZEN_POINT, kept // 2)
    return first_BK, first_BK[..., None] + removed_BKT


# ---------------------------------------------------------------------------- for good
@no_type_check  # jax maps trees to other leaves than arrays
class Ratio(struct.PyTreeNode):
    """What PrefixKV's rule needs to know of the prompt, `[B, L, K]` int32.

    Attributes:
      kept: entries that each head kept of the prompt.
      frozen: the first position that may be evicted; what lies before stays for good.
    """

    kept: Int[Array, "B L K"]
    frozen: Int[Array, "B L K"]


def ratio_of(slots: Slots, prompt_lengths: Int[Array, " B"]) -> Ratio:
    """The 25 last entries of each head may go, half of them where there are fewer."""
    kept_BLK = slots.counts
    may_go_BLK = jnp.where(kept_BLK > FROZEN_POINT, FROZEN_POINT, kept_BLK - kept_BLK // 2)
    frozen = []
    for index in range(kept_BLK.shape[1]):
        layer, may_go_BK = layer_slots(slots, index), may_go_BLK[:, index]
        rank_BKY = jnp.where(layer.owned, layer.positions[:, None] + 1, 0).astype(jnp.uint32)
        nth_BK = exact.kth_largest(rank_BKY, may_go_BK)
        position_BK = jnp.where(may_go_BK > 0, nth_BK, 1).astype(jnp.int32) - 1
        frozen.append(jnp.where(may_go_BK > 0, position_BK, prompt_lengths[:, None]))
    return Ratio(kept=kept_BLK, frozen=jnp.stack(frozen, axis=1))


def allowed(kept: Int[Array, "B ..."], lengths: Int[Array, " B"], grown) -> Int[Array, "B ..."]:
    """Entries of a head at the prompt's ratio, `grown` tokens after it (PrefixKV)."""
    lengths = lengths.reshape(-1, *(1,) * (kept.ndim - 1))
    grown = jnp.broadcast_to(jnp.asarray(grown, jnp.int32), kept.shape)
    return kept + grown - floor_of_product(grown, jnp.maximum(lengths - kept, 0), lengths)
