"""score -> allocate -> pack: from a prompt's keys and values to a compressed cache.

B batch, T prompt tokens (the bucket), N query heads, K KV heads, H head dim, L layers,
S slots of a layer.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax import exact, sharding
from kvjax.cache.packing import put_layer
from kvjax.cache.padded import PaddedLayer, full_layer, pack
from kvjax.cache.slots import Slots, empty_slots, page_size
from kvjax.cache.state import Cache
from kvjax.cache.tail import empty_tail
from kvjax.compression import scorers
from kvjax.compression.allocators import HeadInput, LayerInput, head_allocator, layer_allocator
from kvjax.compression.capacity import capacity, layer_capacity, packs, pool_shape
from kvjax.compression.row_budgets import Rows, eligible, largest, make_rows, protected
from kvjax.compression.scorer_input import ScorerInput
from kvjax.compression.scorers import output_aware, score, squared_sums
from kvjax.config import CompressionConfig, check_config
from kvjax.exact import always_32_bits
from kvjax.methods import Settings
from kvjax.model_interface import Probe, ProbeRequest


@no_type_check  # jax maps trees to other leaves than arrays
class ScoredLayer(struct.PyTreeNode):
    """A layer that waits for the others' scores: sizes are known only after all layers."""

    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K H"]
    scores: Float[Array, "B K T"]
    output_norms: Float[Array, "B K T"] | None = None
    sums: Float[Array, "B K T"] | None = None


@no_type_check  # jax maps trees to other leaves than arrays
class Packing(struct.PyTreeNode):
    """The layers so far: padded ones or those that wait, or slots that are being filled."""

    layers: tuple[PaddedLayer | ScoredLayer, ...] = ()
    slots: Slots | None = None


@no_type_check  # jax maps trees to other leaves than arrays
class Plan(struct.PyTreeNode):
    """A prompt's compression: static settings and what is known before any layer is scored.

    Attributes:
      rows: each row's budget.
      sizes: `[B, L]` entries per head of each layer, or None where they depend on scores.
      key: random key of the `random` scorer, one for all rows or `[B]`.
      config, windows: the settings; each layer's sliding window.
      tokens: the bucket.
    """

    rows: Rows
    sizes: Int[Array, "B L"] | None
    key: Key[Array, "*row"]
    config: CompressionConfig = struct.field(pytree_node=False)
    windows: tuple[int | None, ...] = struct.field(pytree_node=False)
    tokens: int = struct.field(pytree_node=False)


@always_32_bits
def compress(
    keys: Sequence[Float[Array, "B T K H"]],
    values: Sequence[Float[Array, "B T K H"]],
    probes: Sequence[Probe],
    config: CompressionConfig,
    *,
    lengths: Int[Array, " B"] | None = None,
    windows: Sequence[int | None] | None = None,
    key: Key[Array, "*row"] | None = None,
    tail_slots: int = 0,
) -> Cache:
    """Compress a prompt's keys and values, for one's own model. Jittable, `config` static.

    Args:
      keys, values: one array a layer; keys after RoPE, rows padded on the right.
      probes: one a layer, with what `config.scorer` reads (`probe_request` says what).
      lengths: tokens of each row, T by default.
      windows: each layer's sliding window, none by default.
      key: for the `random` scorer; with one for each row (`[B]`) rows draw differently.
      tail_slots: room for tokens to come.

    Returns:
      The cache. Its bytes are the budget's in the packed layout, and bounded by `capacity` in the
      padded one.

    Raises:
      ValueError: a probe without what the scorer reads.
    """
    batch, tokens = keys[0].shape[:2]
    lengths = jnp.full((batch,), tokens) if lengths is None else lengths
    lengths = lengths.astype(jnp.int32)
    wanted = probe_request(config, tokens)
    for index, probe in enumerate(probes):
        given = 0 if probe.queries is None else probe.queries.shape[1]
        if given < wanted.queries:
            raise ValueError(
                f"probe {index} has {given} queries, expected the last {wanted.queries}"
            )
        for name in (
            *scorers.SCORERS[config.scorer].reads,
            *["output_norms"] * config.output_aware,
        ):
            if getattr(probe, name) is None and not config.keeps_all(tokens):
                raise ValueError(
                    f"probe {index} has {name}=None, expected it for {config.method!r}"
                )
    plan = make_plan(config, lengths, tokens, tuple(windows or [None] * len(keys)), key)
    kept = Packing()
    for index, (k, v, probe) in enumerate(zip(keys, values, probes, strict=True)):
        kept = add_layer(kept, index, k, v, probe, plan)
    return finish(kept, plan, tail_slots)


def make_plan(
    config: CompressionConfig,
    lengths: Int[Array, " B"],
    tokens: int,
    windows: tuple[int | None, ...],
    key: Key[Array, "*row"] | None = None,
    rows: Rows | None = None,
) -> Plan:
    """Resolve budgets row by row, and layer sizes as far as they depend on lengths alone.

    `rows` replaces what `config.budget` comes to by smaller budgets, as run-time numbers.
    """
    if config.profile is not None and len(config.profile) != len(windows):
        raise ValueError(
            f"profile has {len(config.profile)} layers, expected the model's {len(windows)}"
        )
    rows = make_rows(config, lengths) if rows is None else rows
    sizes = None
    if not config.keeps_all(tokens) and not needs_all_layers(config):
        sizes = layer_allocator(config).sizes(LayerInput(config, rows, tokens, windows))
    # A key of its own: the sampler folds other numbers into the caller's.
    key = _each(lambda one: jax.random.split(one)[0], jax.random.key(0) if key is None else key)
    return Plan(rows=rows, sizes=sizes, key=key, config=config, windows=windows, tokens=tokens)


def _each(change: Callable, key: Key[Array, "*row"]) -> Key[Array, "*row"]:
    return jax.vmap(change)(key) if key.ndim else change(key)


def probe_request(config: CompressionConfig, tokens: int) -> ProbeRequest:
    """What the scorer of `config` needs from the prefill of a bucket of `tokens`."""
    check_config(config)
    summed = ProbeRequest()
    if config.sums:
        window = min(scorers.SUMS_WINDOW, tokens)
        summed = ProbeRequest(queries=max(window, largest(config, tokens).window))
    if config.keeps_all(tokens):
        return summed
    scorer = scorers.SCORERS[config.scorer]
    asked = scorer.request(config, largest(config, tokens).window)
    norms = asked.output_norms or config.output_aware
    skipped = config.sinks if asked.future else 0
    return dataclasses.replace(asked, output_norms=norms, skipped=skipped) | summed


def needs_all_layers(config: CompressionConfig) -> bool:
    """Whether layer sizes depend on scores, so that no layer can be packed before the last."""
    return layer_allocator(config).scored


def add_layer(
    kept: Packing,
    index: int,
    keys: Float[Array, "B T K H"],
    values: Float[Array, "B T K H"],
    probe: Probe,
    plan: Plan,
) -> Packing:
    """Score the next layer, and pack it at once where its size is known."""
    if plan.config.skips(plan.tokens):
        return kept.replace(layers=(*kept.layers, full_layer(keys, values, plan.rows.lengths)))
    window = plan.windows[index]
    layer = ScorerInput(probe, keys, values, plan.rows, plan.config, plan.key, window)
    sums = sharding.constrain(squared_sums(layer), "BKT") if plan.config.sums else None
    if plan.config.keeps_all(plan.tokens):  # to be quantized or summed: what a later token can see
        keep_BT = eligible(plan.rows, plan.tokens, window)
        return _store(kept, index, keys, values, keep_BT[:, None], plan, sums)
    key = _each(lambda key: jax.random.fold_in(key, index), plan.key)
    layer = layer._replace(key=key)
    norms = probe.output_norms if plan.config.output_aware else None
    scores_BKT = sharding.constrain(score(layer), "BKT")
    scored = ScoredLayer(keys=keys, values=values, scores=scores_BKT, output_norms=norms, sums=sums)
    if plan.sizes is None:
        return kept.replace(layers=(*kept.layers, scored))
    return _pack(kept, index, scored, plan.sizes[:, index], plan)


def finish(kept: Packing, plan: Plan, tail_slots: int = 0) -> Cache:
    """The cache, once every layer was added: those that waited for all scores are packed."""
    waiting = [layer for layer in kept.layers if isinstance(layer, ScoredLayer)]
    if waiting:
        scores = [layer.scores for layer in waiting]
        layers = LayerInput(plan.config, plan.rows, plan.tokens, plan.windows, scores)
        sizes = layer_allocator(plan.config).sizes(layers)
        kept = Packing()
        for index, layer in enumerate(waiting):
            kept = _pack(kept, index, layer, sizes[:, index], plan)
    padded = tuple(layer for layer in kept.layers if isinstance(layer, PaddedLayer))
    return Cache(
        layers=padded,
        slots=kept.slots,
        tail=empty_tail(kept.slots or padded, tail_slots),
        prompt_lengths=plan.rows.lengths,
        next_positions=plan.rows.lengths,
        keep_ratio=plan.config.keep_ratio and not plan.config.keeps_all(plan.tokens),
    )


def _pack(
    kept: Packing,
    index: int,
    layer: ScoredLayer,
    size: Int[Array, " B"] | Int[Array, "B K"],
    plan: Plan,
) -> Packing:
    window = plan.windows[index]
    keep = choose(layer.scores, size, plan.rows, plan.config, window, layer.output_norms)
    return _store(kept, index, layer.keys, layer.values, keep, plan, layer.sums)


def _store(kept: Packing, index: int, keys, values, keep, plan: Plan, sums) -> Packing:
    """What is to be kept of the next layer, in slots."""
    config, windows, tokens = plan.config, plan.windows, plan.tokens
    batch, _, kv_heads, _ = keys.shape
    keep_BKT = jnp.broadcast_to(keep, (batch, kv_heads, tokens))
    if not packs(config):
        width = capacity(config, tokens, index, windows, kv_heads)
        padded = pack(keys, values, keep_BKT, width)
        return kept.replace(layers=(*kept.layers, padded))
    if (slots := kept.slots) is None:
        parts = sharding.parts()
        slots = empty_slots(
            keys,
            len(windows),
            *pool_shape(config, tokens, windows, kv_heads),
            page=page_size(parts),
            quantize=config.quantizes,
            sums=config.sums,
            parts=parts,
        )
    room = kv_heads * layer_capacity(config, tokens, index, windows)
    room = min(room, slots.room)
    if slots.runs is None:
        slots = slots.replace(most=max(slots.most or 0, room))
    return kept.replace(slots=put_layer(slots, index, keys, values, keep_BKT, room, sums))


def choose(
    scores: Float[Array, "B K T"],
    size: Int[Array, " B"] | Int[Array, "B K"],
    rows: Rows,
    config: CompressionConfig,
    window: int | None,
    output_norms: Float[Array, "B K T"] | None = None,
) -> Bool[Array, " B #K T"]:
    """Which entries a layer keeps: the protected ones and each head's best.

    Args:
      scores: importance >= 0 of each entry.
      size: entries of the layer per head, on average, or of each head.
      rows, config, window: each row's budget, the settings, the layer's sliding window.
      output_norms: of each value's part in the output, where the second half of a head's entries
        is chosen by it too (CriticalKV).
    """
    tokens = scores.shape[-1]
    held_BT = protected(rows, tokens, window)
    can_BT = eligible(rows, tokens, window) & ~held_BT
    held_B = held_BT.sum(-1, dtype=jnp.int32)
    rest = size - (held_B if size.ndim == 1 else held_B[:, None])
    return held_BT[:, None] | best(scores, rest, can_BT[:, None], held_B, config, output_norms)


def best(
    scores: Float[Array, "B K S"],
    size: Int[Array, " B"] | Int[Array, "B K"],
    can: Bool[Array, " B #K S"],
    held: Int[Array, " B"],
    config: Settings,
    output_norms: Float[Array, "B K S"] | None = None,
    total: Int[Array, " B"] | None = None,
) -> Bool[Array, " B #K S"]:
    """Each head's best entries of those that `can` be chosen; of a prompt, or while decoding.

    Args:
      scores: importance >= 0 of each entry.
      size: entries to choose per head, on average, or of each head.
      can: which entries may be chosen.
      held: entries that each head keeps beside them.
      config: says how the heads divide them.
      output_norms: see `choose`.
      total: entries of all heads together, where what one head lacks goes to the others.
    """
    allocator = head_allocator(config)
    if allocator.shared:
        scores = scores.mean(1, keepdims=True)
        if output_norms is not None:
            output_norms = output_norms.mean(1, keepdims=True)
    can_BKS = jnp.broadcast_to(can, scores.shape)
    sizes_BK = size  # a layer allocator may give every head its size
    if size.ndim == 1:
        sizes_BK = allocator.sizes(HeadInput(config, scores, can_BKS, size, held))
    if total is not None:
        sizes_BK = exact.spread(sizes_BK, can_BKS.sum(-1, dtype=jnp.int32), total)
    if output_norms is None:
        return exact.select_top(scores, sizes_BK, can_BKS)
    first_BKS = exact.select_top(scores, sizes_BK // 2, can_BKS)
    weighed = output_aware(scores, output_norms)
    rest_BKS = exact.select_top(weighed, sizes_BK - sizes_BK // 2, can_BKS & ~first_BKS)
    return first_BKS | rest_BKS
