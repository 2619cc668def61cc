"""Who keeps how many: allocators as pure array operations, every sum exact, and their bounds.

Layer allocators divide a row's budget among its layers, head allocators a layer's among its
heads. All of them are jitted, batched over leading axes, and work by counting: a threshold is
found by bisection on the bit pattern of the scores, so nothing is sorted but PrefixKV's curves.
An allocator is a record in LAYERS or HEADS: its sizes, and how many slots they can come to need.

B batch, L layers, K KV heads, S cached tokens. Sizes and budgets are int32 entries per KV head.
Budgets of all layers and heads together are below 2**31, for a slot is an int32 index; entries that
are only counted may be more (`kvjax.exact`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvjax.compression import slot_bounds
from kvjax.compression.row_budgets import Rows, eligible, protected
from kvjax.compression.slot_bounds import Bound, Bucket
from kvjax.exact import (
    MILLION,
    THOUSAND,
    count_top,
    divided_product,
    floor_of_product,
    largest_remainder,
    ranking_keys,
    select_largest,
    select_top,
    shortest_prefixes,
    spread,
)
from kvjax.methods import Settings


# ---------------------------------------------------------------------------- layers
def uniform_layers(base: Int[Array, " B"], caps: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """`base` entries per head in every layer; what a layer cannot hold goes to the others.

    Args:
      base: the row's budget per head, >= 0.
      caps: entries that each layer has to offer (a sliding window may see less than the prompt).

    Returns:
      Sizes that sum to min(L * base, sum of caps).
    """
    layers = caps.shape[-1]
    return spread(jnp.broadcast_to(base[:, None], caps.shape), caps, layers * base)


def pyramid_layers(base: Int[Array, " B"], caps: Int[Array, "B L"], beta: int) -> Int[Array, "B L"]:
    """PyramidKV (Cai et al. 2024, section 4.2): sizes fall linearly from layer 0 to the last.

        low = base // beta,  high = 2 base - low     (clamped: high <= the largest cap)
        size_l = high - l (high - low) / (L - 1)

    Exact largest remainder replaces upstream's rounded-down step, which exceeds the budget by up
    to 15 %; upstream's uniform case for short prompts is gone: the clamp covers it, and sizes
    stay (but for 1) monotone in the budget.

    Args:
      base: selectable entries per head (without the window), >= 0, at most the largest cap.
      caps: selectable entries of each layer.
      beta: steepness, >= 1; upstream's default is 20.
    """
    layers = caps.shape[-1]
    if layers == 1:
        return uniform_layers(base, caps)
    high = jnp.minimum(2 * base - base // beta, caps.max(-1))
    low = 2 * base - high
    index = jnp.arange(layers, dtype=jnp.int32)
    # index * (high - low) / (layers - 1) in two parts: the product may not fit int32.
    step, rest = (high - low)[:, None] // (layers - 1), (high - low)[:, None] % (layers - 1)
    ramp = high[:, None] - index * step + largest_remainder(-index * rest, layers - 1)
    return spread(ramp, caps, layers * base)


def profile_layers(
    retained: Float[Array, " L"],
    base: Int[Array, " B"] | None,
    caps: Int[Array, "B L"],
    protected: Int[Array, "B L"],
    lengths: Int[Array, " B"],
) -> Int[Array, "B L"]:
    """Sizes from a stored profile: the fraction of the prompt that each layer retains.

    Shares are resolved to millionths. Without `base`, layer l keeps lengths * retained[l], largest
    remainder over the layers, in all lengths * sum(retained), rounded. With `base`, the profile is
    scaled to L * base. A layer keeps its protected entries whatever its profile says; the others
    make up for them, as far as they have any to spare.
    """
    layers = caps.shape[-1]
    shares = jnp.round(retained.astype(jnp.float32) * MILLION).astype(jnp.int32)
    bits = (MILLION * layers).bit_length()
    if base is None:
        floors, rest = divided_product(lengths[:, None], shares, MILLION)
        budget = floors.sum(-1, dtype=jnp.int32)
        budget += (rest.sum(-1, dtype=jnp.int32) + MILLION // 2) // MILLION
    else:
        budget = layers * base
        whole = jnp.maximum(shares.sum(dtype=jnp.int32), 1)
        floors, rest = divided_product(budget[:, None], shares, whole, bits)
    one_more = select_largest(rest.astype(jnp.uint32), budget - floors.sum(-1, dtype=jnp.int32))
    return spread(floors + one_more, caps, budget, protected)


def prefix_layers(
    scores: Float[Array, "B L S"],
    eligible: Bool[Array, "B L S"],
    protected: Int[Array, "B L"],
    base: Int[Array, " B"],
) -> Int[Array, "B L"]:
    """PrefixKV (Wang et al. 2024, section 3): one threshold of cumulative mass for all layers.

    Let c_l(i) be the share of layer l's importance that its i best tokens hold before the next
    one is added (c_l(0) = 0, tokens in falling order; 1 throughout where no token has any). Layer
    l's prefix at threshold p is the number of i with c_l(i) < p, and p is the largest with

        sum_l prefix_l(p) <= L * base - sum_l protected_l.

    The bisection runs on the bit pattern of c (32 counts, always ends, exact). What is then
    left goes to the layers whose next token ties at p: the heaviest next token first, then the
    lower layer (upstream scales the prefixes and rounds each, and misses the total).

    Args:
      scores: importance >= 0, one per layer and token (the mean over heads).
      eligible: tokens that the layer may keep.
      protected: always-kept tokens of each layer, counted on top of the prefix as upstream does.
      base: the row's budget per head and layer, protected ones included.

    Returns:
      Sizes that sum to min(L * base, eligible), each at least `protected`; monotone in `base`.
    """
    room = eligible.sum(-1, dtype=jnp.int32) - protected
    budget = scores.shape[1] * base - protected.sum(-1, dtype=jnp.int32)
    return protected + shortest_prefixes(scores, eligible, room, jnp.zeros_like(room), budget)


# ---------------------------------------------------------------------------- heads
def ada_heads(
    scores: Float[Array, "B K S"],
    eligible: Bool[Array, "B K S"],
    base: Int[Array, " B"],
    *,
    floor: float,
    cap: Int[Array, " B"] | int | None = None,
) -> Int[Array, "B K"]:
    """Ada-KV (Feng et al. 2024, algorithm 1): heads share a layer's budget by their best scores.

    Let n_h be head h's members among the K * base best scores of all heads. The safeguard mixes
    n_h with the uniform budget,

        size_h = (1 - alpha) n_h + alpha base,

    which need not be whole: upstream rounds each and loses or gains entries. Here it is the
    largest remainder, ties to the head of the most mass, so that the order of the heads does not
    matter. Every size lies between n_h and base, so a layer retains at least the uniform budget's
    mass at any alpha, and no head falls below floor(alpha * base) or rises above the cap. When
    base grows by one, a head that gains no member gains alpha in remainder and a rounded-up one
    keeps its place among the largest: sizes are monotone in `base`.

    Args:
      scores: importance >= 0 of the selectable tokens of each head.
      eligible: which tokens are selectable; the same number in every head.
      base: selectable entries per head, on average over the heads.
      floor: alpha in [0, 1], resolved to thousandths; 0 is pure Ada-KV, 1 is uniform.
      cap: most entries of one head, >= base; the excess goes to the other heads' best scores.

    Returns:
      Sizes that sum to K * base (or to all that is eligible, where that is less).
    """
    batch, heads, _ = scores.shape
    contenders = eligible
    if cap is not None:
        most = jnp.broadcast_to(jnp.asarray(cap)[..., None], (batch, heads))
        contenders = select_top(scores, most, eligible)
    count = count_top(ranking_keys(scores, contenders), heads * base)
    alpha = round(floor * THOUSAND)
    even = count.sum(-1, keepdims=True, dtype=jnp.int32) // heads
    # alpha (even - count) / 1000 in two parts: the product may not fit int32.
    whole, rest = (even - count) // THOUSAND, (even - count) % THOUSAND
    count, mix = count + alpha * whole, alpha * rest
    by_mass = jnp.argsort(-jnp.where(eligible, scores, 0.0).sum(-1), axis=-1, stable=True)
    more = largest_remainder(jnp.take_along_axis(mix, by_mass, axis=-1), THOUSAND)
    return count + jnp.take_along_axis(more, jnp.argsort(by_mass, axis=-1), axis=-1)


# ---------------------------------------------------------------------------- layers and heads
def global_heads(
    scores: Float[Array, "B L K S"],
    eligible: Bool[Array, "B L K S"],
    budget: Int[Array, " B"],
) -> Int[Array, "B L K"]:
    """KV-Compress (Rehg 2024, section 3.3): one threshold over all layers and heads of a row.

    A head keeps what lies among the `budget` best scores of the whole row; ties go to the lower
    layer, then the lower head. KV-Compress evicts whole pages of a head, and only where a page's
    worth of its entries is below the threshold; here entries are what is evicted, so every one
    that goes is at most as important as every one that stays.

    Args:
      scores: importance >= 0, comparable across layers and heads.
      eligible: which entries are selectable.
      budget: entries of all layers and heads together, >= 0.

    Returns:
      Sizes that sum to `budget`, or to all that is eligible, where that is less.
    """
    return count_top(ranking_keys(scores, eligible), budget, axes=3)


def joint_heads(
    scores: Float[Array, "B L K S"],
    eligible: Bool[Array, "B L K S"],
    base: Int[Array, " B"],
    budget: Int[Array, " B"],
    *,
    floor: float,
) -> Int[Array, "B L K"]:
    """PrefixKV's threshold of cumulative mass on the curve of every layer and head (kvjax).

    As `prefix_layers`, one curve a head: head h of layer l keeps the shortest list of its best
    entries that holds a share p of its importance,

        size_lh(p) = max(least_lh, number of i with c_lh(i) < p),

    and p is the largest whose sizes sum to at most the budget; the rest goes to the heads whose
    next entry ties at p, the heaviest first. What Ada-KV does inside a layer by comparing scores of
    heads, this does by comparing the shares that each head has collected, so a layer or a head
    whose scores are small on the whole is not starved.

    Args:
      scores: importance >= 0; only the shares within a head matter.
      eligible: which entries are selectable.
      base: selectable entries per head, on average over layers and heads.
      budget: entries of all layers and heads together, >= 0.
      floor: in [0, 1], resolved to thousandths: least_lh = floor(floor * base), as far as a head
        has entries.

    Returns:
      Sizes that sum to `budget`, or to all that is eligible, where that is less; monotone in `base`
      and `budget` together.
    """
    room = eligible.sum(-1, dtype=jnp.int32)
    least = floor_of_product(base, round(floor * THOUSAND), THOUSAND)
    least = jnp.minimum(least[:, None, None], room)
    return shortest_prefixes(scores, eligible, room, least, budget)


# ---------------------------------------------------------------------------- layer allocators
class LayerInput(NamedTuple):
    """A prompt's layers, as a layer allocator sees them.

    Attributes:
      config: the settings.
      rows: each row's budget.
      tokens: the bucket.
      windows: each layer's sliding window, or None.
      scores: `[B, K, T]` importances of each layer, where the allocator reads them.
    """

    config: Settings
    rows: Rows
    tokens: int
    windows: tuple[int | None, ...]
    scores: Sequence[Float[Array, "B K T"]] = ()

    def masks(self, select: Callable) -> Bool[Array, "B L T"]:
        """`eligible` or `protected` of every layer."""
        masks = [select(self.rows, self.tokens, window) for window in self.windows]
        return jnp.stack(masks, axis=1)

    def counts(self, select: Callable) -> Int[Array, "B L"]:
        """How many entries these are."""
        return self.masks(select).sum(-1, dtype=jnp.int32)


@dataclass(frozen=True, kw_only=True)
class LayerAllocator:
    """How a row's budget is divided among its layers: a row of LAYERS.

    Attributes:
      sizes: entries per head of each layer `[B, L]`, or where it is `by_head` of each layer and
        head `[B, L, K]`, always-kept ones included.
      bound: the slots that these sizes can come to need.
      scored: whether sizes depend on scores, so that no layer can be packed before the last.
      by_head: whether it gives every head its size, and so stands for the head allocator too.
      even: whether all layers get the same, as far as they can hold it.
    """

    sizes: Callable[[LayerInput], Int[Array, " B L *K"]]
    bound: Callable[[Bucket], Bound]
    scored: bool = False
    by_head: bool = False
    even: bool = False


def _uniform(layers: LayerInput) -> Int[Array, "B L"]:
    return uniform_layers(layers.rows.base, layers.counts(eligible))


def _pyramid(layers: LayerInput) -> Int[Array, "B L"]:
    rows, caps_BL = layers.rows, layers.counts(eligible)
    held_B, open_BL = rows.sinks + rows.recent, caps_BL - layers.counts(protected)
    ramp_BL = pyramid_layers(rows.base - held_B, open_BL, layers.config.beta)
    return spread(held_B[:, None] + ramp_BL, caps_BL, len(layers.windows) * rows.base)


def _profile(layers: LayerInput) -> Int[Array, "B L"]:
    config, rows = layers.config, layers.rows
    base = None if config.budget is None else rows.base
    retained, held_BL = jnp.array(config.profile, jnp.float32), layers.counts(protected)
    return profile_layers(retained, base, layers.counts(eligible), held_BL, rows.lengths)


def _prefix(layers: LayerInput) -> Int[Array, "B L"]:
    means_BLT = jnp.stack([scores.mean(1) for scores in layers.scores], axis=1)
    held_BL = layers.counts(protected)
    return prefix_layers(means_BLT, layers.masks(eligible), held_BL, layers.rows.base)


def _over_heads(layers: LayerInput, divide: Callable) -> Int[Array, "B L K"]:
    """Sizes from `divide`, of all scores, what is open, and the budget beside what is held."""
    scores_BLKT, held_BL = jnp.stack(layers.scores, axis=1), layers.counts(protected)
    open_BLT = layers.masks(eligible) & ~layers.masks(protected)
    open_BLKT = jnp.broadcast_to(open_BLT[:, :, None], scores_BLKT.shape)
    held_B, all_B = held_BL.sum(1), len(layers.windows) * layers.rows.base
    budget_B = scores_BLKT.shape[2] * jnp.maximum(all_B - held_B, 0)
    return held_BL[..., None] + divide(scores_BLKT, open_BLKT, budget_B)


def _joint(layers: LayerInput) -> Int[Array, "B L K"]:
    def divide(scores, can, budget_B):
        base_B = budget_B // (scores.shape[1] * scores.shape[2])
        return joint_heads(scores, can, base_B, budget_B, floor=layers.config.floor)

    return _over_heads(layers, divide)


def _scored(sizes: Callable, by_head: bool = False) -> LayerAllocator:
    bound = slot_bounds.any_layer
    return LayerAllocator(sizes=sizes, bound=bound, scored=True, by_head=by_head)


LAYERS: Mapping[str, LayerAllocator] = MappingProxyType(
    {
        "uniform": LayerAllocator(sizes=_uniform, bound=slot_bounds.even_layers, even=True),
        "pyramid": LayerAllocator(sizes=_pyramid, bound=slot_bounds.pyramid),
        "prefix": _scored(_prefix),
        "global": _scored(lambda layers: _over_heads(layers, global_heads), by_head=True),
        "joint": _scored(_joint, by_head=True),
    }
)
PROFILE = LayerAllocator(sizes=_profile, bound=slot_bounds.profile)


def layer_allocator(config: Settings) -> LayerAllocator:
    """The row of LAYERS, or what takes sizes from a stored profile."""
    return LAYERS[config.layers] if config.profile is None else PROFILE


# ---------------------------------------------------------------------------- head allocators
class HeadInput(NamedTuple):
    """One layer, as a head allocator sees it.

    Attributes:
      config: the settings.
      scores: importances; of one head for all where they are `shared`.
      can: which entries are selectable.
      size: selectable entries per head, on average over the heads.
      held: always-kept entries of each head, on top of these.
    """

    config: Settings
    scores: Float[Array, " B #K T"]
    can: Bool[Array, " B #K T"]
    size: Int[Array, " B"]
    held: Int[Array, " B"]


@dataclass(frozen=True, kw_only=True)
class HeadAllocator:
    """How a layer's entries are divided among its heads: a row of HEADS.

    Attributes:
      sizes: selectable entries of each head `[B, K]`.
      bound: most entries of one head, from the layer's most a head and the number of KV heads.
      even: whether all heads get the same.
      shared: whether all heads keep the same tokens, chosen by the mean of their scores.
    """

    sizes: Callable[[HeadInput], Int[Array, " B #K"]]
    bound: Callable[[Settings, int, int], int]
    even: bool = False
    shared: bool = False


def _alike(heads: HeadInput) -> Int[Array, " B #K"]:
    return jnp.broadcast_to(heads.size[:, None], heads.scores.shape[:2])


def _ada(heads: HeadInput) -> Int[Array, "B K"]:
    config = heads.config
    cap_B = None if config.head_cap is None else config.head_cap - heads.held
    return ada_heads(heads.scores, heads.can, heads.size, floor=config.floor, cap=cap_B)


HEADS: Mapping[str, HeadAllocator] = MappingProxyType(
    {
        "uniform": HeadAllocator(sizes=_alike, bound=slot_bounds.even_heads, even=True),
        "ada": HeadAllocator(sizes=_ada, bound=slot_bounds.ada),
        "shared": HeadAllocator(sizes=_alike, bound=slot_bounds.even_heads, even=True, shared=True),
    }
)


def head_allocator(config: Settings) -> HeadAllocator:
    """The row of HEADS; an even one, which nobody asks, where layers give every head its size."""
    return HEADS["uniform" if LAYERS[config.layers].by_head else config.heads]
