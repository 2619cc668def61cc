"""KVzip: what a prompt's repetition attends to (Kim et al. 2025, arXiv 2505.23416, section 3).

After its prefill the prompt is run once more, after itself, against its own full cache, in chunks:

    [instruction] [the 8 tokens before the chunk] [the chunk]    at positions length, length + 1, ..

The importance of an entry is the most attention that it gets from any of these queries, of any
query head of its group, in a softmax over the sinks, the entry's chunk and the repetition itself. A
sliding-window layer's query sees of these what lies in its window, as it does in the model: what no
repetition can look back to is worth 0 there, and will be out of sight soon after the prompt.

B batch, T prompt tokens, U tokens of a repetition, C tokens of a chunk, S sinks, W tokens run at
once, N query heads, K KV heads, G = N // K, H head dim; X = G W queries of a KV head, in columns (a
CPU finds the largest of many columns at once).
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.cache.padded import full_layer
from kvjax.cache.state import Cache
from kvjax.cache.tail import Tail, empty_tail, remember
from kvjax.model_interface import NO_IMAGES, ImageFeatures, Model, Repeat

# Tokens before a chunk that say where it begins.
LEAD = 8
# Most tokens of a repetition that are run at once: a chunk of 2,048 tokens with what leads to it
# takes 13 parts of 160, and hardly any padding.
BLOCK = 160
_STEP = 16  # parts are multiples of it


def reconstruction_scores(
    model: Model,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    keys: Sequence[Float[Array, "B T K H"]],
    values: Sequence[Float[Array, "B T K H"]],
    repeat: Repeat,
    features: ImageFeatures = NO_IMAGES,
) -> list[Float[Array, "B K T"]]:
    """Importance in [0, 1] of each entry of every layer; 0 for padding.

    Sinks are scored as any entry of their chunk: a prompt whose budget protects fewer of them
    chooses among the others.

    Costs about one more prefill: every token passes through the model again, against the whole
    prompt rather than what is before it. Positions go past the prompt by a chunk and what leads to
    it, whatever the model's context; nothing of it stays in the cache.

    Args:
      model: the decoder.
      tokens: prompts padded on the right.
      lengths: their real tokens.
      keys, values: every layer's, from the prefill.
      repeat: chunk, instructions, sinks.
      features: the prompt's images, whose features are repeated with their tokens; at successive
        positions, as text, where the rotary embedding had them in rows and columns.
    """
    width, windows = min(repeat.chunk, tokens.shape[1]), model.config.sliding_windows
    instructions = [jnp.array(ids, jnp.int32) for ids in repeat.instructions]
    texts, counts = _repetitions(tokens, lengths, width, instructions)
    places = None
    if features.places is not None:
        silent = [jnp.full_like(ids, -1) for ids in instructions]
        places, _ = _repetitions(features.places, lengths, width, silent)
    size = texts.shape[-1] // -(-texts.shape[-1] // BLOCK)
    layers = tuple(full_layer(k, v, lengths) for k, v in zip(keys, values, strict=True))
    cache = Cache(
        layers=layers,
        tail=remember(empty_tail(layers, texts.shape[-1]), size, model.config.num_heads),
        prompt_lengths=lengths,
        next_positions=lengths,
        rotary_shift=features.shift,
        rope_length=features.rope_length,
    )

    def chunk(scores, xs):
        text_BU, place_BU, count_B, first = xs

        def block(state, start):
            scores, tail, next_positions = state
            now = cache.replace(tail=tail, next_positions=next_positions)
            part_BW = lax.dynamic_slice_in_dim(text_BU, start, size, axis=1)
            again = NO_IMAGES
            if place_BU is not None:
                place_BW = lax.dynamic_slice_in_dim(place_BU, start, size, axis=1)
                again = ImageFeatures(features.vectors, place_BW)
            _, now = model.extend(part_BW, jnp.clip(count_B - start, 0, size), now, again)
            scores = [
                _raised(score, k, now, layer, first, width, repeat.sinks, window)
                for layer, (score, k, window) in enumerate(zip(scores, keys, windows, strict=True))
            ]
            return (scores, now.tail, now.next_positions), None

        starts = jnp.arange(0, text_BU.shape[1], size)
        (scores, _, _), _ = lax.scan(block, (scores, cache.tail, lengths), starts)
        return scores, None

    batch, prompt_tokens, kv_heads, _ = keys[0].shape
    nothing = [jnp.zeros((batch, kv_heads, prompt_tokens), jnp.float32) for _ in keys]
    firsts = jnp.arange(texts.shape[0]) * width
    return lax.scan(chunk, nothing, (texts, places, counts, firsts))[0]


def _repetitions(tokens, lengths, width, instructions):
    """What is said for each chunk, `[chunks, B, U]` in whole parts, and its real tokens.

    `instructions` come before the first chunk, and before each of the others.
    """
    batch, prompt_tokens = tokens.shape
    texts, counts = [], []
    for first in range(0, prompt_tokens, width):
        instruction = instructions[first > 0]
        lead_BX = tokens[:, max(0, first - LEAD) : first]
        chunk_BC = tokens[:, first : first + width]
        before = instruction.shape[0] + lead_BX.shape[1]
        said_B = jnp.clip(lengths - first, 0, width)
        counts.append(jnp.where(said_B > 0, before + said_B, 0))
        repeated = jnp.broadcast_to(instruction, (batch, instruction.shape[0]))
        texts.append(jnp.concatenate([repeated, lead_BX, chunk_BC], axis=1))
    longest = max(text.shape[1] for text in texts)
    step = -(-longest // BLOCK) * _STEP
    longest += -longest % step
    padded = [jnp.pad(text, ((0, 0), (0, longest - text.shape[1]))) for text in texts]
    return jnp.stack(padded), jnp.stack(counts)


def _raised(
    scores_BKT, k_BTKH, cache: Cache, layer: int, first, width: int, sinks: int, window: int | None
):
    """A layer's scores, raised by the attention of the queries that the tail remembers."""
    batch, tokens, kv_heads, head_dim = k_BTKH.shape
    tail = cache.tail
    q_BWNH, at_BW = tail.queries[layer], tail.query_positions
    assert at_BW is not None  # `remember` made both
    queries = q_BWNH.shape[1]
    q_BKHX = q_BWNH.reshape(batch, queries, kv_heads, -1, head_dim).transpose(0, 2, 4, 3, 1)
    q_BKHX = q_BKHX.reshape(batch, kv_heads, head_dim, -1)
    group = q_BKHX.shape[3] // queries
    start = jnp.minimum(first, tokens - width)  # the last chunk is short
    place_C = start + jnp.arange(width)
    chunk_BC = (place_C >= first) & (place_C < cache.prompt_lengths[:, None])
    chunk_BC &= place_C >= sinks  # each entry once in a softmax
    place_S = jnp.arange(min(sinks, tokens))
    real_BS = place_S < cache.prompt_lengths[:, None]

    def attended(k_BCKH, mask_BC, places):
        """Scores of real keys in rows, and of queries in columns; -inf for what is out of sight."""
        s_BKCX = jnp.einsum("BCKH,BKHX->BKCX", k_BCKH, q_BKHX, preferred_element_type=jnp.float32)
        s_BKCX = s_BKCX * head_dim**-0.5
        seen_BCW = mask_BC[..., None]
        if window is not None:
            seen_BCW = seen_BCW & (at_BW[:, None] - places[..., None] < window)
            seen_BCW = jnp.tile(seen_BCW, group)
        return jnp.where(seen_BCW[:, None], s_BKCX, -jnp.inf)

    of_chunk_BKCX = attended(
        lax.dynamic_slice_in_dim(k_BTKH, start, width, axis=1), chunk_BC, place_C
    )
    of_sinks_BKSX = attended(k_BTKH[:, : len(place_S)], real_BS, place_S)
    lse_BKX = jnp.logaddexp(_lse(of_chunk_BKCX), _lse(of_sinks_BKSX))
    lse_BKX = jnp.logaddexp(lse_BKX, _lse_of_tail(q_BKHX, at_BW, tail, layer, window))
    # What is padding asks nothing.
    lse_BKX = jnp.where(jnp.tile(at_BW >= 0, group)[:, None], lse_BKX, jnp.inf)
    most_BKC, most_BKS = (
        jnp.exp((s_BKCX - lse_BKX[:, :, None]).max(3)) for s_BKCX in (of_chunk_BKCX, of_sinks_BKSX)
    )
    old_BKC = lax.dynamic_slice_in_dim(scores_BKT, start, width, axis=2)
    new_BKC = jnp.where(chunk_BC[:, None], jnp.maximum(old_BKC, most_BKC), old_BKC)
    scores_BKT = lax.dynamic_update_slice_in_dim(scores_BKT, new_BKC, start, axis=2)
    said_BS = real_BS & (place_S >= first) & (place_S < first + width)
    old_BKS = scores_BKT[..., :sinks]
    new_BKS = jnp.where(said_BS[:, None], jnp.maximum(old_BKS, most_BKS), old_BKS)
    return scores_BKT.at[..., :sinks].set(new_BKS)


def _lse(s_BKCX):
    """Log-sum-exp of each column, -inf where all of it is."""
    peak_BKX = s_BKCX.max(2, initial=-jnp.inf)
    safe_BKX = jnp.where(peak_BKX == -jnp.inf, 0.0, peak_BKX)
    return safe_BKX + jnp.log(jnp.exp(s_BKCX - safe_BKX[:, :, None]).sum(2))


def _lse_of_tail(q_BKHX, at_BW, tail: Tail, layer: int, window: int | None):
    """Log-sum-exp of each query's scaled scores of what was repeated up to it."""
    block = at_BW.shape[1]

    def step(index, lse_BKX):
        def cut(x, axis):
            return lax.dynamic_slice_in_dim(x, index * block, block, axis)

        s_BKUX = jnp.einsum(
            "BKUH,BKHX->BKUX",
            cut(tail.keys[layer], 2),
            q_BKHX,
            preferred_element_type=jnp.float32,
        )
        s_BKUX = s_BKUX * q_BKHX.shape[2] ** -0.5
        own_BU1 = cut(tail.positions, 1)[..., None]
        back_BUW = at_BW[:, None] - own_BU1
        seen_BUW = (own_BU1 >= 0) & (back_BUW >= 0)
        seen_BUW = seen_BUW if window is None else seen_BUW & (back_BUW < window)
        s_BKUX = jnp.where(jnp.tile(seen_BUW, q_BKHX.shape[3] // block)[:, None], s_BKUX, -jnp.inf)
        return jnp.logaddexp(lse_BKX, _lse(s_BKUX))

    nothing = jnp.full(q_BKHX.shape[:2] + q_BKHX.shape[3:], -jnp.inf, jnp.float32)
    return lax.fori_loop(0, tail.cursor // block, step, nothing)
