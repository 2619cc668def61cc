"""Decode with a model of your own against a compressed cache: claim slots, append, attend.

    cache = kvjax.compress(keys, values, probes, config, tail_slots=64)   # after one's own prefill
    cache = kvjax.claim(cache, 1)                                         # then, for each new token
    for layer, block in enumerate(my_layers):
        q, k, v = block.project(x, kvjax.claimed_positions(cache, 1))     # RoPE at these positions
        cache = kvjax.append(cache, layer, k, v)
        x = block.output(x, kvjax.decode_attention(q, cache, layer))

B batch, T new tokens, N query heads, K KV heads, H head dim.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvjax.cache.attend import attend
from kvjax.cache.state import Cache
from kvjax.cache.tail import write_layer, write_positions
from kvjax.exact import always_32_bits


@always_32_bits
def claim(cache: Cache, tokens: int) -> Cache:
    """Take the next slots of the tail for `tokens` new tokens of every row. Jittable.

    Raises:
      ValueError: the tail has fewer slots than that (`tail_slots` of `compress`); the slots that
        are taken already count only while running, where too many overwrite the last ones.
    """
    room = cache.tail.positions.shape[1]
    if not 1 <= tokens <= room:
        raise ValueError(f"tokens={tokens}, expected 1 to the tail's {room} slots")
    positions_BT = cache.next_positions[:, None] + jnp.arange(tokens, dtype=jnp.int32)
    return cache.replace(
        tail=write_positions(cache.tail, positions_BT), next_positions=cache.next_positions + tokens
    )


@always_32_bits
def claimed_positions(cache: Cache, tokens: int) -> Int[Array, "B T"]:
    """True positions of the `tokens` tokens claimed last: what RoPE takes for them."""
    return cache.next_positions[:, None] - tokens + jnp.arange(tokens, dtype=jnp.int32)


@always_32_bits
def append(
    cache: Cache, layer: int, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"]
) -> Cache:
    """Write the claimed tokens' keys (after RoPE) and values of one layer."""
    return cache.replace(tail=write_layer(cache.tail, layer, keys, values))


@always_32_bits
def decode_attention(
    q: Float[Array, "B T N H"], cache: Cache, layer: int = 0, *, window: int | None = None
) -> Float[Array, "B T N H"]:
    """Attend the tokens claimed last to what is left of the prompt, and to the tail.

    Args:
      q: their queries after RoPE; K divides N.
      cache: with their keys and values appended.
      layer: of the model, 0..L - 1.
      window: of a sliding-window layer: a query at p sees positions p - window + 1 .. p.
    """
    return attend(q, claimed_positions(cache, q.shape[1]), cache, layer, window)
