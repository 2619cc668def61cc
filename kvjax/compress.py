"""score -> allocate -> pack: from a prompt's keys and values to a compressed cache.

B batch, T prompt tokens (the bucket), N query heads, K KV heads, H head dim, L layers,
S slots of a layer.
"""

import math
from collections.abc import Callable, Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax import budgets
from kvjax.cache import Cache, PaddedLayer, Probe, ProbeRequest, empty_tail, full_layer, pack
from kvjax.config import CompressionConfig
from kvjax.kernels.platform import platform
from kvjax.pool import Pool, empty_pool, put_layer
from kvjax.rows import Rows, eligible, largest, make_rows, protected
from kvjax.scores import score


@no_type_check  # jax maps trees to other leaves than arrays
class Scored(struct.PyTreeNode):
    """A layer that waits for the others' scores: sizes are known only after all layers."""

    keys: Float[Array, "B T K H"]
    values: Float[Array, "B T K H"]
    scores: Float[Array, "B K T"]


@no_type_check  # jax maps trees to other leaves than arrays
class Packing(struct.PyTreeNode):
    """The layers so far: padded ones or those that wait, or a pool that is being filled."""

    layers: tuple[PaddedLayer | Scored, ...] = ()
    pool: Pool | None = None


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
    if lengths is None:
        lengths = jnp.full((batch,), tokens, jnp.int32)
    wanted = probe_request(config, tokens)
    for index, probe in enumerate(probes):
        given = 0 if probe.queries is None else probe.queries.shape[1]
        if given < wanted.queries:
            raise ValueError(
                f"probe {index} has {given} queries, expected the last {wanted.queries}"
            )
        if wanted.column_sums and probe.column_sums is None:
            raise ValueError(f"probe {index} has column_sums=None, expected what each key received")
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
    if not config.skips(tokens) and not needs_all_layers(config):
        sizes = _sizes_from_lengths(config, rows, tokens, windows)
    # A key of its own: the sampler folds other numbers into the caller's.
    key = _each(lambda one: jax.random.split(one)[0], jax.random.key(0) if key is None else key)
    return Plan(rows=rows, sizes=sizes, key=key, config=config, windows=windows, tokens=tokens)


def _each(change: Callable, key: Key[Array, "*row"]) -> Key[Array, "*row"]:
    return jax.vmap(change)(key) if key.ndim else change(key)


def probe_request(config: CompressionConfig, tokens: int) -> ProbeRequest:
    """What the scorer of `config` needs from the prefill of a bucket of `tokens`."""
    if config.skips(tokens):
        return ProbeRequest()
    if config.scorer == "window":
        return ProbeRequest(queries=max(1, largest(config, tokens).window))
    return ProbeRequest(column_sums=config.scorer == "accumulated")


def needs_all_layers(config: CompressionConfig) -> bool:
    """Whether layer sizes depend on scores, so that no layer can be packed before the last."""
    return config.layers == "prefix" and config.profile is None


def _sizes_from_lengths(config, rows, tokens, windows) -> Int[Array, "B L"]:
    def count(select):
        masks = [select(rows, tokens, window) for window in windows]
        return jnp.stack([mask.sum(-1, dtype=jnp.int32) for mask in masks], axis=1)

    caps_BL, held_BL = count(eligible), count(protected)
    if config.profile is not None:
        base = None if config.budget is None else rows.base
        retained = jnp.array(config.profile, jnp.float32)
        return budgets.profile_layers(retained, base, caps_BL, held_BL, rows.lengths)
    if config.layers == "pyramid":
        selectable = rows.base - rows.sinks - rows.recent
        ramp_BL = budgets.pyramid_layers(selectable, caps_BL - held_BL, config.beta)
        wanted_BL = (rows.sinks + rows.recent)[:, None] + ramp_BL
        return budgets.spread(wanted_BL, caps_BL, len(windows) * rows.base)
    return budgets.uniform_layers(rows.base, caps_BL)


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
    scores = score(
        probe.queries,
        probe.column_sums,
        keys,
        plan.rows,
        plan.config,
        _each(lambda key: jax.random.fold_in(key, index), plan.key),
        plan.windows[index],
    )
    scored = Scored(keys=keys, values=values, scores=scores)
    if plan.sizes is None:
        return kept.replace(layers=(*kept.layers, scored))
    return _pack(kept, index, scored, plan.sizes[:, index], plan)


def finish(kept: Packing, plan: Plan, tail_slots: int = 0) -> Cache:
    """The cache, once every layer was added: those that waited for all scores are packed."""
    waiting = [layer for layer in kept.layers if isinstance(layer, Scored)]
    if waiting:
        sizes_BL = _sizes_from_scores(waiting, plan)
        kept = Packing()
        for index, layer in enumerate(waiting):
            kept = _pack(kept, index, layer, sizes_BL[:, index], plan)
    padded = tuple(layer for layer in kept.layers if isinstance(layer, PaddedLayer))
    return Cache(
        layers=padded,
        pool=kept.pool,
        tail=empty_tail(kept.pool or padded, tail_slots),
        prompt_lengths=plan.rows.lengths,
        next_positions=plan.rows.lengths,
        keep_ratio=plan.config.keep_ratio and not plan.config.skips(plan.tokens),
    )


def _sizes_from_scores(layers: Sequence[Scored], plan: Plan) -> Int[Array, "B L"]:
    can = jnp.stack([eligible(plan.rows, plan.tokens, window) for window in plan.windows], axis=1)
    held = [protected(plan.rows, plan.tokens, window) for window in plan.windows]
    return budgets.prefix_layers(
        jnp.stack([layer.scores.mean(1) for layer in layers], axis=1),
        can,
        jnp.stack([mask.sum(-1, dtype=jnp.int32) for mask in held], axis=1),
        plan.rows.base,
    )


def _pack(kept: Packing, index: int, layer: Scored, size: Int[Array, " B"], plan: Plan) -> Packing:
    config, windows, tokens = plan.config, plan.windows, plan.tokens
    keep = choose(layer.scores, size, plan.rows, config, windows[index])
    batch, _, kv_heads, _ = layer.keys.shape
    keep_BKT = jnp.broadcast_to(keep, (batch, kv_heads, tokens))
    if not packs(config):
        slots = capacity(config, tokens, index, windows, kv_heads)
        padded = pack(layer.keys, layer.values, keep_BKT, slots)
        return kept.replace(layers=(*kept.layers, padded))
    pool = kept.pool
    if pool is None:
        slots, regions = pool_shape(config, tokens, windows, kv_heads)
        quantize = config.quantize is not None
        pool = empty_pool(layer.keys, len(windows), slots, regions, quantize)
    room = kv_heads * layer_capacity(config, tokens, index, windows)
    room = min(room, pool.entries.shape[1])
    return kept.replace(pool=put_layer(pool, index, layer.keys, layer.values, keep_BKT, room))


def choose(
    scores: Float[Array, "B K T"],
    size: Int[Array, " B"],
    rows: Rows,
    config: CompressionConfig,
    window: int | None,
) -> Bool[Array, " B #K T"]:
    """Which entries a layer keeps: the protected ones and each head's best, `size` on average."""
    tokens = scores.shape[-1]
    held_BT = protected(rows, tokens, window)
    open_BT = eligible(rows, tokens, window) & ~held_BT
    if config.heads == "shared":
        scores = scores.mean(1, keepdims=True)
    open_BKT = jnp.broadcast_to(open_BT[:, None], scores.shape)
    held_B = held_BT.sum(-1, dtype=jnp.int32)
    base_B = size - held_B
    if config.heads == "ada":
        cap = None if config.head_cap is None else config.head_cap - held_B
        sizes_BK = budgets.ada_heads(scores, open_BKT, base_B, floor=config.floor, cap=cap)
    else:
        sizes_BK = jnp.broadcast_to(base_B[:, None], scores.shape[:2])
    return held_BT[:, None] | budgets.select_top(scores, sizes_BK, open_BKT)


def packs(config: CompressionConfig) -> bool:
    """Whether `config` keeps its entries in the packed layout.

    Where it does not say: packed on an accelerator, and for budgets that differ by head or layer;
    padded for uniform ones on a CPU, whose matrix products gain nothing from looking at all heads.
    """
    if config.layout is not None:
        return config.layout == "packed"
    if config.quantize is not None:
        return True
    uneven = config.heads == "ada" or config.layers != "uniform"
    return uneven or platform() != "cpu"


def pool_shape(
    config: CompressionConfig, tokens: int, windows: tuple[int | None, ...], kv_heads: int
) -> tuple[int, tuple[tuple[int, int], ...] | None]:
    """Slots of the pool for a bucket of `tokens`, and each layer's region where it is fixed."""
    layers, base = len(windows), min(largest(config, tokens).base, tokens)
    if config.profile is not None:
        total = min(_profile_reach(config, base, tokens, 0)[0], layers * tokens)
        return kv_heads * total, None
    if config.layers != "uniform" or any(window is not None for window in windows):
        return kv_heads * layers * base, None
    size = kv_heads * base
    return layers * size, tuple((index * size, (index + 1) * size) for index in range(layers))


def capacity(
    config: CompressionConfig,
    tokens: int,
    index: int,
    windows: tuple[int | None, ...],
    kv_heads: int,
) -> int:
    """Slots a head that layer `index` needs for any prompt of at most `tokens` tokens.

    The padded layout pays for what its longest head might get: exactly the budget for uniform
    sizes, more for the others.
    """
    size = _reach(config, tokens, index, windows)
    if config.heads == "ada":
        alpha = round(config.floor * budgets.THOUSAND) / budgets.THOUSAND
        top = math.ceil((1 - alpha) * kv_heads * size + alpha * size) + 1
        size = min(top, config.head_cap or top)
    return _visible(size, tokens, windows[index])


def layer_capacity(
    config: CompressionConfig, tokens: int, index: int, windows: tuple[int | None, ...]
) -> int:
    """Entries a head, on average over its heads, that layer `index` may get of such a prompt."""
    return _visible(_reach(config, tokens, index, windows), tokens, windows[index])


def _visible(size: int, tokens: int, window: int | None) -> int:
    return min(size, tokens if window is None else max(window - 1, 1))


def _reach(
    config: CompressionConfig, tokens: int, index: int, windows: tuple[int | None, ...]
) -> int:
    rows, layers = largest(config, tokens), len(windows)
    base, held = rows.base, rows.sinks + rows.recent
    total, most, size = layers * base, base, base
    if config.profile is not None:
        total, most, size = _profile_reach(config, base, tokens, index)
        size = max(size, held)
    elif config.layers == "prefix":
        size = total
    elif config.layers == "pyramid" and layers > 1:
        ramp, low = base - held, (base - held) // config.beta
        step = 2 * (ramp - low) / (layers - 1)
        most = 2 * base
        size = held + 1 + max(math.ceil(2 * ramp - low - index * step), ramp)
    cut = any(window is not None and window <= most for window in windows)
    if cut and len(set(windows)) + (config.layers != "uniform") > 1:
        size = total  # what other layers cannot hold may all come here
    return min(size, tokens)


def _profile_reach(
    config: CompressionConfig, base: int, tokens: int, index: int
) -> tuple[int, int, int]:
    """Most entries that a profile gives to all layers, to any one, and to layer `index`."""
    profile = config.profile or ()
    layers, shares = len(profile), sum(profile)
    if config.budget is None:
        total, scale, crowded = math.ceil(tokens * shares) + 1, float(tokens), False
    else:
        total, scale = layers * base, layers * base / shares
        # A layer that wants more than a short prompt has leaves the rest to the others.
        part = 1 if isinstance(config.budget, int) else config.fraction
        crowded = part * layers * max(profile) > shares
    size = profile[index] * scale
    if crowded:
        # No layer is raised by more than `base`, nor above one that the profile prefers to it.
        peers = sum(share >= profile[index] for share in profile)
        size = min(size + base, total / peers)
    return total, math.ceil(max(profile) * scale) + base, math.ceil(size) + 2


def held_slots(
    config: CompressionConfig, tokens: int, windows: tuple[int | None, ...], kv_heads: int
) -> int:
    """Slots of all layers' and heads' buffers for a bucket of `tokens`, empty ones included."""
    if config.skips(tokens):
        return tokens * len(windows) * kv_heads
    if packs(config):
        return pool_shape(config, tokens, windows, kv_heads)[0]
    return kv_heads * sum(
        capacity(config, tokens, index, windows, kv_heads) for index in range(len(windows))
    )


def slot_bytes(config: CompressionConfig, tokens: int, head_dim: int, itemsize: int) -> int:
    """Bytes of a slot's key and value for a bucket of `tokens`, with their scales in int8."""
    if config.quantize is None or config.skips(tokens):
        return 2 * head_dim * itemsize
    return 2 * (head_dim + 4)
