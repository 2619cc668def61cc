"""Scorers: how important is each entry of a cache.

A scorer maps what attention left in the `Probe`, keys and values of a prompt to fp32 importances
`[B, K, T]`, all >= 0; some can do the same for a cache while an answer is decoded, `[B, K, S]`.

B batch, T prompt tokens, W observation window, N query heads, K KV heads, G = N // K, H head dim,
S entries of a cache, slots and tail.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kvjax.compression.row_budgets import eligible
from kvjax.compression.scorer_input import HeldInput, ScorerInput, norms, unit
from kvjax.kernels.window_scores import window_scores
from kvjax.methods import Settings
from kvjax.model_interface import ProbeRequest, Repeat
from kvjax.sharding import across_group, by_device

# Tokens that expected attention looks at together: between keys and scores lies an array that is
# G times as large as the keys, in fp32.
BLOCK = 1024
# Last queries of a prompt whose squared probabilities its entries begin with: KV-Compress's best.
SUMS_WINDOW = 8


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A scorer with all that is known of it: a row of SCORERS.

    Attributes:
      function: importances >= 0 `[B, K, T]` of a layer's entries; what padding gets is ignored.
      words: what it reads, for people.
      reads: fields of the `Probe` that it reads.
      request: what the prefill is asked for, from the settings and the observation window of the
        longest prompt of a bucket, in tokens.
      question: whether it scores by the prompt's last queries, so that a question which comes
        after compression is not provided for.
      all_queries: whether it reads every query of the prompt, not only the last ones.
      window: observation window where the settings have none, in tokens.
      passes: cost of prefill with scoring, in prefills.
      decoding: importances >= 0 `[B, K, S]` of a cache's entries while an answer is decoded; None
        where it reads what only a prefill leaves.
      decoding_queries: whether that reads the last queries.
      decoding_sums: whether that reads the squared probabilities that entries have received.
    """

    function: Callable[[ScorerInput], Float[Array, "B K T"]]
    words: str
    reads: tuple[str, ...] = ()
    request: Callable[[Settings, int], ProbeRequest] = lambda settings, window: ProbeRequest()
    question: bool = False
    all_queries: bool = False
    window: int = 32
    passes: str = "1"
    decoding: Callable[[HeldInput], Float[Array, "B K S"]] | None = None
    decoding_queries: bool = False
    decoding_sums: bool = False


def decoding_scorers() -> tuple[str, ...]:
    """Names of the scorers that a cache can be compressed by while an answer is decoded."""
    return tuple(name for name, row in SCORERS.items() if row.decoding is not None)


def score(layer: ScorerInput) -> Float[Array, "B K T"]:
    """Importance of each entry under `layer.config.scorer`; padding scores 0.

    Raises:
      ValueError: the probe lacks what the scorer reads.
    """
    scores_BKT = jnp.where(layer.real, SCORERS[layer.config.scorer].function(layer), 0.0)
    if layer.config.chunk == 1:
        return scores_BKT
    return jnp.where(layer.real, by_chunk(scores_BKT, layer), 0.0)


# ---------------------------------------------------------------------------- attention seen
def _window(layer: ScorerInput) -> Float[Array, "B K T"]:
    """SnapKV (Li et al. 2024, section 4): attention from the last W queries, pooled.

    The softmax runs over all keys; the window's own columns are dropped after it, so rows do not
    renormalise. The query heads of a group are reduced before pooling (Ada-KV).
    """
    config = layer.config
    raw_BKT = _observed(layer, power=1, group=config.group)
    if config.reduce == "mean":
        raw_BKT = raw_BKT / jnp.maximum(layer.rows.window, 1)[:, None, None]
    return _before(layer, smooth(_before(layer, raw_BKT), config.pooling, config.kernel))


def _l2_window(layer: ScorerInput) -> Float[Array, "B K T"]:
    """KV-Compress (Rehg 2024, section 3.2): SQUARED probabilities of the last W queries.

        score_k(i) = sum over the group's query heads n of smooth(sum over w of A_n(w, i)^2)

    Squares favour an entry that one query needs over one that all of them glance at. Pooling comes
    before the sum over the group, as in the authors' code.
    """
    config, kv_heads = layer.config, layer.keys.shape[2]
    raw_BNT = _before(layer, _observed(layer, power=2, group=None))
    pooled_BNT = _before(layer, smooth(raw_BNT, config.pooling, config.kernel))
    group = pooled_BNT.shape[1] // kv_heads
    return over_group(pooled_BNT, kv_heads, "mean") * group


def squared_sums(layer: ScorerInput) -> Float[Array, "B K T"]:
    """KV-Compress's metric of a prompt's entries: squared probabilities of its last queries.

    As `l2-window`, but entries of the window have theirs too: what keeps them is their position.
    The window is the scorer's own, or as long where the scorer has another kind.
    """
    rows, row = layer.rows, SCORERS[layer.config.scorer]
    observed = row.function in (_l2_window, squared_sums)
    window_B = rows.window if observed else jnp.minimum(rows.lengths, SUMS_WINDOW)
    raw_BNT = _observed(layer, power=2, group=None, window=window_B)
    pooled_BNT = smooth(raw_BNT, layer.config.pooling, layer.config.kernel)
    kv_heads = layer.keys.shape[2]
    sums_BKT = over_group(pooled_BNT, kv_heads, "mean") * (pooled_BNT.shape[1] // kv_heads)
    return jnp.where(layer.real, sums_BKT, 0.0)


def _sums_while_decoding(layer: HeldInput) -> Float[Array, "B K S"]:
    """KV-Compress's metric of a cache's entries, as attention has added it up."""
    assert layer.sums is not None  # `decoding_sums`
    return jnp.where(layer.filled, layer.sums, 0.0)


def _tova(layer: ScorerInput) -> Float[Array, "B K T"]:
    """TOVA (Oren et al. 2024, section 3.2): attention from the last query, the mean over all heads.

    With `heads="shared"` the mean is taken where heads are, so nothing is lost here.
    """
    return _before(layer, _observed(layer, power=1, group="mean", queries=1))


def _observed(
    layer: ScorerInput, *, power, group, queries: int = 0, window: Int[Array, " B"] | None = None
) -> Float[Array, "B X T"]:
    """Column sums of the softmax over a row's observation window, or its last `queries` queries.

    `window` replaces the row's own.
    """
    rows, queries_BWNH = layer.rows, layer.read("queries")[:, -queries:]
    back_W = jnp.arange(queries_BWNH.shape[1], 0, -1)  # the last query is 1 from the end
    if window is not None:
        rows = rows.replace(window=window)
    observed_BW = back_W <= rows.window[:, None]
    positions_BW = jnp.where(observed_BW, rows.lengths[:, None] - back_W, -1)

    def observe(*arrays):
        sums = window_scores(*arrays, window=layer.window, power=power, group=group)
        return across_group(sums, group)

    heads = "K" if group else "N"
    prompt = queries_BWNH, positions_BW, layer.keys, rows.lengths
    return by_device(observe, f"BWNH,BW,BTKH,B->B{heads}T", *prompt)


def _before(layer: ScorerInput, scores: Float[Array, "B X T"]) -> Float[Array, "B X T"]:
    """Scores of what lies before the observation window; the window's own are 0."""
    rows, tokens = layer.rows, layer.keys.shape[1]
    before_B1T = (jnp.arange(tokens) < (rows.lengths - rows.window)[:, None])[:, None]
    return jnp.where(before_B1T, scores, 0.0)


def _window_while_decoding(layer: HeldInput) -> Float[Array, "B K S"]:
    """Attention from the last queries to all that the layer holds, the mean over a group's."""
    assert layer.queries is not None  # `decoding_queries`
    assert layer.query_positions is not None
    batch, observed, _, head_dim = layer.queries.shape
    kv_heads = layer.filled.shape[1]
    q_BKGWH = jnp.moveaxis(layer.queries.reshape(batch, observed, kv_heads, -1, head_dim), 1, 3)
    s_BKRS = layer.held_keys.dot(q_BKGWH.reshape(batch, kv_heads, -1, head_dim)) * head_dim**-0.5
    s_BKGWS = s_BKRS.reshape(*q_BKGWH.shape[:4], -1)
    at_BW1 = layer.query_positions[..., None]
    distance_BWS = at_BW1 - layer.positions[:, None]
    visible_BWS = (distance_BWS >= 0) & (at_BW1 >= 0)
    if layer.window is not None:
        visible_BWS &= distance_BWS < layer.window
    visible = layer.filled[:, :, None, None] & visible_BWS[:, None, None]
    return softmax_where(visible, s_BKGWS).mean((2, 3))


def softmax_where(
    visible: Bool[Array, "*#shape S"], scores: Float[Array, "*shape S"]
) -> Float[Array, "*shape S"]:
    """Softmax over what is visible; 0 elsewhere, and throughout where nothing is."""
    scores = jnp.where(visible, scores, -jnp.inf)
    peak = scores.max(-1, keepdims=True)
    p = jnp.exp(scores - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total > 0, total, 1.0)


def _accumulated(layer: ScorerInput) -> Float[Array, "B K T"]:
    """H2O (Zhang et al. 2023), PrefixKV: attention received from all queries of the prompt."""
    return over_group(layer.read("column_sums"), layer.keys.shape[2], layer.config.group)


# ---------------------------------------------------------------------------- attention expected
def _expected(layer: ScorerInput) -> Float[Array, "B K T"]:
    """Expected Attention (Devoto et al. 2025, equations 6 to 9): no query of the question needed.

    Future queries are taken as Gaussian with mean m and covariance C (the prompt's own before RoPE,
    rotated by the mean rotation of the positions to come), so that in expectation

        E exp(q . k / sqrt(H)) = exp(m . k / sqrt(H) + k' C k / 2H).

    The importance is (p + epsilon) |v|: p is the softmax of the exponents over what can be seen but
    the sinks, the mean over the group. Below epsilon values count for more than expectations, whose
    scale differs from head to head; without it heads of large values take `ada`'s whole budget.
    """
    kv_heads = layer.keys.shape[2]
    mean_BNH, cov_BNHI = layer.read("future_mean"), layer.read("future_cov")
    batch, heads, head_dim = mean_BNH.shape
    grouped = (batch, kv_heads, heads // kv_heads, head_dim)
    mean_BKGH, cov_BKGHI = mean_BNH.reshape(grouped), cov_BNHI.reshape(*grouped, head_dim)

    def exponents(k_BSKH):
        k_BSKH = k_BSKH.astype(jnp.float32)
        linear_BKGS = jnp.einsum("BKGH,BSKH->BKGS", mean_BKGH, k_BSKH) * head_dim**-0.5
        turned_BKGSI = jnp.einsum("BSKH,BKGHI->BKGSI", k_BSKH, cov_BKGHI)
        square_BKGS = jnp.einsum("BKGSI,BSKI->BKGS", turned_BKGSI, k_BSKH)
        return linear_BKGS + square_BKGS / (2 * head_dim)

    s_BKGT = _in_blocks(exponents, layer.keys)
    tokens = layer.keys.shape[1]
    counted_BT = eligible(layer.rows, tokens, layer.window)
    counted_BT &= jnp.arange(tokens) >= layer.rows.sinks[:, None]
    p_BKT = softmax_where(counted_BT[:, None, None], s_BKGT).mean(2)
    importance_BKT = (p_BKT + layer.config.epsilon) * norms(layer.values)
    return jnp.where(counted_BT[:, None], importance_BKT, 0.0)


def _in_blocks(function: Callable[[Array], Array], k_BTKH: Array) -> Array:
    """`function` of BLOCK tokens at a time where that divides the bucket; tokens come last."""
    tokens = k_BTKH.shape[1]
    if tokens <= BLOCK or tokens % BLOCK:
        return function(k_BTKH)
    starts = jnp.arange(0, tokens, BLOCK)
    found = lax.map(
        lambda at: function(lax.dynamic_slice_in_dim(k_BTKH, at, BLOCK, axis=1)), starts
    )
    return jnp.moveaxis(found, 0, -2).reshape(*found.shape[1:-1], tokens)


def _kvzip(layer: ScorerInput) -> Float[Array, "B K T"]:
    """KVzip (Kim et al. 2025, section 3): what a repetition of the prompt attends to.

    The prompt is run once more, after itself, against its full cache, in chunks; an entry's
    importance is the most attention that any query of its chunk's repetition, of any head of the
    group, gives to it (`kvjax.compression.kvzip`). What is needed to say the prompt again is needed
    for any question about it.
    """
    return layer.read("reconstruction")


# ---------------------------------------------------------------------------- keys alone
def _key_norm(layer: ScorerInput | HeldInput) -> Float[Array, "B K S"]:
    """Devoto et al. 2024, section 4: entries with SMALL keys are attended to; 1 / |k|."""
    return 1.0 / jnp.maximum(layer.held_keys.norms(), 1e-30)


def _key_diff(layer: ScorerInput | HeldInput) -> Float[Array, "B K S"]:
    """KeyDiff (Park et al. 2025, equation 5): entries whose keys are unlike the mean direction.

        1 - cos(k_i, a),  a = mean over entries of k_j / |k_j|

    in [0, 2]; the mean is over the entries that the layer can still see.
    """
    units = layer.held_keys.units()
    anchor_BKH = unit(units.total(layer.can))
    return jnp.maximum(1.0 - units.dot(anchor_BKH[:, :, None])[:, :, 0], 0.0)


# ---------------------------------------------------------------------------- baselines
def _positional(layer: ScorerInput) -> Float[Array, "B K T"]:
    """StreamingLLM (Xiao et al. 2023): the later the better."""
    batch, tokens, kv_heads, _ = layer.keys.shape
    return jnp.broadcast_to(jnp.arange(1.0, tokens + 1), (batch, kv_heads, tokens))


def _random(layer: ScorerInput) -> Float[Array, "B K T"]:
    """One draw a position, so that neither the bucket nor the batch changes it."""
    batch, tokens, kv_heads, _ = layer.keys.shape

    def draw(key, position):
        return jax.random.uniform(jax.random.fold_in(key, position), (kv_heads,))

    draw_rows = jax.vmap(jax.vmap(draw, (None, 0), 1), (0, None))
    return draw_rows(jnp.broadcast_to(layer.key, (batch,)), jnp.arange(tokens))


def _alike(layer: ScorerInput) -> Float[Array, "B K T"]:
    """`full`, which keeps everything and scores nothing."""
    batch, tokens, kv_heads, _ = layer.keys.shape
    return jnp.ones((batch, kv_heads, tokens))


# ---------------------------------------------------------------------------- the table
_observer = partial(
    Scorer,
    reads=("queries",),
    request=lambda settings, window: ProbeRequest(queries=max(1, window)),
    question=True,
)


def _repetition(settings: Settings, window: int) -> ProbeRequest:
    instructions = settings.repeat or ((), ())
    return ProbeRequest(repeat=Repeat(settings.repeat_chunk, instructions, settings.sinks))


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "none": Scorer(function=_alike, words="nothing"),
        "window": _observer(
            function=_window,
            words="last W queries",
            decoding=_window_while_decoding,
            decoding_queries=True,
        ),
        "l2-window": _observer(function=_l2_window, words="last W queries", window=SUMS_WINDOW),
        "squared-sum": _observer(
            function=squared_sums,
            words="last W queries",
            window=SUMS_WINDOW,
            decoding=_sums_while_decoding,
            decoding_sums=True,
        ),
        "tova": _observer(function=_tova, words="last query", window=1),
        "accumulated": Scorer(
            function=_accumulated,
            words="all queries",
            reads=("column_sums",),
            request=lambda settings, window: ProbeRequest(column_sums=True),
            all_queries=True,
            passes="1.3",
        ),
        "expected-attention": Scorer(
            function=_expected,
            words="mean and covariance of all queries",
            reads=("future_mean", "future_cov"),
            request=lambda settings, window: ProbeRequest(future=settings.future),
            all_queries=True,
        ),
        "kvzip": Scorer(
            function=_kvzip,
            words="a repetition of the prompt",
            reads=("reconstruction",),
            request=_repetition,
            all_queries=True,
            passes="2 to 3",
        ),
        "key-norm": Scorer(function=_key_norm, words="keys", decoding=_key_norm),
        "key-diff": Scorer(function=_key_diff, words="keys", decoding=_key_diff),
        "positional": Scorer(function=_positional, words="nothing"),
        "random": Scorer(function=_random, words="nothing"),
    }
)


# ---------------------------------------------------------------------------- parts
def output_aware(
    scores: Float[Array, "B K T"], norms: Float[Array, "B K T"]
) -> Float[Array, "B K T"]:
    """CriticalKV (Feng et al. 2025, algorithm 1): importance times the value's part in the output.

        (s_i + 1e-4) * mean over the group of |v_i W_n^O|_1

    What it is for is the second half of a head's entries; the first half goes by `scores` alone.
    """
    return (scores + 1e-4) * norms


def by_chunk(scores: Float[Array, "B K T"], layer: ScorerInput) -> Float[Array, "B K T"]:
    """ChunkKV (Liu et al. 2025, algorithm 1): every entry gets the mean of its chunk.

    Chunks start at position 0; the mean is over a chunk's selectable entries. Equal scores go to
    the lower position, so chunks are taken whole, and only the last one is cut by the budget.
    """
    tokens, size = scores.shape[-1], layer.config.chunk
    rows = layer.rows
    positions_T = jnp.arange(tokens)
    can_BT = eligible(rows, tokens, layer.window) & (positions_T >= rows.sinks[:, None])
    can_BT &= positions_T < (rows.lengths - rows.recent)[:, None]
    short = -tokens % size

    def chunks(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, short))).reshape(*x.shape[:2], -1, size)

    counted = chunks(jnp.broadcast_to(can_BT[:, None], scores.shape))
    mean = jnp.where(counted, chunks(scores), 0.0).sum(-1) / jnp.maximum(counted.sum(-1), 1)
    return jnp.repeat(mean, size, axis=-1)[..., :tokens]


def over_group(
    per_query_head: Float[Array, "B N T"], kv_heads: int, how: str
) -> Float[Array, "B K T"]:
    """The mean or the max over the G query heads that share a KV head."""
    batch, _, tokens = per_query_head.shape
    grouped_BKGT = per_query_head.reshape(batch, kv_heads, -1, tokens)
    return grouped_BKGT.max(2) if how == "max" else grouped_BKGT.mean(2)


def smooth(scores: Float[Array, "B X T"], how: str, kernel: int) -> Float[Array, "B X T"]:
    """Smooth along the sequence so that neighbours of an important entry survive with it.

    "average" pads with zeros and always divides by `kernel` (edges are biased low, as upstream);
    "max" is over the scores inside the sequence. Example, kernel 3, of 1 0 0:
    average 1/3 1/3 0, max 1 1 0.
    """
    if how == "none" or kernel == 1:
        return scores
    # What is wider than both neighbourhoods of a whole sequence is as wide as they are.
    window = (1, 1, min(kernel, 2 * scores.shape[-1] - 1))
    if how == "average":
        return lax.reduce_window(scores, 0.0, lax.add, window, (1, 1, 1), "SAME") / kernel
    return lax.reduce_window(scores, -jnp.inf, lax.max, window, (1, 1, 1), "SAME")
