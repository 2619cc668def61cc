"""KVzip: what a prompt's repetition attends to (Kim et al. 2025, arXiv 2505.23416, section 3).

After its prefill the prompt is run once more, after itself, against its own full cache, in chunks:

    [instruction] [the 8 tokens before the chunk] [the chunk]    at positions length, length + 1, ..

The importance of an entry is the most attention that it gets from any of these queries, of any
query head of its group, in a softmax over the sinks, the entry's chunk and the repetition itself. A
sliding-window layer's query sees of these what lies in its window, as it does in the model: what no
repetition can look back to is worth 0 there, and will be out of sight soon after the prompt.

B batch, T prompt tokens, U tokens of a repetition, C tokens of a chunk, W tokens run at once,
N query heads, K KV heads, G = N // K, H head dim.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kvjax.cache.padded import full_layer
from kvjax.cache.state import Cache
from kvjax.cache.tail import empty_tail, remember
from kvjax.model_interface import NO_IMAGES, ImageFeatures, Model, Repeat

# Tokens before a chunk that say where it begins.
LEAD = 8
# Tokens of a repetition that are run at once.
BLOCK = 128


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
    layers = tuple(full_layer(k, v, lengths) for k, v in zip(keys, values, strict=True))
    cache = Cache(
        layers=layers,
        tail=remember(empty_tail(layers, texts.shape[-1]), BLOCK, model.config.num_heads),
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
            part_BW = lax.dynamic_slice_in_dim(text_BU, start, BLOCK, axis=1)
            again = NO_IMAGES
            if place_BU is not None:
                place_BW = lax.dynamic_slice_in_dim(place_BU, start, BLOCK, axis=1)
                again = ImageFeatures(features.vectors, place_BW)
            _, now = model.extend(part_BW, jnp.clip(count_B - start, 0, BLOCK), now, again)
            scores = [
                _raised(score, k, now, layer, first, width, repeat.sinks, window)
                for layer, (score, k, window) in enumerate(zip(scores, keys, windows, strict=True))
            ]
            return (scores, now.tail, now.next_positions), None

        starts = jnp.arange(0, text_BU.shape[1], BLOCK)
        (scores, _, _), _ = lax.scan(block, (scores, cache.tail, lengths), starts)
        return scores, None

    batch, prompt_tokens, kv_heads, _ = keys[0].shape
    nothing = [jnp.zeros((batch, kv_heads, prompt_tokens), jnp.float32) for _ in keys]
    firsts = jnp.arange(texts.shape[0]) * width
    return lax.scan(chunk, nothing, (texts, places, counts, firsts))[0]


def _repetitions(tokens, lengths, width, instructions):
    """What is said for each chunk, `[chunks, B, U]` in whole blocks, and its real tokens.

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
    longest += -longest % BLOCK
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
    q_BWKGH = q_BWNH.reshape(batch, q_BWNH.shape[1], kv_heads, -1, head_dim)
    start = jnp.minimum(first, tokens - width)  # the last chunk is short
    place_C = start + jnp.arange(width)
    k_BCKH = lax.dynamic_slice_in_dim(k_BTKH, start, width, axis=1)
    chunk_BC = (place_C >= first) & (place_C < cache.prompt_lengths[:, None])
    chunk_BC &= place_C >= sinks  # each entry once in a softmax
    k_BXKH = k_BTKH[:, :sinks]
    place_X = jnp.arange(k_BXKH.shape[1])
    real_BX = place_X < cache.prompt_lengths[:, None]

    def logits(k, equation):
        s = jnp.einsum(equation, q_BWKGH, k, preferred_element_type=jnp.float32)
        return s * head_dim**-0.5

    def in_sight(mask_B1S, places):
        """Of real keys `[B, 1 or W, S]` those that each query sees, `[B, 1, 1, W, S]`."""
        back_BWS = at_BW[..., None] - places
        seen_BWS = mask_B1S & (back_BWS >= 0)
        return (seen_BWS if window is None else seen_BWS & (back_BWS < window))[:, None, None]

    own_B1U = tail.positions[:, None]
    masked = [
        (logits(k_BCKH, "BWKGH,BCKH->BKGWC"), in_sight(chunk_BC[:, None], place_C)),
        (logits(k_BXKH, "BWKGH,BXKH->BKGWX"), in_sight(real_BX[:, None], place_X)),
        (logits(tail.keys[layer], "BWKGH,BKUH->BKGWU"), in_sight(own_B1U >= 0, own_B1U)),
    ]
    parts = [jnp.where(mask, s, -jnp.inf) for s, mask in masked]
    peak = jnp.max(jnp.stack([s.max(-1, initial=-jnp.inf) for s in parts]), axis=0)[..., None]
    safe = jnp.where(peak == -jnp.inf, 0.0, peak)
    exps = [jnp.exp(s - safe) for s in parts]
    total = jnp.sum(jnp.stack([e.sum(-1, keepdims=True) for e in exps]), axis=0)
    asked_BW = (at_BW >= 0)[:, None, None, :, None]
    most_BKC, most_BKX = (
        jnp.where(asked_BW, e / jnp.where(total > 0, total, 1.0), 0.0).max((2, 3)) for e in exps[:2]
    )
    old_BKC = lax.dynamic_slice_in_dim(scores_BKT, start, width, axis=2)
    new_BKC = jnp.where(chunk_BC[:, None], jnp.maximum(old_BKC, most_BKC), old_BKC)
    scores_BKT = lax.dynamic_update_slice_in_dim(scores_BKT, new_BKC, start, axis=2)
    said_BX = real_BX & (place_X >= first) & (place_X < first + width)
    old_BKX = scores_BKT[..., :sinks]
    new_BKX = jnp.where(said_BX[:, None], jnp.maximum(old_BKX, most_BKX), old_BKX)
    return scores_BKT.at[..., :sinks].set(new_BKX)
