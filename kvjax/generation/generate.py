"""generate() and compress_prompt(): what users call, one compiled program each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from kvjax.cache.history import BEGUN, extended
from kvjax.cache.origin import fingerprint
from kvjax.cache.state import Cache
from kvjax.config import CompressionConfig, Recompress, check_config
from kvjax.exact import always_32_bits
from kvjax.generation.decode import Answer, Held, drawn
from kvjax.generation.detokenize import cut_at_stop
from kvjax.generation.prefill import rope_lengths
from kvjax.generation.prefilled import PrefilledPrompts, refuse_beside
from kvjax.generation.programs import (
    answer_program,
    compress_program,
    generate_program,
    prefill_compress_program,
)
from kvjax.generation.request import (
    FULL,
    Options,
    Request,
    check_rows,
    following,
    handed_back,
    instructed,
)
from kvjax.generation.sampling import Sampling, row_keys
from kvjax.generation.stream import CHUNK, closed, stages
from kvjax.inputs.chat import Messages
from kvjax.inputs.multimodal import Pictures
from kvjax.inputs.prompts import Ends, Prompts, bucket, pad
from kvjax.inputs.read import read
from kvjax.model_interface import Model
from kvjax.sharding import place


@dataclass(frozen=True)
class Generation:
    """Answers, one a row.

    Attributes:
      tokens: ids drawn, the end-of-sequence token included where one was drawn.
      log_probs: of each of them under the model itself (before temperature and filters).
      text: what continues the prompt's text, without special tokens, cut before a stop string;
        None without a tokenizer.
      kept: `[B, L, K]` entries of the prompt that each row, layer and head held.
      cache_bytes: bytes of keys and values held for the prompts, empty slots included; what several
        questions of one prompt share counts once.
      full_cache_bytes: what the uncompressed prompts' buckets would take.
      cache: the cache with question and answer, where it was asked for.
    """

    tokens: list[list[int]]
    log_probs: list[list[float]]
    text: list[str] | None
    kept: np.ndarray
    cache_bytes: int
    full_cache_bytes: int
    cache: Cache | None = None


def generate(
    model: Model,
    prompts: Prompts | PrefilledPrompts | None = None,
    config: CompressionConfig = FULL,
    *,
    max_new_tokens: int,
    tokenizer: Any = None,
    sampling: Sampling | Literal["model"] | None = None,
    seed: int | Sequence[int] = 0,
    eos_ids: Ends | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    messages: Messages | None = None,
    template_args: Mapping[str, Any] | None = None,
    attention_mask: np.ndarray | None = None,
    images: Pictures | None = None,
    cache: Cache | None = None,
    return_cache: bool = False,
    recompress: Recompress | None = None,
    mesh: Mesh | None = None,
) -> Generation:
    """Answer prompts with a compressed cache, in one compiled program.

    Args:
      model: from `kvjax.load`.
      prompts: a text or texts, token ids or rows of them, or a padded `[B, T]` array; what
        `prefill_prompts` made of them; None beside messages.
      config: what to keep; everything by default.
      max_new_tokens: most tokens to draw a row, at least 1. A model that scales rotary frequencies
        by length (dynamic NTK, LongRoPE) has a row's chosen for its prompt and as many tokens more.
      tokenizer: from `kvjax.load`; needed for text and for `stop`.
      sampling: greedy by default; "model" for what the checkpoint's `generation_config.json`
        suggests.
      seed: of sampling, and of the `random` scorer: one number, or one a row. A row draws the same
        alone and in any batch; rows of one prompt need seeds of their own to differ.
      eos_ids: token or tokens that end a row; the model's own by default, () for none.
      stop: string or strings that end a row and are cut off (looked for on the host, every few
        tokens); one may be a special token, such as "<|im_end|>".
      chat: each text is the user's turn: the only one, or the one that follows a cache of turns.
      messages: a conversation, or a list of them, in place of prompts: turns with role and content.
        Beside a cache of turns those that follow it, or all from the first on. Where the template
        writes an earlier turn otherwise than it was read, a warning names the turn.
      template_args: of the chat template, such as {"enable_thinking": False}.
      attention_mask: 1 for the real tokens of a padded array, on either side.
      images: of a vision-language model: each prompt's PIL images, paths or uint8 arrays
        `[height, width, 3]`, in the order of the image tokens that stand for them (`<image>` of
        LLaVA); a list for one prompt, a list of lists for several.
      cache: a cache from `compress_prompt` or from an earlier answer, which the prompts
        continue; a cache of one row serves any number of prompts. It is not changed. `config`
        has no effect then. Another model's is refused.
      return_cache: also hand back the cache with the answer in it, for the next turn.
      recompress: compress again and again while decoding, so that an answer of any length needs
        no more memory; the cache is packed then.
      mesh: with axes `data` and `model`, to split the model and the batch over; where the model
        lies by default (`kvjax.load(mesh=)`).

    Raises:
      ValueError: a wrong argument, named with its value and what was expected.
    """
    model = place(model, mesh)
    options = Options(
        max_new_tokens=max_new_tokens, tokenizer=tokenizer, sampling=sampling, seed=seed,
        eos_ids=eos_ids, stop=stop, chat=chat, messages=messages, template_args=template_args,
        attention_mask=attention_mask, images=images, cache=cache, recompress=recompress,
    )  # fmt: skip
    request = Request.make(model, prompts, config, options)
    if stop or request.prefilled is not None:
        return _collect(model, request, return_cache)
    common = {
        "new_tokens": max_new_tokens,
        "tail_slots": request.tail_slots,
        "whole": return_cache,
        "recompress": recompress,
    }
    arrays = request.tokens, request.lengths, request.key, request.rules
    prompt = request.images, request.rope_length
    if request.cache is None:
        found = generate_program(model, *arrays, *prompt, config=request.config, **common)
    else:
        found = answer_program(model, request.cache, *arrays, **common)
    return as_generation(model, request, *found)


@always_32_bits
def compress_prompt(
    model: Model,
    prompts: Prompts | PrefilledPrompts | None = None,
    config: CompressionConfig = FULL,
    *,
    tokenizer: Any = None,
    seed: int | Sequence[int] = 0,
    messages: Messages | None = None,
    template_args: Mapping[str, Any] | None = None,
    attention_mask: np.ndarray | None = None,
    images: Pictures | None = None,
    max_new_tokens: int | Sequence[int] = 0,
    mesh: Mesh | None = None,
) -> Cache:
    """Compress documents once, to ask many questions of (`generate(cache=...)`).

    Arguments as in `generate`, but for `max_new_tokens`: tokens of questions and answers that are
    to follow, one number or one a document. They matter where the model scales rotary frequencies
    by length (dynamic NTK, LongRoPE): a row's are chosen for its document and as many more tokens,
    and stay so, however many follow. The questions are not seen while compressing.

    Raises:
      ValueError: as `generate`; max_new_tokens below 0, or another number of them than documents.
    """
    check_config(config)
    if isinstance(prompts, PrefilledPrompts):
        refuse_beside(
            attention_mask=attention_mask,
            images=images,
            messages=messages,
            template_args=template_args,
        )
        prompts.check_following(following(max_new_tokens, len(prompts.inputs.rows)))
        return _compress_prefilled(place(model, mesh), prompts, config, tokenizer, seed)
    inputs = read(
        model, prompts, images, tokenizer=tokenizer, attention_mask=attention_mask,
        messages=messages, template_args=template_args, answered=False,
    )  # fmt: skip
    model = place(model, mesh)
    check_rows(model, inputs.rows, config)
    tokens, lengths = pad(inputs.rows)
    rope_length = rope_lengths(model, lengths, following(max_new_tokens, len(lengths)))
    config = instructed(config, tokenizer, model.config.vocab_size)
    prompt = tokens, lengths, row_keys(seed, len(lengths)), inputs.images(tokens), rope_length
    cache = prefill_compress_program(model, *prompt, config=config)[1]
    history = extended(BEGUN, inputs.given, inputs.turns)
    return cache.replace(origin=fingerprint(model), history=history)


def _compress_prefilled(model, prompts: PrefilledPrompts, config, tokenizer, seed) -> Cache:
    config = instructed(config, tokenizer, model.config.vocab_size)
    prompts.check(model, config)
    check_rows(model, prompts.inputs.rows, config)
    keys, windows = row_keys(seed, len(prompts.inputs.rows)), model.config.sliding_windows
    cache = compress_program(prompts.arrays, keys, windows=windows, config=config)
    history = extended(BEGUN, prompts.inputs.given, prompts.inputs.turns)
    return cache.replace(origin=prompts.origin, history=history)


# ---------------------------------------------------------------------------- host
def _collect(model: Model, request: Request, return_cache: bool) -> Generation:
    """A stream's end as a Generation: how rows with stop strings and prefilled prompts are run."""
    chunk = request.new_tokens
    if request.stop:  # a cache that is handed back must not hold tokens drawn after a stop string
        chunk = 1 if return_cache else CHUNK
    for _, state in stages(model, request, chunk):  # noqa: B007
        pass
    cache = closed(model, request, state) if return_cache else None
    return as_generation(model, request, state.answer, state.held, cache)


def as_generation(
    model: Model, request: Request, answer: Answer, held: Held, cache: Cache | None
) -> Generation:
    """What came of a request."""
    tokens = drawn(answer.tokens, answer.tokens, 0, answer.tokens.shape[1])
    log_probs = drawn(answer.log_probs, answer.tokens, 0, answer.tokens.shape[1])
    text, answers = None, tokens
    if request.tokenizer is not None:
        cut = [
            cut_at_stop(row, request.tokenizer, request.stop, context)
            for row, context in zip(tokens, request.contexts, strict=True)
        ]
        text = [piece for piece, _ in cut]
        tokens = [row[:count] for row, (_, count) in zip(tokens, cut, strict=True)]
        log_probs = [row[:count] for row, (_, count) in zip(log_probs, cut, strict=True)]
    return Generation(
        tokens=tokens,
        log_probs=log_probs,
        text=text,
        kept=np.asarray(held.kept),
        cache_bytes=held.nbytes,
        full_cache_bytes=_full_bytes(model, request),
        cache=handed_back(cache, model, request, answers, text),
    )


def _full_bytes(model: Model, request: Request) -> int:
    """Bytes of the prompts' keys and values with nothing evicted."""
    config, (batch, tokens) = model.config, request.tokens.shape
    if (cache := request.cache) is not None:
        batch, tokens = batch // cache.shared, bucket(int(cache.prompt_lengths.max()))
    itemsize = model.embed.table_VD[...].dtype.itemsize
    vectors = 2 * config.num_kv_heads * config.num_layers * batch * tokens
    return vectors * config.head_dim * itemsize
