"""Measure allocators alone: how long they take to divide a budget, beside sorting the scores.

Scores are drawn, heavy-tailed and positive, and heads differ in scale, so that Ada-KV and
KV-Compress give them unlike sizes. Ada-KV (without a floor) is measured three times: by bisection,
as kvjax does it, and by two ways of sorting, whose sizes must be the same.

B batch, L layers, K KV heads, S tokens.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvjax import exact
from kvjax.bench.timing import timed
from kvjax.compression import allocators
from kvjax.models.config import ModelConfig

FLOOR = 0.2  # as `CompressionConfig` has it


def measure(
    model: ModelConfig, *, budget: int, batch: int, prompt: int, repeats: int
) -> list[dict[str, Any]]:
    """One row an allocator, and one for the choice of entries that follows all of them.

    Args:
      model: of which only the numbers of layers and KV heads matter.
      budget: entries a KV head, at most the prompt.
      batch, prompt: of every layer's scores, `[B, K, S]`.
      repeats: timed runs.

    Returns:
      Seconds (of a layer and of all), bytes of temporaries and results by the compiler's account,
      and the entries given away.

    Raises:
      RuntimeError: sorting came to other sizes than bisection.
    """
    layers, heads, base = model.num_layers, model.num_kv_heads, min(budget, prompt)
    scores_BLKS = _draw((batch, layers, heads, prompt))
    lengths_B, base_B = (jnp.full((batch,), n, jnp.int32) for n in (prompt, base))
    rows, found = [], {}
    for name, function in _allocators(base).items():
        arrays = scores_BLKS, lengths_B, base_B
        memory: Any = jax.jit(function).lower(*arrays).compile().memory_analysis()
        timing, sizes = timed(function, *arrays, repeats=repeats)
        found[name] = np.asarray(sizes)
        rows.append(
            {
                "what": name,
                "seconds": timing.median / layers,
                "total": timing.median,
                "total_least": timing.least,
                "temporaries": memory.temp_size_in_bytes,
                "results": memory.output_size_in_bytes,
                # Sizes of layers are those of each of their heads; a mask has an entry each.
                "entries": int(found[name].sum()) * (heads if sizes.ndim == 2 else 1),
            }
        )
    for name in ("ada, top_k", "ada, argsort"):
        if not np.array_equal(found[name], found["ada"]):
            raise RuntimeError(f"{name}: other sizes than by bisection")
    return rows


def peak_rss() -> int | None:
    """The most memory that this process has had, in bytes, where the system says."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@jax.jit(static_argnums=0)
def _draw(shape: tuple[int, ...]) -> jax.Array:
    """exp(2 x) of normal x, times a scale of each head that spreads as much."""
    keys = jax.random.split(jax.random.key(0))
    entries, heads = (
        jax.random.normal(key, drawn)
        for key, drawn in zip(keys, (shape, (*shape[:-1], 1)), strict=True)
    )
    return jnp.exp(2 * entries + heads)


# ---------------------------------------------------------------------------- what is measured
def _allocators(base: int) -> dict[str, Callable]:
    """Functions of scores `[B, L, K, S]`, lengths `[B]` and the budget `[B]`.

    `base` is the budget again: where to cut a sorted array off must be known beforehand.
    """

    def uniform(scores, lengths, base_B):
        caps_BL = jnp.broadcast_to(lengths[:, None], scores.shape[:2])
        return allocators.uniform_layers(base_B, caps_BL)

    def ada(scores, lengths, base_B):
        return _each_layer(
            lambda layer, can: allocators.ada_heads(layer, can, base_B, floor=0.0), scores, lengths
        )

    def ada_top_k(scores, lengths, base_B):
        return _each_layer(lambda *layer: _count_best(lax.top_k, *layer, base), scores, lengths)

    def ada_argsort(scores, lengths, base_B):
        return _each_layer(lambda *layer: _count_best(_argsort, *layer, base), scores, lengths)

    def whole_row(scores, lengths, base_B):
        total_B = scores.shape[1] * scores.shape[2] * base_B
        return allocators.global_heads(scores, _can(scores, lengths), total_B)

    def prefix(scores, lengths, base_B):
        means = scores.mean(2)
        none_BL = jnp.zeros(means.shape[:2], jnp.int32)
        return allocators.prefix_layers(means, _can(means, lengths), none_BL, base_B)

    def joint(scores, lengths, base_B):
        total_B = scores.shape[1] * scores.shape[2] * base_B
        can = _can(scores, lengths)
        return allocators.joint_heads(scores, can, base_B, total_B, floor=FLOOR)

    def select(scores, lengths, base_B):
        def keep(layer, can):
            return exact.select_top(layer, jnp.broadcast_to(base_B[:, None], can.shape[:2]), can)

        return _each_layer(keep, scores, lengths)

    return {
        "uniform": uniform,
        "ada": ada,
        "ada, top_k": ada_top_k,
        "ada, argsort": ada_argsort,
        "global": whole_row,
        "prefix": prefix,
        "joint": joint,
        "selection, after any": select,
    }


def _can(scores, lengths) -> jax.Array:
    """What is eligible of `[B, ..., S]` scores: the row's tokens."""
    last = jnp.reshape(lengths, (-1, *[1] * (scores.ndim - 1)))
    return jnp.broadcast_to(jnp.arange(scores.shape[-1]) < last, scores.shape)


def _each_layer(function: Callable, scores_BLKS, lengths) -> jax.Array:
    """One layer after the other, as a prefill meets them: temporaries are those of one."""

    def one(layer):
        scores_BKS = lax.dynamic_index_in_dim(scores_BLKS, layer, axis=1, keepdims=False)
        return function(scores_BKS, _can(scores_BKS, lengths))

    return jnp.moveaxis(lax.map(one, jnp.arange(scores_BLKS.shape[1])), 0, 1)


def _count_best(best: Callable, scores_BKS, can_BKS, base: int) -> jax.Array:
    """Each head's entries among the K * base best of a layer, which are sorted for it."""
    batch, heads, tokens = scores_BKS.shape
    flat = jnp.where(can_BKS, scores_BKS, -1.0).reshape(batch, heads * tokens)
    _, places = best(flat, heads * base)
    owner = places // tokens
    return (owner[..., None] == jnp.arange(heads)).sum(1, dtype=jnp.int32)


def _argsort(values, count: int) -> tuple[jax.Array, jax.Array]:
    places = jnp.argsort(-values, axis=-1, stable=True)[:, :count]
    return values, places
