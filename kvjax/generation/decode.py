"""Decode an answer: first token, loop, what is handed back; from arrays to arrays.

B batch, T prompt tokens (the bucket), V vocabulary, E end-of-sequence ids, O tokens asked for. The
model is an argument.
"""

from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax.cache.ratio import Ratio
from kvjax.cache.state import Cache
from kvjax.cache.sums import settle
from kvjax.cache.tail import Tail, compact, forget
from kvjax.compression.recompress import evict, make_room
from kvjax.compression.room import entries_of_prompt
from kvjax.config import Recompress
from kvjax.generation.sampling import Sampling, Switches, Values, sample
from kvjax.model_interface import Model


@no_type_check  # jax maps trees to other leaves than arrays
class Answer(struct.PyTreeNode):
    """Decoding so far.

    Attributes:
      tokens: `[B, O]` drawn, -1 where none is; an end-of-sequence token is the row's last.
      log_probs: `[B, O]` fp32, under the model itself.
      count: tokens drawn by the rows that are still running.
      done: `[B]` rows that have drawn an end-of-sequence token.
      keys: `[B]` random keys.
      used: `[B, V]` tokens of the prompt and the answer, or None without a repetition penalty.
    """

    tokens: Int[Array, "B O"]
    log_probs: Float[Array, "B O"]
    count: Int[Array, ""]
    done: Bool[Array, " B"]
    keys: Key[Array, " B"]
    used: Bool[Array, "B V"] | None


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
    used = None
    if rules.switches.penalty:
        real_BT = jnp.arange(tokens.shape[1]) < lengths[:, None]
        rows_B1 = jnp.arange(batch)[:, None]
        used = jnp.zeros((batch, vocab), bool).at[rows_B1, tokens].max(real_BT)
    answer = Answer(
        tokens=jnp.full((batch, room), -1, jnp.int32),
        log_probs=jnp.zeros((batch, room), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        done=jnp.zeros((batch,), bool),
        keys=jax.vmap(jax.random.fold_in, (0, None))(jnp.broadcast_to(key, (batch,)), 0),
        used=used,
    )
    return _draw(logits, answer, rules)


def _draw(logits: Float[Array, "B V"], answer: Answer, rules: Rules) -> Answer:
    keys = jax.vmap(jax.random.fold_in, (0, None))(answer.keys, answer.count)
    token_B, log_prob_B = sample(logits, keys, answer.used, rules.switches, rules.values)
    token_B = jnp.where(answer.done, -1, token_B)
    log_prob_B = jnp.where(answer.done, 0.0, log_prob_B)
    used = answer.used
    if used is not None:
        used = used.at[jnp.arange(token_B.shape[0]), jnp.maximum(token_B, 0)].max(~answer.done)
    start = (0, answer.count)
    return answer.replace(
        tokens=lax.dynamic_update_slice(answer.tokens, token_B[:, None], start),
        log_probs=lax.dynamic_update_slice(answer.log_probs, log_prob_B[:, None], start),
        count=answer.count + 1,
        done=answer.done | (token_B[:, None] == rules.eos).any(-1),
        used=used,
    )


def decode(
    model: Model, cache: Cache, answer: Answer, rules: Rules, steps: int
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
    model: Model,
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
    model: Model,
    cache: Cache,
    answer: Answer,
    rules: Rules,
    recompress: Recompress,
    ratio: Ratio | None,
) -> tuple[Cache, Answer]:
    """The whole answer, with the cache compressed again before every segment but the first.

    The outer loop's state holds the slots; in the inner one, `decode`, they are a constant.

    Args:
      cache, ratio: from `open_answer`; the tail has room for a segment.
      answer: from `start_answer`.
    """

    def unfinished(current: Answer):
        return (current.count < current.tokens.shape[1]) & ~current.done.all()

    def segment(state):
        slots, tail, next_positions, current = state
        now = cache.replace(slots=slots, tail=tail, next_positions=next_positions)
        now, current = decode(model, now, current, rules, recompress.every)

        def compress_again(state):
            slots, tail, _ = state
            full = now.replace(slots=slots, tail=tail)
            full = evict(full, ratio, recompress, model.config.sliding_windows)
            return full.slots, full.tail, jnp.array(False)

        # Once or not at all: a conditional would copy the slots, a loop's state stays in place.
        more = unfinished(current)
        state = lax.while_loop(lambda s: s[-1], compress_again, (now.slots, now.tail, more))
        return *state[:2], now.next_positions, current

    state = cache.slots, cache.tail, cache.next_positions, answer
    slots, tail, next_positions, answer = lax.while_loop(
        lambda state: unfinished(state[-1]), segment, state
    )
    return cache.replace(slots=slots, tail=tail, next_positions=next_positions), answer


def close_answer(
    model: Model,
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
    cache = settle(cache)
    return cache.replace(tail=compact(forget(cache.tail)))


def kept_entries(cache: Cache) -> Int[Array, "B L K"]:
    """Entries of the prompt that each row, layer and head keeps; answers' do not count."""
    counts = cache.counts
    if cache.slots is not None and cache.slots.table is not None:
        counts = entries_of_prompt(cache.slots, cache.prompt_lengths)
    return jnp.broadcast_to(counts, (cache.batch, *counts.shape[1:]))


def drawn(array: Array, tokens: Array, start: int, end: int) -> list[list]:
    """Each row's entries of columns start..end - 1 where a token was drawn."""
    block, masks = np.asarray(array[:, start:end]), np.asarray(tokens[:, start:end]) >= 0
    return [row[mask].tolist() for row, mask in zip(block, masks, strict=True)]
