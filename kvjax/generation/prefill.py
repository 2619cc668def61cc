"""Prefill and compress a prompt, or read a question to a cache; from arrays to arrays.

B batch, T prompt tokens (the bucket), D model dim, V vocabulary. The model is an argument.
"""

import math
from collections.abc import Callable
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Float, Int, Key

from kvjax import sharding
from kvjax.cache.state import Cache
from kvjax.compression.compress import Packing, add_layer, finish, make_plan, probe_request
from kvjax.compression.kvzip import reconstruction_scores
from kvjax.compression.row_budgets import make_rows
from kvjax.config import CompressionConfig
from kvjax.model_interface import (
    NO_IMAGES,
    ImageFeatures,
    Images,
    Model,
    Probe,
    ProbeRequest,
    encode_images,
)

Lengths = Int[Array, " B"] | Int[np.ndarray, " B"]
# A question or a scored text longer than this runs against the cache in several blocks, so that
# its scores never span the whole of it.
BLOCK = 128
# Rows of a batch with more tokens than this are prefilled and compressed in groups, one after the
# other, so that a large batch needs no more memory on the way than one of its groups.
PREFILL_TOKENS = 16_384


@no_type_check  # jax maps trees to other leaves than arrays
class Prefilled(struct.PyTreeNode):
    """Prompts that were read and not compressed: one array or probe a layer.

    Attributes:
      logits: after each prompt.
      keys, values: after RoPE, `[B, T, K, H]` each.
      probes: what was asked for.
      lengths: real tokens of each prompt.
      rotary_shift, rope_length: as of `Cache`.
    """

    logits: Float[Array, "B V"]
    keys: tuple[Float[Array, "B T K H"], ...]
    values: tuple[Float[Array, "B T K H"], ...]
    probes: tuple[Probe, ...]
    lengths: Int[Array, " B"]
    rotary_shift: Int[Array, " B"] | None = None
    rope_length: Int[Array, " B"] | None = None


def prefill(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    request: ProbeRequest,
    features: ImageFeatures = NO_IMAGES,
) -> Prefilled:
    """Read prompts, and leave of every layer what any scorer that `request` serves looks at."""
    features = _turned(model, lengths, features)
    x_BTD = features.put(model.embed(tokens))
    layers = []
    for layer in model.layers:
        x_BTD, *kept = layer.prefill(x_BTD, lengths, request, features.rotary)
        layers.append(kept)
    keys, values, probes = zip(*layers, strict=True)
    if request.repeat is not None:
        scores = reconstruction_scores(
            model, tokens, lengths, keys, values, request.repeat, features
        )
        probes = tuple(p.replace(reconstruction=s) for p, s in zip(probes, scores, strict=True))
    logits = last_logits(model, x_BTD, lengths)
    turned = features.shift, features.rope_length
    return Prefilled(logits, keys, values, probes, lengths, *turned)


def prefill_in_groups(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    request: ProbeRequest,
    images: Images | None = None,
    rope_length: Int[Array, " B"] | None = None,
) -> Prefilled:
    """`prefill` of a batch, in groups of rows where it is large; arguments as there."""
    features = encode_images(model, images).turned_for(rope_length)

    def read(tokens, lengths, features, _):
        return prefill(model, tokens, lengths, request, features)

    return _in_groups(read, model, tokens, lengths, features, None)


def compress_prefilled(
    prompts: Prefilled,
    windows: tuple[int | None, ...],
    key: Key[Array, "*row"],
    config: CompressionConfig,
    budgets: Int[Array, " B"] | None = None,
) -> Cache:
    """What `config` keeps of prompts; the tail has no slots.

    Args:
      prompts: prefilled with at least what `probe_request(config, tokens)` asks for.
      windows: each layer's sliding window.
      key: of the `random` scorer.
      config: what is kept.
      budgets: see `make_rows`.
    """
    rows = make_rows(config, prompts.lengths, budgets)
    plan = make_plan(config, prompts.lengths, prompts.keys[0].shape[1], windows, key, rows)
    kept = Packing()
    layers = zip(prompts.keys, prompts.values, prompts.probes, strict=True)
    for index, layer in enumerate(layers):
        kept = add_layer(kept, index, *layer, plan)
    return _turning(finish(kept, plan), prompts)


def _turning(cache: Cache, prompts: Prefilled | ImageFeatures) -> Cache:
    """The cache, which knows how the rotary embedding turns what follows its prompts."""
    shift = prompts.rotary_shift if isinstance(prompts, Prefilled) else prompts.shift
    return cache.replace(rotary_shift=shift, rope_length=prompts.rope_length)


def rope_lengths(
    model: Model, lengths: Lengths, more: Lengths | int = 0
) -> Int[Array, " B"] | None:
    """Tokens that each row's rotary frequencies are chosen for: its own, and `more` to come.

    None where the model's frequencies are the same for every length.
    """
    return jnp.asarray(lengths + more) if model.config.rope_by_length else None


def _turned(model: Model, lengths, features: ImageFeatures) -> ImageFeatures:
    """Features that say what each row's frequencies are chosen for: its prompt, by default."""
    if features.rope_length is not None:
        return features
    return features.turned_for(rope_lengths(model, lengths))


def prefill_compress(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    config: CompressionConfig,
    images: Images | None = None,
    rope_length: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Prefill and compress a batch of prompts, in groups of rows where it is large.

    The logits, and so the first token, come from the uncompressed prompt. The tail has no slots.

    Args:
      model: the decoder.
      tokens: prompts padded on the right.
      lengths: their real tokens.
      key: of the `random` scorer, one for all rows or one a row.
      config: what is kept.
      images: of all rows, encoded by the model's tower before any row is prefilled.
      rope_length: from `rope_lengths`; without it a row's frequencies are chosen for its prompt.
    """
    features = encode_images(model, images).turned_for(rope_length)

    def read(tokens, lengths, features, key):
        return prefill_compress_at_once(model, tokens, lengths, key, config, features)

    return _in_groups(read, model, tokens, lengths, features, key)


def _in_groups(
    read: Callable[..., Any],
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    features: ImageFeatures,
    key: Key[Array, "*row"] | None,
) -> Any:
    """`read(tokens, lengths, features, key)` of all rows, PREFILL_TOKENS or fewer at once."""
    features = _turned(model, lengths, features)
    batch, width = tokens.shape
    shards = math.gcd(batch, sharding.parts((sharding.DATA,)))
    groups = _groups(batch // shards, width)
    tokens, lengths = sharding.constrain(tokens, "BT"), sharding.constrain(lengths, "B")
    if groups == 1:
        return read(tokens, lengths, features, key)
    own_keys = key is not None and key.ndim

    def one(group):
        tokens, lengths, places, rotary, own = group
        mine = features.replace(places=places, rotary=rotary)
        return read(tokens, lengths, mine, own if own_keys else key)

    per_row = (tokens, lengths, features.places, features.rotary, key if own_keys else None)

    def deal(x: Array) -> Array:
        if shards == 1:
            return x.reshape(groups, batch // groups, *x.shape[1:])
        # Every group has rows of each device of the data axis.
        return x.reshape(batch // groups, groups, *x.shape[1:]).swapaxes(0, 1)

    def collect(x: Array) -> Array:
        if x.ndim <= 1:  # everything has a row's axis, but for the cursor of the tail
            return x[0]
        x = x if shards == 1 else x.swapaxes(0, 1)
        return x.reshape(batch, *x.shape[2:])

    return jax.tree.map(collect, lax.map(one, jax.tree.map(deal, per_row)))


def _groups(batch: int, tokens: int) -> int:
    """Fewest equal groups of rows with at most PREFILL_TOKENS tokens each, or of one row."""
    fit = max(1, PREFILL_TOKENS // tokens)
    return next(
        count for count in range(1, batch + 1) if batch % count == 0 and batch // count <= fit
    )


def prefill_compress_at_once(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    config: CompressionConfig,
    features: ImageFeatures = NO_IMAGES,
    budgets: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """`prefill_compress` of all rows together, layer by layer.

    A layer is packed before the next one runs, if it can be scored then. `budgets` are of
    `make_rows`; `features` say what a row's frequencies are chosen for where the model asks.
    """
    windows = model.config.sliding_windows
    request = probe_request(config, tokens.shape[1])
    if request.repeat is not None:
        prompts = prefill(model, tokens, lengths, request, features)
        return prompts.logits, compress_prefilled(prompts, windows, key, config, budgets)
    rows = make_rows(config, lengths, budgets)
    plan = make_plan(config, lengths, tokens.shape[1], windows, key, rows)
    kept = Packing()
    x_BTD = features.put(model.embed(tokens))
    for index, layer in enumerate(model.layers):
        x_BTD, keys, values, probe = layer.prefill(x_BTD, lengths, request, features.rotary)
        kept = add_layer(kept, index, keys, values, probe, plan)
        # Without the barrier XLA may keep every layer's keys and values alive to the end.
        x_BTD, kept = lax.optimization_barrier((x_BTD, kept))
    cache = _turning(finish(kept, plan), features)
    return last_logits(model, x_BTD, lengths), cache


def last_logits(
    model: Model, x_BTD: Float[Array, "B T D"], lengths: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits after the last real token of each row, and of no other."""
    last_B11 = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])


def extend_prompt(
    model: Model, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """A question after a compressed prompt, block by block; logits after each row's last token.

    Blocks are of one size, the largest divisor of T up to BLOCK (a bucket of `prompts.bucket` has
    one above BLOCK / 2), and run in a loop whose constant the kept entries are: a long question
    compiles as fast as a short one. The cache has room for T tokens.
    """
    size = _question_block(tokens.shape[1])
    if size == tokens.shape[1]:
        x_BTD, cache = model.extend(tokens, lengths, cache)
        return last_logits(model, x_BTD, lengths), cache
    last_B = jnp.maximum(lengths - 1, 0)

    def block(state, start):
        tail, next_positions, found_BD = state
        now = cache.replace(tail=tail, next_positions=next_positions)
        block_BC = lax.dynamic_slice_in_dim(tokens, start, size, axis=1)
        x_BCD, now = model.extend(block_BC, jnp.clip(lengths - start, 0, size), now)
        at_B = last_B - start
        near_B11 = jnp.clip(at_B, 0, size - 1)[:, None, None]
        mine_BD = jnp.take_along_axis(x_BCD, near_B11, axis=1)[:, 0]
        here_B1 = ((at_B >= 0) & (at_B < size))[:, None]
        found_BD = jnp.where(here_B1, mine_BD, found_BD)
        return (now.tail, now.next_positions, found_BD), None

    nothing_BD = jnp.zeros_like(model.embed(tokens[:, :1])[:, 0])
    starts = jnp.arange(0, tokens.shape[1], size, dtype=jnp.int32)
    (tail, next_positions, x_BD), _ = lax.scan(
        block, (cache.tail, cache.next_positions, nothing_BD), starts
    )
    return model.logits(x_BD), cache.replace(tail=tail, next_positions=next_positions)


def _question_block(tokens: int) -> int:
    return max(size for size in range(1, BLOCK + 1) if tokens % size == 0)
