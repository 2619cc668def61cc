"""prompt -> prefill -> compress -> decode, as functions from arrays to arrays.

B batch, T prompt tokens (the bucket), D model dim, V vocabulary, O tokens asked for. The model
is an argument: a pytree with `embed`, `layers`, `logits`, `extend` and `config`, and `see` where it
reads images. `generate.py` inlines these stages into one program, or jits them apart.
"""

import math
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax import sharding
from kvjax.cache import Cache, Tail, compact, forget
from kvjax.compress import Packing, add_layer, finish, make_plan, probe_request
from kvjax.config import CompressionConfig, Recompress
from kvjax.loose import Ratio, entries_of_prompt
from kvjax.probe import Probe, ProbeRequest
from kvjax.recompress import evict, make_room
from kvjax.reconstruction import reconstruction_scores
from kvjax.sampling import Sampling, Switches, Values, sample
from kvjax.seen import NOTHING, Images, Seen, see

# A question or a scored text longer than this runs against the cache in several blocks, so that
# its scores never span the whole of it.
BLOCK = 128
# Rows of a batch with more tokens than this are prefilled and compressed in groups, one after the
# other, so that a large batch needs no more memory on the way than one of its groups.
PREFILL_TOKENS = 16_384


@no_type_check  # jax maps trees to other leaves than arrays
class Answer(struct.PyTreeNode):
    """Decoding so far.

    Attributes:
      tokens: `[B, O]` drawn, -1 where none is; an end-of-sequence token is the row's last.
      log_probs: `[B, O]` fp32, under the model itself.
      count: tokens drawn by the rows that are still running.
      done: `[B]` rows that have drawn an end-of-sequence token.
      keys: `[B]` random keys.
      seen: `[B, V]` tokens of the prompt and the answer, or None without a repetition penalty.
    """

    tokens: Int[Array, "B O"]
    log_probs: Float[Array, "B O"]
    count: Int[Array, ""]
    done: Bool[Array, " B"]
    keys: Key[Array, " B"]
    seen: Bool[Array, "B V"] | None


@no_type_check  # jax maps trees to other leaves than arrays
class Held(struct.PyTreeNode):
    """What an answer is decoded from.

    Attributes:
      kept: `[B, L, K]` entries of the prompt that each row, layer and head holds.
      nbytes: bytes of the keys and values that are held beside the tail, empty slots included.
    """

    kept: Int[Array, "B L K"]
    nbytes: int = struct.field(pytree_node=False)


@no_type_check  # jax maps trees to other leaves than arrays
class Rules(struct.PyTreeNode):
    """How tokens are drawn and what ends a row.

    Attributes:
      values: the sampling rules' numbers.
      eos: `[E]` end-of-sequence ids, -1 for none.
      switches: which rules are on.
    """

    values: Values
    eos: Int[Array, " E"]
    switches: Switches = struct.field(pytree_node=False)


def greedy_rules() -> Rules:
    """The likeliest token, always, and no token that ends a row: what evaluations want."""
    rules = Sampling()
    return Rules(values=rules.values, eos=jnp.array([-1]), switches=rules.switches)


# ---------------------------------------------------------------------------- prompt
def prefill(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    request: ProbeRequest,
    seen: Seen = NOTHING,
) -> tuple[Float[Array, "B V"], tuple[Array, ...], tuple[Array, ...], tuple[Probe, ...]]:
    """Every layer's keys, values and probe, uncompressed, and the logits after each prompt."""
    x_BTD = seen.put(model.embed(tokens))
    layers = []
    for layer in model.layers:
        x_BTD, *kept = layer.prefill(x_BTD, lengths, request, seen.rotary)
        layers.append(kept)
    keys, values, probes = zip(*layers, strict=True)
    if request.repeat is not None:
        scores = reconstruction_scores(model, tokens, lengths, keys, values, request.repeat, seen)
        probes = tuple(p.replace(reconstruction=s) for p, s in zip(probes, scores, strict=True))
    return last_logits(model, x_BTD, lengths), keys, values, probes


def prefill_compress(
    model: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    config: CompressionConfig,
    images: Images | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Prefill and compress a batch of prompts, in groups of rows where it is large.

    The logits, and so the first token, come from the uncompressed prompt. The tail has no slots.

    Args:
      model: the decoder.
      tokens: prompts padded on the right.
      lengths: their real tokens.
      key: of the `random` scorer, one for all rows or one a row.
      config: what is kept.
      images: of all rows, seen by the model's tower before any row is prefilled.
    """
    seen = see(model, images)
    batch, width = tokens.shape
    shards = math.gcd(batch, sharding.parts((sharding.DATA,)))
    groups = _groups(batch // shards, width)
    tokens, lengths = sharding.constrain(tokens, "BT"), sharding.constrain(lengths, "B")
    if groups == 1:
        return _prefill_compress(model, tokens, lengths, key, config, seen)

    def one(group):
        tokens, lengths, places, rotary, own = group
        mine = seen.replace(places=places, rotary=rotary)
        return _prefill_compress(model, tokens, lengths, key if own is None else own, config, mine)

    per_row = (tokens, lengths, seen.places, seen.rotary, key if key.ndim else None)

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


def _prefill_compress(model, tokens, lengths, key, config, seen):
    """Layer by layer: a layer is packed before the next one runs, if it can be scored then."""
    plan = make_plan(config, lengths, tokens.shape[1], model.config.sliding_windows, key)
    request = probe_request(config, tokens.shape[1])
    kept = Packing()
    if request.repeat is not None:
        logits, *layers = prefill(model, tokens, lengths, request, seen)
        for index, layer in enumerate(zip(*layers, strict=True)):
            kept = add_layer(kept, index, *layer, plan)
        return logits, finish(kept, plan).replace(rotary_shift=seen.shift)
    x_BTD = seen.put(model.embed(tokens))
    for index, layer in enumerate(model.layers):
        x_BTD, keys, values, probe = layer.prefill(x_BTD, lengths, request, seen.rotary)
        kept = add_layer(kept, index, keys, values, probe, plan)
        # Without the barrier XLA may keep every layer's keys and values alive to the end.
        x_BTD, kept = lax.optimization_barrier((x_BTD, kept))
    cache = finish(kept, plan).replace(rotary_shift=seen.shift)
    return last_logits(model, x_BTD, lengths), cache


def last_logits(
    model: Any, x_BTD: Float[Array, "B T D"], lengths: Int[Array, " B"]
) -> Float[Array, "B V"]:
    """Logits after the last real token of each row, and of no other."""
    last_B11 = jnp.maximum(lengths - 1, 0)[:, None, None]
    return model.logits(jnp.take_along_axis(x_BTD, last_B11, axis=1)[:, 0])


def extend_prompt(
    model: Any, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], cache: Cache
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


# ---------------------------------------------------------------------------- answer
def start_answer(
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    key: Key[Array, "*row"],
    rules: Rules,
    room: int,
) -> Answer:
    """Draw the first token of each row from the prompt's logits; `room` is O.

    Every row draws from a key of its own, whatever its place in the batch.
    """
    batch, vocab = logits.shape
    seen = None
    if rules.switches.penalty:
        real_BT = jnp.arange(tokens.shape[1]) < lengths[:, None]
        rows_B1 = jnp.arange(batch)[:, None]
        seen = jnp.zeros((batch, vocab), bool).at[rows_B1, tokens].max(real_BT)
    answer = Answer(
        tokens=jnp.full((batch, room), -1, jnp.int32),
        log_probs=jnp.zeros((batch, room), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((batch,), bool),
        keys=jax.vmap(jax.random.fold_in, (0, None))(jnp.broadcast_to(key, (batch,)), 0),
        seen=seen,
    )
    return _draw(logits, answer, rules)


def _draw(logits: Float[Array, "B V"], answer: Answer, rules: Rules) -> Answer:
    keys = jax.vmap(jax.random.fold_in, (0, None))(answer.keys, answer.count)
    token_B, log_prob_B = sample(logits, keys, answer.seen, rules.switches, rules.values)
    token_B = jnp.where(answer.done, -1, token_B)
    log_prob_B = jnp.where(answer.done, 0.0, log_prob_B)
    seen = answer.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token_B.shape[0]), jnp.maximum(token_B, 0)].max(~answer.done)
    start = (0, answer.count)
    return answer.replace(
        tokens=lax.dynamic_update_slice(answer.tokens, token_B[:, None], start),
        log_probs=lax.dynamic_update_slice(answer.log_probs, log_prob_B[:, None], start),
        count=answer.count + 1,
        done=answer.done | (token_B[:, None] == rules.eos).any(-1),
        seen=seen,
    )


def decode(
    model: Any, cache: Cache, answer: Answer, rules: Rules, steps: int
) -> tuple[Cache, Answer]:
    """At most `steps` more tokens: feed each row's last, draw the next; stop when all are done.

    The kept entries are a constant of the loop; the tail and the answer are its state.
    """

    def unfinished(state):
        _, _, current = state
        most = jnp.minimum(answer.count + steps, current.tokens.shape[1])
        return (current.count < most) & ~current.done.all()

    def step(state: tuple[Tail, Array, Answer]):
        tail, next_positions, current = state
        now = cache.replace(tail=tail, next_positions=next_positions)
        last_B1 = lax.dynamic_slice_in_dim(current.tokens, current.count - 1, 1, axis=1)
        counts_B = (~current.done).astype(jnp.int32)
        x_B1D, now = model.extend(jnp.maximum(last_B1, 0), counts_B, now)
        return now.tail, now.next_positions, _draw(model.logits(x_B1D[:, 0]), current, rules)

    # The name says in a program's text which loop this is.
    with jax.named_scope("decode"):
        tail, next_positions, answer = lax.while_loop(
            unfinished, step, (cache.tail, cache.next_positions, answer)
        )
    return cache.replace(tail=tail, next_positions=next_positions), answer


def open_answer(
    model: Any,
    cache: Cache,
    recompress: Recompress | None,
    new_tokens: int,
    fraction: float,
    asked: bool,
) -> tuple[Cache, Ratio | None, Held]:
    """Make a cache, with its question, ready to be decoded from; the stage before `decode`.

    Args:
      model: the decoder.
      cache: with room for the answer, or for a segment of it, in its tail.
      recompress: when to compress again, or None.
      new_tokens, fraction: how the cache may grow where the rule keeps a ratio.
      asked: whether the cache was the caller's, with turns after its prompt.

    Returns:
      The cache, the ratio that it is to keep, and what a `Generation` says of it.
    """
    kept, ratio = kept_entries(cache), None
    if recompress is not None:
        config = model.config
        grown = (new_tokens, fraction) if not asked else (0, 1.0)
        windows = config.sliding_windows
        cache, ratio = make_room(cache, recompress, config.num_heads, windows, asked, *grown)
    return cache, ratio, Held(kept=kept, nbytes=cache.nbytes)


def decode_in_segments(
    model: Any,
    cache: Cache,
    answer: Answer,
    rules: Rules,
    recompress: Recompress,
    ratio: Ratio | None,
) -> tuple[Cache, Answer]:
    """The whole answer, with the cache compressed again before every segment but the first.

    The outer loop's state holds the pool; in the inner one, `decode`, it is a constant.

    Args:
      cache, ratio: from `open_answer`; the tail has room for a segment.
      answer: from `start_answer`.
    """

    def unfinished(current: Answer):
        return (current.count < current.tokens.shape[1]) & ~current.done.all()

    def segment(state):
        pool, tail, next_positions, current = state
        now = cache.replace(pool=pool, tail=tail, next_positions=next_positions)
        now, current = decode(model, now, current, rules, recompress.every)

        def compress_again(state):
            pool, tail, _ = state
            full = now.replace(pool=pool, tail=tail)
            full = evict(full, ratio, recompress, model.config.sliding_windows)
            return full.pool, full.tail, jnp.array(False)

        # Once or not at all. A conditional would copy the pool, the state of a loop stays in place.
        more = unfinished(current)
        state = lax.while_loop(lambda s: s[-1], compress_again, (now.pool, now.tail, more))
        return *state[:2], now.next_positions, current

    state = cache.pool, cache.tail, cache.next_positions, answer
    pool, tail, next_positions, answer = lax.while_loop(
        lambda state: unfinished(state[-1]), segment, state
    )
    return cache.replace(pool=pool, tail=tail, next_positions=next_positions), answer


def close_answer(
    model: Any,
    cache: Cache,
    answer: Answer,
    ratio: Ratio | None,
    recompress: Recompress | None,
) -> Cache:
    """The cache for the next turn: compressed again where it is to be, with the whole answer in it.

    Each row's last token is run too, and the tail has its tokens side by side.
    """
    if recompress is not None:
        cache = evict(cache, ratio, recompress, model.config.sliding_windows)
    drawn_B = (answer.tokens >= 0).sum(-1, dtype=jnp.int32)
    last_B1 = jnp.take_along_axis(answer.tokens, drawn_B[:, None] - 1, axis=1)
    _, cache = model.extend(last_B1, jnp.ones_like(drawn_B), cache)
    return cache.replace(tail=compact(forget(cache.tail)))


def kept_entries(cache: Cache) -> Int[Array, "B L K"]:
    """Entries of the prompt that each row, layer and head keeps; answers' do not count."""
    counts = cache.counts
    if cache.pool is not None and cache.pool.starts is not None:
        counts = entries_of_prompt(cache.pool, cache.prompt_lengths)
    return jnp.broadcast_to(counts, (cache.batch, *counts.shape[1:]))
