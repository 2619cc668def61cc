"""Measure the decode step on caches of a given shape, without a prefill.

A step reads every weight and every held entry once, so it is bound by memory: its limit is (weights
+ held bytes) / bandwidth. Entries are random; how many each head owns is even, or skewed as Ada-KV
would make it (each head half as many as the one before).

B batch, L layers, K KV heads, M slots, H head dim.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvjax.bench.timing import Timing, timed
from kvjax.cache.attend import attend
from kvjax.cache.padded import PaddedLayer
from kvjax.cache.slots import Slots, empty_slots, page_size
from kvjax.cache.state import Cache
from kvjax.cache.tail import empty_tail
from kvjax.compression.capacity import capacity, packs, pool_shape
from kvjax.config import CompressionConfig
from kvjax.generation import decode
from kvjax.models.config import ModelConfig
from kvjax.models.decoder import Decoder

OWNERS = ("even", "skewed")


def synthetic_cache(
    model: ModelConfig,
    config: CompressionConfig,
    *,
    batch: int,
    prompt: int,
    new: int,
    dtype: Any,
    owners: str = "even",
) -> Cache:
    """The cache that `config` makes of `batch` prompts of this length, with random entries."""
    windows, base = model.sliding_windows, config.budget
    if config.skips(prompt):
        entries: Any = [(prompt, prompt)] * len(windows)
    elif packs(config):
        slots = _slots(model, config, batch, prompt, dtype, owners)
        return _cache((), slots, batch, prompt, new)
    else:
        sizes = [
            capacity(config, prompt, i, windows, model.num_kv_heads) for i in range(len(windows))
        ]
        entries = [(size, min(int(base or 0), size)) for size in sizes]
    layers = []
    for index, (slots, filled) in enumerate(entries):
        shape = (batch, model.num_kv_heads, slots, model.head_dim)
        keys = jax.random.split(jax.random.key(index))
        slot_S = jnp.arange(slots, dtype=jnp.int32)
        positions = jnp.broadcast_to(jnp.where(slot_S < filled, slot_S, -1), shape[:3])
        k_BKSH, v_BKSH = (jax.random.normal(key, shape, dtype) for key in keys)
        layers.append(PaddedLayer(keys=k_BKSH, values=v_BKSH, positions=positions))
    return _cache(tuple(layers), None, batch, prompt, new)


def _slots(model, config, batch, prompt, dtype, owners) -> Slots:
    kv_heads, layers, page = model.num_kv_heads, model.num_layers, page_size()
    wanted, runs = pool_shape(config, prompt, model.sliding_windows, kv_heads)
    like = jnp.zeros((batch, 1, kv_heads, model.head_dim), dtype)
    slots = empty_slots(like, layers, wanted, runs, page=page, quantize=config.quantize is not None)
    each, total = wanted // layers, slots.size
    pages = -(-each // page)
    counts_LK = np.stack([_shares(each, kv_heads, owners)] * layers)
    owner_M, place_M = np.full(total, -1), np.full(total, -1)
    for layer, counts in enumerate(counts_LK):
        first = layer * pages * page
        owner_M[first : first + each] = np.repeat(np.arange(kv_heads), counts)
        place_M[first : first + each] = np.concatenate([np.arange(count) for count in counts])
    shape = (batch, total)
    key, drawn = jax.random.key(0), slots.entries.shape
    scales = slots.scales
    if scales is not None:
        entries = jax.random.randint(key, drawn, -127, 128, jnp.int8)
        scales = jnp.full(scales.shape, 1 / 127, jnp.float32)
    else:
        entries = jax.random.normal(key, drawn, dtype)
    return slots.replace(
        entries=entries,
        scales=scales,
        owners=jnp.broadcast_to(jnp.asarray(owner_M, jnp.int8), shape),
        positions=jnp.broadcast_to(
            jnp.asarray(np.where(place_M < 0, -1, place_M % prompt), jnp.int32), shape
        ),
        counts=jnp.broadcast_to(jnp.asarray(counts_LK, jnp.int32), (batch, *counts_LK.shape)),
    )


def _shares(total: int, heads: int, owners: str) -> np.ndarray:
    weights = np.ones(heads) if owners == "even" else 0.5 ** np.arange(heads)
    counts = np.floor(total * weights / weights.sum()).astype(int)
    counts[0] += total - counts.sum()
    return counts


def _cache(layers, slots, batch: int, prompt: int, new: int) -> Cache:
    lengths = jnp.full((batch,), prompt, jnp.int32)
    tail = empty_tail(slots or layers, new)
    return Cache(
        layers=layers, slots=slots, tail=tail, prompt_lengths=lengths, next_positions=lengths
    )


def decode_step(model: Decoder, cache: Cache, new: int, repeats: int) -> Timing:
    """Seconds of one step, the mean over new - 1 of them in one loop."""
    run, arrays = decode_loop(model, cache, new)
    return timed(run, *arrays, repeats=repeats, per=new - 1)[0]


def decode_loop(model: Decoder, cache: Cache, new: int) -> tuple[Callable, tuple[Any, ...]]:
    """What runs new - 1 steps of every row in one loop, and its arguments."""
    batch, vocab = cache.batch, model.config.vocab_size
    if model.config.rope_by_length:
        cache = cache.replace(rope_length=cache.prompt_lengths + new)
    rules = decode.greedy_rules()
    tokens, lengths = jnp.zeros((batch, 1), jnp.int32), jnp.ones((batch,), jnp.int32)
    logits = jnp.zeros((batch, vocab), jnp.float32)
    answer = decode.start_answer(logits, tokens, lengths, jax.random.key(0), rules, new)
    return partial(decode.decode, steps=new - 1), (model, cache, answer, rules)


def attention(model: ModelConfig, cache: Cache, repeats: int, dtype: Any, loops: int = 8) -> Timing:
    """Seconds of all layers' attention for one new token, each fed by the one before."""

    def run(q_B1NH, cache):
        positions_B1 = cache.next_positions[:, None]

        def once(_, q):
            for layer, window in enumerate(model.sliding_windows):
                q = q + attend(q, positions_B1, cache, layer, window)
            return q

        return jax.lax.fori_loop(0, loops, once, q_B1NH)

    shape = (cache.batch, 1, model.num_heads, model.head_dim)
    q_B1NH = jax.random.normal(jax.random.key(1), shape, dtype)
    return timed(run, q_B1NH, cache, repeats=repeats, per=loops)[0]


def held_bytes(cache: Cache) -> int:
    """What a step reads of the cache: entries, owners, positions, the tail."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
