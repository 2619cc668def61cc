"""Who keeps how many: allocators as pure array operations, every sum exact.

Layer allocators divide a row's budget among its layers, head allocators a layer's among its
heads. All of them are jitted, batched over leading axes, and work by counting: a threshold is
found by bisection on the bit pattern of the scores, so nothing is sorted but PrefixKV's curves.

B batch, L layers, K KV heads, S cached tokens. Sizes and budgets are int32 entries per KV head.
Budgets of all layers and heads together are below 2**31, for a slot is an int32 index; entries that
are only counted may be more (`kvjax.exact`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.exact import (
    MILLION,
    THOUSAND,
    count_top,
    divided_product,
    floor_of_product,
    give_in_turn,
    kth_largest,
    largest_remainder,
    ranking_keys,
    select_largest,
    select_top,
    spread,
    total,
)


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
    return protected + _shortest_prefixes(scores, eligible, room, jnp.zeros_like(room), budget)


def _shortest_prefixes(scores, eligible, room, least, budget):
    """Entries of each curve `[B, *X]` below the highest threshold of mass that the budget allows.

    A curve keeps at most `room` and at least `least` (<= room) entries; the counts sum to
    min(budget, room).
    """
    curves, axes = scores.shape[1:-1], scores.ndim - 1
    flat = (scores.shape[0], -1)
    ranked = -jnp.sort(-jnp.where(eligible & (scores > 0), scores, 0.0), axis=-1)  # NaN is 0
    mass = jnp.cumsum(ranked, axis=-1)
    whole = jnp.where(mass[..., -1:] > 0, mass[..., -1:], 1.0)
    before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1) / whole
    before = jnp.where(mass[..., -1:] > 0, before, 1.0)  # without any mass, last of all
    rank = jnp.arange(scores.shape[-1])
    before = jnp.where(rank < least[..., None], 0.0, before)
    usable = rank < room[..., None]

    # Smallest keys first: rank by the complement of the bit pattern.
    keys = jnp.where(usable, ~lax.bitcast_convert_type(before, jnp.uint32), jnp.uint32(0))
    budget = jnp.minimum(budget, total(room.reshape(flat)))
    threshold = jnp.expand_dims(kth_largest(keys, budget, axes), tuple(range(-axes, 0)))
    above = (keys > threshold).sum(-1, dtype=jnp.int32)
    tied = ((keys == threshold) & usable).sum(-1, dtype=jnp.int32)
    last = scores.shape[-1] - 1
    next_rank = jnp.minimum(above, last)[..., None]
    next_token = jnp.take_along_axis(ranked / whole, next_rank, axis=-1)[..., 0]
    above, tied, next_token = (x.reshape(flat) for x in (above, tied, next_token))
    spare = budget - above.sum(-1, dtype=jnp.int32)
    return (above + _in_order(tied, next_token, spare)).reshape(-1, *curves)


def _in_order(
    available: Int[Array, "B L"], priority: Float[Array, "B L"], amount: Int[Array, " B"]
) -> Int[Array, "B L"]:
    """Give `amount` away, each layer in falling priority taking all that it can."""
    order = jnp.argsort(-priority, axis=-1, stable=True)
    given = give_in_turn(jnp.take_along_axis(available, order, axis=-1), amount)
    return jnp.take_along_axis(given, jnp.argsort(order, axis=-1), axis=-1)


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
    return _shortest_prefixes(scores, eligible, room, least, budget)
