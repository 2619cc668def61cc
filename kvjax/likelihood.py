"""Teacher-forced scoring: how well a compressed prefix still predicts what follows.

B batch, T padded tokens after the prefix, C tokens of a block, V vocabulary.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from kvjax import sharding
from kvjax.cache.state import with_room
from kvjax.config import CompressionConfig, check_config
from kvjax.exact import always_32_bits
from kvjax.generation import prefill
from kvjax.generation.prefilled import PrefilledPrompts
from kvjax.generation.programs import Program
from kvjax.generation.request import FULL, check_rows
from kvjax.generation.sampling import row_keys
from kvjax.inputs.multimodal import Pictures, by_prompt, prepare_inputs
from kvjax.inputs.prompts import ModelInputs, as_rows, pad
from kvjax.model_interface import Images, Model

Document = tuple[list[int], int]  # tokens, prefix


@dataclass(frozen=True)
class Scored:
    """One text's score.

    Attributes:
      nll: negative log-likelihood (nats) of every token after the prefix.
      top1: the likeliest token at each of those places.
      kept: entries of the prefix that were held, over all layers and heads.
      positions: their positions, one `[K][entries]` list a layer; empty unless asked for.
    """

    nll: list[float]
    top1: list[int]
    kept: int
    positions: list[list[list[int]]]


@always_32_bits
def score(
    model: Model,
    tokens: Sequence[int] | Sequence[Sequence[int]],
    prefix_length: int | Sequence[int],
    config: CompressionConfig = FULL,
    *,
    seed: int | Sequence[int] = 0,
    positions: bool = False,
    pad_to: tuple[int, int] = (0, 0),
    images: Pictures | None = None,
    prefilled: PrefilledPrompts | None = None,
) -> list[Scored]:
    """NLL of what follows a prefix whose cache is compressed once.

    The prefix is prefilled and compressed; the tokens after it run against the compressed cache
    at their true positions, with nothing more evicted (but for PrefixKV's ratio). The first
    target's NLL comes from the uncompressed prefill. Where the model scales rotary frequencies by
    length they are chosen for the whole text.

    Args:
      tokens: ids of a text, or of several.
      prefix_length: tokens of the prefix, one number or one a text; 1 .. length - 1.
      seed: of the `random` scorer, one number or one a text.
      positions: whether to return which entries were kept.
      pad_to: least tokens that prefixes, and what follows them, are padded to, so that batches of
        other texts share one compiled program. It changes no result.
      images: of a vision-language model, as in `generate`, all of them in the prefix; its length
        counts tokens as they are given, be it one for an image or one for each of its features.
      prefilled: the prefixes, from `kvjax.prefill_prompts`, to be read once for many configs.

    Raises:
      ValueError: a prefix outside that range, an id outside the vocabulary, a text longer than
        the model's context.
    """
    check_config(config)
    inputs, rests = _divided(model, tokens, prefix_length, config, images)
    prompt, lengths = pad(inputs.rows, pad_to[0])
    after, counts = pad(rests, pad_to[1])
    key, how = row_keys(seed, len(rests)), {"config": config, "positions": positions}
    if prefilled is None:
        rest = after, counts, key, inputs.images(prompt)
        rope_length = prefill.rope_lengths(model, lengths, counts)
        found = _score_program(model, prompt, lengths, *rest, rope_length, **how)
    else:
        _check_prefixes(model, prefilled, inputs.rows, config, counts)
        found = _score_prefilled_program(model, prefilled.arrays, after, counts, key, **how)
    nll, top1, counts_BLK, kept = found
    nll, top1 = np.asarray(nll), np.asarray(top1)  # sliced here, not row by row on the device
    entries, held = np.asarray(counts_BLK).sum((1, 2)), np.asarray(kept)
    return [
        Scored(
            nll=nll[index, :count].tolist(),
            top1=top1[index, :count].tolist(),
            kept=int(entries[index]),
            positions=[[np.flatnonzero(head).tolist() for head in layer] for layer in held[index]]
            if positions
            else [],
        )
        for index, count in enumerate(counts)
    ]


def _divided(
    model: Model,
    tokens: Sequence[int] | Sequence[Sequence[int]],
    prefix_length: int | Sequence[int],
    config: CompressionConfig,
    images: Pictures | None,
) -> tuple[ModelInputs, list[list[int]]]:
    """Prefixes, with their images' places expanded, and what follows them, all checked."""
    pictures = by_prompt(images, tokens, model)
    rows = as_rows(tokens, vocab_size=model.config.vocab_size)
    if isinstance(prefix_length, int | np.integer):
        prefix_length = [int(prefix_length)] * len(rows)
    prefixes = [int(prefix) for prefix in prefix_length]
    if len(prefixes) != len(rows):
        raise ValueError(f"prefix_length has {len(prefixes)} entries, expected {len(rows)}")
    for index, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        if not 1 <= prefix < len(row):
            raise ValueError(
                f"prefix_length={prefix} of text {index}, expected 1 to {len(row) - 1}"
                f" (it has {len(row)} tokens)"
            )
    # Every token after the prefix is a target; all but the last are inputs too.
    heads = [row[:prefix] for row, prefix in zip(rows, prefixes, strict=True)]
    rests = [row[prefix:] for row, prefix in zip(rows, prefixes, strict=True)]
    inputs = prepare_inputs(model, heads, pictures)
    check_rows(model, inputs.rows, config)
    check_rows(model, [[*a, *b] for a, b in zip(inputs.rows, rests, strict=True)], FULL)
    prepare_inputs(model, rests, None)  # no image stands after the prefix
    return inputs, rests


def _check_prefixes(
    model: Model,
    prefilled: PrefilledPrompts,
    rows: list[list[int]],
    config: CompressionConfig,
    counts,
):
    prefilled.check(model, config)
    prefilled.check_following(counts)
    if prefilled.inputs.rows != rows:
        raise ValueError("prefilled holds other prompts, expected the prefixes of these texts")


def batches(
    documents: Sequence[Document], size: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Indices of at most `size` documents at once, and what `kvjax.score` pads them to.

    A program is compiled for each shape. So documents are grouped by the octaves of their prefix
    and of what follows, every batch of a group has one shape, and the last one is filled up with a
    repeated document.
    """
    lengths = [(prefix, len(tokens) - prefix) for tokens, prefix in documents]
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (prefix, rest) in enumerate(lengths):
        groups[(prefix - 1).bit_length(), (rest - 1).bit_length()].append(index)
    for group in groups.values():
        count = math.ceil(len(group) / size)
        rows = math.ceil(len(group) / count)
        pad_to = max(lengths[i][0] for i in group), max(lengths[i][1] for i in group)
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            yield part + part[-1:] * (rows - len(part)), pad_to


_Found = tuple[
    Float[Array, "B T"], Int[Array, "B T"], Int[Array, "B L K"], Bool[Array, "B L K P"] | None
]


@partial(Program, static_argnames=("config", "positions"))
def _score_program(
    model: Model,
    prompt: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    after: Int[Array, "B T"],
    counts: Int[Array, " B"],
    key: Key[Array, "*row"],
    images: Images | None = None,
    rope_length: Int[Array, " B"] | None = None,
    *,
    config: CompressionConfig,
    positions: bool,
) -> _Found:
    logits_BV, cache = prefill.prefill_compress(
        model, prompt, lengths, key, config, images, rope_length
    )
    width = prompt.shape[1] if positions else None
    return _followed(model, logits_BV, cache, after, counts, width)


@partial(Program, static_argnames=("config", "positions"))
def _score_prefilled_program(
    model: Model,
    prompts: prefill.Prefilled,
    after: Int[Array, "B T"],
    counts: Int[Array, " B"],
    key: Key[Array, "*row"],
    *,
    config: CompressionConfig,
    positions: bool,
) -> _Found:
    cache = prefill.compress_prefilled(prompts, model.config.sliding_windows, key, config)
    width = prompts.keys[0].shape[1] if positions else None
    return _followed(model, prompts.logits, cache, after, counts, width)


def _followed(model, logits_BV, cache, after, counts, width) -> _Found:
    """What follows prompts, against their cache; positions of a bucket of `width` where asked."""
    batch, tokens = after.shape
    block = min(prefill.BLOCK, tokens)
    blocks = -(-tokens // block)
    after_BT = jnp.pad(after, ((0, 0), (0, blocks * block - tokens + 1)))
    cache = with_room(cache, blocks * block)

    def score_block(state, start):
        tail, next_positions = state
        now = cache.replace(tail=tail, next_positions=next_positions)
        inputs_BC = lax.dynamic_slice_in_dim(after_BT, start, block, axis=1)
        targets_BC = lax.dynamic_slice_in_dim(after_BT, start + 1, block, axis=1)
        x_BCD, now = model.extend(inputs_BC, jnp.clip(counts - 1 - start, 0, block), now)
        return (now.tail, now.next_positions), _judge(model.logits(x_BCD), targets_BC)

    starts = jnp.arange(blocks) * block
    _, later = lax.scan(score_block, (cache.tail, cache.next_positions), starts)
    first = _judge(logits_BV[:, None], after_BT[:, :1])
    nll_BT, top1_BT = (
        jnp.concatenate([head, rest.swapaxes(0, 1).reshape(batch, -1)], axis=1)[:, :tokens]
        for head, rest in zip(first, later, strict=True)
    )
    kept = None if width is None else cache.kept_mask(width)
    return sharding.replicated((nll_BT, top1_BT, cache.counts, kept))


def _judge(
    logits: Float[Array, "B C V"], targets: Int[Array, "B C"]
) -> tuple[Float[Array, "B C"], Int[Array, "B C"]]:
    """Each target's NLL, and the likeliest token."""
    log_probs = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return nll, jnp.argmax(logits, axis=-1).astype(jnp.int32)
