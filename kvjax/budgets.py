"""Who keeps how many: allocators as pure array operations, every sum exact.

Layer allocators divide a row's budget among its layers, head allocators a layer's among its
heads. All of them are jitted, batched over leading axes, and work by counting: a threshold is
found by bisection on the bit pattern of the scores, so nothing is sorted but PrefixKV's curves.

B batch, L layers, K KV heads, S cached tokens. Sizes and budgets are int32 entries per KV head.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt

# A fraction such as Ada-KV's floor is held in thousandths, so that the arithmetic is exact.
THOUSAND = 1000


# ---------------------------------------------------------------------------- selection
def ranking_keys(
    scores: Float[Array, "*shape"], eligible: Bool[Array, "*shape"]
) -> UInt[Array, "*shape"]:
    """Non-negative fp32 scores as integers in the same order; 0 marks what is not eligible.

    The bit pattern of a non-negative float grows with its value. NaN counts as 0.
    """
    clean = jnp.where(scores > 0, scores, 0.0).astype(jnp.float32)
    keys = lax.bitcast_convert_type(clean, jnp.uint32) + jnp.uint32(1)
    return jnp.where(eligible, keys, jnp.uint32(0))


def kth_largest(keys: UInt[Array, "*shape S"], k: Int[Array, "*shape"]) -> UInt[Array, "*shape"]:
    """The k-th largest key of the last axis, exactly, by 32 counts; all ones where k <= 0.

    Each bit from the top is set if at least k keys are still not below the candidate.
    """

    def try_bit(index, found):
        candidate = found | (jnp.uint32(1) << jnp.asarray(31 - index, jnp.uint32))
        count = (keys >= candidate[..., None]).sum(-1, dtype=jnp.int32)
        return jnp.where(count >= k, candidate, found)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(k.shape, jnp.uint32))


def select_top(
    scores: Float[Array, "*shape S"],
    k: Int[Array, "*shape"],
    eligible: Bool[Array, "*shape S"],
) -> Bool[Array, "*shape S"]:
    """Mask of the k best eligible scores of the last axis; ties go to the lower index.

    Fewer than k eligible: all of them. Scores are >= 0.
    """
    keys = ranking_keys(scores, eligible)
    k = jnp.minimum(k, eligible.sum(-1, dtype=jnp.int32))
    threshold = kth_largest(keys, k)[..., None]
    above, tied = keys > threshold, (keys == threshold) & eligible
    spare = (k - above.sum(-1, dtype=jnp.int32))[..., None]
    rank_among_tied = jnp.cumsum(tied, axis=-1, dtype=jnp.int32)
    return above | (tied & (rank_among_tied <= spare))


# ---------------------------------------------------------------------------- sharing out
def largest_remainder(
    numerators: Int[Array, "*shape X"], denominator: Int[Array, "*#shape"] | int
) -> Int[Array, "*shape X"]:
    """Integers near numerators / denominator whose sum is the quotients' sum (an integer).

    Hamilton's method: round down, then one more to the largest remainders, ties to the lower
    index. Each result is the quotient rounded down or up.
    """
    denominator = jnp.asarray(denominator, jnp.int32)[..., None]
    floors, remainders = numerators // denominator, numerators % denominator
    spare = remainders.sum(-1, dtype=jnp.int32) // denominator[..., 0]
    one_more = select_top(remainders.astype(jnp.float32), spare, remainders > 0)
    return floors + one_more


def spread(
    wanted: Int[Array, "*shape X"],
    caps: Int[Array, "*shape X"],
    total: Int[Array, "*shape"],
    least: Int[Array, "*shape X"] | int = 0,
) -> Int[Array, "*shape X"]:
    """`wanted` clipped to [least, caps]; the others take what the caps cut off, or make up `least`.

    The result is wanted + level, clipped, with the highest integer level whose sum is at most
    `total`; what is left goes one each to the lowest indices that the next level would raise. It
    sums to `total`, as far as the bounds allow. No entry falls when `total` grows, nor when an
    entry of `wanted` and `total` grow alike.

    Args:
      wanted: sizes >= 0.
      caps, least: bounds, 0 <= least <= caps.
    """

    def sizes_at(level):
        return jnp.clip(wanted + level[..., None], least, caps)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high + 1) // 2
        fits = sizes_at(middle).sum(-1, dtype=jnp.int32) <= total
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    zero = jnp.zeros(total.shape, jnp.int32)
    level, _ = lax.fori_loop(0, 31, halve, (zero - wanted.max(), zero + caps.max()))
    sizes = sizes_at(level)
    spare = (total - sizes.sum(-1, dtype=jnp.int32))[..., None]
    can_grow = sizes_at(level + 1) > sizes
    return sizes + (can_grow & (jnp.cumsum(can_grow, axis=-1, dtype=jnp.int32) <= spare))


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
    ramp = high[:, None] * (layers - 1) - index * (high - low)[:, None]
    return spread(largest_remainder(ramp, layers - 1), caps, layers * base)


def profile_layers(
    retained: Float[Array, " L"],
    base: Int[Array, " B"] | None,
    caps: Int[Array, "B L"],
    protected: Int[Array, "B L"],
    lengths: Int[Array, " B"],
) -> Int[Array, "B L"]:
    """Sizes from a stored profile: the fraction of the prompt that each layer retains.

    Without `base`, layer l keeps lengths * retained[l], largest remainder over the layers, in
    all round(lengths * sum(retained)). With `base`, the profile is scaled to L * base. A layer
    keeps its protected entries whatever its profile says; the others make up for them.
    """
    layers = caps.shape[-1]
    weight = retained.astype(jnp.float32)
    asked = lengths * weight.sum() if base is None else layers * base
    total = jnp.round(asked).astype(jnp.int32)
    quota = total[:, None] * (weight / weight.sum())
    floors = jnp.floor(quota).astype(jnp.int32)
    spare = total - floors.sum(-1, dtype=jnp.int32)
    one_more = select_top(quota - floors, spare, jnp.ones(caps.shape, bool))
    return spread(floors + one_more, caps, total, protected)


def prefix_layers(
    scores: Float[Array, "B L S"],
    eligible: Bool[Array, "B L S"],
    protected: Int[Array, "B L"],
    base: Int[Array, " B"],
) -> Int[Array, "B L"]:
    """PrefixKV (Wang et al. 2024, section 3): one threshold of cumulative mass for all layers.

    Let c_l(i) be the share of layer l's importance that its i best tokens hold before the next
    one is added (c_l(0) = 0, tokens in falling order). Layer l's prefix at threshold p is the
    number of i with c_l(i) < p, and p is the largest with

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
    offered = eligible.sum(-1, dtype=jnp.int32)
    room = offered - protected
    ranked = -jnp.sort(-jnp.where(eligible, jnp.maximum(scores, 0.0), 0.0), axis=-1)
    mass = jnp.cumsum(ranked, axis=-1)
    whole = jnp.where(mass[..., -1:] > 0, mass[..., -1:], 1.0)
    before = jnp.concatenate([jnp.zeros_like(mass[..., :1]), mass[..., :-1]], axis=-1) / whole
    usable = jnp.arange(scores.shape[-1]) < room[..., None]

    # Smallest keys first: rank by the complement of the bit pattern.
    keys = jnp.where(usable, ~lax.bitcast_convert_type(before, jnp.uint32), jnp.uint32(0))
    budget = jnp.minimum(scores.shape[1] * base - protected.sum(-1), room.sum(-1))
    batch = keys.shape[0]
    threshold = kth_largest(keys.reshape(batch, -1), budget)[:, None]
    above = (keys > threshold[..., None]).sum(-1, dtype=jnp.int32)
    tied = ((keys == threshold[..., None]) & usable).sum(-1, dtype=jnp.int32)
    next_token = jnp.take_along_axis(
        ranked / whole, jnp.minimum(above, scores.shape[-1] - 1)[..., None], axis=-1
    )[..., 0]
    spare = budget - above.sum(-1, dtype=jnp.int32)
    return protected + above + _in_order(tied, next_token, spare)


def _in_order(
    available: Int[Array, "B L"], priority: Float[Array, "B L"], amount: Int[Array, " B"]
) -> Int[Array, "B L"]:
    """Give `amount` away, each layer in falling priority taking all that it can."""
    order = jnp.argsort(-priority, axis=-1, stable=True)
    queue = jnp.take_along_axis(available, order, axis=-1)
    taken_before = jnp.cumsum(queue, axis=-1) - queue
    given = jnp.clip(amount[:, None] - taken_before, 0, queue)
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
    flat = select_top(
        scores.reshape(batch, -1), heads * base, contenders.reshape(batch, -1)
    ).reshape(scores.shape)
    count = flat.sum(-1, dtype=jnp.int32)
    alpha = round(floor * THOUSAND)
    even = count.sum(-1, keepdims=True, dtype=jnp.int32) // heads
    mix = (THOUSAND - alpha) * count + alpha * even
    by_mass = jnp.argsort(-jnp.where(eligible, scores, 0.0).sum(-1), axis=-1, stable=True)
    sizes = largest_remainder(jnp.take_along_axis(mix, by_mass, axis=-1), THOUSAND)
    return jnp.take_along_axis(sizes, jnp.argsort(by_mass, axis=-1), axis=-1)
