"""A prompt's cache with an answer in its tail, to be compressed again, and what it holds."""

import jax
import jax.numpy as jnp
import numpy as np
from synthetic import probe_of

import kvjax
from kvjax import CompressionConfig
from kvjax.cache.slots import first_page
from kvjax.cache.state import with_room
from kvjax.compression.room import add_pages

B, T, U, LAYERS, N, K, H = 2, 40, 8, 2, 4, 2, 8
LENGTHS = np.array([40, 29], np.int32)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def prompt_cache(
    method="ada-snapkv", budget=10, layout="packed", sliding=None, lengths=LENGTHS, **changes
):
    keys, values = ([normal(seed + i, B, T, K, H) for i in range(LAYERS)] for seed in (10, 20))
    config = CompressionConfig.named(method, budget, layout=layout, **changes)
    probes = jax.tree.map(jnp.asarray, [probe_of(30 + i, B, T, N, K, H, T) for i in range(LAYERS)])
    windows = [sliding] * LAYERS
    return kvjax.compress(
        keys, values, probes, config, lengths=jnp.asarray(lengths), windows=windows
    )


def with_answer(cache, rule, tokens=U, seed=40):
    """The cache with room and `tokens` more in its tail, all but one in the second row."""
    cache, ratio = add_pages(with_room(cache, tokens), rule, N, tokens, 0.5)
    new = np.broadcast_to(np.arange(tokens), (B, tokens)) + LENGTHS[:, None]
    new = np.array(new)
    new[1] = np.where(np.arange(tokens) == tokens - 1, -1, new[1])
    tail = cache.tail
    shape = B, K, tokens, H
    tail = tail.replace(
        keys=tuple(normal(seed + i, *shape) for i in range(LAYERS)),
        values=tuple(normal(seed + 5 + i, *shape) for i in range(LAYERS)),
        positions=jnp.asarray(new),
        cursor=jnp.asarray(tokens),
    )
    if rule.queries:
        at = new[:, -rule.queries :]
        queries = [normal(seed + 9 + i, B, rule.queries, N, H) for i in range(LAYERS)]
        tail = tail.replace(queries=tuple(queries), query_positions=jnp.asarray(at))
    following = jnp.asarray(LENGTHS + np.array([tokens, tokens - 1]))
    return cache.replace(tail=tail, next_positions=following), ratio


def entries(cache, layer: int, row: int, tail: bool) -> dict:
    """(head, position) -> key and value, of the pool and, if asked, of the tail."""
    pool, found = cache.slots, {}
    for number in range(int(pool.lengths[row, layer])):
        index, offset = divmod(number, pool.page)
        if pool.table is None:
            page = first_page(pool, layer)[row] + index
        else:
            page = pool.table[row, layer, index]
        slot = int(page) * pool.page + offset
        if (owner := int(pool.owners[row, slot])) >= 0:
            place = owner, int(pool.positions[row, slot])
            assert place not in found
            found[place] = np.asarray(pool.entries[row, slot], np.float64)
    if tail:
        for slot, position in enumerate(np.asarray(cache.tail.positions[row])):
            for head in range(K) if position >= 0 else ():
                both = cache.tail.keys[layer], cache.tail.values[layer]
                halves = [np.asarray(x[row, head, slot], np.float64) for x in both]
                found[head, int(position)] = np.concatenate(halves)
    return found
